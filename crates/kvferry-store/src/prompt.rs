//! A request's tokens and the hashes of their chunks, computed once.

use std::ops::Range;
use std::sync::Arc;

use kvferry_core::hash::ChunkHasher;

/// Those of a chunk, if they are known.
pub(crate) type Tokens = Option<Arc<[u32]>>;

/// Tokens with the chained hash of each whole chunk of them.
#[derive(Debug)]
pub(crate) struct Prompt {
    tokens: Arc<[u32]>,
    chunk_size: usize,
    pub(crate) hashes: Vec<[u8; 32]>,
}

impl Prompt {
    /// The prompt of `tokens` with hashes for the whole chunks of its first `end` tokens. What `known`
    /// has hashed of the same leading tokens is not hashed again; where the tokens differ, it is.
    pub(crate) fn new(
        tokens: &Arc<[u32]>,
        end: usize,
        known: Option<Arc<Self>>,
        hasher: &ChunkHasher,
        chunk_size: usize,
    ) -> Arc<Self> {
        let chunks = end / chunk_size;
        let same = known.as_ref().map_or(0, |known| {
            if Arc::ptr_eq(tokens, &known.tokens) {
                return known.hashes.len();
            }
            let ours = tokens.chunks_exact(chunk_size);
            let theirs = known.tokens.chunks_exact(chunk_size).take(known.hashes.len());
            ours.zip(theirs).take_while(|(ours, theirs)| ours == theirs).count()
        });
        if let Some(known) = &known
            && chunks <= same
        {
            return Arc::clone(known);
        }
        let mut hashes = known.map_or_else(Vec::new, |known| known.hashes[..same].to_vec());
        hashes.reserve_exact(chunks - same);
        hasher.extend(&mut hashes, &tokens[..chunks * chunk_size]);
        Arc::new(Self { tokens: Arc::clone(tokens), chunk_size, hashes })
    }

    /// The tokens of those of the chunks that are asked for by their hashes, in their order.
    pub(crate) fn tokens_of(&self, mut chunks: Range<usize>) -> impl FnMut(&[u8; 32]) -> Tokens {
        move |hash| {
            let chunk = chunks.find(|chunk| self.hashes.get(*chunk) == Some(hash))?;
            let start = chunk * self.chunk_size;
            self.tokens.get(start..start + self.chunk_size).map(Arc::from)
        }
    }

    /// Bytes that it takes.
    pub(crate) fn bytes(&self) -> u64 {
        (size_of_val(&*self.tokens) + size_of_val(self.hashes.as_slice())) as u64
    }
}

#[cfg(test)]
mod tests {
    use kvferry_core::hash::ChunkAlgorithm;

    use super::*;

    #[test]
    fn hashes_are_reused_for_as_long_as_the_tokens_are_the_same_and_no_longer() {
        let hasher = ChunkHasher::new(ChunkAlgorithm::Blake3, 4).unwrap();
        let fresh = |tokens: &[u32]| Prompt::new(&tokens.into(), tokens.len(), None, &hasher, 4);
        let first = fresh(&[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(first.hashes.len(), 2);
        let grown: Arc<[u32]> = Arc::new([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
        let more = Prompt::new(&grown, 12, Some(Arc::clone(&first)), &hasher, 4);
        assert_eq!(more.hashes, fresh(&grown).hashes);
        let shorter = Prompt::new(&grown, 4, Some(Arc::clone(&more)), &hasher, 4);
        assert!(Arc::ptr_eq(&shorter, &more), "nothing to compute");
        let changed: Arc<[u32]> = Arc::new([9, 9, 9, 9, 5, 6, 7, 8]);
        let other = Prompt::new(&changed, 8, Some(more), &hasher, 4);
        assert_eq!(
            other.hashes,
            fresh(&changed).hashes,
            "LMCache's sessions keep the first hash here"
        );
    }
}
