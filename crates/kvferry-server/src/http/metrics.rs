//! `/metrics`, in Prometheus' text format 0.0.4.

use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};
use std::sync::atomic::Ordering;

use kvferry_store::AGE_BOUNDS;
use kvferry_store::latencies::{BOUNDS, Latencies};

use super::Snapshot;
use crate::quotas::Shown;

/// The format's media type.
pub(super) const MEDIA_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// How a figure of the store becomes a series.
struct Series {
    figure: &'static str,
    /// Without `kvferry_`; series of one metric stand together.
    metric: &'static str,
    kind: Kind,
    /// As they stand between the braces.
    labels: &'static str,
    /// The figure counts chunks, the metric tokens.
    in_tokens: bool,
    /// The metric's meaning, told by its first series.
    help: &'static str,
}

const fn gauge(
    figure: &'static str,
    metric: &'static str,
    labels: &'static str,
    help: &'static str,
) -> Series {
    Series { figure, metric, kind: Kind::Gauge, labels, in_tokens: false, help }
}

const fn counter(
    figure: &'static str,
    metric: &'static str,
    labels: &'static str,
    help: &'static str,
) -> Series {
    Series { kind: Kind::Counter, ..gauge(figure, metric, labels, help) }
}

const fn tokens(
    figure: &'static str,
    metric: &'static str,
    labels: &'static str,
    help: &'static str,
) -> Series {
    Series { in_tokens: true, ..counter(figure, metric, labels, help) }
}

const MEMORY: &str = "tier=\"memory\"";
const DISK: &str = "tier=\"disk\"";
const REMOTE: &str = "tier=\"remote\"";

