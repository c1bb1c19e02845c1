//! How an engine describes its KV memory to a server that copies from and to it by itself: the tensors of LMCache's
//! `register_kv_cache`. Their shapes say what the engine-driven mode registers in numbers, so both share objects.

use std::collections::HashMap;
use std::sync::Arc;

use crate::copy_plan::CopyShape;
use crate::key::Dtype;
use crate::kv_layout::{KvLayout, Order, Planes};
use crate::{Error, ErrorCode, Result};

/// Bytes of one token in one array at most: what copies hold at once.
pub const TOKEN_BYTES_MAX: u64 = 1 << 20;
/// vLLM's block that stands for "no KV": a chunk of nothing else has nothing to store.
pub const NULL_BLOCK: u32 = 0;

/// A layer's KV tensor: a view of memory of the engine's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvDescriptor {
    /// The memory.
    pub storage: KvStorage,
    /// Element type.
    pub dtype: Dtype,
    /// Outermost first.
    pub shape: Vec<u64>,
    /// Elements from one to the next of each dimension.
    pub stride: Vec<u64>,
    /// Elements from the storage's start.
    pub storage_offset: u64,
}

/// Memory that an engine lets the server reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvStorage {
    /// A shared-memory segment of the host.
    Segment {
        /// Its POSIX name, with its leading slash.
        shm_name: String,
        /// Bytes.
        bytes: u64,
    },
    /// A part of an allocation on a CUDA device.
    Cuda(Box<CudaStorage>),
}

/// A part of an allocation on a CUDA device, by what the engine's process exports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaStorage {
    /// The device: two processes may number them differently.
    pub device_uuid: [u8; 16],
    /// Names the allocation (`CUipcMemHandle`).
    pub handle: [u8; 64],
    /// Bytes from the allocation's start.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
}

impl KvStorage {
    fn bytes(&self) -> u64 {
        match self {
            Self::Segment { bytes, .. } => *bytes,
            Self::Cuda(part) => part.bytes,
        }
    }
}

/// Layers that share block ids (LMCache's `EngineGroupInfo`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineGroup {
    /// Which of the engine's block tables they go by.
    pub engine_group_id: u64,
    /// Its tensors.
    pub layer_indices: Vec<u32>,
    /// Tokens of a block; 0 for as many as the tensors say.
    pub tokens_per_block: u64,
    /// The sliding window; -1 for none.
    pub sw_size_tokens: i64,
    /// Other than 0 for what a connector keeps beside the KV.
    pub extra_object_group_tag: i64,
    /// Whether its blocks hold recurrent state.
    pub recurrent_state: bool,
}

/// A worker's KV memory, as it describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvRegistration {
    /// Without `@`.
    pub model_name: String,
    /// KV shards of the model, 1..=255.
    pub world_size: u32,
    /// "vllm", for instance.
    pub engine_type: String,
    /// The order of dimensions that shapes do not tell: "HND", "NHD" and the like.
    pub kv_layout: Option<String>,
    /// None: one group of all layers.
    pub groups: Vec<EngineGroup>,
    /// One for each layer.
    pub layers: Vec<KvDescriptor>,
}

/// What a registration means.
#[derive(Debug, Clone)]
pub struct DescribedMemory {
    /// The arrays' layout.
    pub layout: KvLayout,
    /// What copies have in common.
    pub shape: Arc<CopyShape>,
    /// What they lie in.
    pub storages: Storages,
    /// Where each array begins: the storage's number, and bytes from its start.
    pub arrays: Vec<(usize, u64)>,
}

/// What an engine's arrays lie in, each once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Storages {
    /// Segments: name and bytes.
    Segments(Vec<(String, u64)>),
    /// Allocations on a CUDA device: handle, and bytes that it must have.
    Cuda {
        /// The device.
        device_uuid: [u8; 16],
        /// In the order of the arrays.
        allocations: Vec<([u8; 64], u64)>,
    },
}

