//! The listening side: a thread of its own, with a task for each connection.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::rc::Rc;
use std::thread::JoinHandle;
use std::time::Duration;

use kvferry_core::{Error, ErrorCode, Result};
use kvferry_store::{Departure, Store};
use tokio::sync::oneshot;

use crate::connection::{Unfinished, serve};
use crate::service::{Peer, Service};

/// Connections at most; one more is closed at once.
const CONNECTIONS_MAX: usize = 1024;
/// After `accept` failed (no file descriptor, say) the next try waits this long.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Where a server listens.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// A loopback address, or `localhost` for 127.0.0.1.
    pub host: String,
    /// 0 lets the system choose.
    pub port: u16,
}

/// A listening server. Dropping it closes its connections and waits for its thread.
pub struct Server {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Binds the address, then makes the store (told the address, whose port is then known), then serves
    /// it. Errors: the address is in use, is not
    /// loopback, or whatever `store` says.
    pub fn start(
        options: &ServerOptions,
        store: impl FnOnce(SocketAddr) -> Result<Store>,
    ) -> Result<Self> {
        let listener = bind(options)?;
        let cannot = |error: std::io::Error| Error::system("cannot serve", &error);
        let address = listener.local_addr().map_err(cannot)?;
        listener.set_nonblocking(true).map_err(cannot)?;
        let store = store(address)?;
        let boot_token = store.boot_token();
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(cannot)?;
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("kvferry-server".into())
            .spawn(move || {
                let service = Rc::new(Service::new(store.clone(), boot_token));
                let tasks = tokio::task::LocalSet::new();
                tasks.block_on(&runtime, async move {
                    tokio::select! {
                        () = accept(listener, CONNECTIONS_MAX, &store, service) => {}
                        _ = stopped => {}
                    }
                });
            })
            .map_err(cannot)?;
        Ok(Self { address, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens; the port is the one that the system chose.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(()); // it may have ended
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn bind(options: &ServerOptions) -> Result<TcpListener> {
    let ServerOptions { host, port } = options;
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    // Resolved, localhost may be several addresses: a second server would take the one that the first
    // has left, and libzmq's clients look at this one only.
    let address = match bare {
        "localhost" => Some(Ipv4Addr::LOCALHOST.into()),
        _ => bare.parse().ok().filter(IpAddr::is_loopback),
    };
    let Some(address) = address else {
        return Err(Error::new(
            ErrorCode::UnsupportedOption,
            format!(
                "host {host:?} is not loopback; this version serves 127.0.0.1, ::1 and localhost only"
            ),
        ));
    };
    TcpListener::bind((address, *port)).map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => Error::new(
            ErrorCode::AddressInUse,
            format!("{host}:{port} is in use; stop the server there, or choose another port"),
        ),
        _ => Error::system(format!("cannot listen on {host}:{port}"), &error),
    })
}

async fn accept(
    listener: TcpListener,
    connections_max: usize,
    store: &Store,
    service: Rc<Service>,
) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
    let unfinished = Rc::new(Unfinished::default());
    let connections = Rc::new(());
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            service.drop_message("accept");
            tokio::time::sleep(ACCEPT_RETRY).await;
            continue;
        };
        if Rc::strong_count(&connections) > connections_max {
            service.drop_message("connections");
            continue;
        }
        let _ = stream.set_nodelay(true); // without it answers come late, and still come
        let (store, service) = (store.clone(), Rc::clone(&service));
        let (unfinished, counted) = (Rc::clone(&unfinished), Rc::clone(&connections));
        tokio::task::spawn_local(async move {
            let mut peer =
                Leaving { peer: Peer::new(store.connect()), departure: Departure::GivenUp, store };
            peer.departure = serve(stream, &service, &mut peer.peer, &unfinished).await;
            drop(counted);
        });
    }
}

/// Tells the store when the connection's task ends, however it ends.
struct Leaving {
    peer: Peer,
    departure: Departure,
    store: Store,
}

impl Drop for Leaving {
    fn drop(&mut self) {
        self.store.disconnect(self.peer.owner(), self.departure);
    }
}

#[cfg(test)]
mod tests {
    use kvferry_store::{Limits, Policy, StoreOptions};
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpStream;

    use super::*;

    fn store() -> Store {
        let options = StoreOptions {
            chunk_size: 16,
            memory: 1 << 20,
            shared_name: None,
            policy: Policy::Lru,
            disk: None,
            limits: Limits::default(),
        };
        Store::new(options).unwrap()
    }

    fn start(host: &str, port: u16) -> Result<Server> {
        Server::start(&ServerOptions { host: host.into(), port }, |_| Ok(store()))
    }

    #[tokio::test]
    async fn one_connection_too_many_is_closed_at_once_and_its_end_makes_room() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let store = store();
        let service = Rc::new(Service::new(store.clone(), [0; 16]));
        let clients = async {
            let mut greeting = [0; 64];
            let mut first = TcpStream::connect(address).await.unwrap();
            first.read_exact(&mut greeting).await.unwrap();
            let mut second = TcpStream::connect(address).await.unwrap();
            second.read_exact(&mut greeting).await.unwrap();
            let mut refused = TcpStream::connect(address).await.unwrap();
            assert_eq!(refused.read(&mut greeting).await.unwrap(), 0);
            drop(first);
            loop {
                let mut next = TcpStream::connect(address).await.unwrap();
                if next.read(&mut greeting).await.unwrap() > 0 {
                    return; // the server has noticed that the first one is gone
                }
            }
        };
        let serving = accept(listener, 2, &store, service);
        tokio::task::LocalSet::new()
            .run_until(async {
                tokio::select! {
                    () = serving => {}
                    () = clients => {}
                }
            })
            .await;
    }

    #[test]
    fn only_loopback_is_served_and_localhost_is_one_address() {
        for host in ["0.0.0.0", "192.0.2.1", "::", "example.com", ""] {
            let error = start(host, 0).err().map(|error| error.code);
            assert_eq!(error, Some(ErrorCode::UnsupportedOption), "{host:?}");
        }
        let server = start("localhost", 0).unwrap();
        assert_eq!(server.address().ip(), Ipv4Addr::LOCALHOST);
        let second = start("localhost", server.address().port()).err().map(|error| error.code);
        assert_eq!(second, Some(ErrorCode::AddressInUse));
    }
}
