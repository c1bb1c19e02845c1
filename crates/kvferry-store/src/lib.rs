//! The chunk store: pool, index, leases, eviction.

mod ages;
mod allocator;
pub mod clock;
pub mod disk;
mod embedded;
mod events;
mod eviction;
mod explain;
mod index;
pub mod latencies;
mod listeners;
mod lmcache_driven;
mod pool;
mod probe;
mod prompt;
pub mod remote;
pub mod replay;
mod space;
mod state;
mod store;
mod table;
mod tenants;
mod tiers;

pub use ages::{AGE_BOUNDS, Ages};
pub use embedded::Embedded;
pub use eviction::Policy;
pub use explain::Explaining;
pub use lmcache_driven::{EngineMemory, GoOn};
pub use probe::{DiskProbe, PROBE_MODEL};
pub use store::{
    Departure, Limits, Owner, READ_HOLD, Reserved, ReservedObject, Shape, Store, StoreOptions,
};
pub use tenants::{Quota, Quotas, TenantStatus};
