//! The client as a [`Cache`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry_core::cache::{
    Cache, CacheFuture, Memory, RetrieveGrant, Slot, StoreGrant, check_checksums,
};
use kvferry_core::events::Events;
use kvferry_core::explain::Explanation;
use kvferry_core::key::{Key, Layout, WORLD_SIZE_MAX, check_model_name, check_salt};
use kvferry_core::{Error, ErrorCode, Result};
use kvferry_wire::message::{Slots, StoreSlots};
use kvferry_wire::{Operation, Reply, Request, RequestKey};

use crate::client::{Client, unexpected};
use crate::frames::{Staged, Transfer};
use crate::pool::Pool;
use crate::session::{Grant, Session, Undo};

/// Between the first two questions for a lookup's result; doubled from there on.
const POLL_MIN: Duration = Duration::from_millis(1);
/// For the question whether a server that did not answer a registration answers anything.
const QUESTION: Duration = Duration::from_millis(500);
/// Between two questions at most.
const POLL_MAX: Duration = Duration::from_millis(16);

impl Cache for Client {
    fn chunk_size(&self) -> u32 {
        self.server().chunk_size
    }

    fn register(&self, layout: Layout, deadline: Instant) -> CacheFuture<'_, u64> {
        Box::pin(async move {
            layout.object_bytes(self.chunk_size())?;
            let deadline = self.deadline(deadline);
            // Remembered first: a connection that begins meanwhile registers it too.
            let (instance_id, session) = self.remember(layout.clone())?;
            let Some(session) = session else { return Ok(instance_id) };
            let forget = Forget { client: self, instance_id, armed: true };
            let undo = Undo::new(Arc::clone(&session), Some(Request::Unregister { instance_id }));
            let reply =
                registered(&session, Request::Register { instance_id, layout }, deadline).await?;
            if let Some(frames) = session.map(reply)? {
                session.request(&frames, deadline).await?;
            }
            undo.disarm();
            forget.disarm();
            Ok(instance_id)
        })
    }

    fn unregister(&self, instance: u64, deadline: Instant) -> CacheFuture<'_, ()> {
        self.forget(instance);
        Box::pin(async move {
            let request = Request::Unregister { instance_id: instance };
            self.session()?.request(&request, self.deadline(deadline)).await.map(drop)
        })
    }

    fn give_up(&self, instance: u64) {
        // The server has it until the connection ends, which the permits of what is written keep open.
        self.forget(instance);
    }

    fn lookup<'a>(&'a self, key: &'a Key, deadline: Instant) -> CacheFuture<'a, u64> {
        Box::pin(async move {
            let chunks = self.chunks(key)?;
            let (session, deadline) = (self.session()?, self.deadline(deadline));
            let (all, tp_size) = self.all_ranks(key, &session)?;
            // Whoever gives up waiting must not leave leases.
            let end = Request::EndSession { request_id: key.request_id.clone() };
            let undo = Undo::new(Arc::clone(&session), Some(end));
            let lookup = Request::Lookup { key: all, tp_size };
            let query = Request::QueryPrefetchStatus { request_id: key.request_id.clone() };
            let mut reply = if session.hello.is_some() {
                // Our server takes requests in their order, so the question needs not wait.
                let (sent, asked) = (session.begin(&lookup, None)?, session.begin(&query, None)?);
                session.flush();
                tokio::try_join!(sent.wait(deadline), asked.wait(deadline))?.1
            } else {
                session.request(&lookup, deadline).await?;
                session.request(&query, deadline).await?
            };
            let mut pause = POLL_MIN;
            loop {
                match reply {
                    Reply::Integer(hit) if hit <= chunks => {
                        undo.disarm();
                        return Ok(hit);
                    }
                    Reply::None => {}
                    reply => return Err(unexpected(Operation::QueryPrefetchStatus, &reply)),
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(POLL_MAX);
                reply = session.request(&query, deadline).await?;
            }
        })
    }

    fn release<'a>(&'a self, key: &'a Key, deadline: Instant) -> CacheFuture<'a, ()> {
        Box::pin(async move {
            self.chunks(key)?;
            let session = self.session()?;
            let (key, tp_size) = self.all_ranks(key, &session)?;
            let request = Request::FreeLookupLocks { key, tp_size };
            session.request(&request, self.deadline(deadline)).await.map(drop)
        })
    }

    fn end_session<'a>(&'a self, request_id: &'a str, deadline: Instant) -> CacheFuture<'a, ()> {
        Box::pin(async move {
            let request = Request::EndSession { request_id: request_id.to_owned() };
            self.session()?.request(&request, self.deadline(deadline)).await.map(drop)
        })
    }

    fn prepare_store<'a>(
        &'a self,
        key: &'a Key,
        instance: u64,
        deadline: Instant,
    ) -> CacheFuture<'a, StoreGrant> {
        Box::pin(async move {
            let chunks = self.chunks(key)?;
            let object_bytes = self.object_bytes(instance)?;
            let session = self.session()?;
            let Some(writer) = self.writers().begin(key, instance) else {
                let (slots, memory, _) = place(&session, &[]).await?;
                let (chunk_indices, refused) = (Vec::new(), Some(0));
                return Ok(StoreGrant { slots, chunk_indices, refused, memory });
            };
            let wire = RequestKey::from(key.clone());
            let request = Request::PrepareStore { key: wire.clone(), instance_id: instance };
            // Whoever gives up waiting must not leave a reservation that nobody fills.
            let abandon = Request::AbandonStore { key: wire.clone(), instance_id: instance };
            let undo = Undo::new(Arc::clone(&session), session.hello.is_some().then_some(abandon));
            let store = match session.request(&request, self.deadline(deadline)).await? {
                Reply::StoreSlots(Some(store)) => store,
                Reply::StoreSlots(None) => return Err(pickles()),
                reply => return Err(unexpected(Operation::PrepareStore, &reply)),
            };
            check_slots(&store.slots, object_bytes)?;
            let ascending = store.chunk_indices.is_sorted_by(|a, b| a < b);
            let inside = store.chunk_indices.last().is_none_or(|last| u64::from(*last) < chunks);
            if !ascending || !inside || store.chunk_indices.len() != store.slots.slots.len() {
                return Err(Error::new(
                    ErrorCode::Protocol,
                    format!("the server granted chunks {:?} of {chunks}", store.chunk_indices),
                ));
            }
            let granted = store.slots.slots;
            let (slots, memory, staged) = place(&session, &granted).await?;
            if !granted.is_empty() {
                let grant = Grant { key: wire, slots: granted, staged, held_until: None };
                session.grant(Operation::PrepareStore, key, instance, grant);
                writer.stay();
            }
            undo.disarm();
            let StoreSlots { chunk_indices, refused, .. } = store;
            Ok(StoreGrant { slots, chunk_indices, refused, memory })
        })
    }

    fn commit_store<'a>(
        &'a self,
        key: &'a Key,
        instance: u64,
        checksums: &'a [u64],
        deadline: Instant,
    ) -> CacheFuture<'a, bool> {
        Box::pin(async move {
            // Whatever comes of it, unless it may be tried again.
            let writer = self.writers().ends(key, instance);
            let session = self.session()?;
            if !checksums.is_empty()
                && let Some(slots) = session.granted(Operation::PrepareStore, key, instance)
                && let Err(error) = check_checksums(checksums, slots)
            {
                writer.stay();
                return Err(error);
            }
            let Some(grant) = session.take_grant(Operation::PrepareStore, key, instance) else {
                return Ok(false);
            };
            let slots = &grant.slots;
            if let Some((placed, memory)) = &grant.staged {
                // However it fails: what is not written whole is never seen.
                let abandon =
                    Request::AbandonStore { key: grant.key.clone(), instance_id: instance };
                let undo = Undo::new(Arc::clone(&session), Some(abandon));
                let session = &*session;
                let transfer = Transfer {
                    client: self,
                    session,
                    instance_id: instance,
                    slots,
                    placed,
                    memory,
                    deadline,
                };
                if !transfer.write().await? {
                    return Ok(false);
                }
                undo.disarm();
            }
            let told = session.keeps_checksums && !checksums.is_empty();
            if let Some((offsets, generations)) = uses(slots).filter(|_| told) {
                // Before the commit on the wire. Nobody waits for the answer: what cannot be kept, the
                // commit goes without.
                session.send_with_next(&Request::Checksums {
                    instance_id: instance,
                    offsets,
                    generations,
                    checksums: checksums.to_vec(),
                });
            }
            let request = Request::CommitStore { key: grant.key, instance_id: instance };
            boolean(&session, &request, self.deadline(deadline)).await
        })
    }

    fn abandon_store<'a>(
        &'a self,
        key: &'a Key,
        instance: u64,
        deadline: Instant,
    ) -> CacheFuture<'a, ()> {
        Box::pin(async move {
            let _writer = self.writers().ends(key, instance);
            let session = self.session()?;
            let Some(grant) = session.take_grant(Operation::PrepareStore, key, instance) else {
                return Ok(());
            };
            if session.hello.is_none() {
                return Ok(()); // LMCache has no such operation: the reservation ends by its own deadline
            }
            let request = Request::AbandonStore { key: grant.key, instance_id: instance };
            session.request(&request, self.deadline(deadline)).await.map(drop)
        })
    }

    fn prepare_retrieve<'a>(
        &'a self,
        key: &'a Key,
        instance: u64,
        deadline: Instant,
    ) -> CacheFuture<'a, Option<RetrieveGrant>> {
        Box::pin(async move {
            let chunks = self.chunks(key)?;
            let object_bytes = self.object_bytes(instance)?;
            let session = self.session()?;
            let wire = RequestKey::from(key.clone());
            let request = Request::PrepareRetrieve { key: wire.clone(), instance_id: instance };
            let reader = session.read(key, instance);
            // Whoever gives up waiting must not leave slots that the server keeps for a reader.
            let commit = Request::CommitRetrieve { key: wire.clone(), instance_id: instance };
            let undo = Undo::new(Arc::clone(&session), Some(commit));
            let held_until = session.read_hold();
            let slots = match session.request(&request, self.deadline(deadline)).await? {
                Reply::RetrieveSlots(Some(slots)) => slots,
                Reply::RetrieveSlots(None) => {
                    undo.disarm();
                    return Ok(None);
                }
                reply => return Err(unexpected(Operation::PrepareRetrieve, &reply)),
            };
            check_slots(&slots, object_bytes)?;
            if slots.slots.len() as u64 != chunks {
                return Err(Error::new(
                    ErrorCode::Protocol,
                    format!("the server granted {} slots for {chunks} chunks", slots.slots.len()),
                ));
            }
            let granted = slots.slots;
            let (slots, memory, staged) = place(&session, &granted).await?;
            if let Some((placed, memory)) = &staged {
                let (session, slots) = (&*session, &granted);
                let transfer = Transfer {
                    client: self,
                    session,
                    instance_id: instance,
                    slots,
                    placed,
                    memory,
                    deadline,
                };
                if !transfer.read().await? {
                    return Ok(None);
                }
            }
            let grant = Grant { key: wire, slots: granted, staged, held_until };
            session.grant(Operation::PrepareRetrieve, key, instance, grant);
            undo.disarm();
            reader.stay();
            Ok(Some(RetrieveGrant { slots, memory }))
        })
    }

    fn clear(&self, deadline: Instant) -> CacheFuture<'_, ()> {
        Box::pin(async move {
            let request = Request::Clear { force: false };
            let session = self.session()?;
            session.check_admin(Operation::Clear)?;
            session.request(&request, self.deadline(deadline)).await.map(drop)
        })
    }

    fn discard<'a>(
        &'a self,
        instance: u64,
        slots: &'a [Slot],
        deadline: Instant,
    ) -> CacheFuture<'a, ()> {
        Box::pin(async move {
            let (session, deadline) = (self.session()?, self.deadline(deadline));
            let uses = slots.iter().filter_map(|slot| Some((slot.offset, slot.generation?)));
            let (offsets, generations): (Vec<u64>, Vec<u64>) = uses.unzip();
            if session.hello.is_none() || offsets.is_empty() {
                return Ok(()); // LMCache's server has no such operation
            }
            let discard = Request::Discard { instance_id: instance, offsets, generations };
            session.request(&discard, deadline).await.map(drop)
        })
    }

    fn commit_retrieve<'a>(
        &'a self,
        key: &'a Key,
        instance: u64,
        slots: &'a [Slot],
        deadline: Instant,
    ) -> CacheFuture<'a, bool> {
        Box::pin(async move {
            let (session, deadline) = (self.session()?, self.deadline(deadline));
            // Slots of a connection that ended may have been used anew during the copy.
            let Some(grant) = session.take_grant(Operation::PrepareRetrieve, key, instance) else {
                return Ok(false);
            };
            let slots = if grant.staged.is_some() { &grant.slots } else { slots };
            // What the server ended meanwhile for another load of the range may have been this one's.
            let reader = session.reader(key, instance);
            let held = grant.held_until.filter(|_| reader.is_alone() && *slots == *grant.slots);
            let commit = Request::CommitRetrieve { key: grant.key, instance_id: instance };
            if held.is_some_and(|until| Instant::now() < until) {
                session.send(&commit)?;
                return Ok(true);
            }
            let uses = uses(slots).filter(|_| session.hello.is_some());
            let Some((offsets, generations)) = uses else {
                return boolean(&session, &commit, deadline).await;
            };
            let confirm = Request::Confirm { instance_id: instance, offsets, generations };
            // In this order on the wire: what is confirmed is still granted.
            let (held, ended) = (session.begin(&confirm, None)?, session.begin(&commit, None)?);
            session.flush();
            let (held, ended) = tokio::join!(held.wait(deadline), ended.wait(deadline));
            Ok(is_yes(Operation::Confirm, held?)? && is_yes(Operation::CommitRetrieve, ended?)?)
        })
    }

    fn events(&self, cursor: u64, max: u32, deadline: Instant) -> CacheFuture<'_, Events> {
        Box::pin(async move {
            match self.ask_ours(&Request::Events { cursor, max }, deadline).await? {
                Reply::Events(events) if events.events.len() <= max as usize => Ok(events),
                Reply::Events(Events { events, .. }) => Err(Error::new(
                    ErrorCode::Protocol,
                    format!("the server answered with {} events, not {max} at most", events.len()),
                )),
                reply => Err(unexpected(Operation::Events, &reply)),
            }
        })
    }

    fn explain<'a>(&'a self, key: &'a Key, deadline: Instant) -> CacheFuture<'a, Explanation> {
        Box::pin(async move {
            let chunks = self.chunks(key)?;
            let key = Key { worker_id: None, ..key.clone() };
            let request = Request::Explain { key: key.into() };
            match self.ask_ours(&request, deadline).await? {
                Reply::Explanation(explanation) if explanation.chunks == chunks => Ok(explanation),
                reply => Err(unexpected(Operation::Explain, &reply)),
            }
        })
    }
}

