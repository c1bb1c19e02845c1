//! `/status`: the figures of the wire's status, tiers, readiness and operations, for pages and scripts.

use super::Snapshot;
use super::metrics::seconds;
use super::readiness::Tier;
use crate::json::{Object, array};
use crate::quotas::{Shown, members_of};

/// Readiness, as `/readyz` tells it.
pub(super) fn readiness(tiers: &[Tier], data: Result<(), &str>) -> (bool, String) {
    let works = |tier: &Tier| tier.failure.is_none() || !tier.is_needed();
    let ready = data.is_ok() && tiers.iter().all(works);
    let mut answer = Object::new().raw("ready", ready);
    if let Err(reason) = data {
        answer = answer.text("reason", reason);
    }
    let by_name = tiers.iter().fold(Object::new(), |all, tier| all.raw(tier.name, tier.json()));
    (ready, answer.raw("tiers", by_name.end()).end())
}

/// The whole object.
pub(super) fn json(now: &Snapshot, data: Result<(), &str>) -> String {
    let mut status = Object::new()
        .text("version", env!("CARGO_PKG_VERSION"))
        .raw("pid", std::process::id())
        .number("uptime_seconds", now.uptime.as_secs_f64());
    for (name, value) in &now.store {
        status = status.raw(name, value);
    }
    if let Some(failure) = &now.disk_failure {
        status = status.text("disk_failure", failure);
    }
    if let Some(remote) = &now.remote {
        status = status.text("remote_failure", remote.failed.as_deref().unwrap_or_default());
    }
    status = status.raw("dropped_messages", now.dropped.values().sum::<u64>());
    for (reason, count) in &now.dropped {
        status = status.raw(&format!("dropped_{}", reason.to_lowercase()), count);
    }
    let memory = [
        ("capacity_bytes", "pool_bytes"),
        ("reserved_bytes", "reserved_bytes"),
        ("used_bytes", "used_bytes"),
        ("objects", "objects"),
        ("stored_bytes", "stored_bytes"),
        ("retrieved_bytes", "retrieved_bytes"),
        ("evicted_bytes", "evicted_bytes"),
    ];
    let disk = [
        ("capacity_bytes", "disk_bytes"),
        ("used_bytes", "disk_used_bytes"),
        ("objects", "disk_objects"),
        ("queue_bytes", "disk_queue_bytes"),
        ("written_bytes", "disk_written_bytes"),
        ("read_bytes", "disk_read_bytes"),
        ("evicted_bytes", "disk_evicted_bytes"),
    ];
    let remote = [
        ("queue_bytes", "remote_queue_bytes"),
        ("written_bytes", "remote_written_bytes"),
        ("read_bytes", "remote_read_bytes"),
    ];
    let tier = |figures: &[(&str, &str)]| {
        let put = |tier: Object, (name, figure): &(&str, &str)| tier.raw(name, now.figure(figure));
        figures.iter().fold(Object::new(), put)
    };
    let mut tiers = Object::new().raw("memory", tier(&memory).end());
    if let Some(failure) = &now.disk_failure {
        let disk = tier(&disk).raw("failed", !failure.is_empty());
        let disk = if failure.is_empty() { disk } else { disk.text("failure", failure) };
        tiers = tiers.raw("disk", disk.end());
    }
    if let Some(status) = &now.remote {
        let remote = tier(&remote).text("place", &status.place);
        let remote = remote.raw("failed", status.failed.is_some());
        let remote = match &status.failed {
            Some(failure) => remote.text("failure", failure),
            None => remote,
        };
        tiers = tiers.raw("remote", remote.end());
    }
    status
        .raw("tiers", tiers.end())
        .raw("readiness", readiness(&now.tiers, data).1)
        .raw("operations", operations(now))
        .raw(
            "slow_operations",
            array(now.figures.slow().iter().map(|slow| {
                let ago = slow.ended.elapsed();
                let one = Object::new().text("operation", slow.operation.name());
                one.number("seconds", slow.took.as_secs_f64())
                    .number("ago_seconds", ago.as_secs_f64())
                    .end()
            })),
        )
        .raw("tenants", tenants(now))
        .end()
}

/// By their labels, as in `/metrics`.
fn tenants(now: &Snapshot) -> String {
    let one = |all: Object, tenant: &Shown| {
        let quota = tenant.quota;
        let told = quota.map_or_else(Object::new, members_of);
        let told = told.raw("used_bytes", tenant.used_bytes).raw("objects", tenant.objects);
        all.raw(&tenant.label, told.raw("evicted_bytes", tenant.evicted_bytes).end())
    };
    now.tenants.iter().fold(Object::new(), one).end()
}

/// Those that were asked for. A quantile is the bound of the histogram that it kept to, null above a second.
fn operations(now: &Snapshot) -> String {
    let mut all = Object::new();
    for (operation, latencies) in now.figures.latencies() {
        let count = latencies.count();
        if count == 0 {
            continue;
        }
        let quantile =
            |part| latencies.bound(part).map_or_else(|| "null".into(), |b| seconds(b).to_string());
        let one = Object::new()
            .raw("count", count)
            .number("mean_seconds", seconds(latencies.nanos / count))
            .raw("p50_seconds", quantile(0.5))
            .raw("p99_seconds", quantile(0.99));
        all = all.raw(operation.name(), one.end());
    }
    all.end()
}
