//! Why a prompt is no hit. All objects and the log of events are looked at, in slices: the lock is let
//! go between them, and other tasks of the same thread run. What neither memory nor disk has the remote is asked for, once.

use std::collections::{BTreeSet, HashSet};
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use kvferry_core::Result;
use kvferry_core::explain::{
    Evictor, Explanation, LISTED_MAX, MissingChunk, ObjectLayout, Removal,
};
use kvferry_core::key::Key;

use crate::events::What;
use crate::index::{ObjectId, Seen};
use crate::prompt::Prompt;
use crate::remote::Remote;
use crate::space::Space;
use crate::state::{Registered, State};
use crate::store::{Store, ids_of};
use crate::tenants::PROBES;

/// Objects or events that are looked at under one lock: some tens of microseconds.
const SLICE: usize = 4_096;
/// How long the remote may take.
const REMOTE_WAIT: Duration = Duration::from_secs(1);

impl Store {
    /// Begins to look for what there is of the key's range, and for what is known of the first chunk
    /// that not every rank has. Takes no lease and changes nothing. `label` says what a tenant is called, by its salt.
    pub fn explain(
        &self,
        key: &Key,
        label: impl Fn(&str) -> String + Send + 'static,
    ) -> Result<Explaining> {
        let chunks = self.chunks(key)?;
        let prompt = self.prompt(key);
        let (layouts, spaces) =
            self.lock().layouts(key, None).map(|of_ranks| of_ranks.into_iter().unzip()).unzip();
        let registered = spaces.is_some();
        let asked = Asked {
            model_name: key.model_name.clone(),
            world_size: key.world_size,
            cache_salt: key.cache_salt.clone(),
            spaces,
        };
        let phase = match &asked.spaces {
            Some(spaces) => Phase::Hits(Hits::new(vec![spaces.clone()], chunks.start)),
            None => Phase::Layouts { place: 0, found: Vec::new() },
        };
        let (store, label) = (self.clone(), Box::new(label));
        Ok(Explaining { store, prompt, chunks, asked, layouts, registered, phase, label })
    }
}

/// An explanation under way; awaiting it does the work.
pub struct Explaining {
    store: Store,
    prompt: Arc<Prompt>,
    chunks: Range<usize>,
    asked: Asked,
    /// Of each rank, until the remote was asked.
    layouts: Option<Vec<Arc<Registered>>>,
    registered: bool,
    phase: Phase,
    label: Box<dyn Fn(&str) -> String + Send>,
}

/// Whose objects the question is about.
struct Asked {
    model_name: String,
    world_size: u32,
    cache_salt: String,
    /// Of each rank; `None` as long as the layout is not known.
    spaces: Option<Vec<[u8; 32]>>,
}

impl Asked {
    /// The same for whatever layout.
    fn is_for(&self, space: &Space) -> bool {
        let event = &space.event;
        event.model_name == self.model_name
            && event.world_size == self.world_size
            && event.cache_salt == self.cache_salt
    }

    fn is(&self, space: &Space) -> bool {
        self.spaces.as_ref().map_or_else(|| self.is_for(space), |ids| ids.contains(&space.id))
    }
}

enum Phase {
    /// No engine is registered: which layouts of the first chunk are stored?
    Layouts { place: usize, found: Vec<[u8; 32]> },
    /// How many leading chunks are there?
    Hits(Hits),
    /// How many of these objects are in the remote?
    Remote { chunk: usize, objects: Vec<ObjectId>, answer: Arc<Mutex<Answer>> },
    /// Who has the chunk that is missing?
    Objects { chunk: usize, place: usize, found: Found },
    /// Was it there before?
    Log { chunk: usize, before: u64, found: Found },
}

/// The remote's: how many objects are there, and who waits to know.
#[derive(Default)]
struct Answer {
    there: Option<usize>,
    waker: Option<Waker>,
}

