mod clears;
mod fakes;
mod hangs;
mod removals;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::{Duration, Instant, SystemTime};

use kvferry_copy::PrivateRegion;
use kvferry_core::cache::Memory;
use kvferry_core::key::{Dtype, Layout};
use kvferry_core::{ErrorCode, Result};

pub(crate) use self::fakes::{Faulty, Gate, Operation};
use self::fakes::{gated, gated_saves};
use super::files::{Entry, Files, Handle, SystemFiles};
use super::power::Volatile;
use super::{Disk, DiskOptions, Loaded, Saved, Times};

const MIB: u64 = 1 << 20;
/// Of the file of an object of one page.
const FILE: u64 = 8192;

pub(crate) fn saved(number: u8, salt: &str) -> Saved {
    let layout = Layout {
        model_name: "model".into(),
        world_size: 2,
        block_size: 16,
        num_layers: 4,
        hidden_dim_size: 8,
        dtype: Dtype::new("bfloat16").unwrap(),
        single_plane: false,
        num_physical_slots: Some(3),
    };
    let space = Saved::space_of(&layout, salt);
    let parent = number.checked_sub(1).map(|parent| [parent; 32]);
    Saved { chunk: [number; 32], space, rank: 1, parent, layout, cache_salt: salt.into() }
}

/// A directory that goes with the test.
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = format!("kvferry-disk-engine-{}-{count}", std::process::id());
        let path = std::env::temp_dir().join(path);
        let _ = fs::remove_dir_all(&path);
        Self(path)
    }

    pub(crate) fn options(&self, bytes: u64) -> DiskOptions {
        DiskOptions::new(&self.0, bytes)
    }

    fn open(&self, bytes: u64) -> Disk {
        Disk::open(&self.options(bytes)).unwrap()
    }

    pub(crate) fn objects(&self) -> PathBuf {
        self.0.join("objects")
    }

    /// Names, in order, without what says that others were cleared.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.objects()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name != "cleared");
        names.sort();
        names
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// Bytes that are unlike those of any other number.
pub(crate) fn content(number: u8, length: u64) -> Vec<u8> {
    let mut seed = u64::from(number) + 1;
    (0..length)
        .map(|_| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            seed.to_be_bytes()[0]
        })
        .collect()
}

fn memory(bytes: &[u8]) -> Arc<dyn Memory> {
    let memory = PrivateRegion::new(bytes.len().max(1) as u64).unwrap();
    memory.write(0, bytes).unwrap();
    Arc::new(memory)
}

type Answer<T> = mpsc::Receiver<Result<T>>;

fn begin_save(disk: &Disk, saved: Saved, bytes: &[u8]) -> Option<Answer<()>> {
    let (told, answer) = mpsc::channel();
    let length = bytes.len() as u64;
    let done = Box::new(move |result| told.send(result).unwrap());
    disk.save(saved, memory(bytes), 0, length, done).then_some(answer)
}

pub(crate) fn save(disk: &Disk, saved: Saved, bytes: &[u8]) -> Result<()> {
    begin_save(disk, saved, bytes).expect("it is accepted").recv().unwrap()
}

fn save_page(disk: &Disk, number: u8) -> Result<()> {
    save(disk, saved(number, ""), &content(number, 4096))
}

/// The bytes that a load will have brought, and its answer.
fn begin_load(
    disk: &Disk,
    saved: &Saved,
    length: u64,
) -> (Arc<dyn Memory>, Answer<Option<Loaded>>) {
    let (told, answer) = mpsc::channel();
    let into = memory(&vec![0; usize::try_from(length).unwrap()]);
    let done = Box::new(move |result| told.send(result).unwrap());
    let place = (&saved.chunk, &saved.space, saved.rank);
    assert!(disk.load(place, Arc::clone(&into), 0, length, done));
    (into, answer)
}

pub(crate) fn load(disk: &Disk, saved: &Saved, length: u64) -> Result<Option<Vec<u8>>> {
    let (into, answer) = begin_load(disk, saved, length);
    let Some(loaded) = answer.recv().unwrap()? else { return Ok(None) };
    let mut bytes = vec![0; usize::try_from(length).unwrap()];
    into.read(0, &mut bytes).unwrap();
    let checksum = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, &bytes);
    assert_eq!(loaded, Loaded { checksum, parent: saved.parent });
    Ok(Some(bytes))
}

fn load_page(disk: &Disk, number: u8) -> bool {
    let loaded = load(disk, &saved(number, ""), 4096).unwrap();
    assert!(loaded.is_none() || loaded == Some(content(number, 4096)), "wrong bytes");
    loaded.is_some()
}

fn find(disk: &Disk, saved: &Saved) -> Option<u64> {
    disk.find(&saved.chunk, &saved.space, saved.rank)
}

fn found(disk: &Disk, numbers: std::ops::Range<u8>) -> Vec<u8> {
    numbers.filter(|number| find(disk, &saved(*number, "")).is_some()).collect()
}

// Objects

#[test]
fn what_was_saved_comes_back_and_after_a_restart_too() {
    let sizes = [0, 1, 4095, 4096, 4097, MIB - 4097, MIB - 4096, MIB - 4095, MIB, 3 * MIB + 5];
    for buffered in [false, true] {
        let directory = Directory::new();
        let open = || {
            let files = match buffered {
                true => SystemFiles::buffered(directory.0.clone()),
                false => SystemFiles::new(directory.0.clone()),
            };
            Disk::open_on(&directory.options(64 * MIB), Arc::new(files), Times::default()).unwrap()
        };
        let check = |disk: &Disk| {
            for (number, size) in (0..).zip(sizes) {
                assert_eq!(find(disk, &saved(number, "s")), Some(size));
                let loaded = load(disk, &saved(number, "s"), size).unwrap();
                assert_eq!(loaded, Some(content(number, size)), "{size} bytes");
            }
            let status = disk.status();
            assert_eq!(status.objects, sizes.len() as u64);
            let files = sizes.map(|size| size.next_multiple_of(4096) + 4096);
            assert_eq!(status.bytes, files.iter().sum::<u64>());
        };
        let disk = open();
        for (number, size) in (0..).zip(sizes) {
            save(&disk, saved(number, "s"), &content(number, size)).unwrap();
        }
        check(&disk);
        disk.flush(soon()).unwrap();
        let status = disk.status();
        assert_eq!((status.saves, status.loads, status.queue_bytes), (10, 10, 0));
        assert_eq!((status.written_bytes, status.read_bytes), (status.bytes, status.bytes));
        drop(disk);
        check(&open());
    }
}

