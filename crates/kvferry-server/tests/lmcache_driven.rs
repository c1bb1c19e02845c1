//! Engines whose memory the server copies from and to by itself, as LMCache's own clients in that mode speak to it.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::{FileExt, chown, symlink};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use common::{Client, key, skipped, start, store_options};
use kvferry_core::key::{Dtype, Key};
use kvferry_core::kv_descriptors::{EngineGroup, KvDescriptor, KvRegistration, KvStorage};
use kvferry_wire::message::Piece;
use kvferry_wire::{Dialect, Reply, Request};

const MIB: u64 = 1 << 20;
const LAYERS: usize = 2;
const BLOCKS: usize = 12;
/// Tokens of a block; the server's chunks have 16.
const TOKENS: usize = 4;
const HEADS: usize = 3;
/// Bytes of a head, K's and V's together.
const HEAD: usize = 8;
const OBJECT: usize = LAYERS * 16 * HEADS * HEAD;
const INSTANCE: u64 = 1000;

/// A segment of this test's, which goes with it.
struct Segment(String);

impl Segment {
    fn new() -> Self {
        static NUMBERS: AtomicU32 = AtomicU32::new(0);
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        Self(format!("/lmcache_kv_server_{}_{number}", std::process::id()))
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/shm{}", self.0))
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.path());
    }
}

/// An engine as vLLM's is on a CPU: K and V fused, `[blocks, heads, tokens, head]` a layer.
struct Engine {
    client: Client,
    segments: Vec<Segment>,
}

const LAYER: usize = BLOCKS * HEADS * TOKENS * HEAD;

impl Engine {
    /// One that has memory and has not registered it.
    fn new(address: SocketAddr) -> Self {
        let segments: Vec<Segment> = (0..LAYERS).map(|_| Segment::new()).collect();
        for (layer, segment) in segments.iter().enumerate() {
            let noise = |at: usize| ((at * 7 + layer * 13) % 251).to_le_bytes()[0];
            fs::write(segment.path(), (0..LAYER).map(noise).collect::<Vec<u8>>()).unwrap();
        }
        Self { client: Client::connect(address), segments }
    }

    fn registered(address: SocketAddr) -> Self {
        let mut engine = Self::new(address);
        let registration = engine.registration();
        assert_eq!(engine.register(registration), Reply::None);
        engine
    }

    fn registration(&self) -> KvRegistration {
        let layers = self.segments.iter().map(|segment| KvDescriptor {
            storage: KvStorage::Segment { shm_name: segment.0.clone(), bytes: LAYER as u64 },
            dtype: Dtype::new("bfloat16").unwrap(),
            shape: [BLOCKS, HEADS, TOKENS, HEAD / 2].map(|size| size as u64).into(),
            stride: [HEADS * TOKENS * HEAD / 2, TOKENS * HEAD / 2, HEAD / 2, 1]
                .map(|it| it as u64)
                .into(),
            storage_offset: 0,
        });
        let group = EngineGroup {
            engine_group_id: 0,
            layer_indices: (0..).take(LAYERS).collect(),
            tokens_per_block: TOKENS as u64,
            sw_size_tokens: -1,
            extra_object_group_tag: 0,
            recurrent_state: false,
        };
        KvRegistration {
            model_name: "m".into(),
            world_size: 1,
            engine_type: "vllm".into(),
            kv_layout: Some("HND".into()),
            groups: vec![group],
            layers: layers.collect(),
        }
    }

    fn register(&mut self, registration: KvRegistration) -> Reply {
        self.client.call(&Request::RegisterKvCache { instance_id: INSTANCE, registration })
    }

    fn store(&mut self, key: Key, blocks: &[u32]) -> bool {
        self.copied(&Request::Store {
            key: key.into(),
            instance_id: INSTANCE,
            block_ids: vec![blocks.to_vec()],
            event: (*b"stub_ipc_handle").into(),
        })
    }

    fn retrieve(&mut self, key: Key, blocks: &[u32], skip_first_n_tokens: u64) -> bool {
        self.copied(&Request::Retrieve {
            key: key.into(),
            instance_id: INSTANCE,
            block_ids: vec![blocks.to_vec()],
            event: (*b"stub_ipc_handle").into(),
            skip_first_n_tokens,
        })
    }

    /// Whether it was done; LMCache's clients wait for the event that is answered then.
    fn copied(&mut self, request: &Request) -> bool {
        let Reply::Copied { event, done } = self.client.call(request) else { panic!("no answer") };
        assert_eq!(&event[..], if done { &b"stub_ipc_handle"[..] } else { b"" });
        done
    }

