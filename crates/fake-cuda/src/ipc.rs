//! Device memory and events of another process.
//!
//! Races between processes are not seen: clocks are one process's own.

use crate::abi::{Handle, IpcHandle, Out, bytes_of, size_of};
use crate::backing::{Backing, Process};
use crate::errors::{
    Failure, INVALID_CONTEXT, INVALID_HANDLE, INVALID_VALUE, MAP_FAILED, OUT_OF_MEMORY, Outcome,
    wrong,
};
use crate::events::Event;
use crate::memory::{Allocation, new_token};
use crate::state::{State, call, lock};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What this process has opened.
pub(crate) struct Import {
    exporter: Process,
    opened: u32,
}

impl Import {
    /// Driver API, cuIpcOpenMemHandle: "Calling cuMemFree on an exported memory region before calling
    /// cuIpcCloseMemHandle in the importing context will result in undefined behavior". Our reading: the end of the
    /// exporting process is the same.
    pub(crate) fn check(&self, backing: &Backing) -> Outcome {
        if backing.is_freed() {
            return Err(wrong(
                INVALID_VALUE,
                &format!("process {} has freed the memory that is open here", self.exporter.id),
            ));
        }
        if self.exporter.has_ended() {
            return Err(wrong(
                INVALID_VALUE,
                &format!("process {}, whose memory is open here, has ended", self.exporter.id),
            ));
        }
        Ok(())
    }
}

const MAGIC: [u8; 8] = *b"FAKECUDA";
const EVENT_MAGIC: [u8; 8] = *b"FAKEEVNT";

/// What a handle of ours says: the exporting process, its descriptor, bytes, and what names it.
fn pack(magic: [u8; 8], backing: &Backing, bytes: u64, token: u64) -> IpcHandle {
    let mut handle = [0; 64];
    handle[..8].copy_from_slice(&magic);
    handle[8..12].copy_from_slice(&std::process::id().to_le_bytes());
    handle[12..16].copy_from_slice(&backing.fd().to_le_bytes());
    handle[16..24].copy_from_slice(&bytes.to_le_bytes());
    handle[24..32].copy_from_slice(&token.to_le_bytes());
    IpcHandle(handle)
}

struct Unpacked {
    exporter: u32,
    fd: u32,
    bytes: u64,
    token: u64,
}

/// Our reading: bytes that are no handle are `INVALID_HANDLE`, one of this process' own is `INVALID_CONTEXT`.
fn unpack(magic: [u8; 8], what: &str, handle: &IpcHandle) -> Outcome<Unpacked> {
    let number = |from: usize, to: usize| {
        handle.0[from..to].iter().rev().fold(0u64, |value, &byte| value << 8 | u64::from(byte))
    };
    if handle.0[..8] != magic {
        return Err(wrong(INVALID_HANDLE, &format!("these bytes are no {what} handle")));
    }
    let exporter = u32::try_from(number(8, 12)).unwrap_or_default();
    let fd = u32::try_from(number(12, 16)).unwrap_or_default();
    if exporter == std::process::id() {
        return Err(wrong(INVALID_CONTEXT, "opened in the process that exported it"));
    }
    Ok(Unpacked { exporter, fd, bytes: number(16, 24), token: number(24, 32) })
}

/// What an interprocess event says to all processes that have it.
pub(crate) struct SharedEvent {
    backing: Backing,
    token: u64,
    /// Of an event that was opened here.
    exporter: Option<Process>,
}

#[repr(C)]
struct Counts {
    recorded: AtomicU64,
    done: AtomicU64,
    /// Queries of processes that have opened it.
    looks: AtomicU64,
}

const EVENT_BYTES: usize = std::mem::size_of::<Counts>();

impl SharedEvent {
    pub(crate) fn new() -> Outcome<Self> {
        let token = new_token();
        let backing = Backing::new(EVENT_BYTES, token).map_err(|_| Failure::Code(OUT_OF_MEMORY))?;
        let event = Self { backing, token, exporter: None };
        let Counts { recorded, done, looks } = event.counts();
        for count in [recorded, done, looks] {
            count.store(0, Ordering::SeqCst);
        }
        Ok(event)
    }

