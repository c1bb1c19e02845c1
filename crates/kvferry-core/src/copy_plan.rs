//! Copy plans: which bytes of an engine's arrays and of a pool of slots belong together. One plan serves both
//! directions, on the host and on GPUs; it knows offsets, and no memory.

use std::ops::Range;
use std::sync::Arc;

use crate::{Error, ErrorCode, Result};

/// Where bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the arrays to the pool: a store gathers.
    Gather,
    /// From the pool to the arrays: a load scatters.
    Scatter,
}

/// Bytes that lie together in an array and in the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// The array's number.
    pub array: usize,
    /// Bytes from the array's start.
    pub at: u64,
    /// Bytes from the pool's start.
    pub pool: u64,
    /// Bytes.
    pub length: u64,
}

/// Tokens that lie together in the pool, and head by head in an array: head `h` of token `t` is at `h * apart + t *
/// length` from the tile's start there, and at `(t * heads + h) * length` here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tile {
    /// The array's number.
    pub array: usize,
    /// Bytes from the array's start.
    pub at: u64,
    /// Bytes from the pool's start.
    pub pool: u64,
    /// Tokens. One, where heads do not lie apart: of as many bytes as lie together.
    pub tokens: u64,
    /// Heads of a token.
    pub heads: u64,
    /// Bytes of a head of a token.
    pub length: u64,
    /// Bytes from a head to the next in the array.
    pub apart: u64,
}

impl Tile {
    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.tokens * self.heads * self.length
    }
}

/// What all plans for the same arrays have in common: computed once, shared by them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyShape {
    /// Where each array's part of an object begins. In the arrays' order a model computes its layers.
    pub(crate) bases: Vec<u64>,
    /// Bytes that each array must have.
    pub(crate) array_bytes: u64,
    /// Bytes of an object.
    pub(crate) object_bytes: u64,
    /// Bytes of an element, which arrays are aligned to.
    pub(crate) element_bytes: u64,
    pub(crate) blocks: Blocks,
}

/// How an array's blocks lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Blocks {
    pub(crate) count: u32,
    /// Tokens of a block.
    pub(crate) tokens: u64,
    /// Bytes from a block to the next.
    pub(crate) stride: u64,
    /// Bytes of a block; the rest of its stride is not ours.
    pub(crate) bytes: u64,
    /// Bytes of a token, in an array and in an object.
    pub(crate) token: u64,
    /// Where each token's heads lie apart from each other: how many there are, and how far apart.
    pub(crate) heads: Option<Heads>,
}

/// `count` heads of a token: `array` bytes apart in an array, without a gap in an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Heads {
    pub(crate) count: u64,
    pub(crate) array: u64,
}

/// A chunk to be copied.
#[derive(Debug, Clone, Copy)]
pub struct ChunkCopy<'a> {
    /// Its blocks in the order of its tokens. With fewer than it has, its end is left out.
    pub blocks: &'a [u32],
    /// Tokens at its beginning that are left alone.
    pub skip: u32,
    /// Where its object begins in the pool.
    pub slot: u64,
}

/// The copies of some chunks, checked: they stay within the arrays and the pool, and none writes what another
/// one does. Their order is that of the arrays, so a model's first layers come first.
#[derive(Debug, Clone)]
pub struct CopyPlan {
    shape: Arc<CopyShape>,
    direction: Direction,
    chunks: Vec<Chunk>,
    rows: Vec<Row>,
    bytes_per_array: u64,
}

/// Which bytes of a chunk are copied, the same in each array's part of its object.
#[derive(Debug, Clone, Copy)]
struct Chunk {
    slot: u64,
    /// From the part's start.
    from: u64,
    until: u64,
    /// Bytes of the chunks before that are copied of each array.
    before: u64,
}

/// Bytes of a chunk that lie together in its object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stretch {
    /// The chunk's number in the plan.
    pub chunk: usize,
    /// Bytes from the object's start.
    pub at: u64,
    /// Bytes.
    pub length: u64,
    /// Bytes from the pool's start.
    pub pool: u64,
    /// The plan's bytes that they are; `None` for tokens that are left alone.
    pub copied: Option<Range<u64>>,
}