/// Leading chunks of one layout after the other; the longest prefix is the answer.
struct Hits {
    first: usize,
    /// The spaces of all ranks, for each layout.
    spaces: Vec<Vec<[u8; 32]>>,
    position: usize,
    chunk: usize,
    best: Option<(usize, usize)>,
}

impl Hits {
    fn new(spaces: Vec<Vec<[u8; 32]>>, first: usize) -> Self {
        Self { first, spaces, position: 0, chunk: first, best: None }
    }
}

/// Where the missing chunk was seen.
struct Found {
    present: Vec<bool>,
    writing: Vec<bool>,
    salts: HashSet<String>,
    models: BTreeSet<String>,
    world_sizes: BTreeSet<u32>,
    layouts: BTreeSet<ObjectLayout>,
}

impl Found {
    fn new(world_size: u32) -> Self {
        let none = vec![false; world_size as usize];
        Self {
            present: none.clone(),
            writing: none,
            salts: HashSet::new(),
            models: BTreeSet::new(),
            world_sizes: BTreeSet::new(),
            layouts: BTreeSet::new(),
        }
    }

    fn add(&mut self, asked: &Asked, chunk_size: u32, seen: &Seen<'_>) {
        let (event, rank) = (&seen.space.event, seen.id.rank as usize);
        let expected = asked.spaces.as_ref().and_then(|spaces| spaces.get(rank));
        if Some(&seen.id.space) == expected {
            let ranks = if seen.visible { &mut self.present } else { &mut self.writing };
            if let Some(rank) = ranks.get_mut(rank) {
                *rank = true;
            }
        } else if !seen.visible {
            // Nobody can find it yet, whatever was asked.
        } else if event.cache_salt != asked.cache_salt {
            // Names under other salts are other tenants', and no salt finds another model's.
            if event.model_name == asked.model_name {
                self.salts.insert(event.cache_salt.clone());
            }
        } else if event.model_name != asked.model_name {
            list(&mut self.models, || event.model_name.clone());
        } else if event.world_size != asked.world_size {
            list(&mut self.world_sizes, || event.world_size);
        } else {
            let layout = &seen.space.registered.layout;
            list(&mut self.layouts, || ObjectLayout {
                shape: layout.shape(chunk_size),
                dtype: layout.dtype.name().to_owned(),
            });
        }
    }

    fn explain(self, chunk: [u8; 32], removed: Option<Removal>, log_since_ms: u64) -> MissingChunk {
        let any = self.present.contains(&true);
        let ranks = |wanted: &dyn Fn(usize) -> bool| {
            (0u32..).take(self.present.len()).filter(|rank| wanted(*rank as usize)).collect()
        };
        MissingChunk {
            chunk,
            missing_ranks: ranks(&|rank| any && !self.present[rank] && !self.writing[rank]),
            writing_ranks: ranks(&|rank| self.writing[rank] && !self.present[rank]),
            other_salts: self.salts.len() as u64,
            other_models: self.models.into_iter().collect(),
            other_world_sizes: self.world_sizes.into_iter().collect(),
            other_layouts: self.layouts.into_iter().collect(),
            removed,
            log_since_ms,
        }
    }
}

fn list<T: Ord>(listed: &mut BTreeSet<T>, item: impl FnOnce() -> T) {
    if listed.len() < LISTED_MAX {
        listed.insert(item());
    }
}

impl Explaining {
    /// Looks at one slice; the explanation when it was the last.
    fn step(&mut self) -> Option<Explanation> {
        let store = self.store.clone();
        let state = store.lock();
        let done = Phase::Layouts { place: 0, found: Vec::new() };
        match std::mem::replace(&mut self.phase, done) {
            Phase::Layouts { place, found } => self.look_for_layouts(&state, place, found),
            Phase::Hits(hits) => return self.count_hits(&state, hits),
            Phase::Remote { chunk, mut objects, answer } => {
                let answer = answer.lock().unwrap_or_else(PoisonError::into_inner);
                objects.truncate(answer.there.unwrap_or_default());
                let there: HashSet<ObjectId> = objects.into_iter().collect();
                return self.add_hits(&state, chunk, &there);
            }
            Phase::Objects { chunk, place, found } => {
                self.look_for_objects(&state, chunk, place, found);
            }
            Phase::Log { chunk, before, found } => {
                return self.look_into_log(&state, chunk, before, found);
            }
        }
        None
    }

