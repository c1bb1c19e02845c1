//! What a power loss, a kill or a short close leaves of saves and clears.

use super::*;

#[test]
fn a_power_loss_at_any_step_loses_nothing_that_was_acknowledged() {
    for seed in 0..400 {
        let volatile = Volatile::new(seed);
        let options = DiskOptions::new("nowhere", 64 * MIB);
        let mut durable = HashMap::new();
        {
            let Ok(disk) = Disk::open_on(&options, Arc::new(volatile.clone()), Times::default())
            else {
                continue; // it came before anything was there
            };
            volatile.fail_after(1 + seed % 60);
            let sizes = [100, 4096, 9000, MIB + 100];
            let size = |number: u8| sizes[usize::from(number) % sizes.len()];
            let answers: Vec<_> = (0..12)
                .filter_map(|number| {
                    let answer =
                        begin_save(&disk, saved(number, ""), &content(number, size(number)));
                    if number % 5 == 0 {
                        let _ = disk.flush(soon()); // so that there are several batches
                    }
                    answer.map(|answer| (number, answer))
                })
                .collect();
            for (number, answer) in answers {
                if answer.recv().unwrap().is_ok() {
                    durable.insert(number, size(number));
                }
            }
        }
        let after = volatile.lose_power();
        let disk = Disk::open_on(&options, Arc::new(after), Times::default()).unwrap();
        for number in 0..12 {
            let saved = saved(number, "");
            let length = find(&disk, &saved);
            assert!(
                length.is_some() || !durable.contains_key(&number),
                "seed {seed}: {number} is lost"
            );
            let Some(length) = length else { continue };
            let loaded = load(&disk, &saved, length).unwrap();
            if durable.contains_key(&number) || loaded.is_some() {
                assert!(loaded == Some(content(number, length)), "seed {seed}: {number} is wrong");
            }
        }
    }
}

#[test]
fn a_power_loss_at_any_step_of_a_clear_leaves_all_that_it_cleared_or_nothing() {
    let (mut whole, mut none, mut sure) = (0, 0, 0);
    for seed in 0..400 {
        let volatile = Volatile::new(seed);
        let options = DiskOptions::new("nowhere", 64 * MIB);
        let disk = Disk::open_on(&options, Arc::new(volatile.clone()), Times::default()).unwrap();
        (0..4).for_each(|number| save_page(&disk, number).unwrap());
        let begin = |number| begin_save(&disk, saved(number, ""), &content(number, 4096));
        volatile.fail_after(seed % 60);
        let overtaken: Vec<_> = (4..8).filter_map(begin).collect();
        disk.clear();
        let after: Vec<_> = (8..12).chain(0..2).filter_map(|n| Some((n, begin(n)?))).collect();
        let flushed = disk.flush(soon());
        let durable: Vec<_> = after
            .into_iter()
            .filter_map(|(number, answer)| answer.recv().unwrap().is_ok().then_some(number))
            .collect();
        drop(overtaken);
        drop(disk);
        let disk = Disk::open_on(&options, Arc::new(volatile.lose_power()), Times::default());
        let disk = disk.unwrap();
        let is_there: Vec<_> = (0..12).filter(|number| load_page(&disk, *number)).collect();
        for number in &durable {
            assert!(is_there.contains(number), "seed {seed}: {number} is lost");
        }
        let cleared: Vec<_> = is_there.iter().filter(|it| (2..8).contains(*it)).collect();
        if flushed.is_ok() {
            sure += 1;
            assert!(cleared.is_empty(), "seed {seed}: {cleared:?} came back");
        }
        let before = cleared.iter().filter(|number| ***number < 4).count();
        assert!(before == 0 || before == 2, "seed {seed}: {cleared:?} is half of it");
        (whole, none) = (whole + usize::from(before > 0), none + usize::from(before == 0));
        if before == 0 {
            assert!(cleared.is_empty(), "seed {seed}: {cleared:?} were being saved");
        }
    }
    assert!(whole > 20 && none > 20 && sure > 20, "{whole}, {none}, {sure}");
}

#[test]
fn a_clear_outlives_a_close_that_runs_out_of_time() {
    let directory = Directory::new();
    let gate = Arc::new(Gate::default());
    let slow = gated(&directory, &gate, |operation| matches!(operation, Operation::Remove));
    let disk = Disk::open_on(&directory.options(MIB), slow, Times::default()).unwrap();
    (0..9).for_each(|number| save_page(&disk, number).unwrap());
    gate.shut();
    disk.clear();
    save_page(&disk, 20).unwrap();
    let error = disk.close(Instant::now() + Duration::from_millis(100)).unwrap_err();
    assert_eq!(error.code, ErrorCode::Timeout);
    let begun = Instant::now();
    while !directory.objects().join("cleared").exists() {
        assert!(begun.elapsed() < Duration::from_secs(10));
        std::thread::yield_now();
    }
    // What a process that is killed now leaves.
    let left = Directory::new();
    drop(left.open(MIB));
    for name in directory.names().into_iter().chain(["cleared".into()]) {
        fs::copy(directory.objects().join(&name), left.objects().join(&name)).unwrap();
    }
    gate.open();
    assert_eq!(left.names().len(), 10);
    let disk = left.open(MIB);
    assert_eq!(found(&disk, 0..99), [20]);
    assert!(load_page(&disk, 20));
    assert_eq!(left.names().len(), 1, "they are gone for good");
}

