//! Result codes (Driver API, Data types, `CUresult`) and how a call ends.

use crate::abi::Out;
use crate::state::call;
use std::ffi::{CStr, c_char};

/// How a call, or a part of one, ends.
pub(crate) type Outcome<T = ()> = Result<T, Failure>;

/// Why a call does not succeed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// An answer that the caller must expect.
    Code(u32),
    /// A misuse: reported as a violation.
    Wrong(u32, String),
}

pub(crate) fn wrong(code: u32, message: &str) -> Failure {
    Failure::Wrong(code, message.to_owned())
}

macro_rules! codes {
    ($($name:ident = $code:literal, $full:literal, $text:literal;)*) => {
        $(
            #[allow(dead_code, reason = "some are only injected and described")]
            pub(crate) const $name: u32 = $code;
        )*

        /// Name and text of a code.
        fn describe(code: u32) -> Option<(&'static CStr, &'static CStr)> {
            match code {
                $($code => Some(($full, $text)),)*
                _ => None,
            }
        }
    };
}

codes! {
    SUCCESS = 0, c"CUDA_SUCCESS", c"no error";
    INVALID_VALUE = 1, c"CUDA_ERROR_INVALID_VALUE", c"invalid argument";
    OUT_OF_MEMORY = 2, c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory";
    NOT_INITIALIZED = 3, c"CUDA_ERROR_NOT_INITIALIZED", c"initialization error";
    DEVICE_UNAVAILABLE = 46, c"CUDA_ERROR_DEVICE_UNAVAILABLE", c"CUDA-capable device(s) is/are busy or unavailable";
    NO_DEVICE = 100, c"CUDA_ERROR_NO_DEVICE", c"no CUDA-capable device is detected";
    INVALID_DEVICE = 101, c"CUDA_ERROR_INVALID_DEVICE", c"invalid device ordinal";
    INVALID_IMAGE = 200, c"CUDA_ERROR_INVALID_IMAGE", c"device kernel image is invalid";
    INVALID_CONTEXT = 201, c"CUDA_ERROR_INVALID_CONTEXT", c"invalid device context";
    MAP_FAILED = 205, c"CUDA_ERROR_MAP_FAILED", c"mapping of buffer object failed";
    ECC_UNCORRECTABLE = 214, c"CUDA_ERROR_ECC_UNCORRECTABLE", c"uncorrectable ECC error encountered";
    INVALID_PTX = 218, c"CUDA_ERROR_INVALID_PTX", c"a PTX JIT compilation failed";
    CONTAINED = 226, c"CUDA_ERROR_CONTAINED", c"Invalid access of peer GPU memory over nvlink or a hardware error";
    OPERATING_SYSTEM = 304, c"CUDA_ERROR_OPERATING_SYSTEM", c"OS call failed or operation not supported on this OS";
    INVALID_HANDLE = 400, c"CUDA_ERROR_INVALID_HANDLE", c"invalid resource handle";
    NOT_FOUND = 500, c"CUDA_ERROR_NOT_FOUND", c"named symbol not found";
    NOT_READY = 600, c"CUDA_ERROR_NOT_READY", c"device not ready";
    ILLEGAL_ADDRESS = 700, c"CUDA_ERROR_ILLEGAL_ADDRESS", c"an illegal memory access was encountered";
    STREAM_CAPTURE_UNSUPPORTED = 900, c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", c"operation not permitted when stream is capturing";
    LAUNCH_TIMEOUT = 702, c"CUDA_ERROR_LAUNCH_TIMEOUT", c"the launch timed out and was terminated";
    CONTEXT_IS_DESTROYED = 709, c"CUDA_ERROR_CONTEXT_IS_DESTROYED", c"context is destroyed";
    HOST_MEMORY_ALREADY_REGISTERED = 712, c"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", c"part or all of the requested memory range is already mapped";
    HOST_MEMORY_NOT_REGISTERED = 713, c"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", c"pointer does not correspond to a registered memory region";
    MISALIGNED_ADDRESS = 716, c"CUDA_ERROR_MISALIGNED_ADDRESS", c"misaligned address";
    LAUNCH_FAILED = 719, c"CUDA_ERROR_LAUNCH_FAILED", c"unspecified launch failure";
    NOT_PERMITTED = 800, c"CUDA_ERROR_NOT_PERMITTED", c"operation not permitted";
    NOT_SUPPORTED = 801, c"CUDA_ERROR_NOT_SUPPORTED", c"operation not supported";
    UNKNOWN = 999, c"CUDA_ERROR_UNKNOWN", c"unknown error";
}

/// Codes after which "any further CUDA work will return the same error" (Driver API, Data types, `CUresult`); of 710 it says
/// that the context cannot be used any more. Of `DEVICE_UNAVAILABLE` and `ECC_UNCORRECTABLE` it says nothing of the kind.
pub(crate) fn is_sticky(code: u32) -> bool {
    matches!(code, CONTAINED | ILLEGAL_ADDRESS | LAUNCH_TIMEOUT | 710 | 714..=719)
}

/// A code's name for a message.
pub(crate) fn name(code: u32) -> String {
    describe(code)
        .map_or_else(|| format!("error {code}"), |(full, _)| full.to_string_lossy().into_owned())
}

/// Driver API, Error Handling: null and `INVALID_VALUE` where the code is not known.
#[unsafe(no_mangle)]
extern "C" fn cuGetErrorName(code: u32, out: Out<*const c_char>) -> u32 {
    call("cuGetErrorName", |_| tell(&out, describe(code).map(|(full, _)| full)))
}

/// Driver API, Error Handling: null and `INVALID_VALUE` where the code is not known.
#[unsafe(no_mangle)]
extern "C" fn cuGetErrorString(code: u32, out: Out<*const c_char>) -> u32 {
    call("cuGetErrorString", |_| tell(&out, describe(code).map(|(_, text)| text)))
}

fn tell(out: &Out<*const c_char>, text: Option<&'static CStr>) -> Outcome {
    out.set(text.map_or(std::ptr::null(), CStr::as_ptr))?;
    text.map(|_| ()).ok_or(Failure::Code(INVALID_VALUE))
}
