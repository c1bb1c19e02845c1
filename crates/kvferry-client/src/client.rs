//! The client: a task that keeps a connection, and what is asked over it.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use kvferry_core::cache::Cache;
use kvferry_core::key::{Dtype, Layout};
use kvferry_core::{Error, ErrorCode, Result};
use kvferry_wire::message::{EXTENSION, Value};
use kvferry_wire::{Dialect, Operation, Reply, Request};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval_at, sleep, timeout_at};

use crate::address::{Address, Token};
use crate::gate::LOOK;
use crate::link::{Link, unreachable};
use crate::release::{self, Release};
use crate::session::{Session, lock};
use crate::writers::Writers;

/// Between the end of a connection and the first try to have another.
const RECONNECT_MIN: Duration = Duration::from_millis(50);
/// Between two tries at most.
const RECONNECT_MAX: Duration = Duration::from_secs(1);
/// How long a connection that has ended stays for what a GPU writes to what was granted over it; from then on, until the
/// process ends.
const QUIET_MAX: Duration = Duration::from_secs(10);
/// How long `close` waits for the server to hear of it.
const GOODBYE: Duration = Duration::from_millis(500);
/// From connecting to being ready, unless told.
const CONNECT: Duration = Duration::from_secs(3);

/// How to reach a server.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// `tcp://host:port`, `host:port` or `ipc:///path`; loopback hosts only, unless there is a token.
    pub address: String,
    /// What the server lets clients in for; it is sent in clear, and to a server that asks for one only. None unless
    /// told.
    pub token: Option<Token>,
    /// Whether the server's pool is mapped where that is possible; else, and where it is not, bytes go in frames. True
    /// unless told.
    pub shared_memory: bool,
    /// How long any request may take, beside the deadline that its caller gives; 5 s unless told.
    pub request_timeout: Duration,
    /// From connecting to being ready; 3 s unless told. Later connections have at least 3 s.
    pub connect_timeout: Duration,
    /// Between two signs of life, sent from the first registration on; 5 s unless told. A server
    /// that is silent for a whole interval after one is given up, and connected to anew.
    pub heartbeat_interval: Duration,
    /// Tokens of a chunk to count with when no server answers at first: the client begins without a
    /// connection then, and has one as soon as a server is there whose chunks have this size. `None`,
    /// unless told: no server is an error.
    pub assumed_chunk_size: Option<u32>,
}

