//! Files that cannot be removed, for a while or for good.

use super::*;

#[test]
fn what_cannot_be_removed_still_counts() {
    let directory = Directory::new();
    let faulty = Faulty::on(&directory, |operation| match operation {
        Operation::Remove => Err(io::ErrorKind::PermissionDenied.into()),
        _ => Ok(()),
    });
    let disk = Disk::open_on(&directory.options(2 * FILE), faulty, Times::default()).unwrap();
    save_page(&disk, 0).unwrap();
    save_page(&disk, 1).unwrap();
    assert!(save_page(&disk, 2).is_err(), "there is no room for it");
    let status = disk.status();
    assert_eq!((status.objects, status.bytes, status.evicted_objects), (2, 2 * FILE, 0));
    assert!(load_page(&disk, 0) && load_page(&disk, 1));
    let Saved { chunk, space, rank, .. } = saved(0, "");
    disk.remove(&chunk, &space, rank);
    assert!(disk.flush(soon()).is_err(), "a restart would find it");
    let status = disk.status();
    assert_eq!((status.objects, status.bytes), (1, 2 * FILE));
}

#[test]
fn one_removal_that_fails_keeps_no_other_from_going() {
    let directory = Directory::new();
    let left = Arc::new(AtomicUsize::new(0));
    let faulty = {
        let left = Arc::clone(&left);
        Faulty::on(&directory, move |operation| match operation {
            Operation::Remove if left.swap(0, Ordering::Relaxed) > 0 => {
                Err(io::Error::other("once"))
            }
            _ => Ok(()),
        })
    };
    let times = Times { retry: Duration::from_secs(60), ..Times::default() };
    let disk = Disk::open_on(&directory.options(MIB), faulty, times).unwrap();
    (0..60).for_each(|number| save_page(&disk, number).unwrap());
    left.store(1, Ordering::Relaxed);
    disk.clear();
    let begun = Instant::now();
    while disk.status().bytes > FILE {
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", disk.status());
        std::thread::yield_now();
    }
    disk.flush(soon()).unwrap(); // tries the one again
    assert_eq!((disk.status().bytes, directory.names().len()), (0, 0));
}

#[test]
fn what_could_not_be_removed_is_tried_again_and_a_flush_says_so_until_it_is_gone() {
    type Which = fn(&Operation) -> bool;
    let steps: [(Which, u64); 2] = [
        (|operation| matches!(operation, Operation::Remove), 3 * FILE),
        (|operation| matches!(operation, Operation::Sync), 0), // a power loss may bring them back
    ];
    for (which, bytes) in steps {
        let directory = Directory::new();
        let (failing, tries) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let faulty = {
            let (failing, tries) = (Arc::clone(&failing), Arc::clone(&tries));
            Faulty::on(&directory, move |operation| {
                if which(operation) && failing.load(Ordering::Relaxed) > 0 {
                    tries.fetch_add(1, Ordering::Relaxed);
                    return Err(io::Error::other("on purpose"));
                }
                Ok(())
            })
        };
        let (retry, retry_most) = (Duration::from_millis(20), Duration::from_millis(40));
        let times = Times { retry, retry_most, ..Times::default() };
        let disk = Disk::open_on(&directory.options(MIB), faulty, times).unwrap();
        (0..3).for_each(|number| save_page(&disk, number).unwrap());
        failing.store(1, Ordering::Relaxed);
        disk.clear();
        let error = disk.flush(soon()).unwrap_err();
        assert!(error.message.contains("on purpose"), "{error}");
        assert_eq!((disk.status().bytes, disk.status().objects), (bytes, 0));
        let (begun, before) = (Instant::now(), tries.load(Ordering::Relaxed));
        std::thread::sleep(Duration::from_millis(200));
        let rounds = begun.elapsed().as_millis() / 20 + 1;
        let tries = (tries.load(Ordering::Relaxed) - before) as u128;
        assert!(tries > 0 && tries <= 3 * rounds, "{tries} tries");
        assert!(disk.flush(soon()).is_err());
        failing.store(0, Ordering::Relaxed);
        let begun = Instant::now();
        while disk.flush(soon()).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", disk.status());
        }
        assert_eq!((disk.status().bytes, directory.names().len()), (0, 0));
        save_page(&disk, 4).unwrap();
    }
}

