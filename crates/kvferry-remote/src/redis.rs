//! Redis and Valkey, a single server or a cluster.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use kvferry_core::{Error, Result};
use kvferry_store::remote::{Objects, RemoteFuture};
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
/// How long connecting may take. What waits for it has a deadline of its own.
const CONNECT: Duration = Duration::from_secs(1);
/// What a cluster's client waits for one of its nodes.
const ANSWER: Duration = Duration::from_secs(10);
/// Questions that a cluster is asked at a time.
const AT_ONCE: usize = 64;

pub(crate) struct Redis {
    opener: Opener,
    place: String,
    for_questions: Line,
    for_values: [Line; FOR_VALUES],
    turn: AtomicUsize,
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

/// A connection that is made when it is needed, and again after it failed.
#[derive(Default)]
struct Line(Mutex<Held>);

#[derive(Default)]
struct Held {
    connection: Option<Connection>,
    /// Of the connections so far.
    number: u64,
}

/// A request under way: one that is given up takes its connection with it, as nobody knows whether that still works.
struct UnderWay<'a> {
    line: &'a Line,
    number: u64,
}

impl Line {
    fn drop_connection(&self, number: u64) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if held.number == number {
            held.connection = None;
        }
    }

    fn held(&self) -> Option<(Connection, u64)> {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Some((held.connection.clone()?, held.number))
    }

    fn hold(&self, connection: Connection) -> (Connection, u64) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.number += 1;
        held.connection = Some(connection.clone());
        (connection, held.number)
    }
}

impl UnderWay<'_> {
    fn answered(self) {
        std::mem::forget(self);
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.line.drop_connection(self.number);
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
        let for_values = Default::default();
        let for_questions = Line::default();
        Ok(Self { opener, place, for_questions, for_values, turn: AtomicUsize::new(0) })
    }

    async fn connect(&self) -> Result<Connection, RedisError> {
        Ok(match &self.opener {
            Opener::Single(client) => {
                let config = AsyncConnectionConfig::new()
                    .set_connection_timeout(Some(CONNECT))
                    .set_response_timeout(None); // the asker's deadline holds
                Connection::Single(
                    client.get_multiplexed_async_connection_with_config(&config).await?,
                )
            }
            Opener::Cluster(client) => Connection::Cluster(client.get_async_connection().await?),
        })
    }

    fn value_line(&self) -> &Line {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        &self.for_values[turn % FOR_VALUES]
    }

    async fn on<T>(
        &self,
        line: &Line,
        ask: impl AsyncFnOnce(Connection) -> Result<T, RedisError>,
    ) -> Result<T> {
        let asked = async {
            let (connection, number) = match line.held() {
                Some(held) => held,
                None => line.hold(self.connect().await?),
            };
            let under_way = UnderWay { line, number };
            let answer = ask(connection).await;
            match &answer {
                Err(error) if error.is_unrecoverable_error() || error.is_io_error() => {
                    drop(under_way);
                }
                _ => under_way.answered(),
            }
            answer
        };
        asked.await.map_err(|error| {
            let passing = is_passing(&error);
            failure(&self.place, passing, &error.to_string())
        })
    }

    async fn send<T: FromRedisValue>(&self, line: &Line, command: &Cmd) -> Result<T> {
        self.on(line, async |connection| match connection {
            Connection::Single(mut one) => command.query_async(&mut one).await,
            Connection::Cluster(mut cluster) => command.query_async(&mut cluster).await,
        })
        .await
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
    fn lengths(&self, keys: Vec<String>) -> RemoteFuture<'_, Vec<u64>> {
        Box::pin(async move {
            let lengths: Vec<u64> = self
                .on(&self.for_questions, async |connection| match connection {
                    Connection::Single(mut one) => {
                        let mut all = pipe();
                        for key in &keys {
                            all.cmd("STRLEN").arg(key);
                        }
                        all.query_async(&mut one).await
                    }
                    Connection::Cluster(cluster) => {
                        let ask = |key: String| {
                            let mut cluster = cluster.clone();
                            async move {
                                cmd("STRLEN").arg(key).query_async::<u64>(&mut cluster).await
                            }
                        };
                        stream::iter(keys).map(ask).buffered(AT_ONCE).try_collect().await
                    }
                })
                .await?;
            Ok(lengths.into_iter().take_while(|length| *length > 0).collect()) // 0: it is not there
        })
    }

    fn get(&self, key: String) -> RemoteFuture<'_, Option<Bytes>> {
        Box::pin(async move { self.send(self.value_line(), cmd("GET").arg(key)).await })
    }

    fn put(&self, key: String, value: Bytes) -> RemoteFuture<'_, ()> {
        Box::pin(
            async move { self.send(self.value_line(), cmd("SET").arg(key).arg(&value[..])).await },
        )
    }

    fn remove(&self, key: String) -> RemoteFuture<'_, ()> {
        Box::pin(async move { self.send(&self.for_questions, cmd("UNLINK").arg(key)).await })
    }

    fn place(&self) -> &str {
        &self.place
    }
}
