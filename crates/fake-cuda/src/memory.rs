//! Device memory, and host memory that is page-locked.

use crate::abi::{Handle, Out, bytes_of, range, size_of};
use crate::backing::Backing;
use crate::errors::{
    Failure, HOST_MEMORY_ALREADY_REGISTERED, HOST_MEMORY_NOT_REGISTERED, ILLEGAL_ADDRESS,
    INVALID_CONTEXT, INVALID_VALUE, OUT_OF_MEMORY, Outcome, wrong,
};
use crate::ipc::Import;
use crate::state::{State, call};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Device addresses begin here: no user address of x86-64 or AArch64 is so high, so a host that follows one faults.
pub(crate) const DEVICE_BASE: u64 = 0x7_0000_0000_0000;
/// Between allocations, so that a range that passes an end never reaches the next.
const GAP: u64 = 2 << 20;

/// Device memory of this process, or of another.
pub(crate) struct Allocation {
    pub(crate) context: Handle,
    pub(crate) bytes: u64,
    pub(crate) backing: Backing,
    /// What names it to other processes.
    pub(crate) token: u64,
    pub(crate) import: Option<Import>,
}

/// Page-locked host memory.
pub(crate) struct Registration {
    pub(crate) context: Handle,
    bytes: u64,
    portable: bool,
    read_only: bool,
    /// Made by cuMemHostAlloc.
    owned: Option<HostPages>,
}

/// Where an operation reads or writes.
#[derive(Clone, Copy)]
pub(crate) enum Place {
    Device(u64),
    Pinned(u64),
    /// Host memory that the driver does not know.
    Pageable(u64),
}

impl Place {
    pub(crate) fn address(self) -> u64 {
        match self {
            Self::Device(address) | Self::Pinned(address) | Self::Pageable(address) => address,
        }
    }

    /// The range whose races are watched: the host's own memory is the host's affair.
    pub(crate) fn watched(self, bytes: u64) -> Option<(u64, u64)> {
        match self {
            Self::Pageable(_) => None,
            _ => Some((self.address(), self.address() + bytes)),
        }
    }
}

impl State {
    /// What lies at `address`, for an operation in `context`. Driver API, Unified Addressing: the address alone tells.
    /// Our reading: a range reaches over no end of an allocation or of a registration, even where another follows.
    pub(crate) fn place(
        &self,
        address: u64,
        bytes: u64,
        context: Handle,
        write: bool,
    ) -> Outcome<Place> {
        let (from, to) = range(address, bytes)?;
        if from >= DEVICE_BASE {
            self.check_device(from, to, context)?;
            return Ok(Place::Device(address));
        }
        if from == 0 {
            return Err(wrong(INVALID_VALUE, "a null pointer"));
        }
        let touched = self.registrations.range(..to.max(from + 1)).next_back();
        let Some((&start, registration)) =
            touched.filter(|(start, registration)| *start + registration.bytes > from)
        else {
            return Ok(Place::Pageable(address));
        };
        let end = start + registration.bytes;
        if from < start || to > end {
            return Err(wrong(
                INVALID_VALUE,
                &format!(
                    "host range {from:#x}..{to:#x} is only partly in the registered {start:#x}..{end:#x}"
                ),
            ));
        }
        if registration.context != context && !registration.portable {
            return Err(wrong(
                INVALID_CONTEXT,
                &format!("{from:#x} is registered in another context, and not as portable"),
            ));
        }
        if write && registration.read_only {
            return Err(wrong(INVALID_VALUE, &format!("{from:#x} is registered as read-only")));
        }
        Ok(Place::Pinned(address))
    }

    fn check_device(&self, from: u64, to: u64, context: Handle) -> Outcome {
        let (start, allocation) = self.allocation(from)?;
        let end = start + allocation.bytes;
        if to > end {
            return Err(wrong(
                INVALID_VALUE,
                &format!(
                    "device range {from:#x}..{to:#x} passes the end of the allocation {start:#x}..{end:#x}"
                ),
            ));
        }
        if allocation.context != context {
            return Err(wrong(INVALID_CONTEXT, &format!("{from:#x} is memory of another context")));
        }
        if let Some(import) = &allocation.import {
            import.check(&allocation.backing)?;
        }
        Ok(())
    }

    /// The allocation that an address lies in, and where it starts.
    pub(crate) fn allocation(&self, address: u64) -> Outcome<(u64, &Allocation)> {
        let below = self.allocations.range(..=address).next_back();
        if let Some((&start, allocation)) = below
            && address < start + allocation.bytes
        {
            return Ok((start, allocation));
        }
        let freed = self.freed.range(..=address).next_back();
        let was = if freed.is_some_and(|(start, bytes)| address < start + bytes) {
            "was freed or closed"
        } else {
            "is in no allocation"
        };
        Err(wrong(INVALID_VALUE, &format!("device address {address:#x} {was}")))
    }

