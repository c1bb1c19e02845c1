//! Stores on disks that are slow, or fail: what becomes of those who wait, and that nothing stays behind.

use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use kvferry_core::cache::{Cache, Slot};
use kvferry_core::key::{Dtype, Key, Layout};

use crate::disk::tests::{Directory, Faulty, Gate, Operation};
use crate::disk::{Disk, DiskOptions, DiskStatus, Loaded, Times};
use crate::remote::Remote;
use crate::tiers::{Coming, Level, Load};
use crate::{Departure, Embedded, Limits, Owner, Policy, Store, StoreOptions};

const CHUNK: u64 = 4;
/// One object is a page.
const OBJECT: u64 = 4096;
/// Of saves, in bytes.
const QUEUE: u64 = 1 << 20;

fn layout(world_size: u32) -> Layout {
    Layout {
        model_name: format!("of {world_size}"),
        world_size,
        block_size: 2,
        num_layers: 1,
        hidden_dim_size: 1024,
        dtype: Dtype::new("uint8").unwrap(),
        single_plane: true,
        num_physical_slots: None,
    }
}

/// `chunks` chunks of a prompt that begins with `first`.
fn key(request: &str, first: u32, chunks: u64) -> Key {
    let end = chunks * CHUNK;
    Key {
        model_name: layout(1).model_name,
        world_size: 1,
        worker_id: Some(0),
        token_ids: (first..).take(usize::try_from(end).unwrap()).collect(),
        start: 0,
        end,
        request_id: request.into(),
        cache_salt: String::new(),
        num_kv_readers: 1,
    }
}

/// A store on a disk whose loads and saves wait at gates.
struct Slow {
    store: Store,
    owner: Owner,
    now: Instant,
    loads: Arc<Gate>,
    saves: Arc<Gate>,
    /// Opening a file fails.
    fails: Arc<AtomicBool>,
    directory: Arc<Directory>,
}

impl Slow {
    fn new(objects: u64) -> Self {
        Self::with(objects, Limits::default(), &Arc::new(Directory::new()))
    }

    fn with(objects: u64, limits: Limits, directory: &Arc<Directory>) -> Self {
        let (loads, saves) = (Arc::new(Gate::default()), Arc::new(Gate::default()));
        let fails = Arc::new(AtomicBool::new(false));
        let files = {
            let (loads, saves, fails) =
                (Arc::clone(&loads), Arc::clone(&saves), Arc::clone(&fails));
            Faulty::on(directory, move |operation| {
                match operation {
                    Operation::Open => loads.pass(),
                    Operation::Create => saves.pass(),
                    _ => {}
                }
                let fails = matches!(operation, Operation::Open) && fails.load(Ordering::Relaxed);
                if fails { Err(io::Error::other("no such luck")) } else { Ok(()) }
            })
        };
        let options = StoreOptions {
            chunk_size: u32::try_from(CHUNK).unwrap(),
            memory: objects * OBJECT,
            shared_name: None,
            policy: Policy::Lru,
            disk: Some(directory.options(64 << 20)),
            remote: None,
            limits,
        };
        let open = |options: &DiskOptions| {
            // More than a half of so little memory: what is put is saved.
            let options = DiskOptions { queue_bytes: QUEUE, ..options.clone() };
            Disk::open_on(&options, files, Times::default())
        };
        let store = Store::on(options, open, Remote::open);
        let store = store.unwrap();
        let owner = store.connect();
        store.register(owner, 1, layout(1)).unwrap();
        store.register(owner, 2, layout(2)).unwrap();
        let directory = Arc::clone(directory);
        Self { store, owner, now: Instant::now(), loads, saves, fails, directory }
    }

    /// With these prompts of `chunks` chunks on the disk, and nothing in memory.
    fn stocked(objects: u64, prompts: &[u32], chunks: u64) -> Self {
        let slow = Self::new(objects.max(chunks * prompts.len() as u64));
        for first in prompts {
            slow.put(&key("stock", *first, chunks));
            slow.flush();
        }
        let Self { store, directory, .. } = slow;
        store.close_tiers(soon()).unwrap();
        Self::with(objects, Limits::default(), &directory)
    }

