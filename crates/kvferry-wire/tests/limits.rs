//! Limits come before allocation: what a peer announces is checked before anything is reserved for
//! it, and what does not follow the grammar to the last byte is refused.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod recorded;

use std::sync::Arc;

use allocation_counter::measure;
use bytes::{Bytes, BytesMut};
use kvferry_core::events::{EVENT_SPACES_MAX, EVENTS_MAX, EventKind, EventSpace, Events, KvEvent};
use kvferry_core::key::{Key, MODEL_NAME_BYTES_MAX, SALT_CHARS_MAX, WORLD_SIZE_MAX};
use kvferry_wire::message::PIECE_MAX;
use kvferry_wire::zmtp::{Config, Connection, Event, Limits, SocketType, ZmtpError};
use kvferry_wire::{Dialect, Header, MessageError, Operation, Problem, Reply, Request};

/// Two connections that are through their handshake.
fn pair() -> (Connection, Connection) {
    let (mut to_server, mut to_client) = (BytesMut::new(), BytesMut::new());
    let mut client = Connection::new(Config::null(SocketType::Dealer), &mut to_server);
    let mut server = Connection::new(Config::null(SocketType::Router), &mut to_client);
    assert_eq!(server.receive(&mut to_server, &mut to_client).unwrap(), None);
    assert_eq!(client.receive(&mut to_client, &mut to_server).unwrap(), Some(Event::Ready));
    assert_eq!(server.receive(&mut to_server, &mut to_client).unwrap(), Some(Event::Ready));
    (client, server)
}

/// What a server says to these bytes, and that it reserves next to nothing for them.
fn receive(bytes: &[u8]) -> Result<Option<Event>, ZmtpError> {
    let (_, mut server) = pair();
    let mut input = BytesMut::from(bytes);
    let mut output = BytesMut::new();
    let mut result = Ok(None);
    let info = measure(|| result = server.receive(&mut input, &mut output));
    assert!(info.bytes_total < 4096, "{} bytes reserved", info.bytes_total);
    result
}

#[test]
fn announced_sizes_are_refused_before_their_bytes_arrive() {
    let limits = Limits::default();
    for announced in [1 << 62, u64::MAX, 1 << 38, limits.message_bytes_max as u64 + 1] {
        let message = [&[2], &announced.to_be_bytes()[..]].concat();
        assert_eq!(receive(&message), Err(ZmtpError::MessageTooLong(limits.message_bytes_max)));
        let command = [&[6], &announced.to_be_bytes()[..]].concat();
        assert_eq!(receive(&command), Err(ZmtpError::CommandTooLong(announced)));
    }
    let largest = [&[2], &(limits.message_bytes_max as u64).to_be_bytes()[..]].concat();
    assert_eq!(receive(&largest), Ok(None));
}

#[test]
fn a_message_has_at_most_16_frames() {
    let sixteen = [b"\x01\x01a".repeat(15), b"\x00\x01a".to_vec()].concat();
    assert!(matches!(receive(&sixteen), Ok(Some(Event::Message(frames))) if frames.len() == 16));
    // The frame too many is refused at its header.
    let seventeen = [b"\x01\x01a".repeat(16), b"\x00\x09".to_vec()].concat();
    assert_eq!(receive(&seventeen), Err(ZmtpError::TooManyFrames(16)));
    assert_eq!(receive(&b"\x01\x00".repeat(17)), Err(ZmtpError::TooManyFrames(16)));
}

#[test]
fn the_frames_of_a_message_share_its_limit() {
    let (_, mut server) = pair();
    let half = Limits::default().message_bytes_max / 2;
    let mut input = BytesMut::new();
    for _ in 0..2 {
        input.extend_from_slice(&[3]);
        input.extend_from_slice(&(half as u64).to_be_bytes());
        input.resize(input.len() + half, 0);
    }
    assert_eq!(server.unfinished(), None);
    assert_eq!(server.receive(&mut input, &mut BytesMut::new()), Ok(None));
    assert_eq!(server.unfinished(), Some(2 * half));
    input.extend_from_slice(b"\x00\x01");
    let result = server.receive(&mut input, &mut BytesMut::new());
    assert_eq!(result, Err(ZmtpError::MessageTooLong(2 * half)));
}

#[test]
fn each_message_has_the_whole_limit() {
    let (_, mut server) = pair();
    let size = Limits::default().message_bytes_max * 2 / 3;
    for _ in 0..2 {
        let mut input = BytesMut::from(&b"\x02"[..]);
        input.extend_from_slice(&(size as u64).to_be_bytes());
        input.resize(input.len() + size, 0);
        let event = server.receive(&mut input, &mut BytesMut::new()).unwrap();
        assert!(matches!(event, Some(Event::Message(_))));
        assert_eq!(server.unfinished(), None);
    }
}

#[test]
fn flags_that_mean_nothing_are_refused() {
    for flags in [0x08, 0x10, 0x20, 0x40, 0x80, 0xff, 0x05, 0x07] {
        assert_eq!(receive(&[flags, 0]), Err(ZmtpError::MalformedFrame(flags)));
    }
}

#[test]
fn we_keep_the_limits_too() {
    let (client, _) = pair();
    let mut output = BytesMut::new();
    assert!(matches!(client.send(&["a"; 17], &mut output), Err(ZmtpError::TooManyFrames(16))));
    let long = vec![0; (8 << 20) + 1];
    assert!(matches!(client.send(&[&long], &mut output), Err(ZmtpError::MessageTooLong(_))));
    assert!(output.is_empty(), "all or nothing");
}

