//! Where there is no /dev/shm.

use std::convert::Infallible;
use std::sync::Arc;

use kvferry_core::cache::Memory;
use kvferry_core::copy_plan::{CopyPlan, CopyShape};
use kvferry_core::kv_descriptors::DescribedMemory;
use kvferry_core::{Error, ErrorCode, Result};

/// An engine's arrays in its segments; there are none here.
#[derive(Debug)]
pub struct SegmentMemory(Infallible);

impl SegmentMemory {
    /// An error.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedPlatform`].
    pub fn open(_memory: &DescribedMemory) -> Result<Self> {
        let message = "an engine's memory is copied on Linux only; start it with LMCACHE_MP_TRANSFER_MODE=engine_driven";
        Err(Error::new(ErrorCode::UnsupportedPlatform, message))
    }

    /// Never called.
    pub fn shape(&self) -> &Arc<CopyShape> {
        match self.0 {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn copy(
        &self,
        _plan: &CopyPlan,
        _pool: &dyn Memory,
        _go_on: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        match self.0 {}
    }
}
