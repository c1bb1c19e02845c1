//! The log of events: what became visible and what went, in a ring of the latest.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use kvferry_core::events::{EVENT_SPACES_MAX, EVENTS_MAX, EventKind, Events, KvEvent};
use kvferry_core::explain::RemovalCause;
use tokio::sync::Notify;

use crate::probe::PROBE_MODEL;
use crate::prompt::Tokens;
use crate::space::Space;
use crate::store::Store;

/// Events that are kept.
const KEPT_MAX: usize = 65_536;
/// Bytes of names that kept events may hold, roughly: tenants and models come and go.
const NAMES_MAX: usize = 32 << 20;
/// Bytes of tokens that kept events may hold: enough for what an engine stores before it begins to listen.
const TOKENS_MAX: usize = 1 << 20;
/// The same from when somebody has listened.
const TOKENS_LISTENED_MAX: usize = 16 << 20;
/// Tokens in an allocation of their own take so many bytes more.
const ALLOCATION_BYTES: usize = 32;

/// What listeners are told of an object besides its identity.
#[derive(Clone)]
pub(crate) struct Origin {
    pub(crate) space: Arc<Space>,
    /// The hash of the chunk before it.
    pub(crate) parent: Option<[u8; 32]>,
}

impl Origin {
    /// Whether LMCache's listeners are told of it: their events have no place for a salt, so others would be sent to where
    /// they hit nothing, and would learn the tenant's prompts.
    pub(crate) fn is_told(&self) -> bool {
        self.space.event.cache_salt.is_empty()
    }
}

/// What happened to an object.
pub(crate) enum What {
    /// With its tokens, as long as they are kept.
    Stored(Tokens),
    /// Why, and for whose chunk it made room.
    Removed(RemovalCause, Option<Arc<str>>),
}

impl What {
    pub(crate) fn kind(&self) -> EventKind {
        match self {
            Self::Stored(_) => EventKind::Stored,
            Self::Removed(..) => EventKind::Removed,
        }
    }

    fn token_bytes(&self) -> usize {
        match self {
            Self::Stored(tokens) => token_bytes(tokens.as_ref()),
            Self::Removed(..) => 0,
        }
    }
}

fn token_bytes(tokens: Option<&Arc<[u32]>>) -> usize {
    tokens.map_or(0, |tokens| ALLOCATION_BYTES + size_of_val(&**tokens))
}

/// An event, as it is kept.
pub(crate) struct Entry {
    pub(crate) chunk: [u8; 32],
    pub(crate) rank: u32,
    /// Bytes of names that it counts for.
    names: u32,
    pub(crate) origin: Origin,
    pub(crate) what: What,
    /// Milliseconds since 1970. No deadline depends on them.
    pub(crate) at_ms: u64,
}

const _: () = assert!(size_of::<Entry>() <= 120);

/// The latest events.
pub(crate) struct EventLog {
    entries: VecDeque<Entry>,
    names: usize,
    /// Bytes of tokens.
    tokens: usize,
    tokens_max: usize,
    /// Events before this one have no tokens any more.
    bare: u64,
    /// The sequence of the next event.
    next: u64,
    started_ms: u64,
    changed: Arc<Notify>,
}

impl Default for EventLog {
    fn default() -> Self {
        Self {
            entries: VecDeque::new(),
            names: 0,
            tokens: 0,
            tokens_max: TOKENS_MAX,
            bare: 1,
            next: 1,
            started_ms: now_ms(),
            changed: Arc::default(),
        }
    }
}

