//! The engines of the store's remote tier, by their addresses: Redis and Valkey, single or cluster, and whatever speaks
//! S3. What is asked of them and what becomes of failures, the store says; here are the requests alone.

mod address;
mod redis;
mod s3;

use std::sync::Arc;

use kvferry_core::{Error, ErrorCode, Result};
use kvferry_store::remote::RemoteOptions;

use address::{Address, Engine};

/// What an error's text is cut to: it may quote what an engine answered.
const TEXT_MAX: usize = 300;

/// The remote at a URL. Nothing is connected to: an engine that is not there is no error.
///
/// # Errors
/// [`ErrorCode::InvalidArgument`] for a URL of another form, which the message names without its credentials.
pub fn open(url: &str) -> Result<RemoteOptions> {
    // Whichever crate asks for TLS first must find one provider.
    let _ = rustls::crypto::ring::default_provider().install_default(); // it may be there already
    let Address { engine, prefix, place } = address::parse(url)?;
    let objects: Arc<dyn kvferry_store::remote::Objects> = match engine {
        Engine::Redis(servers) => Arc::new(redis::Redis::new(servers, place)?),
        Engine::S3(bucket) => Arc::new(s3::S3::new(&bucket, place)?),
    };
    Ok(RemoteOptions { objects, prefix })
}

/// What an engine says is wrong, and what helps if that is known. `passing`: it may answer another time.
fn failure(place: &str, passing: bool, reason: &str, remedy: Option<&str>) -> Error {
    let code = if passing { ErrorCode::Unreachable } else { ErrorCode::System };
    let line: String = reason.lines().next().unwrap_or_default().chars().take(TEXT_MAX).collect();
    let remedy = remedy.map(|remedy| format!("; {remedy}")).unwrap_or_default();
    Error::new(code, format!("{place}: {line}{remedy}"))
}
