//! Requests that wait for a prefetch, beside a connection's other requests.

use std::future::{pending, poll_fn};
use std::pin::pin;
use std::task::Poll;
use std::time::Instant;

use bytes::Bytes;
use kvferry_store::{Store, clock};
use kvferry_wire::{Header, Reply};
use tokio::time::sleep_until;

use crate::streams::detached;

/// Of one connection at most, and the bytes that each of their names may have.
const WAITS_MAX: usize = 64;
const NAME_MAX: usize = 1024;

/// What a connection's peer waits for. It goes with the connection.
#[derive(Default)]
pub(crate) struct Waits(Vec<Wait>);

struct Wait {
    header: Header,
    request_id: String,
    until: Instant,
}

impl Waits {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn have_room_for(&self, request_id: &str) -> bool {
        self.0.len() < WAITS_MAX && request_id.len() <= NAME_MAX
    }

    pub(crate) fn begin(&mut self, header: &Header, request_id: String, until: Instant) {
        self.0.push(Wait { header: detached(header), request_id, until });
    }

    /// The next answer. Nothing is lost when it is waited for no longer.
    pub(crate) async fn next(&mut self, store: &Store) -> Vec<Bytes> {
        let first = self.0.iter().enumerate().min_by_key(|(_, wait)| wait.until);
        let first = first.map(|(place, wait)| (place, wait.until));
        let over = async {
            match first {
                Some((place, until)) => {
                    sleep_until(until.into()).await;
                    place
                }
                None => pending().await,
            }
        };
        let hit = poll_fn(|context| {
            for (place, wait) in self.0.iter().enumerate() {
                if let Poll::Ready(hit) = pin!(store.hit(&wait.request_id)).poll(context) {
                    return Poll::Ready((place, hit));
                }
            }
            Poll::Pending
        });
        let (place, hit) = tokio::select! {
            biased;
            (place, hit) = hit => (place, Some(hit)),
            // Past the lookup's deadline there is an answer, too.
            place = over => (place, store.take_hit(&self.0[place].request_id, clock::now())),
        };
        self.0.remove(place).header.reply(&hit.map_or(Reply::None, Reply::Integer))
    }
}