impl Client {
    /// The answer to a question that only kvferry's server knows.
    async fn ask_ours(&self, request: &Request, deadline: Instant) -> Result<Reply> {
        let session = self.session()?;
        if session.hello.is_none() {
            let operation = request.operation();
            return Err(Error::new(
                ErrorCode::UnsupportedOption,
                format!("the server is not kvferry's and has no {operation}: npx kvferry serve"),
            ));
        }
        session.check_admin(request.operation())?;
        session.request(request, self.deadline(deadline)).await
    }

    /// Checks what servers meet with silence, and counts the chunks of the key's range.
    fn chunks(&self, key: &Key) -> Result<u64> {
        check_model_name(&key.model_name)?;
        check_salt(&key.cache_salt)?;
        if key.world_size == 0 || key.world_size > WORLD_SIZE_MAX {
            return Err(Error::invalid(format!(
                "world size {} is not in 1..={WORLD_SIZE_MAX}",
                key.world_size
            )));
        }
        let chunk = u64::from(self.chunk_size());
        let Key { start, end, .. } = key;
        let tokens = key.token_ids.len() as u64;
        if start > end || *end > tokens || start % chunk != 0 || end % chunk != 0 {
            return Err(Error::invalid(format!(
                "the range {start}..{end} of {tokens} tokens is not one of whole chunks of {chunk}"
            )));
        }
        Ok((end - start) / chunk)
    }

