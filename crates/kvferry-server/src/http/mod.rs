//! The HTTP side, for operators: health, readiness, metrics, status, a page. It has a thread of its own, so that it
//! never holds up the data path, and asks the store on further threads, so that a stuck store never holds it up.
//!
//! One request for each connection: then each of its deadlines is the connection's.

mod guard;
mod metrics;
mod quotas;
mod readiness;
mod socket;
mod status;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{self, HeaderName, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use kvferry_core::{Error, Result};
use kvferry_store::disk::DiskStatus;
use kvferry_store::remote::RemoteStatus;
use kvferry_store::{Ages, Store};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::error::Elapsed;
use tokio::time::{Instant, timeout, timeout_at};

pub(crate) use self::guard::Guard;
use self::guard::{check_host, check_origin};
use self::readiness::{Readiness, Tier};
use self::socket::Socket;
use crate::figures::Figures;
use crate::json::{Object, confirmation};
use crate::notes::Level;
use crate::quotas::{QuotaBook, Shown};
use crate::tokens::Role;

/// Connections at most; for one more the oldest goes that has not sent its headers, else it goes itself.
const CONNECTIONS_MAX: usize = 64;
/// From connecting to the last header.
const HEADERS: Duration = Duration::from_secs(5);
/// From there to the last byte of the answer; the request's body comes within it.
const ANSWER: Duration = Duration::from_secs(10);
/// The store has answered within this time, or the request fails.
const STORE: Duration = Duration::from_secs(5);
/// The data thread as well.
const DATA: Duration = Duration::from_secs(1);
/// After its answer a client is read from for so long, and so much: what it still sends would else reset the
/// connection before it has read the answer.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_MAX: usize = 1 << 20;
/// Bytes of a request's line and headers, and of its body, at most.
const HEADERS_MAX: usize = 16 << 10;
const BODY_MAX: usize = 64 << 10;
/// Questions to the store under way at most; the others wait.
const QUESTIONS_MAX: usize = 8;
/// After `accept` failed the next try waits this long.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// The page, and what its policy says of it; a test says what it must be when the page has changed.
const PAGE: &str = include_str!("page.html");
const PAGE_POLICY: &str = "default-src 'none'; \
    script-src 'sha256-cZ76/6MWXaLERHRouD9jG9toZlef6EVOXXsoIm9mw88='; \
    style-src 'sha256-F9tt2SZZV0E2dGjWgKeyFLXbrMP5O1oc2q3Ski86dOo='; \
    connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
const OPENAPI: &str = include_str!("openapi.json");

/// Something to be done on the data thread.
pub(crate) type Job = Box<dyn FnOnce() + Send>;
/// Jobs that wait at most.
pub(crate) const JOBS_MAX: usize = CONNECTIONS_MAX;

/// The thread. Dropping it closes its connections and waits for it.
pub(crate) struct Http {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Http {
    /// Serves on a bound listener that does not block.
    pub(crate) fn start(
        listener: TcpListener,
        guard: Guard,
        store: Store,
        figures: Arc<Figures>,
        book: QuotaBook,
        jobs: mpsc::Sender<Job>,
    ) -> Result<Self> {
        let cannot = |error: std::io::Error| Error::system("cannot serve HTTP", &error);
        let address = listener.local_addr().map_err(cannot)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(QUESTIONS_MAX + 1) // one for probes
            .thread_name("kvferry-ops")
            .build()
            .map_err(cannot)?;
        let (stop, stopped) = oneshot::channel();
        let serve = move || {
            let desk = Rc::new(Desk::new(guard, store, figures, book, jobs));
            let tasks = tokio::task::LocalSet::new();
            tasks.block_on(&runtime, async {
                tokio::select! {
                    () = accept(listener, CONNECTIONS_MAX, &desk) => {}
                    () = desk.readiness.keep(&desk.store, &desk.figures) => {}
                    _ = stopped => {}
                }
            });
            drop((tasks, desk));
            runtime.shutdown_timeout(STORE); // waits for a question under way: it holds the pool
        };
        let thread =
            std::thread::Builder::new().name("kvferry-http".into()).spawn(serve).map_err(cannot)?;
        Ok(Self { address, stop: Some(stop), thread: Some(thread) })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Http {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(()); // it may have ended
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn accept(listener: TcpListener, connections_max: usize, desk: &Rc<Desk>) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            desk.figures.drop_message("http_accept");
            tokio::time::sleep(ACCEPT_RETRY).await;
            continue;
        };
        if desk.connections.get() >= connections_max {
            desk.figures.drop_message("http_connections");
            let slowest = desk.silent.borrow_mut().pop_first();
            let Some((_, make_room)) = slowest else { continue };
            let _ = make_room.send(()); // it may have ended
        }
        let _ = stream.set_nodelay(true); // without it answers come late, and still come
        desk.connections.set(desk.connections.get() + 1);
        let number = desk.accepted.get();
        desk.accepted.set(number + 1);
        let (make_room, room_is_made) = oneshot::channel();
        desk.silent.borrow_mut().insert(number, make_room);
        let open = Open(Rc::clone(desk), number);
        tokio::task::spawn_local(async move {
            tokio::select! {
                () = serve(stream, &open.0, number) => {}
                Ok(()) = room_is_made => {} // not once its headers have come
            }
        });
    }
}

/// Counts a connection until its task ends, however it ends.
struct Open(Rc<Desk>, u64);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.connections.set(self.0.connections.get() - 1);
        self.0.silent.borrow_mut().remove(&self.1);
    }
}

