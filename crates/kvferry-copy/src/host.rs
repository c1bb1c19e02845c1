//! Copies between an engine's host memory and a pool.

use std::ops::Range;
use std::ptr::NonNull;
use std::slice;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use kvferry_core::cache::Memory;
use kvferry_core::copy_plan::{CopyPlan, CopyShape, Direction, Piece};
use kvferry_core::copy_sums::CopySums;
use kvferry_core::copying::{Copying, KvMemory, Progress, copying};
use kvferry_core::{Error, ErrorCode, Result};

use crate::kernels::{Kernel, Span};
use crate::place_of;
use crate::summed::Summed;
use crate::threads::{CopyThreads, Job, Parts};

/// Bytes that a thread copies in one go: tens of microseconds, during which a connection that closes waits for
/// it.
const PART: u64 = 512 << 10;
/// A piece is cut into spans of so many bytes, which are copied side by side.
const SPAN: usize = 128 << 10;
/// Spans that the kernel gets at once.
const SPANS: usize = 128;

/// An engine's arrays by address.
#[derive(Debug)]
pub struct HostArrays {
    shape: Arc<CopyShape>,
    starts: Vec<NonNull<u8>>,
    pub(crate) kernel: Kernel,
}

// SAFETY: plain memory that any thread may use, as the caller of `new` has promised.
unsafe impl Send for HostArrays {}
// SAFETY: as above; that copies of several threads may overlap is the engine's business: its blocks hold
// numbers, and none is invalid.
unsafe impl Sync for HostArrays {}

/// Where a pool lies, as far as a plan needs it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place {
    /// Its first byte, in this process. All of the plan's ranges are within, and their pages are mapped.
    Here(*mut u8),
    /// Only its own calls know.
    Elsewhere,
}

// SAFETY: an address of memory that any thread may use, see `Memory`.
unsafe impl Send for Place {}
// SAFETY: as above.
unsafe impl Sync for Place {}

impl Place {
    /// Looks at all of the plan's ranges, and has their pages mapped.
    fn of(pool: &dyn Memory, plan: &CopyPlan) -> Result<Self> {
        let mut place = Self::Elsewhere;
        for range in plan.pool_ranges() {
            let start = place_of(pool, range.start, length(range.end - range.start))?;
            let Some(start) = start else { return Ok(Self::Elsewhere) };
            place = Self::Here(start.wrapping_sub(length(range.start)));
        }
        Ok(place)
    }
}

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
        Ok(Self { shape, starts, kernel: Kernel::best() })
    }

    /// Copies a part of the plan's bytes, on this thread and the process's copy threads; returns when it is done.
    ///
    /// # Errors
    /// A plan of another shape; what the pool says; a wrong `KVFERRY_COPY_THREADS`.
    pub fn copy(&self, plan: &CopyPlan, part: Range<u64>, pool: &dyn Memory) -> Result<()> {
        self.copy_now(plan, part, pool, None)
    }

    /// The same, and adds what was copied to `sums`, which gets parts that together are the plan: see
    /// [`CopyPlan::stretches`].
    ///
    /// # Errors
    /// As [`HostArrays::copy`]. `sums` means nothing then.
    pub fn copy_summed(
        &self,
        plan: &CopyPlan,
        part: Range<u64>,
        pool: &dyn Memory,
        sums: &mut CopySums,
    ) -> Result<()> {
        let shared = Mutex::default();
        self.copy_now(plan, part, pool, Some(&shared))?;
        sums.append(shared.into_inner().unwrap_or_else(PoisonError::into_inner));
        Ok(())
    }

    fn copy_now(
        &self,
        plan: &CopyPlan,
        part: Range<u64>,
        pool: &dyn Memory,
        sums: Option<&Mutex<CopySums>>,
    ) -> Result<()> {
        self.check(plan)?;
        let end = part.end.min(plan.bytes());
        let mut parts = end.saturating_sub(part.start).div_ceil(PART);
        if plan.bytes() == 0 && sums.is_some() {
            parts = 1; // nothing to copy, but to sum
        }
        if parts == 0 {
            return Ok(());
        }
        let place = Place::of(pool, plan)?;
        CopyThreads::global()?.run(plan.direction(), length(parts), true, &|number| {
            let start = part.start + number as u64 * PART;
            let part = Part { plan, bytes: start..end.min(start + PART), pool, place };
            self.copy_part(&part, sums)
        })
    }

    fn check(&self, plan: &CopyPlan) -> Result<()> {
        if *plan.shape() != *self.shape {
            return Err(Error::invalid("the plan is of other arrays"));
        }
        Ok(())
    }

    /// Copies a part of a plan of this shape.
    fn copy_part(&self, part: &Part<'_>, sums: Option<&Mutex<CopySums>>) -> Result<()> {
        let Part { plan, bytes, pool, place } = part;
        // Memory whose writes are calls of its own asks for leave itself.
        let _permit = match (place, plan.direction()) {
            (Place::Here(_), Direction::Gather) => Some(pool.permit()?),
            _ => None,
        };
        if let Some(sums) = sums {
            let summed = Summed::new(self, part).copy()?;
            sums.lock().unwrap_or_else(PoisonError::into_inner).append(summed);
            return Ok(());
        }
        match place {
            Place::Here(start) => {
                let mut spans = Spans::new(self.kernel);
                let copied = plan.pieces(bytes.clone(), |piece| {
                    // SAFETY: the plan stays within the arrays and the pool's ranges, its pieces do not overlap where
                    // they are written, and arrays and pool are different memory.
                    unsafe { spans.push(self.span(plan.direction(), &piece, *start)) };
                    Ok(())
                });
                spans.finish();
                copied
            }
            Place::Elsewhere => plan.pieces(bytes.clone(), |piece| {
                let (ours, bytes) = (self.ours(&piece), length(piece.length));
                match plan.direction() {
                    Direction::Gather => {
                        // SAFETY: the plan stays within the arrays.
                        pool.write(piece.pool, unsafe { slice::from_raw_parts(ours, bytes) })
                    }
                    Direction::Scatter => {
                        // SAFETY: as above; nobody else has a reference into the arrays.
                        pool.read(piece.pool, unsafe { slice::from_raw_parts_mut(ours, bytes) })
                    }
                }
            }),
        }
    }

    /// Where a piece lies in the arrays.
    pub(crate) fn ours(&self, piece: &Piece) -> *mut u8 {
        self.starts[piece.array].as_ptr().wrapping_add(length(piece.at))
    }

    /// A piece between the arrays and a pool that begins at `start`.
    pub(crate) fn span(&self, direction: Direction, piece: &Piece, start: *mut u8) -> Span {
        let (ours, theirs) = (self.ours(piece), start.wrapping_add(length(piece.pool)));
        let (to, from) = match direction {
            Direction::Gather => (theirs, ours),
            Direction::Scatter => (ours, theirs),
        };
        Span { to, from, bytes: length(piece.length), ..Span::NONE }
    }
}

