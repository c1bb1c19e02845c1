//! The HTTP side over a real socket: every endpoint, and what it refuses.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{Client, connect_raw, key, layout, store_options, wait_until_cut};
use kvferry_core::key::Key;
use kvferry_core::{Error, ErrorCode};
use kvferry_server::{HttpOptions, Server, ServerOptions};
use kvferry_store::disk::DiskOptions;
use kvferry_store::remote::{Lengths, Objects, RemoteFuture, RemoteOptions};
use kvferry_store::{Departure, Quota, Quotas, Store, StoreOptions};
use kvferry_wire::{Reply, Request};
use serde_json::{Value, json};

const PAGE: u64 = 4096;
const JSON: &str = "content-type: application/json";
const CONFIRMED: &str = r#"{"confirm":true}"#;

/// A server with HTTP around a store of so many pages that `prepare` had before anybody else.
fn start_with(pages: u64, prepare: impl FnOnce(&Store)) -> Server {
    let http = Some(HttpOptions { host: "127.0.0.1".into(), port: 0 });
    let options = ServerOptions { http, ..ServerOptions::default() };
    Server::start(&options, |_| {
        let store = Store::new(store_options(16, pages * PAGE))?;
        prepare(&store);
        Ok(store)
    })
    .unwrap()
}

/// A directory that is gone with the test.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kvferry-http-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A remote in memory.
#[derive(Default)]
struct Shelf {
    values: Mutex<HashMap<String, Bytes>>,
    fails: AtomicBool,
}

impl Shelf {
    fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut HashMap<String, Bytes>) -> T,
    ) -> RemoteFuture<'static, T> {
        let refused = || Error::new(ErrorCode::Unreachable, "shelf: no such luck");
        let fails = self.fails.load(Ordering::Relaxed);
        let answer =
            if fails { Err(refused()) } else { Ok(question(&mut self.values.lock().unwrap())) };
        Box::pin(std::future::ready(answer))
    }
}

impl Objects for Shelf {
    fn lengths<'a>(&'a self, keys: Vec<String>, told: &'a Lengths) -> RemoteFuture<'a, ()> {
        let there = |values: &mut HashMap<String, Bytes>| {
            let there = keys.iter().map_while(|key| values.get(key));
            there.for_each(|value| told.tell(value.len() as u64));
        };
        self.ask(there)
    }

    fn get(&self, key: String) -> RemoteFuture<'_, Option<Bytes>> {
        self.ask(|values| values.get(&key).cloned())
    }

    fn put(&self, key: String, value: Bytes) -> RemoteFuture<'_, ()> {
        self.ask(|values| drop(values.insert(key, value)))
    }

    fn put_new(&self, key: String, value: Bytes) -> RemoteFuture<'_, bool> {
        self.ask(|values| match values.entry(key) {
            Entry::Vacant(place) => {
                place.insert(value);
                true
            }
            Entry::Occupied(_) => false,
        })
    }

    fn remove(&self, key: String) -> RemoteFuture<'_, ()> {
        self.ask(|values| drop(values.remove(&key)))
    }

    fn place(&self) -> &str {
        "shelf"
    }
}

/// A server whose store has a disk as well.
fn start_with_disk(pages: u64, directory: &Directory) -> (Server, SocketAddr) {
    start_with_tiers(pages, directory, None)
}

/// The same, and perhaps a remote.
fn start_with_tiers(
    pages: u64,
    directory: &Directory,
    shelf: Option<&Arc<Shelf>>,
) -> (Server, SocketAddr) {
    let remote =
        shelf.map(|shelf| RemoteOptions { objects: Arc::clone(shelf) as _, prefix: "test".into() });
    let http = Some(HttpOptions { host: "127.0.0.1".into(), port: 0 });
    let options = ServerOptions { http, ..ServerOptions::default() };
    let disk = Some(DiskOptions::new(directory.0.join("disk"), 1 << 20));
    let server = Server::start(&options, |_| {
        Store::new(StoreOptions { disk, remote, ..store_options(16, pages * PAGE) })
    });
    let server = server.unwrap();
    let address = server.http_address().unwrap();
    (server, address)
}

/// Asks until the answer is as it should be.
fn ask_until(address: SocketAddr, path: &str, good: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let answer = get(address, path);
        let value = answer.json();
        if good(&value) {
            return value;
        }
        assert!(Instant::now() < deadline, "{}", answer.body);
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A cap for one tenant.
fn quotas_of(salt: &str) -> Quotas {
    let quota = Quota { cap: Some(PAGE), guarantee: 0 };
    Quotas { named: BTreeMap::from([(salt.to_owned(), quota)]), default: Quota::default() }
}

fn start(pages: u64) -> (Server, SocketAddr) {
    let server = start_with(pages, |_| {});
    let address = server.http_address().unwrap();
    (server, address)
}

#[derive(Debug)]
struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    body: String,
}

impl Answer {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    fn json(&self) -> Value {
        assert_eq!(self.header("content-type"), "application/json");
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The code of an error.
    fn code(&self) -> String {
        let error = &self.json()["error"];
        assert!(!error["message"].as_str().unwrap().is_empty());
        error["code"].as_str().unwrap().to_owned()
    }
}

/// Sends bytes; the answer to them.
fn exchange(address: SocketAddr, request: &[u8]) -> Answer {
    let mut stream = connect_raw(address);
    let _ = stream.write_all(request); // it may be refused half-way
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer:?}"));
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap();
    let headers = lines.map(|line| {
        let (name, value) = line.split_once(": ").unwrap();
        (name.to_ascii_lowercase(), value.to_owned())
    });
    let headers: BTreeMap<_, _> = headers.collect();
    assert_eq!(headers["connection"], "close");
    let status = status.strip_prefix("HTTP/1.1 ").unwrap()[..3].parse().unwrap();
    Answer { status, headers, body: body.to_owned() }
}

fn ask(address: SocketAddr, method: &str, path: &str, headers: &[&str], body: &str) -> Answer {
    let mut request = format!("{method} {path} HTTP/1.1\r\ncontent-length: {}\r\n", body.len());
    if !headers.iter().any(|header| header.to_ascii_lowercase().starts_with("host:")) {
        request += "host: localhost\r\n";
    }
    for header in headers {
        request += &format!("{header}\r\n");
    }
    exchange(address, format!("{request}\r\n{body}").as_bytes())
}