/// Serves one request of the connection.
async fn serve(mut stream: impl AsyncRead + AsyncWrite + Unpin, desk: &Desk, number: u64) {
    match talk(&mut stream, desk, number).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) if error.is_parse() => desk.figures.drop_message("http_malformed"),
        Ok(Err(_)) => return, // the client is gone
        Err(_) => return desk.figures.drop_message("http_deadline"),
    }
    linger(stream).await;
}

async fn talk(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    desk: &Desk,
    number: u64,
) -> Result<hyper::Result<()>, Elapsed> {
    let arrived = Cell::new(None);
    let service = service_fn(|request| {
        arrived.set(Some(Instant::now()));
        desk.silent.borrow_mut().remove(&number);
        desk.answer(request)
    });
    let mut builder = http1::Builder::new();
    builder.keep_alive(false).half_close(true).max_buf_size(HEADERS_MAX).header_read_timeout(None);
    let mut connection = pin!(builder.serve_connection(Socket(stream), service).without_shutdown());
    let ended = match timeout(HEADERS, &mut connection).await {
        Err(late) => match arrived.get() {
            Some(arrived) => timeout_at(arrived + ANSWER, &mut connection).await?,
            None => return Err(late),
        },
        Ok(ended) => ended,
    };
    Ok(ended.map(drop))
}

/// Ends the connection so that the client gets all of its answer.
async fn linger(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    if stream.shutdown().await.is_err() {
        return;
    }
    let drain = async {
        let (mut buffer, mut drained) = ([0; 4096], 0);
        while drained < LINGER_MAX {
            match stream.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(read) => drained += read,
            }
        }
    };
    let _ = timeout(LINGER, drain).await; // it has had its time
}

/// What answers are made of.
struct Desk {
    guard: Guard,
    store: Store,
    figures: Arc<Figures>,
    book: Arc<QuotaBook>,
    jobs: mpsc::Sender<Job>,
    readiness: Readiness,
    questions: Arc<Semaphore>,
    connections: Cell<usize>,
    /// Connections so far.
    accepted: Cell<u64>,
    /// How to end those whose headers have not come, oldest first.
    silent: RefCell<BTreeMap<u64, oneshot::Sender<()>>>,
}

