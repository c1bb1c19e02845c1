//! Random bytes and broken recordings: nothing panics, nothing is reserved beyond a small multiple
//! of the input, and what decodes encodes to what decodes again. `KVFERRY_FUZZ_CASES` sets the
//! number of cases of each test.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod recorded;

use std::ops::Range;
use std::sync::{Arc, LazyLock};

use allocation_counter::measure;
use bytes::{Bytes, BytesMut};
use kvferry_core::cache::Slot;
use kvferry_core::events::{EventKind, EventSpace, Events, KvEvent, KvEventBatch, KvEventRecord};
use kvferry_core::explain::{
    Evictor, Explanation, MissingChunk, ObjectLayout, Removal, RemovalCause,
};
use kvferry_core::key::Dtype;
use kvferry_core::kv_descriptors::{EngineGroup, KvDescriptor, KvRegistration, KvStorage};
use kvferry_wire::message::{Control, Slots};
use kvferry_wire::zmtp::{Config, Connection, Event, SocketType};
use kvferry_wire::{Dialect, Header, Operation, Reply, Request};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use recorded::Recorded;

const CASES: u32 = 20_000;
/// Bytes that a call may reserve for each byte of its input: a list of one-byte integers becomes
/// eight times as long, and a list that a map repeats is refused only after it was read.
const RESERVED_PER_BYTE: u64 = 16;
/// Bytes that may be reserved in any case: lists of at most 1024 names.
const RESERVED: u64 = 128 << 10;

static RECORDED: LazyLock<Vec<Recorded>> = LazyLock::new(|| {
    let mut messages = recorded::messages();
    // Long prompts only slow this down.
    messages.retain(|m| m.frames.iter().map(Bytes::len).sum::<usize>() < 4096);
    assert!(!messages.is_empty());
    messages.extend(ours());
    messages
});

/// Messages of ours with lists that go together or lie in lists, which no recording has.
fn ours() -> Vec<Recorded> {
    let space = |name: &str| {
        let (model_name, cache_salt) = (name.to_owned(), "tenant".to_owned());
        Arc::new(EventSpace { model_name, world_size: 2, cache_salt })
    };
    let event =
        |kind, parent, space| KvEvent { kind, chunk: [1; 32], parent, rank: 1, space, at_ms: 9 };
    let events = Events {
        incarnation: [7; 16],
        first: 1,
        events: vec![
            event(EventKind::Stored, None, space("a")),
            event(EventKind::Removed, Some([2; 32]), space("b")),
        ],
        lost: false,
    };
    let record = |kind, block_hashes, parent_block_hash| KvEventRecord {
        seq: 7,
        kind,
        model_name: "m".to_owned(),
        block_hashes,
        parent_block_hash,
        token_ids: [0, 70_000, u32::MAX].into(),
    };
    let batch = KvEventBatch {
        enabled: true,
        incarnation: 5,
        next_cursor: 8,
        lost: false,
        events: vec![
            record(EventKind::Stored, vec![[1; 32]], Some([2; 32])),
            record(EventKind::Removed, vec![[1; 32], [2; 32]], None),
        ],
    };
    let missing = MissingChunk {
        chunk: [3; 32],
        missing_ranks: vec![1],
        writing_ranks: vec![3],
        other_salts: 4,
        other_models: vec!["n".to_owned()],
        other_world_sizes: vec![2],
        other_layouts: vec![ObjectLayout { shape: vec![2, 16], dtype: "half".to_owned() }],
        removed: Some(Removal {
            cause: RemovalCause::Evicted,
            at_ms: 5,
            by: Some(Evictor { tenant: "2a".into(), own: false }),
        }),
        log_since_ms: 4,
    };
    let explanation =
        Explanation { chunks: 9, hit_chunks: 8, registered: true, missing: Some(missing) };
    let slot = |offset, checksum| Slot { offset, length: 512, generation: Some(9), checksum };
    let slots = Slots {
        slots: vec![slot(0, Some(u64::MAX)), slot(4096, None), slot(8192, Some(0))],
        shape: vec![2, 16],
        dtype: "half".to_owned(),
    };
    let checksums = Request::Checksums {
        instance_id: 1,
        offsets: vec![0, 4096],
        generations: vec![1, 1 << 40],
        checksums: vec![u64::MAX, 0],
    };
    let tensor = KvDescriptor {
        storage: KvStorage::Segment { shm_name: "/lmcache_kv_1_0".into(), bytes: 1 << 20 },
        dtype: Dtype::new("half").unwrap(),
        shape: vec![2, 8, 16, 2, 4],
        stride: vec![1024, 128, 8, 4, 1],
        storage_offset: 0,
    };
    let group = EngineGroup {
        engine_group_id: 0,
        layer_indices: vec![0, 1],
        tokens_per_block: 16,
        sw_size_tokens: -1,
        extra_object_group_tag: 0,
        recurrent_state: false,
    };
    let registration = KvRegistration {
        model_name: "m".into(),
        world_size: 1,
        engine_type: "vllm".into(),
        kv_layout: Some("NHD".into()),
        groups: vec![group],
        layers: vec![tensor.clone(), tensor],
    };
    let register = Request::RegisterKvCache { instance_id: 1, registration };
    let message = |request, frames| {
        let (file, operation) = ("", String::new());
        Recorded { file, step: 0, request, operation, frames }
    };
    let replies = [
        (&b"\xaekvferry.events"[..], Reply::Events(events)),
        (b"\xafkvferry.explain", Reply::Explanation(explanation)),
        (b"\xb3subscribe_kv_events", Reply::KvEvents(batch)),
        (b"\xb0prepare_retrieve", Reply::RetrieveSlots(Some(slots))),
    ];
    let replies = replies.map(|(operation, reply)| {
        let frames = vec![
            Bytes::from_static(b"\x01"),
            Bytes::from_static(operation),
            reply.encode().unwrap(),
        ];
        let (header, payload) = Header::decode(&frames).unwrap();
        assert_eq!(Reply::decode(header.operation, payload).unwrap(), reply);
        message(false, frames)
    });
    let requests = [checksums, register].map(|it| message(true, it.encode(1, Dialect::Current)));
    requests.into_iter().chain(replies).collect()
}

