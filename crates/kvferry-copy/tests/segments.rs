//! Copies from and to an engine's own segments, and which segments are none of its.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, chown, symlink};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kvferry_copy::{PrivateRegion, SegmentMemory};
use kvferry_core::cache::Memory;
use kvferry_core::copy_plan::{ChunkCopy, Direction};
use kvferry_core::key::Dtype;
use kvferry_core::kv_descriptors::{
    DescribedMemory, KvDescriptor, KvRegistration, KvStorage, Storages,
};
use kvferry_core::{Error, ErrorCode};

const CHUNK: u32 = 16;

/// A file of /dev/shm that goes with the test.
struct Segment(String);

impl Segment {
    fn new(bytes: &[u8]) -> Self {
        let segment = Self::unmade();
        fs::write(segment.path(), bytes).unwrap();
        segment
    }

    fn unmade() -> Self {
        static NUMBERS: AtomicU32 = AtomicU32::new(0);
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        Self(format!("/lmcache_kv_segments_{}_{number}", std::process::id()))
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/shm{}", self.0))
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.path());
    }
}

fn noise(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|at| ((at * 31 + seed * 17) % 251).to_le_bytes()[0]).collect()
}

fn describe(shape: &[u64], hint: &str, segments: &[Segment]) -> DescribedMemory {
    let mut stride = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        stride[axis - 1] = stride[axis] * shape[axis];
    }
    let layers = segments.iter().map(|segment| KvDescriptor {
        storage: KvStorage::Segment {
            shm_name: segment.0.clone(),
            bytes: 2 * shape.iter().product::<u64>(),
        },
        dtype: Dtype::new("bfloat16").unwrap(),
        shape: shape.to_vec(),
        stride: stride.clone(),
        storage_offset: 0,
    });
    let registration = KvRegistration {
        model_name: "m".into(),
        world_size: 1,
        engine_type: "vllm".into(),
        kv_layout: Some(hint.into()),
        groups: Vec::new(),
        layers: layers.collect(),
    };
    registration.memory(CHUNK).unwrap()
}

/// A memory of one small layer in the segment.
fn small(segment: &Segment) -> Result<SegmentMemory, Error> {
    let name = Segment(segment.0.clone());
    let described = describe(&[2, 2, 16, 1, 4], "NHD", std::slice::from_ref(&name));
    std::mem::forget(name); // the file is the caller's
    SegmentMemory::open(&described)
}

const SMALL: usize = 2 * 2 * 2 * 16 * 4;

#[test]
fn what_is_stored_comes_back_into_other_blocks_and_what_is_skipped_is_left_alone() {
    // The last shape has blocks of more than a MiB: they are copied in parts.
    for (shape, hint) in [
        (&[2, 8, 4, 3, 5][..], "NHD"),
        (&[2, 8, 3, 4, 5], "HND"),
        (&[8, 2, 4, 3, 5], "NHD"),
        (&[8, 3, 4, 10], "HND"),
        (&[8, 4, 10], "NHD"),
        (&[8, 16, 4, 12_000], "HND"),
    ] {
        let bytes = usize::try_from(2 * shape.iter().product::<u64>()).unwrap();
        let segments: Vec<Segment> =
            (0..2).map(|layer| Segment::new(&noise(bytes, layer))).collect();
        let described = describe(shape, hint, &segments);
        let memory = SegmentMemory::open(&described).unwrap();
        let pool = PrivateRegion::new(2 * memory.shape().object_bytes()).unwrap();
        let slot = memory.shape().object_bytes();
        let blocks = CHUNK / described.layout.block_size;
        let from: Vec<u32> = [7, 2, 5, 0][..blocks as usize].into();
        let into: Vec<u32> = [1, 3, 4, 6][..blocks as usize].into();
        let plan = |direction, blocks: &[u32], skip| {
            let chunk = ChunkCopy { blocks, skip, slot };
            memory.shape().plan(direction, &[chunk], pool.bytes()).unwrap()
        };
        let gather = plan(Direction::Gather, &from, 0);
        memory.copy(&gather, &pool, &|| Ok(())).unwrap();
        let array = |number: usize| {
            let (segment, begin) = described.arrays[number];
            (fs::File::open(segments[segment].path()).unwrap(), begin)
        };
        let read = |array: &(fs::File, u64), at: u64, length: u64| {
            let mut bytes = vec![0; usize::try_from(length).unwrap()];
            array.0.read_exact_at(&mut bytes, array.1 + at).unwrap();
            bytes
        };
        gather
            .pieces(0..gather.bytes(), |piece| {
                let mut stored = vec![0; usize::try_from(piece.length).unwrap()];
                pool.read(piece.pool, &mut stored)?;
                assert!(stored == read(&array(piece.array), piece.at, piece.length));
                Ok(())
            })
            .unwrap();
        // The engine has forgotten all of it, and unlinked its segments.
        for segment in &segments {
            fs::write(segment.path(), vec![0xee; bytes]).unwrap();
        }
        let arrays: Vec<_> = (0..described.arrays.len()).map(array).collect();
        let files = segments.iter().map(|segment| fs::File::open(segment.path()).unwrap());
        let files: Vec<fs::File> = files.collect();
        segments.iter().for_each(|segment| fs::remove_file(segment.path()).unwrap());
        let scatter = plan(Direction::Scatter, &into, 5);
        memory.copy(&scatter, &pool, &|| Ok(())).unwrap();
        let is_new = |byte: &&u8| **byte != 0xee;
        let mut copied = 0;
        scatter
            .pieces(0..scatter.bytes(), |piece| {
                let mut stored = vec![0; usize::try_from(piece.length).unwrap()];
                pool.read(piece.pool, &mut stored)?;
                assert!(stored == read(&arrays[piece.array], piece.at, piece.length));
                copied += stored.iter().filter(is_new).count();
                Ok(())
            })
            .unwrap();
        let changed = files.iter().map(|file| {
            let mut whole = vec![0; bytes];
            file.read_exact_at(&mut whole, 0).unwrap();
            whole.iter().filter(is_new).count()
        });
        assert_eq!(changed.sum::<usize>(), copied, "{shape:?}");
    }
}

