//! Bytes in frames: a client that has not mapped the pool stores and loads the same as one that has.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use common::{Client as Peer, start, store_options};
use kvferry_client::{Client, ConnectOptions};
use kvferry_core::ErrorCode;
use kvferry_core::cache::{Cache, Memory, Slot};
use kvferry_core::key::{Key, Layout};
use kvferry_server::Server;
use kvferry_wire::message::{PIECE_MAX, Piece};
use kvferry_wire::{Reply, Request};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener};

/// Of an object: three pieces, the last of which is short.
const OBJECT: u64 = 2 * PIECE_MAX as u64 + 4096;
const INSTANCE: u64 = 7;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn layout() -> Layout {
    Layout { hidden_dim_size: OBJECT.try_into().unwrap(), ..common::layout("m") }
}

fn key(request: &str, first: u32, chunks: u32) -> Key {
    common::key(request, first, chunks)
}

fn server(objects: u64) -> Server {
    start(store_options(16, objects * OBJECT))
}

async fn connect(server: &Server, shared_memory: bool) -> (Client, u64) {
    let options = ConnectOptions::new(server.address().to_string());
    let client = Client::connect(ConnectOptions { shared_memory, ..options }).await.unwrap();
    let instance = client.register(layout(), soon()).await.unwrap();
    assert_eq!(client.in_frames().is_some(), !shared_memory);
    (client, instance)
}

/// Bytes that differ from place to place and from chunk to chunk.
fn content(seed: u32, length: u64) -> Vec<u8> {
    let mut state = u64::from(seed) << 32 | 1;
    let words = (0..length.div_ceil(8)).flat_map(|_| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_le_bytes()
    });
    words.take(usize::try_from(length).unwrap()).collect()
}

fn fill(memory: &dyn Memory, slots: &[Slot], seed: u32) {
    for (number, slot) in (seed..).zip(slots) {
        memory.write(slot.offset, &content(number, slot.length)).unwrap();
    }
}

async fn store(client: &Client, instance: u64, key: &Key, seed: u32) -> usize {
    let grant = client.prepare_store(key, instance, soon()).await.unwrap();
    fill(&*grant.memory, &grant.slots, seed);
    let sums: Vec<u64> = (0..grant.slots.len() as u64).collect();
    let stored = client.commit_store(key, instance, &sums, soon()).await.unwrap();
    assert_eq!(stored, !grant.slots.is_empty());
    grant.slots.len()
}

/// Loads all chunks of the key and compares them.
async fn load(client: &Client, instance: u64, key: &Key, seed: u32) {
    assert_eq!(client.lookup(key, soon()).await.unwrap(), key.end / 16);
    let grant = client.prepare_retrieve(key, instance, soon()).await.unwrap().unwrap();
    for (number, slot) in (0..).zip(&grant.slots) {
        let mut bytes = vec![0; usize::try_from(slot.length).unwrap()];
        grant.memory.read(slot.offset, &mut bytes).unwrap();
        assert!(bytes == content(seed + number, slot.length), "chunk {number}");
        assert_eq!(slot.checksum, Some(number.into()));
    }
    assert!(client.commit_retrieve(key, instance, &grant.slots, soon()).await.unwrap());
    client.end_session(&key.request_id, soon()).await.unwrap();
}

#[tokio::test]
async fn what_either_stores_either_loads() {
    for (writes, reads) in [(false, false), (false, true), (true, false)] {
        let server = server(16);
        let (writer, writing) = connect(&server, writes).await;
        let (reader, reading) = connect(&server, reads).await;
        // More than the credit of a connection.
        assert_eq!(store(&writer, writing, &key("w", 0, 12), 0).await, 12);
        assert_eq!(store(&writer, writing, &key("again", 0, 12), 0).await, 0);
        load(&reader, reading, &key("r", 0, 12), 0).await;
        load(&reader, reading, &key("once more", 0, 12), 0).await;

        let salted = Key { cache_salt: "tenant".into(), ..key("s", 0, 2) };
        assert_eq!(reader.lookup(&salted, soon()).await.unwrap(), 0, "another tenant's");
        reader.end_session("s", soon()).await.unwrap();
        assert_eq!(store(&writer, writing, &salted, 100).await, 2);
        load(&reader, reading, &salted, 100).await;
        load(&reader, reading, &key("t", 0, 12), 0).await;
    }
}

