//! One connection: bytes in, answers out, with a bound and a deadline for everything.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Buf, BufMut, BytesMut};
use kvferry_store::Departure;
use kvferry_wire::Output;
use kvferry_wire::zmtp::{Config, Connection, Event, Mechanism, SocketType};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;
use tokio::task::unconstrained;
use tokio::time::{Instant, timeout, timeout_at};

use crate::service::{Peer, Service};
use crate::tokens::{Role, Tokens};

/// From connecting to READY.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// From a message's first byte to its last, and for a peer to take an answer.
const MESSAGE: Duration = Duration::from_secs(30);
/// What is read at once, and what an idle connection keeps.
const READ: usize = 16 << 10;
/// The same while a long frame arrives.
const READ_MAX: usize = 512 << 10;
/// A frame of which so much is missing is read to its end and not beyond.
const ALONE: usize = 64 << 10;
/// Answers are sent when there is this much of them, if not before.
const WRITE: usize = 256 << 10;
/// For so long after an answer the next request is waited for awake: a thread that sleeps is woken up in more time than
/// most requests take.
const AWAKE: Duration = Duration::from_micros(100);
/// A pause between two requests of a peer that runs on the same processor is shorter.
const SHARED: Duration = Duration::from_micros(15);
/// After so long without waiting for its peer a connection lets others have their turn, and after so many bytes: what comes
/// faster than it is read would keep everything else on this thread waiting.
const TURN: Duration = Duration::from_millis(1);
const TURN_BYTES: usize = 256 << 10;
/// Bytes of unfinished messages that all connections may hold together which hold more than a share; whoever holds the most
/// is cut when it is more.
const UNFINISHED_MAX: usize = 256 << 20;
/// What every connection may hold, whatever the others do.
const SHARE: usize = 256 << 10;

/// What all connections hold of messages that have not arrived whole.
#[derive(Debug)]
pub(crate) struct Unfinished {
    bytes: AtomicUsize,
    parts: AtomicU64,
    large: Mutex<Large>,
    max: usize,
    share: usize,
}

/// The parts of more than a share, by their numbers.
#[derive(Debug, Default)]
struct Large {
    bytes: usize,
    parts: BTreeMap<u64, (usize, Arc<Notify>)>,
}

impl Large {
    fn remove(&mut self, number: u64) -> Option<Arc<Notify>> {
        let (bytes, cut) = self.parts.remove(&number)?;
        self.bytes -= bytes;
        Some(cut)
    }
}

/// One connection's part of it.
struct Part<'a> {
    all: &'a Unfinished,
    /// Larger for later connections.
    number: u64,
    bytes: usize,
    cut: &'a Arc<Notify>,
}

impl Default for Unfinished {
    fn default() -> Self {
        Self::new(UNFINISHED_MAX, SHARE)
    }
}

impl Unfinished {
    fn new(max: usize, share: usize) -> Self {
        let (bytes, parts, large) = Default::default();
        Self { bytes, parts, large, max, share }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// `cut` is told when the connection has to end.
    fn part<'a>(&'a self, cut: &'a Arc<Notify>) -> Part<'a> {
        let number = self.parts.fetch_add(1, Ordering::Relaxed);
        Part { all: self, number, bytes: 0, cut }
    }
}

impl Part<'_> {
    /// `false` when there is no room for `bytes`, and no other connection holds more.
    fn set(&mut self, bytes: usize) -> bool {
        let before = std::mem::replace(&mut self.bytes, bytes);
        if bytes == before {
            return true;
        }
        let Unfinished { share, max, .. } = *self.all;
        self.all.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.all.bytes.fetch_sub(before, Ordering::Relaxed);
        if bytes <= share && before <= share {
            return true;
        }
        let mut large = self.all.large.lock().unwrap_or_else(PoisonError::into_inner);
        large.remove(self.number);
        if bytes > share {
            large.bytes += bytes;
            large.parts.insert(self.number, (bytes, Arc::clone(self.cut)));
        }
        while large.bytes > max {
            // Of equals the one that came first.
            let most = large.parts.iter().rev().max_by_key(|(_, (bytes, _))| *bytes);
            let Some(most) = most.map(|(number, _)| *number) else { break };
            let cut = large.remove(most);
            if most == self.number {
                return false;
            }
            cut.iter().for_each(|cut| cut.notify_one());
        }
        true
    }
}

