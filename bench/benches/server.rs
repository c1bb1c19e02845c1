//! Hit cycles of a server: lookup, query, free, end for a prompt of 2,048 tokens that is stored. Without an
//! argument against a server in this process; `cargo bench --bench server -- HOST:PORT` against any
//! server that speaks LMCache's protocol, with chunks of 256 tokens.
#![allow(clippy::print_stdout, reason = "a benchmark's rows are its output")]
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[path = "../../crates/kvferry-server/tests/common/mod.rs"]
mod common;

use std::io::Write as _;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use common::{Client, frame, layout, start, store_options};
use kvferry_core::key::Key;
use kvferry_wire::{Dialect, Reply, Request};

const TOKENS: u32 = 2048;
const CHUNK: u32 = 256;
const INSTANCE: u64 = 7;
/// How long each row is measured.
const SPAN: Duration = Duration::from_secs(3);

fn main() {
    let elsewhere = std::env::args().skip(1).find(|argument| !argument.starts_with("--"));
    let server = elsewhere.is_none().then(|| start(store_options(CHUNK, 1 << 20)));
    let address = match (&server, elsewhere) {
        (Some(server), _) => server.address(),
        (None, Some(address)) => address.to_socket_addrs().unwrap().next().unwrap(),
        (None, None) => unreachable!("a server is somewhere"),
    };
    let mut engine = Client::connect(address);
    engine.register(INSTANCE, layout("load"));
    engine.store(key("store"), INSTANCE);
    for clients in [1, 8] {
        let begun = Instant::now();
        let cycles: Vec<Vec<[Duration; 4]>> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..clients).map(|client| scope.spawn(move || load(address, client))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let elapsed = begun.elapsed().as_secs_f64();
        let cycles = cycles.concat();
        println!("{clients} clients: {:.0} hit cycles a second", cycles.len() as f64 / elapsed);
        for (step, name) in ["lookup", "query", "free", "end"].into_iter().enumerate() {
            let mut times: Vec<Duration> = cycles.iter().map(|cycle| cycle[step]).collect();
            times.sort_unstable();
            let at = |percent: usize| times[(times.len() - 1) * percent / 100].as_micros();
            println!("    {name:<8} p50 {:>5} µs   p99 {:>5} µs", at(50), at(99));
        }
    }
}

fn key(request: &str) -> Key {
    Key {
        model_name: "load".into(),
        world_size: 1,
        worker_id: Some(0),
        token_ids: (0..TOKENS).map(|i| i.wrapping_mul(7919) % 128_000).collect(),
        start: 0,
        end: TOKENS.into(),
        request_id: request.into(),
        cache_salt: String::new(),
        num_kv_readers: 1,
    }
}

/// Cycles of one client, one request at a time; how long each request took.
fn load(address: SocketAddr, client: u32) -> Vec<[Duration; 4]> {
    let request_id = format!("request-{client}");
    let key = Key { worker_id: None, ..key(&request_id) };
    let requests = [
        Request::Lookup { key: key.clone().into(), tp_size: 1 },
        Request::QueryPrefetchStatus { request_id: request_id.clone() },
        Request::FreeLookupLocks { key: key.into(), tp_size: 1 },
        Request::EndSession { request_id },
    ];
    let messages = requests.each_ref().map(message);
    let mut client = Client::connect(address);
    let mut cycles = Vec::new();
    let begun = Instant::now();
    while begun.elapsed() < SPAN {
        cycles.push([0, 1, 2, 3].map(|step| {
            let asked = Instant::now();
            loop {
                client.stream.write_all(&messages[step]).unwrap();
                match (step, client.reply()) {
                    (1, Reply::None) => {} // LMCache's lookup still runs
                    (1, Reply::Integer(hit)) => {
                        assert_eq!(hit, u64::from(TOKENS / CHUNK));
                        break;
                    }
                    (_, reply) => {
                        assert_eq!(reply, Reply::None);
                        break;
                    }
                }
            }
            asked.elapsed()
        }));
    }
    cycles
}

/// A request's bytes, encoded once.
fn message(request: &Request) -> BytesMut {
    let frames = request.encode(1, Dialect::Current);
    let last = frames.len() - 1;
    let mut bytes = BytesMut::new();
    for (i, body) in frames.iter().enumerate() {
        bytes.extend_from_slice(&frame(body, i < last));
    }
    bytes
}
