//! What listeners of LMCache's `subscribe_kv_events` hear: the log of events, by model, with the tokens of what was stored.
//!
//! A tenant's chunks are not told of: the form has no place for a salt, so a router would send others to where they hit
//! nothing, and would learn the tenant's prompts.

use std::collections::{HashMap, VecDeque};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvferry_core::events::{EventKind, KvEventBatch, KvEventRecord};
use kvferry_core::key::check_model_name;
use kvferry_core::{Error, Result};

use crate::prompt::Prompt;
use crate::store::Store;

/// Events of one batch at most, as in LMCache.
const BATCH_MAX: u64 = 1024;
/// Tokens of one batch at most, but for the first event's: 5 MiB on the wire.
const BATCH_TOKENS_MAX: usize = 1 << 20;
/// Events that are looked at with the store's lock held.
const PAGE: u32 = 1024;
/// Bytes of prompts that are kept for listeners.
const KEPT_MAX: usize = 16 << 20;
/// Beside its tokens a chunk takes about so many bytes.
const CHUNK_BYTES: usize = 160;

/// The tokens of the chunks that prompts were last seen with, from when the first listener came.
#[derive(Default)]
pub(crate) struct Listeners {
    listen: AtomicBool,
    heard: Mutex<Heard>,
}

#[derive(Default)]
struct Heard {
    chunks: HashMap<[u8; 32], Chunk>,
    by_age: VecDeque<[u8; 32]>,
    bytes: usize,
}

#[derive(Clone)]
struct Chunk {
    parent: Option<[u8; 32]>,
    tokens: Arc<[u32]>,
}

impl Chunk {
    fn bytes(&self) -> usize {
        CHUNK_BYTES + size_of_val(&*self.tokens)
    }
}

impl Heard {
    fn keep(&mut self, hash: [u8; 32], chunk: Chunk) {
        self.bytes += chunk.bytes();
        self.chunks.insert(hash, chunk);
        self.by_age.push_back(hash);
        while self.bytes > KEPT_MAX {
            let Some(oldest) = self.by_age.pop_front() else { break };
            self.bytes -= self.chunks.remove(&oldest).map_or(0, |chunk| chunk.bytes());
        }
    }
}

impl Listeners {
    /// Remembers the chunks of a prompt, if anybody ever listened.
    pub(crate) fn hear(&self, prompt: &Prompt, chunk_size: usize) {
        if !self.listen.load(Ordering::Relaxed) {
            return;
        }
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let mut parent = None;
        for (hash, tokens) in prompt.hashes.iter().zip(prompt.tokens().chunks_exact(chunk_size)) {
            if !heard.chunks.contains_key(hash) {
                heard.keep(*hash, Chunk { parent, tokens: tokens.into() });
            }
            parent = Some(*hash);
        }
    }

    fn chunk(&self, hash: &[u8; 32]) -> Option<Chunk> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).chunks.get(hash).cloned()
    }
}

