//! A file system in memory that loses power: what was not synced may be there or not, page by page and name by name.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

use kvferry_core::{Error, ErrorCode, Result};

use super::files::{Entry, Files, Handle};

/// Cloning gives another handle to the same file system.
#[derive(Clone)]
pub(crate) struct Volatile(Arc<Mutex<State>>);

struct State {
    files: Vec<File>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    /// Operations until the power goes.
    left: Option<u64>,
    random: u64,
}

#[derive(Clone, Default)]
struct File {
    bytes: Vec<u8>,
    durable: Vec<u8>,
}

impl Volatile {
    pub(crate) fn new(seed: u64) -> Self {
        let (files, names, durable_names) = Default::default();
        Self(Arc::new(Mutex::new(State { files, names, durable_names, left: None, random: seed })))
    }

    /// The power goes after so many operations: they fail from then on.
    pub(crate) fn fail_after(&self, operations: u64) {
        self.0.lock().unwrap().left = Some(operations);
    }

    /// What a restart finds.
    pub(crate) fn lose_power(&self) -> Self {
        let mut state = self.0.lock().unwrap();
        let mut files = Vec::new();
        for file in state.files.clone() {
            let mut bytes = if state.toss() { file.bytes.clone() } else { file.durable.clone() };
            for start in (0..bytes.len()).step_by(4096) {
                let end = bytes.len().min(start + 4096);
                let page = if state.toss() { &file.bytes } else { &file.durable };
                let page = page.get(start..end).map(<[u8]>::to_vec);
                bytes[start..end].copy_from_slice(&page.unwrap_or_else(|| vec![0; end - start]));
            }
            files.push(File { durable: bytes.clone(), bytes });
        }
        let mut names = state.durable_names.clone();
        for name in [&state.names, &state.durable_names].map(Clone::clone).into_iter().flatten() {
            if state.toss() {
                match state.names.get(&name.0) {
                    Some(file) => names.insert(name.0, *file),
                    None => names.remove(&name.0),
                };
            }
        }
        let (durable_names, random) = (names.clone(), state.random);
        Self(Arc::new(Mutex::new(State { files, names, durable_names, left: None, random })))
    }

    fn step(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.0.lock().unwrap();
        if let Some(left) = &mut state.left {
            *left = left.checked_sub(1).ok_or_else(|| io::Error::other("the power is gone"))?;
        }
        Ok(state)
    }
}

impl State {
    fn toss(&mut self) -> bool {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        self.random >> 63 == 1
    }
}

impl Files for Volatile {
    fn directory(&self) -> &Path {
        Path::new("nowhere")
    }

    fn prepare(&self) -> Result<()> {
        let gone = |error: io::Error| Error::new(ErrorCode::System, error.to_string());
        self.step().map(|_| ()).map_err(gone)
    }

    fn release(&self) {}

    fn is_direct(&self) -> bool {
        false
    }

    fn entries(&self) -> io::Result<Vec<Entry>> {
        let state = self.step()?;
        let entry = |(name, file): (&String, &usize)| Entry {
            name: name.clone(),
            bytes: state.files[*file].bytes.len() as u64,
            modified: SystemTime::UNIX_EPOCH,
        };
        Ok(state.names.iter().map(entry).collect())
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn Handle>> {
        let mut state = self.step()?;
        let file = state.files.len();
        state.files.push(File::default());
        state.names.insert(name.into(), file);
        Ok(Box::new(Open(self.clone(), file)))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn Handle>> {
        let state = self.step()?;
        let file = *state.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(Open(self.clone(), file)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.step()?;
        let file = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        state.names.insert(to.into(), file);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.step()?.names.remove(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.step()?;
        state.durable_names = state.names.clone();
        Ok(())
    }
}

struct Open(Volatile, usize);

impl Handle for Open {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.0.step()?.files[self.1].bytes.len() as u64)
    }

    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let state = self.0.step()?;
        let start = usize::try_from(offset).unwrap();
        let bytes = state.files[self.1].bytes.get(start..start + into.len());
        into.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        let mut state = self.0.step()?;
        let start = usize::try_from(offset).unwrap();
        let bytes = &mut state.files[self.1].bytes;
        let end = bytes.len().max(start + from.len());
        bytes.resize(end, 0);
        bytes[start..start + from.len()].copy_from_slice(from);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut state = self.0.step()?;
        let file = &mut state.files[self.1];
        file.durable = file.bytes.clone();
        Ok(())
    }

    fn set_modified(&mut self, _time: SystemTime) -> io::Result<()> {
        Ok(())
    }
}