/// The figures of one moment.
struct Snapshot {
    /// The disk's and the remote's figures follow where there are such.
    store: Vec<(&'static str, u64)>,
    /// Why it takes nothing; "" while it does.
    disk_failure: Option<String>,
    remote: Option<RemoteStatus>,
    tenants: Vec<Shown>,
    /// Of what made room, by tier.
    ages: Vec<(&'static str, Ages)>,
    dropped: BTreeMap<&'static str, u64>,
    uptime: Duration,
    tiers: Vec<Tier>,
    http_connections: usize,
    figures: Arc<Figures>,
}

impl Snapshot {
    /// One of the store's figures; `None` for one that it has not.
    fn find(&self, name: &str) -> Option<u64> {
        self.store.iter().find(|(known, _)| *known == name).map(|(_, value)| *value)
    }

    /// The same; 0 for one that it has not.
    fn figure(&self, name: &str) -> u64 {
        self.find(name).unwrap_or(0)
    }
}

/// What can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Route {
    Page,
    Health,
    Ready,
    Metrics,
    Status,
    OpenApi,
    Clear,
    Quotas,
    QuotaDefault,
    QuotaTenant,
}

const ROUTES: [(&str, Route); 10] = [
    ("/", Route::Page),
    ("/healthz", Route::Health),
    ("/readyz", Route::Ready),
    ("/metrics", Route::Metrics),
    ("/status", Route::Status),
    ("/openapi.json", Route::OpenApi),
    ("/clear", Route::Clear),
    ("/quotas", Route::Quotas),
    ("/quotas/default", Route::QuotaDefault),
    ("/quotas/tenant", Route::QuotaTenant),
];

impl Route {
    /// The methods that it takes; those other than GET and HEAD change something.
    fn methods(self) -> &'static str {
        match self {
            Self::Clear => "POST",
            Self::Quotas => "GET, HEAD, PUT",
            Self::QuotaDefault => "PUT",
            Self::QuotaTenant => "PUT, DELETE",
            _ => "GET, HEAD",
        }
    }

    /// Whose token it takes where there are tokens; `None` for what everybody may know.
    fn role(self) -> Option<Role> {
        match self {
            Self::Page | Self::Health | Self::Ready => None,
            Self::Metrics | Self::OpenApi => Some(Role::Metrics),
            Self::Status | Self::Clear | Self::Quotas | Self::QuotaDefault | Self::QuotaTenant => {
                Some(Role::Admin)
            }
        }
    }
}

/// An answer that says no.
struct Refusal {
    status: StatusCode,
    code: &'static str,
    message: String,
    allow: Option<&'static str>,
}

impl Refusal {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), allow: None }
    }
}

/// How quotas are changed by a request's body.
type Change = fn(&QuotaBook, &Store, &[u8]) -> Answered<()>;

type Answered<T = Response<Whole>> = Result<T, Refusal>;

impl Desk {
    fn new(
        guard: Guard,
        store: Store,
        figures: Arc<Figures>,
        book: QuotaBook,
        jobs: mpsc::Sender<Job>,
    ) -> Self {
        let readiness = Readiness::new(&store);
        Self {
            guard,
            store,
            figures,
            book: Arc::new(book),
            jobs,
            readiness,
            questions: Arc::new(Semaphore::new(QUESTIONS_MAX)),
            connections: Cell::new(0),
            accepted: Cell::new(0),
            silent: RefCell::default(),
        }
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Whole>, Infallible> {
        let mut answer = self.route(request).await.unwrap_or_else(|refusal| {
            let Refusal { status, code, message, allow } = refusal;
            let error = Object::new().text("code", code).text("message", &message).end();
            let mut answer = json(status, Object::new().raw("error", error).end());
            if status == StatusCode::UNAUTHORIZED {
                let scheme = HeaderValue::from_static("Bearer");
                answer.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
            }
            if let Some(allow) = allow {
                answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allow));
            }
            answer
        });
        let fixed = [
            (header::CACHE_CONTROL, "no-store"),
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (header::CONTENT_SECURITY_POLICY, "default-src 'none'"),
            (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        ];
        for (name, value) in fixed {
            let headers = answer.headers_mut();
            headers.entry(name).or_insert(HeaderValue::from_static(value));
        }
        Ok(answer)
    }

