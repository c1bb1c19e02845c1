//! Sockets around the store: an LMCache-compatible ROUTER on loopback.

mod connection;
mod server;
mod service;

pub use server::{Server, ServerOptions};
