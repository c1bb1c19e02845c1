//! Conversations of real engines with LMCache's server, from `test/wire/`, held again with ours: each
//! request is sent as it was, and each reply is compared byte for byte.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::collections::HashMap;

use bytes::Bytes;
use common::{Client, skipped, start, store_options};
use kvferry_core::events::{EventKind, KvEventBatch};
use kvferry_store::StoreOptions;
use kvferry_wire::message::StoreSlots;
use kvferry_wire::{Dialect, Header, Operation, Reply, Request};

/// What ours answers otherwise than LMCache's, step by step, and why.
enum Difference {
    /// LMCache's is silent; ours answers this.
    Answered(Reply),
    /// Both answer; ours answers this.
    Other(Reply),
}

/// Ours at a step of a recording.
type Expected = (u64, Difference);

fn nothing_to_store() -> Difference {
    Difference::Answered(Reply::StoreSlots(Some(StoreSlots::default())))
}

fn extension() -> Difference {
    Difference::Other(Reply::Names(vec![
        "kvferry.v1".into(),
        "kvferry.checksums".into(),
        "kvferry.frames".into(),
        "kv_event_stream".into(),
    ]))
}

struct Step {
    number: u64,
    client: String,
    is_request: bool,
    frames: Vec<Bytes>,
}

fn recording(file: &str) -> Vec<Step> {
    let path = format!("{}/../../test/wire/{file}", env!("CARGO_MANIFEST_DIR"));
    let steps: Vec<serde_json::Value> =
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let step = |step: &serde_json::Value| Step {
        number: step["step"].as_u64().unwrap(),
        client: step["client"].as_str().unwrap().into(),
        is_request: step["direction"] == "client->server",
        frames: step["frames_hex"].as_array().unwrap().iter().map(from_hex).collect(),
    };
    steps.iter().map(step).collect()
}

fn from_hex(text: &serde_json::Value) -> Bytes {
    let digits = text.as_str().unwrap().as_bytes();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks_exact(2).map(byte).collect()
}

/// The values of a run, which differ from recording to replay: LMCache's in place of ours, so that
/// everything else can be compared.
#[derive(Default)]
struct Run {
    shm_name: String,
    pool_size: u64,
    /// LMCache's slot of each of ours, and the other way round.
    slots: HashMap<u64, u64>,
    recorded: HashMap<u64, u64>,
}

impl Run {
    /// Our reply in LMCache's values.
    fn read(&mut self, received: &[Bytes], recorded: &[Bytes]) -> Vec<Bytes> {
        let (header, payload) = Header::decode(received).unwrap();
        let ours = Reply::decode(header.operation, payload).unwrap();
        assert_eq!(header.reply(&ours), received, "in the form that is always sent");
        let (_, recorded) = Header::decode(recorded).unwrap();
        let recorded = Reply::decode(header.operation, recorded).unwrap();
        header.reply(&self.translate(ours, &recorded))
    }

    fn translate(&mut self, ours: Reply, recorded: &Reply) -> Reply {
        match (ours, recorded) {
            (Reply::Registered { shm_name, pool_size }, Reply::Registered { .. }) => {
                assert_eq!((shm_name, pool_size), (self.shm_name.clone(), self.pool_size));
                recorded.clone()
            }
            (Reply::StoreSlots(Some(mut ours)), Reply::StoreSlots(Some(recorded))) => {
                for (slot, recorded) in ours.slots.slots.iter_mut().zip(&recorded.slots.slots) {
                    // Either may have been another object's before.
                    self.slots.insert(slot.offset, recorded.offset);
                    self.recorded.insert(recorded.offset, slot.offset);
                    slot.offset = recorded.offset;
                }
                Reply::StoreSlots(Some(ours))
            }
            (Reply::RetrieveSlots(Some(mut ours)), Reply::RetrieveSlots(Some(recorded))) => {
                for (slot, recorded) in ours.slots.iter_mut().zip(&recorded.slots) {
                    assert_eq!(self.recorded.get(&recorded.offset), Some(&slot.offset));
                    slot.offset = self.slots[&slot.offset];
                }
                Reply::RetrieveSlots(Some(ours))
            }
            (Reply::KvEvents(ours), Reply::KvEvents(recorded)) => {
                // LMCache's tells of stores in its other mode only, ours of all.
                let KvEventBatch { incarnation, next_cursor, .. } = *recorded;
                let events = recorded.events.clone();
                Reply::KvEvents(KvEventBatch { incarnation, next_cursor, events, ..ours })
            }
            (ours, _) => ours,
        }
    }
}

