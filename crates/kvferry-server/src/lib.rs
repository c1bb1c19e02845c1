//! Sockets around the store: an LMCache-compatible ROUTER on loopback, and HTTP for operators.

mod connection;
mod figures;
mod http;
mod server;
mod service;

pub use server::{HttpOptions, Server, ServerOptions};