impl KvRegistration {
    /// The memory as arrays of blocks, checked: each lies within its storage, and none over another.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedModel`] for several groups of layers, sliding windows and recurrent state;
    /// [`ErrorCode::UnsupportedOption`] for other engines than vLLM and shapes that are not known;
    /// [`ErrorCode::InvalidArgument`] for what cannot be. No message has words of the peer's.
    pub fn memory(&self, chunk_size: u32) -> Result<DescribedMemory> {
        if self.engine_type != "vllm" {
            return Err(unsupported("only tensors of vLLM are known here"));
        }
        let layers = self.group()?;
        let order = match (self.kv_layout.as_deref(), &layers[0].storage) {
            // LMCache's defaults.
            (None, KvStorage::Segment { .. }) | (Some("HND" | "BLHNC"), _) => Order::Hnd,
            (None, KvStorage::Cuda(_)) | (Some("NHD" | "BLNHC"), _) => Order::Nhd,
            (Some(_), _) => {
                return Err(unsupported("of KV layouts, only HND, NHD, BLHNC and BLNHC are known"));
            }
        };
        let view = View::new(layers[0], order)?;
        let alike = |layer: &&KvDescriptor| {
            let first = layers[0];
            (&layer.dtype, &layer.shape, &layer.stride)
                == (&first.dtype, &first.shape, &first.stride)
        };
        if !layers.iter().all(alike) {
            return Err(unserved(
                "tensors of unlike shapes are several groups of layers, and one is served",
            ));
        }
        let tokens = self.groups.first().map_or(0, |group| group.tokens_per_block);
        if tokens != 0 && tokens != u64::from(view.block_size) {
            return Err(unserved(format!(
                "blocks of {tokens} tokens in {} places are compressed, which is not served",
                view.block_size
            )));
        }
        let layout = view.layout(u32::try_from(layers.len()).unwrap_or(u32::MAX), chunk_size)?;
        let shape = Arc::new(layout.copy_shape(chunk_size));
        view.place(&layers, layout, shape)
    }

    /// The tensors of the only group.
    fn group(&self) -> Result<Vec<&KvDescriptor>> {
        let layers: Vec<&KvDescriptor> = match self.groups.as_slice() {
            [] => self.layers.iter().collect(),
            [group] => {
                if group.sw_size_tokens > 0 {
                    return Err(unserved("layers with a sliding window are not served"));
                }
                if group.recurrent_state || group.extra_object_group_tag != 0 {
                    return Err(unserved("of state, only the KV of attention is served"));
                }
                let mut indices = group.layer_indices.clone();
                indices.sort_unstable();
                indices.dedup();
                if indices != group.layer_indices {
                    return Err(Error::invalid(
                        "a group's layers are not in ascending order, each once",
                    ));
                }
                let layer = |index: &u32| {
                    let layer = self.layers.get(*index as usize);
                    layer.ok_or_else(|| {
                        Error::invalid(format!(
                            "a group has layer {index} of {}",
                            self.layers.len()
                        ))
                    })
                };
                indices.iter().map(layer).collect::<Result<_>>()?
            }
            groups => {
                return Err(unserved(format!(
                    "{} groups of layers were registered, and one is served",
                    groups.len()
                )));
            }
        };
        if layers.is_empty() {
            return Err(Error::invalid("there are no tensors: give one for each layer"));
        }
        Ok(layers)
    }
}

/// What a tensor's shape and strides say; bytes, where the descriptor has elements.
struct View {
    planes: Planes,
    /// From K to V.
    plane_stride: u64,
    num_blocks: u32,
    block_stride: Option<u64>,
    block_size: u32,
    num_kv_heads: u32,
    head_size: u32,
    order: Order,
    dtype: Dtype,
}

