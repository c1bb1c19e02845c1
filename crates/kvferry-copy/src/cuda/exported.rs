//! An engine's memory on a device, for a process that copies from and to it on the engine's behalf. What the engine computes
//! is waited for here and never by a stream: a stream that waits for an engine that has ended would wait for ever.

use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context as TaskContext, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use kvferry_core::cache::Memory;
use kvferry_core::copy_plan::{CopyPlan, CopyShape};
use kvferry_core::copying::{Copying, KvMemory as _};
use kvferry_core::kv_descriptors::{DescribedMemory, Storages};
use kvferry_core::{Error, ErrorCode, Result};

use super::context::{Context, Current};
use super::driver::{Driver, Handle};
use super::{CudaMemory, DOUBT_MAX, IpcArray};

/// The engine's streams mean nothing in this process; nobody uses this one.
const LEGACY_STREAM: u64 = 0;
/// Between looks whether an engine's event is over.
const PAUSE_MIN: Duration = Duration::from_micros(10);
const PAUSE_MAX: Duration = Duration::from_micros(320);
/// Between looks whether a copy may go on.
const LOOK: Duration = Duration::from_millis(5);
/// LMCache's counters: the version of their form, what they lie in, and one.
const COUNTERS_VERSION: u8 = 1;
const COUNTERS_BYTES: u64 = 4096 * COUNTER_BYTES;
const COUNTER_BYTES: u64 = 8;
/// Such allocations of one engine: it has one.
const COUNTERS_MAX: usize = 4;

/// Whether to go on, asked again and again; its error ends what it was asked for.
type GoOn<'a> = &'a dyn Fn() -> Result<()>;

/// An engine's arrays in memory that its process exported, as LMCache's `cuda` and `cuda_raw` descriptors name it.
pub struct ExportedMemory {
    memory: Arc<CudaMemory>,
    /// Made for the first event that is a counter, and taken while it is used.
    counters: Mutex<Option<Counters>>,
    context: Arc<Context>,
}

impl ExportedMemory {
    /// Opens each allocation of a checked description once, on the device that the engine means.
    ///
    /// # Errors
    /// [`ErrorCode::CudaUnavailable`] without a driver, or where the engine's device is none of its; handles that are
    /// not those of a running process' memory; arrays beyond their allocation.
    pub fn open(memory: &DescribedMemory) -> Result<Self> {
        let Storages::Cuda { device_uuid, allocations } = &memory.storages else {
            return Err(Error::invalid("segments of the host are no device's memory"));
        };
        let device = Driver::get()?.device_of(device_uuid)?;
        let context = Context::retain(device)?;
        let bytes = memory.shape.array_bytes();
        let array = |(allocation, offset): &(usize, u64)| {
            let handle = allocations[*allocation].0;
            IpcArray { handle, offset: *offset, bytes }
        };
        let arrays: Vec<IpcArray> = memory.arrays.iter().map(array).collect();
        let shape = Arc::clone(&memory.shape);
        // SAFETY: the arrays are mapped into this process until this closes, whatever the engine does with them, and only
        // the device reads and writes them; the stream is the context's own.
        let memory = unsafe { CudaMemory::open_ipc(shape, device, LEGACY_STREAM, &arrays) }?;
        Ok(Self { memory: Arc::new(memory), counters: Mutex::default(), context })
    }

    /// What its plans are of.
    pub fn shape(&self) -> &Arc<CopyShape> {
        self.memory.shape()
    }

