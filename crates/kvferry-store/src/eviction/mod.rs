//! Which object goes when room is needed: policies behind one trait.
//!
//! The index tells a policy which objects requests use, whether they are there or not, and which of those that are
//! there may go; the policy names the one that goes next. Objects are known to it by their places in the index, and
//! by keys where they are not there.

mod arc;
mod hazard;
pub(crate) mod links;
mod lru;
mod s3_fifo;

use std::fmt;
use std::time::Instant;

use kvferry_core::{Error, Result};

/// How a store chooses what goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Policy {
    /// Ours: what is least likely to be used again soon for the time that it would stay, as the store has learned
    /// from its own requests; the end of a prefix before its beginning.
    #[default]
    Default,
    /// The least recently used, the end of a prefix before its beginning.
    Lru,
    /// Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", 2003.
    Arc,
    /// Yang et al., "FIFO queues are all you need for cache eviction", 2023.
    S3Fifo,
}

impl Policy {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Default, Self::Lru, Self::Arc, Self::S3Fifo];

    /// As options say it: "default", "lru", "arc" or "s3fifo".
    pub fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Lru => "lru",
            Self::Arc => "arc",
            Self::S3Fifo => "s3fifo",
        }
    }

    /// The policy of this name.
    ///
    /// # Errors
    /// There is none; the error names them all.
    pub fn from_name(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|policy| policy.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::invalid(format!("policy {name:?} is not known: give one of {names}"))
        })
    }

    pub(crate) fn eviction(self) -> Box<dyn Eviction> {
        match self {
            Self::Default => Box::<hazard::Hazard>::default(),
            Self::Lru => Box::<lru::Lru>::default(),
            Self::Arc => Box::<arc::Arc>::default(),
            Self::S3Fifo => Box::<s3_fifo::S3Fifo>::default(),
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An object that a request uses.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Use {
    /// 64 bits of its identity.
    pub(crate) key: u64,
    /// Where it is, if it is there.
    pub(crate) place: Option<u32>,
}

/// A policy at work.
pub(crate) trait Eviction: Send {
    /// A request uses these, its first chunk first; `ranks` objects are of each chunk.
    fn request(&mut self, uses: &[Use], ranks: usize, now: Instant);

    /// Whether a request has used it lately, as far as the policy cares.
    fn knows(&self, _key: u64) -> bool {
        true
    }

    /// There is another object; it may not go yet.
    fn add(&mut self, place: u32, key: u64);

    /// It may go. Those of one chain come last one first.
    fn release(&mut self, place: u32);

    /// It may not go, after all.
    fn hold(&mut self, place: u32);

    /// Whether nothing hangs on it; so it is until said otherwise.
    fn is_leaf(&mut self, _place: u32, _leaf: bool) {}

    /// It is there no more.
    fn remove(&mut self, place: u32);

    /// Which of those that may go goes next; it stays until it is removed.
    fn victim(&mut self) -> Option<u32>;

    /// Bytes that the policy takes for objects, there or remembered, and how many these are; where it counts them.
    fn takes(&self) -> Option<(usize, usize)> {
        None
    }
}

#[cfg(test)]
mod tests;
