//! Sockets around the store: an LMCache-compatible ROUTER on loopback, and HTTP for operators.

mod connection;
mod figures;
mod http;
mod json;
mod notes;
mod quotas;
mod server;
mod service;

pub use notes::{Level, Note};
pub use quotas::load_quotas;
pub use server::{HttpOptions, Server, ServerOptions};
