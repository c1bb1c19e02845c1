//! The Node.js addon: converts between JavaScript values and the crates below, and nothing else.
#![allow(unsafe_code, reason = "napi's macros expand to it")]
#![cfg_attr(test, allow(dead_code, reason = "exports are registered in the addon only"))]
#![allow(unreachable_pub, reason = "the exports' only caller is JavaScript")]
#![allow(clippy::needless_pass_by_value, reason = "napi converts arguments to owned values")]

mod cache;
mod client;
mod error;
mod events;
mod explain;
mod hash;
mod kv_tensors;
#[cfg(target_os = "linux")]
mod llama_state;
mod paged;
mod parallel;
mod prefix_index;
mod promise;
mod recovery;
mod replay;
mod server;
#[cfg(feature = "simulator")]
mod simulator;
mod tracker;
mod transfer;
