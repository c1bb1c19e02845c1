//! The Node.js addon: converts between JavaScript values and the crates below, and nothing else.
#![allow(unsafe_code, reason = "napi's macros expand to it")]