#[test]
fn frames_are_slices_of_the_input() {
    let (_, mut server) = pair();
    let mut input =
        BytesMut::from(&[&b"\x02\0\0\0\0\0\x10\0\0"[..], &vec![7; 1 << 20]].concat()[..]);
    let mut event = None;
    let info = measure(|| event = server.receive(&mut input, &mut BytesMut::new()).unwrap());
    assert!(matches!(event, Some(Event::Message(frames)) if frames[0].len() == 1 << 20));
    assert!(info.bytes_total < 4096, "{} bytes reserved", info.bytes_total);
}

#[test]
fn a_message_of_fewer_than_two_frames_is_refused() {
    // The one that silences an LMCache server for ever.
    let (client, mut server) = pair();
    let mut input = BytesMut::new();
    client.send(&["\x07"], &mut input).unwrap();
    let Some(Event::Message(frames)) = server.receive(&mut input, &mut BytesMut::new()).unwrap()
    else {
        panic!("no message");
    };
    assert_eq!(Header::decode(&frames), Err(MessageError::TooFewFrames(1)));
    assert_eq!(Header::decode(&[]), Err(MessageError::TooFewFrames(0)));
}

fn key() -> Key {
    Key {
        model_name: "m".to_owned(),
        world_size: 2,
        worker_id: Some(1),
        token_ids: (0..300).map(|i| i * 1000).collect(),
        start: 0,
        end: 256,
        request_id: "r".to_owned(),
        cache_salt: "s".to_owned(),
        num_kv_readers: 1,
    }
}

/// The problem of a `prepare_store` with this key, and that little is reserved for it.
fn key_problem(key: &[u8]) -> Problem {
    let payload = [Bytes::copy_from_slice(key), Bytes::from_static(b"\x01")];
    let mut result = None;
    let info = measure(|| result = Some(Request::decode(Operation::PrepareStore, &payload)));
    let bound = 4096 + 16 * key.len() as u64;
    assert!(info.bytes_total < bound, "{} bytes reserved", info.bytes_total);
    match result.unwrap() {
        Err(MessageError::Parameter { malformed, .. }) => malformed.problem,
        other => panic!("{other:?}"),
    }
}

/// A map with the entries of `key()`, then these bytes, which are `more` entries.
fn with_entries(more: u8, entries: &[u8]) -> Vec<u8> {
    let request = Request::PrepareStore { key: key().into(), instance_id: 1 };
    let mut encoded = request.encode(0, Dialect::Current)[2].to_vec();
    encoded[0] += more;
    encoded.extend(entries);
    encoded
}

#[test]
fn a_count_larger_than_the_frame_reserves_nothing() {
    let cases: [&[u8]; 5] = [
        b"\x81\xa9token_ids\xdd\xff\xff\xff\xff",
        b"\x81\xa9token_ids\xdc\xff\xff\x01\x02",
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xaamodel_name\xdb\xff\xff\xff\xff",
        b"\x81\xa7unknown\xdd\xff\xff\xff\xff",
    ];
    for case in cases {
        assert_eq!(key_problem(case), Problem::Truncated, "{case:?}");
    }
    let records = [&b"\xdd\0\x10\0\0"[..], &[0x83; 1 << 20]].concat();
    let payload: Vec<Bytes> = [&b"\x01"[..], b"\xa1m", &records].map(Bytes::copy_from_slice).into();
    let mut result = None;
    let info =
        measure(|| result = Some(Request::decode(Operation::ReportBlockAllocation, &payload)));
    assert!(result.unwrap().is_err());
    assert!(info.bytes_total < 4096, "{} bytes reserved", info.bytes_total);
}

#[test]
fn the_bytes_of_a_frame_are_one_value() {
    assert_eq!(key_problem(&with_entries(0, b"\xc0")), Problem::Trailing(1));
    let whole = with_entries(0, b"");
    for end in 0..whole.len() {
        assert_eq!(key_problem(&whole[..end]), Problem::Truncated, "cut at {end}");
    }
    let payload = [Bytes::from_static(b"\xa1r\x00")];
    assert!(Request::decode(Operation::EndSession, &payload).is_err());
}

#[test]
fn a_key_of_a_map_comes_once() {
    assert_eq!(key_problem(&with_entries(1, b"\xa5start\x00")), Problem::Duplicate);
    assert_eq!(key_problem(&with_entries(1, b"\xaacache_salt\xa0")), Problem::Duplicate);
}

