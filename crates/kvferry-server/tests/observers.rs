//! Peers that want to know what there is: events and explanations over a socket.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::{Client, key, layout, start, store_options};
use kvferry_core::events::{EventKind, Events};
use kvferry_core::explain::Explanation;
use kvferry_core::key::{Key, MODEL_NAME_BYTES_MAX};
use kvferry_wire::message::EXTENSION;
use kvferry_wire::zmtp::Limits;
use kvferry_wire::{Operation, Reply, Request};

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
    let announced = [EXTENSION, Operation::Checksums.name(), Operation::Frames.name()]
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
        let bytes: usize = frames.iter().map(bytes::Bytes::len).sum();
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
    assert!(peer.is_unanswered(&question.encode(1, kvferry_wire::Dialect::Current)));
    peer.wait_for("dropped_invalid_salt", 1);
}
