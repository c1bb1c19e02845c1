//! Questions, loads, saves and removals: what each asks of the remote, and what becomes of it.

use std::future::ready;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use crc_fast::{CrcAlgorithm, Digest};
use kvferry_core::{Error, ErrorCode, Result};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::task::block_in_place;

use super::shared::{LoadTask, Question, Request, SaveTask, Shared, closed, random};
use super::{Lengths, RemoteFuture};
use crate::disk::{Loaded, Saved, format};
use crate::index::ObjectId;

/// Saves at a time.
pub(crate) const SAVERS: usize = 4;
/// Loads at a time.
pub(crate) const LOADERS: usize = 8;
/// Removals at a time.
pub(crate) const REMOVERS: usize = 4;
/// How often a request is sent at most. Each may be sent twice: a value is the same whenever it is put.
const TRIES: u32 = 3;
/// Bytes that are summed and copied at a time: the processor's cache holds them in between.
const STEP: usize = 128 << 10;

/// Half of it up to all of it, at random: what failed together does not come back together.
pub(crate) fn jittered(most: Duration) -> Duration {
    #[expect(clippy::cast_precision_loss, reason = "a random number")]
    let part = random().map_or(0.0, |random| random as f64 / u64::MAX as f64);
    most.mul_f64(1.0 - part / 2.0)
}

/// One try.
pub(crate) fn limited<'a, T: 'a>(
    shared: &'a Shared,
    limit: Duration,
    request: RemoteFuture<'a, T>,
) -> RemoteFuture<'a, T> {
    Box::pin(async move {
        tokio::time::timeout(limit, request).await.unwrap_or_else(|_| {
            let (place, ms) = (shared.objects.place(), limit.as_millis());
            Err(Error::new(ErrorCode::Timeout, format!("{place} has not answered within {ms} ms")))
        })
    })
}

/// The same of a question. What was told in time is an answer, if it was anything.
fn lengths<'a>(
    shared: &'a Shared,
    limit: Duration,
    keys: Vec<String>,
    told: &'a Lengths,
) -> RemoteFuture<'a, ()> {
    told.lock().clear();
    let asked = limited(shared, limit, shared.objects.lengths(keys, told));
    Box::pin(async move {
        match asked.await {
            Err(error) if error.code == ErrorCode::Timeout && !told.lock().is_empty() => Ok(()),
            answer => answer,
        }
    })
}

/// Sends a request, which keeps its limit itself, again if the connection was lost, until `until`.
async fn send<'a, T>(
    shared: &'a Shared,
    kind: Request,
    limit: Duration,
    until: Option<Instant>,
    mut request: impl FnMut(Duration) -> RemoteFuture<'a, T>,
) -> Result<T> {
    let mut tries = 0;
    loop {
        tries += 1;
        let begun = Instant::now();
        let left = until.map_or(limit, |until| until.saturating_duration_since(begun));
        let result = request(limit.min(left)).await;
        shared.took(kind, begun.elapsed());
        let error = match result {
            Ok(answer) => {
                shared.succeeded();
                return Ok(answer);
            }
            Err(error) => error,
        };
        // Of an asker that had less time than a question takes nothing is learnt.
        let cut_short = error.code == ErrorCode::Timeout && left < limit;
        let outage = matches!(error.code, ErrorCode::Unreachable | ErrorCode::Timeout);
        let goes_on = outage && !cut_short && shared.failed(&error);
        let pause = jittered(shared.times.backoff.saturating_mul(1 << (tries - 1).min(16)));
        let in_time = until.is_none_or(|until| Instant::now() + pause < until);
        if !goes_on || error.code == ErrorCode::Timeout || tries == TRIES || !in_time {
            return Err(error);
        }
        tokio::time::sleep(pause).await;
        shared.lock().status.retries += 1;
    }
}