#[tokio::test]
async fn several_transfers_share_a_connections_credit() {
    let server = server(48);
    let (client, instance) = connect(&server, false).await;
    let keys: Vec<Key> = (0..4).map(|n| key(&format!("{n}"), 1000 * n, 12)).collect();
    let [a, b, c, d] = &keys[..] else { panic!() };
    let store = |key, seed| store(&client, instance, key, seed);
    let stored = tokio::join!(store(a, 0), store(b, 20), store(c, 40), store(d, 60));
    assert_eq!(stored, (12, 12, 12, 12));
    let load = |key, seed| load(&client, instance, key, seed);
    tokio::join!(load(a, 0), load(b, 20), load(c, 40), load(d, 60));
}

#[tokio::test]
async fn what_is_damaged_is_discarded_and_stored_anew() {
    let server = server(4);
    let (client, instance) = connect(&server, false).await;
    store(&client, instance, &key("w", 0, 2), 0).await;
    let reading = key("r", 0, 2);
    assert_eq!(client.lookup(&reading, soon()).await.unwrap(), 2);
    let grant = client.prepare_retrieve(&reading, instance, soon()).await.unwrap().unwrap();
    client.discard(instance, &grant.slots[1..], soon()).await.unwrap();
    client.commit_retrieve(&reading, instance, &grant.slots, soon()).await.unwrap();
    client.end_session("r", soon()).await.unwrap();
    assert_eq!(client.lookup(&key("s", 0, 2), soon()).await.unwrap(), 1);
}

#[tokio::test]
async fn more_than_may_be_on_its_way_is_an_error_and_leaves_nothing_behind() {
    let server = start(store_options(16, 2 << 20));
    let options = ConnectOptions::new(server.address().to_string());
    let client = Client::connect(ConnectOptions { shared_memory: false, ..options }).await.unwrap();
    let small = Layout { hidden_dim_size: 1 << 20, ..layout() };
    let instance = client.register(small, soon()).await.unwrap();
    let mut grants = Vec::new();
    loop {
        // Each is abandoned, so the server has room; its memory here is still in somebody's hands.
        let one = key("w", 0, 1);
        match client.prepare_store(&one, instance, soon()).await {
            Ok(grant) => {
                assert_eq!(grant.slots.len(), 1);
                client.abandon_store(&one, instance, soon()).await.unwrap();
                grants.push(grant.memory);
            }
            Err(error) => {
                assert_eq!(error.code, ErrorCode::Timeout);
                break;
            }
        }
        assert!(grants.len() <= 1024, "there is a bound");
    }
    drop(grants);
    let one = key("x", 0, 1);
    let grant = client.prepare_store(&one, instance, soon()).await.unwrap();
    assert_eq!(grant.slots.len(), 1, "the one that failed reserves nothing");
}

#[tokio::test]
async fn a_server_that_goes_in_the_middle_of_a_transfer_makes_a_miss() {
    for storing in [true, false] {
        let server = server(64);
        let (client, instance) = connect(&server, false).await;
        let prompt = key("w", 0, 60);
        let grant = client.prepare_store(&prompt, instance, soon()).await.unwrap();
        fill(&*grant.memory, &grant.slots, 0);
        if !storing {
            assert!(client.commit_store(&prompt, instance, &[], soon()).await.unwrap());
            assert_eq!(client.lookup(&prompt, soon()).await.unwrap(), 60);
        }
        let ending = tokio::task::spawn_blocking(move || drop(server));
        // Whichever comes first: it ends, and well before the deadline, and says nothing false.
        let begun = Instant::now();
        if storing {
            let _ = client.commit_store(&prompt, instance, &[], soon()).await;
        } else if let Ok(Some(grant)) = client.prepare_retrieve(&prompt, instance, soon()).await {
            let slot = &grant.slots[59];
            let mut bytes = vec![0; usize::try_from(slot.length).unwrap()];
            grant.memory.read(slot.offset, &mut bytes).unwrap();
            assert!(bytes == content(59, slot.length));
        }
        assert!(begun.elapsed() < Duration::from_secs(30));
        ending.await.unwrap();
    }
}

/// Carries what the client sends to the server as it comes, and of what comes back `step` bytes at a time and `most` in
/// all.
async fn carry(near: impl AsyncRead + AsyncWrite, to: SocketAddr, step: usize, most: usize) {
    let far = TcpStream::connect(to).await.unwrap();
    let (mut from_client, mut to_client) = tokio::io::split(near);
    let (mut from_server, mut to_server) = tokio::io::split(far);
    let back = async {
        let (mut part, mut left) = (vec![0; step], most);
        while let Ok(read @ 1..) = from_server.read(&mut part[..step.min(left)]).await {
            to_client.write_all(&part[..read]).await.unwrap();
            left -= read;
        }
    };
    tokio::select! {
        _ = tokio::io::copy(&mut from_client, &mut to_server) => {}
        () = back => {}
    }
}