impl Store {
    /// Begins to keep what [`Store::kv_events`] tells of prompts from now on, up to 16 MiB of them. Errors: a model name that
    /// cannot be, or `max_events` is not in 1..=1024.
    pub fn listen(&self, model_name: &str, max_events: u64) -> Result<()> {
        check_model_name(model_name)?;
        if !(1..=BATCH_MAX).contains(&max_events) {
            return Err(Error::invalid(format!(
                "max_events {max_events} is not in 1..={BATCH_MAX}"
            )));
        }
        self.listeners().listen.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Up to `max_events` events of the model's chunks without a salt, after the one of sequence `cursor`. What was stored
    /// is told where its tokens are known: see [`Store::listen`].
    pub fn kv_events(&self, model_name: &str, cursor: u64, max_events: u64) -> KvEventBatch {
        let (mut lost, mut events, mut tokens) = (false, Vec::new(), 0);
        let mut next = cursor.saturating_add(1);
        let end = self.lock().index.events.next();
        'pages: loop {
            let (first, page) = self.lock().index.events.read(next, PAGE);
            if first != next {
                (lost, next, tokens) = (true, first, 0);
                events.clear();
            }
            if page.is_empty() {
                break;
            }
            for event in page {
                // What comes meanwhile has its turn later, or this would have no end.
                let full = events.len() as u64 >= max_events || tokens >= BATCH_TOKENS_MAX;
                if full || next >= end {
                    break 'pages;
                }
                let seq = next;
                next += 1;
                if event.space.model_name != model_name || !event.space.cache_salt.is_empty() {
                    continue;
                }
                let chunk = match event.kind {
                    EventKind::Removed => Chunk { parent: None, tokens: Arc::default() },
                    EventKind::Stored => match self.listeners().chunk(&event.chunk) {
                        Some(chunk) => chunk,
                        None => continue,
                    },
                };
                tokens += chunk.tokens.len();
                events.push(KvEventRecord {
                    seq,
                    kind: event.kind,
                    model_name: model_name.to_owned(),
                    block_hashes: vec![event.chunk],
                    parent_block_hash: chunk.parent,
                    token_ids: chunk.tokens,
                });
            }
        }
        let [a, b, c, d, e, f, g, h, ..] = self.boot_token();
        // LMCache's is positive as well.
        let incarnation = u64::from_be_bytes([a, b, c, d, e, f, g, h]) >> 1;
        KvEventBatch { enabled: true, incarnation, next_cursor: next - 1, lost, events }
    }

