//! Peers that want to know what there is: events and explanations over a socket.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use bytes::Bytes;
use common::{Client, key, layout, start, store_options};
use kvferry_core::events::{EventKind, Events, KvEventBatch};
use kvferry_core::explain::Explanation;
use kvferry_core::key::{Key, MODEL_NAME_BYTES_MAX};
use kvferry_wire::message::{Control, EXTENSION, KV_EVENT_STREAM};
use kvferry_wire::zmtp::Limits;
use kvferry_wire::{Dialect, Operation, Reply, Request};

const PAGE: u64 = 4096;

fn events(peer: &mut Client, cursor: u64, max: u32) -> Events {
    match peer.call(&Request::Events { cursor, max }) {
        Reply::Events(events) => events,
        other => panic!("{other:?}"),
    }
}

fn explain(peer: &mut Client, key: Key) -> Explanation {
    match peer.call(&Request::Explain { key: Key { worker_id: None, ..key }.into() }) {
        Reply::Explanation(explanation) => explanation,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_listener_hears_what_others_store_and_what_is_evicted() {
    let server = start(store_options(16, 2 * PAGE));
    let mut engine = Client::connect(server.address());
    engine.register(7, layout("m"));
    let mut listener = Client::connect(server.address());
    let names = listener.call(&Request::GetExperimental);
    let announced =
        [EXTENSION, Operation::Checksums.name(), Operation::Frames.name(), KV_EVENT_STREAM]
            .map(str::to_owned)
            .to_vec();
    assert_eq!(names, Reply::Names(announced), "the operations are announced");
    assert_eq!(events(&mut listener, 0, 9).next(), 1);
    engine.store(key("a", 0, 2), 7);
    engine.store(key("b", 100, 1), 7);
    let heard = events(&mut listener, 1, 9);
    let kinds: Vec<EventKind> = heard.events.iter().map(|event| event.kind).collect();
    assert_eq!(
        kinds,
        [EventKind::Stored, EventKind::Stored, EventKind::Removed, EventKind::Stored]
    );
    assert_eq!(heard.events[1].parent, Some(heard.events[0].chunk));
    assert_eq!(heard.events[2].chunk, heard.events[1].chunk, "the last chunk goes first");
    assert_eq!(heard.events[3].space.model_name, "m");
    assert_eq!(heard.incarnation, listener.hello().boot_token);

    let explanation = explain(&mut listener, key("c", 0, 2));
    assert_eq!((explanation.chunks, explanation.hit_chunks), (2, 1));
    let missing = explanation.missing.unwrap();
    assert_eq!(missing.chunk, heard.events[1].chunk);
    assert_eq!(missing.removed.unwrap().at_ms, heard.events[2].at_ms);

    let again = start(store_options(16, 2 * PAGE));
    let mut listener = Client::connect(again.address());
    let started = events(&mut listener, heard.next(), 9);
    assert_ne!(started.incarnation, heard.incarnation);
    assert!(started.lost);
}

#[test]
fn answers_stay_within_a_message_however_long_the_names_are() {
    let server = start(store_options(16, 2048 * PAGE));
    let mut engine = Client::connect(server.address());
    let model_name = "m".repeat(MODEL_NAME_BYTES_MAX);
    engine.register(7, layout(&model_name));
    for tenant in 0..2000 {
        let cache_salt = format!("{}{tenant}", "\u{10ffff}".repeat(124));
        engine.store(Key { model_name: model_name.clone(), cache_salt, ..key("r", 0, 1) }, 7);
    }
    let (mut cursor, mut answers) = (1, 0);
    while cursor < 2001 {
        engine.request(&Request::Events { cursor, max: u32::MAX });
        let frames = engine.receive();
        let bytes: usize = frames.iter().map(Bytes::len).sum();
        assert!(bytes < Limits::default().message_bytes_max);
        let Ok(Reply::Events(events)) = Reply::decode(Operation::Events, &frames[2..]) else {
            panic!("{frames:?}")
        };
        assert_eq!((events.first, events.lost), (cursor, false));
        cursor = events.next();
        answers += 1;
    }
    assert_eq!((cursor, answers), (2001, 2));
}

#[test]
fn impossible_questions_are_met_with_silence_and_counted() {
    let server = start(store_options(16, 2 * PAGE));
    let mut peer = Client::connect(server.address());
    let key = Key { cache_salt: "a@b".into(), ..key("r", 0, 1) };
    let question = Request::Explain { key: key.into() };
    assert!(peer.is_unanswered(&question.encode(1, Dialect::Current)));
    peer.wait_for("dropped_invalid_salt", 1);
}

/// A stream of model "m" of the connection's instance; its uid frame.
fn subscribe(peer: &mut Client, instance_id: u64, cursor: u64, max_events: u64) -> Bytes {
    let model_name = "m".to_owned();
    let request = Request::SubscribeKvEvents { instance_id, model_name, cursor, max_events };
    let uid = peer.request(&request);
    Request::Noop.encode(uid, Dialect::Current).swap_remove(0)
}

/// The next message, which is a batch of the stream.
fn batch(peer: &mut Client, uid: &Bytes) -> KvEventBatch {
    let frames = peer.receive();
    assert_eq!(frames[0], uid);
    match Reply::decode(Operation::SubscribeKvEvents, &frames[2..]) {
        Ok(Reply::KvEvents(batch)) => batch,
        other => panic!("{other:?}"),
    }
}

fn ends(peer: &mut Client, uid: &Bytes) {
    let frames = peer.receive();
    assert_eq!((frames.len(), &frames[0]), (2, uid), "{frames:?}");
}

fn told(batch: &KvEventBatch) -> Vec<(EventKind, Option<u32>)> {
    batch.events.iter().map(|it| (it.kind, it.token_ids.first().copied())).collect()
}

#[test]
fn a_stream_tells_of_stores_and_removals_a_batch_for_each_acknowledgement_until_it_is_cancelled() {
    let server = start(store_options(16, 8 * PAGE));
    let mut engine = Client::connect(server.address());
    engine.register(7, layout("m"));
    let mut listener = Client::connect(server.address());
    let uid = subscribe(&mut listener, 9, 0, 64);
    let first = batch(&mut listener, &uid);
    assert_eq!((first.enabled, first.next_cursor, first.events), (true, 0, vec![]), "at once");

    engine.store(key("a", 0, 2), 7);
    assert_eq!(listener.call(&Request::Noop), Reply::Text("OK".into()), "none without credit");
    listener.send(&Control::Ack.encode(&uid));
    let stored = batch(&mut listener, &uid);
    assert_eq!(
        told(&stored),
        [(EventKind::Stored, Some(0)), (EventKind::Stored, Some(16))],
        "what came meanwhile, and with its tokens"
    );
    assert_eq!(stored.events[1].parent_block_hash, Some(stored.events[0].block_hashes[0]));
    assert_eq!(stored.incarnation, first.incarnation);

    listener.send(&Control::Ack.encode(&uid));
    listener.send(&Control::Ack.encode(&uid));
    assert_eq!(listener.call(&Request::Noop), Reply::Text("OK".into()), "nothing is no batch");
    engine.call(&Request::Clear { force: false });
    let removed = batch(&mut listener, &uid);
    assert_eq!(told(&removed)[0], (EventKind::Removed, None), "it was waited for");
    engine.store(key("b", 100, 1), 7);
    assert_eq!(listener.call(&Request::Noop), Reply::Text("OK".into()), "credit does not add up");

    listener.send(&Control::Cancel.encode(&uid));
    ends(&mut listener, &uid);
    engine.store(key("c", 200, 1), 7);
    listener.send(&Control::Ack.encode(&uid));
    assert_eq!(listener.call(&Request::Noop), Reply::Text("OK".into()), "it has ended");
    listener.send(&[uid, Bytes::new(), Bytes::from_static(b"more")]);
    listener.wait_for("dropped_bad_control", 1);
}

#[test]
fn what_an_engine_stores_before_it_listens_is_told_too() {
    let server = start(store_options(16, 8 * PAGE));
    let mut engine = Client::connect(server.address());
    engine.register(7, layout("m"));
    engine.store(key("a", 0, 2), 7);
    let uid = subscribe(&mut engine, 7, 0, 1);
    assert_eq!(told(&batch(&mut engine, &uid)), [(EventKind::Stored, Some(0))]);
    engine.send(&Control::Ack.encode(&uid));
    assert_eq!(told(&batch(&mut engine, &uid)), [(EventKind::Stored, Some(16))], "the rest");
}

#[test]
fn an_instance_has_one_stream_and_others_go_on() {
    let server = start(store_options(16, 8 * PAGE));
    let mut engine = Client::connect(server.address());
    engine.register(7, layout("m"));
    let mut listener = Client::connect(server.address());
    let old = subscribe(&mut listener, 9, 0, 64);
    batch(&mut listener, &old);
    let other = subscribe(&mut listener, 10, 0, 64);
    batch(&mut listener, &other);
    let new = subscribe(&mut listener, 9, 0, 64);
    ends(&mut listener, &old);
    batch(&mut listener, &new);
    listener.send(&Control::Ack.encode(&other));
    engine.store(key("a", 0, 1), 7);
    assert_eq!(told(&batch(&mut listener, &other)), [(EventKind::Stored, Some(0))]);
}

#[test]
fn streams_that_are_too_many_or_make_no_sense_are_refused_and_the_connection_goes_on() {
    let server = start(store_options(16, 8 * PAGE));
    let mut listener = Client::connect(server.address());
    for max_events in [0, 1025] {
        subscribe(&mut listener, 17, 0, max_events);
    }
    listener.wait_for("dropped_invalid_argument", 2);
    for instance in 0..16 {
        let uid = subscribe(&mut listener, instance, 0, 64);
        assert!(batch(&mut listener, &uid).enabled);
    }
    let uid = subscribe(&mut listener, 16, 0, 64);
    assert!(!batch(&mut listener, &uid).enabled, "LMCache's worker reports by itself then");
    assert_eq!(listener.call(&Request::Noop), Reply::Text("OK".into()), "it takes that first");
    listener.send(&Control::Ack.encode(&uid));
    ends(&mut listener, &uid);
}

#[test]
fn streams_without_end_are_answered_and_not_kept() {
    let server = start(store_options(16, 8 * PAGE));
    let mut listener = Client::connect(server.address());
    let first = subscribe(&mut listener, 0, 0, 64);
    assert!(batch(&mut listener, &first).enabled);
    let many: Vec<Bytes> =
        (1..200).map(|instance| subscribe(&mut listener, instance, 0, 64)).collect();
    let mut heard = 0;
    for _ in &many {
        let frames = listener.receive();
        let told = Reply::decode(Operation::SubscribeKvEvents, &frames[2..]);
        let Ok(Reply::KvEvents(batch)) = told else { panic!("{told:?}") };
        heard += u32::from(batch.enabled);
    }
    assert_eq!(heard, 15);
    // Those that are kept end when they are acknowledged.
    for uid in &many {
        listener.send(&Control::Ack.encode(uid));
    }
    let uid = listener.request(&Request::Noop);
    let mut ended = 0;
    while listener.receive()[0] != Request::Noop.encode(uid, Dialect::Current)[0] {
        ended += 1;
    }
    let uid = listener.request(&Request::Noop);
    while listener.receive()[0] != Request::Noop.encode(uid, Dialect::Current)[0] {
        ended += 1;
    }
    assert_eq!(ended, 16);
}
