//! The chunk store: pool, index, leases, eviction.

mod allocator;
mod embedded;
mod index;
mod pool;
mod prompt;
mod state;
mod store;

pub use embedded::Embedded;
pub use store::{Departure, Limits, Owner, Reserved, Shape, Store, StoreOptions};