#[test]
fn unknown_entries_are_stepped_over_to_a_bounded_depth() {
    let decode = |entry: &[u8]| {
        let key = Bytes::from(with_entries(1, entry));
        Request::decode(Operation::PrepareStore, &[key, Bytes::from_static(b"\x01")])
    };
    let expected = Request::PrepareStore { key: key().into(), instance_id: 1 };
    let nested = |depth| [&b"\xa1x"[..], &vec![0x91; depth], b"\xc0"].concat();
    for entry in [
        &b"\xa1x\xc7\x02\x01ab"[..],
        b"\xa1x\xd8\x010123456789abcdef",
        b"\xa1x\xc4\x02ab",
        b"\xa1x\x82\xc3\xca\0\0\0\0\x01\xcb\0\0\0\0\0\0\0\0",
        b"\xa1x\xd3\xff\xff\xff\xff\xff\xff\xff\xff",
        &nested(16),
    ] {
        assert_eq!(decode(entry).unwrap(), expected, "{entry:?}");
    }
    assert_eq!(key_problem(&with_entries(1, &nested(17))), Problem::Depth);
    assert_eq!(key_problem(&with_entries(1, &nested(1 << 20))), Problem::Depth);
    let maps = [&b"\xa1x"[..], &vec![0x81; 1 << 20]].concat();
    assert_eq!(key_problem(&with_entries(1, &maps)), Problem::Depth);
    assert!(matches!(key_problem(&with_entries(1, b"\xa1x\xc1")), Problem::Type { .. }));
    assert_eq!(key_problem(&with_entries(1, b"\xa1x\xa1\xff")), Problem::NotUtf8);
    assert_eq!(key_problem(&with_entries(1, b"\xa1\xff\x00")), Problem::NotUtf8);
    assert!(matches!(key_problem(&with_entries(1, b"\x01\x00")), Problem::Type { .. }));
}

#[test]
fn types_are_strict_inside_a_key() {
    let replaced = |field: &str, value: &[u8]| {
        let whole = with_entries(0, b"");
        let at = whole.windows(field.len()).position(|w| w == field.as_bytes()).unwrap();
        let at = at + field.len();
        [&whole[..at], value, &whole[at + 1..]].concat()
    };
    for value in [&b"\xc3"[..], b"\xca\0\0\0\0", b"\xa11", b"\xc0", b"\x80"] {
        assert!(
            matches!(key_problem(&replaced("start", value)), Problem::Type { .. }),
            "{value:?}"
        );
    }
    assert_eq!(key_problem(&replaced("start", b"\xff")), Problem::Range(-1));
    assert_eq!(
        key_problem(&replaced("world_size", b"\xcf\0\0\0\x01\0\0\0\0")),
        Problem::Range(1 << 32)
    );
    assert!(matches!(key_problem(&replaced("worker_id", b"\xc2")), Problem::Type { .. }));
    let as_array = [&b"\x9a"[..], &[0x01; 10]].concat();
    assert!(matches!(key_problem(&as_array), Problem::Type { expected: "a map", .. }));
    let binary = b"\x81\xaamodel_name\xc4\x01m";
    assert!(matches!(key_problem(binary), Problem::Type { expected: "a string", .. }));
    assert_eq!(key_problem(b"\x81\xaamodel_name\xa1m"), Problem::Missing);
    let configs = with_entries(0, b"").to_vec();
    let at = configs.windows(15).position(|w| w == b"request_configs").unwrap() + 15;
    let listed = [&configs[..at], b"\x91\x01", &configs[at + 1..]].concat();
    assert!(matches!(key_problem(&listed), Problem::Type { expected: "a map", .. }));
}

#[test]
fn token_ids_are_32_bit_in_any_encoding() {
    let decode = |tokens: &[u8]| {
        let whole = with_entries(0, b"");
        let at = whole.windows(9).position(|w| w == b"token_ids").unwrap() + 9;
        let end = whole.windows(6).position(|w| w == b"\xa5start").unwrap();
        let key = Bytes::from([&whole[..at], tokens, &whole[end..]].concat());
        match Request::decode(Operation::PrepareStore, &[key, Bytes::from_static(b"\x01")]) {
            Ok(Request::PrepareStore { key, .. }) => Ok(key.key.token_ids.to_vec()),
            Err(MessageError::Parameter { malformed, .. }) => Err(malformed),
            other => panic!("{other:?}"),
        }
    };
    let unsigned = b"\x97\x07\xcc\x07\xcd\x01\0\xce\xff\xff\xff\xff\xcf\0\0\0\0\0\0\0\x07";
    let tokens = [&unsigned[..], b"\xd0\x07\xd3\0\0\0\0\0\0\x01\0"].concat();
    assert_eq!(decode(&tokens).unwrap(), [7, 7, 256, u32::MAX, 7, 7, 256]);
    for (tokens, problem) in [
        (&b"\x91\xff"[..], Problem::Range(-1)),
        (b"\x91\xcf\0\0\0\x01\0\0\0\0", Problem::Range(1 << 32)),
        (b"\x91\xc3", Problem::Type { expected: "an integer", found: "a boolean" }),
        (b"\x91\xca\0\0\0\0", Problem::Type { expected: "an integer", found: "a float" }),
        (b"\xc0", Problem::Type { expected: "an array", found: "nil" }),
    ] {
        let malformed = decode(tokens).unwrap_err();
        assert_eq!((malformed.field, malformed.problem), ("token_ids", problem));
    }
}

#[test]
fn integers_and_booleans_stand_for_each_other_as_parameters() {
    let decode =
        |operation, frame: &'static [u8]| Request::decode(operation, &[Bytes::from_static(frame)]);
    assert_eq!(decode(Operation::Clear, b"\x01").unwrap(), Request::Clear { force: true });
    assert_eq!(decode(Operation::Clear, b"\xc2").unwrap(), Request::Clear { force: false });
    let unregister = decode(Operation::Unregister, b"\xc3").unwrap();
    assert_eq!(unregister, Request::Unregister { instance_id: 1 });
    assert!(decode(Operation::Clear, b"\xc0").is_err());
    assert!(decode(Operation::Unregister, b"\xcb\0\0\0\0\0\0\0\0").is_err());
    let yes = Reply::decode(Operation::CommitStore, &[Bytes::from_static(b"\x01")]).unwrap();
    assert_eq!(yes, Reply::Boolean(true));
    let one = Reply::decode(Operation::GetChunkSize, &[Bytes::from_static(b"\xc3")]).unwrap();
    assert_eq!(one, Reply::Integer(1));
}

