//! Copies between an engine's memory on a CUDA device and a pool, which is registered with CUDA so that the device
//! reaches it by itself. The driver is loaded at run time; without one, every call here says why.

mod ahead;
mod context;
mod driver;
mod exported;
mod pins;
mod submit;
mod worker;

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak, mpsc};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use kvferry_core::cache::Memory;
use kvferry_core::copy_plan::{CopyPlan, CopyShape};
use kvferry_core::copying::{Copying, KvMemory, Progress, copying};
use kvferry_core::{Error, ErrorCode, Result};

use crate::pins_of;
use context::{Context, Current};
use driver::{Driver, Failed, Handle};
pub use exported::ExportedMemory;
pub(crate) use pins::Pins;
use submit::Kernel;
pub use submit::Method;
use worker::{Arrays, SetUp};

/// Copies that wait at most; more are refused.
const JOBS_MAX: usize = 1024;
/// How long copies may take to end that nobody wants any more, or of which the driver does not say whether they have ended,
/// until they are in doubt.
const DOUBT_MAX: Duration = Duration::from_secs(10);
/// How long closing may take: longer only when the driver holds up a call of the worker's.
const CLOSE_MAX: Duration = Duration::from_secs(15);
/// `CU_STREAM_PER_THREAD`.
const PER_THREAD_STREAM: Handle = 2;

/// Whether CUDA can be used.
///
/// # Errors
/// [`ErrorCode::CudaUnavailable`] with the reason: no driver, one without a function that is needed, no device.
pub fn check_available() -> Result<()> {
    Driver::get()?.device(0).map(drop)
}

/// The handle by which another process opens the memory that `address` on a device lies in, and the address's bytes
/// from that memory's start.
///
/// # Errors
/// Memory that is not the device's, or that CUDA hands to no other process (only that of cuMemAlloc and
/// cudaMalloc); what the driver says.
pub fn ipc_handle(device: u32, address: u64) -> Result<([u8; 64], u64)> {
    Context::retain(device)?.enter()?.ipc_handle(address)
}

/// Memory of a device that another process exported with [`ipc_handle`].
#[derive(Debug, Clone, Copy)]
pub struct IpcArray {
    /// What [`ipc_handle`] gave. Arrays that lie in the same memory have the same.
    pub handle: [u8; 64],
    /// Bytes from the memory's start.
    pub offset: u64,
    /// Bytes of the array.
    pub bytes: u64,
}

/// An engine's arrays on a CUDA device. Copies run on a thread of its own, by streams of its own, one for each
/// direction, in the device's primary context, which is where engines live.
///
/// Closing ends copies of which nothing was asked of the device yet, and waits ten seconds for the others, which are in
/// doubt then.
///
/// They are ordered against the engine's stream. A store reads blocks after what was asked of the stream before
/// [`KvMemory::copy`]; a load writes them after that, and what is asked of the stream once the load has ended, or once
/// [`Copying::array`] has told of an array, sees what was loaded. The stream must not be capturing a graph meanwhile.
///
/// The pool of a copy must be a [`PrivateRegion`](crate::PrivateRegion) or `SharedRegion`, behind guards or not. Its
/// pages are page-locked in steps of [`POOL_STEP`](crate::POOL_STEP): each when it is first used, or before, by a thread
/// that the first copy starts, where the step's pages are reserved already, or nobody's leave is needed: a private region so
/// has all of its pages soon.
///
/// Pieces that are too small for the copy engine are copied by a kernel ([`Method::KernelForSmall`]), unless the
/// environment has `KVFERRY_CUDA_KERNEL=0`.
pub struct CudaMemory {
    shape: Arc<CopyShape>,
    stream: Handle,
    shared: Arc<Shared>,
    worker: ThreadId,
}

/// What callers and the worker's thread share.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// There are jobs, or no more will come.
    jobs: Condvar,
    /// The worker has ended.
    ended: Condvar,
}

