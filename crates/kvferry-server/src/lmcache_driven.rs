//! LMCache's `lmcache_driven` mode: engines whose memory this server copies from and to by itself. Each copy has a thread
//! beside this one, so only the connection that asked waits for it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvferry_core::kv_descriptors::KvRegistration;
use kvferry_core::{Error, ErrorCode, Result};
use kvferry_store::{EngineMemory, GoOn, Store};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout_at;

/// Copies that run at once; others wait for their turn.
const COPIES_MAX: usize = 4;
/// Threads that wait at once for what engines asked of their devices, which takes no turn of a copy.
const WAITS_MAX: usize = 64;
/// From when a peer may have asked to the end of its copy, all waits included. LMCache's worker sends its signs of life, one
/// in 10 s, over the same connection: one that is not answered in time ends what it waits for, and its blocks are others'.
const COPY: Duration = Duration::from_secs(5);
/// Registrations of one connection.
const ENGINES_MAX: usize = 64;
/// Layers of all of them: each may have a file of its own.
const LAYERS_MAX: usize = 4_096;
/// The event of a copy that is over: on a CPU there is nothing to wait for, and this is what LMCache answers.
const EVENT: Bytes = Bytes::from_static(b"stub_ipc_handle");
/// The same of a device: LMCache's worker takes it for "nothing is under way", which holds, as the copy was waited for.
const NO_EVENT: Bytes = Bytes::new();

/// What a connection registered. Nobody else may have it copied, and it goes with the connection.
#[derive(Default)]
pub(crate) struct Engines(HashMap<u64, Arc<Engine>>);

struct Engine {
    memory: EngineMemory,
    _layers: OwnedSemaphorePermit,
}

/// What copies share.
pub(crate) struct Copiers {
    turns: Arc<Semaphore>,
    waits: Arc<Semaphore>,
    layers: Arc<Semaphore>,
}

/// Ends a copy that nobody waits for any more: the server stops.
struct GivenUp(Arc<AtomicBool>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Default for Copiers {
    fn default() -> Self {
        let semaphore = |permits| Arc::new(Semaphore::new(permits));
        let (turns, waits) = (semaphore(COPIES_MAX), semaphore(WAITS_MAX));
        Self { turns, waits, layers: semaphore(LAYERS_MAX) }
    }
}

impl Engines {
    pub(crate) async fn unregister(&mut self, instance: u64) {
        if let Some(engine) = self.0.remove(&instance) {
            let closing = tokio::task::spawn_blocking(move || drop(engine));
            let _ = closing.await; // if it panicked, the rest is gone all the same
        }
    }
}

impl Drop for Engines {
    /// Closing a device's memory takes its time, which is not this thread's.
    fn drop(&mut self) {
        let engines = std::mem::take(&mut self.0);
        if let (false, Ok(runtime)) = (engines.is_empty(), Handle::try_current()) {
            runtime.spawn_blocking(move || drop(engines));
        }
    }
}

impl Copiers {
    /// Registers an engine's memory, in place of what the instance had before: its memory is elsewhere now. The bytes of an
    /// object of it.
    pub(crate) async fn register(
        &self,
        store: &Store,
        engines: &mut Engines,
        instance: u64,
        registration: KvRegistration,
    ) -> Result<u64> {
        engines.unregister(instance).await;
        if engines.0.len() >= ENGINES_MAX {
            return Err(Error::invalid(format!(
                "a connection has {ENGINES_MAX} registrations, the most that are allowed; unregister one"
            )));
        }
        let count = u32::try_from(registration.layers.len()).unwrap_or(u32::MAX);
        let layers = Arc::clone(&self.layers).try_acquire_many_owned(count).map_err(|_| {
            Error::invalid(format!(
                "all engines together have more than {LAYERS_MAX} layers, the most that are allowed"
            ))
        })?;
        let store = store.clone();
        // Opening memory takes no turn: an engine that was not registered for want of one would not ask again.
        let opening =
            tokio::task::spawn_blocking(move || EngineMemory::register(&store, &registration));
        let memory = opening.await.map_err(|_| without_result())??;
        let object_bytes = memory.object_bytes();
        engines.0.insert(instance, Arc::new(Engine { memory, _layers: layers }));
        Ok(object_bytes)
    }

    /// Copies for an instance that may have asked at `since`, once its `event` is over: what `copy` does, and the event
    /// that it answers.
    pub(crate) async fn copy(
        &self,
        engines: &Engines,
        instance: u64,
        block_ids: Vec<Vec<u32>>,
        event: Box<[u8]>,
        since: Instant,
        copy: impl FnOnce(&EngineMemory, &[u32], GoOn<'_>) -> Result<bool> + Send + 'static,
    ) -> Result<(Bytes, bool)> {
        let engine = engines.0.get(&instance).ok_or_else(|| {
            let message = format!("instance {instance} is not registered by this connection");
            Error::new(ErrorCode::Protocol, message)
        })?;
        let engine = Arc::clone(engine);
        let Ok([blocks]) = <[Vec<u32>; 1]>::try_from(block_ids) else {
            return Err(Error::invalid("there are blocks of several groups of layers, or of none"));
        };
        let is_on_device = engine.memory.is_on_device();
        if is_on_device {
            let engine = Arc::clone(&engine);
            let wait = move |go_on: GoOn<'_>| engine.memory.wait_for(&event, go_on);
            self.run(&self.waits, since, wait).await?;
        }
        let copy = move |go_on: GoOn<'_>| copy(&engine.memory, &blocks, go_on);
        let done = self.run(&self.turns, since, copy).await?;
        Ok((if done && !is_on_device { EVENT } else { NO_EVENT }, done))
    }

    /// Runs `work` on another thread when it is its turn among `turns`. It is asked to end at its deadline.
    async fn run<T: Send + 'static>(
        &self,
        turns: &Arc<Semaphore>,
        since: Instant,
        work: impl FnOnce(GoOn<'_>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let deadline = since + COPY;
        let late =
            || Error::new(ErrorCode::Timeout, "a copy, or what was asked before it, took too long");
        if Instant::now() >= deadline {
            return Err(late());
        }
        let turn = timeout_at(deadline.into(), Arc::clone(turns).acquire_owned()).await;
        let turn = turn.map_err(|_| late())?;
        let given_up = Arc::new(AtomicBool::new(false));
        let waits = GivenUp(Arc::clone(&given_up));
        let running = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            work(&|| match Instant::now() < deadline && !given_up.load(Ordering::Relaxed) {
                true => Ok(()),
                false => Err(late()),
            })
        });
        let result = running.await;
        drop(waits);
        result.map_err(|_| without_result())?
    }
}

