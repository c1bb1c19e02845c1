use std::ops::Range;

use super::parse::STREAMS_MAX;
use super::{CELL_BYTES, Geometry, MAGIC, PLANE_HEADER_BYTES, Plane, VERSION};
use crate::{Error, ErrorCode, Result};

/// Bytes that lie in one piece in the file and in the chunk's payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// From the file's start.
    pub file_offset: u64,
    /// From the payload's start, descriptor included.
    pub payload_offset: u64,
    /// Bytes, at least 1.
    pub length: u64,
}

/// Where the cells of a file's only stream lie.
#[derive(Debug, Clone)]
pub(super) struct Placement {
    pub(super) geometry: Geometry,
    pub(super) cells: u32,
    /// Offsets of each layer's keys and values.
    pub(super) offsets: Vec<[u64; 2]>,
    /// The slot of each position, when that is not the position itself.
    pub(super) slots: Option<Vec<u32>>,
}

impl Placement {
    pub(super) fn for_each_segment(
        &self,
        tokens: Range<u32>,
        each: impl FnMut(Segment) -> Result<()>,
    ) -> Result<()> {
        if tokens.start >= tokens.end || tokens.end > self.cells {
            return Err(Error::invalid(format!(
                "tokens {}..{} are no range within the {} of the file",
                tokens.start, tokens.end, self.cells
            )));
        }
        let mut merge = Merge { pending: None, each };
        let mut payload = self.geometry.descriptor_bytes();
        for (layer, [keys, values]) in self.geometry.layers().iter().zip(&self.offsets) {
            for (plane, offset) in [(layer.keys, *keys), (layer.values, *values)] {
                self.plane(plane, offset, &tokens, &mut payload, &mut merge)?;
            }
        }
        merge.end()
    }

