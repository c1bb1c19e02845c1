//! Copies that run by themselves, and how far they are.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use crate::cache::Memory;
use crate::copy_plan::{CopyPlan, CopyShape};
use crate::{Error, ErrorCode, Result};

/// An engine's KV memory that copies may run to and from while the engine does other things: host memory
/// that stays where it is, or a GPU's.
pub trait KvMemory: Send + Sync {
    /// What its plans are of.
    fn shape(&self) -> &Arc<CopyShape>;

    /// Begins to carry out a plan of [`KvMemory::shape`]; `pool` is what the plan's slots lie in. With `sums`,
    /// [`Copying::checksums`] has one for each chunk when the copy has ended. What was begun is carried out to its end, to
    /// its first error, or to [`KvMemory::close`], even when nobody waits for it.
    ///
    /// # Errors
    /// [`ErrorCode::Closed`] after [`KvMemory::close`]; what the memory's device says. Nothing is copied then.
    fn copy(&self, plan: CopyPlan, pool: Arc<dyn Memory>, sums: bool) -> Result<Copying>;

    /// Lets no more copies begin, ends those that have not, and returns when none is under way. The memory may be freed
    /// then, unless there is a [`KvMemory::doubt`].
    fn close(&self);

    /// Why copies may be under way that nothing will tell the end of, where that is so: see [`Copying::doubt`]. It is there
    /// to stay.
    fn doubt(&self) -> Option<Error> {
        None
    }
}

/// A copy that was begun. Dropping it does not end it.
#[derive(Debug, Clone)]
pub struct Copying(Arc<Watched<State>>);

/// The side that copies. Dropped before its end, it ends with an error.
#[derive(Debug)]
pub struct Progress(Arc<Watched<State>>);

#[derive(Debug, Default)]
struct State {
    arrays: usize,
    checksums: Vec<u64>,
    ended: Option<Result<()>>,
    in_doubt: bool,
}

/// A state whose changes may be waited for: each from a level on, so that a change wakes only those whom it concerns.
#[derive(Debug, Default)]
pub(crate) struct Watched<S>(Mutex<Inner<S>>);

#[derive(Debug, Default)]
struct Inner<S> {
    state: S,
    waiting: Vec<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    level: usize,
    waker: Waker,
}

/// The two sides of a copy.
pub fn copying() -> (Progress, Copying) {
    let shared = Arc::new(Watched::default());
    (Progress(Arc::clone(&shared)), Copying(shared))
}

impl Copying {
    /// Leading arrays whose part of the plan is copied.
    pub fn arrays(&self) -> usize {
        self.0.lock().state.arrays
    }

    /// The CRC-64/NVME of each chunk's whole object, in the plan's order, as its bytes were written or read; bytes that
    /// the copy leaves alone as they are in the pool. Empty before the end, after an error, and where none were asked
    /// for.
    pub fn checksums(&self) -> Vec<u64> {
        self.0.lock().state.checksums.clone()
    }

    /// Waits until the first `arrays` arrays have their part.
    ///
    /// # Errors
    /// Why the copy ended before that.
    pub async fn array(&self, arrays: usize) -> Result<()> {
        self.0
            .until(arrays, |state| match &state.ended {
                _ if state.arrays >= arrays => Some(Ok(())),
                ended => ended.clone(),
            })
            .await
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// Why not everything is copied.
    pub async fn ended(&self) -> Result<()> {
        self.0.until(usize::MAX, |state| state.ended.clone()).await
    }

    /// The error that it ended with, where nothing says whether the device is done with it: what was to be written may be
    /// written at any later time, so it must never be another's.
    pub fn doubt(&self) -> Option<Error> {
        let inner = self.0.lock();
        inner.state.ended.clone().filter(|_| inner.state.in_doubt)?.err()
    }
}

impl Progress {
    /// The first `arrays` arrays are copied.
    pub fn arrays(&self, arrays: usize) {
        self.0.change(arrays, |state| state.arrays = state.arrays.max(arrays));
    }

    /// What [`Copying::checksums`] will be; to be told before the end.
    pub fn checksums(&self, checksums: Vec<u64>) {
        self.0.lock().state.checksums = checksums;
    }

