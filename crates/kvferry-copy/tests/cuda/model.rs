//! What copies must do, by plain loops over tokens and heads.

use std::sync::Arc;

use kvferry_core::copy_plan::CopyShape;
use kvferry_core::key::Dtype;
use kvferry_core::kv_layout::{KvLayout, Order, Planes};

pub(crate) const CHUNK: u32 = 16;

pub(crate) fn layout(planes: Planes, order: Order, gap: u64) -> KvLayout {
    let mut layout = KvLayout {
        num_layers: 3,
        num_blocks: 12,
        block_size: 4,
        num_kv_heads: if planes == Planes::Latent { 1 } else { 2 },
        head_size: 24,
        dtype: Dtype::new("bfloat16").unwrap(),
        planes,
        order,
        block_stride: None,
    };
    layout.block_stride = (gap > 0).then_some(block_bytes(&layout) + gap);
    layout.check(CHUNK).unwrap();
    layout
}

/// One array a layer, whose blocks of 16 tokens have `block` bytes.
pub(crate) fn flat(num_layers: u32, num_blocks: u32, block: u32) -> KvLayout {
    KvLayout {
        num_layers,
        num_blocks,
        block_size: CHUNK,
        num_kv_heads: 1,
        head_size: block / CHUNK / 2,
        dtype: Dtype::new("bfloat16").unwrap(),
        planes: Planes::Latent,
        order: Order::Nhd,
        block_stride: None,
    }
}

pub(crate) fn shape(layout: &KvLayout) -> Arc<CopyShape> {
    Arc::new(layout.copy_shape(CHUNK))
}

fn head_bytes(layout: &KvLayout) -> u64 {
    let halves = if layout.planes == Planes::Fused { 2 } else { 1 };
    u64::from(layout.head_size) * 2 * halves
}

fn block_bytes(layout: &KvLayout) -> u64 {
    u64::from(layout.block_size * layout.num_kv_heads) * head_bytes(layout)
}

/// Calls `visit` with array, place in it, place in the object and bytes, for each head of each token of a chunk
/// that lies in `blocks`, but for the first `skip` tokens.
pub(crate) fn heads(
    layout: &KvLayout,
    blocks: &[u32],
    skip: u32,
    mut visit: impl FnMut(usize, usize, usize, usize),
) {
    let (head, count) = (head_bytes(layout), u64::from(layout.num_kv_heads));
    let (tokens, layers) = (u64::from(layout.block_size), u64::from(layout.num_layers));
    let planes = layout.arrays() as u64 / layers;
    let stride = layout.block_stride.unwrap_or_else(|| block_bytes(layout));
    for token in u64::from(skip)..blocks.len() as u64 * tokens {
        let block = u64::from(blocks[usize::try_from(token / tokens).unwrap()]);
        let within = token % tokens;
        for (layer, plane, number) in (0..layers)
            .flat_map(|layer| (0..planes).map(move |plane| (layer, plane)))
            .flat_map(|(layer, plane)| (0..count).map(move |number| (layer, plane, number)))
        {
            let at = match layout.order {
                Order::Nhd => within * count + number,
                Order::Hnd => number * tokens + within,
            };
            let object = ((plane * layers + layer) * u64::from(CHUNK) + token) * count + number;
            visit(
                usize::try_from(layer * planes + plane).unwrap(),
                usize::try_from(block * stride + at * head).unwrap(),
                usize::try_from(object * head).unwrap(),
                usize::try_from(head).unwrap(),
            );
        }
    }
}

/// Bytes that no two seeds share.
pub(crate) fn noise(seed: u64, bytes: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    });
    let mut noise: Vec<u8> = Vec::with_capacity(usize::try_from(bytes + 8).unwrap());
    for word in words.take(usize::try_from(bytes.div_ceil(8)).unwrap()) {
        noise.extend(word.to_le_bytes());
    }
    noise.truncate(usize::try_from(bytes).unwrap());
    noise
}
