//! Hashing, identities, plans, file grammars and the `Cache` trait: pure, no I/O, no threads, no
//! unsafe.

pub mod cache;
pub mod error;
pub mod hash;
pub mod key;
pub mod llama_state;
pub mod parallel;
pub mod prefix;
pub mod recovery;
pub mod tracker;

pub use error::{Error, ErrorCode, Result};
