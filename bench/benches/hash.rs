//! Hashing against a digest alone over the same bytes: what chaining and encoding cost. Tokens are
//! uniform in 0..=128255, the ids of Llama 3.
#![allow(clippy::cast_possible_truncation, reason = "the sizes and ids are known here")]

use std::hint::black_box;
use std::time::Duration;

use criterion::Criterion;
use kvferry_bench::Rows;
use kvferry_core::Result;
use kvferry_core::hash::{
    BlockAlgorithm, BlockHasher, BlockHasherOptions, ChunkAlgorithm, ChunkHasher,
};
use sha2::{Digest as _, Sha256};
use xxhash_rust::xxh3::xxh3_128;

const TOKENS: usize = 32 * 1024;
const BLOCK: usize = 16;
const BLOCKS: usize = TOKENS / BLOCK;
const CHUNK: usize = 256;
const CHUNKS: usize = TOKENS / CHUNK;
const SEED: &str = "0";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let tokens = tokens();
    let mut sha256 = vec![0; BLOCKS * 32];
    let mut xxhash = vec![0; BLOCKS * 16];
    let mut chunks = Vec::with_capacity(CHUNKS);
    let chunk_hasher = ChunkHasher::new(ChunkAlgorithm::Blake3, CHUNK as u32)?;

    // What the digests see; each message is followed by the hash that it must have.
    hash_blocks(BlockAlgorithm::Sha256Cbor, &tokens, &mut sha256)?;
    let sha256_messages = cbor_messages(&tokens, &sha256, 32, |seed| Sha256::digest(seed).to_vec());
    for (message, hash) in sha256_messages.iter().zip(sha256.chunks(32)) {
        assert_eq!(Sha256::digest(message)[..], *hash);
    }
    hash_blocks(BlockAlgorithm::XxhashCbor, &tokens, &mut xxhash)?;
    let xxh3 = |bytes: &[u8]| xxh3_128(bytes).to_be_bytes().to_vec();
    let xxhash_messages = cbor_messages(&tokens, &xxhash, 16, xxh3);
    for (message, hash) in xxhash_messages.iter().zip(xxhash.chunks(16)) {
        assert_eq!(xxh3(message), hash);
    }
    chunk_hasher.extend(&mut chunks, &tokens);
    let chunk_messages = chunk_messages(&tokens, &chunks);
    for (message, hash) in chunk_messages.iter().zip(&chunks) {
        assert_eq!(blake3::hash(message).as_bytes(), hash);
    }

    let mut rows = Rows::default();
    let sha256_alone = |messages: &[Vec<u8>]| {
        for message in messages {
            black_box(Sha256::digest(message));
        }
    };
    rows.compare(
        "block hash, sha256_cbor ÷ SHA-256 alone",
        BLOCKS,
        || hash_blocks(BlockAlgorithm::Sha256Cbor, &tokens, &mut sha256),
        || sha256_alone(&sha256_messages),
    );
    rows.compare(
        "block hash, xxhash_cbor ÷ SHA-256 alone",
        BLOCKS,
        || hash_blocks(BlockAlgorithm::XxhashCbor, &tokens, &mut xxhash),
        || sha256_alone(&xxhash_messages),
    );
    rows.compare(
        "chunk hash, blake3 ÷ BLAKE3 alone",
        CHUNKS,
        || {
            chunks.clear();
            chunk_hasher.extend(&mut chunks, &tokens);
        },
        || {
            for message in &chunk_messages {
                black_box(blake3::hash(message));
            }
        },
    );
    rows.finish()?;

    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    for (name, algorithm, bytes) in [
        ("32k tokens, sha256", BlockAlgorithm::Sha256, 32),
        ("32k tokens, sha256_cbor", BlockAlgorithm::Sha256Cbor, 32),
        ("32k tokens, xxhash", BlockAlgorithm::Xxhash, 16),
        ("32k tokens, xxhash_cbor", BlockAlgorithm::XxhashCbor, 16),
    ] {
        let mut hashes = vec![0; BLOCKS * bytes];
        criterion.bench_function(name, |b| b.iter(|| hash_blocks(algorithm, &tokens, &mut hashes)));
    }
    criterion.final_summary();
    Ok(())
}

/// The generator splitmix64, so that every run has the same tokens.
fn tokens() -> Vec<u32> {
    (1..=TOKENS as u64)
        .map(|i| {
            let mut z = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) % 128_256) as u32
        })
        .collect()
}

fn hash_blocks(algorithm: BlockAlgorithm, tokens: &[u32], hashes: &mut [u8]) -> Result<usize> {
    let mut hasher = BlockHasher::new(&BlockHasherOptions {
        block_size: BLOCK as u32,
        algorithm,
        seed: Some(SEED.to_owned()),
        ..BlockHasherOptions::default()
    })?;
    hasher.append(tokens, hashes)
}

/// The CBOR of (hash before, tokens, None) of each block.
fn cbor_messages(
    tokens: &[u32],
    hashes: &[u8],
    hash_bytes: usize,
    digest: impl Fn(&[u8]) -> Vec<u8>,
) -> Vec<Vec<u8>> {
    let none_hash = digest(&[&[0x60 + SEED.len() as u8], SEED.as_bytes()].concat());
    let parents = std::iter::once(&none_hash[..]).chain(hashes.chunks(hash_bytes));
    tokens
        .chunks_exact(BLOCK)
        .zip(parents)
        .map(|(block, parent)| {
            let mut message = vec![0x83];
            message.extend(if hash_bytes < 24 { vec![0x50] } else { vec![0x58, 32] });
            message.extend(parent);
            message.push(0x90);
            for id in block {
                match id {
                    0..24 => message.push(*id as u8),
                    24..=0xff => message.extend([0x18, *id as u8]),
                    0x100..=0xffff => {
                        message.push(0x19);
                        message.extend((*id as u16).to_be_bytes());
                    }
                    _ => {
                        message.push(0x1a);
                        message.extend(id.to_be_bytes());
                    }
                }
            }
            message.push(0xf6);
            message
        })
        .collect()
}

/// The hash before and the tokens as big-endian words of each chunk.
fn chunk_messages(tokens: &[u32], hashes: &[[u8; 32]]) -> Vec<Vec<u8>> {
    let none_hash = *blake3::hash(&[0; 12]).as_bytes();
    let parents = std::iter::once(&none_hash).chain(hashes);
    tokens
        .chunks_exact(CHUNK)
        .zip(parents)
        .map(|(chunk, parent)| {
            let words = chunk.iter().flat_map(|id| id.to_be_bytes());
            parent.iter().copied().chain(words).collect()
        })
        .collect()
}
