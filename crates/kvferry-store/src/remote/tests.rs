//! Stores that share a remote in memory, which fails, lies and hangs as it is told.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};
use std::{fs, io};

use bytes::Bytes;
use kvferry_core::cache::Slot;
use kvferry_core::key::{Dtype, Key, Layout};
use kvferry_core::{Error, ErrorCode, Result};
use tokio::sync::watch;

use super::{Lengths, Objects, Remote, RemoteFuture, RemoteOptions, RemoteStatus, Times};
use crate::disk::tests::{Directory, Faulty, Operation};
use crate::disk::{self, Disk, DiskOptions};
use crate::tiers::{Coming, Tier};
use crate::{Limits, Owner, Policy, Store, StoreOptions};

const CHUNK: u64 = 4;
/// One object is a page.
const OBJECT: u64 = 4096;
/// Where objects begin in their values: the names are short.
const HEADER: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mood {
    Works,
    /// No request is answered until the mood changes.
    Hangs,
    /// The same, of values put by a save.
    HangsSaves,
    /// The connection is refused.
    Fails,
    /// It has no room.
    Refuses,
}

/// A remote in memory.
struct Shelf {
    values: Mutex<HashMap<String, Bytes>>,
    mood: watch::Sender<Mood>,
    questions: AtomicUsize,
    gets: AtomicUsize,
    puts: AtomicUsize,
    removals: AtomicUsize,
    /// Whatever is asked for goes just before.
    evicts: AtomicBool,
    /// Lengths that a question is told before it hangs.
    tells: AtomicUsize,
    /// Nothing is taken out.
    keeps: AtomicBool,
    /// How many objects are on their way to whoever got them, while none arrives.
    travels: watch::Sender<Option<u32>>,
}

fn is_object(key: &str) -> bool {
    !key.contains("/probe/") && !key.ends_with("/epoch")
}

impl Shelf {
    fn new() -> Arc<Self> {
        Self::in_mood(Mood::Works)
    }

    fn in_mood(mood: Mood) -> Arc<Self> {
        Arc::new(Self {
            values: Mutex::default(),
            mood: watch::Sender::new(mood),
            questions: AtomicUsize::new(0),
            gets: AtomicUsize::new(0),
            puts: AtomicUsize::new(0),
            removals: AtomicUsize::new(0),
            evicts: AtomicBool::new(false),
            tells: AtomicUsize::new(usize::MAX),
            keeps: AtomicBool::new(false),
            travels: watch::Sender::new(None),
        })
    }

    fn be(&self, mood: Mood) {
        self.mood.send_replace(mood);
    }

    fn objects(&self) -> Vec<String> {
        let values = self.values.lock().unwrap();
        let mut keys: Vec<_> = values.keys().filter(|key| is_object(key)).cloned().collect();
        keys.sort();
        keys
    }

    async fn pass(&self, puts: bool, key: &str) -> Result<()> {
        let mut mood = self.mood.subscribe();
        let is_save = puts && is_object(key);
        let lets_through = |mood: &Mood| match mood {
            Mood::Hangs => false,
            Mood::HangsSaves => !is_save,
            _ => true,
        };
        let mood = *mood.wait_for(lets_through).await.unwrap();
        match mood {
            Mood::Fails => Err(Error::new(ErrorCode::Unreachable, "shelf: no such luck")),
            Mood::Refuses if puts => Err(Error::new(ErrorCode::System, "shelf: no room")),
            _ => Ok(()),
        }
    }
}

impl Objects for Shelf {
    fn lengths<'a>(&'a self, keys: Vec<String>, told: &'a Lengths) -> RemoteFuture<'a, ()> {
        Box::pin(async move {
            self.questions.fetch_add(1, Ordering::Relaxed);
            self.pass(false, &keys[0]).await?;
            let tells = self.tells.load(Ordering::Relaxed);
            for key in keys.iter().take(tells) {
                let length = self.values.lock().unwrap().get(key).map(Bytes::len);
                let Some(length) = length else { return Ok(()) };
                told.tell(length as u64);
            }
            if keys.len() > tells { std::future::pending().await } else { Ok(()) }
        })
    }

    fn get(&self, key: String) -> RemoteFuture<'_, Option<Bytes>> {
        Box::pin(async move {
            self.gets.fetch_add(usize::from(is_object(&key)), Ordering::Relaxed);
            self.pass(false, &key).await?;
            if is_object(&key) && self.evicts.load(Ordering::Relaxed) {
                self.values.lock().unwrap().remove(&key);
            }
            let value = self.values.lock().unwrap().get(&key).cloned();
            if is_object(&key) && self.travels.borrow().is_some() {
                self.travels.send_modify(|travelling| *travelling.get_or_insert(0) += 1);
                self.travels.subscribe().wait_for(Option::is_none).await.unwrap();
            }
            Ok(value)
        })
    }

    fn put(&self, key: String, value: Bytes) -> RemoteFuture<'_, ()> {
        Box::pin(async move {
            self.puts.fetch_add(usize::from(is_object(&key)), Ordering::Relaxed);
            self.pass(true, &key).await?;
            self.values.lock().unwrap().insert(key, value);
            Ok(())
        })
    }

    fn put_new(&self, key: String, value: Bytes) -> RemoteFuture<'_, bool> {
        Box::pin(async move {
            self.pass(true, &key).await?;
            let mut values = self.values.lock().unwrap();
            let is_new = !values.contains_key(&key);
            values.entry(key).or_insert(value);
            Ok(is_new)
        })
    }

    fn remove(&self, key: String) -> RemoteFuture<'_, ()> {
        Box::pin(async move {
            self.pass(false, &key).await?;
            if self.keeps.load(Ordering::Relaxed) && is_object(&key) {
                return Err(Error::new(ErrorCode::System, "shelf: nothing is taken out"));
            }
            self.values.lock().unwrap().remove(&key);
            self.removals.fetch_add(usize::from(is_object(&key)), Ordering::Relaxed);
            Ok(())
        })
    }

    fn place(&self) -> &str {
        "shelf"
    }
}