impl EventLog {
    /// Adds an event; the oldest one makes room.
    pub(crate) fn push(&mut self, chunk: [u8; 32], rank: u32, origin: Origin, what: What) {
        if origin.space.event.model_name == PROBE_MODEL {
            return;
        }
        let last = self.entries.back();
        let named = last.is_some_and(|last| Arc::ptr_eq(&last.origin.space, &origin.space));
        let by_bytes = match (last.map(|last| &last.what), &what) {
            (Some(What::Removed(_, Some(last))), What::Removed(_, Some(by)))
                if Arc::ptr_eq(last, by) =>
            {
                0
            }
            (_, What::Removed(_, Some(by))) => by.len(),
            _ => 0,
        };
        let names = by_bytes + if named { 0 } else { origin.space.bytes() };
        while self.entries.len() >= KEPT_MAX || self.names + names > NAMES_MAX {
            let Some(oldest) = self.entries.pop_front() else { break };
            self.names -= oldest.names as usize;
            self.tokens -= oldest.what.token_bytes();
        }
        self.names += names;
        self.tokens += what.token_bytes();
        self.next += 1;
        let (names, at_ms) = (u32::try_from(names).unwrap_or(u32::MAX), now_ms());
        self.entries.push_back(Entry { chunk, rank, names, origin, what, at_ms });
        self.bare = self.bare.max(self.first());
        while self.tokens > self.tokens_max && self.bare < self.next {
            let place = usize::try_from(self.bare - self.first()).unwrap_or(usize::MAX);
            if let Some(What::Stored(tokens)) = self.entries.get_mut(place).map(|it| &mut it.what) {
                self.tokens -= token_bytes(tokens.take().as_ref());
            }
            self.bare += 1;
        }
        self.changed.notify_waiters();
    }

    /// Keeps the tokens of more events from now on.
    pub(crate) fn listen(&mut self) {
        self.tokens_max = TOKENS_LISTENED_MAX;
    }

    /// Told of each event.
    pub(crate) fn changed(&self) -> &Arc<Notify> {
        &self.changed
    }

    /// The sequence of the oldest event that is kept.
    pub(crate) fn first(&self) -> u64 {
        self.next - self.entries.len() as u64
    }

    /// That of the next event.
    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    /// Since when all events are kept, in milliseconds since 1970.
    pub(crate) fn since_ms(&self) -> u64 {
        let oldest = self.entries.front().filter(|_| self.first() > 1);
        oldest.map_or(self.started_ms, |oldest| oldest.at_ms)
    }

    /// The kept events before `sequence`, latest first.
    pub(crate) fn before(&self, sequence: u64) -> impl Iterator<Item = &Entry> {
        let end = sequence.clamp(self.first(), self.next) - self.first();
        self.entries.range(..usize::try_from(end).unwrap_or(usize::MAX)).rev()
    }

    /// Those from the one of `sequence` on, which is kept or the next one.
    pub(crate) fn from(&self, sequence: u64) -> impl Iterator<Item = &Entry> {
        let skip = usize::try_from(sequence - self.first()).unwrap_or(usize::MAX);
        self.entries.range(skip.min(self.entries.len())..)
    }

    fn read(&self, cursor: u64, max: u32) -> (u64, Vec<KvEvent>) {
        let first = if cursor == 0 { self.first() } else { cursor.clamp(self.first(), self.next) };
        let events = self.from(first).take(max as usize).map(|entry| KvEvent {
            kind: entry.what.kind(),
            chunk: entry.chunk,
            parent: entry.origin.parent,
            rank: entry.rank,
            space: Arc::clone(&entry.origin.space.event),
            at_ms: entry.at_ms,
        });
        (first, events.collect())
    }
}

impl Store {
    /// Up to `max` events from the one of sequence `cursor` on; 0 is the oldest that is kept. The latest
    /// 65,536 are kept, fewer when many long names are among them. Less than `max` come when
    /// [`EVENTS_MAX`] or [`EVENT_SPACES_MAX`] are reached.
    pub fn events(&self, cursor: u64, max: u32) -> Events {
        let (first, mut events) = self.lock().index.events.read(cursor, max.min(EVENTS_MAX));
        let mut spaces = HashSet::new();
        let fits = events.iter().position(|event| {
            spaces.insert(Arc::as_ptr(&event.space));
            spaces.len() > EVENT_SPACES_MAX
        });
        events.truncate(fits.unwrap_or(events.len()));
        let lost = cursor != 0 && cursor != first;
        Events { incarnation: self.boot_token(), first, events, lost }
    }
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use kvferry_core::key::MODEL_NAME_BYTES_MAX;

    use super::*;
    use crate::space::test_space;
    use crate::state::Registered;