    fn granted(&self, key: &Key) -> Vec<Slot> {
        let instance = key.world_size.into();
        self.store.prepare_store(self.owner, key, instance, self.now).unwrap().slots
    }

    fn put(&self, key: &Key) -> usize {
        let slots = self.granted(key);
        for (number, slot) in (0..).zip(&slots) {
            let byte = u8::try_from(key.token_ids[number] % 251).unwrap();
            self.store.memory().write(slot.offset, &[byte; 4096]).unwrap();
        }
        let done = self.store.commit_store(key, key.world_size.into(), &[]).unwrap();
        assert_eq!(done, !slots.is_empty());
        slots.len()
    }

    fn lookup(&self, key: &Key) -> Option<u64> {
        self.store.lookup(self.owner, key, 1, self.now).unwrap();
        self.store.take_hit(&key.request_id, self.now)
    }

    /// Looks up, waits, and gives back.
    fn hits(&self, key: &Key) -> u64 {
        self.store.lookup(self.owner, key, 1, self.now).unwrap();
        let hit = wait(self.store.hit(&key.request_id));
        self.store.end_session(&key.request_id);
        hit
    }

    fn flush(&self) {
        self.store.flush(soon()).unwrap();
    }

    fn disk(&self) -> DiskStatus {
        self.store.disk_status().unwrap()
    }

    fn status(&self, name: &str) -> u64 {
        let status = self.store.status(self.now);
        status.iter().find(|(known, _)| *known == name).expect("a known figure").1
    }

