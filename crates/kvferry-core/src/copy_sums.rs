//! Checksums of what copies move, so that nothing is read twice.

use crc_fast::{CrcAlgorithm, Digest};

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
    /// Of no bytes yet.
    #[expect(clippy::new_without_default, reason = "it is begun, never had")]
    pub fn new() -> Self {
        Self(Digest::new(CrcAlgorithm::Crc64Nvme))
    }

    /// The stretch's next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }
}

impl CopySums {
    /// A stretch, all of whose bytes came.
    pub fn add(&mut self, stretch: &Stretch, sum: &StretchSum) {
        let Stretch { chunk, at, length, .. } = *stretch;
        self.0.push(Summed { chunk, at, length, sum: sum.0.finalize() });
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
        let mut power = (0, ONE); // most stretches are equally long
        let sums: Option<Vec<u64>> = (0..plan.chunks())
            .map(|chunk| {
                let (mut at, mut sum) = (0, None);
                while let Some(next) = stretches.next_if(|next| next.chunk == chunk) {
                    if next.at != at {
                        return None;
                    }
                    at += next.length;
                    if next.length != power.0 {
                        power = (next.length, power_of_x(next.length));
                    }
                    sum = Some(sum.map_or(next.sum, |sum| multiply(sum, power.1) ^ next.sum));
                }
                sum.filter(|_| at == object)
            })
            .collect();
        sums.filter(|_| stretches.next().is_none()).ok_or_else(|| {
            Error::new(ErrorCode::Internal, "not every byte of the chunks was summed once")
        })
    }
}

/// The polynomial of CRC-64/NVME without its x^64; as everywhere here, the highest bit is the lowest power.
const POLYNOMIAL: u64 = 0x9a6c_9329_ac4b_c9b5;
const ONE: u64 = 1 << 63;

/// The product of two polynomials, modulo CRC-64/NVME's. The checksum of A and B together is that of A times
/// x^(8 * bytes of B), plus that of B: so zlib's crc32_combine has it, and crc-fast too, but for 30 µs each time.
fn multiply(a: u64, mut b: u64) -> u64 {
    let mut product = 0;
    for power in (0..64).rev() {
        product ^= b & 0u64.wrapping_sub(a >> power & 1);
        b = b >> 1 ^ POLYNOMIAL & 0u64.wrapping_sub(b & 1);
    }
    product
}

/// x^(8 * bytes).
fn power_of_x(mut bytes: u64) -> u64 {
    let (mut power, mut square) = (ONE, ONE >> 8);
    while bytes > 0 {
        if bytes & 1 == 1 {
            power = multiply(power, square);
        }
        square = multiply(square, square);
        bytes >>= 1;
    }
    power
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::copy_plan::{ChunkCopy, Direction};
    use crate::key::Dtype;
    use crate::kv_layout::{KvLayout, Order, Planes};

    #[test]
    fn combining_is_what_crc_fast_does() {
        for (first, second, bytes) in [(0, 0, 0), (1, 2, 3), (u64::MAX, 7, 4096), (5, 6, 1 << 40)] {
            let expected =
                crc_fast::checksum_combine(CrcAlgorithm::Crc64Nvme, first, second, bytes);
            assert_eq!(multiply(first, power_of_x(bytes)) ^ second, expected);
        }
    }

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
        let expected = [0, 4096].map(|slot| sum(slot, object).0.finalize());
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
