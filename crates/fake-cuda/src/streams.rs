//! Streams.

use crate::abi::{Handle, Out};
use crate::clocks::Clock;
use crate::errors::{
    Failure, INVALID_CONTEXT, INVALID_HANDLE, INVALID_VALUE, NOT_READY, NOT_SUPPORTED, Outcome,
    wrong,
};
use crate::events::Captured;
use crate::queue::{OpId, Turn, Work};
use crate::state::{CAPTURE_MODE, State, Wait, call, waiting_call};
use std::ffi::c_void;

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Kind {
    /// Handle 0 (or 1): waits for all blocking streams of its context, and they for it.
    Legacy,
    Blocking,
    NonBlocking,
}

pub(crate) struct Stream {
    pub(crate) context: Handle,
    kind: Kind,
    destroyed: bool,
    pub(crate) clock: Clock,
    /// What its early reader knows: see `early_reader`.
    pub(crate) early: Clock,
    pub(crate) last: OpId,
}

impl Stream {
    pub(crate) fn new(context: Handle, kind: Kind) -> Self {
        let (clock, early) = Default::default();
        Self { context, kind, destroyed: false, clock, early, last: 0 }
    }

    /// Made by the program and not destroyed yet.
    pub(crate) fn is_open(&self) -> bool {
        self.kind != Kind::Legacy && !self.destroyed
    }
}

/// `CU_STREAM_CAPTURE_MODE_RELAXED`.
pub(crate) const RELAXED: u32 = 2;
const LEGACY_HANDLE: Handle = 1;
const PER_THREAD_HANDLE: Handle = 2;

impl State {
    /// Checks a stream's handle. Guide, Multi-Device System, Stream and Event Behavior: a launch "will fail if it is issued to a stream
    /// that is not associated to the current device". Our reading: the same holds for everything that takes a
    /// stream, though that page lets a memory copy through.
    pub(crate) fn stream(&self, handle: Handle) -> Outcome<Handle> {
        let current = self.current()?;
        if handle == PER_THREAD_HANDLE {
            return Err(wrong(NOT_SUPPORTED, "the per-thread default stream is not modelled"));
        }
        if handle == 0 || handle == LEGACY_HANDLE {
            return Ok(self.contexts.get(&current).map_or(0, |context| context.legacy_stream));
        }
        let Some(stream) = self.streams.get(&handle).filter(|stream| stream.kind != Kind::Legacy)
        else {
            return Err(wrong(INVALID_HANDLE, &format!("there is no stream {handle:#x}")));
        };
        if stream.destroyed {
            return Err(wrong(INVALID_HANDLE, &format!("stream {handle:#x} was destroyed")));
        }
        if stream.context != current {
            return Err(wrong(
                INVALID_CONTEXT,
                &format!("stream {handle:#x} belongs to another context than the current one"),
            ));
        }
        Ok(handle)
    }

    /// Whose streams order themselves with this one. Driver API, Stream synchronization behavior, Legacy default
    /// stream: it synchronizes with
    /// all other streams of its context except for non-blocking ones: an action in it waits for all blocking streams, and all blocking streams wait for it.
    fn neighbours(&self, handle: Handle) -> Vec<Handle> {
        let Some(stream) = self.streams.get(&handle) else { return Vec::new() };
        let counterpart = match stream.kind {
            Kind::Legacy => Kind::Blocking,
            Kind::Blocking => Kind::Legacy,
            Kind::NonBlocking => return Vec::new(),
        };
        let others = self.streams.iter();
        others
            .filter(|(_, other)| other.context == stream.context && other.kind == counterpart)
            .map(|(&handle, _)| handle)
            .collect()
    }

    /// The next place in a stream: after what is in it, after what the legacy stream asks for, and after all that
    /// the host knows.
    pub(crate) fn turn(&mut self, handle: Handle) -> Turn {
        let mut clock = self.clocks.host.clone();
        let mut after = Vec::new();
        for neighbour in self.neighbours(handle) {
            if let Some(stream) = self.streams.get(&neighbour) {
                clock.join(&stream.clock);
                after.push(stream.last);
            }
        }
        if let Some(stream) = self.streams.get(&handle) {
            clock.join(&stream.clock);
        }
        let stamp = clock.tick(handle);
        if let Some(stream) = self.streams.get_mut(&handle) {
            stream.clock = clock.clone();
        }
        Turn { stream: handle, stamp, clock, after, elsewhere: None }
    }

    /// A place in a stream that the host can wait for.
    pub(crate) fn wait_for_stream(&mut self, stream: Handle) -> Wait {
        let turn = self.turn(stream);
        let clock = turn.clock.clone();
        let op = self.enqueue(turn, Work::Mark(None));
        let context = self.streams.get(&stream).map_or(0, |stream| stream.context);
        Wait { context, ops: vec![op], clock, elsewhere: None }
    }

    fn create_stream(&mut self, out: &Out<Handle>, flags: u32) -> Outcome {
        let context = self.current()?;
        out.require()?;
        let kind = match flags {
            0 => Kind::Blocking,
            1 => Kind::NonBlocking,
            _ => return Err(wrong(INVALID_VALUE, &format!("there are no stream flags {flags}"))),
        };
        let handle = self.new_handle();
        self.streams.insert(handle, Stream::new(context, kind));
        out.set(handle)
    }
}

