//! What a scheduler knows of each request, and the plan of a step: which chunks are loaded, which stored.
//!
//! All counts are tokens. A request's first `external_hit` tokens are in the cache, its first `local_hit`
//! tokens in the engine's own prefix cache; both count the same leading tokens. The rules are those of
//! vLLM 0.33's LMCacheMPConnector (store plan: vLLM pull request 39719) and of LMCache 0.5.6's, which
//! agree but for the limits: where vLLM counts block hashes, `tokens` are those that have one.

use std::mem;

use crate::defect::{Defect, is_active};
use crate::{Error, Result};

/// Words of one operation: handle, direction (0 load, 1 store), first token, token after the last,
/// tokens at the start that must not be overwritten.
pub const OPERATION_WORDS: usize = 5;

/// Requests at most, if not said otherwise.
pub const REQUESTS_MAX: u32 = 1 << 20;

/// Where a request stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum State {
    /// The cache was asked, or will be; no blocks yet.
    Prefetching = 0,
    /// Blocks are allocated, and the next plan loads into them.
    WaitingForLoad = 1,
    /// Nothing is to be loaded (any more).
    Ready = 2,
    /// A load failed: the cache is left out until blocks are allocated anew.
    Bypassed = 3,
}

impl State {
    /// The state of a number, see the variants.
    pub fn from_number(number: u32) -> Result<Self> {
        match number {
            0 => Ok(Self::Prefetching),
            1 => Ok(Self::WaitingForLoad),
            2 => Ok(Self::Ready),
            3 => Ok(Self::Bypassed),
            _ => Err(Error::invalid(format!("state {number} is not in 0..=3"))),
        }
    }
}

/// One request, without its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tracker {
    /// Tokens that have a hash: of the prompt, and generated ones.
    pub tokens: u32,
    /// Tokens beyond which nothing is stored; `u32::MAX` for none.
    pub limit: u32,
    /// Tokens that were scheduled since the request began, or began anew.
    pub scheduled: u32,
    /// Leading tokens in the engine's own prefix cache.
    pub local_hit: u32,
    /// Leading tokens in the cache.
    pub external_hit: u32,
    /// Leading tokens that need not be stored.
    pub stored: u32,
    /// Where the request stands.
    pub state: State,
}

impl Tracker {
    /// A request of `tokens` tokens that nothing is known of yet.
    pub fn new(tokens: u32, limit: u32) -> Self {
        let state = State::Prefetching;
        Self { tokens, limit, scheduled: 0, local_hit: 0, external_hit: 0, stored: 0, state }
    }

    /// Whether the cache has more than the engine itself.
    pub fn needs_load(&self) -> bool {
        self.external_hit > self.local_hit
    }
}

/// What all requests of a table have in common.
#[derive(Debug, Clone)]
pub struct Layout {
    /// Tokens of one chunk.
    pub chunk: u32,
    /// Tokens of one block of each KV group; 0 for a group that is neither stored nor loaded. All divide
    /// the chunk.
    pub groups: Vec<u32>,
    /// Block ids are below it.
    pub blocks: u32,
    /// When a block id that is appended stands already among the last so many, the block has moved: 0 takes
    /// its old place. 0 for never.
    pub relocation_window: u32,
}

/// The requests of one scheduler.
#[derive(Debug)]
pub struct Trackers {
    layout: Layout,
    tokens: Vec<u32>,
    limit: Vec<u32>,
    scheduled: Vec<u32>,
    local_hit: Vec<u32>,
    external_hit: Vec<u32>,
    stored: Vec<u32>,
    state: Vec<State>,
    /// Of each request, the blocks of each group.
    blocks: Vec<Vec<u32>>,
    /// When the request was added, 0 while there is none.
    added: Vec<u64>,
    /// The last step that named the request.
    step: Vec<u64>,
    free: Vec<u32>,
    loading: Vec<u32>,
    additions: u64,
    steps: u64,
    operations: Vec<Operation>,
}

/// The requests of one step, in the order of their plans.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// Each at most once.
    pub handles: &'a [u32],
    /// Tokens that are scheduled now, for each.
    pub scheduled: &'a [u32],
    /// Tokens that have a hash by now, for each.
    pub tokens: &'a [u32],
    /// Where the new blocks of each request's groups begin in `block_ids`, and their end: requests ×
    /// groups + 1.
    pub block_offsets: &'a [u32],
    /// New blocks, behind those that the request has.
    pub block_ids: &'a [u32],
}

