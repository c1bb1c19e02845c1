//! Every recorded message of LMCache's transfer modes decodes, and encodes to the same bytes.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod recorded;

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use kvferry_core::cache::Slot;
use kvferry_core::events::{EventKind, EventSpace, Events, KvEvent, KvEventBatch, KvEventRecord};
use kvferry_core::explain::{
    Evictor, Explanation, MissingChunk, ObjectLayout, Removal, RemovalCause,
};
use kvferry_core::key::Key;
use kvferry_core::kv_descriptors::{CudaStorage, KvRegistration, KvStorage};
use kvferry_wire::message::{
    Control, EXTENSION, Hello, PIECE_MAX, Piece, Slots, StoreSlots, Value,
};
use kvferry_wire::{Dialect, Header, MessageError, Operation, Reply, Request, RequestKey};
use recorded::Recorded;

fn decode_request(frames: &[Bytes]) -> Result<(Header, Request), MessageError> {
    let (header, payload) = Header::decode(frames)?;
    let request = Request::decode(header.operation, payload)?;
    Ok((header, request))
}

fn encode_again(message: &Recorded) -> Result<Vec<Bytes>, MessageError> {
    if let Some(control) = Control::decode(&message.frames) {
        let (uid, control) = control?;
        Ok(control.encode(uid))
    } else if message.request {
        let (header, request) = decode_request(&message.frames)?;
        let uid = rmp::decode::read_int(&mut &header.uid[..]).unwrap();
        Ok(request.encode(uid, Dialect::Current))
    } else {
        let (header, payload) = Header::decode(&message.frames)?;
        Ok(header.reply(&Reply::decode(header.operation, payload)?))
    }
}

#[test]
fn recorded_messages_encode_to_the_same_bytes() {
    let mut equal = 0;
    let mut different = Vec::new();
    let mut refused: BTreeMap<(String, &str), usize> = BTreeMap::new();
    for message in recorded::messages() {
        match encode_again(&message) {
            Ok(frames) if frames == message.frames => equal += 1,
            Ok(_) => different.push((message.file, message.step, message.operation)),
            Err(error) => *refused.entry((message.operation, error.label())).or_default() += 1,
        }
    }
    assert_eq!(equal, 457);
    let expected = [
        (50, "lookup"),            // a key with a field that nobody knows
        (54, "free_lookup_locks"), // the same key
        (58, "ping"),              // by name, where we send the id
    ]
    .map(|(step, operation)| ("extra.json", step, operation.to_owned()));
    // PyTorch's descriptors are encoded as what they say in CUDA's terms.
    let torch = [1, 2].map(|step| (CUDA, step, "register_kv_cache".to_owned()));
    let expected: Vec<_> = expected.into_iter().chain(torch).collect();
    assert_eq!(different, expected);
    let refused: Vec<_> =
        refused.iter().map(|((operation, label), n)| (operation.as_str(), *label, *n)).collect();
    assert_eq!(
        refused,
        [
            ("99", "unknown_operation", 1),
            ("commit_store", "pickle", 2),
            ("lookup", "out_of_range", 1), // a token id of 2^32
            ("nope", "unknown_operation", 1),
            ("ping", "frame_count", 1),
            ("prepare_retrieve", "pickle", 2),
            ("query_prefetch_status", "wrong_type", 1), // an integer for the request id
            ("register_kv_cache", "memory_type", 2),
            ("register_kv_cache_engine_driven_context", "unknown_dtype", 2),
        ]
    );
}

#[test]
fn every_operation_of_lmcache_is_recorded() {
    let mut seen: Vec<Operation> = recorded::messages()
        .iter()
        .filter_map(|message| Header::decode(&message.frames).ok())
        .map(|(header, _)| header.operation)
        .collect();
    seen.sort_by_key(|operation| operation.id(Dialect::Current));
    seen.dedup();
    let mut all: Vec<Operation> = Operation::ALL
        .into_iter()
        .filter(|operation| !operation.name().starts_with("kvferry."))
        .collect();
    all.sort_by_key(|operation| operation.id(Dialect::Current));
    assert_eq!(seen, all);
}

