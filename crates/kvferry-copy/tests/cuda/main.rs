//! Copies between memory of a CUDA device and pools, on the fake driver, or by `npm run test:gpu` on a real one.
#![cfg(target_os = "linux")]
#![allow(unsafe_code, reason = "the tests are engines: they call the driver")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics fails")]
#![allow(
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    reason = "the fake driver checks what the engine of the tests asks for"
)]
#![allow(clippy::print_stdout, reason = "scripts/test-gpu.mjs reads it")]

mod driver;
mod model;

use std::future::Future;
use std::io::Write as _;
use std::pin::pin;
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use cudarc::driver::sys;
use kvferry_copy::cuda::{self, CudaMemory, ExportedMemory, IpcArray, Method};
use kvferry_copy::{POOL_STEP, PrivateRegion, SharedRegion};
use kvferry_core::cache::{Memory, Permit};
use kvferry_core::copy_plan::{ChunkCopy, CopyPlan, CopyShape, Direction};
use kvferry_core::copying::{Copying, KvMemory as _};
use kvferry_core::key::Dtype;
use kvferry_core::kv_descriptors::{
    CudaStorage, DescribedMemory, KvDescriptor, KvRegistration, KvStorage,
};
use kvferry_core::kv_layout::{KvLayout, Order, Planes};
use kvferry_core::{Error, ErrorCode, Result};

use driver::{CUDA_12_4, CUDA_12_8, CUDA_13, Engine, Fake, On, done, on};
use model::{flat, heads, layout, noise, shape};

const ALL: [On; 3] = [CUDA_12_4, CUDA_12_8, CUDA_13];
const METHODS: [Method; 3] = [Method::Batch, Method::Single, Method::Kernel];

/// An engine with arrays of a layout, and the copies of them.
struct Kv {
    layout: KvLayout,
    shape: Arc<CopyShape>,
    arrays: Vec<(u64, u64)>,
    memory: CudaMemory,
}

impl Kv {
    fn new(engine: &mut Engine, layout: KvLayout) -> Self {
        let shape = shape(&layout);
        let bytes = shape.array_bytes();
        let arrays: Vec<_> = (0..shape.arrays()).map(|_| (engine.allocate(bytes), bytes)).collect();
        let memory = open(engine, &shape, &arrays).unwrap();
        Self { layout, shape, arrays, memory }
    }

    fn fill(&self, engine: &Engine, seed: u64) -> Vec<Vec<u8>> {
        (seed..)
            .zip(&self.arrays)
            .map(|(seed, (address, bytes))| {
                let bytes = noise(seed, *bytes);
                engine.write(*address, &bytes);
                bytes
            })
            .collect()
    }

    fn arrays(&self, engine: &Engine) -> Vec<Vec<u8>> {
        self.arrays.iter().map(|(address, bytes)| engine.read(*address, *bytes)).collect()
    }

    fn plan(&self, direction: Direction, chunks: &[ChunkCopy<'_>], pool: &dyn Memory) -> CopyPlan {
        self.shape.plan(direction, chunks, pool.bytes()).unwrap()
    }

    fn copy(
        &self,
        direction: Direction,
        chunks: &[ChunkCopy<'_>],
        pool: &Arc<dyn Memory>,
    ) -> Result<Copying> {
        self.memory.copy(self.plan(direction, chunks, &**pool), Arc::clone(pool), false)
    }
}

fn open(engine: &Engine, shape: &Arc<CopyShape>, arrays: &[(u64, u64)]) -> Result<CudaMemory> {
    let device = engine.device.try_into().unwrap();
    unsafe { CudaMemory::new(Arc::clone(shape), device, engine.stream(), arrays) }
}

fn chunk(blocks: &[u32], slot: u64) -> ChunkCopy<'_> {
    ChunkCopy { blocks, skip: 0, slot }
}

fn private(bytes: u64) -> Arc<dyn Memory> {
    Arc::new(PrivateRegion::new(bytes).unwrap())
}

/// A shared pool, and where it lies in this process.
fn shared(name: &str, bytes: u64, steps: u64) -> (Arc<dyn Memory>, usize) {
    let name = format!("kvferry_test_{}_{name}", std::process::id());
    let region = SharedRegion::create(&name, bytes).unwrap();
    (0..steps).for_each(|step| region.reserve(step).unwrap());
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|line| line.contains(&name)).unwrap();
    let start = usize::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
    (Arc::new(region), start)
}

