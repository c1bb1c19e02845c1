//! State files out of and into a prefix cache.

use std::time::Instant;

use super::{AssemblePlan, Geometry, StateFile, invalid};
use crate::cache::FileBuffer;
use crate::prefix::{PrefixCache, Reading, Writing};
use crate::{Error, ErrorCode, Result};

/// Runs a copy, which takes milliseconds, where that does not hold up other work.
pub type RunCopy<'a> = &'a (dyn Fn(&mut (dyn FnMut() + Send)) + Sync);

/// What was stored of a state file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Chunks that were written now.
    pub chunks: u32,
    /// Bytes of their payloads.
    pub bytes: u64,
    /// Chunks for which there was no room; `None` when the server does not say.
    pub refused: Option<u32>,
}

/// What was restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restored {
    /// Leading chunks that are stored.
    pub found: u32,
    /// Leading chunks that the file holds; with 0 its content means nothing.
    pub written: u32,
}

/// How a context wants its state files.
#[derive(Debug, Clone)]
pub struct Target<'a> {
    /// The state's shape.
    pub geometry: &'a Geometry,
    /// The prompt; leading whole chunks of it are in the file.
    pub tokens: &'a [u32],
    /// Tokens of one chunk.
    pub chunk_size: u32,
    /// Streams of the context, see [`AssemblePlan::new`].
    pub streams: u32,
    /// The sequence that is named as the file's origin.
    pub sequence: u32,
    /// Tokens that the engine has itself: a hit is written only when it is longer.
    pub beyond: u32,
}

/// Looks up the longest stored prefix of the target's tokens and writes its state file into `file`.
pub async fn restore(
    prefix: &PrefixCache,
    target: &Target<'_>,
    salt: &str,
    file: &mut (dyn FileBuffer + Send),
    deadline: Instant,
    run_copy: RunCopy<'_>,
) -> Result<Restored> {
    let hit = prefix.lookup(target.tokens, salt, deadline).await?;
    let found = hit.chunks();
    if u64::from(found) * u64::from(target.chunk_size) <= u64::from(target.beyond) {
        let _ = prefix.finish(&hit, None, deadline).await; // the leases end by themselves too
        return Ok(Restored { found, written: 0 });
    }
    let (reading, chunks) = match prefix.load(&hit, deadline).await {
        Ok(Some(reading)) => {
            let mut chunks = Ok(0);
            run_copy(&mut || {
                chunks = assemble(&reading, target, &mut *file, &|| before(deadline));
            });
            (Some(reading), chunks)
        }
        Ok(None) => (None, Ok(0)),
        Err(error) => (None, Err(error)),
    };
    // Whether the slots were still ours does not matter: what was read has been checked.
    let _ = prefix.finish(&hit, reading, deadline).await;
    chunks.map(|written| Restored { found, written })
}

/// Stores those whole chunks of `tokens`, the leading ones of the state file `bytes`, that are not
/// stored yet.
pub async fn store(
    prefix: &PrefixCache,
    geometry: &Geometry,
    tokens: &[u32],
    bytes: &[u8],
    salt: &str,
    deadline: Instant,
    run_copy: RunCopy<'_>,
) -> Result<Stored> {
    let state = StateFile::parse(bytes)?;
    if !state.tokens().starts_with(tokens) {
        return Err(invalid("the engine's state is of other tokens than those to be stored"));
    }
    let writing = prefix.store(tokens, salt, deadline).await?;
    let mut written = Ok(());
    run_copy(&mut || {
        let check = || before(deadline);
        written = split(&state, bytes, geometry, prefix.chunk_size(), &writing, &check);
    });
    let chunks = u32::try_from(writing.chunks().len()).unwrap_or(u32::MAX);
    let refused = writing.refused();
    if let Err(error) = written {
        let _ = prefix.abandon(writing, deadline).await; // the first error tells more
        return Err(error);
    }
    if !prefix.commit(writing, deadline).await? {
        return Ok(Stored { chunks: 0, bytes: 0, refused: Some(refused.unwrap_or(0) + chunks) });
    }
    Ok(Stored { chunks, bytes: u64::from(chunks) * prefix.payload_bytes(), refused })
}

