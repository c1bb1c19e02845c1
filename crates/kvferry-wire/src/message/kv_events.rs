//! The replies to `subscribe_kv_events`, in LMCache's form.

use kvferry_core::events::{EventKind, KvEventBatch, KvEventRecord};

use crate::messagepack::{Problem, Reader, Result, Writer, once, required};

/// The only memory that is told of.
const MEDIUM: &str = "CPU";
/// A record with the shortest values; bounds what a list of them reserves.
const RECORD_BYTES_MIN: usize = 80;
/// A hash with its header.
const HASH_BYTES: usize = 34;

pub(super) fn encode(batch: &KvEventBatch, w: &mut Writer) {
    w.map(5);
    w.str("enabled");
    w.boolean(batch.enabled);
    w.str("incarnation");
    w.uint(batch.incarnation);
    w.str("next_cursor");
    w.uint(batch.next_cursor);
    w.str("lost");
    w.boolean(batch.lost);
    w.str("events");
    w.array(batch.events.len());
    for record in &batch.events {
        w.map(7);
        w.str("seq");
        w.uint(record.seq);
        w.str("kind");
        w.str(match record.kind {
            EventKind::Stored => "stored",
            EventKind::Removed => "removed",
        });
        w.str("medium");
        w.str(MEDIUM);
        w.str("model_name");
        w.str(&record.model_name);
        w.str("block_hashes");
        w.array(record.block_hashes.len());
        record.block_hashes.iter().for_each(|hash| w.bytes(hash));
        w.str("parent_block_hash");
        match &record.parent_block_hash {
            Some(parent) => w.bytes(parent),
            None => w.nil(),
        }
        w.str("token_ids");
        w.uints(&record.token_ids);
    }
}

pub(super) fn decode(r: &mut Reader<'_>) -> Result<KvEventBatch> {
    let mut enabled = None;
    let mut incarnation = None;
    let mut next_cursor = None;
    let mut lost = None;
    let mut events = None;
    for _ in 0..r.map_len()? {
        match r.str()? {
            "enabled" => once(&mut enabled, "enabled", r.boolean()),
            "incarnation" => once(&mut incarnation, "incarnation", r.integer()),
            "next_cursor" => once(&mut next_cursor, "next_cursor", r.integer()),
            "lost" => once(&mut lost, "lost", r.boolean()),
            "events" => once(&mut events, "events", r.list(RECORD_BYTES_MIN, decode_record)),
            _ => r.skip().map(drop),
        }?;
    }
    Ok(KvEventBatch {
        enabled: required(enabled, "enabled")?,
        incarnation: required(incarnation, "incarnation")?,
        next_cursor: required(next_cursor, "next_cursor")?,
        lost: required(lost, "lost")?,
        events: required(events, "events")?,
    })
}

fn decode_record(r: &mut Reader<'_>) -> Result<KvEventRecord> {
    let mut seq = None;
    let mut kind = None;
    let mut medium = None;
    let mut model_name = None;
    let mut block_hashes = None;
    let mut parent_block_hash = None;
    let mut token_ids = None;
    for _ in 0..r.map_len()? {
        match r.str()? {
            "seq" => once(&mut seq, "seq", r.integer()),
            "kind" => once(&mut kind, "kind", decode_kind(r)),
            "medium" => once(&mut medium, "medium", decode_medium(r)),
            "model_name" => once(&mut model_name, "model_name", r.string()),
            "block_hashes" => {
                let hashes = r.list(HASH_BYTES, Reader::fixed_bytes);
                once(&mut block_hashes, "block_hashes", hashes)
            }
            "parent_block_hash" => {
                let parent = if r.nil() { Ok(None) } else { r.fixed_bytes().map(Some) };
                once(&mut parent_block_hash, "parent_block_hash", parent)
            }
            "token_ids" => once(&mut token_ids, "token_ids", r.token_ids()),
            _ => r.skip().map(drop),
        }?;
    }
    required(medium, "medium")?;
    Ok(KvEventRecord {
        seq: required(seq, "seq")?,
        kind: required(kind, "kind")?,
        model_name: required(model_name, "model_name")?,
        block_hashes: required(block_hashes, "block_hashes")?,
        parent_block_hash: required(parent_block_hash, "parent_block_hash")?,
        token_ids: required(token_ids, "token_ids")?,
    })
}

fn decode_kind(r: &mut Reader<'_>) -> Result<EventKind> {
    match r.str()? {
        "stored" => Ok(EventKind::Stored),
        "removed" => Ok(EventKind::Removed),
        _ => Err(Problem::Inconsistent("an event is \"stored\" or \"removed\"").into()),
    }
}

fn decode_medium(r: &mut Reader<'_>) -> Result<()> {
    match r.str()? {
        MEDIUM => Ok(()),
        _ => Err(Problem::Inconsistent("events are of the medium \"CPU\"").into()),
    }
}
