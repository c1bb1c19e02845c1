//! The ways to ask a device for many copies.

use std::ffi::{c_uint, c_void};
use std::slice;

use cudarc::driver::sys::{
    CU_MEMHOSTALLOC_DEVICEMAP, CU_MEMHOSTALLOC_PORTABLE, CUmemLocation, CUmemLocationType,
    CUmemcpyAttributes, CUmemcpySrcAccessOrder,
};
use kvferry_core::Result;
use kvferry_core::copy_plan::Direction;

use super::context::Current;
use super::driver::{Batch, Handle, check};

/// How a device is asked for copies.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// One call for many pieces (cuMemcpyBatchAsync); [`Method::Single`] where the driver has none, before 12.8.
    Batch,
    /// One call for each piece.
    Single,
    /// A kernel that copies pieces of any size.
    Kernel,
    /// A kernel where pieces have fewer than 64 KiB on average and the driver takes it, else [`Method::Batch`].
    #[default]
    KernelForSmall,
}

/// Pieces of one call at most, so that no call takes long.
const BATCH_PIECES: usize = 1024;
/// Pieces that have fewer bytes on average are too small for the copy engine: it takes longer to begin one than
/// to copy it. Measured on an H100, docs/benchmarks.md.
const SMALL: u64 = 64 << 10;
const THREADS: c_uint = 256;
const PIECES_OF_BLOCK: usize = THREADS as usize / 32;
/// Blocks of threads at most: a quarter of such a GPU's processors saturate its link to the host, the others are
/// the engine's alone.
const BLOCKS: usize = 32;

/// The kernel's text, with the NUL that the driver wants.
const PTX: &str = concat!(include_str!("copy_pieces.ptx"), "\0");

/// Pieces to be copied: addresses of the host, of the device, and bytes, as the driver takes them.
#[derive(Default)]
pub(crate) struct Pieces {
    host: Vec<u64>,
    /// The host's addresses as a kernel sees them.
    mapped: Vec<u64>,
    device: Vec<u64>,
    bytes: Vec<usize>,
    total: u64,
}

impl Pieces {
    pub(crate) fn push(&mut self, host: u64, mapped: u64, device: u64, bytes: usize) {
        self.host.push(host);
        self.mapped.push(mapped);
        self.device.push(device);
        self.bytes.push(bytes);
        self.total += bytes as u64;
    }

    pub(crate) fn clear(&mut self) {
        self.host.clear();
        self.mapped.clear();
        self.device.clear();
        self.bytes.clear();
        self.total = 0;
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn total(&self) -> u64 {
        self.total
    }
}

/// The kernel, loaded into a context.
#[derive(Clone, Copy)]
pub(crate) struct Kernel {
    module: Handle,
    function: Handle,
}

impl Kernel {
    pub(crate) fn load(current: &Current<'_>) -> Result<Self> {
        let driver = current.context.driver;
        let (mut module, mut function) = (0, 0);
        // SAFETY: writes a handle; the text ends with NUL.
        unsafe { check!(driver.cuModuleLoadData(&raw mut module, PTX.as_ptr().cast())) }?;
        let name = c"kvferry_copy_pieces".as_ptr();
        // SAFETY: writes a handle; the module was just loaded, and the name ends with NUL.
        let found = unsafe { check!(driver.cuModuleGetFunction(&raw mut function, module, name)) };
        let kernel = Self { module, function };
        match found {
            Ok(()) => Ok(kernel),
            Err(error) => {
                kernel.unload(current);
                Err(error)
            }
        }
    }

    pub(crate) fn unload(self, current: &Current<'_>) {
        // SAFETY: loaded once; what it was launched for is done. Nothing could be done about a failure.
        let _ = unsafe { (current.context.driver.cuModuleUnload)(self.module) };
    }
}

/// One piece, as the kernel reads it.
#[repr(C)]
struct Record {
    to: u64,
    from: u64,
    bytes: u64,
}

/// Page-locked memory for a kernel's records, in use until the kernel is done.
pub(crate) struct Table {
    records: *mut Record,
    capacity: usize,
}

// SAFETY: plain memory that any thread may use.
unsafe impl Send for Table {}

impl Table {
    fn new(current: &Current<'_>, capacity: usize) -> Result<Self> {
        let driver = current.context.driver;
        let mut start = std::ptr::null_mut();
        let flags = CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP;
        let bytes = capacity * size_of::<Record>();
        // SAFETY: writes an address, of memory that is freed once.
        unsafe { check!(driver.cuMemHostAlloc(&raw mut start, bytes, flags)) }?;
        Ok(Self { records: start.cast(), capacity })
    }

    fn fill(&mut self, pieces: &Pieces, direction: Direction) {
        for number in 0..pieces.len().min(self.capacity) {
            let (device, mapped) = (pieces.device[number], pieces.mapped[number]);
            let (to, from) = match direction {
                Direction::Gather => (mapped, device),
                Direction::Scatter => (device, mapped),
            };
            let record = Record { to, from, bytes: pieces.bytes[number] as u64 };
            let at = self.records.wrapping_add(number);
            // SAFETY: below the capacity, aligned as pages are, and no kernel reads it now.
            unsafe { at.write(record) };
        }
    }