    /// Where the bytes of a place are now: at the time of execution, when much may have been freed.
    pub(crate) fn pointer(
        &self,
        place: Place,
        bytes: u64,
        context: Handle,
        write: bool,
    ) -> Outcome<*mut u8> {
        let address = place.address();
        if matches!(place, Place::Pageable(_)) {
            return Ok(host_pointer(address));
        }
        match self.place(address, bytes, context, write)? {
            Place::Device(_) => {
                let (start, allocation) = self.allocation(address)?;
                Ok(allocation.backing.at(address - start))
            }
            Place::Pinned(_) => Ok(host_pointer(address)),
            Place::Pageable(_) => Err(wrong(
                ILLEGAL_ADDRESS,
                &format!("host address {address:#x} is not page-locked (any more)"),
            )),
        }
    }

    /// Enters device memory at an address of its own.
    pub(crate) fn add_allocation(&mut self, allocation: Allocation) -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(DEVICE_BASE);
        let room = allocation.bytes.next_multiple_of(GAP) + GAP;
        let address = NEXT.fetch_add(room, Ordering::SeqCst);
        self.allocations.insert(address, allocation);
        address
    }

    pub(crate) fn remove_allocation(&mut self, address: u64) -> Option<Allocation> {
        let allocation = self.allocations.remove(&address)?;
        self.freed.insert(address, allocation.bytes);
        Some(allocation)
    }

    /// Reports memory that is given back while something may still use it.
    pub(crate) fn check_unseen(&mut self, from: u64, bytes: u64) {
        if let Some(what) = self.clocks.unseen(from, from + bytes) {
            let message = format!(
                "{from:#x}, {bytes} bytes, is given back before the host has seen the end of {what}"
            );
            self.report(&message);
        }
    }

    fn used(&self, device: usize) -> u64 {
        let own = self.allocations.values().filter(|a| a.import.is_none());
        own.filter(|a| self.device_of(a.context) == device).map(|a| a.bytes).sum()
    }
}

pub(crate) fn host_pointer(address: u64) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(size_of(address))
}

/// A number that nothing else is named by.
pub(crate) fn new_token() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let nanoseconds = u64::try_from(since_epoch.as_nanos()).unwrap_or_default();
    nanoseconds ^ u64::from(std::process::id()).rotate_left(40)
}

/// Driver API, Memory Management: 0 bytes are `INVALID_VALUE`; the memory is not cleared. Aligned to 2 MiB here.
#[unsafe(no_mangle)]
extern "C" fn cuMemAlloc_v2(address: Out<u64>, bytes: usize) -> u32 {
    call("cuMemAlloc_v2", |state| {
        let context = state.current()?;
        address.require()?;
        if bytes == 0 {
            return Err(wrong(INVALID_VALUE, "0 bytes"));
        }
        let used = state.used(state.device_of(context));
        if bytes_of(bytes).saturating_add(used) > bytes_of(state.config.memory) {
            return Err(Failure::Code(OUT_OF_MEMORY));
        }
        let token = new_token();
        let backing = Backing::new(bytes, token).map_err(|_| Failure::Code(OUT_OF_MEMORY))?;
        let bytes = bytes_of(bytes);
        let made = Allocation { context, bytes, backing, token, import: None };
        address.set(state.add_allocation(made))
    })
}

/// Driver API, Memory Management: the address "must have been returned by a previous call" of an allocation. It "may
/// perform implicit synchronization" — may, so the host must have seen the end of all that uses the memory. And
/// cuIpcOpenMemHandle: "Calling cuMemFree on an exported memory region before calling cuIpcCloseMemHandle in the importing
/// context will result in undefined behavior".
#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(address: u64) -> u32 {
    call("cuMemFree_v2", |state| {
        let context = state.current()?;
        if address == 0 {
            return Ok(()); // as free(NULL): our reading
        }
        let (start, allocation) = state.allocation(address)?;
        if start != address {
            return Err(wrong(
                INVALID_VALUE,
                &format!("{address:#x} is not an allocation's start"),
            ));
        }
        if allocation.import.is_some() {
            return Err(wrong(INVALID_VALUE, "memory of another process is closed, not freed"));
        }
        if allocation.context != context {
            return Err(wrong(INVALID_CONTEXT, "the memory belongs to another context"));
        }
        let (bytes, opener) = (allocation.bytes, allocation.backing.opener());
        if let Some(pid) = opener {
            state.report(&format!("{address:#x} is freed while process {pid} has it open"));
        }
        state.check_unseen(address, bytes);
        if let Some(allocation) = state.remove_allocation(address) {
            allocation.backing.note_freed();
        }
        Ok(())
    })
}

