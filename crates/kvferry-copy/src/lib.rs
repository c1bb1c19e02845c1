//! Memory regions and copies: the only crate with unsafe code beside the binding
#![allow(unsafe_code, reason = "memory regions and copies live here")]
