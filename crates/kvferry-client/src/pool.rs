//! The server's pool in this process.

use std::sync::Arc;

use kvferry_core::cache::Memory;
use kvferry_core::{Error, ErrorCode, Result};

use crate::cache::unmapped;

/// A mapped pool.
#[derive(Clone)]
pub(crate) struct Pool {
    name: String,
    bytes: u64,
    /// The mapping. Grants keep it alive beyond the session.
    pub(crate) memory: Arc<dyn Memory>,
}

impl Pool {
    /// Whether this is the mapping of the segment that a server of the same boot names.
    pub(crate) fn is(&self, name: &str, bytes: u64) -> bool {
        self.name == name && self.bytes == bytes
    }

    /// Maps the segment that a registration's reply names.
    ///
    /// # Errors
    /// It is not there, or is another server's: `segment` is which one it has to be, as far as the server says.
    pub(crate) fn map(name: &str, bytes: u64, segment: Option<&str>) -> Result<Self> {
        if name.is_empty() || bytes == 0 {
            return Err(unmapped("the server offers no shared memory"));
        }
        if name.contains(['/', '\0']) {
            return Err(Error::new(
                ErrorCode::Protocol,
                format!("the server names a pool {name:?}, which is no segment's name"),
            ));
        }
        Ok(Self { name: name.to_owned(), bytes, memory: open(name, bytes, segment)? })
    }
}

#[cfg(target_os = "linux")]
fn open(name: &str, bytes: u64, segment: Option<&str>) -> Result<Arc<dyn Memory>> {
    let region = kvferry_copy::SharedRegion::open(name, bytes)?;
    if let Some(segment) = segment
        && region.identity()? != segment
    {
        return Err(Error::new(
            ErrorCode::Protocol,
            format!("the pool {name:?} here is not the server's, which runs elsewhere"),
        ));
    }
    Ok(Arc::new(region))
}

#[cfg(not(target_os = "linux"))]
fn open(_name: &str, _bytes: u64, _segment: Option<&str>) -> Result<Arc<dyn Memory>> {
    Err(Error::new(
        ErrorCode::UnsupportedPlatform,
        "a server's pool is shared memory of Linux; use an embedded store on this platform",
    ))
}
