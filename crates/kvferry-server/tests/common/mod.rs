//! A server in this process and a blocking client of its own, for tests and benchmarks.
#![allow(dead_code, reason = "each test uses its part")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use kvferry_core::key::{Dtype, Key, Layout};
use kvferry_server::{Server, ServerOptions};
use kvferry_store::{Limits, Policy, Store, StoreOptions};
use kvferry_wire::message::{Hello, Slots, StoreSlots, Value};
use kvferry_wire::zmtp::{
    Config, Connection, Credentials, Event, Mechanism, SocketType, ZmtpError,
};
use kvferry_wire::{Dialect, Header, Reply, Request, RequestKey};

/// A peer that does not answer for this long does not answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// A store of `memory` bytes in shared memory of a name of its own.
pub(crate) fn store_options(chunk_size: u32, memory: u64) -> StoreOptions {
    static NAMES: AtomicU32 = AtomicU32::new(0);
    let number = NAMES.fetch_add(1, Ordering::Relaxed);
    let name = format!("kvferry_test_{}_{number}", std::process::id());
    StoreOptions {
        chunk_size,
        memory,
        shared_name: Some(name),
        policy: Policy::Lru,
        disk: None,
        remote: None,
        limits: Limits::default(),
    }
}

/// Says why something is not tested, past the capture of passed tests.
pub(crate) fn skipped(what: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "SKIPPED {what}");
}

/// A server on a free port of loopback.
pub(crate) fn start(options: StoreOptions) -> Server {
    let address = ServerOptions::default();
    Server::start(&address, |_| Store::new(options)).unwrap()
}

/// A layout whose objects take a page each, for any chunk size.
pub(crate) fn layout(model: &str) -> Layout {
    Layout {
        model_name: model.into(),
        world_size: 1,
        block_size: 16,
        num_layers: 1,
        hidden_dim_size: 4096,
        dtype: Dtype::new("uint8").unwrap(),
        single_plane: true,
        num_physical_slots: Some(1),
    }
}

/// `chunks` chunks of 16 tokens of a prompt that begins with `first`, and one token more.
pub(crate) fn key(request: &str, first: u32, chunks: u32) -> Key {
    let end = chunks * 16;
    Key {
        model_name: "m".into(),
        world_size: 1,
        worker_id: Some(0),
        token_ids: (first..=first + end).collect(),
        start: 0,
        end: end.into(),
        request_id: request.into(),
        cache_salt: String::new(),
        num_kv_readers: 1,
    }
}

/// What a client sends to get through the handshake: a greeting of 64 bytes and READY.
pub(crate) fn handshake() -> BytesMut {
    let (mut output, mut theirs) = (BytesMut::new(), BytesMut::new());
    let mut client = Connection::new(Config::null(SocketType::Dealer), &mut output);
    Connection::new(Config::null(SocketType::Router), &mut theirs);
    client.receive(&mut theirs, &mut output).unwrap();
    output
}

/// A connection that has not shaken hands: bytes only.
pub(crate) fn connect_raw(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// Reads until the server ends the connection.
pub(crate) fn wait_until_cut(stream: &mut TcpStream) {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return,
            Err(error) => panic!("the server keeps the connection: {error}"),
        }
    }
}

/// A frame as it travels; `more` follow.
pub(crate) fn frame(body: &[u8], more: bool) -> Vec<u8> {
    let length = (body.len() as u64).to_be_bytes();
    [&[2 | u8::from(more)], &length[..], body].concat()
}

/// A DEALER.
pub(crate) struct Client {
    pub(crate) stream: TcpStream,
    zmtp: Connection,
    input: BytesMut,
    uid: u64,
}

impl Client {
    /// Connects and shakes hands.
    pub(crate) fn connect(address: SocketAddr) -> Self {
        Self::connect_with(address, None).unwrap()
    }

    /// The same with a token.
    pub(crate) fn connect_with(
        address: SocketAddr,
        token: Option<&str>,
    ) -> Result<Self, ZmtpError> {
        let mechanism = token.map_or(Mechanism::Null, |token| {
            let password = Bytes::copy_from_slice(token.as_bytes());
            Mechanism::PlainClient(Credentials { username: "anybody".into(), password })
        });
        let config = Config::new(SocketType::Dealer, mechanism);
        let stream = connect_raw(address);
        let mut output = BytesMut::new();
        let zmtp = Connection::new(config, &mut output);
        let mut client = Self { stream, zmtp, input: BytesMut::new(), uid: 0 };
        client.stream.write_all(&output).unwrap();
        assert_eq!(client.try_event()?, Event::Ready);
        Ok(client)
    }

    /// The next event, waited for.
    fn event(&mut self) -> Event {
        self.try_event().unwrap()
    }

