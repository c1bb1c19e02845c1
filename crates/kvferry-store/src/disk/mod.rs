//! The disk: objects in files of one directory, bounded by bytes.
//!
//! Each object is a file of its own. It is written under another name, synced, renamed and the directory synced,
//! so that whatever stops in between leaves a whole object or none; every load compares the checksum. Names hold
//! the identities: a restart reads the directory and no file. `docs/disk.md` has the reasons and the figures.
//!
//! One lock guards the bookkeeping, and is held across no I/O. Loads and saves have threads of their own, and
//! saves pause where loads are waiting.

mod ahead;
mod buffer;
mod cleared;
pub(crate) mod files;
pub(crate) mod format;
mod health;
mod index;
mod load;
#[cfg(test)]
mod power;
mod save;
pub(crate) mod shared;
#[cfg(test)]
pub(crate) mod tests;
mod watched;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use kvferry_core::cache::Memory;
use kvferry_core::key::Layout;
use kvferry_core::{Error, Result};

use crate::ages::Ages;
use crate::index::ObjectId;
use crate::tiers::Tier;
use files::{Files, SystemFiles};
use format::{Kind, PAGE, kind};
use shared::{Cleared, LoadTask, SaveTask, Shared, State};

/// Threads that save: while some wait for a sync, others write.
const SAVERS: usize = 4;
/// Threads that load, each with one that reads ahead.
const LOADERS: usize = 2;
/// Bytes of one transfer.
const PART: usize = 1 << 20;
/// Bytes that are summed and copied at a time: the processor's cache holds them in between.
const STEP: usize = 128 << 10;
/// How long a drop waits for what is under way.
const DROP_WAIT: Duration = Duration::from_secs(10);

/// How a disk is set up.
#[derive(Debug, Clone)]
pub struct DiskOptions {
    /// The directory; made if it is not there. One process at a time has it.
    pub dir: PathBuf,
    /// Bytes that its files may take, headers included; 8192 or more.
    pub bytes: u64,
    /// Bytes of saves that may wait; one object may, however large. Default 256 MiB; a store takes half of
    /// its memory instead.
    pub queue_bytes: u64,
}

impl DiskOptions {
    /// A directory that may grow to `bytes`.
    pub fn new(dir: impl Into<PathBuf>, bytes: u64) -> Self {
        Self { dir: dir.into(), bytes, queue_bytes: 256 << 20 }
    }
}

/// What an object is, apart from its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// The chunk's chained hash.
    pub chunk: [u8; 32],
    /// [`Saved::space_of`] its layout and salt.
    pub space: [u8; 32],
    /// KV rank.
    pub rank: u32,
    /// The chunk before it.
    pub parent: Option<[u8; 32]>,
    /// Model and shape.
    pub layout: Layout,
    /// The tenant; empty means none.
    pub cache_salt: String,
}

impl Saved {
    /// What, besides its tokens, tells an object from others.
    pub fn space_of(layout: &Layout, cache_salt: &str) -> [u8; 32] {
        crate::space::space(layout, cache_salt)
    }

    pub(crate) fn id(&self) -> ObjectId {
        ObjectId { chunk: self.chunk, space: self.space, rank: self.rank }
    }
}

/// An object that came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// CRC-64/NVME of its bytes, compared with what was written.
    pub checksum: u64,
    /// The chunk before it, as it was saved.
    pub parent: Option<[u8; 32]>,
}

/// What becomes of a save: `Ok` when it outlives a power loss. Called once, on a thread of the disk.
pub type SaveDone = Box<dyn FnOnce(Result<()>) + Send>;
/// The same, of bytes whose checksum is known: `Ok(false)` when they have another one.
pub(crate) type SummedDone = Box<dyn FnOnce(Result<bool>) + Send>;
/// What becomes of a load: `Ok(None)` when the object is not there, or was damaged. Called once, on a thread of
/// the disk.
pub type LoadDone = Box<dyn FnOnce(Result<Option<Loaded>>) + Send>;