    /// Nothing of the copy is under way any more. Only the first end counts.
    pub fn end(&self, result: Result<()>) {
        self.0.change(usize::MAX, |state| {
            state.ended.get_or_insert(result);
        });
    }

    /// Nobody will learn whether something of it is under way: see [`Copying::doubt`].
    pub fn end_in_doubt(&self, error: Error) {
        self.0.change(usize::MAX, |state| {
            state.in_doubt |= state.ended.is_none();
            state.ended.get_or_insert(Err(error));
        });
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        let lost = || Err(Error::new(ErrorCode::Internal, "a copy was given up"));
        self.0.change(usize::MAX, |state| {
            state.ended.get_or_insert_with(lost);
        });
    }
}

impl<S> Watched<S> {
    fn lock(&self) -> MutexGuard<'_, Inner<S>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, and wakes who waits for `level` or less.
    pub(crate) fn change<T>(&self, level: usize, change: impl FnOnce(&mut S) -> T) -> T {
        let (value, concerned) = {
            let mut inner = self.lock();
            let value = change(&mut inner.state);
            let concerned = inner.waiting.extract_if(.., |waiting| waiting.level <= level);
            (value, concerned.collect::<Vec<_>>())
        };
        concerned.into_iter().for_each(|waiting| waiting.waker.wake());
        value
    }

    /// Waits until `done` is something, which it is looked for after changes of `level` or more.
    pub(crate) async fn until<T>(&self, level: usize, done: impl Fn(&S) -> Option<T>) -> T {
        poll_fn(|context| {
            let mut inner = self.lock();
            if let Some(value) = done(&inner.state) {
                return Poll::Ready(value);
            }
            let mut waiting = inner.waiting.iter();
            if !waiting.any(|known| known.level <= level && known.waker.will_wake(context.waker()))
            {
                inner.waiting.push(Waiting { level, waker: context.waker().clone() });
            }
            Poll::Pending
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Wake};

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn who_waits_for_an_array_is_woken_when_it_is_there_and_not_kept_until_the_end() {
        let (progress, copying) = copying();
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(Arc::clone(&woken));
        let mut context = Context::from_waker(&waker);
        let mut second = pin!(copying.array(2));
        let mut end = pin!(copying.ended());
        assert!(second.as_mut().poll(&mut context).is_pending());
        assert!(end.as_mut().poll(&mut context).is_pending());
        progress.arrays(1);
        assert!(second.as_mut().poll(&mut context).is_pending());
        assert_eq!(woken.0.load(Ordering::Relaxed), 0, "it concerns nobody");
        progress.arrays(2);
        assert_eq!(woken.0.load(Ordering::Relaxed), 1);
        assert!(second.as_mut().poll(&mut context).is_ready());
        assert!(end.as_mut().poll(&mut context).is_pending());
        progress.end(Ok(()));
        assert_eq!(end.as_mut().poll(&mut context), Poll::Ready(Ok(())));
    }

    #[test]
    fn a_copy_that_nobody_carries_on_ends_with_an_error() {
        let (progress, copying) = copying();
        progress.arrays(1);
        drop(progress);
        let mut context = Context::from_waker(Waker::noop());
        assert_eq!(pin!(copying.array(1)).poll(&mut context), Poll::Ready(Ok(())));
        assert!(matches!(pin!(copying.array(2)).poll(&mut context), Poll::Ready(Err(_))));
        assert!(matches!(pin!(copying.ended()).poll(&mut context), Poll::Ready(Err(_))));
        assert_eq!(copying.doubt(), None);
    }

    #[test]
    fn a_copy_that_ended_in_doubt_says_so_and_no_other_does() {
        let error = || Error::new(ErrorCode::CudaFailed, "no answer");
        let (progress, copying) = copying();
        assert_eq!(copying.doubt(), None);
        progress.end_in_doubt(error());
        progress.end(Ok(())); // too late
        let mut context = Context::from_waker(Waker::noop());
        assert_eq!(pin!(copying.ended()).poll(&mut context), Poll::Ready(Err(error())));
        assert_eq!(copying.doubt(), Some(error()));
        for (end, late) in [(Ok(()), error()), (Err(error()), error())] {
            let (progress, copying) = super::copying();
            progress.end(end);
            progress.end_in_doubt(late);
            assert_eq!(copying.doubt(), None, "it had ended");
        }
    }
}
