//! The client: a task that keeps a connection, and what is asked over it.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvferry_core::key::Layout;
use kvferry_core::{Error, ErrorCode, Result};
use kvferry_wire::message::{EXTENSION, Value};
use kvferry_wire::{Operation, Reply, Request};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval_at, sleep, timeout};

use crate::address::Address;
use crate::link::Link;
use crate::session::{Outgoing, Session, lock};

/// Between the end of a connection and the first try to have another.
const RECONNECT_MIN: Duration = Duration::from_millis(50);
/// Between two tries at most.
const RECONNECT_MAX: Duration = Duration::from_secs(1);
/// How long `close` waits for the server to hear of it.
const GOODBYE: Duration = Duration::from_millis(500);

/// How to reach a server.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// `tcp://host:port` or `host:port`; loopback hosts only.
    pub address: String,
    /// How long any request may take, beside the deadline that its caller gives; 5 s unless told.
    pub request_timeout: Duration,
    /// From connecting to being ready, for the first connection and for later ones; 3 s unless
    /// told.
    pub connect_timeout: Duration,
    /// Between two signs of life, sent from the first registration on; 5 s unless told. A server
    /// that is silent for a whole interval after one is given up, and connected to anew.
    pub heartbeat_interval: Duration,
}

impl ConnectOptions {
    /// The defaults for a server at `address`.
    pub fn new(address: impl Into<String>) -> Self {
        Self {
            address: address.into(),
            request_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(3),
            heartbeat_interval: Duration::from_secs(5),
        }
    }
}

/// What a server says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerInfo {
    /// Tokens of one chunk.
    pub chunk_size: u32,
    /// kvferry's version; `None` for LMCache's server, which does not say.
    pub version: Option<String>,
    /// Random at each start of the server; `None` for LMCache's.
    pub boot_token: Option<[u8; 16]>,
    /// The server's process; `None` for LMCache's.
    pub pid: Option<u32>,
}

/// Whether there is a connection.
#[derive(Clone)]
enum State {
    Connected(Arc<Session>),
    /// Why there is none.
    Disconnected(Error),
    Closed,
}

/// What the client and its task share.
pub(crate) struct Shared {
    address: Address,
    options: ConnectOptions,
    state: watch::Sender<State>,
    info: Mutex<ServerInfo>,
    registrations: Mutex<Vec<(u64, Layout)>>,
}

/// A connection to a server: kvferry's, or LMCache's in engine-driven mode with shared memory.
///
/// A task on the tokio runtime that [`Client::connect`] ran on keeps the connection: it sends signs
/// of life, connects anew when the connection ends, registers what was registered, and maps the
/// pool again when the server was started anew. While there is no connection every request fails at
/// once with [`ErrorCode::Unreachable`]; a server that does not answer is [`ErrorCode::Timeout`].
///
/// Dropping a client ends its connection; [`Client::close`] says goodbye first.
pub struct Client {
    pub(crate) shared: Arc<Shared>,
}

/// A new connection, ready for requests.
type Opened = (Link, Arc<Session>, mpsc::UnboundedReceiver<Outgoing>, ServerInfo);

impl Client {
    /// Connects, and learns what the server can. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// [`ErrorCode::Unreachable`] when nothing listens at the address, [`ErrorCode::Timeout`] when
    /// what listens does not answer, [`ErrorCode::Protocol`] when it is no such server,
    /// [`ErrorCode::UnsupportedOption`] when the address is not loopback.
    pub async fn connect(options: ConnectOptions) -> Result<Self> {
        let address = Address::parse(&options.address)?;
        let opened = within(&options, &address, open(&address, &[], None)).await?;
        let shared = Arc::new(Shared {
            address,
            options,
            state: watch::Sender::new(State::Connected(Arc::clone(&opened.1))),
            info: Mutex::new(opened.3.clone()),
            registrations: Mutex::default(),
        });
        let task = Arc::clone(&shared);
        tokio::spawn(async move {
            let mut state = task.state.subscribe();
            tokio::select! {
                _ = state.wait_for(|state| matches!(state, State::Closed)) => {}
                () = keep_connected(&task, opened) => {}
            }
        });
        Ok(Self { shared })
    }

    /// What the server said when it was last connected to.
    pub fn server(&self) -> ServerInfo {
        lock(&self.shared.info).clone()
    }

    /// Waits until there is a connection.
    ///
    /// # Errors
    /// At `deadline`, why there is none; [`ErrorCode::Closed`] after [`Client::close`].
    pub async fn connected(&self, deadline: Instant) -> Result<()> {
        let mut state = self.shared.state.subscribe();
        let settled = state.wait_for(|state| !matches!(state, State::Disconnected(_)));
        let _ = tokio::time::timeout_at(deadline.into(), settled).await; // the state says more
        self.session().map(drop)
    }

    /// Asks for a sign of life and says how long it took.
    pub async fn ping(&self) -> Result<Duration> {
        let begin = Instant::now();
        self.request(&Request::Ping { instance_id: None }).await?;
        Ok(begin.elapsed())
    }

