//! Hashing with no boundary to cross: the reference of bench/node/boundary.mjs, which drives it. Takes
//! an algorithm, then on its input how many tokens, the tokens (little endian) and, as often as asked,
//! how many calls to time; answers each with nanoseconds and the last hash.
#![allow(clippy::print_stdout, reason = "the answers")]

use std::error::Error;
use std::hint::black_box;
use std::io::{BufRead as _, Read as _};
use std::time::Instant;

use kvferry_core::Result;
use kvferry_core::hash::{
    BlockAlgorithm, BlockHasher, BlockHasherOptions, ChunkAlgorithm, ChunkHasher, ChunkStream,
};

fn main() -> Result<(), Box<dyn Error>> {
    let algorithm = std::env::args().nth(1).ok_or("which algorithm?")?;
    let mut input = std::io::stdin().lock();
    let mut line = String::new();
    input.read_line(&mut line)?;
    let mut bytes = vec![0; line.trim().parse::<usize>()? * 4];
    input.read_exact(&mut bytes)?;
    let tokens: Vec<u32> = bytes.as_chunks().0.iter().map(|id| u32::from_le_bytes(*id)).collect();

    for line in input.lines() {
        let calls: u32 = line?.trim().parse()?;
        let mut hashes = Vec::new();
        let start = Instant::now();
        for _ in 0..calls {
            hashes = black_box(hash(&algorithm, &tokens)?);
        }
        let nanoseconds = start.elapsed().as_nanos();
        let last = hashes.iter().rev().take(16).rev().map(|byte| format!("{byte:02x}"));
        println!("{nanoseconds} {}", last.collect::<String>());
    }
    Ok(())
}

/// What one call from JavaScript does: a new hasher, room for its hashes, and the hashing.
fn hash(algorithm: &str, tokens: &[u32]) -> Result<Vec<u8>> {
    if algorithm == "blake3" {
        let hasher = ChunkHasher::new(ChunkAlgorithm::Blake3, 256)?;
        let mut stream = ChunkStream::new(&hasher);
        let mut hashes = vec![0; stream.completes(tokens.len()) * 32];
        stream.append(tokens, &mut hashes)?;
        return Ok(hashes);
    }
    let mut hasher = BlockHasher::new(&BlockHasherOptions {
        block_size: 16,
        algorithm: BlockAlgorithm::from_name(algorithm)?,
        seed: Some("0".to_owned()),
        cache_salt: None,
        lora: None,
    })?;
    let mut hashes = vec![0; hasher.completes(tokens.len()) * hasher.hash_bytes()];
    hasher.append(tokens, &mut hashes)?;
    Ok(hashes)
}
