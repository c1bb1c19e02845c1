//! Peers that are broken, malicious, slow or killed: what they get, and what others notice of it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Write};

use bytes::{BufMut, Bytes, BytesMut};
use common::{
    Client, connect_raw, frame, handshake, key, layout, start, store_options, wait_until_cut,
};
use kvferry_core::ErrorCode;
use kvferry_core::cache::Slot;
use kvferry_core::key::{Dtype, Key};
use kvferry_core::kv_descriptors::{KvDescriptor, KvRegistration, KvStorage};
use kvferry_server::{Server, ServerOptions};
use kvferry_store::{Store, StoreOptions};
use kvferry_wire::message::{BlockAllocation, Piece, StoreSlots};
use kvferry_wire::{Dialect, Header, Operation, Reply, Request, RequestKey};

const PAGE: u64 = 4096;
/// The instance of the tests' engine.
const INSTANCE: u64 = 7;

/// A server with room for `objects` objects, and an engine that has registered.
fn server_and_engine(objects: u64) -> (Server, Client) {
    let server = start(store_options(16, objects * PAGE));
    let mut engine = Client::connect(server.address());
    engine.register(INSTANCE, layout("m"));
    (server, engine)
}

/// A well-formed request of each operation.
fn requests() -> Vec<Request> {
    let (key, request_id) = (key("r", 0, 2), "r".to_owned());
    let request_key = || key.clone().into();
    let piece = || Piece::fill(3, |_| Ok::<_, ()>(())).unwrap();
    let tensor = KvDescriptor {
        storage: KvStorage::Segment { shm_name: "/lmcache_kv_none".into(), bytes: 4096 },
        dtype: Dtype::new("uint8").unwrap(),
        shape: vec![4, 16, 64],
        stride: vec![1024, 64, 1],
        storage_offset: 0,
    };
    let registration = KvRegistration {
        model_name: "other".into(),
        world_size: 1,
        engine_type: "vllm".into(),
        kv_layout: None,
        groups: Vec::new(),
        layers: vec![tensor],
    };
    let requests = vec![
        Request::RegisterKvCache { instance_id: 10, registration },
        Request::UnregisterKvCache { instance_id: 10 },
        Request::Store {
            key: request_key(),
            instance_id: 10,
            block_ids: vec![vec![1]],
            event: Box::default(),
        },
        Request::Retrieve {
            key: request_key(),
            instance_id: 10,
            block_ids: vec![vec![1]],
            event: Box::default(),
            skip_first_n_tokens: 0,
        },
        Request::Lookup { key: request_key(), tp_size: 1 },
        Request::QueryPrefetchStatus { request_id: request_id.clone() },
        Request::WaitPrefetchStatus { request_id: request_id.clone(), timeout_s: 1.0 },
        Request::FreeLookupLocks { key: request_key(), tp_size: 1 },
        Request::EndSession { request_id: request_id.clone() },
        Request::Register { instance_id: 9, layout: layout("other") },
        Request::Unregister { instance_id: 9 },
        Request::PrepareStore { key: request_key(), instance_id: INSTANCE },
        Request::CommitStore { key: request_key(), instance_id: INSTANCE },
        Request::PrepareRetrieve { key: request_key(), instance_id: INSTANCE },
        Request::CommitRetrieve { key: request_key(), instance_id: INSTANCE },
        Request::Clear { force: false },
        Request::GetChunkSize,
        Request::Ping { instance_id: None },
        Request::ReportBlockAllocation {
            instance_id: INSTANCE,
            model_name: "m".into(),
            records: vec![BlockAllocation {
                request_id,
                new_block_ids: vec![1],
                new_token_ids: vec![2],
            }],
        },
        Request::Noop,
        Request::GetExperimental,
        Request::Hello,
        Request::AbandonStore { key: request_key(), instance_id: INSTANCE },
        Request::Confirm { instance_id: INSTANCE, offsets: vec![0], generations: vec![1] },
        Request::Discard { instance_id: INSTANCE, offsets: vec![0], generations: vec![1] },
        Request::Checksums {
            instance_id: INSTANCE,
            offsets: vec![0],
            generations: vec![1],
            checksums: vec![2],
        },
        Request::Frames,
        Request::Write { instance_id: INSTANCE, offset: 0, generation: 1, at: 0, piece: piece() },
        Request::Read { instance_id: INSTANCE, offset: 0, generation: 1, at: 0, bytes: 1 },
        Request::SubscribeKvEvents {
            instance_id: INSTANCE,
            model_name: "m".into(),
            cursor: 0,
            max_events: 9,
        },
        Request::Status,
        Request::Events { cursor: 1, max: 9 },
        Request::Explain { key: request_key() },
    ];
    assert_eq!(requests.len(), Operation::ALL.len());
    requests
}