/// What our server said in streams.
fn replay(
    file: &str,
    options: impl FnOnce(u32) -> StoreOptions,
    differences: Vec<Expected>,
) -> Vec<Vec<Bytes>> {
    let steps = recording(file);
    let mut differences: HashMap<u64, Difference> = differences.into_iter().collect();
    let mut latest = HashMap::new();
    let mut replies: HashMap<u64, &[Bytes]> = HashMap::new();
    for step in &steps {
        let uid = (&step.client, &step.frames[0]);
        if step.is_request {
            latest.insert(uid, step.number);
        } else {
            replies.insert(latest[&uid], &step.frames);
        }
    }
    let chunk_size = steps.iter().find_map(|step| match Header::decode(&step.frames) {
        Ok((header, payload))
            if !step.is_request && header.operation == Operation::GetChunkSize =>
        {
            match Reply::decode(header.operation, payload) {
                Ok(Reply::Integer(size)) => u32::try_from(size).ok(),
                _ => None,
            }
        }
        _ => None,
    });
    let options = options(chunk_size.unwrap());
    let mut run = Run {
        shm_name: options.shared_name.clone().unwrap_or_default(),
        pool_size: options.memory,
        ..Run::default()
    };
    let server = start(options);
    let mut clients: HashMap<&str, Client> = HashMap::new();
    let (mut streamed, mut compared) = (Vec::new(), 0);
    let marker = Request::Noop.encode(u64::MAX, Dialect::Current);
    for step in steps.iter().filter(|step| step.is_request) {
        let at = format!("{file}, step {}", step.number);
        let client =
            clients.entry(&step.client).or_insert_with(|| Client::connect(server.address()));
        client.send(&step.frames);
        client.send(&marker); // whatever is answered is answered before this
        let mut received = receive(client, &mut streamed);
        let mut recorded = replies.get(&step.number).copied();
        let difference = differences.remove(&step.number);
        let answered = received[0] != marker[0];
        if let Some(expected) = recorded.filter(|frames| is_of_a_stream(frames)) {
            // It comes when it comes, and its stream may say something else before.
            let is_it = |ours: &Vec<Bytes>, run: &mut Run| run.read(ours, expected) == expected;
            while !streamed.get(compared).is_some_and(|ours| is_it(ours, &mut run)) {
                match compared < streamed.len() {
                    true => compared += 1,
                    false => streamed.push(client.receive()),
                }
            }
            compared += 1;
            recorded = None;
        }
        if answered {
            assert_eq!(receive(client, &mut streamed)[0], marker[0], "{at}: one answer");
            assert_eq!(received[..2], step.frames[..2], "{at}: the header is repeated");
        }
        let expected = match (recorded, &difference) {
            (None, None) => {
                assert!(!answered, "{at}: silence, not {received:?}");
                continue;
            }
            (Some(recorded), None) => recorded.to_vec(),
            (None, Some(Difference::Answered(reply)))
            | (Some(_), Some(Difference::Other(reply))) => {
                Header::decode(&step.frames).unwrap().0.reply(reply)
            }
            _ => panic!("{at}: the listed difference is none"),
        };
        assert!(answered, "{at}: no answer");
        if let Some(recorded) = recorded {
            received = run.read(&received, recorded);
        }
        assert_eq!(received, expected, "{at}");
    }
    assert!(differences.is_empty(), "differences at steps that there are not");
    assert!(run.slots.values().all(|offset| offset % 4096 == 0));
    streamed
}

fn is_of_a_stream(frames: &[Bytes]) -> bool {
    Header::decode(frames).is_ok_and(|(it, _)| it.operation == Operation::SubscribeKvEvents)
}

