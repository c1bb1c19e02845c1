//! A pool's pages, registered with CUDA so that a device reaches them by itself.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::{c_uint, c_void};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvferry_core::Result;

use super::context::{Context, Current};
use super::driver::check;

/// For contexts of all devices, and with an address for kernels.
const FLAGS: c_uint = cudarc::driver::sys::CU_MEMHOSTREGISTER_PORTABLE
    | cudarc::driver::sys::CU_MEMHOSTREGISTER_DEVICEMAP;

/// The registered steps of one region, which each [`CudaMemory`](super::CudaMemory) in the process shares. They
/// are given back when the last of these closes, or before the region goes.
#[derive(Default)]
pub(crate) struct Pins(Mutex<State>);

#[derive(Default)]
struct State {
    users: usize,
    steps: BTreeMap<u64, Step>,
}

struct Step {
    /// Where it begins in this process.
    start: usize,
    /// The same for a device.
    device: u64,
    /// A portable registration is all contexts', but goes with the one that it was made in.
    context: Arc<Context>,
}

/// One who uses the steps.
pub(crate) struct PinUse(Arc<Pins>);

impl Pins {
    pub(crate) fn join(self: &Arc<Self>) -> PinUse {
        let mut state = self.lock();
        state.users += 1; // one step with the reference that it counts, see `PinUse::is_over`
        PinUse(Arc::clone(self))
    }

    /// Gives all steps back.
    pub(crate) fn release(&self) {
        self.lock().release();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PinUse {
    pub(crate) fn is_of(&self, pins: &Arc<Pins>) -> bool {
        Arc::ptr_eq(&self.0, pins)
    }

    /// Whether the region is gone, which alone holds its pins beside those who use them.
    pub(crate) fn is_over(&self) -> bool {
        let state = self.0.lock();
        Arc::strong_count(&self.0) == state.users
    }

    /// The device's address of step `step`, which lies at `start` and is registered now if it was not yet.
    pub(crate) fn step(
        &self,
        current: &Current<'_>,
        context: &Arc<Context>,
        step: u64,
        (start, bytes): (*mut u8, usize),
    ) -> Result<u64> {
        let mut state = self.0.lock();
        let vacant = match state.steps.entry(step) {
            Entry::Occupied(known) => return Ok(known.get().device),
            Entry::Vacant(vacant) => vacant,
        };
        let driver = current.context.driver;
        let pages: *mut c_void = start.cast();
        // SAFETY: the pages are mapped; the region gives them back to CUDA before it unmaps them.
        unsafe { check!(driver.cuMemHostRegister_v2(pages, bytes, FLAGS)) }?;
        let mut device = 0;
        // SAFETY: writes an address, of memory that was just registered.
        let told =
            unsafe { check!(driver.cuMemHostGetDevicePointer_v2(&raw mut device, pages, 0)) };
        let step = Step { start: start.addr(), device, context: Arc::clone(context) };
        match told {
            Ok(()) => {
                vacant.insert(step);
                Ok(device)
            }
            Err(error) => {
                step.unregister();
                Err(error)
            }
        }
    }
}

impl Drop for PinUse {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.users -= 1;
        if state.users == 0 {
            state.release();
        }
    }
}

impl State {
    fn release(&mut self) {
        std::mem::take(&mut self.steps).into_values().for_each(|step| step.unregister());
    }
}

impl Step {
    fn unregister(&self) {
        // A call may fail once for reasons of its own; where the device is lost, nothing is left to give back.
        let Ok(current) = self.context.enter().or_else(|_| self.context.enter()) else { return };
        let pages = std::ptr::without_provenance_mut(self.start);
        // SAFETY: registered in `PinUse::step`, and taken out of the list before; no copy is under way: copies
        // hold their pool, and whoever copies its use of the pins.
        let _ = unsafe { (current.context.driver.cuMemHostUnregister)(pages) };
    }
}

impl fmt::Debug for Pins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} steps", self.lock().steps.len())
    }
}
