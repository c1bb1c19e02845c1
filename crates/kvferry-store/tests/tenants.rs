//! What tenants keep from each other, whatever the policy.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{Engine, OBJECT, key, layout};
use kvferry_core::ErrorCode;
use kvferry_core::key::Key;
use kvferry_store::{Departure, Policy, Quota, Quotas, TenantStatus};
use proptest::prelude::*;

fn of(salt: &str, first: u32, chunks: u64) -> Key {
    let key = key(first, chunks);
    let request_id = format!("{salt} {}", key.request_id);
    Key { cache_salt: salt.into(), request_id, ..key }
}

/// Objects, not bytes.
fn quota(cap: Option<u64>, guarantee: u64) -> Quota {
    Quota { cap: cap.map(|cap| cap * OBJECT), guarantee: guarantee * OBJECT }
}

fn quotas<const N: usize>(named: [(&str, Quota); N], default: Quota) -> Quotas {
    let named = named.into_iter().map(|(salt, quota)| (salt.to_owned(), quota)).collect();
    Quotas { named, default }
}

/// An engine whose tenants are told apart.
struct Tenants(Engine);

impl Tenants {
    fn new(objects: u64, policy: Policy) -> Self {
        let engine = Engine::with(objects, policy);
        engine.register(1, layout("m", 1));
        Self(engine)
    }

    fn set(&self, quotas: Quotas) {
        self.0.store.set_quotas(quotas).unwrap();
    }

    /// Looks up, stores what is missing and ends; chunks that were there, and chunks that were stored.
    fn use_it(&self, key: &Key) -> (u64, usize) {
        let hit = self.0.lookup(key);
        let stored = self.0.put(key);
        self.0.store.end_session(&key.request_id);
        (hit, stored)
    }

    fn hits(&self, key: &Key) -> u64 {
        let hit = self.0.lookup(key);
        self.0.store.end_session(&key.request_id);
        hit
    }

    fn status(&self) -> BTreeMap<String, TenantStatus> {
        let tenants = self.0.store.tenants().into_iter();
        tenants.map(|tenant| (tenant.cache_salt.clone(), tenant)).collect()
    }

    fn objects(&self, salt: &str) -> u64 {
        self.status().get(salt).map_or(0, |tenant| tenant.objects)
    }
}

#[test]
fn a_tenant_that_floods_the_cache_takes_nothing_that_is_guaranteed_to_others() {
    for policy in Policy::ALL {
        let tenants = Tenants::new(32, policy);
        tenants.set(quotas([("quiet", quota(None, 8))], Quota::default()));
        let prompt = of("quiet", 0, 8);
        assert_eq!(tenants.use_it(&prompt), (0, 8));
        for flood in 0..200 {
            assert_eq!(tenants.use_it(&of("loud", 10_000 * flood, 4)).1, 4, "{policy}");
        }
        assert_eq!(tenants.hits(&prompt), 8, "{policy}");
        assert_eq!(tenants.objects("loud"), 24, "{policy}: what is not guaranteed is everybody's");
        assert_eq!(tenants.status()["quiet"].evicted_objects, 0);
    }
}

#[test]
fn what_a_tenant_has_above_its_guarantee_goes_like_everybody_s() {
    for policy in Policy::ALL {
        let tenants = Tenants::new(32, policy);
        tenants.set(quotas([("quiet", quota(None, 8))], Quota::default()));
        for prompt in 0..6 {
            tenants.use_it(&of("quiet", 10_000 * prompt, 4));
        }
        assert_eq!(tenants.objects("quiet"), 24);
        for flood in 0..200 {
            assert_eq!(tenants.use_it(&of("loud", 10_000 * flood, 4)).1, 4, "{policy}");
        }
        assert_eq!(tenants.objects("quiet"), 8, "{policy}");
        // It grows again, at the cost of others.
        for prompt in 0..4 {
            assert_eq!(tenants.use_it(&of("quiet", 10_000 * (100 + prompt), 4)).1, 4, "{policy}");
        }
        assert!(tenants.objects("quiet") >= 8, "{policy}");
    }
}

#[test]
fn a_tenant_whose_guarantee_is_all_of_the_memory_replaces_its_own() {
    for policy in Policy::ALL {
        let tenants = Tenants::new(8, policy);
        tenants.set(quotas([("all", quota(None, 8))], Quota::default()));
        for prompt in 0..20 {
            assert_eq!(tenants.use_it(&of("all", 10_000 * prompt, 4)).1, 4, "{policy}");
        }
        assert_eq!(tenants.use_it(&of("other", 0, 1)).1, 0, "{policy}: nothing is left to others");
        assert_eq!(tenants.objects("all"), 8);
        assert_eq!(tenants.use_it(&of("all", 900_000, 8)).1, 8, "{policy}");
    }
}

