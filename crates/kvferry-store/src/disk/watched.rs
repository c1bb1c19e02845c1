//! How long file operations take: no system call for files has a deadline, so whoever would wait for one asks here
//! first.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use kvferry_core::Result;

use super::files::{Entry, Files, Handle};

/// The operations under way.
#[derive(Default)]
pub(crate) struct Running(Mutex<Operations>);

#[derive(Default)]
struct Operations {
    begun: u64,
    /// By their order.
    since: BTreeMap<u64, (Instant, &'static str)>,
}

impl Running {
    /// How long the oldest has taken so far, and what it does.
    pub(crate) fn longest(&self) -> Option<(Duration, &'static str)> {
        let operations = self.lock();
        let (since, doing) = operations.since.values().next()?;
        Some((since.elapsed(), doing))
    }

    fn run<T>(&self, doing: &'static str, operation: impl FnOnce() -> T) -> T {
        let number = {
            let mut operations = self.lock();
            operations.begun += 1;
            let number = operations.begun;
            operations.since.insert(number, (Instant::now(), doing));
            number
        };
        let result = operation();
        self.lock().since.remove(&number);
        result
    }

    fn lock(&self) -> MutexGuard<'_, Operations> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Files of which it is known what is under way.
pub(crate) struct Watched {
    pub(crate) files: Arc<dyn Files>,
    pub(crate) running: Arc<Running>,
}

impl Watched {
    fn handle(&self, handle: Box<dyn Handle>) -> Box<dyn Handle> {
        Box::new(WatchedHandle { handle, running: Arc::clone(&self.running) })
    }
}

impl Files for Watched {
    fn directory(&self) -> &Path {
        self.files.directory()
    }

    fn prepare(&self) -> Result<()> {
        self.running.run("make the directory", || self.files.prepare())
    }

    fn probe(&self) {
        self.running.run("write a file", || self.files.probe());
    }

    fn release(&self) {
        self.files.release();
    }

    fn is_direct(&self) -> bool {
        self.files.is_direct()
    }

    fn entries(&self) -> io::Result<Vec<Entry>> {
        self.files.entries() // of a start, which nobody waits behind
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn Handle>> {
        let created = self.running.run("make a file", || self.files.create(name));
        created.map(|handle| self.handle(handle))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn Handle>> {
        let opened = self.running.run("open a file", || self.files.open(name));
        opened.map(|handle| self.handle(handle))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.running.run("rename a file", || self.files.rename(from, to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.running.run("remove a file", || self.files.remove(name))
    }

    fn sync(&self) -> io::Result<()> {
        self.running.run("sync", || self.files.sync())
    }
}

struct WatchedHandle {
    handle: Box<dyn Handle>,
    running: Arc<Running>,
}

impl Handle for WatchedHandle {
    fn bytes(&self) -> io::Result<u64> {
        self.running.run("open a file", || self.handle.bytes())
    }

    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.running.run("read a file", || self.handle.read_at(offset, into))
    }

    fn write_at(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.running.run("write a file", || self.handle.write_at(offset, from))
    }

    fn sync(&mut self) -> io::Result<()> {
        self.running.run("sync a file", || self.handle.sync())
    }

    fn set_modified(&mut self, time: SystemTime) -> io::Result<()> {
        self.running.run("write a file", || self.handle.set_modified(time))
    }
}
