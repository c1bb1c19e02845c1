//! Engines with memory on a GPU, which the server copies from and to by itself. Each engine is a process of its own, and so is
//! each test with its server: on the fake driver, or by `npm run test:gpu` on a real one.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;
use std::{env, fs};

use bytes::Bytes;
use common::{Client, key, skipped, start, store_options};
use kvferry_core::key::{Dtype, Key};
use kvferry_core::kv_descriptors::{
    CudaStorage, EngineGroup, KvDescriptor, KvRegistration, KvStorage,
};
use kvferry_server::Server;
use kvferry_wire::{Dialect, Reply, Request};

/// Names the test that a child process runs.
const CHILD: &str = "KVFERRY_CUDA_TEST";
/// Set by `npm run test:gpu`: the tests run on the machine's own driver.
const GPU: &str = "KVFERRY_TEST_GPU";

/// Microseconds that an operation of the fake driver takes at most.
const DELAY: &str = "FAKECUDA_DELAY_US";

const MIB: u64 = 1 << 20;
/// K and V apart, `[2, blocks, tokens, heads, head]` of two bytes a layer, as FlashAttention has it.
const SHAPE: [u64; 5] = [2, 12, 4, 3, 4];
const BLOCK: u64 = 4 * 3 * 4 * 2;
const PLANE: u64 = 12 * BLOCK;
const LAYER: u64 = 2 * PLANE;
/// Where the layers begin in their allocation.
const LAYERS: [u64; 2] = [512, 8192];
const ALLOCATION: u64 = 64 << 10;
const INSTANCE: u64 = 1000;

/// What a test needs.
#[derive(Clone, Copy, PartialEq)]
enum On {
    /// A driver, which complains of nothing.
    Any,
    /// The fake one, which complains of nothing.
    Fake,
    /// The fake one, whose complaints are of the test's own making.
    Wrong,
    /// The fake one, whose copies take longer than anybody waits.
    Stuck,
    /// None.
    Nothing,
}

