//! Who is let in where, and for what.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::{Client, connect_raw, key, layout, store_options};
use kvferry_client::{ConnectOptions, Token};
use kvferry_core::cache::Cache;
use kvferry_core::{Error, ErrorCode, Result};
use kvferry_server::{HttpOptions, Server, ServerOptions};
use kvferry_store::Store;
use kvferry_wire::message::KV_EVENT_STREAM;
use kvferry_wire::zmtp::ZmtpError;
use kvferry_wire::{Dialect, Reply, Request};

const PAGE: u64 = 4096;
const INSTANCE: u64 = 7;
const DATA: &str = "data-data-data-data-data-data-data";
const ADMIN: &str = "admin-admin-admin-admin-admin-admin";
const METRICS: &str = "metrics-metrics-metrics-metrics-metrics";

/// A directory of mode 0700 with a token file, gone with the test.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let name = format!("kvferry-security-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700)
            .create(&path)
            .unwrap();
        let mut options = std::fs::File::options();
        let file = options.write(true).create_new(true).mode(0o600).open(path.join("tokens"));
        let text = format!("data = {DATA}\nadmin = {ADMIN}\nmetrics = {METRICS}\n");
        file.unwrap().write_all(text.as_bytes()).unwrap();
        Self(path)
    }

    fn tokens(&self) -> Option<PathBuf> {
        Some(self.0.join("tokens"))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn start(options: &ServerOptions) -> Result<Server> {
    Server::start(options, |_| Store::new(store_options(16, 8 * PAGE)))
}

/// Where this machine reaches a server that listens everywhere.
fn here(server: &Server) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, server.address().port()).into()
}

#[test]
fn other_addresses_than_loopback_need_the_flag_and_the_tokens() {
    let directory = Directory::new("needs");
    let http = |host: &str| Some(HttpOptions { host: host.into(), port: 0 });
    for (host, http, listen_public, tokens) in [
        ("0.0.0.0", None, false, None),
        ("0.0.0.0", None, true, None),
        ("::", None, false, directory.tokens()),
        ("127.0.0.1", http("0.0.0.0"), true, None),
        ("127.0.0.1", http("0.0.0.0"), false, directory.tokens()),
    ] {
        let options =
            ServerOptions { host: host.into(), http, listen_public, tokens, ..Default::default() };
        let error = start(&options).err().unwrap();
        assert_eq!(error.code, ErrorCode::UnsupportedOption, "{options:?}");
        let remedy = "--listen-public) and tokenFile (--token-file FILE)";
        assert!(error.message.contains(remedy), "{error}");
    }
    let tokens = Some(directory.0.join("nothing"));
    let error = start(&ServerOptions { tokens, ..Default::default() }).err().unwrap();
    assert_eq!(error.code, ErrorCode::System, "a file that is not there is no open door");
}

#[test]
fn a_public_server_lets_in_who_has_a_token_and_for_what_it_is_for() {
    let directory = Directory::new("public");
    let server = start(&ServerOptions {
        host: "0.0.0.0".into(),
        listen_public: true,
        tokens: directory.tokens(),
        ..Default::default()
    });
    let server = server.unwrap();
    let address = here(&server);
    let refused = |token: Option<&str>| Client::connect_with(address, token).err().unwrap();
    assert_eq!(refused(None), ZmtpError::Mechanism { theirs: "PLAIN".into(), ours: "NULL" });
    for token in ["", METRICS, &DATA[1..], &DATA.to_uppercase()] {
        assert_eq!(refused(Some(token)), ZmtpError::Refused("wrong token".into()), "{token:?}");
    }

    let mut engine = Client::connect_with(address, Some(DATA)).unwrap();
    assert!(!engine.hello().admin);
    engine.register(INSTANCE, layout("m"));
    assert_eq!(engine.store(key("r", 0, 2), INSTANCE), 2);
    assert_eq!(engine.lookup(key("s", 0, 2)), 2);
    let question = Request::Explain { key: key("e", 0, 2).into() };
    let others = [
        Request::Clear { force: true },
        Request::Status,
        Request::Events { cursor: 0, max: 1 },
        question.clone(),
    ];
    for request in &others {
        let frames = request.encode(1 << 40, Dialect::Current);
        assert!(engine.is_unanswered(&frames), "{request:?}");
    }
    engine.end_session("s");
    assert_eq!(engine.lookup(key("t", 0, 2)), 2, "nothing was cleared");
    engine.end_session("t");

    let mut admin = Client::connect_with(address, Some(ADMIN)).unwrap();
    assert!(admin.hello().admin);
    assert!(matches!(admin.call(&question), Reply::Explanation(_)));
    assert_eq!(admin.status("dropped_wrong_token"), 4);
    assert_eq!(admin.status("dropped_not_admin"), 4);
    assert_eq!(admin.call(&Request::Clear { force: false }), Reply::None);
    assert_eq!(engine.lookup(key("u", 0, 2)), 0);
}

