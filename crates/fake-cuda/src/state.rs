//! The driver's state, and the frame around each of its calls.

use crate::abi::Handle;
use crate::clocks::{Clock, Clocks, Stamp};
use crate::contexts::{self, Context, Device};
use crate::errors::{
    CONTEXT_IS_DESTROYED, Failure, INVALID_CONTEXT, NOT_INITIALIZED, NOT_PERMITTED, Outcome,
    STREAM_CAPTURE_UNSUPPORTED, SUCCESS, name, wrong,
};
use crate::events::{Elsewhere, Event};
use crate::faults::{Config, Faults};
use crate::kernels::Module;
use crate::memory::{Allocation, Registration};
use crate::queue::{ELSEWHERE, OpId, PROGRESS, Queue};
use crate::streams::{self, Stream};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

pub(crate) struct State {
    pub(crate) config: Config,
    pub(crate) faults: Faults,
    pub(crate) initialized: bool,
    pub(crate) devices: Vec<Device>,
    pub(crate) contexts: BTreeMap<Handle, Context>,
    pub(crate) streams: BTreeMap<Handle, Stream>,
    pub(crate) events: BTreeMap<Handle, Event>,
    pub(crate) modules: BTreeMap<Handle, Module>,
    /// Device memory by address, that of other processes included.
    pub(crate) allocations: BTreeMap<u64, Allocation>,
    /// What was freed, address and bytes: no address is used twice.
    pub(crate) freed: BTreeMap<u64, u64>,
    pub(crate) registrations: BTreeMap<u64, Registration>,
    pub(crate) clocks: Clocks,
    pub(crate) queue: Queue,
    pub(crate) violations: Vec<String>,
    /// Some thread captures a graph in the global mode.
    pub(crate) capturing: bool,
    /// The call that runs gives something back, which a broken device does not prevent.
    releasing: bool,
    handles: u64,
}

/// What a call waits for, and what the host knows afterwards.
pub(crate) struct Wait {
    pub(crate) context: Handle,
    pub(crate) ops: Vec<OpId>,
    pub(crate) clock: Clock,
    /// What another process has to come to.
    pub(crate) elsewhere: Option<Elsewhere>,
}

static STATE: LazyLock<Mutex<State>> = LazyLock::new(|| Mutex::new(State::new()));

/// The state; a thread that panicked with it left nothing half done that matters to a test.
pub(crate) fn lock() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

thread_local! {
    /// The contexts of this thread, the current one last.
    pub(crate) static CONTEXTS: RefCell<Vec<Handle>> = const { RefCell::new(Vec::new()) };
    /// The mode of this thread in which it meets captures of other threads.
    pub(crate) static CAPTURE_MODE: Cell<u32> = const { Cell::new(0) };
    /// The operation whose host function runs on this thread.
    static HOST_FUNCTION: RefCell<Option<(Stamp, Clock)>> = const { RefCell::new(None) };
}

pub(crate) fn host_function_stream() -> Option<(Stamp, Clock)> {
    HOST_FUNCTION.with_borrow(Clone::clone)
}

/// Runs a host function, for the operation that has this place in its stream.
pub(crate) fn within_host_function(stamp: Stamp, clock: Clock, function: impl FnOnce()) {
    HOST_FUNCTION.set(Some((stamp, clock)));
    function();
    HOST_FUNCTION.set(None);
}

/// A call that does not wait.
pub(crate) fn call(name: &'static str, body: impl FnOnce(&mut State) -> Outcome) -> u32 {
    waiting_call(name, |state| body(state).map(|()| None))
}

