//! A scripted server: a ROUTER that answers as it should, unless a test's script says otherwise.

use std::future::pending;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use kvferry_client::ConnectOptions;
use kvferry_core::cache::Slot;
use kvferry_core::key::{Dtype, Key, Layout};
use kvferry_wire::message::{EXTENSION, Hello, Slots, StoreSlots};
use kvferry_wire::zmtp::{Config, Connection, Event, SocketType};
use kvferry_wire::{Dialect, Header, Operation, Reply, Request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};

/// Tokens of a chunk.
pub(crate) const CHUNK: u32 = 16;
/// Bytes of an object of [`layout`].
pub(crate) const OBJECT: u64 = 2 * 16 * 8;
/// Bytes of a pool.
pub(crate) const POOL: u64 = 1 << 20;

/// What happens to a request.
pub(crate) enum Answer {
    /// Answered by this.
    Reply(Reply),
    /// Answered by another request's uid first, then by this.
    Stray(Reply),
    /// Answered as if it were this request.
    As(Box<Request>, Reply),
    /// Answered by this when the next request is, and before it.
    Late(Reply),
    /// Answered by this once the sender is used.
    After(oneshot::Receiver<()>, Reply),
    /// Not answered.
    Silence,
    /// The connection ends.
    Close,
    /// Nothing more is read.
    Stall,
}

/// A listening server.
pub(crate) struct Router {
    /// `host:port`.
    pub(crate) address: String,
    received: mpsc::UnboundedReceiver<(usize, Request)>,
}

impl Router {
    /// Starts one. The script is asked for each request of each connection, counted from 0; where
    /// it says `None` the request is answered as by a kvferry server with a pool of this name.
    pub(crate) async fn start(
        pool: &str,
        script: impl FnMut(usize, &Request) -> Option<Answer> + Send + 'static,
    ) -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").await.unwrap(), pool, script)
    }

    /// The same at an address of the test's choice.
    pub(crate) fn on(
        listener: TcpListener,
        pool: &str,
        mut script: impl FnMut(usize, &Request) -> Option<Answer> + Send + 'static,
    ) -> Self {
        let address = listener.local_addr().unwrap().to_string();
        let (sender, received) = mpsc::unbounded_channel();
        let pool = pool.to_owned();
        tokio::spawn(async move {
            for connection in 0.. {
                let (stream, _) = listener.accept().await.unwrap();
                // One peer after another: a client has one connection.
                serve(stream, |request| {
                    let _ = sender.send((connection, request.clone())); // the test may have ended
                    script(connection, request)
                        .unwrap_or_else(|| Answer::Reply(honest(request, &pool)))
                })
                .await;
            }
        });
        Self { address, received }
    }

    /// A server without surprises.
    pub(crate) async fn honest(pool: &str) -> Self {
        Self::start(pool, |_, _| None).await
    }

    /// Waits for a request, with its connection.
    pub(crate) async fn received(&mut self, wanted: impl Fn(&Request) -> bool) -> (usize, Request) {
        loop {
            let (connection, request) = self.received.recv().await.unwrap();
            if wanted(&request) {
                return (connection, request);
            }
        }
    }

    /// The requests that came since.
    pub(crate) fn so_far(&mut self) -> Vec<Request> {
        std::iter::from_fn(|| self.received.try_recv().ok()).map(|(_, request)| request).collect()
    }

    /// Options for a client of this server.
    pub(crate) fn options(&self) -> ConnectOptions {
        ConnectOptions::new(&self.address)
    }
}