#[test]
fn on_loopback_lmcaches_peers_need_no_token_and_are_no_admins() {
    let directory = Directory::new("loopback");
    let tokens = directory.tokens();
    let server = start(&ServerOptions { tokens, ..Default::default() }).unwrap();
    let mut engine = Client::connect(server.address());
    engine.register(INSTANCE, layout("m"));
    assert_eq!(engine.store(key("r", 0, 2), INSTANCE), 2);
    let clear = Request::Clear { force: true }.encode(1 << 40, Dialect::Current);
    assert!(engine.is_unanswered(&clear));
    let Reply::Names(names) = engine.call(&Request::GetExperimental) else { panic!("no names") };
    assert!(!names.iter().any(|name| name == KV_EVENT_STREAM), "{names:?}");
    // An engine that asks all the same is told so, and reports its own stores.
    let (instance_id, model_name) = (INSTANCE, "m".to_owned());
    engine.request(&Request::SubscribeKvEvents {
        instance_id,
        model_name,
        cursor: 0,
        max_events: 9,
    });
    assert!(matches!(engine.reply(), Reply::KvEvents(batch) if !batch.enabled));
    let wrong = Client::connect_with(server.address(), Some("wrong")).err().unwrap();
    assert_eq!(wrong, ZmtpError::Refused("wrong token".into()), "a token counts, if it is given");
    let mut admin = Client::connect_with(server.address(), Some(ADMIN)).unwrap();
    assert_eq!(admin.status("objects"), 2);
}

fn by_client<T>(work: impl AsyncFnOnce() -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(work())
}

async fn connect(address: &str, token: Option<&str>) -> Result<kvferry_client::Client> {
    let token = token.map(Token::new).transpose()?;
    let options = ConnectOptions { token, ..ConnectOptions::new(address) };
    kvferry_client::Client::connect(options).await
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

#[test]
fn clients_are_told_what_is_wrong_with_their_token_and_never_the_token() {
    let directory = Directory::new("clients");
    let server = start(&ServerOptions {
        host: "0.0.0.0".into(),
        listen_public: true,
        tokens: directory.tokens(),
        ..Default::default()
    });
    let server = server.unwrap();
    let address = here(&server).to_string();
    let open = start(&ServerOptions::default()).unwrap();
    let open = open.address().to_string();
    by_client(async || {
        let check = |error: Error, code: ErrorCode, part: &str| {
            assert_eq!(error.code, code, "{error}");
            assert!(error.message.contains(part), "{part}: {error}");
            assert!(!error.message.contains("s3cret"), "{error}");
        };
        let error = connect(&address, None).await.err().unwrap();
        check(error, ErrorCode::Unauthorized, "wants a token: give token or tokenFile");
        let error = connect(&address, Some("s3cret")).await.err().unwrap();
        check(error, ErrorCode::Unauthorized, "does not know this token");
        let error = connect(&open, Some("s3cret")).await.err().unwrap();
        check(error, ErrorCode::UnsupportedOption, "takes no token: leave it out");
        let error = connect("192.0.2.1:5555", None).await.err().unwrap();
        check(error, ErrorCode::UnsupportedOption, "give the token of the server");

        let data = connect(&address, Some(DATA)).await.unwrap();
        data.ping().await.unwrap();
        let part = "for its admin token only";
        check(data.status().await.err().unwrap(), ErrorCode::Unauthorized, part);
        check(data.clear(soon()).await.err().unwrap(), ErrorCode::Unauthorized, part);
        let events = data.events(0, 1, soon()).await;
        check(events.err().unwrap(), ErrorCode::Unauthorized, part);
        let admin = connect(&address, Some(ADMIN)).await.unwrap();
        admin.status().await.unwrap();
        admin.clear(soon()).await.unwrap();
        let null = connect(&open, None).await.unwrap();
        null.clear(soon()).await.unwrap();
    });
}

#[test]
fn a_unix_socket_is_as_good_as_loopback_beside_a_public_port() {
    let directory = Directory::new("ipc");
    let path = directory.0.join("socket");
    let options = ServerOptions {
        host: "0.0.0.0".into(),
        listen_public: true,
        tokens: directory.tokens(),
        ipc: Some(path.clone()),
        ..Default::default()
    };
    let server = start(&options).unwrap();
    let address = format!("ipc://{}", path.display());
    by_client(async || {
        let client = connect(&address, None).await.unwrap();
        let instance = client.register(layout("m"), soon()).await.unwrap();
        let key = key("r", 0, 2);
        let grant = client.prepare_store(&key, instance, soon()).await.unwrap();
        assert_eq!(grant.slots.len(), 2);
        assert!(client.commit_store(&key, instance, &[], soon()).await.unwrap());
        assert_eq!(client.lookup(&key, soon()).await.unwrap(), 2);
        assert!(client.clear(soon()).await.is_err(), "no admin");
        connect(&address, Some(ADMIN)).await.unwrap().clear(soon()).await.unwrap();
        client.close().await;
    });
    let error = start(&options).err().unwrap();
    assert_eq!(error.code, ErrorCode::AddressInUse);
    drop(server);
    assert!(!path.exists());
}

/// The status, the headers and the body.
fn ask(address: SocketAddr, request: &str, headers: &str, body: &str) -> (u16, String, String) {
    let mut stream = connect_raw(address);
    let length = body.len();
    let request = format!(
        "{request} HTTP/1.1\r\nhost: cache.example.org\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n{headers}\r\n{body}"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), head.to_ascii_lowercase(), body.to_owned())
}

