//! State files out of and into a prefix cache.

use std::time::{Duration, Instant};

use super::{AssemblePlan, Geometry, Segment, StateFile, invalid};
use crate::cache::FileBuffer;
use crate::prefix::{Hit, Passage, PrefixCache, Reading, Writing};
use crate::{Error, ErrorCode, Result};

/// Bytes of a chunk that are copied in one go: little enough that no thread waits long for the last one, and much more
/// than it takes to begin one.
const PART_BYTES: usize = 1 << 20;

/// One of several copies that do not depend on each other.
pub type Copy<'a> = Box<dyn FnOnce() + Send + 'a>;

/// Runs copies to their end, side by side where that helps; they take milliseconds.
pub type RunCopies<'a> = &'a (dyn for<'copy> Fn(Vec<Copy<'copy>>) + Sync);

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
    /// From the call to the cache's answer, the grant of its slots included.
    pub lookup: Duration,
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

/// What a restore still holds: chunks and their leases. Ending it takes round trips that nobody has to
/// wait for.
#[must_use = "until it is ended, nothing makes room where these chunks lie"]
pub struct Held {
    hit: Hit,
    reading: Option<Reading>,
}

impl Held {
    /// Gives it back.
    pub async fn end(self, prefix: &PrefixCache, deadline: Instant) {
        // Whether the slots were still ours does not matter: what was read has been checked.
        let _ = prefix.finish(&self.hit, self.reading, deadline).await;
    }
}

/// Looks up the longest stored prefix of the target's tokens and writes its state file into `file`.
pub async fn restore(
    prefix: &PrefixCache,
    target: &Target<'_>,
    salt: &str,
    file: &mut (dyn FileBuffer + Send),
    deadline: Instant,
    run_copies: RunCopies<'_>,
) -> Result<(Restored, Held)> {
    let called = Instant::now();
    let hit = prefix.lookup(target.tokens, salt, deadline).await?;
    let found = hit.chunks();
    let mut held = Held { hit, reading: None };
    if u64::from(found) * u64::from(target.chunk_size) <= u64::from(target.beyond) {
        return Ok((Restored { found, written: 0, lookup: called.elapsed() }, held));
    }
    let loading = prefix.load(&held.hit, deadline).await;
    let lookup = called.elapsed();
    let written = match loading {
        Ok(Some(reading)) => {
            let reading = held.reading.insert(reading);
            assemble(reading, target, file, &|| before(deadline), run_copies)
        }
        Ok(None) => Ok(0),
        Err(error) => Err(error),
    };
    match written {
        Ok(written) => Ok((Restored { found, written, lookup }, held)),
        Err(error) => {
            held.end(prefix, deadline).await;
            Err(error)
        }
    }
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
    run_copies: RunCopies<'_>,
) -> Result<Stored> {
    let state = StateFile::parse(bytes)?;
    if !state.tokens().starts_with(tokens) {
        return Err(invalid("the engine's state is of other tokens than those to be stored"));
    }
    let writing = prefix.store(tokens, salt, deadline).await?;
    let check = || before(deadline);
    let written = split(&state, bytes, geometry, prefix.chunk_size(), &writing, &check, run_copies);
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
    check: &(dyn Fn() -> Result<()> + Sync),
    run_copies: RunCopies<'_>,
) -> Result<u32> {
    let mut chunks = reading.chunks();
    while chunks > 0 {
        // A chunk that fails moves all later bytes of the file: it is written anew, without it.
        match fill(reading, target, chunks, file, check, run_copies)? {
            whole if whole == chunks => break,
            whole => chunks = whole,
        }
    }
    Ok(chunks)
}

/// Writes the file of `chunks` chunks; says how many of them are whole before the first that is not.
fn fill(
    reading: &Reading,
    target: &Target<'_>,
    chunks: u32,
    file: &mut dyn FileBuffer,
    check: &(dyn Fn() -> Result<()> + Sync),
    run_copies: RunCopies<'_>,
) -> Result<u32> {
    let tokens = chunks.checked_mul(target.chunk_size).map(|tokens| tokens as usize);
    let tokens = tokens.and_then(|tokens| target.tokens.get(..tokens)).ok_or_else(|| {
        Error::invalid(format!("{chunks} chunks are more than the {} tokens", target.tokens.len()))
    })?;
    let plan = AssemblePlan::new(target.geometry, tokens, target.streams, target.sequence)?;
    let bytes = file.resize(plan.file_bytes())?;
    for piece in plan.pieces() {
        let at = usize::try_from(piece.offset).unwrap_or(usize::MAX);
        let room = bytes.get_mut(at..).and_then(|rest| rest.get_mut(..piece.bytes.len()));
        room.ok_or_else(outside)?.copy_from_slice(&piece.bytes);
    }
    let expected = target.geometry.encode();
    let copy = |Part { chunk, from, pieces }: Part<'_>| {
        check()?;
        let mut of_part = PartRead { chunk, passage: reading.begin(chunk, from)?, fits: true };
        if let Some(passage) = &mut of_part.passage {
            if from == 0 {
                let mut descriptor = vec![0; expected.len()];
                reading.next(passage, &mut descriptor)?;
                of_part.fits = descriptor == expected;
            }
            pieces.into_iter().try_for_each(|piece| reading.next(passage, piece))?;
        }
        Ok(of_part)
    };
    let pieces = carve(bytes, &plan, chunks, target.chunk_size)?;
    let parts =
        pieces.into_iter().zip(0..).flat_map(|(pieces, chunk)| cut(chunk, expected.len(), pieces));
    let read = copy_all(parts, &copy, run_copies)?;
    let whole = read.chunk_by(|one, two| one.chunk == two.chunk).map(|of_chunk| {
        let passages: Option<Vec<_>> = of_chunk.iter().map(|part| part.passage.as_ref()).collect();
        let is_whole = passages.map_or(Ok(false), |passages| reading.end(passages))?;
        Ok(is_whole && of_chunk.iter().all(|part| part.fits))
    });
    let whole = whole.collect::<Result<Vec<_>>>()?;
    let leading = whole.iter().take_while(|whole| **whole).count();
    Ok(u32::try_from(leading).unwrap_or(u32::MAX))
}