#[test]
fn what_could_not_be_removed_goes_by_itself_once_it_can() {
    let directory = Directory::new();
    let failing = Arc::new(AtomicUsize::new(1));
    let faulty = {
        let failing = Arc::clone(&failing);
        Faulty::on(&directory, move |operation| match operation {
            Operation::Remove if failing.load(Ordering::Relaxed) > 0 => {
                Err(io::Error::other("on purpose"))
            }
            _ => Ok(()),
        })
    };
    let times = Times { retry: Duration::from_millis(20), ..Times::default() };
    let disk = Disk::open_on(&directory.options(MIB), faulty, times).unwrap();
    save_page(&disk, 0).unwrap();
    disk.clear();
    assert!(disk.flush(soon()).is_err());
    failing.store(0, Ordering::Relaxed);
    let begun = Instant::now();
    while disk.status().bytes > 0 {
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", disk.status());
        std::thread::yield_now();
    }
    assert!(directory.names().is_empty());
}

/// Puts a directory in the place of the object's file, which no unlink removes.
fn make_irremovable(directory: &Directory, number: u8) {
    let is_its = |name: &String| name.starts_with(&format!("{number:02x}{number:02x}"));
    let path = directory.objects().join(directory.names().into_iter().find(is_its).unwrap());
    fs::remove_file(&path).unwrap();
    fs::create_dir(path).unwrap();
}

#[test]
fn a_file_that_cannot_be_removed_leaves_the_others_to_make_room() {
    let directory = Directory::new();
    let disk = directory.open(4 * FILE);
    (0..4).for_each(|number| save_page(&disk, number).unwrap());
    make_irremovable(&directory, 0); // would go first
    (10..30).for_each(|number| save_page(&disk, number).unwrap());
    let status = disk.status();
    assert_eq!((status.failed, status.bytes, status.save_failures), (None, 4 * FILE, 0));
    assert_eq!(found(&disk, 10..30), [27, 28, 29]);
}

#[test]
fn a_start_with_a_smaller_bound_goes_on_past_what_cannot_be_removed() {
    let directory = Directory::new();
    let disk = directory.open(MIB);
    (0..6).for_each(|number| save_page(&disk, number).unwrap());
    drop(disk);
    let removals = AtomicUsize::new(0);
    let faulty = Faulty::on(&directory, move |operation| match operation {
        Operation::Remove if removals.fetch_add(1, Ordering::Relaxed) == 0 => {
            Err(io::ErrorKind::PermissionDenied.into())
        }
        _ => Ok(()),
    });
    let disk = Disk::open_on(&directory.options(2 * FILE), faulty, Times::default()).unwrap();
    let status = disk.status();
    assert_eq!((status.objects, status.bytes, status.evicted_objects), (2, 2 * FILE, 4));
    assert!(load_page(&disk, 0), "what could not go is served");
}

#[test]
fn each_file_is_tried_once_for_a_save_that_finds_no_room() {
    let directory = Directory::new();
    let removals = Arc::new(AtomicUsize::new(0));
    let faulty = {
        let removals = Arc::clone(&removals);
        Faulty::on(&directory, move |operation| match operation {
            Operation::Remove => {
                removals.fetch_add(1, Ordering::Relaxed);
                Err(io::ErrorKind::PermissionDenied.into())
            }
            _ => Ok(()),
        })
    };
    let disk = Disk::open_on(&directory.options(4 * FILE), faulty, Times::default()).unwrap();
    (0..4).for_each(|number| save_page(&disk, number).unwrap());
    let error = save(&disk, saved(9, ""), &content(9, 3 * 4096)).unwrap_err();
    assert!(error.message.contains("cannot remove a file"), "{error}");
    assert_eq!(removals.load(Ordering::Relaxed), 4);
    assert!(disk.status().failed.is_some(), "nothing could be removed");
    assert_eq!(found(&disk, 0..9), [0, 1, 2, 3]);
}

#[test]
fn a_save_that_is_too_large_for_what_can_go_does_not_fail_the_disk() {
    let directory = Directory::new();
    let disk = directory.open(2 * FILE);
    (0..2).for_each(|number| save_page(&disk, number).unwrap());
    make_irremovable(&directory, 0);
    let error = save(&disk, saved(9, ""), &content(9, 2 * 4096)).unwrap_err();
    assert!(error.message.contains("cannot remove a file"), "{error}");
    assert_eq!(disk.status().failed, None);
    save_page(&disk, 2).unwrap();
    assert_eq!(disk.status().bytes, 2 * FILE);
}

/// Files of which one removal waits at the gate, once `armed`, and then fails; a rename afterwards opens the gate.
struct StuckRemoval {
    gate: Gate,
    armed: AtomicUsize,
    waiting: AtomicUsize,
}

