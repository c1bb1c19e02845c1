//! What bench/node/server.mjs drives. `server load HOST:PORT` is the load on a server; it answers each line of its
//! input with one of JSON:
//!
//! - `fill TOKENS PROMPTS`: stores the first prompts; how many of their chunks were new
//! - `hit CLIENTS TOKENS PROMPTS MS AWAKE_US`: hit cycles of the first prompts
//! - `store TOKENS FIRST COUNT AWAKE_US`: store cycles of new prompts
//!
//! Clients wait for an answer awake for so many microseconds.
//!
//! `server serve OBJECTS` is a server of a pool that has room for so many objects of one page, all of them stored,
//! until its input ends. Its pool is its own: nobody writes into the slots, so their pages are never there.
#![allow(clippy::print_stdout, reason = "the answers")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a benchmark fails by panicking")]
#![allow(dead_code, reason = "each benchmark uses its part")]

#[path = "../../crates/kvferry-server/tests/common/mod.rs"]
mod common;
#[path = "../load.rs"]
mod load;

use std::error::Error;
use std::io::{BufRead as _, Read as _};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use kvferry_server::{Server, ServerOptions};
use kvferry_store::{Limits, Policy, Store, StoreOptions};
use serde_json::{Value, json};

/// Tokens of the prompts that a server of its own is filled with.
const TOKENS: u32 = 2048;
const PAGE: u64 = 4096;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["load", address] => load(address.parse()?),
        ["serve", objects] => serve(objects.parse()?, Policy::default()),
        ["serve", objects, policy] => serve(objects.parse()?, Policy::from_name(policy)?),
        _ => Err("usage: server load HOST:PORT | server serve OBJECTS [POLICY]".into()),
    }
}

fn load(address: SocketAddr) -> Result<(), Box<dyn Error>> {
    let mut engine = load::engine(address);
    println!("{}", json!({ "connected": address.to_string() }));
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let mut words = line.split_whitespace();
        let what = words.next().unwrap_or_default();
        let numbers: Vec<u32> = words.map(str::parse).collect::<Result<_, _>>()?;
        let answer = match (what, &numbers[..]) {
            ("fill", [tokens, prompts]) => {
                json!({ "new": load::fill(&mut engine, 0..*prompts, *tokens) })
            }
            ("hit", [clients, tokens, prompts, ms, awake]) => {
                let span = Duration::from_millis(u64::from(*ms));
                let (cycles, seconds) =
                    load::hit_cycles(address, *clients, *prompts, *tokens, span, us(*awake));
                told(&cycles, seconds, ["lookup", "query", "free", "end"])
            }
            ("store", [tokens, first, count, awake]) => {
                let (cycles, seconds) =
                    load::store_cycles(address, *first, *count, *tokens, us(*awake));
                told(&cycles, seconds, ["prepare", "commit"])
            }
            _ => return Err(format!("{line:?} is no command").into()),
        };
        println!("{answer}");
    }
    Ok(())
}

fn us(count: u32) -> Duration {
    Duration::from_micros(count.into())
}

/// Cycles a second; and of each step the median, 99 of 100 and the longest, in microseconds.
fn told<const STEPS: usize>(
    cycles: &[load::Cycle<STEPS>],
    seconds: f64,
    names: [&str; STEPS],
) -> Value {
    let mut all = json!({ "cycles": cycles.len(), "perSecond": cycles.len() as f64 / seconds });
    for (step, name) in names.into_iter().enumerate() {
        let [p50, p99, max] = load::spread(cycles, step);
        all[name] = json!({ "p50": p50, "p99": p99, "max": max });
    }
    all
}

fn serve(objects: u32, policy: Policy) -> Result<(), Box<dyn Error>> {
    let chunks = TOKENS / load::CHUNK;
    let prompts = objects / chunks;
    let store = Store::new(StoreOptions {
        chunk_size: load::CHUNK,
        memory: u64::from(prompts * chunks) * PAGE,
        shared_name: None,
        policy,
        disk: None,
        remote: None,
        limits: Limits::default(),
    })?;
    let address = ServerOptions::default();
    let server = Server::start(&address, |_| Ok(store.clone()))?;
    let before = resident();
    let owner = store.connect();
    store.register(owner, load::INSTANCE, load::model_layout())?;
    let mut longest = Duration::ZERO;
    for prompt in 0..prompts {
        let key = load::key("fill", prompt, TOKENS);
        let begun = Instant::now();
        store.prepare_store(owner, &key, load::INSTANCE, begun)?;
        assert!(store.commit_store(&key, load::INSTANCE, &[])?, "prompt {prompt} is new");
        longest = longest.max(begun.elapsed());
    }
    let status = store.status(Instant::now());
    let stored = status.iter().find(|(name, _)| *name == "objects").map(|(_, count)| *count);
    let answer = json!({
        "address": server.address().to_string(),
        "objects": stored,
        "prompts": prompts,
        "bytes": resident().saturating_sub(before),
        "longestMs": longest.as_secs_f64() * 1e3,
    });
    println!("{answer}");
    for line in std::io::stdin().lock().lines() {
        line?;
        println!("{}", json!({ "bytes": resident().saturating_sub(before) }));
    }
    Ok(())
}

/// Bytes of this process that are in memory and its own; of the pool none are.
fn resident() -> u64 {
    let mut status = String::new();
    let read = std::fs::File::open("/proc/self/status")
        .and_then(|mut file| file.read_to_string(&mut status));
    read.expect("Linux's /proc");
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).expect("RssAnon");
    let kilobytes = line.split_whitespace().nth(1).expect("a number");
    kilobytes.parse::<u64>().expect("a number") << 10
}
