//! The client against a scripted server: what it asks, and what it makes of silence, ends and lies.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod releases;
mod router;

use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use kvferry_client::{Client, ConnectOptions};
use kvferry_copy::SharedRegion;
use kvferry_core::cache::{Cache, Memory};
use kvferry_core::events::{EventKind, EventSpace, Events, KvEvent};
use kvferry_core::explain::{Explanation, count_hits};
use kvferry_core::key::Key;
use kvferry_core::{Error, ErrorCode, Result};
use kvferry_wire::message::{EXTENSION, StoreSlots, Value};
use kvferry_wire::{Operation, Reply, Request};
use router::{
    Answer, CHUNK, OBJECT, POOL, Router, hello, holding, honest, key, layout, shortly, slots, soon,
};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// A pool as a server makes it, under a name of this test's own.
fn pool(test: &str) -> (String, SharedRegion) {
    let name = format!("kvferry_client_test_{}_{test}", std::process::id());
    let region = SharedRegion::create(&name, POOL).unwrap();
    region.reserve(0).unwrap();
    (name, region)
}

fn code<T>(result: Result<T>) -> Option<ErrorCode> {
    result.err().map(|error| error.code)
}

async fn connect_error(options: ConnectOptions) -> Error {
    Client::connect(options).await.err().unwrap()
}

#[tokio::test]
async fn nobody_there_is_said_with_the_address_and_the_remedy() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let error = connect_error(ConnectOptions::new(&address)).await;
    assert_eq!(error.code, ErrorCode::Unreachable);
    assert!(error.message.contains(&address), "{error}");
    assert!(error.message.contains("npx kvferry serve"), "{error}");
}

#[tokio::test]
async fn a_listener_that_says_nothing_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let options = ConnectOptions {
        connect_timeout: Duration::from_millis(30),
        ..ConnectOptions::new(&address)
    };
    let error = connect_error(options).await;
    assert_eq!(error.code, ErrorCode::Timeout);
    assert!(error.message.contains(&address), "{error}");
}

#[tokio::test]
async fn a_listener_of_another_kind_is_told_apart() {
    for (says, is_http) in
        [(&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], true), (b"SSH-2.0-x\r\n", false)]
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let options = ConnectOptions::new(listener.local_addr().unwrap().to_string());
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(says).await.unwrap();
            std::future::pending::<()>().await;
        });
        let error = connect_error(options).await;
        assert_eq!(error.code, ErrorCode::Protocol);
        assert_eq!(error.message.contains("speaks HTTP"), is_http, "{error}");
    }
}

#[tokio::test]
async fn hosts_beyond_loopback_are_an_unsupported_option() {
    let error = connect_error(ConnectOptions::new("tcp://192.0.2.1:5555")).await;
    assert_eq!(error.code, ErrorCode::UnsupportedOption);
}

/// A client of nobody that counts with [`CHUNK`] meanwhile, and the listener's place.
async fn early_client() -> (Client, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let options =
        ConnectOptions { assumed_chunk_size: Some(CHUNK), ..ConnectOptions::new(&address) };
    (Client::connect(options).await.unwrap(), address)
}

#[tokio::test]
async fn a_server_that_comes_later_is_joined_with_all_that_was_registered() {
    let (name, region) = pool("later");
    let (client, address) = early_client().await;
    assert_eq!(client.chunk_size(), CHUNK);
    let failure = client.failure().unwrap();
    assert_eq!(failure.code, ErrorCode::Unreachable);
    let port = address.rsplit_once(':').unwrap().1;
    let command = format!("npx kvferry serve --port {port} --chunk-size {CHUNK}");
    for part in [&address, &command] {
        assert!(failure.message.contains(part), "{failure}");
    }
    let instance = client.register(layout(), soon()).await.unwrap();
    let gone = client.register(layout(), soon()).await.unwrap();
    assert_eq!(code(client.unregister(gone, soon()).await), Some(ErrorCode::Unreachable));
    assert_eq!(code(client.lookup(&key(), soon()).await), Some(ErrorCode::Unreachable));
    let store = client.prepare_store(&key(), instance, soon()).await;
    assert_eq!(code(store), Some(ErrorCode::Unreachable));
    assert_eq!(code(client.ping().await), Some(ErrorCode::Unreachable));
    let invalid = client.lookup(&Key { end: 17, ..key() }, soon()).await;
    assert_eq!(code(invalid), Some(ErrorCode::InvalidArgument), "mistakes are told all the same");

    let listener = TcpListener::bind(&address).await.unwrap();
    let mut router = Router::on(listener, &name, |_, _| None);
    client.connected(soon()).await.unwrap();
    assert_eq!(client.failure(), None);
    let registered: Vec<_> = router
        .so_far()
        .into_iter()
        .filter(|request| matches!(request, Request::Register { .. }))
        .collect();
    assert_eq!(registered, [Request::Register { instance_id: instance, layout: layout() }]);
    let grant = client.prepare_store(&key(), instance, soon()).await.unwrap();
    grant.memory.write(0, b"joined").unwrap();
    let mut seen = [0; 6];
    region.read(0, &mut seen).unwrap();
    assert_eq!(&seen, b"joined");
    assert_eq!(client.lookup(&key(), soon()).await.unwrap(), 2);
}

#[tokio::test]
async fn what_is_registered_while_a_connection_begins_is_registered_over_it() {
    let (name, _region) = pool("begins");
    let (client, address) = early_client().await;
    client.register(layout(), soon()).await.unwrap();
    let (go_on, gate) = oneshot::channel();
    let mut gate = Some(gate);
    let registered = Reply::Registered { shm_name: name.clone(), pool_size: POOL };
    let listener = TcpListener::bind(&address).await.unwrap();
    let mut router = Router::on(listener, &name, move |_, request| match request {
        Request::Register { .. } => Some(Answer::After(gate.take()?, registered.clone())),
        _ => None,
    });
    router.received(|request| matches!(request, Request::Register { .. })).await;
    let instance = client.register(layout(), soon()).await.unwrap();
    go_on.send(()).unwrap();
    let register = Request::Register { instance_id: instance, layout: layout() };
    client.connected(soon()).await.unwrap();
    let asked = router.so_far();
    assert!(asked.contains(&register), "{asked:?}");
    client.prepare_store(&key(), instance, soon()).await.unwrap();
}

#[tokio::test]
async fn a_server_that_comes_later_with_other_chunks_is_not_joined() {
    let (client, address) = early_client().await;
    client.register(layout(), soon()).await.unwrap();
    let listener = TcpListener::bind(&address).await.unwrap();
    let mut router = Router::on(listener, "", |_, request| {
        matches!(request, Request::GetChunkSize).then_some(Answer::Reply(Reply::Integer(64)))
    });
    // The second connection shows what became of the first.
    router.received(|request| matches!(request, Request::Hello)).await;
    router.received(|request| matches!(request, Request::Hello)).await;
    let error = client.lookup(&key(), soon()).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Protocol);
    for part in ["chunks of 64", "with 16", "npx kvferry serve", "--chunk-size 16"] {
        assert!(error.message.contains(part), "{error}");
    }
    client.register(layout(), soon()).await.unwrap();
    let asked = router.so_far();
    assert!(!asked.iter().any(|request| matches!(request, Request::Register { .. })), "{asked:?}");
    client.close().await;
    assert_eq!(code(client.register(layout(), soon()).await), Some(ErrorCode::Closed));
}

