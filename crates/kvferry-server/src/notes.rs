//! What is worth a line in a log. Whoever keeps one takes the notes now and then; the same thing is one note with a count.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvferry_store::disk::DiskStatus;
use kvferry_store::remote::RemoteStatus;

/// Notes between two looks at them; what is more is counted together.
const NOTES_MAX: usize = 64;
/// Figures that are noted as they grow, with the event's name.
const WATCHED: [(&str, &str); 10] = [
    ("refused_chunks", "chunks_refused"),
    ("refused_growing_chunks", "chunks_refused_growing"),
    ("damaged_chunks", "chunks_damaged"),
    ("failed_retrievals", "retrievals_failed"),
    ("disk_save_failures", "saves_failed"),
    ("disk_dropped_full", "saves_dropped"),
    ("disk_dropped_large", "saves_too_large"),
    ("disk_load_failures", "loads_failed"),
    ("disk_refused_loads", "loads_refused"),
    ("disk_damaged", "files_damaged"),
];

/// How much a note matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Something that was asked for.
    Info,
    /// Requests are slower than they need be, or refused.
    Warn,
    /// A tier does not work.
    Error,
}

impl Level {
    /// Its name in logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }
}

/// Something that happened, once or more often.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// How much it matters.
    pub level: Level,
    /// What happened.
    pub event: &'static str,
    /// More of it, in words: of the latest. Never what came from peers.
    pub detail: String,
    /// How often.
    pub count: u64,
}

#[derive(Default)]
pub(crate) struct Notes {
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    /// By event and subject.
    notes: BTreeMap<(&'static str, &'static str), Note>,
    /// The watched figures when they were last looked at.
    figures: BTreeMap<&'static str, u64>,
    /// Tiers that do not work.
    failed: BTreeMap<&'static str, bool>,
    /// The pool cannot grow.
    stunted: bool,
    /// The disk has less room than its bound.
    shrunk: bool,
}

impl Kept {
    fn add(
        &mut self,
        level: Level,
        event: &'static str,
        subject: &'static str,
        (detail, count): (String, u64),
    ) {
        let place = match self.notes.len() >= NOTES_MAX {
            true if !self.notes.contains_key(&(event, subject)) => ("others", ""),
            _ => (event, subject),
        };
        let new = Note { level, event: place.0, detail: String::new(), count: 0 };
        let note = self.notes.entry(place).or_insert(new);
        note.level = note.level.max(level);
        note.detail = detail;
        note.count += count;
    }

    /// A tier works, or does not any more.
    fn tier(&mut self, tier: &'static str, failure: Option<String>) {
        let failed = self.failed.entry(tier).or_default();
        if *failed == failure.is_some() {
            return;
        }
        *failed = failure.is_some();
        match failure {
            Some(reason) => {
                let detail = format!("{tier}: {reason}");
                self.add(Level::Error, "tier_failed", tier, (detail, 1));
            }
            None => self.add(Level::Info, "tier_recovered", tier, (tier.to_owned(), 1)),
        }
    }

    /// Memory that cannot grow still works.
    fn growth(&mut self, failed: bool) {
        if std::mem::replace(&mut self.stunted, failed) == failed {
            return;
        }
        let (level, event, detail) = if failed {
            let remedy = "shared memory ran out: enlarge /dev/shm, or give less --memory";
            (Level::Warn, "memory_cannot_grow", remedy)
        } else {
            (Level::Info, "memory_grows", "there is shared memory again")
        };
        self.add(level, event, "", (detail.to_owned(), 1));
    }

    /// What the disk may hold now.
    fn room(&mut self, capacity: u64, bound: u64) {
        let shrunk = capacity < bound;
        if std::mem::replace(&mut self.shrunk, shrunk) == shrunk {
            return;
        }
        if shrunk {
            let detail = format!("{capacity} of {bound} bytes: the file system is full");
            self.add(Level::Warn, "disk_shrunk", "", (detail, 1));
        } else {
            let detail = format!("up to {bound} bytes are tried for again");
            self.add(Level::Info, "disk_grows", "", (detail, 1));
        }
    }
}

impl Notes {
    /// `subject` tells apart what is of one kind.
    pub(crate) fn add(
        &self,
        level: Level,
        event: &'static str,
        subject: &'static str,
        detail: String,
    ) {
        self.lock().add(level, event, subject, (detail, 1));
    }