    /// When `ready` says something; it is asked again after each event.
    pub async fn after_events<T>(&self, mut ready: impl FnMut() -> Option<T>) -> T {
        let changed = Arc::clone(self.lock().index.events.changed());
        loop {
            let mut event = pin!(changed.notified());
            event.as_mut().enable(); // from here on none is missed
            if let Some(value) = ready() {
                return value;
            }
            event.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use kvferry_core::ErrorCode;
    use kvferry_core::key::{Dtype, Key, Layout};

    use super::*;
    use crate::store::{Limits, StoreOptions};
    use crate::{Owner, Policy};

    const PAGE_BYTES: u64 = 4096;

    fn store(pages: u64) -> (Store, Owner) {
        let store = Store::new(StoreOptions {
            chunk_size: 16,
            memory: pages * PAGE_BYTES,
            shared_name: None,
            policy: Policy::Lru,
            disk: None,
            remote: None,
            limits: Limits::default(),
        });
        let store = store.unwrap();
        let owner = store.connect();
        for (instance, model) in [(1, "m"), (2, "other")] {
            let layout = Layout {
                model_name: model.into(),
                world_size: 1,
                block_size: 16,
                num_layers: 1,
                hidden_dim_size: 4096,
                dtype: Dtype::new("uint8").unwrap(),
                single_plane: true,
                num_physical_slots: Some(1),
            };
            store.register(owner, instance, layout).unwrap();
        }
        (store, owner)
    }

    fn key(first: u32, chunks: u32) -> Key {
        Key {
            model_name: "m".into(),
            world_size: 1,
            worker_id: Some(0),
            token_ids: (first..first + chunks * 16).collect(),
            start: 0,
            end: u64::from(chunks) * 16,
            request_id: format!("{first}"),
            cache_salt: String::new(),
            num_kv_readers: 1,
        }
    }

    fn put(store: &Store, owner: Owner, key: &Key) {
        let instance = if key.model_name == "m" { 1 } else { 2 };
        store.prepare_store(owner, key, instance, Instant::now()).unwrap();
        assert!(store.commit_store(key, instance, &[]).unwrap());
    }

    #[test]
    fn what_is_stored_comes_with_its_tokens_and_what_goes_by_its_hash() {
        let (store, owner) = store(2);
        store.listen("m", 9).unwrap();
        put(&store, owner, &key(0, 2));
        put(&store, owner, &key(100, 1));
        let batch = store.kv_events("m", 0, 9);
        let told: Vec<_> = batch
            .events
            .iter()
            .map(|it| (it.seq, it.kind, it.token_ids.first().copied(), it.token_ids.len()))
            .collect();
        assert_eq!(
            told,
            [
                (1, EventKind::Stored, Some(0), 16),
                (2, EventKind::Stored, Some(16), 16),
                (3, EventKind::Removed, None, 0),
                (4, EventKind::Stored, Some(100), 16),
            ]
        );
        let hash = |place: usize| batch.events[place].block_hashes[0];
        let parents: Vec<_> = batch.events.iter().map(|it| it.parent_block_hash).collect();
        assert_eq!(parents, [None, Some(hash(0)), None, None]);
        assert_eq!(hash(2), hash(1));
        assert_eq!((batch.enabled, batch.lost, batch.next_cursor), (true, false, 4));
        assert_eq!(store.kv_events("m", 4, 9).events, []);
        assert_eq!(store.kv_events("m", 0, 9).incarnation, batch.incarnation);
    }

    #[test]
    fn a_batch_has_no_more_events_than_asked_for_and_the_next_goes_on_there() {
        let (store, owner) = store(9);
        store.listen("m", 1).unwrap();
        put(&store, owner, &key(0, 3));
        let mut cursor = 0;
        for expected in 1..=3 {
            let batch = store.kv_events("m", cursor, 1);
            let seen: Vec<u64> = batch.events.iter().map(|it| it.seq).collect();
            assert_eq!((seen, batch.next_cursor), (vec![expected], expected));
            cursor = batch.next_cursor;
        }
    }

    #[test]
    fn other_models_and_tenants_are_not_told_of_and_their_events_are_passed_by() {
        let (store, owner) = store(9);
        store.listen("m", 9).unwrap();
        put(&store, owner, &Key { cache_salt: "tenant".into(), ..key(0, 2) });
        put(&store, owner, &Key { model_name: "other".into(), ..key(100, 1) });
        store.clear();
        let batch = store.kv_events("m", 0, 9);
        assert_eq!((batch.events, batch.next_cursor), (vec![], 6));
        let heard = &store.listeners().heard.lock().unwrap().chunks;
        assert!(heard.values().all(|chunk| chunk.tokens[0] == 100), "no tenant's prompt is kept");
    }

    #[test]
    fn without_a_listener_no_prompt_is_kept_and_what_was_stored_before_is_passed_by() {
        let (store, owner) = store(9);
        put(&store, owner, &key(0, 1));
        assert!(store.listeners().heard.lock().unwrap().chunks.is_empty());
        store.listen("m", 9).unwrap();
        put(&store, owner, &key(100, 1));
        let batch = store.kv_events("m", 0, 9);
        assert_eq!(batch.events.iter().map(|it| it.seq).collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn a_cursor_that_the_log_does_not_reach_is_a_loss() {
        let (store, owner) = store(9);
        store.listen("m", 9).unwrap();
        put(&store, owner, &key(0, 1));
        for cursor in [2, u64::MAX] {
            let batch = store.kv_events("m", cursor, 9);
            assert_eq!((batch.lost, batch.next_cursor), (true, 1), "{cursor}");
        }
    }

    #[test]
    fn the_prompts_that_are_kept_have_a_bound_in_bytes() {
        let mut heard = Heard::default();
        for number in 0..100_u32 {
            let mut hash = [0; 32];
            hash[..4].copy_from_slice(&number.to_le_bytes());
            heard.keep(hash, Chunk { parent: None, tokens: vec![number; 65_536].into() });
            assert!(heard.bytes <= KEPT_MAX);
        }
        assert_eq!(heard.chunks.len(), heard.by_age.len());
        let mut last = [0; 32];
        last[0] = 99;
        assert!(heard.chunks.len() > 60 && heard.chunks.contains_key(&last));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let (store, _) = store(1);
        for (model, max_events) in [("m", 0), ("m", 1025), ("a@b", 9)] {
            let error = store.listen(model, max_events).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidArgument, "{model} {max_events}");
        }
    }

    #[test]
    fn an_event_that_comes_while_it_is_asked_is_not_missed() {
        let (store, owner) = store(9);
        store.listen("m", 9).unwrap();
        let mut asked = 0;
        let batch = store.after_events(|| {
            let batch = store.kv_events("m", 0, 9);
            asked += 1;
            if asked == 1 {
                put(&store, owner, &key(0, 1));
            }
            (!batch.events.is_empty()).then_some(batch)
        });
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        assert_eq!((runtime.block_on(batch).next_cursor, asked), (1, 2));
    }
}
