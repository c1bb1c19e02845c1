//! Copies between arrays and pools: the right bytes, and no others, whatever the layout and whoever interferes.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(unsafe_code, reason = "arrays are given by address")]
#![allow(clippy::cast_possible_truncation, reason = "the sizes are known here")]

use std::collections::HashMap;
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, LazyLock, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;

use kvferry_copy::{CopyThreads, HostArrays, HostMemory, PrivateRegion};
use kvferry_core::cache::{Memory, Permit};
use kvferry_core::copy_plan::{ChunkCopy, CopyPlan, CopyShape, Direction};
use kvferry_core::copy_sums::CopySums;
use kvferry_core::copying::KvMemory;
use kvferry_core::key::Dtype;
use kvferry_core::kv_layout::{KvLayout, Order, Planes};
use kvferry_core::{Error, ErrorCode, Result};
use proptest::prelude::*;

const CANARY: u8 = 0xee;
/// Longer than any of these copies: only a copy that hangs meets it.
const HANGS: Duration = Duration::from_secs(30);

/// Memory whose last byte (or first) lies beside a page that nobody may touch.
struct Guarded {
    mapping: *mut u8,
    mapped: usize,
    start: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory; the tests look at it when no copy runs.
unsafe impl Send for Guarded {}
// SAFETY: as above.
unsafe impl Sync for Guarded {}

const PAGE: usize = 4096;

impl Guarded {
    fn new(bytes: usize, at_the_end: bool) -> Self {
        let inner = bytes.next_multiple_of(PAGE);
        let mapped = inner + 2 * PAGE;
        // SAFETY: a fresh mapping at an address that the system chooses.
        let mapping = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(std::ptr::null_mut(), mapped, libc::PROT_NONE, flags, -1, 0)
        };
        assert_ne!(mapping, libc::MAP_FAILED);
        let mapping = mapping.cast::<u8>();
        // SAFETY: what lies between the first and the last page of the mapping above.
        let code = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mprotect(mapping.wrapping_add(PAGE).cast(), inner, protection)
        };
        assert_eq!(code, 0);
        let gap = if at_the_end { inner - bytes } else { 0 };
        let mut this = Self { mapping, mapped, start: mapping.wrapping_add(PAGE + gap), bytes };
        this.bytes_mut().fill(CANARY);
        this
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: readable memory of this size; no copy runs when the tests look.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and nobody uses it any more.
        unsafe { libc::munmap(self.mapping.cast(), self.mapped) };
    }
}

/// An engine's arrays, filled with bytes that differ from place to place.
struct Engine {
    shape: Arc<CopyShape>,
    memory: Vec<Guarded>,
}

impl Engine {
    fn new(layout: &KvLayout, chunk: u32, filled: bool) -> Self {
        let shape = Arc::new(layout.copy_shape(chunk));
        let memory = (0..shape.arrays())
            .map(|array| {
                let mut memory = Guarded::new(shape.array_bytes() as usize, array % 2 == 0);
                if filled {
                    fill(memory.bytes_mut(), array as u64);
                }
                memory
            })
            .collect();
        Self { shape, memory }
    }

    fn arrays(&self) -> HostArrays {
        let places: Vec<(*mut u8, usize)> =
            self.memory.iter().map(|memory| (memory.start, memory.bytes)).collect();
        // SAFETY: the tests drop the engine last.
        unsafe { HostArrays::new(Arc::clone(&self.shape), &places) }.unwrap()
    }

    fn plan(&self, direction: Direction, chunks: &[ChunkCopy<'_>], pool: &dyn Memory) -> CopyPlan {
        self.shape.plan(direction, chunks, pool.bytes()).unwrap()
    }
}

fn fill(bytes: &mut [u8], seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for byte in bytes {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        *byte = (state >> 33) as u8;
    }
}

/// Memory that only its own calls reach.
struct Elsewhere(Mutex<Vec<u8>>);

impl Memory for Elsewhere {
    fn bytes(&self) -> u64 {
        self.0.lock().unwrap().len() as u64
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        into.copy_from_slice(&self.0.lock().unwrap()[offset as usize..][..into.len()]);
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        self.0.lock().unwrap()[offset as usize..][..from.len()].copy_from_slice(from);
        Ok(())
    }
}

/// A pool whose writers need leave.
struct Gated {
    inner: Arc<dyn Memory>,
    /// Each permit waits for one message; `false` refuses it, and all later ones.
    leave: Mutex<Receiver<bool>>,
    asked: Sender<()>,
    permits: AtomicUsize,
}

impl Memory for Gated {
    fn bytes(&self) -> u64 {
        self.inner.bytes()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        self.inner.read(offset, into)
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        self.inner.write(offset, from)
    }

