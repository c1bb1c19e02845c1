//! Servers of each release of LMCache, by their operation ids: what the client asks each of them, and
//! what it says to one of a release that it does not know.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use kvferry_client::{Client, ConnectOptions};
use kvferry_core::ErrorCode;
use kvferry_core::cache::Cache;
use kvferry_core::key::Key;
use kvferry_wire::zmtp::{Config, Connection, Event, SocketType};
use kvferry_wire::{Header, Operation, Reply, Request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::router::{CHUNK, honest, key, layout, soon};
use crate::{code, pool};

/// Messages that answer one.
type Answers = Vec<Vec<Bytes>>;

/// A server that answers what `answer` says.
async fn serve(mut answer: impl FnMut(&[Bytes]) -> Answers + Send + 'static) -> ConnectOptions {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let options = ConnectOptions {
        // Half of the wait for a server that does not answer the first question.
        connect_timeout: Duration::from_millis(600),
        ..ConnectOptions::new(listener.local_addr().unwrap().to_string())
    };
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
            let mut zmtp = Connection::new(Config::null(SocketType::Router), &mut output);
            loop {
                while let Some(event) = zmtp.receive(&mut input, &mut output).unwrap() {
                    let Event::Message(frames) = event else { continue };
                    for message in answer(&frames) {
                        zmtp.send(&message, &mut output).unwrap();
                    }
                }
                stream.write_all_buf(&mut output).await.unwrap();
                if stream.read_buf(&mut input).await.is_ok_and(|bytes| bytes > 0) {
                    continue;
                }
                break;
            }
        }
    });
    options
}

/// The ids of operations in one release, read from its package.
type Ids = &'static [(u8, Operation)];

const IDS_047: Ids = &[
    (5, Operation::Lookup),
    (6, Operation::QueryPrefetchStatus),
    (8, Operation::FreeLookupLocks),
    (9, Operation::EndSession),
    (10, Operation::Register),
    (11, Operation::Unregister),
    (12, Operation::PrepareStore),
    (13, Operation::CommitStore),
    (14, Operation::PrepareRetrieve),
    (15, Operation::CommitRetrieve),
    (16, Operation::Clear),
    (17, Operation::GetChunkSize),
    (18, Operation::Ping),
    (19, Operation::ReportBlockAllocation),
    (20, Operation::Noop),
];
const IDS_050: Ids = &[
    (5, Operation::Lookup),
    (6, Operation::QueryPrefetchStatus),
    (7, Operation::WaitPrefetchStatus),
    (9, Operation::FreeLookupLocks),
    (10, Operation::EndSession),
    (11, Operation::Register),
    (12, Operation::Unregister),
    (13, Operation::PrepareStore),
    (14, Operation::CommitStore),
    (15, Operation::PrepareRetrieve),
    (16, Operation::CommitRetrieve),
    (17, Operation::Clear),
    (18, Operation::GetChunkSize),
    (19, Operation::Ping),
    (20, Operation::ReportBlockAllocation),
    (21, Operation::Noop),
];
const IDS_053: Ids = &[
    (8, Operation::Lookup),
    (9, Operation::QueryPrefetchStatus),
    (10, Operation::WaitPrefetchStatus),
    (12, Operation::FreeLookupLocks),
    (13, Operation::EndSession),
    (14, Operation::Register),
    (15, Operation::Unregister),
    (16, Operation::PrepareStore),
    (17, Operation::CommitStore),
    (18, Operation::PrepareRetrieve),
    (19, Operation::CommitRetrieve),
    (20, Operation::Clear),
    (21, Operation::GetChunkSize),
    (22, Operation::Ping),
    (23, Operation::ReportBlockAllocation),
    (24, Operation::Noop),
];

/// What a release's server was asked: the operation's id, and the request if it is one of the release.
type Asked = Arc<Mutex<Vec<(u8, Option<Request>)>>>;

/// A server of a release: silent to ids that it does not have, and to parameters that do not go with
/// them. `experimental`: its id of `get_experimental`.
async fn release(ids: Ids, experimental: Option<u8>, pool: &str) -> (ConnectOptions, Asked) {
    let (asked, pool) = (Asked::default(), pool.to_owned());
    let log = Arc::clone(&asked);
    let options = serve(move |frames| {
        let [uid, id, payload @ ..] = frames else { panic!("one frame stops an LMCache server") };
        let [id_byte @ 0..=0x7f] = id[..] else { panic!("no id: {id:?}") };
        let known = ids.iter().find(|(id, _)| *id == id_byte).map(|(_, operation)| *operation);
        let operation =
            known.or((experimental == Some(id_byte)).then_some(Operation::GetExperimental));
        let request = operation.and_then(|operation| Request::decode(operation, payload).ok());
        log.lock().unwrap().push((id_byte, request.clone()));
        let (Some(operation), Some(request)) = (operation, request) else { return vec![] };
        let reply = match request {
            Request::Noop => Reply::Text("OK".to_owned()),
            Request::GetExperimental => Reply::Names(vec!["kv_event_stream".to_owned()]),
            request => honest(&request, &pool).plain(),
        };
        vec![Header { uid: uid.clone(), operation_frame: id.clone(), operation }.reply(&reply)]
    })
    .await;
    (options, asked)
}