#[test]
fn data_is_never_taken_from_a_message() {
    let decode = |data: &[u8]| {
        let request = Request::CommitStore { key: key().into(), instance_id: 1 };
        let mut payload = request.encode(0, Dialect::Current).split_off(2);
        payload[2] = Bytes::copy_from_slice(data);
        Request::decode(Operation::CommitStore, &payload)
    };
    assert!(decode(b"\xc4\x00").is_ok());
    for protocol in 2..=5 {
        let pickle = decode(&[0xc4, 3, 0x80, protocol, 0x95]);
        assert_eq!(pickle, Err(MessageError::Pickle(Operation::CommitStore)));
    }
    assert_eq!(decode(b"\xc4\x02(.").unwrap_err().label(), "data");
    assert_eq!(decode(b"\xa0").unwrap_err().label(), "wrong_type", "a string is not bytes");
    let reply = b"\x83\xa7success\xc3\xa4data\xc4\x03\x80\x04\x95\xa7context\x80";
    let result = Reply::decode(Operation::PrepareRetrieve, &[Bytes::from_static(reply)]);
    assert_eq!(result, Err(MessageError::Pickle(Operation::PrepareRetrieve)));
}

/// A `register_kv_cache` of one layer with this descriptor.
fn register(descriptor: &[u8]) -> Result<Request, MessageError> {
    let length = u16::try_from(descriptor.len()).unwrap().to_be_bytes();
    let caches = [&b"\x91\xc8"[..], &length, b"\x01", descriptor].concat();
    register_all(&caches, b"\x90")
}

fn register_all(caches: &[u8], groups: &[u8]) -> Result<Request, MessageError> {
    let frames = [&b"\x01"[..], caches, b"\xa1m", b"\x01", b"\xa4vllm", b"\x80", groups];
    let payload: Vec<Bytes> = frames.map(Bytes::copy_from_slice).into();
    let mut result = None;
    let info = measure(|| result = Some(Request::decode(Operation::RegisterKvCache, &payload)));
    let input: usize = frames.iter().map(|frame| frame.len()).sum();
    let bound = 128 * 1024 + 16 * input as u64;
    assert!(info.bytes_total < bound, "{} bytes reserved for {input}", info.bytes_total);
    result.unwrap()
}

/// A descriptor of this type with this tensor.
fn descriptor(kind: &[u8], metadata: &[u8]) -> Vec<u8> {
    let names = b"\xa8shm_name\xa2/s\xa6nbytes\x40\xa7version\x01\xa8metadata";
    [b"\x85\xa4type", kind, &names[..], metadata].concat()
}

#[test]
fn memory_that_is_not_served_is_refused_by_its_type_and_never_run_as_code() {
    let metadata = b"\x85\xa5dtype\xa4half\xa5shape\x93\x01\x01\x01\xa6stride\x93\x01\x01\x01\
        \xaestorage_offset\x00\xabdevice_uuid\xa3cpu";
    assert!(register(&descriptor(b"\xa7cpu_shm", metadata)).is_ok());
    for kind in ["cuda_vmm", "musa", "npu"] {
        // Their own fields are not looked into.
        let length = 0xa0 | u8::try_from(kind.len()).unwrap();
        let handle = b"\xa6handle\x92\x01\xc4\x02ab\xa7version\x01";
        let other = [b"\x83\xa4type", &[length][..], kind.as_bytes(), handle].concat();
        let error = register(&other).unwrap_err();
        assert_eq!(error, MessageError::MemoryType(Operation::RegisterKvCache, kind.to_owned()));
        assert!(error.to_string().contains(kind) && error.to_string().contains("engine_driven"));
        assert_eq!(error.label(), "memory_type");
    }
    let long = [&b"\x81\xa4type\xda\x01\x00"[..], &[b'x'; 256]].concat();
    assert!(register(&long).unwrap_err().to_string().len() < 320, "what is quoted is short");
    for protocol in 2..=5 {
        let error = register(&[0x80, protocol, 0x95, 1]).unwrap_err();
        assert_eq!(error, MessageError::Pickle(Operation::RegisterKvCache));
    }
}

