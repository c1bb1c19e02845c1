//! Copies side by side.

use std::num::NonZero;
use std::sync::LazyLock;
use std::thread;

use rayon_core::{ThreadPool, ThreadPoolBuilder};

/// Threads at most: more of them than memory channels only wait for each other.
const THREADS_MAX: usize = 4;

/// Threads that live as long as the process: starting one costs a tenth of a copy. `None` where no
/// thread can be had, or only one processor.
static POOL: LazyLock<Option<ThreadPool>> = LazyLock::new(|| {
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(THREADS_MAX);
    let builder = ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|index| format!("kvferry-copy-{index}"));
    (threads > 1).then(|| builder.build().ok()).flatten()
});

/// Runs `copies` to their end, on as many threads as help. Each should take a good part of a
/// millisecond.
pub fn run_copies(copies: Vec<Box<dyn FnOnce() + Send + '_>>) {
    match &*POOL {
        Some(pool) if copies.len() > 1 => pool.in_place_scope(|scope| {
            for copy in copies {
                scope.spawn(|_| copy());
            }
        }),
        _ => copies.into_iter().for_each(|copy| copy()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_copy_runs_once_however_many_there_are() {
        for count in [0, 1, 2, 3, 7, 100] {
            let mut runs = vec![0; count];
            run_copies(
                runs.iter_mut()
                    .map(|runs| Box::new(|| *runs += 1) as Box<dyn FnOnce() + Send>)
                    .collect(),
            );
            assert_eq!(runs, vec![1; count]);
        }
    }
}