fn without_result() -> Error {
    Error::new(ErrorCode::Internal, "a copy ended without a result")
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use tokio::task::{JoinHandle, yield_now};
    use tokio::time::advance;

    use super::*;

    /// A copy that runs until it is let go, and says that it does.
    struct Held {
        copy: JoinHandle<Result<()>>,
        let_go: Option<mpsc::Sender<()>>,
        begun: mpsc::Receiver<()>,
    }

    impl Held {
        fn new(copiers: &Arc<Copiers>) -> Self {
            let (let_go, held) = mpsc::channel();
            let (begins, begun) = mpsc::channel();
            let work = move |go_on: GoOn<'_>| {
                let _ = begins.send(());
                let _ = held.recv(); // an error, once nobody holds it
                go_on()
            };
            let copiers = Arc::clone(copiers);
            let copy =
                tokio::spawn(
                    async move { copiers.run(&copiers.turns, Instant::now(), work).await },
                );
            Self { copy, let_go: Some(let_go), begun }
        }

        async fn begins(&self) {
            while self.begun.try_recv().is_err() {
                yield_now().await;
            }
        }

        async fn end(mut self) -> Result<()> {
            drop(self.let_go.take());
            self.copy.await.unwrap()
        }
    }

    #[tokio::test]
    async fn copies_run_beside_each_other_up_to_a_number_and_hold_up_nothing_else() {
        let copiers = Arc::new(Copiers::default());
        let mut copies: Vec<Held> = (0..COPIES_MAX).map(|_| Held::new(&copiers)).collect();
        for copy in &copies {
            copy.begins().await; // which takes this thread
        }
        let next = Held::new(&copiers);
        for _ in 0..100 {
            yield_now().await;
        }
        assert!(next.begun.try_recv().is_err(), "one more waits for its turn");
        assert_eq!(copies.remove(0).end().await, Ok(()));
        next.begins().await;
        copies.push(next);
        for copy in copies {
            assert_eq!(copy.end().await, Ok(()));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_a_turn_is_told_in_time_that_there_is_none() {
        let copiers = Arc::new(Copiers::default());
        let copies: Vec<Held> = (0..COPIES_MAX).map(|_| Held::new(&copiers)).collect();
        for copy in &copies {
            copy.begins().await;
        }
        let late = Held::new(&copiers);
        yield_now().await;
        advance(COPY + Duration::from_secs(1)).await;
        assert_eq!(late.copy.await.unwrap().unwrap_err().code, ErrorCode::Timeout);
        assert!(late.begun.try_recv().is_err());
        for copy in copies {
            assert_eq!(copy.end().await, Ok(()), "the clock of those that run is the system's");
        }
    }

    #[tokio::test]
    async fn a_copy_ends_when_it_is_late_or_nobody_waits_for_it() {
        let copiers = Arc::new(Copiers::default());
        let before = Instant::now().checked_sub(COPY).unwrap();
        let _turn = copiers.turns.acquire().await; // there are others
        let late = copiers.run(&copiers.turns, before, |go_on: GoOn<'_>| go_on()).await;
        assert_eq!(late.unwrap_err().code, ErrorCode::Timeout);
        let (ended, has_ended) = mpsc::channel();
        let (begins, begun) = mpsc::channel();
        let work = move |go_on: GoOn<'_>| {
            let _ = begins.send(());
            while go_on().is_ok() {
                std::thread::yield_now();
            }
            let _ = ended.send(());
            Ok(())
        };
        let copy = tokio::spawn({
            let copiers = Arc::clone(&copiers);
            async move { copiers.run(&copiers.turns, Instant::now(), work).await }
        });
        while begun.try_recv().is_err() {
            yield_now().await;
        }
        copy.abort(); // as when the server stops
        assert!(copy.await.unwrap_err().is_cancelled());
        has_ended.recv_timeout(Duration::from_secs(20)).unwrap();
    }

    #[tokio::test]
    async fn a_copy_that_panics_is_one_that_failed() {
        let copiers = Copiers::default();
        for _ in 0..2 * COPIES_MAX {
            let bug = |_: GoOn<'_>| -> Result<()> { panic!("a bug") };
            let error = copiers.run(&copiers.turns, Instant::now(), bug).await.unwrap_err();
            assert_eq!(error.code, ErrorCode::Internal);
        }
        let next = copiers.run(&copiers.turns, Instant::now(), |_: GoOn<'_>| Ok(1));
        assert_eq!(next.await, Ok(1));
    }
}