/// Runs a test in a process of its own, which finds a driver by its environment.
fn on(needs: On, test: &str, body: impl FnOnce()) {
    if env::var(CHILD).is_ok_and(|child| child == test) {
        return body();
    }
    let mut command = Command::new(env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(CHILD, test);
    let folder = Folder::new(test);
    if env::var_os(GPU).is_none() {
        command.env("LD_LIBRARY_PATH", &folder.0);
        if needs != On::Nothing {
            let Some(driver) = fake_driver() else {
                return skipped(format_args!("{test}: cargo build -p fake-cuda makes its driver"));
            };
            for name in ["libcuda.so", "libcuda.so.1"] {
                std::os::unix::fs::symlink(&driver, folder.0.join(name)).unwrap();
            }
            let is_strict = matches!(needs, On::Any | On::Fake);
            command.env("FAKECUDA_STRICT", if is_strict { "1" } else { "0" });
            if needs == On::Stuck {
                command.env(DELAY, "1000000000");
            }
        }
    } else if needs != On::Any {
        return skipped(format_args!("{test}: it needs the fake driver"));
    }
    let ended = command.output().unwrap();
    let said = [ended.stdout, ended.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(ended.status.success() && said.contains("1 passed"), "{}\n{said}", ended.status);
}

/// A folder that goes with the value.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let name = format!("kvferry_server_cuda_{}_{test}", std::process::id());
        let folder = env::temp_dir().join(name);
        fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Where cargo builds.
fn target() -> PathBuf {
    env::current_exe().unwrap().ancestors().nth(2).map(Path::to_path_buf).unwrap()
}

fn fake_driver() -> Option<PathBuf> {
    let age = |path: &PathBuf| fs::metadata(path).and_then(|of| of.modified()).ok();
    let places = ["libfake_cuda.so", "deps/libfake_cuda.so"].map(|name| target().join(name));
    let newest = places.into_iter().max_by_key(age)?;
    (newest.exists() && target().join("cuda-engine").exists()).then_some(newest)
}

/// The process that has the memory.
struct Process {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Process {
    fn start() -> Self {
        let mut command = Command::new(target().join("cuda-engine"));
        command.env(DELAY, "200");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let orders = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().unwrap());
        Self { child, orders, answers }
    }

    fn ask(&mut self, order: &str) -> String {
        writeln!(self.orders.as_mut().unwrap(), "{order}").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        let answer = answer.strip_prefix("ok").unwrap_or_else(|| panic!("{order}: {answer}"));
        answer.trim().to_owned()
    }

    fn bytes<const N: usize>(&mut self, order: &str) -> [u8; N] {
        from_hex(&self.ask(order)).try_into().unwrap()
    }

    /// It ends by itself, and its driver does not complain.
    fn end(mut self) {
        self.orders = None;
        assert!(self.child.wait().unwrap().success());
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn from_hex(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

/// An engine as vLLM's is, with both layers in one allocation.
struct Engine {
    client: Client,
    process: Process,
}

impl Engine {
    fn new(address: SocketAddr) -> Self {
        let mut process = Process::start();
        assert_eq!(process.ask(&format!("alloc {ALLOCATION}")), "0");
        process.ask("fill 0 1");
        Self { client: Client::connect(address), process }
    }

    fn registered(server: &Server) -> Self {
        let mut engine = Self::new(server.address());
        let registration = engine.registration();
        engine.register(registration);
        assert_eq!(refusals(server), Vec::<String>::new());
        engine
    }

    /// As LMCache's `cuda_raw` descriptors have it.
    fn registration(&mut self) -> KvRegistration {
        let (device_uuid, handle) = (self.process.bytes("uuid"), self.process.bytes("export 0"));
        let layers = LAYERS.map(|offset| {
            let part = CudaStorage { device_uuid, handle, offset, bytes: LAYER };
            KvDescriptor {
                storage: KvStorage::Cuda(Box::new(part)),
                dtype: Dtype::new("bfloat16").unwrap(),
                shape: SHAPE.into(),
                stride: vec![PLANE / 2, BLOCK / 2, 12, 4, 1],
                storage_offset: 0,
            }
        });
        let group = EngineGroup {
            engine_group_id: 0,
            layer_indices: vec![0, 1],
            tokens_per_block: 4,
            sw_size_tokens: -1,
            extra_object_group_tag: 0,
            recurrent_state: false,
        };
        KvRegistration {
            model_name: "m".into(),
            world_size: 1,
            engine_type: "vllm".into(),
            kv_layout: Some("NHD".into()),
            groups: vec![group],
            layers: layers.into(),
        }
    }

    fn register(&mut self, registration: KvRegistration) {
        let request = Request::RegisterKvCache { instance_id: INSTANCE, registration };
        assert_eq!(self.client.call(&request), Reply::None, "it is answered, whatever it is");
    }

    /// Registers by frames that LMCache's own structs were encoded to, with this engine's handle in them.
    fn register_by_frames(&mut self, step: usize) {
        const HANDLE: [u8; 2] = [0xa0, 0xe0];
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../test/wire/lmcache_driven_cuda.json");
        let steps: Vec<serde_json::Value> =
            serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let frames = steps[step]["frames_hex"].as_array().unwrap();
        let mut frames: Vec<Vec<u8>> =
            frames.iter().map(|frame| from_hex(frame.as_str().unwrap())).collect();
        let handle: [u8; 64] = self.process.bytes("export 0");
        let uuid: [u8; 16] = self.process.bytes("uuid");
        let recorded: Vec<u8> = (HANDLE[0]..HANDLE[1]).collect();
        replace(&mut frames[3], &recorded, &handle);
        replace(&mut frames[3], b"66616b65-2d63-7564-612d-646576696300", written(&uuid).as_bytes());
        let frames: Vec<Bytes> = frames.into_iter().map(Bytes::from).collect();
        self.client.send(&frames);
        assert_eq!(self.client.reply(), Reply::None);
    }

    fn unregister(&mut self) {
        let request = Request::UnregisterKvCache { instance_id: INSTANCE };
        assert_eq!(self.client.call(&request), Reply::None);
    }

    /// An event behind all that the engine's stream was asked.
    fn event(&mut self) -> Box<[u8]> {
        Box::new(self.process.bytes::<64>("record"))
    }

    fn store(&mut self, key: Key, blocks: &[u32]) -> bool {
        let request = storing(key, blocks, self.event());
        self.copied(&request)
    }

    fn retrieve(&mut self, key: Key, blocks: &[u32], skip: u64) -> bool {
        let request = retrieving(key, blocks, skip, self.event());
        self.copied(&request)
    }

    fn copied(&mut self, request: &Request) -> bool {
        let reply = self.client.call(request);
        is_done(&reply)
    }

    /// The bytes of some tokens of some blocks in each layer, K and V.
    fn tokens(&mut self, blocks: &[u32], tokens: std::ops::Range<u64>) -> Vec<String> {
        let mut found = Vec::new();
        for begin in LAYERS.into_iter().flat_map(|layer| [layer, layer + PLANE]) {
            for block in blocks {
                let at = begin + u64::from(*block) * BLOCK + tokens.start * 24;
                let bytes = (tokens.end - tokens.start) * 24;
                found.push(self.process.ask(&format!("read 0 {at} {bytes}")));
            }
        }
        found
    }

    fn blocks(&mut self, blocks: &[u32]) -> Vec<String> {
        self.tokens(blocks, 0..4)
    }

    /// Unregisters and ends, and nobody complains.
    fn end(mut self) {
        self.unregister();
        self.process.end();
    }
}

fn storing(key: Key, blocks: &[u32], event: Box<[u8]>) -> Request {
    let block_ids = vec![blocks.to_vec()];
    Request::Store { key: key.into(), instance_id: INSTANCE, block_ids, event }
}

fn retrieving(key: Key, blocks: &[u32], skip: u64, event: Box<[u8]>) -> Request {
    let (block_ids, skip_first_n_tokens) = (vec![blocks.to_vec()], skip);
    let (key, instance_id) = (key.into(), INSTANCE);
    Request::Retrieve { key, instance_id, block_ids, event, skip_first_n_tokens }
}

/// Whether it was done. With no event LMCache's clients take it for over: what was answered by an event would be waited for.
fn is_done(reply: &Reply) -> bool {
    let Reply::Copied { event, done } = reply else { panic!("{reply:?}") };
    assert_eq!(&event[..], b"");
    *done
}

/// Why engines were refused since this was last asked.
fn refusals(server: &Server) -> Vec<String> {
    let notes = server.take_notes(Instant::now()).into_iter();
    let refused = notes.filter(|note| note.event == "engine_refused");
    refused.map(|note| note.detail).collect()
}

/// A UUID as PyTorch writes it.
fn written(uuid: &[u8; 16]) -> String {
    let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

fn replace(bytes: &mut [u8], from: &[u8], to: &[u8]) {
    let mut replaced = 0;
    for at in 0..=bytes.len() - from.len() {
        if bytes[at..at + from.len()] == *from {
            bytes[at..at + from.len()].copy_from_slice(to);
            replaced += 1;
        }
    }
    assert!(replaced > 0);
}

const FIRST: [u32; 4] = [7, 3, 1, 11];
const SECOND: [u32; 4] = [2, 9, 5, 0];

#[test]
fn what_an_engine_stored_comes_back_into_other_blocks() {
    on(On::Any, "what_an_engine_stored_comes_back_into_other_blocks", || {
        let server = start(store_options(16, MIB));
        let mut scheduler = Client::connect(server.address());
        // By our own frames, and by those of PyTorch's storages, with and without a version.
        for (round, step) in [None, Some(1), Some(2)].into_iter().enumerate() {
            let mut engine = Engine::new(server.address());
            match step {
                Some(step) => engine.register_by_frames(step),
                None => {
                    let registration = engine.registration();
                    engine.register(registration);
                }
            }
            assert_eq!(refusals(&server), Vec::<String>::new());
            engine.process.ask(&format!("fill 0 {round}"));
            let first_token = 1000 * u32::try_from(round).unwrap();
            let prompt = key(&format!("r{round}"), first_token, 2);
            assert_eq!(scheduler.lookup(prompt.clone()), 0);
            let (first, second) = (engine.blocks(&FIRST), engine.blocks(&SECOND));
            assert!(engine.store(prompt.clone(), &[FIRST, SECOND].concat()));
            assert_eq!(scheduler.lookup(prompt.clone()), 2, "the answer comes after the commit");
            engine.process.ask("fill 0 99");
            let (one, two) = ([0, 1, 2, 3], [8, 9, 10, 11]);
            let kept = engine.blocks(&[4, 5, 6, 7]);
            assert!(engine.retrieve(prompt.clone(), &[one, two].concat(), 0));
            assert!(engine.blocks(&one) == first && engine.blocks(&two) == second);
            assert!(engine.blocks(&[4, 5, 6, 7]) == kept, "nothing else was touched");
            for (figure, value) in [("leases", 0), ("slots_reading", 0), ("slots_writing", 0)] {
                assert_eq!(scheduler.status(figure), value, "{figure}");
            }
            // The first tokens are left alone: a block and a half here.
            engine.process.ask("fill 0 50");
            assert_eq!(scheduler.lookup(prompt.clone()), 2);
            let before = engine.blocks(&one[..1]);
            let half = engine.tokens(&one[1..2], 0..2);
            assert!(engine.retrieve(prompt, &[one, two].concat(), 6));
            assert!(engine.blocks(&one[..1]) == before && engine.tokens(&one[1..2], 0..2) == half);
            assert!(engine.blocks(&two) == second);
            let stored = [first[1].clone(), first[5].clone(), first[9].clone(), first[13].clone()];
            let late = engine.tokens(&one[1..2], 2..4);
            assert!(late.iter().zip(&stored).all(|(late, stored)| stored.ends_with(late)));
            engine.end();
        }
        assert_eq!(scheduler.status("stored_chunks"), 6);
        assert_eq!(scheduler.status("instances"), 0);
    });
}

#[test]
fn an_engine_finds_what_one_of_the_same_shape_stored_in_another_process() {
    on(On::Any, "an_engine_finds_what_one_of_the_same_shape_stored_in_another_process", || {
        let server = start(store_options(16, MIB));
        let mut first = Engine::registered(&server);
        let stored = first.blocks(&FIRST);
        assert!(first.store(key("r", 0, 1), &FIRST));
        first.end();
        let mut second = Engine::registered(&server);
        second.process.ask("fill 0 9");
        assert_eq!(second.client.lookup(key("s", 0, 1)), 1);
        assert!(second.retrieve(key("s", 0, 1), &SECOND, 0));
        assert!(second.blocks(&SECOND) == stored);
        second.end();
    });
}

#[test]
fn all_memory_is_reserved_once_a_gpu_is_registered() {
    on(On::Any, "all_memory_is_reserved_once_a_gpu_is_registered", || {
        let memory = 192 * MIB;
        let server = start(store_options(16, memory));
        let mut client = Client::connect(server.address());
        assert!(client.status("reserved_bytes") < i64::try_from(memory).unwrap());
        let engine = Engine::registered(&server);
        client.wait_for("reserved_bytes", i64::try_from(memory).unwrap());
        engine.end();
    });
}

#[test]
fn what_the_engine_computes_is_waited_for() {
    on(On::Fake, "what_the_engine_computes_is_waited_for", || {
        let server = start(store_options(16, MIB));
        let mut engine = Engine::registered(&server);
        let prompt = key("r", 0, 1);
        engine.process.ask("hold 1");
        engine.process.ask(&format!("compute 0 0 {ALLOCATION} 90"));
        let event = engine.event();
        engine.client.request(&storing(prompt.clone(), &FIRST, event));
        engine.process.ask("looked");
        engine.process.ask("hold 0");
        assert!(is_done(&engine.client.reply()));
        engine.process.ask("fill 0 9");
        assert_eq!(engine.client.lookup(prompt.clone()), 1);
        // What still computes on the blocks would overwrite what was loaded.
        engine.process.ask("hold 1");
        engine.process.ask(&format!("compute 0 0 {ALLOCATION} 17"));
        let event = engine.event();
        engine.client.request(&retrieving(prompt, &SECOND, 0, event));
        engine.process.ask("looked");
        engine.process.ask("hold 0");
        assert!(is_done(&engine.client.reply()));
        assert!(engine.blocks(&SECOND).iter().all(|block| *block == "5a".repeat(96)));
        engine.end();
    });
}

#[test]
fn counters_are_waited_for_as_events_are() {
    on(On::Any, "counters_are_waited_for_as_events_are", || {
        let server = start(store_options(16, MIB));
        let mut engine = Engine::registered(&server);
        assert_eq!(engine.process.ask("alloc 32768"), "1");
        engine.process.ask(&format!("write 1 0 {}", "00".repeat(32768)));
        let handle: [u8; 64] = engine.process.bytes("export 1");
        let event = |offset: u64, value: u64| -> Box<[u8]> {
            let numbers = [offset.to_be_bytes(), value.to_be_bytes()].concat();
            [&[1], &handle[..], &numbers[..]].concat().into()
        };
        let count = |engine: &mut Engine, value: u64| {
            let hex: String =
                value.to_le_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
            engine.process.ask(&format!("write 1 8 {hex}"));
        };
        let prompt = || key("r", 0, 1);
        assert!(engine.copied(&storing(prompt(), &FIRST, event(0, 0))), "never recorded");
        count(&mut engine, 3);
        assert!(engine.copied(&storing(key("s", 5000, 1), &FIRST, event(8, 2))), "it is past that");
        engine.client.request(&storing(key("t", 9000, 1), &FIRST, event(8, 4)));
        engine.process.ask("fill 0 77");
        let now = engine.blocks(&FIRST);
        count(&mut engine, 4);
        assert!(is_done(&engine.client.reply()));
        assert_eq!(engine.client.lookup(key("t", 9000, 1)), 1);
        assert!(engine.copied(&retrieving(key("t", 9000, 1), &SECOND, 0, event(8, 4))));
        assert!(engine.blocks(&SECOND) == now);
        // None of these is one.
        for (offset, value) in [(4, 1), (32768, 1), (u64::MAX, 1)] {
            assert!(!engine.copied(&storing(key("u", 20_000, 1), &FIRST, event(offset, value))));
        }
        let late = storing(key("v", 30_000, 1), &FIRST, event(8, 5));
        assert!(!engine.copied(&late), "the engine has not counted so far");
        assert_eq!(engine.client.lookup(key("v", 30_000, 1)), 0);
        engine.end();
    });
}

#[test]
fn what_is_no_event_is_refused_at_once() {
    on(On::Wrong, "what_is_no_event_is_refused_at_once", || {
        let server = start(store_options(16, MIB));
        let mut engine = Engine::registered(&server);
        let destroyed = engine.event();
        engine.process.ask("destroy");
        let memory: [u8; 64] = engine.process.bytes("export 0");
        let strange: Vec<Box<[u8]>> = vec![
            Box::default(),
            (*b"stub_ipc_handle").into(),
            [7; 64].into(),
            memory.into(),
            destroyed,
            [1; 81].into(),
            [9; 81].into(),
        ];
        for event in strange {
            assert!(!engine.copied(&storing(key("r", 0, 1), &FIRST, event.clone())), "{event:?}");
        }
        assert_eq!(engine.client.status("slots_writing"), 0);
        assert!(engine.store(key("r", 0, 1), &FIRST));
        engine.end();
    });
}

#[test]
fn memory_that_cannot_be_opened_is_refused_and_the_engine_goes_on_without() {
    let test = "memory_that_cannot_be_opened_is_refused_and_the_engine_goes_on_without";
    on(On::Wrong, test, || {
        let server = start(store_options(16, MIB));
        let mut engine = Engine::new(server.address());
        engine.process.ask("alloc 65536");
        let freed: [u8; 64] = engine.process.bytes("export 1");
        engine.process.ask("free 1");
        let good = engine.registration();
        type Change<'a> = &'a dyn Fn(&mut CudaStorage);
        let changes: [(Change<'_>, &str); 6] = [
            (&|it| it.handle = [7; 64], "cuIpcOpenMemHandle"),
            (&|it| it.handle = freed, "cuIpcOpenMemHandle"),
            (&|it| it.offset = ALLOCATION - LAYER + 512, "beyond the exported memory"),
            (&|it| it.bytes = LAYER - 1, "are not within"),
            (&|it| it.offset = LAYERS[0] + BLOCK / 2, "overlap"),
            (&|it| it.device_uuid = [1; 16], "several devices"),
        ];
        for (change, words) in changes {
            let mut registration = good.clone();
            let KvStorage::Cuda(part) = &mut registration.layers[1].storage else { panic!() };
            change(part);
            engine.register(registration);
            let why = refusals(&server);
            assert!(why.len() == 1 && why[0].contains(words), "{words}: {why:?}");
            assert!(!engine.store(key("r", 0, 1), &FIRST), "{words}");
        }
        let mut elsewhere = good.clone();
        for layer in &mut elsewhere.layers {
            let KvStorage::Cuda(part) = &mut layer.storage else { panic!() };
            part.device_uuid = [1; 16];
        }
        engine.register(elsewhere);
        assert!(refusals(&server)[0].contains("CUDA_VISIBLE_DEVICES"));
        assert_eq!(engine.client.status("dropped_memory_type"), 0);
        engine.register_by_frames_of_another_kind();
        assert_eq!(engine.client.status("dropped_memory_type"), 2);
        assert_eq!(engine.client.status("instances"), 0, "nothing of them is left");
        engine.register(good);
        assert!(engine.store(key("r", 0, 1), &FIRST), "and it may try again");
        engine.end();
    });
}

#[test]
fn an_engine_that_dies_holds_up_and_harms_nobody() {
    on(On::Fake, "an_engine_that_dies_holds_up_and_harms_nobody", || {
        let server = start(store_options(16, MIB));
        let mut dies = Engine::registered(&server);
        let mut lives = Engine::registered(&server);
        let stored = lives.blocks(&FIRST);
        assert!(lives.store(key("r", 0, 1), &FIRST));
        assert_eq!(lives.client.lookup(key("r", 0, 1)), 1);
        // While its event is waited for.
        dies.process.ask("hold 1");
        let event = dies.event();
        dies.client.request(&storing(key("s", 5000, 1), &FIRST, event));
        dies.process.ask("looked");
        dies.process.kill();
        assert!(!is_done(&dies.client.reply()), "what it computed is never done");
        for (figure, value) in [("slots_writing", 0), ("slots_reading", 0), ("objects", 1)] {
            assert_eq!(lives.client.status(figure), value, "{figure}");
        }
        drop(dies);
        lives.client.wait_for("instances", 1);
        assert!(lives.store(key("s", 5000, 1), &FIRST));
        assert!(lives.retrieve(key("r", 0, 1), &SECOND, 0));
        assert!(lives.blocks(&SECOND) == stored);
        lives.end();
    });
}

#[test]
fn memory_that_is_freed_meanwhile_fails_copies_and_nobody_waits() {
    on(On::Wrong, "memory_that_is_freed_meanwhile_fails_copies_and_nobody_waits", || {
        let server = start(store_options(16, MIB));
        let mut other = Client::connect(server.address());
        let mut engine = Engine::registered(&server);
        assert!(engine.store(key("r", 0, 1), &FIRST));
        for request in ["a", "b"] {
            assert_eq!(other.lookup(key(request, 0, 1)), 1);
        }
        engine.process.ask("free 0");
        // The fake driver takes the device away for that.
        assert!(!engine.store(key("s", 5000, 1), &FIRST));
        assert!(!engine.retrieve(key("a", 0, 1), &SECOND, 0));
        for (figure, value) in [("slots_writing", 0), ("slots_reading", 0), ("objects", 1)] {
            assert_eq!(other.status(figure), value, "{figure}");
        }
        engine.process.kill();
        assert!(!engine.copied(&retrieving(key("b", 0, 1), &SECOND, 0, [0; 64].into())));
        drop(engine);
        other.wait_for("instances", 0);
    });
}

#[test]
fn a_copy_that_the_gpu_does_not_end_is_answered_and_its_slots_are_nobodys() {
    on(On::Stuck, "a_copy_that_the_gpu_does_not_end_is_answered_and_its_slots_are_nobodys", || {
        let server = start(store_options(16, MIB));
        let mut other = Client::connect(server.address());
        let mut engine = Engine::registered(&server);
        assert!(!engine.store(key("r", 0, 1), &FIRST));
        assert_eq!(other.status("slots_writing"), 1, "the GPU may yet write there");
        assert!(!engine.store(key("s", 5000, 1), &FIRST), "none begins behind it");
        assert_eq!(other.status("slots_writing"), 1);
        drop(engine);
        other.wait_for("slots_apart", 1);
        assert_eq!(other.status("objects"), 0);
    });
}

#[test]
fn without_a_driver_the_registration_is_refused_and_says_so() {
    on(On::Nothing, "without_a_driver_the_registration_is_refused_and_says_so", || {
        let server = start(store_options(16, MIB));
        let mut client = Client::connect(server.address());
        let storage =
            CudaStorage { device_uuid: [1; 16], handle: [2; 64], offset: 0, bytes: LAYER };
        let layer = KvDescriptor {
            storage: KvStorage::Cuda(Box::new(storage)),
            dtype: Dtype::new("bfloat16").unwrap(),
            shape: SHAPE.into(),
            stride: vec![PLANE / 2, BLOCK / 2, 12, 4, 1],
            storage_offset: 0,
        };
        let registration = KvRegistration {
            model_name: "m".into(),
            world_size: 1,
            engine_type: "vllm".into(),
            kv_layout: Some("NHD".into()),
            groups: Vec::new(),
            layers: vec![layer],
        };
        let request = Request::RegisterKvCache { instance_id: INSTANCE, registration };
        assert_eq!(client.call(&request), Reply::None);
        let why = refusals(&server);
        assert!(why.len() == 1 && why[0].contains("CUDA"), "{why:?}");
        assert!(!is_done(&client.call(&storing(key("r", 0, 1), &FIRST, [0; 64].into()))));
        assert_eq!(client.status("instances"), 0);
    });
}

impl Engine {
    /// Memory that CUDA's handles do not name.
    fn register_by_frames_of_another_kind(&mut self) {
        let registration = self.registration();
        for kind in [&b"\x91\xc7\x0f\x01\x81\xa4type\xa8cuda_vmm"[..], EXPANDABLE] {
            let registration = registration.clone();
            let request = Request::RegisterKvCache { instance_id: INSTANCE, registration };
            let mut frames = request.encode(1, Dialect::Current);
            frames[3] = Bytes::from_static(kind);
            self.client.send(&frames);
            assert_eq!(self.client.reply(), Reply::None);
        }
    }
}

/// A storage of PyTorch's in expandable segments, as short as it can be.
const EXPANDABLE: &[u8] = b"\x91\xc7\x5e\x01\x84\xa4type\xa4cuda\xa6handle\x98\x00\xc4\x03\x02eX\x01\x00\xc0\x00\xc0\xc2\
    \xa7version\x01\xa8metadata\x84\xa5dtype\xa4half\xa5shape\x91\x01\xa6stride\x91\x01\xaestorage_offset\x00";