/// What a disk has, did and could not do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskStatus {
    /// Objects that loads find.
    pub objects: u64,
    /// Bytes of all files: those of other versions, being written and on their way out included.
    pub bytes: u64,
    /// Bytes that they may take where the file system has room for them.
    pub bound: u64,
    /// Bytes that they may take now: the bound, or less while the file system has less room.
    pub capacity: u64,
    /// Bytes of saves that are waiting or being written.
    pub queue_bytes: u64,
    /// Those saves.
    pub queue_saves: u64,
    /// Loads that are waiting or running.
    pub queue_loads: u64,
    /// Objects written.
    pub saves: u64,
    /// Accepted saves that failed; those that a removal or the end overtook are not among them.
    pub save_failures: u64,
    /// Saves refused because the queue was full.
    pub dropped_full: u64,
    /// Saves refused because the disk had failed, or hung.
    pub dropped_failed: u64,
    /// Saves refused because the object is larger than the disk.
    pub dropped_large: u64,
    /// Saves refused because the bytes had another checksum than they were stored with.
    pub dropped_damaged: u64,
    /// Loads refused because too many were waiting, or the disk hung.
    pub refused_loads: u64,
    /// Objects loaded.
    pub loads: u64,
    /// Loads that the system failed.
    pub load_failures: u64,
    /// Objects whose file was not what was written: misses, and removed.
    pub damaged: u64,
    /// Objects that made room, and files of other versions.
    pub evicted_objects: u64,
    /// Their bytes.
    pub evicted_bytes: u64,
    /// For how long the objects among them had not been used.
    pub evicted_ages: Ages,
    /// Bytes of files written.
    pub written_bytes: u64,
    /// Bytes of files read.
    pub read_bytes: u64,
    /// Files of other versions of the format that are still there, and those that nobody needs and that could not be removed.
    pub other_versions: u64,
    /// Why saves are refused just now; where the disk hangs, loads are, too.
    pub failed: Option<String>,
}

impl DiskStatus {
    /// The numbers, by the names that operators see.
    pub fn figures(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("disk_bytes", self.capacity),
            ("disk_bound_bytes", self.bound),
            ("disk_used_bytes", self.bytes),
            ("disk_objects", self.objects),
            ("disk_queue_bytes", self.queue_bytes),
            ("disk_queue_saves", self.queue_saves),
            ("disk_queue_loads", self.queue_loads),
            ("disk_saves", self.saves),
            ("disk_save_failures", self.save_failures),
            ("disk_dropped_full", self.dropped_full),
            ("disk_dropped_failed", self.dropped_failed),
            ("disk_dropped_large", self.dropped_large),
            ("disk_dropped_damaged", self.dropped_damaged),
            ("disk_refused_loads", self.refused_loads),
            ("disk_loads", self.loads),
            ("disk_load_failures", self.load_failures),
            ("disk_damaged", self.damaged),
            ("disk_evicted_objects", self.evicted_objects),
            ("disk_evicted_bytes", self.evicted_bytes),
            ("disk_written_bytes", self.written_bytes),
            ("disk_read_bytes", self.read_bytes),
        ]
    }
}

/// The times of a disk, which tests make shorter.
#[derive(Debug, Clone)]
pub(crate) struct Times {
    /// After the first failure nothing is saved for this long; twice as long after each further one.
    pub(crate) retry: Duration,
    /// At most this long.
    pub(crate) retry_most: Duration,
    /// How long less room than the bound is taken for granted.
    pub(crate) shrunk: Duration,
    /// What loads may hold up each part of a save.
    pub(crate) pause: Duration,
    /// A load writes the file's time when that is older than this.
    pub(crate) stamp: Duration,
    /// A file operation that takes longer stands for a disk that hangs.
    pub(crate) hang: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Self {
            retry: Duration::from_secs(1),
            retry_most: Duration::from_secs(60),
            shrunk: Duration::from_secs(60),
            pause: Duration::from_millis(20),
            stamp: Duration::from_secs(600),
            hang: Duration::from_secs(10),
        }
    }
}

/// Objects in a directory. Dropping it ends it as [`Disk::close`] does, waiting for ten seconds at most.
pub struct Disk {
    shared: Arc<Shared>,
}

impl Disk {
    /// Takes the directory, and knows afterwards what is in it. Files that are not the disk's are left alone.
    ///
    /// # Errors
    /// [`kvferry_core::ErrorCode::DiskInUse`] when another process has the directory, [`kvferry_core::ErrorCode::System`] when it
    /// cannot be written, [`kvferry_core::ErrorCode::InvalidArgument`] for a bound that holds no object.
    pub fn open(options: &DiskOptions) -> Result<Self> {
        let files = Arc::new(SystemFiles::new(options.dir.clone()));
        Self::open_on(options, files, Times::default())
    }

