//! Futures as promises.

use std::future::Future;
use std::marker::PhantomData;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use kvferry_core::inline::run_inline;
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
/// runs as [`run_inline`] does, and must not block.
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
    run_inline(work, move |stretch| {
        let _runtime = runtime.enter();
        stretch();
    });
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