/// The next message that is no stream's.
fn receive(client: &mut Client, streamed: &mut Vec<Vec<Bytes>>) -> Vec<Bytes> {
    loop {
        let frames = client.receive();
        if !is_of_a_stream(&frames) {
            return frames;
        }
        streamed.push(frames);
    }
}

#[test]
fn a_round_trip_of_lmcaches_own_client() {
    replay(
        "roundtrip_shm.json",
        |chunk_size| store_options(chunk_size, 1 << 20),
        vec![
            (4, extension()),
            // Silence ends a vLLM engine: an instance that is not known ...
            (86, nothing_to_store()),
            // ... and ranges that are not whole chunks, or not of the prompt.
            (89, nothing_to_store()),
            (90, nothing_to_store()),
            // A lookup without num_kv_readers counts as one of tp_size readers.
            (87, Difference::Answered(Reply::None)),
        ],
    );
}

#[test]
fn two_ranks_one_plane_names_for_numbers_and_abuse() {
    let streamed = replay(
        "extra.json",
        |chunk_size| store_options(chunk_size, 1 << 20),
        vec![
            // A store of a mode that the recorded server did not serve.
            (71, Difference::Answered(Reply::Copied { event: Bytes::new(), done: false })),
            // A worker without a rank: silence ends a vLLM engine.
            (74, nothing_to_store()),
        ],
    );
    let batch =
        |frames: &Vec<Bytes>| match Reply::decode(Operation::SubscribeKvEvents, &frames[2..]) {
            Ok(Reply::KvEvents(batch)) => batch.events,
            Ok(Reply::None) => Vec::new(),
            other => panic!("{other:?}"),
        };
    let events: Vec<_> = streamed.iter().flat_map(batch).collect();
    assert!(events.iter().all(|event| event.model_name == "tiny/tp2"));
    let last = events.last().unwrap();
    assert_eq!((last.kind, &last.token_ids[..]), (EventKind::Stored, &Vec::from_iter(23..39)[..]));
}

#[test]
fn lmcaches_benchmark_with_objects_of_32_mib() {
    // In private memory: six such objects are more than some machines' /dev/shm.
    let options =
        |chunk_size| StoreOptions { shared_name: None, ..store_options(chunk_size, 256 << 20) };
    replay("lmcache_bench_engine_driven_shm.json", options, vec![]);
}

/// The segments that LMCache's benchmark had; they are holes until they are written to.
#[cfg(target_os = "linux")]
struct Segments(Vec<std::path::PathBuf>);

#[cfg(target_os = "linux")]
impl Segments {
    fn new() -> std::io::Result<Self> {
        let mut segments = Self(Vec::new());
        for layer in 0..32 {
            let path = std::path::PathBuf::from(format!("/dev/shm/lmcache_kv_15177_{layer}"));
            let file = std::fs::File::options().write(true).create_new(true).open(&path)?;
            segments.0.push(path);
            file.set_len(64 << 20)?;
        }
        Ok(segments)
    }
}

#[cfg(target_os = "linux")]
impl Drop for Segments {
    fn drop(&mut self) {
        self.0.iter().for_each(|path| drop(std::fs::remove_file(path)));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn lmcaches_benchmark_with_memory_that_the_server_copies() {
    const WRITTEN: u64 = 256 << 20;
    if kvferry_store::Store::new(store_options(16, WRITTEN)).is_err() {
        return skipped("a replay of lmcache_driven: /dev/shm is too small");
    }
    let segments = match Segments::new() {
        Ok(segments) => segments,
        Err(error) => return skipped(format_args!("a replay of lmcache_driven: {error}")),
    };
    let options =
        |chunk_size| StoreOptions { shared_name: None, ..store_options(chunk_size, 256 << 20) };
    // LMCache's store is over after its answer, and the lookup there was faster; ours answers when it is over.
    let differences = vec![(46, Difference::Other(Reply::Integer(2)))];
    replay("lmcache_bench_lmcache_driven_cpu.json", options, differences);
    drop(segments);
}

#[test]
fn a_vllm_engine_from_start_to_end() {
    let options = |chunk_size| store_options(chunk_size, 16 << 20);
    replay("vllm_life1.json", options, vec![(2, extension())]);
}
