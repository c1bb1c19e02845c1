//! Copies with no boundary to cross: the reference of bench/node/copy.mjs, which drives it. Takes how many chunks
//! of 32 MiB a copy has; then, on its input, `gather` or `scatter` as often as asked; answers each with
//! nanoseconds from the copy's beginning to its end. The chunks go through a pool of shared memory in turn.
#![allow(clippy::print_stdout, reason = "the answers")]
#![allow(unsafe_code, reason = "registers memory by its address")]

use std::error::Error;
use std::io::BufRead as _;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Instant;

use kvferry_copy::{HostArrays, HostMemory, POOL_STEP, SharedRegion};
use kvferry_core::cache::Memory;
use kvferry_core::copy_plan::{ChunkCopy, Direction};
use kvferry_core::copying::KvMemory as _;
use kvferry_core::key::Dtype;
use kvferry_core::kv_layout::{KvLayout, Order, Planes};

/// As in bench/node/copy.mjs.
const POOL: u64 = 512 << 20;
const CHUNK: u32 = 256;
const BLOCKS: u32 = 256;

fn main() -> Result<(), Box<dyn Error>> {
    let chunks: usize = std::env::args().nth(1).ok_or("how many chunks?")?.parse()?;
    let layout = KvLayout {
        num_layers: 32,
        num_blocks: BLOCKS,
        block_size: 16,
        num_kv_heads: 8,
        head_size: 128,
        dtype: Dtype::new("bfloat16")?,
        planes: Planes::Separate,
        order: Order::Nhd,
        block_stride: None,
    };
    let shape = Arc::new(layout.copy_shape(CHUNK));
    let bytes = usize::try_from(shape.array_bytes())?;
    let mut arrays: Vec<Vec<u8>> = (0u8..).take(shape.arrays()).map(|n| vec![n; bytes]).collect();
    let places: Vec<(*mut u8, usize)> =
        arrays.iter_mut().map(|array| (array.as_mut_ptr(), array.len())).collect();
    // SAFETY: the arrays outlive the memory, and nothing else touches them.
    let memory = HostMemory::new(unsafe { HostArrays::new(Arc::clone(&shape), &places) }?);
    let pool =
        Arc::new(SharedRegion::create(&format!("kvferry_bench_{}", std::process::id()), POOL)?);
    for step in 0..POOL / POOL_STEP {
        pool.reserve(step)?;
    }
    pool.read(0, &mut [0])?;
    let mut slot = 0;
    let mut tables: Vec<u32> = (0..BLOCKS).map(|block| block * 97 % BLOCKS).collect();
    for line in std::io::stdin().lock().lines() {
        let direction = if line? == "gather" { Direction::Gather } else { Direction::Scatter };
        let start = Instant::now();
        let copies: Vec<ChunkCopy<'_>> = tables[..chunks * 16]
            .chunks(16)
            .map(|blocks| {
                slot = (slot + shape.object_bytes()) % POOL;
                ChunkCopy { blocks, skip: 0, slot }
            })
            .collect();
        let plan = shape.plan(direction, &copies, POOL)?;
        let copying = memory.copy(plan, Arc::<SharedRegion>::clone(&pool), false)?;
        block_on(copying.ended())?;
        println!("{}", start.elapsed().as_nanos());
        tables.rotate_left(chunks * 16);
    }
    Ok(())
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut work = pin!(work);
    loop {
        match work.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => return value,
            Poll::Pending => thread::park(),
        }
    }
}