impl View {
    /// The shapes that LMCache's detector for vLLM knows.
    fn new(tensor: &KvDescriptor, order: Order) -> Result<Self> {
        let KvDescriptor { dtype, shape, stride, .. } = tensor;
        let unknown = || {
            unsupported(format!("tensors of shape {shape:?} and strides {stride:?} are not known"))
        };
        let (planes, plane_axis) = match shape.as_slice() {
            _ if shape.len() != stride.len() => return Err(unknown()),
            [2, _, _, _, _] => (Planes::Separate, Some(0)),
            [_, 2, _, _, _] => (Planes::Separate, Some(1)),
            [_, _, _, _] => (Planes::Fused, None),
            // The index of sparse attention: rows and their scales lie apart.
            [_, _, 132] if dtype.name() == "uint8" => return Err(unknown()),
            [_, _, _] => (Planes::Latent, None),
            _ => return Err(unknown()),
        };
        let mut dimensions: Vec<(u64, u64)> =
            shape.iter().copied().zip(stride.iter().copied()).collect();
        let size = dtype.size();
        let bytes = |elements: u64| elements.checked_mul(size).ok_or_else(unknown);
        let plane_stride = match plane_axis {
            Some(axis) => bytes(dimensions.remove(axis).1)?,
            None => 0,
        };
        let (blocks, within) = dimensions.split_first().ok_or_else(unknown)?;
        // Within a block nothing lies between; one of a kind has no next.
        let mut tight = 1_u64;
        for (count, stride) in within.iter().rev() {
            if *count != 1 && *stride != tight {
                return Err(unknown());
            }
            tight = tight.checked_mul(*count).ok_or_else(unknown)?;
        }
        let block_stride = if blocks.0 > 1 { Some(bytes(blocks.1)?) } else { None };
        let number = |value: u64| u32::try_from(value).map_err(|_| unknown());
        let within: Vec<u32> =
            within.iter().map(|(count, _)| number(*count)).collect::<Result<_>>()?;
        let (block_size, heads, head) = match (within.as_slice(), order) {
            ([heads, tokens, head], Order::Hnd) => (*tokens, *heads, *head),
            ([tokens, heads, head], Order::Nhd) => (*tokens, *heads, *head),
            ([tokens, head], _) => (*tokens, 1, *head),
            _ => return Err(unknown()),
        };
        let head_size = match planes {
            Planes::Fused if head % 2 == 1 => return Err(unknown()),
            Planes::Fused => head / 2,
            _ => head,
        };
        Ok(Self {
            planes,
            plane_stride,
            num_blocks: number(blocks.0)?,
            block_stride,
            block_size,
            num_kv_heads: heads,
            head_size,
            order,
            dtype: dtype.clone(),
        })
    }

    fn layout(&self, num_layers: u32, chunk_size: u32) -> Result<KvLayout> {
        let layout = KvLayout {
            num_layers,
            num_blocks: self.num_blocks,
            block_size: self.block_size,
            num_kv_heads: self.num_kv_heads,
            head_size: self.head_size,
            dtype: self.dtype.clone(),
            planes: self.planes,
            order: self.order,
            block_stride: self.block_stride,
        };
        layout.check(chunk_size)?;
        let token = layout.token_bytes();
        if token > TOKEN_BYTES_MAX {
            return Err(unsupported(format!(
                "a token of {token} bytes in a layer is more than {TOKEN_BYTES_MAX}"
            )));
        }
        Ok(layout)
    }

