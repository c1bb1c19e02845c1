use super::invalid;
use crate::{Error, Result};

/// Layers that a model may have at most.
pub const LAYERS_MAX: u32 = 4096;

/// Starts an encoded [`Geometry`].
const MAGIC: [u8; 4] = *b"KVLG";
const FORMAT: u8 = 1;
const HEADER_BYTES: usize = 10;
const LAYER_BYTES: usize = 20;

/// The keys or the values of one layer: `runs` runs, each with `run_bytes` for every token. Keys,
/// and values that are not transposed, are one run of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Plane {
    /// ggml's type: 0 F32, 1 F16, 8 `Q8_0`, 30 BF16 (`enum ggml_type`).
    pub ggml_type: i32,
    /// 1, or the width of the values when they are transposed.
    pub runs: u32,
    /// Bytes of one token in one run, at least 1.
    pub run_bytes: u32,
}

impl Plane {
    /// Bytes of one token.
    pub fn token_bytes(&self) -> u64 {
        u64::from(self.runs) * u64::from(self.run_bytes)
    }
}

/// The keys and values of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Layer {
    /// One run.
    pub keys: Plane,
    /// One run, unless the values are transposed.
    pub values: Plane,
}

/// The shape of a model's attention state: what is equal in all files that one context saves.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Geometry {
    transposed: bool,
    layers: Vec<Layer>,
    token_bytes: u64,
}

impl Geometry {
    /// The state of `layers`, 1..=[`LAYERS_MAX`], the first layer first; `transposed` when values
    /// lie so, as they do with flash attention off.
    ///
    /// Errors: `INVALID_STATE` when a plane is empty, or has more than one run where it is made of
    /// rows.
    pub fn new(transposed: bool, layers: Vec<Layer>) -> Result<Self> {
        if layers.is_empty() || layers.len() > LAYERS_MAX as usize {
            return Err(invalid(format!("{} layers are not in 1..={LAYERS_MAX}", layers.len())));
        }
        let mut token_bytes = 0_u64;
        for (index, Layer { keys, values }) in layers.iter().enumerate() {
            if keys.runs != 1 || (!transposed && values.runs != 1) {
                return Err(invalid(format!("layer {index}: rows are one run")));
            }
            if keys.run_bytes == 0 || values.token_bytes() == 0 {
                return Err(invalid(format!("layer {index} has no bytes")));
            }
            token_bytes = [keys, values]
                .iter()
                .try_fold(token_bytes, |sum, plane| sum.checked_add(plane.token_bytes()))
                .ok_or_else(|| invalid(format!("layers 0..={index} have no size in u64")))?;
        }
        Ok(Self { transposed, layers, token_bytes })
    }

    /// Whether each layer's values are runs of single elements instead of rows.
    pub fn transposed(&self) -> bool {
        self.transposed
    }

    /// The first layer first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    pub(super) fn layer_count(&self) -> u32 {
        u32::try_from(self.layers.len()).unwrap_or(LAYERS_MAX) // `new` checked it
    }

    /// Bytes of one token: all layers, keys and values.
    pub fn token_bytes(&self) -> u64 {
        self.token_bytes
    }

    /// Bytes of the descriptor that [`Geometry::encode`] returns.
    pub fn descriptor_bytes(&self) -> u64 {
        (HEADER_BYTES + LAYER_BYTES * self.layers.len()) as u64
    }

    /// Bytes of a chunk's payload: the descriptor, then for each layer the keys and the values of
    /// `tokens` tokens.
    pub fn chunk_payload_bytes(&self, tokens: u32) -> Result<u64> {
        self.token_bytes
            .checked_mul(u64::from(tokens))
            .and_then(|bytes| bytes.checked_add(self.descriptor_bytes()))
            .ok_or_else(|| Error::invalid(format!("a chunk of {tokens} tokens has no size in u64")))
    }

    /// The descriptor, little-endian:
    /// `"KVLG", u8 format, u8 transposed, u32 L, L × { i32 type, u32 bytes, i32 type, u32 runs, u32 bytes }`.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES + LAYER_BYTES * self.layers.len());
        out.extend(MAGIC);
        out.extend([FORMAT, u8::from(self.transposed)]);
        out.extend(self.layer_count().to_le_bytes());
        for Layer { keys, values } in &self.layers {
            out.extend(keys.ggml_type.to_le_bytes());
            out.extend(keys.run_bytes.to_le_bytes());
            out.extend(values.ggml_type.to_le_bytes());
            out.extend(values.runs.to_le_bytes());
            out.extend(values.run_bytes.to_le_bytes());
        }
        out
    }

    /// Reads a descriptor that makes up all of `bytes`.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let refused = |why: &str| invalid(format!("the geometry's descriptor {why}"));
        let (header, body) =
            bytes.split_first_chunk::<HEADER_BYTES>().ok_or_else(|| refused("is too short"))?;
        let [m0, m1, m2, m3, format, transposed, l0, l1, l2, l3] = *header;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(refused("does not begin with \"KVLG\""));
        }
        if format != FORMAT {
            return Err(refused(&format!("has format {format}; this version reads {FORMAT}")));
        }
        if transposed > 1 {
            return Err(refused(&format!("says {transposed} for transposed, not 0 or 1")));
        }
        let layers = u32::from_le_bytes([l0, l1, l2, l3]);
        let (records, rest) = body.as_chunks::<LAYER_BYTES>();
        if !rest.is_empty() || records.len() as u64 != u64::from(layers) {
            return Err(refused(&format!("has {} bytes for {layers} layers", bytes.len())));
        }
        let layers = records
            .iter()
            .map(|record| {
                let (words, _) = record.as_chunks::<4>();
                let word = |i: usize| words.get(i).copied().unwrap_or_default();
                Layer {
                    keys: Plane {
                        ggml_type: i32::from_le_bytes(word(0)),
                        runs: 1,
                        run_bytes: u32::from_le_bytes(word(1)),
                    },
                    values: Plane {
                        ggml_type: i32::from_le_bytes(word(2)),
                        runs: u32::from_le_bytes(word(3)),
                        run_bytes: u32::from_le_bytes(word(4)),
                    },
                }
            })
            .collect();
        Self::new(transposed == 1, layers)
    }
}