    fn counts(&self) -> &Counts {
        // SAFETY: the mapping begins at a page, is longer than the counts, and any bytes are valid ones.
        unsafe { &*self.backing.at(0).cast::<Counts>() }
    }

    /// A record, by any process; its number.
    pub(crate) fn record(&self) -> u64 {
        self.counts().recorded.fetch_add(1, Ordering::SeqCst) + 1
    }

    pub(crate) fn recorded(&self) -> u64 {
        self.counts().recorded.load(Ordering::SeqCst)
    }

    pub(crate) fn reach(&self, number: u64) {
        self.counts().done.fetch_max(number, Ordering::SeqCst);
    }

    pub(crate) fn is_done(&self, number: u64) -> bool {
        self.counts().done.load(Ordering::SeqCst) >= number
    }

    pub(crate) fn note_look(&self) {
        if self.exporter.is_some() {
            self.counts().looks.fetch_add(1, Ordering::SeqCst);
        }
    }

    pub(crate) fn note_destroyed(&self) {
        if self.exporter.is_none() {
            self.backing.note_freed();
        }
    }

    /// Driver API, cuIpcOpenEventHandle: "Performing operations on the imported event after the exported event has been
    /// freed with cuEventDestroy will result in undefined behavior". Our reading: what a process that has ended had
    /// recorded, and its device had not come to, is never done.
    pub(crate) fn check(&self) -> Outcome {
        match &self.exporter {
            Some(exporter) if self.backing.is_freed() => Err(wrong(
                INVALID_HANDLE,
                &format!("process {} has destroyed the event that is open here", exporter.id),
            )),
            _ => Ok(()),
        }
    }
}

/// Driver API, cuIpcGetMemHandle: for memory "created with cuMemAlloc". Our reading: the handle means the whole allocation,
/// whichever address of it is given; memory of another process cannot be handed on.
#[unsafe(no_mangle)]
extern "C" fn cuIpcGetMemHandle(handle: Out<IpcHandle>, address: u64) -> u32 {
    call("cuIpcGetMemHandle", |state| {
        let context = state.current()?;
        let (_, allocation) = state.allocation(address)?;
        if allocation.import.is_some() {
            return Err(wrong(INVALID_VALUE, "memory of another process cannot be handed on"));
        }
        if allocation.context != context {
            return Err(wrong(INVALID_CONTEXT, "the memory belongs to another context"));
        }
        handle.set(pack(MAGIC, &allocation.backing, allocation.bytes, allocation.token))
    })
}

/// Driver API, cuIpcOpenMemHandle: flags "Must be specified as CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS" (1). "If the memory handle has
/// already been opened by the current context, the reference count on the handle is incremented by 1 and the existing device
/// pointer is returned". "No guarantees are made about the address". In the process that exported it:
/// `INVALID_CONTEXT`, our reading.
#[unsafe(no_mangle)]
extern "C" fn cuIpcOpenMemHandle_v2(address: Out<u64>, handle: IpcHandle, flags: u32) -> u32 {
    call("cuIpcOpenMemHandle_v2", |state| {
        let context = state.current()?;
        address.require()?;
        if flags != 1 {
            return Err(wrong(
                INVALID_VALUE,
                "the flags must be CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS",
            ));
        }
        let Unpacked { exporter, fd, bytes, token } = unpack(MAGIC, "memory", &handle)?;
        if let Some((&known, allocation)) = state.opened(context, token)
            && let Some(import) = &mut allocation.import
        {
            import.opened += 1;
            return address.set(known);
        }
        let backing = Backing::open(exporter, fd, size_of(bytes), token)
            .map_err(|_| Failure::Code(MAP_FAILED))?;
        let exporter = Process::open(exporter).map_err(|_| Failure::Code(MAP_FAILED))?;
        backing.note_opened();
        let import = Some(Import { exporter, opened: 1 });
        let made = Allocation { context, bytes: bytes_of(size_of(bytes)), backing, token, import };
        address.set(state.add_allocation(made))
    })
}

