//! A server and kvferry's own client of it, over a socket and a shared pool.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::time::{Duration, Instant};

use common::{Client as Peer, key, layout, start, store_options};
use kvferry_client::{Client, ConnectOptions};
use kvferry_core::ErrorCode;
use kvferry_core::cache::{Cache, Slot};
use kvferry_core::key::Key;

const PAGE: u64 = 4096;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

async fn connect(address: std::net::SocketAddr) -> (Client, u64) {
    let client = Client::connect(ConnectOptions::new(address.to_string())).await.unwrap();
    let instance = client.register(layout("m"), soon()).await.unwrap();
    (client, instance)
}

/// Stores the key's chunks with these checksums; where they lie.
async fn store(client: &Client, instance: u64, key: &Key, checksums: &[u64]) -> Vec<Slot> {
    let grant = client.prepare_store(key, instance, soon()).await.unwrap();
    assert!(client.commit_store(key, instance, checksums, soon()).await.unwrap());
    grant.slots
}

/// The slots that a reader of the key's chunks is told; has them dropped if `discard`.
async fn load(client: &Client, instance: u64, key: &Key, discard: bool) -> Vec<Slot> {
    assert_eq!(client.lookup(key, soon()).await.unwrap(), key.end / 16);
    let slots = client.prepare_retrieve(key, instance, soon()).await.unwrap().unwrap().slots;
    if discard {
        client.discard(instance, &slots, soon()).await.unwrap();
    }
    assert!(client.commit_retrieve(key, instance, &slots, soon()).await.unwrap());
    client.end_session(&key.request_id, soon()).await.unwrap();
    slots
}

fn checksums(slots: &[Slot]) -> Vec<Option<u64>> {
    slots.iter().map(|slot| slot.checksum).collect()
}

#[tokio::test]
async fn another_process_is_told_the_checksums_of_what_was_stored() {
    let server = start(store_options(16, 8 * PAGE));
    let (writer, writing) = connect(server.address()).await;
    let (reader, reading) = connect(server.address()).await;
    let prompt = key("a", 0, 3);
    let stored = store(&writer, writing, &prompt, &[0, 1 << 40, u64::MAX]).await;
    let slots = load(&reader, reading, &prompt, false).await;
    assert_eq!(checksums(&slots), [Some(0), Some(1 << 40), Some(u64::MAX)]);
    let place = |slot: &Slot| (slot.offset, slot.generation);
    assert!(slots.iter().map(place).eq(stored.iter().map(place)));

    // Bytes that failed: what is stored in their place has checksums of its own, or none.
    load(&reader, reading, &prompt, true).await;
    store(&writer, writing, &prompt, &[7, 8, 9]).await;
    assert_eq!(
        checksums(&load(&reader, reading, &prompt, true).await),
        [Some(7), Some(8), Some(9)]
    );
    store(&writer, writing, &prompt, &[]).await;
    assert_eq!(checksums(&load(&reader, reading, &prompt, false).await), [None; 3]);

    let longer = key("b", 0, 4);
    writer.prepare_store(&longer, writing, soon()).await.unwrap();
    let error = writer.commit_store(&longer, writing, &[1, 2], soon()).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    assert_eq!(reader.lookup(&longer, soon()).await.unwrap(), 3, "nothing was committed");
    reader.end_session("b", soon()).await.unwrap();
    writer.abandon_store(&longer, writing, soon()).await.unwrap();
    store(&writer, writing, &longer, &[4]).await;
    assert_eq!(
        checksums(&load(&reader, reading, &longer, false).await),
        [None, None, None, Some(4)]
    );
}

#[tokio::test]
async fn what_lmcaches_client_stored_has_no_checksum() {
    let server = start(store_options(16, 8 * PAGE));
    let (reader, reading) = connect(server.address()).await;
    let mut peer = Peer::connect(server.address());
    peer.register(9, layout("m"));
    assert_eq!(peer.store(key("a", 0, 2), 9), 2);
    assert_eq!(checksums(&load(&reader, reading, &key("b", 0, 2), false).await), [None, None]);
}