#[tokio::test]
async fn a_listener_that_says_nothing_counts_as_nobody() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let options = ConnectOptions {
        connect_timeout: Duration::from_millis(30),
        assumed_chunk_size: Some(CHUNK),
        ..ConnectOptions::new(&address)
    };
    let client = Client::connect(options).await.unwrap();
    let error = client.lookup(&key(), soon()).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unreachable, "this call has waited for nothing");
    assert!(error.message.contains(&address), "{error}");
    assert!(error.message.contains("npx kvferry serve"), "{error}");
}

#[tokio::test]
async fn what_is_there_and_no_server_is_an_error_at_once() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let options = ConnectOptions {
        assumed_chunk_size: Some(CHUNK),
        ..ConnectOptions::new(listener.local_addr().unwrap().to_string())
    };
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        std::future::pending::<()>().await;
    });
    assert_eq!(connect_error(options).await.code, ErrorCode::Protocol);
}

#[tokio::test]
async fn a_server_is_asked_who_it_is() {
    let router = Router::start("", |_, request| match request {
        Request::Status => {
            Some(Answer::Reply(Reply::Status(vec![("objects".to_owned(), Value::Integer(3))])))
        }
        _ => None,
    })
    .await;
    let client = Client::connect(router.options()).await.unwrap();
    let server = client.server();
    assert_eq!((client.chunk_size(), server.chunk_size), (CHUNK, CHUNK));
    assert_eq!(server.boot_token, Some([1; 16]));
    assert_eq!((server.version.as_deref(), server.pid), (Some("0.0.1"), Some(42)));
    client.ping().await.unwrap();
    assert_eq!(client.status().await.unwrap(), [("objects".to_owned(), Value::Integer(3))]);
}

#[tokio::test]
async fn what_is_stored_lies_in_the_servers_pool() {
    let (name, region) = pool("store");
    let router = Router::honest(&name).await;
    let client = Client::connect(router.options()).await.unwrap();
    let instance = client.register(layout(), soon()).await.unwrap();
    let grant = client.prepare_store(&key(), instance, soon()).await.unwrap();
    assert_eq!((&grant.chunk_indices[..], grant.refused), (&[1][..], Some(0)));
    assert_eq!((grant.slots[0].length, grant.slots[0].generation), (OBJECT, Some(7)));
    grant.memory.write(grant.slots[0].offset, b"stored").unwrap();
    assert!(client.commit_store(&key(), instance, &[], soon()).await.unwrap());
    let mut seen = [0; 6];
    region.read(0, &mut seen).unwrap();
    assert_eq!(&seen, b"stored");

    assert!(
        !client.commit_store(&key(), instance, &[], soon()).await.unwrap(),
        "committed already"
    );
}

#[tokio::test]
async fn checksums_go_just_before_the_commit_which_does_not_wait_for_their_answer() {
    let (name, _region) = pool("checksums");
    let mut answers =
        [None, Some(Answer::Silence), Some(Answer::Reply(Reply::Integer(0)))].into_iter();
    let mut router = Router::start(&name, move |_, request| match request {
        Request::Checksums { .. } => answers.next().unwrap(),
        Request::PrepareStore { .. } => {
            let slots =
                StoreSlots { slots: slots(2, OBJECT), chunk_indices: vec![0, 1], refused: Some(0) };
            Some(Answer::Reply(Reply::StoreSlots(Some(slots))))
        }
        _ => None,
    })
    .await;
    let client = Client::connect(router.options()).await.unwrap();
    let instance = client.register(layout(), soon()).await.unwrap();
    for what in ["kept", "not answered", "not kept"] {
        client.prepare_store(&key(), instance, soon()).await.unwrap();
        router.so_far();
        for wrong in [&[1][..], &[1, 2, 3]] {
            let error = client.commit_store(&key(), instance, wrong, soon()).await.unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidArgument);
        }
        assert!(client.commit_store(&key(), instance, &[0, 9], soon()).await.unwrap(), "{what}");
        let checksums = Request::Checksums {
            instance_id: instance,
            offsets: vec![0, 4096],
            generations: vec![7, 8],
            checksums: vec![0, 9],
        };
        let commit = Request::CommitStore { key: key().into(), instance_id: instance };
        assert_eq!(router.so_far(), [checksums, commit], "{what}");
    }
    client.prepare_store(&key(), instance, soon()).await.unwrap();
    router.so_far();
    assert!(client.commit_store(&key(), instance, &[], soon()).await.unwrap());
    assert_eq!(router.so_far().len(), 1, "there is nothing to tell");
    assert!(!client.commit_store(&key(), instance, &[1], soon()).await.unwrap(), "or to commit");
    assert_eq!(router.so_far(), []);
}

#[tokio::test]
async fn a_store_of_what_is_being_stored_asks_for_nothing_until_that_has_ended() {
    let (name, _region) = pool("twice");
    let mut router = Router::honest(&name).await;
    let client = Client::connect(router.options()).await.unwrap();
    let instance = client.register(layout(), soon()).await.unwrap();
    let others = Key { token_ids: key().token_ids.iter().map(|id| id + 1).collect(), ..key() };
    for end in ["commit", "abandon", "commit"] {
        let first = client.prepare_store(&key(), instance, soon()).await.unwrap();
        assert!(!first.slots.is_empty(), "before {end}");
        router.so_far();
        // The server would end the first one with the second's commit, abandonment or undoing.
        let second = client.prepare_store(&key(), instance, soon()).await.unwrap();
        assert_eq!((second.slots, second.chunk_indices, second.refused), (vec![], vec![], Some(0)));
        assert_eq!(router.so_far(), []);
        assert!(!client.prepare_store(&others, instance, soon()).await.unwrap().slots.is_empty());
        client.abandon_store(&others, instance, soon()).await.unwrap();
        if end == "commit" {
            assert!(client.commit_store(&key(), instance, &[], soon()).await.unwrap());
        } else {
            client.abandon_store(&key(), instance, soon()).await.unwrap();
        }
    }
}

#[tokio::test]
async fn what_a_store_leaves_of_a_connection_that_ended_ends_no_store_of_the_next() {
    for abandoned in [false, true] {
        let (name, _region) = pool(&format!("across_{abandoned}"));
        let mut router = Router::start(&name, |connection, request| {
            (connection == 0 && matches!(request, Request::Ping { .. })).then_some(Answer::Close)
        })
        .await;
        let client = Client::connect(router.options()).await.unwrap();
        let instance = client.register(layout(), soon()).await.unwrap();
        let first = client.prepare_store(&key(), instance, soon()).await.unwrap();
        assert!(!first.slots.is_empty());
        assert!(client.ping().await.is_err());
        client.connected(soon()).await.unwrap();
        while router.received(|it| matches!(it, Request::Register { .. })).await.0 == 0 {}
        // Its copy goes on, and its end is still to come: that must not be taken for this one's.
        let second = client.prepare_store(&key(), instance, soon()).await.unwrap();
        assert!(second.slots.is_empty());
        if abandoned {
            client.abandon_store(&key(), instance, soon()).await.unwrap();
        } else {
            assert!(!client.commit_store(&key(), instance, &[], soon()).await.unwrap());
        }
        assert_eq!(router.so_far(), []);
        let third = client.prepare_store(&key(), instance, soon()).await.unwrap();
        assert!(!third.slots.is_empty());
        assert!(client.commit_store(&key(), instance, &[], soon()).await.unwrap());
    }
}

