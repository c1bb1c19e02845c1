//! Where a chunk's KV lies in an engine's blocks, and where in the chunk's object.

use crate::key::{Dtype, Layout};
use crate::{Error, Result};

/// The order of a block's dimensions, outermost first (FlashInfer's names).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// tokens, heads, dimensions.
    Nhd,
    /// heads, tokens, dimensions.
    Hnd,
}

/// What a layer's KV consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Planes {
    /// K and V, each an array of blocks.
    Separate,
    /// One array of blocks, where each head has K's and then V's dimensions.
    Fused,
    /// One array of blocks of latent vectors, as MLA has it.
    Latent,
}

/// An engine's KV memory: for each layer one array of blocks, or two with [`Planes::Separate`] (K, V).
#[derive(Debug, Clone)]
pub struct KvLayout {
    /// Layers of this rank.
    pub num_layers: u32,
    /// Blocks of each array.
    pub num_blocks: u32,
    /// Tokens of a block.
    pub block_size: u32,
    /// KV heads of this rank.
    pub num_kv_heads: u32,
    /// Elements of one head of K, or of V; of the latent vector with [`Planes::Latent`].
    pub head_size: u32,
    /// Element type.
    pub dtype: Dtype,
    /// What a layer consists of.
    pub planes: Planes,
    /// The order within a block.
    pub order: Order,
}

/// Bytes that lie together in an array and in an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Counted over layers, then planes.
    pub array: usize,
    /// Bytes from the array's start.
    pub at: usize,
    /// Bytes from the object's start.
    pub object: u64,
    /// Bytes.
    pub length: usize,
}

impl KvLayout {
    /// Checks that the sizes make sense, for chunks of `chunk_size` tokens.
    ///
    /// # Errors
    /// Sizes of 0, blocks that do not divide the chunk, heads in a latent plane, arrays of 2^53 bytes or more.
    pub fn check(&self, chunk_size: u32) -> Result<()> {
        let sizes = [
            ("layers", self.num_layers),
            ("blocks", self.num_blocks),
            ("tokens in a block", self.block_size),
            ("KV heads", self.num_kv_heads),
            ("elements in a head", self.head_size),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(Error::invalid(format!(
                "there are 0 {name}: give the engine's own number"
            )));
        }
        if !chunk_size.is_multiple_of(self.block_size) {
            return Err(Error::invalid(format!(
                "a chunk of {chunk_size} tokens is not a whole number of blocks of {}: start the server with \
                 another chunk size, or the engine with another block size",
                self.block_size
            )));
        }
        if self.planes == Planes::Latent && self.num_kv_heads != 1 {
            return Err(Error::invalid(format!(
                "a latent plane has one head, not {}: its size goes to the head size",
                self.num_kv_heads
            )));
        }
        self.exact_array_bytes().filter(|bytes| *bytes < 1 << 53).map(drop).ok_or_else(|| {
            Error::invalid("the arrays have 2^53 bytes or more: check blocks, heads and sizes")
        })
    }

    /// Arrays: layers, twice with separate K and V.
    pub fn arrays(&self) -> usize {
        self.num_layers as usize * self.planes()
    }

    /// Bytes of one array; call [`KvLayout::check`] first.
    pub fn array_bytes(&self) -> u64 {
        self.exact_array_bytes().unwrap_or(u64::MAX)
    }

    /// How the objects are announced, as vLLM's connector does for the same memory.
    pub fn registration(&self, model_name: &str, world_size: u32, chunk_size: u32) -> Layout {
        let halves = if self.planes == Planes::Fused { 2 } else { 1 };
        Layout {
            model_name: model_name.to_owned(),
            world_size,
            block_size: self.block_size,
            num_layers: self.num_layers,
            hidden_dim_size: self
                .num_kv_heads
                .saturating_mul(self.head_size)
                .saturating_mul(halves),
            dtype: self.dtype.clone(),
            single_plane: self.planes != Planes::Separate,
            num_physical_slots: Some(chunk_size),
        }
    }