#[test]
fn descriptors_follow_their_grammar_and_have_limits() {
    let half = b"\xa5dtype\xa4half";
    let with = |dtype: &[u8], shape: &[u8], rest: &[u8]| {
        let all = [b"\x84", dtype, b"\xa5shape", shape, b"\xa6stride\x91\x01", rest].concat();
        register(&descriptor(b"\xa7cpu_shm", &all)).map(drop).map_err(|error| error.label())
    };
    let offset = b"\xaestorage_offset\x00";
    assert_eq!(with(half, b"\x91\x01", offset), Ok(()));
    for (dtype, shape, rest, label) in [
        (&b"\xa5dtype\xa5qint8"[..], &b"\x91\x01"[..], &offset[..], "unknown_dtype"),
        (half, b"\x91\xff", offset, "out_of_range"),
        (half, b"\x99\x01\x01\x01\x01\x01\x01\x01\x01\x01", offset, "too_long"),
        (half, b"\xdd\xff\xff\xff\xff", offset, "truncated"),
        (half, b"\x91\x01", b"\xaestorage_offset\xff", "out_of_range"),
        (half, b"\x91\x01", b"\xa5shape\x91\x01", "duplicate_key"),
        (half, b"\x91\x01", b"\xa1x\x00", "missing_key"),
        (half, b"\x91\x01", b"\xaestorage_offset\x00\x00", "trailing_bytes"),
    ] {
        assert_eq!(with(dtype, shape, rest), Err(label), "{shape:?} {rest:?}");
    }
    let label = |caches: &[u8], groups: &[u8]| register_all(caches, groups).map_err(|e| e.label());
    assert_eq!(label(b"\x91\xc7\x01\x02\x80", b"\x90").err(), Some("inconsistent"), "extension 2");
    assert_eq!(label(b"\x91\x80", b"\x90").err(), Some("wrong_type"), "no extension");
    assert_eq!(label(b"\x91\xc8\xff\xff\x01", b"\x90").err(), Some("truncated"));
    let many = [&b"\xdc\x04\x01"[..], &b"\xd4\x01\x80".repeat(0x401)].concat();
    assert_eq!(label(&many, b"\x90").err(), Some("too_long"), "1025 layers");
    let many = [&b"\xdc\x04\x01"[..], &[0x80; 0x401]].concat();
    assert_eq!(label(b"\x90", &many).err(), Some("too_long"), "1025 groups");
    assert_eq!(label(b"\x90", b"\x91\x80").err(), Some("missing_key"));
}

/// The label of what is wrong with a descriptor of memory on a device.
fn on_device(kind: &[u8], fields: &[&[u8]], uuid: &[u8]) -> Result<(), &'static str> {
    let metadata =
        b"\xa7version\x01\xa8metadata\x85\xa5dtype\xa4half\xa5shape\x91\x01\xa6stride\x91\x01\
        \xaestorage_offset\x00\xabdevice_uuid";
    let entries = [0x83 + u8::try_from(fields.len()).unwrap()];
    let fields = fields.concat();
    let all = [&entries[..], b"\xa4type", kind, &fields, &metadata[..], uuid].concat();
    register(&all).map(drop).map_err(|error| error.label())
}

const UUID: &[u8] = b"\xd9\x240123abcd-4567-89EF-0123-456789abcdef";

#[test]
fn descriptors_of_ranges_on_a_device_follow_their_grammar() {
    let handle = |length: u8| {
        let bytes = vec![7; length.into()];
        [&b"\xaaipc_handle\xc4"[..], &[length], &bytes].concat()
    };
    let (good, offset, bytes) = (handle(64), &b"\xacalloc_offset\x00"[..], &b"\xa6nbytes\x40"[..]);
    let with = |fields: &[&[u8]], uuid: &[u8]| on_device(b"\xa8cuda_raw", fields, uuid);
    assert_eq!(with(&[&good, offset, bytes], UUID), Ok(()));
    for (fields, label) in [
        (&[&handle(63)[..], offset, bytes][..], "inconsistent"),
        (&[&handle(65), offset, bytes], "inconsistent"),
        (&[b"\xaaipc_handle\xc0", offset, bytes], "wrong_type"),
        (&[&good, b"\xacalloc_offset\xff", bytes], "out_of_range"),
        (&[&good, offset, b"\xa6nbytes\xff"], "out_of_range"),
        (&[&good, offset], "missing_key"),
        (&[&good, bytes], "missing_key"),
        (&[offset, bytes], "missing_key"),
        (&[&good, &good, offset, bytes], "duplicate_key"),
    ] {
        assert_eq!(with(fields, UUID), Err(label), "{fields:?}");
    }
    for (uuid, label) in [
        (&b"\xa3cpu"[..], "inconsistent"),
        (b"\xd9\x240123abcd-4567-89ef-0123-456789abcdeg", "inconsistent"),
        (b"\xd9\x240123abcd04567-89ef-0123-456789abcdef", "inconsistent"),
        (b"\xd9\x24+123abcd-4567-89ef-0123-456789abcdef", "inconsistent"),
        (b"\xd9\x240123abcd-4567-89ef-0123-456789abcd\xc3\xa4", "inconsistent"),
        (b"\xc0", "wrong_type"),
    ] {
        assert_eq!(with(&[&good, offset, bytes], uuid), Err(label), "{uuid:?}");
    }
}