/// Short enough to be waited for, long enough for a busy machine.
fn times() -> Times {
    Times {
        question: Duration::from_millis(300),
        transfer: Duration::from_millis(600),
        backoff: Duration::from_millis(1),
        period: Duration::from_millis(30),
        retry: Duration::from_millis(5),
        ..Times::default()
    }
}

fn layout() -> Layout {
    Layout {
        model_name: "m".into(),
        world_size: 1,
        block_size: 2,
        num_layers: 1,
        hidden_dim_size: 1024,
        dtype: Dtype::new("uint8").unwrap(),
        single_plane: true,
        num_physical_slots: None,
    }
}

/// `chunks` chunks of a prompt that begins with `first`, for a request of its own.
fn key(first: u32, chunks: u64) -> Key {
    static REQUESTS: AtomicUsize = AtomicUsize::new(0);
    let end = chunks * CHUNK;
    Key {
        model_name: "m".into(),
        world_size: 1,
        worker_id: Some(0),
        token_ids: (first..).take(usize::try_from(end).unwrap()).collect(),
        start: 0,
        end,
        request_id: format!("r{}", REQUESTS.fetch_add(1, Ordering::Relaxed)),
        cache_salt: String::new(),
        num_kv_readers: 1,
    }
}

fn salted(key: Key, salt: &str) -> Key {
    Key { cache_salt: salt.into(), ..key }
}

/// What is stored of a chunk.
fn content(key: &Key, chunk: usize) -> Vec<u8> {
    let first = key.token_ids[chunk * usize::try_from(CHUNK).unwrap()];
    let text = format!("{first} {}", key.cache_salt);
    text.bytes().cycle().take(usize::try_from(OBJECT).unwrap()).collect()
}

fn first_chunk(key: &Key) -> usize {
    usize::try_from(key.start / CHUNK).unwrap()
}

/// A server's store.
struct Engine {
    store: Store,
    owner: Owner,
}

impl Engine {
    fn on(shelf: &Arc<Shelf>) -> Self {
        Self::with(shelf, 64, None)
    }

    fn with(shelf: &Arc<Shelf>, objects: u64, disk: Option<DiskOptions>) -> Self {
        Self::with_times(shelf, objects, disk, times())
    }

    fn with_times(
        shelf: &Arc<Shelf>,
        objects: u64,
        disk: Option<DiskOptions>,
        times: Times,
    ) -> Self {
        Self::with_disk(shelf, objects, disk, Disk::open, times)
    }

    fn with_disk(
        shelf: &Arc<Shelf>,
        objects: u64,
        disk: Option<DiskOptions>,
        open: impl FnOnce(&DiskOptions) -> Result<Disk>,
        times: Times,
    ) -> Self {
        Self::reaching(Arc::clone(shelf) as _, objects, disk, open, times)
    }

    fn reaching(
        shelf: Arc<dyn Objects>,
        objects: u64,
        disk: Option<DiskOptions>,
        open: impl FnOnce(&DiskOptions) -> Result<Disk>,
        times: Times,
    ) -> Self {
        let options = StoreOptions {
            chunk_size: u32::try_from(CHUNK).unwrap(),
            memory: objects * OBJECT,
            shared_name: None,
            policy: Policy::Lru,
            disk,
            remote: Some(RemoteOptions { objects: shelf, prefix: "test".into() }),
            limits: Limits::default(),
        };
        let reach = |options, queue| Remote::open_with(options, queue, times);
        let store = Store::on(options, open, reach).unwrap();
        let owner = store.connect();
        store.register(owner, 1, layout()).unwrap();
        Self { store, owner }
    }

    /// Stores, without a wait; how many chunks were new here.
    fn put(&self, key: &Key) -> usize {
        let slots = self.store.prepare_store(self.owner, key, 1, Instant::now()).unwrap();
        for (slot, chunk) in slots.slots.iter().zip(&slots.chunk_indices) {
            let chunk = first_chunk(key) + *chunk as usize;
            self.store.memory().write(slot.offset, &content(key, chunk)).unwrap();
        }
        self.store.commit_store(key, 1, &[]).unwrap();
        slots.slots.len()
    }

    fn save(&self, key: &Key) -> usize {
        let new = self.put(key);
        self.store.flush(soon()).unwrap();
        new
    }

    /// Chunks that are found, each compared with what was stored; nothing is held afterwards.
    fn read(&self, key: &Key) -> u64 {
        self.store.lookup(self.owner, key, 1, Instant::now()).unwrap();
        let hit = wait(self.store.hit(&key.request_id));
        let range = Key { end: key.start + hit * CHUNK, ..key.clone() };
        let now = Instant::now();
        let slots = self.store.prepare_retrieve(self.owner, &range, 1, now).unwrap().unwrap();
        for (chunk, Slot { offset, .. }) in (first_chunk(key)..).zip(&slots) {
            let mut bytes = vec![0; usize::try_from(OBJECT).unwrap()];
            self.store.memory().read(*offset, &mut bytes).unwrap();
            assert!(bytes == content(key, chunk), "wrong bytes of chunk {chunk}");
        }
        self.store.commit_retrieve(self.owner, &range, 1).unwrap();
        self.store.end_session(&key.request_id);
        hit
    }

    fn remote(&self) -> RemoteStatus {
        self.store.remote_status().unwrap()
    }

    fn status(&self, name: &str) -> u64 {
        let status = self.store.status(Instant::now());
        status.iter().find(|(known, _)| *known == name).expect("a known figure").1
    }

    /// Waits until the remote's status is as it should be.
    fn until(&self, good: impl Fn(&RemoteStatus) -> bool) -> RemoteStatus {
        let give_up = soon();
        loop {
            let status = self.remote();
            if good(&status) {
                return status;
            }
            assert!(Instant::now() < give_up, "{status:?}");
            std::thread::yield_now();
        }
    }

    /// Nothing of it in memory any more.
    fn forget(&self) {
        let memory = self.store.lock().clear();
        assert!(memory > 0);
    }

