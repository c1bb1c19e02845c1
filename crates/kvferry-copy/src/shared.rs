//! A POSIX shared-memory segment: the pool that a server creates and its clients map.

use std::fs::{File, OpenOptions, remove_file};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use kvferry_core::cache::Memory;
use kvferry_core::{Error, ErrorCode, Result};

use crate::cuda::Pins;
use crate::mapping::Mapping;
use crate::{POOL_STEP, range_of};

const DIRECTORY: &str = "/dev/shm";
/// A segment that is locked at so many looks in a row is a live server's.
const LOCK_TRIES: u32 = 16;
const LOCK_PAUSE: Duration = Duration::from_millis(2);

/// cachestat(2), Linux 6.5: the same number everywhere.
const CACHESTAT: libc::c_long = 451;

#[repr(C)]
struct CachestatRange {
    offset: u64,
    length: u64,
}

/// In pages.
#[repr(C)]
#[derive(Default)]
struct Cachestat {
    cached: u64,
    dirty: u64,
    under_writeback: u64,
    /// Swapped out.
    evicted: u64,
    recently_evicted: u64,
}

/// A named segment of shared memory, mapped for reading and writing, mode 0600.
///
/// The server that creates it holds a lock on it (`flock`), so that a segment without one is known to
/// be stale. Its pages are reserved step by step ([`SharedRegion::reserve`]): a page that was never
/// reserved is never touched, so a full /dev/shm is an error and not a SIGBUS.
#[derive(Debug)]
pub struct SharedRegion {
    mapping: Mapping,
    file: File,
    /// Steps whose pages this process has mapped already.
    populated: Vec<AtomicBool>,
    /// Steps, from the first on, that this process has reserved.
    reserved: AtomicU64,
    /// Set in the process that created the segment: removed on drop.
    owned: Option<PathBuf>,
    pins: Arc<Pins>,
}

impl SharedRegion {
    /// Creates the segment `name` of `bytes` (> 0), of which nothing is reserved yet. A segment that
    /// a dead server left is replaced; a live one's is [`ErrorCode::PoolInUse`]. More than what
    /// /dev/shm has free is [`ErrorCode::PoolTooLarge`].
    pub fn create(name: &str, bytes: u64) -> Result<Self> {
        let path = path_of(name)?;
        let free = free_bytes()?;
        if bytes > free {
            return Err(Error::new(
                ErrorCode::PoolTooLarge,
                format!(
                    "the pool needs {bytes} bytes of shared memory, and {DIRECTORY} has {free} free; \
                     ask for less memory, or enlarge it (mount -o remount,size=..., or docker run --shm-size=...)"
                ),
            ));
        }
        let file = create_locked(&path, name)?;
        let sized = file.set_len(bytes).map_err(|error| {
            Error::system(format!("cannot give {bytes} bytes to {}", path.display()), &error)
        });
        match sized.and_then(|()| Self::map(file, bytes)) {
            Ok(mut region) => {
                region.owned = Some(path);
                Ok(region)
            }
            Err(error) => {
                let _ = remove_file(&path); // ours, and useless
                Err(error)
            }
        }
    }

    /// Maps the segment `name` that a server of the same user created, `bytes` long.
    pub fn open(name: &str, bytes: u64) -> Result<Self> {
        let path = path_of(name)?;
        let file = open(&path, false).map_err(|error| {
            let what = format!("cannot open the server's pool {}", path.display());
            match error.kind() {
                io::ErrorKind::PermissionDenied => {
                    let hint = "it is another user's: run the server and this process as one user";
                    Error::system(format!("{what} ({hint})"), &error)
                }
                _ => Error::system(what, &error),
            }
        })?;
        let metadata = file.metadata().map_err(|error| {
            Error::system(format!("cannot read the size of {}", path.display()), &error)
        })?;
        if bytes == 0 || metadata.len() < bytes {
            return Err(Error::new(
                ErrorCode::Protocol,
                format!(
                    "the server announced a pool of {bytes} bytes, {} has {}",
                    path.display(),
                    metadata.len()
                ),
            ));
        }
        Self::map(file, bytes)
    }

