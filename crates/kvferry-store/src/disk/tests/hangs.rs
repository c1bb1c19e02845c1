//! File operations that do not end.

use super::*;

/// A disk on which such operations wait for the gate, and are taken for a hang soon.
fn hanging(
    directory: &Directory,
    gate: &Arc<Gate>,
    is_held: impl Fn(&Operation) -> bool + Send + Sync + 'static,
) -> Disk {
    let times = Times { hang: Duration::from_millis(20), ..Times::default() };
    Disk::open_on(&directory.options(MIB), gated(directory, gate, is_held), times).unwrap()
}

/// What the status says once it says something.
fn failure(disk: &Disk) -> String {
    let begun = Instant::now();
    loop {
        if let Some(failure) = disk.status().failed {
            return failure;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "it never says that it hangs");
        std::thread::yield_now();
    }
}

fn is_refused(disk: &Disk, number: u8) -> bool {
    let Saved { chunk, space, rank, .. } = saved(number, "");
    let done = Box::new(|_| panic!("it was refused"));
    !disk.load((&chunk, &space, rank), memory(&[0; 4096]), 0, 4096, done)
}

#[test]
fn while_a_save_hangs_nothing_is_found_or_taken_and_afterwards_all_is() {
    type Which = fn(&Operation) -> bool;
    let steps: [(&str, Which); 5] = [
        ("make a file", |operation| matches!(operation, Operation::Create)),
        ("write a file", |operation| matches!(operation, Operation::Write)),
        ("sync a file", |operation| matches!(operation, Operation::SyncFile)),
        ("rename a file", |operation| matches!(operation, Operation::Rename)),
        ("sync", |operation| matches!(operation, Operation::Sync)),
    ];
    for (doing, is_held) in steps {
        let directory = Directory::new();
        let gate = Arc::new(Gate::default());
        let disk = hanging(&directory, &gate, is_held);
        save_page(&disk, 0).unwrap();
        gate.shut();
        let answer = begin_save(&disk, saved(1, ""), &content(1, 4096)).unwrap();
        let failure = failure(&disk);
        assert!(failure.contains(&format!("is to {doing} in")), "{failure}");
        assert!(failure.contains(&directory.objects().display().to_string()), "{failure}");
        assert_eq!(found(&disk, 0..3), [], "{doing}: who looks it up would wait for it");
        assert!(is_refused(&disk, 0), "{doing}");
        assert!(begin_save(&disk, saved(2, ""), b"kv").is_none(), "{doing}");
        let status = disk.status();
        assert_eq!((status.refused_loads, status.dropped_failed), (1, 1), "{doing}");
        gate.open();
        answer.recv().unwrap().unwrap();
        assert_eq!(disk.status().failed, None, "{doing}");
        assert_eq!(found(&disk, 0..3), [0, 1], "{doing}");
        assert!(load_page(&disk, 0) && load_page(&disk, 1), "{doing}");
        save_page(&disk, 2).unwrap();
    }
}

#[test]
fn while_a_load_or_a_removal_hangs_nothing_is_found_either() {
    type Which = fn(&Operation) -> bool;
    let steps: [(&str, Which); 3] = [
        ("open a file", |operation| matches!(operation, Operation::Open)),
        ("read a file", |operation| matches!(operation, Operation::Read)),
        ("remove a file", |operation| matches!(operation, Operation::Remove)),
    ];
    for (doing, is_held) in steps {
        let directory = Directory::new();
        let gate = Arc::new(Gate::default());
        let disk = hanging(&directory, &gate, is_held);
        (0..2).for_each(|number| save_page(&disk, number).unwrap());
        gate.shut();
        let (_, loaded) = begin_load(&disk, &saved(0, ""), 4096);
        let Saved { chunk, space, rank, .. } = saved(1, "");
        disk.remove(&chunk, &space, rank);
        let failure = failure(&disk);
        assert!(failure.contains(&format!("is to {doing} in")), "{failure}");
        assert_eq!(found(&disk, 0..2), [], "{doing}");
        gate.open();
        assert!(loaded.recv().unwrap().unwrap().is_some(), "{doing}");
        disk.flush(soon()).unwrap();
        assert_eq!((disk.status().failed, found(&disk, 0..2)), (None, vec![0]), "{doing}");
    }
}