#[derive(Default)]
struct State {
    /// Until the worker ends.
    context: Option<Arc<Context>>,
    /// Those that the worker has not seen.
    jobs: Vec<Job>,
    /// Those that have not ended.
    unfinished: Vec<Weak<Progress>>,
    events: Events,
    method: Method,
    kernel: Option<Kernel>,
    closed: bool,
    /// When.
    closed_at: Option<Instant>,
    /// Why no copy can succeed any more.
    failed: Option<Error>,
    /// Why copies may be under way that nothing will tell the end of.
    doubt: Option<Error>,
    ended: bool,
}

struct Job {
    plan: CopyPlan,
    pool: Arc<dyn Memory>,
    progress: Arc<Progress>,
    /// What the engine's stream was asked before.
    compute: Handle,
}

/// Events of a context, used again and again.
#[derive(Default)]
struct Events {
    free: Vec<Handle>,
    all: Vec<Handle>,
}

impl CudaMemory {
    /// Arrays at these addresses of device `device`, of so many bytes. `stream` is the engine's CUstream: 0 or 1 is
    /// the legacy default stream.
    ///
    /// # Errors
    /// [`CopyShape::check_arrays`]; arrays that are not memory of the device; 2, which is another stream on each thread
    /// (CUDA Driver API, Stream Management, `CU_STREAM_PER_THREAD`); [`ErrorCode::CudaUnavailable`] and
    /// [`ErrorCode::CudaFailed`].
    ///
    /// # Safety
    /// The arrays stay allocated, and the stream alive, until [`KvMemory::close`] has returned.
    pub unsafe fn new(
        shape: Arc<CopyShape>,
        device: u32,
        stream: u64,
        arrays: &[(u64, u64)],
    ) -> Result<Self> {
        shape.check_arrays(arrays)?;
        Self::start(shape, device, stream, Arrays::Ours(arrays.to_vec()))
    }

    /// Arrays in memory that another process exported. Each handle is opened once, and closed when this is. The
    /// exporting process must live and keep its memory until then. Its streams order nothing here: let them
    /// finish before a copy, and begin after its end.
    ///
    /// # Errors
    /// As [`CudaMemory::new`]; arrays beyond the memory's end.
    ///
    /// # Safety
    /// As for [`CudaMemory::new`].
    pub unsafe fn open_ipc(
        shape: Arc<CopyShape>,
        device: u32,
        stream: u64,
        arrays: &[IpcArray],
    ) -> Result<Self> {
        Self::start(shape, device, stream, Arrays::Ipc(arrays.to_vec()))
    }

    fn start(shape: Arc<CopyShape>, device: u32, stream: u64, arrays: Arrays) -> Result<Self> {
        let stream = Handle::try_from(stream)
            .map_err(|_| Error::invalid(format!("there is no stream {stream:#x}")))?;
        if stream == PER_THREAD_STREAM {
            return Err(Error::invalid(
                "stream 2 is each thread's own default stream, and copies are asked for by threads of kvferry's: \
                 create a stream for the engine, and give its address",
            ));
        }
        let shared = Arc::new(Shared::default());
        let (ready, is_ready) = mpsc::sync_channel(1);
        let set_up = SetUp {
            shared: Arc::clone(&shared),
            shape: Arc::clone(&shape),
            device,
            stream,
            arrays,
        };
        let worker = thread::Builder::new()
            .name("kvferry-cuda".into())
            .spawn(move || worker::run(&set_up, &ready))
            .map_err(|error| Error::system("cannot start a thread for CUDA", &error))?;
        let lost = || Error::new(ErrorCode::Internal, "the thread for CUDA ended by itself");
        is_ready.recv().map_err(|_| lost())??;
        Ok(Self { shape, stream, shared, worker: worker.thread().id() })
    }

    /// Chooses how later copies are done, for comparisons. [`Method::KernelForSmall`] unless told.
    ///
    /// # Errors
    /// The driver does not take the kernel; closed.
    pub fn set_method(&self, method: Method) -> Result<()> {
        let mut state = self.shared.lock();
        let context = state.open()?;
        if matches!(method, Method::Kernel | Method::KernelForSmall) && state.kernel.is_none() {
            state.kernel = Some(Kernel::load(&context.enter()?)?);
        }
        state.method = method;
        Ok(())
    }
}

impl KvMemory for CudaMemory {
    fn shape(&self) -> &Arc<CopyShape> {
        &self.shape
    }