    pub(crate) fn open_on(
        options: &DiskOptions,
        files: Arc<dyn Files>,
        times: Times,
    ) -> Result<Self> {
        if options.bytes < 2 * PAGE {
            return Err(Error::invalid(format!(
                "a disk of {} bytes holds no object; give it {} or more",
                options.bytes,
                2 * PAGE
            )));
        }
        files.prepare()?;
        files.probe();
        let mut state = State::default();
        state.sequence = read_directory(&*files, &mut state)?;
        let shared = Arc::new(Shared::new(options, files, times, state));
        shared.shrink_to_bound();
        let disk = Self { shared };
        for (count, name, work) in [
            (LOADERS, "kvferry-load", load::run as fn(&Shared)),
            (SAVERS, "kvferry-save", save::run as fn(&Shared)),
        ] {
            for _ in 0..count {
                let shared = Arc::clone(&disk.shared);
                disk.shared.lock().threads += 1;
                let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
                    let _present = shared.present();
                    work(&shared);
                });
                if let Err(error) = thread {
                    disk.shared.lock().threads -= 1;
                    return Err(Error::system("cannot start a thread of the disk", &error));
                }
            }
        }
        Ok(disk)
    }

    /// The object's bytes if it can be loaded: not while a file operation has been under way for ten seconds, which others
    /// would wait behind. No I/O.
    pub fn find(&self, chunk: &[u8; 32], space: &[u8; 32], rank: u32) -> Option<u64> {
        let id = ObjectId { chunk: *chunk, space: *space, rank };
        let state = self.shared.lock();
        let object = state.index.get(&id).filter(|_| !state.closing && !self.shared.hangs());
        object.map(|object| object.named.length)
    }

    /// Saves `length` bytes at `offset`, which must stay until `done` is called. An object that is there already is
    /// `Ok` at once. `false`: it is not saved, counted, and `done` is not called.
    #[must_use = "a save that was refused calls nothing back"]
    pub fn save(
        &self,
        saved: Saved,
        memory: Arc<dyn Memory>,
        offset: u64,
        length: u64,
        done: SaveDone,
    ) -> bool {
        let done = Box::new(move |saved: Result<bool>| done(saved.map(drop)));
        self.save_summed(saved, memory, (offset, length), None, done)
    }

    /// The same, of bytes that may have no other checksum than `checksum`: memory that was damaged since must not
    /// become an object whose checksum is right.
    #[must_use = "a save that was refused calls nothing back"]
    pub(crate) fn save_summed(
        &self,
        saved: Saved,
        memory: Arc<dyn Memory>,
        (offset, length): (u64, u64),
        checksum: Option<u64>,
        done: SummedDone,
    ) -> bool {
        let (ticket, trial) = (0, false);
        let task = SaveTask { saved, memory, offset, length, checksum, done: None, ticket, trial };
        self.shared.accept_save(task, done)
    }

    /// Loads the object's `length` bytes to `offset`, which must stay until `done` is called; until then, and after
    /// anything but `Ok(Some(_))`, what lies there may be anything. The object is not evicted before. `false`: too
    /// many loads are waiting, or the disk hangs, both of them counted, or it is closed; `done` is not called.
    #[must_use = "a load that was refused calls nothing back"]
    pub fn load(
        &self,
        (chunk, space, rank): (&[u8; 32], &[u8; 32], u32),
        memory: Arc<dyn Memory>,
        offset: u64,
        length: u64,
        done: LoadDone,
    ) -> bool {
        let id = ObjectId { chunk: *chunk, space: *space, rank };
        self.shared
            .accept_load(LoadTask { id, object: None, memory, offset, length, done: None }, done)
    }

    /// The object is in use: it goes later. A restart does not know of it.
    pub fn touch(&self, chunk: &[u8; 32], space: &[u8; 32], rank: u32, now: Instant) {
        let id = ObjectId { chunk: *chunk, space: *space, rank };
        self.shared.lock().index.touch(&id, now);
    }

    /// The object is not found any more, and its file goes soon. Saves of it that are under way end with
    /// [`kvferry_core::ErrorCode::Aborted`].
    pub fn remove(&self, chunk: &[u8; 32], space: &[u8; 32], rank: u32) {
        self.shared.remove(&[ObjectId { chunk: *chunk, space: *space, rank }]);
    }

    /// Removes all objects. Whatever happens after a flush that said `Ok`, none of them is found again; and before,
    /// either all of them or none, unless the disk fails.
    pub fn clear(&self) {
        self.shared.clear();
    }

    /// Waits until everything that was accepted and removed so far is on the disk.
    ///
    /// # Errors
    /// [`kvferry_core::ErrorCode::Timeout`]; why a save failed meanwhile, or why something that was removed may be
    /// there again after a restart. It is tried again, and by each flush.
    pub fn flush(&self, deadline: Instant) -> Result<()> {
        self.shared.flush(deadline)
    }

    /// Counters and state.
    pub fn status(&self) -> DiskStatus {
        self.shared.status()
    }

    /// Whether files are written around the page cache.
    pub fn is_direct(&self) -> bool {
        self.shared.files.is_direct()
    }

    /// Ends the disk: what is being written is finished, what waits is given back with [`kvferry_core::ErrorCode::Closed`].
    /// Calling it again only waits.
    ///
    /// # Errors
    /// [`kvferry_core::ErrorCode::Timeout`]: it ends later.
    pub fn close(&self, deadline: Instant) -> Result<()> {
        self.shared.close(deadline)
    }
}

