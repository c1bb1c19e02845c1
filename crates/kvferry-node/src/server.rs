//! A store in this process, with or without a socket around it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvferry_core::{Error, ErrorCode};
use kvferry_server::{HttpOptions, Role, load_quotas};
use kvferry_store::disk::{DiskOptions, DiskStatus};
use kvferry_store::remote::RemoteStatus;
use kvferry_store::{Embedded, Limits, Policy, Store, StoreOptions};
use napi::bindgen_prelude::PromiseRaw;
use napi::{Env, Result};
use napi_derive::napi;

use crate::cache::PrefixCache;
use crate::error::to_napi;
use crate::events::KvEvents;
use crate::paged::{PagedLayout, PagedPlace, PagedScheduler, PagedWorker};
use crate::promise::promise;

/// How long `close` waits for what is not on the disk or in the remote yet.
const CLOSE: Duration = Duration::from_secs(30);

/// What `Server.start` needs; `ts/server.ts` has the defaults.
#[napi(object)]
pub struct ServerOptions {
    /// A host; absent: no socket.
    pub host: Option<String>,
    /// Others than this machine may reach it.
    pub listen_public: bool,
    /// The file of tokens; absent: nobody is asked for one.
    pub token_file: Option<String>,
    /// A Unix socket beside the port; absent: none.
    pub ipc: Option<String>,
    /// 0 lets the system choose.
    pub port: u16,
    /// Where operators ask, on the same host; 0 lets the system choose, absent: no HTTP.
    pub http_port: Option<u16>,
    /// Bytes of the pool.
    pub memory: f64,
    /// The segment's name; absent: by the port. Without a socket the pool is not shared.
    pub shm_name: Option<String>,
    /// What goes when room is needed; absent: ours.
    pub policy: Option<String>,
    /// Directory of the disk tier; absent: none.
    pub disk: Option<String>,
    /// Bytes that its files may take.
    pub disk_size: f64,
    /// The remote tier's URL; absent: none.
    pub remote: Option<String>,
    /// The file of the tenants' quotas; absent: they end with the server.
    pub quotas: Option<String>,
    /// Tokens of one chunk.
    pub chunk_size: u32,
    /// Milliseconds that a session may be idle.
    pub session_timeout_ms: u32,
    /// Milliseconds from a reservation to its commit.
    pub reservation_timeout_ms: u32,
}

/// Something for a log, once or more often.
#[napi(object)]
pub struct Note {
    /// How much it matters.
    #[napi(ts_type = "'info' | 'warn' | 'error'")]
    pub level: String,
    /// What happened.
    pub event: String,
    /// More of it, in words.
    pub detail: String,
    /// How often.
    pub count: f64,
}

/// A running store.
#[napi]
pub struct Server {
    running: Arc<Mutex<Option<Running>>>,
    address: Option<String>,
    http_address: Option<String>,
    shm_name: String,
}

struct Running {
    store: Store,
    listening: Option<kvferry_server::Server>,
}