#[test]
fn no_cleared_file_goes_before_the_disk_says_that_it_was_cleared() {
    let directory = Directory::new();
    let gate = Arc::new(Gate::default());
    let faulty = gated(&directory, &gate, |operation| matches!(operation, Operation::Rename));
    let disk = Disk::open_on(&directory.options(MIB), faulty, Times::default()).unwrap();
    (0..9).for_each(|number| save_page(&disk, number).unwrap());
    gate.shut();
    disk.clear();
    let error = disk.flush(Instant::now() + Duration::from_millis(50)).unwrap_err();
    assert_eq!(error.code, ErrorCode::Timeout);
    let error = disk.close(Instant::now() + Duration::from_millis(50)).unwrap_err();
    assert_eq!(error.code, ErrorCode::Timeout);
    assert_eq!(directory.names().len(), 9 + 1); // and what is written just now
    gate.open();
    disk.close(soon()).unwrap();
    assert!(directory.names().is_empty());
}

#[test]
fn clears_of_a_full_disk_and_saves_to_it_do_not_wait_for_each_other() {
    let directory = Directory::new();
    let disk = directory.open(4 * FILE);
    let begun = Instant::now();
    let mut answers = Vec::new();
    for _ in 0..20 {
        let begin = |number| begin_save(&disk, saved(number, ""), &content(number, 4096));
        answers.extend((0..30).filter_map(begin));
        std::thread::sleep(Duration::from_millis(3));
        disk.clear();
    }
    disk.flush(soon()).unwrap();
    assert!(answers.iter().all(|answer| answer.try_recv().is_ok()));
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    assert_eq!((disk.status().bytes, directory.names().len()), (0, 0));
    save_page(&disk, 0).unwrap();
}

#[test]
fn what_is_saved_after_a_clear_stays_however_often_the_disk_is_cleared_and_opened() {
    let directory = Directory::new();
    for round in 0..3 {
        let disk = directory.open(MIB);
        assert_eq!(found(&disk, 0..9), if round == 0 { vec![] } else { vec![1] });
        save_page(&disk, 0).unwrap();
        disk.clear();
        disk.flush(soon()).unwrap();
        drop(disk);
        assert!(directory.names().is_empty());
        let disk = directory.open(MIB); // an empty directory: numbers go on all the same
        save_page(&disk, 1).unwrap();
        drop(disk);
        assert!(load_page(&directory.open(MIB), 1));
    }
}

#[test]
fn what_says_that_files_were_cleared_is_ignored_unless_it_is_whole() {
    let directory = Directory::new();
    let disk = directory.open(MIB);
    save_page(&disk, 0).unwrap();
    disk.clear();
    disk.flush(soon()).unwrap();
    save_page(&disk, 1).unwrap();
    drop(disk);
    let path = directory.objects().join("cleared");
    let whole = fs::read(&path).unwrap();
    let mut others = vec![Vec::new(), whole[..100].to_vec(), whole.clone(), whole.clone()];
    others[2][8] += 1; // another version
    others[3][24] = 200; // damaged: it would take everything
    for bytes in others {
        fs::write(&path, bytes).unwrap();
        assert_eq!(found(&directory.open(MIB), 0..9), [1]);
    }
    let mut later = whole;
    crate::disk::format::encode_cleared(200, &mut later);
    fs::write(&path, later).unwrap();
    assert!(found(&directory.open(MIB), 0..9).is_empty());
}

#[test]
fn a_clear_that_the_disk_cannot_note_removes_the_files_all_the_same() {
    let directory = Directory::new();
    let failing = Arc::new(AtomicUsize::new(0));
    let faulty = {
        let failing = Arc::clone(&failing);
        Faulty::on(&directory, move |operation| match operation {
            Operation::Create if failing.load(Ordering::Relaxed) > 0 => {
                Err(io::ErrorKind::StorageFull.into())
            }
            _ => Ok(()),
        })
    };
    let disk = Disk::open_on(&directory.options(MIB), faulty, Times::default()).unwrap();
    (0..9).for_each(|number| save_page(&disk, number).unwrap());
    failing.store(1, Ordering::Relaxed);
    disk.clear();
    disk.flush(soon()).unwrap();
    assert_eq!((disk.status().bytes, directory.names().len()), (0, 0));
    assert!(!directory.objects().join("cleared").exists());
}

#[test]
fn a_start_that_cannot_read_what_was_cleared_fails_and_loses_nothing_that_is_saved_later() {
    let directory = Directory::new();
    let disk = directory.open(MIB);
    (0..9).for_each(|number| save_page(&disk, number).unwrap());
    disk.clear();
    disk.flush(soon()).unwrap();
    drop(disk);
    let faulty = Faulty::on(&directory, |operation| match operation {
        Operation::Open => Err(io::Error::other("on purpose")),
        _ => Ok(()),
    });
    let error = Disk::open_on(&directory.options(MIB), faulty, Times::default()).err().unwrap();
    assert!(error.message.contains("on purpose"), "{error}");

    // What can be read and means nothing goes: it might mean something to a later version.
    fs::write(directory.objects().join("cleared"), [7; 4096]).unwrap();
    let disk = directory.open(MIB);
    assert!(!directory.objects().join("cleared").exists());
    save_page(&disk, 20).unwrap();
    disk.close(soon()).unwrap();
    drop(disk);
    assert_eq!(found(&directory.open(MIB), 0..99), [20]);
}
