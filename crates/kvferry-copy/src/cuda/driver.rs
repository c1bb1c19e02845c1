//! The CUDA driver's functions, looked up at run time, and its errors.
//!
//! cudarc finds the library and knows its types. Its own calls panic where a symbol is missing, and return an
//! enumeration that must not hold a newer driver's codes; so the functions are looked up here, all at once, and
//! return numbers.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUipcEventHandle, CUipcMemHandle, CUmemcpyAttributes};
use kvferry_core::{Error, ErrorCode, Result};

/// A context, stream, event, module or function, which are pointers to the driver and numbers to us.
pub(crate) type Handle = usize;
pub(crate) type Code = u32;

pub(crate) const SUCCESS: Code = 0;
pub(crate) const INVALID_VALUE: Code = 1;
const NO_DEVICE: Code = 100;
pub(crate) const NOT_READY: Code = 600;

/// The first driver with cuMemcpyBatchAsync, and the first with its form of CUDA 13.
const BATCH_VERSION: c_int = 12080;
const BATCH_13_VERSION: c_int = 13000;

/// cuMemcpyBatchAsync of CUDA 12.8 and 12.9: destinations, sources, sizes, count, attributes, where each begins
/// to hold, their number, the index that failed, stream.
pub(crate) type Batch12 = unsafe extern "C" fn(
    *const u64,
    *const u64,
    *const usize,
    usize,
    *const CUmemcpyAttributes,
    *const usize,
    usize,
    *mut usize,
    Handle,
) -> Code;
/// The same of CUDA 13, which does not tell the index.
pub(crate) type Batch13 = unsafe extern "C" fn(
    *const u64,
    *const u64,
    *const usize,
    usize,
    *const CUmemcpyAttributes,
    *const usize,
    usize,
    Handle,
) -> Code;

#[derive(Clone, Copy)]
pub(crate) enum Batch {
    Cuda12(Batch12),
    Cuda13(Batch13),
}

macro_rules! driver {
    ($($name:ident($($argument:ty),*);)*) => {
        /// The functions that are needed, all of them in every driver since CUDA 11.4.
        #[allow(non_snake_case, reason = "the driver's names")]
        pub(crate) struct Driver {
            $(pub(crate) $name: unsafe extern "C" fn($($argument),*) -> Code,)*
            /// Since 12.8.
            pub(crate) batch: Option<Batch>,
        }

        impl Driver {
            /// Looks all functions up; the library must be there.
            fn look_up() -> Result<Self> {
                Ok(Self {
                    $($name: {
                        // SAFETY: the signature is the one of cuda.h for this name, with numbers for
                        // the pointers to opaque things.
                        unsafe { symbol(stringify!($name)) }?
                    },)*
                    batch: None,
                })
            }
        }
    };
}

driver! {
    cuInit(c_uint);
    cuDriverGetVersion(*mut c_int);
    cuGetErrorName(Code, *mut *const c_char);
    cuDeviceGetCount(*mut c_int);
    cuDeviceGet(*mut c_int, c_int);
    cuDeviceGetUuid_v2(*mut [u8; 16], c_int);
    cuDevicePrimaryCtxRetain(*mut Handle, c_int);
    cuDevicePrimaryCtxRelease_v2(c_int);
    cuCtxPushCurrent_v2(Handle);
    cuCtxPopCurrent_v2(*mut Handle);
    cuThreadExchangeStreamCaptureMode(*mut c_uint);
    cuStreamCreate(*mut Handle, c_uint);
    cuStreamDestroy_v2(Handle);
    cuStreamSynchronize(Handle);
    cuStreamWaitEvent(Handle, Handle, c_uint);
    cuEventCreate(*mut Handle, c_uint);
    cuEventDestroy_v2(Handle);
    cuEventRecord(Handle, Handle);
    cuEventQuery(Handle);
    cuMemHostRegister_v2(*mut c_void, usize, c_uint);
    cuMemHostUnregister(*mut c_void);
    cuMemHostGetDevicePointer_v2(*mut u64, *mut c_void, c_uint);
    cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
    cuMemFreeHost(*mut c_void);
    cuMemcpyHtoDAsync_v2(u64, *const c_void, usize, Handle);
    cuMemcpyDtoHAsync_v2(*mut c_void, u64, usize, Handle);
    cuPointerGetAttribute(*mut c_void, c_uint, u64);
    cuMemGetAddressRange_v2(*mut u64, *mut usize, u64);
    cuIpcGetMemHandle(*mut CUipcMemHandle, u64);
    cuIpcOpenMemHandle_v2(*mut u64, CUipcMemHandle, c_uint);
    cuIpcCloseMemHandle(u64);
    cuIpcOpenEventHandle(*mut Handle, CUipcEventHandle);
    cuModuleLoadData(*mut Handle, *const c_void);
    cuModuleGetFunction(*mut Handle, Handle, *const c_char);
    cuModuleUnload(Handle);
    cuLaunchKernel(
        Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle,
        *mut *mut c_void, *mut *mut c_void
    );
}

