//! Events.

use crate::abi::{Handle, Out};
use crate::clocks::Clock;
use crate::errors::{
    Failure, INVALID_CONTEXT, INVALID_HANDLE, INVALID_VALUE, NOT_READY, Outcome, wrong,
};
use crate::ipc::SharedEvent;
use crate::queue::{OpId, Work};
use crate::state::{State, Wait, call, waiting_call};
use std::sync::Arc;
use std::time::Instant;

pub(crate) struct Event {
    pub(crate) context: Handle,
    timed: bool,
    record: Option<Record>,
    /// What it has in common with other processes.
    pub(crate) shared: Option<Arc<SharedEvent>>,
}

/// What an event captured when it was last recorded by this process.
struct Record {
    op: OpId,
    clock: Clock,
    done_at: Option<Instant>,
    /// The record's number among all of a shared event's.
    number: u64,
}

/// What is to be waited for.
#[derive(Default)]
pub(crate) struct Captured {
    pub(crate) op: OpId,
    /// What is known after it.
    pub(crate) clock: Clock,
    /// A record of another process.
    pub(crate) elsewhere: Option<Elsewhere>,
}

#[derive(Clone)]
pub(crate) struct Elsewhere {
    event: Arc<SharedEvent>,
    number: u64,
}

impl Elsewhere {
    pub(crate) fn is_done(&self) -> bool {
        self.event.is_done(self.number)
    }
}

impl Event {
    pub(crate) fn new(context: Handle, timed: bool, shared: Option<Arc<SharedEvent>>) -> Self {
        Self { context, timed, record: None, shared }
    }

    /// The last record; nothing where the event was never recorded.
    pub(crate) fn captured(&self) -> Captured {
        let last = self.shared.as_ref().map_or(0, |shared| shared.recorded());
        match (&self.record, &self.shared) {
            (Some(Record { op, clock, number, .. }), _) if *number == last => {
                Captured { op: *op, clock: clock.clone(), elsewhere: None }
            }
            (_, Some(event)) if last > 0 => {
                let elsewhere = Some(Elsewhere { event: Arc::clone(event), number: last });
                Captured { elsewhere, ..Captured::default() }
            }
            _ => Captured::default(),
        }
    }
}

/// A place in a stream at which an event was recorded.
pub(crate) struct Mark {
    event: Handle,
    shared: Option<(Arc<SharedEvent>, u64)>,
}

impl State {
    pub(crate) fn event(&self, handle: Handle) -> Outcome<&Event> {
        let event = self.events.get(&handle);
        let event = event.ok_or_else(|| {
            wrong(INVALID_HANDLE, &format!("{handle:#x} is no event, or was destroyed"))
        })?;
        event.shared.as_ref().map_or(Ok(()), |shared| shared.check())?;
        Ok(event)
    }

    /// Says when the device reached the place at which an event was recorded.
    pub(crate) fn event_reached(&mut self, mark: &Mark, op: OpId) {
        let Mark { event, shared } = mark;
        if let Some((shared, number)) = shared {
            shared.reach(*number);
        }
        let record = self.events.get_mut(event).and_then(|event| event.record.as_mut());
        if let Some(record) = record.filter(|record| record.op == op) {
            record.done_at = Some(Instant::now());
        }
    }

    fn elapsed_ms(&self, out: &Out<f32>, start: Handle, end: Handle) -> Outcome {
        let mut done = [Instant::now(); 2];
        for (handle, done) in [start, end].into_iter().zip(&mut done) {
            let event = self.event(handle)?;
            if !event.timed {
                return Err(wrong(INVALID_HANDLE, "an event made without timing"));
            }
            let Some(record) = &event.record else {
                return Err(wrong(INVALID_HANDLE, "an event that was never recorded"));
            };
            *done = record.done_at.ok_or(Failure::Code(NOT_READY))?;
        }
        let [start, end] = done;
        let forward = end.saturating_duration_since(start).as_secs_f32();
        out.set((forward - start.saturating_duration_since(end).as_secs_f32()) * 1000.0)
    }
}

