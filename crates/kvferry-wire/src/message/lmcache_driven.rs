//! The parameters of LMCache's `lmcache_driven` mode: descriptors of an engine's memory, and its blocks.

use std::fmt::Write as _;

use bytes::Bytes;
use kvferry_core::key::Dtype;
use kvferry_core::kv_descriptors::{
    CudaStorage, EngineGroup, KvDescriptor, KvRegistration, KvStorage,
};

use super::request::decode_dtype;
use super::{MessageError, Payload, one, refuse_data};
use crate::messagepack::{Problem, Reader, Result, Writer, frame, once, required, within};

/// LMCache's extension for whatever names a device's memory; its data is a map that says what.
const DEVICE_MEMORY: u8 = 1;
/// A POSIX segment.
const CPU_SHM: &str = "cpu_shm";
/// A storage of PyTorch's on a CUDA device.
const CUDA: &str = "cuda";
/// A range of an allocation on a CUDA device.
const CUDA_RAW: &str = "cuda_raw";
/// What a storage of PyTorch's is called that CUDA has no handle for.
const EXPANDABLE: &str = "cuda (expandable segments)";
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
    let mut bytes = None;
    let mut handle = None;
    let mut ipc_handle = None;
    let mut alloc_offset = None;
    let mut version = None;
    let mut metadata = None;
    for _ in 0..r.map_len()? {
        match r.str()? {
            "type" => once(&mut kind, "type", r.str()),
            "shm_name" => once(&mut shm_name, "shm_name", short_string(r)),
            "nbytes" => once(&mut bytes, "nbytes", r.integer()),
            "alloc_offset" => once(&mut alloc_offset, "alloc_offset", r.integer()),
            "version" => once(&mut version, "version", r.integer::<u64>()),
            // Of other types these may be anything, until the type is known.
            "handle" => once(&mut handle, "handle", r.skip()),
            "ipc_handle" => once(&mut ipc_handle, "ipc_handle", r.skip()),
            "metadata" => once(&mut metadata, "metadata", r.skip()),
            _ => r.skip().map(drop),
        }?;
    }
    let kind = required(kind, "type")?;
    if ![CPU_SHM, CUDA, CUDA_RAW].contains(&kind) {
        return Ok(Err(kind.chars().take(QUOTED).collect()));
    }
    if required(version, "version")? != 1 {
        return within("version", Err(Problem::Inconsistent("descriptors have version 1").into()));
    }
    let metadata = required(metadata, "metadata")?;
    let Metadata { dtype, shape, stride, storage_offset, device_uuid } =
        within("metadata", frame(metadata, decode_metadata))?;
    let part = |handle, offset, bytes| -> Result<KvStorage> {
        let device_uuid =
            within("device_uuid", frame(required(device_uuid, "device_uuid")?, uuid))?;
        Ok(KvStorage::Cuda(Box::new(CudaStorage { device_uuid, handle, offset, bytes })))
    };
    let storage = match kind {
        CUDA => {
            let handle = frame(required(handle, "handle")?, decode_shared_storage);
            match within("handle", handle)? {
                Some((handle, offset, bytes)) => part(handle, offset, bytes)?,
                None => return Ok(Err(EXPANDABLE.to_owned())),
            }
        }
        CUDA_RAW => {
            let handle = frame(required(ipc_handle, "ipc_handle")?, |r| cuda_handle(r.bytes()?));
            let offset = required(alloc_offset, "alloc_offset")?;
            part(within("ipc_handle", handle)?, offset, required(bytes, "nbytes")?)?
        }
        _ => KvStorage::Segment {
            shm_name: required(shm_name, "shm_name")?,
            bytes: required(bytes, "nbytes")?,
        },
    };
    Ok(Ok(KvDescriptor { storage, dtype, shape, stride, storage_offset }))
}

fn cuda_handle(bytes: &[u8]) -> Result<[u8; 64]> {
    let handle = bytes.try_into();
    handle.map_err(|_| Problem::Inconsistent("handles of CUDA's have 64 bytes").into())
}

