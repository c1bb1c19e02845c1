//! Tenants: how much of the memory each has, how much it may have, and how much nobody takes from it.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use kvferry_core::key::check_salt;
use kvferry_core::{Error, Result};

use crate::eviction::links::{Links, List, NONE};
use crate::index::Handle;
use crate::probe::PROBE_MODEL;

/// Tenants that may be named.
const NAMED_MAX: usize = 65_536;

/// The tenant of what is stored to see whether storing works: no salt has a NUL. No quota holds for it.
pub(crate) const PROBES: &str = "\0probes";

/// Whose objects of this model and salt are.
pub(crate) fn tenant_of<'a>(model_name: &str, cache_salt: &'a str) -> &'a str {
    if model_name == PROBE_MODEL { PROBES } else { cache_salt }
}

/// What a tenant may have of the memory, and what it keeps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Quota {
    /// Bytes that it has at most; what it stores beyond takes the place of its own. `None`: no bound of its own.
    pub cap: Option<u64>,
    /// Bytes below which no other tenant's chunks take its place.
    pub guarantee: u64,
}

/// The quotas of all tenants. A name is a salt, and the default is none: no salt means it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Quotas {
    /// Of those that are named, by their salts; "" is who has none.
    pub named: BTreeMap<String, Quota>,
    /// Of each other one. Its guarantee holds as far as the memory goes: where all that may go is guaranteed to
    /// tenants that are not named, the oldest of that goes.
    pub default: Quota,
}

impl Quotas {
    /// Whether they can be kept in `memory` bytes.
    ///
    /// # Errors
    /// A salt that is none, a cap below its guarantee, guarantees that together are more than the memory, or too
    /// many names. The error names the salt.
    pub fn check(&self, memory: u64) -> Result<()> {
        if self.named.len() > NAMED_MAX {
            return Err(Error::invalid(format!(
                "{} tenants have quotas: name {NAMED_MAX} at most",
                self.named.len()
            )));
        }
        let mut guaranteed = 0_u64;
        for (salt, quota) in &self.named {
            check_salt(salt)?;
            quota.check(&format!("the tenant {salt:?}"))?;
            guaranteed = guaranteed.saturating_add(quota.guarantee);
        }
        self.default.check("the default")?;
        if guaranteed > memory {
            return Err(Error::invalid(format!(
                "{guaranteed} bytes are guaranteed, and the memory has {memory}: guarantee less, or start the server with more"
            )));
        }
        Ok(())
    }

    fn of(&self, salt: &str) -> (Quota, bool) {
        match self.named.get(salt) {
            Some(quota) => (*quota, true),
            None if salt == PROBES => (Quota::default(), false),
            None => (self.default, false),
        }
    }
}

impl Quota {
    fn check(&self, whose: &str) -> Result<()> {
        match self.cap {
            Some(cap) if cap < self.guarantee => Err(Error::invalid(format!(
                "the cap of {whose}, {cap} bytes, is below its guarantee of {}",
                self.guarantee
            ))),
            _ => Ok(()),
        }
    }
}

/// How a tenant stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TenantStatus {
    /// Its salt; "" for none.
    pub cache_salt: String,
    /// What holds for it.
    pub quota: Quota,
    /// Whether it is named, or has the default.
    pub named: bool,
    /// Bytes of memory that its objects take, being written included.
    pub used_bytes: u64,
    /// How many they are.
    pub objects: u64,
    /// Objects that made room since it has some.
    pub evicted_objects: u64,
    /// Their bytes.
    pub evicted_bytes: u64,
}

/// A tenant that has objects, or is named.
struct Tenant {
    status: TenantStatus,
    /// Its salt, for the log of events.
    name: Arc<str>,
    /// Its objects that may go, those that became so first first.
    free: List,
    /// Objects that the policy wanted to go, and that the guarantee keeps.
    parked: VecDeque<(u64, Handle)>,
}

/// All tenants, by number.
#[derive(Default)]
pub(crate) struct Tenants {
    numbers: HashMap<String, u32>,
    all: Vec<Option<Tenant>>,
    unused: Vec<u32>,
    quotas: Quotas,
    /// Of the lists of what may go, by places in the index.
    links: Links,
    /// Objects parked so far: the order among tenants.
    parkings: u64,
}

impl Tenants {
    pub(crate) fn quotas(&self) -> &Quotas {
        &self.quotas
    }

    /// What is parked is to be released then: guarantees may be others.
    pub(crate) fn set_quotas(&mut self, quotas: Quotas) {
        self.quotas = quotas;
        for tenant in self.all.iter_mut().flatten() {
            (tenant.status.quota, tenant.status.named) = self.quotas.of(&tenant.status.cache_salt);
        }
        let named: Vec<String> = self.quotas.named.keys().cloned().collect();
        for salt in &named {
            self.number(salt);
        }
        for number in 0..self.all.len() {
            self.forget_idle(u32::try_from(number).unwrap_or(NONE));
        }
    }

    /// The tenant of this salt, who is known from now on.
    pub(crate) fn number(&mut self, salt: &str) -> u32 {
        if let Some(number) = self.numbers.get(salt) {
            return *number;
        }
        let (quota, named) = self.quotas.of(salt);
        let status = TenantStatus {
            cache_salt: salt.to_owned(),
            quota,
            named,
            used_bytes: 0,
            objects: 0,
            evicted_objects: 0,
            evicted_bytes: 0,
        };
        let (name, free, parked) = (salt.into(), List::default(), VecDeque::new());
        let tenant = Some(Tenant { status, name, free, parked });
        let number = match self.unused.pop() {
            Some(number) => {
                self.all[number as usize] = tenant;
                number
            }
            None => {
                self.all.push(tenant);
                u32::try_from(self.all.len() - 1).unwrap_or(NONE)
            }
        };
        self.numbers.insert(salt.to_owned(), number);
        number
    }