    fn assert_nothing_is_held(&self) {
        assert_eq!((self.status("leases"), self.status("sessions")), (0, 0));
        let state = self.store.lock();
        assert_eq!(state.coming, Coming::default());
        assert!(state.loading.is_empty() && state.saving.is_empty());
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs a future on this thread. Whoever is not woken within 20 seconds was forgotten.
fn wait<T>(future: impl Future<Output = T>) -> T {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let (mut future, give_up) = (pin!(future), soon());
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return value;
        }
        std::thread::park_timeout(give_up.saturating_duration_since(Instant::now()));
        assert!(Instant::now() < give_up, "nobody woke it");
    }
}

#[test]
fn what_the_remote_has_is_not_explained_as_gone() {
    let shelf = Shelf::new();
    let engine = Engine::on(&shelf);
    engine.save(&key(0, 4));
    engine.forget();
    engine.put(&Key { start: 2 * CHUNK, end: 3 * CHUNK, ..key(0, 3) }); // between those that the remote has
    let explain = |prompt| wait(engine.store.explain(&prompt, str::to_owned).unwrap());
    let told = explain(key(0, 4));
    assert_eq!((told.hit_chunks, told.missing), (4, None));
    let told = explain(key(0, 6));
    assert_eq!((told.hit_chunks, told.missing.unwrap().removed), (4, None));
    shelf.be(Mood::Hangs);
    let told = explain(key(0, 4));
    assert_eq!((told.hit_chunks, told.missing.unwrap().removed.is_some()), (0, true));
}

#[test]
fn what_one_store_saved_another_finds_and_under_another_salt_nobody() {
    let shelf = Shelf::new();
    let (first, second) = (Engine::on(&shelf), Engine::on(&shelf));
    assert_eq!(first.save(&salted(key(0, 5), "mine")), 5);
    for other in ["yours", "", "min"] {
        assert_eq!(second.read(&salted(key(0, 5), other)), 0, "{other:?}");
    }
    assert_eq!(shelf.gets.load(Ordering::Relaxed), 0, "nothing of it was transferred");
    assert_eq!(second.read(&salted(key(0, 9), "mine")), 5);
    assert_eq!(second.read(&salted(key(0, 9), "mine")), 5, "from memory");
    let status = second.remote();
    assert_eq!((status.loads, status.read_bytes), (5, 5 * (OBJECT + HEADER as u64)));
    assert_eq!((second.status("remote_promoted_chunks"), second.status("promoted_chunks")), (5, 0));
    assert_eq!(second.save(&salted(key(0, 7), "mine")), 2, "only what is missing is written");
    assert_eq!(first.read(&salted(key(0, 7), "mine")), 7);
    first.assert_nothing_is_held();
    second.assert_nothing_is_held();
    let keys = shelf.objects();
    assert!(keys.iter().all(|key| key.starts_with("test/1/0/")), "{keys:?}");
}

#[test]
fn a_prefix_may_be_spread_over_memory_disk_and_remote() {
    let (shelf, directory) = (Shelf::new(), Directory::new());
    let whole = key(0, 9);
    let first = Engine::on(&shelf);
    assert_eq!(first.save(&whole), 9);
    let second = Engine::with(&shelf, 64, Some(directory.options(64 << 20)));
    // The disk gets the first six, of which memory keeps the first three; the rest only the remote has.
    assert_eq!(second.save(&Key { end: 6 * CHUNK, ..key(0, 9) }), 6);
    second.forget();
    assert_eq!(second.read(&key(0, 3)), 3);
    assert_eq!(second.read(&key(0, 9)), 9);
    let disk = second.store.disk_status().unwrap();
    assert_eq!((disk.loads, second.remote().loads), (6, 3));
    // Memory has one in the middle of what the remote has.
    let third = Engine::on(&shelf);
    assert_eq!(third.save(&Key { start: 4 * CHUNK, end: 5 * CHUNK, ..key(0, 9) }), 1);
    assert_eq!(third.read(&key(0, 9)), 9);
    assert_eq!(third.remote().loads, 8);
    second.assert_nothing_is_held();
    third.assert_nothing_is_held();
}

/// A store with `chunks` chunks of a prompt on its disk and in the remote, and none in memory. Files cannot be opened
/// while it says so.
fn on_disk_and_remote(
    shelf: &Arc<Shelf>,
    directory: &Directory,
    chunks: u64,
) -> (Engine, Arc<AtomicBool>) {
    let fails = Arc::new(AtomicBool::new(false));
    let files = {
        let fails = Arc::clone(&fails);
        Faulty::on(directory, move |operation| {
            let fails = matches!(operation, Operation::Open) && fails.load(Ordering::Relaxed);
            if fails { Err(io::Error::other("no such luck")) } else { Ok(()) }
        })
    };
    let open = |options: &DiskOptions| Disk::open_on(options, files, disk::Times::default());
    let options = Some(directory.options(64 << 20));
    let engine = Engine::with_disk(shelf, 64, options, open, times());
    assert_eq!(engine.save(&key(0, chunks)), usize::try_from(chunks).unwrap());
    engine.forget();
    (engine, fails)
}

#[test]
fn what_the_disk_has_and_cannot_load_comes_from_the_remote_within_the_same_lookup() {
    let (shelf, directory) = (Shelf::new(), Directory::new());
    let (engine, fails) = on_disk_and_remote(&shelf, &directory, 4);
    // Files that cannot be opened stay, and are the first choice of each lookup.
    fails.store(true, Ordering::Relaxed);
    assert_eq!(engine.read(&key(0, 4)), 4);
    assert_eq!((engine.store.disk_status().unwrap().load_failures, engine.remote().loads), (4, 4));
    assert_eq!((engine.status("remote_promoted_chunks"), engine.status("promoted_chunks")), (4, 0));
    fails.store(false, Ordering::Relaxed);
    engine.forget();
    // One is damaged, one is gone.
    let files = fs::read_dir(directory.objects()).unwrap();
    let files: Vec<_> = files.map(|entry| entry.unwrap().path()).collect();
    fs::write(&files[0], vec![0; 8192]).unwrap();
    fs::remove_file(&files[1]).unwrap();
    assert_eq!(engine.read(&key(0, 4)), 4);
    assert_eq!((engine.store.disk_status().unwrap().damaged, engine.remote().loads), (2, 6));
    engine.assert_nothing_is_held();
}