    /// The key of a scheduler's operation, of no rank; and the number of readers, which servers before
    /// LMCache 0.5.5 take from the operation's `tp_size`, later ones from the key.
    ///
    /// # Errors
    /// [`ErrorCode::Protocol`] when the server would take fewer leases than there are readers. The
    /// first of them ends such a lease, and what the others then copy may be another object's.
    fn all_ranks(&self, key: &Key, session: &Session) -> Result<(RequestKey, u64)> {
        let readers = key.num_kv_readers.max(1);
        if session.dialect.leases(readers, key.world_size) < readers {
            return Err(Error::new(
                ErrorCode::Protocol,
                format!(
                    "the server at {} is an LMCache before 0.5.5, which gives {readers} readers of \
                     one object (MLA) a single lease when the KV world size is {}; update it",
                    self.shared.address, key.world_size
                ),
            ));
        }
        let key = Key { worker_id: None, num_kv_readers: readers, ..key.clone() };
        Ok((key.into(), readers.into()))
    }
}

/// Where granted slots are in this process: their places, the memory, and again both when they are not in the pool.
type Placed = (Vec<Slot>, Arc<dyn Memory>, Option<(Vec<Slot>, Arc<Staged>)>);

async fn place(session: &Session, granted: &[Slot]) -> Result<Placed> {
    if session.in_frames().is_some() {
        let (placed, memory) = session.stage.lay_out(granted)?;
        return Ok((placed.clone(), Arc::<Staged>::clone(&memory), Some((placed, memory))));
    }
    let pool = session.pool().ok_or_else(no_pool)?;
    map(&pool, granted).await?;
    Ok((granted.to_vec(), session.memory(pool), None))
}

