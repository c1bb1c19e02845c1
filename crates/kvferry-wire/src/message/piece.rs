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

    /// Of a frame of `length` bytes that begins so: how many bytes the piece has, and those that are here. `None` while
    /// that cannot be told, and for what is no piece.
    pub fn begun(here: &[u8], length: usize) -> Option<(usize, &[u8])> {
        let (header, data) = here.split_at_checked(HEADER)?;
        let bytes = length.checked_sub(HEADER).filter(|bytes| *bytes <= PIECE_MAX)?;
        let announced = header[1..].iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte));
        (header[0] == BIN32 && announced == bytes).then_some((bytes, data))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_is_known_by_its_beginning_as_by_the_whole_of_it() {
        let fill = |data: &mut [u8]| {
            data.fill(7);
            Ok::<_, ()>(())
        };
        let frame = Piece::fill(300, fill).unwrap().encode();
        for cut in 0..frame.len() {
            let begun = Piece::begun(&frame[..cut], frame.len());
            assert_eq!(begun, (cut >= HEADER).then(|| (300, &frame[HEADER..cut])));
        }
        // Another length, another kind, more than a piece.
        assert_eq!(Piece::begun(&frame[..9], frame.len() + 1), None);
        assert_eq!(Piece::begun(&frame[..9], 4), None);
        assert_eq!(Piece::begun(&[&[0xc5], &frame[1..9]].concat(), frame.len()), None);
        let more = u32::try_from(PIECE_MAX + 1).unwrap().to_be_bytes();
        assert_eq!(Piece::begun(&[&[BIN32][..], &more].concat(), HEADER + PIECE_MAX + 1), None);
    }
}