/// A call that failed.
pub(crate) struct Failed {
    pub(crate) error: Error,
    /// Call and code alone.
    pub(crate) what: String,
    /// Nothing that was asked of the device goes on, and no later call will succeed.
    pub(crate) lost: bool,
}

impl From<Failed> for Error {
    fn from(failed: Failed) -> Self {
        failed.error
    }
}

/// Calls a function of the driver, within an unsafe block; its failure is an error that names it.
macro_rules! check {
    ($driver:ident.$name:ident($($argument:expr),* $(,)?)) => {
        $driver.check(stringify!($name), ($driver.$name)($($argument),*))
    };
}
pub(crate) use check;

/// Why there is no driver is asked anew each time: one may be installed meanwhile.
static DRIVER: OnceLock<Driver> = OnceLock::new();

impl Driver {
    /// The driver, initialised.
    ///
    /// # Errors
    /// [`ErrorCode::CudaUnavailable`], with the reason.
    pub(crate) fn get() -> Result<&'static Self> {
        if let Some(driver) = DRIVER.get() {
            return Ok(driver);
        }
        let driver = Self::load()?;
        Ok(DRIVER.get_or_init(|| driver))
    }

    fn load() -> Result<Self> {
        // SAFETY: loading libcuda runs its initialisers, as any program that uses CUDA does.
        if !unsafe { sys::is_culib_present() } {
            return Err(unavailable(
                "no CUDA driver was found (libcuda.so.1): install NVIDIA's driver, or give the \
                 container access to the GPU",
            ));
        }
        let mut driver = Self::look_up()?;
        // SAFETY: any thread may initialise the driver, as often as it likes.
        match unsafe { (driver.cuInit)(0) } {
            SUCCESS => {}
            NO_DEVICE => return Err(no_device(0, 0)),
            code => {
                return Err(unavailable(&format!(
                    "the CUDA driver does not start: cuInit says {}; see whether nvidia-smi works",
                    driver.name(code)
                )));
            }
        }
        driver.batch = driver.find_batch();
        Ok(driver)
    }

    /// The batched copy in the newest form that the driver has and we know.
    fn find_batch(&self) -> Option<Batch> {
        let mut version = 0;
        // SAFETY: writes a number.
        unsafe { check!(self.cuDriverGetVersion(&raw mut version)) }.ok()?;
        if version >= BATCH_13_VERSION
            && let Some(found) = entry_point(c"cuMemcpyBatchAsync", BATCH_13_VERSION)
        {
            // SAFETY: this is the function's signature at that version.
            return Some(Batch::Cuda13(unsafe {
                std::mem::transmute::<*mut c_void, Batch13>(found)
            }));
        }
        let found = entry_point(c"cuMemcpyBatchAsync", BATCH_VERSION)?;
        // SAFETY: this is the function's signature at that version.
        Some(Batch::Cuda12(unsafe { std::mem::transmute::<*mut c_void, Batch12>(found) }))
    }

    pub(crate) fn check(&self, call: &str, code: Code) -> Result<()> {
        self.succeeded(call, code).map_err(Error::from)
    }

    /// The same for who goes on after some failures.
    pub(crate) fn succeeded(&self, call: &str, code: Code) -> Result<(), Failed> {
        if code == SUCCESS {
            return Ok(());
        }
        // CUDA Driver API, CUresult: these are told to leave the process in a state in which all further work fails (710:
        // the context), or to come from a context that was destroyed (709). Of no other code is that said, 46 (the device
        // is busy or unavailable) and 214 (an ECC error was detected) included: copies may go on after them.
        let lost = matches!(code, 226 | 700 | 702 | 709 | 710 | 714..=719);
        let meaning = match code {
            2 => {
                "memory ran out, of the GPU or of what the system lets be page-locked; nothing can be copied \
                  until some is free"
            }
            _ if lost => "the GPU is lost to this process, which must be started anew",
            201 | 400 => {
                "a stream is not of the device's primary context, or does not exist any more"
            }
            _ => "what was to be copied cannot be used",
        };
        let what = format!("{call} failed with {}", self.name(code));
        let error = Error::new(ErrorCode::CudaFailed, format!("{what}: {meaning}"));
        Err(Failed { error, what, lost })
    }

    /// CUDA's name of an error.
    fn name(&self, code: Code) -> String {
        let mut name = std::ptr::null();
        // SAFETY: writes the address of a text that stays, or null where it does not know the code.
        let told = unsafe { (self.cuGetErrorName)(code, &raw mut name) };
        if told != SUCCESS || name.is_null() {
            return format!("CUDA error {code}");
        }
        // SAFETY: the driver's texts end with NUL and stay.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    }

    /// Checks that there is a device of this number.
    pub(crate) fn device(&self, ordinal: u32) -> Result<c_int> {
        let mut count = 0;
        // SAFETY: writes a number.
        unsafe { check!(self.cuDeviceGetCount(&raw mut count)) }?;
        let there = c_int::try_from(ordinal).ok().filter(|ordinal| *ordinal < count);
        let ordinal = there.ok_or_else(|| no_device(ordinal, count))?;
        let mut device = 0;
        // SAFETY: writes a number.
        unsafe { check!(self.cuDeviceGet(&raw mut device, ordinal)) }?;
        Ok(device)
    }

    /// The number of the device that another process has under this UUID.
    pub(crate) fn device_of(&self, uuid: &[u8; 16]) -> Result<u32> {
        let mut count = 0;
        // SAFETY: writes a number.
        unsafe { check!(self.cuDeviceGetCount(&raw mut count)) }?;
        for ordinal in 0..u32::try_from(count).unwrap_or_default() {
            let device = self.device(ordinal)?;
            let mut found = [0; 16];
            // SAFETY: writes 16 bytes.
            unsafe { check!(self.cuDeviceGetUuid_v2(&raw mut found, device)) }?;
            if found == *uuid {
                return Ok(ordinal);
            }
        }
        Err(unavailable(&format!(
            "none of the {count} CUDA devices here is the engine's: start both with the same CUDA_VISIBLE_DEVICES"
        )))
    }
}

