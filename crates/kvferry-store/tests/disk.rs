//! The disk as its users see it: over restarts, over many objects, and over kills at any moment.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use kvferry_copy::PrivateRegion;
use kvferry_core::Result;
use kvferry_core::cache::Memory;
use kvferry_core::key::{Dtype, Layout};
use kvferry_store::disk::{Disk, DiskOptions, Saved};

/// Tells this binary that it is the process to be killed: its directory, its bound and its first object.
const CHILD: &str = "KVFERRY_CRASH_CHILD";

/// A directory that goes with the test.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kvferry-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn saved(number: u64) -> Saved {
    let layout = Layout {
        model_name: "model".into(),
        world_size: 1,
        block_size: 16,
        num_layers: 2,
        hidden_dim_size: 64,
        dtype: Dtype::new("bfloat16").unwrap(),
        single_plane: false,
        num_physical_slots: None,
    };
    let mut chunk = [0; 32];
    chunk[..8].copy_from_slice(&number.to_le_bytes());
    let space = Saved::space_of(&layout, "tenant");
    Saved { chunk, space, rank: 0, parent: None, layout, cache_salt: "tenant".into() }
}

/// From a page to four MiB; which one, the number says.
fn length(number: u64) -> u64 {
    let random = number.wrapping_mul(6_364_136_223_846_793_005) >> 40;
    match number % 8 {
        0 => (1 << 20) + random % (3 << 20),
        1..=3 => 1 + random % (256 << 10),
        _ => 1 + random % (16 << 10),
    }
}

/// The bytes of an object, which those of no other are.
fn content(number: u64, length: u64) -> Vec<u8> {
    let mut seed = number + 1;
    let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap() + 8);
    while (bytes.len() as u64) < length {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        bytes.extend_from_slice(&(seed ^ seed >> 32).to_le_bytes());
    }
    bytes.truncate(usize::try_from(length).unwrap());
    bytes
}

fn memory(bytes: &[u8]) -> Arc<dyn Memory> {
    let memory = PrivateRegion::new(bytes.len() as u64).unwrap();
    memory.write(0, bytes).unwrap();
    Arc::new(memory)
}

/// Whether the object is there; panics over wrong bytes.
fn load(disk: &Disk, number: u64) -> bool {
    let length = length(number);
    let (told, answer) = mpsc::channel();
    let into = memory(&vec![0; usize::try_from(length).unwrap()]);
    let Saved { chunk, space, rank, .. } = saved(number);
    let done = Box::new(move |result| told.send(result).unwrap());
    assert!(disk.load((&chunk, &space, rank), Arc::clone(&into), 0, length, done));
    if answer.recv().unwrap().unwrap().is_none() {
        return false;
    }
    let mut bytes = vec![0; usize::try_from(length).unwrap()];
    into.read(0, &mut bytes).unwrap();
    assert!(bytes == content(number, length), "object {number} has wrong bytes");
    true
}

fn find(disk: &Disk, number: u64) -> bool {
    let Saved { chunk, space, rank, .. } = saved(number);
    disk.find(&chunk, &space, rank).is_some()
}

#[test]
fn a_hundred_thousand_objects_are_there_after_a_restart() {
    const OBJECTS: u64 = 100_000;
    let directory = Directory::new("restart");
    let options = DiskOptions::new(&directory.0, 4 << 30);
    let disk = Disk::open(&options).unwrap();
    let (told, ends) = mpsc::channel();
    let page = memory(&content(0, 64));
    // A few are saved; the others are copies of their files, under names as the disk gives them.
    for number in 0..10 {
        let told = told.clone();
        let done = Box::new(move |result| told.send(result).unwrap());
        assert!(disk.save(saved(number), Arc::clone(&page), 0, 64, done));
    }
    (0..10).for_each(|_| ends.recv().unwrap().unwrap());
    drop(disk);
    let objects = directory.0.join("objects");
    let first = fs::read_dir(&objects).unwrap().next().unwrap().unwrap().file_name();
    let first = first.into_string().unwrap();
    let bytes = fs::read(objects.join(&first)).unwrap();
    for number in 10..OBJECTS {
        let mut name = String::new();
        for byte in saved(number).chunk {
            name.push_str(&format!("{byte:02x}"));
        }
        fs::write(objects.join(name + &first[64..]), &bytes).unwrap();
    }
    let begun = Instant::now();
    let disk = Disk::open(&options).unwrap();
    let elapsed = begun.elapsed();
    assert_eq!(disk.status().objects, OBJECTS);
    assert!((0..OBJECTS).all(|number| find(&disk, number)));
    let mut out = std::io::stdout().lock();
    writeln!(out, "{OBJECTS} objects came back in {elapsed:?}").unwrap();
}