/// Maps the pages of what was granted on a thread that nobody else waits for: it may take 13 ms for each 64 MiB, once.
/// Who copies may be JavaScript's thread.
async fn map(pool: &Pool, slots: &[Slot]) -> Result<()> {
    let is_new = |slot: &&Slot| !pool.memory.is_mapped(slot.offset, slot.length);
    let new: Vec<(u64, u64)> =
        slots.iter().filter(is_new).map(|slot| (slot.offset, slot.length)).collect();
    if new.is_empty() {
        return Ok(());
    }
    let memory = Arc::clone(&pool.memory);
    let mapped = move || new.into_iter().try_for_each(|(at, bytes)| memory.map(at, bytes));
    let lost = |_| Error::new(ErrorCode::Internal, "mapping the pool was given up");
    tokio::task::spawn_blocking(mapped).await.map_err(lost)?
}

/// Slots of another size than the registered objects would be filled or read wrongly.
fn check_slots(slots: &Slots, object_bytes: u64) -> Result<()> {
    match slots.slots.iter().find(|slot| slot.length != object_bytes) {
        None => Ok(()),
        Some(slot) => Err(Error::new(
            ErrorCode::Protocol,
            format!(
                "the server granted a slot of {} bytes for an object of {object_bytes}; \
                 does another engine use the same model name with another layout?",
                slot.length
            ),
        )),
    }
}