#[test]
fn a_tenant_at_its_cap_makes_room_itself_its_oldest_first() {
    for policy in Policy::ALL {
        let tenants = Tenants::new(64, policy);
        tenants.set(quotas([("small", quota(Some(8), 0))], Quota::default()));
        let other = of("other", 0, 8);
        tenants.use_it(&other);
        for prompt in 0..10 {
            assert_eq!(tenants.use_it(&of("small", 10_000 * prompt, 4)).1, 4, "{policy}");
            assert!(tenants.objects("small") <= 8);
        }
        assert_eq!(tenants.hits(&other), 8);
        assert_eq!(tenants.hits(&of("small", 90_000, 4)), 4, "{policy}");
        assert_eq!(tenants.hits(&of("small", 80_000, 4)), 4, "{policy}");
        assert_eq!(tenants.hits(&of("small", 70_000, 4)), 0, "{policy}");
        assert_eq!(tenants.status()["small"].evicted_objects, 32);
        // What it has in use it cannot replace.
        let held = of("small", 90_000, 4);
        assert_eq!(tenants.0.lookup(&held), 4);
        assert_eq!(tenants.use_it(&of("small", 0, 8)).1, 4, "{policy}");
    }
}

#[test]
fn a_chunk_larger_than_a_cap_is_not_stored_and_nothing_goes_for_it() {
    let tenants = Tenants::new(8, Policy::Default);
    tenants.use_it(&of("a", 0, 2));
    tenants.set(quotas([], quota(Some(0), 0)));
    assert_eq!(tenants.use_it(&of("a", 10_000, 1)), (0, 0));
    assert_eq!(tenants.hits(&of("a", 0, 2)), 2);
}

#[test]
fn a_lowered_cap_evicts_nothing_at_once_and_is_reached_as_the_tenant_stores() {
    for policy in Policy::ALL {
        let tenants = Tenants::new(64, policy);
        tenants.use_it(&of("a", 0, 32));
        tenants.set(quotas([("a", quota(Some(4), 0))], Quota::default()));
        assert_eq!(tenants.objects("a"), 32, "{policy}");
        let mut before = 32;
        for prompt in 1..40 {
            assert_eq!(tenants.use_it(&of("a", 10_000 * prompt, 1)).1, 1, "{policy}");
            let now = tenants.objects("a");
            assert!(now <= before && now + 2 >= before, "{policy}: from {before} to {now}");
            before = now;
        }
        assert_eq!(before, 4, "{policy}");
    }
}

#[test]
fn the_default_is_of_each_tenant_that_is_not_named_and_no_salt_means_it() {
    let tenants = Tenants::new(64, Policy::Default);
    tenants.set(quotas([("named", quota(None, 0))], quota(Some(2), 0)));
    for salt in ["a", "b", "default", "_default", ""] {
        tenants.use_it(&of(salt, 0, 8));
        assert_eq!(tenants.objects(salt), 2, "{salt:?}");
    }
    tenants.use_it(&of("named", 0, 8));
    assert_eq!(tenants.objects("named"), 8);
    tenants.set(quotas([("_default", quota(None, 0)), ("", quota(Some(3), 0))], Quota::default()));
    assert_eq!(tenants.status()["_default"].quota.cap, None);
    assert_eq!(tenants.status()["a"].quota.cap, None, "the default was lifted");
    tenants.use_it(&of("", 50_000, 8));
    assert_eq!(tenants.objects(""), 3);
}

#[test]
fn default_guarantees_hold_among_tenants_and_do_not_shut_new_ones_out() {
    for policy in Policy::ALL {
        let tenants = Tenants::new(16, policy);
        tenants.set(quotas([("named", quota(None, 4))], quota(None, 4)));
        tenants.use_it(&of("named", 0, 4));
        for salt in ["a", "b", "c"] {
            assert_eq!(tenants.use_it(&of(salt, 0, 4)).1, 4);
        }
        assert_eq!(tenants.use_it(&of("new", 0, 4)).1, 4, "{policy}");
        assert_eq!(tenants.hits(&of("named", 0, 4)), 4, "{policy}: a name's guarantee is hard");
        assert_eq!(tenants.objects("new"), 4);
    }
}

