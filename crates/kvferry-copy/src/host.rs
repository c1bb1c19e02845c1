//! Copies between an engine's host memory and a pool.

use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::{slice, thread};

use kvferry_core::cache::Memory;
use kvferry_core::copy_plan::{CopyPlan, CopyShape, Direction, Piece};
use kvferry_core::copying::{Copying, KvMemory, copying};
use kvferry_core::{Error, ErrorCode, Result};

use crate::place_of;

/// An engine's arrays by address.
#[derive(Debug)]
pub struct HostArrays {
    shape: Arc<CopyShape>,
    starts: Vec<NonNull<u8>>,
}

// SAFETY: plain memory that any thread may use, as the caller of `new` has promised.
unsafe impl Send for HostArrays {}
// SAFETY: as above; that copies of several threads may overlap is the engine's business: its blocks hold
// numbers, and none is invalid.
unsafe impl Sync for HostArrays {}

impl HostArrays {
    /// Arrays at these addresses, of so many bytes.
    ///
    /// # Errors
    /// See [`CopyShape::check_arrays`].
    ///
    /// # Safety
    /// All of each array stays readable and writable by any thread until the value is dropped.
    pub unsafe fn new(shape: Arc<CopyShape>, arrays: &[(*mut u8, usize)]) -> Result<Self> {
        let places: Vec<(u64, u64)> =
            arrays.iter().map(|(start, bytes)| (start.addr() as u64, *bytes as u64)).collect();
        shape.check_arrays(&places)?;
        let starts = arrays.iter().filter_map(|(start, _)| NonNull::new(*start)).collect();
        Ok(Self { shape, starts })
    }

    /// Copies a part of the plan's bytes; returns when it is done.
    ///
    /// # Errors
    /// A plan of another shape; what the pool says.
    pub fn copy(&self, plan: &CopyPlan, part: Range<u64>, pool: &dyn Memory) -> Result<()> {
        if *plan.shape() != *self.shape {
            return Err(Error::invalid("the plan is of other arrays"));
        }
        plan.pieces(part, |Piece { array, at, pool: offset, length }| {
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            let ours =
                self.starts[array].as_ptr().wrapping_add(usize::try_from(at).unwrap_or(usize::MAX));
            let theirs = place_of(pool, offset, length)?;
            match (plan.direction(), theirs) {
                (Direction::Gather, Some(theirs)) => {
                    let _permit = pool.permit()?;
                    // SAFETY: the plan stays within the arrays, `place_of` within the pool, and the two are
                    // different memory.
                    unsafe { ptr::copy_nonoverlapping(ours, theirs, length) };
                    Ok(())
                }
                (Direction::Scatter, Some(theirs)) => {
                    // SAFETY: as above.
                    unsafe { ptr::copy_nonoverlapping(theirs, ours, length) };
                    Ok(())
                }
                (Direction::Gather, None) => {
                    // SAFETY: the plan stays within the arrays.
                    pool.write(offset, unsafe { slice::from_raw_parts(ours, length) })
                }
                (Direction::Scatter, None) => {
                    // SAFETY: as above; nobody else has a reference into the arrays.
                    pool.read(offset, unsafe { slice::from_raw_parts_mut(ours, length) })
                }
            }
        })
    }
}

/// Arrays that copies run to and from by themselves.
#[derive(Debug)]
pub struct HostMemory {
    arrays: Arc<HostArrays>,
    running: Arc<Running>,
}

#[derive(Debug, Default)]
struct Running {
    state: Mutex<State>,
    none: Condvar,
}

#[derive(Debug, Default)]
struct State {
    copies: usize,
    closed: bool,
}

impl HostMemory {
    /// Makes copies of `arrays` run by themselves.
    pub fn new(arrays: HostArrays) -> Self {
        Self { arrays: Arc::new(arrays), running: Arc::default() }
    }
}

impl KvMemory for HostMemory {
    fn shape(&self) -> &Arc<CopyShape> {
        &self.arrays.shape
    }

    fn copy(&self, plan: CopyPlan, pool: Arc<dyn Memory>) -> Result<Copying> {
        let mut state = self.running.lock();
        if state.closed {
            return Err(Error::new(
                ErrorCode::Closed,
                "the KV memory was closed; register it anew",
            ));
        }
        state.copies += 1;
        drop(state);
        let (progress, copying) = copying();
        let (arrays, running) = (Arc::clone(&self.arrays), Arc::clone(&self.running));
        thread::spawn(move || {
            let copied = arrays.copy(&plan, 0..plan.bytes(), &*pool);
            progress.arrays(if copied.is_ok() { plan.shape().arrays() } else { 0 });
            running.lock().copies -= 1;
            running.none.notify_all();
            progress.end(copied);
        });
        Ok(copying)
    }

    fn close(&self) {
        let mut state = self.running.lock();
        state.closed = true;
        while state.copies > 0 {
            state = self.running.none.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Running {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
