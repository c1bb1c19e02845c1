//! Bytes on their way to a socket: short ones in a row, long frames as they are.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes, BytesMut};

/// A frame of so many bytes is sent from where it lies: copying it takes longer than one more slice.
const LONG: usize = 16 << 10;

/// What is to be sent, in its order.
#[derive(Debug, Default)]
pub struct Output {
    whole: VecDeque<Bytes>,
    whole_bytes: usize,
    /// Comes after all of `whole`.
    tail: BytesMut,
}

impl Output {
    /// Where short bytes are appended.
    pub fn tail(&mut self) -> &mut BytesMut {
        &mut self.tail
    }

    /// Appends a frame's bytes.
    pub(crate) fn put(&mut self, bytes: &Bytes) {
        if bytes.len() < LONG {
            return self.tail.extend_from_slice(bytes);
        }
        if !self.tail.is_empty() {
            let before = self.tail.split().freeze();
            self.whole_bytes += before.len();
            self.whole.push_back(before);
        }
        self.whole_bytes += bytes.len();
        self.whole.push_back(bytes.clone());
    }
}

impl Buf for Output {
    fn remaining(&self) -> usize {
        self.whole_bytes + self.tail.len()
    }

    fn chunk(&self) -> &[u8] {
        self.whole.front().map_or(&self.tail, |first| first)
    }

    fn advance(&mut self, mut bytes: usize) {
        while let Some(first) = self.whole.front_mut() {
            let taken = bytes.min(first.len());
            first.advance(taken);
            self.whole_bytes -= taken;
            bytes -= taken;
            if !first.is_empty() {
                return;
            }
            self.whole.pop_front();
        }
        self.tail.advance(bytes);
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let all = self.whole.iter().map(|bytes| &bytes[..]).chain([&self.tail[..]]);
        let filled = slices.iter_mut().zip(all.filter(|bytes| !bytes.is_empty()));
        filled.map(|(slice, bytes)| *slice = IoSlice::new(bytes)).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_out_in_the_order_they_came_in_whatever_is_taken_at_once() {
        let parts: Vec<Bytes> = [3, LONG, 0, LONG + 5, 7, 7, LONG - 1, LONG, 1]
            .into_iter()
            .zip(1_u8..)
            .map(|(length, byte)| Bytes::from(vec![byte; length]))
            .collect();
        let expected = parts.concat();
        for step in [1, 5, LONG, LONG + 3, usize::MAX] {
            let mut output = Output::default();
            parts.iter().for_each(|part| output.put(part));
            let mut sent = Vec::new();
            while output.has_remaining() {
                assert_eq!(output.remaining(), expected.len() - sent.len());
                let mut slices = [IoSlice::new(&[]); 3];
                let count = output.chunks_vectored(&mut slices);
                let seen: Vec<u8> =
                    slices[..count].iter().flat_map(|slice| slice.to_vec()).collect();
                assert!(seen.starts_with(output.chunk()) && !output.chunk().is_empty());
                let taken = step.min(seen.len());
                sent.extend_from_slice(&seen[..taken]);
                output.advance(taken);
            }
            assert!(sent == expected, "{step} at once");
        }
    }
}
