//! Copies that are summed. What is written goes to a buffer too, from the same registers, and the buffer is summed: so
//! the sum is that of what was written, whoever changes the source meanwhile.

use std::ops::Range;
use std::ptr;

use kvferry_core::Result;
use kvferry_core::copy_plan::{Direction, Piece, Stretch};
use kvferry_core::copy_sums::{CopySums, StretchSum};

use crate::folded::{self, LANES, Run};
use crate::host::{HostArrays, Part, Place, length};
use crate::kernels::{SIDE_BY_SIDE, Span, TURN};

/// Small enough for the first cache, beside what is read.
const BUFFER: usize = 16 << 10;
/// Bytes that are read or written in one go, several of them side by side.
const PIECE: u64 = 4 << 10;

/// The bytes of one go, initialised once: what they are before does not matter.
#[repr(C, align(64))]
struct Buffer([u8; BUFFER]);

/// The copy of one part.
pub(crate) struct Summed<'a> {
    arrays: &'a HostArrays,
    part: &'a Part<'a>,
    buffer: Buffer,
    spans: Vec<Span>,
}

/// A piece of a stretch, by its number.
type OfStretch = (usize, Piece);

impl<'a> Summed<'a> {
    pub(crate) fn new(arrays: &'a HostArrays, part: &'a Part<'a>) -> Self {
        Self { arrays, part, buffer: Buffer([0; BUFFER]), spans: Vec::new() }
    }

    /// Copies it; the checksums of its stretches.
    pub(crate) fn copy(&mut self) -> Result<CopySums> {
        let stretches = self.part.plan.stretches(self.part.bytes.clone());
        let mut sums: Vec<StretchSum> = stretches.iter().map(|_| StretchSum::new()).collect();
        let (mut pieces, mut foldable) = (Vec::<OfStretch>::new(), Vec::new());
        let direction = self.part.plan.direction();
        for (number, stretch) in stretches.iter().enumerate() {
            match &stretch.copied {
                Some(bytes) => match self.foldable(bytes)? {
                    Some(spans) => foldable.push((number, spans)),
                    None => self.part.plan.pieces(bytes.clone(), |piece| {
                        let to = match self.part.place {
                            Place::Here(start) => {
                                self.arrays.span(direction, &piece, start).to.addr()
                            }
                            Place::Elsewhere => 0,
                        };
                        cut(piece, to, |piece| pieces.push((number, piece)));
                        Ok(())
                    })?,
                },
                None => self.sum_pool(stretch, &mut sums[number])?,
            }
        }
        self.fold(&foldable, &mut sums);
        let mut rest = &pieces[..];
        while !rest.is_empty() {
            let mut room = BUFFER as u64;
            let count = rest.iter().take_while(|(_, piece)| {
                let fits = piece.length <= room;
                room = room.saturating_sub(piece.length);
                fits
            });
            let (now, later) = rest.split_at(count.count());
            self.copy_some(now, later)?;
            let mut at = 0;
            for of_stretch in now.chunk_by(|one, two| one.0 == two.0) {
                let bytes: u64 = of_stretch.iter().map(|(_, piece)| piece.length).sum();
                sums[of_stretch[0].0].update(&self.buffer.0[at..at + length(bytes)]);
                at += length(bytes);
            }
            rest = later;
        }
        self.arrays.kernel.fence();
        let mut all = CopySums::default();
        stretches.iter().zip(&sums).for_each(|(stretch, sum)| all.add(stretch, sum));
        Ok(all)
    }

    /// The spans of some of the plan's bytes, if they can be folded.
    fn foldable(&self, bytes: &Range<u64>) -> Result<Option<Vec<Span>>> {
        let Place::Here(start) = self.part.place else { return Ok(None) };
        if self.arrays.kernel.fold.is_none() {
            return Ok(None);
        }
        let (mut spans, mut fit) = (Vec::new(), true);
        self.part.plan.pieces(bytes.clone(), |piece| {
            let span = self.arrays.span(self.part.plan.direction(), &piece, start);
            fit &= folded::fits(&span) && span.bytes >= SIDE_BY_SIDE;
            spans.push(span);
            Ok(())
        })?;
        Ok(fit.then_some(spans))
    }

