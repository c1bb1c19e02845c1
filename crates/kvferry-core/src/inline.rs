//! Work that goes on wherever it is woken.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Wake, Waker};

/// Runs `work` here as far as it needs not wait, and the rest on whichever thread wakes it: the one that ended its copy,
/// the one that received its answer. To wake another thread first would take longer than what there is to do, so `work`
/// must not block, and nobody may wake it while holding what it needs. What panics has ended, and is dropped. What is woken by
/// such work goes on behind it, on its thread: a chain of any length needs no more of the stack than one.
///
/// `around` is called with each stretch of the work, to run it within a runtime for example.
pub fn run_inline(
    work: impl Future<Output = ()> + Send + 'static,
    around: impl Fn(&mut dyn FnMut()) + Send + Sync + 'static,
) {
    let work: Work = Box::pin(work);
    let inline = Inline { work: Mutex::new(Some(work)), wakes: AtomicUsize::new(0), around };
    Arc::new(inline).wake();
}

type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

struct Inline<F> {
    work: Mutex<Option<Work>>,
    /// Those that the thread has not seen that runs the work; whose is the first, it is that thread.
    wakes: AtomicUsize,
    around: F,
}

thread_local! {
    /// What goes on when the work has come to its end or a wait that runs on this thread; `None` while none does.
    static BEHIND: RefCell<Option<VecDeque<Arc<dyn GoOn>>>> = const { RefCell::new(None) };
}

trait GoOn: Send + Sync {
    /// Runs the work until it has seen all its wakes.
    fn go_on(self: Arc<Self>);
}

impl<F: Fn(&mut dyn FnMut()) + Send + Sync + 'static> Wake for Inline<F> {
    fn wake(self: Arc<Self>) {
        if self.wakes.fetch_add(1, Ordering::AcqRel) > 0 {
            return;
        }
        let mut next: Option<Arc<dyn GoOn>> = Some(self);
        let queue = |behind: &RefCell<Option<VecDeque<_>>>| match &mut *behind.borrow_mut() {
            Some(queue) => queue.extend(next.take()),
            none => *none = Some(VecDeque::new()),
        };
        let _ = BEHIND.try_with(queue); // a thread that ends has none
        while let Some(work) = next {
            // It has caught what panicked; what its drop threw must not keep the others from their turn.
            let _ = catch_unwind(AssertUnwindSafe(|| work.go_on())).map_err(std::mem::forget);
            next = BEHIND.try_with(take_next).ok().flatten();
        }
    }
}

fn take_next(behind: &RefCell<Option<VecDeque<Arc<dyn GoOn>>>>) -> Option<Arc<dyn GoOn>> {
    let mut behind = behind.borrow_mut();
    let next = behind.as_mut().and_then(VecDeque::pop_front);
    if next.is_none() {
        *behind = None;
    }
    next
}

impl<F: Fn(&mut dyn FnMut()) + Send + Sync + 'static> GoOn for Inline<F> {
    fn go_on(self: Arc<Self>) {
        loop {
            let seen = self.wakes.load(Ordering::Acquire);
            self.poll();
            if self.wakes.fetch_sub(seen, Ordering::AcqRel) == seen {
                return;
            }
        }
    }
}

