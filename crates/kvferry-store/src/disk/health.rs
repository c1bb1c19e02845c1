//! Whether the disk works, and how much of it there is.

use std::time::Instant;

use super::Times;

/// What failures say of the disk.
#[derive(Default)]
pub(crate) struct Health {
    /// Why saves are refused, and until when.
    failed: Option<Failed>,
    /// Bytes that the file system had room for when it was full, and until when that is believed.
    room: Option<(u64, Instant)>,
}

struct Failed {
    reason: String,
    retry_at: Instant,
    wait: std::time::Duration,
}

/// What may be done with a save.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Leave {
    Granted,
    /// To find out whether the disk works again.
    Trial,
    Refused,
}

impl Health {
    pub(crate) fn reason(&self) -> Option<&str> {
        self.failed.as_ref().map(|failed| failed.reason.as_str())
    }

    /// Whether one more save may be accepted. Of those after a failure, one at a time is.
    pub(crate) fn ask(&mut self, now: Instant) -> Leave {
        match &mut self.failed {
            None => Leave::Granted,
            Some(failed) if now >= failed.retry_at => {
                failed.retry_at = now + failed.wait;
                Leave::Trial
            }
            Some(_) => Leave::Refused,
        }
    }

    pub(crate) fn fail(&mut self, reason: String, trial: bool, now: Instant, times: &Times) {
        let wait = match &self.failed {
            None => times.retry,
            Some(failed) if trial => (2 * failed.wait).min(times.retry_most),
            Some(failed) => failed.wait,
        };
        self.failed = Some(Failed { reason, retry_at: now + wait, wait });
    }

    /// A trial was saved.
    pub(crate) fn recover(&mut self) {
        self.failed = None;
    }

    /// The file system holds no more than `bytes` of ours.
    pub(crate) fn shrink(&mut self, bytes: u64, now: Instant, times: &Times) {
        self.room = Some((bytes, now + times.shrunk));
    }

    /// Bytes that files may take.
    pub(crate) fn capacity(&self, bound: u64, now: Instant) -> u64 {
        match self.room {
            Some((bytes, until)) if now < until => bound.min(bytes),
            _ => bound,
        }
    }
}