#[test]
fn descriptors_of_pytorchs_storages_follow_their_grammar() {
    let shared = |handle: &[u8], rest: &[u8]| {
        let handle = match u8::try_from(handle.len()).unwrap() {
            0 => b"\xc0".to_vec(),
            length => [&[0xc4, length][..], handle].concat(),
        };
        let storage = [&b"\xa6handle\x98\x00"[..], &handle, rest].concat();
        on_device(b"\xa4cuda", &[&storage], UUID)
    };
    let rest = b"\x40\x08\xc4\x02/x\x00\xc4\x01e\xc2";
    let bare = [7; 64];
    let kind = |kind: u8, length: usize| [&[3, kind][..], &vec![7; length]].concat();
    assert_eq!(shared(&bare, rest), Ok(()));
    assert_eq!(shared(&kind(b'c', 64), rest), Ok(()));
    assert_eq!(shared(&kind(b'e', 40), rest), Err("memory_type"));
    for (handle, rest, label) in [
        (&bare[..63], &rest[..], "inconsistent"),
        (&kind(b'c', 63), rest, "inconsistent"),
        (&kind(b'x', 64), rest, "inconsistent"),
        (b"", rest, "wrong_type"),
        (&bare, b"\xff\x08\xc4\x02/x\x00\xc4\x01e\xc2", "out_of_range"),
        (&bare, b"\x40\xff\xc4\x02/x\x00\xc4\x01e\xc2", "out_of_range"),
        (&bare, b"\x40\x08\xa2/x\x00\xc4\x01e\xc2", "wrong_type"),
        (&bare, b"\x40\x08\xc4\x02/x\xff\xc4\x01e\xc2", "out_of_range"),
        (&bare, b"\x40\x08\xc4\x02/x\x00\xc4\x01e\xc0", "wrong_type"),
    ] {
        assert_eq!(shared(handle, rest), Err(label), "{handle:?} {rest:?}");
    }
    let short = on_device(b"\xa4cuda", &[b"\xa6handle\x92\x00\xc0"], UUID);
    assert_eq!(short, Err("inconsistent"));
    assert_eq!(on_device(b"\xa4cuda", &[], UUID), Err("missing_key"));
}

#[test]
fn blocks_are_lists_of_32_bit_numbers() {
    let decode = |blocks: &[u8], event: &[u8]| {
        let request = Request::Store {
            key: key().into(),
            instance_id: 1,
            block_ids: Vec::new(),
            event: Box::default(),
        };
        let mut payload = request.encode(0, Dialect::Current).split_off(2);
        payload[2] = Bytes::copy_from_slice(blocks);
        payload[3] = Bytes::copy_from_slice(event);
        match Request::decode(Operation::Store, &payload) {
            Ok(Request::Store { block_ids, .. }) => Ok(block_ids),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.label()),
        }
    };
    let empty = b"\xc4\x00";
    assert_eq!(decode(b"\x92\x91\x07\x90", empty), Ok(vec![vec![7], vec![]]));
    for (blocks, label) in [
        (&b"\x91\x91\xff"[..], "out_of_range"),
        (b"\x91\x91\xcf\x00\x00\x00\x01\x00\x00\x00\x00", "out_of_range"),
        (b"\x91\x07", "wrong_type"),
        (b"\x91\xdd\xff\xff\xff\xff", "truncated"),
        (b"\xdd\xff\xff\xff\xff", "truncated"),
    ] {
        assert_eq!(decode(blocks, empty), Err(label), "{blocks:?}");
    }
    let long = [&b"\xc5\x04\x01"[..], &[0; 0x401]].concat();
    assert_eq!(decode(b"\x90", &long), Err("too_long"));
    assert_eq!(decode(b"\x90", b"\xa0"), Err("wrong_type"));
}

#[test]
fn no_peer_names_an_instance_of_the_servers_own() {
    for (instance_id, fine) in
        [(0, true), ((1 << 63) - 1, true), (1 << 63, false), (u64::MAX, false)]
    {
        let requests = [
            Request::Unregister { instance_id },
            Request::UnregisterKvCache { instance_id },
            Request::CommitStore { key: key().into(), instance_id },
            Request::CommitRetrieve { key: key().into(), instance_id },
        ];
        for request in requests {
            let payload = request.encode(0, Dialect::Current).split_off(2);
            let decoded = Request::decode(request.operation(), &payload);
            let label = decoded.map_err(|error| error.label());
            assert_eq!(label, if fine { Ok(request) } else { Err("out_of_range") });
        }
    }
}

#[test]
fn the_lists_of_a_reply_go_together() {
    let slot = |dtype: &str| {
        let mut slot = b"\x84\xa6offset\x00\xa6length\x01\xa5shape\x91\x01\xa5dtype".to_vec();
        slot.push(0xa0 | u8::try_from(dtype.len()).unwrap());
        slot.extend(dtype.as_bytes());
        slot
    };
    let decode = |slots: &[Vec<u8>], rest: &[u8]| {
        let count = 0x90 | u8::try_from(slots.len()).unwrap();
        let reply = [b"\x81\xa7context\x82\xa5slots", &[count][..], &slots.concat(), rest].concat();
        Reply::decode(Operation::PrepareStore, &[Bytes::from(reply)])
    };
    let label = |result: Result<Reply, MessageError>| result.map_err(|error| error.label());
    assert!(decode(&[slot("half")], b"\xadchunk_indices\x91\x00").is_ok());
    let indices = decode(&[slot("half")], b"\xadchunk_indices\x90");
    assert_eq!(label(indices), Err("inconsistent"));
    let layouts = decode(&[slot("half"), slot("int8")], b"\xadchunk_indices\x92\x00\x01");
    assert_eq!(label(layouts), Err("inconsistent"));
    assert_eq!(label(decode(&[slot("half")], b"\xabgenerations\x90")), Err("inconsistent"));
    assert_eq!(label(decode(&[slot("half")], b"\xabgenerations\x91\x01")), Err("missing_key"));
}

