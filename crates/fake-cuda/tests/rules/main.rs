//! Every rule of the fake driver: the right use passes, and the wrong one is reported, each time. Each test loads a copy of the
//! library of its own, so that they share nothing.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unsafe_code, reason = "the interface under test is C")]
#![allow(clippy::undocumented_unsafe_blocks, reason = "tests call C functions as declared here")]

mod contexts;
mod copies;
mod defects;
mod events;
mod faults;
mod ipc;
mod kernels;
mod memory;
mod races;
mod streams;
mod support;