#[test]
fn a_key_with_unknown_and_missing_fields_takes_the_defaults() {
    let messages = recorded::messages();
    let message = messages.iter().find(|m| m.file == "extra.json" && m.step == 50).unwrap();
    let (_, Request::Lookup { key, tp_size }) = decode_request(&message.frames).unwrap() else {
        panic!("{message}");
    };
    assert_eq!((key.key.model_name.as_str(), key.key.world_size), ("tiny/tp2", 2));
    assert_eq!((key.key.token_ids.len(), key.key.start, key.key.end), (32, 0, 16));
    assert_eq!((key.key.cache_salt.as_str(), key.configs, tp_size), ("", None, 2));
}

#[test]
fn a_registration_of_memory_is_what_its_engine_said() {
    let messages = recorded::messages();
    let file = "lmcache_bench_lmcache_driven_cpu.json";
    let message = messages.iter().find(|m| m.file == file && m.step == 2).unwrap();
    let (_, Request::RegisterKvCache { instance_id, registration }) =
        decode_request(&message.frames).unwrap()
    else {
        panic!("{message}");
    };
    assert_eq!((instance_id, registration.layers.len(), registration.groups.len()), (1000, 32, 1));
    let last = &registration.layers[31];
    let segment = KvStorage::Segment { shm_name: "/lmcache_kv_15177_31".into(), bytes: 64 << 20 };
    assert_eq!(last.storage, segment);
    assert_eq!(last.shape, [2, 1024, 16, 8, 128]);
    let memory = registration.memory(256).unwrap();
    let object = memory.layout.registration(&registration.model_name, registration.world_size, 256);
    assert_eq!(object.shape(256), [2, 32, 256, 1024], "as its engine-driven mode has it");
    assert_eq!(object.dtype.name(), "float16");
}

/// Encoded by LMCache's own structs, on a machine without a GPU.
const CUDA: &str = "lmcache_driven_cuda.json";

fn cuda_registration(step: u64) -> Result<KvRegistration, MessageError> {
    let messages = recorded::messages();
    let message = messages.iter().find(|m| m.file == CUDA && m.step == step).unwrap();
    match decode_request(&message.frames)?.1 {
        Request::RegisterKvCache { registration, .. } => Ok(registration),
        other => panic!("{other:?}"),
    }
}

#[test]
fn memory_of_a_gpu_is_what_lmcaches_descriptors_say() {
    let handle: Vec<u8> = (0xa0..0xe0).collect();
    let layer_bytes = 2 * 12 * 4 * 3 * 4 * 2;
    for step in [0, 1, 2] {
        let registration = cuda_registration(step).unwrap();
        assert_eq!(registration.layers.len(), 2);
        for (layer, offset) in registration.layers.iter().zip([512, 8192]) {
            let part = CudaStorage {
                device_uuid: *b"fake-cuda-devic\0",
                handle: handle.clone().try_into().unwrap(),
                offset,
                bytes: layer_bytes,
            };
            assert_eq!(layer.storage, KvStorage::Cuda(Box::new(part)), "step {step}");
            assert_eq!(layer.shape, [2, 12, 4, 3, 4]);
            assert_eq!((layer.dtype.name(), layer.storage_offset), ("bfloat16", 0));
        }
        let memory = registration.memory(16).unwrap();
        assert_eq!((memory.layout.num_blocks, memory.layout.block_size), (12, 4));
        let plane = layer_bytes / 2;
        assert_eq!(memory.arrays, [(0, 512), (0, 512 + plane), (0, 8192), (0, 8192 + plane)]);
    }
    for (step, kind) in [(3, "expandable segments"), (4, "cuda_vmm")] {
        let error = cuda_registration(step).unwrap_err();
        assert_eq!(error.label(), "memory_type");
        assert!(error.to_string().contains(kind), "{error}");
        assert!(error.to_string().contains("expandable_segments:False"), "{error}");
    }
}

#[test]
fn an_operation_goes_by_name_as_well_and_its_frame_is_echoed() {
    let messages = recorded::messages();
    let named: Vec<_> = messages
        .iter()
        .filter(|m| m.file == "extra.json" && m.operation == "ping" && m.frames[1].len() > 1)
        .collect();
    let (header, request) = decode_request(&named[0].frames).unwrap();
    assert_eq!(request, Request::Ping { instance_id: None });
    assert_eq!(header.reply(&Reply::Boolean(true)), named[1].frames);
}

#[test]
fn request_configs_are_kept_verbatim() {
    let messages = recorded::messages();
    let message = messages.iter().find(|m| m.file == "roundtrip_shm.json" && m.step == 72).unwrap();
    let (_, Request::Lookup { key, .. }) = decode_request(&message.frames).unwrap() else {
        panic!("{message}");
    };
    assert_eq!(key.key.cache_salt, "tenantA");
    assert_eq!(&key.configs.unwrap()[..], b"\x81\xb0lmcache.tag.user\xa2u1");
}