#[test]
fn a_named_tenant_reaches_its_guarantee_at_the_cost_of_default_ones_the_oldest_first() {
    for policy in Policy::ALL {
        let tenants = Tenants::new(12, policy);
        tenants.set(quotas([("named", quota(None, 5))], quota(None, 12)));
        for (salt, first) in [("a", 0), ("b", 10_000), ("c", 20_000)] {
            assert_eq!(tenants.use_it(&of(salt, first, 4)).1, 4);
        }
        for prompt in 0..5 {
            assert_eq!(tenants.use_it(&of("named", 50_000 + 10_000 * prompt, 1)).1, 1, "{policy}");
            assert_eq!(tenants.objects("named"), u64::from(prompt) + 1, "{policy}");
        }
        let rest: u64 = ["a", "b", "c"].map(|salt| tenants.objects(salt)).iter().sum();
        assert_eq!(rest, 7, "{policy}");
        if policy == Policy::Lru {
            assert_eq!(["a", "b", "c"].map(|salt| tenants.objects(salt)), [0, 3, 4]);
        }
    }
}

#[test]
fn damaged_chunks_of_a_tenant_at_its_cap_make_room() {
    for policy in Policy::ALL {
        let tenants = Tenants::new(64, policy);
        tenants.set(quotas([("a", quota(Some(4), 0))], Quota::default()));
        let prompt = of("a", 0, 4);
        tenants.use_it(&prompt);
        assert_eq!(tenants.0.discard(&prompt), 4);
        assert_eq!(tenants.use_it(&prompt), (0, 4), "{policy}");
    }
}

#[test]
fn slots_that_a_silent_writer_keeps_count_for_its_tenant() {
    let tenants = Tenants::new(64, Policy::Default);
    tenants.set(quotas([("a", quota(Some(4), 0))], Quota::default()));
    let engine = &tenants.0;
    assert_eq!(engine.reserve(&of("a", 0, 4), 1), 4);
    engine.store.disconnect(engine.owner, Departure::GivenUp);
    let status = engine.store.status(engine.now);
    assert!(status.contains(&("slots_apart", 4)), "{status:?}");
    assert_eq!(tenants.objects("a"), 4, "its writer may still write to them");
    assert_eq!(engine.reserve(&of("a", 10_000, 1), 1), 0);
    engine.store.unregister(1);
    assert_eq!(tenants.status()["a"].used_bytes, 0);
}

#[test]
fn what_grows_above_a_guarantee_may_go_byte_for_byte() {
    for policy in Policy::ALL {
        let tenants = Tenants::new(20, policy);
        tenants.set(quotas([("a", quota(None, 10))], Quota::default()));
        tenants.use_it(&of("a", 0, 10));
        // Others have the rest, and the policy looks at all of a's.
        for flood in 0..20 {
            tenants.use_it(&of("b", 100_000 + 10_000 * flood, 5));
        }
        assert_eq!(tenants.objects("a"), 10, "{policy}");
        let large = of("a", 500_000, 8);
        assert_eq!(tenants.use_it(&large).1, 8, "{policy}");
        assert_eq!(tenants.0.lookup(&large), 8); // leased
        // Eight of the first ten may go now.
        assert_eq!(tenants.use_it(&of("b", 900_000, 10)).1, 10, "{policy}");
        assert_eq!(tenants.objects("a"), 10, "{policy}");
    }
}

#[test]
fn quotas_that_cannot_be_kept_are_refused_and_change_nothing() {
    let tenants = Tenants::new(16, Policy::Default);
    let good = quotas([("a", quota(Some(8), 8))], quota(None, 1));
    tenants.set(good.clone());
    let bad = [
        (quotas([("a", quota(None, 9)), ("b", quota(None, 8))], Quota::default()), "guaranteed"),
        (quotas([("a", quota(Some(1), 2))], Quota::default()), "\"a\""),
        (quotas([], quota(Some(1), 2)), "default"),
        (quotas([("a@b", Quota::default())], Quota::default()), "'@'"),
    ];
    for (quotas, named) in bad {
        let error = tenants.0.store.set_quotas(quotas).unwrap_err();
        assert!(error.message.contains(named), "{error}");
        assert!(
            matches!(error.code, ErrorCode::InvalidArgument | ErrorCode::InvalidSalt),
            "{error}"
        );
        assert_eq!(tenants.0.store.quotas(), good);
    }
}

#[test]
fn tenants_without_anything_are_forgotten_unless_they_are_named() {
    let tenants = Tenants::new(4, Policy::Default);
    tenants.set(quotas([("named", quota(None, 0))], Quota::default()));
    for tenant in 0..1_000 {
        tenants.use_it(&of(&format!("tenant {tenant}"), 0, 2));
    }
    let idle = |(salt, tenant): &(&String, &TenantStatus)| *salt != "named" && tenant.objects == 0;
    assert_eq!(tenants.status().iter().find(idle), None);
    assert!(tenants.status().contains_key("named"));
    tenants.0.store.clear();
    assert_eq!(tenants.status().keys().collect::<Vec<_>>(), ["named"]);
}

