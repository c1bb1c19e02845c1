//! Copies that are summed: through a buffer that the processor's caches hold, so that what is summed is what is written,
//! whoever changes the source meanwhile.

use std::mem::MaybeUninit;
use std::{ptr, slice};

use kvferry_core::Result;
use kvferry_core::copy_plan::{Direction, Piece, Stretch};
use kvferry_core::copy_sums::{CopySums, StretchSum};

use crate::host::{HostArrays, Part, Place, length};
use crate::kernels::{Kernel, Span};

const BUFFER: usize = 32 << 10;

#[repr(C, align(64))]
struct Buffer([MaybeUninit<u8>; BUFFER]);

/// The copy of one part.
pub(crate) struct Buffered<'a> {
    arrays: &'a HostArrays,
    part: &'a Part<'a>,
    buffer: Buffer,
    /// What the buffer holds, and where it goes.
    held: Vec<Piece>,
    filled: usize,
    spans: Vec<Span>,
}

impl<'a> Buffered<'a> {
    pub(crate) fn new(arrays: &'a HostArrays, part: &'a Part<'a>) -> Self {
        let buffer = Buffer([MaybeUninit::uninit(); BUFFER]);
        Self { arrays, part, buffer, held: Vec::new(), filled: 0, spans: Vec::new() }
    }

    /// Copies it; the checksums of its stretches.
    pub(crate) fn copy(mut self) -> Result<CopySums> {
        let mut sums = CopySums::default();
        let mut pieces = Vec::new();
        for stretch in self.part.plan.stretches(self.part.bytes.clone()) {
            let mut sum = StretchSum::new();
            match &stretch.copied {
                Some(bytes) => {
                    pieces.clear();
                    self.part.plan.pieces(bytes.clone(), |piece| {
                        cut(piece, |piece| pieces.push(piece));
                        Ok(())
                    })?;
                    self.copy_pieces(&pieces, &mut sum)?;
                }
                None => self.sum_pool(&stretch, &mut sum)?,
            }
            sums.add(&stretch, &sum);
        }
        self.arrays.kernel.fence();
        Ok(sums)
    }

    /// Pieces that each fit into the buffer.
    fn copy_pieces(&mut self, pieces: &[Piece], sum: &mut StretchSum) -> Result<()> {
        let mut ahead = 0;
        for (number, piece) in pieces.iter().enumerate() {
            if self.filled + length(piece.length) > BUFFER {
                ahead = self.prefetch(pieces, ahead.max(number));
                self.flush(sum)?;
            }
            self.fill(piece)?;
        }
        self.flush(sum)
    }

    /// Has what fills the buffer next fetched, while what it holds is summed and written; says how far that goes.
    fn prefetch(&self, pieces: &[Piece], from: usize) -> usize {
        let mut bytes = 0;
        let mut number = from;
        while let Some(piece) = pieces.get(number).filter(|_| bytes < BUFFER) {
            let bytes_of_piece = length(piece.length);
            match (self.part.plan.direction(), self.part.place) {
                (Direction::Gather, _) => Kernel::prefetch(self.arrays.ours(piece), bytes_of_piece),
                (Direction::Scatter, Place::Here(start)) => {
                    Kernel::prefetch(start.wrapping_add(length(piece.pool)), bytes_of_piece);
                }
                (Direction::Scatter, Place::Elsewhere) => {}
            }
            bytes += bytes_of_piece;
            number += 1;
        }
        number
    }

    /// Reads a piece to where the buffer is filled so far; there is room.
    fn fill(&mut self, piece: &Piece) -> Result<()> {
        let bytes = length(piece.length);
        let from = match (self.part.plan.direction(), self.part.place) {
            (Direction::Gather, _) => self.arrays.ours(piece).cast_const(),
            (Direction::Scatter, Place::Here(start)) => {
                start.wrapping_add(length(piece.pool)).cast_const()
            }
            (Direction::Scatter, Place::Elsewhere) => ptr::null(),
        };
        self.read(from, piece.pool, bytes)?;
        self.held.push(*piece);
        Ok(())
    }

    /// Reads bytes at `from`, or, where that is null, at `pool`, which only the pool's own calls know.
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

    /// Sums what the buffer holds, and writes it.
    fn flush(&mut self, sum: &mut StretchSum) -> Result<()> {
        let start: *const u8 = self.buffer.0.as_ptr().cast();
        // SAFETY: so much of the buffer is filled.
        let filled = unsafe { slice::from_raw_parts(start, self.filled) };
        sum.update(filled);
        let mut at = 0;
        self.spans.clear();
        for piece in &self.held {
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
            self.spans.push(Span { to, from: start.wrapping_add(at), bytes });
            at += bytes;
        }
        // SAFETY: the plan stays within the arrays and the pool's ranges, its pieces do not overlap where they are
        // written, and the buffer is other memory.
        unsafe { self.arrays.kernel.copy(&self.spans) };
        self.held.clear();
        self.filled = 0;
        Ok(())
    }

    /// Sums bytes of the pool that are left alone.
    fn sum_pool(&mut self, stretch: &Stretch, sum: &mut StretchSum) -> Result<()> {
        let mut at = 0;
        while at < stretch.length {
            let (pool, bytes) = (stretch.pool + at, (stretch.length - at).min(BUFFER as u64));
            let from = match self.part.place {
                Place::Here(start) => start.wrapping_add(length(pool)).cast_const(),
                Place::Elsewhere => ptr::null(),
            };
            self.read(from, pool, length(bytes))?;
            self.flush(sum)?;
            at += bytes;
        }
        Ok(())
    }
}

/// Cuts a piece so that each part fits into the buffer, several of them into it at once.
fn cut(piece: Piece, mut visit: impl FnMut(Piece)) {
    let mut rest = piece;
    while rest.length > 0 {
        let length = rest.length.min(BUFFER as u64 / 4);
        visit(Piece { length, ..rest });
        rest.at += length;
        rest.pool += length;
        rest.length -= length;
    }
}
