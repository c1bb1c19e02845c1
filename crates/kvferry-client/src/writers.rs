//! Which stores are under way.

use std::collections::HashMap;
use std::sync::Mutex;

use kvferry_core::key::Key;

use crate::session::lock;

/// Stores that have begun and not ended, over whichever connection. A commit or an abandonment names a range, and the
/// server ends the oldest store of it; so there is one at a time, and what ends late cannot be taken for another.
#[derive(Default)]
pub(crate) struct Writers(Mutex<HashMap<(u64, String), Vec<Key>>>);

/// A store, from before its prepare until after its commit or its end without one.
pub(crate) struct Writer<'a> {
    writers: &'a Writers,
    key: &'a Key,
    instance: u64,
    stays: bool,
}

impl Writers {
    /// A store of the key's range begins; `None` while another one is under way, which writes what this one would.
    pub(crate) fn begin<'a>(&'a self, key: &'a Key, instance: u64) -> Option<Writer<'a>> {
        let mut all = lock(&self.0);
        let keys = all.entry((instance, key.request_id.clone())).or_default();
        if keys.iter().any(|known| is_same(known, key)) {
            return None;
        }
        keys.push(key.clone());
        drop(all);
        Some(self.ends(key, instance))
    }

    /// One that began and stayed: it ends with this, if it does not stay once more.
    pub(crate) fn ends<'a>(&'a self, key: &'a Key, instance: u64) -> Writer<'a> {
        Writer { writers: self, key, instance, stays: false }
    }

    /// The instance is gone.
    pub(crate) fn forget(&self, instance: u64) {
        lock(&self.0).retain(|(known, _), _| *known != instance);
    }
}

impl Writer<'_> {
    /// It goes on after this.
    pub(crate) fn stay(mut self) {
        self.stays = true;
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        if self.stays {
            return;
        }
        let place = (self.instance, self.key.request_id.clone());
        let mut all = lock(&self.writers.0);
        if let Some(keys) = all.get_mut(&place) {
            keys.retain(|known| !is_same(known, self.key));
            if keys.is_empty() {
                all.remove(&place);
            }
        }
    }
}

/// Whether the server takes both for one range: tokens after its end tell nothing.
fn is_same(a: &Key, b: &Key) -> bool {
    let range = |key: &Key| (key.start, key.end, key.world_size, key.worker_id);
    range(a) == range(b)
        && (&a.model_name, &a.cache_salt) == (&b.model_name, &b.cache_salt)
        && tokens(a) == tokens(b)
}

fn tokens(key: &Key) -> &[u32] {
    let end = usize::try_from(key.end).unwrap_or(usize::MAX).min(key.token_ids.len());
    &key.token_ids[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(tokens: u32, end: u64) -> Key {
        Key {
            model_name: "m".into(),
            world_size: 1,
            worker_id: Some(0),
            token_ids: (0..tokens).collect(),
            start: 0,
            end,
            request_id: "r".into(),
            cache_salt: String::new(),
            num_kv_readers: 1,
        }
    }

    #[test]
    fn a_range_is_the_same_however_far_its_prompt_has_grown() {
        let writers = Writers::default();
        let (short, long) = (key(16, 16), Key { num_kv_readers: 2, ..key(40, 16) });
        writers.begin(&short, 1).unwrap().stay();
        assert!(writers.begin(&long, 1).is_none());
        for other in [
            key(40, 32),
            Key { token_ids: (1..17).collect(), ..short.clone() },
            Key { cache_salt: "a".into(), ..short.clone() },
            Key { request_id: "s".into(), ..short.clone() },
            Key { worker_id: Some(1), ..short.clone() },
        ] {
            assert!(writers.begin(&other, 1).is_some(), "{other:?}");
        }
        assert!(writers.begin(&short, 2).is_some());
        drop(writers.ends(&long, 1));
        writers.begin(&short, 1).unwrap().stay();
        writers.forget(1);
        drop(writers.begin(&short, 1).unwrap());
        assert!(lock(&writers.0).is_empty());
    }
}
