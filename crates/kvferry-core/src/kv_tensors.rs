//! KV in tensors `[1, heads, tokens, elements]` of one whole prompt each, as ONNX models take and give them.
//!
//! To a [copy plan](crate::copy_plan) each head of each tensor is an array, and its blocks are the prompt's
//! chunks. A chunk's payload is `[tensors, heads, tokens of the chunk, elements]`.

use std::sync::Arc;

use crate::copy_plan::{ChunkCopy, CopyPlan, CopyShape, Direction, Piece};
use crate::key::Dtype;
use crate::kv_layout::{KvLayout, Order, Planes};
use crate::prefix::{Passage, Reading, Writing};
use crate::{Error, Result};

/// What all tensors of a model have in common.
#[derive(Debug, Clone)]
pub struct KvTensors {
    /// For a prompt of one chunk.
    layout: KvLayout,
    tensors: usize,
    heads: usize,
}

/// Chunks on their way from a cache into tensors that hold just them.
pub struct Load(Copying);

/// Chunks on their way from tensors into a cache.
pub struct Store(Copying);

/// Chunks that are copied one after the other.
struct Copying {
    shape: Arc<CopyShape>,
    tensors: usize,
    heads: usize,
    /// Bytes of a head's tokens.
    head_bytes: usize,
    /// Chunks that are through.
    done: u32,
    chunks: u32,
    now: Option<Now>,
}

/// The chunk whose turn it is.
struct Now {
    plan: CopyPlan,
    passage: Passage,
    at: u64,
}

impl KvTensors {
    /// `tensors` (two for each layer) of `heads` with `head_size` elements, in chunks of `chunk_size` tokens.
    ///
    /// # Errors
    /// Sizes of 0, and sizes that together are too large.
    pub fn new(
        tensors: u32,
        heads: u32,
        head_size: u32,
        dtype: Dtype,
        chunk_size: u32,
    ) -> Result<Self> {
        let arrays = tensors.checked_mul(heads).ok_or_else(|| {
            Error::invalid(format!("{tensors} tensors of {heads} heads are too many"))
        })?;
        let layout = KvLayout {
            num_layers: arrays,
            num_blocks: 1,
            block_size: chunk_size,
            num_kv_heads: 1,
            head_size,
            dtype,
            planes: Planes::Latent,
            order: Order::Nhd,
            block_stride: None,
        };
        layout.check(chunk_size)?;
        Ok(Self { layout, tensors: tensors as usize, heads: heads as usize })
    }

    /// Bytes of a chunk.
    ///
    /// # Errors
    /// 2^53 bytes or more.
    pub fn payload_bytes(&self) -> Result<u64> {
        self.layout
            .array_bytes()
            .checked_mul(self.layout.num_layers.into())
            .filter(|bytes| *bytes < 1 << 53)
            .ok_or_else(|| Error::invalid("a chunk has 2^53 bytes or more: check heads and sizes"))
    }

    /// Loads the first `chunks` of a reading (≥ 1) into tensors of as many tokens.
    ///
    /// # Errors
    /// Tensors that would be too large.
    pub fn load(&self, chunks: u32) -> Result<Load> {
        let tokens = chunks.checked_mul(self.layout.block_size).ok_or_else(too_large)?;
        self.copying(tokens, chunks).map(Load)
    }

    /// Stores a writing's chunks out of tensors of `tokens`, a chunk's at least.
    ///
    /// # Errors
    /// Tensors that would be too large, or have not all of the chunks.
    pub fn store(&self, writing: &Writing, tokens: u32) -> Result<Store> {
        let chunks = writing.chunks();
        if chunks.last().is_some_and(|last| *last >= tokens / self.layout.block_size) {
            return Err(Error::invalid(format!(
                "tensors of {tokens} tokens do not hold the chunks {chunks:?}"
            )));
        }
        self.copying(tokens, u32::try_from(chunks.len()).unwrap_or(u32::MAX)).map(Store)
    }

    fn copying(&self, tokens: u32, chunks: u32) -> Result<Copying> {
        let chunk_size = self.layout.block_size;
        let layout = KvLayout { num_blocks: tokens / chunk_size, ..self.layout.clone() };
        layout.check(chunk_size)?;
        let token_bytes = self.layout.array_bytes() / u64::from(chunk_size);
        let head_bytes =
            token_bytes.checked_mul(tokens.into()).and_then(|bytes| usize::try_from(bytes).ok());
        Ok(Copying {
            shape: Arc::new(layout.copy_shape(chunk_size)),
            tensors: self.tensors,
            heads: self.heads,
            head_bytes: head_bytes.ok_or_else(too_large)?,
            done: 0,
            chunks,
            now: None,
        })
    }
}