/// A call that waits for operations, if it says so. Driver API, Introduction: "may also return error codes from
/// previous, asynchronous launches".
pub(crate) fn waiting_call(
    name: &'static str,
    body: impl FnOnce(&mut State) -> Outcome<Option<Wait>>,
) -> u32 {
    let mut state = lock();
    let injected = match state.enter(name) {
        Ok(injected) => injected,
        Err(failure) => return state.answer(name, failure),
    };
    while !state.faults.lets_go(name) {
        state = PROGRESS.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
    state.releasing = is_release(name);
    if let (Some(code), false) = (injected, state.releasing) {
        return code;
    }
    let wait = match body(&mut state) {
        Ok(wait) => wait,
        Err(failure) => return state.answer(name, failure),
    };
    if let Some(wait) = wait {
        while !wait.ops.iter().all(|&op| state.queue.is_done(op)) {
            state = PROGRESS.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        while wait.elsewhere.as_ref().is_some_and(|elsewhere| !elsewhere.is_done()) {
            let waited = PROGRESS.wait_timeout(state, ELSEWHERE);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if let Some(code) = state.broken(wait.context) {
            return code;
        }
        state.clocks.observe(&wait.clock);
    } else if state.releasing && gives_back_memory_or_handles(name) {
        let current = CONTEXTS.with_borrow(|stack| stack.last().copied());
        if let Some(code) = current.and_then(|context| state.broken(context)) {
            return code;
        }
    }
    injected.unwrap_or(SUCCESS)
}

/// Calls that give something back do so whatever they answer: nothing could be done with it any more.
fn is_release(name: &str) -> bool {
    gives_back_memory_or_handles(name)
        || matches!(name, "cuCtxPopCurrent_v2" | "cuDevicePrimaryCtxRelease_v2")
}

fn gives_back_memory_or_handles(name: &str) -> bool {
    matches!(
        name,
        "cuStreamDestroy_v2"
            | "cuEventDestroy_v2"
            | "cuMemFree_v2"
            | "cuMemFreeHost"
            | "cuMemHostUnregister"
            | "cuIpcCloseMemHandle"
            | "cuModuleUnload"
    )
}

/// Driver API, Stream Management, cuThreadExchangeStreamCaptureMode: while any thread captures in the mode GLOBAL, one that
/// is not RELAXED is "prohibited from potentially unsafe API calls". Which these are is our reading: those that
/// wait, ask for progress, or give and take memory.
fn is_unsafe_in_capture(name: &str) -> bool {
    matches!(
        name,
        "cuEventQuery"
            | "cuEventSynchronize"
            | "cuStreamQuery"
            | "cuStreamSynchronize"
            | "cuCtxSynchronize"
            | "cuMemAlloc_v2"
            | "cuMemFree_v2"
            | "cuMemHostAlloc"
            | "cuMemFreeHost"
            | "cuMemHostRegister_v2"
            | "cuMemHostUnregister"
            | "cuIpcOpenMemHandle_v2"
            | "cuIpcCloseMemHandle"
            | "cuIpcOpenEventHandle"
            | "cuModuleLoadData"
            | "cuModuleUnload"
    )
}

/// Calls that are allowed before cuInit: those that its page in the Driver API (Initialization) does not need, and
/// those about versions and errors.
fn needs_no_init(name: &str) -> bool {
    matches!(
        name,
        "cuInit"
            | "cuDriverGetVersion"
            | "cuGetErrorName"
            | "cuGetErrorString"
            | "cuGetProcAddress_v2"
    )
}

impl State {
    fn new() -> Self {
        let config = Config::from_environment();
        Self {
            devices: contexts::devices(&config),
            faults: Faults::from_environment(),
            queue: Queue::new(config.seed),
            config,
            initialized: false,
            contexts: BTreeMap::new(),
            streams: BTreeMap::new(),
            events: BTreeMap::new(),
            modules: BTreeMap::new(),
            allocations: BTreeMap::new(),
            freed: BTreeMap::new(),
            registrations: BTreeMap::new(),
            clocks: Clocks::default(),
            violations: Vec::new(),
            capturing: false,
            releasing: false,
            handles: 0,
        }
    }

    /// Counts the call; the code that it was told to fail with.
    fn enter(&mut self, name: &'static str) -> Outcome<Option<u32>> {
        let fault = self.faults.at_call(name);
        if let Some(code) = fault.lost {
            self.lose_devices(code);
        }
        // Driver API, Execution Control, cuLaunchHostFunc: "The host function must not make any CUDA API calls.
        // Attempting to use a CUDA API may result in CUDA_ERROR_NOT_PERMITTED".
        if HOST_FUNCTION.with_borrow(Option::is_some) {
            return Err(wrong(NOT_PERMITTED, "called from a host function"));
        }
        // Driver API, Initialization, cuInit: "must be called before any other function from the driver API.
        // If cuInit() has not been called, any function from the driver API will return
        // CUDA_ERROR_NOT_INITIALIZED".
        if !self.initialized && !needs_no_init(name) {
            return Err(wrong(NOT_INITIALIZED, "called before cuInit"));
        }
        if self.capturing && CAPTURE_MODE.get() != streams::RELAXED && is_unsafe_in_capture(name) {
            return Err(wrong(
                STREAM_CAPTURE_UNSUPPORTED,
                "called while a graph is captured, which it spoils",
            ));
        }
        if let Some(code) = fault.code {
            if crate::errors::is_sticky(code) {
                self.lose_devices(code);
            }
            return Ok(Some(code));
        }
        Ok(None)
    }

    fn answer(&mut self, call: &str, failure: Failure) -> u32 {
        match failure {
            Failure::Code(code) => code,
            Failure::Wrong(code, message) => {
                self.report(&format!("{call}: {message} ({})", name(code)));
                code
            }
        }
    }

    /// Enters a violation.
    pub(crate) fn report(&mut self, message: &str) {
        eprintln!("[fake-cuda] VIOLATION {message}");
        self.violations.push(message.to_owned());
        if self.config.abort {
            std::process::abort();
        }
    }

    /// A handle that no memory lies at, and that no other object had: 0x6_0000_0000_0000 and up.
    pub(crate) fn new_handle(&mut self) -> Handle {
        self.handles += 1;
        0x6_0000_0000_0000 + self.handles * 16
    }

    /// The context of this thread. Driver API, Context Management: each host thread has a stack of current
    /// contexts; calls that need one work on its top.
    pub(crate) fn current(&self) -> Outcome<Handle> {
        let Some(context) = CONTEXTS.with_borrow(|stack| stack.last().copied()) else {
            return Err(wrong(INVALID_CONTEXT, "no context is current on this thread"));
        };
        if !self.contexts.contains_key(&context) {
            return Err(wrong(CONTEXT_IS_DESTROYED, "the current context was released"));
        }
        match self.broken(context) {
            Some(code) if !self.releasing => Err(Failure::Code(code)),
            _ => Ok(context),
        }
    }

    /// Driver API, Data types, `CUresult`: an illegal address or a failed launch "leaves the process in an inconsistent state and
    /// any further CUDA work will return the same error". Our reading, and for the tests' sake: until the
    /// primary context was released by all that had retained it.
    pub(crate) fn broken(&self, context: Handle) -> Option<u32> {
        self.contexts.get(&context).and_then(|context| context.broken)
    }

    /// All contexts answer with `code` from now on, and nothing that was asked for runs.
    pub(crate) fn lose_devices(&mut self, code: u32) {
        let contexts: Vec<Handle> = self.contexts.keys().copied().collect();
        for context in contexts {
            self.break_context(context, code);
        }
    }

    pub(crate) fn break_context(&mut self, context: Handle, code: u32) {
        if let Some(context) = self.contexts.get_mut(&context) {
            context.broken.get_or_insert(code);
        }
        self.drop_work(context);
    }

    /// Takes away all that was asked for in a context and has not run.
    pub(crate) fn drop_work(&mut self, context: Handle) {
        let streams = self.streams.iter().filter(|(_, stream)| stream.context == context);
        for (&stream, _) in streams {
            for _ in 0..self.queue.drop_stream(stream) {
                self.clocks.end_kernel();
            }
        }
        self.clocks.drop_all();
        PROGRESS.notify_all();
    }
}
