//! Copies between ordinary memory and a shared-memory pool, 256 MiB in all and in pieces of 256 bytes to 2 MiB, against
//! one large copy of as many bytes by as many threads, in turns. The large copy is the faster one of memcpy and of our
//! own kernel over one range, each thread having its half. Ratios of "GB/s" rows are ours ÷ reference: more is better.
//! `cargo bench --bench copy -- SIZE` measures one size. A row named "memcpy" is the plain loop over the same pieces instead of ours.
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]
#![allow(clippy::cast_possible_truncation, reason = "the sizes are known here")]
#![allow(clippy::print_stdout, reason = "a benchmark's rows are its output")]
#![allow(unsafe_code, reason = "the reference copies by address")]

#[path = "../../../bench/lib.rs"]
#[allow(dead_code, unreachable_pub, reason = "other benchmarks use the rest")]
mod rows;

use std::future::Future;
use std::hint::black_box;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Instant;

use kvferry_copy::{CopyThreads, HostArrays, HostMemory, POOL_STEP, SharedRegion, kernel_name};
use kvferry_core::cache::Memory;
use kvferry_core::copy_plan::{ChunkCopy, CopyPlan, CopyShape, Direction};
use kvferry_core::copying::KvMemory;
use kvferry_core::key::Dtype;
use kvferry_core::kv_layout::{KvLayout, Order, Planes};
use rows::Rows;

const TOTAL: usize = 256 << 20;
const CHUNK: u32 = 256;
/// How often each copy is timed.
const TURNS: usize = 15;
const PIECES: [(&str, usize); 6] = [
    ("256 B heads", 256),
    ("1 KiB", 1 << 10),
    ("4 KiB", 4 << 10),
    ("64 KiB", 64 << 10),
    ("512 KiB", 512 << 10),
    ("2 MiB", 2 << 20),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut rows = Rows::default();
    println!("kernel: {}", kernel_name());
    let name = format!("kvferry_bench_{}", std::process::id());
    let pool = Arc::new(SharedRegion::create(&name, TOTAL as u64)?);
    for step in 0..TOTAL as u64 / POOL_STEP {
        pool.reserve(step)?;
    }
    let mut memory = vec![1u8; TOTAL + 4096];
    let start = memory.as_mut_ptr().wrapping_add(memory.as_ptr().align_offset(4096));
    let chosen = std::env::args().skip(1).find(|argument| !argument.starts_with("--"));
    for direction in [Direction::Gather, Direction::Scatter] {
        for (name, piece) in PIECES {
            if chosen.as_ref().is_some_and(|chosen| !name.contains(&**chosen)) {
                continue;
            }
            let mut measure =
                |threads| measure(&mut rows, direction, (name, piece), threads, start, &pool);
            let ([one, one_large], [two, two_large]) = (measure(1), measure(2));
            for (what, two, one) in [("", two, one), (" of the large copy", two_large, one_large)] {
                let name = format!("{}, {name}, 2 threads ÷ 1{what}", way(direction));
                let [two, one] = [two, one].map(|times| TOTAL as f64 / 1e9 / median(times));
                rows.row(&name, two, one, "GB/s", two / one);
            }
        }
    }
    rows.finish()?;
    drop(memory);
    Ok(())
}

fn way(direction: Direction) -> &'static str {
    match direction {
        Direction::Gather => "gather",
        Direction::Scatter => "scatter",
    }
}

/// Two arrays for each of 32 layers, as an 8B model has them, whose pieces have so many bytes; of 256, heads that lie
/// apart. One layer, one array for the large copy.
fn layout(piece: usize) -> KvLayout {
    let large = piece > 2 << 20;
    let (block_size, heads, layers) = match piece {
        _ if large => (CHUNK as usize, 1, 1),
        256 => (16, 8, 32),
        _ => (16, 1, 32),
    };
    let planes = if large { Planes::Latent } else { Planes::Separate };
    let block = if heads == 1 { piece } else { block_size * heads * piece };
    let arrays = if large { 1 } else { 2 * layers };
    KvLayout {
        num_layers: layers as u32,
        num_blocks: (TOTAL / arrays / block) as u32,
        block_size: block_size as u32,
        num_kv_heads: heads as u32,
        head_size: (block / block_size / heads) as u32,
        dtype: Dtype::new("uint8").unwrap(),
        planes,
        order: if heads > 1 { Order::Hnd } else { Order::Nhd },
        block_stride: None,
    }
}

