//! The reply to [`Request::Explain`](super::Request::Explain).

use kvferry_core::explain::{
    Evictor, Explanation, MissingChunk, ObjectLayout, Removal, RemovalCause,
};

use crate::messagepack::{Problem, Reader, Result, Writer, once, required};

pub(super) fn encode(explanation: &Explanation, w: &mut Writer) {
    w.map(4);
    w.str("chunks");
    w.uint(explanation.chunks);
    w.str("hit_chunks");
    w.uint(explanation.hit_chunks);
    w.str("registered");
    w.boolean(explanation.registered);
    w.str("missing");
    match &explanation.missing {
        Some(missing) => encode_missing(missing, w),
        None => w.nil(),
    }
}

fn encode_missing(missing: &MissingChunk, w: &mut Writer) {
    w.map(9);
    w.str("chunk");
    w.bytes(&missing.chunk);
    w.str("missing_ranks");
    w.uints(&missing.missing_ranks);
    w.str("writing_ranks");
    w.uints(&missing.writing_ranks);
    w.str("other_salts");
    w.uint(missing.other_salts);
    w.str("other_models");
    w.array(missing.other_models.len());
    missing.other_models.iter().for_each(|name| w.str(name));
    w.str("other_world_sizes");
    w.uints(&missing.other_world_sizes);
    w.str("other_layouts");
    w.array(missing.other_layouts.len());
    for layout in &missing.other_layouts {
        w.map(2);
        w.str("shape");
        w.uints(&layout.shape);
        w.str("dtype");
        w.str(&layout.dtype);
    }
    w.str("removed");
    match &missing.removed {
        Some(removal) => {
            w.map(2 + usize::from(removal.by.is_some()));
            w.str("cause");
            w.str(removal.cause.as_str());
            w.str("at_ms");
            w.uint(removal.at_ms);
            if let Some(Evictor { tenant, own }) = &removal.by {
                w.str("by");
                w.map(2);
                w.str("tenant");
                w.str(tenant);
                w.str("own");
                w.boolean(*own);
            }
        }
        None => w.nil(),
    }
    w.str("log_since_ms");
    w.uint(missing.log_since_ms);
}

pub(super) fn decode(r: &mut Reader<'_>) -> Result<Explanation> {
    let mut chunks = None;
    let mut hit_chunks = None;
    let mut registered = None;
    let mut missing = None;
    for _ in 0..r.map_len()? {
        match r.str()? {
            "chunks" => once(&mut chunks, "chunks", r.integer()),
            "hit_chunks" => once(&mut hit_chunks, "hit_chunks", r.integer()),
            "registered" => once(&mut registered, "registered", r.boolean()),
            "missing" => once(&mut missing, "missing", or_nil(r, decode_missing)),
            _ => r.skip().map(drop),
        }?;
    }
    Ok(Explanation {
        chunks: required(chunks, "chunks")?,
        hit_chunks: required(hit_chunks, "hit_chunks")?,
        registered: required(registered, "registered")?,
        missing: required(missing, "missing")?,
    })
}

fn decode_missing(r: &mut Reader<'_>) -> Result<MissingChunk> {
    let mut chunk = None;
    let mut missing_ranks = None;
    let mut writing_ranks = None;
    let mut other_salts = None;
    let mut other_models = None;
    let mut other_world_sizes = None;
    let mut other_layouts = None;
    let mut removed = None;
    let mut log_since_ms = None;
    for _ in 0..r.map_len()? {
        match r.str()? {
            "chunk" => once(&mut chunk, "chunk", r.fixed_bytes()),
            "missing_ranks" => once(&mut missing_ranks, "missing_ranks", r.integers()),
            "writing_ranks" => once(&mut writing_ranks, "writing_ranks", r.integers()),
            "other_salts" => once(&mut other_salts, "other_salts", r.integer()),
            "other_models" => once(&mut other_models, "other_models", r.short_list(Reader::string)),
            "other_world_sizes" => once(&mut other_world_sizes, "other_world_sizes", r.integers()),
            "other_layouts" => {
                once(&mut other_layouts, "other_layouts", r.short_list(decode_layout))
            }
            "removed" => once(&mut removed, "removed", or_nil(r, decode_removal)),
            "log_since_ms" => once(&mut log_since_ms, "log_since_ms", r.integer()),
            _ => r.skip().map(drop),
        }?;
    }
    Ok(MissingChunk {
        chunk: required(chunk, "chunk")?,
        missing_ranks: required(missing_ranks, "missing_ranks")?,
        writing_ranks: required(writing_ranks, "writing_ranks")?,
        other_salts: required(other_salts, "other_salts")?,
        other_models: required(other_models, "other_models")?,
        other_world_sizes: required(other_world_sizes, "other_world_sizes")?,
        other_layouts: required(other_layouts, "other_layouts")?,
        removed: required(removed, "removed")?,
        log_since_ms: required(log_since_ms, "log_since_ms")?,
    })
}

fn decode_layout(r: &mut Reader<'_>) -> Result<ObjectLayout> {
    let mut shape = None;
    let mut dtype = None;
    for _ in 0..r.map_len()? {
        match r.str()? {
            "shape" => once(&mut shape, "shape", r.integers()),
            "dtype" => once(&mut dtype, "dtype", r.string()),
            _ => r.skip().map(drop),
        }?;
    }
    Ok(ObjectLayout { shape: required(shape, "shape")?, dtype: required(dtype, "dtype")? })
}

fn decode_removal(r: &mut Reader<'_>) -> Result<Removal> {
    let mut cause = None;
    let mut at_ms = None;
    let mut by = None;
    for _ in 0..r.map_len()? {
        match r.str()? {
            "cause" => once(&mut cause, "cause", decode_cause(r)),
            "at_ms" => once(&mut at_ms, "at_ms", r.integer()),
            "by" => once(&mut by, "by", or_nil(r, decode_evictor)),
            _ => r.skip().map(drop),
        }?;
    }
    let (cause, at_ms) = (required(cause, "cause")?, required(at_ms, "at_ms")?);
    Ok(Removal { cause, at_ms, by: by.flatten() })
}

fn decode_evictor(r: &mut Reader<'_>) -> Result<Evictor> {
    let mut tenant = None;
    let mut own = None;
    for _ in 0..r.map_len()? {
        match r.str()? {
            "tenant" => once(&mut tenant, "tenant", r.string()),
            "own" => once(&mut own, "own", r.boolean()),
            _ => r.skip().map(drop),
        }?;
    }
    Ok(Evictor { tenant: required(tenant, "tenant")?, own: required(own, "own")? })
}

fn decode_cause(r: &mut Reader<'_>) -> Result<RemovalCause> {
    let cause = RemovalCause::from_name(r.str()?);
    cause.ok_or_else(|| Problem::Inconsistent("no cause of this name is known").into())
}

fn or_nil<'a, T>(
    r: &mut Reader<'a>,
    decode: impl FnOnce(&mut Reader<'a>) -> Result<T>,
) -> Result<Option<T>> {
    if r.nil() { Ok(None) } else { decode(r).map(Some) }
}