    /// Nothing is held any more: all of the memory can be cleared.
    fn assert_nothing_is_held(&self) {
        self.flush();
        assert_eq!((self.status("leases"), self.status("sessions")), (0, 0));
        assert!(self.store.lock().loading.is_empty());
        assert!(self.store.lock().saving.is_empty());
        self.store.clear();
        self.flush();
        assert_eq!((self.status("objects"), self.status("used_bytes")), (0, 0));
        assert_eq!(self.disk().objects, 0);
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

fn is_pending<T>(future: &mut std::pin::Pin<&mut impl Future<Output = T>>) -> bool {
    future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending()
}

#[test]
fn what_the_disk_has_loaded_just_before_a_clear_does_not_arrive() {
    let slow = Slow::stocked(8, &[0], 1);
    slow.loads.shut();
    assert_eq!(slow.lookup(&key("waits", 0, 1)), None);
    let mut state = slow.store.lock();
    slow.loads.open();
    let give_up = soon();
    while slow.disk().loads == 0 {
        assert!(Instant::now() < give_up, "it is loaded, and to be told once the lock is free");
        std::thread::yield_now();
    }
    state.clear();
    slow.store.below().all().for_each(|tier| tier.clear());
    drop(state);
    assert_eq!(wait(slow.store.hit("waits")), 0);
    assert_eq!(slow.lookup(&key("later", 0, 1)), Some(0));
    assert_eq!(slow.store.lock().coming, Coming::default());
}

#[test]
fn a_disk_that_hangs_leaves_a_quarter_of_the_memory_and_nobody_in_its_queue() {
    let slow = Slow::stocked(8, &[0, 1000, 2000, 3000], 3);
    assert_eq!(slow.put(&key("own", 9000, 2)), 2);
    slow.flush();
    slow.loads.shut();
    let late = slow.now + Limits::default().promotion;
    for round in 0..100 {
        for first in [0, 1000, 2000, 3000] {
            let request = format!("r{first} of {round}");
            slow.lookup(&key(&request, first, 3));
            slow.store.take_hit(&request, late);
            slow.store.end_session(&request);
        }
    }
    let waiting: usize = slow.store.lock().loading.values().map(|requests| requests.len()).sum();
    assert_eq!(waiting, 0, "requests that have ended");
    assert_eq!(slow.store.lock().loading.len(), 6, "three quarters of the memory");
    assert_eq!(slow.put(&key("new", 7000, 2)), 2);
    assert_eq!(slow.lookup(&key("again", 7000, 2)), Some(2));
    slow.loads.open();
    slow.store.close_tiers(soon()).unwrap();
    assert_eq!(slow.store.lock().coming, Coming::default());
}

#[test]
fn a_lookup_is_answered_when_all_that_the_disk_has_of_it_is_in_memory_and_leased() {
    let slow = Slow::stocked(8, &[0], 3);
    slow.loads.shut();
    let prompt = key("a", 0, 4);
    assert_eq!(slow.lookup(&prompt), None);
    let mut hit = pin!(slow.store.hit("a"));
    assert!(is_pending(&mut hit));
    let range = key("a", 0, 1);
    let early = slow.store.prepare_retrieve(slow.owner, &range, 1, slow.now).unwrap();
    assert!(early.is_none(), "it is not there yet");
    assert_eq!(slow.status("leases"), 0);
    slow.loads.open();
    assert_eq!(wait(hit), 3);
    assert_eq!((slow.status("leases"), slow.status("promoted_chunks")), (3, 3));
    assert_eq!(slow.store.take_hit("a", slow.now), Some(0), "it was told once");
    let range = key("a", 0, 3);
    let slots = slow.store.prepare_retrieve(slow.owner, &range, 1, slow.now).unwrap().unwrap();
    for (number, slot) in (0..).zip(&slots) {
        let mut bytes = vec![0; 4096];
        slow.store.memory().read(slot.offset, &mut bytes).unwrap();
        assert_eq!(bytes, [number; 4096]);
        let sum = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, &bytes);
        assert_eq!(slot.checksum, Some(sum));
    }
    assert_eq!(slots.len(), 3);
    assert!(slow.store.commit_retrieve(slow.owner, &range, 1).unwrap());
    slow.store.end_session("a");
    assert_eq!((slow.status("hit_chunks"), slow.status("abandoned_chunks")), (3, 0));
    assert_eq!(slow.hits(&key("b", 0, 4)), 3, "from memory");
    assert_eq!(slow.disk().loads, 3);
    slow.assert_nothing_is_held();
}

#[test]
fn two_lookups_of_one_prefix_share_what_is_loaded() {
    let slow = Slow::stocked(8, &[0], 3);
    slow.loads.shut();
    assert_eq!(slow.lookup(&key("a", 0, 2)), None);
    assert_eq!(slow.lookup(&Key { num_kv_readers: 2, ..key("b", 0, 3) }), None);
    slow.loads.open();
    assert_eq!((wait(slow.store.hit("b")), wait(slow.store.hit("a"))), (3, 2));
    assert_eq!((slow.disk().loads, slow.status("leases")), (3, 2 + 2 * 3));
    slow.store.end_session("a");
    slow.store.end_session("b");
    slow.assert_nothing_is_held();
}

#[test]
fn whoever_leaves_while_chunks_come_holds_nothing_and_they_come_all_the_same() {
    type Leave = fn(&Slow);
    let leave: [(&str, Leave); 5] = [
        ("its session ends", |slow| slow.store.end_session("a")),
        ("its peer is gone", |slow| slow.store.disconnect(slow.owner, Departure::Ended)),
        ("its peer was given up", |slow| slow.store.disconnect(slow.owner, Departure::GivenUp)),
        ("it asks for something else", |slow| {
            assert_eq!(slow.lookup(&key("a", 500, 1)), Some(0));
            slow.store.end_session("a");
        }),
        ("its session expires", |slow| {
            slow.store.status(slow.now + Limits::default().session_idle);
        }),
    ];
    for (why, leave) in leave {
        let slow = Slow::stocked(8, &[0], 3);
        assert_eq!(slow.hits(&key("first", 0, 1)), 1, "one is in memory: leased at once");
        slow.loads.shut();
        assert_eq!(slow.lookup(&key("a", 0, 3)), None);
        let mut hit = pin!(slow.store.hit("a"));
        assert!(is_pending(&mut hit));
        leave(&slow);
        assert_eq!(slow.status("leases"), 0, "{why}");
        assert_eq!(wait(hit), 0, "{why}");
        let other = slow.store.connect();
        slow.store.lookup(other, &key("b", 0, 3), 1, slow.now).unwrap();
        slow.loads.open();
        assert_eq!(wait(slow.store.hit("b")), 3, "{why}");
        assert_eq!((slow.disk().loads, slow.status("leases")), (3, 3), "{why}");
        slow.store.end_session("b");
        slow.assert_nothing_is_held();
    }
}

#[test]
fn a_request_that_asks_again_while_it_waits_gets_one_answer_and_one_lease_each() {
    let slow = Slow::stocked(8, &[0], 3);
    slow.loads.shut();
    for _ in 0..5 {
        assert_eq!(slow.lookup(&key("a", 0, 3)), None);
    }
    assert!(slow.store.lock().loading.values().all(|waiting| waiting.len() == 1));
    slow.loads.open();
    assert_eq!(wait(slow.store.hit("a")), 3);
    assert_eq!((slow.disk().loads, slow.status("leases")), (3, 3));
    slow.store.end_session("a");
    slow.assert_nothing_is_held();
}

#[test]
fn at_the_deadline_what_has_come_counts_and_what_comes_late_is_there_for_the_next() {
    let slow = Slow::stocked(8, &[0], 3);
    assert_eq!(slow.hits(&key("first", 0, 1)), 1);
    slow.loads.shut();
    assert_eq!(slow.lookup(&key("a", 0, 3)), None);
    let late = slow.now + Limits::default().promotion;
    assert_eq!(slow.store.take_hit("a", late - Duration::from_millis(1)), None);
    assert_eq!(slow.store.take_hit("a", late), Some(1));
    assert_eq!(slow.status("leases"), 1);
    assert_eq!(slow.lookup(&key("b", 0, 3)), None);
    slow.loads.open();
    assert_eq!(wait(slow.store.hit("b")), 3);
    assert_eq!(slow.status("leases"), 1 + 3, "what came late is not the first one's");
    slow.store.end_session("a");
    slow.store.end_session("b");
    slow.assert_nothing_is_held();
}

#[test]
fn a_gap_at_the_deadline_ends_the_hit() {
    let slow = Slow::stocked(8, &[0], 3);
    slow.loads.shut();
    assert_eq!(slow.lookup(&key("a", 0, 2)), None);
    // The third is written by another meanwhile; of the first two, nothing has come.
    assert_eq!(slow.put(&key("w", 0, 3)), 1, "what is on its way is not written again");
    let late = slow.now + Limits::default().promotion;
    assert_eq!(slow.store.take_hit("a", late), Some(0));
    slow.loads.open();
    assert_eq!(slow.hits(&key("b", 0, 3)), 3);
    slow.store.end_session("a");
    slow.assert_nothing_is_held();
}

#[test]
fn what_another_is_writing_is_not_waited_for() {
    let slow = Slow::stocked(8, &[0], 1);
    let longer = key("w", 0, 2);
    assert_eq!(slow.granted(&longer).len(), 2, "nobody asked for the first");
    assert_eq!(slow.lookup(&key("a", 0, 2)), Some(0));
    slow.store.abandon_store(&longer, 1).unwrap();
    assert_eq!(slow.hits(&key("b", 0, 2)), 1);
    slow.store.end_session("a");
    slow.assert_nothing_is_held();
}

#[test]
fn a_load_that_fails_makes_a_shorter_hit_and_is_tried_again_by_the_next() {
    let slow = Slow::stocked(8, &[0], 3);
    assert_eq!(slow.hits(&key("first", 0, 1)), 1);
    slow.fails.store(true, Ordering::Relaxed);
    assert_eq!(slow.hits(&key("a", 0, 3)), 1);
    assert_eq!((slow.disk().load_failures, slow.status("objects")), (2, 1));
    assert_eq!(slow.status("abandoned_chunks"), 0, "no writer gave anything up");
    slow.fails.store(false, Ordering::Relaxed);
    assert_eq!(slow.hits(&key("b", 0, 3)), 3);
    slow.assert_nothing_is_held();
}

#[test]
fn what_is_in_memory_does_not_make_room_for_what_comes_before_it() {
    let slow = Slow::stocked(3, &[0], 2);
    assert_eq!(slow.put(&key("w", 0, 3)), 3);
    slow.flush();
    let third = handle_of(&slow, 2);
    let third = slow.store.lock().index.describe(third).unwrap().0;
    slow.store.disk().unwrap().remove(&third.chunk, &third.space, third.rank);
    // Of the three, the third alone is left in memory, and is the next to go.
    let two: Vec<u64> = (0..2).map(|chunk| generation(&slow, chunk)).collect();
    let offsets = two.into_iter().collect();
    let gone = slow.store.lock().index.discard(&offsets);
    assert_eq!(gone.len(), 2);
    assert_eq!(slow.put(&key("other", 900, 2)), 2);
    slow.flush();
    assert_eq!(slow.hits(&key("a", 0, 3)), 3);
    slow.assert_nothing_is_held();
}

/// The object of a chunk of the prompt that begins with 0.
fn handle_of(slow: &Slow, chunk: usize) -> crate::index::Handle {
    let key = key("x", 0, chunk as u64 + 1);
    let prompt = slow.store.prompt(&key);
    let state = slow.store.lock();
    let spaces = state.spaces(&key, None).unwrap();
    let id = crate::store::ids_of(&prompt, chunk, &spaces).next().unwrap();
    state.index.get(&id).unwrap()
}

fn generation(slow: &Slow, chunk: usize) -> u64 {
    let handle = handle_of(slow, chunk);
    slow.store.lock().index.grant(handle).unwrap().generation()
}

#[test]
fn ranks_of_one_chunk_do_not_make_room_for_each_other() {
    let slow = Slow::new(2);
    let rank = |request: &str, rank| Key {
        model_name: layout(2).model_name,
        world_size: 2,
        worker_id: Some(rank),
        ..key(request, 0, 1)
    };
    assert_eq!((slow.put(&rank("w", 0)), slow.put(&rank("w", 1))), (1, 1));
    slow.flush();
    assert_eq!(slow.put(&key("other", 900, 1)), 1, "in the place of the first rank's");
    slow.flush();
    assert_eq!(slow.hits(&rank("a", 0)), 1, "in that of the other prompt");
    assert_eq!(slow.disk().loads, 1);
    let prompt = slow.store.prompt(&rank("x", 0));
    let space = slow.store.lock().spaces(&rank("x", 0), None).unwrap()[1];
    slow.store.clear();
    slow.flush();
    assert_eq!((slow.put(&rank("w", 0)), slow.put(&rank("w", 1))), (1, 1));
    slow.flush();
    slow.store.disk().unwrap().remove(&prompt.hashes[0], &space, 1);
    slow.flush();
    slow.store.trim(0);
    assert_eq!(slow.hits(&rank("b", 0)), 0, "one rank's is nowhere");
    assert_eq!(slow.status("objects"), 0, "and the other's stays where it is");
    slow.assert_nothing_is_held();
}

#[test]
fn a_pool_too_small_for_a_prefix_makes_a_shorter_hit() {
    let slow = Slow::stocked(3, &[0], 5);
    assert_eq!(slow.hits(&key("a", 0, 5)), 3);
    assert_eq!(slow.lookup(&key("b", 0, 2)), Some(2));
    assert_eq!(slow.hits(&key("c", 0, 5)), 3, "leased ones count, too");
    slow.store.end_session("b");
    slow.assert_nothing_is_held();
}

#[test]
fn what_has_come_stays_for_as_long_as_the_rest_is_waited_for() {
    let slow = Slow::stocked(3, &[0], 2);
    slow.loads.shut();
    assert_eq!(slow.lookup(&key("a", 0, 2)), None);
    let second = handle_of(&slow, 1);
    let loaded = Loaded { checksum: 0, parent: None };
    {
        let mut state = slow.store.lock();
        let (id, _, Slot { offset, length, .. }) = state.index.describe(second).unwrap();
        let load = Load {
            handle: second,
            id,
            chunk: 0,
            place: (offset, length),
            from: Level::Disk,
            clears: 0,
        };
        state.loaded(load, Some(&loaded), false); // before the first
    }
    assert_eq!(slow.put(&key("w", 700, 2)), 1, "of three places one is free");
    slow.loads.open();
    assert_eq!(wait(slow.store.hit("a")), 2);
    slow.store.end_session("a");
    slow.assert_nothing_is_held();
}

#[test]
fn what_is_evicted_makes_room_for_what_comes_and_comes_back_itself() {
    let slow = Slow::stocked(3, &[0, 100, 200], 3);
    for round in 0..3 {
        for first in [0, 100, 200] {
            assert_eq!(slow.hits(&key("a", first, 3)), 3, "round {round}");
        }
    }
    assert_eq!(slow.disk().loads, 27);
    assert_eq!(slow.status("evicted_objects"), 24);
    slow.assert_nothing_is_held();
}

#[test]
fn chunks_that_alternate_between_memory_and_disk_are_one_hit() {
    let slow = Slow::stocked(8, &[0], 5);
    assert_eq!(slow.hits(&key("all", 0, 5)), 5);
    let gone = [1, 3].map(|chunk| generation(&slow, chunk)).into_iter().collect();
    assert_eq!(slow.store.lock().index.discard(&gone).len(), 2);
    slow.loads.shut();
    assert_eq!(slow.lookup(&key("a", 0, 5)), None);
    assert_eq!(slow.status("leases"), 1);
    assert_eq!(
        slow.put(&key("w", 700, 6)),
        1,
        "8 places: 3 in memory, 2 on their way, 2 discarded"
    );
    slow.loads.open();
    assert_eq!(wait(slow.store.hit("a")), 5);
    assert_eq!((slow.disk().loads, slow.status("leases")), (7, 5));
    slow.store.end_session("a");
    slow.assert_nothing_is_held();
}

#[test]
fn what_is_cleared_while_it_is_being_saved_is_gone_at_once_and_for_good() {
    let slow = Slow::new(4);
    slow.saves.shut();
    assert_eq!(slow.put(&key("w", 0, 3)), 3);
    assert_eq!(slow.lookup(&key("reader", 0, 1)), Some(1));
    assert_eq!(slow.store.clear(), 2, "what is leased stays");
    assert_eq!(slow.lookup(&key("a", 0, 3)), Some(1));
    assert_eq!(slow.status("used_bytes"), 3 * OBJECT, "the disk may still read them");
    assert_eq!(slow.granted(&key("v", 0, 3)).len(), 1);
    slow.saves.open();
    slow.flush();
    assert_eq!(slow.status("used_bytes"), 2 * OBJECT);
    assert_eq!((slow.disk().objects, slow.disk().bytes), (0, 0));
    slow.store.abandon_store(&key("v", 0, 3), 1).unwrap();
    slow.store.end_session("a");
    slow.store.end_session("reader");
    slow.assert_nothing_is_held();
}

#[test]
fn what_is_cleared_or_discarded_while_it_is_loaded_stays_consistent() {
    let slow = Slow::stocked(8, &[0], 3);
    assert_eq!(slow.hits(&key("first", 0, 1)), 1);
    slow.loads.shut();
    assert_eq!(slow.lookup(&key("a", 0, 3)), None);
    slow.store.unregister(1); // its engine is gone
    assert_eq!(slow.store.clear(), 0, "leased or on its way");
    let first = generation_of_leased(&slow);
    assert_eq!(slow.store.discard(first), 1);
    slow.loads.open();
    let hit = wait(slow.store.hit("a"));
    assert!(hit <= 3);
    slow.store.end_session("a");
    slow.assert_nothing_is_held();
}

/// Of what request "a" has leased.
fn generation_of_leased(slow: &Slow) -> Vec<u64> {
    let state = slow.store.lock();
    let leases = state.sessions["a"].leases.keys();
    let grants = leases.map(|handle| state.index.grant(*handle).unwrap());
    grants.map(|grant| grant.generation()).collect()
}

#[test]
fn what_is_discarded_while_it_is_being_saved_does_not_come_back() {
    let slow = Slow::new(4);
    slow.saves.shut();
    assert_eq!(slow.put(&key("w", 0, 2)), 2);
    let handle = handle_of(&slow, 0);
    let slot = slow.store.lock().index.grant(handle).unwrap().slot();
    assert_eq!(slow.store.discard([slot.generation.unwrap()]), 1);
    slow.saves.open();
    slow.flush();
    assert_eq!((slow.disk().objects, slow.hits(&key("a", 0, 2))), (1, 0));
    assert_eq!(slow.put(&key("w", 0, 2)), 1);
    slow.flush();
    slow.store.trim(0);
    assert_eq!(slow.hits(&key("b", 0, 2)), 2);
    slow.assert_nothing_is_held();
}

#[test]
fn memory_that_was_damaged_before_it_was_saved_is_not_saved_and_not_served() {
    let slow = Slow::new(4);
    slow.saves.shut();
    let prompt = key("w", 0, 2);
    let slots = slow.granted(&prompt);
    let sum = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, &[7; 4096]);
    for slot in &slots {
        slow.store.memory().write(slot.offset, &[7; 4096]).unwrap();
    }
    assert!(slow.store.commit_store(&prompt, 1, &[sum, sum]).unwrap());
    slow.store.memory().write(slots[1].offset + 4095, &[6]).unwrap();
    slow.saves.open();
    slow.flush();
    assert_eq!((slow.disk().objects, slow.disk().dropped_damaged), (1, 1));
    assert_eq!((slow.hits(&key("a", 0, 2)), slow.status("damaged_chunks")), (1, 1));
    assert_eq!(slow.put(&prompt), 1, "it is made anew");
    slow.flush();
    assert_eq!(slow.disk().objects, 2);
    slow.assert_nothing_is_held();
}