#[test]
fn another_tenant_rank_or_chunk_is_not_found() {
    let directory = Directory::new();
    let disk = directory.open(MIB);
    save(&disk, saved(1, "mine"), b"secret").unwrap();
    let mine = saved(1, "mine");
    assert_eq!(find(&disk, &mine), Some(6));
    let others = [
        saved(1, "yours"),
        saved(1, ""),
        saved(2, "mine"),
        Saved { rank: 0, ..mine.clone() },
        Saved { space: [0; 32], ..mine },
    ];
    for other in others {
        assert_eq!(find(&disk, &other), None);
        assert_eq!(load(&disk, &other, 6), Ok(None));
    }
    let status = disk.status();
    assert_eq!((status.damaged, status.loads), (0, 0));
}

#[test]
fn a_file_that_was_given_another_identitys_name_is_refused() {
    let mine = saved(1, "mine");
    let others = [saved(1, "yours"), saved(2, "mine"), Saved { rank: 0, ..mine.clone() }];
    for other in others {
        let directory = Directory::new();
        let disk = directory.open(MIB);
        save(&disk, mine.clone(), b"secret").unwrap();
        drop(disk);
        let name = directory.names().remove(0);
        let named = super::format::Named { id: other.id(), length: 6, sequence: 1 };
        fs::rename(directory.objects().join(name), directory.objects().join(named.name())).unwrap();
        let disk = directory.open(MIB);
        assert_eq!(find(&disk, &other), Some(6), "names are all that a start reads");
        assert_eq!(load(&disk, &other, 6), Ok(None));
        assert_eq!(disk.status().damaged, 1);
    }
}

#[test]
fn a_space_that_is_not_of_the_layout_is_refused() {
    let directory = Directory::new();
    let disk = directory.open(MIB);
    let error = save(&disk, Saved { space: [0; 32], ..saved(1, "") }, b"kv").unwrap_err();
    assert_eq!(error.code, ErrorCode::Internal);
    assert_eq!(disk.status().failed, None);
    save_page(&disk, 1).unwrap();
}

#[test]
fn damage_of_any_kind_is_a_miss_and_counted() {
    let directory = Directory::new();
    let length = 5000;
    let disk = directory.open(MIB);
    save(&disk, saved(1, "salt"), &content(1, length)).unwrap();
    drop(disk);
    let path = directory.objects().join(directory.names().remove(0));
    let whole = fs::read(&path).unwrap();
    assert_eq!(whole.len(), 4096 + 8192);
    let mut damaged: Vec<(String, Vec<u8>)> = Vec::new();
    for at in (0..200).chain([300, 1000, 4095, 4096, 4097, 6000, 8191, 8192, 4096 + 4999]) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        damaged.push((format!("a bit of byte {at}"), bytes));
    }
    for bytes in [0, 1, 100, 4095, 4096, 4097, 8192, 12287] {
        damaged.push((format!("only {bytes} bytes"), whole[..bytes].to_vec()));
    }
    for bytes in [1, 4096, 8192] {
        let longer = [&whole[..], &vec![0; bytes]].concat();
        damaged.push((format!("{bytes} bytes more"), longer));
    }
    damaged.push(("zeroes".into(), vec![0; whole.len()]));
    damaged.push(("the payload zeroed".into(), {
        let mut bytes = whole.clone();
        bytes[4096..].fill(0);
        bytes
    }));
    let two = [&whole[4096..], &whole[..4096]].concat();
    damaged.push(("pages in another order".into(), two));
    for (what, bytes) in damaged {
        fs::write(&path, bytes).unwrap();
        let disk = directory.open(MIB);
        assert_eq!(load(&disk, &saved(1, "salt"), length), Ok(None), "{what}");
        assert_eq!(disk.status().damaged, 1, "{what}");
        assert_eq!(find(&disk, &saved(1, "salt")), None, "{what}");
        disk.flush(soon()).unwrap();
        assert!(!path.exists(), "{what}");
        assert_eq!(disk.status().bytes, 0, "{what}");
    }
    fs::write(&path, whole).unwrap();
    let disk = directory.open(MIB);
    assert_eq!(load(&disk, &saved(1, "salt"), length), Ok(Some(content(1, length))));
}

#[test]
fn what_was_removed_while_it_is_loaded_is_a_miss_and_no_damage() {
    type Is = fn(&Operation) -> bool;
    // Before its file is opened, and when it is open and cannot vanish any more.
    let held: [Is; 2] = [|it| matches!(it, Operation::Open), |it| matches!(it, Operation::Read)];
    for is_held in held {
        let directory = Directory::new();
        let gate = Arc::new(Gate::default());
        let faulty = gated(&directory, &gate, is_held);
        let disk = Disk::open_on(&directory.options(MIB), faulty, Times::default()).unwrap();
        (0..8).for_each(|number| save_page(&disk, number).unwrap());
        gate.shut();
        let answers: Vec<_> =
            (0..8).map(|number| begin_load(&disk, &saved(number, ""), 4096).1).collect();
        gate.wait();
        disk.clear();
        disk.flush(soon()).unwrap();
        gate.open();
        for answer in answers {
            assert_eq!(answer.recv().unwrap().unwrap(), None);
        }
        assert_eq!((disk.status().damaged, disk.status().loads), (0, 0));
    }
}

#[test]
fn a_probe_whose_file_is_gone_counts_no_damage() {
    let directory = Directory::new();
    let disk = directory.open(MIB);
    let layout = Layout {
        model_name: crate::probe::PROBE_MODEL.into(),
        world_size: 1,
        block_size: 1,
        num_layers: 1,
        hidden_dim_size: 4096,
        dtype: Dtype::new("uint8").unwrap(),
        single_plane: true,
        num_physical_slots: Some(1),
    };
    let space = Saved::space_of(&layout, "");
    let probe = Saved { space, layout, ..saved(0, "") };
    save(&disk, probe.clone(), &content(0, 4096)).unwrap();
    fs::remove_file(directory.objects().join(directory.names().remove(0))).unwrap();
    assert_eq!(load(&disk, &probe, 4096), Ok(None));
    assert_eq!(disk.status().damaged, 0);
}