    /// The same of one that is known.
    pub(crate) fn find(&self, salt: &str) -> Option<u32> {
        self.numbers.get(salt).copied()
    }

    /// Forgets who has nothing and is not named.
    pub(crate) fn forget_idle(&mut self, number: u32) {
        let tenant = self.all.get(number as usize).and_then(Option::as_ref);
        if let Some(Tenant { status, .. }) = tenant.filter(|it| it.status.objects == 0)
            && !status.named
        {
            self.numbers.remove(&status.cache_salt);
            self.all[number as usize] = None;
            self.unused.push(number);
        }
    }

    fn get(&mut self, number: u32) -> Option<&mut Tenant> {
        self.all.get_mut(number as usize)?.as_mut()
    }

    fn status(&self, number: u32) -> Option<&TenantStatus> {
        Some(&self.all.get(number as usize)?.as_ref()?.status)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &TenantStatus> {
        self.all.iter().flatten().map(|tenant| &tenant.status)
    }

    /// Its salt.
    pub(crate) fn name(&self, number: u32) -> Option<Arc<str>> {
        Some(Arc::clone(&self.all.get(number as usize)?.as_ref()?.name))
    }

    pub(crate) fn used(&self, number: u32) -> u64 {
        self.status(number).map_or(0, |status| status.used_bytes)
    }

    pub(crate) fn cap(&self, number: u32) -> u64 {
        self.status(number).and_then(|status| status.quota.cap).unwrap_or(u64::MAX)
    }

    /// Whether it has more than is guaranteed to it, and would without so many bytes.
    pub(crate) fn may_lose(&self, number: u32, bytes: u64) -> bool {
        self.status(number).is_none_or(|status| {
            let left = status.used_bytes.checked_sub(bytes);
            left.is_some_and(|left| left >= status.quota.guarantee)
        })
    }

    /// Bytes that it has above its guarantee.
    pub(crate) fn above(&self, number: u32) -> u64 {
        self.status(number)
            .map_or(0, |status| status.used_bytes.saturating_sub(status.quota.guarantee))
    }

    pub(crate) fn charge(&mut self, number: u32, bytes: u64) {
        if let Some(tenant) = self.get(number) {
            tenant.status.used_bytes += bytes;
            tenant.status.objects += 1;
        }
    }

    pub(crate) fn discharge(&mut self, number: u32, bytes: u64) {
        if let Some(tenant) = self.get(number) {
            tenant.status.used_bytes -= bytes;
            tenant.status.objects -= 1;
        }
    }

    pub(crate) fn count_evicted(&mut self, number: u32, bytes: u64) {
        if let Some(tenant) = self.get(number) {
            tenant.status.evicted_objects += 1;
            tenant.status.evicted_bytes += bytes;
        }
    }

    /// The object at `place` may go.
    pub(crate) fn list(&mut self, number: u32, place: u32) {
        self.links.grow(place as usize + 1);
        if let Some(tenant) = self.all.get_mut(number as usize).and_then(Option::as_mut) {
            self.links.push(&mut tenant.free, place);
        }
    }

    /// It may not, after all.
    pub(crate) fn unlist(&mut self, number: u32, place: u32) {
        if let Some(tenant) = self.all.get_mut(number as usize).and_then(Option::as_mut) {
            self.links.unlink(&mut tenant.free, place);
        }
    }

    /// The first of its objects that became free to go.
    pub(crate) fn first(&self, number: u32) -> Option<u32> {
        let tenant = self.all.get(number as usize)?.as_ref()?;
        Some(tenant.free.first).filter(|first| *first != NONE)
    }

    pub(crate) fn park(&mut self, number: u32, handle: Handle) {
        self.parkings += 1;
        let order = self.parkings;
        if let Some(tenant) = self.get(number) {
            tenant.parked.push_back((order, handle));
        }
    }

    /// Whether more is parked than it has: most of it was used since.
    pub(crate) fn is_stale(&self, number: u32) -> bool {
        let tenant = self.all.get(number as usize).and_then(Option::as_ref);
        tenant.is_some_and(|it| it.parked.len() as u64 > 2 * it.status.objects + 16)
    }

    /// Keeps of what is parked what `is_parked`.
    pub(crate) fn tidy(&mut self, number: u32, mut is_parked: impl FnMut(&Handle) -> bool) {
        if let Some(tenant) = self.get(number) {
            let mut seen = HashSet::new();
            tenant.parked.retain(|(_, handle)| is_parked(handle) && seen.insert(*handle));
        }
    }

    /// What was parked first; it may have been used since.
    pub(crate) fn next_parked(&mut self, number: u32) -> Option<Handle> {
        self.get(number)?.parked.pop_front().map(|(_, handle)| handle)
    }

    /// The same among all tenants that are not named.
    pub(crate) fn next_parked_unnamed(&mut self) -> Option<Handle> {
        let unnamed = self.all.iter_mut().flatten().filter(|tenant| !tenant.status.named);
        let parked = unnamed.filter(|tenant| !tenant.parked.is_empty());
        let oldest = parked.min_by_key(|tenant| tenant.parked.front().map(|(order, _)| *order))?;
        oldest.parked.pop_front().map(|(_, handle)| handle)
    }

    /// All that is parked.
    pub(crate) fn take_parked(&mut self) -> Vec<Handle> {
        self.all
            .iter_mut()
            .flatten()
            .flat_map(|tenant| tenant.parked.drain(..))
            .map(|(_, handle)| handle)
            .collect()
    }
}
