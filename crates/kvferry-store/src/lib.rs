//! The chunk store: pool, index, leases, eviction