#[tokio::test]
async fn a_store_that_was_granted_nothing_or_not_answered_keeps_nobody_from_the_next() {
    let (name, _region) = pool("nothing");
    let mut prepares = 0;
    let router = Router::start(&name, move |_, request| match request {
        Request::PrepareStore { .. } => {
            prepares += 1;
            match prepares {
                1 => Some(Answer::Reply(Reply::StoreSlots(Some(StoreSlots::default())))),
                2 => Some(Answer::Silence),
                _ => None,
            }
        }
        _ => None,
    })
    .await;
    let client = Client::connect(router.options()).await.unwrap();
    let instance = client.register(layout(), soon()).await.unwrap();
    assert!(client.prepare_store(&key(), instance, soon()).await.unwrap().slots.is_empty());
    let unanswered = client.prepare_store(&key(), instance, shortly()).await;
    assert_eq!(code(unanswered), Some(ErrorCode::Timeout));
    assert!(!client.prepare_store(&key(), instance, soon()).await.unwrap().slots.is_empty());
}

#[tokio::test]
async fn what_ends_something_at_the_server_goes_though_nobody_waits_for_its_answer_any_more() {
    let (name, _region) = pool("goes");
    let (go_on, stalled) = oneshot::channel();
    let mut stalled = Some(stalled);
    let mut router = Router::start(&name, move |_, request| match request {
        Request::Ping { .. } => {
            stalled.take().map(|stalled| Answer::After(stalled, Reply::Boolean(true)))
        }
        _ => None,
    })
    .await;
    let client = Arc::new(Client::connect(router.options()).await.unwrap());
    let instance = client.register(layout(), soon()).await.unwrap();
    client.prepare_store(&key(), instance, soon()).await.unwrap();
    let pinging = Arc::clone(&client);
    let ping = tokio::spawn(async move { pinging.ping().await.map(drop) });
    router.received(|it| matches!(it, Request::Ping { .. })).await;
    // More than the sockets take, so that what follows waits in the client.
    let large = Key { token_ids: vec![u32::MAX; (7 << 20) / 5].into(), end: 0, ..key() };
    for _ in 0..4 {
        assert_eq!(code(client.lookup(&large, shortly()).await), Some(ErrorCode::Timeout));
    }
    let late = client.commit_store(&key(), instance, &[], shortly()).await;
    assert_eq!(code(late), Some(ErrorCode::Timeout));
    go_on.send(()).unwrap();
    router.received(|it| matches!(it, Request::CommitStore { .. })).await;
    ping.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_server_that_does_not_announce_checksums_is_committed_to_without() {
    let (name, _region) = pool("unannounced");
    for (announced, ours) in [(EXTENSION, true), ("kv_event_stream", false)] {
        let mut router = Router::start(&name, move |_, request| match request {
            Request::GetExperimental => {
                Some(Answer::Reply(Reply::Names(vec![announced.to_owned()])))
            }
            Request::Checksums { .. } => panic!("not announced"),
            Request::PrepareStore { .. } if !ours => {
                Some(Answer::Reply(honest(request, "").plain()))
            }
            _ => None,
        })
        .await;
        let client = Client::connect(router.options()).await.unwrap();
        let instance = client.register(layout(), soon()).await.unwrap();
        client.prepare_store(&key(), instance, soon()).await.unwrap();
        router.so_far();
        let error = client.commit_store(&key(), instance, &[1, 2], soon()).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidArgument, "there as well");
        assert!(client.commit_store(&key(), instance, &[1], soon()).await.unwrap());
        let commit = Request::CommitStore { key: key().into(), instance_id: instance };
        assert_eq!(router.so_far(), [commit], "{announced}");
    }
}

#[tokio::test]
async fn a_server_in_another_transfer_mode_is_told_what_to_be_started_with() {
    let router = Router::start("unused", |_, request| match request {
        Request::GetExperimental => Some(Answer::Reply(Reply::Names(Vec::new()))),
        Request::Register { .. } => Some(Answer::Silence),
        Request::Noop => Some(Answer::Reply(Reply::Text("OK".to_owned()))),
        _ => None,
    })
    .await;
    let client = Client::connect(router.options()).await.unwrap();
    let error = client.register(layout(), soon()).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::UnsupportedOption, "{error}");
    assert!(error.message.contains("--supported-transfer-mode engine_driven"), "{error}");
}

#[tokio::test]
async fn nothing_is_written_to_granted_slots_once_the_server_may_give_them_away() {
    let (name, region) = pool("gate");
    for ending in ["close", "drop", "silence"] {
        region.write(0, b"------").unwrap();
        let mut router = Router::start(&name, move |_, request| match request {
            Request::Ping { .. } if ending == "silence" => Some(Answer::Silence),
            _ => None,
        })
        .await;
        let options =
            ConnectOptions { heartbeat_interval: Duration::from_millis(50), ..router.options() };
        let client = Client::connect(options).await.unwrap();
        let instance = client.register(layout(), soon()).await.unwrap();
        let grant = client.prepare_store(&key(), instance, soon()).await.unwrap();
        match ending {
            "close" => client.close().await,
            "drop" => drop(client),
            // The second connection's registration shows that the first one is given up.
            _ => {
                router.received(|request| matches!(request, Request::Register { .. })).await;
                router.received(|request| matches!(request, Request::Register { .. })).await;
            }
        }
        let refused = loop {
            match grant.memory.write(grant.slots[0].offset, b"late") {
                Ok(()) => tokio::task::yield_now().await, // a drop ends the connection's task soon
                Err(error) => break error,
            }
        };
        assert_eq!(refused.code, ErrorCode::Unreachable, "{ending}");
        if ending == "close" {
            let mut seen = [0; 6];
            region.read(0, &mut seen).unwrap();
            assert_eq!(&seen, b"------", "close has waited until nothing can be written");
        }
    }
}

#[tokio::test]
async fn what_is_granted_is_mapped_before_who_copies_hears_of_it() {
    let (name, _region) = pool("mapped");
    for load in [false, true] {
        let router = Router::honest(&name).await;
        let client = Client::connect(router.options()).await.unwrap();
        let instance = client.register(layout(), soon()).await.unwrap();
        let (slots, memory) = if load {
            let grant = client.prepare_retrieve(&key(), instance, soon()).await.unwrap().unwrap();
            (grant.slots, grant.memory)
        } else {
            let grant = client.prepare_store(&key(), instance, soon()).await.unwrap();
            (grant.slots, grant.memory)
        };
        assert!(!slots.is_empty());
        assert!(slots.iter().all(|slot| memory.is_mapped(slot.offset, slot.length)), "{load}");
    }
}

#[tokio::test]
async fn what_a_gpu_still_writes_keeps_its_slots_and_holds_nobody_up() {
    let (name, _region) = pool("gpu");
    for ending in ["close", "drop"] {
        let mut router = Router::honest(&name).await;
        let client = Client::connect(router.options()).await.unwrap();
        let instance = client.register(layout(), soon()).await.unwrap();
        let grant = client.prepare_store(&key(), instance, soon()).await.unwrap();
        let writing = grant.memory.permit().unwrap();
        let began = Instant::now();
        if ending == "close" {
            client.close().await;
        }
        drop(client);
        assert!(began.elapsed() < Duration::from_secs(10), "nobody waits for the GPU");
        // The router takes the next client when the socket of this one has closed.
        let mut next = tokio::spawn(Client::connect(router.options()));
        assert!(timeout(Duration::from_millis(200), &mut next).await.is_err(), "{ending}");
        let gone = router.so_far().into_iter();
        assert_eq!(gone.filter(|request| matches!(request, Request::Unregister { .. })).count(), 0);
        drop(writing);
        next.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_runtime_ends_though_a_gpu_does_not_and_the_socket_outlives_it() {
    let (name, _region) = pool("runtime");
    let router = Router::honest(&name).await;
    let options = router.options();
    let ending = tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let writing = runtime.block_on(async {
            let client = Client::connect(options).await.unwrap();
            let instance = client.register(layout(), soon()).await.unwrap();
            let grant = client.prepare_store(&key(), instance, soon()).await.unwrap();
            grant.memory.permit().unwrap()
        });
        drop(runtime);
        writing
    });
    let writing = timeout(Duration::from_secs(60), ending).await.expect("it ends").unwrap();
    // The router takes the next client when the socket of this one has closed.
    let next = Client::connect(router.options());
    assert!(timeout(Duration::from_millis(200), next).await.is_err(), "its slots are kept");
    drop(writing);
}

