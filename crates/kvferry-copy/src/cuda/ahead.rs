//! The thread that page-locks a pool's steps before copies need them: inline it takes far longer than the copy.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvferry_core::cache::Memory;

use super::Shared;
use super::context::Context;
use super::pins::{Lead, PinUse};
use super::worker::Step;
use crate::{POOL_STEP, is_reserved, unguarded};

/// How long the thread may take to end: it is in one registration at most.
const END_MAX: Duration = Duration::from_secs(10);
/// How long it waits for a pool to grow, which does so as it is filled. The next copy starts it again.
const LINGER: Duration = Duration::from_secs(5);
/// Between two looks at whether it has grown.
const LOOK: Duration = Duration::from_millis(20);

/// A worker's part in it, for one pool. The thread comes with steps that are there to be registered, and goes when no more come.
pub(super) struct Ahead {
    shared: Arc<Shared>,
    /// It is to end, or a registration failed: copies register what they need, and tell what fails.
    stop: Arc<AtomicBool>,
    /// The receiver hears when all that the thread had is given back.
    thread: Option<(JoinHandle<()>, Receiver<()>)>,
}

/// What the thread has.
struct Work {
    shared: Arc<Shared>,
    stop: Arc<AtomicBool>,
    lead: Lead,
    context: Arc<Context>,
    /// Held for one registration at a time: the region is its owner's to give up.
    pool: Weak<dyn Memory>,
    /// The pool's, whole.
    bytes: u64,
}

impl Ahead {
    pub(super) fn new(shared: &Arc<Shared>) -> Self {
        Self { shared: Arc::clone(shared), stop: Arc::default(), thread: None }
    }

    /// Has a thread register all steps that are reserved, in ascending order, if there are some and no thread of any
    /// worker's is at it.
    pub(super) fn go_on(&mut self, pins: &PinUse, context: &Arc<Context>, pool: &Arc<dyn Memory>) {
        if self.stop.load(Ordering::Relaxed) {
            return;
        }
        let Some(lead) = pins.lead() else { return };
        if !is_reserved(&**pool, lead.next()) {
            return;
        }
        self.wait(); // for one that has done all and is about to end
        let (shared, stop) = (Arc::clone(&self.shared), Arc::clone(&self.stop));
        let (context, bytes) = (Arc::clone(context), pool.bytes());
        let pool = Arc::downgrade(unguarded(pool));
        let work = Work { shared, stop, lead, context, pool, bytes };
        let (ended, has_ended) = mpsc::sync_channel(0);
        let thread = thread::Builder::new().name("kvferry-pins".into()).spawn(move || {
            work.run();
            drop(work);
            drop(ended);
        });
        self.thread = thread.ok().map(|thread| (thread, has_ended));
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some((thread, _)) = &self.thread {
            thread.thread().unpark();
        }
    }

    /// Waits for the thread's end. One that the driver holds up keeps what it needs, and gives it back whenever it ends.
    pub(super) fn wait(&mut self) {
        let Some((thread, has_ended)) = self.thread.take() else { return };
        if has_ended.recv_timeout(END_MAX) != Err(RecvTimeoutError::Timeout) {
            let _ = thread.join();
        }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.stop();
        self.wait();
    }
}

impl Work {
    fn run(&self) {
        let Ok(current) = self.context.enter() else { return self.fail() };
        let mut until = Instant::now() + LINGER;
        while !self.stop.load(Ordering::Relaxed) && !self.shared.lock().closed {
            let Some(pool) = self.pool.upgrade() else { return };
            let step = self.lead.next();
            if !is_reserved(&*pool, step) {
                drop(pool);
                if step * POOL_STEP >= self.bytes || Instant::now() >= until {
                    return;
                }
                thread::park_timeout(LOOK);
                continue;
            }
            let place = step * POOL_STEP;
            if Step::find(&*pool, &self.lead, (&current, &self.context), place).is_err() {
                return self.fail();
            }
            until = Instant::now() + LINGER;
        }
    }

    fn fail(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
