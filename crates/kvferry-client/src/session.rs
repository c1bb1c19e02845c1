//! What belongs to one connection: requests under way, what the server granted, its pool.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvferry_core::cache::{Memory, Slot};
use kvferry_core::key::Key;
use kvferry_core::{Error, ErrorCode, Result};
use kvferry_wire::message::{Hello, Piece};
use kvferry_wire::{Dialect, Header, Operation, Reply, Request, RequestKey};
use tokio::sync::oneshot;
use tokio::time::sleep;

use crate::address::Address;
use crate::frames::{Landing, Place, Stage, Staged};
use crate::gate::{Gate, Gated, LOOK};
use crate::link::{Link, Stream};
use crate::outbox::{LIMITS, Outbox, Outgoing, QUEUED_BYTES_MAX, Refused};
use crate::pool::Pool;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Waiting {
    operation: Operation,
    answer: oneshot::Sender<Result<Reply>>,
    /// Where the piece goes that the reply brings.
    place: Option<Place>,
}

/// Requests that wait for a reply, by the bytes of their uid; after the end, why it ended.
type Requests = Result<HashMap<Bytes, Waiting>>;

/// What a prepare granted and no commit has ended.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Granted {
    operation: Operation,
    instance: u64,
    request_id: String,
    start: u64,
    end: u64,
}

/// A grant's slots at the server, and where they are here when bytes go in frames.
#[derive(Clone)]
pub(crate) struct Grant {
    /// For the request that ends it.
    pub(crate) key: RequestKey,
    pub(crate) slots: Vec<Slot>,
    pub(crate) staged: Option<(Vec<Slot>, Arc<Staged>)>,
    /// For slots to read from: until when the server does not use them anew, unless their retrieval is committed.
    pub(crate) held_until: Option<Instant>,
}

/// Loads of one range that have begun and not ended.
struct Readers {
    count: usize,
    /// Whether there was more than one at a time: the server ends the oldest, whoever commits.
    mixed: bool,
}

/// One of them, from before its prepare until after its commit.
pub(crate) struct Reader<'a> {
    session: &'a Session,
    granted: Option<Granted>,
}

impl Reader<'_> {
    /// It goes on after this, see [`Session::reader`].
    pub(crate) fn stay(mut self) {
        self.granted = None;
    }

    /// Whether there was no other all the time.
    pub(crate) fn is_alone(&self) -> bool {
        let readers = lock(&self.session.readers);
        let known = self.granted.as_ref().and_then(|granted| readers.get(granted));
        known.is_some_and(|readers| !readers.mixed)
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        let Some(granted) = &self.granted else { return };
        let mut readers = lock(&self.session.readers);
        if let Some(known) = readers.get_mut(granted) {
            known.count = known.count.saturating_sub(1);
            if known.count == 0 {
                readers.remove(granted);
            }
        }
    }
}

impl Granted {
    fn new(operation: Operation, key: &Key, instance: u64) -> Self {
        let Key { request_id, start, end, .. } = key;
        Self { operation, instance, request_id: request_id.clone(), start: *start, end: *end }
    }
}

pub(crate) struct Session {
    address: Address,
    /// Whose ids the server knows.
    pub(crate) dialect: Dialect,
    /// `None` for a server without our operations.
    pub(crate) hello: Option<Hello>,
    /// Whether it takes [`Request::Checksums`].
    pub(crate) keeps_checksums: bool,
    uids: AtomicU64,
    requests: Mutex<Requests>,
    outbox: Outbox,
    /// Oldest first, as their commits come.
    granted: Mutex<HashMap<Granted, VecDeque<Grant>>>,
    pool: Mutex<Option<Pool>>,
    /// Whether the server takes bytes in frames.
    offers_frames: bool,
    shared_memory: bool,
    /// Why bytes go in frames; `None` while they do not.
    in_frames: Mutex<Option<Error>>,
    pub(crate) stage: Arc<Stage>,
    gate: Arc<Gate>,
    readers: Mutex<HashMap<Granted, Readers>>,
}

