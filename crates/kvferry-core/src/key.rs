//! What names a cached object: model, KV rank, tokens and salt; and the shape of its bytes.

use std::fmt::Write as _;
use std::sync::Arc;

use crate::{Error, ErrorCode, Result};

/// Code points that a salt may have at most (LMCache's limit).
pub const SALT_CHARS_MAX: usize = 128;
/// Bytes that a model name may have at most: as many as a path.
pub const MODEL_NAME_BYTES_MAX: usize = 4096;
/// KV ranks that one model may have at most: [`kv_rank`] packs them in a byte.
pub const WORLD_SIZE_MAX: u32 = 255;

/// Checks a salt for the store and the wire: no `@ / \ NUL`, at most [`SALT_CHARS_MAX`] code points.
/// The empty salt is the absence of one.
pub fn check_salt(salt: &str) -> Result<()> {
    if let Some(c) = salt.chars().find(|c| matches!(c, '@' | '/' | '\\' | '\0')) {
        return Err(Error::new(
            ErrorCode::InvalidSalt,
            format!("a salt must not contain {c:?}; encode the tenant's name, as hex for instance"),
        ));
    }
    let chars = salt.chars().count();
    if chars > SALT_CHARS_MAX {
        return Err(Error::new(
            ErrorCode::InvalidSalt,
            format!(
                "a salt has at most {SALT_CHARS_MAX} characters, this one has {chars}; pass a hash of it"
            ),
        ));
    }
    Ok(())
}

/// Checks a model name: it is part of object keys, where `@` separates the fields, and has at most
/// [`MODEL_NAME_BYTES_MAX`] bytes.
pub fn check_model_name(name: &str) -> Result<()> {
    if name.len() > MODEL_NAME_BYTES_MAX {
        return Err(Error::invalid(format!(
            "a model name has at most {MODEL_NAME_BYTES_MAX} bytes, this one has {}",
            name.len()
        )));
    }
    if name.contains('@') {
        return Err(Error::invalid(format!("model name {name:?} must not contain '@'")));
    }
    Ok(())
}

/// LMCache's packed position of a KV shard: `world << 24 | rank << 16 | world << 8 | rank`
/// (`lmcache.v1.distributed.api`, where local and global coincide for keys).
pub const fn kv_rank(world_size: u32, rank: u32) -> u32 {
    world_size << 24 | rank << 16 | world_size << 8 | rank
}

/// LMCache's string form of an object's key: `model@kvrank@group@hash[@salt]`, hexadecimal.
pub fn object_key(model_name: &str, kv_rank: u32, group: u32, hash: &[u8], salt: &str) -> String {
    let mut key = format!("{model_name}@{kv_rank:08x}@{group:x}@");
    for byte in hash {
        let _ = write!(key, "{byte:02x}"); // writing into a String cannot fail
    }
    if !salt.is_empty() {
        key.push('@');
        key.push_str(salt);
    }
    key
}

/// A range of one request's tokens: the key of LMCache's operations (`IPCCacheServerKey`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// Without `@`.
    pub model_name: String,
    /// KV shards of the model, 1..=255.
    pub world_size: u32,
    /// The KV rank that stores or retrieves; `None` for the scheduler's operations (all ranks).
    pub worker_id: Option<u32>,
    /// The request's whole prompt, not only the range.
    pub token_ids: Arc<[u32]>,
    /// First token of the range, a multiple of the chunk size.
    pub start: u64,
    /// End of the range (exclusive), a multiple of the chunk size, at most the number of tokens.
    pub end: u64,
    /// Names the session: what a server remembers until `end_session`.
    pub request_id: String,
    /// The tenant; empty means none.
    pub cache_salt: String,
    /// How many ranks read each object that a lookup leases; 0 means "not said".
    pub num_kv_readers: u32,
}

/// Element types that LMCache's peers register, by the name torch gives them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Dtype(String);

impl Dtype {
    /// `name` without "torch.", for instance "bfloat16".
    pub fn new(name: &str) -> Result<Self> {
        let dtype = Self(name.to_owned());
        if dtype.lookup().is_none() {
            return Err(Error::invalid(format!("{name:?} is no element type that kvferry knows")));
        }
        Ok(dtype)
    }

    /// The name, as on the wire.
    pub fn name(&self) -> &str {
        &self.0
    }

    /// Bytes of one element.
    pub fn size(&self) -> u64 {
        self.lookup().unwrap_or(1)
    }

    fn lookup(&self) -> Option<u64> {
        Some(match self.0.as_str() {
            "uint8" | "int8" | "bool" | "float8_e4m3fn" | "float8_e5m2" | "float8_e4m3fnuz"
            | "float8_e5m2fnuz" | "float8_e8m0fnu" => 1,
            "float16" | "half" | "bfloat16" | "int16" | "short" | "uint16" => 2,
            "float32" | "float" | "int32" | "int" | "uint32" => 4,
            "float64" | "double" | "int64" | "long" | "uint64" | "complex64" => 8,
            _ => return None,
        })
    }
}

