//! Memory regions and copies: the only crate with unsafe code beside the binding.
#![allow(unsafe_code, reason = "memory regions and copies live here")]

pub mod cuda;
mod folded;
mod host;
mod kernels;
#[cfg(target_os = "linux")]
mod mapping;
#[cfg(target_os = "linux")]
mod memfd;
#[cfg(not(target_os = "linux"))]
mod no_segments;
mod private;
#[cfg(target_os = "linux")]
mod segments;
#[cfg(target_os = "linux")]
mod shared;
mod summed;
mod threads;

pub use host::{HostArrays, HostMemory};
#[cfg(target_os = "linux")]
pub use memfd::MemFd;
#[cfg(not(target_os = "linux"))]
pub use no_segments::SegmentMemory;
pub use private::PrivateRegion;
#[cfg(target_os = "linux")]
pub use segments::SegmentMemory;
#[cfg(target_os = "linux")]
pub use shared::SharedRegion;
pub use threads::{CopyThreads, run_copies};

/// Bytes of one step in which a pool is reserved and mapped: 64 MiB. Servers reserve whole steps, so
/// clients may populate whole steps.
pub const POOL_STEP: u64 = 64 << 20;

use std::any::Any;
use std::sync::Arc;

use kvferry_core::cache::Memory;
use kvferry_core::{Error, Result};

/// How this process copies: "AVX-512", "AVX2", "NEON" or "memcpy".
pub fn kernel_name() -> &'static str {
    kernels::Kernel::best().name()
}

/// `offset..offset + length` as the range of a region of `bytes`, or an error that names all three.
fn range_of(offset: u64, length: usize, bytes: usize) -> Result<std::ops::Range<usize>> {
    let range =
        usize::try_from(offset).ok().and_then(|start| Some(start..start.checked_add(length)?));
    range.filter(|range| range.end <= bytes).ok_or_else(|| {
        Error::invalid(format!(
            "{length} bytes at {offset} lie outside the region of {bytes} bytes"
        ))
    })
}

/// The pins of a pool's region; `None` for memory that is no region of this crate's.
fn pins_of(pool: &dyn Memory) -> Option<&Arc<cuda::Pins>> {
    if let Some(inner) = pool.guarded() {
        return pins_of(&**inner);
    }
    let any: &dyn Any = pool;
    #[cfg(target_os = "linux")]
    if let Some(region) = any.downcast_ref::<SharedRegion>() {
        return Some(region.pins());
    }
    any.downcast_ref::<PrivateRegion>().map(PrivateRegion::pins)
}

/// Where `bytes` at `offset` of a pool lie in this process, ready to be copied to or from; `None` for memory
/// that is no region of this crate's.
///
/// # Errors
/// The range lies outside, or the system has no pages for it.
fn place_of(pool: &dyn Memory, offset: u64, bytes: usize) -> Result<Option<*mut u8>> {
    if let Some(inner) = pool.guarded() {
        return place_of(&**inner, offset, bytes);
    }
    let any: &dyn Any = pool;
    #[cfg(target_os = "linux")]
    if let Some(region) = any.downcast_ref::<SharedRegion>() {
        return region.place(offset, bytes).map(Some);
    }
    any.downcast_ref::<PrivateRegion>().map(|region| region.place(offset, bytes)).transpose()
}

/// Whether a pool's step is known to have pages, or needs nobody's leave to take them: mapping others could take what a
/// server has not reserved. `false` for memory that is no region of this crate's.
fn is_reserved(pool: &dyn Memory, step: u64) -> bool {
    if let Some(inner) = pool.guarded() {
        return is_reserved(&**inner, step);
    }
    let any: &dyn Any = pool;
    #[cfg(target_os = "linux")]
    if let Some(region) = any.downcast_ref::<SharedRegion>() {
        return region.is_reserved(step);
    }
    // Private pages are there when they are touched.
    any.is::<PrivateRegion>() && step < pool.bytes().div_ceil(POOL_STEP)
}

/// The memory behind a pool's guards.
fn unguarded(pool: &Arc<dyn Memory>) -> &Arc<dyn Memory> {
    pool.guarded().map_or(pool, unguarded)
}