#[test]
fn what_neither_the_disk_nor_the_remote_can_load_makes_a_shorter_hit() {
    for mood in [Mood::Works, Mood::Fails, Mood::Hangs] {
        let (shelf, directory) = (Shelf::new(), Directory::new());
        let (engine, fails) = on_disk_and_remote(&shelf, &directory, 3);
        assert_eq!(engine.read(&key(0, 1)), 1);
        shelf.values.lock().unwrap().retain(|key, _| !is_object(key));
        fails.store(true, Ordering::Relaxed);
        shelf.be(mood);
        assert_eq!(engine.read(&key(0, 3)), 1, "{mood:?}");
        engine.assert_nothing_is_held();
        assert_eq!(engine.status("used_bytes"), OBJECT, "{mood:?}");
    }
}

#[test]
fn a_lookup_to_which_the_disk_has_given_all_it_has_still_waits_for_the_remotes_word() {
    let (shelf, directory) = (Shelf::new(), Directory::new());
    Engine::on(&shelf).save(&key(0, 4));
    let patient = Times { question: Duration::from_secs(20), ..times() };
    let disk = Some(directory.options(64 << 20));
    let engine = Engine::with_times(&shelf, 64, disk, patient);
    engine.save(&key(0, 2));
    engine.forget();
    shelf.be(Mood::Hangs);
    let prompt = key(0, 4);
    engine.store.lookup(engine.owner, &prompt, 1, Instant::now()).unwrap();
    let give_up = soon();
    while engine.status("promoted_chunks") < 2 {
        assert!(Instant::now() < give_up);
        std::thread::yield_now();
    }
    let promotion = Limits::default().promotion / 2; // long before the lookup's deadline
    let early = Instant::now().checked_sub(promotion).unwrap();
    assert_eq!(engine.store.take_hit(&prompt.request_id, early), None);
    shelf.be(Mood::Works);
    assert_eq!(wait(engine.store.hit(&prompt.request_id)), 4);
    engine.store.end_session(&prompt.request_id);
    engine.assert_nothing_is_held();
}

#[test]
fn a_value_that_is_not_what_was_saved_is_a_miss_and_counted_and_what_is_stored_anew_is_whole() {
    type Damage = fn(&[u8]) -> Vec<u8>;
    let damages: [(&str, Damage); 6] = [
        ("a byte of the object", |value| changed(value, HEADER + 100)),
        ("a byte of the header", |value| changed(value, 30)),
        ("the magic", |value| changed(value, 0)),
        ("all zeroes", |value| vec![0; value.len()]),
        ("the end of another length", |value| {
            let mut value = value.to_vec();
            value.truncate(HEADER + 4000);
            value.resize(HEADER + 4096, 0);
            value
        }),
        ("another object", |_| Vec::new()), // see below
    ];
    for (what, damage) in damages {
        let shelf = Shelf::new();
        let writer = Engine::on(&shelf);
        writer.save(&key(0, 1));
        let first_key = shelf.objects()[0].clone();
        writer.save(&salted(key(0, 1), "of another tenant"));
        let other_key = shelf.objects().into_iter().find(|key| *key != first_key).unwrap();
        {
            let mut values = shelf.values.lock().unwrap();
            let mut value = damage(&values[&first_key]);
            if value.is_empty() {
                value = values[&other_key].to_vec();
            }
            values.insert(first_key.clone(), value.into());
        }
        let reader = Engine::on(&shelf);
        assert_eq!(reader.read(&key(0, 1)), 0, "{what}");
        assert_eq!((reader.remote().damaged, reader.remote().loads), (1, 0), "{what}");
        let give_up = soon();
        while shelf.objects().contains(&first_key) {
            assert!(Instant::now() < give_up, "{what}: it is taken out");
            std::thread::yield_now();
        }
        assert_eq!(reader.save(&key(0, 1)), 1);
        assert_eq!(Engine::on(&shelf).read(&key(0, 1)), 1, "{what}");
        reader.assert_nothing_is_held();
    }
}

fn changed(value: &[u8], at: usize) -> Vec<u8> {
    let mut value = value.to_vec();
    value[at] ^= 1;
    value
}

#[test]
fn a_value_of_another_length_is_not_even_loaded() {
    let shelf = Shelf::new();
    Engine::on(&shelf).save(&key(0, 2));
    let keys = shelf.objects();
    for key in &keys {
        let mut values = shelf.values.lock().unwrap();
        let torn = values[key].slice(..HEADER + 4000);
        values.insert(key.clone(), torn);
    }
    let reader = Engine::on(&shelf);
    assert_eq!(reader.read(&key(0, 2)), 0);
    assert_eq!(shelf.gets.load(Ordering::Relaxed), 0);
    assert_eq!(reader.save(&key(0, 2)), 2);
    assert_eq!(Engine::on(&shelf).read(&key(0, 2)), 2, "it was written over");
}

#[test]
fn what_is_gone_between_the_question_and_the_load_is_a_miss() {
    let shelf = Shelf::new();
    Engine::on(&shelf).save(&key(0, 3));
    let reader = Engine::on(&shelf);
    shelf.evicts.store(true, Ordering::Relaxed);
    assert_eq!(reader.read(&key(0, 3)), 0);
    let status = reader.remote();
    assert_eq!((status.missing, status.load_failures, status.damaged), (3, 0, 0));
    reader.assert_nothing_is_held();
}

