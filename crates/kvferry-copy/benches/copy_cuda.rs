//! Copies between a GPU and a registered pool, by each method and piece size, against one large copy in the same
//! direction, in GB/s. Without a GPU one line says why nothing is measured.
#![allow(unsafe_code, reason = "an engine's part: it allocates memory of the device")]
#![allow(
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    reason = "calls of the driver with addresses that it has just given"
)]
#![allow(clippy::print_stdout, reason = "a benchmark's rows are its output")]
#![allow(clippy::cast_possible_truncation, reason = "the sizes are known here")]

#[path = "../../../bench/lib.rs"]
#[allow(dead_code, unreachable_pub, reason = "other benchmarks use the rest")]
mod rows;

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Instant;

use cudarc::driver::sys::{self, CUresult, CUstream};
use kvferry_copy::PrivateRegion;
use kvferry_copy::cuda::{self, CudaMemory, Method};
use kvferry_core::cache::Memory;
use kvferry_core::copy_plan::{ChunkCopy, CopyPlan, CopyShape, Direction};
use kvferry_core::copying::KvMemory as _;
use kvferry_core::key::Dtype;
use kvferry_core::kv_layout::{KvLayout, Order, Planes};
use rows::Rows;

/// Enough for bandwidth to count, and one chunk of an 8B model.
const SIZES: [u64; 2] = [256 << 20, 32 << 20];
const LAYERS: u64 = 8;
const TOKENS: u32 = 16;
const REPETITIONS: usize = 9;
const METHODS: [(Method, &str); 3] =
    [(Method::Batch, "batch"), (Method::Single, "single"), (Method::Kernel, "kernel")];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if let Err(error) = cuda::check_available() {
        println!("not run on a GPU: {error}");
        return Ok(());
    }
    if unsafe { sys::culib().get::<fn()>(b"fakeCudaViolations") }.is_ok() {
        println!("not run on a GPU: this is the fake driver");
        return Ok(());
    }
    let device = Device::new();
    let mut rows = Rows::default();
    let pieces = [4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 512 << 10, 2 << 20];
    for (bytes, piece) in SIZES.iter().flat_map(|bytes| pieces.map(|piece| (*bytes, piece))) {
        let bench = Bench::new(&device, bytes, piece)?;
        for (method, name) in METHODS {
            bench.memory.set_method(method)?;
            bench.check()?;
            for way in [
                &[Direction::Scatter][..],
                &[Direction::Gather],
                &[Direction::Scatter, Direction::Gather],
            ] {
                let what = match way {
                    [Direction::Scatter] => "to the GPU",
                    [Direction::Gather] => "from the GPU",
                    _ => "both ways",
                };
                let mut pairs = Vec::new();
                for _ in 0..REPETITIONS {
                    pairs.push((bench.ours(way)?, device.large(bytes, way)));
                }
                let mut median = |of: fn(&(f64, f64)) -> f64| {
                    pairs.sort_by(|a, b| of(a).total_cmp(&of(b)));
                    of(&pairs[REPETITIONS / 2])
                };
                let ratio = median(|pair| pair.0 / pair.1);
                let (ours, large) = (median(|pair| pair.0), median(|pair| pair.1));
                let (size, kib) = (bytes >> 20, piece >> 10);
                let name = format!("{size} MiB, {name}, pieces of {kib} KiB, {what} ÷ one copy");
                rows.row(&name, ours, large, "GB/s", ratio);
            }
        }
    }
    rows.finish()?;
    Ok(())
}

fn done(result: CUresult) {
    assert_eq!(result, CUresult::CUDA_SUCCESS);
}

/// The device with its context current, and what one large copy takes.
struct Device {
    streams: [CUstream; 2],
    host: [*mut u8; 2],
    memory: [u64; 2],
}

impl Device {
    fn new() -> Self {
        let (mut context, mut name, mut version) = (std::ptr::null_mut(), [0; 256], 0);
        let mut device = Self {
            streams: [std::ptr::null_mut(); 2],
            host: [std::ptr::null_mut(); 2],
            memory: [0; 2],
        };
        unsafe {
            done(sys::cuDevicePrimaryCtxRetain(&raw mut context, 0));
            done(sys::cuCtxPushCurrent_v2(context));
            done(sys::cuDeviceGetName(name.as_mut_ptr(), 256, 0));
            done(sys::cuDriverGetVersion(&raw mut version));
            for way in 0..2 {
                done(sys::cuStreamCreate(&raw mut device.streams[way], 1));
                done(sys::cuMemAlloc_v2(&raw mut device.memory[way], SIZES[0] as usize));
                let mut host = std::ptr::null_mut();
                done(sys::cuMemHostAlloc(&raw mut host, SIZES[0] as usize, 0));
                device.host[way] = host.cast();
            }
        }
        let name: String = name
            .iter()
            .take_while(|byte| **byte != 0)
            .map(|byte| char::from(byte.cast_unsigned()))
            .collect();
        println!("{name}, driver of CUDA {}.{}", version / 1000, version % 1000 / 10);
        device
    }