fn get(address: SocketAddr, path: &str) -> Answer {
    ask(address, "GET", path, &[], "")
}

fn wait_until_ready(address: SocketAddr) {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let answer = get(address, "/readyz");
        if answer.status == 200 {
            return;
        }
        assert!(Instant::now() < deadline, "{}", answer.body);
        std::thread::yield_now();
    }
}

/// Stores and loads something, so that there are figures.
fn exercise(server: &Server) -> Client {
    let mut engine = Client::connect(server.address());
    engine.register(7, layout("m"));
    assert_eq!(engine.store(key("a", 0, 3), 7), 3);
    assert_eq!(engine.lookup(key("b", 0, 5)), 3);
    assert!(engine.prepare_retrieve(key("b", 0, 3), 7).is_some());
    let ended =
        engine.call(&Request::CommitRetrieve { key: key("b", 0, 3).into(), instance_id: 7 });
    assert_eq!(ended, Reply::Boolean(true));
    engine.end_session("b");
    engine
}

/// What is wrong with the value by the schema, as far as our description uses schemas.
fn check(value: &Value, schema: &Value, description: &Value) -> Result<(), String> {
    const KNOWN: [&str; 11] = [
        "$ref",
        "type",
        "items",
        "required",
        "properties",
        "patternProperties",
        "additionalProperties",
        "minimum",
        "const",
        "enum",
        "description",
    ];
    let schema_map = schema.as_object().unwrap();
    assert!(schema_map.keys().all(|word| KNOWN.contains(&word.as_str())), "{schema}");
    if let Some(reference) = schema["$ref"].as_str() {
        let pointer = reference.strip_prefix('#').unwrap();
        return check(value, description.pointer(pointer).unwrap(), description);
    }
    let is_of = |name: &str| match name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "null" => value.is_null(),
        other => panic!("{other}"),
    };
    let fits = match &schema["type"] {
        Value::Null => true,
        Value::String(name) => is_of(name),
        names => names.as_array().unwrap().iter().any(|name| is_of(name.as_str().unwrap())),
    };
    let refused = |why: &str| Err(format!("{value} {why} {schema}"));
    if !fits {
        return refused("has not the type of");
    }
    if schema_map.get("const").is_some_and(|one| one != value)
        || schema["enum"].as_array().is_some_and(|all| !all.contains(value))
    {
        return refused("is none of");
    }
    if let (Some(least), Some(number)) = (schema["minimum"].as_f64(), value.as_f64())
        && number < least
    {
        return refused("is less than in");
    }
    for item in value.as_array().into_iter().flatten() {
        check(item, &schema["items"], description)?;
    }
    let Some(members) = value.as_object() else { return Ok(()) };
    for name in schema["required"].as_array().into_iter().flatten() {
        if !members.contains_key(name.as_str().unwrap()) {
            return refused(&format!("lacks {name} of"));
        }
    }
    for (name, member) in members {
        let pattern = schema["patternProperties"].as_object().into_iter().flatten();
        let by_pattern = pattern
            .filter(|(pattern, _)| name.starts_with(pattern.strip_prefix('^').unwrap()))
            .map(|(_, schema)| schema);
        let by_name = schema["properties"].get(name).into_iter().chain(by_pattern).next();
        match by_name.unwrap_or(&schema["additionalProperties"]) {
            Value::Bool(false) => return refused(&format!("has {name}, unlike")),
            Value::Null | Value::Bool(true) => {}
            schema => check(member, schema, description)?,
        }
    }
    Ok(())
}

#[test]
fn every_operation_of_the_description_answers_as_it_says() {
    let server = start_with(8, |store| store.set_quotas(quotas_of("leaving")).unwrap());
    let address = server.http_address().unwrap();
    let _engine = exercise(&server);
    wait_until_ready(address);
    let description = get(address, "/openapi.json").json();
    assert_eq!(description["openapi"], "3.1.0");
    let mut seen = 0;
    for (path, item) in description["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let body = match (method.as_str(), path.as_str()) {
                ("post", _) => CONFIRMED,
                ("delete", _) => r#"{"salt":"leaving"}"#,
                ("put", "/quotas") => r#"{"tenants":{"leaving":{"cap":"1MiB"}}}"#,
                ("put", "/quotas/tenant") => r#"{"salt":"new","guarantee":"4KiB"}"#,
                ("put", _) => r#"{"cap":null}"#,
                _ => "",
            };
            let answer = ask(address, &method.to_uppercase(), path, &[JSON], body);
            assert_eq!(answer.status, 200, "{method} {path}: {}", answer.body);
            seen += 1;
            // The same with another host, and the body of another request: refused as described.
            let foreign = ask(address, &method.to_uppercase(), path, &["host: x.org"], "");
            for answer in [answer, foreign] {
                let status = answer.status.to_string();
                let mut response = &operation["responses"][&status];
                if let Some(reference) = response["$ref"].as_str() {
                    response = description.pointer(&reference[1..]).unwrap();
                }
                assert!(response.is_object(), "{method} {path} answers {status}");
                let Some(content) = response["content"].as_object() else {
                    assert_eq!(answer.body, "", "{method} {path}");
                    continue;
                };
                let media = answer.header("content-type").split(';').next().unwrap();
                let schema = &content[media]["schema"];
                let value = match media {
                    "application/json" => answer.json(),
                    _ => Value::String(answer.body),
                };
                check(&value, schema, &description)
                    .unwrap_or_else(|error| panic!("{method} {path}: {error}"));
            }
        }
    }
    assert_eq!(seen, 19);
}

#[test]
fn head_is_get_without_the_body() {
    let (_server, address) = start(8);
    wait_until_ready(address);
    for path in ["/", "/healthz", "/readyz", "/metrics", "/status", "/openapi.json", "/nothing"] {
        let (whole, head) = (get(address, path), ask(address, "HEAD", path, &[], ""));
        assert_eq!((head.status, head.body.as_str()), (whole.status, ""), "{path}");
        assert_eq!(head.header("content-type"), whole.header("content-type"));
        assert_eq!(whole.header("content-length"), whole.body.len().to_string());
        assert_ne!(head.header("content-length"), "", "{path}");
    }
}

