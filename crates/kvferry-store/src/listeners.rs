//! What listeners of LMCache's `subscribe_kv_events` hear: the log of events, by model, with the tokens of what was stored.

use std::pin::pin;
use std::sync::Arc;

use kvferry_core::events::{KvEventBatch, KvEventRecord};
use kvferry_core::key::check_model_name;
use kvferry_core::{Error, Result};

use crate::events::What;
use crate::store::Store;

/// Events of one batch at most, as in LMCache.
const BATCH_MAX: u64 = 1024;
/// Tokens of one batch at most, but for the last event's: with the names below a message's 8 MiB.
const BATCH_TOKENS_MAX: usize = 128 << 10;
/// Events that are looked at with the store's lock held.
const PAGE: usize = 4096;

impl Store {
    /// From now on the tokens of more chunks are kept for listeners: 16 MiB of them instead of one.
    ///
    /// # Errors
    /// A model name that cannot be, or `max_events` is not in 1..=1024.
    pub fn listen(&self, model_name: &str, max_events: u64) -> Result<()> {
        check_model_name(model_name)?;
        if !(1..=BATCH_MAX).contains(&max_events) {
            return Err(Error::invalid(format!(
                "max_events {max_events} is not in 1..={BATCH_MAX}"
            )));
        }
        self.lock().index.events.listen();
        Ok(())
    }

    /// Up to `max_events` events of the model's chunks without a salt, after the one of sequence `cursor`. What was stored
    /// is told as long as its tokens are kept.
    pub fn kv_events(&self, model_name: &str, cursor: u64, max_events: u64) -> KvEventBatch {
        let (mut lost, mut events, mut tokens) = (false, Vec::new(), 0);
        let mut next = cursor.saturating_add(1);
        // What comes meanwhile has its turn later, or this would have no end.
        let mut end = u64::MAX;
        'pages: loop {
            let state = self.lock();
            let log = &state.index.events;
            end = end.min(log.next());
            let first = next.clamp(log.first(), log.next());
            if first != next {
                (lost, next, tokens) = (true, first, 0);
                events.clear();
            }
            for entry in log.from(next).take(PAGE) {
                if next >= end || events.len() as u64 >= max_events || tokens >= BATCH_TOKENS_MAX {
                    break 'pages;
                }
                let seq = next;
                next += 1;
                let origin = &entry.origin;
                if origin.space.event.model_name != model_name || !origin.is_told() {
                    continue;
                }
                let (parent_block_hash, token_ids) = match &entry.what {
                    What::Stored(Some(tokens)) => (origin.parent, Arc::clone(tokens)),
                    What::Stored(None) => continue,
                    What::Removed(..) => (None, Arc::default()),
                };
                tokens += token_ids.len();
                events.push(KvEventRecord {
                    seq,
                    kind: entry.what.kind(),
                    model_name: model_name.to_owned(),
                    block_hashes: vec![entry.chunk],
                    parent_block_hash,
                    token_ids,
                });
            }
            if next >= end {
                break;
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
    use kvferry_core::events::EventKind;
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
        put(&store, owner, &Key { cache_salt: "tenant".into(), ..key(0, 2) });
        put(&store, owner, &Key { model_name: "other".into(), ..key(100, 1) });
        store.clear();
        let batch = store.kv_events("m", 0, 9);
        assert_eq!((batch.events, batch.next_cursor), (vec![], 6));
    }

    #[test]
    fn a_cursor_that_the_log_does_not_reach_is_a_loss() {
        let (store, owner) = store(9);
        put(&store, owner, &key(0, 1));
        for cursor in [2, u64::MAX] {
            let batch = store.kv_events("m", cursor, 9);
            assert_eq!((batch.lost, batch.next_cursor), (true, 1), "{cursor}");
        }
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