#[test]
fn a_header_of_another_layout_or_salt_than_its_space_is_refused() {
    let directory = Directory::new();
    let disk = directory.open(MIB);
    save_page(&disk, 1).unwrap();
    drop(disk);
    let path = directory.objects().join(directory.names().remove(0));
    let whole = fs::read(&path).unwrap();
    let header = super::format::decode(&whole).unwrap();
    let mut others = [header.saved.clone(), header.saved.clone(), header.saved];
    others[0].layout.num_layers += 1;
    others[1].cache_salt = "other".into();
    for (other, is_there) in others.iter().zip([false, false, true]) {
        let mut bytes = whole.clone();
        super::format::encode(other, header.length, header.checksum, &mut bytes[..4096]);
        fs::write(&path, bytes).unwrap();
        assert_eq!(load_page(&directory.open(MIB), 1), is_there, "{other:?}");
    }
}

#[test]
fn damage_far_into_a_large_object_is_a_miss() {
    let length = 3 * MIB + 100;
    for at in [4096, MIB, MIB + 1, 2 * MIB - 1, 3 * MIB, 3 * MIB + 4096 + 99] {
        let directory = Directory::new();
        let disk = directory.open(16 * MIB);
        save(&disk, saved(1, ""), &content(1, length)).unwrap();
        save(&disk, saved(2, ""), &content(2, length)).unwrap();
        let path = directory.objects().join(directory.names().remove(0));
        let mut bytes = fs::read(&path).unwrap();
        bytes[usize::try_from(at).unwrap()] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert_eq!(load(&disk, &saved(1, ""), length), Ok(None), "byte {at}");
        assert_eq!(disk.status().damaged, 1);
        assert_eq!(load(&disk, &saved(2, ""), length), Ok(Some(content(2, length))));
    }
}

#[test]
fn a_file_that_shrinks_or_goes_under_a_running_disk_is_a_miss() {
    for gone in [false, true] {
        let directory = Directory::new();
        let disk = directory.open(16 * MIB);
        save(&disk, saved(1, ""), &content(1, 2 * MIB)).unwrap();
        let path = directory.objects().join(directory.names().remove(0));
        if gone {
            fs::remove_file(&path).unwrap();
        } else {
            fs::File::options().write(true).open(&path).unwrap().set_len(MIB).unwrap();
        }
        assert_eq!(load(&disk, &saved(1, ""), 2 * MIB), Ok(None));
        disk.flush(soon()).unwrap();
        let status = disk.status();
        assert_eq!((status.damaged, status.objects, status.bytes), (1, 0, 0));
    }
}

#[test]
fn bytes_outside_the_callers_memory_are_the_callers_mistake() {
    let directory = Directory::new();
    let disk = directory.open(MIB);
    let (told, answer) = mpsc::channel();
    let copy = told.clone();
    let done = Box::new(move |result| copy.send(result).unwrap());
    assert!(disk.save(saved(1, ""), memory(&[0; 10]), 5, 10, done));
    assert!(answer.recv().unwrap().is_err());
    let done = Box::new(move |result: Result<()>| told.send(result).unwrap());
    assert!(disk.save(saved(2, ""), memory(&[0; 10]), u64::MAX - 1, 10, done));
    assert!(answer.recv().unwrap().is_err());
    assert_eq!((disk.status().failed, disk.status().bytes), (None, 0));
    save_page(&disk, 1).unwrap();
    let (told, answer) = mpsc::channel();
    let done = Box::new(move |result| told.send(result).unwrap());
    let Saved { chunk, space, rank, .. } = saved(1, "");
    assert!(disk.load((&chunk, &space, rank), memory(&[0; 10]), 0, 4096, done));
    assert!(answer.recv().unwrap().is_err());
    assert!(load(&disk, &saved(1, ""), 4095).is_err(), "it has another length");
    assert!(load_page(&disk, 1), "it is still there");
}

// The directory

#[test]
fn files_of_others_are_left_alone_and_unfinished_ones_go() {
    let directory = Directory::new();
    let disk = directory.open(MIB);
    save_page(&disk, 1).unwrap();
    drop(disk);
    let name = directory.names().remove(0);
    let unfinished = super::format::Named { id: saved(2, "").id(), length: 5, sequence: 9 };
    let put = |name: &str| fs::write(directory.objects().join(name), b"kv").unwrap();
    put(&unfinished.unfinished());
    put("notes.txt");
    put("a.tmp");
    fs::create_dir(directory.objects().join("a-directory")).unwrap();
    #[cfg(unix)]
    {
        let link = super::format::Named { id: saved(3, "").id(), length: 4096, sequence: 10 };
        let to = directory.objects().join(link.name());
        std::os::unix::fs::symlink(directory.objects().join(&name), &to).unwrap();
        let disk = directory.open(MIB);
        assert_eq!(find(&disk, &saved(3, "")), None, "links are no objects");
        drop(disk);
        fs::remove_file(to).unwrap();
    }
    let disk = directory.open(MIB);
    disk.clear();
    disk.flush(soon()).unwrap();
    assert_eq!(directory.names(), ["a-directory", "a.tmp", "notes.txt"]);
}

#[test]
fn files_of_another_version_are_not_served_count_and_go_first() {
    let directory = Directory::new();
    let disk = directory.open(MIB);
    (1..=3).for_each(|number| save_page(&disk, number).unwrap());
    drop(disk);
    for name in directory.names() {
        if name.starts_with("0303") {
            let other = directory.objects().join(name.replace(".kv1", ".kv2"));
            fs::rename(directory.objects().join(name), other).unwrap();
        }
    }
    let disk = directory.open(3 * FILE);
    let status = disk.status();
    assert_eq!((status.objects, status.other_versions, status.bytes), (2, 1, 3 * FILE));
    assert!(!load_page(&disk, 3));
    save_page(&disk, 4).unwrap();
    assert_eq!(found(&disk, 0..9), [1, 2, 4]);
    let status = disk.status();
    assert_eq!((status.other_versions, status.evicted_objects, status.bytes), (0, 1, 3 * FILE));
}

#[test]
fn of_two_files_of_one_object_the_later_counts() {
    let directory = Directory::new();
    let disk = directory.open(MIB);
    save_page(&disk, 1).unwrap();
    drop(disk);
    let name = directory.names().remove(0);
    let later = name.replace("0001.kv1", "0002.kv1");
    fs::copy(directory.objects().join(&name), directory.objects().join(&later)).unwrap();
    let disk = directory.open(MIB);
    assert_eq!(disk.status().objects, 1);
    assert_eq!(directory.names(), [later]);
    save_page(&disk, 2).unwrap();
    assert!(directory.names()[1].ends_with("0003.kv1"), "no name is used twice");
}