impl Tier for Disk {
    fn save(
        &self,
        saved: Saved,
        memory: Arc<dyn Memory>,
        place: (u64, u64),
        checksum: Option<u64>,
        done: SummedDone,
    ) -> bool {
        self.save_summed(saved, memory, place, checksum, done)
    }

    fn load(
        &self,
        ObjectId { chunk, space, rank }: &ObjectId,
        memory: Arc<dyn Memory>,
        (offset, length): (u64, u64),
        done: LoadDone,
    ) -> bool {
        self.load((chunk, space, *rank), memory, offset, length, done)
    }

    fn remove(&self, ids: &[ObjectId]) {
        self.shared.remove(ids);
    }

    fn clear(&self) {
        self.clear();
    }

    fn flush(&self, deadline: Instant) -> Result<()> {
        self.flush(deadline)
    }

    fn close(&self, deadline: Instant) -> Result<()> {
        self.close(deadline)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = self.close(Instant::now() + DROP_WAIT); // the threads end by themselves
    }
}

/// Fills the index, least recently used first. Gives the next sequence number.
fn read_directory(files: &dyn Files, state: &mut State) -> Result<u64> {
    let failed = |error: &std::io::Error| {
        Error::system(format!("cannot read {}", files.directory().display()), error)
    };
    let mut found = Vec::new();
    let mut remove = Vec::new();
    let (mut sequence, mut cleared) = (0, 0);
    for entry in files.entries().map_err(|error| failed(&error))? {
        match kind(&entry.name) {
            Kind::Object(named) => {
                sequence = sequence.max(named.sequence);
                found.push((entry.modified, named, entry.bytes));
            }
            Kind::Unfinished(used) => {
                sequence = sequence.max(used); // it may stay
                remove.push((entry.name, entry.bytes));
            }
            Kind::Cleared => cleared = cleared::read(files).map_err(|error| failed(&error))?,
            Kind::OtherVersion => state.index.insert_other(entry.name, entry.bytes),
            Kind::Foreign => {}
        }
    }
    found.sort_unstable_by_key(|(modified, named, _)| (*modified, named.sequence));
    let now = SystemTime::now();
    for (modified, named, bytes) in found {
        let former = state.index.get(&named.id).map(|object| object.named);
        if named.sequence <= cleared {
            remove.push((named.name(), bytes));
        } else if !is_plausible(named.length, bytes) {
            state.status.damaged += 1;
            remove.push((named.name(), bytes));
        } else if former.is_some_and(|former| former.sequence > named.sequence) {
            remove.push((named.name(), bytes));
        } else {
            if let Some(former) = state.index.remove(&named.id) {
                remove.push((former.named.name(), former.bytes));
            }
            let aged = now.duration_since(modified).unwrap_or_default();
            state.index.insert(named, bytes, modified, aged);
        }
    }
    for (name, bytes) in remove {
        let removed = files.remove(&name);
        if removed.is_err_and(|error| error.kind() != std::io::ErrorKind::NotFound) {
            state.index.insert_other(name, bytes); // no reason not to start
        }
    }
    state.cleared = Cleared::new(cleared);
    Ok(sequence.max(cleared)) // what is saved from now on was not cleared
}

/// Whether a file of `bytes` can hold an object of `length`.
fn is_plausible(length: u64, bytes: u64) -> bool {
    let most = format::HEADER_MAX as u64 / PAGE;
    let padded = format::padded(length);
    (1..=most)
        .any(|pages| padded.and_then(|padded| padded.checked_add(pages * PAGE)) == Some(bytes))
}
