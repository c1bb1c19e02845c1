//! Objects that are stored only to see whether storing works.

use std::sync::{Arc, LazyLock};

use kvferry_copy::PrivateRegion;
use kvferry_core::cache::Memory;
use kvferry_core::key::{Dtype, Key, Layout};
use kvferry_core::{Error, ErrorCode, Result};

use crate::disk::{Disk, LoadDone, SaveDone, Saved};
use crate::index::ObjectId;
use crate::store::Store;

/// Bytes of such an object on the disk: the least that every disk has room for.
const BYTES: usize = 4096;

/// The model name of such objects. No event tells of them: one every few seconds would push the others
/// out of the log of an idle server.
pub const PROBE_MODEL: &str = "kvferry/readyz";

/// Identifies them on the disk.
static SPACE: LazyLock<[u8; 32]> =
    LazyLock::new(|| layout().map_or([0; 32], |layout| Saved::space_of(&layout, "")));

/// Whether the disk does not count it.
pub(crate) fn is_probe(id: &ObjectId) -> bool {
    id.space == *SPACE
}

fn layout() -> Result<Layout> {
    Ok(Layout {
        model_name: PROBE_MODEL.into(),
        world_size: 1,
        block_size: 1,
        num_layers: 1,
        hidden_dim_size: 4096,
        dtype: Dtype::new("uint8")?,
        single_plane: true,
        num_physical_slots: Some(1),
    })
}

/// Fresh bytes that go to the disk and come back. Gone from it when this is dropped.
pub struct DiskProbe {
    store: Store,
    chunk: [u8; 32],
    bytes: Vec<u8>,
    from: Arc<PrivateRegion>,
    into: Arc<PrivateRegion>,
}

impl DiskProbe {
    /// Saves them. An error says why the disk takes nothing; `done` is not called then.
    pub fn save(&self, done: SaveDone) -> Result<()> {
        let saved = Saved {
            chunk: self.chunk,
            space: *SPACE,
            rank: 0,
            parent: None,
            layout: layout()?,
            cache_salt: String::new(),
        };
        let disk = self.disk()?;
        if disk.save(saved, Arc::clone(&self.from) as _, 0, BYTES as u64, done) {
            return Ok(());
        }
        let status = disk.status();
        let reason = status.failed.unwrap_or_else(|| match status.queue_bytes {
            0 => "the disk tier was closed".to_owned(),
            bytes => format!("the disk tier is behind: {bytes} bytes wait to be saved"),
        });
        Err(Error::new(ErrorCode::System, reason))
    }

    /// Loads them.
    pub fn load(&self, done: LoadDone) -> Result<()> {
        let place = (&self.chunk, &*SPACE, 0);
        if self.disk()?.load(place, Arc::clone(&self.into) as _, 0, BYTES as u64, done) {
            return Ok(());
        }
        Err(Error::new(ErrorCode::System, "the disk tier takes no more loads"))
    }

    /// Whether what came back is what went.
    pub fn is_same(&self) -> Result<bool> {
        let mut read = vec![0; BYTES];
        self.into.read(0, &mut read)?;
        Ok(read == self.bytes)
    }

    fn disk(&self) -> Result<&Disk> {
        self.store.disk().ok_or_else(|| Error::new(ErrorCode::Closed, "there is no disk tier"))
    }
}

impl Drop for DiskProbe {
    fn drop(&mut self) {
        if let Ok(disk) = self.disk() {
            disk.remove(&self.chunk, &SPACE, 0);
        }
    }
}

impl Store {
    /// Whether there is a disk.
    pub fn has_disk(&self) -> bool {
        self.disk().is_some()
    }

    /// What finds out whether the disk works.
    pub fn disk_probe(&self) -> Result<DiskProbe> {
        let mut random = [0; 32 + BYTES];
        getrandom::fill(&mut random).map_err(|error| {
            Error::new(ErrorCode::System, format!("no random numbers: {error}"))
        })?;
        let (chunk, bytes) = random.split_at(32);
        let region = || PrivateRegion::new(BYTES as u64).map(Arc::new);
        let (from, into) = (region()?, region()?);
        from.write(0, bytes)?;
        let chunk = chunk.try_into().unwrap_or([0; 32]);
        Ok(DiskProbe { store: self.clone(), chunk, bytes: bytes.to_vec(), from, into })
    }

    /// Takes the objects of the key's range and rank out at once, counted nowhere; says how many it were.
    /// Those that are leased stay.
    pub fn take_out(&self, key: &Key, instance: u64) -> Result<u64> {
        let chunks = self.chunks(key)?;
        let prompt = self.prompt(key);
        let mut state = self.lock();
        let (_, range) = state.range(key, instance, &prompt, &chunks)?;
        let Some(range) = range else { return Ok(0) };
        let mut taken = 0;
        for chunk in chunks.rev() {
            let id = ObjectId { chunk: prompt.hashes[chunk], space: range.space, rank: range.rank };
            let Some(handle) = state.index.get_visible(&id) else { continue };
            if let Some(grant) = state.index.remove_unpinned(handle) {
                state.pool.give_back(grant);
                taken += 1;
            }
        }
        Ok(taken)
    }
}