    /// A head of a token of a layer.
    fn head(&self, layer: usize, block: u32, token: usize, head: usize) -> Vec<u8> {
        let file = fs::File::open(self.segments[layer].path()).unwrap();
        let mut bytes = vec![0; HEAD];
        let at = ((block as usize * HEADS + head) * TOKENS + token) * HEAD;
        file.read_exact_at(&mut bytes, at as u64).unwrap();
        bytes
    }

    /// All of some blocks, in the order of an object.
    fn object(&self, blocks: &[u32]) -> Vec<u8> {
        let mut object = Vec::new();
        for layer in 0..LAYERS {
            for (block, token) in
                blocks.iter().flat_map(|block| (0..TOKENS).map(move |token| (*block, token)))
            {
                for head in 0..HEADS {
                    object.extend(self.head(layer, block, token, head));
                }
            }
        }
        object
    }

    /// Overwrites all of its memory.
    fn forget(&self) {
        for segment in &self.segments {
            let file = fs::File::options().write(true).open(segment.path()).unwrap();
            file.write_all_at(&[0xee; LAYER], 0).unwrap();
        }
    }
}

#[test]
fn what_an_engine_stored_comes_back_into_other_blocks_and_is_any_modes() {
    let server = start(store_options(16, MIB));
    let mut engine = Engine::registered(server.address());
    let mut scheduler = Client::connect(server.address());
    let prompt = key("r", 0, 2);
    assert_eq!(scheduler.lookup(prompt.clone()), 0);
    let (first, second) = ([7, 3, 1, 11], [2, 9, 5, 0]);
    let blocks = [first, second].concat();
    let stored = [engine.object(&first), engine.object(&second)];
    assert!(engine.store(prompt.clone(), &blocks));
    assert_eq!(scheduler.lookup(prompt.clone()), 2, "the answer to a store comes after its commit");
    engine.forget();
    let (one, two) = ([0, 1, 2, 3], [8, 9, 10, 11]);
    assert!(engine.retrieve(prompt.clone(), &[one, two].concat(), 0));
    assert!(engine.object(&one) == stored[0] && engine.object(&two) == stored[1]);
    for (figure, value) in [
        ("stored_chunks", 2),
        ("stored_bytes", 2 * OBJECT as i64),
        ("retrieved_chunks", 2),
        ("hit_chunks", 2),
        ("leases", 0),
        ("slots_reading", 0),
        ("slots_writing", 0),
    ] {
        assert_eq!(scheduler.status(figure), value, "{figure}");
    }
    // An engine of the same shape in the engine-driven mode finds the same objects.
    let layout = engine.registration().memory(16).unwrap().layout.registration("m", 1, 16);
    scheduler.register(1, layout);
    assert_eq!(scheduler.lookup(key("other", 0, 2)), 2);
    scheduler.hello();
    assert_eq!(scheduler.call(&Request::Frames), Reply::None);
    let slots = scheduler.prepare_retrieve(key("other", 0, 2), 1).unwrap();
    for (slot, stored) in slots.slots.iter().zip(&stored) {
        assert_eq!(slot.length, OBJECT as u64);
        let read = Request::Read {
            instance_id: 1,
            offset: slot.offset,
            generation: slot.generation.unwrap(),
            at: 0,
            bytes: slot.length,
        };
        let piece: Option<Piece> = match scheduler.call(&read) {
            Reply::Piece(piece) => piece,
            other => panic!("{other:?}"),
        };
        assert!(piece.unwrap().data() == &stored[..]);
    }
}

#[test]
fn an_object_that_is_not_what_was_stored_is_not_loaded() {
    let server = start(store_options(16, MIB));
    let mut engine = Engine::registered(server.address());
    let mut writer = Client::connect(server.address());
    let layout = engine.registration().memory(16).unwrap().layout.registration("m", 1, 16);
    writer.register(1, layout);
    writer.hello();
    let prompt = key("w", 0, 2);
    let slots = writer.prepare_store(prompt.clone(), 1).slots;
    let generations = slots.slots.iter().filter_map(|slot| slot.generation).collect();
    let checksums = Request::Checksums {
        instance_id: 1,
        offsets: slots.slots.iter().map(|slot| slot.offset).collect(),
        generations,
        checksums: vec![1, 2], // of other bytes
    };
    assert_eq!(writer.call(&checksums), Reply::Integer(2));
    writer.call(&Request::CommitStore { key: prompt.into(), instance_id: 1 });
    assert_eq!(engine.client.lookup(key("r", 0, 2)), 2);
    engine.forget();
    let into = [1, 2, 3, 4, 5, 6, 7, 8];
    assert!(!engine.retrieve(key("r", 0, 2), &into, 0));
    assert_eq!(engine.object(&into[..4]), [0xee; OBJECT]);
    assert_eq!(engine.client.lookup(key("again", 0, 2)), 0, "nobody else loads it");
}