/// Leave to hold a value of `bytes` beside the pool: twice, as the clients of engines do while it travels.
async fn in_flight<'a>(
    shared: &Shared,
    semaphore: &'a Semaphore,
    bytes: u64,
) -> Result<SemaphorePermit<'a>> {
    let kib = u32::try_from(bytes.saturating_mul(2).div_ceil(1024)).unwrap_or(u32::MAX);
    let kib = kib.clamp(1, shared.times.in_flight_kib);
    semaphore.acquire_many(kib).await.map_err(|_| closed())
}

pub(crate) async fn find(shared: Arc<Shared>, question: Question) {
    let keys: Vec<String> = question.objects.iter().map(|(id, _)| shared.key(id)).collect();
    let limit = shared.times.question;
    let told = Lengths::default();
    let ask = |limit| lengths(&shared, limit, keys.clone(), &told);
    if send(&shared, Request::Question, limit, Some(question.until), ask).await.is_err() {
        shared.lock().status.question_failures += 1;
    }
    let there = {
        let told = told.lock();
        let same = |((_, expected), bytes): (&(ObjectId, u64), &u64)| expected == bytes;
        question.objects.iter().zip(&*told).take_while(|pair| same(*pair)).count()
    };
    // The callback takes the store's lock, and reserves room for what is there.
    block_in_place(|| question.answer(there));
}

pub(crate) async fn load(shared: Arc<Shared>) {
    let _present = shared.present();
    loop {
        let Some((task, done, go)) = shared.next_load() else {
            if shared.lock().closing {
                return;
            }
            shared.for_loaders.notified().await;
            continue;
        };
        let result = match go {
            Ok(()) => load_one(&shared, &task).await,
            Err(error) => Err(error),
        };
        block_in_place(|| shared.end_load(done, result));
    }
}

async fn load_one(shared: &Shared, task: &LoadTask) -> Result<Option<Loaded>> {
    let _permit = in_flight(shared, &shared.loads_in_flight, task.length).await?;
    let got = match shared.begin_get(&task.id) {
        Some(key) => {
            let get = |limit| limited(shared, limit, shared.objects.get(key.clone()));
            let got = send(shared, Request::Load, shared.times.transfer, None, get).await;
            let may_be_used = shared.end_get(&task.id);
            got.map(|value| value.filter(|_| may_be_used))
        }
        None => Ok(None),
    };
    let value = match got {
        Ok(Some(value)) => value,
        Ok(None) => {
            shared.lock().status.missing += 1;
            return Ok(None);
        }
        Err(error) => {
            shared.lock().status.load_failures += 1;
            return Err(error);
        }
    };
    let loaded = block_in_place(|| take(task, &value));
    match loaded {
        Ok(Some(loaded)) => {
            let mut state = shared.lock();
            state.status.loads += 1;
            state.status.read_bytes += value.len() as u64;
            Ok(Some(loaded))
        }
        Ok(None) => {
            shared.lock().status.damaged += 1;
            shared.remove_damaged(&task.id);
            Ok(None)
        }
        Err(error) => {
            shared.lock().status.load_failures += 1;
            Err(error)
        }
    }
}

/// Copies the object to its place; `None` unless the value is what was saved under its key.
fn take(task: &LoadTask, value: &Bytes) -> Result<Option<Loaded>> {
    let Some(header) = format::decode(value) else { return Ok(None) };
    let (saved, bytes) = (&header.saved, &value[header.bytes..]);
    let expected = header.length == task.length
        && bytes.len() as u64 == task.length
        && saved.id() == task.id
        && saved.space == Saved::space_of(&saved.layout, &saved.cache_salt);
    if !expected {
        return Ok(None);
    }
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    let mut at = task.offset;
    for step in bytes.chunks(STEP) {
        digest.update(step);
        task.memory.write(at, step)?;
        at = at.saturating_add(step.len() as u64); // out of bounds: the memory says so
    }
    let checksum = digest.finalize();
    Ok((checksum == header.checksum).then_some(Loaded { checksum, parent: saved.parent }))
}

