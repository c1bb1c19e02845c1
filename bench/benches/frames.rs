//! Store and load of chunks of 32 MiB in frames, beside one plain TCP stream on loopback that carries the same bytes
//! into memory: `cargo bench -p kvferry-bench --bench frames`. Server and client are in this process, on threads of
//! their own, as the two ends of the stream are.
#![allow(clippy::print_stdout, reason = "a benchmark's rows are its output")]
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]
#![allow(dead_code, reason = "each benchmark uses its part")]
#![allow(clippy::cast_precision_loss, reason = "figures")]

#[path = "../../crates/kvferry-server/tests/common/mod.rs"]
mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use common::{layout, start, store_options};
use kvferry_bench::Rows;
use kvferry_client::{Client, ConnectOptions};
use kvferry_core::cache::Cache;
use kvferry_core::key::{Key, Layout};

const CHUNK: u64 = 32 << 20;
const CHUNKS: u64 = 8;
const BYTES: u64 = CHUNK * CHUNKS;
const PAIRS: u32 = 9;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn key(request: &str, first: u32) -> Key {
    common::key(request, first, u32::try_from(CHUNKS).unwrap())
}

/// The other end takes a byte for each transfer, and answers it with one when it has all of it.
struct Stream(TcpStream, Vec<u8>);

impl Stream {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        near.set_nodelay(true).unwrap();
        far.set_nodelay(true).unwrap();
        std::thread::spawn(move || {
            let mut memory = vec![1; usize::try_from(BYTES).unwrap()];
            let mut asked = [0];
            while far.read_exact(&mut asked).is_ok() {
                match asked[0] {
                    0 => {
                        far.read_exact(&mut memory).unwrap();
                        far.write_all(&[1]).unwrap();
                    }
                    _ => far.write_all(&memory).unwrap(),
                }
            }
        });
        Self(near, vec![2; usize::try_from(BYTES).unwrap()])
    }

    /// Seconds of the same bytes, there or back.
    fn seconds(&mut self, load: bool) -> f64 {
        let begun = Instant::now();
        self.0.write_all(&[load.into()]).unwrap();
        if load {
            self.0.read_exact(&mut self.1).unwrap();
        } else {
            self.0.write_all(&self.1).unwrap();
            self.0.read_exact(&mut [0]).unwrap();
        }
        begun.elapsed().as_secs_f64()
    }
}

fn main() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(runtime.spawn(measure())).unwrap();
}

async fn measure() {
    let server = start(store_options(16, 2 * BYTES));
    let options = ConnectOptions::new(server.address().to_string());
    let client = Client::connect(ConnectOptions { shared_memory: false, ..options }).await.unwrap();
    let large = Layout { hidden_dim_size: CHUNK.try_into().unwrap(), ..layout("m") };
    let instance = client.register(large, soon()).await.unwrap();
    assert!(client.in_frames().is_some());
    let mut stream = Stream::new();
    let (mut stores, mut loads) = (Vec::new(), Vec::new());
    for round in 0..PAIRS {
        let (first, content) = (round * 10_000, vec![u8::try_from(round + 1).unwrap(); 4096]);
        let there = round.is_multiple_of(2).then(|| stream.seconds(false));
        let prompt = key(&format!("w{round}"), first);
        let grant = client.prepare_store(&prompt, instance, soon()).await.unwrap();
        for slot in &grant.slots {
            for at in (0..CHUNK).step_by(4096) {
                grant.memory.write(slot.offset + at, &content).unwrap();
            }
        }
        let begun = Instant::now();
        assert!(client.commit_store(&prompt, instance, &[], soon()).await.unwrap());
        let ours = begun.elapsed().as_secs_f64();
        drop(grant);
        stores.push((ours, there.unwrap_or_else(|| stream.seconds(false))));

        let back = round.is_multiple_of(2).then(|| stream.seconds(true));
        let prompt = key(&format!("r{round}"), first);
        assert_eq!(client.lookup(&prompt, soon()).await.unwrap(), CHUNKS);
        let begun = Instant::now();
        let grant = client.prepare_retrieve(&prompt, instance, soon()).await.unwrap().unwrap();
        let ours = begun.elapsed().as_secs_f64();
        let mut page = [0; 4096];
        for slot in &grant.slots {
            for at in (0..CHUNK).step_by(4096) {
                grant.memory.read(slot.offset + at, &mut page).unwrap();
                assert_eq!(page, content[..]);
            }
        }
        assert!(client.commit_retrieve(&prompt, instance, &grant.slots, soon()).await.unwrap());
        client.end_session(&prompt.request_id, soon()).await.unwrap();
        loads.push((ours, back.unwrap_or_else(|| stream.seconds(true))));
    }
    let mut rows = Rows::default();
    for (name, pairs) in [("store in frames", stores), ("load in frames", loads)] {
        let median = |of: fn(&(f64, f64)) -> f64| {
            let mut all: Vec<f64> = pairs.iter().map(of).collect();
            all.sort_by(f64::total_cmp);
            all[all.len() / 2]
        };
        let rate = |seconds: f64| BYTES as f64 / seconds / 1e9;
        let (ours, plain) = (rate(median(|pair| pair.0)), rate(median(|pair| pair.1)));
        rows.row(name, ours, plain, "GB/s", median(|pair| pair.1 / pair.0));
    }
    rows.finish().unwrap();
    client.close().await;
}