/// What may be wrong with the parameters of a message.
fn malformed(request: &Request) -> Vec<Vec<Bytes>> {
    let frames = request.encode(77, Dialect::Current);
    let mut broken = vec![[&frames[..], &[Bytes::from_static(&[0])]].concat()];
    for i in 2..frames.len() {
        let frame = &frames[i];
        broken.push([&frames[..i], &frames[i + 1..]].concat());
        for other in [
            frame.slice(..frame.len() - 1),
            [frame, &b"\x00"[..]].concat().into(),
            Bytes::from_static(b"\xc1"),                 // is never used
            Bytes::from_static(b"\xdd\xff\xff\xff\xff"), // an array of 2^32 - 1 elements
            Bytes::from_static(b"\xdf\xff\xff\xff\xff"), // a map of as many
            Bytes::from_static(b"\xc6\xff\xff\xff\xff"), // as many bytes
            Bytes::from_static(b"\x91\x91\x91"),
            Bytes::from_static(b"\x81\xa1"),
            Bytes::new(),
        ] {
            let mut changed = frames.clone();
            changed[i] = other;
            broken.push(changed);
        }
    }
    let is_broken = |frames: &Vec<Bytes>| {
        let (header, payload) = Header::decode(frames).unwrap();
        Request::decode(header.operation, payload).is_err()
    };
    broken.retain(is_broken);
    assert!(!broken.is_empty());
    broken
}

/// What a malformed request is answered; most are met with silence, as LMCache does.
fn refusal(operation: Operation) -> Option<Reply> {
    Some(match operation {
        Operation::PrepareStore => Reply::StoreSlots(Some(StoreSlots::default())),
        Operation::PrepareRetrieve => Reply::RetrieveSlots(None),
        Operation::RegisterKvCache => Reply::None,
        Operation::Store | Operation::Retrieve => {
            Reply::Copied { event: Bytes::new(), done: false }
        }
        Operation::CommitStore | Operation::Confirm => Reply::Boolean(false),
        Operation::CommitRetrieve => Reply::Boolean(true),
        Operation::Discard | Operation::Checksums => Reply::Integer(0),
        Operation::Write => Reply::Boolean(false),
        Operation::Read => Reply::Piece(None),
        _ => return None,
    })
}

#[test]
fn an_engine_is_not_anothers_to_unregister_as_long_as_it_is_there() {
    let (server, mut engine) = server_and_engine(8);
    let mut other = Client::connect(server.address());
    let unregister = Request::Unregister { instance_id: INSTANCE };
    engine.prepare_store(key("r", 0, 2), INSTANCE);
    assert_eq!(other.call(&unregister), Reply::None);
    assert_eq!(other.status("instances"), 1);
    assert_eq!(other.status("slots_writing"), 2, "they are nobody else's");
    assert_eq!(other.status("dropped_not_its_own"), 1);
    assert!(engine.commit_store(key("r", 0, 2), INSTANCE));
    // An LMCache worker whose connection was made anew does not register again.
    drop(engine);
    while other.status("instances") > 0 {
        assert_eq!(other.call(&unregister), Reply::None);
    }
}

#[test]
fn a_peer_takes_no_more_than_its_share_of_registrations_and_the_log_says_so() {
    let (server, mut engine) = server_and_engine(8);
    let mut greedy = Client::connect(server.address());
    for instance in 0..256 {
        greedy.register(1000 + instance, layout("other"));
    }
    let register = |instance_id| Request::Register { instance_id, layout: layout("other") };
    assert!(greedy.is_unanswered(&register(1256).encode(9999, Dialect::Current)));
    greedy.register(1000, layout("other")); // it has that one
    let notes = server.take_notes(std::time::Instant::now());
    let refused: Vec<_> = notes.iter().filter(|note| note.event == "engine_refused").collect();
    assert!(refused[0].detail.contains("256 instances"), "{notes:?}");
    engine.register(2000, layout("m"));
    greedy.call(&Request::Unregister { instance_id: 1000 });
    greedy.register(1256, layout("other"));
}