impl StuckRemoval {
    fn on(directory: &Directory) -> (Arc<Self>, Arc<dyn Files>) {
        let (armed, waiting) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let stuck = Arc::new(Self { gate: Gate::default(), armed, waiting });
        let held = Arc::clone(&stuck);
        let faulty = Faulty::on(directory, move |operation| match operation {
            Operation::Remove if held.armed.swap(0, Ordering::Relaxed) == 1 => {
                held.waiting.store(1, Ordering::Relaxed);
                held.gate.pass();
                Err(io::Error::other("on purpose"))
            }
            Operation::Rename if held.waiting.load(Ordering::Relaxed) == 1 => {
                held.gate.open();
                std::thread::sleep(Duration::from_millis(100)); // the removal's end comes first
                Ok(())
            }
            _ => Ok(()),
        });
        (stuck, faulty)
    }

    /// Begins to save what makes object 0 go, whose removal then waits.
    fn evict(&self, disk: &Disk) -> Answer<()> {
        self.gate.shut();
        self.armed.store(1, Ordering::Relaxed);
        let answer = begin_save(disk, saved(2, ""), &content(2, 8192)).unwrap();
        while self.waiting.load(Ordering::Relaxed) == 0 {
            std::thread::yield_now();
        }
        answer
    }
}

#[test]
fn what_a_caller_removes_while_it_is_evicted_does_not_come_back() {
    type Forget = fn(&Disk);
    let ways: [Forget; 2] = [Disk::clear, |disk| {
        let Saved { chunk, space, rank, .. } = saved(0, "");
        disk.remove(&chunk, &space, rank);
    }];
    for forget in ways {
        let directory = Directory::new();
        let (stuck, files) = StuckRemoval::on(&directory);
        let disk = Disk::open_on(&directory.options(3 * FILE), files, Times::default()).unwrap();
        (0..2).for_each(|number| save_page(&disk, number).unwrap());
        let answer = stuck.evict(&disk);
        forget(&disk);
        stuck.gate.open();
        let _ = answer.recv().unwrap(); // it may have been cleared
        disk.flush(soon()).unwrap();
        assert_eq!(find(&disk, &saved(0, "")), None);
        drop(disk);
        assert_eq!(find(&directory.open(MIB), &saved(0, "")), None, "the file is gone, too");
    }
}

#[test]
fn an_object_that_is_saved_anew_while_it_is_evicted_leaves_no_file_that_nobody_knows() {
    let directory = Directory::new();
    let (stuck, files) = StuckRemoval::on(&directory);
    let disk = Disk::open_on(&directory.options(4 * FILE), files, Times::default()).unwrap();
    (0..3).for_each(|number| save_page(&disk, [0, 1, 3][number]).unwrap());
    let large = stuck.evict(&disk);
    save_page(&disk, 0).unwrap();
    large.recv().unwrap().unwrap();
    let lengths = directory.names().into_iter().map(|name| {
        let metadata = fs::metadata(directory.objects().join(name)).unwrap();
        metadata.len()
    });
    assert_eq!(disk.status().bytes, lengths.sum::<u64>());
    assert!(load_page(&disk, 0));
    disk.clear();
    disk.flush(soon()).unwrap();
    assert_eq!((disk.status().bytes, directory.names().len()), (0, 0));
}

#[test]
fn a_discard_takes_along_what_a_restart_would_take_for_the_object() {
    let directory = Directory::new();
    let fails = Arc::new(AtomicUsize::new(1));
    let open = || {
        let fails = Arc::clone(&fails);
        let faulty = Faulty::on(&directory, move |operation| match operation {
            Operation::Remove if fails.load(Ordering::Relaxed) > 0 => {
                Err(io::Error::other("on purpose"))
            }
            _ => Ok(()),
        });
        Disk::open_on(&directory.options(MIB), faulty, Times::default()).unwrap()
    };
    let discard = |disk: &Disk| disk.remove(&[0; 32], &saved(0, "").space, 1);
    let disk = open();
    save_page(&disk, 0).unwrap();
    discard(&disk);
    assert!(disk.flush(soon()).is_err(), "its file stays");
    save_page(&disk, 0).unwrap();
    drop(disk);
    let disk = open();
    assert_eq!((disk.status().objects, disk.status().other_versions), (1, 1));
    fails.store(0, Ordering::Relaxed);
    discard(&disk);
    disk.flush(soon()).unwrap();
    assert_eq!((disk.status().bytes, disk.status().other_versions), (0, 0));
    drop(disk);
    assert_eq!(found(&open(), 0..9), [0_u8; 0]);
}
