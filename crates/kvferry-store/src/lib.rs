//! The chunk store: pool, index, leases, eviction.

mod allocator;
pub mod clock;
mod embedded;
mod events;
mod explain;
mod index;
mod pool;
mod probe;
mod prompt;
mod space;
mod state;
mod store;

pub use embedded::Embedded;
pub use explain::Explaining;
pub use probe::PROBE_MODEL;
pub use store::{Departure, Limits, Owner, Reserved, Shape, Store, StoreOptions};