/// Every figure of the store, of its disk and of its remote. A test refuses one that is missing.
#[rustfmt::skip]
const STORE: &[Series] = &[
    gauge("chunk_size", "chunk_size_tokens", "", "Tokens of one chunk."),
    gauge("pool_bytes", "tier_capacity_bytes", MEMORY, "Bytes that the tier may hold."),
    gauge("disk_bytes", "tier_capacity_bytes", DISK, ""),
    gauge("disk_bound_bytes", "tier_bound_bytes", DISK, "Bytes that the tier may hold where the file system has room for them."),
    gauge("reserved_bytes", "tier_reserved_bytes", MEMORY, "Bytes that the tier has of the system by now."),
    gauge("used_bytes", "tier_used_bytes", MEMORY, "Bytes that objects and slots being written take."),
    gauge("disk_used_bytes", "tier_used_bytes", DISK, ""),
    gauge("objects", "tier_objects", MEMORY, "Objects that readers may see."),
    gauge("disk_objects", "tier_objects", DISK, ""),
    gauge("disk_queue_bytes", "tier_queue_bytes", DISK, "Bytes that wait to be saved, or are being saved."),
    gauge("remote_queue_bytes", "tier_queue_bytes", REMOTE, ""),
    gauge("disk_queue_saves", "tier_queue_saves", DISK, "Objects that wait to be saved, or are being saved."),
    gauge("disk_queue_loads", "tier_queue_loads", DISK, "Loads that wait or run."),
    gauge("remote_queue_loads", "tier_queue_loads", REMOTE, ""),
    gauge("growth_failed", "tier_growth_failed", MEMORY, "1 while the system refuses more memory."),
    gauge("instances", "instances", "", "Registered engines' workers."),
    gauge("sessions", "sessions", "", "Requests that the server remembers something of."),
    gauge("leases", "leases", "", "Read locks of lookups that no worker was handed yet."),
    gauge("slots_writing", "slots", "state=\"writing\"", "Slots of the pool that peers were told of."),
    gauge("slots_reading", "slots", "state=\"reading\"", ""),
    gauge("slots_apart", "slots", "state=\"apart\"", ""),
    gauge("slots_apart_bytes", "slots_apart_bytes", "", "Bytes of slots whose writers were given up."),
    counter("lookups", "lookups_total", "", "Lookups."),
    counter("lookup_chunks", "lookup_chunks_total", "", "Chunks that were looked up."),
    tokens("lookup_chunks", "lookup_tokens_total", "", "Tokens of the chunks that were looked up."),
    counter("hit_chunks", "hit_chunks_total", MEMORY, "Chunks that lookups found."),
    counter("promoted_hit_chunks", "hit_chunks_total", DISK, ""),
    counter("remote_promoted_hit_chunks", "hit_chunks_total", REMOTE, ""),
    tokens("hit_chunks", "hit_tokens_total", MEMORY, "Tokens of the chunks that lookups found."),
    tokens("promoted_hit_chunks", "hit_tokens_total", DISK, ""),
    tokens("remote_promoted_hit_chunks", "hit_tokens_total", REMOTE, ""),
    counter("stored_chunks", "stored_chunks_total", MEMORY, "Chunks that became visible, each KV rank's by itself."),
    counter("stored_bytes", "stored_bytes_total", MEMORY, "Bytes of the chunks that became visible."),
    counter("promoted_chunks", "promoted_chunks_total", DISK, "Chunks that lookups brought back to memory."),
    counter("remote_promoted_chunks", "promoted_chunks_total", REMOTE, ""),
    counter("disk_saves", "saves_total", DISK, "Objects that were written to the tier."),
    counter("remote_saves", "saves_total", REMOTE, ""),
    counter("remote_known_saves", "known_saves_total", REMOTE, "Objects that the tier had already, from another server or from before."),
    counter("disk_written_bytes", "written_bytes_total", DISK, "Bytes of files that were written."),
    counter("remote_written_bytes", "written_bytes_total", REMOTE, ""),
    counter("disk_save_failures", "dropped_saves_total", "tier=\"disk\",reason=\"error\"", "Objects that the tier did not take: the system failed, it had failed before, the queue was full, too large for it."),
    counter("disk_dropped_failed", "dropped_saves_total", "tier=\"disk\",reason=\"failed\"", ""),
    counter("disk_dropped_full", "dropped_saves_total", "tier=\"disk\",reason=\"full\"", ""),
    counter("disk_dropped_large", "dropped_saves_total", "tier=\"disk\",reason=\"large\"", ""),
    counter("disk_dropped_damaged", "dropped_saves_total", "tier=\"disk\",reason=\"damaged\"", ""),
    counter("remote_save_failures", "dropped_saves_total", "tier=\"remote\",reason=\"error\"", ""),
    counter("remote_dropped_failed", "dropped_saves_total", "tier=\"remote\",reason=\"failed\"", ""),
    counter("remote_dropped_full", "dropped_saves_total", "tier=\"remote\",reason=\"full\"", ""),
    counter("remote_dropped_damaged", "dropped_saves_total", "tier=\"remote\",reason=\"damaged\"", ""),
    counter("disk_loads", "loads_total", DISK, "Objects that were loaded from the tier."),
    counter("remote_loads", "loads_total", REMOTE, ""),
    counter("disk_read_bytes", "read_bytes_total", DISK, "Bytes of files that were read."),
    counter("remote_read_bytes", "read_bytes_total", REMOTE, ""),
    counter("disk_load_failures", "failed_loads_total", "tier=\"disk\",reason=\"error\"", "Objects that did not come back: the system failed, too many waited, not what was written."),
    counter("disk_refused_loads", "failed_loads_total", "tier=\"disk\",reason=\"full\"", ""),
    counter("disk_damaged", "failed_loads_total", "tier=\"disk\",reason=\"damaged\"", ""),
    counter("remote_load_failures", "failed_loads_total", "tier=\"remote\",reason=\"error\"", ""),
    counter("remote_refused_loads", "failed_loads_total", "tier=\"remote\",reason=\"full\"", ""),
    counter("remote_damaged", "failed_loads_total", "tier=\"remote\",reason=\"damaged\"", ""),
    counter("remote_missing", "failed_loads_total", "tier=\"remote\",reason=\"missing\"", ""),
    counter("remote_questions", "tier_questions_total", REMOTE, "Questions of lookups about what the tier has."),
    counter("remote_question_failures", "failed_questions_total", REMOTE, "Questions that were not answered in time."),
    counter("remote_retries", "tier_retries_total", REMOTE, "Requests that were sent again."),
    counter("remote_outages", "tier_outages_total", REMOTE, "How often the tier stopped answering or taking objects."),
    counter("retrieved_chunks", "retrieved_chunks_total", MEMORY, "Chunks that readers were handed, each KV rank's by itself."),
    counter("retrieved_bytes", "retrieved_bytes_total", MEMORY, "Bytes of the chunks that readers were handed."),
    counter("failed_retrievals", "failed_retrievals_total", "", "Retrievals of what was gone or not leased."),
    counter("refused_chunks", "dropped_chunks_total", "reason=\"refused\"", "Chunks that were not stored or not kept: no room for them, or not yet as the memory grows, given up by their writer, damaged."),
    counter("refused_growing_chunks", "dropped_chunks_total", "reason=\"growing\"", ""),
    counter("abandoned_chunks", "dropped_chunks_total", "reason=\"abandoned\"", ""),
    counter("damaged_chunks", "dropped_chunks_total", "reason=\"damaged\"", ""),
    counter("evicted_objects", "evicted_objects_total", MEMORY, "Objects that made room for others."),
    counter("disk_evicted_objects", "evicted_objects_total", DISK, ""),
    counter("evicted_bytes", "evicted_bytes_total", MEMORY, "Bytes of the objects that made room for others."),
    counter("disk_evicted_bytes", "evicted_bytes_total", DISK, ""),
    counter("expired_sessions", "expired_sessions_total", "", "Requests that were forgotten: idle for too long, or one too many."),
];