#[test]
fn what_lookups_wait_for_takes_a_quarter_of_the_memory_at_most() {
    let shelf = Shelf::new();
    assert_eq!(Engine::on(&shelf).save(&key(0, 12)), 12);
    let small = Engine::with(&shelf, 16, None);
    for hit in [4, 8, 12] {
        assert_eq!(small.read(&key(0, 12)), hit, "the next one finds more");
        small.assert_nothing_is_held();
    }
    small.assert_nothing_is_held();
}

#[test]
fn an_object_that_the_remote_has_is_not_written_again() {
    let shelf = Shelf::new();
    let (first, second) = (Engine::on(&shelf), Engine::on(&shelf));
    first.save(&key(0, 4));
    second.save(&key(0, 6));
    let status = second.remote();
    assert_eq!((status.known_saves, status.saves), (4, 2));
    assert_eq!(shelf.puts.load(Ordering::Relaxed), 6);
}

#[test]
fn two_lookups_of_one_prefix_share_what_is_loaded() {
    let shelf = Shelf::new();
    Engine::on(&shelf).save(&key(0, 3));
    let reader = Engine::on(&shelf);
    shelf.be(Mood::Hangs);
    let keys = [key(0, 3), key(0, 2), key(0, 3)];
    for key in &keys {
        reader.store.lookup(reader.owner, key, 1, Instant::now()).unwrap();
        assert_eq!(reader.store.take_hit(&key.request_id, Instant::now()), None);
    }
    shelf.be(Mood::Works);
    let hits = keys.each_ref().map(|key| wait(reader.store.hit(&key.request_id)));
    assert_eq!(hits, [3, 2, 3]);
    assert_eq!(shelf.gets.load(Ordering::Relaxed), 3);
    for key in &keys {
        reader.store.end_session(&key.request_id);
    }
    reader.assert_nothing_is_held();
}

#[test]
fn a_remote_that_fails_is_left_alone_until_it_is_back() {
    let shelf = Shelf::new();
    Engine::on(&shelf).save(&key(0, 3));
    let engine = Engine::on(&shelf);
    shelf.be(Mood::Fails);
    // Each lookup is answered, also before the remote is taken for gone.
    let give_up = soon();
    while engine.remote().failed.is_none() {
        assert_eq!(engine.read(&key(0, 3)), 0);
        assert!(Instant::now() < give_up);
    }
    let failed = engine.remote();
    assert!(failed.failed.unwrap().contains("no such luck"));
    assert_eq!(failed.outages, 1);
    let asked = shelf.questions.load(Ordering::Relaxed);
    assert_eq!(engine.read(&key(0, 3)), 0);
    assert_eq!(engine.put(&key(100, 2)), 2);
    assert_eq!(engine.read(&key(100, 2)), 2, "from memory");
    let status = engine.remote();
    assert_eq!(shelf.questions.load(Ordering::Relaxed), asked, "nobody asks");
    assert_eq!((status.dropped_failed, status.queue_bytes), (2, 0));
    shelf.be(Mood::Works);
    engine.until(|status| status.failed.is_none());
    assert_eq!(engine.read(&key(0, 3)), 3, "hits return");
    assert_eq!(engine.save(&key(200, 2)), 2);
    assert_eq!(Engine::on(&shelf).read(&key(200, 2)), 2, "saves too");
    engine.assert_nothing_is_held();
}

#[test]
fn requests_find_out_that_a_remote_is_gone_before_its_keeper_comes_round() {
    let shelf = Shelf::new();
    let times = Times { period: Duration::from_secs(1000), ..times() };
    let engine = Engine::with_times(&shelf, 64, None, times);
    engine.save(&key(0, 1));
    engine.forget();
    let asked = shelf.questions.load(Ordering::Relaxed);
    shelf.be(Mood::Fails);
    for _ in 0..10 {
        assert_eq!(engine.read(&key(0, 1)), 0);
    }
    assert_eq!(shelf.questions.load(Ordering::Relaxed) - asked, 5, "then nobody asks");
    shelf.be(Mood::Works);
    engine.until(|status| status.failed.is_none());
    assert_eq!((engine.read(&key(0, 1)), engine.remote().outages), (1, 1));
}

#[test]
fn a_connection_that_is_lost_once_costs_a_second_try_and_no_hit() {
    struct Flaky(Arc<Shelf>, AtomicUsize);
    impl Flaky {
        fn is_lost(&self, key: &str) -> bool {
            is_object(key) && self.1.fetch_add(1, Ordering::Relaxed).is_multiple_of(2)
        }
    }
    fn lost<T: Send + 'static>() -> RemoteFuture<'static, T> {
        Box::pin(std::future::ready(Err(Error::new(ErrorCode::Unreachable, "connection reset"))))
    }
    impl Objects for Flaky {
        fn lengths<'a>(&'a self, keys: Vec<String>, told: &'a Lengths) -> RemoteFuture<'a, ()> {
            if self.is_lost(&keys[0]) { lost() } else { self.0.lengths(keys, told) }
        }
        fn get(&self, key: String) -> RemoteFuture<'_, Option<Bytes>> {
            if self.is_lost(&key) { lost() } else { self.0.get(key) }
        }
        fn put(&self, key: String, value: Bytes) -> RemoteFuture<'_, ()> {
            if self.is_lost(&key) { lost() } else { self.0.put(key, value) }
        }
        fn put_new(&self, key: String, value: Bytes) -> RemoteFuture<'_, bool> {
            self.0.put_new(key, value)
        }
        fn remove(&self, key: String) -> RemoteFuture<'_, ()> {
            self.0.remove(key)
        }
        fn place(&self) -> &str {
            "flaky"
        }
    }
    let shelf = Shelf::new();
    Engine::on(&shelf).save(&key(0, 1));
    let flaky = Arc::new(Flaky(Arc::clone(&shelf), AtomicUsize::new(0)));
    let engine = Engine::reaching(flaky, 8, None, Disk::open, times());
    assert_eq!(engine.read(&key(0, 1)), 1);
    assert_eq!((engine.remote().retries, engine.remote().outages), (2, 0));
}