    /// The server's counters and settings, by name.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedOption`] from a server of LMCache, which tells them over HTTP only.
    pub async fn status(&self) -> Result<Vec<(String, Value)>> {
        if self.session()?.hello.is_none() {
            return Err(Error::new(
                ErrorCode::UnsupportedOption,
                format!(
                    "the server at {} is not kvferry's and has no status; ask LMCache's over HTTP",
                    self.shared.address
                ),
            ));
        }
        match self.request(&Request::Status).await? {
            Reply::Status(entries) => Ok(entries),
            reply => Err(unexpected(Operation::Status, &reply)),
        }
    }

    /// Tells the server that this client goes, waits shortly for it to hear, and ends the
    /// connection. Requests under way and all later ones fail with [`ErrorCode::Closed`]. Calling
    /// it again does nothing.
    pub async fn close(&self) {
        let registrations = std::mem::take(&mut *lock(&self.shared.registrations));
        if let Ok(session) = self.session() {
            session.shut(); // unregistering gives the slots to others
            let deadline = Instant::now() + GOODBYE;
            for (instance_id, _) in registrations {
                // The end of the connection tells the same.
                let _ = session.request(&Request::Unregister { instance_id }, deadline).await;
            }
        }
        self.end();
    }

    fn end(&self) {
        if let State::Connected(session) = self.shared.state.send_replace(State::Closed) {
            session.end(&self.shared.closed());
        }
    }

    async fn request(&self, request: &Request) -> Result<Reply> {
        self.session()?.request(request, Instant::now() + self.shared.options.request_timeout).await
    }

    /// The connection that there is.
    pub(crate) fn session(&self) -> Result<Arc<Session>> {
        match &*self.shared.state.borrow() {
            State::Connected(session) => Ok(Arc::clone(session)),
            State::Disconnected(error) => Err(error.clone()),
            State::Closed => Err(self.shared.closed()),
        }
    }

    /// The sooner of the caller's deadline and ours.
    pub(crate) fn deadline(&self, deadline: Instant) -> Instant {
        deadline.min(Instant::now() + self.shared.options.request_timeout)
    }

    /// Remembers a layout, under a new name for its instance.
    pub(crate) fn remember(&self, layout: Layout) -> u64 {
        let instance = random() >> 1; // LMCache's are positive and signed
        lock(&self.shared.registrations).push((instance, layout));
        instance
    }

    /// Forgets it.
    pub(crate) fn forget(&self, instance: u64) {
        lock(&self.shared.registrations).retain(|(known, _)| *known != instance);
    }

    /// Bytes of one object of the instance.
    pub(crate) fn object_bytes(&self, instance: u64) -> Result<u64> {
        let registrations = lock(&self.shared.registrations);
        let layout = registrations.iter().find(|(known, _)| *known == instance);
        let (_, layout) = layout.ok_or_else(|| {
            Error::invalid(format!("instance {instance} is not registered with this client"))
        })?;
        layout.object_bytes(lock(&self.shared.info).chunk_size)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn closed(&self) -> Error {
        Error::new(
            ErrorCode::Closed,
            format!("the client of {} was closed; connect another one", self.address),
        )
    }

    /// A new state, unless the client was closed.
    fn set(&self, new: State) {
        self.state.send_if_modified(|state| match state {
            State::Closed => false,
            _ => {
                *state = new;
                true
            }
        });
    }
}

/// The error of a reply that is not what the operation answers.
pub(crate) fn unexpected(operation: Operation, reply: &Reply) -> Error {
    Error::new(ErrorCode::Protocol, format!("{operation} was answered with {reply:?}"))
}

/// A connection in use. However its use ends, the socket closes after the last write to what was
/// granted over it: the server gives the slots to others then.
struct InUse {
    session: Arc<Session>,
    link: Link,
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.session.shut(); // the fields go after this, the socket with them
    }
}

/// Serves requests over one connection after another.
async fn keep_connected(shared: &Shared, opened: Opened) {
    let (link, session, mut outgoing, _) = opened;
    let mut in_use = InUse { session, link };
    let mut pause = RECONNECT_MIN;
    loop {
        let began = Instant::now();
        let Err(error) = serve(shared, &mut in_use, &mut outgoing).await;
        shared.set(State::Disconnected(error.clone()));
        in_use.session.end(&error);
        let last = Arc::clone(&in_use.session);
        drop(in_use); // a server that lives on shall see the end of this connection
        if began.elapsed() > RECONNECT_MAX {
            pause = RECONNECT_MIN;
        }
        let (link, session, new_outgoing, info) = loop {
            sleep(pause.mul_f64(0.5 + 0.5 * random_fraction())).await;
            pause = (pause * 2).min(RECONNECT_MAX);
            match reopen(shared, &last).await {
                Ok(opened) => break opened,
                Err(error) => shared.set(State::Disconnected(error)),
            }
        };
        in_use = InUse { session, link };
        outgoing = new_outgoing;
        *lock(&shared.info) = info;
        shared.set(State::Connected(Arc::clone(&in_use.session)));
    }
}

