//! Hit cycles of a server: lookup, query, free, end for a prompt of 2,048 tokens that is stored. Without an
//! argument against a server in this process; `cargo bench --bench server -- HOST:PORT` against any
//! server that speaks LMCache's protocol, with chunks of 256 tokens. Servers side by side: `npm run bench -- server`.
#![allow(clippy::print_stdout, reason = "a benchmark's rows are its output")]
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]
#![allow(dead_code, reason = "each benchmark uses its part")]

#[path = "../../crates/kvferry-server/tests/common/mod.rs"]
mod common;
#[path = "../load.rs"]
mod load;

use std::net::ToSocketAddrs as _;
use std::time::Duration;

use common::{start, store_options};

const TOKENS: u32 = 2048;
/// How long each row is measured.
const SPAN: Duration = Duration::from_secs(3);
/// For so long a client that is alone waits for an answer awake.
const AWAKE: Duration = Duration::from_micros(150);

fn main() {
    let elsewhere = std::env::args().skip(1).find(|argument| !argument.starts_with("--"));
    let server = elsewhere.is_none().then(|| start(store_options(load::CHUNK, 1 << 20)));
    let address = match (&server, elsewhere) {
        (Some(server), _) => server.address(),
        (None, Some(address)) => address.to_socket_addrs().unwrap().next().unwrap(),
        (None, None) => unreachable!("a server is somewhere"),
    };
    let mut engine = load::engine(address);
    load::fill(&mut engine, 0..1, TOKENS);
    for (clients, awake) in [(1, AWAKE), (1, Duration::ZERO), (8, Duration::ZERO)] {
        let (cycles, seconds) = load::hit_cycles(address, clients, 1, TOKENS, SPAN, awake);
        let rate = cycles.len() as f64 / seconds;
        println!("{clients} clients, awake for {awake:?}: {rate:.0} hit cycles a second");
        for (step, name) in ["lookup", "query", "free", "end"].into_iter().enumerate() {
            let [p50, p99, _] = load::spread(&cycles, step);
            println!("    {name:<8} p50 {p50:>5.0} µs   p99 {p99:>5.0} µs");
        }
    }
}