#[test]
fn a_remote_that_hangs_holds_up_no_lookup_for_longer_than_a_question_takes() {
    let shelf = Shelf::new();
    Engine::on(&shelf).save(&key(0, 3));
    let engine = Engine::on(&shelf);
    shelf.be(Mood::Hangs);
    // Nobody lets it go on: each answer comes by a deadline of ours.
    let give_up = soon();
    while engine.remote().failed.is_none() {
        assert_eq!(engine.read(&key(0, 3)), 0);
        assert!(Instant::now() < give_up);
    }
    assert!(engine.remote().failed.unwrap().contains("has not answered within"));
    shelf.be(Mood::Works);
    engine.until(|status| status.failed.is_none());
    assert_eq!(engine.read(&key(0, 3)), 3);
    engine.assert_nothing_is_held();
}

#[test]
fn a_question_that_is_not_answered_whole_in_time_finds_what_was_told_and_is_no_failure() {
    let shelf = Shelf::new();
    Engine::on(&shelf).save(&key(0, 6));
    let engine = Engine::on(&shelf);
    shelf.tells.store(2, Ordering::Relaxed);
    for hit in [2, 4, 6, 6] {
        assert_eq!(engine.read(&key(0, 6)), hit, "the next one finds more");
    }
    let status = engine.remote();
    assert_eq!((status.question_failures, status.outages, status.failed), (0, 0, None));
    // Nothing in time is a failure as ever.
    engine.forget();
    shelf.tells.store(0, Ordering::Relaxed);
    assert_eq!(engine.read(&key(0, 6)), 0);
    assert_eq!(engine.remote().question_failures, 1);
    engine.assert_nothing_is_held();
}

#[test]
fn a_remote_without_room_goes_on_to_serve_what_it_has() {
    let shelf = Shelf::new();
    let engine = Engine::on(&shelf);
    engine.save(&key(0, 2));
    engine.forget();
    shelf.be(Mood::Refuses);
    engine.put(&key(100, 1));
    let status = engine.until(|status| status.failed.is_some());
    assert!(status.failed.unwrap().contains("no room"));
    assert_eq!(engine.read(&key(0, 2)), 2);
    engine.until(|status| status.queue_bytes == 0);
    let before = engine.remote();
    engine.put(&key(200, 2));
    assert_eq!(engine.remote().dropped_failed, before.dropped_failed + 2);
    shelf.be(Mood::Works);
    engine.until(|status| status.failed.is_none());
    engine.save(&key(300, 1));
    assert_eq!(Engine::on(&shelf).read(&key(300, 1)), 1);
}

#[test]
fn what_waits_to_be_saved_is_bounded_and_comes_free() {
    let shelf = Shelf::new();
    let engine = Engine::with(&shelf, 16, None);
    shelf.be(Mood::HangsSaves);
    assert_eq!(engine.put(&key(0, 12)), 12);
    let status = engine.remote();
    assert_eq!((status.queue_bytes, status.dropped_full), (8 * OBJECT, 4), "half of the memory");
    assert_eq!(engine.put(&key(100, 8)), 8, "the others make room");
    shelf.be(Mood::Works);
    engine.store.flush(soon()).unwrap();
    assert_eq!(engine.remote().queue_bytes, 0);
    engine.forget();
    assert_eq!(engine.status("used_bytes"), 0);
    engine.assert_nothing_is_held();
}

#[test]
fn a_value_that_travels_counts_twice() {
    let shelf = Shelf::new();
    let ten_pages = Times { in_flight_kib: 40, ..times() };
    let engine = Engine::with_times(&shelf, 64, None, ten_pages);
    shelf.be(Mood::HangsSaves);
    engine.put(&key(0, 8));
    let give_up = soon();
    while shelf.puts.load(Ordering::Relaxed) < 4 {
        assert!(Instant::now() < give_up);
        std::thread::yield_now();
    }
    let shared = &engine.store.remote().unwrap().shared;
    assert_eq!(shared.saves_in_flight.available_permits(), 40 - 4 * 2 * 4);
    shelf.be(Mood::Works);
    engine.store.flush(soon()).unwrap();
    assert_eq!((shared.saves_in_flight.available_permits(), shelf.objects().len()), (40, 8));
}

#[test]
fn what_was_cleared_is_found_neither_here_nor_by_others_and_what_comes_after_is() {
    let shelf = Shelf::new();
    let (first, second) = (Engine::on(&shelf), Engine::on(&shelf));
    first.save(&key(0, 3));
    first.store.clear();
    assert_eq!(first.read(&key(0, 3)), 0, "at once");
    let give_up = soon();
    while second.read(&key(0, 3)) > 0 {
        second.forget(); // from memory it may come
        assert!(Instant::now() < give_up, "within a round of its keeper");
    }
    assert_eq!(Engine::on(&shelf).read(&key(0, 3)), 0, "nor by a store that starts later");
    assert_eq!(first.save(&key(0, 2)), 2);
    let give_up = soon();
    while second.read(&key(0, 3)) < 2 {
        assert!(Instant::now() < give_up);
    }
    assert_eq!(first.remote().failed, None);
}

#[test]
fn what_was_cleared_while_the_remote_was_away_stays_away() {
    let shelf = Shelf::new();
    let engine = Engine::on(&shelf);
    engine.save(&key(0, 3));
    shelf.be(Mood::Fails);
    engine.until(|status| status.failed.is_some());
    engine.store.clear();
    shelf.be(Mood::Works);
    engine.until(|status| status.failed.is_none());
    assert_eq!(engine.read(&key(0, 3)), 0);
    assert_eq!(Engine::on(&shelf).read(&key(0, 3)), 0);
}

#[test]
fn saves_that_a_clear_overtakes_end_and_their_memory_comes_free() {
    let shelf = Shelf::new();
    let engine = Engine::on(&shelf);
    shelf.be(Mood::HangsSaves);
    engine.put(&key(0, 8));
    assert_eq!(engine.store.clear(), 8);
    shelf.be(Mood::Works);
    engine.store.flush(soon()).unwrap();
    assert_eq!((engine.read(&key(0, 8)), engine.status("used_bytes")), (0, 0));
    engine.assert_nothing_is_held();
}

