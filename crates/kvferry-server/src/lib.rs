//! Sockets around the store: an LMCache-compatible ROUTER, and HTTP for operators. Loopback unless told.

mod connection;
mod figures;
mod frames;
mod http;
#[cfg(unix)]
mod ipc;
mod json;
mod lmcache_driven;
mod notes;
mod processes;
mod quotas;
mod server;
mod service;
mod streams;
mod tokens;
mod waits;

pub use notes::{Level, Note};
pub use quotas::load_quotas;
pub use server::{HttpOptions, Server, ServerOptions};
pub use tokens::{Role, read_token};