#[test]
fn the_salt_is_dropped_by_neither_end_of_the_wire() {
    let key = || {
        let key = Key {
            model_name: "m".into(),
            world_size: 1,
            worker_id: None,
            token_ids: (0..16).collect(),
            start: 0,
            end: 16,
            request_id: "r".into(),
            cache_salt: "tenant".into(),
            num_kv_readers: 1,
        };
        RequestKey::from(key)
    };
    for request in [
        Request::Lookup { key: key(), tp_size: 1 },
        Request::FreeLookupLocks { key: key(), tp_size: 1 },
        Request::PrepareStore { key: key(), instance_id: 1 },
        Request::CommitStore { key: key(), instance_id: 1 },
        Request::AbandonStore { key: key(), instance_id: 1 },
        Request::PrepareRetrieve { key: key(), instance_id: 1 },
        Request::CommitRetrieve { key: key(), instance_id: 1 },
        Request::Store { key: key(), instance_id: 1, block_ids: Vec::new(), event: Box::default() },
        Request::Retrieve {
            key: key(),
            instance_id: 1,
            block_ids: vec![vec![3, 70_000]],
            event: (*b"event").into(),
            skip_first_n_tokens: 16,
        },
        Request::Explain { key: key() },
    ] {
        let frames = request.encode(7, Dialect::Current);
        let salted = b"\xaacache_salt\xa6tenant";
        assert!(frames[2].windows(salted.len()).any(|bytes| bytes == salted), "{request:?}");
        assert_eq!(decode_request(&frames).unwrap().1, request);
    }
}

#[test]
fn a_stream_is_told_two_words_and_no_others() {
    let uid = Bytes::from_static(b"\x07");
    for (control, word) in [(Control::Ack, "ack"), (Control::Cancel, "cancel")] {
        let frames = control.encode(&uid);
        assert_eq!(frames, [uid.clone(), Bytes::new(), word.into()]);
        assert_eq!(Control::decode(&frames), Some(Ok((&uid, control))));
    }
    let frames = |words: &[&'static str]| -> Vec<Bytes> {
        [uid.clone()].into_iter().chain(words.iter().map(|word| Bytes::from(*word))).collect()
    };
    for words in [&[""][..], &["", ""], &["", "Ack"], &["", "ack", "ack"]] {
        assert_eq!(Control::decode(&frames(words)), Some(Err(MessageError::Control)), "{words:?}");
    }
    for words in [&[][..], &["ping", "ack"]] {
        assert_eq!(Control::decode(&frames(words)), None, "{words:?}");
    }
}

/// Operations in the order of their ids, and the first id of each run of ids without a gap; read from
/// the packages of LMCache 0.4.7, 0.5.2, 0.5.4 and 0.5.6.
#[test]
fn operations_have_the_ids_of_each_release() {
    let operations = ["lookup", "query_prefetch_status", "wait_prefetch_status"];
    let rest = [
        "free_lookup_locks",
        "end_session",
        "register_kv_cache_engine_driven_context",
        "unregister_kv_cache_engine_driven_context",
        "prepare_store",
        "commit_store",
        "prepare_retrieve",
        "commit_retrieve",
        "clear",
        "get_chunk_size",
        "ping",
        "report_block_allocation",
        "noop",
    ];
    let driven =
        [(1, "register_kv_cache"), (2, "unregister_kv_cache"), (6, "store"), (7, "retrieve")];
    for (dialect, lookups, others, experimental) in [
        (Dialect::Lmcache047, &operations[..2], 8, None),
        (Dialect::Lmcache050, &operations[..], 9, None),
        (Dialect::Lmcache053, &operations[..], 12, Some(40)),
        (Dialect::Current, &operations[..], 12, Some(32)),
    ] {
        let first = if others == 12 { 8 } else { 5 };
        let mut expected: Vec<(u64, &str)> = Vec::new();
        expected.extend(driven.iter().filter(|_| others == 12));
        expected.extend((first..).zip(lookups.iter().copied()));
        expected.extend((others..).zip(rest));
        expected.extend(experimental.map(|id| (id, "get_experimental")));
        let ids = |id| Some((id, Operation::from_id(id, dialect)?.name()));
        assert_eq!((0..256).filter_map(ids).collect::<Vec<_>>(), expected, "{dialect:?}");
    }
}