    /// Calls `visit` for the pieces of one chunk of `tokens` tokens, whose tokens lie in `blocks` in this order,
    /// without its first `skip` tokens. With fewer blocks than it has, its end is left out. Blocks that follow
    /// each other make one piece where the order allows it.
    ///
    /// # Errors
    /// A block beyond the engine's, before any piece is visited; what `visit` says.
    pub fn pieces(
        &self,
        blocks: &[u32],
        tokens: u32,
        skip: u32,
        mut visit: impl FnMut(Piece) -> Result<()>,
    ) -> Result<()> {
        self.check_blocks(blocks)?;
        let tokens = tokens as usize;
        let head = self.head_bytes();
        let hidden = head * self.num_kv_heads as usize;
        let runs = self.runs(blocks, skip as usize);
        for array in 0..self.arrays() {
            let (layer, plane) = (array / self.planes(), array % self.planes());
            let first = (plane * self.num_layers as usize + layer) * tokens * hidden;
            for run in &runs {
                if self.order == Order::Nhd || self.num_kv_heads == 1 {
                    visit(Piece {
                        array,
                        at: run.from * hidden,
                        object: (first + run.token * hidden) as u64,
                        length: run.length * hidden,
                    })?;
                    continue;
                }
                let size = self.block_size as usize;
                for token in 0..run.length {
                    let (block, inside) = ((run.from + token) / size, (run.from + token) % size);
                    for number in 0..self.num_kv_heads as usize {
                        visit(Piece {
                            array,
                            at: ((block * self.num_kv_heads as usize + number) * size + inside)
                                * head,
                            object: (first + (run.token + token) * hidden + number * head) as u64,
                            length: head,
                        })?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Refuses blocks beyond the engine's.
    pub fn check_blocks(&self, blocks: &[u32]) -> Result<()> {
        match blocks.iter().find(|block| **block >= self.num_blocks) {
            None => Ok(()),
            Some(block) => Err(Error::invalid(format!(
                "block {block} is beyond the engine's {} blocks",
                self.num_blocks
            ))),
        }
    }

    /// Tokens that lie behind each other in the arrays.
    fn runs(&self, blocks: &[u32], skip: usize) -> Vec<Run> {
        let size = self.block_size as usize;
        let mut runs: Vec<Run> = Vec::with_capacity(blocks.len());
        for (number, block) in blocks.iter().enumerate() {
            let skipped = skip.saturating_sub(number * size).min(size);
            let run = Run {
                token: number * size + skipped,
                from: *block as usize * size + skipped,
                length: size - skipped,
            };
            match runs.last_mut() {
                Some(last) if last.from + last.length == run.from => last.length += run.length,
                _ if run.length == 0 => {}
                _ => runs.push(run),
            }
        }
        runs
    }

    fn planes(&self) -> usize {
        if self.planes == Planes::Separate { 2 } else { 1 }
    }

    fn head_bytes(&self) -> usize {
        let halves = if self.planes == Planes::Fused { 2 } else { 1 };
        self.head_size as usize * halves * usize::try_from(self.dtype.size()).unwrap_or(1)
    }

    fn exact_array_bytes(&self) -> Option<u64> {
        let halves = if self.planes == Planes::Fused { 2 } else { 1 };
        [self.num_blocks, self.block_size, self.num_kv_heads, self.head_size, halves]
            .iter()
            .try_fold(self.dtype.size(), |bytes, size| bytes.checked_mul(u64::from(*size)))
    }
}

/// Tokens of a chunk in their order.
struct Run {
    /// The first, counted from the chunk's.
    token: usize,
    /// The same token, counted from the arrays' start.
    from: usize,
    length: usize,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layout(planes: Planes, order: Order) -> KvLayout {
        KvLayout {
            num_layers: 3,
            num_blocks: 8,
            block_size: 4,
            num_kv_heads: if planes == Planes::Latent { 1 } else { 2 },
            head_size: 5,
            dtype: Dtype::new("bfloat16").unwrap(),
            planes,
            order,
        }
    }

    /// Where an element lies in its array: spelt out from the shapes, one element at a time.
    fn element(layout: &KvLayout, block: usize, token: usize, head: usize, byte: usize) -> usize {
        let heads = layout.num_kv_heads as usize;
        let (size, bytes) = (layout.block_size as usize, layout.head_bytes());
        match layout.order {
            Order::Nhd => ((block * size + token) * heads + head) * bytes + byte,
            Order::Hnd => ((block * heads + head) * size + token) * bytes + byte,
        }
    }

    proptest! {
        #[test]
        fn each_byte_of_the_chunk_has_its_place_and_no_other(
            planes in prop::sample::select(vec![Planes::Separate, Planes::Fused, Planes::Latent]),
            order in prop::sample::select(vec![Order::Nhd, Order::Hnd]),
            blocks in Just((0u32..8).collect::<Vec<_>>()).prop_shuffle(),
            count in 1usize..6,
            skip in 0u32..24,
            longer in 0usize..3,
        ) {
            let layout = layout(planes, order);
            layout.check(16).unwrap();
            let blocks = &blocks[..count];
            let (size, bytes) = (layout.block_size as usize, layout.head_bytes());
            let heads = layout.num_kv_heads as usize;
            let tokens = count * size;
            let chunk_tokens = tokens + longer * size;
            let mut expected = std::collections::HashMap::new();
            for array in 0..layout.arrays() {
                let (layer, plane) = (array / layout.planes(), array % layout.planes());
                for token in skip as usize..tokens {
                    for head in 0..heads {
                        for byte in 0..bytes {
                            // [planes, layers, tokens, heads, dimensions]
                            let plane_and_layer = plane * layout.num_layers as usize + layer;
                            let object = ((plane_and_layer * chunk_tokens + token) * heads + head) * bytes + byte;
                            let block = blocks[token / size] as usize;
                            let at = element(&layout, block, token % size, head, byte);
                            expected.insert((array, at), object as u64);
                        }
                    }
                }
            }
            let mut found = std::collections::HashMap::new();
            layout.pieces(blocks, u32::try_from(chunk_tokens).unwrap(), skip, |piece| {
                for byte in 0..piece.length {
                    let twice = found.insert((piece.array, piece.at + byte), piece.object + byte as u64);
                    assert_eq!(twice, None);
                }
                Ok(())
            }).unwrap();
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn blocks_in_a_row_are_one_piece() {
        let layout = layout(Planes::Separate, Order::Nhd);
        let mut pieces = Vec::new();
        let visit = |piece| {
            pieces.push(piece);
            Ok(())
        };
        layout.pieces(&[2, 3, 4, 7], 16, 0, visit).unwrap();
        assert_eq!(pieces.len(), 6 * 2, "for each of six arrays");
    }

    #[test]
    fn a_block_beyond_the_engine_is_refused_before_anything_is_copied() {
        let layout = layout(Planes::Fused, Order::Hnd);
        let error = layout.pieces(&[0, 8], 8, 0, |_| panic!("nothing is visited")).unwrap_err();
        assert!(error.message.contains("block 8"), "{error}");
    }

    #[test]
    fn an_object_is_announced_as_vllm_does_it() {
        let fused = layout(Planes::Fused, Order::Hnd).registration("m", 1, 16);
        assert_eq!((fused.hidden_dim_size, fused.single_plane), (20, true));
        let separate = layout(Planes::Separate, Order::Nhd).registration("m", 1, 16);
        assert_eq!(separate.shape(16), [2, 3, 16, 10]);
        let latent = layout(Planes::Latent, Order::Nhd).registration("m", 1, 16);
        assert_eq!(latent.shape(16), [3, 16, 5]);
    }

    #[test]
    fn sizes_that_make_no_sense_are_refused() {
        let good = layout(Planes::Separate, Order::Nhd);
        assert!(good.check(16).is_ok());
        assert!(good.check(18).unwrap_err().message.contains("18 tokens"));
        assert!(KvLayout { num_layers: 0, ..good.clone() }.check(16).is_err());
        let latent = KvLayout { planes: Planes::Latent, ..good.clone() };
        assert!(latent.check(16).unwrap_err().message.contains("one head, not 2"));
        let huge = KvLayout { num_blocks: u32::MAX, head_size: u32::MAX, ..good };
        assert!(huge.check(16).is_err());
    }
}