    /// Which file of which kernel it is. A name alone says nothing to a peer on another machine or in another container,
    /// where a segment of the same name may be another server's.
    pub fn identity(&self) -> Result<String> {
        const BOOT: &str = "/proc/sys/kernel/random/boot_id";
        let cannot = |error: io::Error| Error::system("cannot tell which pool this is", &error);
        let boot = std::fs::read_to_string(BOOT).map_err(cannot)?;
        let metadata = self.file.metadata().map_err(cannot)?;
        Ok(format!("{}:{:x}:{:x}", boot.trim(), metadata.dev(), metadata.ino()))
    }

    /// Removes segments of this user whose names begin with `prefix` and whose servers are dead: they
    /// would take memory until the machine restarts. Those that cannot be removed stay.
    pub fn remove_stale(prefix: &str) {
        let Ok(entries) = std::fs::read_dir(DIRECTORY) else { return };
        for entry in entries.flatten() {
            if !entry.file_name().to_string_lossy().starts_with(prefix) {
                continue;
            }
            let path = entry.path();
            if let Ok(file) = open(&path, false)
                && lock(&file)
                && names(&path, &file)
            {
                let _ = remove_file(&path); // another starter may have been faster
            }
        }
    }

    fn map(file: File, bytes: u64) -> Result<Self> {
        let cannot =
            |error: &io::Error| Error::system(format!("cannot map a pool of {bytes} bytes"), error);
        let length =
            usize::try_from(bytes).map_err(|_| cannot(&io::ErrorKind::OutOfMemory.into()))?;
        let mapping = Mapping::new(&file, length).map_err(|error| cannot(&error))?;
        // Where the kernel has huge pages for shared memory they help; nothing depends on them.
        let _ = mapping.advise(0, length, libc::MADV_HUGEPAGE);
        let steps = bytes.div_ceil(POOL_STEP);
        let populated = (0..steps).map(|_| AtomicBool::new(false)).collect();
        let reserved = AtomicU64::new(0);
        Ok(Self { mapping, file, populated, reserved, owned: None, pins: Arc::default() })
    }

    /// Reserves the pages of step `step` (of [`POOL_STEP`] bytes; the last may be shorter), or says
    /// that /dev/shm has no room for them. Takes ~10–15 ms a step: not for a request's path.
    pub fn reserve(&self, step: u64) -> Result<()> {
        let (offset, bytes) = self.step(step)?;
        let signed = |value: u64| libc::off_t::try_from(value).unwrap_or(libc::off_t::MAX);
        // SAFETY: a call on an open file of ours; it touches no memory.
        let code =
            unsafe { libc::posix_fallocate(self.file.as_raw_fd(), signed(offset), signed(bytes)) };
        match code {
            0 => {
                // One that is out of turn is not counted: pages before it may be nobody's.
                let (now, order) = (step + 1, Ordering::AcqRel);
                let _ = self.reserved.compare_exchange(step, now, order, Ordering::Relaxed);
                Ok(())
            }
            code => Err(Error::system(
                format!("cannot reserve {bytes} bytes of shared memory"),
                &io::Error::from_raw_os_error(code),
            )),
        }
    }

