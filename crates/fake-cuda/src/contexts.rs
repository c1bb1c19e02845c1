//! Initialization, devices and primary contexts.

use crate::abi::{Handle, Out};
use crate::clocks::Clock;
use crate::errors::{
    Failure, INVALID_CONTEXT, INVALID_DEVICE, INVALID_VALUE, NO_DEVICE, Outcome, wrong,
};
use crate::faults::{Config, Leaks, at_exit};
use crate::queue;
use crate::state::{CONTEXTS, State, Wait, call, waiting_call};
use crate::streams::{Kind, Stream};
use std::ffi::c_char;

pub(crate) struct Device {
    context: Option<Handle>,
    retained: u32,
}

pub(crate) struct Context {
    pub(crate) device: usize,
    /// The stream that handle 0 means.
    pub(crate) legacy_stream: Handle,
    /// The error that every call answers with.
    pub(crate) broken: Option<u32>,
}

pub(crate) fn devices(config: &Config) -> Vec<Device> {
    (0..config.devices).map(|_| Device { context: None, retained: 0 }).collect()
}

impl State {
    fn device(&self, device: i32) -> Outcome<usize> {
        let found = usize::try_from(device).ok().filter(|&device| device < self.devices.len());
        found.ok_or_else(|| wrong(INVALID_DEVICE, &format!("there is no device {device}")))
    }

    pub(crate) fn device_of(&self, context: Handle) -> usize {
        self.contexts.get(&context).map_or(0, |context| context.device)
    }
}

/// Driver API, Initialization: "the Flags parameter must be 0".
#[unsafe(no_mangle)]
extern "C" fn cuInit(flags: u32) -> u32 {
    call("cuInit", |state| {
        if flags != 0 {
            return Err(wrong(INVALID_VALUE, "the flags must be 0"));
        }
        if state.devices.is_empty() {
            return Err(Failure::Code(NO_DEVICE));
        }
        if !state.initialized {
            state.initialized = true;
            queue::start();
            at_exit();
        }
        Ok(())
    })
}

/// Driver API, Version Management: 1000 × major + 10 × minor.
#[unsafe(no_mangle)]
extern "C" fn cuDriverGetVersion(version: Out<i32>) -> u32 {
    call("cuDriverGetVersion", |state| version.set(state.config.version))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetCount(count: Out<i32>) -> u32 {
    call("cuDeviceGetCount", |state| {
        count.set(i32::try_from(state.devices.len()).unwrap_or(i32::MAX))
    })
}

/// Driver API, Device Management: ordinals run from 0 to the number of devices − 1.
#[unsafe(no_mangle)]
extern "C" fn cuDeviceGet(device: Out<i32>, ordinal: i32) -> u32 {
    call("cuDeviceGet", |state| {
        // Asking for a device that is not there is a question, no misuse.
        state.device(ordinal).map_err(|_| Failure::Code(INVALID_DEVICE))?;
        device.set(ordinal)
    })
}

/// Driver API, Device Management: a text that ends with NUL, cut to `length`.
#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetName(name: Out<c_char>, length: i32, device: i32) -> u32 {
    call("cuDeviceGetName", |state| {
        let device = state.device(device)?;
        let text = format!("Fake CUDA device {device}");
        let room = usize::try_from(length).unwrap_or(0);
        if room == 0 {
            return Err(wrong(INVALID_VALUE, "there is no room for the name"));
        }
        let cut = text.bytes().take(room - 1).map(u8::cast_signed).chain([0]);
        name.set_all(&cut.collect::<Vec<c_char>>())
    })
}

/// Driver API, Device Management, `CUdevice_attribute`: those that programs which copy ask for; 0 for the others.
#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetAttribute(value: Out<i32>, attribute: i32, device: i32) -> u32 {
    call("cuDeviceGetAttribute", |state| {
        state.device(device)?;
        value.set(match attribute {
            1 => 1024,                    // MAX_THREADS_PER_BLOCK
            2..=4 => 1024,                // MAX_BLOCK_DIM_X, Y, Z
            5 => i32::MAX,                // MAX_GRID_DIM_X
            6 | 7 => 65535,               // MAX_GRID_DIM_Y, Z
            10 => 32,                     // WARP_SIZE
            16 => 132,                    // MULTIPROCESSOR_COUNT
            19 | 31 | 41 | 78 | 110 => 1, // CAN_MAP_HOST_MEMORY, CONCURRENT_KERNELS, UNIFIED_ADDRESSING, STREAM_PRIORITIES, HOST_REGISTER
            40 => 3,                      // ASYNC_ENGINE_COUNT
            75 => 9,                      // COMPUTE_CAPABILITY_MAJOR
            91 => 1,                      // CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
            _ => 0,
        })
    })
}