    fn look_for_layouts(&mut self, state: &State, place: usize, mut found: Vec<[u8; 32]>) {
        let next = self.prompt.hashes.get(self.chunks.start).and_then(|first| {
            state.index.find(first, place..place + SLICE, |seen| {
                let known = !seen.visible || found.contains(&seen.id.space);
                if !known && found.len() < LISTED_MAX && self.asked.is_for(seen.space) {
                    found.push(seen.id.space);
                }
            })
        });
        self.phase = match next {
            Some(place) => Phase::Layouts { place, found },
            None => {
                let ranks = self.asked.world_size as usize;
                let spaces = found.into_iter().map(|space| vec![space; ranks]).collect();
                Phase::Hits(Hits::new(spaces, self.chunks.start))
            }
        };
    }

    fn count_hits(&mut self, state: &State, mut hits: Hits) -> Option<Explanation> {
        let mut left = SLICE;
        while let Some(spaces) = hits.spaces.get(hits.position) {
            while hits.chunk < self.chunks.end {
                let chunk = self.prompt.hashes[hits.chunk];
                let mut ids = (0u32..).zip(spaces).map(|(rank, space)| ObjectId {
                    chunk,
                    space: *space,
                    rank,
                });
                if !ids.all(|id| self.has(state, &id)) {
                    break;
                }
                hits.chunk += 1;
                left = left.saturating_sub(self.asked.world_size as usize);
                if left == 0 {
                    self.phase = Phase::Hits(hits);
                    return None;
                }
            }
            if hits.best.is_none_or(|(longest, _)| hits.chunk > longest) {
                hits.best = Some((hits.chunk, hits.position));
            }
            hits.position += 1;
            hits.chunk = hits.first;
        }
        let chunk = hits.best.map_or(hits.first, |(chunk, _)| chunk);
        self.asked.spaces = hits.best.map(|(_, position)| hits.spaces.swap_remove(position));
        match self.ask_remote(state, chunk) {
            Some(asking) => {
                self.phase = asking;
                None
            }
            None => self.add_hits(state, chunk, &HashSet::new()),
        }
    }

    /// Whether memory or disk has it.
    fn has(&self, state: &State, id: &ObjectId) -> bool {
        let disk = self.store.disk();
        state.index.get_visible(id).is_some()
            || disk.is_some_and(|disk| disk.find(&id.chunk, &id.space, id.rank).is_some())
    }

    /// Asks for what is missing from `chunk` on; `None`: nothing is missing, or there is nobody to ask.
    fn ask_remote(&mut self, state: &State, chunk: usize) -> Option<Phase> {
        let remote = self.store.remote()?;
        let (layouts, spaces) = (self.layouts.take()?, self.asked.spaces.as_ref()?);
        let objects = (chunk..self.chunks.end).flat_map(|chunk| {
            let bytes = layouts
                .iter()
                .map(|it| Remote::value_bytes(&it.layout, &self.asked.cache_salt, it.object_bytes));
            ids_of(&self.prompt, chunk, spaces).zip(bytes)
        });
        let missing = objects.filter(|(id, _)| !self.has(state, id));
        let missing: Vec<(ObjectId, u64)> = missing.take(SLICE).collect();
        let objects = missing.iter().map(|(id, _)| *id).collect();
        let answer = Arc::new(Mutex::new(Answer::default()));
        let told = Arc::clone(&answer);
        let found = Box::new(move |there| {
            let waker = {
                let mut answer = told.lock().unwrap_or_else(PoisonError::into_inner);
                answer.there = Some(there);
                answer.waker.take()
            };
            waker.into_iter().for_each(Waker::wake);
        });
        let asked = remote.find(missing, Instant::now() + REMOTE_WAIT, found);
        asked.then_some(Phase::Remote { chunk, objects, answer })
    }