/// Why messages and connections are dropped, but for what is wrong in a message: those are told from the start, so
/// that the first one shows in a rate.
const DROPS: [&str; 17] = [
    "accept",
    "connection",
    "connections",
    "deadline",
    "http_accept",
    "http_connections",
    "http_deadline",
    "http_forbidden",
    "http_host",
    "http_malformed",
    "http_media_type",
    "http_origin",
    "http_token",
    "http_too_large",
    "not_admin",
    "unfinished_messages",
    "wrong_token",
];

/// What is written so far.
struct Exposition {
    text: String,
    last: &'static str,
}

impl Exposition {
    /// Begins a metric, unless the one before is the same.
    fn metric(&mut self, name: &'static str, kind: Kind, help: &str) {
        if self.last == name {
            return;
        }
        self.last = name;
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        // Writing into a String cannot fail.
        let _ = write!(self.text, "# HELP kvferry_{name} {help}\n# TYPE kvferry_{name} {kind}\n");
    }

    fn sample(&mut self, suffix: &str, labels: &str, value: impl Display) {
        let braced = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
        let _ = writeln!(self.text, "kvferry_{}{suffix}{braced} {value}", self.last);
    }

    fn histogram(&mut self, labels: &str, latencies: &Latencies) {
        for (bound, count) in BOUNDS.iter().zip(latencies.counts) {
            self.sample("_bucket", &format!("{labels},le=\"{}\"", seconds(*bound)), count);
        }
        self.sample("_bucket", &format!("{labels},le=\"+Inf\""), latencies.count());
        self.sample("_sum", labels, seconds(latencies.nanos));
        self.sample("_count", labels, latencies.count());
    }

    fn one(&mut self, name: &'static str, kind: Kind, help: &str, value: impl Display) {
        self.metric(name, kind, help);
        self.sample("", "", value);
    }
}

