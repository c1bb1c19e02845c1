use std::ops::Range;

use super::plan::Placement;
use super::{
    CELL_BYTES, Geometry, LAYERS_MAX, Layer, MAGIC, PLANE_HEADER_BYTES, Plane, Segment, VERSION,
    invalid,
};
use crate::{Error, ErrorCode, Result};

/// Streams that a file may have at most: llama.cpp's `LLAMA_MAX_SEQ`.
pub const STREAMS_MAX: u32 = 256;

/// A state file that was checked: it holds the attention state of tokens `0..tokens().len()`, and
/// nothing else.
#[derive(Debug, Clone)]
pub struct StateFile {
    tokens: Vec<u32>,
    streams: u32,
    sequence: u32,
    placement: Placement,
}

impl StateFile {
    /// Checks `bytes`, which must be one whole file.
    ///
    /// Errors: `UNSUPPORTED_MODEL` where the file shows a model whose state cannot be cut by
    /// tokens (sliding window, M-RoPE, no values), else `INVALID_STATE` with what is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader { bytes, at: 0 };
        let magic = reader.u32("the magic number")?;
        if magic != MAGIC {
            return Err(invalid(format!("{magic:#x} is not the magic number of a state file")));
        }
        let version = reader.u32("the version")?;
        if version != VERSION {
            return Err(invalid(format!(
                "state files of version {version} cannot be read, only version {VERSION}; use a release of llama.cpp that writes it"
            )));
        }
        let count = reader.u32("the number of tokens")?;
        reader.expect(count, 4, "tokens")?;
        let mut tokens = Vec::with_capacity(count as usize);
        for position in 0..count {
            let token = reader.u32("tokens")?;
            if i32::try_from(token).is_err() {
                return Err(invalid(format!("token {position} is negative")));
            }
            tokens.push(token);
        }

        let start = reader.clone();
        match Section::parse(&mut reader, &Rules { cells: Some(count), cell_extension: 0 }) {
            Ok(Section { streams, sequence, placement }) if reader.left() == 0 => {
                Ok(Self { tokens, streams, sequence, placement })
            }
            Ok(_) => Err(trailing(reader)),
            Err(error) => Err(multi_position(&start, count).unwrap_or(error)),
        }
    }

    /// The tokens whose state the file holds, at least one.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Streams of the context that saved the file.
    pub fn streams(&self) -> u32 {
        self.streams
    }

    /// The sequence that was saved.
    pub fn sequence(&self) -> u32 {
        self.sequence
    }

    /// The state's shape.
    pub fn geometry(&self) -> &Geometry {
        &self.placement.geometry
    }

    /// Calls `each` with where the payload of a chunk of `tokens` lies, in the payload's order.
    pub fn for_each_segment(
        &self,
        tokens: Range<u32>,
        each: impl FnMut(Segment) -> Result<()>,
    ) -> Result<()> {
        self.placement.for_each_segment(tokens, each)
    }
}

fn unsupported(message: &str) -> Error {
    Error::new(ErrorCode::UnsupportedModel, message)
}

fn windowed() -> Error {
    unsupported(
        "a sliding-window model's state lacks the tokens that left the window, so it cannot be cached",
    )
}

/// What follows the attention state: a sliding-window model saves a second cache.
fn trailing(mut reader: Reader<'_>) -> Error {
    let left = reader.left();
    match Section::parse(&mut reader, &Rules { cells: None, cell_extension: 0 }) {
        Ok(_) if reader.left() == 0 => windowed(),
        _ => invalid(format!(
            "{left} bytes follow the attention state; hybrid models append recurrent state, which cannot be cached"
        )),
    }
}

/// Models with more than one position a token (M-RoPE) save it with each cell.
fn multi_position(section: &Reader<'_>, tokens: u32) -> Option<Error> {
    [8, 12].into_iter().find_map(|cell_extension| {
        let mut reader = section.clone();
        Section::parse(&mut reader, &Rules { cells: Some(tokens), cell_extension }).ok()?;
        (reader.left() == 0).then(|| {
            unsupported("a model with several positions for each token (M-RoPE) cannot be cached")
        })
    })
}

struct Rules {
    /// Cells that the section must have, at positions from 0; `None`: any number, anywhere.
    cells: Option<u32>,
    /// Bytes of each cell between its count of sequences and its sequence.
    cell_extension: u64,
}

/// One cache: its streams, of which one holds all cells.
struct Section {
    streams: u32,
    sequence: u32,
    placement: Placement,
}

impl Section {
    fn parse(reader: &mut Reader<'_>, rules: &Rules) -> Result<Self> {
        let streams = reader.u32("the number of streams")?;
        if !(1..=STREAMS_MAX).contains(&streams) {
            return Err(invalid(format!("{streams} streams are not in 1..={STREAMS_MAX}")));
        }
        reader.expect(streams, 4, "streams")?;
        let mut found = None;
        for stream in 0..streams {
            let cells = reader.u32("the number of cells")?;
            if cells == 0 {
                continue;
            }
            if found.is_some() {
                return Err(invalid(
                    "two streams hold cells, so the file has more than one sequence",
                ));
            }
            let (sequence, slots) = read_cells(reader, cells, rules)?;
            if streams > 1 && sequence != stream {
                return Err(invalid(format!("stream {stream} holds cells of sequence {sequence}")));
            }
            let after = 4 * u64::from(streams - stream - 1);
            let placement = read_planes(reader, cells, slots, after)?;
            found = Some(Self { streams, sequence, placement });
        }
        found.ok_or_else(|| invalid("the file holds no cells"))
    }
}