    /// Copies and sums stretches without the buffer.
    fn fold(&self, stretches: &[(usize, Vec<Span>)], sums: &mut [StretchSum]) {
        let Some(fold) = self.arrays.kernel.fold else { return };
        let total: usize =
            stretches.iter().flat_map(|(_, spans)| spans).map(|span| span.bytes).sum();
        // As many bytes of each lane, but for the last.
        let of_lane = total.div_ceil(LANES).next_multiple_of(TURN).max(TURN);
        let mut lanes: [(Vec<Span>, Vec<Run>); LANES] = Default::default();
        let mut at = 0;
        for (stretch, spans) in stretches {
            let mut seed = StretchSum::SEED;
            for span in spans {
                let mut rest = *span;
                while rest.bytes > 0 {
                    let bytes = rest.bytes.min(of_lane - at % of_lane);
                    let (spans, runs) = &mut lanes[at / of_lane];
                    spans.push(Span { bytes, ..rest });
                    match runs.last_mut().filter(|run| run.stretch == *stretch) {
                        Some(run) => run.spans += 1,
                        None => runs.push(Run::new(*stretch, std::mem::take(&mut seed))),
                    }
                    at += bytes;
                    rest = rest.behind(bytes);
                }
            }
        }
        // SAFETY: the plan stays within the arrays and the pool's ranges, its pieces do not overlap where they are
        // written, and arrays and pool are different memory. The kernel is one of this processor's, and the spans fit.
        unsafe { fold(lanes.each_mut().map(|(spans, runs)| (&spans[..], &mut runs[..]))) };
        for run in lanes.iter().flat_map(|(_, runs)| runs) {
            let sum = &mut sums[run.stretch];
            match run.seed {
                0 => sum.update_folded(&run.folded, run.bytes),
                _ => *sum = StretchSum::from_folded(&run.folded),
            }
        }
    }

    /// Copies pieces that together fit into the buffer, which has their bytes then.
    fn copy_some(&mut self, now: &[OfStretch], later: &[OfStretch]) -> Result<()> {
        let direction = self.part.plan.direction();
        let Place::Here(start) = self.part.place else { return self.copy_elsewhere(now) };
        self.spans.clear();
        let mut keep = self.buffer.0.as_mut_ptr();
        for (number, (_, piece)) in now.iter().enumerate() {
            let ahead = later
                .get(number)
                .map_or(ptr::null(), |(_, piece)| self.arrays.span(direction, piece, start).from);
            let span = Span { ahead, keep, ..self.arrays.span(direction, piece, start) };
            keep = keep.wrapping_add(span.bytes);
            self.spans.push(span);
        }
        // SAFETY: the plan stays within the arrays and the pool's ranges, its pieces do not overlap where they are
        // written, and arrays, pool and buffer are different memory. The pieces fit into the buffer.
        unsafe { self.arrays.kernel.copy_twice(&self.spans) };
        Ok(())
    }

    /// The same, by the pool's own calls.
    fn copy_elsewhere(&mut self, now: &[OfStretch]) -> Result<()> {
        let mut rest = &mut self.buffer.0[..];
        for (_, piece) in now {
            let (bytes, after) = rest.split_at_mut(length(piece.length));
            let ours = self.arrays.ours(piece);
            match self.part.plan.direction() {
                Direction::Gather => {
                    // SAFETY: the plan stays within the arrays; the buffer is other memory.
                    unsafe { ptr::copy_nonoverlapping(ours, bytes.as_mut_ptr(), bytes.len()) };
                    self.part.pool.write(piece.pool, bytes)?;
                }
                Direction::Scatter => {
                    self.part.pool.read(piece.pool, bytes)?;
                    // SAFETY: as above.
                    unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), ours, bytes.len()) };
                }
            }
            rest = after;
        }
        Ok(())
    }

    /// Sums bytes of the pool that are left alone.
    fn sum_pool(&mut self, stretch: &Stretch, sum: &mut StretchSum) -> Result<()> {
        let mut at = 0;
        while at < stretch.length {
            let bytes = &mut self.buffer.0[..length((stretch.length - at).min(BUFFER as u64))];
            match self.part.place {
                Place::Here(start) => {
                    let from = start.wrapping_add(length(stretch.pool + at));
                    // SAFETY: within the object, and so within the pool's ranges; the buffer is other memory.
                    unsafe { ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
                }
                Place::Elsewhere => self.part.pool.read(stretch.pool + at, bytes)?,
            }
            sum.update(bytes);
            at += bytes.len() as u64;
        }
        Ok(())
    }
}

/// Cuts a piece so that several of them fit into the buffer, where its bytes go to `to`: at addresses that lines begin
/// at, since a line that is written in two halves is read first.
fn cut(mut piece: Piece, to: usize, mut visit: impl FnMut(Piece)) {
    let mut most = PIECE - to as u64 % PIECE;
    while piece.length > 0 {
        let length = piece.length.min(most);
        visit(Piece { length, ..piece });
        piece.at += length;
        piece.pool += length;
        piece.length -= length;
        most = PIECE;
    }
}
