//! The system's files, which fail and wait as they are told.

use super::*;

/// What a file operation is.
pub(crate) enum Operation {
    Prepare,
    Create,
    Open,
    Read,
    Write,
    SyncFile,
    Rename,
    Remove,
    Sync,
}

type Fault = Arc<dyn Fn(&Operation) -> io::Result<()> + Send + Sync>;

/// The system's files, and something that happens before each operation.
pub(crate) struct Faulty {
    files: SystemFiles,
    fault: Fault,
}

impl Faulty {
    pub(crate) fn on(
        directory: &Directory,
        fault: impl Fn(&Operation) -> io::Result<()> + Send + Sync + 'static,
    ) -> Arc<dyn Files> {
        Arc::new(Self { files: SystemFiles::new(directory.0.clone()), fault: Arc::new(fault) })
    }
}

impl Files for Faulty {
    fn directory(&self) -> &Path {
        self.files.directory()
    }

    fn prepare(&self) -> Result<()> {
        (self.fault)(&Operation::Prepare)
            .map_err(|error| kvferry_core::Error::system(self.directory().display(), &error))?;
        self.files.prepare()
    }

    fn release(&self) {
        self.files.release();
    }

    fn is_direct(&self) -> bool {
        self.files.is_direct()
    }

    fn entries(&self) -> io::Result<Vec<Entry>> {
        self.files.entries()
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn Handle>> {
        (self.fault)(&Operation::Create)?;
        Ok(Box::new(FaultyHandle(self.files.create(name)?, Arc::clone(&self.fault))))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn Handle>> {
        (self.fault)(&Operation::Open)?;
        Ok(Box::new(FaultyHandle(self.files.open(name)?, Arc::clone(&self.fault))))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        (self.fault)(&Operation::Rename)?;
        self.files.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        (self.fault)(&Operation::Remove)?;
        self.files.remove(name)
    }

    fn sync(&self) -> io::Result<()> {
        (self.fault)(&Operation::Sync)?;
        self.files.sync()
    }
}

struct FaultyHandle(Box<dyn Handle>, Fault);

impl Handle for FaultyHandle {
    fn bytes(&self) -> io::Result<u64> {
        self.0.bytes()
    }

    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        (self.1)(&Operation::Read)?;
        self.0.read_at(offset, into)
    }

    fn write_at(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        (self.1)(&Operation::Write)?;
        self.0.write_at(offset, from)
    }

    fn sync(&mut self) -> io::Result<()> {
        (self.1)(&Operation::SyncFile)?;
        self.0.sync()
    }

    fn set_modified(&mut self, time: SystemTime) -> io::Result<()> {
        self.0.set_modified(time)
    }
}

/// Files of which such operations only happen while `gate` is open.
pub(super) fn gated(
    directory: &Directory,
    gate: &Arc<Gate>,
    is_held: impl Fn(&Operation) -> bool + Send + Sync + 'static,
) -> Arc<dyn Files> {
    let gate = Arc::clone(gate);
    Faulty::on(directory, move |operation| {
        if is_held(operation) {
            gate.pass();
        }
        Ok(())
    })
}

/// The same of files that are created.
pub(super) fn gated_saves(directory: &Directory, gate: &Arc<Gate>) -> Arc<dyn Files> {
    gated(directory, gate, |operation| matches!(operation, Operation::Create))
}

/// Holds threads up while it is shut.
#[derive(Default)]
pub(crate) struct Gate {
    shut: Mutex<bool>,
    held: Mutex<u32>,
    changed: Condvar,
    arrived: Condvar,
}

impl Gate {
    pub(crate) fn shut(&self) {
        *self.shut.lock().unwrap() = true;
    }

    pub(crate) fn open(&self) {
        *self.shut.lock().unwrap() = false;
        self.changed.notify_all();
    }

    pub(crate) fn pass(&self) {
        let mut shut = self.shut.lock().unwrap();
        if *shut {
            *self.held.lock().unwrap() += 1;
            self.arrived.notify_all();
        }
        while *shut {
            shut = self.changed.wait(shut).unwrap();
        }
    }

    /// Waits until somebody stands before it.
    pub(super) fn wait(&self) {
        let held = self.held.lock().unwrap();
        drop(self.arrived.wait_while(held, |held| *held == 0).unwrap());
    }
}