#[test]
fn a_start_that_cannot_remove_what_is_left_counts_it_and_goes_on() {
    let directory = Directory::new();
    let disk = directory.open(MIB);
    (0..2).for_each(|number| save_page(&disk, number).unwrap());
    drop(disk);
    let names = directory.names();
    let path = |name: &str| directory.objects().join(name);
    fs::write(path(&names[0].replace("0001.kv1", "0007.kv1.tmp")), b"half of it").unwrap();
    fs::copy(path(&names[0]), path(&names[0].replace("0001.kv1", "0003.kv1"))).unwrap();
    fs::write(path(&names[1].replace("0002.kv1", "0004.kv1")), b"too short").unwrap();
    let stuck = Arc::new(AtomicUsize::new(1));
    let faulty = {
        let stuck = Arc::clone(&stuck);
        Faulty::on(&directory, move |operation| match operation {
            Operation::Remove if stuck.load(Ordering::Relaxed) > 0 => {
                Err(io::Error::other("a damaged inode"))
            }
            _ => Ok(()),
        })
    };
    let bound = 4 * FILE;
    let disk = Disk::open_on(&directory.options(bound), faulty, Times::default()).unwrap();
    let status = disk.status();
    assert_eq!((status.objects, status.other_versions, status.bytes), (2, 3, 3 * FILE + 19));
    assert!(load_page(&disk, 0) && load_page(&disk, 1));
    stuck.store(0, Ordering::Relaxed);
    (2..4).for_each(|number| save_page(&disk, number).unwrap());
    assert_eq!(found(&disk, 0..9), [0, 1, 2, 3], "they go first");
    assert!(directory.names()[2].ends_with("0008.kv1"), "no name is used twice");
}

#[test]
fn one_disk_at_a_time_has_the_directory() {
    let directory = Directory::new();
    let disk = directory.open(MIB);
    let error = Disk::open(&directory.options(MIB)).err().unwrap();
    assert_eq!(error.code, ErrorCode::DiskInUse);
    assert!(error.message.contains(&std::process::id().to_string()), "{error}");
    assert!(error.message.contains(&directory.0.display().to_string()), "{error}");
    disk.close(soon()).unwrap();
    let again = directory.open(MIB);
    disk.close(soon()).unwrap();
    drop(disk);
    assert!(Disk::open(&directory.options(MIB)).is_err(), "the second has it");
    drop(again);
}

#[test]
#[cfg(unix)]
fn directory_and_files_are_their_owners_alone() {
    use std::os::unix::fs::PermissionsExt as _;
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let directory = Directory::new();
    fs::create_dir_all(directory.objects()).unwrap();
    fs::set_permissions(directory.objects(), fs::Permissions::from_mode(0o755)).unwrap();
    let disk = directory.open(MIB);
    save_page(&disk, 1).unwrap();
    assert_eq!(mode(&directory.objects()), 0o700);
    assert_eq!(mode(&directory.objects().join(directory.names().remove(0))), 0o600);
    assert_eq!(mode(&directory.0.join("kvferry.lock")), 0o600);
    drop(disk);
    fs::remove_dir_all(&directory.0).unwrap();
    drop(directory.open(MIB));
    assert_eq!(mode(&directory.0), 0o700);
}

#[test]
fn a_directory_that_cannot_be_is_a_named_error() {
    let directory = Directory::new();
    fs::write(&directory.0, b"a file").unwrap();
    let error = Disk::open(&directory.options(MIB)).err().unwrap();
    assert_eq!(error.code, ErrorCode::System);
    assert!(error.message.contains(&directory.0.display().to_string()), "{error}");
    let error = Disk::open(&directory.options(8191)).err().unwrap();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    fs::remove_file(&directory.0).unwrap();
}

// Bound and order

#[test]
fn what_was_not_used_for_longest_makes_room() {
    let directory = Directory::new();
    let disk = directory.open(4 * FILE);
    (0..4).for_each(|number| save_page(&disk, number).unwrap());
    assert!(load_page(&disk, 0));
    let Saved { chunk, space, rank, .. } = saved(1, "");
    disk.touch(&chunk, &space, rank, Instant::now());
    save_page(&disk, 2).unwrap(); // is there: used
    save_page(&disk, 4).unwrap();
    assert_eq!(found(&disk, 0..9), [0, 1, 2, 4]);
    save(&disk, saved(5, ""), &content(5, 2 * 4096)).unwrap(); // two go for it
    assert_eq!(found(&disk, 0..9), [2, 4, 5]);
    let status = disk.status();
    assert_eq!((status.evicted_objects, status.evicted_bytes), (3, 3 * FILE));
    assert_eq!(status.bytes, 2 * FILE + 3 * 4096);
    assert_eq!(directory.names().len(), 3);
    assert!(begin_save(&disk, saved(6, ""), &content(6, 4 * FILE)).is_none());
    assert_eq!(disk.status().dropped_large, 1);
    assert_eq!(found(&disk, 0..9), [2, 4, 5], "nothing went for what cannot be");
}

#[test]
fn ages_of_what_made_room_go_back_beyond_the_start() {
    let directory = Directory::new();
    let disk = directory.open(2 * FILE);
    (0..2).for_each(|number| save_page(&disk, number).unwrap());
    drop(disk);
    let hour = Duration::from_secs(3600);
    for name in directory.names() {
        let file = fs::File::options().write(true).open(directory.objects().join(name)).unwrap();
        file.set_modified(SystemTime::now() - 2 * hour).unwrap();
    }
    let disk = directory.open(2 * FILE);
    let Saved { chunk, space, rank, .. } = saved(0, "");
    disk.touch(&chunk, &space, rank, Instant::now());
    save_page(&disk, 2).unwrap();
    let ages = disk.status().evicted_ages;
    assert!(ages.sum() >= 2 * hour && ages.cumulative()[5..7] == [0, 1], "{ages:?}");
    save_page(&disk, 3).unwrap();
    let ages = disk.status().evicted_ages;
    assert!(ages.sum() < 3 * hour && ages.cumulative()[10] == 2, "the use counts: {ages:?}");
}