#[test]
fn what_is_there_already_is_not_copied_and_what_does_not_fit_is_not_said_to_be_stored() {
    // A page for each object: four of them.
    let server = start(store_options(16, 4 * 4096));
    let mut engine = Engine::registered(server.address());
    assert!(engine.store(key("r", 0, 1), &[1, 2, 3, 4]));
    let before = engine.object(&[1, 2, 3, 4]);
    engine.forget();
    assert!(engine.store(key("r", 0, 2), &[1, 2, 3, 4, 5, 6, 7, 8]), "the first is there");
    assert_eq!(engine.client.status("stored_chunks"), 2);
    assert_eq!(engine.client.lookup(key("r", 0, 2)), 2);
    assert!(engine.retrieve(key("r", 0, 1), &[8, 9, 10, 11], 0));
    assert!(engine.object(&[8, 9, 10, 11]) == before);
    // Leased chunks make no room.
    assert_eq!(engine.client.lookup(key("leased", 0, 2)), 2);
    let blocks: Vec<u32> = (0..12).collect();
    assert!(!engine.store(key("large", 5000, 3), &blocks));
    assert_eq!(engine.client.status("refused_chunks"), 1);
    assert_eq!(engine.client.lookup(key("large", 5000, 3)), 2, "its beginning is there");
}

#[test]
fn the_first_tokens_of_a_load_are_left_alone() {
    let server = start(store_options(16, MIB));
    let mut engine = Engine::registered(server.address());
    let blocks: Vec<u32> = (1..9).collect();
    let first = engine.object(&blocks[..4]);
    assert!(engine.store(key("r", 0, 2), &blocks));
    for (number, skip) in [(0, 6), (1, 16), (2, 21), (3, 32), (4, u64::MAX)] {
        let request = format!("skip {number}");
        engine.forget();
        assert_eq!(engine.client.lookup(key(&request, 0, 2)), 2);
        assert!(engine.retrieve(key(&request, 0, 2), &blocks, skip));
        for token in 0..32 {
            let found = engine.head(1, blocks[token / TOKENS], token % TOKENS, 2);
            let kept = (token as u64) < skip;
            assert_eq!(found == [0xee; HEAD], kept, "token {token}, {skip} skipped");
        }
        if skip == 6 {
            let token = (HEADS * HEAD) * (16 + 6);
            assert_eq!(engine.head(1, blocks[1], 2, 0), first[token..token + HEAD]);
        }
    }
}

#[test]
fn a_load_takes_leases_and_without_one_nothing_is_touched() {
    let server = start(store_options(16, MIB));
    let mut engine = Engine::registered(server.address());
    assert!(engine.store(key("r", 0, 2), &[1, 2, 3, 4, 5, 6, 7, 8]));
    engine.forget();
    let into = [8, 9, 10, 11];
    assert!(!engine.retrieve(key("r", 0, 1), &into, 0), "nobody looked it up");
    assert_eq!(engine.client.lookup(key("r", 0, 1)), 1);
    assert!(!engine.retrieve(key("other", 0, 1), &into, 0), "another request's lease");
    assert!(
        !engine.retrieve(key("r", 0, 2), &[into, [0, 1, 2, 3]].concat(), 0),
        "one is not leased"
    );
    assert_eq!(engine.object(&into), [0xee; OBJECT]);
    assert!(engine.retrieve(key("r", 0, 1), &into, 0));
    assert_ne!(engine.object(&into), [0xee; OBJECT]);
    assert!(!engine.retrieve(key("r", 0, 1), &into, 0), "the lease was taken");
}