#[tokio::test]
async fn an_instance_that_was_given_up_is_not_unregistered() {
    let (name, _region) = pool("given_up");
    let mut router = Router::honest(&name).await;
    let client = Client::connect(router.options()).await.unwrap();
    let doubtful = client.register(layout(), soon()).await.unwrap();
    let other = client.register(layout(), soon()).await.unwrap();
    client.prepare_store(&key(), doubtful, soon()).await.unwrap();
    client.give_up(doubtful);
    client.close().await;
    let unregistered: Vec<u64> = router
        .so_far()
        .into_iter()
        .filter_map(|request| match request {
            Request::Unregister { instance_id } => Some(instance_id),
            Request::AbandonStore { instance_id, .. } => Some(instance_id),
            _ => None,
        })
        .collect();
    assert_eq!(unregistered, [other]);
}

#[tokio::test]
async fn what_is_loaded_is_confirmed_before_the_lease_ends() {
    let (name, region) = pool("load");
    region.write(4096, b"second").unwrap();
    let mut held = [true, false].into_iter();
    let mut router = Router::start(&name, move |_, request| match request {
        Request::Confirm { .. } => Some(Answer::Reply(Reply::Boolean(held.next().unwrap()))),
        _ => None,
    })
    .await;
    let client = Client::connect(router.options()).await.unwrap();
    let instance = client.register(layout(), soon()).await.unwrap();
    for held in [true, false] {
        let grant = client.prepare_retrieve(&key(), instance, soon()).await.unwrap().unwrap();
        let mut seen = [0; 6];
        grant.memory.read(grant.slots[1].offset, &mut seen).unwrap();
        assert_eq!(&seen, b"second");
        router.so_far();
        let kept = client.commit_retrieve(&key(), instance, &grant.slots, soon()).await.unwrap();
        assert_eq!(kept, held, "slots that were used anew are thrown away");
        let asked = router.so_far();
        let confirm = Request::Confirm {
            instance_id: instance,
            offsets: vec![0, 4096],
            generations: vec![7, 8],
        };
        assert_eq!(asked[0], confirm);
        assert!(matches!(asked[1], Request::CommitRetrieve { .. }));
    }
}

#[tokio::test]
async fn what_is_loaded_within_the_time_that_the_server_holds_it_is_not_asked_about() {
    const LONG: u32 = 60_000;
    for hold in [LONG, 1] {
        let (name, _region) = pool(&format!("hold_{hold}"));
        let mut router = Router::start(&name, move |_, request| match request {
            Request::Hello => Some(Answer::Reply(holding(1, hold))),
            Request::CommitRetrieve { .. } if hold == LONG => Some(Answer::Silence),
            _ => None,
        })
        .await;
        let client = Client::connect(router.options()).await.unwrap();
        let instance = client.register(layout(), soon()).await.unwrap();
        let grant = client.prepare_retrieve(&key(), instance, soon()).await.unwrap().unwrap();
        if hold == 1 {
            tokio::time::sleep(Duration::from_millis(2)).await; // the copy took longer
        }
        router.so_far();
        let kept = client.commit_retrieve(&key(), instance, &grant.slots, soon()).await.unwrap();
        assert!(kept, "nobody waits for an answer to the commit");
        let (_, first) = router.received(|_| true).await;
        let asked = matches!(first, Request::Confirm { .. });
        assert_eq!(asked, hold == 1, "{first:?}");
        if !asked {
            let commit = Request::CommitRetrieve { key: key().into(), instance_id: instance };
            assert_eq!(first, commit, "so that the server needs not hold it any longer");
        }
        let again = client.commit_retrieve(&key(), instance, &grant.slots, soon()).await.unwrap();
        assert!(!again, "there is no such grant any more");
    }
}

/// Two loads of one range, of which the server pairs prepares and commits in their order.
#[tokio::test]
async fn what_another_load_of_the_range_may_have_ended_is_asked_about() {
    for undone in [false, true] {
        let (name, _region) = pool(&format!("mixed_{undone}"));
        let mut grants = 0;
        let mut router = Router::start(&name, move |_, request| match request {
            Request::Hello => Some(Answer::Reply(holding(1, 60_000))),
            Request::PrepareRetrieve { .. } => {
                grants += 1;
                (undone && grants == 2).then_some(Answer::Silence)
            }
            _ => None,
        })
        .await;
        let client = Client::connect(router.options()).await.unwrap();
        let instance = client.register(layout(), soon()).await.unwrap();
        let key = key();
        let first = client.prepare_retrieve(&key, instance, soon()).await.unwrap().unwrap();
        // The second is given up, or commits before the first.
        let until = if undone { shortly() } else { soon() };
        let second = client.prepare_retrieve(&key, instance, until).await;
        assert_eq!(second.is_err(), undone);
        if let Ok(second) = second {
            client.commit_retrieve(&key, instance, &second.unwrap().slots, soon()).await.unwrap();
        }
        client.commit_retrieve(&key, instance, &first.slots, soon()).await.unwrap();
        let asked = router.so_far().into_iter();
        let confirmed = asked.filter(|request| matches!(request, Request::Confirm { .. }));
        assert_eq!(confirmed.count(), if undone { 1 } else { 2 });
        let alone = client.prepare_retrieve(&key, instance, soon()).await.unwrap().unwrap();
        router.so_far();
        client.commit_retrieve(&key, instance, &alone.slots, soon()).await.unwrap();
        let (_, first) = router.received(|_| true).await;
        assert!(
            matches!(first, Request::CommitRetrieve { .. }),
            "the others have ended: {first:?}"
        );
    }
}

/// A request id that is used again while its first store is under way.
#[tokio::test]
async fn a_commit_or_abandonment_ends_the_store_of_its_own_tokens_and_salt() {
    for abandoned in [false, true] {
        let (name, _region) = pool(&format!("own_{abandoned}"));
        let mut router = Router::honest(&name).await;
        let client = Client::connect(router.options()).await.unwrap();
        let instance = client.register(layout(), soon()).await.unwrap();
        let first = key();
        let salted = Key { cache_salt: "anna".into(), ..key() };
        let others = Key { token_ids: key().token_ids.iter().map(|id| id + 1).collect(), ..key() };
        for key in [&first, &salted, &others] {
            client.prepare_store(key, instance, soon()).await.unwrap();
        }
        router.so_far();
        for key in [&others, &first, &salted] {
            if abandoned {
                client.abandon_store(key, instance, soon()).await.unwrap();
            } else {
                assert!(client.commit_store(key, instance, &[], soon()).await.unwrap());
            }
            let asked = router.so_far();
            let (Request::CommitStore { key: ended, .. }
            | Request::AbandonStore { key: ended, .. }) = &asked[0]
            else {
                panic!("{asked:?}")
            };
            assert_eq!(ended.key, *key);
        }
        assert!(!client.commit_store(&first, instance, &[], soon()).await.unwrap());
    }
}

