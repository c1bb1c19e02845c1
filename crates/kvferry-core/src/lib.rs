//! Hashing, identities, plans, file grammars and the `Cache` trait: pure, no I/O, no threads, no
//! unsafe.

pub mod cache;
pub mod error;
pub mod key;

pub use error::{Error, ErrorCode, Result};