/// Tokens of a chunk, the same in each array.
#[derive(Debug, Clone, Copy)]
struct Row {
    /// The first token, from an array's start.
    at: u64,
    /// The same, from the pool's start, for an array whose part begins where the object does.
    pool: u64,
    /// Bytes, of all heads.
    bytes: u64,
    /// Bytes of the rows before.
    before: u64,
}

impl CopyShape {
    /// Bytes of an object.
    pub fn object_bytes(&self) -> u64 {
        self.object_bytes
    }

    /// Bytes of each array.
    pub fn array_bytes(&self) -> u64 {
        self.array_bytes
    }

    /// How many arrays there are.
    pub fn arrays(&self) -> usize {
        self.bases.len()
    }

    /// Checks arrays by address and bytes.
    ///
    /// # Errors
    /// Another number of arrays, or of bytes; an address that is 0, not a multiple of an element's size, or too
    /// near to the end of the address space; arrays whose blocks overlap.
    pub fn check_arrays(&self, arrays: &[(u64, u64)]) -> Result<()> {
        if arrays.len() != self.arrays() {
            return Err(Error::invalid(format!(
                "{} arrays were given for {}",
                arrays.len(),
                self.arrays()
            )));
        }
        for (address, bytes) in arrays {
            if *bytes != self.array_bytes {
                return Err(Error::invalid(format!(
                    "an array of the KV memory has {bytes} bytes instead of {}: was it transferred or resized?",
                    self.array_bytes
                )));
            }
            if *address == 0 || address.checked_add(*bytes).is_none() {
                return Err(Error::invalid(format!(
                    "an array of {bytes} bytes cannot lie at address {address:#x}"
                )));
            }
            if address % self.element_bytes != 0 {
                return Err(Error::invalid(format!(
                    "an array at {address:#x} is not aligned to its elements of {} bytes",
                    self.element_bytes
                )));
            }
        }
        self.check_apart(arrays)
    }