#[test]
fn a_request_goes_out_while_the_clients_runtime_is_busy() {
    // Nothing of these runs but while something of theirs is waited for.
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (servers, clients) = (runtime(), runtime());
    let mut router = servers.block_on(Router::honest(""));
    let options = router.options();
    let client = std::thread::spawn(move || {
        let client = clients.block_on(Client::connect(options)).unwrap();
        let _context = clients.enter();
        let (key, mut context) = (key(), Context::from_waker(Waker::noop()));
        assert!(client.lookup(&key, soon()).as_mut().poll(&mut context).is_pending());
        (client, clients)
    });
    let sent = async {
        let lookup = |request: &Request| matches!(request, Request::Lookup { .. });
        timeout(Duration::from_secs(5), router.received(lookup)).await.is_ok()
    };
    assert!(servers.block_on(sent), "the request waits for the connection's task");
    drop(client.join().unwrap());
}

#[tokio::test]
async fn a_miss_is_no_error() {
    let (name, _region) = pool("miss");
    let router = Router::start(&name, |_, request| {
        matches!(request, Request::PrepareRetrieve { .. })
            .then_some(Answer::Reply(Reply::RetrieveSlots(None)))
    })
    .await;
    let client = Client::connect(router.options()).await.unwrap();
    let instance = client.register(layout(), soon()).await.unwrap();
    assert!(client.prepare_retrieve(&key(), instance, soon()).await.unwrap().is_none());
}

#[tokio::test]
async fn a_lookup_asks_until_it_is_done() {
    let mut questions = 0;
    let mut router = Router::start("", move |_, request| match request {
        Request::QueryPrefetchStatus { .. } => {
            questions += 1;
            (questions < 3).then_some(Answer::Reply(Reply::None))
        }
        _ => None,
    })
    .await;
    let client = Client::connect(router.options()).await.unwrap();
    assert_eq!(client.lookup(&key(), soon()).await.unwrap(), 2);
    let (_, lookup) = router.received(|request| matches!(request, Request::Lookup { .. })).await;
    let Request::Lookup { key: asked, .. } = lookup else { panic!("{lookup:?}") };
    // LMCache is silent to a key with a rank, and to one that does not say the readers.
    assert_eq!(asked.key, Key { worker_id: None, num_kv_readers: 1, ..key() });
    assert_eq!(router.so_far().len(), 3);
    client.release(&key(), soon()).await.unwrap();
    client.end_session("request", soon()).await.unwrap();
    let asked = router.so_far();
    assert!(
        matches!(&asked[0], Request::FreeLookupLocks { key, .. } if key.key.worker_id.is_none())
    );
    assert_eq!(asked[1], Request::EndSession { request_id: "request".to_owned() });
}

#[tokio::test]
async fn keys_that_servers_meet_with_silence_are_not_sent() {
    let mut router = Router::honest("").await;
    let client = Client::connect(router.options()).await.unwrap();
    router.so_far();
    let bad = [
        (Key { cache_salt: "a@b".to_owned(), ..key() }, ErrorCode::InvalidSalt),
        (Key { model_name: "a@b".to_owned(), ..key() }, ErrorCode::InvalidArgument),
        (Key { world_size: 0, ..key() }, ErrorCode::InvalidArgument),
        (Key { end: 17, ..key() }, ErrorCode::InvalidArgument),
        (Key { start: 8, ..key() }, ErrorCode::InvalidArgument),
        (Key { end: 48, ..key() }, ErrorCode::InvalidArgument),
        (Key { start: 32, end: 16, ..key() }, ErrorCode::InvalidArgument),
    ];
    for (key, expected) in bad {
        assert_eq!(code(client.lookup(&key, soon()).await), Some(expected), "{key:?}");
    }
    let unknown = client.prepare_store(&key(), 1, soon()).await;
    assert_eq!(code(unknown), Some(ErrorCode::Closed), "an instance that is registered no longer");
    assert_eq!(router.so_far(), []);
}

#[tokio::test]
async fn silence_is_a_timeout_and_a_late_reply_is_nobodys() {
    let counter = |value| Reply::Status(vec![("counter".to_owned(), Value::Integer(value))]);
    let mut questions = 0;
    let router = Router::start("", move |_, request| {
        questions += i64::from(matches!(request, Request::Status));
        match (request, questions) {
            (Request::Status, 1) => Some(Answer::Late(counter(1))),
            (Request::Status, n) => Some(Answer::Reply(counter(n))),
            _ => None,
        }
    })
    .await;
    let options =
        ConnectOptions { request_timeout: Duration::from_millis(200), ..router.options() };
    let client = Client::connect(options).await.unwrap();
    let error = client.status().await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Timeout);
    assert!(error.message.contains("status") && error.message.contains(&router.address), "{error}");
    assert_eq!(client.status().await.unwrap(), [("counter".to_owned(), Value::Integer(2))]);
}

#[tokio::test]
async fn replies_that_nobody_asked_for_are_ignored() {
    let router = Router::start("", |_, request| {
        matches!(request, Request::Ping { .. }).then_some(Answer::Stray(Reply::Boolean(true)))
    })
    .await;
    let client = Client::connect(router.options()).await.unwrap();
    client.ping().await.unwrap();
    client.ping().await.unwrap();
}

#[tokio::test]
async fn the_reply_of_another_operation_is_refused() {
    let router = Router::start("", |_, request| {
        let wrong = Answer::As(Box::new(Request::Clear { force: true }), Reply::Boolean(true));
        matches!(request, Request::Ping { .. }).then_some(wrong)
    })
    .await;
    let client = Client::connect(router.options()).await.unwrap();
    assert_eq!(code(client.ping().await), Some(ErrorCode::Protocol));
}

#[tokio::test]
async fn replies_may_come_in_any_order() {
    let mut first = None;
    let router = Router::start("", move |_, request| match request {
        Request::Lookup { key, .. } if first.is_none() => {
            first = Some(key.key.request_id.clone());
            Some(Answer::Silence)
        }
        _ => None,
    })
    .await;
    let client = Client::connect(router.options()).await.unwrap();
    let first = Key { request_id: "first".to_owned(), ..key() };
    let second = Key { request_id: "second".to_owned(), ..key() };
    let (first, second) =
        tokio::join!(client.lookup(&first, shortly()), client.lookup(&second, soon()));
    assert_eq!(code(first), Some(ErrorCode::Timeout));
    assert_eq!(second.unwrap(), 2);
}

#[tokio::test]
async fn what_a_call_leaves_that_got_no_answer_is_undone() {
    let (name, _region) = pool("undone");
    let mut router = Router::start(&name, |_, request| {
        let unanswered = matches!(
            request,
            Request::Lookup { .. } | Request::PrepareStore { .. } | Request::PrepareRetrieve { .. }
        );
        unanswered.then_some(Answer::Silence)
    })
    .await;
    let client = Client::connect(router.options()).await.unwrap();
    assert_eq!(code(client.lookup(&key(), shortly()).await), Some(ErrorCode::Timeout));
    let (_, undone) = router.received(|r| matches!(r, Request::EndSession { .. })).await;
    assert_eq!(undone, Request::EndSession { request_id: "request".to_owned() });
    let instance = client.register(layout(), soon()).await.unwrap();
    let store = client.prepare_store(&key(), instance, shortly()).await;
    assert_eq!(code(store), Some(ErrorCode::Timeout));
    let (_, undone) = router.received(|r| matches!(r, Request::AbandonStore { .. })).await;
    assert_eq!(undone, Request::AbandonStore { key: key().into(), instance_id: instance });
    let load = client.prepare_retrieve(&key(), instance, shortly()).await;
    assert_eq!(code(load), Some(ErrorCode::Timeout));
    router.received(|request| matches!(request, Request::CommitRetrieve { .. })).await;
    let asked = router.so_far();
    assert!(asked.is_empty(), "{asked:?}");
}