impl Session {
    /// A session over `link`, whose output has gone out.
    pub(crate) fn new(
        link: &mut Link,
        hello: Option<Hello>,
        shared_memory: bool,
        announces: impl Fn(&str) -> bool,
        pool: Option<Pool>,
    ) -> Self {
        Self {
            address: link.address.clone(),
            dialect: link.dialect,
            hello,
            keeps_checksums: announces(Operation::Checksums.name()),
            uids: AtomicU64::new(link.uid()),
            requests: Mutex::new(Ok(HashMap::new())),
            outbox: Outbox::new(Arc::downgrade(link.stream())),
            granted: Mutex::default(),
            pool: Mutex::new(pool),
            offers_frames: announces(Operation::Frames.name()),
            shared_memory,
            in_frames: Mutex::default(),
            stage: Arc::default(),
            gate: Arc::default(),
            readers: Mutex::default(),
        }
    }

    /// Whether the server does for this connection what concerns everybody; it would not answer.
    pub(crate) fn check_admin(&self, operation: Operation) -> Result<()> {
        if self.hello.as_ref().is_none_or(|hello| hello.admin) {
            return Ok(());
        }
        Err(Error::new(
            ErrorCode::Unauthorized,
            format!(
                "the server at {} does {operation} for its admin token only: give that",
                self.address
            ),
        ))
    }

    /// Sends a request and waits for its reply until `deadline`. A reply that comes later is
    /// dropped.
    pub(crate) async fn request(&self, request: &Request, deadline: Instant) -> Result<Reply> {
        let pending = self.begin(request, None)?;
        self.flush();
        pending.wait(deadline).await
    }

