//! Hashing with no boundary to cross: the reference of bench/node/boundary.mjs, which drives it. Takes
//! an algorithm, then on its input how many tokens, the tokens (little endian) and, as often as asked,
//! how many calls to time; answers each with nanoseconds and the first bytes of the last call's hashes.
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

    let mut hasher = Hasher::new(&algorithm)?;
    let mut hashes = vec![0; tokens.len() * 32];
    for line in input.lines() {
        let calls: u32 = line?.trim().parse()?;
        let start = Instant::now();
        for _ in 0..calls {
            hasher.append(black_box(&tokens), &mut hashes)?;
        }
        println!("{} {:?}", start.elapsed().as_nanos(), &hashes[..16]);
    }
    Ok(())
}

enum Hasher {
    Chunk(ChunkStream),
    Block(BlockHasher),
}

impl Hasher {
    fn new(algorithm: &str) -> Result<Self> {
        if algorithm == "blake3" {
            let hasher = ChunkHasher::new(ChunkAlgorithm::Blake3, 256)?;
            return Ok(Self::Chunk(ChunkStream::new(&hasher)));
        }
        let hasher = BlockHasher::new(&BlockHasherOptions {
            block_size: 16,
            algorithm: BlockAlgorithm::from_name(algorithm)?,
            seed: Some("0".to_owned()),
            ..BlockHasherOptions::default()
        });
        hasher.map(Self::Block)
    }

    fn append(&mut self, tokens: &[u32], hashes: &mut [u8]) -> Result<usize> {
        match self {
            Self::Chunk(stream) => stream.append(tokens, hashes),
            Self::Block(hasher) => hasher.append(tokens, hashes),
        }
    }
}