impl Drop for Part<'_> {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// What a connection has done since others had their turn.
struct Turn {
    since: std::time::Instant,
    bytes: usize,
}

impl Turn {
    fn begin() -> Self {
        Self { since: std::time::Instant::now(), bytes: 0 }
    }

    /// Lets others go on if they have waited for long enough.
    async fn pass_on(&mut self) {
        if self.bytes >= TURN_BYTES || self.since.elapsed() >= TURN {
            tokio::task::yield_now().await;
            *self = Self::begin();
        }
    }
}

/// Whom a listener lets in.
#[derive(Clone)]
pub(crate) struct Door {
    /// `None`: nobody is asked, and everybody may do everything.
    pub(crate) tokens: Option<Arc<Tokens>>,
    /// Whether peers without a token, which LMCache's are, may store and load all the same.
    pub(crate) open: bool,
}

impl Door {
    fn mechanism(&self) -> Mechanism {
        match (&self.tokens, self.open) {
            (None, _) => Mechanism::Null,
            (Some(_), true) => Mechanism::NullOrPlainServer,
            (Some(_), false) => Mechanism::PlainServer,
        }
    }

    fn admits(&self, token: &[u8], peer: &mut Peer) -> bool {
        match self.tokens.as_ref().and_then(|tokens| tokens.role(token)) {
            Some(Role::Admin) => peer.make_admin(),
            Some(Role::Data) => {}
            Some(Role::Metrics) | None => return false,
        }
        true
    }
}

/// Serves the connection until it ends; says who ended it.
pub(crate) async fn serve(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    service: &Service,
    peer: &mut Peer,
    unfinished: &Unfinished,
    door: &Door,
) -> Departure {
    let cut = Arc::new(Notify::new());
    let talked = tokio::select! {
        biased;
        talked = talk(&mut stream, service, peer, unfinished.part(&cut), door) => talked,
        () = cut.notified() => Err(io::ErrorKind::OutOfMemory.into()),
    };
    let error = match talked {
        Ok(()) => return Departure::Ended, // the peer's kernel said so
        Err(error) => error,
    };
    match error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Departure::Ended,
        _ => {
            service.drop_message(label(&error));
            Departure::GivenUp
        }
    }
}