    /// Waits on this thread until the engine's stream has come to where it recorded an event: an interprocess event of
    /// CUDA's, or one of LMCache's counters (`lmcache.mp.isolated_ipc`).
    ///
    /// # Errors
    /// `go_on`'s; bytes that are neither; what the driver says; all once this [is in doubt](Self::is_in_doubt).
    pub fn wait_for(&self, event: &[u8], go_on: GoOn<'_>) -> Result<()> {
        if self.is_in_doubt() {
            return Err(in_doubt());
        }
        match Event::parse(event)? {
            Event::Cuda(handle) => {
                let current = self.context.enter()?;
                let event = current.open_event(handle)?;
                let over = until(|| Ok(current.is_done(event)?), go_on);
                current.destroy_event(event);
                over
            }
            Event::Counter { value: 0, .. } => Ok(()), // never recorded
            Event::Counter { handle, offset, value } => {
                let current = self.context.enter()?;
                let known = self.lock().take();
                let mut counters = known.map_or_else(|| Counters::new(&current), Ok)?;
                let over = counters.find(&current, handle, offset).and_then(|address| {
                    until(|| Ok(counters.read(&current, address)? >= value), go_on)
                });
                if counters.reading {
                    self.doubt(); // the word may yet be written to
                    return over;
                }
                let another = self.lock().replace(counters);
                if let Some(another) = another {
                    another.release(&current);
                }
                over
            }
        }
    }

    /// Carries out a plan of [`ExportedMemory::shape`] while this thread waits; `pool` is what its slots lie in. Nothing is
    /// under way when this returns, unless [`ExportedMemory::is_in_doubt`].
    ///
    /// # Errors
    /// What the device says; `go_on`'s, after the copy's end: bytes may have been copied then, all of them even.
    pub fn copy(&self, plan: CopyPlan, pool: Arc<dyn Memory>, go_on: GoOn<'_>) -> Result<()> {
        self.finish(&self.memory.copy(plan, pool, false)?, go_on)
    }

    /// Whether a copy may be under way that nothing will tell the end of. Its slots must not be used again; this memory
    /// stays open for ever.
    pub fn is_in_doubt(&self) -> bool {
        self.memory.doubt().is_some()
    }

    fn doubt(&self) {
        self.memory.shared.lock().doubt.get_or_insert_with(in_doubt);
        std::mem::forget(Arc::clone(&self.memory)); // closing it would wait for the copy
    }

    fn lock(&self) -> MutexGuard<'_, Option<Counters>> {
        self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn finish(&self, copying: &Copying, go_on: GoOn<'_>) -> Result<()> {
        let waker = Waker::from(Arc::new(Unpark(thread::current())));
        let mut task = TaskContext::from_waker(&waker);
        let mut end = pin!(copying.ended());
        let mut given_up: Option<(Error, Instant)> = None;
        loop {
            if let Poll::Ready(ended) = end.as_mut().poll(&mut task) {
                return given_up.map_or(ended, |(error, _)| Err(error));
            }
            match &given_up {
                None => given_up = go_on().err().map(|error| (error, Instant::now())),
                Some((_, since)) if since.elapsed() > DOUBT_MAX => {
                    self.doubt();
                    return Err(in_doubt());
                }
                Some(_) => {}
            }
            thread::park_timeout(LOOK);
        }
    }
}

impl Drop for ExportedMemory {
    fn drop(&mut self) {
        let Some(counters) = self.lock().take() else { return };
        // Where the device is lost, nothing is left to give back.
        if let Ok(current) = self.context.enter() {
            counters.release(&current);
        }
    }
}

