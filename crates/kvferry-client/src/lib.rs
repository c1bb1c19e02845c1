//! A connection to a server: requests, deadlines, heartbeat, mapping of its pool.
//!
//! [`Client`] speaks to kvferry's server and to LMCache's alike, and is a
//! [`Cache`](kvferry_core::cache::Cache).

mod address;
mod cache;
mod client;
mod frames;
mod gate;
mod link;
mod outbox;
mod pool;
mod release;
mod session;
mod writers;

pub use address::Token;
pub use client::{Client, ConnectOptions, ServerInfo};
pub use kvferry_wire::message::Value;