    fn copy(&self, plan: CopyPlan, pool: Arc<dyn Memory>, sums: bool) -> Result<Copying> {
        if sums {
            return Err(Error::new(
                ErrorCode::UnsupportedOption,
                "copies of a GPU's memory are not summed: register it without verifying",
            ));
        }
        if *plan.shape() != *self.shape {
            return Err(Error::invalid("the plan is of other arrays"));
        }
        if pins_of(&*pool).is_none() {
            return Err(unreachable_pool());
        }
        if let Some(range) = plan.pool_ranges().find(|range| range.end > pool.bytes()) {
            return Err(Error::invalid(format!(
                "the plan's slots reach to {}, beyond the pool's {} bytes",
                range.end,
                pool.bytes()
            )));
        }
        let mut state = self.shared.lock();
        let context = state.open()?;
        let (progress, copying) = copying();
        if plan.bytes() == 0 {
            drop(state);
            progress.arrays(plan.shape().arrays());
            progress.end(Ok(()));
            return Ok(copying);
        }
        if state.unfinished.len() >= JOBS_MAX {
            return Err(Error::new(
                ErrorCode::Timeout,
                format!("{JOBS_MAX} copies wait for CUDA device {} already", context.ordinal),
            ));
        }
        let compute = state.events.record(&context.enter()?, self.stream)?;
        let progress = Arc::new(progress);
        state.unfinished.push(Arc::downgrade(&progress));
        state.jobs.push(Job { plan, pool, progress, compute });
        drop(state);
        self.shared.jobs.notify_one();
        Ok(copying)
    }

    fn close(&self) {
        let mut state = self.shared.lock();
        state.closed = true;
        let until = *state.closed_at.get_or_insert_with(Instant::now) + CLOSE_MAX;
        self.shared.jobs.notify_one();
        if thread::current().id() == self.worker {
            return; // told by whoever was woken at a copy's end, which the worker cannot wait for
        }
        while !state.ended {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.shared.ended.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let unfinished = std::mem::take(&mut state.unfinished);
        if !unfinished.is_empty() {
            // The worker is in a call of the driver's.
            let doubt = state.doubt.get_or_insert_with(not_closed).clone();
            drop(state);
            for progress in unfinished.iter().filter_map(Weak::upgrade) {
                progress.end_in_doubt(doubt.clone());
            }
        }
    }

    fn doubt(&self) -> Option<Error> {
        let state = self.shared.lock();
        // A close on the worker's own thread has waited for nothing.
        let left = state.closed && !state.ended && !state.unfinished.is_empty();
        state.doubt.clone().or_else(|| left.then(not_closed))
    }
}

impl Drop for CudaMemory {
    fn drop(&mut self) {
        self.close();
    }
}

impl fmt::Debug for CudaMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaMemory").field("arrays", &self.shape.arrays()).finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The context, if copies may still begin.
    fn open(&self) -> Result<Arc<Context>> {
        if let (Some(error), false) = (&self.failed, self.closed) {
            return Err(error.clone());
        }
        let context = self.context.as_ref().filter(|_| !self.closed);
        context.cloned().ok_or_else(closed)
    }
}

fn closed() -> Error {
    Error::new(ErrorCode::Closed, "the KV memory was closed; register it anew")
}

/// The doubt of copies that closing has not seen the end of.
fn not_closed() -> Error {
    Error::new(
        ErrorCode::CudaFailed,
        "the KV memory was closed, and the GPU does not come to the end of its copies: leave that memory alone, and \
         start the process anew",
    )
}

fn unreachable_pool() -> Error {
    Error::invalid("CUDA cannot reach this pool: use the one of a server or of an embedded store")
}

impl Events {
    /// An event that has recorded what a stream was asked until now.
    fn record(&mut self, current: &Current<'_>, stream: Handle) -> Result<Handle, Failed> {
        let event = match self.free.pop() {
            Some(event) => event,
            None => {
                let event = current.new_event()?;
                self.all.push(event);
                event
            }
        };
        current.record(event, stream).map(|()| event).inspect_err(|_| self.free.push(event))
    }
}
