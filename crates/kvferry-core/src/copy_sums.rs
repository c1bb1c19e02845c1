//! Checksums of what copies move, so that nothing is read twice.

use crc_fast::{CrcAlgorithm, Digest};

use crate::checksum::{self, Joiner};
use crate::copy_plan::{CopyPlan, Stretch};
use crate::{Error, ErrorCode, Result};

/// The checksums of a plan's chunks, as far as their stretches are summed: CRC-64/NVME, of all bytes of an object.
#[derive(Debug, Default)]
pub struct CopySums(Vec<Summed>);

/// A stretch that is summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Summed {
    chunk: usize,
    at: u64,
    length: u64,
    sum: u64,
}

/// The checksum of one stretch, while its bytes come.
#[derive(Debug)]
pub struct StretchSum(Digest);

impl StretchSum {
    /// What a checksum begins with: the first eight bytes are taken exclusive or this.
    pub const SEED: u64 = !0;

    /// CRC-64/NVME's, without its x^64; the highest bit is the lowest power.
    pub const POLYNOMIAL: u64 = checksum::POLYNOMIAL;

    /// Of no bytes yet.
    #[expect(clippy::new_without_default, reason = "it is begun, never had")]
    pub fn new() -> Self {
        Self(Digest::new(CrcAlgorithm::Crc64Nvme))
    }

    /// The stretch's next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Of a stretch's first bytes, of which only some are known that leave the same remainder, divided by the polynomial,
    /// where [`StretchSum::SEED`] was added to the first eight.
    pub fn from_folded(folded: &[u8]) -> Self {
        Self(remainder(folded))
    }

    /// The stretch's next `length` bytes, of which only some are known that leave the same remainder.
    pub fn update_folded(&mut self, folded: &[u8], length: u64) {
        let state = remainder(folded).get_state();
        let state = Joiner::default().join(self.0.get_state(), state, length);
        self.0 = Digest::new_with_init_state(CrcAlgorithm::Crc64Nvme, state);
    }

    /// The checksum of what came.
    pub fn finish(&self) -> u64 {
        self.0.finalize()
    }
}

fn remainder(folded: &[u8]) -> Digest {
    let mut remainder = Digest::new_with_init_state(CrcAlgorithm::Crc64Nvme, 0);
    remainder.update(folded);
    remainder
}

impl CopySums {
    /// A stretch, all of whose bytes came.
    pub fn add(&mut self, stretch: &Stretch, sum: &StretchSum) {
        let Stretch { chunk, at, length, .. } = *stretch;
        self.0.push(Summed { chunk, at, length, sum: sum.finish() });
    }

    /// Those of another part of the plan.
    pub fn append(&mut self, mut other: Self) {
        self.0.append(&mut other.0);
    }

    /// One checksum for each of the plan's chunks.
    ///
    /// # Errors
    /// Not all of the plan's parts were summed, or one twice.
    pub fn finish(mut self, plan: &CopyPlan) -> Result<Vec<u64>> {
        self.0.sort_unstable();
        let mut stretches = self.0.into_iter().peekable();
        let object = plan.shape().object_bytes();
        let mut joiner = Joiner::default();
        let sums: Option<Vec<u64>> = (0..plan.chunks())
            .map(|chunk| {
                let (mut at, mut sum) = (0, 0);
                while let Some(next) = stretches.next_if(|next| next.chunk == chunk) {
                    if next.at != at {
                        return None;
                    }
                    at += next.length;
                    sum = joiner.join(sum, next.sum, next.length);
                }
                (at == object).then_some(sum)
            })
            .collect();
        sums.filter(|_| stretches.next().is_none()).ok_or_else(|| {
            Error::new(ErrorCode::Internal, "not every byte of the chunks was summed once")
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::copy_plan::{ChunkCopy, Direction};
    use crate::key::Dtype;
    use crate::kv_layout::{KvLayout, Order, Planes};

    #[test]
    fn stretches_in_any_order_make_the_sum_of_each_object() {
        let layout = KvLayout {
            num_layers: 3,
            num_blocks: 8,
            block_size: 4,
            num_kv_heads: 2,
            head_size: 5,
            dtype: Dtype::new("bfloat16").unwrap(),
            planes: Planes::Separate,
            order: Order::Nhd,
            block_stride: None,
        };
        let shape = Arc::new(layout.copy_shape(16));
        let chunks = [
            ChunkCopy { blocks: &[0, 1, 2, 3], skip: 5, slot: 0 },
            ChunkCopy { blocks: &[4, 5], skip: 0, slot: 4096 },
        ];
        let plan = shape.plan(Direction::Scatter, &chunks, 8192).unwrap();
        let pool: Vec<u8> = (0..8192u32).map(|at| (at * 7 % 251) as u8).collect();
        let sum = |from: u64, bytes: u64| {
            let mut sum = StretchSum::new();
            let [from, bytes] = [from, bytes].map(|number| usize::try_from(number).unwrap());
            sum.update(&pool[from..][..bytes]);
            sum
        };
        let parts = [0..100, 100..1234, 1234..plan.bytes()];
        let stretches: Vec<Stretch> =
            parts.iter().rev().flat_map(|part| plan.stretches(part.clone())).collect();
        let mut sums = CopySums::default();
        for stretch in &stretches {
            sums.add(stretch, &sum(stretch.pool, stretch.length));
        }
        let object = shape.object_bytes();
        let expected = [0, 4096].map(|slot| sum(slot, object).finish());
        assert_eq!(sums.finish(&plan).unwrap(), expected);

        let mut missing = CopySums::default();
        for stretch in &stretches[1..] {
            missing.add(stretch, &sum(stretch.pool, stretch.length));
        }
        assert!(missing.finish(&plan).is_err());
        let mut twice = CopySums::default();
        for stretch in stretches.iter().chain(&stretches[..1]) {
            twice.add(stretch, &sum(stretch.pool, stretch.length));
        }
        assert!(twice.finish(&plan).is_err());
    }
}