    /// Maps the pages of every step that `offset..offset + bytes` touches, once: a copy into an
    /// unmapped range takes 4 times as long. The server has reserved them.
    fn populate(&self, offset: u64, bytes: usize) -> Result<()> {
        for step in steps_of(offset, bytes as u64) {
            let Some(done) = self.is_populated(step) else {
                return Ok(()); // out of bounds: the copy says so
            };
            if done.load(Ordering::Acquire) {
                continue;
            }
            let (start, length) = self.step(step)?;
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            // Several threads may do it at once, to the same end. A kernel before 5.14 does not know
            // the advice: pages are then mapped as touched.
            self.mapping.advise(start, length, libc::MADV_POPULATE_WRITE).map_err(|error| {
                Error::system(format!("cannot map step {step} of the pool"), &error)
            })?;
            done.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Whether a step's pages were reserved, by this process, or by the server's as far as the kernel tells. No page is
    /// touched.
    pub(crate) fn is_reserved(&self, step: u64) -> bool {
        let populated = self.is_populated(step);
        step < self.reserved.load(Ordering::Acquire)
            || populated.is_some_and(|done| done.load(Ordering::Acquire))
            || (self.owned.is_none() && self.has_pages(step).unwrap_or(false))
    }

    /// Whether all pages of a step are in memory or swapped out. An older kernel does not know the call.
    fn has_pages(&self, step: u64) -> io::Result<bool> {
        let (offset, length) = self.step(step).map_err(io::Error::other)?;
        let (range, mut told) = (CachestatRange { offset, length }, Cachestat::default());
        let (file, flags) = (self.file.as_raw_fd(), 0 as libc::c_uint);
        // SAFETY: reads the range, and writes the numbers of the kernel's structure; it touches no memory of the file.
        let code =
            unsafe { libc::syscall(CACHESTAT, file, &raw const range, &raw mut told, flags) };
        if code != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a call that only answers.
        let page = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) });
        let page = page.map_err(io::Error::other)?.max(1);
        Ok(told.cached + told.evicted >= length.div_ceil(page))
    }

    fn is_populated(&self, step: u64) -> Option<&AtomicBool> {
        usize::try_from(step).ok().and_then(|step| self.populated.get(step))
    }

    /// Where `bytes` at `offset` lie, while this region lives; their pages are mapped.
    pub(crate) fn place(&self, offset: u64, bytes: usize) -> Result<*mut u8> {
        let range = range_of(offset, bytes, self.mapping.len())?;
        self.populate(offset, bytes)?;
        Ok(self.mapping.as_ptr().wrapping_add(range.start))
    }

    pub(crate) fn pins(&self) -> &Arc<Pins> {
        &self.pins
    }

    fn step(&self, step: u64) -> Result<(u64, u64)> {
        let offset = step.checked_mul(POOL_STEP).filter(|offset| *offset < self.bytes());
        let offset =
            offset.ok_or_else(|| Error::invalid(format!("the pool has no step {step}")))?;
        Ok((offset, POOL_STEP.min(self.bytes() - offset)))
    }
}

impl Memory for SharedRegion {
    fn bytes(&self) -> u64 {
        self.mapping.len() as u64
    }

    fn is_mapped(&self, offset: u64, bytes: u64) -> bool {
        let mut steps = steps_of(offset, bytes).map_while(|step| self.is_populated(step));
        steps.all(|done| done.load(Ordering::Acquire))
    }

    fn map(&self, offset: u64, bytes: u64) -> Result<()> {
        self.populate(offset, usize::try_from(bytes).unwrap_or(usize::MAX))
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        self.populate(offset, into.len())?;
        self.mapping.read(offset, into)
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        self.populate(offset, from.len())?;
        self.mapping.write(offset, from)
    }
}

impl Drop for SharedRegion {
    fn drop(&mut self) {
        self.pins.release(); // while the pages are mapped
        // Someone may have removed the file, and another server made its own under the name.
        if let Some(path) = &self.owned
            && names(path, &self.file)
        {
            let _ = remove_file(path); // clients keep their mappings
        }
    }
}

/// The steps that `bytes` at `offset` touch.
fn steps_of(offset: u64, bytes: u64) -> std::ops::RangeInclusive<u64> {
    offset / POOL_STEP..=offset.saturating_add(bytes.max(1) - 1) / POOL_STEP
}

