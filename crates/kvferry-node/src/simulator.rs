//! What only the simulator's own build has: its clock, and deliberate defects.

use kvferry_core::{Error, defect};
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