#[tokio::test]
async fn a_load_is_the_same_in_whatever_parts_it_comes_and_an_error_when_it_ends_in_one() {
    let server = server(4);
    let (writer, writing) = connect(&server, false).await;
    assert_eq!(store(&writer, writing, &key("w", 0, 4), 0).await, 4);
    let directory = std::env::temp_dir().join(format!("kvferry-parts-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let whole = usize::MAX;
    for (ipc, step, most) in [
        (false, 999, whole),
        (false, PIECE_MAX + 1, whole),
        (true, 4096, whole),
        (false, 4096, 100_000),
        (true, PIECE_MAX, 900_000),
    ] {
        let to = server.address();
        let (address, carrying) = if ipc {
            let path = directory.join(format!("{step}"));
            let listener = UnixListener::bind(&path).unwrap();
            let carrying = tokio::spawn(async move {
                carry(listener.accept().await.unwrap().0, to, step, most).await;
            });
            (format!("ipc://{}", path.display()), carrying)
        } else {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap().to_string();
            let carrying = tokio::spawn(async move {
                carry(listener.accept().await.unwrap().0, to, step, most).await;
            });
            (address, carrying)
        };
        let options = ConnectOptions { shared_memory: false, ..ConnectOptions::new(address) };
        let client = Client::connect(options).await.unwrap();
        let instance = client.register(layout(), soon()).await.unwrap();
        let prompt = key("r", 0, 4);
        if most == whole {
            load(&client, instance, &prompt, 0).await;
            load(&client, instance, &prompt, 0).await;
        } else {
            assert_eq!(client.lookup(&prompt, soon()).await.unwrap(), 4);
            let ended = client.prepare_retrieve(&prompt, instance, soon()).await.err().unwrap();
            assert_eq!(ended.code, ErrorCode::Unreachable, "at once, not at the deadline");
        }
        client.close().await;
        carrying.await.unwrap();
    }
    std::fs::remove_dir_all(directory).unwrap();
}

/// A connection of which every byte is known.
struct Raw(Peer);

impl Raw {
    fn connect(server: &Server) -> Self {
        let mut peer = Peer::connect(server.address());
        peer.hello();
        assert_eq!(peer.call(&Request::Frames), Reply::None);
        peer.register(INSTANCE, layout());
        Self(peer)
    }

    fn write(&mut self, slot: &Slot, at: u64, bytes: usize) -> bool {
        let (offset, generation) = (slot.offset, slot.generation.unwrap());
        let piece = Piece::fill(bytes, |data| {
            data.fill(7);
            Ok::<_, ()>(())
        });
        let piece = piece.unwrap();
        let write = Request::Write { instance_id: INSTANCE, offset, generation, at, piece };
        self.0.call(&write) == Reply::Boolean(true)
    }

    /// Writes all of it.
    fn fill(&mut self, slot: &Slot) {
        let piece = PIECE_MAX as u64;
        for at in (0..OBJECT).step_by(PIECE_MAX) {
            assert!(self.write(slot, at, piece.min(OBJECT - at).try_into().unwrap()));
        }
    }

    /// Stores the key's chunks; how many were new.
    fn store(&mut self, key: Key) -> usize {
        let slots = self.0.prepare_store(key.clone(), INSTANCE).slots.slots;
        slots.iter().for_each(|slot| self.fill(slot));
        assert!(self.0.commit_store(key, INSTANCE));
        slots.len()
    }

    fn read(&mut self, slot: &Slot, at: u64, bytes: u64) -> Option<Vec<u8>> {
        let (offset, generation) = (slot.offset, slot.generation.unwrap());
        let read = Request::Read { instance_id: INSTANCE, offset, generation, at, bytes };
        match self.0.call(&read) {
            Reply::Piece(piece) => piece.map(|piece| piece.data().to_vec()),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_peer_touches_what_it_was_granted_and_nothing_else() {
    let server = server(8);
    let mut one = Raw::connect(&server);
    let slot = one.0.prepare_store(key("w", 0, 1), INSTANCE).slots.slots.remove(0);
    let of = |generation: u64, offset: u64| Slot {
        offset,
        generation: Some(generation),
        ..slot.clone()
    };
    let generation = slot.generation.unwrap();
    assert!(one.write(&slot, 0, 10));
    assert!(!one.write(&slot, OBJECT - 10, 10), "a gap");
    assert_eq!(one.read(&slot, 0, 10), None, "what it is to write, it may not read");
    for (what, wrong, at) in [
        ("another use", of(generation + 1, slot.offset), 0),
        ("another slot", of(generation, slot.offset + 4096), 0),
        ("past its end", slot.clone(), OBJECT - 9),
        ("far past its end", slot.clone(), u64::MAX),
    ] {
        assert!(!one.write(&wrong, at, 10), "{what}");
        assert_eq!(one.read(&wrong, at, 10), None, "{what}");
    }
    let mut other = Raw::connect(&server);
    assert!(!other.write(&slot, 0, 10), "another connection's");
    assert_eq!(other.read(&slot, 0, 10), None);
    assert_eq!(one.read(&slot, 0, PIECE_MAX as u64 + 1), None, "more than a piece");

    assert!(!one.0.commit_store(key("w", 0, 1), INSTANCE), "the rest is a former owner's");
    assert_eq!(one.0.lookup(key("q", 0, 1)), 0);
    one.0.end_session("q");
    let slot = one.0.prepare_store(key("w", 0, 1), INSTANCE).slots.slots.remove(0);
    one.fill(&slot);
    assert!(one.0.commit_store(key("w", 0, 1), INSTANCE));
    assert!(!one.write(&slot, 0, 10), "what is visible is not changed any more");
    assert_eq!(one.0.lookup(key("r", 0, 1)), 1);
    let read = one.0.prepare_retrieve(key("r", 0, 1), INSTANCE).unwrap().slots.remove(0);
    assert_eq!(one.read(&read, 0, 11).unwrap()[..10], [7; 10]);
    assert_eq!(other.read(&read, 0, 11), None, "it asked for nothing, and may not know the salt");

    let mut mapped = Peer::connect(server.address());
    mapped.register(8, layout());
    let (offset, generation) = (read.offset, read.generation.unwrap());
    let asked = Request::Read { instance_id: 8, offset, generation, at: 0, bytes: 1 };
    assert_eq!(mapped.call(&asked), Reply::Piece(None), "a connection that did not say frames");
}

#[test]
fn what_was_written_in_part_is_never_seen_and_its_room_comes_back() {
    let server = server(2);
    let mut one = Raw::connect(&server);
    let slots = one.0.prepare_store(key("w", 0, 2), INSTANCE).slots.slots;
    assert!(one.write(&slots[0], 0, PIECE_MAX));
    let mut watcher = Raw::connect(&server);
    assert_eq!(watcher.0.lookup(key("r", 0, 2)), 0);
    watcher.0.end_session("r");
    drop(one);
    watcher.0.wait_for("slots_writing", 0);
    assert_eq!(watcher.0.lookup(key("s", 0, 2)), 0);
    watcher.0.end_session("s");
    assert_eq!(watcher.store(key("x", 500, 2)), 2);
}

#[test]
fn a_slot_that_was_used_anew_is_not_read() {
    let server = server(1);
    let mut one = Raw::connect(&server);
    assert_eq!(one.store(key("w", 0, 1)), 1);
    assert_eq!(one.0.lookup(key("r", 0, 1)), 1);
    let read = one.0.prepare_retrieve(key("r", 0, 1), INSTANCE).unwrap().slots.remove(0);
    assert!(one.read(&read, 0, 10).is_some());
    let ended = Request::CommitRetrieve { key: key("r", 0, 1).into(), instance_id: INSTANCE };
    assert_eq!(one.0.call(&ended), Reply::Boolean(true));
    one.0.end_session("r");
    assert_eq!(one.store(key("x", 500, 1)), 1, "in the place of the first");
    assert_eq!(one.read(&read, 0, 10), None);
}

#[test]
fn nobody_drops_what_it_does_not_read() {
    let server = server(4);
    let mut one = Raw::connect(&server);
    assert_eq!(one.store(key("w", 0, 2)), 2);
    assert_eq!(one.0.lookup(key("r", 0, 1)), 1);
    let read = one.0.prepare_retrieve(key("r", 0, 1), INSTANCE).unwrap().slots.remove(0);
    let generation = read.generation.unwrap();
    let discard = |instance_id, generations: Vec<u64>| Request::Discard {
        instance_id,
        offsets: vec![0; generations.len()],
        generations,
    };
    // All that were or will be, of another's.
    let guessed: Vec<u64> =
        (0..64).flat_map(|place| [1 << 28, 2 << 28, 3 << 28].map(|it| it | place)).collect();
    let mut other = Raw::connect(&server);
    other.0.register(8, layout());
    assert_eq!(other.0.call(&discard(8, guessed.clone())), Reply::Integer(0));
    assert_eq!(
        one.0.call(&discard(INSTANCE, guessed)),
        Reply::Integer(1),
        "what it reads, and no more"
    );
    assert_eq!(one.0.call(&discard(INSTANCE, vec![generation])), Reply::Integer(0), "gone");
}