fn config() -> ProptestConfig {
    let cases = std::env::var("KVFERRY_FUZZ_CASES").ok().and_then(|cases| cases.parse().ok());
    ProptestConfig {
        cases: cases.unwrap_or(CASES),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// What is done to bytes.
#[derive(Debug, Clone)]
enum Mutation {
    Set(Index, u8),
    Insert(Index, Vec<u8>),
    Delete(Index, usize),
    Truncate(Index),
    Repeat(Index, usize, usize),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    // Headers that announce much, and the edges of what is stepped over.
    let announcements = prop_oneof![
        Just(b"\xdd\xff\xff\xff\xff".to_vec()),
        Just(b"\xdf\x7f\xff\xff\xff".to_vec()),
        Just(b"\xdb\xff\xff\xff\xff".to_vec()),
        Just(b"\xc6\xff\xff\xff\xff".to_vec()),
        Just(b"\xc9\xff\xff\xff\xff\x01".to_vec()),
        Just(b"\xdc\xff\xff".to_vec()),
        Just(b"\x91".repeat(40)),
        Just(b"\x81\xa1x".repeat(40)),
        Just(b"\x02\x3f\xff\xff\xff\xff\xff\xff\xff".to_vec()),
        vec(any::<u8>(), 1..12),
    ];
    prop_oneof![
        (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Mutation::Set(at, byte)),
        (any::<Index>(), announcements).prop_map(|(at, bytes)| Mutation::Insert(at, bytes)),
        (any::<Index>(), 1..16_usize).prop_map(|(at, n)| Mutation::Delete(at, n)),
        any::<Index>().prop_map(Mutation::Truncate),
        (any::<Index>(), 1..64_usize, 1..64_usize)
            .prop_map(|(at, n, times)| Mutation::Repeat(at, n, times)),
    ]
}

fn mutate(bytes: &mut Vec<u8>, mutation: &Mutation) {
    let range = |at: &Index, n: usize| -> Range<usize> {
        let start = at.index(bytes.len() + 1);
        start..bytes.len().min(start + n)
    };
    match mutation {
        Mutation::Set(at, byte) => {
            let range = range(at, 1);
            bytes[range].fill(*byte);
        }
        Mutation::Insert(at, inserted) => {
            let range = range(at, 0);
            bytes.splice(range, inserted.iter().copied());
        }
        Mutation::Delete(at, n) => {
            let range = range(at, *n);
            bytes.drain(range);
        }
        Mutation::Truncate(at) => bytes.truncate(range(at, 0).start),
        Mutation::Repeat(at, n, times) => {
            let range = range(at, *n);
            let repeated = bytes[range.clone()].repeat(*times);
            bytes.splice(range, repeated);
        }
    }
}

/// Runs `decode` and checks what it reserves for so many bytes.
fn bounded<T>(input: usize, decode: impl FnOnce() -> T) -> T {
    let mut value = None;
    let info = measure(|| value = Some(decode()));
    let bound = RESERVED + RESERVED_PER_BYTE * input as u64;
    assert!(info.bytes_total <= bound, "{} bytes reserved for {input}", info.bytes_total);
    value.unwrap()
}

/// Decodes a message both as a request and as a reply. What decodes must encode to a message that
/// decodes and encodes to the same.
fn check_message(frames: &[Bytes]) {
    let input = frames.iter().map(Bytes::len).sum();
    let _ = bounded(input, || Control::decode(frames).is_some());
    let Ok((header, payload)) = bounded(input, || Header::decode(frames)) else { return };
    check_request(header.operation, payload);
    if let Ok(reply) = bounded(input, || Reply::decode(header.operation, payload)) {
        let encoded = header.reply(&reply);
        let again = Reply::decode(header.operation, &encoded[2..]).unwrap();
        assert_eq!(header.reply(&again), encoded);
    }
}

fn check_request(operation: Operation, payload: &[Bytes]) {
    let input = payload.iter().map(Bytes::len).sum();
    let Ok(request) = bounded(input, || Request::decode(operation, payload)) else { return };
    let encoded = request.encode(0, Dialect::Current);
    let again = Request::decode(operation, &encoded[2..]).unwrap();
    assert_eq!(again.encode(0, Dialect::Current), encoded);
}

/// Feeds a stream in pieces to a connection, and the messages that come out to the grammar.
fn check_stream(mut connection: Connection, pieces: &[&[u8]]) {
    let mut input = BytesMut::new();
    let mut output = BytesMut::new();
    for piece in pieces {
        input.extend_from_slice(piece);
        loop {
            let length = input.len();
            match bounded(length, || connection.receive(&mut input, &mut output)) {
                Ok(Some(Event::Message(frames))) => check_message(&frames),
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
}

/// A router after its handshake with a client, and what a client sends next.
fn connected(messages: &[&Recorded]) -> (Connection, Vec<u8>) {
    let (mut to_server, mut to_client) = (BytesMut::new(), BytesMut::new());
    let mut client = Connection::new(Config::null(SocketType::Dealer), &mut to_server);
    let mut server = Connection::new(Config::null(SocketType::Router), &mut to_client);
    server.receive(&mut to_server, &mut to_client).unwrap();
    client.receive(&mut to_client, &mut to_server).unwrap();
    server.receive(&mut to_server, &mut to_client).unwrap();
    for message in messages {
        client.send(&message.frames, &mut to_server).unwrap();
    }
    (server, to_server.to_vec())
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn broken_recorded_frames(
        message in any::<Index>(),
        mutations in vec((any::<Index>(), mutation()), 1..6),
    ) {
        let message = message.get(&RECORDED);
        let mut frames: Vec<Vec<u8>> = message.frames.iter().map(|frame| frame.to_vec()).collect();
        for (frame, mutation) in &mutations {
            let frame = frame.index(frames.len());
            mutate(&mut frames[frame], mutation);
        }
        let frames: Vec<Bytes> = frames.into_iter().map(Bytes::from).collect();
        check_message(&frames);
    }

    #[test]
    fn frames_of_one_operation_under_another(
        message in any::<Index>(),
        operation in any::<Index>(),
    ) {
        let payload = message.get(&RECORDED).frames.get(2..).unwrap_or_default();
        check_request(*operation.get(&Operation::ALL), payload);
    }

    #[test]
    fn random_frames(
        operation in any::<Index>(),
        payload in vec(vec(any::<u8>(), 0..200).prop_map(Bytes::from), 0..4),
    ) {
        let operation = *operation.get(&Operation::ALL);
        check_request(operation, &payload);
        let name = Request::Noop.encode(0, Dialect::Current);
        let header = [name, payload].concat();
        check_message(&header);
    }

    #[test]
    fn random_streams(bytes in vec(any::<u8>(), 0..300), cut in any::<Index>(), fresh: bool) {
        let (first, second) = bytes.split_at(cut.index(bytes.len() + 1));
        let connection = if fresh {
            Connection::new(Config::null(SocketType::Router), &mut BytesMut::new())
        } else {
            connected(&[]).0
        };
        check_stream(connection, &[first, second]);
    }

    #[test]
    fn broken_recorded_streams(
        messages in vec(any::<Index>(), 1..5),
        mutations in vec(mutation(), 0..6),
        cut in any::<Index>(),
    ) {
        let messages: Vec<&Recorded> = messages.iter().map(|index| index.get(&RECORDED)).collect();
        let (connection, mut bytes) = connected(&messages);
        mutations.iter().for_each(|mutation| mutate(&mut bytes, mutation));
        let (first, second) = bytes.split_at(cut.index(bytes.len() + 1));
        check_stream(connection, &[first, second]);
    }

    #[test]
    fn broken_handshakes(mutations in vec(mutation(), 1..4), cut in any::<Index>()) {
        let mut output = BytesMut::new();
        let mut client = Connection::new(Config::null(SocketType::Dealer), &mut output);
        let mut input = BytesMut::new();
        Connection::new(Config::null(SocketType::Router), &mut input);
        client.receive(&mut input, &mut output).unwrap();
        let mut bytes = output.to_vec();
        mutations.iter().for_each(|mutation| mutate(&mut bytes, mutation));
        let (first, second) = bytes.split_at(cut.index(bytes.len() + 1));
        let server = Connection::new(Config::null(SocketType::Router), &mut BytesMut::new());
        check_stream(server, &[first, second]);
    }
}
