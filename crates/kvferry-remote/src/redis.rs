//! Redis and Valkey, a single server or a cluster.

use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt as _, Shared};
use futures_util::stream::{self, StreamExt as _};
use kvferry_core::{Error, Result};
use kvferry_store::remote::{Lengths, Objects, RemoteFuture};
use redis::aio::MultiplexedConnection;
use redis::cluster::ClusterClient;
use redis::cluster_async::ClusterConnection;
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ErrorKind, FromRedisValue,
    IntoConnectionInfo, RedisConnectionInfo, RedisError, ServerErrorKind, cmd, pipe,
};

use crate::address::Servers;
use crate::failure;

/// Connections that values travel over; questions have one of their own, so that no value is in their way.
const FOR_VALUES: usize = 4;
/// How long connecting to a server may take.
const CONNECT: Duration = Duration::from_secs(1);
/// The same of all that it takes: a cluster's client waits for the nodes that it is told of, then for those that these
/// name. It goes on by itself, as whoever needs the connection has less time.
const CONNECT_ALL: Duration = Duration::from_secs(5);
/// What a cluster's client waits for one of its nodes.
const ANSWER: Duration = Duration::from_secs(10);
const CREDENTIALS: &str = "give what it takes: KVFERRY_REDIS_PASSWORD in the environment, and where it has users \
                           KVFERRY_REDIS_USERNAME";
/// Questions that a cluster is asked at a time.
const AT_ONCE: usize = 64;

pub(crate) struct Redis {
    opener: Arc<Opener>,
    place: String,
    for_questions: Arc<Line>,
    for_values: [Arc<Line>; FOR_VALUES],
    turn: AtomicUsize,
    /// Connections so far.
    connections: AtomicU64,
}

enum Opener {
    Single(Box<Client>),
    Cluster(Box<ClusterClient>),
}

#[derive(Clone)]
enum Connection {
    Single(MultiplexedConnection),
    Cluster(ClusterConnection),
}

/// A connection that is being made or was.
type Connecting = Shared<BoxFuture<'static, Result<Connection, RedisError>>>;

/// A connection that is made when it is needed, and again after it failed; with its number.
#[derive(Default)]
struct Line(Mutex<Option<(Connecting, u64)>>);

/// A request under way: one that is given up takes its connection with it, as nobody knows whether that still works.
struct UnderWay<'a> {
    line: &'a Line,
    number: u64,
}

impl Opener {
    async fn connect(&self) -> Result<Connection, RedisError> {
        Ok(match self {
            Self::Single(client) => {
                let config = AsyncConnectionConfig::new()
                    .set_connection_timeout(Some(CONNECT))
                    .set_response_timeout(None); // the asker's deadline holds
                Connection::Single(
                    client.get_multiplexed_async_connection_with_config(&config).await?,
                )
            }
            Self::Cluster(client) => Connection::Cluster(client.get_async_connection().await?),
        })
    }
}

impl Line {
    fn lock(&self) -> MutexGuard<'_, Option<(Connecting, u64)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drop_connection(&self, is_meant: impl FnOnce(u64) -> bool) {
        let dropped = self.lock().take_if(|(_, number)| is_meant(*number));
        drop(dropped); // not under the lock
    }
}

impl UnderWay<'_> {
    fn answered(self) {
        std::mem::forget(self);
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.line.drop_connection(|number| number == self.number);
    }
}