#[test]
fn the_directory_never_holds_more_than_the_bound() {
    let directory = Directory::new();
    let most = Arc::new(AtomicU64::new(0));
    let faulty = {
        let (most, objects) = (Arc::clone(&most), directory.objects());
        Faulty::on(&directory, move |operation| {
            if matches!(operation, Operation::SyncFile | Operation::Rename) {
                let bytes = |entry: io::Result<fs::DirEntry>| {
                    entry.ok().and_then(|it| it.metadata().ok()).map_or(0, |it| it.len())
                };
                let all = fs::read_dir(&objects).unwrap().map(bytes).sum();
                most.fetch_max(all, Ordering::Relaxed);
            }
            Ok(())
        })
    };
    let disk = Disk::open_on(&directory.options(10 * FILE), faulty, Times::default()).unwrap();
    let answers: Vec<_> = (0..200)
        .filter_map(|number| {
            begin_save(&disk, saved(number, ""), &content(number, 4096 * u64::from(number % 5)))
        })
        .collect();
    answers.into_iter().for_each(|answer| answer.recv().unwrap().unwrap());
    let most = most.load(Ordering::Relaxed);
    assert!(most <= 10 * FILE && most > 8 * FILE, "{most} bytes");
}

#[test]
fn a_smaller_bound_holds_from_the_start() {
    let directory = Directory::new();
    let disk = directory.open(MIB);
    (0..6).for_each(|number| save_page(&disk, number).unwrap());
    drop(disk);
    let disk = directory.open(2 * FILE);
    assert_eq!(found(&disk, 0..9), [4, 5]);
    assert_eq!(directory.names().len(), 2);
    assert_eq!(disk.status().evicted_objects, 4);
}

#[test]
fn a_restart_knows_what_was_loaded_last() {
    let directory = Directory::new();
    let times = Times { stamp: Duration::ZERO, ..Times::default() };
    let files = Arc::new(SystemFiles::new(directory.0.clone()));
    let disk = Disk::open_on(&directory.options(MIB), files, times).unwrap();
    for number in 0..3 {
        save_page(&disk, number).unwrap();
    }
    std::thread::sleep(Duration::from_millis(20)); // file systems' clocks are coarse
    assert!(load_page(&disk, 0));
    drop(disk);
    let disk = directory.open(2 * FILE);
    assert_eq!(found(&disk, 0..9), [0, 2]);
}

#[test]
fn what_a_load_waits_for_is_not_evicted() {
    let directory = Directory::new();
    let gate = Arc::new(Gate::default());
    let faulty = gated(&directory, &gate, |operation| matches!(operation, Operation::Open));
    let times = Times { pause: Duration::ZERO, ..Times::default() };
    let disk = Disk::open_on(&directory.options(3 * FILE), faulty, times).unwrap();
    (0..3).for_each(|number| save_page(&disk, number).unwrap());
    gate.shut();
    let (_, answer) = begin_load(&disk, &saved(0, ""), 4096);
    (3..9).for_each(|number| save_page(&disk, number).unwrap());
    assert_eq!(found(&disk, 0..9), [0, 7, 8]);
    gate.open();
    assert!(answer.recv().unwrap().unwrap().is_some());
    assert!(load_page(&disk, 0));
    (3..7).for_each(|number| save_page(&disk, number).unwrap());
    assert_eq!(found(&disk, 0..9), [4, 5, 6], "afterwards it may go");
}

#[test]
fn a_disk_of_one_object_takes_one_after_the_other() {
    let directory = Directory::new();
    let disk = directory.open(FILE);
    let answers: Vec<_> = (0..20)
        .filter_map(|number| begin_save(&disk, saved(number, ""), &content(number, 4096)))
        .collect();
    assert_eq!(answers.len(), 20);
    answers.into_iter().for_each(|answer| answer.recv().unwrap().unwrap());
    assert_eq!(disk.status().objects, 1);
    assert_eq!(directory.names().len(), 1);
}

// Queues

#[test]
fn the_queue_of_saves_is_bounded_and_drops_are_counted() {
    let directory = Directory::new();
    let gate = Arc::new(Gate::default());
    let faulty = gated_saves(&directory, &gate);
    let mut options = directory.options(MIB);
    options.queue_bytes = 5 * 4096;
    let disk = Disk::open_on(&options, faulty, Times::default()).unwrap();
    gate.shut();
    let answers: Vec<_> = (0..8)
        .filter_map(|number| begin_save(&disk, saved(number, ""), &content(number, 4096)))
        .collect();
    assert_eq!(answers.len(), 5);
    let status = disk.status();
    assert_eq!((status.dropped_full, status.queue_bytes), (3, 5 * 4096));
    gate.open();
    answers.into_iter().for_each(|answer| answer.recv().unwrap().unwrap());
    disk.flush(soon()).unwrap();
    assert_eq!(disk.status().queue_bytes, 0);
    assert_eq!(found(&disk, 0..9), [0, 1, 2, 3, 4]);
    gate.shut();
    let larger = begin_save(&disk, saved(9, ""), &content(9, 6 * 4096)).unwrap();
    assert!(begin_save(&disk, saved(8, ""), &content(8, 4096)).is_none(), "it waits alone");
    gate.open();
    larger.recv().unwrap().unwrap();
    let status = disk.status();
    assert_eq!((status.dropped_full, status.dropped_large), (4, 0));
}

#[test]
fn bytes_of_another_checksum_than_they_had_are_not_saved() {
    let directory = Directory::new();
    let gate = Arc::new(Gate::default());
    let disk = Disk::open_on(
        &directory.options(16 * MIB),
        gated_saves(&directory, &gate),
        Times::default(),
    )
    .unwrap();
    for length in [1, 4096, MIB - 4096, MIB, 2 * MIB + 1] {
        let bytes = content(1, length);
        let sum = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, &bytes);
        let begin = |bytes: &[u8]| {
            let (told, answer) = mpsc::channel();
            let done = Box::new(move |result: Result<bool>| told.send(result).unwrap());
            let memory = memory(bytes);
            assert!(disk.save_summed(saved(1, ""), memory, (0, length), Some(sum), done));
            answer
        };
        let mut damaged = bytes.clone();
        damaged[usize::try_from(length).unwrap() - 1] ^= 1;
        gate.shut();
        let bad = begin(&damaged);
        let good = begin(&bytes); // waits for the other, which is of the same object
        gate.open();
        assert_eq!((bad.recv().unwrap(), good.recv().unwrap()), (Ok(false), Ok(true)));
        assert_eq!(load(&disk, &saved(1, ""), length), Ok(Some(bytes)));
        let Saved { chunk, space, rank, .. } = saved(1, "");
        disk.remove(&chunk, &space, rank);
        disk.flush(soon()).unwrap();
        assert!(directory.names().is_empty());
    }
    let status = disk.status();
    assert_eq!((status.dropped_damaged, status.save_failures, status.saves), (5, 0, 5));
    assert_eq!((status.failed, status.bytes, status.queue_bytes), (None, 0, 0));
}