fn read(pool: &dyn Memory, offset: u64, bytes: u64) -> Vec<u8> {
    let mut into = vec![0; bytes.try_into().unwrap()];
    pool.read(offset, &mut into).unwrap();
    into
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

fn ends(copying: Result<Copying>) -> Result<()> {
    wait(copying?.ended())
}

fn violations() -> u64 {
    Fake::here().map_or(0, |fake| fake.violations())
}

/// What `npm run test:gpu` asks first.
#[test]
fn device_and_driver() {
    match cuda::check_available() {
        Err(error) => println!("{error}"),
        Ok(()) => println!("{}", driver::describe()),
    }
}

#[test]
fn every_layout_is_copied_both_ways_by_every_method_and_nothing_beside_it() {
    on(
        "every_layout_is_copied_both_ways_by_every_method_and_nothing_beside_it",
        &ALL,
        false,
        || {
            let mut engine = Engine::new(0);
            let orders = [Order::Nhd, Order::Hnd];
            let layouts = [Planes::Separate, Planes::Fused, Planes::Latent]
                .into_iter()
                .flat_map(|planes| {
                    orders.map(|order| [layout(planes, order, 0), layout(planes, order, 6)])
                })
                .flatten();
            for layout in layouts {
                let kv = Kv::new(&mut engine, layout);
                let object = kv.shape.object_bytes();
                let pool = private(4 * object);
                for method in METHODS {
                    kv.memory.set_method(method).unwrap();
                    let what = format!("{:?} {method:?}", kv.layout);
                    round_trip(&engine, &kv, &pool, &what);
                }
            }
            assert_eq!(violations(), 0);
        },
    );
}

/// Stores two chunks, and loads them into other blocks, the first without its first 5 tokens.
fn round_trip(engine: &Engine, kv: &Kv, pool: &Arc<dyn Memory>, what: &str) {
    let object = kv.shape.object_bytes();
    let (first, second) = ([7, 2, 9, 4], [0, 1, 11, 3]);
    let before = kv.fill(engine, 1);
    let mut slots = noise(100, pool.bytes());
    pool.write(0, &slots).unwrap();
    let chunks = [chunk(&first, 2 * object), chunk(&second, object)];
    ends(kv.copy(Direction::Gather, &chunks, pool)).unwrap();
    for (blocks, slot) in [(first, 2 * object), (second, object)] {
        let slot = usize::try_from(slot).unwrap();
        heads(&kv.layout, &blocks, 0, |array, at, object, bytes| {
            let to = slot + object;
            slots[to..to + bytes].copy_from_slice(&before[array][at..at + bytes]);
        });
    }
    assert!(read(&**pool, 0, pool.bytes()) == slots, "gathered: {what}");

    let mut arrays = kv.fill(engine, 50);
    let (to, fewer) = ([5, 6, 8, 10], [2, 7, 1]);
    let skipping = ChunkCopy { blocks: &to, skip: 5, slot: 2 * object };
    ends(kv.copy(Direction::Scatter, &[skipping, chunk(&fewer, object)], pool)).unwrap();
    for (blocks, skip, slot) in [(&to[..], 5, 2 * object), (&fewer[..], 0, object)] {
        let slot = usize::try_from(slot).unwrap();
        heads(&kv.layout, blocks, skip, |array, at, object, bytes| {
            let from = slot + object;
            arrays[array][at..at + bytes].copy_from_slice(&slots[from..from + bytes]);
        });
    }
    assert!(kv.arrays(engine) == arrays, "scattered: {what}");
}

#[test]
fn large_copies_go_over_the_pools_steps_and_in_many_parts() {
    on("large_copies_go_over_the_pools_steps_and_in_many_parts", &ALL, false, || {
        let mut engine = Engine::new(0);
        let kv = Kv::new(&mut engine, flat(6, 4, 1 << 20));
        let object = kv.shape.object_bytes();
        let (pool, start) = shared("steps", 2 * POOL_STEP, 2);
        // The object lies over the end of the first step, by an odd number of bytes.
        let slot = POOL_STEP - 2 * (1 << 20) - 333;
        for method in METHODS {
            kv.memory.set_method(method).unwrap();
            let arrays = kv.fill(&engine, 3);
            ends(kv.copy(Direction::Gather, &[chunk(&[2], slot)], &pool)).unwrap();
            if let Some(fake) = Fake::here() {
                fake.host_reads(start, (2 * POOL_STEP).try_into().unwrap());
            }
            let stored = read(&*pool, slot, object);
            let mut expected = vec![0; stored.len()];
            heads(&kv.layout, &[2], 0, |array, at, object, bytes| {
                expected[object..object + bytes].copy_from_slice(&arrays[array][at..at + bytes]);
            });
            assert!(stored == expected, "{method:?}");
            ends(kv.copy(Direction::Scatter, &[chunk(&[3], slot)], &pool)).unwrap();
            for ((address, bytes), filled) in kv.arrays.iter().zip(&arrays) {
                let block = bytes / 4;
                let loaded = engine.read(address + 3 * block, block);
                let at = usize::try_from(2 * block).unwrap();
                assert!(loaded == filled[at..at + loaded.len()], "{method:?}");
            }
        }
        assert_eq!(violations(), 0);
    });
}

#[test]
fn a_store_waits_for_the_compute_that_writes_its_blocks() {
    on("a_store_waits_for_the_compute_that_writes_its_blocks", &ALL, false, || {
        let mut engine = Engine::new(0);
        let kv = Kv::new(&mut engine, flat(4, 3, 4096));
        let (pool, start) = shared("store", 1 << 20, 1);
        for (value, method) in (1..).zip([METHODS, METHODS, METHODS].concat()) {
            if let Some(fake) = Fake::here() {
                fake.schedule(value.into(), 5000);
            }
            kv.memory.set_method(method).unwrap();
            engine.busy();
            for (address, bytes) in &kv.arrays {
                engine.compute(*address, value, *bytes);
            }
            ends(kv.copy(Direction::Gather, &[chunk(&[1], 4096)], &pool)).unwrap();
            if let Some(fake) = Fake::here() {
                fake.host_reads(start, 1 << 20);
            }
            let stored = read(&*pool, 4096, kv.shape.object_bytes());
            assert!(stored.iter().all(|byte| *byte == value), "{method:?}");
        }
        assert_eq!(violations(), 0);
    });
}

#[test]
fn a_load_waits_for_the_compute_before_it_and_the_compute_after_it_waits_for_the_load() {
    const NAME: &str =
        "a_load_waits_for_the_compute_before_it_and_the_compute_after_it_waits_for_the_load";
    on(NAME, &ALL, false, || {
        let mut engine = Engine::new(0);
        let kv = Kv::new(&mut engine, flat(1, 3, 4096));
        let pool = private(1 << 20);
        let (before, after) = (engine.allocate(4096), engine.allocate(4096));
        let block = kv.arrays[0].0 + 4096;
        for (round, method) in (1..).zip([METHODS, METHODS].concat()) {
            kv.memory.set_method(method).unwrap();
            kv.fill(&engine, round);
            let old = engine.read(block, 4096);
            let new = noise(1000 + round, 4096);
            pool.write(8192, &new).unwrap();
            engine.busy();
            engine.copy(before, block, 4096);
            let fake = Fake::here();
            let waits = fake.as_ref().map_or(0, |fake| fake.calls("cuStreamWaitEvent"));
            if let Some(fake) = &fake {
                fake.schedule(round, 5000);
                fake.hold(true);
            }
            let copying = kv.copy(Direction::Scatter, &[chunk(&[1], 8192)], &pool).unwrap();
            match &fake {
                Some(fake) => {
                    // Once the load's last part is asked for, the engine's stream waits for it: nobody else need.
                    fake.await_calls("cuStreamWaitEvent", waits + 2);
                    engine.copy(after, block, 4096);
                    fake.hold(false);
                    engine.synchronize();
                    wait(copying.ended()).unwrap();
                }
                None => {
                    wait(copying.ended()).unwrap();
                    engine.copy(after, block, 4096);
                    engine.synchronize();
                }
            }
            assert!(engine.read(before, 4096) == old, "{method:?}");
            assert!(engine.read(after, 4096) == new, "{method:?}");
        }
        assert_eq!(violations(), 0);
    });
}

#[test]
fn arrays_are_told_of_as_they_are_copied() {
    on("arrays_are_told_of_as_they_are_copied", &ALL[..2], true, || {
        let mut engine = Engine::new(0);
        let kv = Kv::new(&mut engine, flat(12, 2, 4 << 20));
        let (pool, start) = shared("parts", POOL_STEP, 1);
        let fake = Fake::here().unwrap();
        let fail_sixth = |single| {
            for call in ["cuMemcpyBatchAsync", single] {
                fake.fail(call, 6, 2);
            }
        };
        // Each array is a part; the sixth cannot be asked for.
        fail_sixth("cuMemcpyHtoDAsync_v2");
        let copying = kv.copy(Direction::Scatter, &[chunk(&[1], 0)], &pool).unwrap();
        wait(copying.array(5)).unwrap();
        assert_eq!(copying.arrays(), 5);
        let error = wait(copying.array(6)).unwrap_err();
        assert_eq!(error.code, ErrorCode::CudaFailed);
        assert!(error.message.contains("CUDA_ERROR_OUT_OF_MEMORY"), "{error}");
        assert_eq!(wait(copying.ended()), Err(error));
        fake.reset();
        let copying = kv.copy(Direction::Scatter, &[chunk(&[1], 0)], &pool).unwrap();
        wait(copying.ended()).unwrap();
        assert_eq!(copying.arrays(), 12);

        // A store that fails ends when nothing of it is under way any more.
        let filled = kv.fill(&engine, 1);
        fake.schedule(1, 5000);
        fail_sixth("cuMemcpyDtoHAsync_v2");
        ends(kv.copy(Direction::Gather, &[chunk(&[0], 0)], &pool)).unwrap_err();
        fake.host_reads(start, POOL_STEP.try_into().unwrap());
        for (array, at) in filled.iter().zip((0..5).map(|array| array << 22)) {
            assert!(read(&*pool, at, 4 << 20) == array[..4 << 20]);
        }
        assert_eq!(fake.violations(), 0);
    });
}

#[test]
fn the_callers_thread_neither_waits_nor_changes_its_context() {
    on("the_callers_thread_neither_waits_nor_changes_its_context", &ALL, false, || {
        let mut engine = Engine::new(0);
        let kv = Kv::new(&mut engine, flat(2, 2, 4096));
        let pool = private(1 << 20);
        let current = || {
            let mut context = std::ptr::null_mut();
            unsafe { done(sys::cuCtxGetCurrent(&raw mut context)) };
            context
        };
        let before = current();
        if let Some(fake) = Fake::here() {
            fake.hold(true);
        }
        let store = kv.copy(Direction::Gather, &[chunk(&[0], 0)], &pool).unwrap();
        let load = kv.copy(Direction::Scatter, &[chunk(&[1], 65536)], &pool).unwrap();
        assert_eq!(current(), before);
        thread::scope(|scope| {
            scope.spawn(|| {
                assert!(current().is_null());
                drop(kv.copy(Direction::Gather, &[chunk(&[0], 4096 * 64)], &pool).unwrap());
                assert!(current().is_null(), "a thread without a context stays so");
            });
        });
        if let Some(fake) = Fake::here() {
            assert_eq!((store.arrays(), load.arrays()), (0, 0));
            fake.hold(false);
        }
        wait(store.ended()).unwrap();
        wait(load.ended()).unwrap();
        kv.memory.close();
        assert_eq!(current(), before);
        assert_eq!(violations(), 0);
    });
}

#[test]
fn devices_do_not_mix() {
    let two = [On::Fake(&[("FAKECUDA_DEVICES", "2")])];
    on("devices_do_not_mix", &two, true, || {
        let mut first = Engine::new(0);
        let mut second = Engine::new(1);
        let of_second = Kv::new(&mut second, flat(2, 2, 4096)); // the second's context is current
        let pool = private(1 << 20);
        unsafe { done(sys::cuCtxPopCurrent_v2(&mut std::ptr::null_mut())) };
        let of_first = Kv::new(&mut first, flat(2, 2, 4096));
        let filled = of_first.fill(&first, 1);
        // The pool is registered once, by the first that comes, for both.
        ends(of_second.copy(Direction::Gather, &[chunk(&[0], 65536)], &pool)).unwrap();
        ends(of_first.copy(Direction::Gather, &[chunk(&[0], 0)], &pool)).unwrap();
        assert!(read(&*pool, 0, 4096) == filled[0][..4096]);
        assert_eq!(Fake::here().unwrap().calls("cuMemHostRegister_v2"), 1);
        let error = unsafe {
            CudaMemory::new(Arc::clone(&of_first.shape), 1, first.stream(), &of_first.arrays)
        };
        assert_eq!(error.unwrap_err().code, ErrorCode::InvalidArgument);
        // Gone on one device, the pool is still the other's.
        drop(of_second);
        of_first.fill(&first, 5);
        ends(of_first.copy(Direction::Scatter, &[chunk(&[0], 0)], &pool)).unwrap();
        assert!(first.read(of_first.arrays[0].0, 4096) == filled[0][..4096]);
        drop(of_first);
        drop(first);
        let context = unsafe {
            let mut context = std::ptr::null_mut();
            done(sys::cuDevicePrimaryCtxRetain(&raw mut context, 1));
            done(sys::cuDevicePrimaryCtxRelease_v2(1));
            context
        };
        unsafe { done(sys::cuCtxPushCurrent_v2(context)) };
        drop(second);
        assert_eq!(violations(), 0);
    });
}

#[test]
fn memory_that_is_not_the_devices_is_refused() {
    on("memory_that_is_not_the_devices_is_refused", &ALL, false, || {
        let mut engine = Engine::new(0);
        let shape = shape(&flat(1, 4, 4096));
        let bytes = shape.array_bytes();
        let good = engine.allocate(bytes);
        let freed = engine.allocate(bytes);
        engine.free(freed);
        let host = vec![0u8; 1 << 20];
        let host = host.as_ptr().expose_provenance() as u64 / 4096 * 4096 + 4096;
        for bad in [host, freed, good + 2] {
            let error = open(&engine, &shape, &[(bad, bytes)]).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
        }
        for arrays in [&[][..], &[(0, bytes)], &[(good, bytes - 1)], &[(good + 1, bytes)]] {
            let error = open(&engine, &shape, arrays).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
        }
        let error =
            unsafe { CudaMemory::new(Arc::clone(&shape), 99, engine.stream(), &[(good, bytes)]) };
        assert_eq!(error.unwrap_err().code, ErrorCode::CudaUnavailable);
        assert_eq!(cuda::ipc_handle(0, host).unwrap_err().code, ErrorCode::InvalidArgument);
        assert_eq!(violations(), 0);
    });
}

#[test]
fn copies_that_make_no_sense_are_refused_before_any_byte_moves() {
    on("copies_that_make_no_sense_are_refused_before_any_byte_moves", &ALL[..1], false, || {
        struct Elsewhere;
        impl Memory for Elsewhere {
            fn bytes(&self) -> u64 {
                1 << 20
            }
            fn read(&self, _: u64, _: &mut [u8]) -> Result<()> {
                Ok(())
            }
            fn write(&self, _: u64, _: &[u8]) -> Result<()> {
                Ok(())
            }
        }
        let mut engine = Engine::new(0);
        let kv = Kv::new(&mut engine, flat(2, 2, 4096));
        let other = shape(&flat(2, 3, 4096));
        let pool = private(1 << 20);
        let plan = other.plan(Direction::Gather, &[chunk(&[2], 0)], 1 << 20).unwrap();
        let refused = |copying: Result<Copying>| copying.map(drop).unwrap_err().code;
        assert_eq!(
            refused(kv.memory.copy(plan, Arc::clone(&pool), false)),
            ErrorCode::InvalidArgument
        );
        let beyond = kv.shape.plan(Direction::Gather, &[chunk(&[0], 1 << 20)], 1 << 21).unwrap();
        assert_eq!(
            refused(kv.memory.copy(beyond, Arc::clone(&pool), false)),
            ErrorCode::InvalidArgument
        );
        let elsewhere: Arc<dyn Memory> = Arc::new(Elsewhere);
        let copying = kv.copy(Direction::Gather, &[chunk(&[0], 0)], &elsewhere);
        assert_eq!(refused(copying), ErrorCode::InvalidArgument);
        ends(kv.copy(Direction::Gather, &[], &pool)).unwrap();
        kv.memory.close();
        kv.memory.close();
        let copying = kv.copy(Direction::Gather, &[chunk(&[0], 0)], &pool);
        assert_eq!(refused(copying), ErrorCode::Closed);
        assert_eq!(kv.memory.set_method(Method::Single).unwrap_err().code, ErrorCode::Closed);
    });
}

/// A pool behind a guard that counts those who may write.
struct Guarded {
    pool: Arc<dyn Memory>,
    held: Arc<AtomicUsize>,
    /// What asking for a permit does first.
    asked: Mutex<Asked>,
    /// What calls fail with that are to fail.
    code: u32,
}

#[derive(Clone, Copy)]
enum Asked {
    Grant,
    /// Nothing runs on the device from then on.
    Hold,
    /// The same, and of the calls of this function from then on, those from the first number to the second fail.
    HoldAndFail(&'static str, u64, u64),
    Refuse,
}

struct Held(Arc<AtomicUsize>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Memory for Guarded {
    fn bytes(&self) -> u64 {
        self.pool.bytes()
    }
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        self.pool.read(offset, into)
    }
    fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        self.pool.write(offset, from)
    }
    fn guarded(&self) -> Option<&Arc<dyn Memory>> {
        Some(&self.pool)
    }
    fn permit(&self) -> Result<Permit> {
        match *self.asked.lock().unwrap() {
            Asked::Grant => {}
            Asked::Hold => Fake::here().unwrap().hold(true),
            Asked::HoldAndFail(call, first, last) => {
                let fake = Fake::here().unwrap();
                fake.hold(true);
                (first..=last).for_each(|nth| fake.fail(call, nth, self.code));
            }
            Asked::Refuse => return Err(Error::new(ErrorCode::Unreachable, "the server is gone")),
        }
        self.held.fetch_add(1, Ordering::SeqCst);
        Ok(Permit::holding(Held(Arc::clone(&self.held))))
    }
}

#[test]
fn a_store_writes_under_the_pools_permit_and_only_then() {
    on("a_store_writes_under_the_pools_permit_and_only_then", &ALL, true, || {
        let mut engine = Engine::new(0);
        let kv = Kv::new(&mut engine, flat(2, 2, 4096));
        let fake = Fake::here().unwrap();
        let held = Arc::new(AtomicUsize::new(0));
        let asked = Mutex::new(Asked::Grant);
        let guarded =
            Arc::new(Guarded { pool: private(1 << 20), held: Arc::clone(&held), asked, code: 999 });
        let pool: Arc<dyn Memory> = guarded.clone();
        fake.hold(true);
        engine.compute(kv.arrays[0].0, 7, 4096);
        let queries = fake.calls("cuEventQuery");
        let copying = kv.copy(Direction::Gather, &[chunk(&[0], 0)], &pool).unwrap();
        fake.await_calls("cuEventQuery", queries + 3);
        assert_eq!(held.load(Ordering::SeqCst), 0, "none while compute runs");
        fake.hold(false);
        wait(copying.ended()).unwrap();
        assert_eq!(held.load(Ordering::SeqCst), 0, "none after the end");
        assert!(read(&*pool, 0, 4096).iter().all(|byte| *byte == 7));

        *guarded.asked.lock().unwrap() = Asked::Hold;
        let records = fake.calls("cuEventRecord");
        let copying = kv.copy(Direction::Gather, &[chunk(&[0], 0)], &pool).unwrap();
        fake.await_calls("cuEventRecord", records + 2);
        assert_eq!(held.load(Ordering::SeqCst), 1, "one while the device writes");
        fake.hold(false);
        wait(copying.ended()).unwrap();
        assert_eq!(held.load(Ordering::SeqCst), 0);

        *guarded.asked.lock().unwrap() = Asked::Refuse;
        pool.write(0, &[9; 4096]).unwrap();
        let error = ends(kv.copy(Direction::Gather, &[chunk(&[1], 0)], &pool)).unwrap_err();
        assert_eq!(error.code, ErrorCode::Unreachable);
        assert!(read(&*pool, 0, 4096).iter().all(|byte| *byte == 9), "nothing was written");
        ends(kv.copy(Direction::Scatter, &[chunk(&[1], 0)], &pool)).unwrap();
        assert!(engine.read(kv.arrays[0].0 + 4096, 4096).iter().all(|byte| *byte == 9));
        assert_eq!(violations(), 0);
    });
}

#[test]
fn a_pool_is_registered_step_by_step_once_for_all_and_given_back() {
    on("a_pool_is_registered_step_by_step_once_for_all_and_given_back", &ALL, true, || {
        let mut engine = Engine::new(0);
        let first = Kv::new(&mut engine, flat(2, 2, 4096));
        let second = Kv::new(&mut engine, flat(2, 2, 4096));
        // The kernel's tables are page-locked too, and would be counted.
        for kv in [&first, &second] {
            kv.memory.set_method(Method::Batch).unwrap();
        }
        let fake = Fake::here().unwrap();
        let pinned = || fake.alive()[3];
        // Of three steps the server has reserved the second alone: the others must not be touched.
        let name = format!("kvferry_test_{}_pins", std::process::id());
        let region = SharedRegion::create(&name, 3 * POOL_STEP).unwrap();
        region.reserve(1).unwrap();
        let pool: Arc<dyn Memory> = Arc::new(region);
        for kv in [&first, &second, &first] {
            ends(kv.copy(Direction::Gather, &[chunk(&[0], POOL_STEP + 4096)], &pool)).unwrap();
            ends(kv.copy(Direction::Scatter, &[chunk(&[0], POOL_STEP + 4096)], &pool)).unwrap();
        }
        assert_eq!((fake.calls("cuMemHostRegister_v2"), pinned()), (1, 1));
        let blocks = std::fs::metadata(format!("/dev/shm/{name}")).unwrap();
        assert_eq!(std::os::unix::fs::MetadataExt::blocks(&blocks) * 512, POOL_STEP);

        // The pool goes before the memories: unregistered while it is mapped.
        drop(pool);
        assert_eq!(
            pinned(),
            0,
            "nothing was to be registered ahead, and nobody else holds the pool"
        );
        // The memories go before the pool: the last one gives it back.
        let pool = private(1 << 20);
        for kv in [&first, &second] {
            ends(kv.copy(Direction::Gather, &[chunk(&[0], 0)], &pool)).unwrap();
        }
        assert_eq!(pinned(), 1);
        first.memory.close();
        assert_eq!(pinned(), 1);
        ends(second.copy(Direction::Gather, &[chunk(&[0], 0)], &pool)).unwrap();
        second.memory.close();
        assert_eq!(pinned(), 0);
        // A pool that cannot be registered is one copy's error.
        let third = Kv::new(&mut engine, flat(2, 2, 4096));
        third.memory.set_method(Method::Batch).unwrap();
        fake.fail("cuMemHostRegister_v2", 1, 2);
        let error = ends(third.copy(Direction::Gather, &[chunk(&[0], 0)], &pool)).unwrap_err();
        assert_eq!(error.code, ErrorCode::CudaFailed);
        assert!(error.message.starts_with("cuMemHostRegister_v2"), "{error}");
        ends(third.copy(Direction::Gather, &[chunk(&[0], 0)], &pool)).unwrap();
        assert_eq!(violations(), 0);
    });
}

const REGISTER: &str = "cuMemHostRegister_v2";

/// Memories of one engine whose copies page-lock nothing but the pool.
fn memories<const N: usize>(engine: &mut Engine) -> [Kv; N] {
    [(); N].map(|()| {
        let kv = Kv::new(engine, flat(2, 2, 4096));
        kv.memory.set_method(Method::Batch).unwrap();
        kv
    })
}

fn stores(kv: &Kv, slot: u64, pool: &Arc<dyn Memory>) -> Result<()> {
    ends(kv.copy(Direction::Gather, &[chunk(&[0], slot)], pool))
}

#[test]
fn steps_that_are_there_are_registered_before_copies_need_them() {
    on("steps_that_are_there_are_registered_before_copies_need_them", &ALL, true, || {
        let mut engine = Engine::new(0);
        let [first, second] = memories(&mut engine);
        let fake = Fake::here().unwrap();
        let state = || (fake.calls(REGISTER), fake.alive()[3]);
        // Of six steps the server has reserved three.
        let name = format!("kvferry_test_{}_ahead", std::process::id());
        let region = Arc::new(SharedRegion::create(&name, 5 * POOL_STEP + 4096).unwrap());
        (0..3).for_each(|step| region.reserve(step).unwrap());
        let pool: Arc<dyn Memory> = region.clone();
        stores(&first, POOL_STEP, &pool).unwrap();
        fake.await_that(|| state() == (3, 3));
        assert_eq!(state(), (3, 3), "two that no copy has touched");
        for (kv, step) in [(&first, 0), (&second, 2), (&second, 1)] {
            stores(kv, step * POOL_STEP + (1 << 20), &pool).unwrap();
        }
        assert_eq!(state(), (3, 3), "each once, for all");
        // It grows: the next copy, of whatever step, finds what is new; not the last, which is out of turn.
        region.reserve(5).unwrap();
        region.reserve(3).unwrap();
        fake.await_that(|| {
            stores(&second, 0, &pool).unwrap();
            state() == (4, 4)
        });
        assert_eq!(state(), (4, 4));
        let blocks = std::fs::metadata(format!("/dev/shm/{name}")).unwrap();
        let bytes = std::os::unix::fs::MetadataExt::blocks(&blocks) * 512;
        assert_eq!(bytes, 4 * POOL_STEP + 4096, "no page was touched that is not reserved");
        region.reserve(4).unwrap();
        stores(&first, 5 * POOL_STEP - 8192, &pool).unwrap();
        fake.await_that(|| state().1 == 5);
        // All goes with the last memory that used it.
        first.memory.close();
        assert!(fake.alive()[3] >= 5);
        second.memory.close();
        assert_eq!(fake.alive()[3], 0);
        assert_eq!(fake.violations(), 0);
    });
}

#[test]
fn a_client_registers_what_the_server_has_reserved_and_no_more() {
    const NAME: &str = "a_client_registers_what_the_server_has_reserved_and_no_more";
    // Linux 6.5: cachestat, here of no file.
    let code = unsafe { libc::syscall(451, -1, 0, 0, 0) };
    let error = std::io::Error::last_os_error();
    if code != -1 || error.raw_os_error() != Some(libc::EBADF) {
        return driver::skip(NAME, "the kernel does not tell what is reserved");
    }
    on(NAME, &ALL[..1], true, || {
        let mut engine = Engine::new(0);
        let [kv] = memories(&mut engine);
        let fake = Fake::here().unwrap();
        let name = format!("kvferry_test_{}_client", std::process::id());
        let server = SharedRegion::create(&name, 4 * POOL_STEP).unwrap();
        (0..3).for_each(|step| server.reserve(step).unwrap());
        let region = Arc::new(SharedRegion::open(&name, 4 * POOL_STEP).unwrap());
        let held = Arc::default();
        let pool: Arc<dyn Memory> =
            Arc::new(Guarded { pool: region, held, asked: Mutex::new(Asked::Grant), code: 999 });
        stores(&kv, 0, &pool).unwrap();
        fake.await_that(|| fake.alive()[3] == 3);
        assert_eq!(fake.alive()[3], 3);
        stores(&kv, 2 * POOL_STEP, &pool).unwrap();
        let blocks = std::fs::metadata(format!("/dev/shm/{name}")).unwrap();
        assert_eq!(std::os::unix::fs::MetadataExt::blocks(&blocks) * 512, 3 * POOL_STEP);
        server.reserve(3).unwrap();
        fake.await_that(|| fake.alive()[3] == 4); // with no further copy
        assert_eq!((fake.calls(REGISTER), fake.alive()[3]), (4, 4));
        drop((kv, pool));
        assert_eq!((fake.alive()[3], fake.violations()), (0, 0));
    });
}

#[test]
fn a_step_is_registered_once_though_copies_race_with_the_thread_that_goes_ahead() {
    const NAME: &str =
        "a_step_is_registered_once_though_copies_race_with_the_thread_that_goes_ahead";
    on(NAME, &ALL[..1], true, || {
        const STEPS: u64 = 48;
        let mut engine = Engine::new(0);
        let fake = Fake::here().unwrap();
        for round in 0..8 {
            let kvs: [Kv; 3] = memories(&mut engine);
            let pool = private(STEPS * POOL_STEP);
            let before = fake.calls(REGISTER);
            let (meet, pool) = (Barrier::new(kvs.len()), &pool);
            thread::scope(|scope| {
                for (kv, number) in kvs.iter().zip(0..) {
                    let meet = &meet;
                    scope.spawn(move || {
                        let mut worst = Ok(());
                        for step in 0..STEPS {
                            meet.wait();
                            // In the thread's order and against it.
                            let step = if round % 2 == 0 { step } else { STEPS - 1 - step };
                            let slot = step * POOL_STEP + (number << 20);
                            worst = worst.and(stores(kv, slot, pool));
                        }
                        worst.unwrap();
                    });
                }
            });
            assert_eq!((fake.calls(REGISTER) - before, fake.alive()[3]), (STEPS, STEPS));
            drop(kvs);
            assert_eq!(fake.alive()[3], 0);
        }
        assert_eq!(fake.violations(), 0);
    });
}

#[test]
fn copies_wait_for_no_registration_but_that_of_their_own_step() {
    on("copies_wait_for_no_registration_but_that_of_their_own_step", &ALL[..1], true, || {
        let mut engine = Engine::new(0);
        let [first, second] = memories(&mut engine);
        let fake = Fake::here().unwrap();
        let pool = private(4 * POOL_STEP);
        // The copy registers the second step, and the thread stays in the first.
        fake.hold_calls(Some(REGISTER), 1);
        stores(&first, POOL_STEP, &pool).unwrap();
        fake.await_calls(REGISTER, 2);
        stores(&first, POOL_STEP, &pool).unwrap();
        stores(&second, POOL_STEP + (1 << 20), &pool).unwrap();
        // What is not registered is so at once, by the copy.
        let copying = second.copy(Direction::Gather, &[chunk(&[0], 3 * POOL_STEP)], &pool).unwrap();
        fake.await_calls(REGISTER, 3);
        assert_eq!(fake.calls(REGISTER), 3);
        // A copy that needs the step which is under way waits for that one, and asks for no other.
        let queries = fake.calls("cuEventQuery");
        let waits = first.copy(Direction::Gather, &[chunk(&[0], 0)], &pool).unwrap();
        fake.await_calls("cuEventQuery", queries + 1); // the last before it looks for its step
        fake.hold_calls(None, 0);
        wait(copying.ended()).unwrap();
        wait(waits.ended()).unwrap();
        fake.await_that(|| fake.alive()[3] == 4);
        assert_eq!((fake.calls(REGISTER), fake.alive()[3]), (4, 4));
        drop((first, second));
        assert_eq!((fake.alive()[3], fake.violations()), (0, 0));
    });
}

#[test]
fn a_step_that_cannot_be_registered_ahead_is_the_error_of_no_copy_but_its_own() {
    const NAME: &str = "a_step_that_cannot_be_registered_ahead_is_the_error_of_no_copy_but_its_own";
    on(NAME, &ALL[..1], true, || {
        let mut engine = Engine::new(0);
        let fake = Fake::here().unwrap();
        for call in [REGISTER, "cuMemHostGetDevicePointer_v2"] {
            let [kv] = memories(&mut engine);
            let pool = private(3 * POOL_STEP);
            fake.reset();
            // The first is the copy's own; memory cannot be page-locked for the thread's, and for the copy's after that.
            (2..=3).for_each(|nth| fake.fail(call, nth, 2));
            stores(&kv, 2 * POOL_STEP, &pool).unwrap();
            fake.await_calls(call, 2);
            (0..9).for_each(|_| stores(&kv, 2 * POOL_STEP, &pool).unwrap());
            assert_eq!(fake.calls(call), 2, "the thread does not try again and again");
            assert_eq!(fake.alive()[3], 1);
            let error = stores(&kv, 0, &pool).unwrap_err();
            assert_eq!(error.code, ErrorCode::CudaFailed);
            assert!(error.message.starts_with(call), "{error}");
            for slot in [0, POOL_STEP] {
                stores(&kv, slot, &pool).unwrap();
            }
            assert_eq!(fake.alive()[3], 3);
            drop(kv);
            assert_eq!((fake.alive()[3], fake.violations()), (0, 0));
        }
    });
}

#[test]
fn whoever_goes_while_steps_are_registered_ahead_leaves_none_registered() {
    const NAME: &str = "whoever_goes_while_steps_are_registered_ahead_leaves_none_registered";
    on(NAME, &ALL, true, || {
        let mut engine = Engine::new(0);
        let fake = Fake::here().unwrap();
        // The thread is in the registration of the first step when the memory closes, and ends after that.
        let [kv] = memories(&mut engine);
        let pool = private(40 * POOL_STEP);
        fake.hold_calls(Some(REGISTER), 1);
        stores(&kv, 39 * POOL_STEP, &pool).unwrap();
        fake.await_calls(REGISTER, 2);
        thread::scope(|scope| {
            let closing = scope.spawn(|| kv.memory.close());
            while kv.memory.set_method(Method::Batch).is_ok() {
                thread::yield_now();
            }
            assert!(!closing.is_finished(), "the registration is under way");
            fake.hold_calls(None, 0);
        });
        assert_eq!((fake.alive()[3], fake.calls(REGISTER)), (0, 2), "no other was begun");
        // Others begin anew.
        for _ in 0..2 {
            let [kv] = memories(&mut engine);
            stores(&kv, 39 * POOL_STEP, &pool).unwrap();
            fake.await_that(|| fake.alive()[3] == 40);
            assert_eq!(fake.alive()[3], 40);
            drop(kv);
            assert_eq!(fake.alive()[3], 0);
        }
        let [kv] = memories(&mut engine);
        stores(&kv, 0, &pool).unwrap();
        drop(pool);
        fake.await_that(|| fake.alive()[3] == 0); // the thread may look for more at this moment
        assert_eq!(fake.alive()[3], 0);
        // The pool goes while a step of it is registered.
        let (before, pool) = (fake.calls(REGISTER), private(40 * POOL_STEP));
        fake.hold_calls(Some(REGISTER), 1);
        stores(&kv, 0, &pool).unwrap();
        fake.await_calls(REGISTER, before + 2);
        drop(pool);
        assert_eq!(fake.alive()[3], 1, "the pages stay until that has ended");
        fake.hold_calls(None, 0);
        fake.await_that(|| fake.alive()[3] == 0);
        assert_eq!((fake.alive()[3], fake.calls(REGISTER)), (0, before + 2), "no other was begun");
        // The device is lost.
        let pool = private(40 * POOL_STEP);
        fake.hold_calls(Some(REGISTER), 1);
        stores(&kv, 0, &pool).unwrap();
        fake.await_calls(REGISTER, before + 4);
        fake.lose(719);
        fake.hold_calls(None, 0);
        stores(&kv, 0, &pool).unwrap_err();
        drop(kv);
        drop(pool);
        assert_eq!(fake.calls(REGISTER), before + 4);
        drop(engine);
        assert_eq!((fake.alive(), fake.violations()), ([0; 6], 0));
    });
}

#[test]
fn closing_waits_for_copies_under_way() {
    on("closing_waits_for_copies_under_way", &ALL, true, || {
        let mut engine = Engine::new(0);
        let kv = Kv::new(&mut engine, flat(3, 2, 4096));
        let asked = Mutex::new(Asked::Hold);
        let pool: Arc<dyn Memory> =
            Arc::new(Guarded { pool: private(1 << 20), held: Arc::default(), asked, code: 999 });
        let fake = Fake::here().unwrap();
        let records = fake.calls("cuEventRecord");
        let store = kv.copy(Direction::Gather, &[chunk(&[0], 0)], &pool).unwrap();
        fake.await_calls("cuEventRecord", records + 2);
        let load = kv.copy(Direction::Scatter, &[chunk(&[1], 1 << 18)], &pool).unwrap();
        fake.await_calls("cuEventRecord", records + 4);
        let late = kv.copy(Direction::Gather, &[chunk(&[0], 1 << 19)], &pool).unwrap();
        drop(pool);
        thread::scope(|scope| {
            let closing = [(); 2].map(|()| scope.spawn(|| kv.memory.close()));
            // Both have begun where no copy may begin any more.
            while kv.memory.set_method(Method::Batch).is_ok() {
                thread::yield_now();
            }
            let error = wait(late.ended()).unwrap_err();
            assert_eq!(error.code, ErrorCode::Closed, "the device was not asked for it: {error}");
            assert!(!closing.iter().any(thread::ScopedJoinHandle::is_finished));
            fake.hold(false);
        });
        assert_eq!((late.doubt(), kv.memory.doubt()), (None, None));
        assert_eq!(store.arrays(), 3);
        wait(store.ended()).unwrap();
        wait(load.ended()).unwrap();
        let [streams, .., pins, modules, contexts] = fake.alive();
        assert_eq!((streams, pins, modules, contexts), (1, 0, 0, 1), "the engine's alone");
        assert_eq!(violations(), 0);
    });
}

#[test]
fn closing_ends_though_the_device_does_not() {
    let leaks = [On::Fake(&[("FAKECUDA_STRICT", "0")])];
    on("closing_ends_though_the_device_does_not", &leaks, true, || {
        let mut engine = Engine::new(0);
        // Of the load more is left than parts that may be under way.
        let [kv, stuck, idle] = [64, 1, 1].map(|mib| Kv::new(&mut engine, flat(1, 2, mib << 20)));
        let fake = Fake::here().unwrap();
        let held = Arc::new(AtomicUsize::new(0));
        let guarded = |pool| Guarded {
            pool,
            held: Arc::clone(&held),
            asked: Mutex::new(Asked::Hold),
            code: 999,
        };
        let pool: Arc<dyn Memory> = Arc::new(guarded(private(POOL_STEP)));
        let records = fake.calls("cuEventRecord");
        let store = stuck.copy(Direction::Gather, &[chunk(&[0], 0)], &pool).unwrap();
        fake.await_calls("cuEventRecord", records + 2);
        let load = kv.copy(Direction::Scatter, &[chunk(&[1], 0)], &pool).unwrap();
        fake.await_calls("cuEventRecord", records + 3 + 4);
        let waits = fake.calls("cuStreamWaitEvent");
        let began = Instant::now();
        let of_nothing = idle.copy(Direction::Gather, &[chunk(&[0], 0)], &pool).unwrap();
        idle.memory.close();
        assert_eq!(wait(of_nothing.ended()).unwrap_err().code, ErrorCode::Closed);
        assert_eq!((of_nothing.doubt(), idle.memory.doubt()), (None, None));
        assert!(began.elapsed() < Duration::from_secs(8), "nobody waits for what was not begun");
        thread::scope(|scope| {
            for memory in [&kv.memory, &stuck.memory] {
                scope.spawn(|| memory.close());
            }
        });
        for (copying, memory) in [(&load, &kv.memory), (&store, &stuck.memory)] {
            let error = wait(copying.ended()).unwrap_err();
            assert!(error.message.contains("start the process anew"), "{error}");
            assert_eq!(copying.doubt(), Some(error.clone()));
            assert_eq!(memory.doubt(), Some(error));
        }
        assert_eq!(held.load(Ordering::SeqCst), 1, "the store's slots are never another's");
        // Compute in the load's blocks, which the engine takes for failed, comes after what is under way.
        assert_eq!(fake.calls("cuStreamWaitEvent"), waits + 1);
        fake.hold(false);
    });
}

#[test]
fn closing_ends_though_a_call_of_the_drivers_does_not() {
    let leaks = [On::Fake(&[("FAKECUDA_STRICT", "0")])];
    on("closing_ends_though_a_call_of_the_drivers_does_not", &leaks, true, || {
        let mut engine = Engine::new(0);
        let kv = Kv::new(&mut engine, flat(1, 2, 4096));
        let fake = Fake::here().unwrap();
        let launched = fake.calls("cuLaunchKernel");
        fake.hold_calls(Some("cuLaunchKernel"), 0);
        let copying = kv.copy(Direction::Gather, &[chunk(&[0], 0)], &private(1 << 20)).unwrap();
        fake.await_calls("cuLaunchKernel", launched + 1);
        kv.memory.close();
        let error = wait(copying.ended()).unwrap_err();
        assert_eq!((copying.doubt(), kv.memory.doubt()), (Some(error.clone()), Some(error)));
        fake.hold_calls(None, 0);
    });
}

#[test]
fn an_engine_that_loses_the_device_ends_the_copies() {
    // The next test loses the fake driver's device, which runs our kernel alone.
    on("an_engine_that_loses_the_device_ends_the_copies", &[], false, || {
        let mut engine = Engine::new(0);
        let kv = Kv::new(&mut engine, flat(8, 2, 1 << 20));
        let pool = private(POOL_STEP);
        ends(kv.copy(Direction::Gather, &[chunk(&[1], 0)], &pool)).unwrap();
        engine.crash();
        for direction in [Direction::Gather, Direction::Scatter] {
            let ended = ends(kv.copy(direction, &[chunk(&[1], 0)], &pool)).unwrap_err();
            assert_eq!(ended.code, ErrorCode::CudaFailed, "{ended}");
            assert!(ended.message.contains("started anew"), "{ended}");
        }
        drop(kv);
        std::mem::forget(engine); // what it has cannot be given back any more
    });
}

#[test]
fn a_lost_device_ends_every_copy_and_later_ones_fail_at_once() {
    on("a_lost_device_ends_every_copy_and_later_ones_fail_at_once", &ALL, true, || {
        let mut engine = Engine::new(0);
        let kv = Kv::new(&mut engine, flat(8, 2, 1 << 20));
        let pool = private(POOL_STEP);
        let fake = Fake::here().unwrap();
        fake.hold(true);
        let copies: Vec<Copying> = [Direction::Scatter, Direction::Gather, Direction::Scatter]
            .map(|direction| kv.copy(direction, &[chunk(&[1], 0)], &pool).unwrap())
            .into();
        fake.lose(719);
        fake.hold(false);
        for copying in copies {
            let error = wait(copying.ended()).unwrap_err();
            assert_eq!(error.code, ErrorCode::CudaFailed);
            assert!(error.message.contains("CUDA_ERROR_LAUNCH_FAILED"), "{error}");
            assert!(error.message.contains("started anew"), "{error}");
        }
        let error = kv.copy(Direction::Gather, &[chunk(&[1], 0)], &pool).map(drop).unwrap_err();
        assert_eq!(error.code, ErrorCode::CudaFailed);
        drop(kv);
        drop(pool);
        drop(engine);
        assert_eq!(fake.alive(), [0; 6]);
        // A new engine has a context that works.
        let mut engine = Engine::new(0);
        let kv = Kv::new(&mut engine, flat(1, 2, 4096));
        ends(kv.copy(Direction::Gather, &[chunk(&[1], 0)], &private(1 << 20))).unwrap();
        assert_eq!(violations(), 0);
    });
}

/// What an injected failure meets: memory is opened, stores, loads by every method, and closes.
fn scenario(engine: &mut Engine) -> Result<()> {
    let layout = flat(3, 4, 4096);
    let shape = shape(&layout);
    let bytes = shape.array_bytes();
    let arrays: Vec<_> = (0..3).map(|_| (engine.allocate(bytes), bytes)).collect();
    let pool = private(1 << 20);
    let memory = open(engine, &shape, &arrays)?;
    let mut worst = Ok(());
    for method in METHODS {
        let chosen = memory.set_method(method);
        let mut copies = Vec::new();
        for (direction, block) in [(Direction::Gather, 1), (Direction::Scatter, 2)] {
            let slot = if direction == Direction::Gather { 0 } else { 1 << 18 };
            let plan = shape.plan(direction, &[chunk(&[block], slot)], pool.bytes()).unwrap();
            copies.push(memory.copy(plan, Arc::clone(&pool), false));
        }
        for copying in copies {
            worst = worst.and(ends(copying));
        }
        worst = worst.and(chosen);
    }
    drop(memory);
    worst
}

#[test]
fn every_failing_call_is_a_typed_error_that_leaves_nothing_behind() {
    on("every_failing_call_is_a_typed_error_that_leaves_nothing_behind", &ALL, true, || {
        // The driver is loaded before, which is a test of its own.
        cuda::check_available().unwrap();
        let fake = Fake::here().unwrap();
        let mut seen = 0;
        for call in CALLS {
            for code in [2, 999, 700] {
                // How often a call comes depends on the time (cuEventQuery): later ones fail no other way.
                for nth in 1..=40 {
                    fake.reset();
                    let mut engine = Engine::new(0);
                    fake.reset();
                    fake.fail(call, nth, code);
                    let ended = scenario(&mut engine);
                    let reached = fake.calls(call) >= nth;
                    assert_eq!(fake.violations(), 0, "{call} {nth} {code}: {ended:?}");
                    fake.reset();
                    let [streams, .., pins, modules, _] = fake.alive();
                    let left = (streams, pins, modules);
                    assert_eq!(left, (1, 0, 0), "{call} {nth} {code}: {ended:?}");
                    // Unless the device is lost, the engine computes and copies on.
                    if code != 700 && ended.is_err() {
                        let again = scenario(&mut engine);
                        assert_eq!(again, Ok(()), "after {call} {nth} {code}");
                        assert_eq!(fake.violations(), 0, "after {call} {nth} {code}");
                    }
                    drop(engine);
                    assert_eq!(fake.alive(), [0; 6], "{call} {nth} {code}");
                    if let Err(error) = ended {
                        let fine = [ErrorCode::CudaFailed, ErrorCode::InvalidArgument];
                        assert!(fine.contains(&error.code), "{call} {nth} {code}: {error}");
                        seen += 1;
                    }
                    if !reached {
                        break;
                    }
                }
            }
        }
        assert!(seen > 200, "{seen}");
    });
}

#[test]
fn what_may_be_under_way_keeps_its_permit_however_calls_fail() {
    on("what_may_be_under_way_keeps_its_permit_however_calls_fail", &ALL, true, || {
        let mut engine = Engine::new(0);
        let kv = Kv::new(&mut engine, flat(3, 4, 4096));
        let fake = Fake::here().unwrap();
        kv.memory.set_method(Method::Single).unwrap();
        // Of three pieces the second is refused when the first is under way.
        let failing =
            [("cuEventQuery", 1, 40), ("cuEventRecord", 1, 40), ("cuMemcpyDtoHAsync_v2", 2, 2)];
        for (call, first, last) in failing {
            let held = Arc::new(AtomicUsize::new(0));
            let asked = Mutex::new(Asked::HoldAndFail(call, first, last));
            let pool: Arc<dyn Memory> = Arc::new(Guarded {
                pool: private(1 << 20),
                held: Arc::clone(&held),
                asked,
                code: 999,
            });
            fake.reset();
            let copying = kv.copy(Direction::Gather, &[chunk(&[1], 0)], &pool).unwrap();
            fake.await_that(|| held.load(Ordering::SeqCst) == 1);
            // Before the permit, the engine's compute may have been asked for any number of times.
            let before = if call == "cuEventQuery" { fake.calls(call) } else { 0 };
            fake.await_calls(call, before + last);
            fake.await_calls("cuEventQuery", fake.calls("cuEventQuery") + 4);
            assert_eq!(held.load(Ordering::SeqCst), 1, "{call}: the device may write still");
            fake.hold(false);
            assert_eq!(wait(copying.ended()).unwrap_err().code, ErrorCode::CudaFailed, "{call}");
            assert_eq!(held.load(Ordering::SeqCst), 0, "{call}");
            ends(kv.copy(Direction::Scatter, &[chunk(&[2], 0)], &private(1 << 20))).unwrap();
        }
        assert_eq!(violations(), 0);
    });
}

#[test]
fn a_driver_that_never_says_whether_copies_are_done_keeps_what_it_may_write() {
    let leaks = [On::Fake(&[("FAKECUDA_STRICT", "0")])];
    let test = "a_driver_that_never_says_whether_copies_are_done_keeps_what_it_may_write";
    on(test, &leaks, true, || {
        let mut engine = Engine::new(0);
        let kv = Kv::new(&mut engine, flat(3, 4, 4096));
        let fake = Fake::here().unwrap();
        let held = Arc::new(AtomicUsize::new(0));
        let asked = Mutex::new(Asked::Hold);
        let guarded =
            Arc::new(Guarded { pool: private(1 << 20), held: Arc::clone(&held), asked, code: 999 });
        let pool: Arc<dyn Memory> = guarded.clone();
        let copying = kv.copy(Direction::Gather, &[chunk(&[1], 0)], &pool).unwrap();
        fake.await_that(|| held.load(Ordering::SeqCst) == 1);
        let of_nothing = kv.copy(Direction::Gather, &[chunk(&[3], 1 << 18)], &pool).unwrap();
        assert_eq!((copying.doubt(), kv.memory.doubt()), (None, None));
        fake.fail_at_random(1, 1000, 999);
        assert_eq!(wait(copying.ended()).unwrap_err().code, ErrorCode::CudaFailed, "nobody hangs");
        assert_eq!(copying.doubt(), wait(copying.ended()).err(), "its slots are to be kept");
        assert_eq!(kv.memory.doubt(), copying.doubt());
        assert!(wait(of_nothing.ended()).is_err());
        assert_eq!(of_nothing.doubt(), None, "nothing of it was asked for");
        let later = kv.copy(Direction::Gather, &[chunk(&[2], 0)], &pool);
        let later = later.map(drop).unwrap_err();
        assert_eq!(copying.doubt().as_ref(), Some(&later));
        for said in [
            "cuEventQuery failed with CUDA_ERROR_UNKNOWN",
            "no later copy",
            "shut the adapter down",
        ] {
            assert!(later.message.contains(said), "{later}");
        }
        fake.reset();
        drop(kv);
        assert_eq!(held.load(Ordering::SeqCst), 1, "the slots are never another's");
        drop(pool);
        assert!(Arc::strong_count(&guarded) > 1, "the pages are never unmapped");
        fake.hold(false);
    });
}

#[test]
fn a_code_that_does_not_end_the_context_ends_no_copy() {
    on("a_code_that_does_not_end_the_context_ends_no_copy", &ALL, true, || {
        // Device unavailable, ECC error, unknown.
        for code in [46, 214, 999] {
            let mut engine = Engine::new(0);
            let kv = Kv::new(&mut engine, flat(3, 4, 4096));
            let fake = Fake::here().unwrap();
            let held = Arc::new(AtomicUsize::new(0));
            let asked = Mutex::new(Asked::HoldAndFail("cuEventQuery", 1, 3));
            let pool: Arc<dyn Memory> =
                Arc::new(Guarded { pool: private(1 << 20), held: Arc::clone(&held), asked, code });
            let copying = kv.copy(Direction::Gather, &[chunk(&[1], 0)], &pool).unwrap();
            fake.await_that(|| held.load(Ordering::SeqCst) == 1);
            fake.await_calls("cuEventQuery", fake.calls("cuEventQuery") + 6);
            assert_eq!(held.load(Ordering::SeqCst), 1, "{code}: the device may write still");
            fake.hold(false);
            assert_eq!(wait(copying.ended()).unwrap_err().code, ErrorCode::CudaFailed, "{code}");
            assert_eq!((copying.doubt(), kv.memory.doubt()), (None, None), "{code}: it was seen");
            ends(kv.copy(Direction::Scatter, &[chunk(&[2], 0)], &private(1 << 20))).unwrap();
            drop(kv);
            drop(pool);
            drop(engine);
            assert_eq!((fake.alive(), fake.violations()), ([0; 6], 0), "{code}");
            fake.reset();
        }
    });
}

#[test]
fn copies_spoil_no_graph_that_is_captured_meanwhile() {
    on("copies_spoil_no_graph_that_is_captured_meanwhile", &ALL, false, || {
        let mut engine = Engine::new(0);
        let shape = shape(&flat(3, 4, 4096));
        let bytes = shape.array_bytes();
        let arrays: Vec<_> = (0..3).map(|_| (engine.allocate(bytes), bytes)).collect();
        let pool = private(1 << 20);
        engine.capture(true);
        let memory = open(&engine, &shape, &arrays).unwrap();
        for direction in [Direction::Gather, Direction::Scatter] {
            let plan = shape.plan(direction, &[chunk(&[1], 0)], pool.bytes()).unwrap();
            ends(memory.copy(plan, Arc::clone(&pool), false)).unwrap();
        }
        drop(memory);
        drop(pool);
        engine.capture(false);
        assert_eq!(violations(), 0);
    });
}

#[test]
fn calls_that_fail_at_random_hang_and_leak_nothing() {
    on("calls_that_fail_at_random_hang_and_leak_nothing", &ALL, true, || {
        cuda::check_available().unwrap();
        let fake = Fake::here().unwrap();
        for (seed, per_mille) in (0..60).flat_map(|seed| [(seed, 100), (seed, 400)]) {
            let mut engine = Engine::new(0);
            let pool = private(1 << 20);
            let shape = shape(&flat(3, 4, 4096));
            let bytes = shape.array_bytes();
            let arrays: Vec<_> = (0..3).map(|_| (engine.allocate(bytes), bytes)).collect();
            let memory = open(&engine, &shape, &arrays).unwrap();
            fake.fail_at_random(seed, per_mille, if seed % 2 == 0 { 2 } else { 719 });
            let copies: Vec<_> = [Direction::Gather, Direction::Scatter, Direction::Gather]
                .into_iter()
                .zip(0u32..)
                .map(|(direction, block)| {
                    let slot = u64::from(block) << 18;
                    let plan = shape.plan(direction, &[chunk(&[block], slot)], pool.bytes());
                    memory.copy(plan.unwrap(), Arc::clone(&pool), false)
                })
                .collect();
            for copying in copies {
                if let Err(error) = ends(copying) {
                    assert_eq!(error.code, ErrorCode::CudaFailed, "{error}");
                }
            }
            assert_eq!(fake.violations(), 0, "{seed}, {per_mille}");
            fake.reset();
            drop(memory);
            drop(pool);
            drop(engine);
            assert_eq!(fake.alive(), [0; 6], "{seed}, {per_mille}");
            assert_eq!(fake.violations(), 0, "{seed}, {per_mille}");
        }
    });
}

/// The driver's functions that the crate calls, those that load it excepted.
const CALLS: [&str; 30] = [
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2",
    "cuThreadExchangeStreamCaptureMode",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventQuery",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemHostGetDevicePointer_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyBatchAsync",
    "cuMemcpyBatchAsync_v2",
    "cuPointerGetAttribute",
    "cuMemGetAddressRange_v2",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuModuleUnload",
    "cuLaunchKernel",
];

#[test]
fn without_a_usable_driver_one_typed_error_says_why() {
    let more = [
        "cuInit",
        "cuDriverGetVersion",
        "cuGetErrorName",
        "cuIpcGetMemHandle",
        "cuIpcOpenMemHandle_v2",
        "cuIpcCloseMemHandle",
        "cuIpcOpenEventHandle",
        "cuDeviceGetUuid_v2",
    ];
    let needed = CALLS.into_iter().filter(|call| !call.starts_with("cuMemcpyBatchAsync"));
    let mut unusable: Vec<On> = needed.chain(more).map(On::Without).collect();
    unusable.extend([
        On::Nothing,
        On::Fake(&[("FAKECUDA_DEVICES", "0")]),
        On::Fake(&[("FAKECUDA_FAIL", "cuInit:1:999")]),
    ]);
    on("without_a_usable_driver_one_typed_error_says_why", &unusable, true, || {
        let shape = shape(&flat(1, 2, 4096));
        let bytes = shape.array_bytes();
        let error = cuda::check_available().unwrap_err();
        assert_eq!(error.code, ErrorCode::CudaUnavailable);
        let named = ["libcuda.so.1", "there is no CUDA device 0", "cuInit says"];
        let missing = CALLS.into_iter().chain(more).map(|call| format!("has no {call}: install"));
        let mut named = named.map(str::to_owned).into_iter().chain(missing);
        assert!(named.any(|name| error.message.contains(&name)), "{error}");
        assert!(!error.message.contains("panic"), "{error}");
        // A second try may find a driver well that did not start; the others stay as they are.
        let opened = unsafe { CudaMemory::new(shape, 0, 0, &[(0x7000_0000_0000, bytes)]) };
        let opened = opened.unwrap_err();
        assert!(opened.code == ErrorCode::CudaUnavailable || error.message.contains("cuInit says"));
    });
}

#[test]
fn a_driver_without_the_batched_copy_or_the_way_to_find_it_copies_one_by_one() {
    let old = [
        On::Without("cuGetProcAddress_v2"),
        On::Without("cuMemcpyBatchAsync"),
        On::Fake(&[("FAKECUDA_FAIL", "cuGetProcAddress_v2:1:500")]),
        On::Fake(&[("FAKECUDA_VERSION", "11040")]),
        On::Fake(&[("FAKECUDA_FAIL", "cuDriverGetVersion:1:999")]),
    ];
    on(
        "a_driver_without_the_batched_copy_or_the_way_to_find_it_copies_one_by_one",
        &old,
        true,
        || {
            let mut engine = Engine::new(0);
            let kv = Kv::new(&mut engine, layout(Planes::Separate, Order::Hnd, 0));
            kv.memory.set_method(Method::Batch).unwrap();
            round_trip(&engine, &kv, &private(4 * kv.shape.object_bytes()), "one by one");
            let fake = Fake::here().unwrap();
            assert_eq!(fake.calls("cuMemcpyBatchAsync") + fake.calls("cuMemcpyBatchAsync_v2"), 0);
            assert!(fake.calls("cuMemcpyDtoHAsync_v2") > 1);
            assert_eq!(fake.violations(), 0);
        },
    );
}

#[test]
fn each_driver_gets_the_form_of_the_batched_copy_that_it_has() {
    on("each_driver_gets_the_form_of_the_batched_copy_that_it_has", &ALL, true, || {
        let mut engine = Engine::new(0);
        let kv = Kv::new(&mut engine, layout(Planes::Separate, Order::Hnd, 0));
        kv.memory.set_method(Method::Batch).unwrap();
        ends(kv.copy(Direction::Gather, &[chunk(&[0, 1, 2, 3], 0)], &private(1 << 20))).unwrap();
        let fake = Fake::here().unwrap();
        let (cuda_12, cuda_13, single) = (
            fake.calls("cuMemcpyBatchAsync"),
            fake.calls("cuMemcpyBatchAsync_v2"),
            fake.calls("cuMemcpyDtoHAsync_v2"),
        );
        match std::env::var("FAKECUDA_VERSION").as_deref() {
            Ok("12040") => assert!(single > 1 && cuda_12 + cuda_13 == 0),
            Ok("12080") => assert!(cuda_12 == 1 && single + cuda_13 == 0),
            _ => assert!(cuda_13 == 1 && single + cuda_12 == 0),
        }
    });
}

#[test]
fn the_kernel_is_for_small_pieces_unless_it_is_turned_off_or_refused() {
    let all = [
        On::Fake(&[]),
        On::Fake(&[("KVFERRY_CUDA_KERNEL", "0")]),
        On::Fake(&[("FAKECUDA_FAIL", "cuModuleLoadData:1:218")]),
    ];
    on("the_kernel_is_for_small_pieces_unless_it_is_turned_off_or_refused", &all, true, || {
        let mut engine = Engine::new(0);
        let fake = Fake::here().unwrap();
        let pool = private(1 << 20);
        let without = ["KVFERRY_CUDA_KERNEL", "FAKECUDA_FAIL"].map(std::env::var_os);
        let expected = u64::from(without == [None, None]);
        let small = Kv::new(&mut engine, flat(2, 2, 32 << 10));
        round_trip_of_one(&engine, &small, &pool);
        assert_eq!(fake.calls("cuLaunchKernel"), 2 * expected);
        let large = Kv::new(&mut engine, flat(2, 2, 64 << 10));
        round_trip_of_one(&engine, &large, &pool);
        assert_eq!(fake.calls("cuLaunchKernel"), 2 * expected);
        assert_eq!(fake.violations(), 0);
    });
}

/// Stores the first block and loads it into the second.
fn round_trip_of_one(engine: &Engine, kv: &Kv, pool: &Arc<dyn Memory>) {
    kv.fill(engine, 11);
    ends(kv.copy(Direction::Gather, &[chunk(&[0], 4096)], pool)).unwrap();
    ends(kv.copy(Direction::Scatter, &[chunk(&[1], 4096)], pool)).unwrap();
    for array in kv.arrays(engine) {
        let (first, second) = array.split_at(array.len() / 2);
        assert!(first == second);
    }
}

#[test]
fn memories_pools_and_threads_do_not_disturb_each_other() {
    on("memories_pools_and_threads_do_not_disturb_each_other", &ALL, false, || {
        let mut engine = Engine::new(0);
        let kvs: Vec<Kv> = (0..3).map(|_| Kv::new(&mut engine, flat(4, 16, 4096))).collect();
        let pools: Vec<Arc<dyn Memory>> = (0..2).map(|_| private(1 << 20)).collect();
        let filled: Vec<_> = (0..).zip(&kvs).map(|(n, kv)| kv.fill(&engine, n * 100)).collect();
        thread::scope(|scope| {
            for (number, kv) in kvs.iter().enumerate() {
                for half in 0..2u32 {
                    let (pools, filled) = (&pools, &filled[number]);
                    scope.spawn(move || {
                        let object = kv.shape.object_bytes();
                        for round in 0..12u32 {
                            let pool = &pools[(round % 2) as usize];
                            let slot = (number as u64 * 2 + u64::from(half)) * object;
                            let block = half * 8 + round % 4;
                            let to = half * 8 + 4 + round % 4;
                            ends(kv.copy(Direction::Gather, &[chunk(&[block], slot)], pool))
                                .unwrap();
                            let mut stored = vec![0; 4096];
                            pool.read(slot, &mut stored).unwrap();
                            let at = block as usize * 4096;
                            assert!(stored == filled[0][at..at + 4096]);
                            ends(kv.copy(Direction::Scatter, &[chunk(&[to], slot)], pool)).unwrap();
                        }
                    });
                }
            }
        });
        for (kv, filled) in kvs.iter().zip(&filled) {
            for (array, filled) in kv.arrays(&engine).iter().zip(filled) {
                for half in [0, 8 * 4096] {
                    let from = &filled[half..half + 4 * 4096];
                    assert!(array[half + 4 * 4096..half + 8 * 4096] == *from);
                }
            }
        }
        assert_eq!(violations(), 0);
    });
}

#[test]
fn memory_of_another_process_is_opened_used_and_closed() {
    const NAME: &str = "memory_of_another_process_is_opened_used_and_closed";
    const HANDLES: &str = "KVFERRY_CUDA_TEST_HANDLES";
    on(NAME, &ALL, false, || {
        let layout = flat(2, 4, 4096);
        let shape = shape(&layout);
        let bytes = shape.array_bytes();
        if let Ok(text) = std::env::var(HANDLES) {
            return import(&shape, bytes, &text);
        }
        let mut engine = Engine::new(0);
        // Both arrays in one allocation, neither at its start.
        let start = engine.allocate(1 << 20);
        let arrays = [start + 4096, start + 4096 + bytes];
        arrays.iter().for_each(|array| engine.write(*array, &noise(*array - start, bytes)));
        let handles = arrays.map(|array| {
            let (handle, offset) = cuda::ipc_handle(0, array).unwrap();
            let hex: String = handle.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{hex}:{offset}")
        });
        let mut child = driver::child(NAME);
        child.env(HANDLES, handles.join(",")).stdin(Stdio::null());
        driver::run_child(NAME, child);
        for array in arrays {
            let now = engine.read(array, bytes);
            let then = noise(array - start, bytes);
            assert!(now[..4096] == then[..4096] && now[2 * 4096..] == then[2 * 4096..]);
            assert!(now[4096..8192] == then[3 * 4096..], "block 3 was loaded into block 1");
        }
        assert_eq!(violations(), 0);
    });
}

/// Two layers in one allocation of another process, which its handle names.
fn described(handle: [u8; 64], device_uuid: [u8; 16]) -> DescribedMemory {
    let layers = [4096, 4096 + EXPORTED_LAYER].map(|offset| KvDescriptor {
        storage: KvStorage::Cuda(Box::new(CudaStorage {
            device_uuid,
            handle,
            offset,
            bytes: EXPORTED_LAYER,
        })),
        dtype: Dtype::new("uint8").unwrap(),
        shape: vec![4, 16, 256],
        stride: vec![4096, 256, 1],
        storage_offset: 0,
    });
    let registration = KvRegistration {
        model_name: "m".into(),
        world_size: 1,
        engine_type: "vllm".into(),
        kv_layout: None,
        groups: Vec::new(),
        layers: layers.into(),
    };
    registration.memory(16).unwrap()
}

const EXPORTED_LAYER: u64 = 4 * 4096;

#[test]
fn an_engines_exported_memory_is_copied_and_what_does_not_end_is_in_doubt() {
    const NAME: &str = "an_engines_exported_memory_is_copied_and_what_does_not_end_is_in_doubt";
    const HANDLE: &str = "KVFERRY_CUDA_TEST_HANDLE";
    // What is in doubt is never given back.
    let leaks = [On::Fake(&[("FAKECUDA_STRICT", "0")])];
    on(NAME, &leaks, true, || {
        if let Ok(text) = std::env::var(HANDLE) {
            let mut handle = [0; 64];
            for (byte, at) in handle.iter_mut().zip((0..128).step_by(2)) {
                *byte = u8::from_str_radix(&text[at..at + 2], 16).unwrap();
            }
            return copy_exported(handle);
        }
        let mut engine = Engine::new(0);
        let start = engine.allocate(1 << 20);
        engine.write(start + 4096, &noise(1, 2 * EXPORTED_LAYER));
        let (handle, offset) = cuda::ipc_handle(0, start).unwrap();
        assert_eq!(offset, 0);
        let hex: String = handle.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut child = driver::child(NAME);
        child.env(HANDLE, hex).stdin(Stdio::null());
        driver::run_child(NAME, child);
    });
}

/// The other process, which holds its device up.
fn copy_exported(handle: [u8; 64]) {
    let (mut uuid, going_on) = ([0u8; 16], || Ok(()));
    let late = || Err(Error::new(ErrorCode::Timeout, "late"));
    cuda::check_available().unwrap();
    unsafe { done(sys::cuDeviceGetUuid_v2((&raw mut uuid).cast(), 0)) };
    let elsewhere = ExportedMemory::open(&described(handle, [1; 16]));
    assert_eq!(elsewhere.map(drop).unwrap_err().code, ErrorCode::CudaUnavailable);
    let fake = Fake::here().unwrap();
    let memory = ExportedMemory::open(&described(handle, uuid)).unwrap();
    let pool = private(1 << 20);
    let plan = |direction, block: u32| {
        memory.shape().plan(direction, &[chunk(&[block], 8192)], pool.bytes()).unwrap()
    };
    memory.copy(plan(Direction::Gather, 3), Arc::clone(&pool), &going_on).unwrap();
    let whole = noise(1, 2 * EXPORTED_LAYER);
    let layer = usize::try_from(EXPORTED_LAYER).unwrap();
    assert!(read(&*pool, 8192, 4096) == whole[3 * 4096..4 * 4096]);
    assert!(read(&*pool, 8192 + 4096, 4096) == whole[layer + 3 * 4096..layer + 4 * 4096]);
    assert_eq!(fake.violations(), 0);
    // A copy that is given up comes to its end before that is told.
    fake.hold(true);
    let asked = AtomicUsize::new(0);
    thread::scope(|scope| {
        let copying = scope.spawn(|| {
            let give_up = || {
                asked.fetch_add(1, Ordering::SeqCst);
                late()
            };
            memory.copy(plan(Direction::Scatter, 0), Arc::clone(&pool), &give_up)
        });
        fake.await_that(|| asked.load(Ordering::SeqCst) > 0);
        assert!(!copying.is_finished(), "the device may still read the slot");
        fake.hold(false);
        assert_eq!(copying.join().unwrap().unwrap_err().code, ErrorCode::Timeout);
    });
    assert!(!memory.is_in_doubt());
    // One that does not end is in doubt, and no other begins.
    fake.hold(true);
    let stuck = memory.copy(plan(Direction::Gather, 1), Arc::clone(&pool), &late);
    assert_eq!(stuck.unwrap_err().code, ErrorCode::CudaFailed);
    assert!(memory.is_in_doubt());
    let refused = memory.wait_for(&[0; 64], &going_on).unwrap_err();
    assert!(refused.message.contains("set apart"), "{refused}");
    let before = Arc::strong_count(&pool);
    drop(memory);
    assert_eq!(Arc::strong_count(&pool), before, "its pages stay");
    fake.hold(false);
}

/// The other process: stores block 3 and loads it into block 1.
fn import(shape: &Arc<CopyShape>, bytes: u64, text: &str) {
    let arrays: Vec<IpcArray> = text
        .split(',')
        .map(|array| {
            let (hex, offset) = array.split_once(':').unwrap();
            let mut handle = [0; 64];
            for (byte, at) in handle.iter_mut().zip((0..128).step_by(2)) {
                *byte = u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
            }
            IpcArray { handle, offset: offset.parse().unwrap(), bytes }
        })
        .collect();
    let open =
        |arrays: &[IpcArray]| unsafe { CudaMemory::open_ipc(Arc::clone(shape), 0, 0, arrays) };
    let beyond = [arrays[0], IpcArray { offset: (1 << 20) - bytes + 4096, ..arrays[1] }];
    assert_eq!(open(&beyond).unwrap_err().code, ErrorCode::InvalidArgument);
    let endless = [arrays[0], IpcArray { offset: u64::MAX - 1, ..arrays[1] }];
    assert_eq!(open(&endless).unwrap_err().code, ErrorCode::InvalidArgument);
    let memory = open(&arrays).unwrap();
    if let Some(fake) = Fake::here() {
        assert_eq!(fake.alive()[2], 1, "one allocation, opened once");
    }
    let pool = private(1 << 20);
    let plan = |direction, block: u32| {
        shape.plan(direction, &[chunk(&[block], 8192)], pool.bytes()).unwrap()
    };
    ends(memory.copy(plan(Direction::Gather, 3), Arc::clone(&pool), false)).unwrap();
    for (array, at) in arrays.iter().zip([8192, 8192 + 4096]) {
        assert!(read(&*pool, at, 4096) == noise(array.offset, bytes)[3 * 4096..]);
    }
    ends(memory.copy(plan(Direction::Scatter, 1), Arc::clone(&pool), false)).unwrap();
    memory.close();
    if let Some(fake) = Fake::here() {
        assert_eq!((fake.alive(), fake.violations()), ([0; 6], 0), "closed");
        // What cannot be opened leaves nothing behind.
        for nth in 1..=2 {
            fake.fail("cuIpcOpenMemHandle_v2", nth, 205);
            let other = IpcArray { handle: [1; 64], ..arrays[1] };
            let opened = open(&[arrays[0], other]).unwrap_err();
            assert_eq!(opened.code, ErrorCode::CudaFailed);
            fake.reset();
        }
        assert_eq!(fake.alive(), [0; 6]);
    }
    let _ = std::io::stdout().flush();
}
