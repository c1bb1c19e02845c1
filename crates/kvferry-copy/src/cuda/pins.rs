//! A pool's pages, registered with CUDA so that a device reaches them by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{c_uint, c_void};
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvferry_core::{Error, ErrorCode, Result};

use super::context::{Context, Current};
use super::driver::check;

/// For contexts of all devices, and with an address for kernels.
const FLAGS: c_uint = cudarc::driver::sys::CU_MEMHOSTREGISTER_PORTABLE
    | cudarc::driver::sys::CU_MEMHOSTREGISTER_DEVICEMAP;
/// How long the registration of a step may take that another thread needs.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// The registered steps of one region, which each [`CudaMemory`](super::CudaMemory) in the process shares. They
/// are given back when the last of these closes, or before the region goes.
#[derive(Default)]
pub(crate) struct Pins {
    state: Mutex<State>,
    /// Registrations that were under way have ended.
    ended: Condvar,
}

#[derive(Default)]
struct State {
    users: usize,
    steps: BTreeMap<u64, Step>,
    /// Steps that are being registered: the lock is not held for that, which takes long.
    under_way: BTreeSet<u64>,
    /// All steps before it are registered.
    next: u64,
    /// There is a [`Lead`].
    led: bool,
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

/// The one of them who registers steps before copies need them.
pub(crate) struct Lead(PinUse);

impl Pins {
    pub(crate) fn join(self: &Arc<Self>) -> PinUse {
        self.join_locked(&mut self.lock())
    }

    fn join_locked(self: &Arc<Self>, state: &mut State) -> PinUse {
        state.users += 1; // one step with the reference that it counts, see `PinUse::is_over`
        PinUse(Arc::clone(self))
    }

    /// Gives all steps back.
    pub(crate) fn release(&self) {
        self.lock().release();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
        place: (*mut u8, usize),
    ) -> Result<u64> {
        let mut state = self.0.lock();
        let mut since = None;
        loop {
            if let Some(known) = state.steps.get(&step) {
                return Ok(known.device);
            }
            if !state.under_way.contains(&step) {
                break;
            }
            let since: &Instant = since.get_or_insert_with(Instant::now);
            let left = WAIT_MAX.checked_sub(since.elapsed()).ok_or_else(|| stuck(step))?;
            let waited = self.0.ended.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.under_way.insert(step);
        drop(state);
        let registered = Step::register(current, context, place);
        let mut state = self.0.lock();
        state.under_way.remove(&step);
        let device = registered.map(|registered| {
            let device = registered.device;
            state.steps.insert(step, registered);
            device
        });
        drop(state);
        self.0.ended.notify_all();
        device
    }

    /// The first step that is not registered.
    pub(crate) fn next(&self) -> u64 {
        let mut state = self.0.lock();
        while state.steps.contains_key(&state.next) {
            state.next += 1;
        }
        state.next
    }

    /// Takes the lead; `None` while another has it.
    pub(crate) fn lead(&self) -> Option<Lead> {
        let mut state = self.0.lock();
        if std::mem::replace(&mut state.led, true) {
            return None;
        }
        Some(Lead(self.0.join_locked(&mut state)))
    }
}

fn stuck(step: u64) -> Error {
    let message = format!(
        "CUDA does not come to an end with page-locking step {step} of the pool; start this process anew"
    );
    Error::new(ErrorCode::CudaFailed, message)
}

impl std::ops::Deref for Lead {
    type Target = PinUse;

    fn deref(&self) -> &PinUse {
        &self.0
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        self.0.0.lock().led = false;
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
        self.next = 0;
        std::mem::take(&mut self.steps).into_values().for_each(Step::give_back);
    }
}

impl Step {
    fn register(
        current: &Current<'_>,
        context: &Arc<Context>,
        (start, bytes): (*mut u8, usize),
    ) -> Result<Self> {
        let driver = current.context.driver;
        let pages: *mut c_void = start.cast();
        // SAFETY: the pages are mapped; the region gives them back to CUDA before it unmaps them.
        unsafe { check!(driver.cuMemHostRegister_v2(pages, bytes, FLAGS)) }?;
        let mut device = 0;
        // SAFETY: writes an address, of memory that was just registered.
        let told =
            unsafe { check!(driver.cuMemHostGetDevicePointer_v2(&raw mut device, pages, 0)) };
        let step = Self { start: start.addr(), device, context: Arc::clone(context) };
        told.inspect_err(|_| step.unregister(current))?;
        Ok(step)
    }

    fn give_back(self) {
        // A call may fail once for reasons of its own; where the device is lost, nothing is left to give back.
        let current = self.context.enter().or_else(|_| self.context.enter());
        let _ = current.map(|current| self.unregister(&current));
    }

    fn unregister(&self, current: &Current<'_>) {
        let pages = std::ptr::without_provenance_mut(self.start);
        // SAFETY: registered before, and in no list of steps any more; no copy is under way: copies
        // hold their pool, and whoever copies its use of the pins.
        let _ = unsafe { (current.context.driver.cuMemHostUnregister)(pages) };
    }
}

impl fmt::Debug for Pins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} steps", self.lock().steps.len())
    }
}