#[test]
fn answers_are_neither_kept_nor_framed_nor_taken_for_another_type() {
    let (_server, address) = start(8);
    for path in ["/", "/healthz", "/nothing"] {
        let answer = get(address, path);
        assert_eq!(answer.header("cache-control"), "no-store");
        assert_eq!(answer.header("x-content-type-options"), "nosniff");
        assert_eq!(answer.header("cross-origin-resource-policy"), "same-origin");
        let policy = answer.header("content-security-policy");
        assert!(policy.starts_with("default-src 'none'"), "{policy}");
        assert!(!policy.contains("unsafe"), "{policy}");
        assert_eq!(answer.header("access-control-allow-origin"), "");
    }
}

#[test]
fn unknown_paths_and_methods_without_use_are_named() {
    let (_server, address) = start(8);
    for path in ["/nothing", "/healthz/", "/status/x", "//", "/CLEAR", "/..", "/%2e"] {
        let answer = get(address, path);
        assert_eq!((answer.status, answer.code()), (404, "NOT_FOUND".into()), "{path}");
    }
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "NONSENSE"] {
        let answer = ask(address, method, "/healthz", &[JSON], "{}");
        assert_eq!((answer.status, answer.code()), (405, "METHOD_NOT_ALLOWED".into()), "{method}");
        assert_eq!(answer.header("allow"), "GET, HEAD");
    }
    for (path, method, allow) in [
        ("/quotas", "POST", "GET, HEAD, PUT"),
        ("/quotas/tenant", "GET", "PUT, DELETE"),
        ("/quotas/default", "DELETE", "PUT"),
    ] {
        let answer = ask(address, method, path, &[JSON], "{}");
        assert_eq!((answer.status, answer.header("allow")), (405, allow), "{path}");
    }
    for method in ["GET", "HEAD", "PUT"] {
        let answer = ask(address, method, "/clear", &[JSON], "");
        assert_eq!((answer.status, answer.header("allow")), (405, "POST"), "{method}");
    }
    assert_eq!(get(address, "/healthz?verbose=1").status, 200, "a query changes nothing");
}

#[test]
fn names_that_are_not_loopback_are_refused_however_they_are_given() {
    let (_server, address) = start(8);
    for host in ["example.org", "127.0.0.1.example.org", "192.0.2.1:8080", "", "localhost, x"] {
        for path in ["/", "/status", "/metrics", "/nothing"] {
            let answer = ask(address, "GET", path, &[&format!("host: {host}")], "");
            assert_eq!(
                (answer.status, answer.code()),
                (403, "UNSUPPORTED_OPTION".into()),
                "{host}"
            );
        }
    }
    for host in ["127.0.0.1", "LOCALHOST:1", "[::1]:8080"] {
        assert_eq!(ask(address, "GET", "/healthz", &[&format!("host: {host}")], "").status, 200);
    }
    let absolute = b"GET http://example.org/status HTTP/1.1\r\nhost: localhost\r\n\r\n";
    assert_eq!(exchange(address, absolute).status, 403);
    for none_or_two in ["", "host: localhost\r\nhost: localhost\r\n"] {
        let request = format!("GET /status HTTP/1.1\r\n{none_or_two}\r\n");
        let answer = exchange(address, request.as_bytes());
        assert_eq!((answer.status, answer.code()), (400, "INVALID_ARGUMENT".into()));
    }
    assert_eq!(dropped(address, "http_host"), 23);
    assert_eq!(dropped(address, "http_token"), 0, "told from the start");
}

/// What was dropped for this reason.
fn dropped(address: SocketAddr, reason: &str) -> u64 {
    let text = get(address, "/metrics").body;
    let name = format!("kvferry_dropped_messages_total{{reason=\"{reason}\"}} ");
    let line = text.lines().find_map(|line| line.strip_prefix(&name));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
}

#[test]
fn other_sites_pages_cannot_clear_the_cache() {
    let (server, address) = start(8);
    let mut engine = exercise(&server);
    let clear = |headers: &[&str]| ask(address, "POST", "/clear", headers, CONFIRMED);
    let origins = ["http://example.org", "null", "https://localhost", "http://localhost:1", ""];
    for origin in origins {
        let answer = clear(&[JSON, &format!("origin: {origin}")]);
        assert_eq!((answer.status, answer.code()), (403, "UNSUPPORTED_OPTION".into()), "{origin}");
    }
    // What a page may send without asking first.
    let simple = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""];
    for media in simple {
        let answer = clear(&[&format!("content-type: {media}")]);
        assert_eq!((answer.status, answer.code()), (415, "INVALID_ARGUMENT".into()), "{media}");
    }
    assert_eq!(clear(&[]).status, 415);
    assert_eq!((dropped(address, "http_origin"), dropped(address, "http_media_type")), (5, 5));
    assert_eq!(engine.status("objects"), 3);
    assert_eq!(clear(&[JSON, "origin: http://localhost"]).json(), json!({ "cleared": 3 }));
    assert_eq!(engine.status("objects"), 0);
}

#[test]
fn clearing_leaves_what_is_leased_and_wants_to_be_meant() {
    let (server, address) = start(8);
    let mut engine = exercise(&server);
    assert_eq!(engine.lookup(key("c", 0, 2)), 2);
    for body in ["", "{}", "true", r#"{"confirm":false}"#, r#"{"confirm":true}x"#, "\0"] {
        let answer = ask(address, "POST", "/clear", &[JSON], body);
        assert_eq!((answer.status, answer.code()), (400, "INVALID_ARGUMENT".into()), "{body}");
    }
    assert_eq!(engine.status("objects"), 3);
    let media = "content-type: Application/JSON; charset=utf-8";
    let answer = ask(address, "POST", "/clear", &[media], " { \"confirm\" : true }\n");
    assert_eq!(answer.json(), json!({ "cleared": 1 }));
    engine.end_session("c");
    let chunked = format!(
        "POST /clear HTTP/1.1\r\nhost: localhost\r\n{JSON}\r\ntransfer-encoding: chunked\r\n\r\n\
         5\r\n{}\r\nb\r\n{}\r\n0\r\n\r\n",
        &CONFIRMED[..5],
        &CONFIRMED[5..]
    );
    assert_eq!(exchange(address, chunked.as_bytes()).json(), json!({ "cleared": 2 }));
}

