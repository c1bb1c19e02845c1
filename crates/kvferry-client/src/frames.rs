//! Bytes in frames, for a server whose pool cannot be mapped: what is stored lies in memory of this process and goes out in
//! pieces before its commit; what is loaded is fetched in pieces before it is granted.

use std::collections::VecDeque;
#[cfg(unix)]
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use kvferry_copy::PrivateRegion;
use kvferry_core::cache::{Memory, Slot};
use kvferry_core::{Error, ErrorCode, Result};
use kvferry_wire::message::{PIECE_MAX, Piece};
use kvferry_wire::{Reply, Request};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout_at;

use crate::client::{Client, unexpected};
use crate::session::{Pending, Session, lock};

/// Pieces of one connection under way at most: 4 MiB.
const CREDIT: usize = 16;
/// Of a transfer to the server: more of them leave the processors' caches before they are read.
const WRITES: usize = 6;
/// Bytes that all grants of a connection may have here together.
const STAGED_MAX: u64 = 1 << 30;
/// Memory that is kept for the next grant, so that its pages need not come anew.
const SPARE_MAX: u64 = 256 << 20;
const PAGE: u64 = 4096;

/// Where a connection's grants have their memory.
pub(crate) struct Stage {
    staged: AtomicU64,
    spare: Mutex<Option<Arc<PrivateRegion>>>,
    credit: Semaphore,
}

impl Default for Stage {
    fn default() -> Self {
        Self { staged: AtomicU64::new(0), spare: Mutex::default(), credit: Semaphore::new(CREDIT) }
    }
}

/// The memory of one grant, which comes back when nobody copies from or to it any more.
pub(crate) struct Staged {
    region: Option<Arc<dyn Memory>>,
    whole: Arc<PrivateRegion>,
    bytes: u64,
    stage: Weak<Stage>,
}

impl Stage {
    /// Memory for these slots, and where in it each of them is.
    pub(crate) fn lay_out(self: &Arc<Self>, slots: &[Slot]) -> Result<(Vec<Slot>, Arc<Staged>)> {
        let mut bytes = 0_u64;
        let mut placed = Vec::with_capacity(slots.len());
        for slot in slots {
            placed.push(Slot { offset: bytes, ..slot.clone() });
            bytes = bytes.saturating_add(slot.length.next_multiple_of(PAGE));
        }
        let before = self.staged.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) > STAGED_MAX {
            self.staged.fetch_sub(bytes, Ordering::Relaxed);
            return Err(Error::new(
                ErrorCode::Timeout,
                format!(
                    "{bytes} bytes more than {before} would be on their way to or from a server whose pool cannot \
                     be mapped, and {STAGED_MAX} at once are the most"
                ),
            ));
        }
        let spare = lock(&self.spare).take_if(|spare| spare.bytes() >= bytes);
        let whole = spare.map_or_else(|| PrivateRegion::new(bytes.max(PAGE)).map(Arc::new), Ok);
        let whole = whole.inspect_err(|_| {
            self.staged.fetch_sub(bytes, Ordering::Relaxed);
        })?;
        let region: Arc<dyn Memory> = Arc::<PrivateRegion>::clone(&whole);
        let staged = Staged { region: Some(region), whole, bytes, stage: Arc::downgrade(self) };
        Ok((placed, Arc::new(staged)))
    }
}

impl Memory for Staged {
    fn bytes(&self) -> u64 {
        self.whole.bytes()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        self.whole.read(offset, into)
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        self.whole.write(offset, from)
    }

    fn guarded(&self) -> Option<&Arc<dyn Memory>> {
        self.region.as_ref()
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        let Some(stage) = self.stage.upgrade() else { return };
        stage.staged.fetch_sub(self.bytes, Ordering::Relaxed);
        self.region = None;
        if Arc::strong_count(&self.whole) == 1 && self.whole.bytes() <= SPARE_MAX {
            let mut spare = lock(&stage.spare);
            if spare.as_ref().is_none_or(|spare| spare.bytes() < self.whole.bytes()) {
                *spare = Some(Arc::clone(&self.whole));
            }
        }
    }
}

/// Where a piece belongs here.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) memory: Arc<Staged>,
    pub(crate) at: u64,
    pub(crate) bytes: usize,
}

/// A piece that is on its way from the socket to its place.
pub(crate) struct Landing {
    /// Whose answer it is.
    pub(crate) uid: Bytes,
    /// Of what is missing.
    rest: Place,
}

impl Landing {
    /// A piece of which some bytes are here. `None`: they do not fit.
    pub(crate) fn new(uid: Bytes, place: Place, here: &[u8]) -> Option<Self> {
        place.memory.write(place.at, here).ok()?;
        let bytes = place.bytes.checked_sub(here.len())?;
        Some(Self { uid, rest: Place { at: place.at + here.len() as u64, bytes, ..place } })
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.rest.bytes == 0
    }