/// Bytes of a plan that one thread copies in one go.
pub(crate) struct Part<'a> {
    pub(crate) plan: &'a CopyPlan,
    pub(crate) bytes: Range<u64>,
    pub(crate) pool: &'a dyn Memory,
    pub(crate) place: Place,
}

pub(crate) fn length(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// Spans on their way to the kernel.
struct Spans {
    kernel: Kernel,
    spans: [Span; SPANS],
    count: usize,
}

impl Spans {
    fn new(kernel: Kernel) -> Self {
        Self { kernel, spans: [Span::NONE; SPANS], count: 0 }
    }

    /// Copies it, now or by [`Spans::finish`].
    ///
    /// # Safety
    /// As for [`Kernel::copy`], until [`Spans::finish`].
    unsafe fn push(&mut self, mut span: Span) {
        while span.bytes > 0 {
            if self.count == SPANS {
                self.flush();
            }
            let bytes = span.bytes.min(SPAN);
            if let Some(earlier) =
                Kernel::ahead(bytes).and_then(|ahead| self.count.checked_sub(ahead))
            {
                self.spans[earlier].ahead = span.from;
            }
            self.spans[self.count] = Span { bytes, ..span };
            self.count += 1;
            span = span.behind(bytes);
        }
    }

    fn flush(&mut self) {
        // SAFETY: what `push` was promised.
        unsafe { self.kernel.copy(&self.spans[..self.count]) };
        self.count = 0;
    }

    /// Copies the rest; all of it is visible to whoever learns of it now.
    fn finish(mut self) {
        self.flush();
        self.kernel.fence();
    }
}

/// Arrays that copies run to and from by themselves. Dropped, it closes.
#[derive(Debug)]
pub struct HostMemory {
    arrays: Arc<HostArrays>,
    threads: Result<Arc<CopyThreads>>,
    running: Mutex<Running>,
}

#[derive(Debug, Default)]
struct Running {
    copies: Vec<Weak<Job>>,
    closed: bool,
}

impl HostMemory {
    /// Makes copies of `arrays` run by themselves, on the process's copy threads. Where these cannot be had, each
    /// copy is the error of [`CopyThreads::global`].
    pub fn new(arrays: HostArrays) -> Self {
        Self::with(CopyThreads::global().cloned(), arrays)
    }

    /// The same, on other threads.
    pub fn on(threads: &Arc<CopyThreads>, arrays: HostArrays) -> Self {
        Self::with(Ok(Arc::clone(threads)), arrays)
    }

    fn with(threads: Result<Arc<CopyThreads>>, arrays: HostArrays) -> Self {
        Self { arrays: Arc::new(arrays), threads, running: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KvMemory for HostMemory {
    fn shape(&self) -> &Arc<CopyShape> {
        &self.arrays.shape
    }

    fn copy(&self, plan: CopyPlan, pool: Arc<dyn Memory>, sums: bool) -> Result<Copying> {
        self.arrays.check(&plan)?;
        let threads = self.threads.as_ref().map_err(Clone::clone)?;
        let mut running = self.lock();
        if running.closed {
            return Err(closed());
        }
        running.copies.retain(|copy| copy.strong_count() > 0);
        let (progress, copying) = copying();
        let direction = plan.direction();
        let parts = plan.bytes().div_ceil(PART).max(u64::from(sums)); // there may be nothing to copy, but to sum
        let left = Left { bytes: vec![plan.bytes_per_array(); plan.shape().arrays()], arrays: 0 };
        let copy = HostCopy {
            arrays: Arc::clone(&self.arrays),
            plan,
            pool,
            place: OnceLock::new(),
            sums: sums.then(Mutex::default),
            progress,
            left: Mutex::new(left),
        };
        let job = threads.begin(direction, length(parts), Box::new(copy))?;
        running.copies.push(Arc::downgrade(&job));
        Ok(copying)
    }

    fn close(&self) {
        let copies = {
            let mut running = self.lock();
            running.closed = true;
            running.copies.clone()
        };
        let copies: Vec<Arc<Job>> = copies.iter().filter_map(Weak::upgrade).collect();
        for copy in &copies {
            copy.stop(Err(closed()));
        }
        for copy in &copies {
            let _ = copy.wait(); // how it ended is told to whoever began it
        }
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        self.close();
    }
}

fn closed() -> Error {
    Error::new(ErrorCode::Closed, "the KV memory was closed; register it anew")
}

/// A copy that runs by itself.
struct HostCopy {
    arrays: Arc<HostArrays>,
    plan: CopyPlan,
    pool: Arc<dyn Memory>,
    place: OnceLock<Place>,
    sums: Option<Mutex<CopySums>>,
    progress: Progress,
    left: Mutex<Left>,
}

/// What is not copied yet.
struct Left {
    /// Bytes of each array.
    bytes: Vec<u64>,
    /// Leading arrays that have none.
    arrays: usize,
}

impl HostCopy {
    fn part(&self, part: usize) -> Range<u64> {
        let start = part as u64 * PART;
        start..self.plan.bytes().min(start + PART)
    }
}

impl Parts for HostCopy {
    fn copy(&self, part: usize) -> Result<()> {
        let place = match self.place.get() {
            Some(place) => *place,
            // Two threads may both find out, to the same end: no lock is held while pages are mapped.
            None => {
                let place = Place::of(&*self.pool, &self.plan)?;
                *self.place.get_or_init(|| place)
            }
        };
        let part = Part { plan: &self.plan, bytes: self.part(part), pool: &*self.pool, place };
        self.arrays.copy_part(&part, self.sums.as_ref())
    }

    fn copied(&self, part: usize) {
        let Range { start, end } = self.part(part);
        let of_array = self.plan.bytes_per_array();
        let arrays = {
            let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
            let mut at = start;
            while at < end {
                let bytes = (of_array - at % of_array).min(end - at);
                left.bytes[length(at / of_array)] -= bytes;
                at += bytes;
            }
            let before = left.arrays;
            while left.bytes.get(left.arrays) == Some(&0) {
                left.arrays += 1;
            }
            (left.arrays > before).then_some(left.arrays)
        };
        if let Some(arrays) = arrays {
            self.progress.arrays(arrays);
        }
    }

    fn ended(&self, result: Result<()>) {
        let result = result.and_then(|()| {
            let Some(sums) = &self.sums else { return Ok(()) };
            let sums = std::mem::take(&mut *sums.lock().unwrap_or_else(PoisonError::into_inner));
            self.progress.checksums(sums.finish(&self.plan)?);
            Ok(())
        });
        if result.is_ok() {
            self.progress.arrays(self.plan.shape().arrays());
        }
        self.progress.end(result);
    }
}