#[test]
fn http_takes_each_token_for_its_routes_and_tells_nothing_more_without() {
    let directory = Directory::new("http");
    let http = Some(HttpOptions { host: "0.0.0.0".into(), port: 0 });
    let tokens = directory.tokens();
    let options = ServerOptions { http, listen_public: true, tokens, ..Default::default() };
    let server = start(&options).unwrap();
    let address = (Ipv4Addr::LOCALHOST, server.http_address().unwrap().port()).into();
    let with = |token: &str| format!("authorization: Bearer {token}\r\n");
    let (data, metrics, admin) = (with(DATA), with(METRICS), with(ADMIN));
    let clear = r#"{"confirm":true}"#;
    for (request, body, by_metrics) in [
        ("GET /metrics", "", 200),
        ("GET /openapi.json", "", 200),
        ("GET /status", "", 403),
        ("POST /clear", clear, 403),
        ("GET /quotas", "", 403),
        ("PUT /quotas", "{}", 403),
        ("PUT /quotas/default", "{}", 403),
        ("PUT /quotas/tenant", r#"{"salt":"a"}"#, 403),
        ("DELETE /quotas/tenant", r#"{"salt":"a"}"#, 403),
    ] {
        let wrong = [
            String::new(),
            with(""),
            with(&ADMIN[1..]),
            format!("authorization: Basic {ADMIN}\r\n"),
            format!("authorization: {ADMIN}\r\n"),
            format!("{admin}{admin}"),
        ];
        for headers in wrong {
            let (status, head, answer) = ask(address, request, &headers, body);
            assert_eq!(status, 401, "{request} {headers:?}: {answer}");
            assert!(head.contains("www-authenticate: bearer"), "{head}");
            assert!(answer.contains(r#""code":"UNAUTHORIZED""#), "{answer}");
        }
        assert_eq!(ask(address, request, &data, body).0, 403, "{request}: data is not HTTP's");
        assert_eq!(ask(address, request, &metrics, body).0, by_metrics, "{request}");
        assert_eq!(ask(address, request, &admin, body).0, 200, "{request}");
    }
    assert_eq!(ask(address, "GET /healthz", "", "").2, r#"{"healthy":true}"#);
    let deadline = soon();
    while ask(address, "GET /readyz", "", "").2 != r#"{"ready":true}"# {
        assert!(Instant::now() < deadline, "{:?}", ask(address, "GET /readyz", "", ""));
    }
    assert_eq!(ask(address, "GET /", "", "").0, 200, "the page itself knows nothing");
    let lower = format!("authorization: bearer  {METRICS}\r\n");
    let (status, _, figures) = ask(address, "GET /metrics", &lower, "");
    assert_eq!(status, 200, "the scheme has no case");
    let refused = r#"kvferry_dropped_messages_total{reason="http_token"} 54"#;
    assert!(figures.contains(refused), "{figures}");
    assert!(figures.contains(r#"reason="http_forbidden"}"#), "{figures}");
    assert!(!figures.contains(r#"reason="http_forbidden"} 0"#), "{figures}");
}

#[test]
fn a_page_of_another_site_does_not_reach_a_server_of_loopback_with_tokens() {
    let directory = Directory::new("rebinding");
    let http = Some(HttpOptions { host: "127.0.0.1".into(), port: 0 });
    let tokens = directory.tokens();
    let server = start(&ServerOptions { http, tokens, ..Default::default() }).unwrap();
    let admin = format!("authorization: Bearer {ADMIN}\r\n");
    assert_eq!(ask(server.http_address().unwrap(), "GET /status", &admin, "").0, 403);
}