    fn log_of(count: u64) -> EventLog {
        let mut log = EventLog::default();
        let origin = Origin { space: test_space(), parent: None };
        for number in 0..count {
            let mut chunk = [0; 32];
            chunk[..8].copy_from_slice(&number.to_le_bytes());
            log.push(chunk, 0, origin.clone(), What::Stored(None));
        }
        log
    }

    fn number(event: &KvEvent) -> u64 {
        u64::from_le_bytes(event.chunk[..8].try_into().unwrap())
    }

    #[test]
    fn the_ring_keeps_the_latest_and_takes_memory_only_as_they_come() {
        assert_eq!(log_of(0).entries.capacity(), 0);
        assert!(log_of(10).entries.capacity() < 100);
        let kept = KEPT_MAX as u64;
        let log = log_of(kept + 5);
        assert_eq!((log.first(), log.next()), (6, kept + 6));
        assert_eq!(log.entries.capacity(), KEPT_MAX, "and no more than it keeps");
        let (first, events) = log.read(0, u32::MAX);
        assert_eq!((first, events.len()), (6, KEPT_MAX));
        assert!(events.iter().map(number).eq(5..kept + 5));
    }

    #[test]
    fn events_before_a_sequence_come_latest_first() {
        let log = log_of(5);
        let before =
            |sequence| log.before(sequence).map(|entry| entry.chunk[0]).collect::<Vec<_>>();
        assert_eq!(before(u64::MAX), [4, 3, 2, 1, 0]);
        assert_eq!(before(3), [1, 0]);
        assert!(before(1).is_empty() && before(0).is_empty());
    }

    #[test]
    fn the_log_reaches_back_to_the_start_as_long_as_it_has_all_events() {
        let mut log = log_of(KEPT_MAX as u64);
        log.started_ms = 7;
        assert_eq!(log.since_ms(), 7);
        let origin = Origin { space: test_space(), parent: None };
        log.push([0; 32], 0, origin, What::Stored(None));
        assert_eq!(log.since_ms(), log.entries[0].at_ms);
        assert_ne!(log.since_ms(), 7);
    }

    #[test]
    fn tokens_are_bounded_in_bytes_and_more_of_them_are_kept_for_listeners() {
        let kept = |log: &EventLog| {
            let tokens = |entry: &&Entry| entry.what.token_bytes() > 0;
            let bytes: usize = log.entries.iter().map(|entry| entry.what.token_bytes()).sum();
            assert_eq!(bytes, log.tokens);
            (log.entries.iter().filter(tokens).count(), log.entries.len())
        };
        let mut log = EventLog::default();
        let push = |log: &mut EventLog, count: u32| {
            for number in 0..count {
                let origin = Origin { space: test_space(), parent: None };
                let what = match number % 8 {
                    0 => What::Removed(RemovalCause::Evicted, None),
                    _ => What::Stored(Some(vec![number; 1016].into())),
                };
                log.push([0; 32], 0, origin, what);
            }
        };
        push(&mut log, 2000);
        assert_eq!(kept(&log), (256, 2000));
        assert!(log.entries.back().unwrap().what.token_bytes() > 0, "the latest");
        log.listen();
        push(&mut log, 8000);
        assert_eq!(kept(&log), (4096, 10_000));
        push(&mut log, u32::try_from(KEPT_MAX).unwrap());
        assert_eq!(kept(&log), (4096, KEPT_MAX));
    }

    #[test]
    fn names_are_bounded_in_bytes_too() {
        let mut log = EventLog::default();
        let mut layout = test_space().registered.layout.clone();
        for number in 0..20_000 {
            layout.model_name = format!("{number:0MODEL_NAME_BYTES_MAX$}");
            let registered = Registered { layout: layout.clone(), object_bytes: 1 };
            let space = Arc::new(Space::new([0; 32], Arc::new(registered), "salt"));
            log.push([0; 32], 0, Origin { space, parent: None }, What::Stored(None));
        }
        let held: usize = log.entries.iter().map(|entry| entry.origin.space.bytes()).sum();
        assert!(held <= NAMES_MAX, "{held} bytes");
        assert!(held > NAMES_MAX / 2, "{held} bytes");
        assert_eq!(log.next(), 20_001);
    }
}