#[test]
fn the_checksums_of_a_reply_go_with_its_slots() {
    let slot = b"\x84\xa6offset\x00\xa6length\x01\xa5shape\x91\x01\xa5dtype\xa4half";
    let decode = |before: &[u8], after: &[u8]| {
        let context = [b"\xa7context\x82", before, b"\xa5slots\x92", slot, slot, after].concat();
        let reply = [b"\x83\xa7success\xc3\xa4data\xc4\x00", &context[..]].concat();
        match Reply::decode(Operation::PrepareRetrieve, &[Bytes::from(reply)]) {
            Ok(Reply::RetrieveSlots(Some(slots))) => {
                Ok(slots.slots.iter().map(|slot| slot.checksum).collect::<Vec<_>>())
            }
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err((error.label(), error.to_string().contains("checksums: "))),
        }
    };
    assert_eq!(decode(b"", b"\xa9checksums\x92\x05\xc0"), Ok(vec![Some(5), None]));
    assert_eq!(decode(b"\xa9checksums\x92\xc0\x06", b""), Ok(vec![None, Some(6)]), "in any order");
    for (list, label) in [
        (&b"\x90"[..], "inconsistent"),
        (b"\x91\x05", "inconsistent"),
        (b"\x93\x05\x06\x07", "inconsistent"),
        (b"\x92\x05\xff", "out_of_range"),
        (b"\x92\x05\xc3", "wrong_type"),
        (b"\x92\x05\xcb\x00\x00\x00\x00\x00\x00\x00\x00", "wrong_type"),
        (b"\xc0", "wrong_type"),
        (b"\x82\x00\x05\x01\x06", "wrong_type"),
        (b"\xdd\xff\xff\xff\xff", "truncated"),
    ] {
        assert_eq!(decode(b"", &[b"\xa9checksums", list].concat()), Err((label, true)), "{list:?}");
    }
}

#[test]
fn each_slot_of_a_request_has_a_generation_and_a_checksum() {
    let decode = |lists: [&'static [u8]; 3]| {
        let frames = [&[&b"\x05"[..]][..], &lists].concat();
        let frames: Vec<Bytes> = frames.into_iter().map(Bytes::from_static).collect();
        Request::decode(Operation::Checksums, &frames).map_err(|error| error.label())
    };
    assert!(decode([b"\x92\x00\x01", b"\x92\x02\x03", b"\x92\x04\x05"]).is_ok());
    assert!(decode([b"\x90", b"\x90", b"\x90"]).is_ok());
    for (lists, label) in [
        ([&b"\x92\x00\x01"[..], b"\x91\x02", b"\x92\x04\x05"], "inconsistent"),
        ([b"\x92\x00\x01", b"\x92\x02\x03", b"\x91\x04"], "inconsistent"),
        ([b"\x91\x00", b"\x91\x02", b"\x92\x04\x05"], "inconsistent"),
        ([b"\x91\x00", b"\x91\x02", b"\x91\xc0"], "wrong_type"),
        ([b"\x91\x00", b"\x91\x02", b"\x91\xff"], "out_of_range"),
        ([b"\x91\x00", b"\x91\x02", b"\x91\x04\x05"], "trailing_bytes"),
        ([b"\x91\x00", b"\x91\x02", b"\xdd\xff\xff\xff\xff"], "truncated"),
    ] {
        assert_eq!(decode(lists), Err(label), "{lists:?}");
    }
}

#[test]
fn a_piece_is_bytes_of_a_bounded_number() {
    let decode = |frame: Vec<u8>| {
        let reply = Reply::decode(Operation::Read, &[Bytes::from(frame)]);
        reply.map_err(|error| error.label()).map(|reply| match reply {
            Reply::Piece(piece) => piece.map(|piece| piece.data().len()),
            other => panic!("{other:?}"),
        })
    };
    let bytes = |length: usize| {
        let header = u32::try_from(length).unwrap().to_be_bytes();
        [&[0xc6], &header[..], &vec![1; length]].concat()
    };
    assert_eq!(decode(bytes(PIECE_MAX)), Ok(Some(PIECE_MAX)));
    assert_eq!(decode(b"\xc4\x02ab".to_vec()), Ok(Some(2)), "in whatever way the length is said");
    assert_eq!(decode(b"\xc0".to_vec()), Ok(None));
    for (frame, label) in [
        (bytes(PIECE_MAX + 1), "inconsistent"),
        (b"\xc6\xff\xff\xff\xffab".to_vec(), "truncated"),
        (b"\xc4\x02abc".to_vec(), "trailing_bytes"),
        (b"\xa2ab".to_vec(), "wrong_type"),
        (b"\x80".to_vec(), "wrong_type"),
        (Vec::new(), "truncated"),
    ] {
        assert_eq!(decode(frame), Err(label));
    }
}

#[test]
fn names_and_counters_are_few() {
    let many = |marker: u8, entry: &[u8]| {
        Bytes::from([&[marker, 0x04, 0x01], &entry.repeat(0x401)[..]].concat())
    };
    let names = Reply::decode(Operation::GetExperimental, &[many(0xdc, b"\xa0")]);
    assert_eq!(names.unwrap_err().label(), "too_long");
    let status = Reply::decode(Operation::Status, &[many(0xde, b"\xa0\x00")]);
    assert_eq!(status.unwrap_err().label(), "too_long");
}