impl Redis {
    pub(crate) fn new(servers: Servers, place: String) -> Result<Self> {
        let wrong = |error: RedisError| {
            Error::invalid(format!("the remote {place:?} cannot be used: {}", error.category()))
        };
        let mut settings = RedisConnectionInfo::default().set_db(servers.database);
        if let Some(username) = &servers.username {
            settings = settings.set_username(username);
        }
        if let Some(password) = &servers.password {
            settings = settings.set_password(password);
        }
        let mut nodes = Vec::with_capacity(servers.nodes.len());
        for (host, port) in servers.nodes {
            let address = match servers.tls {
                true => ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None },
                false => ConnectionAddr::Tcp(host, port),
            };
            let info = address.into_connection_info().map_err(wrong)?;
            nodes.push(info.set_redis_settings(settings.clone()));
        }
        let opener = match nodes.pop() {
            Some(node) if !servers.is_cluster => {
                Opener::Single(Box::new(Client::open(node).map_err(wrong)?))
            }
            last => {
                let client = ClusterClient::builder(nodes.into_iter().chain(last))
                    .connection_timeout(CONNECT)
                    .response_timeout(ANSWER)
                    .retries(2)
                    .build()
                    .map_err(wrong)?;
                Opener::Cluster(Box::new(client))
            }
        };
        Ok(Self {
            opener: Arc::new(opener),
            place,
            for_questions: Arc::default(),
            for_values: Default::default(),
            turn: AtomicUsize::new(0),
            connections: AtomicU64::new(0),
        })
    }

    fn lines(&self) -> impl Iterator<Item = &Arc<Line>> {
        self.for_values.iter().chain([&self.for_questions])
    }

    /// The line's connection. All that are not there are made at once, even if nobody lives to see it: made one after the
    /// other, each would hold up a request.
    fn connection(&self, line: &Arc<Line>) -> (Connecting, u64) {
        self.lines().for_each(|line| drop(self.start(line)));
        self.start(line)
    }

    fn start(&self, line: &Arc<Line>) -> (Connecting, u64) {
        let connect = || {
            let number = self.connections.fetch_add(1, Ordering::Relaxed) + 1;
            let (opener, line) = (Arc::clone(&self.opener), Arc::clone(line));
            let connecting = tokio::spawn(async move {
                let late = |_| Err(io::Error::from(io::ErrorKind::TimedOut).into());
                let made = tokio::time::timeout(CONNECT_ALL, opener.connect()).await;
                let made = made.unwrap_or_else(late);
                if made.is_err() {
                    line.drop_connection(|it| it == number); // who comes next tries again
                }
                made
            });
            let lost = |_| Err(io::Error::from(io::ErrorKind::ConnectionAborted).into());
            (connecting.map(move |made| made.unwrap_or_else(lost)).boxed().shared(), number)
        };
        line.lock().get_or_insert_with(connect).clone()
    }

    /// A connection was lost. A server that was started again has lost all that were made before the request was: they
    /// need not be found out one by one. A cluster's client sees to its nodes itself.
    fn lost(&self, newest: u64) {
        if let Opener::Single(_) = *self.opener {
            self.lines().for_each(|line| line.drop_connection(|number| number <= newest));
        }
    }

    fn value_line(&self) -> &Arc<Line> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        &self.for_values[turn % FOR_VALUES]
    }

    async fn on<T>(
        &self,
        line: &Arc<Line>,
        ask: impl AsyncFnOnce(Connection) -> Result<T, RedisError>,
    ) -> Result<T> {
        let asked = async {
            let (connecting, number) = self.connection(line);
            let newest = self.connections.load(Ordering::Relaxed);
            let connection = connecting.await.inspect_err(|_| {
                line.drop_connection(|it| it == number); // whatever ended it, the next request makes another
            })?;
            let under_way = UnderWay { line, number };
            let answer = ask(connection).await;
            match &answer {
                Err(error) if error.is_unrecoverable_error() || error.is_io_error() => {
                    drop(under_way);
                    self.lost(newest);
                }
                _ => under_way.answered(),
            }
            answer
        };
        asked.await.map_err(|error| {
            let passing = is_passing(&error);
            failure(&self.place, passing, &error.to_string(), remedy(&error))
        })
    }

    async fn send<T: FromRedisValue>(&self, line: &Arc<Line>, command: &Cmd) -> Result<T> {
        self.on(line, async |connection| match connection {
            Connection::Single(mut one) => command.query_async(&mut one).await,
            Connection::Cluster(mut cluster) => command.query_async(&mut cluster).await,
        })
        .await
    }
}

fn remedy(error: &RedisError) -> Option<&'static str> {
    match error.code() {
        Some("NOAUTH" | "WRONGPASS") => Some(CREDENTIALS),
        _ if error.kind() == ErrorKind::AuthenticationFailed => Some(CREDENTIALS),
        Some("NOPERM") => Some("let its user read, write and remove the keys of the prefix"),
        _ => None,
    }
}

/// Whether the same request may succeed later.
fn is_passing(error: &RedisError) -> bool {
    error.is_io_error()
        || error.is_cluster_error()
        || matches!(
            error.kind(),
            ErrorKind::ClusterConnectionNotFound
                | ErrorKind::Server(ServerErrorKind::BusyLoading | ServerErrorKind::MasterDown)
        )
}

impl Objects for Redis {
    fn lengths<'a>(&'a self, keys: Vec<String>, told: &'a Lengths) -> RemoteFuture<'a, ()> {
        Box::pin(self.on(&self.for_questions, async move |connection| {
            match connection {
                Connection::Single(mut one) => {
                    let mut all = pipe();
                    for key in &keys {
                        all.cmd("STRLEN").arg(key);
                    }
                    let lengths: Vec<u64> = all.query_async(&mut one).await?;
                    let there = lengths.into_iter().take_while(|length| *length > 0);
                    there.for_each(|length| told.tell(length));
                }
                Connection::Cluster(cluster) => {
                    let ask = |key: String| {
                        let mut cluster = cluster.clone();
                        async move { cmd("STRLEN").arg(key).query_async(&mut cluster).await }
                    };
                    let mut asked = pin!(stream::iter(keys).map(ask).buffered(AT_ONCE));
                    while let Some(length) = asked.next().await {
                        match length? {
                            0 => break, // it is not there
                            length => told.tell(length),
                        }
                    }
                }
            }
            Ok(())
        }))
    }

    fn get(&self, key: String) -> RemoteFuture<'_, Option<Bytes>> {
        Box::pin(async move { self.send(self.value_line(), cmd("GET").arg(key)).await })
    }

    fn put(&self, key: String, value: Bytes) -> RemoteFuture<'_, ()> {
        Box::pin(async move {
            let mut set = cmd("SET");
            set.arg(key).arg(&value[..]);
            drop(value); // there is a copy in the command, and another travels
            self.send(self.value_line(), &set).await
        })
    }

    fn put_new(&self, key: String, value: Bytes) -> RemoteFuture<'_, bool> {
        Box::pin(async move {
            let mut set = cmd("SET");
            set.arg(key).arg(&value[..]).arg("NX");
            let put: Option<String> = self.send(&self.for_questions, &set).await?;
            Ok(put.is_some())
        })
    }

    fn remove(&self, key: String) -> RemoteFuture<'_, ()> {
        Box::pin(async move { self.send(&self.for_questions, cmd("UNLINK").arg(key)).await })
    }

    fn place(&self) -> &str {
        &self.place
    }
}
