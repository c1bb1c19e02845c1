//! What keeps in touch with the remote: whether it answers and takes objects, and which epoch there is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvferry_core::{Error, ErrorCode, Result};

use super::keys;
use super::shared::{Shared, random};
use super::work::{jittered, limited};

pub(crate) async fn run(shared: Arc<Shared>) {
    let _present = shared.present();
    let mut failures = 0;
    loop {
        let begun = Instant::now();
        let result = round(&shared).await;
        let works = matches!(result, Ok(Ok(())));
        shared.end_round(begun, result);
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
    let value = |epoch: &str| Bytes::from(epoch.as_bytes().to_vec());
    let epoch = match ours {
        Some(ours) if is_new => {
            limited(shared, limit, shared.objects.put(key, value(&ours))).await?;
            ours
        }
        ours => match (read_epoch(shared, &key).await?, ours) {
            (Some(theirs), _) => theirs,
            (None, Some(ours)) if ours != keys::FIRST_EPOCH => {
                // The remote has lost it. Of servers that know another one the first to say so is right.
                let put = shared.objects.put_new(key.clone(), value(&ours));
                match limited(shared, limit, put).await? {
                    true => ours,
                    false => read_epoch(shared, &key).await?.unwrap_or(ours),
                }
            }
            (None, _) => keys::FIRST_EPOCH.to_owned(),
        },
    };
    shared.keep_epoch(epoch, clears);
    Ok(())
}

async fn read_epoch(shared: &Shared, key: &str) -> Result<Option<String>> {
    let limit = shared.times.question;
    let value = limited(shared, limit, shared.objects.get(key.to_owned())).await?;
    let epoch = value.map(|value| String::from_utf8(value.to_vec()).ok());
    match epoch.map(|epoch| epoch.filter(|epoch| keys::is_epoch(epoch))) {
        Some(None) => {
            let place = shared.objects.place();
            let message =
                format!("{key:?} in {place} is not kvferry's: remove it, or give another prefix");
            Err(Error::new(ErrorCode::Protocol, message))
        }
        epoch => Ok(epoch.flatten()),
    }
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