/// Where a plan is written. Loads come before stores, older requests first.
#[derive(Debug)]
pub struct Plan<'a> {
    /// [`OPERATION_WORDS`] for each operation.
    pub operations: &'a mut [u32],
    /// Where the blocks of each operation's groups begin in `block_ids`, and their end: operations ×
    /// groups + 1.
    pub block_offsets: &'a mut [u32],
    /// The blocks of the operations. They may be fewer than the range needs, when the request has fewer.
    pub block_ids: &'a mut [u32],
}

/// How much a plan holds, or would.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Operations.
    pub operations: usize,
    /// Blocks of all of them.
    pub blocks: usize,
}

#[derive(Debug, Clone, Copy)]
struct Operation {
    handle: u32,
    store: bool,
    start: u32,
    end: u32,
    skip: u32,
}

/// A plan being written.
struct Writer<'a, 'b> {
    plan: &'a mut Plan<'b>,
    operations: usize,
    blocks: usize,
}

impl Writer<'_, '_> {
    fn write<'c>(
        &mut self,
        words: [u32; OPERATION_WORDS],
        groups: impl ExactSizeIterator<Item = &'c [u32]>,
    ) {
        let Plan { operations, block_offsets, block_ids } = &mut *self.plan;
        operations[self.operations * OPERATION_WORDS..][..OPERATION_WORDS].copy_from_slice(&words);
        let first = self.operations * groups.len() + 1;
        for (ids, end) in groups.zip(&mut block_offsets[first..]) {
            block_ids[self.blocks..][..ids.len()].copy_from_slice(ids);
            self.blocks += ids.len();
            *end = u32::try_from(self.blocks).unwrap_or(u32::MAX);
        }
        self.operations += 1;
    }
}

impl Trackers {
    /// An empty table.
    pub fn new(layout: Layout) -> Result<Self> {
        let Layout { chunk, groups, .. } = &layout;
        if *chunk == 0 || groups.is_empty() {
            return Err(Error::invalid(format!(
                "chunks of {chunk} tokens in {} groups: both are at least 1",
                groups.len()
            )));
        }
        if let Some(block) =
            groups.iter().find(|block| **block > 0 && !chunk.is_multiple_of(**block))
        {
            return Err(Error::invalid(format!(
                "a chunk of {chunk} tokens is not a whole number of blocks of {block}; \
                 choose a chunk size that the block size divides"
            )));
        }
        Ok(Self {
            layout,
            tokens: Vec::new(),
            limit: Vec::new(),
            scheduled: Vec::new(),
            local_hit: Vec::new(),
            external_hit: Vec::new(),
            stored: Vec::new(),
            state: Vec::new(),
            blocks: Vec::new(),
            added: Vec::new(),
            step: Vec::new(),
            free: Vec::new(),
            loading: Vec::new(),
            additions: 0,
            steps: 0,
            operations: Vec::new(),
        })
    }

