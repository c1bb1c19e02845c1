//! The disk tier beside plain large sequential files on the same disk, in turns within one run: both around the page
//! cache (O_DIRECT) where the file system takes that, else both through it and synced. `KVFERRY_BENCH_DIR` names
//! the directory; without it there is one under `target/`. With `KVFERRY_BENCH_DROP_CACHES`, and as root, the
//! restarts find nothing in the system's caches.
#![allow(clippy::print_stdout, reason = "a benchmark's rows are its output")]
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use kvferry_bench::Rows;
use kvferry_copy::PrivateRegion;
use kvferry_core::cache::Memory;
use kvferry_core::key::{Dtype, Layout};
use kvferry_store::disk::{Disk, DiskOptions, Saved};

const MIB: u64 = 1 << 20;
/// Pairs of each row; odd, so that there is a median.
const PAIRS: usize = 7;
/// Bytes of one write or read of the plain file: larger ones were not faster.
const PART: usize = 4 << 20;
/// Objects that a restart finds.
const OBJECTS: u32 = 100_000;

fn main() {
    let mut rows = Rows::default();
    let base = std::env::var_os("KVFERRY_BENCH_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"), PathBuf::from);
    let directory = base.join(format!("kvferry-bench-disk-{}", std::process::id()));
    let bench = Bench::new(&directory);
    for (bytes, count) in [(32 * MIB, 32), (MIB, 512)] {
        bench.compare(&mut rows, bytes, count);
    }
    bench.one_at_a_time(&mut rows, 32 * MIB);
    bench.restart(&mut rows);
    drop(bench);
    rows.finish().unwrap();
}

struct Bench {
    directory: PathBuf,
    memory: Arc<dyn Memory>,
    random: Vec<u8>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

impl Bench {
    fn new(directory: &Path) -> Self {
        std::fs::create_dir_all(directory).unwrap();
        let mut seed = 1u64;
        let random: Vec<u8> = (0..PART + 4096)
            .map(|_| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                seed.to_be_bytes()[0]
            })
            .collect();
        let memory = PrivateRegion::new(1 << 30).unwrap();
        for part in 0..(1 << 30) / PART {
            memory.write((part * PART) as u64, &random[..PART]).unwrap();
        }
        Self { directory: directory.to_owned(), memory: Arc::new(memory), random }
    }

    fn open(&self) -> Disk {
        let mut options = DiskOptions::new(self.directory.join("disk"), 8 << 30);
        options.queue_bytes = 2 << 30;
        Disk::open(&options).unwrap()
    }

    fn save(&self, disk: &Disk, chunks: std::ops::Range<u32>, bytes: u64) {
        let first = chunks.start;
        let (told, ends) = mpsc::channel();
        for chunk in chunks.clone() {
            let told = told.clone();
            let done = Box::new(move |result| told.send(result).unwrap());
            let offset = u64::from(chunk - first) * bytes % (1 << 30);
            assert!(disk.save(saved(chunk), Arc::clone(&self.memory), offset, bytes, done));
        }
        for _ in chunks {
            ends.recv().unwrap().unwrap();
        }
    }

    fn load(&self, disk: &Disk, chunks: std::ops::Range<u32>, bytes: u64) {
        let first = chunks.start;
        let (told, ends) = mpsc::channel();
        for chunk in chunks.clone() {
            let told = told.clone();
            let done = Box::new(move |result| told.send(result).unwrap());
            let offset = u64::from(chunk - first) * bytes % (1 << 30);
            let Saved { chunk, space, rank, .. } = saved(chunk);
            let memory = Arc::clone(&self.memory);
            assert!(disk.load((&chunk, &space, rank), memory, offset, bytes, done));
        }
        for _ in chunks {
            assert!(ends.recv().unwrap().unwrap().is_some(), "what was saved is there");
        }
    }

    /// `count` objects of `bytes`, all asked for at once, and one file of as many bytes.
    fn compare(&self, rows: &mut Rows, bytes: u64, count: u32) {
        let disk = self.open();
        let total = bytes * u64::from(count);
        let plain = self.directory.join("plain");
        let (mut saves, mut loads) = (Vec::new(), Vec::new());
        for pair in 0..PAIRS {
            disk.clear();
            disk.flush(Instant::now() + Duration::from_secs(60)).unwrap();
            let ours = || time(total, || self.save(&disk, 0..count, bytes));
            let reference = || time(total, || self.write_plain(&plain, total, disk.is_direct()));
            saves.push(in_turns(pair, ours, reference));
            let ours = || time(total, || self.load(&disk, 0..count, bytes));
            let reference = || time(total, || self.read_plain(&plain, total, disk.is_direct()));
            loads.push(in_turns(pair, ours, reference));
            std::fs::remove_file(&plain).unwrap();
        }
        let size = bytes / MIB;
        row(rows, &format!("save {count} objects of {size} MiB ÷ plain file"), saves);
        row(rows, &format!("load {count} objects of {size} MiB ÷ plain file"), loads);
        disk.clear();
        disk.close(Instant::now() + Duration::from_secs(60)).unwrap();
    }