async fn talk(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    service: &Service,
    peer: &mut Peer,
    mut part: Part<'_>,
    door: &Door,
) -> io::Result<()> {
    if door.tokens.is_none() {
        peer.make_admin();
    }
    let (mut input, mut output) = (BytesMut::new(), Output::default());
    let mut zmtp =
        Connection::new(Config::new(SocketType::Router, door.mechanism()), output.tail());
    let mut deadline = Some(Instant::now() + HANDSHAKE);
    let (mut awake, mut arrival) = (false, 0);
    let mut turn = Turn::begin();
    loop {
        send(stream, &mut output).await?;
        // A long frame comes whole and alone: what came with it would have to be copied away from it.
        let missing = zmtp.missing(&input);
        let most = if missing > ALONE { missing.min(READ_MAX) } else { missing + READ };
        input.reserve(most);
        let mut room = (&mut input).limit(most);
        let answered = std::time::Instant::now();
        let mut waited = false;
        // All that is there is read before it waits, however much that is; only its turn ends it.
        let read = unconstrained(stream.read_buf(&mut room));
        let read = awake_until(awake.then(|| answered + AWAKE), read, &mut waited);
        let read = async {
            match deadline {
                Some(deadline) => {
                    timeout_at(deadline, read).await.map_err(|_| io::ErrorKind::TimedOut)?
                }
                None => read.await, // an idle connection costs little; its end is noticed
            }
        };
        let read = tokio::select! {
            biased; // it says no more than the peer asked for
            message = service.told(peer), if peer.listens() => {
                zmtp.send_shared(&message, &mut output).map_err(Malformed::io)?;
                if waited {
                    peer.is_heard_out();
                }
                awake = false;
                turn.pass_on().await;
                continue;
            }
            read = read => read,
        };
        let read = read?;
        if read == 0 {
            return Ok(());
        }
        if waited {
            peer.is_heard_out();
            turn = Turn::begin();
        }
        turn.bytes += read;
        let before = std::mem::replace(&mut arrival, service.next_turn());
        // Not where it was in vain, nor where others keep the thread awake; and who is as fast as this shares our
        // processor, and needs it.
        awake = arrival == before + 1
            && (SHARED..if awake { AWAKE } else { 2 * AWAKE }).contains(&answered.elapsed());
        let arrived = input.len();
        let mut ready = false;
        loop {
            let event = match zmtp.receive(&mut input, output.tail()) {
                Ok(Some(event)) => event,
                Ok(None) => break,
                Err(error) => {
                    send(stream, &mut output).await?; // what was answered before, and the reason
                    return Err(Malformed::io(error));
                }
            };
            match event {
                Event::Message(frames) => {
                    ready = true;
                    let now = std::time::Instant::now();
                    if let Some(reply) = service.answer(peer, &frames, now).await {
                        zmtp.send_shared(&reply, &mut output).map_err(Malformed::io)?;
                    }
                }
                // The name says nothing: the token is whose it is.
                Event::Credentials(given) if door.admits(&given.password, peer) => {
                    zmtp.accept(output.tail()).map_err(Malformed::io)?;
                }
                Event::Credentials(_) => {
                    zmtp.reject("wrong token", output.tail()).map_err(Malformed::io)?;
                    send(stream, &mut output).await?;
                    return Err(io::ErrorKind::PermissionDenied.into());
                }
                Event::Ready => ready = true,
            }
            if output.remaining() > WRITE {
                send(stream, &mut output).await?;
            }
            turn.pass_on().await;
        }
        turn.pass_on().await; // not every frame is an event
        if input.len() < arrived {
            // What stays must not keep the space of what was taken.
            input = BytesMut::from(&input[..]);
        }
        let begun = zmtp.unfinished();
        if !part.set(input.len() + begun.unwrap_or(0)) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        if zmtp.is_ready() {
            deadline = match deadline {
                _ if input.is_empty() && begun.is_none() => None,
                Some(deadline) if !ready => Some(deadline), // the same message goes on
                _ => Some(Instant::now() + MESSAGE),
            };
        }
    }
}

/// The same, without letting the thread sleep before then; other tasks run in between. Says whether it took any time.
async fn awake_until<T>(
    until: Option<std::time::Instant>,
    future: impl Future<Output = T>,
    waited: &mut bool,
) -> T {
    let mut future = pin!(future);
    poll_fn(|context| {
        let polled = future.as_mut().poll(context);
        *waited |= polled.is_pending();
        if polled.is_pending() && until.is_some_and(|until| std::time::Instant::now() < until) {
            context.waker().wake_by_ref();
        }
        polled
    })
    .await
}

async fn send(stream: &mut (impl AsyncWrite + Unpin), output: &mut Output) -> io::Result<()> {
    if output.has_remaining() {
        let sent = timeout(MESSAGE, stream.write_all_buf(output)).await;
        sent.map_err(|_| io::ErrorKind::TimedOut)??;
        if output.tail().capacity() > WRITE {
            *output.tail() = BytesMut::new(); // an idle peer does not keep a large answer's space
        }
    }
    Ok(())
}

/// A protocol error on its way through `io::Error`.
#[derive(Debug)]
struct Malformed(kvferry_wire::zmtp::ZmtpError);

impl Malformed {
    fn io(error: kvferry_wire::zmtp::ZmtpError) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, Self(error))
    }
}

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl std::error::Error for Malformed {}