    /// Prepares a request, which [`Session::flush`] or [`Session::nudge`] sends. A piece that its reply brings goes to
    /// `place` by itself where it can; the reply is `true` then.
    pub(crate) fn begin(&self, request: &Request, place: Option<Place>) -> Result<Pending<'_>> {
        let (answer, answered) = oneshot::channel();
        let operation = request.operation();
        let uid = self.enqueue(request, Some(Waiting { operation, answer, place }))?;
        Ok(Pending { session: self, uid, operation, answered })
    }

    /// Sends a request whose reply nobody waits for. The end of the session undoes what such requests are for.
    ///
    /// # Errors
    /// It is not sent: too much waits, or the connection has ended.
    pub(crate) fn send(&self, request: &Request) -> Result<()> {
        self.enqueue(request, None)?;
        self.flush();
        Ok(())
    }

    /// The same, together with what is sent next.
    pub(crate) fn send_with_next(&self, request: &Request) {
        let _ = self.enqueue(request, None);
    }

    /// Sends what was begun, in one message to the peer's kernel: it wakes once.
    pub(crate) fn flush(&self) {
        self.outbox.flush(|request| self.wants(request));
    }

    /// Lets the connection's task send what was begun, and what will be until then.
    pub(crate) fn nudge(&self) {
        self.outbox.nudge();
    }

    /// Sends what no caller sends, until the socket fails.
    pub(crate) async fn drain(&self, stream: &Stream) -> std::io::Error {
        self.outbox.drain(stream, |request| self.wants(request)).await
    }

    /// Answers the peer's commands.
    pub(crate) fn reply(&self, bytes: &[u8]) {
        self.outbox.reply(bytes);
    }

    /// Whether somebody waits for the reply, or it is sent for what it does, see [`ends`].
    fn wants(&self, request: &Outgoing) -> bool {
        !request.awaited
            || lock(&self.requests).as_ref().is_ok_and(|all| all.contains_key(&request.frames[0]))
    }

    fn enqueue(&self, request: &Request, waiting: Option<Waiting>) -> Result<Bytes> {
        let frames = request.encode(self.uids.fetch_add(1, Ordering::Relaxed), self.dialect);
        let uid = frames[0].clone();
        let awaited = waiting.is_some() && !ends(request.operation());
        LIMITS
            .check(&frames)
            .map_err(|error| Error::invalid(format!("the request cannot be sent: {error}")))?;
        let mut requests = lock(&self.requests);
        let all = requests.as_mut().map_err(|error| error.clone())?;
        if let Some(waiting) = waiting {
            all.insert(uid.clone(), waiting);
        }
        drop(requests);
        self.outbox.push(Outgoing { frames, awaited }).map_err(|refused| {
            self.take(&uid);
            match refused {
                Refused::Ended => self.ended(),
                Refused::TooMany => Error::new(
                    ErrorCode::Timeout,
                    format!(
                        "{QUEUED_BYTES_MAX} bytes of requests wait for the server at {}, which does not \
                         take them",
                        self.address
                    ),
                ),
            }
        })?;
        Ok(uid)
    }

    /// Hands a reply to whoever waits for it. What nobody waits for is dropped.
    pub(crate) fn deliver(&self, message: &[Bytes]) {
        let Ok((header, payload)) = Header::decode_in(self.dialect, message) else { return };
        let Some(Waiting { operation, answer, .. }) = self.take(&header.uid) else { return };
        let reply = if header.operation == operation {
            Reply::decode(operation, payload).map_err(Error::from)
        } else {
            Err(Error::new(
                ErrorCode::Protocol,
                format!(
                    "the server at {} answered {operation} with {}",
                    self.address, header.operation
                ),
            ))
        };
        let _ = answer.send(reply); // nobody may wait any more
    }

    /// The way of a piece to its place, when its reply begins so: the frames before it, and what is here of its own, which
    /// has `length` bytes. `None` for any other reply.
    pub(crate) fn landing(&self, before: &[Bytes], here: &[u8], length: usize) -> Option<Landing> {
        let (bytes, here) = Piece::begun(here, length)?;
        let (header, payload) = Header::decode_in(self.dialect, before).ok()?;
        let fits = |waiting: &Waiting| {
            let place = waiting.place.clone().filter(|place| place.bytes == bytes);
            place.filter(|_| waiting.operation == header.operation && payload.is_empty())
        };
        let place = lock(&self.requests).as_ref().ok()?.get(&header.uid).and_then(fits)?;
        Landing::new(header.uid, place, here)
    }

    /// Tells who waits for a piece that it lies in its place.
    pub(crate) fn landed(&self, uid: &Bytes) {
        if let Some(Waiting { answer, .. }) = self.take(uid) {
            let _ = answer.send(Ok(Reply::Boolean(true))); // nobody may wait any more
        }
    }

    fn take(&self, uid: &Bytes) -> Option<Waiting> {
        lock(&self.requests).as_mut().ok()?.remove(uid)
    }

    /// Ends all requests, these and those to come.
    pub(crate) fn end(&self, error: &Error) {
        let ended = std::mem::replace(&mut *lock(&self.requests), Err(error.clone()));
        for waiting in ended.into_iter().flat_map(HashMap::into_values) {
            let _ = waiting.answer.send(Err(error.clone()));
        }
        self.outbox.end();
    }

    pub(crate) fn ended(&self) -> Error {
        let error = lock(&self.requests).as_ref().err().cloned();
        error.unwrap_or_else(|| {
            Error::new(
                ErrorCode::Closed,
                "this client's connection has ended for good; connect another one",
            )
        })
    }

    /// How long the server holds what it grants for reading to a request that is sent after this.
    pub(crate) fn read_hold(&self) -> Option<Instant> {
        let hold = Duration::from_millis(self.hello.as_ref()?.read_hold_ms.into());
        Some(Instant::now() + hold)
    }

    /// A load of the key's range begins.
    pub(crate) fn read(&self, key: &Key, instance: u64) -> Reader<'_> {
        let reader = self.reader(key, instance);
        if let Some(granted) = &reader.granted {
            let mut readers = lock(&self.readers);
            let known =
                readers.entry(granted.clone()).or_insert(Readers { count: 0, mixed: false });
            known.count += 1;
            known.mixed |= known.count > 1;
        }
        reader
    }

    /// A load that began with [`Session::read`] and stayed.
    pub(crate) fn reader(&self, key: &Key, instance: u64) -> Reader<'_> {
        let granted = Granted::new(Operation::PrepareRetrieve, key, instance);
        Reader { session: self, granted: Some(granted) }
    }

    /// Remembers that a prepare was granted, with the slots that its commit tells the server of.
    pub(crate) fn grant(&self, operation: Operation, key: &Key, instance: u64, grant: Grant) {
        let granted = Granted::new(operation, key, instance);
        lock(&self.granted).entry(granted).or_default().push_back(grant);
    }

    /// How many slots the grant has that [`Session::take_grant`] would forget; `None` for none.
    pub(crate) fn granted(&self, operation: Operation, key: &Key, instance: u64) -> Option<usize> {
        let granted = lock(&self.granted);
        let grants = granted.get(&Granted::new(operation, key, instance))?;
        grants.iter().find(|grant| grant.key.key == *key).map(|grant| grant.slots.len())
    }

    /// Forgets it again and gives it, of several of this key the oldest. `None`: this session has not granted
    /// it. A commit must not go to the server then: what it would end is another's.
    pub(crate) fn take_grant(
        &self,
        operation: Operation,
        key: &Key,
        instance: u64,
    ) -> Option<Grant> {
        let granted = Granted::new(operation, key, instance);
        let mut all = lock(&self.granted);
        let grants = all.get_mut(&granted)?;
        let oldest = grants.iter().position(|grant| grant.key.key == *key)?;
        let taken = grants.remove(oldest);
        if grants.is_empty() {
            all.remove(&granted);
        }
        taken
    }

    /// The pool, once a registration was answered.
    pub(crate) fn pool(&self) -> Option<Pool> {
        lock(&self.pool).clone()
    }

    /// The pool for what this session grants: nothing is written to it after [`Session::shut`].
    pub(crate) fn memory(&self, pool: Pool) -> Arc<dyn Memory> {
        Arc::new(Gated { memory: pool.memory, gate: Arc::clone(&self.gate) })
    }

    /// Ends all writing to what was granted; to be called before the server learns of the end. `false`: some goes on,
    /// until [`Session::quiet`].
    pub(crate) fn shut(&self) -> bool {
        self.gate.shut()
    }

    /// Waits until nothing is written any more to what was granted, after [`Session::shut`].
    pub(crate) async fn quiet(&self) {
        while !self.is_quiet() {
            sleep(LOOK).await;
        }
    }

    pub(crate) fn is_quiet(&self) -> bool {
        self.gate.is_quiet()
    }

    /// Maps the pool that a registration's reply names, unless it is mapped. What it gives has to be sent: bytes go in
    /// frames from then on.
    pub(crate) fn map(&self, reply: Reply) -> Result<Option<Request>> {
        let Reply::Registered { shm_name, pool_size } = reply else { return Ok(None) };
        let mut pool = lock(&self.pool);
        let mut in_frames = lock(&self.in_frames);
        if in_frames.is_some() || pool.as_ref().is_some_and(|pool| pool.is(&shm_name, pool_size)) {
            return Ok(None);
        }
        let segment = self.hello.as_ref().and_then(|hello| hello.segment.as_deref());
        let mapped = if self.shared_memory {
            Pool::map(&shm_name, pool_size, segment)
        } else {
            let message =
                "shared memory was not asked for; this server takes bytes in no other way";
            Err(Error::new(ErrorCode::UnsupportedOption, message))
        };
        match mapped {
            Ok(mapped) => {
                *pool = Some(mapped);
                Ok(None)
            }
            Err(why) if self.offers_frames => {
                *in_frames = Some(why);
                *pool = None;
                Ok(Some(Request::Frames))
            }
            Err(error) => Err(error),
        }
    }

    /// Why bytes go in frames; `None` while they do not.
    pub(crate) fn in_frames(&self) -> Option<Error> {
        lock(&self.in_frames).clone()
    }
}