    async fn route(&self, request: Request<Incoming>) -> Answered {
        let host = check_host(&request, self.guard.public)
            .inspect_err(|_| self.figures.drop_message("http_host"))?;
        let path = request.uri().path();
        let Some((_, route)) = ROUTES.iter().find(|(known, _)| *known == path) else {
            let message = "there is nothing at this path; /openapi.json lists those that there are";
            return Err(Refusal::new(StatusCode::NOT_FOUND, "NOT_FOUND", message));
        };
        self.guard.check(request.headers(), *route).inspect_err(|refusal| {
            let unknown = refusal.status == StatusCode::UNAUTHORIZED;
            self.figures.drop_message(if unknown { "http_token" } else { "http_forbidden" });
        })?;
        // Whoever has no token is told that something is wrong, and not what.
        let tells = self.guard.tokens.is_none();
        let (method, allow) = (request.method().clone(), route.methods());
        if !allow.split(", ").any(|known| known == method.as_str()) {
            let message = format!("{method} has no use at this path; it takes {allow}");
            let refusal =
                Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "METHOD_NOT_ALLOWED", message);
            return Err(Refusal { allow: Some(allow), ..refusal });
        }
        let changes = !matches!(method, Method::GET | Method::HEAD);
        if changes {
            check_origin(request.headers(), &host).inspect_err(|refusal| {
                let foreign = refusal.status == StatusCode::FORBIDDEN;
                self.figures.drop_message(if foreign { "http_origin" } else { "http_media_type" });
            })?;
        }
        match route {
            Route::Page => Ok(page()),
            Route::Health => Ok(match self.data_answers().await {
                Ok(()) => json(StatusCode::OK, Object::new().raw("healthy", true).end()),
                Err(reason) => {
                    let answer = Object::new().raw("healthy", false);
                    let answer = if tells { answer.text("reason", reason) } else { answer };
                    json(StatusCode::SERVICE_UNAVAILABLE, answer.end())
                }
            }),
            Route::Ready => {
                let data = self.data_answers().await;
                let tiers = self.readiness.tiers(std::time::Instant::now());
                let (ready, mut answer) = status::readiness(&tiers, data);
                if !tells {
                    answer = Object::new().raw("ready", ready).end();
                }
                Ok(json(
                    if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE },
                    answer,
                ))
            }
            Route::Metrics => {
                let text = metrics::text(&self.snapshot().await?);
                Ok(whole(StatusCode::OK, metrics::MEDIA_TYPE, text))
            }
            Route::Status => {
                let data = self.data_answers().await;
                Ok(json(StatusCode::OK, status::json(&self.snapshot().await?, data)))
            }
            Route::OpenApi => Ok(json(StatusCode::OK, OPENAPI)),
            Route::Clear => {
                let body = self.read_body(request.into_body()).await?;
                let Some(salt) = confirmation(&body) else {
                    let message = "clearing takes the body {\"confirm\":true}, with a \"salt\" for one tenant";
                    return Err(Refusal::new(StatusCode::BAD_REQUEST, "INVALID_ARGUMENT", message));
                };
                let clear = move |store: &Store| match salt {
                    Some(salt) => store.clear_tenant(&salt),
                    None => store.clear(),
                };
                let cleared = self.ask(clear).await?;
                let detail = format!("{cleared} objects, over HTTP");
                self.figures.notes.add(Level::Info, "cleared", "http", detail);
                Ok(json(StatusCode::OK, Object::new().raw("cleared", cleared).end()))
            }
            Route::Quotas | Route::QuotaDefault | Route::QuotaTenant => {
                let change = match (route, method) {
                    (Route::Quotas, Method::PUT) => Some(quotas::put_all as Change),
                    (Route::QuotaDefault, _) => Some(quotas::put_default as Change),
                    (Route::QuotaTenant, Method::DELETE) => Some(quotas::delete_tenant as Change),
                    (Route::QuotaTenant, _) => Some(quotas::put_tenant as Change),
                    _ => None,
                };
                let body = match change {
                    Some(_) => self.read_body(request.into_body()).await?,
                    None => Bytes::new(),
                };
                let book = Arc::clone(&self.book);
                let changes = change.is_some();
                let told = self.ask(move |store| {
                    if let Some(change) = change {
                        change(&book, store, &body)?;
                    }
                    Ok(quotas::tell(&book, store))
                });
                let told = told.await??;
                if changes {
                    self.figures.notes.add(Level::Info, "quotas_changed", "", "over HTTP".into());
                }
                Ok(json(StatusCode::OK, told))
            }
        }
    }

    async fn read_body(&self, body: Incoming) -> Answered<Bytes> {
        read_body(body).await.inspect_err(|refusal| {
            if refusal.status == StatusCode::PAYLOAD_TOO_LARGE {
                self.figures.drop_message("http_too_large");
            }
        })
    }

    /// Whether the data path works: its thread does something for us.
    async fn data_answers(&self) -> Result<(), &'static str> {
        let (answer, answered) = oneshot::channel();
        let job = Box::new(move || {
            let _ = answer.send(()); // we may have stopped waiting
        });
        self.jobs.try_send(job).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => "the data thread does not answer",
            mpsc::error::TrySendError::Closed(_) => "the data thread has ended",
        })?;
        match timeout(DATA, answered).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err("the data thread has ended"),
            Err(_) => Err("the data thread has not answered within a second"),
        }
    }

    async fn snapshot(&self) -> Answered<Snapshot> {
        let now = std::time::Instant::now();
        let figures = Arc::clone(&self.figures);
        let book = Arc::clone(&self.book);
        let ask = move |store: &Store| {
            let tenants = {
                let _no_probe = figures.probing(); // it would be somebody's object
                store.tenants()
            };
            let (memory, below) =
                (store.evicted_ages(), (store.disk_status(), store.remote_status()));
            (figures.store(store, now), memory, below, book.shown(tenants))
        };
        let (mut store, memory, (disk, remote), tenants) = self.ask(ask).await?;
        let of_disk = disk.iter().map(|disk| ("disk", disk.evicted_ages));
        let ages = std::iter::once(("memory", memory)).chain(of_disk).collect();
        store.extend(disk.iter().flat_map(DiskStatus::figures));
        store.extend(remote.iter().flat_map(RemoteStatus::figures));
        Ok(Snapshot {
            store,
            tenants,
            ages,
            disk_failure: disk.map(|disk| disk.failed.unwrap_or_default()),
            remote,
            dropped: self.figures.dropped(),
            uptime: self.figures.uptime(now),
            tiers: self.readiness.tiers(now),
            http_connections: self.connections.get(),
            figures: Arc::clone(&self.figures),
        })
    }

    /// Asks the store where it may take its time.
    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Store) -> T + Send + 'static,
    ) -> Answered<T> {
        let asked = async {
            let permit = Arc::clone(&self.questions).acquire_owned().await.ok()?;
            let store = self.store.clone();
            let ask = move || {
                let _permit = permit; // until the store has answered, whoever still waits for it
                question(&store)
            };
            tokio::task::spawn_blocking(ask).await.ok()
        };
        let answer = timeout(STORE, asked).await.ok().flatten();
        answer.ok_or_else(|| {
            let message = format!("the store has not answered within {} s", STORE.as_secs());
            Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "TIMEOUT", message)
        })
    }
}

