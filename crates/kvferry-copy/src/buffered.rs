//! Copies that are summed: through a buffer that the processor's caches hold, so that what is summed is what is written,
//! whoever changes the source meanwhile.

use std::mem::MaybeUninit;
use std::{ptr, slice};

use kvferry_core::Result;
use kvferry_core::copy_plan::{Direction, Piece, Stretch};
use kvferry_core::copy_sums::{CopySums, StretchSum};

use crate::host::{HostArrays, Part, Place, length};
use crate::kernels::Span;

/// Small enough for the first cache, beside what is read.
const BUFFER: usize = 16 << 10;
/// Bytes that are read or written in one go, several of them side by side.
const PIECE: u64 = 4 << 10;

#[repr(C, align(64))]
struct Buffer([MaybeUninit<u8>; BUFFER]);

/// The copy of one part.
pub(crate) struct Buffered<'a> {
    arrays: &'a HostArrays,
    part: &'a Part<'a>,
    buffer: Buffer,
    filled: usize,
    spans: Vec<Span>,
}

/// A piece of a stretch, by its number.
type OfStretch = (usize, Piece);

impl<'a> Buffered<'a> {
    pub(crate) fn new(arrays: &'a HostArrays, part: &'a Part<'a>) -> Self {
        let buffer = Buffer([MaybeUninit::uninit(); BUFFER]);
        Self { arrays, part, buffer, filled: 0, spans: Vec::new() }
    }

    /// Copies it; the checksums of its stretches.
    pub(crate) fn copy(mut self) -> Result<CopySums> {
        let stretches = self.part.plan.stretches(self.part.bytes.clone());
        let mut sums: Vec<StretchSum> = stretches.iter().map(|_| StretchSum::new()).collect();
        let mut pieces: Vec<OfStretch> = Vec::new();
        for (number, stretch) in stretches.iter().enumerate() {
            match &stretch.copied {
                Some(bytes) => self.part.plan.pieces(bytes.clone(), |piece| {
                    cut(piece, |piece| pieces.push((number, piece)));
                    Ok(())
                })?,
                None => self.sum_pool(stretch, &mut sums[number])?,
            }
        }
        let mut rest = &pieces[..];
        while !rest.is_empty() {
            let mut room = BUFFER as u64;
            let count = rest.iter().take_while(|(_, piece)| {
                let fits = piece.length <= room;
                room = room.saturating_sub(piece.length);
                fits
            });
            let (now, later) = rest.split_at(count.count());
            self.copy_some(now, later, &mut sums)?;
            rest = later;
        }
        self.arrays.kernel.fence();
        let mut all = CopySums::default();
        stretches.iter().zip(&sums).for_each(|(stretch, sum)| all.add(stretch, sum));
        Ok(all)
    }

    /// Copies pieces that together fit into the buffer, while those that follow are fetched.
    fn copy_some(
        &mut self,
        now: &[OfStretch],
        later: &[OfStretch],
        sums: &mut [StretchSum],
    ) -> Result<()> {
        self.filled = 0;
        for (_, piece) in now {
            self.read(self.source(piece), piece.pool, length(piece.length))?;
        }
        let start: *const u8 = self.buffer.0.as_ptr().cast();
        // SAFETY: so much of the buffer is filled.
        let filled = unsafe { slice::from_raw_parts(start, self.filled) };
        let mut at = 0;
        for of_stretch in now.chunk_by(|one, two| one.0 == two.0) {
            let bytes: u64 = of_stretch.iter().map(|(_, piece)| piece.length).sum();
            sums[of_stretch[0].0].update(&filled[at..at + length(bytes)]);
            at += length(bytes);
        }
        at = 0;
        self.spans.clear();
        for (number, (_, piece)) in now.iter().enumerate() {
            let bytes = length(piece.length);
            let to = match (self.part.plan.direction(), self.part.place) {
                (Direction::Scatter, _) => self.arrays.ours(piece),
                (Direction::Gather, Place::Here(pool)) => pool.wrapping_add(length(piece.pool)),
                (Direction::Gather, Place::Elsewhere) => {
                    self.part.pool.write(piece.pool, &filled[at..at + bytes])?;
                    at += bytes;
                    continue;
                }
            };
            let ahead = later.get(number).map_or(ptr::null(), |(_, piece)| self.source(piece));
            self.spans.push(Span { to, from: start.wrapping_add(at), bytes, ahead });
            at += bytes;
        }
        // SAFETY: the plan stays within the arrays and the pool's ranges, its pieces do not overlap where they are
        // written, and the buffer is other memory.
        unsafe { self.arrays.kernel.copy(&self.spans) };
        Ok(())
    }

    /// Where a piece is read; null where only the pool's own calls know.
    fn source(&self, piece: &Piece) -> *const u8 {
        match self.part.plan.direction() {
            Direction::Gather => self.arrays.ours(piece),
            Direction::Scatter => self.in_pool(piece.pool),
        }
    }

    fn in_pool(&self, at: u64) -> *const u8 {
        match self.part.place {
            Place::Here(start) => start.wrapping_add(length(at)),
            Place::Elsewhere => ptr::null(),
        }
    }

    /// Reads bytes at `from`, or, where that is null, at `pool`, behind those that the buffer holds.
    fn read(&mut self, from: *const u8, pool: u64, bytes: usize) -> Result<()> {
        let room = &mut self.buffer.0[self.filled..self.filled + bytes];
        if from.is_null() {
            room.fill(MaybeUninit::new(0));
            // SAFETY: just filled.
            let room = unsafe { slice::from_raw_parts_mut(room.as_mut_ptr().cast(), bytes) };
            self.part.pool.read(pool, room)?;
        } else {
            // SAFETY: a piece of the plan, which stays within the arrays and the pool's ranges, or bytes beside it of
            // the same object; the buffer is our own.
            unsafe { ptr::copy_nonoverlapping(from, room.as_mut_ptr().cast(), bytes) };
        }
        self.filled += bytes;
        Ok(())
    }

    /// Sums bytes of the pool that are left alone.
    fn sum_pool(&mut self, stretch: &Stretch, sum: &mut StretchSum) -> Result<()> {
        let mut at = 0;
        while at < stretch.length {
            let bytes = (stretch.length - at).min(BUFFER as u64);
            self.filled = 0;
            self.read(self.in_pool(stretch.pool + at), stretch.pool + at, length(bytes))?;
            // SAFETY: so much of the buffer is filled.
            let filled =
                unsafe { slice::from_raw_parts(self.buffer.0.as_ptr().cast(), self.filled) };
            sum.update(filled);
            at += bytes;
        }
        Ok(())
    }
}

/// Cuts a piece so that each part fits into the buffer, several of them into it at once.
fn cut(mut piece: Piece, mut visit: impl FnMut(Piece)) {
    while piece.length > 0 {
        let length = piece.length.min(PIECE);
        visit(Piece { length, ..piece });
        piece.at += length;
        piece.pool += length;
        piece.length -= length;
    }
}