    fn try_event(&mut self) -> Result<Event, ZmtpError> {
        loop {
            let mut output = BytesMut::new();
            let event = self.zmtp.receive(&mut self.input, &mut output)?;
            self.stream.write_all(&output).unwrap();
            if let Some(event) = event {
                return Ok(event);
            }
            let mut buffer = [0; 16 << 10];
            let read = self.stream.read(&mut buffer).expect("an answer in time");
            assert!(read > 0, "the server ended the connection");
            self.input.extend_from_slice(&buffer[..read]);
        }
    }

    /// Sends a message of any frames.
    pub(crate) fn send(&mut self, frames: &[Bytes]) {
        let mut output = BytesMut::new();
        self.zmtp.send(frames, &mut output).unwrap();
        self.stream.write_all(&output).unwrap();
    }

    /// Sends a request and does not wait.
    pub(crate) fn request(&mut self, request: &Request) -> u64 {
        self.uid += 1;
        self.send(&request.encode(self.uid, Dialect::Current));
        self.uid
    }

    /// The next message.
    pub(crate) fn receive(&mut self) -> Vec<Bytes> {
        match self.event() {
            Event::Message(frames) => frames,
            other => panic!("{other:?}"),
        }
    }

    /// The reply to a request that was sent last.
    pub(crate) fn reply(&mut self) -> Reply {
        let frames = self.receive();
        let (header, payload) = Header::decode(&frames).unwrap();
        Reply::decode(header.operation, payload).unwrap()
    }

    /// Sends a request; its reply.
    pub(crate) fn call(&mut self, request: &Request) -> Reply {
        let uid = self.request(request);
        let frames = self.receive();
        let (header, payload) = Header::decode(&frames).unwrap();
        assert_eq!(header.uid, Request::Noop.encode(uid, Dialect::Current)[0]);
        assert_eq!(header.operation, request.operation());
        Reply::decode(header.operation, payload).unwrap()
    }

    /// Whether the server ignores these messages: the answer that comes next is a later request's.
    pub(crate) fn is_unanswered(&mut self, frames: &[Bytes]) -> bool {
        self.send(frames);
        let uid = self.request(&Request::Noop);
        self.receive()[0] == Request::Noop.encode(uid, Dialect::Current)[0]
    }

    pub(crate) fn register(&mut self, instance_id: u64, layout: Layout) {
        let reply = self.call(&Request::Register { instance_id, layout });
        assert!(matches!(reply, Reply::Registered { .. }), "{reply:?}");
    }

    pub(crate) fn hello(&mut self) -> Hello {
        match self.call(&Request::Hello) {
            Reply::Hello(hello) => hello,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn prepare_store(&mut self, key: Key, instance_id: u64) -> StoreSlots {
        match self.call(&Request::PrepareStore { key: key.into(), instance_id }) {
            Reply::StoreSlots(Some(slots)) => slots,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn commit_store(&mut self, key: Key, instance_id: u64) -> bool {
        self.call(&Request::CommitStore { key: key.into(), instance_id }) == Reply::Boolean(true)
    }

    /// Stores the key's chunks, whatever is in their slots; how many were new.
    pub(crate) fn store(&mut self, key: Key, instance_id: u64) -> usize {
        let count = self.prepare_store(key.clone(), instance_id).slots.slots.len();
        assert_eq!(self.commit_store(key, instance_id), count > 0);
        count
    }

    /// Looks the key up; the chunks that are there, leased.
    pub(crate) fn lookup(&mut self, key: Key) -> u64 {
        let request_id = key.request_id.clone();
        let key = RequestKey::from(Key { worker_id: None, ..key });
        assert_eq!(self.call(&Request::Lookup { key, tp_size: 1 }), Reply::None);
        // The server waits for the tiers below the memory, but not for long at once.
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match self.call(&Request::QueryPrefetchStatus { request_id: request_id.clone() }) {
                Reply::Integer(chunks) => return chunks,
                Reply::None if Instant::now() < deadline => {}
                other => panic!("{other:?}"),
            }
        }
    }

    pub(crate) fn prepare_retrieve(&mut self, key: Key, instance_id: u64) -> Option<Slots> {
        match self.call(&Request::PrepareRetrieve { key: key.into(), instance_id }) {
            Reply::RetrieveSlots(slots) => slots,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn end_session(&mut self, request_id: &str) {
        let request_id = request_id.into();
        assert_eq!(self.call(&Request::EndSession { request_id }), Reply::None);
    }

    /// One of the server's figures; 0 for one that it has not.
    pub(crate) fn status(&mut self, name: &str) -> i64 {
        let Reply::Status(status) = self.call(&Request::Status) else { panic!("no status") };
        match status.iter().find(|(known, _)| known == name) {
            Some((_, Value::Integer(value))) => *value,
            Some(other) => panic!("{other:?}"),
            None => 0,
        }
    }

    /// Waits until one of the server's figures is `value`.
    pub(crate) fn wait_for(&mut self, name: &str, value: i64) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = self.status(name);
            if now == value {
                return;
            }
            assert!(Instant::now() < deadline, "{name} stays {now}, not {value}");
            std::thread::yield_now();
        }
    }
}