/// Creates the segment and locks it, replacing one that nobody has locked.
fn create_locked(path: &PathBuf, name: &str) -> Result<File> {
    let system = |error: &io::Error| cannot_create(path, error);
    for _ in 0..LOCK_TRIES {
        match open(path, true) {
            Ok(file) => {
                // Between creation and lock another starter may take ours for stale: then its lock
                // fails or it removed the name; both show here.
                if lock(&file) && names(path, &file) {
                    return Ok(file);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => match open(path, false) {
                Ok(stale) if lock(&stale) => {
                    if names(path, &stale) {
                        remove_file(path).map_err(|error| system(&error))?;
                    }
                }
                // A live server's, or another starter is just looking whether it is stale.
                Ok(_) => std::thread::sleep(LOCK_PAUSE),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(system(&error)),
            },
            Err(error) => return Err(system(&error)),
        }
    }
    Err(Error::new(
        ErrorCode::PoolInUse,
        format!(
            "a live server owns the shared memory {name:?}; stop it, or choose another name (--shm-name NAME)"
        ),
    ))
}

/// Whether a server of another user still lives, nobody but that user can find out.
fn cannot_create(path: &Path, error: &io::Error) -> Error {
    let path = path.display();
    if error.kind() == io::ErrorKind::PermissionDenied {
        let message = format!(
            "{path} is another user's ({error}): remove it if that server has ended, or choose another name (--shm-name NAME)"
        );
        return Error::new(ErrorCode::PoolInUse, message);
    }
    Error::system(format!("cannot create {path}"), error)
}

fn open(path: &PathBuf, create: bool) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(create)
        .mode(0o600)
        .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
        .open(path)
}

/// Takes the lock that lives as long as the open file; `false` when another process has it.
fn lock(file: &File) -> bool {
    // SAFETY: a call on an open file of ours; it touches no memory.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) == 0 }
}

/// Whether `path` still names this very file.
fn names(path: &PathBuf, file: &File) -> bool {
    let inode = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
    match (std::fs::symlink_metadata(path), file.metadata()) {
        (Ok(named), Ok(opened)) => inode(named) == inode(opened),
        _ => false,
    }
}

fn path_of(name: &str) -> Result<PathBuf> {
    let fine = !name.is_empty()
        && name.len() <= 200
        && name != "."
        && name != ".."
        && !name.contains(['/', '\0']);
    if !fine {
        return Err(Error::invalid(format!(
            "{name:?} cannot name shared memory: 1 to 200 bytes without '/' and NUL"
        )));
    }
    Ok(PathBuf::from(DIRECTORY).join(name))
}

/// Free bytes of the file system that holds shared memory.
fn free_bytes() -> Result<u64> {
    let mut stats = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path is a C string and `stats` has room for the answer.
    let code = unsafe { libc::statvfs(c"/dev/shm".as_ptr(), stats.as_mut_ptr()) };
    if code != 0 {
        return Err(Error::system(
            format!("cannot read the free space of {DIRECTORY}"),
            &io::Error::last_os_error(),
        ));
    }
    // SAFETY: the call succeeded, so it filled the structure.
    let stats = unsafe { stats.assume_init() };
    Ok(stats.f_bavail.saturating_mul(stats.f_frsize))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn name(test: &str) -> String {
        format!("kvferry_test_{}_{test}", std::process::id())
    }

    #[test]
    fn a_client_reads_what_the_server_wrote() {
        let name = name("roundtrip");
        let server = SharedRegion::create(&name, POOL_STEP + 4096).unwrap();
        server.reserve(0).unwrap();
        server.reserve(1).unwrap();
        for bytes in [0, POOL_STEP + 4097] {
            let error = SharedRegion::open(&name, bytes).unwrap_err();
            assert_eq!(error.code, ErrorCode::Protocol, "the file has another size");
        }
        let client = SharedRegion::open(&name, POOL_STEP + 4096).unwrap();
        client.map(0, 4).unwrap();
        assert!(client.is_mapped(0, POOL_STEP) && !client.is_mapped(POOL_STEP - 2, 4));
        client.write(POOL_STEP - 2, b"over").unwrap(); // crosses a step
        assert!(client.is_mapped(POOL_STEP - 2, 4));
        assert!(client.is_mapped(u64::MAX - 1, 9), "out of bounds: there is nothing to map");
        client.map(u64::MAX - 1, 9).unwrap();
        let mut four = [0; 4];
        server.read(POOL_STEP - 2, &mut four).unwrap();
        assert_eq!(&four, b"over");
        assert!(client.read(POOL_STEP + 4094, &mut four).is_err(), "out of bounds");
        assert!(server.reserve(2).is_err());
        assert_eq!(client.identity().unwrap(), server.identity().unwrap());
        let mode = std::fs::metadata(path_of(&name).unwrap()).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(server);
        assert!(SharedRegion::open(&name, 4096).is_err(), "the name goes with the server");
        client.read(0, &mut four).unwrap(); // the mapping stays
    }

    #[test]
    fn what_is_reserved_is_known_without_touching_it() {
        let name = name("reserved");
        let server = SharedRegion::create(&name, 3 * POOL_STEP + 4096).unwrap();
        let client = SharedRegion::open(&name, 3 * POOL_STEP + 4096).unwrap();
        let known = |region: &SharedRegion| [0, 1, 2, 3, 4].map(|step| region.is_reserved(step));
        server.reserve(0).unwrap();
        assert_eq!(known(&server), [true, false, false, false, false]);
        server.reserve(2).unwrap(); // out of turn
        assert_eq!(known(&server), [true, false, false, false, false]);
        if let Err(error) = client.has_pages(0) {
            let _ =
                writeln!(io::stderr(), "SKIPPED what the kernel tells of reserved pages: {error}");
            return;
        }
        assert_eq!(known(&client), [true, false, true, false, false]);
        (1..4).for_each(|step| server.reserve(step).unwrap());
        assert_eq!(known(&client), [true, true, true, true, false]);
        assert_eq!(known(&server), [true, true, true, true, false]);
        assert!(!client.is_mapped(0, 1), "no page was mapped");
    }

    #[test]
    fn a_segment_of_another_user_is_told_with_the_remedy() {
        let path = Path::new("/dev/shm/kvferry_1");
        let error = cannot_create(path, &io::Error::from_raw_os_error(libc::EACCES));
        assert_eq!(error.code, ErrorCode::PoolInUse);
        assert!(error.message.contains("/dev/shm/kvferry_1 is another user's"), "{error}");
        assert!(error.message.contains("--shm-name NAME"), "{error}");
        let error = cannot_create(path, &io::Error::from_raw_os_error(libc::EMFILE));
        assert_eq!(error.code, ErrorCode::System);
    }

    #[test]
    fn a_live_segment_is_refused_and_a_stale_one_replaced() {
        let name = name("stale");
        let live = SharedRegion::create(&name, 4096).unwrap();
        live.reserve(0).unwrap();
        live.write(0, b"live").unwrap();
        assert_eq!(SharedRegion::create(&name, 4096).unwrap_err().code, ErrorCode::PoolInUse);
        let mut four = [0; 4];
        SharedRegion::open(&name, 4096).unwrap().read(0, &mut four).unwrap();
        assert_eq!(&four, b"live", "the refused start left it alone");
        drop(live);
        std::fs::write(path_of(&name).unwrap(), b"left by a killed server").unwrap();
        let fresh = SharedRegion::create(&name, 4096).unwrap();
        fresh.reserve(0).unwrap();
        fresh.read(0, &mut four).unwrap();
        assert_eq!(four, [0; 4]);
    }

    #[test]
    fn what_dead_servers_left_goes_and_live_ones_stay() {
        let prefix = name("sweep");
        let live = SharedRegion::create(&format!("{prefix}_live"), 4096).unwrap();
        let stale = path_of(&format!("{prefix}_stale")).unwrap();
        std::fs::write(&stale, b"left by a killed server").unwrap();
        SharedRegion::remove_stale(&prefix);
        assert!(!stale.exists());
        assert!(SharedRegion::open(&format!("{prefix}_live"), 4096).is_ok());
        drop(live);
    }

    #[test]
    fn servers_that_start_at_once_do_not_take_each_other_for_live_or_stale() {
        let prefix = name("race");
        std::thread::scope(|scope| {
            for server in 0..4 {
                let prefix = &prefix;
                scope.spawn(move || {
                    let name = format!("{prefix}_{server}");
                    for _ in 0..3000 {
                        std::fs::write(path_of(&name).unwrap(), b"left by a killed server")
                            .unwrap();
                        SharedRegion::remove_stale(prefix);
                        let region = SharedRegion::create(&name, 4096).unwrap();
                        drop(SharedRegion::open(&name, 4096).expect("nobody removed it"));
                        drop(region);
                    }
                });
            }
        });
    }

    #[test]
    fn a_server_whose_segment_was_removed_leaves_its_successors_alone() {
        let name = name("removed");
        let first = SharedRegion::create(&name, 4096).unwrap();
        remove_file(path_of(&name).unwrap()).unwrap();
        let second = SharedRegion::create(&name, 4096).unwrap();
        assert_ne!(first.identity().unwrap(), second.identity().unwrap(), "of one name");
        drop(first);
        assert!(SharedRegion::open(&name, 4096).is_ok());
        drop(second);
    }

    #[test]
    fn more_than_shared_memory_has_is_an_error_with_both_sizes() {
        let error = SharedRegion::create(&name("huge"), 1 << 60).unwrap_err();
        assert_eq!(error.code, ErrorCode::PoolTooLarge);
        assert!(error.message.contains(&(1u64 << 60).to_string()), "{error}");
        let free = error.message.split(" free").next().and_then(|text| text.rsplit(' ').next());
        assert!(
            free.is_some_and(|free| free.parse::<u64>().is_ok_and(|free| free < 1 << 60)),
            "{error}"
        );
    }

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        for bad in ["", "..", "a/b", "a\0b"] {
            assert_eq!(SharedRegion::open(bad, 4096).unwrap_err().code, ErrorCode::InvalidArgument);
        }
    }
}