async fn read_body(mut body: Incoming) -> Answered<Bytes> {
    let too_large = || {
        let message = format!("a body has at most {BODY_MAX} bytes");
        Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "INVALID_ARGUMENT", message)
    };
    let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
    if announced > BODY_MAX {
        return Err(too_large());
    }
    let mut read = BytesMut::new();
    while let Some(frame) =
        std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await
    {
        let frame = frame.map_err(|_| {
            let message = "the body ended before its end";
            Refusal::new(StatusCode::BAD_REQUEST, "INVALID_ARGUMENT", message)
        })?;
        let data = frame.into_data().unwrap_or_default(); // trailers say nothing to us
        if read.len() + data.len() > BODY_MAX {
            return Err(too_large());
        }
        read.extend_from_slice(&data);
    }
    Ok(read.freeze())
}

fn page() -> Response<Whole> {
    let mut page = whole(StatusCode::OK, "text/html; charset=utf-8", PAGE);
    let policy = HeaderValue::from_static(PAGE_POLICY);
    page.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
    page
}

fn json(status: StatusCode, body: impl Into<Bytes>) -> Response<Whole> {
    whole(status, "application/json", body)
}

fn whole(status: StatusCode, media: &'static str, body: impl Into<Bytes>) -> Response<Whole> {
    let mut response = Response::new(Whole(Some(body.into())));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(media));
    response
}