    /// Receives more of it, without a wait; how much.
    #[cfg(unix)]
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>) -> std::io::Result<usize> {
        let Place { memory, at, bytes } = &mut self.rest;
        let received = memory.whole.receive(socket, *at, *bytes)?;
        *at += received as u64;
        *bytes -= received;
        Ok(received)
    }
}

/// The pieces of slots, each with its place at the server and its place here.
fn pieces<'a>(
    slots: &'a [Slot],
    placed: &'a [Slot],
) -> impl Iterator<Item = (&'a Slot, u64, u64, usize)> {
    slots.iter().zip(placed).flat_map(|(slot, here)| {
        (0..slot.length).step_by(PIECE_MAX).map(move |at| {
            let bytes =
                usize::try_from(slot.length - at).map_or(PIECE_MAX, |rest| rest.min(PIECE_MAX));
            (slot, at, here.offset + at, bytes)
        })
    })
}

/// Requests under way, oldest first, each with its part of the credit and where its answer's bytes belong.
type UnderWay<'a> = VecDeque<Asked<'a>>;

struct Asked<'a> {
    pending: Pending<'a>,
    _credit: SemaphorePermit<'a>,
    place: Place,
    /// What was sent; its memory is used again.
    sent: Option<Piece>,
}

/// A transfer over one connection.
pub(crate) struct Transfer<'a> {
    pub(crate) client: &'a Client,
    pub(crate) session: &'a Session,
    pub(crate) instance_id: u64,
    /// The server's.
    pub(crate) slots: &'a [Slot],
    /// The same here.
    pub(crate) placed: &'a [Slot],
    pub(crate) memory: &'a Arc<Staged>,
    pub(crate) deadline: Instant,
}

impl<'a> Transfer<'a> {
    /// Writes the slots. `false`: the server does not have them for us any more.
    pub(crate) async fn write(&self) -> Result<bool> {
        self.each(|memory, generation, slot, at, here, bytes| {
            let piece = Piece::refill(memory, bytes, |data| self.memory.read(here, data))?;
            let offset = slot.offset;
            Ok(Request::Write { instance_id: self.instance_id, offset, generation, at, piece })
        })
        .await
    }

    /// Reads the slots. `false`: they hold something else by now.
    pub(crate) async fn read(&self) -> Result<bool> {
        self.each(|_, generation, slot, at, _, bytes| {
            let (offset, bytes) = (slot.offset, bytes as u64);
            Ok(Request::Read { instance_id: self.instance_id, offset, generation, at, bytes })
        })
        .await
    }

    async fn each(
        &self,
        ask: impl Fn(BytesMut, u64, &Slot, u64, u64, usize) -> Result<Request>,
    ) -> Result<bool> {
        let mut under_way = UnderWay::new();
        let mut memory = BytesMut::new();
        for (slot, at, here, bytes) in pieces(self.slots, self.placed) {
            let Some(generation) = slot.generation else {
                let message = "the server granted a slot without its generation";
                return Err(Error::new(ErrorCode::Protocol, message));
            };
            let credit = loop {
                let full = under_way.front().is_some_and(|oldest| oldest.sent.is_some())
                    && under_way.len() >= WRITES;
                if !full && let Ok(credit) = self.session.stage.credit.try_acquire() {
                    break credit;
                }
                if let Some(mut oldest) = under_way.pop_front() {
                    let sent = oldest.sent.take();
                    if !self.end(oldest).await? {
                        return Ok(false);
                    }
                    memory = sent.map(Piece::into_memory).unwrap_or_default();
                    continue;
                }
                let until = self.client.deadline(self.deadline);
                match timeout_at(until.into(), self.session.stage.credit.acquire()).await {
                    Ok(Ok(credit)) => break credit,
                    _ => {
                        let message = "other transfers had all of the connection's credit";
                        return Err(Error::new(ErrorCode::Timeout, message));
                    }
                }
            };
            let request = ask(std::mem::take(&mut memory), generation, slot, at, here, bytes)?;
            let place = Place { memory: Arc::clone(self.memory), at: here, bytes };
            let (sent, into) = match &request {
                Request::Write { piece, .. } => (Some(piece.clone()), None),
                _ => (None, Some(place.clone())),
            };
            let pending = self.session.begin(&request, into)?;
            self.session.nudge();
            under_way.push_back(Asked { pending, _credit: credit, place, sent });
        }
        while let Some(oldest) = under_way.pop_front() {
            if !self.end(oldest).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Waits for an answer, and puts what it brings in its place, unless it went there by itself.
    async fn end(&self, asked: Asked<'a>) -> Result<bool> {
        let Asked { pending, _credit, place: Place { memory, at, bytes }, .. } = asked;
        let operation = pending.operation();
        match pending.wait(self.client.deadline(self.deadline)).await? {
            Reply::Boolean(done) => Ok(done),
            Reply::Piece(None) => Ok(false),
            Reply::Piece(Some(piece)) if piece.data().len() == bytes => {
                memory.write(at, piece.data()).map(|()| true)
            }
            reply => Err(unexpected(operation, &reply)),
        }
    }
}