#[tokio::test]
async fn an_abandoned_store_is_given_back_and_not_committed() {
    let (name, _region) = pool("abandoned");
    let mut router = Router::honest(&name).await;
    let client = Client::connect(router.options()).await.unwrap();
    let instance = client.register(layout(), soon()).await.unwrap();
    client.prepare_store(&key(), instance, soon()).await.unwrap();
    router.so_far();
    client.abandon_store(&key(), instance, soon()).await.unwrap();
    assert!(!client.commit_store(&key(), instance, &[], soon()).await.unwrap());
    let abandon = Request::AbandonStore { key: key().into(), instance_id: instance };
    assert_eq!(router.so_far(), [abandon]);
}

/// The keys of what a client asked, by operation.
fn salts(asked: &[Request]) -> Vec<(String, String)> {
    let salt = |request: &Request| match request {
        Request::Lookup { key, .. }
        | Request::FreeLookupLocks { key, .. }
        | Request::PrepareStore { key, .. }
        | Request::CommitStore { key, .. }
        | Request::AbandonStore { key, .. }
        | Request::PrepareRetrieve { key, .. }
        | Request::CommitRetrieve { key, .. }
        | Request::Explain { key } => Some(key.key.cache_salt.clone()),
        _ => None,
    };
    asked.iter().filter_map(|it| Some((it.operation().to_string(), salt(it)?))).collect()
}

#[tokio::test]
async fn the_salt_is_dropped_from_no_request() {
    let (name, _region) = pool("salted");
    let mut router = Router::start(&name, |_, request| {
        let explanation = Explanation { chunks: 2, hit_chunks: 2, registered: true, missing: None };
        let explain = matches!(request, Request::Explain { .. });
        explain.then_some(Answer::Reply(Reply::Explanation(explanation)))
    })
    .await;
    let client = Client::connect(router.options()).await.unwrap();
    let instance = client.register(layout(), soon()).await.unwrap();
    let salted = &Key { cache_salt: "tenant".into(), ..key() };
    client.lookup(salted, soon()).await.unwrap();
    client.release(salted, soon()).await.unwrap();
    client.prepare_store(salted, instance, soon()).await.unwrap();
    assert!(client.commit_store(salted, instance, &[], soon()).await.unwrap());
    client.prepare_store(salted, instance, soon()).await.unwrap();
    client.abandon_store(salted, instance, soon()).await.unwrap();
    let load = client.prepare_retrieve(salted, instance, soon()).await.unwrap().unwrap();
    assert!(client.commit_retrieve(salted, instance, &load.slots, soon()).await.unwrap());
    client.explain(salted, soon()).await.unwrap();
    let operations = [
        Operation::Lookup,
        Operation::FreeLookupLocks,
        Operation::PrepareStore,
        Operation::CommitStore,
        Operation::PrepareStore,
        Operation::AbandonStore,
        Operation::PrepareRetrieve,
        Operation::CommitRetrieve,
        Operation::Explain,
    ];
    let expected = operations.map(|operation| (operation.to_string(), "tenant".to_owned()));
    assert_eq!(salts(&router.so_far()), expected);
}

#[tokio::test]
async fn the_salt_is_not_dropped_when_a_call_is_undone() {
    let (name, _region) = pool("salt_undone");
    let mut router = Router::start(&name, |_, request| {
        let prepares =
            matches!(request, Request::PrepareStore { .. } | Request::PrepareRetrieve { .. });
        prepares.then_some(Answer::Silence)
    })
    .await;
    let client = Client::connect(router.options()).await.unwrap();
    let instance = client.register(layout(), soon()).await.unwrap();
    let salted = &Key { cache_salt: "tenant".into(), ..key() };
    assert!(client.prepare_store(salted, instance, shortly()).await.is_err());
    let (_, abandoned) = router.received(|r| matches!(r, Request::AbandonStore { .. })).await;
    assert!(client.prepare_retrieve(salted, instance, shortly()).await.is_err());
    let (_, ended) = router.received(|r| matches!(r, Request::CommitRetrieve { .. })).await;
    let expected = [Operation::AbandonStore, Operation::CommitRetrieve]
        .map(|operation| (operation.to_string(), "tenant".to_owned()));
    assert_eq!(salts(&[abandoned, ended]), expected);
}

#[tokio::test]
async fn grants_that_do_not_fit_are_refused_and_undone() {
    let (name, _region) = pool("unfit");
    let mut grants = [
        StoreSlots { slots: slots(1, OBJECT / 2), chunk_indices: vec![0], refused: None },
        StoreSlots { slots: slots(1, OBJECT), chunk_indices: vec![2], refused: None },
        StoreSlots { slots: slots(2, OBJECT), chunk_indices: vec![1, 0], refused: None },
        StoreSlots { slots: slots(2, OBJECT), chunk_indices: vec![1, 1], refused: None },
    ]
    .into_iter();
    let mut router = Router::start(&name, move |_, request| match request {
        Request::PrepareStore { .. } => {
            Some(Answer::Reply(Reply::StoreSlots(Some(grants.next().unwrap()))))
        }
        Request::PrepareRetrieve { .. } => {
            Some(Answer::Reply(Reply::RetrieveSlots(Some(slots(1, OBJECT)))))
        }
        _ => None,
    })
    .await;
    let client = Client::connect(router.options()).await.unwrap();
    let instance = client.register(layout(), soon()).await.unwrap();
    for _ in 0..4 {
        let store = client.prepare_store(&key(), instance, soon()).await;
        assert_eq!(code(store), Some(ErrorCode::Protocol));
        router.received(|request| matches!(request, Request::AbandonStore { .. })).await;
    }
    let load = client.prepare_retrieve(&key(), instance, soon()).await;
    assert_eq!(code(load), Some(ErrorCode::Protocol), "one slot for two chunks");
}

#[tokio::test]
async fn a_server_started_anew_is_registered_with_and_its_pool_mapped() {
    let (old_name, old) = pool("before");
    let (new_name, new) = pool("after");
    let registered = new_name.clone();
    let mut router =
        Router::start(&old_name, move |connection, request| match (connection, request) {
            (0, Request::Ping { .. }) => Some(Answer::Close),
            (1, Request::Hello) => Some(Answer::Reply(hello(2))),
            (1, Request::Register { .. }) => Some(Answer::Reply(honest(request, &registered))),
            _ => None,
        })
        .await;
    let client = Client::connect(router.options()).await.unwrap();
    let instance = client.register(layout(), soon()).await.unwrap();
    let before = client.prepare_store(&key(), instance, soon()).await.unwrap();
    let load = client.prepare_retrieve(&key(), instance, soon()).await.unwrap().unwrap();
    router.so_far();

    let error = client.ping().await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unreachable, "in mid-request");
    assert!(error.message.contains(&router.address), "{error}");
    let (connection, again) =
        router.received(|request| matches!(request, Request::Register { .. })).await;
    let register = Request::Register { instance_id: instance, layout: layout() };
    assert_eq!((connection, again), (1, register));
    client.connected(soon()).await.unwrap();
    assert_eq!(client.server().boot_token, Some([2; 16]));
    router.so_far();

    // What the old server granted is not the new one's to commit, and cannot be confirmed.
    assert!(!client.commit_store(&key(), instance, &[], soon()).await.unwrap());
    assert!(!client.commit_retrieve(&key(), instance, &load.slots, soon()).await.unwrap());
    assert_eq!(router.so_far(), []);

    let after = client.prepare_store(&key(), instance, soon()).await.unwrap();
    let late = before.memory.write(0, b"old").unwrap_err();
    assert_eq!(late.code, ErrorCode::Unreachable);
    after.memory.write(0, b"new").unwrap();
    for (region, expected) in [(old, b"\0\0\0"), (new, b"new")] {
        let mut seen = [0; 3];
        region.read(0, &mut seen).unwrap();
        assert_eq!(&seen, expected);
    }
}