    /// Goes on with what is missing after these; the explanation if nothing is.
    fn add_hits(
        &mut self,
        state: &State,
        mut chunk: usize,
        there: &HashSet<ObjectId>,
    ) -> Option<Explanation> {
        if let Some(spaces) = self.asked.spaces.as_ref().filter(|_| !there.is_empty()) {
            let has = |id: &ObjectId| there.contains(id) || self.has(state, id);
            while chunk < self.chunks.end && ids_of(&self.prompt, chunk, spaces).all(|id| has(&id))
            {
                chunk += 1;
            }
        }
        if chunk == self.chunks.end {
            return Some(self.explanation(chunk, None));
        }
        let found = Found::new(self.asked.world_size);
        self.phase = Phase::Objects { chunk, place: 0, found };
        None
    }

    fn look_for_objects(&mut self, state: &State, chunk: usize, place: usize, mut found: Found) {
        let chunk_size = self.store.chunk_size();
        let hash = &self.prompt.hashes[chunk];
        let next = state.index.find(hash, place..place + SLICE, |seen| {
            found.add(&self.asked, chunk_size, &seen);
        });
        self.phase = match (next, &self.asked.spaces) {
            (Some(place), _) => Phase::Objects { chunk, place, found },
            // It was stored meanwhile: so it is no miss, and the next one is looked at.
            (None, Some(spaces)) if !found.present.contains(&false) => {
                let mut hits = Hits::new(vec![spaces.clone()], self.chunks.start);
                hits.chunk = chunk + 1;
                Phase::Hits(hits)
            }
            (None, _) => Phase::Log { chunk, before: u64::MAX, found },
        };
    }

    fn look_into_log(
        &mut self,
        state: &State,
        chunk: usize,
        before: u64,
        found: Found,
    ) -> Option<Explanation> {
        let log = &state.index.events;
        let before = before.min(log.next());
        let hash = self.prompt.hashes[chunk];
        let removed = log.before(before).take(SLICE).find_map(|entry| {
            let is_there = found.present.get(entry.rank as usize).copied().unwrap_or_default();
            let same = entry.chunk == hash && !is_there && self.asked.is(&entry.origin.space);
            let (true, What::Removed(cause, by)) = (same, &entry.what) else { return None };
            let by = by.as_deref().map(|salt| Evictor {
                tenant: if salt == PROBES { "readyz".into() } else { (self.label)(salt) },
                own: salt == self.asked.cache_salt,
            });
            Some(Removal { cause: *cause, at_ms: entry.at_ms, by })
        });
        let rest = before.saturating_sub(SLICE as u64);
        if removed.is_none() && rest > log.first() {
            self.phase = Phase::Log { chunk, before: rest, found };
            return None;
        }
        let missing = found.explain(hash, removed, log.since_ms());
        Some(self.explanation(chunk, Some(missing)))
    }

    fn explanation(&self, chunk: usize, missing: Option<MissingChunk>) -> Explanation {
        Explanation {
            chunks: self.chunks.len() as u64,
            hit_chunks: (chunk - self.chunks.start) as u64,
            registered: self.registered,
            missing,
        }
    }
}

impl Future for Explaining {
    type Output = Explanation;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Explanation> {
        if let Phase::Remote { answer, .. } = &self.phase {
            let mut answer = answer.lock().unwrap_or_else(PoisonError::into_inner);
            if answer.there.is_none() {
                answer.waker = Some(context.waker().clone());
                return Poll::Pending;
            }
        }
        match self.step() {
            Some(explanation) => Poll::Ready(explanation),
            None => {
                context.waker().wake_by_ref(); // others first
                Poll::Pending
            }
        }
    }
}
