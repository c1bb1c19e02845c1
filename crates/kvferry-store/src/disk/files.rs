//! The few file operations that the disk needs, behind a trait: tests put failing disks and power losses in its place.

use std::fs::{self, DirBuilder, DirEntry, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use kvferry_core::{Error, ErrorCode, Result};

use super::buffer::Buffer;
use super::format::HEADER_MAX;

/// Held locked by the process that has the directory; holds its id.
const LOCK: &str = "kvferry.lock";
/// Holds the objects: of mode 0700 whatever the directory around it has.
const OBJECTS: &str = "objects";
/// Threads that ask for files' sizes and times.
const LISTERS: usize = 4;
/// Tried at each start.
const PROBE: &str = "probe.tmp";

/// One flat directory of files, by their names.
pub(crate) trait Files: Send + Sync {
    /// The directory, for messages.
    fn directory(&self) -> &Path;
    /// Makes the directory if it is not there, and takes it for this process alone, also when it was replaced.
    fn prepare(&self) -> Result<()>;
    /// Finds out how files can be written.
    fn probe(&self) {}
    /// Others may take it.
    fn release(&self);
    /// Whether files are written around the page cache.
    fn is_direct(&self) -> bool;
    /// Plain files.
    fn entries(&self) -> io::Result<Vec<Entry>>;
    /// A new file.
    fn create(&self, name: &str) -> io::Result<Box<dyn Handle>>;
    /// A file to read.
    fn open(&self, name: &str) -> io::Result<Box<dyn Handle>>;
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    fn remove(&self, name: &str) -> io::Result<()>;
    /// What was renamed and removed outlives a power loss.
    fn sync(&self) -> io::Result<()>;
}

/// An open file. Offsets and lengths are whole pages, and buffers are aligned to pages.
pub(crate) trait Handle: Send {
    fn bytes(&self) -> io::Result<u64>;
    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()>;
    fn write_at(&mut self, offset: u64, from: &[u8]) -> io::Result<()>;
    /// What was written outlives a power loss, under some name.
    fn sync(&mut self) -> io::Result<()>;
    fn set_modified(&mut self, time: SystemTime) -> io::Result<()>;
}

/// A file in the directory.
#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    pub(crate) modified: SystemTime,
}

/// A directory of the system.
pub(crate) struct SystemFiles {
    root: PathBuf,
    objects: PathBuf,
    lock: Mutex<Option<File>>,
    direct: AtomicBool,
}

impl SystemFiles {
    pub(crate) fn new(root: PathBuf) -> Self {
        let objects = root.join(OBJECTS);
        let direct = AtomicBool::new(cfg!(target_os = "linux"));
        Self { root, objects, lock: Mutex::new(None), direct }
    }

    /// Through the page cache, as where O_DIRECT is not taken.
    #[cfg(test)]
    pub(crate) fn buffered(root: PathBuf) -> Self {
        let files = Self::new(root);
        files.direct.store(false, Ordering::Relaxed);
        files
    }

    fn take_lock(&self) -> Result<()> {
        let path = self.root.join(LOCK);
        let failed = |error: &io::Error| {
            Error::system(format!("cannot lock {}; is it writable?", path.display()), error)
        };
        let mut held = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        if held.as_ref().is_some_and(|file| is_named(file, &path)) {
            return Ok(());
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        restrict(&mut options, 0);
        let mut file = options.open(&path).map_err(|error| failed(&error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let _ = file.take(20).read_to_string(&mut holder); // only for the message
                let holder: String = holder.chars().filter(char::is_ascii_digit).collect();
                return Err(Error::new(
                    ErrorCode::DiskInUse,
                    format!(
                        "process {holder} has the disk directory {}; stop it, or give this one another directory",
                        self.root.display()
                    ),
                ));
            }
            Err(TryLockError::Error(error)) => return Err(failed(&error)),
        }
        // Only for the message: a full disk can be read, and make room.
        let _ = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
        *held = Some(file);
        Ok(())
    }

    fn open_with(&self, options: &mut OpenOptions, name: &str) -> io::Result<Box<dyn Handle>> {
        let path = self.objects.join(name);
        if self.is_direct() {
            restrict(options, DIRECT);
            match options.open(&path) {
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                    self.direct.store(false, Ordering::Relaxed); // the file system does not take the flag
                }
                opened => return Ok(Box::new(SystemFile(opened?))),
            }
        }
        restrict(options, 0);
        match options.open(&path) {
            // The refused attempt may have made it.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                fs::remove_file(&path)?;
                Ok(Box::new(SystemFile(options.open(&path)?)))
            }
            opened => Ok(Box::new(SystemFile(opened?))),
        }
    }
}

impl Files for SystemFiles {
    fn directory(&self) -> &Path {
        &self.objects
    }