#[tokio::test]
async fn a_pool_made_anew_under_the_same_name_is_mapped_again() {
    let (name, region) = pool("again");
    let mut region = Some(region);
    let router = Router::start(&name, move |connection, request| match (connection, request) {
        (0, Request::Ping { .. }) => {
            drop(region.take()); // the old server's end removes its segment
            let (_, new) = pool("again");
            new.write(0, b"new").unwrap();
            region = Some(new);
            Some(Answer::Close)
        }
        (1, Request::Hello) => Some(Answer::Reply(hello(2))),
        _ => None,
    })
    .await;
    let client = Client::connect(router.options()).await.unwrap();
    let instance = client.register(layout(), soon()).await.unwrap();
    client.ping().await.unwrap_err();
    client.connected(soon()).await.unwrap();
    let grant = client.prepare_retrieve(&key(), instance, soon()).await.unwrap().unwrap();
    let mut seen = [0; 3];
    grant.memory.read(0, &mut seen).unwrap();
    assert_eq!(&seen, b"new");
}

#[tokio::test]
async fn a_server_that_lives_on_keeps_its_mapping() {
    let (name, region) = pool("same");
    let router = Router::start(&name, move |connection, request| {
        (connection == 0 && matches!(request, Request::Ping { .. })).then_some(Answer::Close)
    })
    .await;
    let client = Client::connect(router.options()).await.unwrap();
    let instance = client.register(layout(), soon()).await.unwrap();
    region.write(4096, b"kept").unwrap();
    drop(region); // the name is gone: mapping it again would fail
    client.ping().await.unwrap_err();
    client.connected(soon()).await.unwrap();
    let grant = client.prepare_retrieve(&key(), instance, soon()).await.unwrap().unwrap();
    let mut seen = [0; 4];
    grant.memory.read(4096, &mut seen).unwrap();
    assert_eq!(&seen, b"kept");
}

#[tokio::test]
async fn without_a_connection_requests_fail_at_once() {
    let mut router = Router::start("", |connection, request| match connection {
        0 => matches!(request, Request::Ping { .. }).then_some(Answer::Close),
        _ => Some(Answer::Close),
    })
    .await;
    let client = Client::connect(router.options()).await.unwrap();
    client.ping().await.unwrap_err();
    router.received(|_| true).await;
    for _ in 0..3 {
        let error = client.lookup(&key(), soon()).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Unreachable);
        assert!(error.message.contains("npx kvferry serve"), "{error}");
    }
    let register = client.register(layout(), soon()).await;
    assert_eq!(code(register), Some(ErrorCode::Unreachable), "unless told to wait for a server");
    let never = client.connected(shortly()).await;
    assert_eq!(code(never), Some(ErrorCode::Unreachable));
}

#[tokio::test]
async fn another_chunk_size_after_a_restart_is_said() {
    let router = Router::start("", |connection, request| match (connection, request) {
        (0, Request::Ping { .. }) => Some(Answer::Close),
        (0, _) => None,
        (_, Request::GetChunkSize) => Some(Answer::Reply(Reply::Integer(256))),
        _ => None,
    })
    .await;
    let client = Client::connect(router.options()).await.unwrap();
    client.ping().await.unwrap_err();
    loop {
        let error = client.ping().await.unwrap_err();
        if error.code != ErrorCode::Unreachable {
            assert_eq!(error.code, ErrorCode::Protocol);
            assert!(error.message.contains("256") && error.message.contains("16"), "{error}");
            break;
        }
        tokio::task::yield_now().await;
    }
    assert_eq!(client.chunk_size(), CHUNK);
}

#[tokio::test]
async fn signs_of_life_begin_with_a_registration_and_their_lack_ends_a_connection() {
    let (name, _region) = pool("life");
    let mut router = Router::start(&name, |connection, request| {
        (connection == 0 && matches!(request, Request::Ping { .. })).then_some(Answer::Silence)
    })
    .await;
    let options =
        ConnectOptions { heartbeat_interval: Duration::from_millis(20), ..router.options() };
    let client = Client::connect(options).await.unwrap();
    let instance = client.register(layout(), soon()).await.unwrap();
    let ping = |request: &Request| matches!(request, Request::Ping { .. });
    let expected = Request::Ping { instance_id: Some(instance) };
    assert_eq!(router.received(ping).await, (0, expected.clone()));
    assert_eq!(router.received(ping).await, (1, expected.clone()), "on another connection");
    assert_eq!(router.received(ping).await, (1, expected), "where they are answered");
}

#[tokio::test]
async fn a_stalled_server_is_not_given_more_than_can_be_kept() {
    let router = Router::start("", |_, request| {
        matches!(request, Request::Ping { .. }).then_some(Answer::Stall)
    })
    .await;
    let client = Arc::new(Client::connect(router.options()).await.unwrap());
    // Tokens of five bytes each: 7 MiB a request, of which the sockets take a few.
    let large = Key { token_ids: vec![u32::MAX; (7 << 20) / 5].into(), end: 0, ..key() };
    let mut requests = JoinSet::new();
    let stalled = Arc::clone(&client);
    requests.spawn(async move { stalled.ping().await.map(drop) });
    for _ in 0..24 {
        let (client, key) = (Arc::clone(&client), large.clone());
        requests.spawn(async move { client.lookup(&key, soon()).await.map(drop) });
    }
    let error = requests.join_next().await.unwrap().unwrap().unwrap_err();
    assert_eq!(error.code, ErrorCode::Timeout);
    assert!(error.message.contains("does not take them"), "{error}");
}

#[tokio::test]
async fn a_request_too_long_for_any_server_is_refused_and_harms_no_other() {
    let router = Router::honest("").await;
    let client = Client::connect(router.options()).await.unwrap();
    let long = Key { token_ids: vec![u32::MAX; 2 << 20].into(), end: 0, ..key() };
    let error = client.lookup(&long, soon()).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    client.ping().await.unwrap();
}

/// LMCache's server: no operations of ours.
async fn lmcache(pool: &str) -> Router {
    Router::start(pool, |_, request| match request {
        Request::GetExperimental => {
            Some(Answer::Reply(Reply::Names(vec!["kv_event_stream".to_owned()])))
        }
        Request::Hello
        | Request::Confirm { .. }
        | Request::Checksums { .. }
        | Request::AbandonStore { .. }
        | Request::Events { .. }
        | Request::Explain { .. }
        | Request::Status => {
            panic!("LMCache was asked {request:?}")
        }
        Request::PrepareStore { .. } | Request::PrepareRetrieve { .. } => {
            Some(Answer::Reply(honest(request, "").plain()))
        }
        _ => None,
    })
    .await
}