fn in_doubt() -> Error {
    Error::new(
        ErrorCode::CudaFailed,
        "the GPU did not end a copy of this engine's memory, which stays set apart; start the engine anew",
    )
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Looks until it is over, after longer and longer pauses.
fn until(mut is_over: impl FnMut() -> Result<bool>, go_on: GoOn<'_>) -> Result<()> {
    let mut pause = PAUSE_MIN;
    while !is_over()? {
        go_on()?;
        thread::sleep(pause);
        pause = PAUSE_MAX.min(pause * 2);
    }
    Ok(())
}

/// What an engine's event is, as the engine's process exported it.
enum Event<'a> {
    /// `CUipcEventHandle`.
    Cuda(&'a [u8; 64]),
    /// Over when the number at this place of an exported allocation has come to this value.
    Counter { handle: &'a [u8; 64], offset: u64, value: u64 },
}

impl<'a> Event<'a> {
    fn parse(event: &'a [u8]) -> Result<Self> {
        if let Ok(handle) = event.try_into() {
            return Ok(Self::Cuda(handle));
        }
        let counter = || {
            let (version, rest) = event.split_first()?;
            let (handle, rest) = rest.split_first_chunk()?;
            let (offset, value) = rest.split_first_chunk()?;
            let value = u64::from_be_bytes(value.try_into().ok()?);
            (*version == COUNTERS_VERSION).then_some((handle, u64::from_be_bytes(*offset), value))
        };
        let (handle, offset, value) = counter().ok_or_else(|| {
            Error::invalid(format!(
                "an event of {} bytes is neither CUDA's, of 64, nor one of LMCache's counters, of 81",
                event.len()
            ))
        })?;
        if offset >= COUNTERS_BYTES || offset % COUNTER_BYTES != 0 {
            return Err(Error::invalid(format!(
                "there is no counter at {offset}: there are {COUNTERS_BYTES} bytes of {COUNTER_BYTES} each"
            )));
        }
        Ok(Self::Counter { handle, offset, value })
    }
}

/// An engine's counters, and what they are read with. They are read in this process' own time: a stream that waits for a
/// value would never come back from an engine that has ended.
struct Counters {
    opened: Vec<([u8; 64], u64)>,
    stream: Handle,
    event: Handle,
    /// Page-locked.
    word: *mut u64,
    /// The word may yet be written to.
    reading: bool,
}

// SAFETY: the word is plain memory that any thread may use, one at a time.
unsafe impl Send for Counters {}

impl Counters {
    fn new(current: &Current<'_>) -> Result<Self> {
        let (opened, word) = (Vec::new(), std::ptr::null_mut());
        let mut counters = Self { opened, stream: 0, event: 0, word, reading: false };
        let made = counters.make(current);
        match made {
            Ok(()) => Ok(counters),
            Err(error) => {
                counters.release(current);
                Err(error)
            }
        }
    }

    fn make(&mut self, current: &Current<'_>) -> Result<()> {
        self.stream = current.new_stream()?;
        self.event = current.new_event()?;
        self.word = current.new_word()?;
        Ok(())
    }

    /// Where a counter is in this process.
    fn find(&mut self, current: &Current<'_>, handle: &[u8; 64], offset: u64) -> Result<u64> {
        let known = self.opened.iter().find(|(known, _)| known == handle);
        let start = match known {
            Some((_, start)) => *start,
            None if self.opened.len() >= COUNTERS_MAX => {
                return Err(Error::invalid(format!(
                    "an engine's counters lie in more than {COUNTERS_MAX} allocations"
                )));
            }
            None => {
                let start = current.open_ipc(handle)?;
                self.opened.push((*handle, start));
                start
            }
        };
        let (from, bytes) = current.allocation(start).unwrap_or((start, COUNTERS_BYTES));
        if start - from + offset + COUNTER_BYTES > bytes {
            return Err(Error::invalid(format!(
                "a counter at {offset} lies beyond its allocation of {bytes} bytes"
            )));
        }
        Ok(start + offset)
    }

    /// The counter's value a moment ago.
    fn read(&mut self, current: &Current<'_>, address: u64) -> Result<u64> {
        self.reading = true;
        let asked = current
            .copy_word(self.word, address, self.stream)
            .and_then(|()| Ok(current.record(self.event, self.stream)?));
        let Err(error) = asked else { return self.arrived(current) };
        // Whether it was begun, only the stream can tell.
        if current.record(self.event, self.stream).is_ok() {
            self.arrived(current)?;
        }
        Err(error)
    }

    fn arrived(&mut self, current: &Current<'_>) -> Result<u64> {
        let since = Instant::now();
        let in_time = || if since.elapsed() > DOUBT_MAX { Err(in_doubt()) } else { Ok(()) };
        until(|| Ok(current.is_done(self.event)?), &in_time)?;
        self.reading = false;
        // SAFETY: page-locked, aligned as pages are, and nothing writes to it now.
        Ok(unsafe { self.word.read_volatile() })
    }

    /// Gives back what there is.
    fn release(self, current: &Current<'_>) {
        if !self.word.is_null() {
            current.free_word(self.word);
        }
        if self.event != 0 {
            current.destroy_event(self.event);
        }
        if self.stream != 0 {
            current.destroy_stream(self.stream);
        }
        for (_, start) in self.opened {
            current.close_ipc(start);
        }
    }
}