    /// Requests in the table.
    pub fn len(&self) -> usize {
        self.tokens.len() - self.free.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds a request with the blocks of each of its groups, and returns its handle, which may be that of one
    /// removed before.
    pub fn add(&mut self, tracker: Tracker, offsets: &[u32], ids: &[u32]) -> Result<u32> {
        self.check_blocks(1, offsets, ids)?;
        let handle = match self.free.pop() {
            Some(handle) => handle,
            None => {
                let handle = u32::try_from(self.tokens.len()).unwrap_or(u32::MAX);
                if handle >= REQUESTS_MAX {
                    return Err(Error::invalid(format!(
                        "{REQUESTS_MAX} requests are tracked already; finish some"
                    )));
                }
                self.grow();
                handle
            }
        };
        self.additions += 1;
        let at = handle as usize;
        self.added[at] = self.additions;
        self.write(at, tracker);
        for (group, pair) in self.groups_of(at).zip(offsets.windows(2)) {
            self.blocks[group].extend_from_slice(slice(ids, pair));
        }
        if tracker.state == State::WaitingForLoad {
            self.loading.push(handle);
        }
        Ok(handle)
    }

    /// Forgets a request.
    pub fn remove(&mut self, handle: u32) -> Result<()> {
        let at = self.at(handle)?;
        self.added[at] = 0;
        self.loading.retain(|loading| *loading != handle);
        for group in self.groups_of(at) {
            self.blocks[group] = Vec::new();
        }
        self.free.push(handle);
        Ok(())
    }

    /// The request.
    pub fn get(&self, handle: u32) -> Result<Tracker> {
        self.at(handle).map(|at| self.read(at))
    }

    /// Its blocks of a group.
    pub fn blocks(&self, handle: u32, group: usize) -> Result<&[u32]> {
        let at = self.at(handle)?;
        let groups = self.layout.groups.len();
        if group >= groups {
            return Err(Error::invalid(format!("group {group} is not one of the {groups}")));
        }
        Ok(&self.blocks[at * groups + group])
    }

    /// Takes in what a lookup found: leading tokens in the engine's own prefix cache and in the cache.
    pub fn set_hits(&mut self, handle: u32, local: u32, external: u32) -> Result<()> {
        let at = self.at(handle)?;
        self.check_external(external, self.tokens[at])?;
        self.local_hit[at] = local;
        self.external_hit[at] = external;
        // Not added to what an earlier answer to the same question said: it is the same tokens.
        self.stored[at] = external;
        Ok(())
    }

    /// Takes in the blocks that the engine allocated: for each group all that the request has now, those
    /// before included. A request that has not been waited for becomes one to `load`, if the cache has more
    /// than the engine, or ready.
    pub fn allocate(
        &mut self,
        handle: u32,
        block_offsets: &[u32],
        block_ids: &[u32],
        load: bool,
    ) -> Result<State> {
        let at = self.at(handle)?;
        let groups = self.groups_of(at);
        self.check_blocks(1, block_offsets, block_ids)?;
        let lists = || block_offsets.windows(2).map(|pair| slice(block_ids, pair));
        for (group, ids) in groups.clone().zip(lists()) {
            if ids.len() < self.blocks[group].len() {
                return Err(Error::invalid(format!(
                    "the request has {} blocks and was allocated {}: pass all of them, not the new ones",
                    self.blocks[group].len(),
                    ids.len()
                )));
            }
            // What is stored and loaded goes by the blocks that are known: others' by now, if these are not the same.
            let moves = self.layout.relocation_window > 0;
            let others = self.blocks[group]
                .iter()
                .zip(ids)
                .find(|(known, id)| known != id && !(moves && (**known == 0 || **id == 0)));
            if let Some((known, id)) = others {
                return Err(Error::invalid(format!(
                    "the request was allocated block {id} where it has block {known}: one that was preempted is \
                     asked for again, with the status PREEMPTED, before it has other blocks; one that has ended is \
                     removed first; a sliding window that gives blocks up takes a relocation window"
                )));
            }
        }
        for (group, ids) in groups.zip(lists()) {
            let known = self.blocks[group].len();
            append(&mut self.blocks[group], &ids[known..], self.layout.relocation_window);
        }
        let state = match self.state[at] {
            State::Prefetching if load && self.read(at).needs_load() => {
                self.loading.push(handle);
                State::WaitingForLoad
            }
            State::WaitingForLoad => State::WaitingForLoad,
            State::Prefetching | State::Ready | State::Bypassed => State::Ready,
        };
        self.state[at] = state;
        Ok(state)
    }

    /// Leaves the cache out for a request whose load failed: it is computed from its first token.
    pub fn bypass(&mut self, handle: u32) -> Result<()> {
        let at = self.at(handle)?;
        let Tracker { tokens, limit, scheduled, .. } = self.read(at);
        self.loading.retain(|loading| *loading != handle);
        self.write(
            at,
            Tracker { scheduled, state: State::Bypassed, ..Tracker::new(tokens, limit) },
        );
        Ok(())
    }

    /// Plans a step: what is waited for is loaded, and of the requests in `step` those whole chunks are
    /// stored that are computed by the step's end and are not stored yet. `false`: `plan` is smaller than the
    /// size says, and nothing has changed.
    pub fn plan(&mut self, step: &Step<'_>, plan: &mut Plan<'_>) -> Result<(Size, bool)> {
        self.check_step(step)?;
        let mut operations = mem::take(&mut self.operations);
        operations.clear();
        let size = self.collect(step, &mut operations);
        let groups = self.layout.groups.len();
        let fits = size.as_ref().is_ok_and(|size| {
            plan.operations.len() / OPERATION_WORDS >= size.operations
                && plan.block_offsets.len() > size.operations * groups
                && plan.block_ids.len() >= size.blocks
        });
        if fits {
            let loads = operations.partition_point(|operation| !operation.store);
            let mut writer = Writer { plan, operations: 0, blocks: 0 };
            writer.plan.block_offsets[0] = 0;
            self.emit(&operations[..loads], &mut writer);
            self.apply(step); // loads go to the blocks that were there before
            self.emit(&operations[loads..], &mut writer);
        }
        self.operations = operations;
        Ok((size?, fits))
    }

    /// The operations of a step, from what it would make of the table.
    fn collect(&mut self, step: &Step<'_>, operations: &mut Vec<Operation>) -> Result<Size> {
        let mut blocks = 0;
        // Handles are used anew; age is not.
        self.loading.sort_unstable_by_key(|handle| self.added[*handle as usize]);
        for handle in &self.loading {
            let at = *handle as usize;
            let tracker = self.read(at);
            if !tracker.needs_load() {
                continue;
            }
            self.check_external(tracker.external_hit, tracker.tokens)?;
            let start = tracker.local_hit / self.layout.chunk * self.layout.chunk;
            let skip = tracker.local_hit - start;
            let end = tracker.external_hit;
            operations.push(Operation { handle: *handle, store: false, start, end, skip });
            for (group, block) in self.groups_of(at).zip(&self.layout.groups) {
                blocks += covered(self.blocks[group].len(), start, end, *block).len();
            }
        }
        let groups = self.layout.groups.len();
        for (i, handle) in step.handles.iter().enumerate() {
            let at = *handle as usize;
            let mut tracker = self.read(at);
            tracker.tokens = step.tokens[i];
            tracker.scheduled = tracker.scheduled.saturating_add(step.scheduled[i]);
            let new = &step.block_offsets[i * groups..=(i + 1) * groups];
            let allocated = |group: usize| {
                let held = self.blocks[at * groups + group].len();
                held + (new[group + 1] - new[group]) as usize
            };
            let Some((start, end)) = self.to_store(&tracker, allocated) else { continue };
            operations.push(Operation { handle: *handle, store: true, start, end, skip: 0 });
            for (group, block) in self.layout.groups.iter().enumerate() {
                blocks += covered(allocated(group), start, end, *block).len();
            }
        }
        Ok(Size { operations: operations.len(), blocks })
    }

    /// The whole chunks of a request that can be stored and are not.
    fn to_store(
        &self,
        tracker: &Tracker,
        allocated: impl Fn(usize) -> usize,
    ) -> Option<(u32, u32)> {
        let Tracker { tokens, limit, scheduled, local_hit, external_hit, stored, .. } = *tracker;
        // The greater of the hits, not their sum: both count the same leading tokens. Nor the external hit
        // alone, which ends at a chunk: blocks between the two would never be stored.
        let hit = match () {
            () if is_active(Defect::SumForMax) => local_hit.saturating_add(external_hit),
            () if is_active(Defect::ExternalHitAlone) => external_hit,
            () => local_hit.max(external_hit),
        };
        let computed = u64::from(scheduled) + u64::from(hit);
        let groups = self.layout.groups.iter().enumerate().filter(|(_, block)| **block > 0);
        let allocated =
            groups.map(|(group, block)| allocated(group) as u64 * u64::from(*block)).min();
        let available =
            computed.min(allocated.unwrap_or(0)).min(u64::from(tokens)).min(u64::from(limit));
        let chunk = u64::from(self.layout.chunk);
        let chunks = available.saturating_sub(u64::from(stored)) / chunk;
        let end = u32::try_from(u64::from(stored) + chunks * chunk).ok()?;
        (chunks > 0).then_some((stored, end))
    }

    fn apply(&mut self, step: &Step<'_>) {
        for handle in mem::take(&mut self.loading) {
            self.state[handle as usize] = State::Ready;
        }
        let groups = self.layout.groups.len();
        for (i, handle) in step.handles.iter().enumerate() {
            let at = *handle as usize;
            self.tokens[at] = step.tokens[i];
            self.scheduled[at] = self.scheduled[at].saturating_add(step.scheduled[i]);
            for group in 0..groups {
                let new = slice(step.block_ids, &step.block_offsets[i * groups + group..][..2]);
                let blocks = &mut self.blocks[at * groups + group];
                append(blocks, new, self.layout.relocation_window);
            }
        }
    }

    fn emit(&mut self, operations: &[Operation], writer: &mut Writer<'_, '_>) {
        for operation in operations {
            let Operation { handle, store, start, end, skip } = *operation;
            if store {
                self.stored[handle as usize] = end;
            }
            let blocks = self.groups_of(handle as usize).zip(&self.layout.groups);
            let blocks = blocks.map(|(group, block)| {
                let ids = &self.blocks[group];
                &ids[covered(ids.len(), start, end, *block)]
            });
            writer.write([handle, u32::from(store), start, end, skip], blocks);
        }
    }

    fn check_step(&mut self, step: &Step<'_>) -> Result<()> {
        let requests = step.handles.len();
        if step.scheduled.len() != requests || step.tokens.len() != requests {
            return Err(Error::invalid(format!(
                "{requests} requests have {} counts of scheduled tokens and {} of tokens",
                step.scheduled.len(),
                step.tokens.len()
            )));
        }
        self.check_blocks(requests, step.block_offsets, step.block_ids)?;
        self.steps += 1;
        for handle in step.handles {
            let at = self.at(*handle)?;
            if mem::replace(&mut self.step[at], self.steps) == self.steps {
                return Err(Error::invalid(format!("request {handle} is in the step twice")));
            }
        }
        Ok(())
    }

    fn check_blocks(&self, requests: usize, offsets: &[u32], ids: &[u32]) -> Result<()> {
        let groups = self.layout.groups.len();
        let ascending = offsets.is_sorted() && offsets.first() == Some(&0);
        let whole = offsets.last().is_some_and(|last| *last as usize == ids.len());
        if offsets.len() != requests * groups + 1 || !ascending || !whole {
            return Err(Error::invalid(format!(
                "the block offsets of {requests} requests in {groups} groups are {} ascending numbers from 0 to \
                 the number of block ids, {}",
                requests * groups + 1,
                ids.len()
            )));
        }
        match ids.iter().find(|id| **id >= self.layout.blocks) {
            None => Ok(()),
            Some(id) => {
                Err(Error::invalid(format!("block {id} is not below {}", self.layout.blocks)))
            }
        }
    }

    fn check_external(&self, external: u32, tokens: u32) -> Result<()> {
        let chunk = self.layout.chunk;
        if external.is_multiple_of(chunk) && external <= tokens {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "a hit of {external} tokens is not a whole number of chunks of {chunk} within the {tokens} of the \
             request"
        )))
    }

    fn at(&self, handle: u32) -> Result<usize> {
        let at = handle as usize;
        match self.added.get(at) {
            Some(added) if *added > 0 => Ok(at),
            _ => Err(Error::invalid(format!("request {handle} is not tracked, or no more"))),
        }
    }

    fn groups_of(&self, at: usize) -> std::ops::Range<usize> {
        let groups = self.layout.groups.len();
        at * groups..(at + 1) * groups
    }

    fn grow(&mut self) {
        for column in [
            &mut self.tokens,
            &mut self.limit,
            &mut self.scheduled,
            &mut self.local_hit,
            &mut self.external_hit,
            &mut self.stored,
        ] {
            column.push(0);
        }
        self.state.push(State::Ready);
        self.added.push(0);
        self.step.push(0);
        let groups = self.layout.groups.len();
        self.blocks.resize_with(self.blocks.len() + groups, Vec::new);
    }

    fn read(&self, at: usize) -> Tracker {
        Tracker {
            tokens: self.tokens[at],
            limit: self.limit[at],
            scheduled: self.scheduled[at],
            local_hit: self.local_hit[at],
            external_hit: self.external_hit[at],
            stored: self.stored[at],
            state: self.state[at],
        }
    }

    fn write(&mut self, at: usize, tracker: Tracker) {
        self.tokens[at] = tracker.tokens;
        self.limit[at] = tracker.limit;
        self.scheduled[at] = tracker.scheduled;
        self.local_hit[at] = tracker.local_hit;
        self.external_hit[at] = tracker.external_hit;
        self.stored[at] = tracker.stored;
        self.state[at] = tracker.state;
        for group in self.groups_of(at) {
            self.blocks[group].clear();
        }
    }
}

/// Adds blocks behind those there are; see [`Layout::relocation_window`].
fn append(blocks: &mut Vec<u32>, new: &[u32], window: u32) {
    let known = blocks.len();
    blocks.extend_from_slice(new);
    let (known, new) = blocks.split_at_mut(known);
    let from = known.len().saturating_sub(window as usize);
    for id in new.iter().filter(|id| **id != 0) {
        if let Some(moved) = known[from..].iter_mut().find(|old| *old == id) {
            *moved = 0;
        }
    }
}

/// Which of a request's blocks hold a range of tokens; fewer when it has fewer.
fn covered(blocks: usize, start: u32, end: u32, tokens_per_block: u32) -> std::ops::Range<usize> {
    if tokens_per_block == 0 {
        return 0..0;
    }
    let end = ((end / tokens_per_block) as usize).min(blocks);
    let start = (start / tokens_per_block) as usize;
    start.min(end)..end
}

fn slice<'a>(ids: &'a [u32], offsets: &[u32]) -> &'a [u32] {
    match offsets {
        [start, end, ..] => ids.get(*start as usize..*end as usize).unwrap_or_default(),
        _ => &[],
    }
}

#[cfg(test)]
mod tests;
