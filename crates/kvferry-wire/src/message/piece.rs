//! Bytes of a slot on their way in a frame.

use bytes::{BufMut, Bytes, BytesMut};

use crate::messagepack::{Problem, Reader, Result, frame};

/// Bytes of a piece at most. What a peer may make the other hold is a few of these.
pub const PIECE_MAX: usize = 256 << 10;

/// MessagePack's marker of bytes with a length of four bytes, which all pieces have.
const BIN32: u8 = 0xc6;
const HEADER: usize = 5;

/// A piece, as it travels: it is written once and sliced from what arrived.
#[derive(Clone, PartialEq, Eq)]
pub struct Piece {
    frame: Bytes,
    header: usize,
}

impl std::fmt::Debug for Piece {
    /// Errors show replies, and nobody's state is to be in them.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Piece of {} bytes", self.data().len())
    }
}

impl Piece {
    /// A piece of so many bytes, [`PIECE_MAX`] at most, which `fill` writes.
    ///
    /// # Errors
    /// What `fill` says.
    pub fn fill<E>(bytes: usize, fill: impl FnOnce(&mut [u8]) -> Result<(), E>) -> Result<Self, E> {
        Self::refill(BytesMut::new(), bytes, fill)
    }

    /// The same in memory that [`Piece::into_memory`] gave, which saves clearing it.
    ///
    /// # Errors
    /// What `fill` says.
    pub fn refill<E>(
        mut frame: BytesMut,
        bytes: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let bytes = bytes.min(PIECE_MAX);
        if frame.is_empty() {
            frame = BytesMut::zeroed(HEADER + bytes);
        }
        frame.resize(HEADER + bytes, 0);
        let (mut header, data) = frame.split_at_mut(HEADER);
        header.put_u8(BIN32);
        header.put_uint(bytes as u64, 4);
        fill(data)?;
        Ok(Self { frame: frame.freeze(), header: HEADER })
    }

    /// Its bytes.
    pub fn data(&self) -> &[u8] {
        &self.frame[self.header..]
    }

    /// Its memory, for another one; empty while others have it too.
    pub fn into_memory(self) -> BytesMut {
        self.frame.try_into_mut().unwrap_or_default()
    }

    pub(super) fn encode(&self) -> Bytes {
        self.frame.clone()
    }

    pub(super) fn decode(bytes: &Bytes) -> Result<Self> {
        let length = frame(bytes, Reader::bytes)?.len();
        if length > PIECE_MAX {
            return Err(Problem::Inconsistent("a piece has at most 262144 bytes").into());
        }
        Ok(Self { frame: bytes.clone(), header: bytes.len() - length })
    }
}