    fn guarded(&self) -> Option<&Arc<dyn Memory>> {
        Some(&self.inner)
    }

    fn permit(&self) -> Result<Permit> {
        let _ = self.asked.send(());
        match self.leave.lock().unwrap().recv_timeout(HANGS) {
            Ok(true) => {
                self.permits.fetch_add(1, Ordering::Relaxed);
                Ok(Permit::default())
            }
            Err(RecvTimeoutError::Timeout) => Err(Error::new(ErrorCode::Timeout, "the copy hangs")),
            _ => Err(Error::new(ErrorCode::Unreachable, "refused")),
        }
    }
}

fn gated(inner: &Arc<PrivateRegion>) -> (Arc<Gated>, Sender<bool>, Receiver<()>) {
    let ((give, leave), (asked, asks)) = (channel(), channel());
    let inner: Arc<dyn Memory> = Arc::<PrivateRegion>::clone(inner);
    let (leave, permits) = (Mutex::new(leave), AtomicUsize::new(0));
    (Arc::new(Gated { inner, leave, asked, permits }), give, asks)
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

fn contents(pool: &dyn Memory) -> Vec<u8> {
    let mut bytes = vec![0; pool.bytes() as usize];
    pool.read(0, &mut bytes).unwrap();
    bytes
}

fn layout(planes: Planes, order: Order, [block_size, heads, head_size]: [u32; 3]) -> KvLayout {
    KvLayout {
        num_layers: 2,
        num_blocks: 8,
        block_size,
        num_kv_heads: if planes == Planes::Latent { 1 } else { heads },
        head_size,
        dtype: Dtype::new("bfloat16").unwrap(),
        planes,
        order,
        block_stride: None,
    }
}

/// Where each byte of the chunks lies, in arrays and in the pool: spelt out from their shapes.
fn places(layout: &KvLayout, chunk: u32, copies: &[ChunkCopy<'_>]) -> HashMap<(usize, u64), u64> {
    let planes = if layout.planes == Planes::Separate { 2 } else { 1 };
    let halves = if layout.planes == Planes::Fused { 2 } else { 1 };
    let (layers, heads) = (u64::from(layout.num_layers), u64::from(layout.num_kv_heads));
    let (size, head_bytes) =
        (u64::from(layout.block_size), u64::from(layout.head_size) * 2 * halves);
    let stride = layout.block_stride.unwrap_or(size * heads * head_bytes);
    let mut places = HashMap::new();
    for copy in copies {
        for token in u64::from(copy.skip)..copy.blocks.len() as u64 * size {
            let block = u64::from(copy.blocks[(token / size) as usize]);
            for (layer, plane) in (0..layers).flat_map(|l| (0..planes).map(move |p| (l, p))) {
                for head in 0..heads {
                    let row = match layout.order {
                        Order::Nhd => token % size * heads + head,
                        Order::Hnd => head * size + token % size,
                    };
                    let at = block * stride + row * head_bytes;
                    let first = (plane * layers + layer) * u64::from(chunk);
                    let object = ((first + token) * heads + head) * head_bytes;
                    for byte in 0..head_bytes {
                        let array = (layer * planes + plane) as usize;
                        places.insert((array, at + byte), copy.slot + object + byte);
                    }
                }
            }
        }
    }
    places
}

#[derive(Debug, Clone, Copy)]
enum Pool {
    Private,
    Guarded,
    #[cfg(target_os = "linux")]
    Shared,
    Elsewhere,
}

impl Pool {
    fn make(self, bytes: u64) -> Arc<dyn Memory> {
        let pool: Arc<dyn Memory> = match self {
            Self::Private => Arc::new(PrivateRegion::new(bytes).unwrap()),
            Self::Guarded => {
                let inner = Arc::new(PrivateRegion::new(bytes).unwrap());
                let (pool, give, _) = gated(&inner);
                (0..1000).for_each(|_| give.send(true).unwrap());
                pool
            }
            #[cfg(target_os = "linux")]
            Self::Shared => {
                static NUMBER: AtomicUsize = AtomicUsize::new(0);
                let number = NUMBER.fetch_add(1, Ordering::Relaxed);
                let name = format!("kvferry_host_{}_{number}", std::process::id());
                let region = kvferry_copy::SharedRegion::create(&name, bytes).unwrap();
                region.reserve(0).unwrap();
                Arc::new(region)
            }
            Self::Elsewhere => Arc::new(Elsewhere(Mutex::new(vec![0; bytes as usize]))),
        };
        pool.write(0, &vec![CANARY; bytes as usize]).unwrap();
        pool
    }
}

fn pools() -> impl Strategy<Value = Pool> {
    prop::sample::select(vec![
        Pool::Private,
        Pool::Guarded,
        #[cfg(target_os = "linux")]
        Pool::Shared,
        Pool::Elsewhere,
    ])
}

/// How a plan is carried out.
#[derive(Debug, Clone)]
struct How {
    /// At once, in slices that end here; or else by itself.
    cuts: Option<Vec<u64>>,
    sums: bool,
}

/// Copies a plan; the checksums, where they are wanted.
fn copy(engine: &Engine, plan: CopyPlan, pool: &Arc<dyn Memory>, how: &How) -> Option<Vec<u64>> {
    let arrays = engine.arrays();
    let Some(cuts) = &how.cuts else {
        let threads = Arc::new(CopyThreads::new(2));
        let memory = HostMemory::on(&threads, arrays);
        let copying = memory.copy(plan, Arc::clone(pool), how.sums).unwrap();
        wait(copying.ended()).unwrap();
        assert_eq!(copying.arrays(), engine.shape.arrays());
        let sums = copying.checksums();
        assert!(how.sums || sums.is_empty());
        return how.sums.then_some(sums);
    };
    let mut cuts: Vec<u64> = cuts.iter().map(|cut| cut % (plan.bytes() + 1)).collect();
    cuts.extend([0, plan.bytes()]);
    cuts.sort_unstable();
    cuts.dedup();
    if plan.bytes() == 0 {
        cuts.push(0);
    }
    let mut sums = CopySums::default();
    for two in cuts.windows(2) {
        if how.sums {
            arrays.copy_summed(&plan, two[0]..two[1], &**pool, &mut sums).unwrap();
        } else {
            arrays.copy(&plan, two[0]..two[1], &**pool).unwrap();
        }
    }
    how.sums.then(|| sums.finish(&plan).unwrap())
}

/// CRC-64/NVME by its definition: reflected polynomial 0x9a6c9329ac4bc9b5, all bits set before and inverted after.
fn crc(bytes: &[u8]) -> u64 {
    static TABLE: LazyLock<[u64; 256]> = LazyLock::new(|| {
        std::array::from_fn(|byte| {
            (0..8).fold(byte as u64, |crc, _| (crc >> 1) ^ ((crc & 1) * 0x9a6c_9329_ac4b_c9b5))
        })
    });
    !bytes.iter().fold(!0, |crc, byte| TABLE[usize::from(crc as u8 ^ byte)] ^ (crc >> 8))
}

/// The checksums of the objects at these slots.
fn crcs(pool: &[u8], object: u64, slots: &[u64]) -> Vec<u64> {
    slots.iter().map(|slot| crc(&pool[*slot as usize..][..object as usize])).collect()
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: std::env::var("KVFERRY_HOST_CASES").map_or(150, |cases| cases.parse().unwrap()),
        ..ProptestConfig::default()
    })]