    /// Arrays may lie within each other's gaps (K and V of each block side by side), but not over each other.
    fn check_apart(&self, arrays: &[(u64, u64)]) -> Result<()> {
        let mut sorted: Vec<u64> = arrays.iter().map(|(address, _)| *address).collect();
        sorted.sort_unstable();
        let Blocks { stride, bytes, .. } = self.blocks;
        for (number, first) in sorted.iter().enumerate() {
            let within = |second: &&u64| **second - first < self.array_bytes;
            for second in sorted[number + 1..].iter().take_while(within) {
                let apart = (second - first) % stride;
                if apart < bytes || stride - apart < bytes {
                    return Err(Error::invalid(format!(
                        "the arrays at {first:#x} and {second:#x} overlap"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Plans copies between the arrays and a pool of `pool_bytes`.
    ///
    /// # Errors
    /// Blocks beyond the arrays', more of them than a chunk has, and slots beyond the pool; a block that would be
    /// written twice, or slots that overlap where they are written.
    pub fn plan(
        self: &Arc<Self>,
        direction: Direction,
        chunks: &[ChunkCopy<'_>],
        pool_bytes: u64,
    ) -> Result<CopyPlan> {
        self.check_blocks(direction, chunks)?;
        self.check_slots(direction, chunks, pool_bytes)?;
        let mut plan = CopyPlan {
            shape: Arc::clone(self),
            direction,
            chunks: Vec::with_capacity(chunks.len()),
            rows: Vec::with_capacity(chunks.iter().map(|chunk| chunk.blocks.len()).sum()),
            bytes_per_array: 0,
        };
        let Blocks { tokens, stride, token, .. } = self.blocks;
        // A row of tokens whose heads lie apart begins with its first head.
        let of_token = token / self.blocks.heads.map_or(1, |heads| heads.count);
        for chunk in chunks {
            let until = chunk.blocks.len() as u64 * tokens * token;
            plan.chunks.push(Chunk {
                slot: chunk.slot,
                from: (u64::from(chunk.skip) * token).min(until),
                until,
                before: plan.bytes_per_array,
            });
            let first_row = plan.rows.len();
            for (number, block) in (0u64..).zip(chunk.blocks) {
                let skipped = u64::from(chunk.skip).saturating_sub(number * tokens).min(tokens);
                plan.push(
                    first_row,
                    u64::from(*block) * stride + skipped * of_token,
                    chunk.slot + (number * tokens + skipped) * token,
                    (tokens - skipped) * token,
                );
            }
        }
        Ok(plan)
    }

    fn check_blocks(&self, direction: Direction, chunks: &[ChunkCopy<'_>]) -> Result<()> {
        let mut written = Vec::new();
        let of_object = self.object_bytes / self.arrays().max(1) as u64;
        for chunk in chunks {
            let blocks = chunk.blocks.len() as u64;
            if blocks > of_object / self.blocks.bytes {
                return Err(Error::invalid(format!(
                    "a chunk was given {blocks} blocks of {} bytes, its object has {of_object} bytes of each array",
                    self.blocks.bytes
                )));
            }
            for (number, block) in (1u64..).zip(chunk.blocks) {
                if *block >= self.blocks.count {
                    return Err(Error::invalid(format!(
                        "block {block} is beyond the engine's {} blocks",
                        self.blocks.count
                    )));
                }
                if direction == Direction::Scatter
                    && number * self.blocks.tokens > chunk.skip.into()
                {
                    written.push(*block);
                }
            }
        }
        written.sort_unstable();
        match written.windows(2).find(|two| two[0] == two[1]) {
            None => Ok(()),
            Some(two) => Err(Error::invalid(format!(
                "block {} would be loaded twice: give each token a block of its own",
                two[0]
            ))),
        }
    }

    fn check_slots(
        &self,
        direction: Direction,
        chunks: &[ChunkCopy<'_>],
        pool_bytes: u64,
    ) -> Result<()> {
        let protocol = |message| Err(Error::new(ErrorCode::Protocol, message));
        let mut slots: Vec<u64> = chunks.iter().map(|chunk| chunk.slot).collect();
        for slot in &slots {
            if slot.checked_add(self.object_bytes).is_none_or(|end| end > pool_bytes) {
                return protocol(format!(
                    "a slot of {} bytes at {slot} lies outside the pool of {pool_bytes} bytes",
                    self.object_bytes
                ));
            }
        }
        slots.sort_unstable();
        let near = |two: &&[u64]| two[1] - two[0] < self.object_bytes;
        match slots.windows(2).find(near) {
            Some(two) if direction == Direction::Gather => {
                protocol(format!("the slots at {} and {} overlap", two[0], two[1]))
            }
            _ => Ok(()),
        }
    }
}

impl CopyPlan {
    /// Whether it gathers or scatters.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// What it has in common with other plans.
    pub fn shape(&self) -> &CopyShape {
        &self.shape
    }

    /// All bytes that are copied.
    pub fn bytes(&self) -> u64 {
        self.bytes_per_array * self.shape.arrays() as u64
    }

    /// Bytes of each array that are copied: those of array `n` are the plan's from `n` times as many on.
    pub fn bytes_per_array(&self) -> u64 {
        self.bytes_per_array
    }

    /// How many chunks there are.
    pub fn chunks(&self) -> usize {
        self.chunks.len()
    }

    /// What is to be summed by who copies the plan's bytes `part`: these bytes, and what is left alone beside them.
    /// Parts that together are `0..bytes()` have all bytes of each chunk's object, once. A plan without bytes has
    /// one part, `0..0`.
    pub fn stretches(&self, part: Range<u64>) -> Vec<Stretch> {
        let arrays = self.shape.arrays() as u64;
        let of_array = self.bytes_per_array;
        let section = self.shape.object_bytes / arrays.max(1);
        let end = part.end.min(self.bytes());
        let touched = match of_array {
            0 => 0..arrays,
            _ if part.start >= end => 0..0,
            _ => part.start / of_array..end.div_ceil(of_array),
        };
        let mut stretches = Vec::new();
        for array in touched {
            let start = part.start.saturating_sub(array * of_array);
            let end = end.saturating_sub(array * of_array).min(of_array);
            let base = self.shape.bases[usize::try_from(array).unwrap_or(usize::MAX)];
            for (number, Chunk { slot, from, until, before }) in self.chunks.iter().enumerate() {
                let mut push = |range: Range<u64>, copied: Option<Range<u64>>| {
                    if !range.is_empty() {
                        let (at, length) = (base + range.start, range.end - range.start);
                        stretches.push(Stretch {
                            chunk: number,
                            at,
                            length,
                            pool: slot + at,
                            copied,
                        });
                    }
                };
                let after = before + (until - from);
                // Who copies a chunk's first byte sums what comes before it, and who copies its last one what comes
                // after. A chunk without any goes with the byte that would follow, or else with the last.
                let first =
                    (start..end).contains(before) || (*before == of_array && end == of_array);
                let last = if after > *before { start < after && after <= end } else { first };
                if first {
                    push(0..*from, None);
                }
                let (low, high) = (start.max(*before), end.min(after));
                if low < high {
                    let within = from + (low - before)..from + (high - before);
                    push(within, Some(array * of_array + low..array * of_array + high));
                }
                if last {
                    push(*until..section, None);
                }
            }
        }
        stretches
    }

    /// Where the chunks' objects lie in the pool: for those who look at a pool once, before they copy or sum.
    pub fn pool_ranges(&self) -> impl Iterator<Item = Range<u64>> {
        self.chunks.iter().map(|chunk| chunk.slot..chunk.slot + self.shape.object_bytes)
    }

    /// Calls `visit` for the pieces of the plan's bytes `part`, all of them being `0..bytes()`. A piece at the
    /// part's edge is cut. Within an array and a chunk they come in the order of the object's bytes.
    ///
    /// # Errors
    /// The first of `visit`'s, which ends it.
    #[inline]
    pub fn pieces(
        &self,
        part: Range<u64>,
        mut visit: impl FnMut(Piece) -> Result<()>,
    ) -> Result<()> {
        let mut at = part.start;
        let end = part.end.min(self.bytes());
        while at < end {
            let (array, within) = (at / self.bytes_per_array, at % self.bytes_per_array);
            let array = usize::try_from(array).unwrap_or(usize::MAX);
            let first = self.rows.partition_point(|row| row.before <= within) - 1;
            let mut from = within - self.rows[first].before;
            for row in &self.rows[first..] {
                let until = row.bytes.min(from + (end - at));
                self.row(array, row, from..until, &mut visit)?;
                at += until - from;
                from = 0;
                if at == end {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Calls `visit` for all of the plan, for those who copy more cheaply than piece by piece; tiles have at most `most`
    /// bytes, and a token at least.
    ///
    /// # Errors
    /// The first of `visit`'s, which ends it.
    pub fn tiles(&self, most: u64, mut visit: impl FnMut(Tile) -> Result<()>) -> Result<()> {
        let token = self.shape.blocks.token;
        for (array, base) in self.shape.bases.iter().enumerate() {
            for row in &self.rows {
                let (step, heads) = match self.shape.blocks.heads {
                    Some(heads) => ((most / token).max(1) * token, heads),
                    None => (most.max(1), Heads { count: 1, array: 0 }),
                };
                let mut done = 0;
                while done < row.bytes {
                    let bytes = step.min(row.bytes - done);
                    let tokens = if heads.count > 1 { bytes / token } else { 1 };
                    visit(Tile {
                        array,
                        at: row.at + done / heads.count,
                        pool: row.pool + base + done,
                        tokens,
                        heads: heads.count,
                        length: bytes / tokens / heads.count,
                        apart: heads.array,
                    })?;
                    done += bytes;
                }
            }
        }
        Ok(())
    }

    /// The pieces of the row's bytes `part`.
    #[inline]
    fn row(
        &self,
        array: usize,
        row: &Row,
        part: Range<u64>,
        visit: &mut impl FnMut(Piece) -> Result<()>,
    ) -> Result<()> {
        let pool = row.pool + self.shape.bases[array];
        let Some(heads) = self.shape.blocks.heads else {
            return visit(Piece {
                array,
                at: row.at + part.start,
                pool: pool + part.start,
                length: part.end - part.start,
            });
        };
        let length = self.shape.blocks.token / heads.count;
        let (mut number, mut cut) = (part.start / length, part.start % length);
        let mut at = part.start;
        let (mut token, mut head) = (number / heads.count, number % heads.count);
        while at < part.end {
            let whole = (length - cut).min(part.end - at);
            visit(Piece {
                array,
                at: row.at + token * length + head * heads.array + cut,
                pool: pool + number * length + cut,
                length: whole,
            })?;
            at += whole;
            cut = 0;
            number += 1;
            head += 1;
            if head == heads.count {
                (token, head) = (token + 1, 0);
            }
        }
        Ok(())
    }

    /// Adds a row to a chunk, whose rows are those from `first` on.
    fn push(&mut self, first: usize, at: u64, pool: u64, bytes: u64) {
        if bytes == 0 {
            return;
        }
        let before = self.bytes_per_array;
        self.bytes_per_array += bytes;
        match self.rows[first..].last_mut() {
            Some(last)
                if self.shape.blocks.heads.is_none()
                    && last.at + last.bytes == at
                    && last.pool + last.bytes == pool =>
            {
                last.bytes += bytes;
            }
            _ => self.rows.push(Row { at, pool, bytes, before }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::key::Dtype;
    use crate::kv_layout::{KvLayout, Order, Planes};

    const CHUNK: u32 = 16;
    const POOL: u64 = 1 << 20;

    fn layout(planes: Planes, order: Order, block_size: u32, gap: u64) -> KvLayout {
        let mut layout = KvLayout {
            num_layers: 3,
            num_blocks: 8,
            block_size,
            num_kv_heads: if planes == Planes::Latent { 1 } else { 2 },
            head_size: 5,
            dtype: Dtype::new("bfloat16").unwrap(),
            planes,
            order,
            block_stride: None,
        };
        let halves = if planes == Planes::Fused { 2 } else { 1 };
        let block = u64::from(block_size * layout.num_kv_heads * 5 * 2 * halves);
        layout.block_stride = (gap > 0).then_some(block + gap);
        layout.check(CHUNK).unwrap();
        layout
    }

    fn shape(planes: Planes, order: Order) -> Arc<CopyShape> {
        Arc::new(layout(planes, order, 4, 0).copy_shape(CHUNK))
    }

    fn pieces(plan: &CopyPlan, part: Range<u64>) -> Vec<Piece> {
        let mut pieces = Vec::new();
        plan.pieces(part, |piece| {
            pieces.push(piece);
            Ok(())
        })
        .unwrap();
        pieces
    }

    /// Each head of each token of the plan's tiles.
    fn tiles(plan: &CopyPlan, most: u64) -> Vec<Piece> {
        let mut pieces = Vec::new();
        plan.tiles(most, |tile| {
            let token = tile.heads * tile.length;
            assert!(tile.bytes() <= most.max(token));
            for (token, head) in
                (0..tile.tokens).flat_map(|token| (0..tile.heads).map(move |head| (token, head)))
            {
                pieces.push(Piece {
                    array: tile.array,
                    at: tile.at + head * tile.apart + token * tile.length,
                    pool: tile.pool + (token * tile.heads + head) * tile.length,
                    length: tile.length,
                });
            }
            Ok(())
        })
        .unwrap();
        pieces
    }

    /// Each byte's place, by array and place there.
    fn bytes(pieces: &[Piece]) -> HashMap<(usize, u64), u64> {
        let mut found = HashMap::new();
        for piece in pieces {
            for byte in 0..piece.length {
                let twice = found.insert((piece.array, piece.at + byte), piece.pool + byte);
                assert_eq!(twice, None);
            }
        }
        found
    }

    /// The same, spelt out from the shapes of arrays and objects, one element at a time.
    fn expected(layout: &KvLayout, chunks: &[ChunkCopy<'_>]) -> HashMap<(usize, u64), u64> {
        let planes = if layout.planes == Planes::Separate { 2 } else { 1 };
        let halves = if layout.planes == Planes::Fused { 2 } else { 1 };
        let (layers, heads) = (u64::from(layout.num_layers), u64::from(layout.num_kv_heads));
        let (size, head_bytes) =
            (u64::from(layout.block_size), u64::from(layout.head_size) * 2 * halves);
        let stride = layout.block_stride.unwrap_or(size * heads * head_bytes);
        let mut expected = HashMap::new();
        for chunk in chunks {
            for token in u64::from(chunk.skip)..chunk.blocks.len() as u64 * size {
                let block = u64::from(chunk.blocks[usize::try_from(token / size).unwrap()]);
                for (layer, plane) in (0..layers).flat_map(|l| (0..planes).map(move |p| (l, p))) {
                    for (head, byte) in
                        (0..heads).flat_map(|h| (0..head_bytes).map(move |b| (h, b)))
                    {
                        let inside = token % size;
                        let row = match layout.order {
                            Order::Nhd => inside * heads + head,
                            Order::Hnd => head * size + inside,
                        };
                        let at = block * stride + row * head_bytes + byte;
                        // [planes, layers, tokens, heads, elements]
                        let first = (plane * layers + layer) * u64::from(CHUNK);
                        let object = ((first + token) * heads + head) * head_bytes + byte;
                        let array = usize::try_from(layer * planes + plane).unwrap();
                        expected.insert((array, at), chunk.slot + object);
                    }
                }
            }
        }
        expected
    }

    proptest! {
        #[test]
        fn each_byte_of_the_chunks_has_its_place_and_no_other(
            planes in prop::sample::select(vec![Planes::Separate, Planes::Fused, Planes::Latent]),
            order in prop::sample::select(vec![Order::Nhd, Order::Hnd]),
            block_size in prop::sample::select(vec![1u32, 2, 4]),
            gap in prop::sample::select(vec![0u64, 2, 64]),
            blocks in Just((0u32..8).collect::<Vec<_>>()).prop_shuffle(),
            first in 1usize..=4,
            second in 0usize..=4,
            skip in 0u32..20,
            most in 1u64..400,
            cuts in prop::collection::vec(0u64..5000, 0..4),
        ) {
            let layout = layout(planes, order, block_size, gap);
            let shape = Arc::new(layout.copy_shape(CHUNK));
            let (one, two) = blocks[..first + second].split_at(first);
            let chunks = [
                ChunkCopy { blocks: one, skip, slot: 40_960 },
                ChunkCopy { blocks: two, skip: 0, slot: 4096 },
            ];
            let plan = shape.plan(Direction::Scatter, &chunks, POOL).unwrap();
            let whole = pieces(&plan, 0..plan.bytes());
            let found = bytes(&whole);
            prop_assert_eq!(found.len() as u64, plan.bytes());
            prop_assert_eq!(&found, &expected(&layout, &chunks));
            prop_assert!(whole.is_sorted_by_key(|piece| piece.array));
            prop_assert_eq!(bytes(&tiles(&plan, most)), found.clone());
            // Heads that lie apart meet at a block's end only, which is not worth looking for.
            let together = shape.blocks.heads.is_none();
            for two in whole.windows(2).filter(|_| together) {
                let merged = two[0].array == two[1].array
                    && two[0].at + two[0].length == two[1].at
                    && two[0].pool + two[0].length == two[1].pool;
                prop_assert!(!merged, "neighbours are one piece: {:?}", two);
            }
            // Cut anywhere, the parts together are the plan, and what is summed is all of each object, once.
            let mut cuts: Vec<u64> = cuts.into_iter().map(|cut| cut.min(plan.bytes())).collect();
            cuts.extend([0, plan.bytes()]);
            cuts.sort_unstable();
            let parts: Vec<Piece> =
                cuts.windows(2).flat_map(|two| pieces(&plan, two[0]..two[1])).collect();
            prop_assert_eq!(bytes(&parts), found);
            let mut summed = Vec::new();
            for cuts in cuts.windows(2).filter(|cuts| cuts[0] < cuts[1]) {
                for stretch in plan.stretches(cuts[0]..cuts[1]) {
                    let slot = chunks[stretch.chunk].slot;
                    prop_assert_eq!(stretch.pool, slot + stretch.at);
                    let copied = stretch.copied.clone().map_or_else(Vec::new, |copied| {
                        assert!(cuts[0] <= copied.start && copied.end <= cuts[1]);
                        pieces(&plan, copied)
                    });
                    prop_assert_eq!(stretch.copied.is_some(), !copied.is_empty());
                    let lengths: u64 = copied.iter().map(|piece| piece.length).sum();
                    prop_assert!(lengths == 0 || lengths == stretch.length);
                    let mut at = stretch.pool;
                    for piece in copied {
                        prop_assert_eq!(piece.pool, at, "in the object's order");
                        at += piece.length;
                    }
                    summed.extend((0..stretch.length).map(|byte| (stretch.chunk, stretch.at + byte)));
                }
            }
            if plan.bytes() > 0 {
                summed.sort_unstable();
                let object = shape.object_bytes();
                let all = (0..2).flat_map(|chunk| (0..object).map(move |at| (chunk, at)));
                prop_assert!(summed.into_iter().eq(all), "each byte of both objects, once");
            }
        }
    }

    #[test]
    fn a_plan_that_copies_nothing_sums_all_of_its_objects() {
        let shape = shape(Planes::Separate, Order::Nhd);
        let chunk = ChunkCopy { blocks: &[1], skip: 4, slot: 4096 };
        let plan = shape.plan(Direction::Scatter, &[chunk], POOL).unwrap();
        assert_eq!((plan.bytes(), plan.chunks()), (0, 1));
        let bytes: u64 = plan.stretches(0..0).iter().map(|stretch| stretch.length).sum();
        assert_eq!(bytes, shape.object_bytes());
    }

    #[test]
    fn blocks_in_a_row_are_one_piece() {
        let shape = shape(Planes::Separate, Order::Nhd);
        let chunk = ChunkCopy { blocks: &[2, 3, 4, 7], skip: 0, slot: 0 };
        let plan = shape.plan(Direction::Gather, &[chunk], POOL).unwrap();
        assert_eq!(pieces(&plan, 0..plan.bytes()).len(), 6 * 2, "for each of six arrays");
    }

    #[test]
    fn what_cannot_be_copied_is_refused_as_a_whole() {
        let shape = shape(Planes::Separate, Order::Nhd);
        let plan = |direction, blocks: &[u32], slots: &[u64]| {
            let chunks: Vec<ChunkCopy<'_>> =
                slots.iter().map(|slot| ChunkCopy { blocks, skip: 2, slot: *slot }).collect();
            shape.plan(direction, &chunks, POOL)
        };
        let refused = |direction, blocks: &[u32], slots: &[u64]| {
            plan(direction, blocks, slots).unwrap_err().message
        };
        assert!(refused(Direction::Gather, &[0, 8], &[0]).contains("block 8"));
        assert!(plan(Direction::Gather, &[0, 1, 2, 3], &[0]).is_ok());
        assert!(
            refused(Direction::Gather, &[0, 1, 2, 3, 4], &[0]).contains("5 blocks of 80 bytes")
        );
        assert!(
            refused(Direction::Scatter, &[1, 2, 1], &[0]).contains("block 1 would be loaded twice")
        );
        assert!(refused(Direction::Scatter, &[1], &[0, 8192]).contains("twice"));
        assert!(refused(Direction::Gather, &[1], &[0, 1919]).contains("overlap"));
        assert!(refused(Direction::Gather, &[1], &[POOL - 1919]).contains("outside the pool"));
        assert!(refused(Direction::Gather, &[1], &[u64::MAX - 3]).contains("outside the pool"));
        assert_eq!(shape.object_bytes(), 1920);
        assert!(plan(Direction::Gather, &[1], &[0, 1920]).is_ok());
        assert!(
            plan(Direction::Gather, &[1, 1], &[0]).is_ok(),
            "reading a block twice does no harm"
        );
        assert_eq!(plan(Direction::Gather, &[], &[0]).unwrap().bytes(), 0);
        // A block whose tokens are all left alone is not written.
        let skipped = ChunkCopy { blocks: &[1, 1], skip: 4, slot: 0 };
        assert!(shape.plan(Direction::Scatter, &[skipped], POOL).is_ok());
    }

    #[test]
    fn arrays_that_cannot_be_are_refused() {
        let shape = Arc::new(layout(Planes::Separate, Order::Nhd, 4, 80).copy_shape(CHUNK));
        let bytes = shape.array_bytes();
        assert_eq!(bytes, 7 * 160 + 80);
        // K and V of a block side by side, layers behind each other.
        let places = [0, 80, 1280, 1360, 2560, 2640].map(|at| (4096 + at, bytes));
        assert!(shape.check_arrays(&places).is_ok());
        let with = |at: usize, address: u64, bytes: u64| {
            let mut places = places;
            places[at] = (address, bytes);
            shape.check_arrays(&places).unwrap_err().message
        };
        assert!(shape.check_arrays(&places[..5]).unwrap_err().message.contains("5 arrays"));
        assert!(with(0, 4096, bytes - 1).contains("bytes instead of"));
        assert!(with(0, 0, bytes).contains("address 0x0"));
        assert!(with(0, u64::MAX - 5, bytes).contains("cannot lie"));
        assert!(with(0, 9001, bytes).contains("not aligned"));
        assert!(with(0, 4096 + 82, bytes).contains("overlap"));
        assert!(with(5, 4096 + 1278, bytes).contains("overlap"));
    }
}