#[test]
fn a_kill_at_any_moment_loses_nothing_that_was_acknowledged() {
    if let Ok(arguments) = std::env::var(CHILD) {
        return be_killed(&arguments);
    }
    let kills: u64 =
        std::env::var("KVFERRY_CRASH_KILLS").ok().and_then(|it| it.parse().ok()).unwrap_or(15);
    let mut seed = std::process::id().into();
    let mut random = move |below: u64| {
        seed = u64::wrapping_mul(seed, 6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % below
    };
    // One directory has room for all, so that what was acknowledged must be there; the other evicts all the time.
    let directories =
        [(Directory::new("crash-large"), 64 << 30), (Directory::new("crash-small"), 8 << 20)];
    let mut durable = [BTreeSet::new(), BTreeSet::new()];
    let (mut next, mut checked) = ([0; 2], [0; 2]);
    let (mut acknowledged, mut unfinished, mut damaged) = (0, 0, 0);
    for kill in 0..kills {
        let which = usize::from(kill % 3 == 2);
        let (directory, bound) = (&directories[which].0.0, directories[which].1);
        let wait = Duration::from_micros(5_000 + random(70_000));
        for number in run_and_kill(directory, bound, next[which], wait) {
            durable[which].insert(number);
            acknowledged += 1;
        }
        let leftovers = fs::read_dir(directory.join("objects")).map_or(0, |entries| {
            let names = entries.filter_map(|entry| entry.unwrap().file_name().into_string().ok());
            names.filter(|name| name.ends_with(".tmp")).count()
        });
        unfinished += leftovers;
        let disk = Disk::open(&DiskOptions::new(directory, bound)).unwrap();
        // The child's numbers go up, and so many more than it said to be durable were not begun.
        let last = durable[which].last().map_or(0, |last| *last);
        let last = last.max(next[which]) + 3_000;
        let mut there = 0;
        for number in checked[which]..last {
            let found = find(&disk, number);
            if which == 0 && durable[which].contains(&number) {
                assert!(found && load(&disk, number), "kill {kill}: object {number} is lost");
            } else if found {
                load(&disk, number);
            }
            there += u64::from(found);
        }
        let status = disk.status();
        assert_eq!(there, status.objects + status.damaged, "kill {kill}: nothing unknown is there");
        assert!(status.bytes <= bound, "kill {kill}");
        damaged += status.damaged;
        next[which] = last;
        // What was checked once goes, so that a thousand kills do not fill the disk.
        if status.bytes > 200 << 20 || kill % 40 > 37 {
            disk.clear();
            disk.flush(soon()).unwrap();
            durable[which].clear();
            checked[which] = last;
        }
    }
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{kills} kills: {acknowledged} objects were acknowledged, {unfinished} files unfinished, {damaged} damaged"
    )
    .unwrap();
    assert!(kills < 10 || acknowledged > 0, "the child had time for something");
    assert_eq!(damaged, 0, "a kill leaves no damaged file");
}

/// Starts a child, kills it after `wait` from its first sign of life, and gives what it said to be durable.
fn run_and_kill(directory: &Path, bound: u64, first: u64, wait: Duration) -> Vec<u64> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_kill_at_any_moment_loses_nothing_that_was_acknowledged"])
        .args(["--nocapture", "--test-threads=1"])
        .env(CHILD, format!("{}\n{bound}\n{first}", directory.display()))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (started, start) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut durable = Vec::new();
        while let Some(Ok(line)) = lines.next() {
            // Other lines are the test harness's; the last may have been cut.
            match line.split_once(' ') {
                None if line == "open" => started.send(()).unwrap(),
                Some(("durable", number)) => durable.push(number.parse().unwrap()),
                Some(("wrong", what)) => panic!("the child read wrong bytes: {what}"),
                _ => {}
            }
        }
        durable
    });
    let begun = start.recv_timeout(Duration::from_secs(20));
    std::thread::sleep(wait);
    child.kill().unwrap();
    child.wait().unwrap();
    begun.unwrap();
    reader.join().unwrap()
}

/// Saves and loads until it is killed, and says what is durable, each line in one write.
fn be_killed(arguments: &str) {
    let mut arguments = arguments.split('\n');
    let mut argument = || arguments.next().unwrap();
    let mut options = DiskOptions::new(argument(), 0);
    options.bytes = argument().parse().unwrap();
    options.queue_bytes = 64 << 20;
    let first: u64 = argument().parse().unwrap();
    let say = |line: String| std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
    let disk = Disk::open(&options).unwrap();
    say("\nopen\n".into());
    let begun = Instant::now();
    for number in first.. {
        let length = length(number);
        let bytes = content(number, length);
        loop {
            let done = Box::new(move |result: Result<()>| {
                if result.is_ok() {
                    say(format!("durable {number}\n"));
                }
            });
            if disk.save(saved(number), memory(&bytes), 0, length, done) {
                break;
            }
            std::thread::sleep(Duration::from_millis(1)); // the queue is full
        }
        if number % 16 == 15 {
            let earlier = first + (number - first) / 2;
            let told =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| load(&disk, earlier)));
            if told.is_err() {
                say(format!("wrong {earlier}\n"));
            }
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "nobody killed it");
    }
}