/// The offsets and generations of slots; `None` when the server does not say all generations.
fn uses(slots: &[Slot]) -> Option<(Vec<u64>, Vec<u64>)> {
    slots.iter().map(|slot| Some((slot.offset, slot.generation?))).collect()
}

/// The answer to a request that is answered by yes or no.
async fn boolean(session: &Session, request: &Request, deadline: Instant) -> Result<bool> {
    is_yes(request.operation(), session.request(request, deadline).await?)
}

fn is_yes(operation: Operation, reply: Reply) -> Result<bool> {
    match reply {
        Reply::Boolean(yes) => Ok(yes),
        reply => Err(unexpected(operation, &reply)),
    }
}

/// The answer to a registration. LMCache's server gives none in its other mode, in which it copies from and to the
/// engine's memory by itself: it is told apart from one that hangs by a question, for which there is a little more time.
async fn registered(session: &Session, register: Request, deadline: Instant) -> Result<Reply> {
    let answer = session.request(&register, deadline).await;
    match answer {
        Err(error) if error.code == ErrorCode::Timeout && session.hello.is_none() => {
            let alive = session.request(&Request::Noop, Instant::now() + QUESTION).await;
            Err(match alive {
                Ok(_) => unmapped("the server answers, but takes no registration"),
                Err(_) => error,
            })
        }
        answer => answer,
    }
}

fn pickles() -> Error {
    unmapped("the server asks for pickles")
}

/// Why there is no shared memory, and what to do about it.
pub(crate) fn unmapped(why: &str) -> Error {
    Error::new(
        ErrorCode::UnsupportedOption,
        format!(
            "{why}; LMCache's server needs the options \
             --no-l1-use-lazy --shm-name NAME --supported-transfer-mode engine_driven"
        ),
    )
}

fn no_pool() -> Error {
    Error::new(ErrorCode::Protocol, "the server granted slots and has named no pool")
}

/// Takes a registration back that did not succeed, however it failed.
struct Forget<'a> {
    client: &'a Client,
    instance_id: u64,
    armed: bool,
}

impl Forget<'_> {
    fn disarm(mut self) {
        self.armed = false;
    }
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.client.forget(self.instance_id);
        }
    }
}
