//! The parameters of LMCache's `lmcache_driven` mode: descriptors of an engine's memory, and its blocks.

use bytes::Bytes;
use kvferry_core::kv_descriptors::{EngineGroup, KvDescriptor, KvRegistration};

use super::request::decode_dtype;
use super::{MessageError, Payload, one, refuse_data};
use crate::messagepack::{Problem, Reader, Result, Writer, frame, once, required, within};

/// LMCache's extension for whatever names a device's memory; its data is a map that says what.
const DEVICE_MEMORY: u8 = 1;
/// The only memory that is served: a POSIX segment.
const CPU_SHM: &str = "cpu_shm";
/// No tensor of any engine has more dimensions.
const DIMENSIONS_MAX: usize = 8;
/// What is quoted of an unknown type, in characters.
const QUOTED: usize = 32;
/// A segment's name is a file's.
const NAME_BYTES_MAX: usize = 256;
/// Bytes of an event's handle; CUDA's have 64.
const EVENT_BYTES_MAX: usize = 1024;

/// The frames after the instance.
pub(super) fn registration(p: &mut Payload<'_>) -> Result<KvRegistration, MessageError> {
    let descriptors = p.next("kv_caches", |r| r.short_list(|r| r.extension(DEVICE_MEMORY)))?;
    let mut layers = Vec::with_capacity(descriptors.len());
    for descriptor in descriptors {
        // Older releases pickle them, which begins as an empty map does.
        refuse_pickle(p, descriptor)?;
        let decoded = p.within("kv_caches", frame(descriptor, decode_descriptor))?;
        layers.push(decoded.map_err(|other| MessageError::MemoryType(p.operation, other))?);
    }
    Ok(KvRegistration {
        layers,
        model_name: p.next("model_name", Reader::string)?,
        world_size: p.next("world_size", Reader::integer)?,
        engine_type: p.next("engine_type", short_string)?,
        kv_layout: p.next("layout_hints", decode_hints)?,
        groups: p.next("engine_group_infos", |r| r.short_list(decode_group))?,
    })
}

fn refuse_pickle(p: &Payload<'_>, data: &[u8]) -> Result<(), MessageError> {
    if data.len() > 1 && data[0] == 0x80 { refuse_data(p.operation, data) } else { Ok(()) }
}

/// The blocks of each group.
pub(super) fn block_ids(r: &mut Reader<'_>) -> Result<Vec<Vec<u32>>> {
    r.short_list(Reader::integers)
}

pub(super) fn event(p: &mut Payload<'_>) -> Result<Box<[u8]>, MessageError> {
    let event = p.next("event_ipc_handle", |r| match r.bytes()? {
        event if event.len() <= EVENT_BYTES_MAX => Ok(event),
        event => Err(Problem::TooLong(event.len()).into()),
    })?;
    Ok(event.into())
}

/// A word that is never long in an honest message.
fn short_string(r: &mut Reader<'_>) -> Result<String> {
    match r.str()? {
        word if word.len() <= NAME_BYTES_MAX => Ok(word.to_owned()),
        word => Err(Problem::TooLong(word.len()).into()),
    }
}

/// A descriptor; of another type's, the type.
fn decode_descriptor(r: &mut Reader<'_>) -> Result<Result<KvDescriptor, String>> {
    let mut kind = None;
    let mut shm_name = None;
    let mut segment_bytes = None;
    let mut version = None;
    let mut metadata = None;
    for _ in 0..r.map_len()? {
        match r.str()? {
            "type" => once(&mut kind, "type", r.str()),
            "shm_name" => once(&mut shm_name, "shm_name", short_string(r)),
            "nbytes" => once(&mut segment_bytes, "nbytes", r.integer()),
            "version" => once(&mut version, "version", r.integer::<u64>()),
            // Of other types it may be anything, until the type is known.
            "metadata" => once(&mut metadata, "metadata", r.skip()),
            _ => r.skip().map(drop),
        }?;
    }
    let kind = required(kind, "type")?;
    if kind != CPU_SHM {
        return Ok(Err(kind.chars().take(QUOTED).collect()));
    }
    if required(version, "version")? != 1 {
        return within("version", Err(Problem::Inconsistent("descriptors have version 1").into()));
    }
    let metadata = required(metadata, "metadata")?;
    let (dtype, shape, stride, storage_offset) =
        within("metadata", frame(metadata, decode_metadata))?;
    Ok(Ok(KvDescriptor {
        shm_name: required(shm_name, "shm_name")?,
        segment_bytes: required(segment_bytes, "nbytes")?,
        dtype,
        shape,
        stride,
        storage_offset,
    }))
}

type Metadata = (kvferry_core::key::Dtype, Vec<u64>, Vec<u64>, u64);