#[test]
fn clearing_a_tenant_leaves_the_others_and_what_is_leased() {
    let directory = Directory::new("clear-tenant");
    let (server, address) = start_with_disk(16, &directory);
    let mut engine = Client::connect(server.address());
    engine.register(7, layout("m"));
    store_of(&mut engine, "a", 2);
    store_of(&mut engine, "b", 3);
    ask_until(address, "/status", |it| it["disk_objects"] == 5 && it["disk_queue_bytes"] == 0);
    let clear = |salt: &str| {
        let body = json!({ "confirm": true, "salt": salt }).to_string();
        ask(address, "POST", "/clear", &[JSON], &body).json()["cleared"].clone()
    };
    assert_eq!(clear("nobody"), 0);
    assert_eq!(clear("a"), 2);
    let status = ask_until(address, "/status", |it| it["disk_objects"] == 3);
    assert_eq!((&status["objects"], &status["evicted_objects"]), (&json!(3), &json!(0)));
    assert_eq!(clear("a"), 0);
    assert_eq!(clear("b"), 3);
}

#[test]
fn what_is_too_large_is_refused_before_it_is_kept() {
    let (_server, address) = start(8);
    let body = " ".repeat(64 << 10);
    let answer = ask(address, "POST", "/clear", &[JSON], &body);
    assert_eq!(answer.status, 400, "as large as a body may be");
    let answer = ask(address, "POST", "/clear", &[JSON], &format!("{body} "));
    assert_eq!((answer.status, answer.code()), (413, "INVALID_ARGUMENT".into()));
    let huge = format!(
        "POST /clear HTTP/1.1\r\nhost: localhost\r\n{JSON}\r\ncontent-length: {}\r\n\r\n",
        u64::MAX - 8
    );
    assert_eq!(exchange(address, huge.as_bytes()).status, 413);
    let mut chunked = format!(
        "POST /clear HTTP/1.1\r\nhost: localhost\r\n{JSON}\r\ntransfer-encoding: chunked\r\n\r\n"
    );
    for _ in 0..65 {
        chunked += &format!("400\r\n{}\r\n", " ".repeat(1 << 10));
    }
    assert_eq!(exchange(address, chunked.as_bytes()).status, 413);
    assert_eq!(dropped(address, "http_too_large"), 3);
    let header = format!("x: {}", "y".repeat(32 << 10));
    assert_eq!(ask(address, "GET", "/healthz", &[&header], "").status, 431);
    let many: Vec<String> = (0..200).map(|number| format!("x-{number}: y")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert_eq!(ask(address, "GET", "/healthz", &many, "").status, 431);
    assert_eq!(get(address, &format!("/{}", "x".repeat(32 << 10))).status, 431);
    assert_eq!(get(address, "/healthz").status, 200);
}

#[test]
fn what_is_no_http_is_cut_and_counted() {
    let (server, address) = start(8);
    for nonsense in [&b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..], b"GET\r\n\r\n", b"\0\0"]
    {
        let mut stream = connect_raw(address);
        stream.write_all(nonsense).unwrap();
        wait_until_cut(&mut stream);
    }
    let mut peer = Client::connect(server.address());
    peer.wait_for("dropped_http_malformed", 3);
    for request in ["GET / HTTP/2.0\r\n\r\n", "GET / HTTP/1.1\r\nhost : localhost\r\n\r\n"] {
        assert!((400..600).contains(&exchange(address, request.as_bytes()).status), "{request}");
    }
}