pub(crate) async fn save(shared: Arc<Shared>) {
    let _present = shared.present();
    loop {
        let Some((task, ticket, go)) = shared.next_save() else {
            if shared.lock().closing {
                return;
            }
            shared.for_savers.notified().await;
            continue;
        };
        let result = match go {
            Ok(key) => save_one(&shared, &task, ticket.number, &key).await,
            Err(error) => Err(error),
        };
        block_in_place(|| shared.end_save(task, ticket, result));
    }
}

async fn save_one(shared: &Shared, task: &SaveTask, ticket: u64, key: &str) -> Result<bool> {
    let _permit = in_flight(shared, &shared.saves_in_flight, task.length).await?;
    let id = task.saved.id();
    let header = match format::header_bytes(&task.saved) {
        Ok(header) => header,
        Err(error) => {
            shared.lock().status.save_failures += 1;
            return Err(error);
        }
    };
    let bytes = task.length.saturating_add(header as u64);
    if !shared.is_removed(&id) {
        let told = Lengths::default();
        let ask = |limit| lengths(shared, limit, vec![key.to_owned()], &told);
        let asked = send(shared, Request::Question, shared.times.question, None, ask).await;
        if let Err(error) = asked {
            shared.save_failed(&error);
            return Err(error);
        }
        if *told.lock() == [bytes] {
            shared.lock().status.known_saves += 1;
            return Ok(true);
        }
    }
    let mut made = match block_in_place(|| value(task, header)) {
        Ok(Some(value)) => Some(value),
        Ok(None) => {
            shared.lock().status.dropped_damaged += 1;
            return Ok(false);
        }
        Err(error) => {
            shared.lock().status.save_failures += 1;
            return Err(error);
        }
    };
    let damaged = AtomicBool::new(false);
    // Made again for another try: while an answer is waited for, the engine's copies are enough.
    let put = |limit| -> RemoteFuture<'_, ()> {
        let made = match made.take() {
            Some(made) => Ok(Some(made)),
            None => block_in_place(|| value(task, header)),
        };
        match made {
            Ok(Some(value)) => limited(shared, limit, shared.objects.put(key.to_owned(), value)),
            Ok(None) => {
                damaged.store(true, Ordering::Relaxed);
                let message = "the object was damaged in memory before it was in the remote";
                Box::pin(ready(Err(Error::new(ErrorCode::Aborted, message))))
            }
            Err(error) => Box::pin(ready(Err(error))),
        }
    };
    let put = send(shared, Request::Save, shared.times.transfer, None, put).await;
    shared.was_put(&id, ticket, put.is_ok());
    if damaged.into_inner() {
        shared.lock().status.dropped_damaged += 1;
        return Ok(false);
    }
    if let Err(error) = put {
        shared.save_failed(&error);
        return Err(error);
    }
    let mut state = shared.lock();
    state.status.saves += 1;
    state.status.written_bytes += bytes;
    Ok(true)
}

/// Header and bytes; `None` when the bytes are not those that were stored.
fn value(task: &SaveTask, header: usize) -> Result<Option<Bytes>> {
    let length = usize::try_from(task.length).unwrap_or(usize::MAX);
    let mut value = vec![0; header.saturating_add(length)];
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    let mut at = task.offset;
    for step in value[header..].chunks_mut(STEP) {
        task.memory.read(at, step)?;
        digest.update(step);
        at = at.saturating_add(step.len() as u64); // out of bounds: the memory says so
    }
    let checksum = digest.finalize();
    if task.checksum.is_some_and(|expected| expected != checksum) {
        return Ok(None);
    }
    format::encode(&task.saved, task.length, checksum, &mut value[..header]);
    Ok(Some(value.into()))
}

pub(crate) async fn remove(shared: Arc<Shared>) {
    let _present = shared.present();
    loop {
        let Some((id, number)) = shared.next_removal() else {
            if shared.lock().closing {
                return;
            }
            shared.for_removers.notified().await;
            continue;
        };
        let key = shared.key(&id);
        // Once, and whatever comes of it says nothing of loads: an engine may refuse removals alone. The next round of the
        // keeper tries again.
        let removed = limited(&shared, shared.times.question, shared.objects.remove(key)).await;
        shared.end_removal(&id, number, removed.is_ok());
    }
}