#[test]
fn a_request_differs_between_releases_in_its_id_alone() {
    for message in recorded::messages() {
        let Ok((_, request)) = decode_request(&message.frames) else { continue };
        let frames = request.encode(7, Dialect::Current);
        for dialect in [Dialect::Lmcache053, Dialect::Lmcache050, Dialect::Lmcache047] {
            let old = request.encode(7, dialect);
            assert_eq!((&old[0], &old[2..]), (&frames[0], &frames[2..]));
            if request.operation().id(dialect).is_some() {
                let (header, _) = Header::decode_in(dialect, &old).unwrap();
                assert_eq!(header.operation, request.operation());
            }
        }
    }
}

fn events() -> Events {
    let space = |name: &str| {
        let (model_name, cache_salt) = (name.to_owned(), "tenant".to_owned());
        Arc::new(EventSpace { model_name, world_size: 2, cache_salt })
    };
    let event = |kind, byte, parent, rank, space: &Arc<EventSpace>| KvEvent {
        kind,
        chunk: [byte; 32],
        parent,
        rank,
        space: Arc::clone(space),
        at_ms: 1_800_000_000_000 + u64::from(byte),
    };
    let (a, b) = (space("a"), space("b"));
    Events {
        incarnation: [7; 16],
        first: 1 << 33,
        events: vec![
            event(EventKind::Stored, 1, None, 0, &b),
            event(EventKind::Stored, 2, Some([1; 32]), 254, &a),
            event(EventKind::Removed, 1, None, 1, &b),
        ],
        lost: true,
    }
}

fn batch() -> KvEventBatch {
    let record = |seq, kind, block_hashes, parent_block_hash, tokens: &[u32]| KvEventRecord {
        seq,
        kind,
        model_name: "m".to_owned(),
        block_hashes,
        parent_block_hash,
        token_ids: tokens.into(),
    };
    KvEventBatch {
        enabled: true,
        incarnation: u64::MAX >> 1,
        next_cursor: 1 << 33,
        lost: true,
        events: vec![
            record(7, EventKind::Stored, vec![[1; 32]], None, &[0, 70_000, u32::MAX]),
            record(8, EventKind::Stored, vec![[2; 32]], Some([1; 32]), &[1]),
            record(9, EventKind::Removed, vec![[1; 32], [2; 32]], None, &[]),
        ],
    }
}

fn missing() -> MissingChunk {
    MissingChunk {
        chunk: [3; 32],
        missing_ranks: vec![1, 2],
        writing_ranks: vec![3],
        other_salts: 4,
        other_models: vec!["n".to_owned(), "o".to_owned()],
        other_world_sizes: vec![2, 8],
        other_layouts: vec![ObjectLayout { shape: vec![2, 16], dtype: "half".to_owned() }],
        removed: Some(Removal {
            cause: RemovalCause::Damaged,
            at_ms: 5,
            by: Some(Evictor { tenant: "2a".into(), own: true }),
        }),
        log_since_ms: 4,
    }
}

fn piece(bytes: usize) -> Piece {
    let fill = |data: &mut [u8]| {
        (0..).zip(data).for_each(|(at, byte): (u32, _)| *byte = at.to_le_bytes()[0]);
        Ok::<_, ()>(())
    };
    Piece::fill(bytes, fill).unwrap()
}

fn explanation(missing: Option<MissingChunk>) -> Explanation {
    Explanation { chunks: 9, hit_chunks: 8, registered: true, missing }
}