    /// Finds the arrays in their storages.
    fn place(
        &self,
        layers: &[&KvDescriptor],
        layout: KvLayout,
        shape: Arc<CopyShape>,
    ) -> Result<DescribedMemory> {
        let planes = if self.planes == Planes::Separate { 2 } else { 1 };
        let too_far = || Error::invalid("a tensor begins beyond its storage");
        let mut storages = Storages::like(&layers[0].storage);
        let mut known = HashMap::new();
        let mut arrays = Vec::with_capacity(layers.len() * planes);
        for layer in layers {
            let (number, from) = storages.place(&layer.storage, &mut known)?;
            let bytes = layer.storage.bytes();
            let begin = layer.storage_offset.checked_mul(self.dtype.size()).ok_or_else(too_far)?;
            for plane in 0..planes as u64 {
                let offset = plane.checked_mul(self.plane_stride);
                let offset =
                    offset.and_then(|offset| offset.checked_add(begin)).ok_or_else(too_far)?;
                let end = offset.checked_add(shape.array_bytes());
                if end.is_none_or(|end| end > bytes) {
                    return Err(Error::invalid(format!(
                        "{} bytes at {offset} are not within a storage of {bytes} bytes",
                        shape.array_bytes()
                    )));
                }
                arrays.push((number, from.checked_add(offset).ok_or_else(too_far)?));
            }
        }
        // As if the storages lay one behind the other.
        const PAGE: u64 = 4096;
        let mut next = Some(PAGE);
        let begins = storages.bytes().into_iter().map(|bytes| {
            let begin = next.ok_or_else(too_far)?;
            next = begin.checked_add(bytes).and_then(|end| end.checked_next_multiple_of(PAGE));
            Ok(begin)
        });
        let begins: Vec<u64> = begins.collect::<Result<_>>()?;
        let address = |(storage, offset): &(usize, u64)| {
            begins[*storage].checked_add(*offset).map(|at| (at, shape.array_bytes()))
        };
        let addresses: Option<Vec<(u64, u64)>> = arrays.iter().map(address).collect();
        shape.check_arrays(&addresses.ok_or_else(too_far)?)?;
        Ok(DescribedMemory { layout, shape, storages, arrays })
    }
}

impl Storages {
    /// None yet, of the kind that the first tensor has.
    fn like(first: &KvStorage) -> Self {
        match first {
            KvStorage::Segment { .. } => Self::Segments(Vec::new()),
            KvStorage::Cuda(part) => {
                Self::Cuda { device_uuid: part.device_uuid, allocations: Vec::new() }
            }
        }
    }

    /// A tensor's storage by its number, and where the tensor's part of it begins.
    fn place<'a>(
        &mut self,
        storage: &'a KvStorage,
        known: &mut HashMap<&'a [u8], usize>,
    ) -> Result<(usize, u64)> {
        match (self, storage) {
            (Self::Segments(segments), KvStorage::Segment { shm_name, bytes }) => {
                let number = *known.entry(shm_name.as_bytes()).or_insert_with(|| {
                    segments.push((shm_name.clone(), *bytes));
                    segments.len() - 1
                });
                if segments[number].1 != *bytes {
                    return Err(Error::invalid(format!(
                        "a segment has {} bytes for one tensor and {bytes} for another",
                        segments[number].1
                    )));
                }
                Ok((number, 0))
            }
            (Self::Cuda { device_uuid, allocations }, KvStorage::Cuda(part)) => {
                if part.device_uuid != *device_uuid {
                    return Err(unserved("layers on several devices are not served"));
                }
                let end = part.offset.checked_add(part.bytes).ok_or_else(|| {
                    Error::invalid(format!(
                        "{} bytes at {} are beyond any allocation",
                        part.bytes, part.offset
                    ))
                })?;
                let number = *known.entry(&part.handle).or_insert_with(|| {
                    allocations.push((part.handle, 0));
                    allocations.len() - 1
                });
                let bytes = &mut allocations[number].1;
                *bytes = end.max(*bytes);
                Ok((number, part.offset))
            }
            _ => Err(unserved("layers in memory of several kinds are not served")),
        }
    }

    fn bytes(&self) -> Vec<u64> {
        match self {
            Self::Segments(segments) => segments.iter().map(|(_, bytes)| *bytes).collect(),
            Self::Cuda { allocations, .. } => allocations.iter().map(|(_, bytes)| *bytes).collect(),
        }
    }
}

/// What no mode serves.
fn unserved(message: impl Into<String>) -> Error {
    let message = format!("{}; the engine computes without the cache", message.into());
    Error::new(ErrorCode::UnsupportedModel, message)
}