#[cfg(target_os = "linux")]
#[test]
fn slots_of_a_peer_that_was_cut_come_back_when_its_process_has_ended() {
    let (server, mut engine) = server_and_engine(64);
    // The other process does with the connection what it is told here, and keeps it open.
    let script =
        format!("exec 3<>/dev/tcp/127.0.0.1/{}; cat >&3; exec sleep 1000", server.address().port());
    let mut other = std::process::Command::new("bash");
    let other = other.args(["-c", &script]).stdin(std::process::Stdio::piped());
    let mut other = other.spawn().unwrap();
    let (register, store) = (
        Request::Register { instance_id: 8, layout: layout("m") },
        Request::PrepareStore { key: key("cut", 500, 4).into(), instance_id: 8 },
    );
    let mut sent = handshake().to_vec();
    for (uid, request) in (1..).zip([register, store]) {
        let frames = request.encode(uid, Dialect::Current);
        for (i, body) in frames.iter().enumerate() {
            sent.extend(frame(body, i + 1 < frames.len()));
        }
    }
    sent.push(0xff); // flags that mean nothing
    other.stdin.take().unwrap().write_all(&sent).unwrap();
    engine.wait_for("slots_apart", 4);
    std::thread::sleep(std::time::Duration::from_millis(1500));
    assert_eq!(engine.status("slots_apart"), 4, "it may still write to them");
    other.kill().unwrap();
    engine.wait_for("slots_apart", 0);
    assert_eq!(engine.status("used_bytes"), 0);
    other.wait().unwrap();
}

#[test]
fn malformed_messages_by_the_thousand_are_dropped_counted_and_harm_nobody() {
    let (server, mut engine) = server_and_engine(8);
    assert_eq!(engine.store(key("before", 0, 2), INSTANCE), 2);
    let mut peer = Client::connect(server.address());
    let header = |first: &'static [u8], second: &'static [u8]| {
        vec![Bytes::from_static(first), Bytes::from_static(second)]
    };
    let silent = [
        vec![Bytes::from_static(b"\x01")], // one frame: it stops LMCache's server for ever
        vec![Bytes::new()],
        header(b"\xa1u", b"\x18"),
        header(b"\x01", b"\x63"),
        header(b"\x01", b"\xa4nope"),
        header(b"\x01", b""),
        header(b"\x01", b"\x80"),
    ];
    let mut sent = 0;
    for _ in 0..10 {
        for frames in &silent {
            assert!(peer.is_unanswered(frames), "{frames:?}");
            sent += 1;
        }
        for request in requests() {
            let operation = request.operation();
            for frames in malformed(&request) {
                sent += 1;
                match refusal(operation) {
                    None => assert!(peer.is_unanswered(&frames), "{operation} {frames:?}"),
                    Some(refusal) => {
                        peer.send(&frames);
                        assert_eq!(peer.reply(), refusal, "{operation} {frames:?}");
                    }
                }
            }
        }
        assert_eq!(engine.call(&Request::Noop), Reply::Text("OK".into()));
    }
    assert!(sent > 2_000, "{sent} were sent");
    assert_eq!(engine.status("dropped_messages"), sent);
    assert_eq!(engine.status("dropped_too_few_frames"), 20);
    assert_eq!(engine.status("dropped_unknown_operation"), 20);
    for reason in ["bad_uid", "bad_operation", "frame_count", "truncated", "trailing_bytes"] {
        let name = format!("dropped_{reason}");
        assert!(engine.status(&name) > 0, "{name}");
    }
    assert_eq!(engine.lookup(key("after", 0, 2)), 2, "what was stored is still there");
}

#[test]
fn what_is_no_zmtp_is_cut_by_the_thousand_and_harms_nobody() {
    let (server, mut engine) = server_and_engine(8);
    let ready = handshake();
    let long = |flags: u8, length: u64| {
        let mut bytes = BytesMut::from(&ready[..]);
        bytes.put_u8(flags);
        bytes.put_u64(length);
        bytes
    };
    let mut before_ready = BytesMut::from(&ready[..64]);
    before_ready.extend_from_slice(b"\x02\x40\0\0\0\0\0\0\0");
    let mut plain = BytesMut::from(&ready[..64]);
    plain[12..17].copy_from_slice(b"PLAIN");
    let attacks = [
        ("greeting", BytesMut::from(&b"GET / HTTP/1.1\r\n\r\n"[..])),
        ("greeting", BytesMut::from(&[0; 64][..])),
        ("version", BytesMut::from(&b"\xff\0\0\0\0\0\0\0\x01\x7f\x01"[..])),
        ("mechanism", plain),
        ("unexpected", before_ready), // 2^62 bytes, before the handshake is done
        ("message_too_long", long(0x02, 1 << 62)),
        ("message_too_long", long(0x03, u64::MAX)),
        ("message_too_long", long(0x02, (8 << 20) + 1)),
        ("command_too_long", long(0x06, 1 << 62)),
        ("frame", long(0xff, 0)),
        ("too_many_frames", {
            let mut bytes = BytesMut::from(&ready[..]);
            bytes.extend((0..17).flat_map(|_| [1, 0]));
            bytes
        }),
    ];
    const ROUNDS: i64 = 100;
    let mut expected: BTreeMap<&str, i64> = BTreeMap::new();
    for _ in 0..ROUNDS {
        for (reason, bytes) in &attacks {
            let mut stream = connect_raw(server.address());
            stream.write_all(bytes).unwrap();
            wait_until_cut(&mut stream);
            *expected.entry(reason).or_default() += 1;
        }
        assert_eq!(engine.call(&Request::Noop), Reply::Text("OK".into()));
    }
    for (reason, count) in expected {
        assert_eq!(engine.status(&format!("dropped_zmtp_{reason}")), count, "{reason}");
    }
    assert_eq!(engine.status("dropped_messages"), ROUNDS * attacks.len() as i64);
}

