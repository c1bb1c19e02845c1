//! A device's primary context, in which engines live, and what is made in it.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::Arc;

use cudarc::driver::sys::{
    CU_MEMHOSTALLOC_PORTABLE, CUevent_flags_enum, CUipcEventHandle, CUipcMem_flags_enum,
    CUipcMemHandle, CUmemorytype_enum, CUpointer_attribute_enum, CUstream_flags_enum,
};
use kvferry_core::{Error, ErrorCode, Result};

use super::driver::{Driver, Failed, Handle, INVALID_VALUE, NOT_READY, SUCCESS, check};

/// `CU_STREAM_CAPTURE_MODE_RELAXED`.
const RELAXED: c_uint = 2;

/// A device's primary context, retained until this is dropped.
pub(crate) struct Context {
    pub(crate) driver: &'static Driver,
    pub(crate) ordinal: u32,
    device: c_int,
    handle: Handle,
}

/// While it lives, a context is this thread's current one, the engine's own lies below it, and no call of this thread
/// spoils a graph that the engine captures on another one meanwhile (CUDA Driver API, Stream Management,
/// cuThreadExchangeStreamCaptureMode: asking for an event or page-locking memory would).
pub(crate) struct Current<'a> {
    pub(crate) context: &'a Context,
    /// This thread's before.
    capture_mode: c_uint,
    /// The stack of contexts is the thread's.
    _thread: std::marker::PhantomData<*const ()>,
}

impl Context {
    pub(crate) fn retain(ordinal: u32) -> Result<Arc<Self>> {
        let driver = Driver::get()?;
        let device = driver.device(ordinal)?;
        let mut handle = 0;
        // SAFETY: writes a handle, which is released once, on drop.
        unsafe { check!(driver.cuDevicePrimaryCtxRetain(&raw mut handle, device)) }?;
        Ok(Arc::new(Self { driver, ordinal, device, handle }))
    }

    pub(crate) fn enter(&self) -> Result<Current<'_>> {
        let driver = self.driver;
        // SAFETY: the context is retained, and leaves this thread again when `Current` is dropped.
        unsafe { check!(driver.cuCtxPushCurrent_v2(self.handle)) }?;
        let mut capture_mode = RELAXED;
        // SAFETY: reads and writes a number.
        let relaxed =
            unsafe { check!(driver.cuThreadExchangeStreamCaptureMode(&raw mut capture_mode)) };
        if let Err(error) = relaxed {
            self.leave();
            return Err(error);
        }
        Ok(Current { context: self, capture_mode, _thread: std::marker::PhantomData })
    }

    fn leave(&self) {
        let mut popped = 0;
        // SAFETY: the context was pushed by this thread, and calls between push and pop are balanced.
        let _ = unsafe { (self.driver.cuCtxPopCurrent_v2)(&raw mut popped) };
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once. Nothing could be done about a failure.
        let _ = unsafe { (self.driver.cuDevicePrimaryCtxRelease_v2)(self.device) };
    }
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        let exchange = self.context.driver.cuThreadExchangeStreamCaptureMode;
        // SAFETY: reads and writes a number. Nothing could be done about a failure.
        let _ = unsafe { exchange(&raw mut self.capture_mode) };
        self.context.leave();
    }
}