#[test]
fn the_longest_answer_of_events_fits_in_a_message() {
    let spaces: Vec<_> = (0..EVENT_SPACES_MAX)
        .map(|number| {
            Arc::new(EventSpace {
                model_name: format!("{number:0MODEL_NAME_BYTES_MAX$}"),
                world_size: WORLD_SIZE_MAX,
                cache_salt: "\u{10ffff}".repeat(SALT_CHARS_MAX),
            })
        })
        .collect();
    let event = |number: usize| KvEvent {
        kind: EventKind::Removed,
        chunk: [255; 32],
        parent: Some([255; 32]),
        rank: u32::MAX,
        space: Arc::clone(&spaces[number % EVENT_SPACES_MAX]),
        at_ms: u64::MAX,
    };
    let events = (0..EVENTS_MAX as usize).map(event).collect();
    let events = Events { incarnation: [255; 16], first: u64::MAX >> 1, events, lost: true };
    let reply = Reply::Events(events);
    let frame = reply.encode().unwrap();
    let longest = Limits::default().message_bytes_max - 1024; // the header's frames
    assert!(frame.len() < longest, "{} bytes", frame.len());
    assert_eq!(Reply::decode(Operation::Events, &[frame]).unwrap(), reply);
}

#[test]
fn events_follow_their_grammar() {
    let decode = |spaces: &[u8], events: &[u8]| {
        let head = b"\x85\xabincarnation\xc4\x10................\xa5first\x01\xa4lost\xc2";
        let reply = [head, spaces, b"\xa6events", events].concat();
        let result = Reply::decode(Operation::Events, &[Bytes::from(reply)]);
        result.map_err(|error| error.label())
    };
    let spaces = b"\xa6spaces\x91\x83\xaamodel_name\xa1m\xaaworld_size\x01\xaacache_salt\xa0";
    let row = |chunk: &[u8], space: u8| {
        [
            &b"\x91\x96\xc2\xc4"[..],
            &[u8::try_from(chunk.len()).unwrap()],
            chunk,
            &[0xc0, 0, space, 9],
        ]
        .concat()
    };
    let hash = [1; 32];
    assert!(decode(spaces, &row(&hash, 0)).is_ok());
    assert_eq!(decode(spaces, &row(&hash, 1)), Err("inconsistent"), "a space that is not there");
    assert_eq!(decode(b"\xa6spaces\x90", &row(&hash, 0)), Err("inconsistent"));
    assert_eq!(decode(spaces, &row(&[1; 33], 0)), Err("inconsistent"), "a hash of 33 bytes");
    let mut five = row(&hash, 0);
    five[1] = 0x95;
    assert_eq!(decode(spaces, &five), Err("inconsistent"));
    assert_eq!(decode(spaces, b"\xdd\x00\x01\x00\x00"), Err("truncated"), "65,536 of nothing");
    let many = [&b"\xdd\x00\x01\x00\x00"[..], &[0; 1 << 16]].concat();
    let info = measure(|| drop(decode(spaces, &many)));
    assert!(info.bytes_total < 4 << 20, "{} bytes reserved for 64 KiB", info.bytes_total);
    let cause = b"\x81\xa7removed\x82\xa5cause\xa4lost\xa5at_ms\x01";
    let explained = [&b"\x81\xa7missing"[..], cause].concat();
    let explained = Reply::decode(Operation::Explain, &[Bytes::from(explained)]);
    assert_eq!(explained.unwrap_err().label(), "inconsistent");
}

#[test]
fn every_frame_counts() {
    for message in recorded::messages() {
        let Ok((header, payload)) = Header::decode(&message.frames) else { continue };
        let more = [payload, &[Bytes::from_static(b"\x00")]].concat();
        let decode = |payload| {
            if message.request {
                Request::decode(header.operation, payload).map(drop)
            } else {
                Reply::decode(header.operation, payload).map(drop)
            }
        };
        if decode(payload).is_err() {
            continue;
        }
        // A count may be there or not.
        let counted = [Operation::QueryPrefetchStatus, Operation::WaitPrefetchStatus];
        let absent = !message.request && payload.is_empty() && counted.contains(&header.operation);
        assert_eq!(decode(&more).is_err(), !absent, "{message}");
        if let [fewer @ .., _] = payload {
            // And the end of a stream has nothing.
            let ends = header.operation == Operation::SubscribeKvEvents;
            let optional = !message.request && (ends || counted.contains(&header.operation));
            assert_eq!(decode(fewer).is_err(), !optional, "{message}");
        }
    }
}

#[test]
fn uids_and_operations_are_checked() {
    let label = |uid: &'static [u8], operation: &'static [u8]| {
        Header::decode(&[uid, operation].map(Bytes::from_static)).map_err(|e| e.label()).err()
    };
    assert_eq!(label(b"\x07", b"\x16"), None);
    assert_eq!(label(b"\xd3\xff\xff\xff\xff\xff\xff\xff\xff", b"\xa4ping"), None);
    for uid in [&b""[..], b"\xc3", b"\xa1a", b"\x07\x07", b"\xcf\x00"] {
        assert_eq!(label(uid, b"\x16"), Some("bad_uid"), "{uid:?}");
    }
    for operation in [&b""[..], b"\xc0", b"\x16\x16", b"\xa4ping\x00", b"\xa1\xff", b"\xa4pin"] {
        assert_eq!(label(b"\x07", operation), Some("bad_operation"), "{operation:?}");
    }
    for operation in [&b"\xff"[..], b"\x00", b"\xcd\x01\x16", b"\xa4PING", b"\xadkvferry.hello"] {
        let unknown = label(b"\x07", operation);
        assert_eq!(unknown, (operation[0] != 0xad).then_some("unknown_operation"), "{operation:?}");
    }
}
