//! The keys of a remote, and its values: the header of the disk's files, and the object's bytes right behind it.
//!
//! | key | value |
//! | --- | --- |
//! | `PREFIX/1/epoch` | 16 hexadecimal digits; while there is none, the epoch is `0` |
//! | `PREFIX/1/EPOCH/SPACE/CHUNK-RANK` | an object; SPACE and CHUNK of 64, RANK of 8 hexadecimal digits |
//! | `PREFIX/1/probe/RANDOM` | what a running server sees by that the remote works |

use std::fmt::Write as _;

use kvferry_core::key::Layout;
use kvferry_core::{Error, Result};

use crate::disk::format;
use crate::index::ObjectId;

/// Of the keys and of the values' headers.
const VERSION: &str = "1";
/// The epoch as long as nobody has cleared anything.
pub(crate) const FIRST_EPOCH: &str = "0";
/// Of any other.
pub(crate) const EPOCH_DIGITS: usize = 16;
const PREFIX_MAX: usize = 200;

pub(crate) fn check_prefix(prefix: &str) -> Result<()> {
    let known =
        |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'/' | b':');
    if prefix.is_empty() || prefix.len() > PREFIX_MAX || !prefix.bytes().all(known) {
        return Err(Error::invalid(format!(
            "the remote's prefix {prefix:?} is not of 1 to {PREFIX_MAX} letters, digits and . _ - / :; give one like \"kvferry\""
        )));
    }
    Ok(())
}

pub(crate) fn epoch(prefix: &str) -> String {
    format!("{prefix}/{VERSION}/epoch")
}

pub(crate) fn probe(prefix: &str, server: u64) -> String {
    format!("{prefix}/{VERSION}/probe/{server:016x}")
}

/// Hexadecimal only, whatever the identity was made of.
pub(crate) fn object(prefix: &str, epoch: &str, id: &ObjectId) -> String {
    let mut key = format!("{prefix}/{VERSION}/{epoch}/");
    let mut put = |hash: &[u8; 32], end: char| {
        for byte in hash {
            let _ = write!(key, "{byte:02x}"); // writing into a String cannot fail
        }
        key.push(end);
    };
    put(&id.space, '/');
    put(&id.chunk, '-');
    let _ = write!(key, "{:08x}", id.rank);
    key
}

/// Whether the remote's word for the epoch can be one.
pub(crate) fn is_epoch(text: &str) -> bool {
    text.len() == EPOCH_DIGITS && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Bytes of the value of an object of `length` bytes.
pub(crate) fn value_bytes(layout: &Layout, cache_salt: &str, length: u64) -> u64 {
    let header = format::header_bytes_of(layout, cache_salt).unwrap_or(format::HEADER_MAX);
    length.saturating_add(header as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_those_of_the_documentation() {
        let id = ObjectId { chunk: [0xab; 32], space: [1; 32], rank: 7 };
        let key = object("team/kv", "0123456789abcdef", &id);
        let (space, chunk) = ("01".repeat(32), "ab".repeat(32));
        assert_eq!(key, format!("team/kv/1/0123456789abcdef/{space}/{chunk}-00000007"));
        assert_eq!(epoch("kvferry"), "kvferry/1/epoch");
        assert_eq!(probe("kvferry", 10), "kvferry/1/probe/000000000000000a");
    }

    #[test]
    fn a_prefix_that_another_program_might_read_otherwise_is_refused() {
        let long = "a".repeat(201);
        for prefix in ["", " ", "a b", "a\n", "ä", "a*", &long] {
            let error = check_prefix(prefix).unwrap_err();
            assert!(error.message.contains("1 to 200"), "{error}");
        }
        check_prefix("a/B-c_9.x:y").unwrap();
    }
}