#[tokio::test]
async fn an_lmcache_server_is_asked_only_what_it_knows() {
    let (name, _region) = pool("lmcache");
    let mut router = lmcache(&name).await;
    let client = Client::connect(router.options()).await.unwrap();
    assert_eq!(client.server().boot_token, None);
    assert_eq!(code(client.status().await), Some(ErrorCode::UnsupportedOption));
    assert_eq!(code(client.events(0, 9, soon()).await), Some(ErrorCode::UnsupportedOption));
    assert_eq!(code(client.explain(&key(), soon()).await), Some(ErrorCode::UnsupportedOption));
    let hits = count_hits(&client, &key(), soon()).await.unwrap();
    assert_eq!(hits, 2, "what it can be asked");
    let instance = client.register(layout(), soon()).await.unwrap();
    let store = client.prepare_store(&key(), instance, soon()).await.unwrap();
    assert_eq!((store.refused, store.slots[0].generation), (None, None));
    client.abandon_store(&key(), instance, soon()).await.unwrap();
    let load = client.prepare_retrieve(&key(), instance, soon()).await.unwrap().unwrap();
    assert!(client.commit_retrieve(&key(), instance, &load.slots, soon()).await.unwrap());
    client.close().await;
    let received = router.so_far();
    let given_back = received.iter().filter_map(|request| match request {
        Request::FreeLookupLocks { key, .. } => Some((key.key.end, key.key.num_kv_readers)),
        _ => None,
    });
    assert!(given_back.eq([(key().end, 1)]), "the lookup's leases: {received:?}");
}

#[tokio::test]
async fn events_and_explanations_are_asked_for_and_checked() {
    let space = EventSpace { model_name: "m".into(), world_size: 1, cache_salt: String::new() };
    let event = KvEvent {
        kind: EventKind::Stored,
        chunk: [1; 32],
        parent: None,
        rank: 0,
        space: Arc::new(space),
        at_ms: 1,
    };
    let events =
        Events { incarnation: [1; 16], first: 5, events: vec![event.clone(), event], lost: false };
    let explanation = Explanation { chunks: 2, hit_chunks: 2, registered: true, missing: None };
    let (told, explained) = (events.clone(), explanation.clone());
    let mut router = Router::start("", move |_, request| match request {
        Request::Events { .. } => Some(Answer::Reply(Reply::Events(told.clone()))),
        Request::Explain { .. } => Some(Answer::Reply(Reply::Explanation(explained.clone()))),
        _ => None,
    })
    .await;
    let client = Client::connect(router.options()).await.unwrap();
    assert_eq!(client.events(5, 2, soon()).await.unwrap(), events);
    let (_, request) = router.received(|it| matches!(it, Request::Events { .. })).await;
    assert_eq!(request, Request::Events { cursor: 5, max: 2 });
    let more = client.events(5, 1, soon()).await;
    assert_eq!(code(more), Some(ErrorCode::Protocol), "more than was asked for");

    assert_eq!(client.explain(&key(), soon()).await.unwrap(), explanation);
    let (_, request) = router.received(|it| matches!(it, Request::Explain { .. })).await;
    assert!(matches!(request, Request::Explain { key } if key.key.worker_id.is_none()));
    let one = Key { end: CHUNK.into(), ..key() };
    let other = client.explain(&one, soon()).await;
    assert_eq!(code(other), Some(ErrorCode::Protocol), "of another range");
    let salted = Key { cache_salt: "a@b".into(), ..key() };
    assert_eq!(code(client.explain(&salted, soon()).await), Some(ErrorCode::InvalidSalt));
}

#[tokio::test]
async fn an_lmcache_server_without_shared_memory_is_told_what_it_lacks() {
    let router = Router::start("", |_, request| match request {
        Request::Register { .. } => {
            Some(Answer::Reply(Reply::Registered { shm_name: String::new(), pool_size: 0 }))
        }
        _ => None,
    })
    .await;
    let client = Client::connect(router.options()).await.unwrap();
    let error = client.register(layout(), soon()).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::UnsupportedOption);
    for option in ["--no-l1-use-lazy", "--shm-name", "--supported-transfer-mode engine_driven"] {
        assert!(error.message.contains(option), "{error}");
    }
}

#[tokio::test]
async fn a_pool_is_a_segment_and_no_other_file() {
    for name in ["../../etc/passwd", "a\0b"] {
        let router = Router::honest(name).await;
        let client = Client::connect(router.options()).await.unwrap();
        let error = client.register(layout(), soon()).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Protocol, "{name:?}");
    }
}

#[tokio::test]
async fn closing_says_goodbye_once() {
    let (name, _region) = pool("close");
    let mut router = Router::honest(&name).await;
    let client = Client::connect(router.options()).await.unwrap();
    let instance = client.register(layout(), soon()).await.unwrap();
    router.so_far();
    client.close().await;
    client.close().await;
    assert_eq!(router.so_far(), [Request::Unregister { instance_id: instance }]);
    assert_eq!(code(client.ping().await), Some(ErrorCode::Closed));
    assert_eq!(code(client.lookup(&key(), soon()).await), Some(ErrorCode::Closed));
    assert_eq!(code(client.connected(soon()).await), Some(ErrorCode::Closed));
}

#[tokio::test]
async fn closing_ends_requests_under_way() {
    let mut router = Router::start("", |_, request| {
        matches!(request, Request::Ping { .. }).then_some(Answer::Silence)
    })
    .await;
    let client = Arc::new(Client::connect(router.options()).await.unwrap());
    let pinging = Arc::clone(&client);
    let ping = tokio::spawn(async move { pinging.ping().await });
    router.received(|request| matches!(request, Request::Ping { .. })).await;
    client.close().await;
    assert_eq!(code(ping.await.unwrap()), Some(ErrorCode::Closed));
}

#[tokio::test]
async fn what_is_asked_beside_a_close_is_closed() {
    let (name, _region) = pool("beside");
    let mut router = Router::start(&name, |_, request| {
        matches!(request, Request::Unregister { .. }).then_some(Answer::Silence)
    })
    .await;
    let client = Arc::new(Client::connect(router.options()).await.unwrap());
    let instance = client.register(layout(), soon()).await.unwrap();
    let gone = client.register(layout(), soon()).await.unwrap();
    drop(client.unregister(gone, soon()));
    let closing = Arc::clone(&client);
    let refused = async |instance| {
        let store = client.prepare_store(&key(), instance, soon()).await;
        assert_eq!(code(store), Some(ErrorCode::Closed));
        let retrieve = client.prepare_retrieve(&key(), instance, soon()).await;
        assert_eq!(code(retrieve), Some(ErrorCode::Closed));
    };
    refused(gone).await;
    let closing = tokio::spawn(async move { closing.close().await });
    router.received(|request| matches!(request, Request::Unregister { .. })).await;
    refused(instance).await;
    assert!(!closing.is_finished(), "it waits for the server to hear of it");
    closing.await.unwrap();
    refused(instance).await;
}

#[tokio::test]
async fn an_instance_that_is_unregistered_stays_so() {
    let (name, _region) = pool("unregister");
    let mut router = Router::start(&name, |connection, request| {
        (connection == 0 && matches!(request, Request::Ping { .. })).then_some(Answer::Close)
    })
    .await;
    let client = Client::connect(router.options()).await.unwrap();
    let kept = client.register(layout(), soon()).await.unwrap();
    let gone = client.register(layout(), soon()).await.unwrap();
    assert_ne!(kept, gone);
    client.unregister(gone, soon()).await.unwrap();
    client.ping().await.unwrap_err();
    client.connected(soon()).await.unwrap();
    client.ping().await.unwrap();
    let again: Vec<_> = router
        .so_far()
        .into_iter()
        .skip_while(|request| !matches!(request, Request::Ping { .. }))
        .filter(|request| matches!(request, Request::Register { .. }))
        .collect();
    assert_eq!(again, [Request::Register { instance_id: kept, layout: layout() }]);
}