/// The sequence of all cells, and the slot of each position unless cells lie in that order.
fn read_cells(
    reader: &mut Reader<'_>,
    cells: u32,
    rules: &Rules,
) -> Result<(u32, Option<Vec<u32>>)> {
    const VACANT: u32 = u32::MAX;
    reader.expect(cells, CELL_BYTES + rules.cell_extension, "cells")?;
    if let Some(tokens) = rules.cells.filter(|tokens| cells > *tokens) {
        return Err(invalid(format!("{cells} cells for {tokens} tokens")));
    }
    let positions = rules.cells.unwrap_or(0);
    let mut slots = vec![VACANT; positions as usize];
    let mut sequence = None;
    let mut in_order = true;
    for slot in 0..cells {
        let position = reader.u32("cells")?;
        let sequences = reader.u32("cells")?;
        if sequences != 1 {
            return Err(invalid(format!("cell {slot} is of {sequences} sequences, not of one")));
        }
        reader.skip(rules.cell_extension, "cells")?;
        let of = reader.u32("cells")?;
        if of >= STREAMS_MAX || *sequence.get_or_insert(of) != of {
            return Err(invalid(format!("cell {slot} is of sequence {of}, unlike the first")));
        }
        if rules.cells.is_none() {
            continue;
        }
        match slots.get_mut(position as usize) {
            Some(vacant @ &mut VACANT) => *vacant = slot,
            Some(_) => return Err(invalid(format!("two cells are at position {position}"))),
            None => {
                return Err(invalid(format!(
                    "cell {slot} is at position {position} of {positions}"
                )));
            }
        }
        in_order &= position == slot;
    }
    if cells < positions {
        return Err(windowed());
    }
    Ok((sequence.unwrap_or_default(), (!in_order).then_some(slots)))
}

/// `after`: bytes that the section has behind its planes.
fn read_planes(
    reader: &mut Reader<'_>,
    cells: u32,
    slots: Option<Vec<u32>>,
    after: u64,
) -> Result<Placement> {
    let transposed = match reader.u32("the layout of values")? {
        0 => false,
        1 => true,
        other => return Err(invalid(format!("{other} for transposed values is neither 0 nor 1"))),
    };
    let count = reader.u32("the number of layers")?;
    if !(1..=LAYERS_MAX).contains(&count) {
        return Err(invalid(format!("{count} layers are not in 1..={LAYERS_MAX}")));
    }
    reader.expect(count, PLANE_HEADER_BYTES, "layers")?;
    let mut keys = Vec::with_capacity(count as usize);
    for layer in 0..count {
        let plane = reader.row_header(layer)?;
        keys.push((plane, reader.plane(plane, cells)?));
    }
    if reader.left() == after {
        return Err(unsupported(
            "a model whose layers keep no values (multi-head latent attention) cannot be cached",
        ));
    }
    let mut layers = Vec::with_capacity(keys.len());
    let mut offsets = Vec::with_capacity(keys.len());
    for (layer, (keys, keys_offset)) in (0..).zip(keys) {
        let values = if transposed {
            let ggml_type = reader.i32("a layer's values")?;
            let run_bytes = reader.u32("a layer's values")?;
            let runs = reader.u32("a layer's values")?;
            Plane { ggml_type, runs, run_bytes }
        } else {
            reader.row_header(layer)?
        };
        layers.push(Layer { keys, values });
        offsets.push([keys_offset, reader.plane(values, cells)?]);
    }
    let geometry = Geometry::new(transposed, layers)?;
    Ok(Placement { geometry, cells, offsets, slots })
}

#[derive(Clone)]
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn left(&self) -> u64 {
        self.bytes.len().saturating_sub(self.at) as u64
    }

    /// Checks a count before anything is made for it.
    fn expect(&self, count: u32, bytes_each: u64, what: &str) -> Result<()> {
        // Both factors are far below 2^32, the product fits.
        if u64::from(count) * bytes_each > self.left() {
            return Err(invalid(format!("the file ends before its {count} {what}")));
        }
        Ok(())
    }

    fn take<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let taken = self.bytes.get(self.at..).and_then(|rest| rest.first_chunk::<N>());
        let taken = *taken.ok_or_else(|| invalid(format!("the file ends within {what}")))?;
        self.at += N;
        Ok(taken)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.take(what).map(u32::from_le_bytes)
    }

    fn i32(&mut self, what: &str) -> Result<i32> {
        self.take(what).map(i32::from_le_bytes)
    }

    fn skip(&mut self, bytes: u64, what: &str) -> Result<()> {
        let end = usize::try_from(bytes).ok().and_then(|bytes| self.at.checked_add(bytes));
        match end.filter(|end| *end <= self.bytes.len()) {
            Some(end) => {
                self.at = end;
                Ok(())
            }
            None => Err(invalid(format!("the file ends within {what}"))),
        }
    }

    fn row_header(&mut self, layer: u32) -> Result<Plane> {
        let ggml_type = self.i32("a layer's header")?;
        let row = u64::from_le_bytes(self.take("a layer's header")?);
        let run_bytes = u32::try_from(row)
            .map_err(|_| invalid(format!("layer {layer} has rows of {row} bytes")))?;
        Ok(Plane { ggml_type, runs: 1, run_bytes })
    }

    /// Passes the plane's bytes and returns their offset.
    fn plane(&mut self, plane: Plane, cells: u32) -> Result<u64> {
        let offset = self.at as u64;
        let bytes = plane.token_bytes().checked_mul(u64::from(cells));
        self.skip(bytes.unwrap_or(u64::MAX), "a layer")?;
        Ok(offset)
    }
}
