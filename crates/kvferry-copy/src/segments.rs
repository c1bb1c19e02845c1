//! An engine's KV memory in shared-memory segments of its own. They are read and written as files and never mapped: an
//! engine that truncates a segment would end this process by SIGBUS.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use kvferry_core::cache::Memory;
use kvferry_core::copy_plan::{CopyPlan, CopyShape, Direction, Tile};
use kvferry_core::kv_descriptors::{DescribedMemory, Storages, TOKEN_BYTES_MAX};
use kvferry_core::{Error, ErrorCode, Result};

const DIRECTORY: &str = "/dev/shm";
/// Begins the name of every segment that LMCache makes for KV: with a name alone, a peer could otherwise have any
/// shared memory of this user read and written, our own pool included.
const PREFIX: &str = "lmcache_kv_";
const NAME_MAX: usize = 255;

/// An engine's arrays in its segments, which stay open even when it unlinks them.
#[derive(Debug)]
pub struct SegmentMemory {
    shape: Arc<CopyShape>,
    segments: Vec<Segment>,
    /// Where each array begins: the segment's number, and bytes from its start.
    arrays: Vec<(usize, u64)>,
}

#[derive(Debug)]
struct Segment {
    file: File,
    bytes: u64,
}

impl SegmentMemory {
    /// Opens the segments of a checked description.
    ///
    /// # Errors
    /// A name that is not one of LMCache's segments for KV, or what has the name is no regular file of /dev/shm, is of
    /// another user or is shorter than it was said to be. No message has the name.
    pub fn open(memory: &DescribedMemory) -> Result<Self> {
        let Storages::Segments(segments) = &memory.storages else {
            return Err(Error::invalid("a device's memory lies in no segments of the host"));
        };
        let device = Path::new(DIRECTORY).metadata();
        let device = device
            .map_err(|error| Error::system(format!("cannot look at {DIRECTORY}"), &error))?
            .dev();
        let open = |(number, (name, bytes)): (usize, &(String, u64))| {
            let file = open(name, *bytes, device).map_err(|reason| {
                Error::new(
                    reason.code,
                    format!("segment {number} of the engine: {}", reason.message),
                )
            })?;
            Ok(Segment { file, bytes: *bytes })
        };
        let segments = segments.iter().enumerate().map(open).collect::<Result<_>>()?;
        Ok(Self { shape: Arc::clone(&memory.shape), segments, arrays: memory.arrays.clone() })
    }

    /// What its plans are of.
    pub fn shape(&self) -> &Arc<CopyShape> {
        &self.shape
    }

    /// Carries out a plan of [`SegmentMemory::shape`] on this thread; `pool` is what its slots lie in. `go_on` is asked
    /// again and again, and its error ends the copy.
    ///
    /// # Errors
    /// A segment has become shorter, or the system refuses; bytes may have been copied in part then.
    pub fn copy(
        &self,
        plan: &CopyPlan,
        pool: &dyn Memory,
        go_on: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        for segment in &self.segments {
            segment.check_length()?;
        }
        let size = usize::try_from(TOKEN_BYTES_MAX).unwrap_or(usize::MAX);
        let (mut here, mut there) = (vec![0; size], Vec::new());
        let copied = plan.tiles(TOKEN_BYTES_MAX, |tile| {
            go_on()?;
            let (segment, base) = self.arrays[tile.array];
            let file = &self.segments[segment].file;
            let tile = Tile { at: base + tile.at, ..tile };
            let bytes = &mut here[..usize::try_from(tile.bytes()).unwrap_or(usize::MAX)];
            if tile.heads > 1 {
                there.resize(bytes.len(), 0);
            }
            match plan.direction() {
                Direction::Gather => {
                    read(file, &tile, bytes, &mut there).map_err(|error| cannot("read", &error))?;
                    pool.write(tile.pool, bytes)
                }
                Direction::Scatter => {
                    pool.read(tile.pool, bytes)?;
                    write(file, &tile, bytes, &mut there).map_err(|error| cannot("write", &error))
                }
            }
        });
        copied?;
        // Writing behind a segment's end makes it longer; reading there was an error above.
        self.segments.iter().try_for_each(Segment::check_length)
    }
}