impl<F: Fn(&mut dyn FnMut()) + Send + Sync + 'static> Inline<F> {
    fn poll(self: &Arc<Self>) {
        let mut place = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        let waker = Waker::from(Arc::clone(self));
        let mut stretch = || {
            let Some(work) = &mut *place else { return };
            if work.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
                *place = None;
            }
        };
        if catch_unwind(AssertUnwindSafe(|| (self.around)(&mut stretch))).is_err() {
            let _ = catch_unwind(AssertUnwindSafe(|| *place = None));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::mpsc::{Sender, channel};
    use std::task::Poll;
    use std::thread::{self, ThreadId};

    use super::*;

    /// Ready when `done` says so; leaves the waker.
    fn until<D: FnMut() -> bool + Send>(
        waker: &Arc<Mutex<Option<Waker>>>,
        mut done: D,
    ) -> impl Future<Output = ()> + Send + use<D> {
        let waker = Arc::clone(waker);
        poll_fn(move |context| {
            *waker.lock().unwrap() = Some(context.waker().clone());
            if done() { Poll::Ready(()) } else { Poll::Pending }
        })
    }

    fn left(waker: &Mutex<Option<Waker>>) -> Waker {
        waker.lock().unwrap().clone().unwrap()
    }

    fn plain(stretch: &mut dyn FnMut()) {
        stretch();
    }

    #[test]
    fn the_rest_runs_on_the_thread_that_wakes_it() {
        let (told, ran) = channel();
        let waker = Arc::default();
        let mut first = true;
        let wait = until(&waker, move || !std::mem::take(&mut first));
        let tell: Sender<ThreadId> = told;
        run_inline(
            async move {
                tell.send(thread::current().id()).unwrap();
                wait.await;
                tell.send(thread::current().id()).unwrap();
            },
            plain,
        );
        assert_eq!(ran.try_recv(), Ok(thread::current().id()), "without a wait");
        assert!(ran.try_recv().is_err());
        let waker = left(&waker);
        let waking = thread::spawn(move || {
            waker.wake();
            thread::current().id()
        });
        assert_eq!(ran.recv(), Ok(waking.join().unwrap()));
    }

    #[test]
    fn what_is_woken_while_it_runs_runs_once_more_where_it_runs() {
        let (begun, begins) = channel();
        let (leave, left_alone) = channel::<()>();
        let waker = Arc::default();
        let mut polls = 0;
        let wait = until(&waker, move || {
            begun.send(thread::current().id()).unwrap();
            polls += 1;
            if polls == 1 {
                left_alone.recv().unwrap();
            }
            false
        });
        let running = thread::spawn(move || run_inline(wait, plain));
        let here = begins.recv().unwrap();
        for _ in 0..3 {
            left(&waker).wake(); // returns at once: another thread runs it
        }
        assert!(begins.try_recv().is_err());
        leave.send(()).unwrap();
        running.join().unwrap();
        assert_eq!(begins.try_iter().collect::<Vec<_>>(), [here], "once, for all of them");
        left(&waker).wake();
        assert_eq!(begins.try_iter().collect::<Vec<_>>(), [thread::current().id()]);
    }

    #[test]
    fn a_long_chain_of_which_each_wakes_the_next_needs_no_more_stack_than_one() {
        const LINKS: usize = 100_000;
        let wakers: Arc<Vec<Arc<Mutex<Option<Waker>>>>> =
            Arc::new((0..LINKS).map(|_| Arc::default()).collect());
        let (told, ended) = channel();
        for link in 0..LINKS {
            let (wakers, told) = (Arc::clone(&wakers), told.clone());
            let mut first = true;
            let wait = until(&wakers[link], move || !std::mem::take(&mut first));
            let work = async move {
                wait.await;
                if let Some(next) = wakers.get(link + 1) {
                    left(next).wake();
                }
                told.send(link).unwrap();
            };
            run_inline(work, plain);
        }
        left(&wakers[0]).wake();
        assert!(
            ended.try_iter().eq(0..LINKS),
            "all of them, in their order, when the wake returns"
        );
    }

    #[test]
    fn what_panics_ends_and_who_woke_it_goes_on() {
        struct Dropped(Sender<()>);
        impl Drop for Dropped {
            fn drop(&mut self) {
                self.0.send(()).unwrap();
            }
        }
        let (told, dropped) = channel();
        let waker = Arc::default();
        let mut first = true;
        let wait = until(&waker, move || !std::mem::take(&mut first));
        run_inline(
            async move {
                let _held = Dropped(told);
                wait.await;
                panic!("deliberate");
            },
            plain,
        );
        assert!(dropped.try_recv().is_err());
        left(&waker).wake();
        assert_eq!(dropped.try_recv(), Ok(()));
        left(&waker).wake(); // it has ended
    }

    #[test]
    fn each_stretch_runs_within_what_is_around_it() {
        thread_local!(static WITHIN: std::cell::Cell<bool> = const { std::cell::Cell::new(false) });
        let (told, seen) = channel();
        let waker = Arc::default();
        let mut polls = 0;
        let wait = until(&waker, move || {
            told.send(WITHIN.get()).unwrap();
            polls += 1;
            polls == 2
        });
        run_inline(wait, |stretch| {
            WITHIN.set(true);
            stretch();
            WITHIN.set(false);
        });
        left(&waker).wake();
        assert_eq!(seen.try_iter().collect::<Vec<_>>(), [true, true]);
    }
}
