//! What keeps in touch with the remote: whether it answers and takes objects, and which epoch there is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvferry_core::{Error, ErrorCode, Result};

use super::keys;
use super::shared::{Shared, random};
use super::work::{jittered, limited, remove};

/// Objects that are taken out in one round.
const STALE: usize = 8;

pub(crate) async fn run(shared: Arc<Shared>) {
    let _present = shared.present();
    let mut failures = 0;
    loop {
        let begun = Instant::now();
        let result = round(&shared).await;
        let works = matches!(result, Ok(Ok(())));
        let reached = result.is_ok();
        shared.end_round(begun, result);
        if reached {
            for id in shared.take_stale(STALE) {
                remove(Arc::clone(&shared), id).await;
            }
        }
        failures = if works { 0 } else { failures + 1 };
        let mut wait = pause(&shared, failures);
        // A new epoch is told at once; a failure is looked into a little later, as it may have been the last.
        while tokio::time::timeout(wait, shared.for_keeper.notified()).await.is_ok() {
            if shared.lock().closing {
                let probe = shared.objects.remove(keys::probe(&shared.prefix, shared.server));
                let _ = limited(&shared, shared.times.question, probe).await; // 64 bytes are left there
                return;
            }
            if shared.epoch().1 {
                break;
            }
            wait = pause(&shared, 1);
        }
    }
}

/// Until the next round.
fn pause(shared: &Shared, failures: u32) -> Duration {
    match failures {
        0 => shared.times.period,
        _ => jittered(shared.times.retry.saturating_mul(1 << (failures - 1).min(16)))
            .min(shared.times.period),
    }
}

/// Whether the remote answers, and whether it takes values.
async fn round(shared: &Shared) -> Result<Result<()>> {
    agree_on_epoch(shared).await?;
    Ok(round_trip(shared).await)
}

/// Whoever cleared last says which epoch it is.
async fn agree_on_epoch(shared: &Shared) -> Result<()> {
    let key = keys::epoch(&shared.prefix);
    let (ours, is_new, clears) = shared.epoch();
    let limit = shared.times.question;
    let theirs =
        if is_new { None } else { limited(shared, limit, shared.objects.get(key.clone())).await? };
    let epoch = match (theirs, ours) {
        (Some(theirs), _) => match String::from_utf8(theirs.to_vec()) {
            Ok(theirs) if keys::is_epoch(&theirs) => theirs,
            _ => {
                return Err(Error::new(
                    ErrorCode::Protocol,
                    format!(
                        "{key:?} in {} is not kvferry's: remove it, or give another prefix",
                        shared.objects.place()
                    ),
                ));
            }
        },
        (None, Some(ours)) if ours != keys::FIRST_EPOCH => {
            // Ours is new, or the remote has lost it.
            let value = Bytes::from(ours.clone().into_bytes());
            limited(shared, limit, shared.objects.put(key, value)).await?;
            ours
        }
        (None, _) => keys::FIRST_EPOCH.to_owned(),
    };
    shared.keep_epoch(epoch, clears);
    Ok(())
}

/// Fresh bytes go there and come back.
async fn round_trip(shared: &Shared) -> Result<()> {
    let key = keys::probe(&shared.prefix, shared.server);
    let mut value = Vec::with_capacity(64);
    while value.len() < 64 {
        value.extend(random()?.to_le_bytes());
    }
    let value = Bytes::from(value);
    let limit = shared.times.question;
    limited(shared, limit, shared.objects.put(key.clone(), value.clone())).await?;
    let back = limited(shared, limit, shared.objects.get(key)).await?;
    if back.as_ref() == Some(&value) {
        return Ok(());
    }
    let place = shared.objects.place();
    Err(Error::new(
        ErrorCode::System,
        format!("what was put into {place} does not come back from it"),
    ))
}