/// The address of a function.
///
/// # Safety
/// `F` is the function's type.
unsafe fn symbol<F: Copy>(name: &str) -> Result<F> {
    // SAFETY: the library is there, or this would not be called; it stays loaded.
    let library = unsafe { sys::culib() };
    // SAFETY: the caller has said that the type is right.
    let found = unsafe { library.get::<F>(name.as_bytes()) };
    found.map(|found| *found).map_err(|_| {
        unavailable(&format!(
            "the CUDA driver has no {name}: install a driver of CUDA 11.4 or newer"
        ))
    })
}

/// A function as it is at a version; `None` where the driver does not have it.
fn entry_point(name: &CStr, version: c_int) -> Option<*mut c_void> {
    type GetProcAddress =
        unsafe extern "C" fn(*const c_char, *mut *mut c_void, c_int, u64, *mut c_int) -> Code;
    // SAFETY: the signature of cuda.h since 12.0.
    let get: GetProcAddress = unsafe { symbol("cuGetProcAddress_v2") }.ok()?;
    let (mut found, mut status) = (std::ptr::null_mut(), 0);
    // SAFETY: the name ends with NUL, and both results are written to variables of ours.
    let code = unsafe { get(name.as_ptr(), &raw mut found, version, 0, &raw mut status) };
    (code == SUCCESS && !found.is_null()).then_some(found)
}

fn unavailable(message: &str) -> Error {
    Error::new(ErrorCode::CudaUnavailable, message)
}

fn no_device(ordinal: u32, count: c_int) -> Error {
    unavailable(&format!(
        "there is no CUDA device {ordinal}: the driver has {count}; see CUDA_VISIBLE_DEVICES and nvidia-smi"
    ))
}