#[test]
fn saves_wait_while_loads_run_but_not_for_ever() {
    let directory = Directory::new();
    let gate = Arc::new(Gate::default());
    let log = Arc::new(Mutex::new(Vec::new()));
    let faulty = {
        let (gate, log) = (Arc::clone(&gate), Arc::clone(&log));
        Faulty::on(&directory, move |operation| {
            match operation {
                Operation::Open => gate.pass(),
                Operation::Write => log.lock().unwrap().push("write"),
                Operation::Read => log.lock().unwrap().push("read"),
                _ => {}
            }
            Ok(())
        })
    };
    let times = Times { pause: Duration::from_millis(300), ..Times::default() };
    let disk = Disk::open_on(&directory.options(MIB), faulty, times).unwrap();
    save_page(&disk, 0).unwrap();
    log.lock().unwrap().clear();
    gate.shut();
    let loads: Vec<_> = (0..4).map(|_| begin_load(&disk, &saved(0, ""), 4096)).collect();
    let answer = begin_save(&disk, saved(1, ""), &content(1, 4096)).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert!(log.lock().unwrap().is_empty(), "the save waits");
    gate.open();
    loads.iter().for_each(|(_, answer)| assert!(answer.recv().unwrap().unwrap().is_some()));
    answer.recv().unwrap().unwrap();
    assert_eq!(*log.lock().unwrap(), ["read", "read", "read", "read", "write"]);
    gate.shut();
    let (_, held) = begin_load(&disk, &saved(0, ""), 4096);
    save_page(&disk, 2).unwrap(); // though the load still runs
    gate.open();
    assert!(held.recv().unwrap().unwrap().is_some());
}

#[test]
fn an_object_is_written_once_however_often_it_is_saved() {
    let directory = Directory::new();
    let gate = Arc::new(Gate::default());
    let disk =
        Disk::open_on(&directory.options(MIB), gated_saves(&directory, &gate), Times::default())
            .unwrap();
    gate.shut();
    let answers: Vec<_> = (0..6)
        .filter_map(|_| {
            std::thread::sleep(Duration::from_millis(5)); // some find it being written
            begin_save(&disk, saved(1, ""), &content(1, 4096))
        })
        .collect();
    gate.open();
    assert_eq!(answers.len(), 6);
    answers.into_iter().for_each(|answer| answer.recv().unwrap().unwrap());
    save_page(&disk, 1).unwrap();
    disk.flush(soon()).unwrap();
    let status = disk.status();
    assert_eq!((status.saves, status.objects, status.queue_bytes), (1, 1, 0));
    assert_eq!(directory.names().len(), 1);
}

#[test]
fn a_removal_overtakes_saves_and_is_for_good() {
    let directory = Directory::new();
    let gate = Arc::new(Gate::default());
    let disk =
        Disk::open_on(&directory.options(MIB), gated_saves(&directory, &gate), Times::default())
            .unwrap();
    save_page(&disk, 0).unwrap();
    gate.shut();
    let waiting: Vec<_> = (1..4)
        .filter_map(|number| begin_save(&disk, saved(number, ""), &content(number, 4096)))
        .collect();
    std::thread::sleep(Duration::from_millis(20)); // they are being written
    let remove = |number| {
        let Saved { chunk, space, rank, .. } = saved(number, "");
        disk.remove(&chunk, &space, rank);
    };
    remove(0);
    remove(1);
    let again = begin_save(&disk, saved(1, ""), &content(1, 4096)).unwrap();
    let twice = begin_save(&disk, saved(2, ""), &content(2, 4096)).unwrap();
    remove(2);
    assert_eq!(found(&disk, 0..9), [0; 0]);
    gate.open();
    let results: Vec<_> = waiting.iter().map(|answer| answer.recv().unwrap()).collect();
    let aborted =
        |result: &Result<()>| result.as_ref().is_err_and(|error| error.code == ErrorCode::Aborted);
    assert!(aborted(&results[0]) && aborted(&results[1]) && results[2].is_ok(), "{results:?}");
    again.recv().unwrap().unwrap();
    assert!(aborted(&twice.recv().unwrap()));
    disk.flush(soon()).unwrap();
    assert_eq!(found(&disk, 0..9), [1, 3]);
    assert_eq!(disk.status().bytes, 2 * FILE);
    drop(disk);
    let disk = directory.open(MIB);
    assert_eq!(found(&disk, 0..9), [1, 3]);
    assert!(load_page(&disk, 1) && load_page(&disk, 3));
    disk.clear();
    assert_eq!(found(&disk, 0..9), [0; 0]);
    disk.flush(soon()).unwrap();
    assert_eq!((disk.status().bytes, directory.names().len()), (0, 0));
    assert_eq!(disk.status().save_failures, 0);
}

#[test]
fn a_flush_waits_for_what_was_accepted_and_has_a_deadline() {
    let directory = Directory::new();
    let gate = Arc::new(Gate::default());
    let disk =
        Disk::open_on(&directory.options(MIB), gated_saves(&directory, &gate), Times::default())
            .unwrap();
    gate.shut();
    let answer = begin_save(&disk, saved(1, ""), &content(1, 4096)).unwrap();
    let error = disk.flush(Instant::now() + Duration::from_millis(20)).unwrap_err();
    assert_eq!(error.code, ErrorCode::Timeout);
    gate.open();
    disk.flush(soon()).unwrap();
    answer.try_recv().unwrap().unwrap(); // its callback has been called
    drop(disk);
    assert_eq!(found(&directory.open(MIB), 0..9), [1]);
}

