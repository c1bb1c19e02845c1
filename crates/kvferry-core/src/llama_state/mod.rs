//! The grammar of llama.cpp's sequence state files (`llama_state_seq_save_file`,
//! `LLAMA_STATE_SEQ_VERSION` 3), and how the attention state in them is cut into chunks and put
//! together again.
//!
//! Little-endian, no padding:
//!
//! ```text
//! u32 magic 0x67677371, u32 version
//! u32 T, i32 tokens[T]
//! u32 streams
//! per stream:
//!   u32 C                                             0: the stream ends here
//!   C × { i32 position, u32 1, i32 sequence }         in slot order, not in position order
//!   u32 transposed, u32 L
//!   L × { i32 type, u64 row, u8[row × C] }            keys
//!   L × { i32 type, u64 row, u8[row × C] }            values, or when transposed:
//!   L × { i32 type, u32 element, u32 rows, rows × u8[element × C] }
//! ```
//!
//! llama.cpp trusts such a file: a truncated one aborts the process, a huge cell count kills it,
//! and changed bytes are loaded silently. So [`StateFile::parse`] checks all of it, and what
//! [`AssemblePlan`] describes is byte for byte what the engine would save.

mod geometry;
mod parse;
mod plan;
#[cfg(test)]
mod tests;
mod transfer;

pub use geometry::{Geometry, LAYERS_MAX, Layer, Plane};
pub use parse::{STREAMS_MAX, StateFile};
pub use plan::{AssemblePlan, Piece, Segment};
pub use transfer::{Copy, Restored, RunCopies, Stored, Target, restore, store};

use crate::{Error, ErrorCode};

const MAGIC: u32 = 0x6767_7371;
const VERSION: u32 = 3;
/// `position, count of sequences, sequence`.
const CELL_BYTES: u64 = 12;
/// The header of a plane, transposed or not: `i32, u64` or `i32, u32, u32`.
const PLANE_HEADER_BYTES: u64 = 12;

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorCode::InvalidState, message)
}
