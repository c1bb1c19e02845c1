//! The listening side: a thread of its own, with a task for each connection.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvferry_core::{Error, ErrorCode, Result};
use kvferry_store::{Departure, Owner, Store};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::connection::{Door, serve};
use crate::figures::Figures;
use crate::http::{Guard, Http, JOBS_MAX, Job};
use crate::notes::Note;
use crate::processes::{Process, Whence};
use crate::quotas::QuotaBook;
use crate::service::{Peer, Service};
use crate::tokens::Tokens;

/// Connections at most; one more is closed at once.
const CONNECTIONS_MAX: usize = 1024;
/// After so long without a word the system asks whether the peer's machine is there.
const IDLE: Duration = Duration::from_secs(60);
/// A machine that has not said for so long that it received what was sent is gone.
#[cfg(target_os = "linux")]
const UNHEARD: Duration = Duration::from_secs(90);
/// Given up peers whose processes are watched at once; slots of others stay apart until they say that they are done.
const WATCHED_MAX: usize = 256;
/// Between two looks at whether they have ended.
const WATCH: Duration = Duration::from_secs(1);
/// For so long a peer's processes are looked for.
const FIND: Duration = Duration::from_secs(5);
/// After `accept` failed (no file descriptor, say) the next try waits this long.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Where a server listens.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// An address, or `localhost` for 127.0.0.1; one that is not loopback needs the next two.
    pub host: String,
    /// 0 lets the system choose.
    pub port: u16,
    /// Others than this machine may reach it.
    pub listen_public: bool,
    /// The file of tokens. `None`: whoever reaches it may do everything.
    pub tokens: Option<PathBuf>,
    /// A Unix socket beside the port, in a directory that its owner alone may enter.
    pub ipc: Option<PathBuf>,
    /// Health, metrics and a page for operators; `None`: no HTTP.
    pub http: Option<HttpOptions>,
    /// The file that keeps the quotas of tenants; it need not be there yet. `None`: they end with the server.
    pub quotas: Option<PathBuf>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".into(),
            port: 0,
            listen_public: false,
            tokens: None,
            ipc: None,
            http: None,
            quotas: None,
        }
    }
}

/// Where a server answers HTTP.
#[derive(Debug, Clone)]
pub struct HttpOptions {
    /// As [`ServerOptions::host`].
    pub host: String,
    /// 0 lets the system choose.
    pub port: u16,
}

/// A listening server. Dropping it closes its connections and waits for its thread.
pub struct Server {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    /// Ends first: it asks the other thread.
    http: Option<Http>,
    store: Store,
    figures: Arc<Figures>,
    /// For the data thread.
    #[cfg(test)]
    jobs: mpsc::Sender<Job>,
}

impl Server {
    /// Binds the address, then makes the store (told the address, whose port is then known), then serves
    /// it. Errors: the address is in use, is not loopback and has not what that needs, the file of quotas or of tokens
    /// is broken, or whatever `store` says.
    pub fn start(
        options: &ServerOptions,
        store: impl FnOnce(SocketAddr) -> Result<Store>,
    ) -> Result<Self> {
        let tokens = options.tokens.as_deref().map(Tokens::open).transpose()?.map(Arc::new);
        let may_be_public = options.listen_public && tokens.is_some();
        let (listener, public) = bind(&options.host, options.port, may_be_public, "")?;
        let bind_http = |http: &HttpOptions| bind(&http.host, http.port, may_be_public, HTTP_HINT);
        let http = options.http.as_ref().map(bind_http).transpose()?;
        let ipc = match &options.ipc {
            #[cfg(unix)]
            Some(path) => Some(crate::ipc::Socket::bind(path)?),
            #[cfg(not(unix))]
            Some(_) => {
                let message = "ipc needs a system with Unix sockets; leave it out";
                return Err(Error::new(ErrorCode::UnsupportedPlatform, message));
            }
            None => None::<Ipc>,
        };
        let cannot = |error: std::io::Error| Error::system("cannot serve", &error);
        let address = listener.local_addr().map_err(cannot)?;
        let store = store(address)?;
        let book = QuotaBook::open(options.quotas.as_deref(), &store)?;
        let (boot_token, labels) = (store.boot_token(), book.labels());
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(cannot)?;
        let (stop, stopped) = oneshot::channel();
        let figures = Arc::new(Figures::new());
        let (jobs, todo) = mpsc::channel(JOBS_MAX);
        let served = (store.clone(), Arc::clone(&figures));
        let door = Door { tokens: tokens.clone(), open: !public };
        let thread = std::thread::Builder::new()
            .name("kvferry-server".into())
            .spawn(move || {
                let (store, figures) = served;
                let service = Service::new(store.clone(), boot_token, Arc::clone(&figures), labels);
                let tasks = tokio::task::LocalSet::new();
                let hall = Hall {
                    connections_max: CONNECTIONS_MAX,
                    store,
                    service: Rc::new(service),
                    figures,
                    watched: Rc::new(Semaphore::new(WATCHED_MAX)),
                };
                tasks.block_on(&runtime, async move {
                    let here = Door { open: true, ..door.clone() };
                    tokio::select! {
                        () = hall.accept(Listener::tcp(listener), &door) => {}
                        () = hall.accept(Listener::ipc(ipc.as_ref()), &here) => {}
                        () = work(todo) => {}
                        _ = stopped => {}
                    }
                });
            })
            .map_err(cannot)?;
        let (stop, thread) = (Some(stop), Some(thread));
        let mut server = Self {
            address,
            stop,
            thread,
            http: None,
            store,
            figures,
            #[cfg(test)]
            jobs: jobs.clone(),
        };
        if let Some(listener) = http {
            let (store, figures) = (server.store.clone(), Arc::clone(&server.figures));
            let (listener, public) = listener;
            let guard = Guard { tokens, public };
            server.http = Some(Http::start(listener, guard, store, figures, book, jobs)?);
        }
        Ok(server)
    }

