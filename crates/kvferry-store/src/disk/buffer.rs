//! Memory for transfers around the page cache.

use super::format::PAGE;

/// Bytes that begin at a page, as O_DIRECT wants them.
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Buffer {
    /// `length` zeroes.
    pub(crate) fn new(length: usize) -> Self {
        let page = usize::try_from(PAGE).unwrap_or_default();
        let bytes = vec![0; length + page];
        let start = bytes.as_ptr().align_offset(page).min(page);
        Self { bytes, start, length }
    }

    /// The first `length` bytes, as many as there are at most.
    pub(crate) fn first(&mut self, length: usize) -> &mut [u8] {
        let length = length.min(self.length);
        &mut self.bytes[self.start..self.start + length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_begins_at_a_page() {
        for length in [4096, 8192, 1 << 20] {
            let mut buffer = Buffer::new(length);
            assert_eq!(buffer.first(length).as_ptr().align_offset(4096), 0);
            assert_eq!(buffer.first(usize::MAX).len(), length);
        }
    }
}
