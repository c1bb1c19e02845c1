//! The chunk store: pool, index, leases, eviction.

mod allocator;
pub mod clock;
pub mod disk;
mod embedded;
mod events;
mod eviction;
mod explain;
mod index;
mod pool;
mod probe;
mod prompt;
pub mod replay;
mod space;
mod state;
mod store;
mod table;
mod tenants;
mod tiers;

pub use embedded::Embedded;
pub use eviction::Policy;
pub use explain::Explaining;
pub use probe::{DiskProbe, PROBE_MODEL};
pub use store::{Departure, Limits, Owner, Reserved, ReservedObject, Shape, Store, StoreOptions};
pub use tenants::{Quota, Quotas, TenantStatus};