impl ConnectOptions {
    /// The defaults for a server at `address`.
    pub fn new(address: impl Into<String>) -> Self {
        Self {
            address: address.into(),
            token: None,
            shared_memory: true,
            request_timeout: Duration::from_secs(5),
            connect_timeout: CONNECT,
            heartbeat_interval: Duration::from_secs(5),
            assumed_chunk_size: None,
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
    /// What it speaks, which says of LMCache's server between which releases it is.
    pub dialect: Dialect,
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

impl State {
    /// Whatever silence ended a connection or kept one from beginning, there is none now: a call that
    /// fails for that has not waited.
    fn disconnected(mut error: Error) -> Self {
        if error.code == ErrorCode::Timeout {
            error.code = ErrorCode::Unreachable;
        }
        Self::Disconnected(error)
    }
}

/// What the client and its task share.
pub(crate) struct Shared {
    pub(crate) address: Address,
    options: ConnectOptions,
    state: watch::Sender<State>,
    info: Mutex<ServerInfo>,
    registrations: Mutex<Vec<(u64, Layout)>>,
    writers: Writers,
}

/// A connection to a server: kvferry's, or LMCache's in engine-driven mode with shared memory.
///
/// A task on the tokio runtime that [`Client::connect`] ran on keeps the connection: it sends signs
/// of life, connects anew when the connection ends, registers what was registered, and maps the
/// pool again when the server was started anew. While there is no connection every request fails at
/// once with [`ErrorCode::Unreachable`], or [`ErrorCode::Protocol`] when what is there cannot be used; a
/// connected server that does not answer is [`ErrorCode::Timeout`].
///
/// Servers are LMCache 0.4.7, 0.5.0 to 0.5.6, and kvferry's; which one it is, each connection finds out.
/// Before LMCache 0.5.5 a server knows the readers of an object (MLA: all tensor-parallel ranks) only
/// when they outnumber the KV world size; where it does not, lookups for several readers fail with
/// [`ErrorCode::Protocol`].
///
/// Dropping a client ends its connection; [`Client::close`] says goodbye first.
pub struct Client {
    pub(crate) shared: Arc<Shared>,
}

/// A new connection, ready for requests.
type Opened = (Link, Arc<Session>, ServerInfo);

impl Client {
    /// Connects, and learns what the server can. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// [`ErrorCode::Unreachable`] when nothing listens at the address, [`ErrorCode::Timeout`] when
    /// what listens does not answer; neither with [`ConnectOptions::assumed_chunk_size`], see
    /// [`Client::failure`]. [`ErrorCode::Protocol`] when it is no such server,
    /// [`ErrorCode::Unauthorized`] when it wants a token, or another one; [`ErrorCode::UnsupportedOption`] when the
    /// address is not loopback and there is no token, or the server takes none.
    pub async fn connect(mut options: ConnectOptions) -> Result<Self> {
        let mut address = Address::parse(&options.address, options.token.clone())?;
        address.chunk_size = options.assumed_chunk_size;
        let opened = open(&address, &options, options.connect_timeout, None).await;
        let (state, info) = match (&opened, options.assumed_chunk_size) {
            (Ok(opened), _) => (State::Connected(Arc::clone(&opened.1)), opened.2.clone()),
            (Err(error), Some(chunk_size)) if is_absence(error) => {
                let info = ServerInfo {
                    chunk_size,
                    version: None,
                    dialect: Dialect::Current,
                    boot_token: None,
                    pid: None,
                };
                (State::disconnected(error.clone()), info)
            }
            (Err(error), _) => return Err(error.clone()),
        };
        address.chunk_size = Some(info.chunk_size);
        options.connect_timeout = options.connect_timeout.max(CONNECT);
        let shared = Arc::new(Shared {
            address,
            options,
            state: watch::Sender::new(state),
            info: Mutex::new(info),
            registrations: Mutex::default(),
            writers: Writers::default(),
        });
        let task = Arc::clone(&shared);
        tokio::spawn(async move {
            let mut state = task.state.subscribe();
            // The state is not borrowed while what the connection leaves is told.
            let closed = async {
                drop(state.wait_for(|state| matches!(state, State::Closed)).await);
            };
            tokio::select! {
                () = closed => {}
                () = keep_connected(&task, opened.ok()) => {}
            }
        });
        Ok(Self { shared })
    }

    /// What the server said when it was last connected to; before that, of the chunk size what
    /// [`ConnectOptions::assumed_chunk_size`] says.
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
        let _ = timeout_at(deadline.into(), settled).await; // the state says more
        self.session().map(drop)
    }

    /// Why there is no connection now; `None` while there is one.
    pub fn failure(&self) -> Option<Error> {
        self.session().err()
    }

    /// Why bytes go to and from the server in frames, where they do: its pool cannot be mapped here, or
    /// [`ConnectOptions::shared_memory`] is false. Found out with the first registration of a connection; `None` before,
    /// and for shared memory.
    pub fn in_frames(&self) -> Option<Error> {
        self.session().ok()?.in_frames()
    }

    /// Finds out what [`Client::in_frames`] says, by a registration that is taken back.
    ///
    /// # Errors
    /// As [`Cache::register`]: there is neither shared memory nor a server that takes frames.
    pub async fn find_way(&self, deadline: Instant) -> Result<Option<Error>> {
        let layout = Layout {
            model_name: "kvferry/doctor".into(),
            world_size: 1,
            block_size: 1,
            num_layers: 1,
            hidden_dim_size: 1,
            dtype: Dtype::new("uint8")?,
            single_plane: true,
            num_physical_slots: Some(1),
        };
        let instance = self.register(layout, deadline).await?;
        let way = self.in_frames();
        self.unregister(instance, deadline).await?;
        Ok(way)
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
        let session = self.session()?;
        if session.hello.is_none() {
            return Err(Error::new(
                ErrorCode::UnsupportedOption,
                format!(
                    "the server at {} is not kvferry's and has no status; ask LMCache's over HTTP",
                    self.shared.address
                ),
            ));
        }
        session.check_admin(Operation::Status)?;
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
            let deadline = Instant::now() + GOODBYE;
            // Unregistering gives the slots to others: not while a GPU still writes to them.
            let is_quiet =
                session.shut() || timeout_at(deadline.into(), session.quiet()).await.is_ok();
            for (instance_id, _) in registrations.into_iter().filter(|_| is_quiet) {
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

    /// Remembers a layout, under a new name for its instance; with the connection to register it over.
    /// Without one, where that is no error, the next connection begins with it.
    pub(crate) fn remember(&self, layout: Layout) -> Result<(u64, Option<Arc<Session>>)> {
        let mut registrations = lock(&self.shared.registrations);
        let session = match self.session() {
            Ok(session) => Some(session),
            Err(error) if error.code == ErrorCode::Closed => return Err(error),
            Err(_) if self.shared.options.assumed_chunk_size.is_some() => None,
            Err(error) => return Err(error),
        };
        let instance = random() >> 1; // LMCache's are positive and signed
        registrations.push((instance, layout));
        Ok((instance, session))
    }

    /// Forgets it.
    pub(crate) fn forget(&self, instance: u64) {
        lock(&self.shared.registrations).retain(|(known, _)| *known != instance);
        self.shared.writers.forget(instance);
    }

    pub(crate) fn writers(&self) -> &Writers {
        &self.shared.writers
    }

    /// Bytes of one object of the instance; closed, where it is forgotten: by its own end, or by the client's, whose
    /// goodbye takes a while.
    pub(crate) fn object_bytes(&self, instance: u64) -> Result<u64> {
        let registrations = lock(&self.shared.registrations);
        let layout = registrations.iter().find(|(known, _)| *known == instance);
        let (_, layout) = layout.ok_or_else(|| {
            let message = format!(
                "a cache of the client of {} was closed, or the client; open another one",
                self.shared.address
            );
            Error::new(ErrorCode::Closed, message)
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
/// granted over it, or with the process: the server gives the slots to others then.
struct InUse {
    session: Arc<Session>,
    link: Option<Link>,
}

impl Drop for InUse {
    fn drop(&mut self) {
        // Who waits hears of it even where the runtime ends, which polls nobody any more.
        self.session.end(&self.session.ended());
        let until = Instant::now() + QUIET_MAX;
        let last = Last { session: Arc::clone(&self.session), link: self.link.take(), until };
        // What a GPU writes takes as long as the GPU does. Nobody waits for it but the socket.
        if !last.session.shut()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(async move {
                let _ = timeout_at(last.until.into(), last.session.quiet()).await;
            });
        }
    }
}

/// A socket that closes when nothing is written any more.
struct Last {
    session: Arc<Session>,
    link: Option<Link>,
    until: Instant,
}

impl Drop for Last {
    fn drop(&mut self) {
        while !self.session.is_quiet() {
            if Instant::now() >= self.until {
                return std::mem::forget(self.link.take());
            }
            thread::sleep(LOOK); // the runtime ends
        }
    }
}

/// Serves requests over one connection after another.
async fn keep_connected(shared: &Shared, first: Option<Opened>) {
    let mut pause = RECONNECT_MIN;
    let (mut next, mut last) = (first, None);
    loop {
        let (link, session, _) = match next.take() {
            Some(opened) => opened,
            None => loop {
                sleep(pause.mul_f64(0.5 + 0.5 * random_fraction())).await;
                pause = (pause * 2).min(RECONNECT_MAX);
                match reopen(shared, last.as_deref()).await {
                    Ok(opened) => break opened,
                    Err(error) => shared.set(State::disconnected(error)),
                }
            },
        };
        let mut in_use = InUse { session, link: Some(link) };
        let began = Instant::now();
        let Err(error) = serve(shared, &mut in_use).await;
        shared.set(State::disconnected(error.clone()));
        in_use.session.end(&error);
        last = Some(Arc::clone(&in_use.session));
        drop(in_use); // a server that lives on shall see the end of this connection
        if began.elapsed() > RECONNECT_MAX {
            pause = RECONNECT_MIN;
        }
    }
}

/// Sends what is queued, delivers what arrives, gives signs of life; until the connection ends.
async fn serve(shared: &Shared, in_use: &mut InUse) -> Result<std::convert::Infallible> {
    let InUse { session, link: Some(link) } = in_use else { return Err(shared.closed()) };
    let stream = Arc::clone(link.stream());
    let interval = shared.options.heartbeat_interval;
    let mut heartbeat = interval_at(tokio::time::Instant::now() + interval, interval);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // A sign of life was sent, and nothing has come since.
    let mut silent = false;
    loop {
        tokio::task::consume_budget().await; // others, too, while a socket always has something
        while let Some(message) = link.next_message()? {
            silent = false;
            session.deliver(&message);
        }
        session.reply(&link.take_output());
        link.land(|before, here, length| session.landing(before, here, length));
        tokio::select! {
            read = link.read() => {
                read?;
                if let Some(uid) = link.landed() {
                    silent = false;
                    session.landed(&uid);
                }
            }
            error = session.drain(&stream) => return Err(unreachable(&shared.address, error)),
            _ = heartbeat.tick() => {
                if silent {
                    return Err(Error::new(
                        ErrorCode::Timeout,
                        format!("the server at {} gives no sign of life", shared.address),
                    ));
                }
                for (instance, _) in &*lock(&shared.registrations) {
                    let _ = session.send(&Request::Ping { instance_id: Some(*instance) });
                    silent = true;
                }
            }
        }
    }
}

/// Another connection, after the end of one or the lack of a first: what was registered is registered
/// there too, then requests may go over it.
async fn reopen(shared: &Shared, last: Option<&Session>) -> Result<Opened> {
    let Shared { address, options, .. } = shared;
    let deadline = Instant::now() + options.connect_timeout;
    let (mut link, session, info) = open(address, options, options.connect_timeout, last).await?;
    let (was, is) = (lock(&shared.info).chunk_size, info.chunk_size);
    if was != is {
        return Err(Error::new(
            ErrorCode::Protocol,
            format!(
                "the server at {address} has chunks of {is} tokens, this client counts with {was}; \
                 connect another client, or start the server with `{}`",
                address.command()
            ),
        ));
    }
    let mut registered = Vec::new();
    loop {
        let layouts: Vec<(u64, Layout)> = {
            let registrations = lock(&shared.registrations);
            let new = registrations.iter().filter(|(instance, _)| !registered.contains(instance));
            let new: Vec<_> = new.cloned().collect();
            if new.is_empty() {
                *lock(&shared.info) = info.clone();
                // Under the lock: whoever remembers another layout from now on has this connection.
                shared.set(State::Connected(Arc::clone(&session)));
                return Ok((link, session, info));
            }
            new
        };
        for (instance_id, layout) in layouts {
            let register = Request::Register { instance_id, layout };
            let late = || silent(address, options.connect_timeout);
            if let Some(frames) =
                session.map(by(deadline, link.exchange(&register), late).await?)?
            {
                by(deadline, link.exchange(&frames), || silent(address, options.connect_timeout))
                    .await?;
            }
            registered.push(instance_id);
        }
    }
}

/// What `work` gives before `deadline`.
async fn by<T>(
    deadline: Instant,
    work: impl Future<Output = Result<T>>,
    late: impl FnOnce() -> Error,
) -> Result<T> {
    timeout_at(deadline.into(), work).await.unwrap_or_else(|_| Err(late()))
}

/// Whether this says that no server is there, rather than something else.
fn is_absence(error: &Error) -> bool {
    matches!(error.code, ErrorCode::Unreachable | ErrorCode::Timeout)
}

fn silent(address: &Address, waited: Duration) -> Error {
    Error::new(
        ErrorCode::Timeout,
        format!(
            "what listens at {address} did not answer within {waited:?}; end it, and start a server \
             with `{}`",
            address.command()
        ),
    )
}

/// Connects, and learns what the server can.
async fn open(
    address: &Address,
    options: &ConnectOptions,
    time: Duration,
    last: Option<&Session>,
) -> Result<Opened> {
    let deadline = Instant::now() + time;
    let silent = || silent(address, time);
    let unknown = || {
        Error::new(
            ErrorCode::Timeout,
            format!(
                "the server at {address} did not answer within {time:?}: it hangs, or its release is \
                 none that kvferry knows ({}); start one with `{}`",
                Dialect::RELEASES,
                address.command()
            ),
        )
    };
    let mut link = by(deadline, Link::open(address), silent).await?;
    let asking = release::find(&mut link, time / 4);
    let release = by(deadline, asking, unknown).await?;
    let Release { dialect, chunk_size, .. } = release;
    link.dialect = dialect;
    let hello = match release.announces(EXTENSION) {
        true => match by(deadline, link.exchange(&Request::Hello), silent).await? {
            Reply::Hello(hello) => Some(hello),
            reply => return Err(unexpected(Operation::Hello, &reply)),
        },
        false => None,
    };
    let info = ServerInfo {
        chunk_size,
        version: hello.as_ref().map(|hello| hello.version.clone()),
        dialect,
        boot_token: hello.as_ref().map(|hello| hello.boot_token),
        pid: hello.as_ref().map(|hello| hello.pid),
    };
    // The mapping of a server that was not started anew is still right; of others nobody knows.
    let token = info.boot_token;
    let same = |last: &&Session| {
        token.is_some() && last.hello.as_ref().map(|hello| hello.boot_token) == token
    };
    let pool = last.filter(same).and_then(Session::pool);
    let session =
        Session::new(&mut link, hello, options.shared_memory, |name| release.announces(name), pool);
    Ok((link, Arc::new(session), info))
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