impl Segment {
    fn check_length(&self) -> Result<()> {
        let length = self.file.metadata().map_err(|error| cannot("look at", &error))?.len();
        check_length(length, self.bytes)
    }
}

fn check_length(length: u64, bytes: u64) -> Result<()> {
    if length < bytes {
        return Err(Error::invalid(format!(
            "a segment of the engine has {length} bytes, and was said to have {bytes}"
        )));
    }
    Ok(())
}

fn cannot(what: &str, error: &io::Error) -> Error {
    Error::system(format!("cannot {what} a segment of the engine"), error)
}

fn open(name: &str, bytes: u64, device: u64) -> Result<File> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    let file_name = name.strip_prefix('/').unwrap_or(name);
    if !file_name.starts_with(PREFIX) || file_name.len() > NAME_MAX || !file_name.bytes().all(plain)
    {
        return Err(Error::invalid(format!(
            "its name is not {PREFIX} and letters, digits, '_', '-' and '.'"
        )));
    }
    let mut options = OpenOptions::new();
    // Not even a pipe of this name makes it wait.
    options.custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK);
    let path = Path::new(DIRECTORY).join(file_name);
    let file = options.read(true).write(true).open(path);
    let file = file.map_err(|error| Error::system("it cannot be opened", &error))?;
    let found = file.metadata().map_err(|error| Error::system("it cannot be looked at", &error))?;
    // SAFETY: a call without arguments that cannot fail.
    let user = unsafe { libc::geteuid() };
    if !found.is_file() || found.dev() != device {
        return Err(Error::invalid(format!("it is no file of {DIRECTORY}")));
    }
    if found.uid() != user {
        return Err(Error::new(
            ErrorCode::Unauthorized,
            format!("it is of user {}, the server of {user}: run both as one user", found.uid()),
        ));
    }
    check_length(found.len(), bytes)?;
    Ok(file)
}

/// A tile's bytes in the object's order; `spare` is as long where heads lie apart.
fn read(file: &File, tile: &Tile, bytes: &mut [u8], spare: &mut [u8]) -> io::Result<()> {
    if tile.heads == 1 {
        return file.read_exact_at(bytes, tile.at);
    }
    runs(tile, spare.len(), |at, run| file.read_exact_at(&mut spare[run], at))?;
    for_each_head(tile, |token_first, head_first, length| {
        bytes[token_first..token_first + length]
            .copy_from_slice(&spare[head_first..head_first + length]);
    });
    Ok(())
}

fn write(file: &File, tile: &Tile, bytes: &[u8], spare: &mut [u8]) -> io::Result<()> {
    if tile.heads == 1 {
        return file.write_all_at(bytes, tile.at);
    }
    for_each_head(tile, |token_first, head_first, length| {
        spare[head_first..head_first + length]
            .copy_from_slice(&bytes[token_first..token_first + length]);
    });
    runs(tile, spare.len(), |at, run| file.write_all_at(&spare[run], at))
}

/// Where a tile's bytes lie in the array, and in a buffer without gaps between heads: at once where there are none.
fn runs(
    tile: &Tile,
    all: usize,
    mut visit: impl FnMut(u64, std::ops::Range<usize>) -> io::Result<()>,
) -> io::Result<()> {
    let of_head = tile.tokens * tile.length;
    if of_head == tile.apart {
        return visit(tile.at, 0..all);
    }
    let length = usize::try_from(of_head).unwrap_or(usize::MAX);
    for (head, begin) in (0..tile.heads).zip((0..).step_by(length.max(1))) {
        visit(tile.at + head * tile.apart, begin..begin + length)?;
    }
    Ok(())
}

/// Each head of each token: where it begins in the object's order, and in the array's.
fn for_each_head(tile: &Tile, mut visit: impl FnMut(usize, usize, usize)) {
    let size = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
    let (tokens, heads, length) = (size(tile.tokens), size(tile.heads), size(tile.length));
    for head in 0..heads {
        for token in 0..tokens {
            visit((token * heads + head) * length, (head * tokens + token) * length, length);
        }
    }
}