/// Driver API, Memory Management: free and total bytes of the current context's device.
#[unsafe(no_mangle)]
extern "C" fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) -> u32 {
    call("cuMemGetInfo_v2", |state| {
        let context = state.current()?;
        let memory = state.config.memory;
        free.set_unless_null(memory - size_of(state.used(state.device_of(context))));
        total.set_unless_null(memory);
        Ok(())
    })
}

/// Driver API, Memory Management: base and size of the allocation that an address is in; "Both parameters pbase and
/// psize are optional". `NOT_FOUND` or `INVALID_VALUE` where there is none.
#[unsafe(no_mangle)]
extern "C" fn cuMemGetAddressRange_v2(base: Out<u64>, bytes: Out<usize>, address: u64) -> u32 {
    call("cuMemGetAddressRange_v2", |state| {
        state.current()?;
        let (start, allocation) = state.allocation(address)?;
        base.set_unless_null(start);
        bytes.set_unless_null(size_of(allocation.bytes));
        Ok(())
    })
}

/// Driver API, Unified Addressing, `CUpointer_attribute`; `INVALID_VALUE` for memory that the driver does not know.
#[unsafe(no_mangle)]
extern "C" fn cuPointerGetAttribute(data: Out<u8>, attribute: u32, address: u64) -> u32 {
    call("cuPointerGetAttribute", |state| {
        state.current()?;
        let is_device = address >= DEVICE_BASE;
        let (start, bytes, context) = if is_device {
            let (start, allocation) =
                state.allocation(address).map_err(|_| Failure::Code(INVALID_VALUE))?;
            (start, allocation.bytes, allocation.context)
        } else {
            let found = state.registrations.range(..=address).next_back();
            let found = found.filter(|(start, r)| address < *start + r.bytes);
            let (&start, registration) = found.ok_or(Failure::Code(INVALID_VALUE))?;
            (start, registration.bytes, registration.context)
        };
        let number = |value: u32| data.set_all(&value.to_ne_bytes());
        let long = |value: u64| data.set_all(&value.to_ne_bytes());
        match attribute {
            1 => long(context),                                                // CONTEXT
            2 => number(if is_device { 2 } else { 1 }),                        // MEMORY_TYPE
            4 if is_device => Err(Failure::Code(INVALID_VALUE)),               // HOST_POINTER
            3 | 4 => long(address),                                            // DEVICE_POINTER
            7 => long(start),                                                  // BUFFER_ID
            6 | 8 => number(0), // SYNC_MEMOPS, IS_MANAGED
            9 => number(u32::try_from(state.device_of(context)).unwrap_or(0)), // DEVICE_ORDINAL
            10 => number(u32::from(is_device)), // IS_LEGACY_CUDA_IPC_CAPABLE
            11 => long(start),  // RANGE_START_ADDR
            12 => long(bytes),  // RANGE_SIZE
            _ => Err(wrong(INVALID_VALUE, &format!("attribute {attribute} is not modelled"))),
        }
    })
}

/// Pages that cuMemHostAlloc made.
struct HostPages {
    start: u64,
    bytes: usize,
}

impl HostPages {
    fn new(bytes: usize) -> Option<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let null = std::ptr::null_mut();
        // SAFETY: the kernel chooses an address at which nothing is mapped.
        let start = unsafe { libc::mmap(null, bytes, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return None;
        }
        Some(Self { start: bytes_of(start.expose_provenance()), bytes })
    }
}

impl Drop for HostPages {
    fn drop(&mut self) {
        // SAFETY: the pages are this object's own; who still points at them was told to have given them back.
        unsafe { libc::munmap(host_pointer(self.start).cast(), self.bytes) };
    }
}

const PORTABLE: u32 = 1;
const READ_ONLY: u32 = 8;

/// Driver API, Memory Management: flags PORTABLE (1), DEVICEMAP (2), WRITECOMBINED (4). Unified Addressing, Automatic
/// Mapping of Host Allocated Host Memory: all contexts may use it, whatever the flags.
#[unsafe(no_mangle)]
extern "C" fn cuMemHostAlloc(pointer: Out<u64>, bytes: usize, flags: u32) -> u32 {
    call("cuMemHostAlloc", |state| {
        let context = state.current()?;
        pointer.require()?;
        if bytes == 0 || flags > 7 {
            return Err(wrong(INVALID_VALUE, &format!("{bytes} bytes with flags {flags}")));
        }
        let pages = HostPages::new(bytes).ok_or(Failure::Code(OUT_OF_MEMORY))?;
        let (start, bytes) = (pages.start, bytes_of(bytes));
        let owned = Some(pages);
        let made = Registration { context, bytes, portable: true, read_only: false, owned };
        state.registrations.insert(start, made);
        pointer.set(start)
    })
}