/// Driver API, cuIpcCloseMemHandle: "Decrements the reference count of the memory returned by cuIpcOpenMemHandle by 1. When
/// the reference count reaches 0, this API unmaps the memory". Our reading: nothing that uses it may be under way.
#[unsafe(no_mangle)]
extern "C" fn cuIpcCloseMemHandle(address: u64) -> u32 {
    call("cuIpcCloseMemHandle", |state| {
        let context = state.current()?;
        let (start, allocation) = state.allocation(address)?;
        if start != address || allocation.import.is_none() {
            return Err(wrong(INVALID_VALUE, &format!("{address:#x} was not opened")));
        }
        if allocation.context != context {
            return Err(wrong(INVALID_CONTEXT, "the memory was opened in another context"));
        }
        let bytes = allocation.bytes;
        let Some(import) = state.allocations.get_mut(&address).and_then(|a| a.import.as_mut())
        else {
            return Ok(());
        };
        import.opened -= 1;
        if import.opened == 0 {
            state.check_unseen(address, bytes);
            if let Some(allocation) = state.remove_allocation(address) {
                allocation.backing.note_closed();
            }
        }
        Ok(())
    })
}

/// Driver API, cuIpcGetEventHandle: the event "must have been created with the CU_EVENT_INTERPROCESS and
/// CU_EVENT_DISABLE_TIMING flags set". Our reading: an event of another process cannot be handed on.
#[unsafe(no_mangle)]
extern "C" fn cuIpcGetEventHandle(handle: Out<IpcHandle>, event: Handle) -> u32 {
    call("cuIpcGetEventHandle", |state| {
        let context = state.current()?;
        let event = state.event(event)?;
        if event.context != context {
            return Err(wrong(INVALID_CONTEXT, "the event belongs to another context"));
        }
        match &event.shared {
            Some(shared) if shared.exporter.is_none() => {
                handle.set(pack(EVENT_MAGIC, &shared.backing, bytes_of(EVENT_BYTES), shared.token))
            }
            Some(_) => {
                Err(wrong(INVALID_HANDLE, "an event of another process cannot be handed on"))
            }
            None => Err(wrong(INVALID_HANDLE, "the event was made without CU_EVENT_INTERPROCESS")),
        }
    })
}

/// Driver API, cuIpcOpenEventHandle: the event "behaves like a locally created event with the CU_EVENT_DISABLE_TIMING flag
/// specified", and "must be freed with cuEventDestroy". In the process that exported it: `INVALID_CONTEXT`, our
/// reading.
#[unsafe(no_mangle)]
extern "C" fn cuIpcOpenEventHandle(event: Out<Handle>, handle: IpcHandle) -> u32 {
    call("cuIpcOpenEventHandle", |state| {
        let context = state.current()?;
        event.require()?;
        let Unpacked { exporter, fd, bytes, token } = unpack(EVENT_MAGIC, "event", &handle)?;
        let failed = |_| Failure::Code(MAP_FAILED);
        let backing = Backing::open(exporter, fd, size_of(bytes), token).map_err(failed)?;
        let exporter = Some(Process::open(exporter).map_err(failed)?);
        let shared = Arc::new(SharedEvent { backing, token, exporter });
        let opened = state.new_handle();
        state.events.insert(opened, Event::new(context, false, Some(shared)));
        event.set(opened)
    })
}

/// How often other processes have asked whether an event is over.
#[unsafe(no_mangle)]
extern "C" fn fakeCudaEventLooks(event: Handle) -> u64 {
    let state = lock();
    let shared = state.events.get(&event).and_then(|event| event.shared.as_ref());
    shared.map_or(0, |shared| shared.counts().looks.load(Ordering::SeqCst))
}

impl State {
    fn opened(&mut self, context: Handle, token: u64) -> Option<(&u64, &mut Allocation)> {
        let mut all = self.allocations.iter_mut();
        all.find(|(_, a)| a.context == context && a.token == token && a.import.is_some())
    }
}