/// The whole text.
pub(super) fn text(now: &Snapshot) -> String {
    let mut text = Exposition { text: String::with_capacity(48 << 10), last: "" };
    text.metric("build_info", Kind::Gauge, "The server's version; always 1.");
    text.sample("", &format!("version=\"{}\"", env!("CARGO_PKG_VERSION")), 1);
    text.one("uptime_seconds", Kind::Gauge, "Since the server's start.", now.uptime.as_secs_f64());
    let chunk_size = now.figure("chunk_size");
    for series in STORE {
        let of_disk = series.labels.starts_with(DISK);
        let found = now.find(series.figure).filter(|_| !of_disk || now.disk_failure.is_some());
        let Some(mut value) = found else { continue }; // there is no such tier
        if series.figure == "hit_chunks" {
            // Each tier's by itself.
            let below = ["promoted_hit_chunks", "remote_promoted_hit_chunks"];
            let below = below.iter().filter_map(|figure| now.find(figure)).sum();
            value = value.saturating_sub(below);
        }
        text.metric(series.metric, series.kind, series.help);
        let scale = if series.in_tokens { chunk_size } else { 1 };
        text.sample("", series.labels, value.saturating_mul(scale));
    }
    text.metric("tier_ready", Kind::Gauge, "1 when a store and a load worked a moment ago.");
    for tier in &now.tiers {
        let labels = format!("tier=\"{}\"", tier.name);
        text.sample("", &labels, u8::from(tier.failure.is_none()));
    }
    let disk = now.disk_failure.as_ref().map(|failure| (DISK, !failure.is_empty()));
    let remote = now.remote.as_ref().map(|remote| (REMOTE, remote.failed.is_some()));
    for (labels, failed) in disk.into_iter().chain(remote) {
        let help = "1 while the tier takes nothing: the system failed it, or it does not answer.";
        text.metric("tier_failed", Kind::Gauge, help);
        text.sample("", labels, u8::from(failed));
    }
    text.metric("tier_probe_seconds", Kind::Gauge, "What the latest store and load took.");
    for tier in &now.tiers {
        let took = tier.took.map_or(f64::NAN, |took| took.as_secs_f64());
        text.sample("", &format!("tier=\"{}\"", tier.name), took);
    }
    text.metric(
        "evicted_age_seconds",
        Kind::Histogram,
        "For how long objects that made room had been neither looked up nor stored.",
    );
    for (tier, ages) in &now.ages {
        let counts = ages.cumulative();
        for (bound, count) in AGE_BOUNDS.iter().zip(counts) {
            text.sample("_bucket", &format!("tier=\"{tier}\",le=\"{bound}\""), count);
        }
        let (labels, all) = (format!("tier=\"{tier}\""), counts[AGE_BOUNDS.len()]);
        text.sample("_bucket", &format!("{labels},le=\"+Inf\""), all);
        text.sample("_sum", &labels, ages.sum().as_secs_f64());
        text.sample("_count", &labels, all);
    }
    tenants(&mut text, &now.tenants);
    text.metric("connections", Kind::Gauge, "Open connections.");
    let data = now.figures.connections.load(Ordering::Relaxed);
    text.sample("", "protocol=\"zmtp\"", data);
    text.sample("", "protocol=\"http\"", now.http_connections);
    text.one(
        "unfinished_message_bytes",
        Kind::Gauge,
        "Bytes of messages that have not arrived whole.",
        now.figures.unfinished.bytes(),
    );
    text.metric(
        "dropped_messages_total",
        Kind::Counter,
        "Messages and connections that were dropped, by why.",
    );
    let mut dropped: BTreeMap<_, _> = DROPS.iter().map(|reason| (*reason, 0)).collect();
    dropped.extend(&now.dropped);
    for (reason, count) in dropped {
        text.sample("", &format!("reason=\"{}\"", reason.to_lowercase()), count);
    }
    text.metric(
        "operation_seconds",
        Kind::Histogram,
        "From a request to its answer, without the socket; by LMCache's names of the operations.",
    );
    for (operation, latencies) in now.figures.latencies() {
        text.histogram(&format!("operation=\"{operation}\""), &latencies);
    }
    if let Some(remote) = &now.remote {
        let help = "From a request to the tier to its answer, each try by itself.";
        text.metric("tier_request_seconds", Kind::Histogram, help);
        for (request, latencies) in &remote.latencies {
            text.histogram(&format!("{REMOTE},request=\"{request}\""), latencies);
        }
    }
    text.text
}