/// Driver API, Memory Management: takes what cuMemHostAlloc gave.
#[unsafe(no_mangle)]
extern "C" fn cuMemFreeHost(pointer: u64) -> u32 {
    call("cuMemFreeHost", |state| {
        state.current()?;
        match state.registrations.get(&pointer) {
            Some(registration) if registration.owned.is_some() => {
                let bytes = registration.bytes;
                state.check_unseen(pointer, bytes);
                state.registrations.remove(&pointer);
                Ok(())
            }
            _ => Err(wrong(
                INVALID_VALUE,
                &format!("{pointer:#x} is not from cuMemHostAlloc, or was freed"),
            )),
        }
    })
}

/// Driver API, Memory Management: flags PORTABLE (1), DEVICEMAP (2), READ_ONLY (8); IOMEMORY (4) is not modelled. It must not overlap another
/// registered one: `HOST_MEMORY_ALREADY_REGISTERED`. Our reading: memory that is
/// not mapped is `INVALID_VALUE`.
#[unsafe(no_mangle)]
extern "C" fn cuMemHostRegister_v2(pointer: u64, bytes: usize, flags: u32) -> u32 {
    call("cuMemHostRegister_v2", |state| {
        let context = state.current()?;
        let (from, to) = range(pointer, bytes_of(bytes))?;
        if bytes == 0 || flags & !11 != 0 || from == 0 || to > DEVICE_BASE {
            return Err(wrong(
                INVALID_VALUE,
                &format!("{bytes} bytes at {pointer:#x} with flags {flags}"),
            ));
        }
        let overlaps = state.registrations.range(..to).next_back();
        if overlaps.is_some_and(|(start, other)| start + other.bytes > from) {
            return Err(Failure::Code(HOST_MEMORY_ALREADY_REGISTERED));
        }
        if !is_mapped(from, to) {
            return Err(wrong(INVALID_VALUE, &format!("{from:#x}..{to:#x} is not mapped")));
        }
        let (portable, read_only) = (flags & PORTABLE != 0, flags & READ_ONLY != 0);
        let bytes = bytes_of(bytes);
        let made = Registration { context, bytes, portable, read_only, owned: None };
        state.registrations.insert(from, made);
        Ok(())
    })
}

fn is_mapped(from: u64, to: u64) -> bool {
    const PAGE: u64 = 4096;
    let start = from / PAGE * PAGE;
    let bytes = size_of(to.next_multiple_of(PAGE) - start);
    let mut resident = vec![0u8; bytes.div_ceil(size_of(PAGE))];
    // SAFETY: mincore reads no memory of the range, and there is one byte for each of its pages.
    let result =
        unsafe { libc::mincore(host_pointer(start).cast(), bytes, resident.as_mut_ptr().cast()) };
    result == 0
}

/// Driver API, Memory Management: the address must be the one that was registered;
/// `HOST_MEMORY_NOT_REGISTERED` where it is not registered. Our reading: no copy from or to it may be under way.
#[unsafe(no_mangle)]
extern "C" fn cuMemHostUnregister(pointer: u64) -> u32 {
    call("cuMemHostUnregister", |state| {
        state.current()?;
        match state.registrations.get(&pointer) {
            Some(registration) if registration.owned.is_none() => {
                let bytes = registration.bytes;
                state.check_unseen(pointer, bytes);
                state.registrations.remove(&pointer);
                Ok(())
            }
            _ => Err(wrong(
                HOST_MEMORY_NOT_REGISTERED,
                &format!("{pointer:#x} is not the start of a registered range"),
            )),
        }
    })
}

/// Driver API, Memory Management: the device's address of page-locked memory: the same one here, where the attribute
/// CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM is 1.
#[unsafe(no_mangle)]
extern "C" fn cuMemHostGetDevicePointer_v2(address: Out<u64>, pointer: u64, flags: u32) -> u32 {
    call("cuMemHostGetDevicePointer_v2", |state| {
        let context = state.current()?;
        if flags != 0 {
            return Err(wrong(INVALID_VALUE, "the flags must be 0"));
        }
        match state.place(pointer, 1, context, false)? {
            Place::Pinned(same) => address.set(same),
            _ => Err(wrong(INVALID_VALUE, &format!("{pointer:#x} is not page-locked"))),
        }
    })
}