fn label(error: &io::Error) -> &'static str {
    let malformed = error.get_ref().and_then(|inner| inner.downcast_ref::<Malformed>());
    match (malformed, error.kind()) {
        (Some(malformed), _) => malformed.0.label(),
        (None, io::ErrorKind::TimedOut) => "deadline",
        (None, io::ErrorKind::OutOfMemory) => "unfinished_messages",
        (None, io::ErrorKind::PermissionDenied) => "wrong_token",
        (None, _) => "connection",
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use bytes::Bytes;
    use kvferry_core::key::{Dtype, Key, Layout};
    use kvferry_store::{Limits, Policy, Store, StoreOptions};
    use kvferry_wire::message::{Control, Value};
    use kvferry_wire::zmtp::Credentials;
    use kvferry_wire::{Operation, Reply, Request};
    use tokio::io::{DuplexStream, ReadBuf, duplex};
    use tokio::time::sleep;

    use super::*;
    use crate::figures::Figures;
    use crate::quotas::Labels;

    /// The serving side, without a socket.
    struct Host {
        store: Store,
        service: Service,
        unfinished: Unfinished,
    }

    impl Host {
        fn new() -> Self {
            let options = StoreOptions {
                chunk_size: 16,
                memory: 1 << 20,
                shared_name: None,
                policy: Policy::Lru,
                disk: None,
                remote: None,
                limits: Limits::default(),
            };
            let store = Store::new(options).unwrap();
            let service =
                Service::new(store.clone(), [0; 16], Figures::new().into(), Labels([0; 32]));
            Self { store, service, unfinished: Unfinished::default() }
        }

        /// How the connection ends, and after how long.
        async fn serve(&self, stream: DuplexStream) -> (Departure, Duration) {
            self.serve_at(stream, Door { tokens: None, open: true }).await
        }

        async fn serve_at(&self, stream: DuplexStream, door: Door) -> (Departure, Duration) {
            const NEVER: Duration = Duration::from_secs(1 << 32);
            let begun = Instant::now();
            let mut peer = Peer::new(self.store.connect());
            let serving = serve(stream, &self.service, &mut peer, &self.unfinished, &door);
            let departure = timeout(NEVER, serving).await.expect("the connection ends");
            (departure, begun.elapsed())
        }

        async fn dropped(&self, reason: &str) -> i64 {
            let frames = Request::Status.encode(0, Default::default());
            let mut peer = Peer::new(self.store.connect());
            peer.make_admin();
            let now = std::time::Instant::now();
            let reply = self.service.answer(&mut peer, &frames, now).await.unwrap();
            let Ok(Reply::Status(status)) = Reply::decode(Operation::Status, &reply[2..]) else {
                panic!("no status")
            };
            let name = format!("dropped_{reason}");
            status.iter().find(|(known, _)| *known == name).map_or(0, |(_, count)| match count {
                Value::Integer(count) => *count,
                other => panic!("{other:?}"),
            })
        }
    }

    /// What a client sends to get through the handshake.
    fn handshake() -> BytesMut {
        let mut output = BytesMut::new();
        let mut client = Connection::new(Config::null(SocketType::Dealer), &mut output);
        let mut theirs = BytesMut::new();
        Connection::new(Config::null(SocketType::Router), &mut theirs);
        client.receive(&mut theirs, &mut output).unwrap();
        output
    }

    fn message(frames: &[Bytes]) -> BytesMut {
        let mut output = BytesMut::new();
        for (i, frame) in frames.iter().enumerate() {
            let more = u8::from(i + 1 < frames.len());
            output.extend_from_slice(&[more, u8::try_from(frame.len()).unwrap()]);
            output.extend_from_slice(frame);
        }
        output
    }

    fn layout() -> Layout {
        Layout {
            model_name: "m".into(),
            world_size: 1,
            block_size: 16,
            num_layers: 1,
            hidden_dim_size: 256,
            dtype: Dtype::new("uint8").unwrap(),
            single_plane: true,
            num_physical_slots: None,
        }
    }

    fn key() -> Key {
        Key {
            model_name: "m".into(),
            world_size: 1,
            worker_id: Some(0),
            token_ids: (0..16).collect(),
            start: 0,
            end: 16,
            request_id: "r".into(),
            cache_salt: String::new(),
            num_kv_readers: 1,
        }
    }

    fn noop() -> BytesMut {
        message(&Request::Noop.encode(1, Default::default()))
    }

    async fn drain(mut stream: impl AsyncRead + Unpin) {
        let mut buffer = [0; 4096];
        while stream.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
    }

    #[tokio::test]
    async fn what_comes_together_with_an_event_had_not_been_waiting_and_is_answered() {
        let host = Host::new();
        let door = Door { tokens: None, open: true };
        let mut peer = Peer::new(host.store.connect());
        let (mut near, far) = duplex(1 << 16);
        let talking = async {
            let mut answer = async |sent: &BytesMut, end: &[u8]| {
                near.write_all(sent).await.unwrap();
                let mut answered = BytesMut::new();
                while !answered.windows(end.len()).any(|bytes| bytes == end) {
                    near.read_buf(&mut answered).await.unwrap();
                }
            };
            let listen = Request::SubscribeKvEvents {
                instance_id: 1,
                model_name: "m".into(),
                cursor: 0,
                max_events: 9,
            };
            let listen = listen.encode(7, Default::default());
            let begin = [handshake(), message(&listen)].concat();
            answer(&BytesMut::from(&begin[..]), b"\xa6events\x90").await;
            // Acknowledged; and then it waits.
            let ready = [message(&Control::Ack.encode(&listen[0])), noop()].concat();
            answer(&BytesMut::from(&ready[..]), b"OK").await;
            let owner = host.store.connect();
            host.store.register(owner, 1, layout()).unwrap();
            host.store.prepare_store(owner, &key(), 1, std::time::Instant::now()).unwrap();
            assert!(host.store.commit_store(&key(), 1, &[]).unwrap());
            answer(&BytesMut::from(&noop()[..3]), b"stored").await; // between a request's parts
            answer(&BytesMut::from(&noop()[3..]), b"OK").await;
            answer(&BytesMut::from(&ready[..]), b"OK").await;
            std::thread::sleep(Duration::from_millis(5));
            let begun = std::time::Instant::now();
            assert_eq!(host.store.clear(), 1);
            answer(&noop(), b"OK").await;
            drop(near);
            begun
        };
        let serving = serve(far, &host.service, &mut peer, &host.unfinished, &door);
        let (departure, begun) = tokio::join!(serving, talking);
        assert_eq!(departure, Departure::Ended);
        assert!(peer.waits_since() >= begun, "a copy would have been refused as too late");
    }

    #[tokio::test(start_paused = true)]
    async fn a_handshake_takes_five_seconds_at_most_however_it_is_dragged_out() {
        for sent in [0, 1, 11, 63, 64, 70, handshake().len() - 1] {
            let host = Host::new();
            let (near, far) = duplex(4096);
            let (reading, mut writing) = tokio::io::split(near);
            let dragging = async {
                for byte in &handshake()[..sent] {
                    writing.write_all(&[*byte]).await.unwrap();
                    sleep(HANDSHAKE / 100).await;
                }
                drain(reading).await;
            };
            let (ended, ()) = tokio::join!(host.serve(far), dragging);
            assert_eq!(ended, (Departure::GivenUp, HANDSHAKE), "after {sent} bytes");
            assert_eq!(host.dropped("deadline").await, 1);
        }
    }

    /// What a client with a token sends, step by step.
    fn plain_handshake(token: &'static str) -> [BytesMut; 2] {
        let credentials = Credentials { username: Bytes::new(), password: token.into() };
        let mechanism = Mechanism::PlainClient(credentials);
        let mut output = BytesMut::new();
        let mut client = Connection::new(Config::new(SocketType::Dealer, mechanism), &mut output);
        let mut theirs = BytesMut::new();
        Connection::new(Config::new(SocketType::Router, Mechanism::PlainServer), &mut theirs);
        client.receive(&mut theirs, &mut output).unwrap();
        let hello = output.split();
        client.receive(&mut BytesMut::from(&b"\x04\x08\x07WELCOME"[..]), &mut output).unwrap();
        [hello, output]
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_with_a_token_has_five_seconds_too_and_a_wrong_one_is_cut_at_once() {
        let tokens = || {
            Some(Arc::new(Tokens::from([
                b"the data token" as &[u8],
                b"the admin token",
                b"metrics token",
            ])))
        };
        for open in [false, true] {
            for (token, sent, ended) in [
                ("the data token", 0, HANDSHAKE),
                ("the data token", 1, HANDSHAKE),
                ("the data token, nearly", 1, Duration::ZERO),
                ("metrics token", 1, Duration::ZERO),
                ("", 1, Duration::ZERO),
            ] {
                let host = Host::new();
                let (near, far) = duplex(4096);
                let (reading, mut writing) = tokio::io::split(near);
                let client = async {
                    for bytes in &plain_handshake(token)[..sent] {
                        writing.write_all(bytes).await.unwrap();
                    }
                    drain(reading).await;
                };
                let door = Door { tokens: tokens(), open };
                let (told, ()) = tokio::join!(host.serve_at(far, door), client);
                assert_eq!(told, (Departure::GivenUp, ended), "{token:?} {sent}");
                let reason = if ended.is_zero() { "wrong_token" } else { "deadline" };
                assert_eq!(host.dropped(reason).await, 1);
            }
            // Through it, a peer is served.
            let host = Host::new();
            let (mut near, far) = duplex(4096);
            for bytes in plain_handshake("the data token").into_iter().chain([noop()]) {
                near.write_all(&bytes).await.unwrap();
            }
            near.shutdown().await.unwrap();
            let door = Door { tokens: tokens(), open };
            assert_eq!(host.serve_at(far, door).await.0, Departure::Ended);
            let mut received = Vec::new();
            near.read_to_end(&mut received).await.unwrap();
            assert!(received.ends_with(b"\xa2OK"));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn between_messages_a_peer_may_be_silent_for_as_long_as_it_likes() {
        let host = Host::new();
        let (mut near, far) = duplex(4096);
        let client = async {
            near.write_all(&handshake()).await.unwrap();
            near.write_all(&noop()).await.unwrap();
            sleep(Duration::from_secs(86_400)).await;
            near.write_all(&noop()).await.unwrap();
            near.shutdown().await.unwrap();
            let mut received = Vec::new();
            near.read_to_end(&mut received).await.unwrap();
            let answers = received.windows(3).filter(|bytes| bytes == b"\xa2OK").count();
            assert_eq!(answers, 2);
        };
        let ((departure, _), ()) = tokio::join!(host.serve(far), client);
        assert_eq!(departure, Departure::Ended);
    }

    /// A stream that counts how often it is asked for bytes.
    struct Counted(DuplexStream, Arc<AtomicUsize>);

    impl AsyncRead for Counted {
        fn poll_read(
            mut self: Pin<&mut Self>,
            context: &mut Context<'_>,
            buffer: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            self.1.fetch_add(1, Ordering::Relaxed);
            Pin::new(&mut self.0).poll_read(context, buffer)
        }
    }

    impl AsyncWrite for Counted {
        fn poll_write(
            mut self: Pin<&mut Self>,
            context: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.0).poll_write(context, bytes)
        }

        fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_flush(context)
        }

        fn poll_shutdown(
            mut self: Pin<&mut Self>,
            context: &mut Context<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_shutdown(context)
        }
    }

    #[tokio::test]
    async fn who_asks_fast_is_waited_for_awake_and_who_has_stopped_asking_is_not() {
        let asked = Arc::new(AtomicUsize::new(0));
        let (mut near, far) = duplex(4096);
        let stream = Counted(far, Arc::clone(&asked));
        // A task of its own: else it would be asked whenever the client goes on.
        let serving = tokio::spawn(async move {
            let host = Host::new();
            let mut peer = Peer::new(host.store.connect());
            let door = Door { tokens: None, open: true };
            let serving = serve(stream, &host.service, &mut peer, &host.unfinished, &door);
            assert_eq!(serving.await, Departure::Ended);
        });
        let client = async move {
            near.write_all(&handshake()).await.unwrap();
            let mut buffer = [0; 4096];
            let mut most = 0;
            for _ in 0..1000 {
                near.write_all(&noop()).await.unwrap();
                assert_ne!(near.read(&mut buffer).await.unwrap(), 0);
                let before = asked.load(Ordering::Relaxed);
                let pause = std::time::Instant::now();
                while pause.elapsed() < 2 * SHARED {
                    tokio::task::yield_now().await;
                }
                most = most.max(asked.load(Ordering::Relaxed) - before);
            }
            assert!(most > 2, "it is asked again and again: {most}");
            sleep(2 * AWAKE).await;
            let before = asked.load(Ordering::Relaxed);
            sleep(Duration::from_millis(20)).await;
            assert_eq!(asked.load(Ordering::Relaxed), before, "it sleeps");
            drop(near);
        };
        tokio::join!(serving, client).0.unwrap();
    }

    /// A stream whose next bytes are always there, until there were this many.
    struct Flood {
        handshake: BytesMut,
        repeated: BytesMut,
        left: usize,
    }

    impl AsyncRead for Flood {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buffer: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let room = buffer.remaining();
            let length = self.handshake.len().min(room);
            let begins = self.handshake.split_to(length);
            buffer.put_slice(&begins);
            while self.left > 0 && buffer.remaining() >= self.repeated.len() {
                self.left = self.left.saturating_sub(self.repeated.len());
                buffer.put_slice(&self.repeated);
            }
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Flood {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn a_peer_whose_bytes_never_end_lets_others_have_their_turn() {
        let unknown = message(&[vec![1], b"\xa1x".to_vec()].map(Bytes::from));
        let pong = BytesMut::from(&b"\x04\x05\x04PONG"[..]);
        for repeated in [unknown, pong, noop()] {
            let host = Host::new();
            let flood = Flood { handshake: handshake(), repeated, left: 16 << 20 };
            let mut peer = Peer::new(host.store.connect());
            let door = Door { tokens: None, open: true };
            let mut turns = 0;
            tokio::select! {
                biased;
                departure = serve(flood, &host.service, &mut peer, &host.unfinished, &door) => {
                    assert_eq!(departure, Departure::Ended);
                }
                () = async {
                    loop {
                        turns += 1;
                        tokio::task::yield_now().await;
                    }
                } => {}
            }
            assert!(turns >= 16 << 20 >> 18, "{turns}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_takes_thirty_seconds_at_most_from_its_first_byte() {
        let frames = [vec![1], vec![0x18]].map(Bytes::from);
        let whole = message(&frames);
        // In the middle of a header, of a frame, and between two frames of a message.
        for cut in 1..whole.len() {
            let host = Host::new();
            let (near, far) = duplex(4096);
            let (reading, mut writing) = tokio::io::split(near);
            let idle = Duration::from_secs(600);
            let dragging = async {
                writing.write_all(&handshake()).await.unwrap();
                sleep(idle).await;
                for byte in &whole[..cut] {
                    writing.write_all(&[*byte]).await.unwrap();
                    sleep(MESSAGE / 10).await;
                }
                drain(reading).await;
            };
            let (ended, ()) = tokio::join!(host.serve(far), dragging);
            assert_eq!(ended, (Departure::GivenUp, idle + MESSAGE), "after {cut} bytes");
            assert_eq!(host.dropped("deadline").await, 1);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_no_answers_is_cut() {
        let host = Host::new();
        let (near, far) = duplex(1024);
        let (reading, mut writing) = tokio::io::split(near);
        let asking = async {
            writing.write_all(&handshake()).await.unwrap();
            while writing.write_all(&noop()).await.is_ok() {}
        };
        let ((departure, took), ()) = tokio::join!(host.serve(far), asking);
        assert_eq!((departure, took), (Departure::GivenUp, MESSAGE));
        assert_eq!(host.dropped("deadline").await, 1);
        drop(reading);
    }

    #[tokio::test(start_paused = true)]
    async fn who_holds_the_most_of_unfinished_messages_is_cut_and_everybody_has_a_share() {
        let host = Host { unfinished: Unfinished::new(1000, 100), ..Host::new() };
        // Both in a frame that has not arrived whole and in frames that have.
        let part = |length: u16| {
            let announced = (u64::from(length) + 100).to_be_bytes();
            [&[3][..], &announced, &vec![0; length.into()]].concat()
        };
        let frames = |count: u16| [&[1, 50][..], &[0; 50]].concat().repeat(count.into());
        let client = |sent: Vec<u8>, after: u64| {
            let (near, far) = duplex(4096);
            let (reading, mut writing) = tokio::io::split(near);
            let talking = async move {
                sleep(Duration::from_millis(after)).await;
                writing.write_all(&handshake()).await.unwrap();
                writing.write_all(&sent).await.unwrap();
                sleep(Duration::from_secs(1)).await;
                let _ = writing.shutdown().await; // it may have been cut
                drain(reading).await;
            };
            async { tokio::join!(host.serve(far), talking).0.0 }
        };
        let (ended, cut) = (Departure::Ended, Departure::GivenUp);
        for (sent, expected) in [
            ([part(500), part(400), part(90)], [ended, ended, ended]),
            ([part(500), frames(12), part(90)], [ended, cut, ended]), // the one that came grew larger
            ([part(600), part(500), part(90)], [cut, ended, ended]),
            ([part(550), part(550), part(90)], [cut, ended, ended]),
            ([frames(12), part(500), part(90)], [cut, ended, ended]),
            ([part(990), part(90), part(90)], [ended, ended, ended]), // shares do not count
            ([part(990), part(90), part(200)], [cut, ended, ended]),
        ] {
            let before = host.dropped("unfinished_messages").await;
            let lengths = sent.each_ref().map(Vec::len);
            let [first, second, third] = sent;
            let told = tokio::join!(client(first, 0), client(second, 100), client(third, 200));
            assert_eq!([told.0, told.1, told.2], expected, "{lengths:?}");
            let cuts = expected.iter().filter(|departure| **departure == cut).count();
            let counted = host.dropped("unfinished_messages").await - before;
            assert_eq!(counted, i64::try_from(cuts).unwrap());
            assert_eq!(host.unfinished.bytes(), 0, "what they held is given back");
            assert_eq!(host.unfinished.large.lock().unwrap().bytes, 0);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_came_before_a_malformed_frame_is_answered() {
        let subscriber =
            [&handshake()[..64], b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03SUB"].concat();
        let served = [&handshake()[..], &noop(), &[0xff]].concat();
        for (sent, answer) in [(served, &b"\xa2OK"[..]), (subscriber, b"ERROR")] {
            let host = Host::new();
            let (mut near, far) = duplex(4096);
            near.write_all(&sent).await.unwrap();
            assert_eq!(host.serve(far).await.0, Departure::GivenUp);
            let mut received = Vec::new();
            near.read_to_end(&mut received).await.unwrap();
            assert!(received.windows(answer.len()).any(|bytes| bytes == answer), "{answer:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_ended_a_connection_is_told_apart() {
        let host = Host::new();
        let (near, far) = duplex(4096);
        drop(near);
        assert_eq!(host.serve(far).await.0, Departure::Ended);
        let (mut near, far) = duplex(4096);
        near.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        assert_eq!(host.serve(far).await.0, Departure::GivenUp);
        assert_eq!(host.dropped("zmtp_greeting").await, 1);
    }
}