    /// One object after the other, so that nothing of ours runs beside the disk's work.
    fn one_at_a_time(&self, rows: &mut Rows, bytes: u64) {
        const COUNT: u32 = 8;
        let disk = self.open();
        let total = bytes * u64::from(COUNT);
        let plain = self.directory.join("plain");
        self.save(&disk, 0..COUNT, bytes);
        self.write_plain(&plain, total, disk.is_direct());
        let loads = (0..PAIRS).map(|pair| {
            let ours =
                || time(total, || (0..COUNT).for_each(|it| self.load(&disk, it..it + 1, bytes)));
            let reference = || time(total, || self.read_plain(&plain, total, disk.is_direct()));
            in_turns(pair, ours, reference)
        });
        let name = format!("load objects of {} MiB, one after the other ÷ plain file", bytes / MIB);
        row(rows, &name, loads.collect());
        std::fs::remove_file(&plain).unwrap();
        disk.clear();
        disk.close(Instant::now() + Duration::from_secs(60)).unwrap();
    }

    fn restart(&self, rows: &mut Rows) {
        let disk = self.open();
        let begun = Instant::now();
        for first in (0..OBJECTS).step_by(10_000) {
            self.save(&disk, first..first + 10_000, 4096);
        }
        let seconds = begun.elapsed().as_secs_f64();
        println!("objects of 4 KiB: {:.0} saved a second", f64::from(OBJECTS) / seconds);
        let begun = Instant::now();
        self.load(&disk, 0..10_000, 4096);
        let seconds = begun.elapsed().as_secs_f64();
        println!("objects of 4 KiB: {:.0} loaded a second", 10_000.0 / seconds);
        disk.close(Instant::now() + Duration::from_secs(60)).unwrap();
        drop(disk);
        let mut times: Vec<f64> = (0..PAIRS)
            .map(|_| {
                if std::env::var_os("KVFERRY_BENCH_DROP_CACHES").is_some() {
                    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap(); // root only
                }
                let begun = Instant::now();
                let disk = self.open();
                let seconds = begun.elapsed().as_secs_f64();
                assert_eq!(disk.status().objects, u64::from(OBJECTS));
                seconds
            })
            .collect();
        times.sort_by(f64::total_cmp);
        let median = times[PAIRS / 2];
        rows.row("open with 100,000 objects ÷ limit", median, 2.0, "s", median / 2.0);
    }

    fn write_plain(&self, path: &Path, total: u64, direct: bool) {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true);
        let mut file = open(&mut options, path, direct);
        let part = aligned(&self.random);
        for _ in 0..total / part.len() as u64 {
            file.write_all(part).unwrap();
        }
        file.sync_all().unwrap();
    }

    fn read_plain(&self, path: &Path, total: u64, direct: bool) {
        let mut file = open(OpenOptions::new().read(true), path, direct);
        let mut buffer = vec![0; PART + 4096];
        let start = buffer.as_ptr().align_offset(4096);
        for _ in 0..total / PART as u64 {
            file.read_exact(&mut buffer[start..start + PART]).unwrap();
        }
    }
}

fn aligned(bytes: &[u8]) -> &[u8] {
    let start = bytes.as_ptr().align_offset(4096);
    &bytes[start..start + PART]
}

fn open(options: &mut OpenOptions, path: &Path, direct: bool) -> File {
    #[cfg(target_os = "linux")]
    if direct {
        std::os::unix::fs::OpenOptionsExt::custom_flags(options, libc::O_DIRECT);
    }
    let _ = direct;
    options.open(path).unwrap()
}

fn saved(chunk: u32) -> Saved {
    let layout = Layout {
        model_name: "bench".into(),
        world_size: 1,
        block_size: 16,
        num_layers: 32,
        hidden_dim_size: 1024,
        dtype: Dtype::new("bfloat16").unwrap(),
        single_plane: false,
        num_physical_slots: None,
    };
    let mut hash = [0; 32];
    hash[..4].copy_from_slice(&chunk.to_le_bytes());
    let space = Saved::space_of(&layout, "");
    Saved { chunk: hash, space, rank: 0, parent: None, layout, cache_salt: String::new() }
}

/// MB a second.
fn time(bytes: u64, work: impl FnOnce()) -> f64 {
    let begun = Instant::now();
    work();
    bytes as f64 / 1e6 / begun.elapsed().as_secs_f64()
}

/// Each goes first half of the time.
fn in_turns(pair: usize, ours: impl Fn() -> f64, reference: impl Fn() -> f64) -> (f64, f64) {
    if pair.is_multiple_of(2) {
        let ours = ours();
        (ours, reference())
    } else {
        let reference = reference();
        (ours(), reference)
    }
}

fn row(rows: &mut Rows, name: &str, mut pairs: Vec<(f64, f64)>) {
    let mut median = |of: fn(&(f64, f64)) -> f64| {
        pairs.sort_by(|a, b| of(a).total_cmp(&of(b)));
        of(&pairs[pairs.len() / 2])
    };
    let (ours, reference) = (median(|pair| pair.0), median(|pair| pair.1));
    let ratio = median(|pair| pair.0 / pair.1);
    rows.row(name, ours, reference, "MB/s", ratio);
}