/// What PyTorch's `UntypedStorage._share_cuda_()` gives: the allocation's handle, where the storage begins in it, and its
/// bytes. `None` for expandable segments, which are mapped piece by piece.
///
/// What PyTorch's processes count references by stays as it is: an engine that frees its tensors, and goes on, has
/// the memory back when it ends.
fn decode_shared_storage(r: &mut Reader<'_>) -> Result<Option<([u8; 64], u64, u64)>> {
    if r.array_len()? != 8 {
        return Err(Problem::Inconsistent("a shared storage has 8 fields").into());
    }
    r.integer::<i64>()?; // the device's number among the engine's
    let handle = r.bytes()?;
    let (bytes, offset) = (r.integer()?, r.integer()?);
    bytes_or_nil(r)?; // the file of reference counts
    r.integer::<u64>()?; // the place in it
    bytes_or_nil(r)?; // an event of the time of sharing: each request has one of its own
    r.boolean()?;
    // All but old releases of PyTorch put a version and the kind of the allocation first. The versions 1 to 3 differ in
    // expandable segments only.
    let handle = match handle {
        [_, b'c', handle @ ..] if handle.len() == 64 => handle,
        [_, b'e', ..] if handle.len() != 64 => return Ok(None),
        handle => handle,
    };
    Ok(Some((cuda_handle(handle)?, offset, bytes)))
}

fn bytes_or_nil(r: &mut Reader<'_>) -> Result<()> {
    if r.nil() { Ok(()) } else { r.bytes().map(drop) }
}

/// 8-4-4-4-12 hexadecimal digits, as PyTorch writes a device's UUID.
fn uuid(r: &mut Reader<'_>) -> Result<[u8; 16]> {
    let parsed = parse_uuid(r.str()?);
    parsed.ok_or(Problem::Inconsistent("a device's UUID has 32 hexadecimal digits").into())
}

fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    const DASHES: [usize; 4] = [8, 13, 18, 23];
    if text.len() != 36 || DASHES.iter().any(|at| text.as_bytes()[*at] != b'-') {
        return None;
    }
    let digits = text.bytes().enumerate().filter(|(at, _)| !DASHES.contains(at));
    let mut digits = digits.map(|(_, digit)| char::from(digit).to_digit(16));
    let mut uuid = [0; 16];
    for byte in &mut uuid {
        let (high, low) = (digits.next()??, digits.next()??);
        *byte = u8::try_from(high << 4 | low).ok()?;
    }
    Some(uuid)
}

/// A tensor's view of its storage.
struct Metadata<'a> {
    dtype: Dtype,
    shape: Vec<u64>,
    stride: Vec<u64>,
    storage_offset: u64,
    /// What there is of it: a host's is the word "cpu".
    device_uuid: Option<&'a [u8]>,
}

fn decode_metadata<'a>(r: &mut Reader<'a>) -> Result<Metadata<'a>> {
    let mut dtype = None;
    let mut shape = None;
    let mut stride = None;
    let mut storage_offset = None;
    let mut device_uuid = None;
    for _ in 0..r.map_len()? {
        match r.str()? {
            "dtype" => once(&mut dtype, "dtype", decode_dtype(r)),
            "shape" => once(&mut shape, "shape", dimensions(r)),
            "stride" => once(&mut stride, "stride", dimensions(r)),
            "storage_offset" => once(&mut storage_offset, "storage_offset", r.integer()),
            "device_uuid" => once(&mut device_uuid, "device_uuid", r.skip()),
            _ => r.skip().map(drop),
        }?;
    }
    Ok(Metadata {
        dtype: required(dtype, "dtype")?,
        shape: required(shape, "shape")?,
        stride: required(stride, "stride")?,
        storage_offset: required(storage_offset, "storage_offset")?,
        device_uuid,
    })
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
        match &layer.storage {
            KvStorage::Segment { shm_name, bytes } => {
                w.map(5);
                w.str("type");
                w.str(CPU_SHM);
                w.str("shm_name");
                w.str(shm_name);
                w.str("nbytes");
                w.uint(*bytes);
            }
            KvStorage::Cuda(part) => {
                w.map(6);
                w.str("type");
                w.str(CUDA_RAW);
                w.str("ipc_handle");
                w.bytes(&part.handle);
                w.str("alloc_offset");
                w.uint(part.offset);
                w.str("nbytes");
                w.uint(part.bytes);
            }
        }
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
        match &layer.storage {
            KvStorage::Segment { .. } => w.str("cpu"),
            KvStorage::Cuda(part) => w.str(&format_uuid(&part.device_uuid)),
        }
    })
}

fn format_uuid(uuid: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (at, byte) in uuid.iter().enumerate() {
        if [4, 6, 8, 10].contains(&at) {
            text.push('-');
        }
        let _ = write!(text, "{byte:02x}"); // a String takes everything
    }
    text
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