    /// Where it listens; the port is the one that the system chose.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it answers HTTP.
    pub fn http_address(&self) -> Option<SocketAddr> {
        self.http.as_ref().map(Http::address)
    }

    /// What happened since this was asked last, for a log.
    pub fn take_notes(&self, now: Instant) -> Vec<Note> {
        let (disk, remote) = (self.store.disk_status(), self.store.remote_status());
        self.figures.notes.take(&self.figures(now), disk, remote)
    }

    /// The store's figures, without what the server's own probes of it have added.
    pub fn figures(&self, now: Instant) -> Vec<(&'static str, u64)> {
        self.figures.store(&self.store, now)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.http.take());
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(()); // it may have ended
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Ends the error of a port that is in use.
const HTTP_HINT: &str = " for HTTP (httpPort, --http-port), or none (--http-port off)";

/// A listener that does not block, and whether others than this machine reach it.
fn bind(host: &str, port: u16, may_be_public: bool, hint: &str) -> Result<(TcpListener, bool)> {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    // Resolved, localhost may be several addresses: a second server would take the one that the first
    // has left, and libzmq's clients look at this one only.
    let address: Option<IpAddr> = match bare {
        "localhost" => Some(Ipv4Addr::LOCALHOST.into()),
        _ => bare.parse().ok(),
    };
    let Some(address) = address else {
        return Err(Error::new(
            ErrorCode::UnsupportedOption,
            format!(
                "host {host:?} is no address: give 127.0.0.1, ::1, localhost, or one to be public at"
            ),
        ));
    };
    let public = !address.is_loopback();
    if public && !may_be_public {
        return Err(Error::new(
            ErrorCode::UnsupportedOption,
            format!(
                "host {host:?} is not loopback: others could reach the server there. That needs both listenPublic \
                 (--listen-public) and tokenFile (--token-file FILE); docs/security.md says what they protect"
            ),
        ));
    }
    let cannot = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::AddrInUse => Error::new(
            ErrorCode::AddressInUse,
            format!("{host}:{port} is in use; stop the server there, or choose another port{hint}"),
        ),
        _ => Error::system(format!("cannot listen on {host}:{port}"), &error),
    };
    let listener = TcpListener::bind((address, port)).map_err(cannot)?;
    listener.set_nonblocking(true).map_err(cannot)?;
    Ok((listener, public))
}

/// Does what other threads ask of this one.
async fn work(mut jobs: mpsc::Receiver<Job>) {
    while let Some(job) = jobs.recv().await {
        job();
    }
    std::future::pending::<()>().await; // there is no HTTP: the other branches go on
}

trait Duplex: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Duplex for T {}

#[cfg(unix)]
type Ipc = crate::ipc::Socket;
#[cfg(not(unix))]
type Ipc = std::convert::Infallible;

/// Where peers come in.
enum Listener {
    Tcp(tokio::net::TcpListener),
    #[cfg(unix)]
    Ipc(tokio::net::UnixListener),
}

impl Listener {
    fn tcp(listener: TcpListener) -> Option<Self> {
        tokio::net::TcpListener::from_std(listener).ok().map(Self::Tcp)
    }