#[test]
fn a_store_that_is_dropped_while_it_loads_and_saves_lets_go_of_the_directory() {
    let slow = Slow::stocked(8, &[0], 2);
    slow.loads.shut();
    slow.saves.shut();
    assert_eq!(slow.lookup(&key("a", 0, 2)), None);
    assert_eq!(slow.put(&key("w", 50, 2)), 2);
    let Slow { store, loads, saves, directory, .. } = slow;
    let dropping = std::thread::spawn(move || drop(store));
    loads.open();
    saves.open();
    dropping.join().unwrap();
    let again = Slow::with(8, Limits::default(), &directory);
    assert_eq!(again.hits(&key("b", 0, 2)), 2);
    again.assert_nothing_is_held();
}

#[test]
fn a_store_whose_disk_is_closed_goes_on_in_memory() {
    let slow = Slow::stocked(2, &[0], 2);
    assert_eq!(slow.put(&key("w", 50, 2)), 2);
    slow.store.close_tiers(soon()).unwrap();
    slow.store.close_tiers(soon()).unwrap();
    assert_eq!(slow.lookup(&key("a", 0, 2)), Some(0), "nothing is waited for");
    assert_eq!(slow.lookup(&key("b", 50, 2)), Some(2), "and nothing went for it");
    assert_eq!(slow.store.clear(), 0);
    slow.store.end_session("a");
    slow.store.end_session("b");
    assert_eq!(slow.store.clear(), 2);
    assert_eq!(slow.status("used_bytes"), 0);
}

