//! Futures as promises.

use std::future::Future;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use kvferry_core::llama_state::Copy;
use kvferry_core::{Error, ErrorCode};
use napi::bindgen_prelude::{JsValue, PromiseRaw, ToNapiValue, within_runtime_if_available};
use napi::{Env, Result};
use tokio::runtime::Handle;

use crate::error::to_napi;

/// Runs `work` on threads of our own; napi turns a panic in it into a rejection.
pub(crate) fn promise<'env, T>(
    env: &'env Env,
    work: impl Future<Output = kvferry_core::Result<T>> + Send + 'static,
) -> Result<PromiseRaw<'env, T>>
where
    T: ToNapiValue + Send + 'static,
{
    env.spawn_future(async move { work.await.map_err(to_napi) })
}

/// Runs `work` here and now as far as it needs not wait: what is begun in an order is asked for in that order. The rest
/// runs as [`Inline`] does, and must not block.
pub(crate) fn begin<'env, T>(
    env: &'env Env,
    work: impl Future<Output = kvferry_core::Result<T>> + Send + 'static,
) -> Result<PromiseRaw<'env, T>>
where
    T: ToNapiValue + Send + 'static,
{
    let mut work = Box::pin(work);
    let mut context = Context::from_waker(Waker::noop());
    match within_runtime_if_available(|| work.as_mut().poll(&mut context)) {
        Poll::Ready(Ok(value)) => PromiseRaw::resolve(env, value),
        Poll::Ready(Err(error)) => PromiseRaw::reject(env, to_napi(error)),
        Poll::Pending => {
            let (deferred, promise) = env.create_deferred()?;
            let promise = PromiseRaw::new(env.raw(), promise.raw());
            // However the work ends, the promise is settled.
            let settle = move |result: kvferry_core::Result<T>| match result {
                Ok(value) => deferred.resolve(move |_| Ok(value)),
                Err(error) => deferred.reject(to_napi(error)),
            };
            let mut settle = Settle(Some(settle), PhantomData);
            begin_detached(async move {
                let result = work.await;
                settle.with(result);
            });
            Ok(promise)
        }
    }
}

/// The same for work that no promise tells of.
pub(crate) fn begin_detached(work: impl Future<Output = ()> + Send + 'static) {
    let runtime = within_runtime_if_available(Handle::current);
    let work = Mutex::new(Some(Box::pin(work) as Work));
    Arc::new(Inline { work, wakes: AtomicUsize::new(0), runtime }).wake();
}

type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Work that goes on wherever it is woken: on the copy thread that ended its copy, on the task that received its answer.
/// Another thread would have to be woken first, which takes longer than what there is to do.
struct Inline {
    work: Mutex<Option<Work>>,
    /// Those that the thread has not seen that runs the work; the first of them runs it.
    wakes: AtomicUsize,
    runtime: Handle,
}

impl Wake for Inline {
    fn wake(self: Arc<Self>) {
        if self.wakes.fetch_add(1, Ordering::AcqRel) > 0 {
            return;
        }
        loop {
            let seen = self.wakes.load(Ordering::Acquire);
            self.poll();
            if self.wakes.fetch_sub(seen, Ordering::AcqRel) == seen {
                return;
            }
        }
    }
}

impl Inline {
    fn poll(self: &Arc<Self>) {
        let mut place = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(work) = &mut *place else { return };
        let _runtime = self.runtime.enter();
        let waker = Waker::from(Arc::clone(self));
        let mut context = Context::from_waker(&waker);
        let poll = || work.as_mut().poll(&mut context).is_ready();
        if catch_unwind(AssertUnwindSafe(poll)).unwrap_or(true) {
            *place = None;
        }
    }
}

/// Tells a result once; of work that is given up, that it was.
struct Settle<T, F: FnOnce(kvferry_core::Result<T>)>(Option<F>, PhantomData<T>);

impl<T, F: FnOnce(kvferry_core::Result<T>)> Settle<T, F> {
    fn with(&mut self, result: kvferry_core::Result<T>) {
        if let Some(settle) = self.0.take() {
            settle(result);
        }
    }
}

impl<T, F: FnOnce(kvferry_core::Result<T>)> Drop for Settle<T, F> {
    fn drop(&mut self) {
        self.with(Err(Error::new(ErrorCode::Internal, "this operation was given up")));
    }
}

/// The moment `timeout_ms` from now.
pub(crate) fn deadline(timeout_ms: u32) -> Instant {
    Instant::now() + Duration::from_millis(timeout_ms.into())
}

/// What `work` gives before `deadline`.
pub(crate) async fn within<T>(
    deadline: Instant,
    work: impl Future<Output = kvferry_core::Result<T>>,
) -> kvferry_core::Result<T> {
    tokio::time::timeout_at(deadline.into(), work).await.unwrap_or_else(|_| {
        Err(Error::new(ErrorCode::Timeout, "the server did not answer before the deadline"))
    })
}

/// Runs copies without holding up the other tasks.
pub(crate) fn run_copies(copies: Vec<Copy<'_>>) {
    tokio::task::block_in_place(|| kvferry_copy::run_copies(copies));
}

/// One thread for all tasks: they wait for servers and start copies, and waking each other on one
/// thread is cheaper than across two.
#[napi_derive::module_init]
fn start_runtime() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("kvferry")
        .enable_all()
        .build();
    if let Ok(runtime) = runtime {
        napi::bindgen_prelude::create_custom_tokio_runtime(runtime);
    }
}