    #[cfg(unix)]
    fn ipc(socket: Option<&Ipc>) -> Option<Self> {
        socket.and_then(Ipc::listener).map(Self::Ipc)
    }

    #[cfg(not(unix))]
    fn ipc(_socket: Option<&Ipc>) -> Option<Self> {
        None
    }

    /// A connection, whether it is of another machine, and where it comes from.
    async fn accept(&self) -> std::io::Result<(Box<dyn Duplex>, bool, Whence)> {
        Ok(match self {
            Self::Tcp(listener) => {
                let (stream, from) = listener.accept().await?;
                let _ = stream.set_nodelay(true); // without it answers come late, and still come
                notice_end(&SockRef::from(&stream));
                let here = from.ip().to_canonical();
                let to = stream.local_addr().ok();
                let local = to.map(|to| to.ip().to_canonical());
                let distant = !here.is_loopback() && local != Some(here);
                let whence = to.map_or(Whence::Unknown, |to| Whence::Tcp { from, to });
                (Box::new(stream), distant, whence)
            }
            #[cfg(unix)]
            Self::Ipc(listener) => {
                let stream = listener.accept().await?.0;
                let pid = stream.peer_cred().ok().and_then(|peer| peer.pid()?.try_into().ok());
                let process = pid.and_then(Process::of);
                (Box::new(stream), false, process.map_or(Whence::Unknown, Whence::Process))
            }
        })
    }
}

/// A machine that is gone does not say so, and what it was granted would be kept for ever.
fn notice_end(socket: &SockRef<'_>) {
    let keepalive = TcpKeepalive::new().with_time(IDLE).with_interval(IDLE / 4);
    let _ = socket.set_tcp_keepalive(&keepalive);
    // An answer that is on its way keeps the question from being asked; its repetitions take a quarter of an hour.
    #[cfg(target_os = "linux")]
    let _ = socket.set_tcp_user_timeout(Some(UNHEARD));
}

/// Where all connections of a server are served.
struct Hall {
    connections_max: usize,
    store: Store,
    service: Rc<Service>,
    figures: Arc<Figures>,
    /// Peers that were given up and whose processes are watched.
    watched: Rc<Semaphore>,
}

impl Hall {
    async fn accept(&self, listener: Option<Listener>, door: &Door) {
        let Some(listener) = listener else { return std::future::pending().await };
        let Self { connections_max, store, service, figures, watched } = self;
        loop {
            let Ok((mut stream, distant, whence)) = listener.accept().await else {
                service.drop_message("accept");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            };
            if figures.connections.load(Ordering::Relaxed) >= *connections_max {
                service.drop_message("connections");
                continue;
            }
            let (store, service, door) = (store.clone(), Rc::clone(service), door.clone());
            let watched = Rc::clone(watched);
            figures.connections.fetch_add(1, Ordering::Relaxed);
            let counted = Counted(Arc::clone(figures));
            tokio::task::spawn_local(async move {
                let owner = store.connect();
                let peer = if distant { Peer::distant(owner) } else { Peer::new(owner) };
                let mut peer = Leaving { peer, departure: Departure::GivenUp, store };
                let unfinished = &counted.0.unfinished;
                let serving = serve(&mut stream, &service, &mut peer.peer, unfinished, &door);
                peer.departure = serving.await;
                let (owner, left) = (peer.peer.owner(), peer.give_up());
                let store = peer.store.clone();
                drop(peer);
                if left.is_empty() {
                    return;
                }
                let Ok(watched) = watched.try_acquire() else { return };
                // As long as its end of the connection is open.
                let finding = tokio::task::spawn_blocking(move || whence.processes());
                let processes = tokio::time::timeout(FIND, finding).await;
                drop((stream, counted));
                if let Ok(Ok(processes)) = processes {
                    take_back_after(&store, owner, &processes, left).await;
                }
                drop(watched);
            });
        }
    }
}

