//! A connection to a server.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvferry_client::{ConnectOptions, Token, Value};
use kvferry_core::cache::Cache as _;
use kvferry_core::explain::{count_hits, prompt_key};
use kvferry_core::key::Key;
use kvferry_core::{Error, ErrorCode};
use napi::bindgen_prelude::{Either, PromiseRaw};
use napi::{Env, Result};
use napi_derive::napi;

use crate::cache::PrefixCache;
use crate::error::to_napi;
use crate::events::{KvEvents, number};
use crate::explain::Explanation;
use crate::paged::{PagedLayout, PagedPlace, PagedScheduler, PagedWorker};
use crate::promise::{deadline, promise, within};
use crate::server::whole;

/// A connection.
#[napi]
pub struct Client {
    inner: Mutex<Option<Arc<kvferry_client::Client>>>,
    chunk_size: u32,
}

type Figure = (String, Either<f64, String>);

#[napi]
impl Client {
    /// Connects to `tcp://host:port` or `ipc:///path`. With a chunk size, the lack of a server is no error.
    #[napi(catch_unwind, ts_return_type = "Promise<Client>")]
    pub fn connect(
        env: &Env,
        url: String,
        timeout_ms: u32,
        assumed_chunk_size: Option<u32>,
        token: Option<String>,
        shared_memory: bool,
    ) -> Result<PromiseRaw<'_, Client>> {
        promise(env, async move {
            let mut options = ConnectOptions::new(url);
            options.shared_memory = shared_memory;
            options.token = token.map(Token::new).transpose()?;
            options.connect_timeout = Duration::from_millis(timeout_ms.into());
            options.assumed_chunk_size = assumed_chunk_size;
            let client = kvferry_client::Client::connect(options).await?;
            let chunk_size = client.server().chunk_size;
            Ok(Self { inner: Mutex::new(Some(Arc::new(client))), chunk_size })
        })
    }

    /// Tokens of one chunk.
    #[napi(getter, catch_unwind)]
    pub fn chunk_size(&self) -> u32 {
        self.chunk_size
    }

    /// Between which releases of LMCache the server is, or whose it speaks.
    #[napi(getter, catch_unwind)]
    pub fn releases(&self) -> Option<String> {
        Some(self.client().ok()?.server().dialect.releases().to_owned())
    }

    /// Why there is no connection now, as `CODE: message`; absent while there is one.
    #[napi(getter, catch_unwind)]
    pub fn failure(&self) -> Option<String> {
        match self.client() {
            Ok(client) => client.failure().map(|error| error.to_string()),
            Err(closed) => Some(closed.reason.clone()),
        }
    }

    /// Why bytes go in frames and not through shared memory; absent where they do not, or before it is known.
    #[napi(getter, catch_unwind)]
    pub fn in_frames(&self) -> Option<String> {
        let why = self.client().ok()?.in_frames();
        why.map(|error| error.message)
    }

    /// Finds out whether bytes go in frames; the reason, as above.
    #[napi(catch_unwind, ts_return_type = "Promise<string | undefined | null>")]
    pub fn find_way<'env>(
        &self,
        env: &'env Env,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, Option<String>>> {
        let (client, until) = (self.client()?, deadline(timeout_ms));
        promise(env, async move { Ok(client.find_way(until).await?.map(|error| error.message)) })
    }

    /// Milliseconds that a sign of life takes.
    #[napi(catch_unwind)]
    pub fn ping<'env>(&self, env: &'env Env, timeout_ms: u32) -> Result<PromiseRaw<'env, f64>> {
        let (client, until) = (self.client()?, deadline(timeout_ms));
        promise(env, async move {
            let took = within(until, client.ping()).await?;
            Ok(took.as_secs_f64() * 1e3)
        })
    }

    /// The server's figures, by name.
    #[napi(catch_unwind, ts_return_type = "Promise<Array<[string, number | string]>>")]
    pub fn status<'env>(
        &self,
        env: &'env Env,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, Vec<Figure>>> {
        let (client, until) = (self.client()?, deadline(timeout_ms));
        promise(env, async move {
            let figures = within(until, client.status()).await?;
            #[expect(clippy::cast_precision_loss, reason = "JavaScript's numbers")]
            let convert = |value| match value {
                Value::Integer(value) => Either::A(value as f64),
                Value::Float(value) => Either::A(value),
                Value::Text(text) => Either::B(text),
            };
            Ok(figures.into_iter().map(|(name, value)| (name, convert(value))).collect())
        })
    }

    /// Events from `cursor` on; 0 is the oldest.
    #[napi(catch_unwind, ts_return_type = "Promise<KvEvents>")]
    pub fn events<'env>(
        &self,
        env: &'env Env,
        cursor: f64,
        max: u32,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, KvEvents>> {
        let (client, until) = (self.client()?, deadline(timeout_ms));
        let cursor = whole(cursor, "cursor").map_err(to_napi)?;
        promise(env, async move { Ok(client.events(cursor, max, until).await?.into()) })
    }

    /// Drops everything that is neither leased nor being written.
    #[napi(catch_unwind, ts_return_type = "Promise<void>")]
    pub fn clear<'env>(&self, env: &'env Env, timeout_ms: u32) -> Result<PromiseRaw<'env, ()>> {
        let (client, until) = (self.client()?, deadline(timeout_ms));
        promise(env, async move { client.clear(until).await })
    }

    /// Why a prompt is no hit.
    #[napi(catch_unwind, ts_return_type = "Promise<Explanation>")]
    pub fn explain<'env>(
        &self,
        env: &'env Env,
        model_name: String,
        world_size: u32,
        tokens: &[u32],
        salt: String,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, Explanation>> {
        let (client, until) = (self.client()?, deadline(timeout_ms));
        let key = self.question(model_name, world_size, tokens, salt);
        promise(env, async move { Ok(client.explain(&key, until).await?.into()) })
    }

    /// The leading chunks of a prompt that a lookup finds.
    #[napi(catch_unwind)]
    pub fn count_hits<'env>(
        &self,
        env: &'env Env,
        model_name: String,
        world_size: u32,
        tokens: &[u32],
        salt: String,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, f64>> {
        let (client, until) = (self.client()?, deadline(timeout_ms));
        let key = self.question(model_name, world_size, tokens, salt);
        promise(env, async move { Ok(number(count_hits(&*client, &key, until).await?)) })
    }

    /// A prefix cache at this server.
    #[napi(catch_unwind, ts_return_type = "Promise<PrefixCache>")]
    pub fn open_prefix_cache<'env>(
        &self,
        env: &'env Env,
        identity: &[u8],
        payload_bytes: f64,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, PrefixCache>> {
        PrefixCache::open(env, self.client()?, identity.to_vec(), payload_bytes, timeout_ms)
    }

    /// The scheduler's side of a paged engine's cache at this server.
    #[napi(catch_unwind)]
    pub fn open_scheduler(&self, place: PagedPlace) -> Result<PagedScheduler> {
        PagedScheduler::open(self.client()?, place)
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
        PagedWorker::open(env, self.client()?, place, worker_id, layout, timeout_ms)
    }

    /// Says goodbye and ends the connection.
    #[napi(catch_unwind)]
    pub fn close<'env>(&self, env: &'env Env, timeout_ms: u32) -> Result<PromiseRaw<'env, ()>> {
        let client = self.inner.lock().unwrap_or_else(PoisonError::into_inner).take();
        let until = deadline(timeout_ms);
        promise(env, async move {
            match client {
                Some(client) => {
                    let goodbye = async {
                        client.close().await;
                        Ok(())
                    };
                    within(until, goodbye).await
                }
                None => Ok(()),
            }
        })
    }

    fn question(&self, model_name: String, world_size: u32, tokens: &[u32], salt: String) -> Key {
        let nonce = RandomState::new().hash_one(std::process::id());
        let request_id = format!("kvferry-question-{nonce:016x}");
        prompt_key(model_name, world_size, tokens.into(), salt, request_id, self.chunk_size)
    }

    fn client(&self) -> Result<Arc<kvferry_client::Client>> {
        let client = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        client.clone().ok_or_else(|| {
            to_napi(Error::new(ErrorCode::Closed, "the client was closed; connect another one"))
        })
    }
}