#[napi]
impl Server {
    /// Creates the pool and listens.
    #[napi(catch_unwind, ts_return_type = "Promise<Server>")]
    pub fn start(env: &Env, options: ServerOptions) -> Result<PromiseRaw<'_, Server>> {
        promise(env, async move {
            let mut started = Err(Error::new(ErrorCode::Internal, "the server did not start"));
            // Reserving the first memory takes milliseconds.
            tokio::task::block_in_place(|| started = start(options));
            started
        })
    }

    /// `host:port`; absent without a socket.
    #[napi(getter, catch_unwind)]
    pub fn address(&self) -> Option<String> {
        self.address.clone()
    }

    /// `host:port` of HTTP; absent without it.
    #[napi(getter, catch_unwind)]
    pub fn http_address(&self) -> Option<String> {
        self.http_address.clone()
    }

    /// The shared segment's name; empty when the pool is private.
    #[napi(getter, catch_unwind)]
    pub fn shm_name(&self) -> String {
        self.shm_name.clone()
    }

    /// Figures by name.
    #[napi(catch_unwind)]
    pub fn status(&self) -> Result<Vec<(String, f64)>> {
        let now = kvferry_store::clock::now();
        let mut figures = self.ask(|running| match &running.listening {
            Some(server) => server.figures(now),
            None => running.store.status(now),
        })?;
        let disk = self.ask(|running| running.store.disk_status())?;
        figures.extend(disk.iter().flat_map(DiskStatus::figures));
        let remote = self.ask(|running| running.store.remote_status())?;
        figures.extend(remote.iter().flat_map(RemoteStatus::figures));
        #[expect(clippy::cast_precision_loss, reason = "JavaScript's numbers")]
        let figures = figures.into_iter().map(|(name, value)| (name.to_owned(), value as f64));
        Ok(figures.collect())
    }

    /// What happened since this was asked last; nothing without a socket.
    #[napi(catch_unwind)]
    pub fn take_notes(&self) -> Result<Vec<Note>> {
        let now = kvferry_store::clock::now();
        let notes = self.ask(|running| {
            running.listening.as_ref().map(|server| server.take_notes(now)).unwrap_or_default()
        })?;
        let convert = |note: kvferry_server::Note| Note {
            level: note.level.as_str().to_owned(),
            event: note.event.to_owned(),
            detail: note.detail,
            count: crate::events::number(note.count),
        };
        Ok(notes.into_iter().map(convert).collect())
    }

    /// Events from `cursor` on; 0 is the oldest.
    #[napi(catch_unwind, ts_return_type = "Promise<KvEvents>")]
    pub fn events<'env>(
        &self,
        env: &'env Env,
        cursor: f64,
        max: u32,
    ) -> Result<PromiseRaw<'env, KvEvents>> {
        let (store, cursor) = (self.store()?, whole(cursor, "cursor").map_err(to_napi)?);
        promise(env, async move { Ok(store.events(cursor, max).into()) })
    }

    /// A prefix cache on this store, no socket between.
    #[napi(catch_unwind, ts_return_type = "Promise<PrefixCache>")]
    pub fn open_prefix_cache<'env>(
        &self,
        env: &'env Env,
        identity: &[u8],
        payload_bytes: f64,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, PrefixCache>> {
        let cache = Arc::new(Embedded::new(self.store()?));
        PrefixCache::open(env, cache, identity.to_vec(), payload_bytes, timeout_ms)
    }

    /// The scheduler's side of a paged engine's cache on this store, no socket between.
    #[napi(catch_unwind)]
    pub fn open_scheduler(&self, place: PagedPlace) -> Result<PagedScheduler> {
        PagedScheduler::open(Arc::new(Embedded::new(self.store()?)), place)
    }

    /// A worker's side of it: registers the worker's memory.
    #[napi(catch_unwind, ts_return_type = "Promise<PagedWorker>")]
    pub fn open_worker<'env>(
        &self,
        env: &'env Env,
        place: PagedPlace,
        worker_id: u32,
        layout: PagedLayout,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, PagedWorker>> {
        PagedWorker::open(
            env,
            Arc::new(Embedded::new(self.store()?)),
            place,
            worker_id,
            layout,
            timeout_ms,
        )
    }

    /// Stops listening, closes all connections and lets go of the store.
    #[napi(catch_unwind)]
    pub fn close<'env>(&self, env: &'env Env) -> Result<PromiseRaw<'env, ()>> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        promise(env, async move {
            tokio::task::block_in_place(|| {
                let Some(Running { store, listening }) = running else { return };
                drop(listening); // waits for the server's thread: nothing more is committed
                let _ = store.close_tiers(Instant::now() + CLOSE); // what is lost is computed again
            });
            Ok(())
        })
    }

    fn store(&self) -> Result<Store> {
        self.ask(|running| running.store.clone())
    }

    fn ask<T>(&self, question: impl FnOnce(&Running) -> T) -> Result<T> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.as_ref().map(question).ok_or_else(|| {
            to_napi(Error::new(ErrorCode::Closed, "the server was closed; start another one"))
        })
    }
}