/// What the other mode may serve, where the engine copies by itself.
fn unsupported(message: impl Into<String>) -> Error {
    Error::new(
        ErrorCode::UnsupportedOption,
        format!("{}; start the engine with LMCACHE_MP_TRANSFER_MODE=engine_driven", message.into()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u32 = 16;

    fn segment(number: u32, bytes: u64) -> KvStorage {
        KvStorage::Segment { shm_name: format!("/lmcache_kv_1_{number}"), bytes }
    }

    fn tensor(shape: &[u64]) -> KvDescriptor {
        let mut stride = vec![1; shape.len()];
        for axis in (1..shape.len()).rev() {
            stride[axis - 1] = stride[axis] * shape[axis];
        }
        KvDescriptor {
            storage: segment(0, 2 * shape.iter().product::<u64>()),
            dtype: Dtype::new("bfloat16").unwrap(),
            shape: shape.to_vec(),
            stride,
            storage_offset: 0,
        }
    }

    fn registration(layers: Vec<KvDescriptor>, kv_layout: &str) -> KvRegistration {
        let layers = (0..).zip(layers).map(|(number, layer): (u32, KvDescriptor)| KvDescriptor {
            storage: segment(number, layer.storage.bytes()),
            ..layer
        });
        KvRegistration {
            model_name: "m".into(),
            world_size: 1,
            engine_type: "vllm".into(),
            kv_layout: Some(kv_layout.into()),
            groups: Vec::new(),
            layers: layers.collect(),
        }
    }

    fn group() -> EngineGroup {
        EngineGroup {
            engine_group_id: 0,
            layer_indices: vec![0, 1],
            tokens_per_block: 4,
            sw_size_tokens: -1,
            extra_object_group_tag: 0,
            recurrent_state: false,
        }
    }

    #[test]
    fn shapes_are_what_lmcaches_detector_for_vllm_takes_them_for() {
        for (shape, hint, planes, order, heads, head) in [
            (&[2, 8, 4, 3, 5][..], "NHD", Planes::Separate, Order::Nhd, 3, 5),
            (&[8, 2, 3, 4, 5], "HND", Planes::Separate, Order::Hnd, 3, 5),
            (&[8, 3, 4, 10], "HND", Planes::Fused, Order::Hnd, 3, 5),
            (&[8, 4, 3, 10], "NHD", Planes::Fused, Order::Nhd, 3, 5),
            (&[8, 4, 5], "NHD", Planes::Latent, Order::Nhd, 1, 5),
        ] {
            let two = registration(vec![tensor(shape), tensor(shape)], hint);
            let DescribedMemory { layout, storages, arrays, .. } = two.memory(CHUNK).unwrap();
            let found = (layout.planes, layout.order, layout.num_kv_heads, layout.head_size);
            assert_eq!(found, (planes, order, heads, head), "{shape:?}");
            assert_eq!((layout.num_layers, layout.num_blocks, layout.block_size), (2, 8, 4));
            assert_eq!((storages.bytes().len(), arrays.len()), (2, layout.arrays()));
        }
        let packed =
            KvRegistration { kv_layout: None, ..registration(vec![tensor(&[8, 3, 4, 10])], "") };
        assert_eq!(
            packed.memory(CHUNK).unwrap().layout.order,
            Order::Hnd,
            "LMCache's default on a CPU"
        );
    }

    #[test]
    fn what_vllm_and_lmcaches_benchmark_register_has_the_objects_of_their_engine_driven_mode() {
        let fused = registration(vec![tensor(&[8, 2, 4, 16]); 3], "HND");
        let object = fused.memory(CHUNK).unwrap().layout.registration("m", 1, CHUNK);
        assert_eq!((object.hidden_dim_size, object.single_plane), (2 * 16, true));
        assert_eq!(object.num_physical_slots, Some(CHUNK));
        let separate = registration(vec![tensor(&[2, 8, 4, 2, 8]); 3], "NHD");
        let object = separate.memory(CHUNK).unwrap().layout.registration("m", 1, CHUNK);
        assert_eq!(object.shape(CHUNK), [2, 3, 16, 16]);
    }

    #[test]
    fn k_and_v_of_a_block_may_lie_side_by_side_and_layers_share_a_segment() {
        let block = 4 * 3 * 5;
        let layer = |number: u64| KvDescriptor {
            storage_offset: number * 2 * block,
            stride: vec![4 * block, block, 15, 5, 1],
            storage: segment(0, 2 * 8 * 4 * block),
            ..tensor(&[8, 2, 4, 3, 5])
        };
        let mut both = registration(Vec::new(), "NHD");
        both.layers = vec![layer(0), layer(1)];
        let memory = both.memory(CHUNK).unwrap();
        assert_eq!(memory.layout.block_stride, Some(8 * block));
        let segments = vec![("/lmcache_kv_1_0".to_owned(), 64 * block)];
        assert_eq!(memory.storages, Storages::Segments(segments));
        assert_eq!(memory.arrays, [(0, 0), (0, 2 * block), (0, 4 * block), (0, 6 * block)]);
        both.layers[1].storage_offset = block; // the first layer's V
        assert!(both.memory(CHUNK).unwrap_err().message.contains("overlap"));
    }

    #[test]
    fn what_is_not_served_is_named_and_says_what_to_do() {
        let good = registration(vec![tensor(&[2, 8, 4, 3, 5]); 2], "NHD");
        let with = |change: &dyn Fn(&mut KvRegistration)| {
            let mut changed = KvRegistration { groups: vec![group()], ..good.clone() };
            change(&mut changed);
            changed.memory(CHUNK).map(|memory| memory.layout.num_layers)
        };
        assert_eq!(with(&|_| {}), Ok(2));
        assert_eq!(
            with(&|it| it.groups[0].layer_indices = vec![1]),
            Ok(1),
            "layers that share others' KV are left out"
        );
        type Change<'a> = &'a dyn Fn(&mut KvRegistration);
        let changes: [(&str, Change<'_>); 9] = [
            ("of vLLM", &|it| it.engine_type = "sglang".into()),
            ("KV layouts", &|it| it.kv_layout = Some("other".into())),
            ("not known", &|it| it.layers = vec![tensor(&[2, 8, 4, 3, 5, 1]); 2]),
            ("2 groups", &|it| it.groups.push(group())),
            ("sliding", &|it| it.groups[0].sw_size_tokens = 128),
            ("of attention", &|it| it.groups[0].recurrent_state = true),
            ("of attention", &|it| it.groups[0].extra_object_group_tag = 1),
            ("compressed", &|it| it.groups[0].tokens_per_block = 16),
            ("unlike shapes", &|it| it.layers[1] = tensor(&[2, 8, 4, 3, 6])),
        ];
        for (number, (words, change)) in changes.into_iter().enumerate() {
            let error = with(change).unwrap_err();
            let (code, remedy) = match number {
                0..3 => (ErrorCode::UnsupportedOption, "engine_driven"),
                _ => (ErrorCode::UnsupportedModel, "computes without"),
            };
            assert_eq!(error.code, code);
            assert!(error.message.contains(words) && error.message.contains(remedy), "{error}");
        }
    }

    #[test]
    fn tensors_that_cannot_be_are_refused() {
        let good = registration(vec![tensor(&[2, 8, 4, 3, 5]); 2], "NHD");
        let bytes = good.layers[0].storage.bytes();
        let with = |change: &dyn Fn(&mut KvDescriptor)| {
            let mut changed = good.clone();
            change(&mut changed.layers[0]);
            change(&mut changed.layers[1]);
            changed.memory(CHUNK)
        };
        let wrong: [&dyn Fn(&mut KvDescriptor); 11] = [
            &|it| it.storage = segment(0, bytes - 1),
            &|it| it.storage_offset = 1,
            &|it| it.storage_offset = u64::MAX,
            &|it| it.stride[4] = 2,
            &|it| it.stride[2] = 16,
            &|it| it.stride[1] = 59,
            &|it| it.stride[0] = 60,
            &|it| it.stride[0] = u64::MAX,
            &|it| it.stride = vec![1],
            &|it| it.shape[1] = 0,
            &|it| it.shape[1] = u64::MAX,
        ];
        for (number, change) in wrong.iter().enumerate() {
            assert!(with(*change).is_err(), "{number}");
        }
        let none = KvRegistration { layers: Vec::new(), ..good.clone() };
        assert!(none.memory(CHUNK).unwrap_err().message.contains("no tensors"));
        for indices in [vec![2], vec![1, 0], vec![0, 0], vec![]] {
            let groups = vec![EngineGroup { layer_indices: indices.clone(), ..group() }];
            assert!(
                KvRegistration { groups, ..good.clone() }.memory(CHUNK).is_err(),
                "{indices:?}"
            );
        }
        let mut other = good.clone();
        other.layers[1] =
            KvDescriptor { storage: segment(0, bytes + 2), ..tensor(&[2, 8, 4, 3, 5]) };
        assert!(other.memory(CHUNK).unwrap_err().message.contains("for another"));
        assert!(good.memory(18).unwrap_err().message.contains("18 tokens"));
        let wide = registration(vec![tensor(&[2, 1, 1, 1 << 10, 1 << 10])], "NHD");
        assert!(wide.memory(CHUNK).unwrap_err().message.contains("a token of"));
    }

    /// Two layers of 8 blocks on a device, one behind the other in an allocation.
    fn on_device() -> KvRegistration {
        let mut both = registration(vec![tensor(&[2, 8, 4, 3, 5]); 2], "NHD");
        for (layer, offset) in both.layers.iter_mut().zip([512, 4096]) {
            let bytes = layer.storage.bytes();
            let (device_uuid, handle) = ([7; 16], [9; 64]);
            let part = CudaStorage { device_uuid, handle, offset, bytes };
            layer.storage = KvStorage::Cuda(Box::new(part));
        }
        both
    }

    fn cuda(layer: &mut KvDescriptor) -> &mut CudaStorage {
        match &mut layer.storage {
            KvStorage::Cuda(part) => part,
            KvStorage::Segment { .. } => panic!("a segment"),
        }
    }

    #[test]
    fn layers_on_a_device_are_found_in_their_allocations_each_of_which_is_there_once() {
        let mut both = on_device();
        let plane = 8 * 4 * 3 * 5 * 2;
        let memory = both.memory(CHUNK).unwrap();
        assert_eq!(
            memory.storages,
            Storages::Cuda { device_uuid: [7; 16], allocations: vec![([9; 64], 4096 + 2 * plane)] }
        );
        assert_eq!(memory.arrays, [(0, 512), (0, 512 + plane), (0, 4096), (0, 4096 + plane)]);
        cuda(&mut both.layers[1]).handle = [8; 64];
        let memory = both.memory(CHUNK).unwrap();
        assert_eq!(memory.arrays, [(0, 512), (0, 512 + plane), (1, 4096), (1, 4096 + plane)]);
        both.kv_layout = None;
        assert_eq!(
            both.memory(CHUNK).unwrap().layout.order,
            Order::Nhd,
            "LMCache's default on a device"
        );
    }

    #[test]
    fn layers_on_a_device_that_cannot_be_are_refused() {
        let refused = |change: &dyn Fn(&mut KvRegistration)| {
            let mut changed = on_device();
            change(&mut changed);
            changed.memory(CHUNK).unwrap_err().message
        };
        assert!(refused(&|it| cuda(&mut it.layers[1]).offset = 514).contains("overlap"));
        assert!(refused(&|it| cuda(&mut it.layers[1]).offset = u64::MAX).contains("beyond any"));
        assert!(refused(&|it| cuda(&mut it.layers[1]).bytes -= 1).contains("not within"));
        assert!(refused(&|it| it.layers[1].storage_offset = 1).contains("not within"));
        let several = |it: &mut KvRegistration| cuda(&mut it.layers[1]).device_uuid = [0; 16];
        assert!(refused(&several).contains("several devices"));
        let mixed = |it: &mut KvRegistration| it.layers[1].storage = segment(0, 1 << 20);
        assert!(refused(&mixed).contains("several kinds"));
        let mixed = |it: &mut KvRegistration| it.layers[0].storage = segment(0, 1 << 20);
        assert!(refused(&mixed).contains("several kinds"));
    }
}