/// Copies of all blocks in a random order.
struct Load {
    shape: Arc<CopyShape>,
    blocks: Vec<u32>,
    of_chunk: usize,
}

impl Load {
    fn new(piece: usize) -> Self {
        let layout = layout(piece);
        let of_chunk = (CHUNK / layout.block_size).min(layout.num_blocks);
        let shape = Arc::new(layout.copy_shape(layout.block_size * of_chunk));
        let mut blocks: Vec<u32> = (0..layout.num_blocks).collect();
        let mut random = 1u64;
        for last in (1..blocks.len()).rev() {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            blocks.swap(last, (random >> 33) as usize % (last + 1));
        }
        Self { shape, blocks, of_chunk: of_chunk as usize }
    }

    fn plan(&self, direction: Direction) -> CopyPlan {
        let chunks: Vec<ChunkCopy<'_>> = self
            .blocks
            .chunks(self.of_chunk)
            .zip(0u64..)
            .map(|(blocks, chunk)| ChunkCopy {
                blocks,
                skip: 0,
                slot: chunk * self.shape.object_bytes(),
            })
            .collect();
        self.shape.plan(direction, &chunks, TOTAL as u64).unwrap()
    }

    fn memory(&self, start: *mut u8, threads: &Arc<CopyThreads>) -> HostMemory {
        let bytes = self.shape.array_bytes() as usize;
        let arrays: Vec<(*mut u8, usize)> = (0..self.shape.arrays())
            .map(|array| (start.wrapping_add(array * bytes), bytes))
            .collect();
        // SAFETY: `main` keeps the memory until the end.
        let arrays = unsafe { HostArrays::new(Arc::clone(&self.shape), &arrays) };
        HostMemory::on(threads, arrays.unwrap())
    }
}

/// The rows of one direction, size and number of threads; the times of our copies and of the large one.
fn measure(
    rows: &mut Rows,
    direction: Direction,
    (name, piece): (&str, usize),
    threads: usize,
    start: *mut u8,
    pool: &Arc<SharedRegion>,
) -> [Vec<f64>; 2] {
    let ours = Load::new(piece);
    let large = Load::new(TOTAL / threads);
    let copiers = Arc::new(CopyThreads::new(threads));
    let (memory, range) = (ours.memory(start, &copiers), large.memory(start, &copiers));
    let (plan, one_range) = (ours.plan(direction), large.plan(direction));
    let mut pieces: Vec<(usize, usize, usize)> = Vec::new();
    plan.pieces(0..plan.bytes(), |piece| {
        let array = piece.array * plan.shape().array_bytes() as usize;
        pieces.push((array + piece.at as usize, piece.pool as usize, piece.length as usize));
        Ok(())
    })
    .unwrap();
    check(direction, &pieces, start, pool, || run(&memory, &plan, pool, false));

    let half = TOTAL / threads;
    let whole: Vec<(usize, usize, usize)> =
        (0..threads).map(|part| (part * half, part * half, half)).collect();
    let start = Start(start);
    let mut times: [Vec<f64>; 6] = Default::default();
    for turn in 0..TURNS {
        for which in 0..times.len() {
            let which = (which + turn) % times.len();
            let begun = Instant::now();
            match which {
                0 => run(&memory, &plan, pool, false),
                1 => run(&range, &one_range, pool, false),
                2 => memcpy(direction, &whole, threads, start, pool),
                3 => memcpy(direction, &pieces, threads, start, pool),
                4 => run(&memory, &plan, pool, true),
                _ => {
                    black_box(ours.plan(direction));
                }
            }
            times[which].push(begun.elapsed().as_secs_f64());
        }
    }
    let gigabytes = TOTAL as f64 / 1e9;
    let speed = |which: usize| gigabytes / median(times[which].clone());
    let large = if speed(1) > speed(2) { 1 } else { 2 };
    // Ratios are medians over turns: what disturbs one of a pair mostly disturbs the other too.
    let mut row = |what: String, ours: usize, reference: usize| {
        let pairs = times[ours].iter().zip(&times[reference]);
        let ratio = median(pairs.map(|(ours, reference)| reference / ours).collect());
        rows.row(&what, speed(ours), speed(reference), "GB/s", ratio);
    };
    let plural = if threads == 1 { "" } else { "s" };
    let title = format!("{}, {name}, {threads} thread{plural}", way(direction));
    let faster = if large == 1 { "ours" } else { "memcpy" };
    row(format!("{title} ÷ one large copy ({faster})"), 0, large);
    row(format!("{title}, memcpy in a loop ÷ one large copy"), 3, large);
    row(format!("{title}, with checksums ÷ without"), 4, 0);
    let (planning, copy) = (median(times[5].clone()) * 1e3, median(times[0].clone()) * 1e3);
    rows.row(&format!("{title}, planning ÷ copy"), planning, copy, "ms", planning / copy);
    [times[0].clone(), times[large].clone()]
}

