//! Copies side by side.

use std::num::NonZero;
use std::thread;

/// Threads at most: more of them than memory channels only wait for each other.
const THREADS_MAX: usize = 4;

/// Runs `copies` to their end, on this thread and as many others as help. Each copy should take a
/// millisecond or so: starting a thread costs some hundredths of one.
pub fn run_copies(copies: Vec<Box<dyn FnOnce() + Send + '_>>) {
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    let share = copies.len().div_ceil(processors.min(THREADS_MAX)).max(1);
    let mut copies = copies.into_iter();
    thread::scope(|scope| {
        loop {
            let part: Vec<_> = copies.by_ref().take(share).collect();
            if copies.len() == 0 {
                return part.into_iter().for_each(|copy| copy()); // the last part is this thread's
            }
            scope.spawn(move || part.into_iter().for_each(|copy| copy()));
        }
    });
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