#[test]
fn an_epoch_that_the_remote_lost_is_told_it_again() {
    let shelf = Shelf::new();
    let engine = Engine::on(&shelf);
    engine.save(&key(0, 1));
    engine.store.clear();
    engine.save(&key(100, 1));
    let epochs = || {
        let values = shelf.values.lock().unwrap();
        values.get("test/1/epoch").cloned()
    };
    let give_up = soon();
    while epochs().is_none() {
        assert!(Instant::now() < give_up);
        std::thread::yield_now();
    }
    let told = epochs().unwrap();
    shelf.values.lock().unwrap().remove("test/1/epoch");
    let give_up = soon();
    while epochs().as_ref() != Some(&told) {
        assert!(Instant::now() < give_up);
        std::thread::yield_now();
    }
    assert_eq!(Engine::on(&shelf).read(&key(0, 1)), 0);
    assert_eq!(Engine::on(&shelf).read(&key(100, 1)), 1);
}

#[test]
fn of_servers_that_tell_a_remote_the_epoch_that_it_lost_the_first_is_right() {
    /// Another server tells it an epoch just after it was found to be lost.
    struct Raced(Arc<Shelf>, AtomicBool);
    impl Objects for Raced {
        fn lengths<'a>(&'a self, keys: Vec<String>, told: &'a Lengths) -> RemoteFuture<'a, ()> {
            self.0.lengths(keys, told)
        }
        fn get(&self, key: String) -> RemoteFuture<'_, Option<Bytes>> {
            let races = key.ends_with("/epoch") && self.1.swap(false, Ordering::Relaxed);
            Box::pin(async move {
                if races {
                    self.0.values.lock().unwrap().insert(key, "0123456789abcdef".into());
                    return Ok(None);
                }
                self.0.get(key).await
            })
        }
        fn put(&self, key: String, value: Bytes) -> RemoteFuture<'_, ()> {
            self.0.put(key, value)
        }
        fn put_new(&self, key: String, value: Bytes) -> RemoteFuture<'_, bool> {
            self.0.put_new(key, value)
        }
        fn remove(&self, key: String) -> RemoteFuture<'_, ()> {
            self.0.remove(key)
        }
        fn place(&self) -> &str {
            "raced"
        }
    }
    let shelf = Shelf::new();
    let raced = Arc::new(Raced(Arc::clone(&shelf), AtomicBool::new(false)));
    let engine = Engine::reaching(Arc::clone(&raced) as _, 64, None, Disk::open, times());
    engine.store.clear(); // it has an epoch of its own from now on
    let give_up = soon();
    while !shelf.values.lock().unwrap().contains_key("test/1/epoch") {
        assert!(Instant::now() < give_up);
        std::thread::yield_now();
    }
    raced.1.store(true, Ordering::Relaxed);
    while raced.1.load(Ordering::Relaxed) {
        assert!(Instant::now() < give_up);
        std::thread::yield_now();
    }
    let others = |engine: &Engine| {
        engine.save(&key(0, 1));
        engine.forget();
        shelf.objects().iter().any(|key| key.starts_with("test/1/0123456789abcdef/"))
    };
    while !others(&engine) {
        assert!(Instant::now() < give_up, "it follows");
    }
    assert_eq!(shelf.values.lock().unwrap()["test/1/epoch"], "0123456789abcdef");
}

#[test]
fn a_key_of_somebody_else_in_the_epochs_place_keeps_the_remote_out() {
    let shelf = Shelf::new();
    shelf.values.lock().unwrap().insert("test/1/epoch".into(), "mine".into());
    let engine = Engine::on(&shelf);
    assert!(engine.remote().failed.unwrap().contains("give another prefix"));
    assert_eq!(engine.put(&key(0, 1)), 1);
    assert!(shelf.objects().is_empty());
}

#[test]
fn what_a_reader_discards_is_taken_out_for_all() {
    let shelf = Shelf::new();
    let engine = Engine::on(&shelf);
    let prompt = key(0, 2);
    engine.save(&prompt);
    assert_eq!(discard(&engine, &prompt), 2);
    assert_eq!(engine.read(&key(0, 2)), 0);
    let give_up = soon();
    while !shelf.objects().is_empty() {
        assert!(Instant::now() < give_up);
        std::thread::yield_now();
    }
}

/// Discards all that memory has of the prompt.
fn discard(engine: &Engine, prompt: &Key) -> u64 {
    engine.store.lookup(engine.owner, prompt, 1, Instant::now()).unwrap();
    wait(engine.store.hit(&prompt.request_id));
    let slots = engine.store.prepare_retrieve(engine.owner, prompt, 1, Instant::now());
    let slots = slots.unwrap().unwrap();
    let discarded = engine.store.discard(slots.iter().map(|slot| slot.generation.unwrap()));
    engine.store.commit_retrieve(engine.owner, prompt, 1).unwrap();
    engine.store.end_session(&prompt.request_id);
    discarded
}

#[test]
fn what_is_removed_or_cleared_while_it_is_on_its_way_is_not_loaded() {
    for clears in [false, true] {
        let shelf = Shelf::new();
        let prompt = key(0, 1);
        assert_eq!(Engine::on(&shelf).save(&prompt), 1);
        let engine = Engine::on(&shelf);
        engine.until(|status| status.probe.is_some());
        shelf.travels.send_replace(Some(0));
        engine.store.lookup(engine.owner, &prompt, 1, Instant::now()).unwrap();
        wait(async {
            let mut travels = shelf.travels.subscribe();
            travels.wait_for(|travelling| *travelling == Some(1)).await.unwrap();
        });
        let id = {
            let state = engine.store.lock();
            let handle = *state.loading.keys().next().unwrap();
            state.index.describe(handle).unwrap().0
        };
        let remote = engine.store.below().remote.unwrap();
        if clears {
            remote.clear();
        } else {
            remote.remove(&[id]);
            remote.flush(soon()).unwrap(); // its mark is gone by now
            assert!(shelf.objects().is_empty());
        }
        shelf.travels.send_replace(None);
        assert_eq!(wait(engine.store.hit(&prompt.request_id)), 0);
        assert_eq!((engine.remote().loads, engine.remote().missing), (0, 1));
        engine.store.end_session(&prompt.request_id);
        engine.assert_nothing_is_held();
    }
}