/// Asserts that `copy` moves just these bytes.
fn check(
    direction: Direction,
    pieces: &[(usize, usize, usize)],
    start: *mut u8,
    pool: &SharedRegion,
    copy: impl FnOnce(),
) {
    let pattern: Vec<u8> = (0..TOTAL as u64)
        .step_by(8)
        .flat_map(|at| at.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .collect();
    // SAFETY: `main` keeps the memory, and nobody else uses it now.
    let memory = || unsafe { std::slice::from_raw_parts_mut(start, TOTAL) };
    match direction {
        Direction::Gather => {
            memory().copy_from_slice(&pattern);
            pool.write(0, &vec![0; TOTAL]).unwrap();
        }
        Direction::Scatter => {
            memory().fill(0);
            pool.write(0, &pattern).unwrap();
        }
    }
    copy();
    let mut copied = vec![0; TOTAL];
    pool.read(0, &mut copied).unwrap();
    for (at, theirs, length) in pieces {
        assert!(memory()[*at..at + length] == copied[*theirs..theirs + length], "at {at}");
    }
    assert_eq!(pieces.iter().map(|piece| piece.2).sum::<usize>(), TOTAL);
}

/// From submission to completion.
fn run(memory: &HostMemory, plan: &CopyPlan, pool: &Arc<SharedRegion>, sums: bool) {
    let copying = memory.copy(plan.clone(), Arc::<SharedRegion>::clone(pool), sums).unwrap();
    wait(copying.ended()).unwrap();
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => return value,
            Poll::Pending => thread::park(),
        }
    }
}

/// Places in memory and in the pool, and bytes.
type Pieces = [(usize, usize, usize)];

/// The memory under test, for several threads.
#[derive(Clone, Copy)]
struct Start(*mut u8);

// SAFETY: plain memory; each thread uses a part of its own.
unsafe impl Send for Start {}
// SAFETY: as above.
unsafe impl Sync for Start {}

impl Start {
    #[allow(clippy::mut_from_ref, reason = "the pieces of a plan do not overlap")]
    fn bytes(&self, at: usize, length: usize) -> &mut [u8] {
        // SAFETY: a piece of a plan of the memory, which `main` keeps, and which nobody else uses now.
        unsafe { std::slice::from_raw_parts_mut(self.0.wrapping_add(at), length) }
    }
}

/// The plain loop, each thread with as many bytes.
fn memcpy(
    direction: Direction,
    pieces: &Pieces,
    threads: usize,
    start: Start,
    pool: &SharedRegion,
) {
    let copy = |pieces: &Pieces| {
        for (at, theirs, length) in pieces {
            match direction {
                Direction::Gather => pool.write(*theirs as u64, start.bytes(*at, *length)),
                Direction::Scatter => pool.read(*theirs as u64, start.bytes(*at, *length)),
            }
            .unwrap();
        }
    };
    thread::scope(|scope| {
        let mut parts = pieces.chunks(pieces.len().div_ceil(threads));
        let first = parts.next().unwrap_or_default();
        for part in parts {
            scope.spawn(|| copy(part));
        }
        copy(first);
    });
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