#[test]
fn a_close_ends_every_operation_once() {
    let directory = Directory::new();
    let gate = Arc::new(Gate::default());
    let disk = Disk::open_on(
        &directory.options(16 * MIB),
        gated_saves(&directory, &gate),
        Times::default(),
    )
    .unwrap();
    save_page(&disk, 0).unwrap();
    gate.shut();
    let begin = |number| begin_save(&disk, saved(number, ""), &content(number, 4096)).unwrap();
    let mut answers = vec![begin(1)];
    std::thread::sleep(Duration::from_millis(50)); // the first is being written
    answers.extend((2..200).map(begin));
    let loads: Vec<_> = (0..100).map(|_| begin_load(&disk, &saved(0, ""), 4096).1).collect();
    let error = disk.close(Instant::now() + Duration::from_millis(20)).unwrap_err();
    assert_eq!(error.code, ErrorCode::Timeout);
    assert!(begin_save(&disk, saved(9, ""), b"late").is_none());
    gate.open();
    disk.close(soon()).unwrap();
    disk.close(Instant::now()).unwrap();
    let closed = |code| code == ErrorCode::Closed;
    answers[0].try_recv().unwrap().unwrap(); // was under way: finished
    let ends: Vec<_> = answers[1..].iter().map(|it| it.try_recv().unwrap()).collect();
    assert!(ends.iter().any(|end| end.as_ref().is_err_and(|error| closed(error.code))));
    let durable = 2 + ends.iter().filter(|end| end.is_ok()).count();
    for load in loads {
        match load.try_recv().unwrap() {
            Ok(loaded) => assert!(loaded.is_some()),
            Err(error) => assert!(closed(error.code)),
        }
        assert!(load.try_recv().is_err(), "once");
    }
    assert!(disk.flush(soon()).is_ok());
    drop(disk);
    assert_eq!(directory.open(16 * MIB).status().objects, durable as u64);
}

#[test]
fn the_last_handle_may_go_in_a_callback_and_callbacks_may_panic() {
    let directory = Directory::new();
    let disk = Arc::new(directory.open(MIB));
    for number in 0..6 {
        let done = Box::new(|_| panic!("a caller's mistake, on purpose"));
        assert!(disk.save(saved(number, ""), memory(b"kv"), 0, 2, done));
    }
    disk.flush(soon()).unwrap();
    save_page(&disk, 6).unwrap();
    let (told, answer) = mpsc::channel();
    let handle = Arc::clone(&disk);
    let (go, wait) = mpsc::channel::<()>();
    let done = Box::new(move |_| {
        wait.recv().unwrap();
        let begun = Instant::now();
        drop(handle);
        told.send(begun.elapsed()).unwrap();
    });
    assert!(disk.save(saved(7, ""), memory(b"kv"), 0, 2, done));
    drop(disk);
    go.send(()).unwrap();
    assert!(answer.recv().unwrap() < Duration::from_secs(5), "it does not wait for itself");
}

// Failures

#[test]
fn a_failing_disk_says_so_serves_what_it_can_and_recovers() {
    type Which = fn(&Operation) -> bool;
    let steps: [(&str, Which); 6] = [
        ("create", |operation| matches!(operation, Operation::Create)),
        ("write", |operation| matches!(operation, Operation::Write)),
        ("sync", |operation| matches!(operation, Operation::SyncFile)),
        ("rename", |operation| matches!(operation, Operation::Rename)),
        ("directory", |operation| matches!(operation, Operation::Sync)),
        ("prepare", |operation| matches!(operation, Operation::Create | Operation::Prepare)),
    ];
    for (step, which) in steps {
        for kind in [io::ErrorKind::ReadOnlyFilesystem, io::ErrorKind::Other] {
            let directory = Directory::new();
            let failing = Arc::new(AtomicUsize::new(0));
            let faulty = {
                let failing = Arc::clone(&failing);
                Faulty::on(&directory, move |operation| {
                    if failing.load(Ordering::Relaxed) > 0 && which(operation) {
                        return Err(io::Error::from(kind));
                    }
                    Ok(())
                })
            };
            let times = Times {
                retry: Duration::from_millis(200),
                retry_most: Duration::from_millis(400),
                ..Times::default()
            };
            let disk = Disk::open_on(&directory.options(MIB), faulty, times).unwrap();
            save_page(&disk, 0).unwrap();
            failing.store(1, Ordering::Relaxed);
            let error = save_page(&disk, 1).unwrap_err();
            assert!(error.message.contains(&directory.objects().display().to_string()), "{error}");
            let status = disk.status();
            assert_eq!(status.failed.as_ref(), Some(&error.message), "{step}");
            assert_eq!((status.save_failures, status.bytes), (1, FILE), "{step}");
            assert!(begin_save(&disk, saved(2, ""), b"kv").is_none(), "{step}");
            assert_eq!(disk.status().dropped_failed, 1, "{step}");
            assert!(load_page(&disk, 0), "{step}: loads go on");
            assert_eq!(found(&disk, 0..9), [0], "{step}");
            std::thread::sleep(Duration::from_millis(250));
            assert!(save_page(&disk, 1).is_err(), "{step}: a trial");
            std::thread::sleep(Duration::from_millis(250));
            assert!(begin_save(&disk, saved(2, ""), b"kv").is_none(), "{step}: it waits longer");
            failing.store(0, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(250));
            save_page(&disk, 1).unwrap();
            assert_eq!(disk.status().failed, None, "{step}");
            save_page(&disk, 2).unwrap();
            assert_eq!(directory.names().len(), 3, "{step}: nothing unfinished is left");
            drop(disk);
            assert_eq!(found(&directory.open(MIB), 0..9), [0, 1, 2], "{step}");
        }
    }
}

#[test]
fn saves_that_wait_when_the_disk_fails_end_with_the_reason() {
    let directory = Directory::new();
    let gate = Arc::new(Gate::default());
    let faulty = {
        let gate = Arc::clone(&gate);
        Faulty::on(&directory, move |operation| match operation {
            Operation::Create => {
                gate.pass();
                Err(io::Error::other("on purpose"))
            }
            _ => Ok(()),
        })
    };
    let disk = Disk::open_on(&directory.options(MIB), faulty, Times::default()).unwrap();
    gate.shut();
    let answers: Vec<_> = (0..200)
        .filter_map(|number| begin_save(&disk, saved(number, ""), &content(number, 100)))
        .collect();
    assert_eq!(answers.len(), 200);
    gate.open();
    for answer in answers {
        let error = answer.recv().unwrap().unwrap_err();
        assert!(error.message.contains("on purpose"), "{error}");
    }
    disk.flush(soon()).unwrap();
    let status = disk.status();
    assert_eq!((status.save_failures, status.bytes, status.queue_bytes), (200, 0, 0));
}