/// What is copied in one go of a chunk: the payload's bytes from `from` on.
struct Part<'a> {
    chunk: u32,
    from: u64,
    pieces: Vec<&'a mut [u8]>,
}

/// A part that was read.
struct PartRead {
    chunk: u32,
    /// `None`: the chunk is not what was stored.
    passage: Option<Passage>,
    /// The state's shape is the target's, as far as this part tells.
    fits: bool,
}

/// Cuts a chunk, whose pieces follow `ahead` bytes of the payload, into parts.
fn cut(chunk: u32, ahead: usize, pieces: Vec<&mut [u8]>) -> Vec<Part<'_>> {
    let mut parts = vec![Part { chunk, from: 0, pieces: Vec::new() }];
    let (mut at, mut room) = (ahead as u64, PART_BYTES);
    for piece in pieces {
        if room == 0 {
            parts.push(Part { chunk, from: at, pieces: Vec::new() });
            room = PART_BYTES;
        }
        at += piece.len() as u64;
        room = room.saturating_sub(piece.len());
        if let Some(part) = parts.last_mut() {
            part.pieces.push(piece);
        }
    }
    parts
}

/// Cuts a file into the pieces of each of its chunks, in the payload's order.
fn carve<'a>(
    bytes: &'a mut [u8],
    plan: &AssemblePlan,
    chunks: u32,
    chunk_size: u32,
) -> Result<Vec<Vec<&'a mut [u8]>>> {
    let mut segments = Vec::new();
    for chunk in 0..chunks {
        let first = chunk * chunk_size;
        plan.for_each_segment(first..first + chunk_size, |segment| {
            segments.push((segment, chunk as usize));
            Ok(())
        })?;
    }
    segments.sort_unstable_by_key(|(segment, _)| segment.file_offset);
    let mut carved: Vec<Vec<(u64, &mut [u8])>> = (0..chunks).map(|_| Vec::new()).collect();
    let (mut rest, mut at) = (bytes, 0);
    for (Segment { file_offset, payload_offset, length }, chunk) in segments {
        let gap = file_offset.checked_sub(at).and_then(|gap| usize::try_from(gap).ok());
        let length = usize::try_from(length).ok();
        let (gap, length) = gap.zip(length).ok_or_else(outside)?;
        let (_, from) = rest.split_at_mut_checked(gap).ok_or_else(outside)?;
        let (piece, after) = from.split_at_mut_checked(length).ok_or_else(outside)?;
        at = file_offset + piece.len() as u64;
        carved[chunk].push((payload_offset, piece));
        rest = after;
    }
    let in_order = |mut pieces: Vec<(u64, &'a mut [u8])>| {
        pieces.sort_unstable_by_key(|(payload_offset, _)| *payload_offset);
        pieces.into_iter().map(|(_, piece)| piece).collect()
    };
    Ok(carved.into_iter().map(in_order).collect())
}

/// Fills `writing` from the state file `bytes`, parsed as `state`.
fn split(
    state: &StateFile,
    bytes: &[u8],
    geometry: &Geometry,
    chunk_size: u32,
    writing: &Writing,
    check: &(dyn Fn() -> Result<()> + Sync),
    run_copies: RunCopies<'_>,
) -> Result<()> {
    if state.geometry() != geometry {
        return Err(Error::new(
            ErrorCode::InvalidState,
            "the engine's state has another shape than its model and context let expect",
        ));
    }
    let descriptor = geometry.encode();
    let copy = |(place, chunk): (usize, &u32)| {
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
        })
    };
    copy_all(writing.chunks().iter().enumerate(), &copy, run_copies).map(drop)
}

/// Runs `copy` for each item; the results in the items' order, or the first error.
fn copy_all<I: Send, T: Send>(
    items: impl Iterator<Item = I>,
    copy: &(dyn Fn(I) -> Result<T> + Sync),
    run_copies: RunCopies<'_>,
) -> Result<Vec<T>> {
    let mut results: Vec<(Option<I>, Result<T>)> =
        items.map(|item| (Some(item), Err(not_run()))).collect();
    let copies = results.iter_mut().map(|(item, result)| {
        let run: Copy<'_> = Box::new(move || {
            if let Some(item) = item.take() {
                *result = copy(item);
            }
        });
        run
    });
    run_copies(copies.collect());
    results.into_iter().map(|(_, result)| result).collect()
}

fn not_run() -> Error {
    Error::new(ErrorCode::Internal, "a copy was not run")
}

fn outside() -> Error {
    Error::new(ErrorCode::Internal, "the plan of a state file leaves the file")
}