#[test]
fn clearing_takes_what_is_guaranteed_too() {
    for policy in Policy::ALL {
        let tenants = Tenants::new(8, policy);
        tenants.set(quotas([("a", quota(None, 4))], quota(None, 2)));
        tenants.use_it(&of("a", 0, 4));
        for flood in 0..20 {
            tenants.use_it(&of("b", 10_000 * flood, 2)); // some of both is parked by now
        }
        tenants.0.store.clear();
        assert_eq!(tenants.objects("a") + tenants.objects("b"), 0, "{policy}");
    }
}

const SALTS: [&str; 4] = ["a", "b", "c", ""];
const ROOM: u64 = 24;

#[derive(Debug, Clone)]
enum Step {
    Use { tenant: usize, prompt: u32, chunks: u64 },
    Hold { tenant: usize, prompt: u32, chunks: u64 },
    Discard { tenant: usize, prompt: u32 },
    Quotas([Option<(Option<u64>, u64)>; 4], Option<u64>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let tenant = 0..SALTS.len();
    let quota = (prop::option::of(6..20_u64), 0..6_u64);
    let step = prop_oneof![
        8 => (tenant.clone(), 0..12_u32, 1..9_u64)
            .prop_map(|(tenant, prompt, chunks)| Step::Use { tenant, prompt, chunks }),
        1 => (tenant.clone(), 0..12_u32, 1..3_u64)
            .prop_map(|(tenant, prompt, chunks)| Step::Hold { tenant, prompt, chunks }),
        1 => (tenant, 0..12_u32).prop_map(|(tenant, prompt)| Step::Discard { tenant, prompt }),
        1 => (prop::array::uniform4(prop::option::of(quota)), prop::option::of(6..20_u64))
            .prop_map(|(named, default)| Step::Quotas(named, default)),
    ];
    prop::collection::vec(step, 1..150)
}

proptest! {
    /// Against what was there before each store: nobody else falls below a named guarantee, nobody who was within its
    /// cap leaves it, and what all have is what the memory lacks.
    #[test]
    fn quotas_hold_through_whatever_tenants_do(steps in steps()) {
        for policy in Policy::ALL {
            let tenants = Tenants::new(ROOM, policy);
            let mut damaged = BTreeSet::new();
            for step in steps.clone() {
                let before = tenants.status();
                let used = before.clone();
                let before_of = |salt: Option<&str>| {
                    salt.and_then(|salt| used.get(salt)).map_or(0, |tenant| tenant.used_bytes)
                };
                let by = match step {
                    Step::Use { tenant, prompt, chunks } => {
                        tenants.use_it(&of(SALTS[tenant], prompt * 10_000, chunks));
                        Some(SALTS[tenant])
                    }
                    Step::Hold { tenant, prompt, chunks } => {
                        tenants.0.lookup(&of(SALTS[tenant], prompt * 10_000, chunks));
                        None
                    }
                    Step::Discard { tenant, prompt } => {
                        let key = of(SALTS[tenant], prompt * 10_000, 1);
                        if tenants.hits(&key) == 1 {
                            tenants.0.discard(&key);
                        }
                        damaged.insert(SALTS[tenant]); // it goes first, guaranteed or not
                        continue;
                    }
                    Step::Quotas(named, default) => {
                        let named = SALTS.iter().zip(named).filter_map(|(salt, it)| {
                            it.map(|(cap, guarantee)| ((*salt).to_owned(), quota(cap, guarantee)))
                        });
                        let default = quota(default, 0);
                        tenants.set(Quotas { named: named.collect(), default });
                        None
                    }
                };
                let after = tenants.status();
                for (salt, was) in before {
                    let has = after.get(&salt).map_or(0, |tenant| tenant.used_bytes);
                    let (quota, lost) = (was.quota, has < was.used_bytes);
                    let own = by.is_none_or(|by| by == salt) || damaged.contains(salt.as_str());
                    if lost && !own {
                        prop_assert!(has >= quota.guarantee, "{policy}: {salt:?} has {has} of {was:?}");
                    }
                }
                if let Some(tenant) = by.and_then(|salt| after.get(salt))
                    && let Some(cap) = tenant.quota.cap
                {
                    let was = before_of(by);
                    prop_assert!(tenant.used_bytes <= cap.max(was), "{policy}: {was} and {tenant:?}");
                }
                let status: BTreeMap<_, _> =
                    tenants.0.store.status(tenants.0.now).into_iter().collect();
                let used: u64 = after.values().map(|tenant| tenant.used_bytes).sum();
                let discarded_too = status["used_bytes"];
                prop_assert_eq!(used, discarded_too);
            }
        }
    }
}