    fn plane(
        &self,
        plane: Plane,
        offset: u64,
        tokens: &Range<u32>,
        payload: &mut u64,
        merge: &mut Merge<impl FnMut(Segment) -> Result<()>>,
    ) -> Result<()> {
        let bytes = u64::from(plane.run_bytes);
        for run in 0..u64::from(plane.runs) {
            let run_offset = offset + run * bytes * u64::from(self.cells);
            let mut push = |slot: u32, count: u64| {
                let length = count * bytes;
                let file_offset = run_offset + u64::from(slot) * bytes;
                merge.push(Segment { file_offset, payload_offset: *payload, length })?;
                *payload += length;
                Ok(())
            };
            match &self.slots {
                None => push(tokens.start, u64::from(tokens.end - tokens.start))?,
                Some(slots) => {
                    for position in tokens.clone() {
                        push(slots.get(position as usize).copied().unwrap_or(position), 1)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Joins segments that go on where the last one ended.
struct Merge<F> {
    pending: Option<Segment>,
    each: F,
}

impl<F: FnMut(Segment) -> Result<()>> Merge<F> {
    fn push(&mut self, next: Segment) -> Result<()> {
        match &mut self.pending {
            Some(last)
                if last.file_offset + last.length == next.file_offset
                    && last.payload_offset + last.length == next.payload_offset =>
            {
                last.length += next.length;
                Ok(())
            }
            pending => pending.replace(next).map_or(Ok(()), &mut self.each),
        }
    }

    fn end(mut self) -> Result<()> {
        self.pending.take().map_or(Ok(()), &mut self.each)
    }
}

/// Bytes of a file that come from no chunk: headers, tokens and cells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// From the file's start.
    pub offset: u64,
    /// What to write there.
    pub bytes: Vec<u8>,
}

/// How to write the state file of `tokens` from chunks: the [`Piece`]s and the chunks' segments
/// together cover every byte of the file once.
#[derive(Debug, Clone)]
pub struct AssemblePlan {
    file_bytes: u64,
    pieces: Vec<Piece>,
    placement: Placement,
}

impl AssemblePlan {
    /// The plan of a file that a context with `streams` streams loads: its number of sequences, or 1
    /// where they share one cache. The file names `sequence` as its origin; llama.cpp loads it
    /// into any sequence.
    pub fn new(geometry: &Geometry, tokens: &[u32], streams: u32, sequence: u32) -> Result<Self> {
        if !(1..=STREAMS_MAX).contains(&streams) || (streams > 1 && sequence >= streams) {
            return Err(Error::invalid(format!(
                "sequence {sequence} of {streams} streams: streams are 1..={STREAMS_MAX}, and each has one sequence"
            )));
        }
        if let Some(position) = tokens.iter().position(|token| i32::try_from(*token).is_err()) {
            return Err(Error::new(
                ErrorCode::InvalidToken,
                format!(
                    "token {position} is {}; llama.cpp's tokens end at 2147483647",
                    tokens[position]
                ),
            ));
        }
        let cells = u32::try_from(tokens.len())
            .ok()
            .filter(|cells| (1..=i32::MAX.unsigned_abs()).contains(cells))
            .ok_or_else(|| Error::invalid(format!("{} tokens make no state file", tokens.len())))?;
        let file_bytes = file_bytes(geometry, cells, streams).ok_or_else(|| {
            Error::invalid(format!("a file of {cells} tokens has no size in u64"))
        })?;

        let stream = if streams == 1 { 0 } else { sequence };
        let mut writer = Writer::default();
        writer.words([MAGIC, VERSION, cells]);
        writer.words(tokens.iter().copied());
        writer.words([streams]);
        writer.words((0..stream).map(|_| 0));
        writer.words([cells]);
        writer.words((0..cells).flat_map(|position| [position, 1, sequence]));
        writer.words([u32::from(geometry.transposed()), geometry.layer_count()]);
        let mut offsets = Vec::with_capacity(geometry.layers().len());
        for layer in geometry.layers() {
            writer.row_header(layer.keys);
            offsets.push([writer.skip(layer.keys, cells), 0]);
        }
        for (layer, [_, values]) in geometry.layers().iter().zip(&mut offsets) {
            if geometry.transposed() {
                let Plane { ggml_type, runs, run_bytes } = layer.values;
                writer.words([ggml_type.cast_unsigned(), run_bytes, runs]);
            } else {
                writer.row_header(layer.values);
            }
            *values = writer.skip(layer.values, cells);
        }
        writer.words((stream + 1..streams).map(|_| 0));
        let placement = Placement { geometry: geometry.clone(), cells, offsets, slots: None };
        Ok(Self { file_bytes, pieces: writer.finish(), placement })
    }

    /// The file's size in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// What lies between the chunks' bytes, in the file's order.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Calls `each` with where the payload of the chunk of `tokens` goes, in the payload's order.
    pub fn for_each_segment(
        &self,
        tokens: Range<u32>,
        each: impl FnMut(Segment) -> Result<()>,
    ) -> Result<()> {
        self.placement.for_each_segment(tokens, each)
    }
}

fn file_bytes(geometry: &Geometry, cells: u32, streams: u32) -> Option<u64> {
    const FIXED_WORDS: u64 = 6; // magic, version, tokens, streams, transposed, layers
    let cells = u64::from(cells);
    let headers = 4 * (FIXED_WORDS + u64::from(streams))
        + (4 + CELL_BYTES) * cells
        + 2 * PLANE_HEADER_BYTES * u64::from(geometry.layer_count());
    geometry.token_bytes().checked_mul(cells)?.checked_add(headers)
}

#[derive(Default)]
struct Writer {
    at: u64,
    pieces: Vec<Piece>,
    open: Vec<u8>,
}

impl Writer {
    fn words(&mut self, words: impl IntoIterator<Item = u32>) {
        for word in words {
            self.open.extend(word.to_le_bytes());
            self.at += 4;
        }
    }

    fn row_header(&mut self, plane: Plane) {
        self.words([plane.ggml_type.cast_unsigned(), plane.run_bytes, 0]); // the row is a u64
    }

    /// Leaves room for the plane's bytes and returns their offset.
    fn skip(&mut self, plane: Plane, cells: u32) -> u64 {
        let offset = self.at;
        self.close();
        self.at += plane.token_bytes() * u64::from(cells);
        offset
    }

    fn close(&mut self) {
        let bytes = std::mem::take(&mut self.open);
        if !bytes.is_empty() {
            self.pieces.push(Piece { offset: self.at - bytes.len() as u64, bytes });
        }
    }

    fn finish(mut self) -> Vec<Piece> {
        self.close();
        self.pieces
    }
}