/// A body that is there from the start.
struct Whole(Option<Bytes>);

impl Body for Whole {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.take().map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.as_ref().map_or(0, Bytes::len) as u64)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use kvferry_store::{Limits, StoreOptions};
    use sha2::{Digest, Sha256};
    use tokio::io::duplex;
    use tokio::net::TcpStream;
    use tokio::time::sleep;

    use super::*;

    fn desk() -> Rc<Desk> {
        let options = StoreOptions {
            chunk_size: 16,
            memory: 1 << 20,
            shared_name: None,
            policy: kvferry_store::Policy::Lru,
            disk: None,
            remote: None,
            limits: Limits::default(),
        };
        let (jobs, _) = mpsc::channel(1);
        let store = Store::new(options).unwrap();
        let book = QuotaBook::open(None, &store).unwrap();
        let guard = Guard { tokens: None, public: false };
        Rc::new(Desk::new(guard, store, Arc::new(Figures::new()), book, jobs))
    }

    /// Serves a client that does `what`; after how long the connection is given up.
    async fn given_up_after<F: Future<Output = ()>>(
        room: usize,
        what: impl FnOnce(tokio::io::DuplexStream) -> F,
    ) -> Duration {
        let desk = desk();
        let (near, far) = duplex(room);
        let begun = Instant::now();
        tokio::select! {
            () = serve(far, &desk, 0) => {}
            () = async { what(near).await; std::future::pending().await } => {}
        }
        assert_eq!(desk.figures.dropped().get("http_deadline"), Some(&1));
        begun.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_client_and_one_that_drags_its_headers_out_are_cut_after_five_seconds() {
        let silent = given_up_after(4096, |near| async {
            sleep(Duration::from_secs(60)).await;
            drop(near);
        });
        assert_eq!(silent.await, HEADERS);
        let dragging = given_up_after(4096, |mut near| async move {
            near.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n").await.unwrap();
            for number in 0.. {
                sleep(Duration::from_millis(300)).await;
                let header = format!("x-{number}: 1\r\n");
                near.write_all(header.as_bytes()).await.unwrap();
            }
        });
        assert_eq!(dragging.await, HEADERS);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_drags_its_body_out_is_cut_after_ten_seconds() {
        let dragging = given_up_after(4096, |mut near| async move {
            let head = b"POST /clear HTTP/1.1\r\nhost: localhost\r\ncontent-length: 60000\r\n\
                content-type: application/json\r\n\r\n";
            near.write_all(head).await.unwrap();
            loop {
                near.write_all(b" ").await.unwrap();
                sleep(Duration::from_millis(300)).await;
            }
        });
        assert_eq!(dragging.await, ANSWER);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_does_not_read_its_answer_is_cut_after_ten_seconds() {
        let deaf = given_up_after(64, |mut near| async move {
            near.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
            sleep(Duration::from_secs(60)).await;
            drop(near);
        });
        assert_eq!(deaf.await, ANSWER);
    }

    #[tokio::test]
    async fn one_connection_too_many_takes_the_place_of_the_oldest_that_has_asked_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let desk = desk();
        let clients = async {
            let asking = || async {
                let mut asking = TcpStream::connect(address).await.unwrap();
                let head = b"POST /clear HTTP/1.1\r\nhost: localhost\r\n\
                    content-type: application/json\r\ncontent-length: 9\r\n\r\n";
                asking.write_all(head).await.unwrap();
                asking
            };
            let dropped = || desk.figures.dropped().get("http_connections").copied();
            let first = asking().await;
            let mut silent = TcpStream::connect(address).await.unwrap();
            silent.write_all(b"GET / HTTP/1.1\r\nhost: ").await.unwrap();
            while desk.connections.get() < 2 || desk.silent.borrow().len() > 1 {
                tokio::task::yield_now().await;
            }
            let _second = asking().await;
            assert_eq!(silent.read(&mut [0]).await.unwrap_or(0), 0);
            assert_eq!(dropped(), Some(1));
            while !desk.silent.borrow().is_empty() {
                tokio::task::yield_now().await;
            }
            let mut refused = TcpStream::connect(address).await.unwrap();
            assert_eq!(refused.read(&mut [0]).await.unwrap(), 0);
            assert_eq!(dropped(), Some(2));
            drop(first);
            loop {
                let mut next = TcpStream::connect(address).await.unwrap();
                let _ = next.write_all(b"GET /x HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
                if next.read(&mut [0]).await.is_ok_and(|read| read > 0) {
                    return; // the server has noticed that the first one is gone
                }
            }
        };
        tokio::task::LocalSet::new()
            .run_until(async {
                tokio::select! {
                    () = accept(listener, 2, &desk) => {}
                    () = clients => {}
                }
            })
            .await;
    }

    #[test]
    fn every_route_is_described() {
        let description: serde_json::Value = serde_json::from_str(OPENAPI).unwrap();
        assert_eq!(description["info"]["version"], env!("CARGO_PKG_VERSION"));
        let described: BTreeSet<(&str, &str)> = description["paths"]
            .as_object()
            .unwrap()
            .iter()
            .flat_map(|(path, item)| {
                let methods = item.as_object().unwrap().keys();
                methods.map(move |method| (path.as_str(), method.as_str()))
            })
            .collect();
        let routes = ROUTES.iter().flat_map(|(path, route)| {
            route.methods().split(", ").map(|method| (*path, method.to_ascii_lowercase()))
        });
        let described = described.into_iter().map(|(path, method)| (path, method.to_owned()));
        assert_eq!(described.collect::<BTreeSet<_>>(), routes.collect());
    }

    #[test]
    fn the_page_runs_its_own_script_and_style_and_nothing_else() {
        for (tag, directive) in [("script", "script-src"), ("style", "style-src")] {
            let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
            let (_, rest) = PAGE.split_once(&open).unwrap();
            let (inside, after) = rest.split_once(&close).unwrap();
            assert!(!after.contains(&open), "one {tag}");
            let policy = format!("{directive} 'sha256-{}';", base64(&Sha256::digest(inside)));
            assert!(PAGE_POLICY.contains(&policy), "the page has changed: {policy}");
        }
        for foreign in
            ["http:", "https:", "src=", "href=", "style=", "url(", "@import", "innerHTML"]
        {
            assert!(!PAGE.contains(foreign), "{foreign}");
        }
    }

    fn base64(bytes: &[u8]) -> String {
        let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut text = String::new();
        for three in bytes.chunks(3) {
            let bits =
                three.iter().chain(&[0, 0]).take(3).fold(0, |bits, b| bits << 8 | usize::from(*b));
            for place in 0..4 {
                let digit = digits[bits >> (18 - 6 * place) & 63] as char;
                text.push(if place <= three.len() { digit } else { '=' });
            }
        }
        text
    }
}
