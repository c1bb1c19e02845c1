//! The server's memory stays flat under attack. Alone in its process, whose memory it measures: the
//! figures include the attackers.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::io::Write;

use bytes::Bytes;
use common::{
    Client, connect_raw, frame, handshake, key, layout, start, store_options, wait_until_cut,
};
use kvferry_core::key::{Key, Layout};
use kvferry_store::{Limits, StoreOptions};
use kvferry_wire::{Dialect, Reply, Request};

const MIB: u64 = 1 << 20;
/// What thousands of small attacks may leave behind: caches of the allocator, tables that grew once.
const SMALL_MARGIN: u64 = 4 * MIB;
/// What the allocator may keep of large buffers that were given back.
const LARGE_MARGIN: u64 = 96 * MIB;

/// Bytes of this process that are in memory, without the pool's pages.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    let kilobytes = line.split_whitespace().nth(1).unwrap();
    kilobytes.parse::<u64>().unwrap() << 10
}

/// Runs `attack` once to warm up, then measures what more of it adds.
fn assert_flat(what: &str, margin: u64, rounds: usize, mut attack: impl FnMut()) {
    attack();
    let before = resident();
    (0..rounds).for_each(|_| attack());
    let grown = resident().saturating_sub(before);
    assert!(grown <= margin, "{what}: {} KiB more after {rounds} rounds", grown >> 10);
}

#[test]
fn memory_stays_flat() {
    let limits = Limits { session_bytes: 32 * MIB, ..Limits::default() };
    let server = start(StoreOptions { limits, ..store_options(16, MIB) });
    let mut engine = Client::connect(server.address());
    engine.register(7, layout("m"));
    let mut peer = Client::connect(server.address());

    let prepare = Request::PrepareStore { key: key("r", 0, 100).into(), instance_id: 7 };
    let mut malformed = prepare.encode(1, Dialect::Current);
    malformed[2] = [&malformed[2], &b"\0"[..]].concat().into();
    assert_flat("malformed messages", SMALL_MARGIN, 20, || {
        for _ in 0..500 {
            assert!(peer.is_unanswered(&[Bytes::from_static(b"\x01")]));
            peer.send(&malformed);
            peer.reply();
        }
    });

    let huge = [&handshake()[..], &b"\x02\x40\0\0\0\0\0\0\0"[..]].concat();
    assert_flat("connections that are cut", SMALL_MARGIN, 20, || {
        for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &huge].repeat(100) {
            let mut stream = connect_raw(server.address());
            stream.write_all(bytes).unwrap();
            wait_until_cut(&mut stream);
        }
    });

    assert_flat("connections that hold something and end", SMALL_MARGIN, 20, || {
        for _ in 0..100 {
            let mut peer = Client::connect(server.address());
            assert_eq!(peer.prepare_store(key("killed", 5000, 4), 7).chunk_indices.len(), 4);
            peer.lookup(key("killed", 0, 4));
            drop(peer);
            engine.wait_for("slots_writing", 0);
            engine.wait_for("sessions", 0);
        }
    });

    // Names as long as a message: what is remembered of them has a bound.
    let long = "n".repeat(7 << 20);
    let mut number = 0;
    assert_flat("long names", LARGE_MARGIN, 30, || {
        number += 1;
        let request_id = format!("{number}{long}");
        peer.lookup(Key { request_id: request_id.clone(), ..key("", 0, 4) });
        let layout = Layout { model_name: request_id, ..layout("") };
        let register = Request::Register { instance_id: number, layout };
        assert!(peer.is_unanswered(&register.encode(1, Dialect::Current)));
    });

    // Peers that sent something large once, and are now idle or in the middle of the next message.
    let large = [frame(b"\x01", true), frame(&vec![0; 7 << 20], false)].concat();
    let begun = [large, frame(b"\x01", true)].concat();
    let noop = Request::Noop.encode(1, Dialect::Current)[1].clone();
    let mut peers = Vec::new();
    assert_flat("peers that sent something large", LARGE_MARGIN, 60, || {
        let mut peer = Client::connect(server.address());
        peer.stream.write_all(&begun).unwrap();
        peers.push(peer);
        engine.call(&Request::Noop);
    });
    for peer in &mut peers {
        peer.stream.write_all(&frame(&noop, false)).unwrap();
        assert_eq!(peer.reply(), Reply::Text("OK".into()));
    }
}