/// Driver API, Event Management: flags are CU_EVENT_DEFAULT, CU_EVENT_BLOCKING_SYNC (1), CU_EVENT_DISABLE_TIMING (2),
/// CU_EVENT_INTERPROCESS (4): "CU_EVENT_DISABLE_TIMING must be set" with it.
#[unsafe(no_mangle)]
extern "C" fn cuEventCreate(event: Out<Handle>, flags: u32) -> u32 {
    call("cuEventCreate", |state| {
        let context = state.current()?;
        event.require()?;
        let (is_timed, is_shared) = (flags & 2 == 0, flags & 4 != 0);
        if flags > 7 || (is_timed && is_shared) {
            return Err(wrong(INVALID_VALUE, &format!("there are no event flags {flags}")));
        }
        let shared = if is_shared { Some(Arc::new(SharedEvent::new()?)) } else { None };
        let handle = state.new_handle();
        state.events.insert(handle, Event::new(context, is_timed, shared));
        event.set(handle)
    })
}

/// Driver API, Event Management: "An event may be destroyed before it is complete […] the call does not block on
/// completion of the event".
#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(event: Handle) -> u32 {
    call("cuEventDestroy_v2", |state| {
        let Some(known) = state.events.get(&event) else {
            return Err(wrong(
                INVALID_HANDLE,
                &format!("{event:#x} is no event, or was destroyed"),
            ));
        };
        let owner = known.context;
        if state.current()? != owner {
            return Err(wrong(INVALID_CONTEXT, "the event belongs to another context"));
        }
        if let Some(shared) = state.events.remove(&event).and_then(|event| event.shared) {
            shared.note_destroyed();
        }
        Ok(())
    })
}

/// Driver API, Event Management: "Captures in hEvent the contents of hStream at the time of this call. hEvent and
/// hStream must be from the same context otherwise CUDA_ERROR_INVALID_HANDLE is returned"; a later record
/// overwrites.
#[unsafe(no_mangle)]
extern "C" fn cuEventRecord(event: Handle, stream: Handle) -> u32 {
    call("cuEventRecord", |state| {
        let context = state.event(event)?.context;
        let stream = state.stream(stream)?;
        if state.current()? != context {
            return Err(wrong(INVALID_HANDLE, "event and stream are of different contexts"));
        }
        let turn = state.turn(stream);
        let clock = turn.clock.clone();
        let shared = state.event(event)?.shared.as_ref();
        let shared = shared.map(|shared| (Arc::clone(shared), shared.record()));
        let number = shared.as_ref().map_or(0, |(_, number)| *number);
        let op = state.enqueue(turn, Work::Mark(Some(Mark { event, shared })));
        if let Some(event) = state.events.get_mut(&event) {
            event.record = Some(Record { op, clock, done_at: None, number });
        }
        Ok(())
    })
}

/// Driver API, Event Management: success "if all captured work has been completed", also where nothing was
/// recorded; else `NOT_READY`. No context need be current (its page names no INVALID_CONTEXT).
#[unsafe(no_mangle)]
extern "C" fn cuEventQuery(event: Handle) -> u32 {
    call("cuEventQuery", |state| {
        let event = state.event(event)?;
        let (context, captured) = (event.context, event.captured());
        if let Some(shared) = &event.shared {
            shared.note_look();
        }
        if let Some(code) = state.broken(context) {
            return Err(Failure::Code(code));
        }
        let is_done = state.queue.is_done(captured.op)
            && captured.elsewhere.as_ref().is_none_or(Elsewhere::is_done);
        if !is_done {
            return Err(Failure::Code(NOT_READY));
        }
        state.clocks.observe(&captured.clock);
        Ok(())
    })
}

/// Driver API, Event Management: waits for what the last record before this call captured.
#[unsafe(no_mangle)]
extern "C" fn cuEventSynchronize(event: Handle) -> u32 {
    waiting_call("cuEventSynchronize", |state| {
        let event = state.event(event)?;
        let Captured { op, clock, elsewhere } = event.captured();
        Ok(Some(Wait { context: event.context, ops: vec![op], clock, elsewhere }))
    })
}

/// Driver API, Event Management: milliseconds; `INVALID_HANDLE` for an event that was not recorded or has no timing,
/// `NOT_READY` while one is not complete.
#[unsafe(no_mangle)]
extern "C" fn cuEventElapsedTime(milliseconds: Out<f32>, start: Handle, end: Handle) -> u32 {
    call("cuEventElapsedTime", |state| state.elapsed_ms(&milliseconds, start, end))
}

/// As cuEventElapsedTime.
#[unsafe(no_mangle)]
extern "C" fn cuEventElapsedTime_v2(milliseconds: Out<f32>, start: Handle, end: Handle) -> u32 {
    call("cuEventElapsedTime_v2", |state| state.elapsed_ms(&milliseconds, start, end))
}