fn decode_metadata(r: &mut Reader<'_>) -> Result<Metadata> {
    let mut dtype = None;
    let mut shape = None;
    let mut stride = None;
    let mut storage_offset = None;
    for _ in 0..r.map_len()? {
        match r.str()? {
            "dtype" => once(&mut dtype, "dtype", decode_dtype(r)),
            "shape" => once(&mut shape, "shape", dimensions(r)),
            "stride" => once(&mut stride, "stride", dimensions(r)),
            "storage_offset" => once(&mut storage_offset, "storage_offset", r.integer()),
            _ => r.skip().map(drop), // the device's name, which is "cpu"
        }?;
    }
    Ok((
        required(dtype, "dtype")?,
        required(shape, "shape")?,
        required(stride, "stride")?,
        required(storage_offset, "storage_offset")?,
    ))
}

fn dimensions(r: &mut Reader<'_>) -> Result<Vec<u64>> {
    let dimensions: Vec<u64> = r.integers()?;
    match dimensions.len() {
        ..=DIMENSIONS_MAX => Ok(dimensions),
        count => Err(Problem::TooLong(count).into()),
    }
}

/// Of an engine's hints, the one that is of use here.
fn decode_hints(r: &mut Reader<'_>) -> Result<Option<String>> {
    let mut kv_layout = None;
    for _ in 0..r.map_len()? {
        match r.str()? {
            "kv_layout" => once(&mut kv_layout, "kv_layout", short_string(r)),
            _ => r.skip().map(drop),
        }?;
    }
    Ok(kv_layout)
}

fn decode_group(r: &mut Reader<'_>) -> Result<EngineGroup> {
    let mut engine_group_id = None;
    let mut layer_indices = None;
    let mut tokens_per_block = None;
    let mut sw_size_tokens = None;
    let mut extra_object_group_tag = None;
    let mut recurrent_state = None;
    for _ in 0..r.map_len()? {
        match r.str()? {
            "engine_group_id" => once(&mut engine_group_id, "engine_group_id", r.integer()),
            "layer_indices" => once(&mut layer_indices, "layer_indices", r.integers()),
            "tokens_per_block" => once(&mut tokens_per_block, "tokens_per_block", r.integer()),
            "sw_size_tokens" => once(&mut sw_size_tokens, "sw_size_tokens", r.integer()),
            "extra_object_group_tag" => {
                once(&mut extra_object_group_tag, "extra_object_group_tag", r.integer())
            }
            "recurrent_state" => once(&mut recurrent_state, "recurrent_state", r.boolean()),
            _ => r.skip().map(drop),
        }?;
    }
    Ok(EngineGroup {
        engine_group_id: required(engine_group_id, "engine_group_id")?,
        layer_indices: layer_indices.unwrap_or_default(),
        tokens_per_block: tokens_per_block.unwrap_or_default(),
        sw_size_tokens: sw_size_tokens.unwrap_or(-1),
        extra_object_group_tag: extra_object_group_tag.unwrap_or_default(),
        recurrent_state: recurrent_state.unwrap_or_default(),
    })
}

pub(super) fn encode_registration(registration: &KvRegistration) -> [Bytes; 6] {
    let KvRegistration { model_name, world_size, engine_type, kv_layout, groups, layers } =
        registration;
    [
        one(|w| {
            w.array(layers.len());
            layers.iter().for_each(|layer| w.extension(DEVICE_MEMORY, &encode_descriptor(layer)));
        }),
        one(|w| w.str(model_name)),
        one(|w| w.uint(*world_size)),
        one(|w| w.str(engine_type)),
        one(|w| {
            w.map(usize::from(kv_layout.is_some()));
            if let Some(kv_layout) = kv_layout {
                w.str("kv_layout");
                w.str(kv_layout);
            }
        }),
        one(|w| {
            w.array(groups.len());
            groups.iter().for_each(|group| encode_group(group, w));
        }),
    ]
}

fn encode_descriptor(layer: &KvDescriptor) -> Bytes {
    one(|w| {
        w.map(5);
        w.str("type");
        w.str(CPU_SHM);
        w.str("shm_name");
        w.str(&layer.shm_name);
        w.str("nbytes");
        w.uint(layer.segment_bytes);
        w.str("version");
        w.uint(1_u64);
        w.str("metadata");
        w.map(5);
        w.str("dtype");
        w.str(layer.dtype.name());
        w.str("shape");
        w.uints(&layer.shape);
        w.str("stride");
        w.uints(&layer.stride);
        w.str("storage_offset");
        w.uint(layer.storage_offset);
        w.str("device_uuid");
        w.str("cpu");
    })
}

fn encode_group(group: &EngineGroup, w: &mut Writer) {
    w.map(6);
    w.str("engine_group_id");
    w.uint(group.engine_group_id);
    w.str("layer_indices");
    w.uints(&group.layer_indices);
    w.str("tokens_per_block");
    w.uint(group.tokens_per_block);
    w.str("sw_size_tokens");
    w.int(group.sw_size_tokens);
    w.str("extra_object_group_tag");
    w.int(group.extra_object_group_tag);
    w.str("recurrent_state");
    w.boolean(group.recurrent_state);
}

pub(super) fn encode_blocks(block_ids: &[Vec<u32>], event: &[u8]) -> [Bytes; 2] {
    let blocks = one(|w| {
        w.array(block_ids.len());
        block_ids.iter().for_each(|blocks| w.uints(blocks));
    });
    [blocks, one(|w| w.bytes(event))]
}