impl Load {
    /// Copies on, about `bytes` (≥ 1) of them; `false` when there is no more to copy. `tensors` are the same each
    /// time.
    ///
    /// # Errors
    /// Another number of tensors or of bytes in one of them, before anything is copied; the memory's own.
    pub fn copy(
        &mut self,
        reading: &Reading,
        tensors: &mut [&mut [u8]],
        bytes: u64,
    ) -> Result<bool> {
        let copying = &mut self.0;
        copying.check(tensors.iter().map(|tensor| tensor.len()))?;
        let mut left = bytes;
        while left > 0 && copying.done < copying.chunks {
            let chunk = copying.done;
            if copying.now.is_none() {
                let Some(passage) = reading.begin(chunk, 0)? else {
                    copying.chunks = chunk;
                    break;
                };
                copying.begin(Direction::Scatter, chunk, passage)?;
            }
            let (head_bytes, heads) = (copying.head_bytes, copying.heads);
            let ended = copying.go_on(&mut left, |passage, piece| {
                let (tensor, part) = locate(piece, head_bytes, heads)?;
                let part = tensors.get_mut(tensor).and_then(|tensor| tensor.get_mut(part));
                reading.next(passage, part.ok_or_else(outside)?)
            })?;
            match ended.map(|passage| reading.end([&passage])).transpose()? {
                None => {}
                Some(true) => copying.done += 1,
                Some(false) => copying.chunks = chunk,
            }
        }
        Ok(copying.done < copying.chunks)
    }

    /// Leading chunks that are loaded. Fewer than asked for when there are no more to copy: the one behind them
    /// is not what was stored, and its part of the tensors means nothing.
    pub fn loaded(&self) -> u32 {
        self.0.done
    }
}

impl Store {
    /// Copies on, as [`Load::copy`] does.
    ///
    /// # Errors
    /// Those of [`Load::copy`].
    pub fn copy(&mut self, writing: &Writing, tensors: &[&[u8]], bytes: u64) -> Result<bool> {
        let copying = &mut self.0;
        copying.check(tensors.iter().map(|tensor| tensor.len()))?;
        let mut left = bytes;
        while left > 0 && copying.done < copying.chunks {
            if copying.now.is_none() {
                let place = copying.done as usize;
                let chunk = *writing.chunks().get(place).ok_or_else(outside)?;
                copying.begin(Direction::Gather, chunk, writing.begin(place)?)?;
            }
            let (head_bytes, heads) = (copying.head_bytes, copying.heads);
            let ended = copying.go_on(&mut left, |passage, piece| {
                let (tensor, part) = locate(piece, head_bytes, heads)?;
                let part = tensors.get(tensor).and_then(|tensor| tensor.get(part));
                writing.next(passage, part.ok_or_else(outside)?)
            })?;
            if let Some(passage) = ended {
                writing.end(&passage)?;
                copying.done += 1;
            }
        }
        Ok(copying.done < copying.chunks)
    }
}

impl Copying {
    fn check(&self, lengths: impl ExactSizeIterator<Item = usize>) -> Result<()> {
        if lengths.len() != self.tensors {
            return Err(Error::invalid(format!(
                "{} tensors were given for the model's {}",
                lengths.len(),
                self.tensors
            )));
        }
        let wanted = self.head_bytes.checked_mul(self.heads).ok_or_else(too_large)?;
        for (number, length) in lengths.enumerate() {
            if length != wanted {
                return Err(Error::invalid(format!(
                    "tensor {number} has {length} bytes instead of {wanted}: was it transferred or disposed of?"
                )));
            }
        }
        Ok(())
    }

    fn begin(&mut self, direction: Direction, chunk: u32, passage: Passage) -> Result<()> {
        let whole = ChunkCopy { blocks: &[chunk], skip: 0, slot: 0 };
        let plan = self.shape.plan(direction, &[whole], self.shape.object_bytes())?;
        self.now = Some(Now { plan, passage, at: 0 });
        Ok(())
    }

    /// Copies up to `left` bytes of the chunk whose turn it is; its passage when those were its last.
    fn go_on(
        &mut self,
        left: &mut u64,
        mut copy: impl FnMut(&mut Passage, Piece) -> Result<()>,
    ) -> Result<Option<Passage>> {
        // Taken: after an error nothing goes on from the middle of a piece.
        let Some(Now { plan, mut passage, at }) = self.now.take() else { return Ok(None) };
        let end = plan.bytes().min(at.saturating_add(*left));
        // An array's part of a chunk is one piece, so they come in the payload's order.
        plan.pieces(at..end, |piece| copy(&mut passage, piece))?;
        *left -= end - at;
        if end == plan.bytes() {
            return Ok(Some(passage));
        }
        self.now = Some(Now { plan, passage, at: end });
        Ok(None)
    }
}

/// A piece's tensor, and the bytes there.
fn locate(
    piece: Piece,
    head_bytes: usize,
    heads: usize,
) -> Result<(usize, std::ops::Range<usize>)> {
    let at = usize::try_from(piece.at).map_err(|_| outside())?;
    let length = usize::try_from(piece.length).map_err(|_| outside())?;
    let from = piece.array % heads * head_bytes + at;
    Ok((piece.array / heads, from..from + length))
}

fn too_large() -> Error {
    Error::invalid("the tensors would be larger than memory can be: give fewer tokens")
}

fn outside() -> Error {
    Error::new(crate::ErrorCode::Internal, "the plan of a copy leaves the tensors")
}