    fn prepare(&self) -> Result<()> {
        let failed = |error: &io::Error| {
            let path = self.objects.display();
            Error::system(format!("cannot use {path} for the disk tier; is it writable?"), error)
        };
        make_directory(&self.root).map_err(|error| failed(&error))?;
        self.take_lock()?;
        let made = make_directory(&self.objects).and_then(|()| sync_directory(&self.root));
        made.map_err(|error| failed(&error))?;
        Ok(())
    }

    fn probe(&self) {
        let mut buffer = Buffer::new(HEADER_MAX);
        let mut transfer = || -> io::Result<()> {
            let _ = self.remove(PROBE); // of a start that was killed
            self.create(PROBE)?.write_at(0, buffer.first(HEADER_MAX))?;
            self.open(PROBE)?.read_at(0, buffer.first(HEADER_MAX))
        };
        // Some file systems take the flag, and refuse the first transfer. Whatever else fails, what was not seen to
        // work is not relied on.
        if transfer().is_err() {
            self.direct.store(false, Ordering::Relaxed);
        }
        let _ = self.remove(PROBE); // whatever else is wrong, the first save will say
    }

    fn release(&self) {
        *self.lock.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn is_direct(&self) -> bool {
        self.direct.load(Ordering::Relaxed)
    }

    fn entries(&self) -> io::Result<Vec<Entry>> {
        let mut found = fs::read_dir(&self.objects)?.collect::<io::Result<Vec<_>>>()?;
        // In the order in which the file system keeps what is asked of each, if nothing of it is in memory yet.
        #[cfg(unix)]
        found.sort_unstable_by_key(std::os::unix::fs::DirEntryExt::ino);
        let some = found.len().div_ceil(LISTERS).max(1);
        let entries = std::thread::scope(|scope| {
            let begin = |some| {
                let thread = std::thread::Builder::new().spawn_scoped(scope, move || list(some));
                thread.map_err(|_| list(some)) // there can be no more threads
            };
            let lists: Vec<_> = found.chunks(some).map(begin).collect();
            let end = |list| match list {
                Ok(thread) => std::thread::ScopedJoinHandle::join(thread).ok(),
                Err(entries) => Some(entries),
            };
            lists.into_iter().map(end).collect::<Option<Vec<_>>>()
        });
        let ended = || io::Error::other("a thread that lists the directory is gone");
        Ok(entries.ok_or_else(ended)?.concat())
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn Handle>> {
        self.open_with(OpenOptions::new().write(true).create_new(true), name)
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn Handle>> {
        self.open_with(OpenOptions::new().read(true), name)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.objects.join(from), self.objects.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.objects.join(name))
    }

    fn sync(&self) -> io::Result<()> {
        sync_directory(&self.objects)
    }
}

/// Those that are plain files.
fn list(found: &[DirEntry]) -> Vec<Entry> {
    let entries = found.iter().filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let metadata = entry.metadata().ok().filter(fs::Metadata::is_file)?; // or gone meanwhile
        let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        Some(Entry { name, bytes: metadata.len(), modified })
    });
    entries.collect()
}

struct SystemFile(File);

impl Handle for SystemFile {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.0.seek(SeekFrom::Start(offset))?;
        self.0.read_exact(into)
    }

    fn write_at(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.0.seek(SeekFrom::Start(offset))?;
        self.0.write_all(from)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn set_modified(&mut self, time: SystemTime) -> io::Result<()> {
        self.0.set_modified(time)
    }
}

#[cfg(target_os = "linux")]
const DIRECT: i32 = libc::O_DIRECT;
#[cfg(not(target_os = "linux"))]
const DIRECT: i32 = 0;

/// Files are their owner's alone, and no link is followed.
fn restrict(options: &mut OpenOptions, flags: i32) {
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt as _;
        options.mode(0o600).custom_flags(flags | libc::O_NOFOLLOW);
    }
    #[cfg(not(unix))]
    let _ = (options, flags);
}

/// Makes the directory and those above it; one that is made is its owner's alone.
fn make_directory(path: &Path) -> io::Result<()> {
    let mut builder = DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path)?;
    #[cfg(unix)]
    if path.ends_with(OBJECTS) {
        use std::os::unix::fs::PermissionsExt as _;
        let mode = fs::metadata(path)?.permissions().mode();
        if mode & 0o077 != 0 {
            fs::set_permissions(path, fs::Permissions::from_mode(0o700))?;
        }
    }
    Ok(())
}

#[cfg(unix)]
fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Elsewhere directories cannot be opened, and the system keeps their order.
#[cfg(not(unix))]
fn sync_directory(_path: &Path) -> io::Result<()> {
    Ok(())
}

/// Whether `path` still names this very file.
#[cfg(unix)]
fn is_named(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let inode = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    match (fs::symlink_metadata(path), file.metadata()) {
        (Ok(named), Ok(opened)) => inode(named) == inode(opened),
        _ => false,
    }
}

#[cfg(not(unix))]
fn is_named(_file: &File, path: &Path) -> bool {
    path.exists()
}