    pub(crate) fn free(self, current: &Current<'_>) {
        // SAFETY: allocated once, and the kernels that read it are done. Nothing could be done about a failure.
        let _ = unsafe { (current.context.driver.cuMemFreeHost)(self.records.cast()) };
    }
}

/// Where copies go, and by which way.
pub(crate) struct Submission<'a> {
    pub(crate) current: &'a Current<'a>,
    pub(crate) stream: Handle,
    pub(crate) direction: Direction,
    pub(crate) method: Method,
    pub(crate) kernel: Option<Kernel>,
}

impl Submission<'_> {
    /// Asks for all of `pieces`. A table comes back that is in use until they are copied. After an error, some may
    /// have been asked for.
    pub(crate) fn submit(
        &self,
        pieces: &Pieces,
        tables: &mut Vec<Table>,
    ) -> (Option<Table>, Result<()>) {
        let is_small = pieces.total < SMALL * pieces.len() as u64;
        match (self.method, self.kernel, self.current.context.driver.batch) {
            (Method::Kernel, Some(kernel), _) => self.launch(kernel, pieces, tables),
            (Method::KernelForSmall, Some(kernel), _) if is_small => {
                self.launch(kernel, pieces, tables)
            }
            (Method::Single, ..) | (_, _, None) => (None, self.each(pieces)),
            (_, _, Some(batch)) => (None, self.batches(batch, pieces)),
        }
    }

    fn each(&self, pieces: &Pieces) -> Result<()> {
        let driver = self.current.context.driver;
        for ((host, device), bytes) in pieces.host.iter().zip(&pieces.device).zip(&pieces.bytes) {
            let host: *mut c_void = std::ptr::with_exposed_provenance_mut(address(*host));
            match self.direction {
                // SAFETY: the plan stays within the engine's arrays and the pool, whose pages are registered;
                // both live until the copy is done.
                Direction::Gather => unsafe {
                    check!(driver.cuMemcpyDtoHAsync_v2(host, *device, *bytes, self.stream))
                },
                // SAFETY: as above.
                Direction::Scatter => unsafe {
                    check!(driver.cuMemcpyHtoDAsync_v2(*device, host, *bytes, self.stream))
                },
            }?;
        }
        Ok(())
    }

    fn batches(&self, batch: Batch, pieces: &Pieces) -> Result<()> {
        let (to, from) = match self.direction {
            Direction::Gather => (&pieces.host, &pieces.device),
            Direction::Scatter => (&pieces.device, &pieces.host),
        };
        let nowhere =
            || CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID, id: 0 };
        let attributes = CUmemcpyAttributes {
            // Sources are read in the stream's order: with ANY, the copy engine could read blocks before the
            // compute that the stream waits for has written them.
            srcAccessOrder: CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
            srcLocHint: nowhere(), // only managed memory needs hints
            dstLocHint: nowhere(),
            flags: 0,
        };
        let driver = self.current.context.driver;
        for first in (0..pieces.len()).step_by(BATCH_PIECES) {
            let part = first..pieces.len().min(first + BATCH_PIECES);
            let (to, from) = (to[part.clone()].as_ptr(), from[part.clone()].as_ptr());
            let (bytes, count) = (pieces.bytes[part.clone()].as_ptr(), part.len());
            let (kinds, starts) = (slice::from_ref(&attributes).as_ptr(), [0usize]);
            let code = match batch {
                Batch::Cuda12(copy) => {
                    let mut failed = usize::MAX;
                    let failed = &raw mut failed;
                    // SAFETY: arrays of `count` entries, and one of attributes that holds from the first on; the
                    // memory is as for single copies.
                    unsafe {
                        copy(to, from, bytes, count, kinds, starts.as_ptr(), 1, failed, self.stream)
                    }
                }
                // SAFETY: as above.
                Batch::Cuda13(copy) => unsafe {
                    copy(to, from, bytes, count, kinds, starts.as_ptr(), 1, self.stream)
                },
            };
            driver.check("cuMemcpyBatchAsync", code)?;
        }
        Ok(())
    }

    fn launch(
        &self,
        kernel: Kernel,
        pieces: &Pieces,
        tables: &mut Vec<Table>,
    ) -> (Option<Table>, Result<()>) {
        let mut table = match tables.pop() {
            Some(table) if table.capacity >= pieces.len() => table,
            other => {
                if let Some(small) = other {
                    small.free(self.current);
                }
                match Table::new(self.current, pieces.len().next_power_of_two()) {
                    Ok(table) => table,
                    Err(error) => return (None, Err(error)),
                }
            }
        };
        table.fill(pieces, self.direction);
        // Unified addressing, which all 64-bit drivers have: the host's address is the device's for memory that
        // the driver allocated.
        let mut records = table.records.expose_provenance() as u64;
        let mut count = c_uint::try_from(pieces.len()).unwrap_or(c_uint::MAX);
        let mut reserved: c_uint = 0;
        let mut parameters: [*mut c_void; 3] =
            [(&raw mut records).cast(), (&raw mut count).cast(), (&raw mut reserved).cast()];
        let blocks =
            c_uint::try_from(pieces.len().div_ceil(PIECES_OF_BLOCK).min(BLOCKS)).unwrap_or(1);
        let (stream, none) = (self.stream, std::ptr::null_mut());
        let (function, parameters) = (kernel.function, parameters.as_mut_ptr());
        let driver = self.current.context.driver;
        // SAFETY: the parameters are the kernel's, and its records name what single copies would.
        let launched =
            unsafe {
                check!(driver.cuLaunchKernel(
                    function, blocks, 1, 1, THREADS, 1, 1, 0, stream, parameters, none
                ))
            };
        (Some(table), launched)
    }
}

fn address(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