#[test]
fn a_full_file_system_makes_the_disk_smaller_for_a_while() {
    let directory = Directory::new();
    let room = Arc::new(AtomicU64::new(5 * FILE));
    let faulty = {
        let (room, objects) = (Arc::clone(&room), directory.objects());
        Faulty::on(&directory, move |operation| {
            if let Operation::Write = operation {
                let bytes = |entry: io::Result<fs::DirEntry>| {
                    entry.ok().and_then(|it| it.metadata().ok()).map_or(0, |it| it.len())
                };
                let used: u64 = fs::read_dir(&objects).unwrap().map(bytes).sum();
                if used + FILE > room.load(Ordering::Relaxed) {
                    return Err(io::ErrorKind::StorageFull.into());
                }
            }
            Ok(())
        })
    };
    let times = Times {
        shrunk: Duration::from_millis(300),
        retry: Duration::from_millis(20),
        ..Times::default()
    };
    let disk = Disk::open_on(&directory.options(8 * FILE), faulty, times).unwrap();
    (0..9).for_each(|number| save_page(&disk, number).unwrap());
    assert_eq!(found(&disk, 0..9), [4, 5, 6, 7, 8]);
    let status = disk.status();
    assert_eq!((status.capacity, status.failed, status.save_failures), (5 * FILE, None, 0));
    assert_eq!(status.bound, 8 * FILE);
    assert_eq!(status.evicted_objects, 4);
    room.store(0, Ordering::Relaxed); // others take everything
    let error = save_page(&disk, 9).unwrap_err();
    assert!(error.message.contains("free some space"), "{error}");
    assert!(disk.status().failed.is_some());
    assert!(load_page(&disk, 8), "what is left is served");
    room.store(u64::MAX, Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(320));
    (10..20).for_each(|number| save_page(&disk, number).unwrap());
    let status = disk.status();
    assert_eq!((status.capacity, status.failed, status.objects), (8 * FILE, None, 8));
}

#[test]
fn a_directory_that_was_removed_is_made_anew() {
    let directory = Directory::new();
    let times = Times { retry: Duration::from_millis(20), ..Times::default() };
    let files = Arc::new(SystemFiles::new(directory.0.clone()));
    let disk = Disk::open_on(&directory.options(MIB), files, times).unwrap();
    save_page(&disk, 0).unwrap();
    fs::remove_dir_all(&directory.0).unwrap();
    let error = save_page(&disk, 1).unwrap_err();
    assert!(error.message.contains("directory is gone"), "{error}");
    assert!(!load_page(&disk, 0));
    std::thread::sleep(Duration::from_millis(30));
    save_page(&disk, 1).unwrap();
    assert!(load_page(&disk, 1));
    let status = disk.status();
    assert_eq!((status.failed, status.objects, status.bytes), (None, 1, FILE));
    let error = Disk::open(&directory.options(MIB)).err().unwrap();
    assert_eq!(error.code, ErrorCode::DiskInUse, "the new directory is taken too");
}

#[test]
fn a_load_that_the_system_fails_is_an_error_and_forgets_the_object() {
    let directory = Directory::new();
    let faulty = Faulty::on(&directory, |operation| match operation {
        Operation::Read => Err(io::Error::other("on purpose")),
        _ => Ok(()),
    });
    let disk = Disk::open_on(&directory.options(MIB), faulty, Times::default()).unwrap();
    save_page(&disk, 0).unwrap();
    assert!(load(&disk, &saved(0, ""), 4096).is_err());
    disk.flush(soon()).unwrap();
    let status = disk.status();
    assert_eq!((status.load_failures, status.damaged, status.bytes), (1, 0, 0));
    let directory = Directory::new();
    let faulty = Faulty::on(&directory, |operation| match operation {
        Operation::Open => Err(io::Error::other("too many open files, say")),
        _ => Ok(()),
    });
    let disk = Disk::open_on(&directory.options(MIB), faulty, Times::default()).unwrap();
    save_page(&disk, 0).unwrap();
    assert!(load(&disk, &saved(0, ""), 4096).is_err());
    assert_eq!(found(&disk, 0..9), [0], "the file may be whole");
}

#[test]
fn a_way_of_reading_that_the_system_refuses_forgets_no_object() {
    let directory = Directory::new();
    let faulty = Faulty::on(&directory, |operation| match operation {
        Operation::Read => Err(io::ErrorKind::InvalidInput.into()),
        _ => Ok(()),
    });
    let disk = Disk::open_on(&directory.options(MIB), faulty, Times::default()).unwrap();
    save_page(&disk, 0).unwrap();
    assert!(load(&disk, &saved(0, ""), 4096).is_err());
    assert_eq!(found(&disk, 0..9), [0]);
    drop(disk);
    assert!(load_page(&directory.open(MIB), 0), "its file is whole");
}

#[test]
fn a_probe_that_a_former_start_left_changes_nothing() {
    let directory = Directory::new();
    let is_direct = directory.open(MIB).is_direct();
    fs::write(directory.objects().join("probe.tmp"), b"half").unwrap();
    assert_eq!(directory.open(MIB).is_direct(), is_direct);
    assert!(directory.names().is_empty());
}

#[test]
fn a_probe_that_cannot_be_made_leaves_files_buffered() {
    let directory = Directory::new();
    drop(directory.open(MIB));
    fs::create_dir(directory.objects().join("probe.tmp")).unwrap();
    let disk = directory.open(MIB);
    assert!(!disk.is_direct(), "nobody saw it work");
    save_page(&disk, 0).unwrap();
    assert!(load_page(&disk, 0));
}

#[test]
fn a_file_that_could_not_be_made_takes_no_room() {
    let directory = Directory::new();
    let failing = Arc::new(AtomicUsize::new(0));
    let faulty = {
        let failing = Arc::clone(&failing);
        Faulty::on(&directory, move |operation| match operation {
            // As on a file system that was remounted read-only.
            Operation::Create | Operation::Remove if failing.load(Ordering::Relaxed) > 0 => {
                Err(io::ErrorKind::ReadOnlyFilesystem.into())
            }
            _ => Ok(()),
        })
    };
    let retry = Duration::from_millis(1);
    let times = Times { retry, retry_most: retry, ..Times::default() };
    let disk = Disk::open_on(&directory.options(4 * FILE), faulty, times).unwrap();
    (0..2).for_each(|number| save_page(&disk, number).unwrap());
    failing.store(1, Ordering::Relaxed);
    for number in 2..9 {
        assert!(save_page(&disk, number).is_err());
        std::thread::sleep(Duration::from_millis(2));
    }
    let status = disk.status();
    assert_eq!((status.bytes, status.other_versions), (2 * FILE, 0));
    failing.store(0, Ordering::Relaxed);
    (2..4).for_each(|number| save_page(&disk, number).unwrap());
    assert_eq!(found(&disk, 0..9), [0, 1, 2, 3], "nothing went for files that never were");
}