fn before(deadline: Instant) -> Result<()> {
    if Instant::now() < deadline {
        return Ok(());
    }
    Err(Error::new(ErrorCode::Timeout, "the deadline passed while state was copied"))
}

/// Writes the state file of the chunks of `reading` into `file`; says how many leading chunks it holds.
/// The first chunk that is not what was stored ends it; with 0 chunks there is nothing to load.
/// `check` is called before each chunk and may end the work with its error.
fn assemble(
    reading: &Reading,
    target: &Target<'_>,
    file: &mut dyn FileBuffer,
    check: &dyn Fn() -> Result<()>,
) -> Result<u32> {
    let mut chunks = reading.chunks();
    loop {
        // A chunk that fails moves all later bytes of the file: it is written anew, without it.
        match fill(reading, target, chunks, file, check)? {
            whole if whole == chunks => return Ok(chunks),
            whole => chunks = whole,
        }
    }
}

/// Writes the file of `chunks` chunks; says how many of them are whole before the first that is not.
fn fill(
    reading: &Reading,
    target: &Target<'_>,
    chunks: u32,
    file: &mut dyn FileBuffer,
    check: &dyn Fn() -> Result<()>,
) -> Result<u32> {
    if chunks == 0 {
        return Ok(0);
    }
    let tokens = chunks.checked_mul(target.chunk_size).map(|tokens| tokens as usize);
    let tokens = tokens.and_then(|tokens| target.tokens.get(..tokens)).ok_or_else(|| {
        Error::invalid(format!("{chunks} chunks are more than the {} tokens", target.tokens.len()))
    })?;
    let plan = AssemblePlan::new(target.geometry, tokens, target.streams, target.sequence)?;
    let bytes = file.resize(plan.file_bytes())?;
    for piece in plan.pieces() {
        range(bytes, piece.offset, piece.bytes.len() as u64)?.copy_from_slice(&piece.bytes);
    }
    let expected = target.geometry.encode();
    let mut descriptor = vec![0; expected.len()];
    for chunk in 0..chunks {
        check()?;
        let first = chunk * target.chunk_size;
        let whole = reading.read(chunk, |next| {
            next(&mut descriptor)?;
            plan.for_each_segment(first..first + target.chunk_size, |segment| {
                next(range(bytes, segment.file_offset, segment.length)?)
            })
        })?;
        if !whole || descriptor != expected {
            return Ok(chunk);
        }
    }
    Ok(chunks)
}

/// Fills `writing` from the state file `bytes`, parsed as `state`.
fn split(
    state: &StateFile,
    bytes: &[u8],
    geometry: &Geometry,
    chunk_size: u32,
    writing: &Writing,
    check: &dyn Fn() -> Result<()>,
) -> Result<()> {
    if state.geometry() != geometry {
        return Err(Error::new(
            ErrorCode::InvalidState,
            "the engine's state has another shape than its model and context let expect",
        ));
    }
    let descriptor = geometry.encode();
    for (place, chunk) in writing.chunks().iter().enumerate() {
        check()?;
        let first = chunk * chunk_size;
        writing.write(place, |next| {
            next(&descriptor)?;
            state.for_each_segment(first..first + chunk_size, |segment| {
                let start = usize::try_from(segment.file_offset).ok();
                let end = usize::try_from(segment.file_offset + segment.length).ok();
                let piece = start.zip(end).and_then(|(start, end)| bytes.get(start..end));
                next(piece.ok_or_else(|| invalid("the state file became shorter"))?)
            })
        })?;
    }
    Ok(())
}

fn range(bytes: &mut [u8], offset: u64, length: u64) -> Result<&mut [u8]> {
    let size = bytes.len();
    let start = usize::try_from(offset).ok();
    let end = usize::try_from(offset.saturating_add(length)).ok();
    let found = start.zip(end).and_then(|(start, end)| bytes.get_mut(start..end));
    found.ok_or_else(|| {
        Error::invalid(format!("{length} bytes at {offset} lie outside a file of {size}"))
    })
}