/// Counts a connection until its task ends, however it ends.
struct Counted(Arc<Figures>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Tells the store when the connection's task ends, however it ends.
struct Leaving {
    peer: Peer,
    departure: Departure,
    store: Store,
}

impl Leaving {
    fn departure(&self) -> Departure {
        // What writes through its connection alone writes nothing without it.
        let mut departure = self.departure;
        if self.peer.is_distant() {
            departure = Departure::Ended;
        }
        if self.peer.is_ours() && departure == Departure::Ended {
            departure = Departure::Left;
        }
        departure
    }

    /// Instances of which a peer that was given up may still touch slots.
    fn give_up(&self) -> Vec<u64> {
        match self.departure() {
            Departure::GivenUp => self.store.give_up(self.peer.owner()),
            Departure::Ended | Departure::Left => Vec::new(),
        }
    }
}

/// Waits until all the processes have ended, which may be never, or nothing is left of the instances, and takes that back.
async fn take_back_after(
    store: &Store,
    owner: Owner,
    processes: &[Process],
    mut instances: Vec<u64>,
) {
    while !processes.is_empty() {
        instances.retain(|instance| store.is_apart(owner, *instance));
        if instances.is_empty() {
            return;
        }
        if processes.iter().all(|process| process.has_ended()) {
            instances.into_iter().for_each(|instance| store.take_back(owner, instance));
            return;
        }
        tokio::time::sleep(WATCH).await;
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        self.store.disconnect(self.peer.owner(), self.departure());
    }
}

#[cfg(test)]
mod tests {
    use kvferry_store::{Limits, Policy, StoreOptions};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;
    use crate::quotas::Labels;

    fn store() -> Store {
        let options = StoreOptions {
            chunk_size: 16,
            memory: 1 << 20,
            shared_name: None,
            policy: Policy::Lru,
            disk: None,
            remote: None,
            limits: Limits::default(),
        };
        Store::new(options).unwrap()
    }

    fn start(host: &str, port: u16) -> Result<Server> {
        let options = ServerOptions { host: host.into(), port, ..ServerOptions::default() };
        Server::start(&options, |_| Ok(store()))
    }

    #[tokio::test]
    async fn one_connection_too_many_is_closed_at_once_and_its_end_makes_room() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let store = store();
        let figures = Arc::new(Figures::new());
        let service =
            Rc::new(Service::new(store.clone(), [0; 16], Arc::clone(&figures), Labels([0; 32])));
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
        let watched = Rc::new(Semaphore::new(WATCHED_MAX));
        let hall = Hall { connections_max: 2, store, service, figures, watched };
        let door = Door { tokens: None, open: true };
        tokio::task::LocalSet::new()
            .run_until(async {
                tokio::select! {
                    () = hall.accept(Listener::tcp(listener), &door) => {}
                    () = clients => {}
                }
            })
            .await;
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_machine_that_vanished_is_noticed_with_an_answer_on_its_way_too() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _near = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        let socket = SockRef::from(&far);
        notice_end(&socket);
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(UNHEARD));
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
    /// The status code and the body.
    async fn get(server: &Server, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(server.http_address().unwrap()).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), body.to_owned())
    }

    #[tokio::test]
    async fn a_server_whose_data_thread_is_stuck_is_neither_healthy_nor_ready() {
        let http = Some(HttpOptions { host: "localhost".into(), port: 0 });
        let options = ServerOptions { http, ..ServerOptions::default() };
        let server = Server::start(&options, |_| Ok(store())).unwrap();
        assert_eq!(get(&server, "/healthz").await, (200, r#"{"healthy":true}"#.into()));
        let (go_on, held) = std::sync::mpsc::channel::<()>();
        let stuck = Box::new(move || assert!(held.recv().is_err())); // until `go_on` is dropped
        server.jobs.send(stuck).await.unwrap();
        let reason = "the data thread has not answered within a second";
        let (status, body) = get(&server, "/healthz").await;
        assert_eq!((status, body), (503, format!(r#"{{"healthy":false,"reason":"{reason}"}}"#)));
        let (status, body) = get(&server, "/readyz").await;
        assert_eq!(status, 503);
        assert!(
            body.starts_with(&format!(r#"{{"ready":false,"reason":"{reason}","tiers":"#)),
            "{body}"
        );
        assert_eq!(get(&server, "/metrics").await.0, 200, "figures are told all the same");
        drop(go_on);
        assert_eq!(get(&server, "/healthz").await.0, 200);
    }

    #[test]
    fn http_is_served_on_loopback_only_and_on_a_port_of_its_own() {
        let start = |host: &str, port| {
            let http = Some(HttpOptions { host: host.into(), port });
            let options = ServerOptions { http, ..ServerOptions::default() };
            Server::start(&options, |_| Ok(store()))
        };
        let error = start("0.0.0.0", 0).err().map(|error| error.code);
        assert_eq!(error, Some(ErrorCode::UnsupportedOption));
        let server = start("localhost", 0).unwrap();
        let address = server.http_address().unwrap();
        assert_eq!(address.ip(), Ipv4Addr::LOCALHOST);
        let error = start("localhost", address.port()).err().unwrap();
        assert_eq!(error.code, ErrorCode::AddressInUse);
        assert!(error.message.contains("--http-port"), "{error}");
    }
}