#[tokio::test]
async fn each_release_is_asked_by_its_own_ids() {
    let (name, _region) = pool("releases");
    for (ids, experimental, expected) in [
        (IDS_047, None, &[21, 17, 10, 12, 13, 5, 6, 14, 15, 8, 9, 18, 11][..]),
        (IDS_050, None, &[21, 18, 11, 13, 14, 5, 6, 15, 16, 9, 10, 19, 12]),
        (IDS_053, Some(40), &[21, 32, 24, 14, 16, 17, 8, 9, 18, 19, 12, 13, 22, 15]),
        (IDS_053, Some(32), &[21, 32, 24, 14, 16, 17, 8, 9, 18, 19, 12, 13, 22, 15]),
    ] {
        let (options, asked) = release(ids, experimental, &name).await;
        let client = Client::connect(options).await.unwrap();
        assert_eq!(client.chunk_size(), CHUNK);
        let instance = client.register(layout(), soon()).await.unwrap();
        let store = client.prepare_store(&key(), instance, soon()).await.unwrap();
        assert_eq!(store.chunk_indices, [1]);
        assert!(client.commit_store(&key(), instance, &[], soon()).await.unwrap());
        assert_eq!(client.lookup(&key(), soon()).await.unwrap(), 2);
        let load = client.prepare_retrieve(&key(), instance, soon()).await.unwrap().unwrap();
        assert!(client.commit_retrieve(&key(), instance, &load.slots, soon()).await.unwrap());
        client.release(&key(), soon()).await.unwrap();
        client.end_session("request", soon()).await.unwrap();
        client.ping().await.unwrap();
        assert_eq!(code(client.status().await), Some(ErrorCode::UnsupportedOption));
        client.close().await;
        let ids: Vec<u8> = asked.lock().unwrap().iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, expected);
    }
}

#[tokio::test]
async fn readers_are_told_in_the_way_of_each_release_or_not_risked() {
    for (ids, experimental, current) in [
        (IDS_047, None, false),
        (IDS_050, None, false),
        (IDS_053, Some(40), false),
        (IDS_053, Some(32), true),
    ] {
        let (options, asked) = release(ids, experimental, "").await;
        let client = Client::connect(options).await.unwrap();
        // MLA with 4 tensor-parallel ranks: of one pipeline stage, and of four.
        let one = Key { num_kv_readers: 4, world_size: 1, ..key() };
        let four = Key { num_kv_readers: 4, world_size: 4, ..key() };
        assert_eq!(client.lookup(&one, soon()).await.unwrap(), 2);
        client.release(&one, soon()).await.unwrap();
        for (_, request) in asked.lock().unwrap().drain(..) {
            if let Some(
                Request::Lookup { key, tp_size } | Request::FreeLookupLocks { key, tp_size },
            ) = request
            {
                assert_eq!((key.key.num_kv_readers, tp_size), (4, 4));
            }
        }
        let lookup = client.lookup(&four, soon()).await;
        if current {
            assert_eq!(lookup.unwrap(), 2);
            continue;
        }
        let error = lookup.unwrap_err();
        assert_eq!(error.code, ErrorCode::Protocol);
        assert!(error.message.contains("0.5.5") && error.message.contains('4'), "{error}");
        assert!(client.release(&four, soon()).await.is_err());
        assert_eq!(asked.lock().unwrap().len(), 0, "no lease was taken");
    }
}

#[tokio::test]
async fn a_server_of_an_unknown_release_is_told_which_ones_are_known() {
    // As one whose ids have moved on.
    let (options, asked) = release(&[(121, Operation::GetChunkSize)], None, "").await;
    let address = options.address.clone();
    let error = Client::connect(options).await.err().unwrap();
    assert_eq!(error.code, ErrorCode::Timeout);
    for part in [&*address, "LMCache 0.4.7 and 0.5.0 to 0.5.6", "npx kvferry serve"] {
        assert!(error.message.contains(part), "{error}");
    }
    assert_eq!(*asked.lock().unwrap(), [(21, None), (17, None)], "without parameters");
}

#[tokio::test]
async fn a_server_that_answers_otherwise_is_told_too() {
    let options = serve(|frames| {
        vec![vec![frames[0].clone(), frames[1].clone(), Bytes::from_static(b"\xc0")]]
    })
    .await;
    let error = Client::connect(options).await.err().unwrap();
    assert_eq!(error.code, ErrorCode::Protocol);
    assert!(error.message.contains("0.5.0 to 0.5.6"), "{error}");
}

/// A server that wakes after it was asked the older question too. To ours that is a commit without
/// parameters, which it answers with "no".
#[tokio::test]
async fn a_slow_server_is_known_by_its_late_answer() {
    for no_comes_first in [true, false] {
        let mut first = None;
        let options = serve(move |frames| {
            let reply = |value: u8| {
                let [uid, operation] = [frames[0].clone(), frames[1].clone()];
                vec![uid, operation, Bytes::copy_from_slice(&[value])]
            };
            match (&frames[1][..], frames.len()) {
                (b"\x15", 2) => {
                    first = Some(reply(64));
                    vec![]
                }
                (b"\x11", 2) => {
                    let answers = [reply(0xc2), first.take().unwrap()];
                    if no_comes_first {
                        answers.into()
                    } else {
                        answers.into_iter().rev().collect()
                    }
                }
                (b"\x18", 2) => vec![[&frames[..2], &[Bytes::from_static(b"\xa2OK")]].concat()],
                (b"\x16", 3) => vec![reply(0xc3)],
                _ => vec![],
            }
        })
        .await;
        let client = Client::connect(options).await.unwrap();
        assert_eq!(client.chunk_size(), 64);
        client.ping().await.unwrap();
    }
}