    /// Takes all notes, those on the figures of this moment included.
    pub(crate) fn take(
        &self,
        store: &[(&'static str, u64)],
        disk: Option<DiskStatus>,
        remote: Option<RemoteStatus>,
    ) -> Vec<Note> {
        let mut kept = self.lock();
        let of_disk = disk.iter().flat_map(DiskStatus::figures);
        for (name, value) in store.iter().copied().chain(of_disk) {
            if name == "growth_failed" {
                kept.growth(value > 0);
            }
            let Some((_, event)) = WATCHED.iter().find(|(figure, _)| *figure == name) else {
                continue;
            };
            let before = kept.figures.insert(name, value).unwrap_or(0);
            if value > before {
                kept.add(
                    Level::Warn,
                    event,
                    "",
                    (format!("{value} since the start"), value - before),
                );
            }
        }
        if let Some(disk) = disk {
            kept.room(disk.capacity, disk.bound);
            kept.tier("disk", disk.failed);
        }
        if let Some(remote) = remote {
            kept.tier("remote", remote.failed);
        }
        std::mem::take(&mut kept.notes).into_values().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(notes: &[Note]) -> Vec<(&'static str, u64)> {
        notes.iter().map(|note| (note.event, note.count)).collect()
    }

    #[test]
    fn a_storm_is_one_note_with_a_count_and_many_kinds_are_bounded() {
        let notes = Notes::default();
        for _ in 0..1000 {
            notes.add(Level::Warn, "dropped", "a", "a".into());
            notes.add(Level::Warn, "dropped", "b", "b".into());
        }
        assert_eq!(events(&notes.take(&[], None, None)), [("dropped", 1000), ("dropped", 1000)]);
        assert_eq!(notes.take(&[], None, None), []);
        for number in 0..100 {
            let subject: &'static str = Box::leak(format!("{number}").into_boxed_str());
            notes.add(Level::Info, "dropped", subject, String::new());
        }
        let taken = notes.take(&[], None, None);
        assert_eq!(taken.len(), NOTES_MAX + 1);
        assert_eq!(taken.iter().map(|note| note.count).sum::<u64>(), 100);
    }

    #[test]
    fn figures_are_noted_as_they_grow() {
        let notes = Notes::default();
        let at = |value| {
            events(&notes.take(&[("refused_chunks", value), ("lookups", value)], None, None))
        };
        assert_eq!(at(0), []);
        assert_eq!(at(3), [("chunks_refused", 3)]);
        assert_eq!(at(3), []);
        assert_eq!(at(5), [("chunks_refused", 2)]);
    }

    #[test]
    fn a_tier_that_fails_is_noted_once_and_so_is_its_recovery() {
        let notes = Notes::default();
        let disk = |failed: Option<String>| {
            let status = DiskStatus { failed, ..Default::default() };
            notes.take(&[], Some(status), None)
        };
        let remote = |failed: Option<String>| {
            let status = RemoteStatus { failed, ..Default::default() };
            notes.take(&[], None, Some(status))
        };
        type Tier<'a> = &'a dyn Fn(Option<String>) -> Vec<Note>;
        let tiers: [(&str, Tier<'_>); 2] = [("disk", &disk), ("remote", &remote)];
        for (name, tier) in tiers {
            assert_eq!(tier(None), []);
            let failed = tier(Some("no room".into()));
            assert_eq!(events(&failed), [("tier_failed", 1)]);
            assert_eq!(failed[0].detail, format!("{name}: no room"));
            assert_eq!(tier(Some("still".into())), []);
            assert_eq!(events(&tier(None)), [("tier_recovered", 1)]);
        }
        let grown = |value| events(&notes.take(&[("growth_failed", value)], None, None));
        assert_eq!(grown(1), [("memory_cannot_grow", 1)]);
        assert_eq!((grown(1), grown(0)), (vec![], vec![("memory_grows", 1)]));
    }

    #[test]
    fn a_disk_with_less_room_than_its_bound_is_noted_and_so_is_that_it_has_it_again() {
        let notes = Notes::default();
        let room = |capacity| {
            let status = DiskStatus { bound: 1024, capacity, ..Default::default() };
            notes.take(&[], Some(status), None)
        };
        assert_eq!(room(1024), []);
        let shrunk = room(24);
        assert_eq!((events(&shrunk), shrunk[0].level), (vec![("disk_shrunk", 1)], Level::Warn));
        assert_eq!(shrunk[0].detail, "24 of 1024 bytes: the file system is full");
        assert_eq!(room(25), []);
        assert_eq!(events(&room(1024)), [("disk_grows", 1)]);
    }
}
