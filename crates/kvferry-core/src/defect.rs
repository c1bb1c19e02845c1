//! Deliberate defects that the simulator must notice. Only its own build, with the feature `simulator`, has
//! any; elsewhere [`is_active`] is `false` for the compiler to see.

/// What can be made wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Defect {
    /// A store plan adds up both hits, which count the same tokens.
    SumForMax,
    /// A store plan counts the external hit alone.
    ExternalHitAlone,
    /// The tenant is left out of the cache's keys.
    SaltLeftOut,
    /// A lookup counts leases that keep nothing.
    LeaseNotTaken,
    /// Lookups lease for one reader, however many load.
    OneReaderUnderMla,
    /// Chunks become visible before they are filled.
    CommitBeforeFill,
    /// Recovery takes what a step scheduled for computed.
    RecoveryWithoutSubtraction,
    /// Every rank stores what all of them have.
    EveryRankStores,
    /// What one rank has counts as a hit.
    AnyRankHits,
    /// A session's leases outlive it.
    SessionKept,
    /// Every worker takes the first one's shard.
    FirstShardForAll,
    /// Slots are given to others when their writer is late, while it may still write.
    LateSlotReused,
}

#[cfg(feature = "simulator")]
mod active {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::Defect;

    /// A package test looks for it: in the simulator's addon, and in no other.
    pub static MARKER: &str = "kvferry: this build has deliberate defects";
    static ACTIVE: AtomicU32 = AtomicU32::new(0);

    const ALL: [Defect; 12] = [
        Defect::SumForMax,
        Defect::ExternalHitAlone,
        Defect::SaltLeftOut,
        Defect::LeaseNotTaken,
        Defect::OneReaderUnderMla,
        Defect::CommitBeforeFill,
        Defect::RecoveryWithoutSubtraction,
        Defect::EveryRankStores,
        Defect::AnyRankHits,
        Defect::SessionKept,
        Defect::FirstShardForAll,
        Defect::LateSlotReused,
    ];

    /// The names of all defects.
    pub fn names() -> Vec<String> {
        ALL.iter().map(|defect| format!("{defect:?}")).collect()
    }

    /// Makes one of them real for this process, or none; `false` when there is none of that name.
    pub fn activate(name: Option<&str>) -> bool {
        let found = ALL.iter().position(|defect| Some(format!("{defect:?}").as_str()) == name);
        ACTIVE.store(found.map_or(0, |at| 1 << at), Ordering::SeqCst);
        name.is_none() || found.is_some()
    }

    /// Whether a defect is real.
    pub fn is_active(defect: Defect) -> bool {
        ACTIVE.load(Ordering::Relaxed) & (1 << defect as u32) != 0
    }
}

#[cfg(feature = "simulator")]
pub use active::{MARKER, activate, is_active, names};

/// Whether a defect is real: never in this build.
#[cfg(not(feature = "simulator"))]
#[inline(always)]
pub const fn is_active(_defect: Defect) -> bool {
    false
}