#[test]
fn too_many_sessions_end_one_that_waits() {
    let slow = Slow::stocked(8, &[0], 2);
    let limits = Limits { sessions: 1, ..Limits::default() };
    let directory = Arc::clone(&slow.directory);
    slow.store.close_tiers(soon()).unwrap();
    let slow = Slow::with(8, limits, &directory);
    slow.loads.shut();
    assert_eq!(slow.lookup(&key("a", 0, 2)), None);
    assert_eq!(slow.lookup(&key("b", 0, 1)), None);
    assert_eq!(slow.store.take_hit("a", slow.now), Some(0));
    slow.loads.open();
    assert_eq!(wait(slow.store.hit("b")), 1);
    assert_eq!(slow.hits(&key("c", 0, 2)), 2);
    slow.assert_nothing_is_held();
}

/// Asks the store something when it is woken, from another thread; whether it was answered.
struct Asks(Store, mpsc::Sender<bool>);

impl Wake for Asks {
    fn wake(self: Arc<Self>) {
        let (told, answer) = mpsc::channel();
        let asks = Arc::clone(&self);
        std::thread::spawn(move || {
            asks.0.chunk_size();
            asks.0.take_hit("nobody", Instant::now());
            let _ = told.send(());
        });
        let answered = answer.recv_timeout(Duration::from_secs(5)).is_ok();
        let _ = self.1.send(answered);
    }
}

