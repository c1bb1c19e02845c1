//! Hashing, identities, plans, file grammars and the `Cache` trait: pure, no I/O, no threads, no
//! unsafe.

pub mod cache;
mod checksum;
pub mod copy_plan;
pub mod copy_sums;
pub mod copying;
pub mod defect;
pub mod error;
pub mod events;
pub mod explain;
pub mod hash;
pub mod inline;
pub mod key;
pub mod kv_descriptors;
pub mod kv_layout;
pub mod kv_tensors;
pub mod llama_state;
pub mod paged;
pub mod parallel;
pub mod prefix;
pub mod prefix_index;
pub mod recovery;
pub mod tracker;
pub mod transfer;

pub use error::{Error, ErrorCode, Result};
