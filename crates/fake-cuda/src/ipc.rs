//! Device memory of another process.
//!
//! Races between processes are not seen: clocks are one process's own.

use crate::abi::{Handle, IpcHandle, Out, bytes_of, size_of};
use crate::backing::{Backing, Process};
use crate::errors::{
    Failure, INVALID_CONTEXT, INVALID_HANDLE, INVALID_VALUE, MAP_FAILED, Outcome, wrong,
};
use crate::memory::Allocation;
use crate::state::{State, call};

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
        let mut bytes = [0; 64];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&std::process::id().to_le_bytes());
        bytes[12..16].copy_from_slice(&allocation.backing.fd().to_le_bytes());
        bytes[16..24].copy_from_slice(&allocation.bytes.to_le_bytes());
        bytes[24..32].copy_from_slice(&allocation.token.to_le_bytes());
        handle.set(IpcHandle(bytes))
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
        let number = |from: usize, to: usize| {
            handle.0[from..to].iter().rev().fold(0u64, |value, &byte| value << 8 | u64::from(byte))
        };
        if handle.0[..8] != MAGIC {
            return Err(wrong(INVALID_HANDLE, "these bytes are no memory handle"));
        }
        let exporter = u32::try_from(number(8, 12)).unwrap_or_default();
        let fd = u32::try_from(number(12, 16)).unwrap_or_default();
        let (bytes, token) = (number(16, 24), number(24, 32));
        if exporter == std::process::id() {
            return Err(wrong(INVALID_CONTEXT, "opened in the process that exported it"));
        }
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

impl State {
    fn opened(&mut self, context: Handle, token: u64) -> Option<(&u64, &mut Allocation)> {
        let mut all = self.allocations.iter_mut();
        all.find(|(_, a)| a.context == context && a.token == token && a.import.is_some())
    }
}
