//! Load on a server that speaks LMCache's protocol: hit cycles and store cycles of prompts that differ in their
//! first token, and so in all of their chunks. Messages are encoded once; a prompt's number is put into them.

use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry_core::key::Key;
use kvferry_wire::{Dialect, Reply, Request};

use crate::common::{Client, frame, layout};

/// Tokens of a chunk.
pub(crate) const CHUNK: u32 = 256;
/// The instance that stores.
pub(crate) const INSTANCE: u64 = 7;
const MODEL: &str = "load";
/// Prompt 0's first token; any of these take four bytes in a message.
const FIRST: u32 = 1 << 16;

/// How long each request of a cycle took.
pub(crate) type Cycle<const STEPS: usize> = [Duration; STEPS];

/// The key of a prompt of `tokens` tokens.
pub(crate) fn key(request: &str, prompt: u32, tokens: u32) -> Key {
    let rest = (1..tokens).map(|i| i.wrapping_mul(7919) % 128_000);
    Key {
        model_name: MODEL.into(),
        world_size: 1,
        worker_id: Some(0),
        token_ids: std::iter::once(FIRST + prompt).chain(rest).collect::<Arc<[u32]>>(),
        start: 0,
        end: tokens.into(),
        request_id: request.into(),
        cache_salt: String::new(),
        num_kv_readers: 1,
    }
}

/// The engine that stores: it stays connected as long as prompts are looked up.
pub(crate) fn engine(address: SocketAddr) -> Client {
    let mut engine = Client::connect(address);
    engine.register(INSTANCE, layout(MODEL));
    engine
}

/// The layout of the objects, a page each.
pub(crate) fn model_layout() -> kvferry_core::key::Layout {
    layout(MODEL)
}

/// A request's bytes, and where in them a prompt's number is, if anywhere.
struct Message {
    bytes: Vec<u8>,
    prompt_at: Option<usize>,
}

impl Message {
    fn new(request: impl Fn(u32) -> Request) -> Self {
        let (bytes, other) = (encode(&request(0)), encode(&request(u32::MAX - FIRST)));
        let prompt_at = bytes.iter().zip(&other).position(|(one, other)| one != other);
        let this = Self { bytes, prompt_at };
        assert_eq!(bytes_of(&this, u32::MAX - FIRST), other, "four bytes say which prompt it is");
        this
    }

    /// Makes it one of another prompt.
    fn of(&mut self, prompt: u32) -> &[u8] {
        // 65,536 begins with the bytes 0 and 1, u32::MAX with 255: all four bytes are told apart.
        if let Some(at) = self.prompt_at {
            self.bytes[at..at + 4].copy_from_slice(&(FIRST + prompt).to_be_bytes());
        }
        &self.bytes
    }
}

fn bytes_of(message: &Message, prompt: u32) -> Vec<u8> {
    let Message { ref bytes, prompt_at } = *message;
    Message { bytes: bytes.clone(), prompt_at }.of(prompt).to_vec()
}

fn encode(request: &Request) -> Vec<u8> {
    let frames = request.encode(1, Dialect::Current);
    let last = frames.len() - 1;
    frames.iter().enumerate().flat_map(|(i, body)| frame(body, i < last)).collect()
}

/// Stores prompts, whatever is in their slots; how many of their chunks were new.
pub(crate) fn fill(engine: &mut Client, prompts: Range<u32>, tokens: u32) -> usize {
    prompts
        .map(|prompt| {
            let key = key("fill", prompt, tokens);
            let new = engine.store(key, INSTANCE);
            engine.end_session("fill");
            new
        })
        .sum()
}

/// Waits for an answer without letting the thread sleep, for so long at most: else what is measured is how long an idle
/// processor takes to wake up, too, which on a virtual one is longer than a request takes.
fn wait_awake(stream: &TcpStream, most: Duration) {
    if most.is_zero() {
        return;
    }
    let begun = Instant::now();
    stream.set_nonblocking(true).expect("a socket");
    while begun.elapsed() < most && stream.peek(&mut [0]).is_err() {
        std::thread::yield_now(); // to a server on the same processor
    }
    stream.set_nonblocking(false).expect("a socket");
}

