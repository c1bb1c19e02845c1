//! What only the simulator's own build has: its clock, deliberate defects, and an engine's side of a GPU.

use std::ffi::{CString, c_char};
use std::ptr;
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUresult, CUstream};
use kvferry_copy::cuda;
use kvferry_core::{Error, ErrorCode, defect};
use napi::Result;
use napi::bindgen_prelude::{BigInt, Uint8ArraySlice};
use napi_derive::napi;

use crate::error::to_napi;

/// Lets the time of embedded stores pass.
#[napi(catch_unwind)]
pub fn simulator_advance(ms: u32) {
    kvferry_store::clock::advance(ms.into());
}

/// Makes one defect real, or none.
#[napi(catch_unwind)]
pub fn simulator_defect(name: Option<String>) -> Result<()> {
    if defect::activate(name.as_deref()) {
        return Ok(());
    }
    let (name, known) = (name.unwrap_or_default(), defect::names().join(", "));
    Err(to_napi(Error::invalid(format!("there is no defect {name:?}; known: {known}"))))
}

/// The names of all defects.
#[napi(catch_unwind)]
pub fn simulator_defects() -> Vec<String> {
    defect::names()
}

/// Where an array's bytes lie.
#[napi(catch_unwind)]
pub fn simulator_address(array: Uint8ArraySlice<'_>) -> BigInt {
    BigInt::from(array.as_ptr().expose_provenance() as u64)
}

/// What tells this build from others.
#[napi(catch_unwind)]
pub fn simulator_marker() -> String {
    defect::MARKER.to_owned()
}

/// The device, as an engine has it: its primary context, current on this thread, and the stream that it computes on.
struct Gpu {
    stream: CUstream,
}

// SAFETY: handles of the driver, which any thread may use.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

impl Gpu {
    fn get() -> Result<&'static Self> {
        static GPU: OnceLock<Gpu> = OnceLock::new();
        if let Some(gpu) = GPU.get() {
            return Ok(gpu);
        }
        cuda::check_available().map_err(to_napi)?;
        let (mut context, mut stream) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the driver is there.
        done(unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, 0) })?;
        // SAFETY: the context was just retained.
        done(unsafe { sys::cuCtxSetCurrent(context) })?;
        // SAFETY: a context is current.
        done(unsafe { sys::cuStreamCreate(&raw mut stream, 1) })?;
        Ok(GPU.get_or_init(|| Gpu { stream }))
    }
}

fn done(code: CUresult) -> Result<()> {
    match code {
        CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(to_napi(Error::new(ErrorCode::CudaFailed, format!("the engine met {code:?}")))),
    }
}

/// The stream that the engine computes on.
#[napi(catch_unwind)]
pub fn simulator_cuda_stream() -> Result<BigInt> {
    Ok(BigInt::from(Gpu::get()?.stream as u64))
}

/// Memory of the device.
#[napi(catch_unwind)]
pub fn simulator_cuda_allocate(bytes: u32) -> Result<BigInt> {
    Gpu::get()?;
    let mut address = 0;
    // SAFETY: a context is current.
    done(unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes as usize) })?;
    Ok(BigInt::from(address))
}

/// Frees it.
#[napi(catch_unwind)]
pub fn simulator_cuda_free(address: BigInt) -> Result<()> {
    Gpu::get()?;
    // SAFETY: a context is current; the driver refuses what it has not allocated.
    done(unsafe { sys::cuMemFree_v2(address.get_u64().1) })
}

/// Computes something: some time later, in the order of the stream, the bytes lie there.
#[napi(catch_unwind)]
pub fn simulator_cuda_write(address: BigInt, bytes: Uint8ArraySlice<'_>) -> Result<()> {
    let gpu = Gpu::get()?;
    let (from, address) = (bytes.as_ptr().cast(), address.get_u64().1);
    // SAFETY: pageable memory is read before the call returns; the driver checks the address.
    done(unsafe { sys::cuMemcpyHtoDAsync_v2(address, from, bytes.len(), gpu.stream) })
}

/// What lies there when all that was asked of the stream is done.
#[napi(catch_unwind)]
pub fn simulator_cuda_read(address: BigInt, bytes: Uint8ArraySlice<'_>) -> Result<()> {
    let gpu = Gpu::get()?;
    let (into, address) = (bytes.as_ptr().cast_mut().cast(), address.get_u64().1);
    // SAFETY: pageable memory is written before the call returns; the driver checks the address.
    done(unsafe { sys::cuMemcpyDtoHAsync_v2(into, address, bytes.len(), gpu.stream) })?;
    // SAFETY: the stream lives as long as the process.
    done(unsafe { sys::cuStreamSynchronize(gpu.stream) })
}

/// Rules that the fake driver saw broken.
#[napi(catch_unwind)]
pub fn simulator_cuda_violations() -> Result<u32> {
    let violations: extern "C" fn() -> u64 = fake("fakeCudaViolations")?;
    Ok(u32::try_from(violations()).unwrap_or(u32::MAX))
}

/// Makes the fake driver fail a call of a function, counted from now, with an error.
#[napi(catch_unwind)]
pub fn simulator_cuda_fail(name: String, call: u32, code: u32) -> Result<()> {
    let fail: extern "C" fn(*const c_char, u64, u32) = fake("fakeCudaControlFail")?;
    let name = CString::new(name).map_err(|error| to_napi(Error::invalid(error.to_string())))?;
    fail(name.as_ptr(), call.into(), code);
    Ok(())
}

fn fake<F: Copy>(name: &str) -> Result<F> {
    // SAFETY: the types are those of the fake driver's exports, and nothing unloads it.
    let found = unsafe { sys::culib().get::<F>(name.as_bytes()) };
    found.map(|found| *found).map_err(|error| {
        to_napi(Error::new(ErrorCode::CudaUnavailable, format!("this driver is no fake: {error}")))
    })
}