#[test]
fn hundreds_of_silent_connections_keep_nobody_from_being_served() {
    let (server, mut engine) = server_and_engine(8);
    let greeting = &handshake()[..64];
    let _silent: Vec<_> = (0..150)
        .map(|i| {
            let mut stream = connect_raw(server.address());
            stream.write_all(&greeting[..i % 65]).unwrap(); // from nothing to a whole greeting
            stream
        })
        .collect();
    let mut idle: Vec<_> = (0..150).map(|_| Client::connect(server.address())).collect();
    assert_eq!(engine.store(key("r", 0, 2), INSTANCE), 2);
    assert_eq!(engine.lookup(key("s", 0, 2)), 2);
    for client in &mut idle {
        assert_eq!(client.call(&Request::GetChunkSize), Reply::Integer(16));
    }
}

/// The bytes of as many messages as there are uids.
fn pipelined(request: &Request, uids: std::ops::Range<u64>) -> Vec<u8> {
    let message = |uid| {
        let frames = request.encode(uid, Dialect::Current);
        let last = frames.len() - 1;
        let parts = frames.iter().enumerate();
        parts.flat_map(|(i, body)| frame(body, i < last)).collect::<Vec<_>>()
    };
    uids.flat_map(message).collect()
}

#[test]
fn a_peer_that_never_reads_keeps_nobody_from_being_served() {
    let (server, mut engine) = server_and_engine(8);
    let mut deaf = Client::connect(server.address());
    deaf.stream.set_nonblocking(true).unwrap();
    let asking = pipelined(&Request::Status, 0..1000);
    // Until the server has stopped reading, since nobody reads what it answers.
    let mut refused = 0;
    while refused < 100 {
        match deaf.stream.write(&asking) {
            Ok(_) => refused = 0,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                refused += 1;
                assert_eq!(engine.call(&Request::Noop), Reply::Text("OK".into()));
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(engine.store(key("r", 0, 2), INSTANCE), 2);
}

#[test]
fn many_requests_at_once_are_answered_in_their_order() {
    let (_server, mut engine) = server_and_engine(8);
    const REQUESTS: u64 = 5_000;
    let ping = Request::Ping { instance_id: Some(INSTANCE) };
    let bytes = pipelined(&ping, 0..REQUESTS);
    // In pieces that respect no boundary.
    for piece in bytes.chunks(997) {
        engine.stream.write_all(piece).unwrap();
    }
    for uid in 0..REQUESTS {
        assert_eq!(engine.receive()[0], ping.encode(uid, Dialect::Current)[0]);
    }
}

#[test]
fn a_port_and_a_segment_have_one_server() {
    let options = store_options(16, 8 * PAGE);
    let server = start(options.clone());
    let mut engine = Client::connect(server.address());
    engine.register(INSTANCE, layout("m"));
    assert_eq!(engine.store(key("r", 0, 2), INSTANCE), 2);

    let port = server.address().port();
    let address = ServerOptions { port, ..ServerOptions::default() };
    let error = Server::start(&address, |_| panic!("the port comes first")).err().unwrap();
    assert_eq!(error.code, ErrorCode::AddressInUse);
    assert!(error.message.contains(&server.address().to_string()), "{error}");

    let elsewhere = ServerOptions::default();
    let error = Server::start(&elsewhere, |_| Store::new(options.clone())).err().unwrap();
    assert_eq!(error.code, ErrorCode::PoolInUse);
    assert!(error.message.contains(options.shared_name.as_ref().unwrap()), "{error}");

    assert_eq!(engine.lookup(key("s", 0, 2)), 2, "the live server is not disturbed");
    assert!(engine.prepare_retrieve(key("s", 0, 2), INSTANCE).is_some());
    drop(server);
    start(options); // both are free again
}

#[test]
fn more_memory_than_there_is_is_refused_with_both_sizes() {
    let options = StoreOptions { memory: 1 << 43, ..store_options(16, PAGE) };
    let elsewhere = ServerOptions::default();
    let error = Server::start(&elsewhere, |_| Store::new(options)).err().unwrap();
    assert_eq!(error.code, ErrorCode::PoolTooLarge);
    assert!(error.message.contains(&(1u64 << 43).to_string()), "{error}");
}

/// A peer of the engine with a lease, a reservation and a retrieval; nothing else is held.
fn holding(server: &Server, engine: &mut Client) -> Client {
    assert_eq!(engine.store(key("stored", 0, 3), INSTANCE), 3);
    let mut peer = Client::connect(server.address());
    assert_eq!(peer.prepare_store(key("new", 1000, 2), INSTANCE).slots.slots.len(), 2);
    assert_eq!(peer.lookup(key("old", 0, 3)), 3);
    let read = Key { end: 16, ..key("old", 0, 3) };
    assert_eq!(peer.prepare_retrieve(read, INSTANCE).unwrap().slots.len(), 1);
    let held = ["slots_writing", "slots_reading", "leases", "slots_apart"];
    assert_eq!(held.map(|name| engine.status(name)), [2, 1, 2, 0]);
    peer
}

#[test]
fn a_killed_peer_gives_everything_back() {
    for unread in [false, true] {
        let (server, mut engine) = server_and_engine(8);
        let mut peer = holding(&server, &mut engine);
        if unread {
            peer.request(&Request::Status);
            let mut byte = [0];
            peer.stream.peek(&mut byte).unwrap(); // the answer is there: its kernel sends a reset
        }
        drop(peer);
        for name in ["slots_writing", "slots_reading", "leases", "slots_apart"] {
            engine.wait_for(name, 0);
        }
        let used = 3 * PAGE;
        assert_eq!(engine.status("used_bytes"), i64::try_from(used).unwrap());
        assert_eq!(engine.store(key("again", 1000, 2), INSTANCE), 2, "others may store it");
        assert_eq!(engine.call(&Request::Clear { force: true }), Reply::None);
        assert_eq!(engine.status("objects"), 0, "and nothing is pinned");
    }
}

#[test]
fn a_peer_that_we_cut_keeps_its_slots_apart_until_it_says_that_it_is_done() {
    let (server, mut engine) = server_and_engine(8);
    let mut peer = holding(&server, &mut engine);
    peer.stream.write_all(&[0xff; 16]).unwrap();
    wait_until_cut(&mut peer.stream);
    engine.wait_for("leases", 0); // no worker was handed these
    assert_eq!(engine.status("slots_writing"), 0);
    assert_eq!(engine.status("slots_apart"), 3, "it may still write to 2 and read 1");

    // Its chunks can be stored by others, in other slots; the one that it reads is not evicted.
    let granted = engine.prepare_store(key("other", 1000, 2), INSTANCE).slots.slots;
    assert_eq!(granted.len(), 2);
    assert!(engine.commit_store(key("other", 1000, 2), INSTANCE));
    assert_eq!(engine.call(&Request::Clear { force: true }), Reply::None);
    assert_eq!(engine.status("objects"), 1);
    let apart = 2 * PAGE;
    assert_eq!(engine.status("slots_apart_bytes"), i64::try_from(apart).unwrap());
    let all: Vec<_> = engine.prepare_store(key("all", 5000, 8), INSTANCE).slots.slots;
    assert_eq!(all.len(), 5, "of 8 slots, 2 are apart and 1 is read");

    // It comes back: what it wrote too late is thrown away.
    let mut peer = Client::connect(server.address());
    assert!(!peer.commit_store(key("new", 1000, 2), INSTANCE));
    assert_eq!(engine.status("slots_apart"), 1);
    let key = Key { end: 16, ..key("old", 0, 3) };
    peer.call(&Request::CommitRetrieve { key: key.into(), instance_id: INSTANCE });
    assert_eq!(engine.status("slots_apart"), 0);
}

#[test]
fn unregistering_takes_back_what_was_set_apart() {
    let (server, mut engine) = server_and_engine(8);
    let mut peer = holding(&server, &mut engine);
    peer.stream.write_all(&[0xff; 16]).unwrap();
    wait_until_cut(&mut peer.stream);
    engine.wait_for("slots_apart", 3);
    assert_eq!(engine.call(&Request::Unregister { instance_id: INSTANCE }), Reply::None);
    assert_eq!(engine.status("slots_apart"), 0);
    engine.wait_for("slots_reading", 0); // it may read for a moment
    assert_eq!(engine.call(&Request::Clear { force: true }), Reply::None);
    assert_eq!(engine.status("used_bytes"), 0);
}

#[test]
fn a_store_that_fits_partly_stores_its_leading_chunks_and_says_so_to_those_who_ask() {
    let (server, mut engine) = server_and_engine(4);
    let granted = engine.prepare_store(key("r", 0, 6), INSTANCE);
    assert_eq!(granted.chunk_indices, [0, 1, 2, 3]);
    assert_eq!(granted.refused, None, "LMCache's clients know nothing of it");
    assert!(granted.slots.slots.iter().all(|slot| slot.generation.is_none()));
    assert!(engine.commit_store(key("r", 0, 6), INSTANCE));
    assert_eq!(engine.status("refused_chunks"), 2);
    assert_eq!(engine.lookup(key("s", 0, 6)), 4);

    let mut ours = Client::connect(server.address());
    ours.hello();
    let granted = ours.prepare_store(key("t", 0, 6), INSTANCE);
    assert_eq!((granted.slots.slots.len(), granted.refused), (0, Some(2)));
    engine.end_session("s");
    let granted = ours.prepare_store(key("u", 1000, 3), INSTANCE);
    assert_eq!((granted.slots.slots.len(), granted.refused), (3, Some(0)), "others make room");
    assert!(granted.slots.slots.iter().all(|slot| slot.generation.is_some()));
}

#[test]
fn generations_tell_whether_a_slot_is_still_what_was_read() {
    let (_server, mut engine) = server_and_engine(2);
    engine.hello();
    engine.store(key("r", 0, 2), INSTANCE);
    assert_eq!(engine.lookup(key("s", 0, 2)), 2);
    let slots = engine.prepare_retrieve(key("s", 0, 2), INSTANCE).unwrap().slots;
    let offsets: Vec<u64> = slots.iter().map(|slot| slot.offset).collect();
    let generations: Vec<u64> = slots.iter().map(|slot| slot.generation.unwrap()).collect();
    let confirm = |engine: &mut Client, generations: &[u64]| {
        let (offsets, generations) = (offsets.clone(), generations.to_vec());
        engine.call(&Request::Confirm { instance_id: INSTANCE, offsets, generations })
    };
    assert_eq!(confirm(&mut engine, &generations), Reply::Boolean(true));
    let others: Vec<u64> = generations.iter().map(|generation| generation + 1).collect();
    assert_eq!(confirm(&mut engine, &others), Reply::Boolean(false));
    let committed = Request::CommitRetrieve { key: key("s", 0, 2).into(), instance_id: INSTANCE };
    assert_eq!(engine.call(&committed), Reply::Boolean(true));
    assert_eq!(confirm(&mut engine, &generations), Reply::Boolean(true), "not evicted yet");

    // The same places, another use.
    engine.end_session("s");
    let again = engine.prepare_store(key("t", 1000, 2), INSTANCE).slots.slots;
    let sorted = |slots: &[Slot]| {
        let mut offsets: Vec<_> = slots.iter().map(|slot| slot.offset).collect();
        offsets.sort_unstable();
        offsets
    };
    assert_eq!(sorted(&again), sorted(&slots));
    assert_eq!(confirm(&mut engine, &generations), Reply::Boolean(false));
}

#[test]
fn checksums_are_for_connections_that_said_hello() {
    let (server, mut engine) = server_and_engine(8);
    let mut ours = Client::connect(server.address());
    ours.hello();
    let granted = ours.prepare_store(key("r", 0, 2), INSTANCE).slots.slots;
    let tell = |instance_id, checksums: [u64; 2]| Request::Checksums {
        instance_id,
        offsets: granted.iter().map(|slot| slot.offset).collect(),
        generations: granted.iter().map(|slot| slot.generation.unwrap()).collect(),
        checksums: checksums.to_vec(),
    };
    assert_eq!(ours.call(&tell(INSTANCE + 1, [8, 9])), Reply::Integer(0), "not its slots");
    // Pipelined, as clients send them: the commit does not wait.
    ours.request(&tell(INSTANCE, [1, 2]));
    ours.request(&Request::CommitStore { key: key("r", 0, 2).into(), instance_id: INSTANCE });
    assert_eq!(ours.reply(), Reply::Integer(2));
    assert_eq!(ours.reply(), Reply::Boolean(true));
    assert_eq!(ours.call(&tell(INSTANCE, [8, 9])), Reply::Integer(0), "committed");

    let retrieve = |peer: &mut Client, request_id| {
        assert_eq!(peer.lookup(key(request_id, 0, 2)), 2);
        peer.prepare_retrieve(key(request_id, 0, 2), INSTANCE).unwrap()
    };
    let told = retrieve(&mut ours, "s");
    assert!(told.slots.iter().map(|slot| slot.checksum).eq([Some(1), Some(2)]));
    let plain = retrieve(&mut engine, "t");
    let lmcaches = Slot { generation: None, checksum: None, ..told.slots[0].clone() };
    assert_eq!(plain.slots[0], lmcaches);

    // What a peer without the extension stored has none, and nothing is said of it.
    assert_eq!(engine.store(key("u", 1000, 2), INSTANCE), 2);
    assert_eq!(ours.lookup(key("v", 1000, 2)), 2);
    let request = Request::PrepareRetrieve { key: key("v", 1000, 2).into(), instance_id: INSTANCE };
    ours.request(&request);
    let reply = ours.receive();
    let says = |word: &[u8]| reply[2].windows(word.len()).any(|part| part == word);
    assert!(says(b"generations") && !says(b"checksums"));
}

#[test]
fn what_is_abandoned_is_free_again_and_was_never_there() {
    let (_server, mut engine) = server_and_engine(4);
    assert_eq!(engine.prepare_store(key("r", 0, 4), INSTANCE).chunk_indices.len(), 4);
    let abandon = Request::AbandonStore { key: key("r", 0, 4).into(), instance_id: INSTANCE };
    assert_eq!(engine.call(&abandon), Reply::None);
    assert_eq!(engine.status("used_bytes"), 0);
    assert_eq!(engine.lookup(key("s", 0, 4)), 0);
    assert!(!engine.commit_store(key("r", 0, 4), INSTANCE), "there is nothing to commit");
    assert_eq!(engine.store(key("t", 0, 4), INSTANCE), 4);
}

#[test]
fn a_restart_shows_in_the_boot_token() {
    let options = store_options(16, 8 * PAGE);
    let mut hellos = (0..2).map(|_| {
        let server = start(options.clone());
        let mut client = Client::connect(server.address());
        let hello = client.hello();
        assert_eq!(client.hello(), hello);
        assert_eq!(Client::connect(server.address()).hello(), hello);
        hello
    });
    let (first, second) = (hellos.next().unwrap(), hellos.next().unwrap());
    assert_ne!(first.boot_token, second.boot_token);
    assert_eq!(first.pid, std::process::id());
}

#[test]
fn a_prepare_is_answered_whatever_is_wrong_with_it() {
    let (_server, mut engine) = server_and_engine(8);
    let good = || key("r", 0, 2);
    let wrong = [
        ("an unknown instance", good(), 999),
        ("no worker", Key { worker_id: None, ..good() }, INSTANCE),
        ("a worker beyond the world", Key { worker_id: Some(1), ..good() }, INSTANCE),
        ("no world", Key { world_size: 0, ..good() }, INSTANCE),
        ("another world", Key { world_size: 2, ..good() }, INSTANCE),
        ("a huge world", Key { world_size: u32::MAX, ..good() }, INSTANCE),
        ("another model", Key { model_name: "n".into(), ..good() }, INSTANCE),
        ("a model name with a separator", Key { model_name: "m@1".into(), ..good() }, INSTANCE),
        ("a salt with a separator", Key { cache_salt: "a/b".into(), ..good() }, INSTANCE),
        ("an end within a chunk", Key { end: 17, ..good() }, INSTANCE),
        ("a start within a chunk", Key { start: 1, ..good() }, INSTANCE),
        ("an end beyond the tokens", Key { end: 48, ..good() }, INSTANCE),
        ("an end before the start", Key { start: 32, end: 16, ..good() }, INSTANCE),
        ("an end beyond everything", Key { end: u64::MAX - 15, ..good() }, INSTANCE),
    ];
    let count = i64::try_from(wrong.len()).unwrap();
    for (what, key, instance) in wrong {
        let granted = engine.prepare_store(key.clone(), instance);
        assert_eq!(granted, StoreSlots::default(), "{what}");
        assert!(!engine.commit_store(key.clone(), instance), "{what}");
        assert_eq!(engine.prepare_retrieve(key, instance), None, "{what}");
    }
    assert_eq!(engine.status("dropped_messages"), 3 * count);
    assert_eq!(engine.status("used_bytes"), 0);
    assert_eq!(engine.store(good(), INSTANCE), 2);
}

#[test]
fn a_pickle_is_refused_by_name_and_the_reservation_stays() {
    let (_server, mut engine) = server_and_engine(8);
    let reserved = engine.prepare_store(key("r", 0, 2), INSTANCE);
    assert_eq!(reserved.chunk_indices, [0, 1]);
    let commit = Request::CommitStore { key: key("r", 0, 2).into(), instance_id: INSTANCE };
    let mut frames = commit.encode(1, Dialect::Current);
    frames[4] = Bytes::from_static(b"\xc4\x06\x80\x05}\x94K\x2e");
    engine.send(&frames);
    assert_eq!(engine.reply(), Reply::Boolean(false));
    assert_eq!(engine.status("dropped_pickle"), 1);
    assert_eq!(engine.lookup(key("s", 0, 2)), 0);
    assert!(engine.commit_store(key("r", 0, 2), INSTANCE));
}

#[test]
fn a_salt_separates_tenants() {
    let (_server, mut engine) = server_and_engine(8);
    let of = |request: &str, tenant: &str| Key { cache_salt: tenant.into(), ..key(request, 0, 2) };
    assert_eq!(engine.store(of("r", "a"), INSTANCE), 2);
    assert_eq!(engine.lookup(of("s", "b")), 0);
    assert_eq!(engine.lookup(of("t", "")), 0);
    assert_eq!(engine.prepare_retrieve(of("u", "b"), INSTANCE), None);
    assert_eq!(engine.lookup(of("v", "a")), 2);
}

#[test]
fn the_salt_is_dropped_at_no_operation() {
    let (_server, mut engine) = server_and_engine(8);
    let of = |request: &str, tenant: &str| Key { cache_salt: tenant.into(), ..key(request, 0, 2) };
    let all = |key: Key| RequestKey::from(Key { worker_id: None, ..key });
    assert_eq!(engine.prepare_store(of("r", "a"), INSTANCE).slots.slots.len(), 2);
    assert!(!engine.commit_store(of("r", "b"), INSTANCE), "a commit");
    engine.call(&Request::AbandonStore { key: of("r", "b").into(), instance_id: INSTANCE });
    assert_eq!(engine.status("slots_writing"), 2, "an abandoned store");
    engine.call(&Request::AbandonStore { key: of("r", "a").into(), instance_id: INSTANCE });
    assert_eq!(engine.status("slots_writing"), 0);
    assert_eq!(engine.store(of("r", "a"), INSTANCE), 2);

    assert_eq!(engine.lookup(of("s", "b")), 0, "a lookup");
    assert_eq!(engine.lookup(of("s", "a")), 2);
    engine.call(&Request::FreeLookupLocks { key: all(of("s", "b")), tp_size: 1 });
    assert_eq!(engine.status("leases"), 2, "leases given back");
    engine.call(&Request::FreeLookupLocks { key: all(of("s", "a")), tp_size: 1 });
    assert_eq!(engine.status("leases"), 0);

    assert_eq!(engine.lookup(of("t", "a")), 2);
    assert_eq!(engine.prepare_retrieve(of("t", "b"), INSTANCE), None, "a load");
    assert!(engine.prepare_retrieve(of("t", "a"), INSTANCE).is_some());
    engine.call(&Request::CommitRetrieve { key: of("t", "b").into(), instance_id: INSTANCE });
    assert_eq!(engine.status("slots_reading"), 2, "a load's end");
    engine.call(&Request::CommitRetrieve { key: of("t", "a").into(), instance_id: INSTANCE });
    assert_eq!(engine.status("slots_reading"), 0);

    for (tenant, hits) in [("a", 2), ("b", 0), ("", 0)] {
        let reply = engine.call(&Request::Explain { key: all(of("u", tenant)) });
        let Reply::Explanation(explanation) = reply else { panic!("{reply:?}") };
        assert_eq!(explanation.hit_chunks, hits, "{tenant:?}");
    }
}

#[test]
fn two_peers_that_store_the_same_prefix_at_once_do_not_get_in_each_others_way() {
    let (server, mut engine) = server_and_engine(8);
    let mut other = Client::connect(server.address());
    other.register(8, layout("m"));
    assert_eq!(engine.prepare_store(key("a", 0, 2), INSTANCE).chunk_indices, [0, 1]);
    let granted = other.prepare_store(key("b", 0, 4), 8);
    assert_eq!(granted.chunk_indices, [2, 3], "what is being written is left to its writer");
    assert!(other.commit_store(key("b", 0, 4), 8));
    assert_eq!(other.lookup(key("c", 0, 4)), 0, "the prefix is not there yet");
    assert!(engine.commit_store(key("a", 0, 2), INSTANCE));
    assert_eq!(other.lookup(key("d", 0, 4)), 4);
}

#[test]
fn the_largest_prompts_are_answered_within_a_message() {
    // Chunks of one token, and more of them than an answer has room for.
    const CHUNKS: u32 = 70_000;
    let options = StoreOptions {
        shared_name: None, // reserved at once, never touched
        ..store_options(1, u64::from(CHUNKS) * PAGE)
    };
    let server = start(options);
    let mut engine = Client::connect(server.address());
    engine.hello();
    engine.register(INSTANCE, layout("m"));
    let of = |request: &str, end: u32| Key {
        token_ids: (0..CHUNKS).collect(),
        end: end.into(),
        ..key(request, 0, 0)
    };
    let granted = engine.prepare_store(of("r", CHUNKS), INSTANCE);
    let fits = 65_536;
    assert_eq!(granted.slots.slots.len(), fits as usize);
    assert_eq!(granted.refused, Some(CHUNKS - fits));
    assert!(engine.commit_store(of("r", CHUNKS), INSTANCE));
    assert_eq!(engine.store(of("s", CHUNKS), INSTANCE), (CHUNKS - fits) as usize, "the rest");
    assert_eq!(engine.lookup(of("t", CHUNKS)), u64::from(CHUNKS));
    assert_eq!(engine.prepare_retrieve(of("t", CHUNKS), INSTANCE), None);
    let slots = engine.prepare_retrieve(of("t", fits), INSTANCE).unwrap();
    assert_eq!(slots.slots.len(), fits as usize);
}
