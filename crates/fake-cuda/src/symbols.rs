//! cuGetProcAddress.

use crate::abi::{In, Out};
use crate::errors::{INVALID_VALUE, wrong};
use crate::state::call;
use std::ffi::{CString, c_char, c_void};

const FOUND: i32 = 0;
const NOT_FOUND: i32 = 1;
const VERSION_NOT_SUFFICIENT: i32 = 2;

/// Driver API, Driver Entry Point Access: the function of that name that is newest at `version`, whose name may end
/// in `_v2`. "The API will return CUDA_SUCCESS and set the returned pfn to NULL" where there is none; `status` then tells
/// why. Our reading: a version beyond the driver's gives what the driver has.
#[unsafe(no_mangle)]
extern "C" fn cuGetProcAddress_v2(
    symbol: In<c_char>,
    function: Out<*mut c_void>,
    version: i32,
    flags: u64,
    status: Out<i32>,
) -> u32 {
    call("cuGetProcAddress_v2", |state| {
        let name = symbol.text()?;
        function.require()?;
        if flags > 1 {
            return Err(wrong(INVALID_VALUE, "only the legacy default stream is modelled"));
        }
        let driver = state.config.version;
        let names = match (name.as_str(), version.min(driver)) {
            ("cuMemcpyBatchAsync", 13000..) => vec!["cuMemcpyBatchAsync_v2".to_owned()],
            ("cuMemcpyBatchAsync", 12080..) => vec![name.clone()],
            ("cuMemcpyBatchAsync", _) if driver >= 12080 => {
                status.set_unless_null(VERSION_NOT_SUFFICIENT);
                return function.set(std::ptr::null_mut());
            }
            ("cuMemcpyBatchAsync" | "cuMemcpyBatchAsync_v2", _) => Vec::new(),
            _ => vec![format!("{name}_v2"), name.clone()],
        };
        let found = names.iter().map(|name| own_symbol(name)).find(|found| !found.is_null());
        status.set_unless_null(if found.is_some() { FOUND } else { NOT_FOUND });
        function.set(found.unwrap_or(std::ptr::null_mut()))
    })
}

/// What this very library exports, as dlsym finds it: a copy in which a name was struck out does not have it here either.
fn own_symbol(name: &str) -> *mut c_void {
    let Ok(name) = CString::new(name) else { return std::ptr::null_mut() };
    let here = own_symbol as *const c_void;
    let mut info = std::mem::MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: dladdr fills in the structure that it is given.
    if unsafe { libc::dladdr(here, info.as_mut_ptr()) } == 0 {
        return std::ptr::null_mut();
    }
    // SAFETY: zeroes are a valid Dl_info, and it was filled in.
    let info = unsafe { info.assume_init() };
    // SAFETY: dli_fname is the path of this library, which stays loaded.
    let library = unsafe { libc::dlopen(info.dli_fname, libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
    if library.is_null() {
        return std::ptr::null_mut();
    }
    // SAFETY: the library is loaded, and the name is a text that ends with NUL.
    unsafe { libc::dlsym(library, name.as_ptr()) }
}