/// Driver API, Device Management: 16 bytes.
#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetUuid_v2(uuid: Out<[u8; 16]>, device: i32) -> u32 {
    call("cuDeviceGetUuid_v2", |state| {
        let device = state.device(device)?;
        let mut bytes = *b"fake-cuda-device";
        bytes[15] = u8::try_from(device).unwrap_or(u8::MAX);
        uuid.set(bytes)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceTotalMem_v2(bytes: Out<usize>, device: i32) -> u32 {
    call("cuDeviceTotalMem_v2", |state| {
        state.device(device)?;
        bytes.set(state.config.memory)
    })
}

/// Driver API, Primary Context Management: makes the context at the first call, counts the others. It does not
/// become current.
#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRetain(context: Out<Handle>, device: i32) -> u32 {
    call("cuDevicePrimaryCtxRetain", |state| {
        let device = state.device(device)?;
        context.require()?;
        let handle = match state.devices[device].context {
            Some(handle) => handle,
            None => state.make_context(device),
        };
        state.devices[device].retained += 1;
        context.set(handle)
    })
}

/// Driver API, Primary Context Management: the last release destroys the context; releasing more
/// often than it was retained is `INVALID_CONTEXT`. Our reading: what is alive in it by then has leaked.
#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(device: i32) -> u32 {
    call("cuDevicePrimaryCtxRelease_v2", |state| {
        let device = state.device(device)?;
        let entry = &mut state.devices[device];
        let Some(context) = entry.context else {
            return Err(wrong(INVALID_CONTEXT, "released more often than retained"));
        };
        entry.retained -= 1;
        if entry.retained == 0 {
            entry.context = None;
            state.destroy_context(context);
        }
        Ok(())
    })
}

impl State {
    fn make_context(&mut self, device: usize) -> Handle {
        let (context, legacy_stream) = (self.new_handle(), self.new_handle());
        self.streams.insert(legacy_stream, Stream::new(context, Kind::Legacy));
        self.contexts.insert(context, Context { device, legacy_stream, broken: None });
        self.devices[device].context = Some(context);
        context
    }

    fn destroy_context(&mut self, context: Handle) {
        let leaks = self.leaks(Some(context));
        if leaks.objects() > 0 {
            self.report(&format!("the primary context was released with {leaks} still alive"));
        }
        self.drop_work(context);
        self.streams.retain(|_, stream| stream.context != context);
        self.events.retain(|_, event| event.context != context);
        self.modules.retain(|_, module| module.context != context);
        self.allocations.retain(|_, allocation| {
            let goes = allocation.context == context;
            if goes && allocation.import.is_none() {
                allocation.backing.note_freed();
            }
            !goes
        });
        self.registrations.retain(|_, registration| registration.context != context);
        self.contexts.remove(&context);
    }

    /// What is alive, in one context or in all.
    pub(crate) fn leaks(&self, context: Option<Handle>) -> Leaks {
        let of = |owner: Handle| context.is_none_or(|context| context == owner);
        let streams = self.streams.values();
        let count = |number: usize| number as u64;
        Leaks {
            streams: count(streams.filter(|s| s.is_open() && of(s.context)).count()),
            events: count(self.events.values().filter(|e| of(e.context)).count()),
            allocations: count(self.allocations.values().filter(|a| of(a.context)).count()),
            registrations: count(self.registrations.values().filter(|r| of(r.context)).count()),
            modules: count(self.modules.values().filter(|m| of(m.context)).count()),
            contexts: count(self.contexts.keys().filter(|&&handle| of(handle)).count()),
        }
    }
}

fn check_context(state: &State, context: Handle) -> Outcome {
    if state.contexts.contains_key(&context) {
        return Ok(());
    }
    Err(wrong(INVALID_CONTEXT, &format!("{context:#x} is no context, or was released")))
}

/// Driver API, Context Management: pushes onto this thread's stack.
#[unsafe(no_mangle)]
extern "C" fn cuCtxPushCurrent_v2(context: Handle) -> u32 {
    call("cuCtxPushCurrent_v2", |state| {
        check_context(state, context)?;
        CONTEXTS.with_borrow_mut(|stack| stack.push(context));
        Ok(())
    })
}

/// Driver API, Context Management: pops from this thread's stack; `INVALID_CONTEXT` where that is empty.
#[unsafe(no_mangle)]
extern "C" fn cuCtxPopCurrent_v2(context: Out<Handle>) -> u32 {
    call("cuCtxPopCurrent_v2", |_| match CONTEXTS.with_borrow_mut(Vec::pop) {
        Some(top) => {
            context.set_unless_null(top);
            Ok(())
        }
        None => Err(wrong(INVALID_CONTEXT, "no context is current on this thread")),
    })
}

/// Driver API, Context Management: "this will replace the top of that stack with ctx"; null pops
/// the top, or does nothing where there is none.
#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: Handle) -> u32 {
    call("cuCtxSetCurrent", |state| {
        if context != 0 {
            check_context(state, context)?;
        }
        CONTEXTS.with_borrow_mut(|stack| {
            stack.pop();
            if context != 0 {
                stack.push(context);
            }
        });
        Ok(())
    })
}

/// Driver API, Context Management: null, and success, where none is current.
#[unsafe(no_mangle)]
extern "C" fn cuCtxGetCurrent(context: Out<Handle>) -> u32 {
    call("cuCtxGetCurrent", |_| {
        context.set(CONTEXTS.with_borrow(|stack| stack.last().copied()).unwrap_or(0))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetDevice(device: Out<i32>) -> u32 {
    call("cuCtxGetDevice", |state| {
        let context = state.current()?;
        device.set(i32::try_from(state.device_of(context)).unwrap_or(i32::MAX))
    })
}

/// Driver API, Context Management: "Blocks until the current context has completed all preceding requested tasks".
#[unsafe(no_mangle)]
extern "C" fn cuCtxSynchronize() -> u32 {
    waiting_call("cuCtxSynchronize", |state| {
        let context = state.current()?;
        let mut clock = Clock::default();
        let mut ops = Vec::new();
        for stream in state.streams.values().filter(|stream| stream.context == context) {
            clock.join(&stream.clock);
            ops.push(stream.last);
        }
        Ok(Some(Wait { context, ops, clock, elsewhere: None }))
    })
}