#[test]
fn requests_that_make_no_sense_are_answered_at_once_and_change_nothing() {
    let server = start(store_options(16, MIB));
    let mut engine = Engine::registered(server.address());
    let good = [1, 2, 3, 4];
    let beyond = u32::try_from(BLOCKS).unwrap();
    for blocks in [&[1, 2, 3, beyond][..], &[1, 2, 3, u32::MAX], &[1, 2, 3], &[], &[0, 0, 0, 0]] {
        assert!(!engine.store(key("r", 0, 1), blocks), "{blocks:?}");
    }
    let with = |key: Key, instance_id, block_ids: Vec<Vec<u32>>| Request::Store {
        key: key.into(),
        instance_id,
        block_ids,
        event: (*b"e").into(),
    };
    let prompt = || key("r", 0, 1);
    for request in [
        with(prompt(), INSTANCE + 1, vec![good.into()]),
        with(prompt(), INSTANCE, vec![good.into(), good.into()]),
        with(prompt(), INSTANCE, Vec::new()),
        with(Key { model_name: "n".into(), ..prompt() }, INSTANCE, vec![good.into()]),
        with(Key { worker_id: None, ..prompt() }, INSTANCE, vec![good.into()]),
        with(Key { worker_id: Some(1), ..prompt() }, INSTANCE, vec![good.into()]),
        with(Key { end: 15, ..prompt() }, INSTANCE, vec![good.into()]),
        with(Key { cache_salt: "a/b".into(), ..prompt() }, INSTANCE, vec![good.into()]),
    ] {
        assert!(!engine.copied(&request), "{request:?}");
    }
    assert_eq!(engine.client.status("objects"), 0);
    assert_eq!(engine.client.status("slots_writing"), 0);
    assert!(engine.store(prompt(), &[1, 2, 3, 4, 5, 6]), "more blocks than it needs");
    assert_eq!(engine.client.lookup(prompt()), 1);
    for blocks in [&[1, 2, 3, beyond][..], &[1, 2, 3], &[1, 2, 3, 1]] {
        assert!(!engine.retrieve(prompt(), blocks, 0), "{blocks:?}");
        assert_eq!(engine.client.status("slots_reading"), 0);
        engine.client.lookup(prompt());
    }
    // Malformed, and not even an instance of a peer's.
    let mut frames = with(prompt(), INSTANCE, Vec::new()).encode(1, Dialect::Current);
    frames[4] = Bytes::from_static(b"\xc0");
    engine.client.send(&frames);
    assert_eq!(engine.client.reply(), Reply::Copied { event: Bytes::new(), done: false });
    assert!(!engine.copied(&with(prompt(), 1 << 63, vec![good.into()])));
}

#[test]
fn memory_that_cannot_be_or_is_others_is_refused_and_the_engine_goes_on_without() {
    let server = start(store_options(16, MIB));
    let mut engine = Engine::new(server.address());
    let target = Segment::new();
    fs::write(target.path(), [1; LAYER]).unwrap();
    let link = Segment::new();
    symlink(target.path(), link.path()).unwrap();
    let foreign = Segment::new();
    fs::write(foreign.path(), [1; LAYER]).unwrap();
    let chowned = chown(foreign.path(), Some(1), None);
    let short = Segment::new();
    fs::write(short.path(), [1; LAYER - 1]).unwrap();
    let mut names =
        vec![link.0.clone(), short.0.clone(), "/kvferry_5555".into(), "/../etc/passwd".into()];
    match chowned {
        Ok(()) => names.push(foreign.0.clone()),
        Err(error) => skipped(format_args!("a segment of another user: {error}")),
    }
    for name in names {
        let mut registration = engine.registration();
        let segment = KvStorage::Segment { shm_name: name.clone(), bytes: LAYER as u64 };
        registration.layers[1].storage = segment;
        assert_eq!(engine.register(registration), Reply::None, "{name}: it is answered");
        assert!(!engine.store(key("r", 0, 1), &[1, 2, 3, 4]), "{name}");
    }
    for change in [
        (|it| {
            if let KvStorage::Segment { bytes, .. } = &mut it.layers[0].storage {
                *bytes += 4096;
            }
        }) as fn(&mut KvRegistration),
        |it| it.layers[0].shape[0] = 1 << 40,
        |it| it.layers[1].storage_offset = 1,
        |it| it.layers.clear(),
        |it| it.engine_type = "sglang".into(),
        |it| it.groups.push(it.groups[0].clone()),
        |it| it.model_name = "a@b".into(),
        |it| it.world_size = 0,
    ] {
        let mut registration = engine.registration();
        change(&mut registration);
        assert_eq!(engine.register(registration), Reply::None);
        assert!(!engine.store(key("r", 0, 1), &[1, 2, 3, 4]));
    }
    assert_eq!(engine.client.status("instances"), 0, "nothing of them is left");
    let notes = server.take_notes(std::time::Instant::now());
    let refused = notes.iter().filter(|note| note.event == "engine_refused");
    assert!(refused.clone().map(|note| note.count).sum::<u64>() >= 12);
    assert!(refused.clone().any(|note| note.detail.contains("LMCACHE_MP_TRANSFER_MODE")));
    assert!(!refused.clone().any(|note| note.detail.contains("a@b")), "logs have no peer's words");
    // Other memory is named by its type.
    let registration = engine.registration();
    let request = Request::RegisterKvCache { instance_id: INSTANCE, registration };
    let mut frames = request.encode(1, Dialect::Current);
    frames[3] = Bytes::from_static(b"\x91\xc7\x0f\x01\x81\xa4type\xa8cuda_vmm");
    engine.client.send(&frames);
    assert_eq!(engine.client.reply(), Reply::None);
    assert_eq!(engine.client.status("dropped_memory_type"), 1);
    let registration = engine.registration();
    engine.register(registration);
    assert!(engine.store(key("r", 0, 1), &[1, 2, 3, 4]), "and it may try again");
}