/// Hit cycles (lookup, query, free, end) of so many clients for `span`, each with one request at a time, of the
/// first `prompts` prompts in an order of chance. Each cycle must find all chunks. See [`wait_awake`] for `awake`.
pub(crate) fn hit_cycles(
    address: SocketAddr,
    clients: u32,
    prompts: u32,
    tokens: u32,
    span: Duration,
    awake: Duration,
) -> (Vec<Cycle<4>>, f64) {
    let mut loads: Vec<_> =
        (0..clients).map(|client| Hits::new(address, client, tokens, awake)).collect();
    let begun = Instant::now();
    let cycles: Vec<Vec<Cycle<4>>> = std::thread::scope(|scope| {
        let run = |load: &mut Hits| load.run(prompts, span);
        let threads: Vec<_> = loads.iter_mut().map(|load| scope.spawn(move || run(load))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a client's cycles")).collect()
    });
    (cycles.concat(), begun.elapsed().as_secs_f64())
}

struct Hits {
    client: Client,
    messages: [Message; 4],
    chunks: u64,
    chance: u64,
    awake: Duration,
}

impl Hits {
    fn new(address: SocketAddr, client: u32, tokens: u32, awake: Duration) -> Self {
        let request_id = format!("request-{client}");
        let key = |prompt| Key { worker_id: None, ..key(&request_id, prompt, tokens) };
        let query = || Request::QueryPrefetchStatus { request_id: request_id.clone() };
        let messages = [
            Message::new(|prompt| Request::Lookup { key: key(prompt).into(), tp_size: 1 }),
            Message::new(|_| query()),
            Message::new(|prompt| Request::FreeLookupLocks { key: key(prompt).into(), tp_size: 1 }),
            Message::new(|_| Request::EndSession { request_id: request_id.clone() }),
        ];
        let chance = u64::from(client) + 1;
        let chunks = u64::from(tokens / CHUNK);
        Self { client: Client::connect(address), messages, chunks, chance, awake }
    }

    fn run(&mut self, prompts: u32, span: Duration) -> Vec<Cycle<4>> {
        let mut cycles = Vec::new();
        let begun = Instant::now();
        while begun.elapsed() < span {
            self.chance = self.chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let prompt = u32::try_from((self.chance >> 33) % u64::from(prompts)).unwrap_or(0);
            cycles.push([0, 1, 2, 3].map(|step| self.step(step, prompt)));
        }
        cycles
    }

    fn step(&mut self, step: usize, prompt: u32) -> Duration {
        let Self { client, messages, chunks, awake, .. } = self;
        let message = messages[step].of(prompt);
        let asked = Instant::now();
        loop {
            client.stream.write_all(message).expect("a server that takes requests");
            wait_awake(&client.stream, *awake);
            match (step, client.reply()) {
                (1, Reply::None) => {} // LMCache's lookup still runs
                (1, Reply::Integer(hit)) => {
                    assert_eq!(hit, *chunks, "prompt {prompt} is stored");
                    return asked.elapsed();
                }
                (_, reply) => {
                    assert_eq!(reply, Reply::None);
                    return asked.elapsed();
                }
            }
        }
    }
}

/// Store cycles (prepare, commit) of `count` new prompts from number `first` on, for which others must go. Each
/// must get slots for all of its chunks. See [`wait_awake`] for `awake`.
pub(crate) fn store_cycles(
    address: SocketAddr,
    first: u32,
    count: u32,
    tokens: u32,
    awake: Duration,
) -> (Vec<Cycle<2>>, f64) {
    let instance_id = INSTANCE;
    let mut messages = [
        Message::new(|prompt| Request::PrepareStore {
            key: key("store", prompt, tokens).into(),
            instance_id,
        }),
        Message::new(|prompt| Request::CommitStore {
            key: key("store", prompt, tokens).into(),
            instance_id,
        }),
    ];
    let mut client = Client::connect(address);
    let chunks = (tokens / CHUNK) as usize;
    let begun = Instant::now();
    let cycles = (first..first + count)
        .map(|prompt| {
            [0, 1].map(|step| {
                let message = messages[step].of(prompt);
                let asked = Instant::now();
                client.stream.write_all(message).expect("a server that takes requests");
                wait_awake(&client.stream, awake);
                match client.reply() {
                    Reply::StoreSlots(Some(slots)) if step == 0 => {
                        assert_eq!(slots.slots.slots.len(), chunks, "prompt {prompt} is new");
                    }
                    reply => assert_eq!((step, reply), (1, Reply::Boolean(true))),
                }
                asked.elapsed()
            })
        })
        .collect();
    (cycles, begun.elapsed().as_secs_f64())
}

/// Microseconds of one step of many cycles: the median, 99 of 100, and the longest.
pub(crate) fn spread<const STEPS: usize>(cycles: &[Cycle<STEPS>], step: usize) -> [f64; 3] {
    let mut times: Vec<Duration> = cycles.iter().map(|cycle| cycle[step]).collect();
    times.sort_unstable();
    let last = times.len().saturating_sub(1);
    let at = |percent: usize| times.get(last * percent / 100).map_or(f64::NAN, |time| us(*time));
    [at(50), at(99), at(100)]
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