    #[test]
    fn what_was_gathered_is_scattered_and_nothing_else_changes(
        planes in prop::sample::select(vec![Planes::Separate, Planes::Fused, Planes::Latent]),
        order in prop::sample::select(vec![Order::Nhd, Order::Hnd]),
        block_size in prop::sample::select(vec![1u32, 4, 16]),
        heads in 1u32..=3,
        head_size in prop::sample::select(vec![1u32, 5, 32, 64, 200, 1500]),
        gap in prop::sample::select(vec![0u64, 2, 64]),
        pool in pools(),
        blocks in Just((0u32..8).collect::<Vec<_>>()).prop_shuffle(),
        targets in Just((0u32..8).collect::<Vec<_>>()).prop_shuffle(),
        (first, second) in (1usize..=4, 0usize..=4),
        skip in 0u32..20,
        slots_apart in prop::sample::select(vec![0u64, 1, 64, 4096]),
        cuts in prop::option::of(prop::collection::vec(0u64..1 << 40, 0..3)),
        sums in any::<bool>(),
    ) {
        let mut layout = layout(planes, order, [block_size, heads, head_size]);
        let chunk = block_size * 4;
        let halves = if planes == Planes::Fused { 2 } else { 1 };
        let block = u64::from(block_size * layout.num_kv_heads * head_size) * 2 * halves;
        layout.block_stride = (gap > 0).then_some(block + gap);
        layout.check(chunk).unwrap();
        let engine = Engine::new(&layout, chunk, true);
        let object = engine.shape.object_bytes();
        // The last slot ends where the pool does.
        let pool = pool.make(2 * object + slots_apart);
        let slots = [object + slots_apart, 0];
        fn chunks(blocks: &[u32], counts: [usize; 2], skip: u32, slots: [u64; 2]) -> [ChunkCopy<'_>; 2] {
            let (one, two) = blocks[..counts[0] + counts[1]].split_at(counts[0]);
            [
                ChunkCopy { blocks: one, skip, slot: slots[0] },
                ChunkCopy { blocks: two, skip: 0, slot: slots[1] },
            ]
        }

        let stored = chunks(&blocks, [first, second], skip, slots);
        let how = How { cuts, sums };
        let plan = engine.plan(Direction::Gather, &stored, &*pool);
        let gathered = copy(&engine, plan, &pool, &how);
        let mut expected = vec![CANARY; pool.bytes() as usize];
        for ((array, at), theirs) in places(&layout, chunk, &stored) {
            expected[theirs as usize] = engine.memory[array].bytes()[at as usize];
        }
        prop_assert!(contents(&*pool) == expected, "the pool has what was gathered");
        let expected_sums = sums.then(|| crcs(&expected, object, &slots));
        prop_assert_eq!(&gathered, &expected_sums);

        let other = Engine::new(&layout, chunk, false);
        let loaded = chunks(&targets, [first, second], skip, slots);
        let scattered = copy(&other, other.plan(Direction::Scatter, &loaded, &*pool), &pool, &how);
        prop_assert_eq!(scattered, expected_sums);
        let mut arrays = vec![vec![CANARY; layout.array_bytes() as usize]; other.memory.len()];
        for ((array, at), theirs) in places(&layout, chunk, &loaded) {
            arrays[array][at as usize] = expected[theirs as usize];
        }
        for (array, expected) in arrays.iter().enumerate() {
            prop_assert!(other.memory[array].bytes() == expected, "array {}", array);
        }
        prop_assert!(contents(&*pool) == expected, "a load changes no pool");
    }
}