/// Whether it ends what the server keeps for us: it is sent even if nobody waits for its answer any more, or that would be
/// kept for as long as the connection lives.
fn ends(operation: Operation) -> bool {
    matches!(
        operation,
        Operation::CommitStore
            | Operation::AbandonStore
            | Operation::CommitRetrieve
            | Operation::FreeLookupLocks
            | Operation::EndSession
            | Operation::Unregister
    )
}

/// A request that was sent. Dropped, its reply is, too.
pub(crate) struct Pending<'a> {
    session: &'a Session,
    uid: Bytes,
    operation: Operation,
    answered: oneshot::Receiver<Result<Reply>>,
}

impl Pending<'_> {
    pub(crate) fn operation(&self) -> Operation {
        self.operation
    }

    /// Waits for the reply until `deadline`.
    pub(crate) async fn wait(mut self, deadline: Instant) -> Result<Reply> {
        let Self { session, operation, .. } = self;
        match tokio::time::timeout_at(deadline.into(), &mut self.answered).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(_)) => Err(session.ended()),
            Err(_) => Err(Error::new(
                ErrorCode::Timeout,
                format!("the server at {} did not answer {operation} in time", session.address),
            )),
        }
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.session.take(&self.uid);
    }
}

/// A request that is sent unless disarmed: it undoes on the server what a caller no longer waits
/// for.
pub(crate) struct Undo {
    session: Arc<Session>,
    request: Option<Request>,
}

impl Undo {
    pub(crate) fn new(session: Arc<Session>, request: Option<Request>) -> Self {
        Self { session, request }
    }

    pub(crate) fn disarm(mut self) {
        self.request = None;
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if let Some(request) = &self.request {
            let _ = self.session.send(request); // the connection's end does it at last
        }
    }
}