/// The shape of one object (one chunk of one KV rank), as an engine registers it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Layout {
    /// Without `@`.
    pub model_name: String,
    /// KV shards of the model, 1..=255.
    pub world_size: u32,
    /// Tokens of the engine's paging unit; informative.
    pub block_size: u32,
    /// Layers of this rank.
    pub num_layers: u32,
    /// KV heads × head dimension of this rank (doubled where K and V are fused).
    pub hidden_dim_size: u32,
    /// Element type.
    pub dtype: Dtype,
    /// One plane instead of separate K and V (MLA, or fused K/V): LMCache's `use_mla`.
    pub single_plane: bool,
    /// Tokens of one object; `None` means the server's chunk size.
    pub num_physical_slots: Option<u32>,
}

impl Layout {
    /// The object's shape, outermost first: `[2 (K, V),] layers, tokens, hidden`.
    pub fn shape(&self, chunk_size: u32) -> Vec<u64> {
        let slots = self.num_physical_slots.unwrap_or(chunk_size);
        let mut shape = Vec::with_capacity(4);
        if !self.single_plane {
            shape.push(2);
        }
        shape.extend([self.num_layers, slots, self.hidden_dim_size].map(u64::from));
        shape
    }

    /// Bytes of one object. Errors when a dimension is 0 or the product overflows.
    pub fn object_bytes(&self, chunk_size: u32) -> Result<u64> {
        check_model_name(&self.model_name)?;
        if self.world_size == 0 || self.world_size > WORLD_SIZE_MAX {
            return Err(Error::invalid(format!(
                "world size {} is not in 1..={WORLD_SIZE_MAX}",
                self.world_size
            )));
        }
        let shape = self.shape(chunk_size);
        shape
            .iter()
            .try_fold(self.dtype.size(), |bytes, dim| bytes.checked_mul(*dim))
            .filter(|bytes| (1..=1 << 40).contains(bytes))
            .ok_or_else(|| {
                Error::invalid(format!(
                    "an object of shape {shape:?} × {} has no size in 1 byte..=1 TiB",
                    self.dtype.name()
                ))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn salts_that_would_break_a_key_are_refused_by_name() {
        for bad in ["a@b", "a/b", "a\\b", "a\0b"] {
            let error = check_salt(bad).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidSalt, "{bad:?}");
        }
        assert!(check_salt(&"é".repeat(SALT_CHARS_MAX)).is_ok(), "characters count, not bytes");
        assert!(check_salt(&"é".repeat(SALT_CHARS_MAX + 1)).is_err());
        assert!(check_salt("").is_ok());
    }

    #[test]
    fn the_salt_is_dropped_from_no_object_key() {
        let key = |salt| object_key("m", kv_rank(2, 1), 0, &[0xab], salt);
        assert_eq!(key("tenant"), "m@02010201@0@ab@tenant");
        assert_eq!(key(""), "m@02010201@0@ab");
    }

    #[test]
    fn a_model_name_has_a_bound() {
        assert!(check_model_name(&"m".repeat(MODEL_NAME_BYTES_MAX)).is_ok());
        assert!(check_model_name(&"m".repeat(MODEL_NAME_BYTES_MAX + 1)).is_err());
    }

    fn layout() -> Layout {
        Layout {
            model_name: "m".into(),
            world_size: 1,
            block_size: 16,
            num_layers: 2,
            hidden_dim_size: 8,
            dtype: Dtype::new("bfloat16").unwrap(),
            single_plane: false,
            num_physical_slots: None,
        }
    }

    #[test]
    fn an_object_has_the_bytes_of_its_shape() {
        assert_eq!(layout().object_bytes(16).unwrap(), 2 * 2 * 16 * 8 * 2);
        let mla = Layout { single_plane: true, num_physical_slots: Some(4), ..layout() };
        assert_eq!(mla.shape(16), [2, 4, 8]);
        assert_eq!(mla.object_bytes(16).unwrap(), 2 * 4 * 8 * 2);
    }

    #[test]
    fn a_layout_without_a_size_is_refused() {
        assert!(Layout { num_layers: 0, ..layout() }.object_bytes(16).is_err());
        let huge = Layout { num_layers: u32::MAX, hidden_dim_size: u32::MAX, ..layout() };
        assert!(huge.object_bytes(256).is_err(), "2^64 elements do not wrap to a small size");
        assert!(Layout { world_size: 256, ..layout() }.object_bytes(16).is_err());
        assert!(Dtype::new("nope").is_err());
    }
}