/// Four arrays of 1.5 MiB: three parts each.
fn large() -> (Engine, Arc<PrivateRegion>) {
    let layout = layout(Planes::Separate, Order::Nhd, [16, 4, 1536]);
    let engine = Engine::new(&layout, 128, true);
    assert_eq!(engine.shape.array_bytes(), 3 << 19);
    let pool = Arc::new(PrivateRegion::new(2 * engine.shape.object_bytes()).unwrap());
    pool.write(0, &vec![CANARY; pool.bytes() as usize]).unwrap();
    (engine, pool)
}

const ALL: [u32; 8] = [3, 1, 4, 0, 5, 7, 2, 6];

fn store(engine: &Engine, pool: &dyn Memory) -> CopyPlan {
    engine.plan(Direction::Gather, &[ChunkCopy { blocks: &ALL, skip: 0, slot: 0 }], pool)
}

fn load(engine: &Engine, pool: &dyn Memory) -> CopyPlan {
    engine.plan(Direction::Scatter, &[ChunkCopy { blocks: &ALL, skip: 0, slot: 0 }], pool)
}

#[test]
fn layers_are_told_as_they_arrive() {
    let (engine, pool) = large();
    let (gated, give, _asks) = gated(&pool);
    let memory = HostMemory::on(&Arc::new(CopyThreads::new(1)), engine.arrays());
    let plan = store(&engine, &*pool);
    let (parts, bytes) = (12, plan.bytes_per_array() as usize);
    let copying = memory.copy(plan, gated, false).unwrap();
    (0..parts / 2 + 1).for_each(|_| give.send(true).unwrap());
    wait(copying.array(2)).unwrap();
    assert_eq!(copying.arrays(), 2, "the others wait for leave");
    let written = contents(&*pool);
    // K and V of a layer are the first two arrays; an object has all K before all V.
    for array in [0, 2] {
        let part = &written[array * bytes..][..bytes];
        let mut found = 0;
        for (place, block) in ALL.iter().enumerate() {
            let block_bytes = bytes / ALL.len();
            let ours = &engine.memory[array / 2].bytes()[*block as usize * block_bytes..];
            found += usize::from(part[place * block_bytes..][..block_bytes] == ours[..block_bytes]);
        }
        assert_eq!(found, ALL.len());
    }
    drop(give);
    assert_eq!(wait(copying.ended()).unwrap_err().code, ErrorCode::Unreachable);
    assert_eq!(wait(copying.array(4)).unwrap_err().code, ErrorCode::Unreachable);
}