async fn serve(mut stream: TcpStream, mut answer: impl FnMut(&Request) -> Answer) {
    let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
    let mut zmtp = Connection::new(Config::null(SocketType::Router), &mut output);
    let mut late: Vec<Bytes> = Vec::new();
    loop {
        while let Some(event) = zmtp.receive(&mut input, &mut output).unwrap() {
            let Event::Message(frames) = event else { continue };
            let (header, payload) = Header::decode(&frames).unwrap();
            let request = Request::decode(header.operation, payload).unwrap();
            match answer(&request) {
                Answer::Reply(reply) => {
                    if !late.is_empty() {
                        zmtp.send(&std::mem::take(&mut late), &mut output).unwrap();
                    }
                    zmtp.send(&header.reply(&reply), &mut output).unwrap();
                }
                Answer::Stray(reply) => {
                    let stray = Request::Noop.encode(u64::MAX, Dialect::Current);
                    zmtp.send(&stray, &mut output).unwrap();
                    zmtp.send(&["not an integer"; 2], &mut output).unwrap();
                    zmtp.send(&header.reply(&reply), &mut output).unwrap();
                }
                Answer::As(other, reply) => {
                    let other = other.encode(0, Dialect::Current);
                    let (mut other, _) = Header::decode(&other).unwrap();
                    other.uid = header.uid;
                    zmtp.send(&other.reply(&reply), &mut output).unwrap();
                }
                Answer::Late(reply) => late.extend(header.reply(&reply)),
                Answer::After(gate, reply) => {
                    gate.await.unwrap();
                    zmtp.send(&header.reply(&reply), &mut output).unwrap();
                }
                Answer::Silence => {}
                Answer::Close => return,
                Answer::Stall => pending().await,
            }
        }
        if !output.is_empty() && stream.write_all(&output).await.is_err() {
            return;
        }
        output.clear();
        match stream.read_buf(&mut input).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    }
}

/// The answer of a kvferry server whose cache holds everything.
pub(crate) fn honest(request: &Request, pool: &str) -> Reply {
    match request {
        Request::GetChunkSize => Reply::Integer(CHUNK.into()),
        Request::GetExperimental => Reply::Names(
            ["other", EXTENSION, Operation::Checksums.name()].map(str::to_owned).to_vec(),
        ),
        Request::Hello => hello(1),
        Request::Register { .. } => {
            Reply::Registered { shm_name: pool.to_owned(), pool_size: POOL }
        }
        Request::Ping { .. }
        | Request::CommitStore { .. }
        | Request::CommitRetrieve { .. }
        | Request::Confirm { .. } => Reply::Boolean(true),
        Request::QueryPrefetchStatus { .. } => Reply::Integer(2),
        Request::Checksums { checksums, .. } => Reply::Integer(checksums.len() as u64),
        Request::PrepareStore { .. } => Reply::StoreSlots(Some(StoreSlots {
            slots: slots(1, OBJECT),
            chunk_indices: vec![1],
            refused: Some(0),
        })),
        Request::PrepareRetrieve { .. } => Reply::RetrieveSlots(Some(slots(2, OBJECT))),
        Request::Status => Reply::Status(vec![]),
        _ => Reply::None,
    }
}

/// Who a server with this boot token is.
pub(crate) fn hello(token: u8) -> Reply {
    holding(token, 0)
}

/// The same, of one that holds what is read for so many milliseconds.
pub(crate) fn holding(token: u8, read_hold_ms: u32) -> Reply {
    Reply::Hello(Hello {
        boot_token: [token; 16],
        version: "0.0.1".to_owned(),
        pid: 42,
        admin: true,
        read_hold_ms,
        segment: None,
    })
}

/// Slots at the pool's begin.
pub(crate) fn slots(count: u64, length: u64) -> Slots {
    let slot = |i| Slot { offset: i * 4096, length, generation: Some(7 + i), checksum: None };
    Slots {
        slots: (0..count).map(slot).collect(),
        shape: vec![2, 16, 8],
        dtype: "uint8".to_owned(),
    }
}

/// Objects of [`OBJECT`] bytes.
pub(crate) fn layout() -> Layout {
    Layout {
        model_name: "model".to_owned(),
        world_size: 1,
        block_size: 16,
        num_layers: 1,
        hidden_dim_size: 8,
        dtype: Dtype::new("uint8").unwrap(),
        single_plane: false,
        num_physical_slots: None,
    }
}

/// A key of two chunks.
pub(crate) fn key() -> Key {
    Key {
        model_name: "model".to_owned(),
        world_size: 1,
        worker_id: Some(0),
        token_ids: (0..2 * CHUNK).collect(),
        start: 0,
        end: 2 * u64::from(CHUNK),
        request_id: "request".to_owned(),
        cache_salt: String::new(),
        num_kv_readers: 0,
    }
}

/// Long enough for anything that is answered.
pub(crate) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// As long as a wait that must end without an answer.
pub(crate) fn shortly() -> Instant {
    Instant::now() + Duration::from_millis(30)
}