#[test]
fn a_client_that_only_closes_its_side_gets_its_answer() {
    let (_server, address) = start(8);
    let mut stream = connect_raw(address);
    stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[test]
fn sixty_four_clients_may_be_slow_and_are_cut_and_the_data_side_does_not_notice() {
    let (server, address) = start(8);
    let begun = Instant::now();
    let mut slow: Vec<_> = (0..64).map(|_| connect_raw(address)).collect();
    for stream in &mut slow {
        stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: ").unwrap();
    }
    assert_eq!(get(address, "/healthz").status, 200); // in the place of the first, at once
    wait_until_cut(&mut slow.remove(0));
    assert!(begun.elapsed() < Duration::from_secs(5));
    let mut peer = exercise(&server);
    for stream in &mut slow {
        wait_until_cut(stream);
    }
    assert!(begun.elapsed() >= Duration::from_secs(5), "else nobody waited for them");
    peer.wait_for("dropped_http_deadline", 63);
    assert!(peer.status("dropped_http_connections") >= 1);
    assert_eq!(get(address, "/healthz").status, 200);
}

#[test]
fn a_server_is_ready_at_once_and_its_probes_are_in_no_figure() {
    let (server, address) = start(1);
    let mut peer = Client::connect(server.address());
    wait_until_ready(address);
    let ready = get(address, "/readyz").json();
    let memory = &ready["tiers"]["memory"];
    assert_eq!((&ready["ready"], &memory["ok"]), (&json!(true), &json!(true)));
    assert!(memory["ms"].as_f64().unwrap() > 0.0);
    assert!(memory["age_ms"].as_f64().unwrap() >= 0.0);
    let names = [
        "lookups",
        "hit_chunks",
        "stored_chunks",
        "stored_bytes",
        "damaged_chunks",
        "objects",
        "instances",
    ];
    for name in names {
        assert_eq!(peer.status(name), 0, "{name}");
    }
    let Reply::Events(events) = peer.call(&Request::Events { cursor: 0, max: 9 }) else { panic!() };
    assert!(events.events.is_empty());
}

#[test]
fn a_pool_full_of_what_is_held_is_not_ready_until_there_is_room() {
    let mut held = None;
    let server = start_with(2, |store| {
        let owner = store.connect();
        store.register(owner, 7, layout("m")).unwrap();
        let key = Key { worker_id: Some(0), ..key("a", 0, 2) };
        assert_eq!(store.prepare_store(owner, &key, 7, Instant::now()).unwrap().slots.len(), 2);
        held = Some((store.clone(), owner));
    });
    let address = server.http_address().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let answer = get(address, "/readyz");
        assert_eq!(answer.status, 503);
        let memory = &answer.json()["tiers"]["memory"];
        assert_eq!(memory["ok"], false);
        let reason = memory["reason"].as_str().unwrap();
        if reason.starts_with("there is no room for another object") {
            break;
        }
        assert!(reason.starts_with("nothing was stored and loaded "), "{reason}");
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    assert_eq!(get(address, "/healthz").status, 200, "it lives all the same");
    let metrics = get(address, "/metrics").body;
    assert!(metrics.contains("\nkvferry_tier_ready{tier=\"memory\"} 0\n"), "{metrics}");
    let (store, owner) = held.unwrap();
    store.disconnect(owner, Departure::Ended);
    wait_until_ready(address);
}

#[test]
fn the_status_has_the_figures_of_the_wire() {
    let (server, address) = start(8);
    let mut engine = exercise(&server);
    assert!(engine.is_unanswered(&[b"\x01".to_vec().into(), b"\xc1".to_vec().into()]));
    wait_until_ready(address);
    let status = get(address, "/status").json();
    let Reply::Status(wire) = engine.call(&Request::Status) else { panic!() };
    for (name, value) in wire {
        let value = match value {
            kvferry_wire::message::Value::Integer(value) => json!(value),
            kvferry_wire::message::Value::Text(value) => json!(value),
            _ => continue, // the uptime
        };
        assert_eq!(status[&name], value, "{name}");
    }
    assert_eq!(status["hit_chunks"], 3);
    assert_eq!(status["stored_bytes"], 3 * PAGE);
    assert_eq!(status["retrieved_bytes"], 3 * PAGE);
    assert_eq!(status["tiers"]["memory"]["used_bytes"], 3 * PAGE);
    assert_eq!(status["readiness"]["ready"], true);
    let prepared = &status["operations"]["prepare_store"];
    assert_eq!(prepared["count"], 1);
    assert!(prepared["p99_seconds"].as_f64().unwrap() >= 1e-5);
    assert_eq!(status["operations"]["kvferry.explain"], Value::Null);
}

#[test]
fn a_disk_is_a_tier_of_its_own_and_what_its_probes_do_is_counted_nowhere() {
    let directory = Directory::new("tier");
    let (server, address) = start_with_disk(64, &directory);
    let ready = ask_until(address, "/readyz", |it| it["tiers"]["disk"]["ok"] == true);
    assert!(ready["tiers"]["disk"]["ms"].as_f64().unwrap() > 0.0);
    let fresh = ask_until(address, "/status", |it| it["disk_used_bytes"] == 0);
    for name in ["disk_saves", "disk_loads", "disk_written_bytes", "disk_read_bytes"] {
        assert_eq!(fresh[name], 0, "{name}");
    }
    let _engine = exercise(&server);
    let status = ask_until(address, "/status", |it| it["disk_saves"] == 3);
    let description = get(address, "/openapi.json").json();
    let schemas = &description["components"]["schemas"];
    check(&status, &schemas["Status"], &description).unwrap();
    check(&get(address, "/readyz").json(), &schemas["Readiness"], &description).unwrap();
    let disk = &status["tiers"]["disk"];
    assert_eq!((&disk["capacity_bytes"], &disk["objects"]), (&json!(1 << 20), &json!(3)));
    assert_eq!((&disk["failed"], &disk["failure"]), (&json!(false), &Value::Null));
    assert_eq!(status["disk_failure"], "");
    let (metrics, _) = parse_metrics(&get(address, "/metrics").body);
    let value = |name: &str| metrics[&(format!("kvferry_{name}"), "tier=\"disk\"".to_owned())];
    assert_eq!((value("saves_total"), value("tier_objects")), (3.0, 3.0));
    assert_eq!((value("tier_ready"), value("tier_failed")), (1.0, 0.0));
    assert!(value("written_bytes_total") >= 3.0 * 8192.0);
}

#[test]
fn a_server_whose_disk_fails_stays_ready_and_says_so() {
    let directory = Directory::new("failing");
    let (_server, address) = start_with_disk(8, &directory);
    let disk = directory.0.join("disk");
    ask_until(address, "/readyz", |it| it["tiers"]["disk"]["ok"] == true);
    std::fs::rename(&disk, directory.0.join("away")).unwrap();
    std::fs::write(&disk, "no directory").unwrap();
    let ready = ask_until(address, "/readyz", |it| it["tiers"]["disk"]["ok"] == false);
    assert_eq!(ready["ready"], true);
    let reason = ready["tiers"]["disk"]["reason"].as_str().unwrap();
    assert!(reason.contains(disk.to_str().unwrap()), "{reason}");
    assert_eq!(get(address, "/readyz").status, 200);
    let status = get(address, "/status").json();
    assert_eq!(
        (&status["disk_failure"], &status["tiers"]["disk"]["failed"]),
        (&json!(reason), &json!(true))
    );
    assert_eq!(status["disk_dropped_failed"], 0, "nobody stored anything");
    let metrics = get(address, "/metrics").body;
    for line in ["tier_ready{tier=\"disk\"} 0", "tier_failed{tier=\"disk\"} 1"] {
        assert!(metrics.contains(&format!("\nkvferry_{line}\n")), "{metrics}");
    }
    std::fs::remove_file(&disk).unwrap();
    ask_until(address, "/readyz", |it| it["tiers"]["disk"]["ok"] == true);
    assert_eq!(get(address, "/status").json()["disk_failure"], "", "a probe was the trial");
}

#[test]
fn a_remote_is_a_tier_of_its_own_and_while_it_fails_the_server_stays_ready_and_says_so() {
    let directory = Directory::new("remote");
    let shelf = Arc::new(Shelf::default());
    shelf.fails.store(true, Ordering::Relaxed);
    let (server, address) = start_with_tiers(64, &directory, Some(&shelf));
    let ready = ask_until(address, "/readyz", |it| {
        it["ready"] == true && it["tiers"]["remote"]["reason"] == "shelf: no such luck"
    });
    assert_eq!(ready["tiers"]["remote"]["ok"], false);
    let status = get(address, "/status").json();
    assert_eq!(status["remote_failure"], "shelf: no such luck");
    assert_eq!(status["tiers"]["remote"]["failure"], "shelf: no such luck");
    let metrics = get(address, "/metrics").body;
    for line in ["tier_ready{tier=\"remote\"} 0", "tier_failed{tier=\"remote\"} 1"] {
        assert!(metrics.contains(&format!("\nkvferry_{line}\n")), "{metrics}");
    }
    shelf.fails.store(false, Ordering::Relaxed);
    let ready = ask_until(address, "/readyz", |it| it["tiers"]["remote"]["ok"] == true);
    assert!(ready["tiers"]["remote"]["ms"].as_f64().is_some());
    let _engine = exercise(&server);
    let status = ask_until(address, "/status", |it| it["remote_saves"] == 3);
    assert_eq!((&status["remote_outages"], &status["remote_failure"]), (&json!(1), &json!("")));
    let description = get(address, "/openapi.json").json();
    let schemas = &description["components"]["schemas"];
    check(&status, &schemas["Status"], &description).unwrap();
    check(&get(address, "/readyz").json(), &schemas["Readiness"], &description).unwrap();
    let (metrics, _) = parse_metrics(&get(address, "/metrics").body);
    let value = |name: &str, labels: &str| {
        metrics[&(format!("kvferry_{name}"), format!("tier=\"remote\"{labels}"))]
    };
    assert_eq!((value("saves_total", ""), value("tier_ready", "")), (3.0, 1.0));
    assert!(value("written_bytes_total", "") >= 3.0 * 4096.0);
    assert_eq!(value("tier_request_seconds_count", ",request=\"save\""), 3.0);
}

#[test]
fn the_page_shows_no_figure_that_the_status_lacks() {
    let directory = Directory::new("page");
    let (_server, address) = start_with_tiers(8, &directory, Some(&Arc::default()));
    let status = get(address, "/status").json();
    let page = get(address, "/").body;
    let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    let mut shown = BTreeSet::new();
    for opening in [" now.", "(now.", "{now.", "since(\"", "rate(\""] {
        let after = page.split(opening).skip(1);
        shown.extend(after.map(|rest| rest.split(word).next().unwrap()));
    }
    let drops = page.split("const DROPS = {").nth(1).unwrap().split("};").next().unwrap();
    shown.extend(drops.split(": \"").filter_map(|text| text.rsplit([' ', '\n']).next()));
    shown.retain(|name| !["", "at"].contains(name)); // the end, and the page's own
    let missing: Vec<_> = shown.iter().filter(|name| status.get(name).is_none()).collect();
    assert!(shown.len() > 20, "{shown:?}");
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn the_boot_token_is_told_to_peers_only() {
    let (server, address) = start(8);
    let token = exercise(&server).hello().boot_token;
    let token: String = token.iter().map(|byte| format!("{byte:02x}")).collect();
    for path in ["/", "/healthz", "/readyz", "/metrics", "/status", "/openapi.json"] {
        assert!(!get(address, path).body.to_lowercase().contains(&token), "{path}");
    }
}

/// A server whose quotas are in a file.
fn start_with_quotas(file: &Path) -> kvferry_core::Result<(Server, SocketAddr)> {
    let http = Some(HttpOptions { host: "127.0.0.1".into(), port: 0 });
    let quotas = Some(file.to_owned());
    let options = ServerOptions { http, quotas, ..ServerOptions::default() };
    let server = Server::start(&options, |_| Store::new(store_options(16, 8 * PAGE)))?;
    let address = server.http_address().unwrap();
    Ok((server, address))
}

fn change(address: SocketAddr, method: &str, path: &str, body: &Value) -> Answer {
    ask(address, method, path, &[JSON], &body.to_string())
}

/// Stores chunks of a tenant's.
fn store_of(engine: &mut Client, salt: &str, chunks: u32) {
    let key = Key { cache_salt: salt.into(), ..key(salt, 0, chunks) };
    engine.store(key, 7);
}

#[test]
fn quotas_are_set_listed_replaced_and_taken_back() {
    let (server, address) = start(8);
    let mut engine = Client::connect(server.address());
    engine.register(7, layout("m"));
    let none = json!({ "cap": null, "guarantee": 0 });
    let fresh = get(address, "/quotas").json();
    let nobody = json!({
        "tenants": 0, "used_bytes": 0, "objects": 0, "evicted_objects": 0, "evicted_bytes": 0
    });
    let all = json!({
        "memory_bytes": 8 * PAGE, "persistent": false, "default": none, "tenants": {}, "unnamed": nobody
    });
    assert_eq!(fresh, all);
    let odd = "a\"b c:ü";
    let set = json!({ "salt": odd, "cap": "8KiB", "guarantee": 4096 });
    let answer = change(address, "PUT", "/quotas/tenant", &set);
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.json()["tenants"][odd]["cap"], 2 * PAGE);
    change(address, "PUT", "/quotas/default", &json!({ "cap": 3 * PAGE }));
    for salt in [odd, "unnamed 1", "unnamed 2"] {
        store_of(&mut engine, salt, 3);
    }
    let told = get(address, "/quotas");
    assert!(!told.body.contains("unnamed 1"), "{}", told.body);
    let told = told.json();
    assert_eq!(told["default"], json!({ "cap": 3 * PAGE, "guarantee": 0 }));
    let one = &told["tenants"][odd];
    assert_eq!((&one["guarantee"], &one["used_bytes"]), (&json!(PAGE), &json!(2 * PAGE)));
    assert_eq!((&told["unnamed"]["tenants"], &told["unnamed"]["objects"]), (&json!(2), &json!(6)));
    let replaced = json!({ "tenants": { "other": { "guarantee": "4 KiB" } } });
    let told = change(address, "PUT", "/quotas", &replaced).json();
    let names: Vec<_> = told["tenants"].as_object().unwrap().keys().collect();
    assert_eq!((names, &told["default"]), (vec![&"other".to_owned()], &none));
    let answer = change(address, "DELETE", "/quotas/tenant", &json!({ "salt": odd }));
    assert_eq!((answer.status, answer.code()), (404, "NOT_FOUND".into()));
    let told = change(address, "DELETE", "/quotas/tenant", &json!({ "salt": "other" })).json();
    assert_eq!(told["tenants"], json!({}));
}

#[test]
fn quotas_that_cannot_be_kept_are_refused_and_change_nothing() {
    let directory = Directory::new("refused");
    let file = directory.0.join("quotas.json");
    let (_server, address) = start_with_quotas(&file).unwrap();
    let kept =
        json!({ "default": { "cap": "8KiB" }, "tenants": { "a": { "guarantee": 5 * PAGE } } });
    let before = change(address, "PUT", "/quotas", &kept).json();
    let written = std::fs::read(&file).unwrap();
    let refused = [
        ("PUT", "/quotas/tenant", json!({ "salt": "b", "guarantee": 4 * PAGE }), "are guaranteed"),
        (
            "PUT",
            "/quotas",
            json!({ "tenants": { "b": { "guarantee": "1GiB" } } }),
            "are guaranteed",
        ),
        (
            "PUT",
            "/quotas/tenant",
            json!({ "salt": "b", "cap": 1, "guarantee": 2 }),
            "below its guarantee",
        ),
        ("PUT", "/quotas/tenant", json!({ "salt": "b/c" }), "a salt must not contain '/'"),
        ("PUT", "/quotas/tenant", json!({ "cap": 1 }), "salt is missing"),
        ("PUT", "/quotas/tenant", json!({ "salt": 1 }), "salt is missing"),
        ("PUT", "/quotas/default", json!({ "gurantee": 1 }), "did you mean \"guarantee\"?"),
        ("PUT", "/quotas/default", json!({ "salt": "a" }), "has a key \"salt\""),
        ("PUT", "/quotas", json!([]), "is no object"),
        ("DELETE", "/quotas/tenant", json!({ "salt": "a", "cap": 1 }), "did you mean \"salt\"?"),
    ];
    for (method, path, body, part) in refused {
        let answer = change(address, method, path, &body);
        let code = if part.starts_with("a salt") { "INVALID_SALT" } else { "INVALID_ARGUMENT" };
        assert_eq!((answer.status, answer.code()), (400, code.into()), "{}", answer.body);
        let message = answer.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(message.contains(part), "{part}: {message}");
    }
    for headers in [&["content-type: text/plain"][..], &[JSON, "origin: http://example.org"]] {
        let answer = ask(address, "PUT", "/quotas", headers, "{}");
        assert!([403, 415].contains(&answer.status), "{}", answer.body);
    }
    assert_eq!(get(address, "/quotas").json(), before);
    assert_eq!(std::fs::read(&file).unwrap(), written);
}

#[test]
fn quotas_and_labels_outlive_the_server_in_a_file_for_its_owner_only() {
    let directory = Directory::new("kept");
    let file = directory.0.join("quotas.json");
    let (server, address) = start_with_quotas(&file).unwrap();
    assert!(!file.exists(), "nothing was set yet");
    for salt in ["acme", "blue"] {
        change(address, "PUT", "/quotas/tenant", &json!({ "salt": salt, "guarantee": "4KiB" }));
    }
    let before = get(address, "/quotas").json();
    assert_eq!(before["persistent"], true);
    drop(server);
    let (_server, address) = start_with_quotas(&file).unwrap();
    assert_eq!(get(address, "/quotas").json(), before, "labels as well");
    let mut names: Vec<_> = std::fs::read_dir(&directory.0)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["quotas.json", "quotas.json.key"]);
    #[cfg(unix)]
    for name in names {
        use std::os::unix::fs::PermissionsExt as _;
        let mode = std::fs::metadata(directory.0.join(&name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    std::fs::remove_dir_all(&directory.0).unwrap();
    let answer = change(address, "PUT", "/quotas", &json!({}));
    assert_eq!((answer.status, answer.code()), (500, "SYSTEM".into()));
    assert_eq!(get(address, "/quotas").json(), before, "what is not kept does not hold");
}

#[test]
fn a_broken_file_is_refused_at_the_start_with_its_name_and_the_remedy() {
    let directory = Directory::new("broken");
    let file = directory.0.join("quotas.json");
    for (text, part) in [
        ("", "no JSON"),
        (r#"{"tenants":{"s3cret":{"cap":1,"cap":2}}}"#, "a name comes twice"),
        (
            r#"{"tenants":{"s3cret":{"cups":1}}}"#,
            "tenants, number 1 has a key \"cups\": did you mean \"cap\"?",
        ),
        (r#"{"tenants":{"s3cret":{"guarantee":"1GiB"}}}"#, "are guaranteed"),
        (r#"{"default":{"cap":1,"guarantee":2}}"#, "the cap of the default"),
    ] {
        std::fs::write(&file, text).unwrap();
        let error = start_with_quotas(&file).err().unwrap();
        assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
        assert!(error.message.starts_with(file.to_str().unwrap()), "{error}");
        assert!(
            error.message.contains(part) && error.message.ends_with("start without it"),
            "{error}"
        );
        assert!(!error.message.contains("s3cret"), "{error}");
    }
    let large = std::fs::File::create(&file).unwrap();
    large.set_len((16 << 20) + 1).unwrap();
    let error = start_with_quotas(&file).err().unwrap();
    assert!(error.message.contains("more than 16777216 bytes"), "{error}");
    let error = start_with_quotas(&directory.0).err().unwrap();
    assert!(error.message.contains("is no file"), "{error}");
    let error = start_with_quotas(&directory.0.join("none/quotas.json")).err().unwrap();
    assert!(error.message.contains("make its directory"), "{error}");
    std::fs::remove_file(&file).unwrap();
    std::fs::write(directory.0.join("quotas.json.key"), "short").unwrap();
    let error = start_with_quotas(&file).err().unwrap();
    assert!(error.message.contains("no key of 64 hex digits"), "{error}");
}

#[test]
fn metrics_tell_tenants_apart_and_never_their_salts() {
    let (server, address) = start(8);
    let mut engine = Client::connect(server.address());
    engine.register(7, layout("m"));
    let set = json!({ "salt": "s3cret-acme", "cap": 4 * PAGE, "guarantee": PAGE });
    let told = change(address, "PUT", "/quotas/tenant", &set).json();
    let label = told["tenants"]["s3cret-acme"]["label"].as_str().unwrap().to_owned();
    for (salt, chunks) in [("s3cret-acme", 5), ("s3cret-blue", 2), ("", 1)] {
        store_of(&mut engine, salt, chunks);
    }
    for path in ["/", "/healthz", "/readyz", "/metrics", "/status"] {
        assert!(!get(address, path).body.contains("s3cret"), "{path}");
    }
    let (metrics, _) = parse_metrics(&get(address, "/metrics").body);
    let value = |name: &str, label: &str| {
        metrics[&(format!("kvferry_tenant_{name}"), format!("tenant=\"{label}\""))]
    };
    assert_eq!(value("used_bytes", &label), 4.0 * 4096.0);
    assert_eq!(value("objects", &label), 4.0);
    assert_eq!(value("cap_bytes", &label), 4.0 * 4096.0);
    assert_eq!(value("guarantee_bytes", &label), 4096.0);
    assert_eq!(value("evicted_bytes_total", &label), 0.0);
    assert_eq!(value("objects", "none"), 1.0);
    assert_eq!(value("cap_bytes", "none"), f64::INFINITY);
    let tenants = metrics.keys().filter(|(name, _)| name == "kvferry_tenant_objects");
    assert_eq!(tenants.count(), 3);
    let status = get(address, "/status").json();
    assert_eq!(status["tenants"].as_object().unwrap().len(), 3);
    let told = json!({ "cap": 4 * PAGE, "guarantee": PAGE, "used_bytes": 4 * PAGE, "objects": 4,
        "evicted_bytes": 0 });
    assert_eq!(status["tenants"][&label], told);
}

/// The series of a text in Prometheus' format, by name and labels, and the kind of each metric.
/// Refuses what a strict reader of the format would.
fn parse_metrics(text: &str) -> (BTreeMap<(String, String), f64>, BTreeMap<String, String>) {
    let (mut series, mut kinds) = (BTreeMap::new(), BTreeMap::new());
    let mut current: Option<(String, String)> = None;
    assert!(text.ends_with('\n') && !text.contains('\r'));
    let is_name = |name: &str| {
        name.strip_prefix("kvferry_").is_some_and(|rest| {
            !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
        })
    };
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, words) = help.split_once(' ').unwrap();
            assert!(is_name(name), "{line}");
            assert!(words.ends_with('.') && !words.contains('\\'), "{line}");
            let kind = lines.next().unwrap().strip_prefix(&format!("# TYPE {name} ")).unwrap();
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert_eq!(name.ends_with("_total"), kind == "counter", "{line}");
            assert_eq!(kinds.insert(name.to_owned(), kind.to_owned()), None, "{name} comes twice");
            current = Some((name.to_owned(), kind.to_owned()));
            continue;
        }
        let (id, value) = line.rsplit_once(' ').unwrap();
        let (name, labels) = match id.strip_suffix('}') {
            Some(id) => id.split_once('{').unwrap(),
            None => (id, ""),
        };
        let (metric, kind) = current.as_ref().unwrap();
        let suffix = name.strip_prefix(metric.as_str()).unwrap_or_else(|| panic!("{line}"));
        match kind.as_str() {
            "histogram" => assert!(["_bucket", "_sum", "_count"].contains(&suffix), "{line}"),
            _ => assert_eq!(suffix, "", "{line}"),
        }
        let mut names = BTreeSet::new();
        for label in labels.split(',').filter(|_| !labels.is_empty()) {
            let (name, value) = label.split_once('=').unwrap();
            assert!(name.bytes().all(|byte| byte.is_ascii_lowercase()), "{line}");
            let value = value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap();
            assert!(!value.is_empty() && !value.contains(['"', '\\']), "{line}");
            assert!(names.insert(name), "{line}");
        }
        assert_eq!(names.contains("le"), suffix == "_bucket", "{line}");
        let value: f64 = value.parse().unwrap();
        assert!(kind == "gauge" || value >= 0.0, "{line}");
        let before = series.insert((name.to_owned(), labels.to_owned()), value);
        assert_eq!(before, None, "{line} comes twice");
    }
    (series, kinds)
}

#[test]
fn metrics_are_well_formed_and_counters_never_go_down() {
    let (server, address) = start(8);
    let mut engine = exercise(&server);
    let answer = get(address, "/metrics");
    assert_eq!(answer.header("content-type"), "text/plain; version=0.0.4; charset=utf-8");
    let (mut before, kinds) = parse_metrics(&answer.body);
    for round in 0..50 {
        engine.store(key("c", 1000 * round, 5), 7); // the pool is full: some of the others go
        engine.lookup(key("d", 1000 * round, 5));
        engine.end_session("d");
        assert!(engine.is_unanswered(&[b"\x01".to_vec().into(), b"\xc1".to_vec().into()]));
        let (now, same) = parse_metrics(&get(address, "/metrics").body);
        assert_eq!(same, kinds);
        for (id, value) in &before {
            let metric = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|suffix| {
                    id.0.strip_suffix(suffix).filter(|name| kinds.contains_key(*name))
                })
                .unwrap_or(&id.0);
            if kinds[metric] != "gauge" {
                assert!(now[id] >= *value, "{id:?} went from {value} to {}", now[id]);
            }
        }
        before = now;
    }
    let value = |name: &str, labels: &str| before[&(name.to_owned(), labels.to_owned())];
    let memory = "tier=\"memory\"";
    assert_eq!(value("kvferry_tier_capacity_bytes", memory), 8.0 * 4096.0);
    assert_eq!(value("kvferry_lookup_chunks_total", ""), 255.0);
    assert_eq!(value("kvferry_hit_chunks_total", memory), 253.0);
    assert_eq!(value("kvferry_hit_tokens_total", memory), 16.0 * 253.0);
    assert_eq!(value("kvferry_stored_bytes_total", memory), 250.0 * 4096.0);
    let evicted = value("kvferry_evicted_objects_total", memory);
    assert!(evicted >= 242.0);
    let aged = |le: &str| {
        value("kvferry_evicted_age_seconds_bucket", &format!("tier=\"memory\",le=\"{le}\""))
    };
    assert_eq!(value("kvferry_evicted_age_seconds_count", memory), evicted);
    assert_eq!((aged("604800"), aged("+Inf")), (evicted, evicted));
    assert_eq!(value("kvferry_connections", "protocol=\"zmtp\""), 1.0);
    assert_eq!(value("kvferry_operation_seconds_count", "operation=\"prepare_store\""), 51.0);
    let all = value("kvferry_operation_seconds_bucket", "operation=\"lookup\",le=\"+Inf\"");
    assert_eq!(all, value("kvferry_operation_seconds_count", "operation=\"lookup\""));
    let buckets: Vec<f64> = ["0.00001", "0.0001", "0.001", "0.01", "0.1", "1"]
        .map(|bound| format!("operation=\"lookup\",le=\"{bound}\""))
        .iter()
        .map(|labels| value("kvferry_operation_seconds_bucket", labels))
        .collect();
    assert!(buckets.is_sorted(), "{buckets:?}");
}

#[test]
fn a_server_that_ends_leaves_its_http_port_to_others() {
    let (server, address) = start(8);
    assert_eq!(get(address, "/healthz").status, 200);
    let mut idle = connect_raw(address);
    drop(server);
    wait_until_cut(&mut idle);
    assert!(std::net::TcpStream::connect(address).is_err());
}
