//! Sockets around the store: an LMCache-compatible ROUTER on loopback
