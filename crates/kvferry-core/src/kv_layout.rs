//! How an engine's KV memory is laid out.

use crate::copy_plan::{Blocks, CopyShape, Heads};
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
    /// Bytes from a block to the next, where they do not follow each other.
    pub block_stride: Option<u64>,
}

impl KvLayout {
    /// Checks that the sizes make sense, for chunks of `chunk_size` tokens.
    ///
    /// # Errors
    /// Sizes of 0, blocks that do not divide the chunk, that overlap or whose stride is no multiple of an
    /// element, heads in a latent plane, arrays of 2^53 bytes or more.
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
        if let Some(stride) = self.block_stride
            && (self.exact_block_bytes().is_none_or(|bytes| stride < bytes)
                || !stride.is_multiple_of(self.dtype.size()))
        {
            return Err(Error::invalid(format!(
                "blocks cannot lie {stride} bytes apart: give the bytes from one to the next, at least a \
                 block's, in whole elements"
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

    /// What copies between the arrays and chunks of `chunk_size` tokens have in common; call
    /// [`KvLayout::check`] first. An object is `[planes, layers, tokens, heads, elements]`.
    pub fn copy_shape(&self, chunk_size: u32) -> CopyShape {
        let (head, tokens) = (self.head_bytes(), u64::from(self.block_size));
        let token = self.token_bytes();
        let array_of_object = token * u64::from(chunk_size);
        let layers = u64::from(self.num_layers);
        let planes = self.planes() as u64;
        let base = |layer: u64, plane: u64| (plane * layers + layer) * array_of_object;
        let bases = (0..layers)
            .flat_map(|layer| (0..planes).map(move |plane| base(layer, plane)))
            .collect();
        let apart = self.order == Order::Hnd && self.num_kv_heads > 1 && self.block_size > 1;
        let heads = Heads { count: self.num_kv_heads.into(), array: tokens * head };
        CopyShape {
            bases,
            array_bytes: self.array_bytes(),
            object_bytes: planes * layers * array_of_object,
            element_bytes: self.dtype.size(),
            blocks: Blocks {
                count: self.num_blocks,
                tokens,
                stride: self.stride(),
                bytes: tokens * token,
                token,
                heads: apart.then_some(heads),
            },
        }
    }

    /// Bytes of a token in one array; call [`KvLayout::check`] first.
    pub(crate) fn token_bytes(&self) -> u64 {
        self.head_bytes() * u64::from(self.num_kv_heads)
    }

    fn planes(&self) -> usize {
        if self.planes == Planes::Separate { 2 } else { 1 }
    }

    fn head_bytes(&self) -> u64 {
        u64::from(self.head_size) * self.halves() * self.dtype.size()
    }

    fn halves(&self) -> u64 {
        if self.planes == Planes::Fused { 2 } else { 1 }
    }

    /// Bytes from a block to the next.
    fn stride(&self) -> u64 {
        self.block_stride.or_else(|| self.exact_block_bytes()).unwrap_or(u64::MAX)
    }

    fn exact_block_bytes(&self) -> Option<u64> {
        [self.block_size, self.num_kv_heads, self.head_size]
            .iter()
            .try_fold(self.dtype.size() * self.halves(), |bytes, size| {
                bytes.checked_mul(u64::from(*size))
            })
    }

    fn exact_array_bytes(&self) -> Option<u64> {
        let block = self.exact_block_bytes()?;
        let before = self.stride().checked_mul(u64::from(self.num_blocks.saturating_sub(1)))?;
        before.checked_add(block)
    }
}

#[cfg(test)]
mod tests {
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
            block_stride: None,
        }
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
        let huge = KvLayout { num_blocks: u32::MAX, head_size: u32::MAX, ..good.clone() };
        assert!(huge.check(16).is_err());
        for (stride, fine) in [(80, true), (160, true), (79, false), (81, false), (u64::MAX, false)]
        {
            let strided = KvLayout { block_stride: Some(stride), ..good.clone() };
            assert_eq!(
                strided.check(16).is_ok(),
                fine,
                "a block has 80 bytes, an element 2: {stride}"
            );
        }
    }
}