/// Calls that need this context. Each takes what was made in it.
impl Current<'_> {
    /// A stream that does not wait for the legacy default stream.
    pub(crate) fn new_stream(&self) -> Result<Handle> {
        let driver = self.context.driver;
        let mut stream = 0;
        let flags = CUstream_flags_enum::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: writes a handle.
        unsafe { check!(driver.cuStreamCreate(&raw mut stream, flags)) }?;
        Ok(stream)
    }

    pub(crate) fn destroy_stream(&self, stream: Handle) {
        // SAFETY: whoever made it calls this once. Nothing could be done about a failure.
        let _ = unsafe { (self.context.driver.cuStreamDestroy_v2)(stream) };
    }

    /// Waits until a stream's work is done.
    pub(crate) fn synchronize(&self, stream: Handle) -> Result<()> {
        let driver = self.context.driver;
        // SAFETY: the stream lives.
        unsafe { check!(driver.cuStreamSynchronize(stream)) }
    }

    /// What is asked of `stream` from now on waits for what `event` has recorded.
    pub(crate) fn wait(&self, stream: Handle, event: Handle) -> Result<()> {
        let driver = self.context.driver;
        // SAFETY: both live.
        unsafe { check!(driver.cuStreamWaitEvent(stream, event, 0)) }
    }

    pub(crate) fn new_event(&self) -> Result<Handle, Failed> {
        let driver = self.context.driver;
        let mut event = 0;
        let flags = CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as c_uint;
        // SAFETY: writes a handle.
        let code = unsafe { (driver.cuEventCreate)(&raw mut event, flags) };
        driver.succeeded("cuEventCreate", code).map(|()| event)
    }

    pub(crate) fn destroy_event(&self, event: Handle) {
        // SAFETY: whoever made it calls this once. Nothing could be done about a failure.
        let _ = unsafe { (self.context.driver.cuEventDestroy_v2)(event) };
    }

    pub(crate) fn record(&self, event: Handle, stream: Handle) -> Result<(), Failed> {
        let driver = self.context.driver;
        // SAFETY: both live, the engine's stream by the word of who gave it.
        driver.succeeded("cuEventRecord", unsafe { (driver.cuEventRecord)(event, stream) })
    }

    /// Whether what the event has recorded is done.
    pub(crate) fn is_done(&self, event: Handle) -> Result<bool, Failed> {
        let driver = self.context.driver;
        // SAFETY: the event lives.
        match unsafe { (driver.cuEventQuery)(event) } {
            NOT_READY => Ok(false),
            code => driver.succeeded("cuEventQuery", code).map(|()| true),
        }
    }

    /// Checks that `bytes` at `address` are memory of this context's device.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidArgument`] where they are not.
    pub(crate) fn check_memory(&self, address: u64, bytes: u64) -> Result<()> {
        let end = address.saturating_add(bytes);
        let mut at = address;
        while at < end {
            let kind =
                self.attribute(at, CUpointer_attribute_enum::CU_POINTER_ATTRIBUTE_MEMORY_TYPE)?;
            let device =
                self.attribute(at, CUpointer_attribute_enum::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL)?;
            let wanted = CUmemorytype_enum::CU_MEMORYTYPE_DEVICE as u32;
            if (kind, device) != (Some(wanted), Some(self.context.ordinal)) {
                return Err(Error::invalid(format!(
                    "{bytes} bytes at {address:#x} are not memory of CUDA device {}{}",
                    self.context.ordinal,
                    if at == address {
                        String::new()
                    } else {
                        format!(": the allocation ends at {at:#x}")
                    }
                )));
            }
            // An array may lie in several allocations, one behind the other, that were mapped so.
            let Some((start, length)) = self.allocation(at) else { break };
            at = start.saturating_add(length).max(at + 1);
        }
        Ok(())
    }

    /// An attribute of memory; `None` for memory that the driver does not know.
    fn attribute(&self, address: u64, attribute: CUpointer_attribute_enum) -> Result<Option<u32>> {
        let driver = self.context.driver;
        let mut value = 0u32;
        let data: *mut c_void = (&raw mut value).cast();
        // SAFETY: both attributes that are asked for have 32 bits, and no memory is read at the address.
        match unsafe { (driver.cuPointerGetAttribute)(data, attribute as c_uint, address) } {
            INVALID_VALUE => Ok(None),
            code => driver.check("cuPointerGetAttribute", code).map(|()| Some(value)),
        }
    }

    /// Start and bytes of the allocation that a device's address is in, where the driver tells.
    pub(crate) fn allocation(&self, address: u64) -> Option<(u64, u64)> {
        let (mut start, mut bytes) = (0, 0);
        let driver = self.context.driver;
        // SAFETY: writes two numbers.
        let code =
            unsafe { (driver.cuMemGetAddressRange_v2)(&raw mut start, &raw mut bytes, address) };
        (code == SUCCESS).then_some((start, bytes as u64))
    }

    /// The handle by which another process opens the memory at `address`, and where in it that is.
    pub(crate) fn ipc_handle(&self, address: u64) -> Result<([u8; 64], u64)> {
        self.check_memory(address, 1)?;
        let start = self.allocation(address).map_or(address, |(start, _)| start);
        let mut handle = CUipcMemHandle { reserved: [0; 64] };
        let driver = self.context.driver;
        // SAFETY: writes a handle, for memory that was just found to be the device's.
        match unsafe { (driver.cuIpcGetMemHandle)(&raw mut handle, start) } {
            INVALID_VALUE => Err(Error::invalid(format!(
                "the memory at {address:#x} cannot be handed to another process: allocate it with cuMemAlloc \
                 or cudaMalloc"
            ))),
            code => {
                driver.check("cuIpcGetMemHandle", code)?;
                Ok((handle.reserved.map(|byte| byte.to_ne_bytes()[0]), address - start))
            }
        }
    }

    pub(crate) fn open_ipc(&self, handle: &[u8; 64]) -> Result<u64> {
        let driver = self.context.driver;
        let mut address = 0;
        let handle = CUipcMemHandle { reserved: handle.map(|byte| c_char::from_ne_bytes([byte])) };
        let flags = CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as c_uint;
        // SAFETY: writes an address; bytes that are no handle are refused.
        let code = unsafe { (driver.cuIpcOpenMemHandle_v2)(&raw mut address, handle, flags) };
        driver.check("cuIpcOpenMemHandle", code).map(|()| address).map_err(|error| {
            Error::new(
                ErrorCode::CudaFailed,
                format!(
                    "{}; the process that exports the memory must run, on this machine, and cannot open it itself",
                    error.message
                ),
            )
        })
    }

    pub(crate) fn close_ipc(&self, address: u64) {
        // SAFETY: whoever opened it calls this once. Nothing could be done about a failure.
        let _ = unsafe { (self.context.driver.cuIpcCloseMemHandle)(address) };
    }

    /// An event that another process exported, to be destroyed here.
    pub(crate) fn open_event(&self, handle: &[u8; 64]) -> Result<Handle> {
        let driver = self.context.driver;
        let mut event = 0;
        let handle =
            CUipcEventHandle { reserved: handle.map(|byte| c_char::from_ne_bytes([byte])) };
        // SAFETY: writes a handle; bytes that are no event's are refused.
        let code = unsafe { (driver.cuIpcOpenEventHandle)(&raw mut event, handle) };
        driver.check("cuIpcOpenEventHandle", code).map(|()| event)
    }

    /// A number in page-locked memory.
    pub(crate) fn new_word(&self) -> Result<*mut u64> {
        let driver = self.context.driver;
        let mut start = std::ptr::null_mut();
        let flags = CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: writes an address, of memory that is freed once.
        unsafe { check!(driver.cuMemHostAlloc(&raw mut start, size_of::<u64>(), flags)) }?;
        Ok(start.cast())
    }

    pub(crate) fn free_word(&self, word: *mut u64) {
        // SAFETY: whoever made it calls this once, when no copy to it is under way. Nothing could be done about a
        // failure.
        let _ = unsafe { (self.context.driver.cuMemFreeHost)(word.cast()) };
    }

    /// Asks for the number at a device's address.
    pub(crate) fn copy_word(&self, word: *mut u64, from: u64, stream: Handle) -> Result<()> {
        let driver = self.context.driver;
        let bytes = size_of::<u64>();
        // SAFETY: the word is page-locked and stays until the stream has come so far; the device's memory is opened.
        unsafe { check!(driver.cuMemcpyDtoHAsync_v2(word.cast::<c_void>(), from, bytes, stream)) }
    }
}
