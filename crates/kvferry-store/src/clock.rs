//! The time that an embedded store goes by.

/// Now, by the clock of embedded stores.
#[cfg(not(feature = "simulator"))]
pub fn now() -> std::time::Instant {
    std::time::Instant::now()
}

#[cfg(feature = "simulator")]
mod simulated {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::{Duration, Instant};

    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    static PASSED_MS: AtomicU64 = AtomicU64::new(0);

    /// Now, by the simulator's clock, which stands still by itself.
    pub fn now() -> Instant {
        *START + Duration::from_millis(PASSED_MS.load(Ordering::Relaxed))
    }

    /// Lets time pass.
    pub fn advance(ms: u64) {
        PASSED_MS.fetch_add(ms, Ordering::Relaxed);
    }
}

#[cfg(feature = "simulator")]
pub use simulated::{advance, now};