#[test]
fn nothing_is_written_once_leave_is_refused() {
    for permits in [0, 1, 5] {
        let (engine, pool) = large();
        let (gated, give, _asks) = gated(&pool);
        let memory = HostMemory::on(&Arc::new(CopyThreads::new(1)), engine.arrays());
        (0..permits).for_each(|_| give.send(true).unwrap());
        drop(give);
        let copying =
            memory.copy(store(&engine, &*pool), Arc::<Gated>::clone(&gated), false).unwrap();
        assert_eq!(wait(copying.ended()).unwrap_err().code, ErrorCode::Unreachable);
        assert_eq!(gated.permits.load(Ordering::Relaxed), permits);
        assert_eq!(copying.arrays(), permits / 3, "whole arrays only");
        let written = contents(&*pool).iter().filter(|byte| **byte != CANARY).count();
        let most = permits << 19;
        assert!(written <= most && written >= most - most / 64, "{written} of {most}");
    }
}

#[test]
fn closing_waits_for_what_is_under_way_and_ends_the_rest() {
    for drop_it in [false, true] {
        let (engine, pool) = large();
        let (gated, give, asks) = gated(&pool);
        let threads = Arc::new(CopyThreads::new(1));
        let memory = HostMemory::on(&threads, engine.arrays());
        let plan = store(&engine, &*pool);
        let first = memory.copy(plan.clone(), Arc::<Gated>::clone(&gated), false).unwrap();
        let second = memory.copy(plan.clone(), Arc::<Gated>::clone(&gated), false).unwrap();
        asks.recv_timeout(HANGS).unwrap(); // the first part is under way
        let closed = AtomicBool::new(false);
        let other = HostMemory::on(&threads, engine.arrays());
        thread::scope(|scope| {
            let closing = scope.spawn(|| {
                let memory = memory;
                if !drop_it {
                    memory.close();
                }
                let refused = (!drop_it).then(|| {
                    memory.copy(plan.clone(), Arc::<Gated>::clone(&gated), false).unwrap_err()
                });
                drop(memory);
                closed.store(true, Ordering::Release);
                refused
            });
            // What was never begun ends at once.
            assert_eq!(wait(second.ended()).unwrap_err().code, ErrorCode::Closed);
            assert!(!closed.load(Ordering::Acquire), "a part is under way");
            give.send(true).unwrap();
            let refused = closing.join().unwrap();
            assert!(refused.is_none_or(|error| error.code == ErrorCode::Closed));
        });
        assert_eq!(wait(first.ended()).unwrap_err().code, ErrorCode::Closed);
        assert_eq!(gated.permits.load(Ordering::Relaxed), 1);
        // The threads go on with other memory.
        let copying = other.copy(load(&engine, &*pool), Arc::<PrivateRegion>::clone(&pool), false);
        wait(copying.unwrap().ended()).unwrap();
    }
}