/// Replies of the operations that no LMCache has, and what a hello adds to the others.
#[test]
fn our_own_messages_survive_the_wire() {
    let slot = |offset, generation| Slot { offset, length: 1024, generation, checksum: None };
    let slots = Slots {
        slots: vec![slot(0, Some(7)), slot(4096, Some(1 << 40))],
        shape: vec![2, 2, 16, 8],
        dtype: "bfloat16".to_owned(),
    };
    let with_checksums = |checksums: [Option<u64>; 2]| {
        let mut slots = slots.clone();
        for (slot, checksum) in slots.slots.iter_mut().zip(checksums) {
            slot.checksum = checksum;
        }
        slots
    };
    let store = StoreSlots { slots: slots.clone(), chunk_indices: vec![0, 3], refused: Some(2) };
    let replies = [
        (Operation::PrepareStore, Reply::StoreSlots(Some(store))),
        (
            Operation::PrepareStore,
            Reply::StoreSlots(Some(StoreSlots { refused: Some(4), ..StoreSlots::default() })),
        ),
        (Operation::PrepareRetrieve, Reply::RetrieveSlots(Some(with_checksums([Some(0), None])))),
        (
            Operation::PrepareRetrieve,
            Reply::RetrieveSlots(Some(with_checksums([Some(1 << 20), Some(u64::MAX)]))),
        ),
        (Operation::PrepareRetrieve, Reply::RetrieveSlots(Some(slots))),
        (
            Operation::Hello,
            Reply::Hello(Hello {
                boot_token: [9; 16],
                version: "0.1.0".to_owned(),
                pid: 4711,
                admin: false,
                read_hold_ms: 1000,
                segment: Some("a:1:2".to_owned()),
            }),
        ),
        (Operation::GetExperimental, Reply::Names(vec![EXTENSION.to_owned()])),
        (
            Operation::Status,
            Reply::Status(vec![
                ("objects".to_owned(), Value::Integer(3)),
                ("drift".to_owned(), Value::Integer(-3)),
                ("hit_ratio".to_owned(), Value::Float(0.5)),
                ("policy".to_owned(), Value::Text("lru".to_owned())),
            ]),
        ),
        (Operation::RegisterKvCache, Reply::None),
        (Operation::Store, Reply::Copied { event: Bytes::new(), done: false }),
        (Operation::AbandonStore, Reply::None),
        (Operation::Confirm, Reply::Boolean(false)),
        (Operation::Discard, Reply::Integer(1)),
        (Operation::Checksums, Reply::Integer(2)),
        (Operation::Frames, Reply::None),
        (Operation::Write, Reply::Boolean(true)),
        (Operation::Read, Reply::Piece(Some(piece(PIECE_MAX)))),
        (Operation::Read, Reply::Piece(Some(piece(0)))),
        (Operation::Read, Reply::Piece(None)),
        (Operation::Events, Reply::Events(events())),
        (Operation::Explain, Reply::Explanation(explanation(Some(missing())))),
        (Operation::Explain, Reply::Explanation(explanation(None))),
        (Operation::SubscribeKvEvents, Reply::KvEvents(batch())),
        (Operation::SubscribeKvEvents, Reply::None),
    ];
    for (operation, reply) in replies {
        let payload: Vec<Bytes> = reply.encode().into_iter().collect();
        assert_eq!(Reply::decode(operation, &payload).unwrap(), reply);
    }

    let requests = [
        Request::Hello,
        Request::Status,
        Request::Confirm { instance_id: 5, offsets: vec![0, 4096], generations: vec![1, 2] },
        Request::Discard { instance_id: 5, offsets: vec![0, 4096], generations: vec![1, 2] },
        Request::Checksums {
            instance_id: 5,
            offsets: vec![0, 4096],
            generations: vec![1, 2],
            checksums: vec![0, u64::MAX],
        },
        Request::Events { cursor: 1 << 40, max: 1000 },
        Request::Frames,
        Request::Write { instance_id: 5, offset: 4096, generation: 2, at: 9, piece: piece(3) },
        Request::Read { instance_id: 5, offset: 4096, generation: 2, at: 9, bytes: 10 },
    ];
    for request in requests {
        let frames = request.encode(300, Dialect::Current);
        let (header, decoded) = decode_request(&frames).unwrap();
        assert_eq!((header.operation, decoded), (request.operation(), request));
        assert_eq!(header.operation_frame[1..], *header.operation.name().as_bytes(), "by name");
    }
}

#[test]
fn without_a_hello_a_reply_is_lmcaches() {
    for message in recorded::messages().iter().filter(|message| !message.request) {
        let Ok((header, payload)) = Header::decode(&message.frames) else { continue };
        let Ok(mut reply) = Reply::decode(header.operation, payload) else { continue };
        match &mut reply {
            Reply::StoreSlots(Some(store)) => {
                store.refused = Some(1);
                store.slots.slots.iter_mut().for_each(|slot| slot.generation = Some(1));
            }
            Reply::RetrieveSlots(Some(slots)) => {
                for slot in &mut slots.slots {
                    slot.generation = Some(1);
                    slot.checksum = Some(2);
                }
            }
            _ => continue,
        }
        assert_ne!(header.reply(&reply), message.frames);
        assert_eq!(header.reply(&reply.plain()), message.frames);
    }
}