/// Those of each tenant.
fn tenants(text: &mut Exposition, tenants: &[Shown]) {
    type Figure = fn(&Shown) -> Option<String>;
    let figures: [(&str, Kind, &str, Figure); 5] = [
        (
            "tenant_used_bytes",
            Kind::Gauge,
            "Bytes of memory by tenant: a hash of its salt, none without one, other for all but the largest.",
            |tenant| Some(tenant.used_bytes.to_string()),
        ),
        ("tenant_objects", Kind::Gauge, "Objects in memory by tenant.", |tenant| {
            Some(tenant.objects.to_string())
        }),
        (
            "tenant_evicted_bytes_total",
            Kind::Counter,
            "Bytes that made room since the tenant has some; not of other: who is among them changes.",
            |tenant| tenant.quota.map(|_| tenant.evicted_bytes.to_string()),
        ),
        ("tenant_cap_bytes", Kind::Gauge, "Bytes that the tenant has at most.", |tenant| {
            let cap = tenant.quota?.cap;
            Some(cap.map_or_else(|| "+Inf".to_owned(), |cap| cap.to_string()))
        }),
        (
            "tenant_guarantee_bytes",
            Kind::Gauge,
            "Bytes below which no other tenant's chunks take its place.",
            |tenant| Some(tenant.quota?.guarantee.to_string()),
        ),
    ];
    for (name, kind, help, figure) in figures {
        text.metric(name, kind, help);
        for tenant in tenants {
            if let Some(value) = figure(tenant) {
                text.sample("", &format!("tenant=\"{}\"", tenant.label), value);
            }
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "2^53 nanoseconds are 104 days")]
pub(super) fn seconds(nanos: u64) -> f64 {
    nanos as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Instant;

    use kvferry_store::disk::DiskStatus;
    use kvferry_store::remote::RemoteStatus;
    use kvferry_store::{Limits, Quota, Store, StoreOptions};

    use super::*;

    #[test]
    fn every_figure_of_the_store_is_a_metric_and_every_metric_a_figure() {
        let options = StoreOptions {
            chunk_size: 16,
            memory: 4096,
            shared_name: None,
            policy: kvferry_store::Policy::Lru,
            disk: None,
            remote: None,
            limits: Limits::default(),
        };
        let status = Store::new(options).unwrap().status(Instant::now());
        let disk = DiskStatus::default().figures();
        let mut remote = RemoteStatus::default().figures();
        // The store has these, with a remote.
        remote.extend([("remote_promoted_chunks", 0), ("remote_promoted_hit_chunks", 0)]);
        let figures = status.iter().chain(&disk).chain(&remote);
        let known: BTreeSet<_> = figures.map(|(name, _)| *name).collect();
        let shown: BTreeSet<_> = STORE.iter().map(|series| series.figure).collect();
        assert_eq!(known, shown);
    }

    #[test]
    fn the_evictions_of_all_other_tenants_together_are_no_counter() {
        let mut text = Exposition { text: String::new(), last: "" };
        let shown = |label: &str, quota| Shown {
            label: label.into(),
            used_bytes: 1,
            objects: 1,
            evicted_bytes: 1,
            quota,
        };
        tenants(&mut text, &[shown("none", Some(Quota::default())), shown("other", None)]);
        let samples = |name| text.text.lines().filter(|line| line.starts_with(name)).count();
        assert_eq!(samples("kvferry_tenant_used_bytes{"), 2);
        assert_eq!(samples("kvferry_tenant_evicted_bytes_total{"), 1);
    }

    #[test]
    fn a_metric_is_described_once_and_counters_end_in_total() {
        for (place, series) in STORE.iter().enumerate() {
            let first = STORE.iter().position(|other| other.metric == series.metric).unwrap();
            assert_eq!(series.help.is_empty(), first < place, "{}", series.metric);
            let counts = series.kind == Kind::Counter;
            assert_eq!(series.metric.ends_with("_total"), counts, "{}", series.metric);
        }
    }
}