#[test]
fn what_is_summed_is_what_is_written_whoever_changes_the_source_meanwhile() {
    let (engine, pool) = large();
    let other = Engine::new(&layout(Planes::Separate, Order::Nhd, [16, 4, 1536]), 128, false);
    let object = engine.shape.object_bytes() as usize;
    let threads = Arc::new(CopyThreads::new(1));
    let (from, to) =
        (HostMemory::on(&threads, engine.arrays()), HostMemory::on(&threads, other.arrays()));
    assert_eq!(crc(b"123456789"), 0xae8b_1486_0a79_9888, "the catalogue's check value");
    for turn in 0..20 {
        let stop = AtomicBool::new(false);
        let summed = |memory: &HostMemory, plan| {
            let pool = Arc::<PrivateRegion>::clone(&pool);
            let copying = memory.copy(plan, pool, true).unwrap();
            wait(copying.ended()).unwrap();
            stop.store(true, Ordering::Relaxed);
            copying.checksums()
        };
        let stored = thread::scope(|scope| {
            scope.spawn(|| {
                for byte in (0..u8::MAX).cycle() {
                    for memory in &engine.memory {
                        // SAFETY: a byte of an array that lives on; only copies read it meanwhile.
                        let last = unsafe {
                            AtomicU8::from_ptr(memory.start.wrapping_add(memory.bytes - 1))
                        };
                        last.store(byte, Ordering::Relaxed);
                    }
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
            summed(&from, store(&engine, &*pool))
        });
        assert_eq!(stored, [crc(&contents(&*pool)[..object])], "turn {turn}");

        stop.store(false, Ordering::Relaxed);
        let loaded = thread::scope(|scope| {
            scope.spawn(|| {
                for byte in (0..u8::MAX).cycle() {
                    for array in 1..=4 {
                        pool.write((array * object / 4 - 1) as u64, &[byte]).unwrap();
                    }
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
            summed(&to, load(&other, &*pool))
        });
        // Gathered anew, nothing changing, the arrays say what arrived in them.
        let again = Arc::new(PrivateRegion::new(pool.bytes()).unwrap());
        let plan = store(&other, &*again);
        other.arrays().copy(&plan, 0..plan.bytes(), &*again).unwrap();
        assert_eq!(loaded, [crc(&contents(&*again)[..object])], "turn {turn}");
    }
}

#[test]
fn a_load_overtakes_a_store_that_was_begun_before() {
    let (engine, pool) = large();
    let (gated, give, asks) = gated(&pool);
    let memory = HostMemory::on(&Arc::new(CopyThreads::new(1)), engine.arrays());
    let storing = memory.copy(store(&engine, &*pool), gated, false).unwrap();
    asks.recv_timeout(HANGS).unwrap();
    let source = Arc::new(PrivateRegion::new(pool.bytes()).unwrap());
    let loading = memory.copy(load(&engine, &*source), source, false).unwrap();
    give.send(true).unwrap(); // one part of the store
    wait(loading.ended()).unwrap();
    assert_eq!(storing.arrays(), 0);
    drop(give);
    assert!(wait(storing.ended()).is_err());
}

#[test]
fn many_copies_at_once_do_not_disturb_each_other() {
    let layout = layout(Planes::Separate, Order::Hnd, [16, 4, 256]);
    let (engine, other) = (Engine::new(&layout, 16, true), Engine::new(&layout, 16, false));
    let object = engine.shape.object_bytes();
    let pool = Arc::new(PrivateRegion::new(8 * object).unwrap());
    let threads = Arc::new(CopyThreads::new(3));
    let (from, to) =
        (HostMemory::on(&threads, engine.arrays()), HostMemory::on(&threads, other.arrays()));
    let (arrays, back) = (engine.arrays(), other.arrays());
    thread::scope(|scope| {
        for block in 0..8u32 {
            let (from, to, arrays, back, pool, engine) =
                (&from, &to, &arrays, &back, &pool, &engine);
            scope.spawn(move || {
                let chunk =
                    [ChunkCopy { blocks: &[block], skip: 0, slot: u64::from(block) * object }];
                for turn in 0..20 {
                    let gather = engine.plan(Direction::Gather, &chunk, &**pool);
                    let scatter = engine.plan(Direction::Scatter, &chunk, &**pool);
                    if turn % 2 == 0 {
                        let pool: Arc<dyn Memory> = Arc::<PrivateRegion>::clone(pool);
                        wait(from.copy(gather, Arc::clone(&pool), false).unwrap().ended()).unwrap();
                        wait(to.copy(scatter, pool, false).unwrap().ended()).unwrap();
                    } else {
                        arrays.copy(&gather, 0..gather.bytes(), &**pool).unwrap();
                        back.copy(&scatter, 0..scatter.bytes(), &**pool).unwrap();
                    }
                }
            });
        }
    });
    for (ours, theirs) in engine.memory.iter().zip(&other.memory) {
        assert!(ours.bytes() == theirs.bytes());
    }
}

#[test]
fn bad_input_is_refused_before_any_byte_moves() {
    let (engine, pool) = large();
    let shape = &engine.shape;
    let places: Vec<_> = engine.memory.iter().map(|memory| (memory.start, memory.bytes)).collect();
    type Places = Vec<(*mut u8, usize)>;
    let refused = |change: &dyn Fn(&mut Places)| {
        let mut places = places.clone();
        change(&mut places);
        // SAFETY: no copy uses the arrays.
        let error = unsafe { HostArrays::new(Arc::clone(shape), &places) }.unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidArgument);
        error.message
    };
    assert!(refused(&|places| places[1].0 = std::ptr::null_mut()).contains("address 0x0"));
    assert!(refused(&|places| places[1].0 = places[1].0.wrapping_add(1)).contains("not aligned"));
    assert!(refused(&|places| places[1].1 -= 2).contains("bytes instead of"));
    assert!(
        refused(&|places| places[1].0 = std::ptr::without_provenance_mut(usize::MAX - 1))
            .contains("cannot lie")
    );
    assert!(refused(&|places| places[1].0 = places[0].0.wrapping_add(2)).contains("overlap"));
    assert!(refused(&|places| places.truncate(3)).contains("3 arrays"));

    let arrays = engine.arrays();
    let memory = HostMemory::on(&Arc::new(CopyThreads::new(2)), engine.arrays());
    let other = Engine::new(&layout(Planes::Latent, Order::Nhd, [16, 1, 8]), 64, true);
    let foreign = other.plan(Direction::Gather, &[], &*pool);
    assert!(arrays.copy(&foreign, 0..0, &*pool).unwrap_err().message.contains("other arrays"));
    let pool_again: Arc<dyn Memory> = Arc::<PrivateRegion>::clone(&pool);
    assert!(memory.copy(foreign, pool_again, false).unwrap_err().message.contains("other arrays"));

    // A plan for a larger pool than the one that is given: its second chunk lies outside.
    let object = shape.object_bytes();
    let chunks = [
        ChunkCopy { blocks: &ALL[..4], skip: 0, slot: 0 },
        ChunkCopy { blocks: &ALL[4..], skip: 0, slot: object },
    ];
    let plan = engine.plan(Direction::Gather, &chunks, &*pool);
    let small = Arc::new(PrivateRegion::new(object + 10).unwrap());
    assert!(arrays.copy(&plan, 0..plan.bytes(), &*small).is_err());
    let copying = memory.copy(plan, Arc::<PrivateRegion>::clone(&small), false).unwrap();
    assert_eq!(wait(copying.ended()).unwrap_err().code, ErrorCode::InvalidArgument);
    assert_eq!(copying.arrays(), 0);
    assert!(contents(&*small).iter().all(|byte| *byte == 0));
    assert!(contents(&*pool).iter().all(|byte| *byte == CANARY));
}