#[test]
fn an_engine_that_truncates_its_memory_harms_nobody_else() {
    let server = start(store_options(16, MIB));
    let mut engine = Engine::registered(server.address());
    let mut other = Engine::registered(server.address());
    assert!(engine.store(key("r", 0, 1), &[1, 2, 3, 4]));
    assert_eq!(engine.client.lookup(key("r", 0, 1)), 1);
    let file = fs::File::options().write(true).open(engine.segments[1].path()).unwrap();
    file.set_len(100).unwrap();
    assert!(!engine.store(key("s", 5000, 1), &[1, 2, 3, 4]));
    assert!(!engine.retrieve(key("r", 0, 1), &[5, 6, 7, 8], 0));
    assert_eq!(file.metadata().unwrap().len(), 100, "it was not made longer");
    for (figure, value) in
        [("slots_writing", 0), ("slots_reading", 0), ("leases", 0), ("objects", 1)]
    {
        assert_eq!(other.client.status(figure), value, "{figure}");
    }
    assert_eq!(other.client.lookup(key("s", 5000, 1)), 0, "half a chunk is none");
    assert!(other.store(key("s", 5000, 1), &[1, 2, 3, 4]));
    assert_eq!(other.client.lookup(key("s", 5000, 1)), 1);
    assert!(other.retrieve(key("s", 5000, 1), &[5, 6, 7, 8], 0));
    // Unlinked memory is still the engine's.
    other.segments.iter().for_each(|segment| fs::remove_file(segment.path()).unwrap());
    assert!(other.store(key("t", 9000, 1), &[1, 2, 3, 4]));
}

#[test]
fn memory_is_its_connections_own_and_goes_with_it() {
    let server = start(store_options(16, MIB));
    let mut observer = Client::connect(server.address());
    let mut engine = Engine::registered(server.address());
    assert!(engine.store(key("r", 0, 1), &[1, 2, 3, 4]));
    let mut stranger = Engine::new(server.address());
    assert!(
        !stranger.store(key("s", 5000, 1), &[1, 2, 3, 4]),
        "the instance is another connection's"
    );
    let unregister = Request::UnregisterKvCache { instance_id: INSTANCE };
    assert_eq!(stranger.client.call(&unregister), Reply::None);
    assert!(engine.store(key("s", 5000, 1), &[1, 2, 3, 4]));
    let open = || {
        let links = fs::read_dir("/proc/self/fd").unwrap().flatten();
        let targets = links.filter_map(|link| fs::read_link(link.path()).ok());
        let name = engine.segments[0].0.clone();
        targets.filter(|target| target.to_string_lossy().contains(&name)).count()
    };
    assert_eq!(open(), 1);
    assert_eq!(engine.client.call(&unregister), Reply::None);
    assert_eq!((open(), observer.status("instances")), (0, 0));
    assert!(!engine.store(key("t", 9000, 1), &[1, 2, 3, 4]));
    assert_eq!(observer.lookup(key("r", 0, 1)), 0, "nobody of the model is registered");
    let registration = engine.registration();
    engine.register(registration.clone());
    engine.register(registration);
    assert_eq!(observer.status("instances"), 1, "the same instance again");
    assert_eq!(observer.lookup(key("r", 0, 1)), 1, "what it stored is still there");
    drop(engine);
    observer.wait_for("instances", 0);
}