#[test]
fn a_segment_that_is_truncated_fails_the_copy_and_nothing_else() {
    let segment = Segment::new(&noise(SMALL, 0));
    let memory = small(&segment).unwrap();
    let pool = PrivateRegion::new(4096).unwrap();
    let plan = |direction| {
        let chunk = ChunkCopy { blocks: &[1], skip: 0, slot: 0 };
        memory.shape().plan(direction, &[chunk], pool.bytes()).unwrap()
    };
    let shorten = |length: usize| {
        let file = fs::File::options().write(true).open(segment.path()).unwrap();
        file.set_len(length as u64).unwrap();
    };
    for direction in [Direction::Gather, Direction::Scatter] {
        memory.copy(&plan(direction), &pool, &|| Ok(())).unwrap();
        shorten(SMALL - 1);
        let error = memory.copy(&plan(direction), &pool, &|| Ok(())).unwrap_err();
        assert!(error.message.contains("was said to have"), "{error}");
        shorten(SMALL);
    }
    let in_the_middle = || {
        shorten(SMALL - 1);
        Ok(())
    };
    let error = memory.copy(&plan(Direction::Gather), &pool, &in_the_middle).unwrap_err();
    assert_eq!(error.code, ErrorCode::System);
    shorten(SMALL);
    let stopped = || Err(Error::new(ErrorCode::Timeout, "late"));
    let error = memory.copy(&plan(Direction::Gather), &pool, &stopped).unwrap_err();
    assert_eq!(error.code, ErrorCode::Timeout);
}

#[test]
fn only_regular_files_of_this_user_under_lmcaches_names_are_opened() {
    let good = Segment::new(&noise(SMALL, 0));
    assert!(small(&good).is_ok());
    assert!(small(&Segment(good.0[1..].to_owned())).is_ok(), "LMCache puts the slash there itself");
    let good = Segment::new(&noise(SMALL, 0));
    let refused = |segment: &Segment| small(segment).unwrap_err();
    let nothing = Segment::unmade();
    assert_eq!(refused(&nothing).code, ErrorCode::System);
    let short = Segment::new(&noise(SMALL - 1, 0));
    assert!(refused(&short).message.contains("was said to have"));
    let link = Segment::unmade();
    symlink(good.path(), link.path()).unwrap();
    assert_eq!(refused(&link).code, ErrorCode::System);
    let pipe = Segment::unmade();
    assert!(Command::new("mkfifo").arg(pipe.path()).status().unwrap().success());
    assert!(refused(&pipe).message.contains("no file of"));
    let name = good.0.strip_prefix('/').unwrap();
    for bad in [
        String::new(),
        "/".into(),
        "/lmcache_kv_/../x".into(),
        format!("/../dev/shm/{name}"),
        format!("/dev/shm/{name}"),
        format!("//{name}"),
        format!("/./{name}"),
        format!("/{name}\0"),
        format!("/lmcache_kv_{}", "x".repeat(300)),
        // A pool of ours, and whatever else this user has.
        "/kvferry_5555".into(),
        "/passwords".into(),
    ] {
        let bad = Segment(bad);
        assert_eq!(refused(&bad).code, ErrorCode::InvalidArgument, "{:?}", bad.0);
        assert!(!refused(&bad).message.contains("passwords"), "messages end up in logs");
        std::mem::forget(bad);
    }
    let other = Segment::new(&noise(SMALL, 0));
    match chown(other.path(), Some(1), None) {
        Ok(()) => assert_eq!(refused(&other).code, ErrorCode::Unauthorized),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "SKIPPED a segment of another user: {error}");
        }
    }
}

#[test]
fn layers_that_share_a_segment_open_it_once() {
    let segment = Segment::new(&noise(2 * SMALL, 0));
    let mut registration = KvRegistration {
        model_name: "m".into(),
        world_size: 1,
        engine_type: "vllm".into(),
        kv_layout: Some("NHD".into()),
        groups: Vec::new(),
        layers: Vec::new(),
    };
    for layer in 0..2 {
        registration.layers.push(KvDescriptor {
            storage: KvStorage::Segment { shm_name: segment.0.clone(), bytes: 2 * SMALL as u64 },
            dtype: Dtype::new("bfloat16").unwrap(),
            shape: vec![2, 2, 16, 1, 4],
            stride: vec![128, 64, 4, 4, 1],
            storage_offset: layer * 256,
        });
    }
    let described = registration.memory(CHUNK).unwrap();
    assert!(matches!(&described.storages, Storages::Segments(segments) if segments.len() == 1));
    let memory = SegmentMemory::open(&described).unwrap();
    let pool = Arc::new(PrivateRegion::new(4096).unwrap());
    let chunk = ChunkCopy { blocks: &[1], skip: 0, slot: 0 };
    let plan = memory.shape().plan(Direction::Gather, &[chunk], pool.bytes()).unwrap();
    memory.copy(&plan, &*pool, &|| Ok(())).unwrap();
    let whole = noise(2 * SMALL, 0);
    let mut second = vec![0; 128];
    pool.read(128, &mut second).unwrap(); // K of the second layer
    assert_eq!(second, whole[SMALL + 128..SMALL + 256]);
}