#[test]
fn who_is_woken_may_call_the_store_at_once() {
    type Act = fn(&Slow);
    let acts: [Act; 4] = [
        |slow| slow.store.end_session("a"),
        |slow| slow.store.disconnect(slow.owner, Departure::Ended),
        |slow| {
            let late = slow.now + Limits::default().promotion;
            assert_eq!(slow.store.take_hit("a", late), Some(0));
        },
        |slow| slow.loads.open(),
    ];
    for act in acts {
        let slow = Slow::stocked(8, &[0], 1);
        slow.loads.shut();
        assert_eq!(slow.lookup(&key("a", 0, 1)), None);
        let (told, answered) = mpsc::channel();
        let waker = Waker::from(Arc::new(Asks(slow.store.clone(), told)));
        let mut hit = pin!(slow.store.hit("a"));
        assert!(hit.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        act(&slow);
        assert_eq!(answered.recv_timeout(Duration::from_secs(20)), Ok(true));
        slow.loads.open();
    }
}

#[test]
fn an_engine_in_this_process_waits_no_longer_than_the_limit_and_leaves_nothing_when_it_gives_up() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let stocked = Slow::stocked(8, &[0], 2);
    stocked.store.close_tiers(soon()).unwrap();
    let limits = Limits { promotion: Duration::from_millis(1), ..Limits::default() };
    let slow = Slow::with(8, limits, &stocked.directory);
    slow.loads.shut();
    let cache = Embedded::new(slow.store.clone());
    let begin = Instant::now();
    let far = begin + Duration::from_secs(40);
    assert_eq!(runtime.block_on(cache.lookup(&key("a", 0, 2), far)), Ok(0));
    assert!(begin.elapsed() < Duration::from_secs(10), "it waited for the caller's deadline");
    slow.store.end_session("a");

    slow.store.lock().limits.promotion = Duration::from_secs(100);
    assert_eq!(runtime.block_on(cache.lookup(&key("b", 0, 2), Instant::now())), Ok(0));
    slow.store.end_session("b");
    let prompt = key("c", 0, 2);
    {
        let mut given_up = cache.lookup(&prompt, far);
        let _entered = runtime.enter();
        assert!(given_up.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    }
    assert_eq!(slow.status("sessions"), 0);
    slow.loads.open();
    assert_eq!(runtime.block_on(cache.lookup(&key("d", 0, 2), far)), Ok(2));
    drop(cache);
    slow.assert_nothing_is_held();
}