/// Driver API, Stream Management: flags CU_STREAM_DEFAULT (0) or CU_STREAM_NON_BLOCKING (1).
#[unsafe(no_mangle)]
extern "C" fn cuStreamCreate(stream: Out<Handle>, flags: u32) -> u32 {
    call("cuStreamCreate", |state| state.create_stream(&stream, flags))
}

/// Driver API, Stream Management: priorities are hints, and one out of range is clamped; here they change nothing.
#[unsafe(no_mangle)]
extern "C" fn cuStreamCreateWithPriority(stream: Out<Handle>, flags: u32, _priority: i32) -> u32 {
    call("cuStreamCreateWithPriority", |state| state.create_stream(&stream, flags))
}

/// Driver API, Context Management: the range is from the least (0) to the greatest (negative).
#[unsafe(no_mangle)]
extern "C" fn cuCtxGetStreamPriorityRange(least: Out<i32>, greatest: Out<i32>) -> u32 {
    call("cuCtxGetStreamPriorityRange", |state| {
        state.current()?;
        least.set_unless_null(0);
        greatest.set_unless_null(-5);
        Ok(())
    })
}

/// Driver API, Stream Management: "In case the device is still doing work in the stream hStream when
/// cuStreamDestroy() is called, the function will return immediately and the resources associated with hStream
/// will be released automatically once the device has completed all work". Destroying the default stream is our
/// reading of `INVALID_HANDLE`.
#[unsafe(no_mangle)]
extern "C" fn cuStreamDestroy_v2(stream: Handle) -> u32 {
    call("cuStreamDestroy_v2", |state| {
        if stream == 0 || stream == LEGACY_HANDLE {
            return Err(wrong(INVALID_HANDLE, "the default stream cannot be destroyed"));
        }
        let handle = state.stream(stream)?;
        if let Some(stream) = state.streams.get_mut(&handle) {
            stream.destroyed = true;
        }
        Ok(())
    })
}

/// Driver API, Stream Management: waits until the device has done all operations of the stream.
#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(stream: Handle) -> u32 {
    waiting_call("cuStreamSynchronize", |state| {
        let stream = state.stream(stream)?;
        Ok(Some(state.wait_for_stream(stream)))
    })
}

/// Driver API, Stream Management: success "if all operations in the stream specified by hStream have completed",
/// else `NOT_READY`. Our
/// reading: success is as good as having synchronized, which the page says of Unified Memory.
#[unsafe(no_mangle)]
extern "C" fn cuStreamQuery(stream: Handle) -> u32 {
    call("cuStreamQuery", |state| {
        let handle = state.stream(stream)?;
        let is_legacy = state.streams.get(&handle).is_some_and(|s| s.kind == Kind::Legacy);
        let mut asked = vec![handle];
        if is_legacy {
            asked.extend(state.neighbours(handle));
        }
        let mut clock = Clock::default();
        for handle in asked {
            let Some(stream) = state.streams.get(&handle) else { continue };
            if !state.queue.is_done(stream.last) {
                return Err(Failure::Code(NOT_READY));
            }
            clock.join(&stream.clock);
        }
        state.clocks.observe(&clock);
        Ok(())
    })
}

/// Driver API, Stream Management: "Makes all future work submitted to hStream wait for all work captured in
/// hEvent": by the record before this call, not by later ones; nothing to wait for where there was none. The
/// event "may be from a different context or device than hStream". Flags: CU_EVENT_WAIT_DEFAULT (0).
#[unsafe(no_mangle)]
extern "C" fn cuStreamWaitEvent(stream: Handle, event: Handle, flags: u32) -> u32 {
    call("cuStreamWaitEvent", |state| {
        let stream = state.stream(stream)?;
        if flags != 0 {
            return Err(wrong(INVALID_VALUE, "the flags must be 0"));
        }
        let Captured { op, clock, elsewhere } = state.event(event)?.captured();
        if let Some(stream) = state.streams.get_mut(&stream) {
            stream.clock.join(&clock);
        }
        let mut turn = state.turn(stream);
        turn.after.push(op);
        turn.elsewhere = elsewhere;
        state.enqueue(turn, Work::Mark(None));
        Ok(())
    })
}

/// Driver API, Stream Management: swaps the thread's mode with `mode`: GLOBAL (0), THREAD_LOCAL (1) or RELAXED (2).
#[unsafe(no_mangle)]
extern "C" fn cuThreadExchangeStreamCaptureMode(mode: Out<u32>) -> u32 {
    call("cuThreadExchangeStreamCaptureMode", |_| {
        let wanted = mode.get()?;
        if wanted > RELAXED {
            return Err(wrong(INVALID_VALUE, &format!("there is no capture mode {wanted}")));
        }
        mode.set(CAPTURE_MODE.replace(wanted))
    })
}

/// Driver API, Execution Control: calls a host function in stream order, on a thread of the driver's; it may call
/// nothing of the driver's. Our reading: that it has run tells the host nothing, unless it asks the driver.
#[unsafe(no_mangle)]
extern "C" fn cuLaunchHostFunc(
    stream: Handle,
    function: Option<extern "C" fn(*mut c_void)>,
    data: u64,
) -> u32 {
    call("cuLaunchHostFunc", |state| {
        let stream = state.stream(stream)?;
        let Some(function) = function else {
            return Err(wrong(INVALID_VALUE, "the host function is null"));
        };
        let turn = state.turn(stream);
        state.enqueue(turn, Work::HostFunction { function, data });
        Ok(())
    })
}