#[test]
fn what_is_discarded_before_it_is_saved_does_not_get_there() {
    let shelf = Shelf::new();
    let engine = Engine::on(&shelf);
    shelf.be(Mood::HangsSaves);
    assert_eq!(engine.put(&key(0, 8)), 8);
    let give_up = soon();
    while shelf.puts.load(Ordering::Relaxed) < 4 {
        assert!(Instant::now() < give_up, "four are under way, four wait");
        std::thread::yield_now();
    }
    assert_eq!(discard(&engine, &key(0, 8)), 8);
    let give_up = soon();
    while shelf.removals.load(Ordering::Relaxed) < 8 {
        assert!(Instant::now() < give_up, "they come before the saves");
        std::thread::yield_now();
    }
    shelf.be(Mood::Works);
    engine.store.flush(soon()).unwrap();
    assert_eq!(shelf.objects(), [""; 0]);
    assert_eq!(shelf.puts.load(Ordering::Relaxed), 4, "those that waited were not sent");
    // What is stored anew is not what was removed.
    assert_eq!(engine.save(&key(0, 8)), 8);
    assert_eq!(Engine::on(&shelf).read(&key(0, 8)), 8);
    engine.assert_nothing_is_held();
}

#[test]
fn what_could_not_be_taken_out_goes_at_once_when_the_remote_lets_go_of_it() {
    let shelf = Shelf::new();
    let times = Times { period: Duration::from_secs(1000), ..times() };
    let engine = Engine::with_times(&shelf, 128, None, times);
    engine.save(&salted(key(0, 40), "a"));
    shelf.keeps.store(true, Ordering::Relaxed);
    assert_eq!(engine.store.clear_tenant("a"), 40);
    engine.store.flush(soon()).unwrap(); // it waits for no removal that was refused
    assert_eq!(engine.read(&salted(key(0, 40), "a")), 0, "it is not loaded");
    assert_eq!(shelf.objects().len(), 40);
    shelf.keeps.store(false, Ordering::Relaxed);
    engine.store.remote().unwrap().shared.for_keeper.notify_one(); // one round
    let give_up = soon();
    while !shelf.objects().is_empty() {
        assert!(Instant::now() < give_up);
        std::thread::yield_now();
    }
}

#[test]
fn a_tenants_clear_leaves_saves_of_others_alone() {
    let (shelf, directory) = (Shelf::new(), Directory::new());
    let engine = Engine::with(&shelf, 64, Some(directory.options(64 << 20)));
    engine.save(&salted(key(0, 4), "a"));
    shelf.be(Mood::HangsSaves);
    engine.put(&salted(key(0, 5), "b"));
    assert_eq!(engine.store.clear_tenant("a"), 4);
    shelf.be(Mood::Works);
    engine.store.flush(soon()).unwrap();
    assert_eq!((shelf.objects().len(), engine.store.disk_status().unwrap().objects), (5, 5));
    engine.forget();
    assert_eq!(engine.read(&salted(key(0, 5), "b")), 5);
    assert_eq!(engine.read(&salted(key(0, 4), "a")), 0);
}

#[test]
fn bytes_that_were_damaged_in_memory_do_not_get_there() {
    let shelf = Shelf::new();
    let engine = Engine::on(&shelf);
    let prompt = key(0, 1);
    engine.store.prepare_store(engine.owner, &prompt, 1, Instant::now()).unwrap();
    assert!(engine.store.commit_store(&prompt, 1, &[1]).unwrap(), "of other bytes");
    engine.store.flush(soon()).unwrap();
    assert_eq!((engine.remote().dropped_damaged, engine.remote().saves), (1, 0));
    assert_eq!((shelf.objects().len(), engine.status("damaged_chunks")), (0, 1));
    assert_eq!(engine.read(&key(0, 1)), 0);
}

#[test]
fn a_store_starts_without_its_remote_and_is_joined_by_it() {
    let shelf = Shelf::in_mood(Mood::Fails);
    let engine = Engine::on(&shelf);
    assert_eq!(engine.put(&key(0, 2)), 2);
    assert_eq!(engine.read(&key(0, 2)), 2);
    assert!(engine.remote().failed.is_some());
    shelf.be(Mood::Works);
    engine.until(|status| status.failed.is_none());
    assert_eq!(engine.save(&key(0, 3)), 1);
    let found = Engine::on(&shelf).read(&Key { start: 2 * CHUNK, ..key(0, 3) });
    assert_eq!(found, 1, "what was stored before is not there");
}

#[test]
fn a_store_ends_though_its_remote_hangs() {
    let shelf = Shelf::new();
    let engine = Engine::on(&shelf);
    shelf.be(Mood::Hangs);
    engine.put(&key(0, 8));
    let give_up = soon();
    while shelf.questions.load(Ordering::Relaxed) < 4 {
        assert!(Instant::now() < give_up, "four saves are under way");
        std::thread::yield_now();
    }
    let error = engine.store.close_tiers(Instant::now()).unwrap_err();
    assert_eq!(error.code, ErrorCode::Timeout);
    // The requests' own deadlines end it, nobody else does.
    let closed = engine.store.close_tiers(soon());
    assert!(closed.is_err(), "they were not saved");
    assert_eq!(engine.remote().queue_bytes, 0);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async move { drop(engine) }); // a runtime must not end inside another
}

#[test]
fn a_server_leaves_none_of_its_own_keys() {
    let shelf = Shelf::new();
    let engine = Engine::on(&shelf);
    engine.until(|status| status.probe.is_some());
    engine.store.close_tiers(soon()).unwrap();
    assert!(shelf.values.lock().unwrap().is_empty());
}