fn start(options: ServerOptions) -> kvferry_core::Result<Server> {
    let ServerOptions { host, port, http_port, shm_name, .. } = options;
    let quotas = options.quotas.map(PathBuf::from);
    let policy = options.policy.as_deref().map_or(Ok(Policy::default()), Policy::from_name)?;
    let disk = match options.disk {
        Some(dir) => Some(DiskOptions::new(dir, whole(options.disk_size, "diskSize")?)),
        None => None,
    };
    let private = StoreOptions {
        chunk_size: options.chunk_size,
        memory: whole(options.memory, "memory")?,
        shared_name: None,
        policy,
        disk,
        remote: options.remote.as_deref().map(remote).transpose()?,
        limits: Limits {
            session_idle: Duration::from_millis(options.session_timeout_ms.into()),
            reservation: Duration::from_millis(options.reservation_timeout_ms.into()),
            ..Limits::default()
        },
    };
    let (store, listening) = match host {
        None => {
            let store = Store::new(private)?;
            if let Some(file) = &quotas {
                load_quotas(file, &store)?;
            }
            (store, None)
        }
        Some(host) => {
            let mut made = None;
            let http = http_port.map(|port| HttpOptions { host: host.clone(), port });
            let listen = kvferry_server::ServerOptions {
                host,
                port,
                listen_public: options.listen_public,
                tokens: options.token_file.map(PathBuf::from),
                ipc: options.ipc.map(PathBuf::from),
                http,
                quotas,
            };
            let server = kvferry_server::Server::start(&listen, |address| {
                let name = shm_name.unwrap_or_else(|| address.port().to_string());
                let store = Store::new(StoreOptions { shared_name: Some(name), ..private })?;
                made = Some(store.clone());
                Ok(store)
            })?;
            let store = made.ok_or_else(|| Error::new(ErrorCode::Internal, "no store was made"))?;
            (store, Some(server))
        }
    };
    let address = listening.as_ref().map(|server| server.address().to_string());
    let http_address = listening.as_ref().and_then(kvferry_server::Server::http_address);
    let http_address = http_address.map(|address| address.to_string());
    let (shm_name, _) = store.pool();
    let running = Arc::new(Mutex::new(Some(Running { store, listening })));
    Ok(Server { running, address, http_address, shm_name })
}

/// The first token of these roles in a file.
#[napi(catch_unwind)]
pub fn read_token(file: String, roles: Vec<String>) -> Result<String> {
    let roles: Vec<Role> = roles.iter().filter_map(|role| Role::from_name(role)).collect();
    kvferry_server::read_token(file.as_ref(), &roles).map_err(to_napi)
}

#[cfg(feature = "remote")]
fn remote(url: &str) -> kvferry_core::Result<kvferry_store::remote::RemoteOptions> {
    kvferry_remote::open(url)
}

#[cfg(not(feature = "remote"))]
fn remote(_url: &str) -> kvferry_core::Result<kvferry_store::remote::RemoteOptions> {
    let message =
        "this build has no remote tier: leave remote out, or build with the cargo feature remote";
    Err(Error::new(ErrorCode::UnsupportedOption, message))
}

/// A JavaScript number that counts something.
pub(crate) fn whole(value: f64, name: &str) -> kvferry_core::Result<u64> {
    const LARGEST: f64 = 9_007_199_254_740_991.0;
    if (0.0..=LARGEST).contains(&value) && value.fract() == 0.0 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "just checked"
        )]
        return Ok(value as u64);
    }
    Err(Error::invalid(format!(
        "{name} is {value}, which is not a whole number from 0 to 2^53 - 1"
    )))
}
