//! The reply to [`Request::Events`](super::Request::Events). A space (model, world size, salt) is
//! written once, and events, which are many, are rows: `[removed, chunk, parent, rank, space, at_ms]`.

use std::collections::HashMap;
use std::sync::Arc;

use kvferry_core::events::{EventKind, EventSpace, Events, KvEvent};

use crate::messagepack::{Problem, Reader, Result, Writer, once, required};

/// A row with the shortest values; bounds what a list of them reserves.
const EVENT_BYTES_MIN: usize = 40;
/// Values of a row.
const ROW: usize = 6;

pub(super) fn encode(events: &Events, w: &mut Writer) {
    let mut places: HashMap<*const EventSpace, u64> = HashMap::new();
    let mut spaces: Vec<&EventSpace> = Vec::new();
    let rows: Vec<(&KvEvent, u64)> = events
        .events
        .iter()
        .map(|event| {
            let place = *places.entry(Arc::as_ptr(&event.space)).or_insert_with(|| {
                spaces.push(&event.space);
                spaces.len() as u64 - 1
            });
            (event, place)
        })
        .collect();
    w.map(5);
    w.str("incarnation");
    w.bytes(&events.incarnation);
    w.str("first");
    w.uint(events.first);
    w.str("lost");
    w.boolean(events.lost);
    w.str("spaces");
    w.array(spaces.len());
    for space in spaces {
        w.map(3);
        w.str("model_name");
        w.str(&space.model_name);
        w.str("world_size");
        w.uint(space.world_size);
        w.str("cache_salt");
        w.str(&space.cache_salt);
    }
    w.str("events");
    w.reserve(rows.len() * 2 * EVENT_BYTES_MIN);
    w.array(rows.len());
    for (event, place) in rows {
        w.array(ROW);
        w.boolean(event.kind == EventKind::Removed);
        w.bytes(&event.chunk);
        match &event.parent {
            Some(parent) => w.bytes(parent),
            None => w.nil(),
        }
        w.uint(event.rank);
        w.uint(place);
        w.uint(event.at_ms);
    }
}

pub(super) fn decode(r: &mut Reader<'_>) -> Result<Events> {
    let mut incarnation = None;
    let mut first = None;
    let mut lost = None;
    let mut spaces: Option<Vec<Arc<EventSpace>>> = None;
    let mut events = None;
    for _ in 0..r.map_len()? {
        match r.str()? {
            "incarnation" => once(&mut incarnation, "incarnation", r.fixed_bytes()),
            "first" => once(&mut first, "first", r.integer()),
            "lost" => once(&mut lost, "lost", r.boolean()),
            "spaces" => once(&mut spaces, "spaces", r.short_list(decode_space)),
            "events" => {
                // They come after the spaces that they refer to.
                let spaces = spaces.as_deref().unwrap_or_default();
                let rows = r.list(EVENT_BYTES_MIN, |r| decode_event(r, spaces));
                once(&mut events, "events", rows)
            }
            _ => r.skip().map(drop),
        }?;
    }
    Ok(Events {
        incarnation: required(incarnation, "incarnation")?,
        first: required(first, "first")?,
        lost: required(lost, "lost")?,
        events: required(events, "events")?,
    })
}

fn decode_space(r: &mut Reader<'_>) -> Result<Arc<EventSpace>> {
    let mut model_name = None;
    let mut world_size = None;
    let mut cache_salt = None;
    for _ in 0..r.map_len()? {
        match r.str()? {
            "model_name" => once(&mut model_name, "model_name", r.string()),
            "world_size" => once(&mut world_size, "world_size", r.integer()),
            "cache_salt" => once(&mut cache_salt, "cache_salt", r.string()),
            _ => r.skip().map(drop),
        }?;
    }
    Ok(Arc::new(EventSpace {
        model_name: required(model_name, "model_name")?,
        world_size: required(world_size, "world_size")?,
        cache_salt: required(cache_salt, "cache_salt")?,
    }))
}

fn decode_event(r: &mut Reader<'_>, spaces: &[Arc<EventSpace>]) -> Result<KvEvent> {
    if r.array_len()? != ROW {
        return Err(Problem::Inconsistent("an event has 6 values").into());
    }
    let kind = if r.boolean()? { EventKind::Removed } else { EventKind::Stored };
    let chunk = r.fixed_bytes()?;
    let parent = if r.nil() { None } else { Some(r.fixed_bytes()?) };
    let rank = r.integer()?;
    let space = spaces.get(r.integer::<usize>()?);
    let space = space.ok_or(Problem::Inconsistent("each event has a space of the list"))?;
    Ok(KvEvent { kind, chunk, parent, rank, space: Arc::clone(space), at_ms: r.integer()? })
}