    /// GB/s of one large copy in each direction of `way`, at once.
    fn large(&self, size: u64, way: &[Direction]) -> f64 {
        let bytes = size as usize;
        let start = Instant::now();
        for direction in way {
            let lane = usize::from(*direction == Direction::Gather);
            let (memory, host, stream) =
                (self.memory[lane], self.host[lane].cast(), self.streams[lane]);
            unsafe {
                done(match direction {
                    Direction::Scatter => sys::cuMemcpyHtoDAsync_v2(memory, host, bytes, stream),
                    Direction::Gather => sys::cuMemcpyDtoHAsync_v2(host, memory, bytes, stream),
                });
            }
        }
        self.streams.iter().for_each(|stream| unsafe { done(sys::cuStreamSynchronize(*stream)) });
        (size * way.len() as u64) as f64 / start.elapsed().as_nanos() as f64
    }
}

/// An engine whose blocks are pieces of one size. The first half of each array is stored, the second is loaded.
struct Bench {
    shape: Arc<CopyShape>,
    memory: CudaMemory,
    arrays: Vec<(u64, u64)>,
    pool: Arc<dyn Memory>,
    bytes: u64,
    chunks: u64,
    piece: u64,
}

impl Bench {
    fn new(device: &Device, bytes: u64, piece: u64) -> kvferry_core::Result<Self> {
        let chunks = bytes / LAYERS / piece;
        let layout = KvLayout {
            num_layers: LAYERS as u32,
            num_blocks: 2 * chunks as u32,
            block_size: TOKENS,
            num_kv_heads: 1,
            head_size: piece as u32 / TOKENS / 2,
            dtype: Dtype::new("bfloat16")?,
            planes: Planes::Latent,
            order: Order::Nhd,
            block_stride: None,
        };
        layout.check(TOKENS)?;
        let shape = Arc::new(layout.copy_shape(TOKENS));
        let array = shape.array_bytes();
        let arrays: Vec<(u64, u64)> = (0..LAYERS)
            .map(|_| {
                let mut address = 0;
                unsafe { done(sys::cuMemAlloc_v2(&raw mut address, array as usize)) };
                (address, array)
            })
            .collect();
        let stream = device.streams[0].addr() as u64;
        // The arrays are freed after the memory is closed, on drop.
        let memory = unsafe { CudaMemory::new(Arc::clone(&shape), 0, stream, &arrays) }?;
        let pool = Arc::new(PrivateRegion::new(2 * bytes)?);
        Ok(Self { shape, memory, arrays, pool, bytes, chunks, piece })
    }

    /// Every chunk in a block and a slot of its own, in no order, so that no two pieces are one.
    fn plan(&self, direction: Direction, slots: u64) -> kvferry_core::Result<CopyPlan> {
        let second_half = if direction == Direction::Scatter { self.chunks } else { 0 };
        let blocks: Vec<[u32; 1]> = (0..self.chunks)
            .map(|chunk| [(second_half + scattered(chunk, self.chunks)) as u32])
            .collect();
        let object = self.shape.object_bytes();
        let chunks: Vec<ChunkCopy<'_>> = (0..)
            .zip(&blocks)
            .map(|(chunk, blocks)| ChunkCopy { blocks, skip: 0, slot: slots + chunk * object })
            .collect();
        self.shape.plan(direction, &chunks, self.pool.bytes())
    }

    /// What is stored and loaded again is the same.
    fn check(&self) -> kvferry_core::Result<()> {
        let half = (self.chunks * self.piece) as usize;
        for (number, (array, bytes)) in self.arrays.iter().enumerate() {
            let fill = number as u8 + 1;
            let noise: Vec<u8> = (0..*bytes as usize)
                .map(|at| if at < half { (at / 512 * 31 + at) as u8 ^ fill } else { 0 })
                .collect();
            unsafe { done(sys::cuMemcpyHtoD_v2(*array, noise.as_ptr().cast(), noise.len())) };
        }
        unsafe { done(sys::cuCtxSynchronize()) };
        wait(
            self.memory
                .copy(self.plan(Direction::Gather, 0)?, Arc::clone(&self.pool), false)?
                .ended(),
        )?;
        wait(
            self.memory
                .copy(self.plan(Direction::Scatter, 0)?, Arc::clone(&self.pool), false)?
                .ended(),
        )?;
        for (array, bytes) in &self.arrays {
            let mut now = vec![0u8; *bytes as usize];
            unsafe { done(sys::cuMemcpyDtoH_v2(now.as_mut_ptr().cast(), *array, now.len())) };
            assert!(now[..half] == now[half..] && now[..half].iter().any(|byte| *byte != 0));
        }
        Ok(())
    }

    /// GB/s of copies in each direction of `way`, at once.
    fn ours(&self, way: &[Direction]) -> kvferry_core::Result<f64> {
        let plans = way.iter().map(|direction| {
            self.plan(*direction, if *direction == Direction::Gather { self.bytes } else { 0 })
        });
        let plans = plans.collect::<kvferry_core::Result<Vec<_>>>()?;
        let start = Instant::now();
        let copies =
            plans.into_iter().map(|plan| self.memory.copy(plan, Arc::clone(&self.pool), false));
        for copying in copies.collect::<kvferry_core::Result<Vec<_>>>()? {
            wait(copying.ended())?;
        }
        Ok((self.bytes * way.len() as u64) as f64 / start.elapsed().as_nanos() as f64)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.memory.close();
        self.arrays.iter().for_each(|(array, _)| unsafe { done(sys::cuMemFree_v2(*array)) });
    }
}

/// A number below `count`, a power of 2, that no other has.
fn scattered(number: u64, count: u64) -> u64 {
    number.wrapping_mul(0x9e37_79b1) % count
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => return value,
            Poll::Pending => thread::park(),
        }
    }
}