/// Sends what is queued, delivers what arrives, gives signs of life; until the connection ends.
async fn serve(
    shared: &Shared,
    in_use: &mut InUse,
    outgoing: &mut mpsc::UnboundedReceiver<Outgoing>,
) -> Result<std::convert::Infallible> {
    let InUse { session, link } = &mut *in_use;
    let interval = shared.options.heartbeat_interval;
    let mut heartbeat = interval_at(tokio::time::Instant::now() + interval, interval);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // A sign of life was sent, and nothing has come since.
    let mut silent = false;
    loop {
        while let Some(message) = link.next_message()? {
            silent = false;
            session.deliver(&message);
        }
        tokio::select! {
            progress = link.progress() => progress?,
            Some(request) = outgoing.recv(), if link.has_room() => {
                let mut next = Some(request);
                // Requests that were made together go together: the server wakes once.
                while let Some(request) = next {
                    if let Some(frames) = session.dequeue(request)
                        && let Err(error) = link.send(&frames)
                    {
                        session.fail(&frames[0], error);
                    }
                    next = if link.has_room() { outgoing.try_recv().ok() } else { None };
                }
            }
            _ = heartbeat.tick() => {
                if silent {
                    return Err(Error::new(
                        ErrorCode::Timeout,
                        format!("the server at {} gives no sign of life", shared.address),
                    ));
                }
                for (instance, _) in &*lock(&shared.registrations) {
                    session.send(&Request::Ping { instance_id: Some(*instance) });
                    silent = true;
                }
            }
        }
    }
}

/// Another connection after the end of one: what was registered is registered there too.
async fn reopen(shared: &Shared, last: &Session) -> Result<Opened> {
    let registrations = lock(&shared.registrations).clone();
    let opening = open(&shared.address, &registrations, Some(last));
    let opened = within(&shared.options, &shared.address, opening).await?;
    let (was, is) = (lock(&shared.info).chunk_size, opened.3.chunk_size);
    if was != is {
        return Err(Error::new(
            ErrorCode::Protocol,
            format!(
                "the server at {} was started anew with chunks of {is} tokens instead of {was}; \
                 connect another client",
                shared.address
            ),
        ));
    }
    Ok(opened)
}

async fn within<T>(
    options: &ConnectOptions,
    address: &Address,
    opening: impl Future<Output = Result<T>>,
) -> Result<T> {
    timeout(options.connect_timeout, opening).await.unwrap_or_else(|_| {
        Err(Error::new(
            ErrorCode::Timeout,
            format!("the server at {address} did not answer within {:?}", options.connect_timeout),
        ))
    })
}

/// Connects, learns what the server can, and registers.
async fn open(
    address: &Address,
    registrations: &[(u64, Layout)],
    last: Option<&Session>,
) -> Result<Opened> {
    let mut link = Link::open(address).await?;
    let chunk_size = match link.exchange(&Request::GetChunkSize).await? {
        Reply::Integer(size) => u32::try_from(size).ok().filter(|size| *size > 0),
        _ => None,
    };
    let chunk_size =
        chunk_size.ok_or_else(|| link.broken("its chunks have no size from 1 to 2^32 - 1"))?;
    let extended = match link.exchange(&Request::GetExperimental).await? {
        Reply::Names(names) => names.iter().any(|name| name == EXTENSION),
        _ => false,
    };
    let hello = match extended {
        true => match link.exchange(&Request::Hello).await? {
            Reply::Hello(hello) => Some(hello),
            reply => return Err(unexpected(Operation::Hello, &reply)),
        },
        false => None,
    };
    let info = ServerInfo {
        chunk_size,
        version: hello.as_ref().map(|hello| hello.version.clone()),
        boot_token: hello.as_ref().map(|hello| hello.boot_token),
        pid: hello.as_ref().map(|hello| hello.pid),
    };
    // The mapping of a server that was not started anew is still right; of others nobody knows.
    let token = info.boot_token;
    let same = |last: &&Session| {
        token.is_some() && last.hello.as_ref().map(|hello| hello.boot_token) == token
    };
    let pool = last.filter(same).and_then(Session::pool);
    let (session, outgoing) = Session::new(address.clone(), hello, pool);
    for (instance_id, layout) in registrations {
        let register = Request::Register { instance_id: *instance_id, layout: layout.clone() };
        session.map(link.exchange(&register).await?)?;
    }
    Ok((link, Arc::new(session), outgoing, info))
}

/// Random enough for names and pauses: the standard library's keys of a hash map.
fn random() -> u64 {
    RandomState::new().hash_one(0)
}

/// In 0..=1.
fn random_fraction() -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a pause needs few bits")]
    let fraction = random() as f64 / u64::MAX as f64;
    fraction
}
