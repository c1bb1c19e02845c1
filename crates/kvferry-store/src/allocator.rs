//! Where the pool is free: a two-level segregated fit allocator (TLSF; Masmano et al., "TLSF: a new
//! dynamic memory allocator for real-time systems", 2004) over pages, with its bookkeeping beside the
//! memory and not in it. Allocating and freeing cost the same however many objects there are.
//!
//! One thing is added to the algorithm: objects of one model all have the same size, so the bin in
//! which a hole of just that size lies is looked at first. Plain TLSF would pass it over, since that
//! bin also holds smaller holes.

/// Holes that are looked at in the bin whose sizes straddle the wanted one.
const EXACT_FIT_TRIES: usize = 8;
const NONE: u32 = u32::MAX;
const TAKEN: u32 = u32::MAX - 1;
/// Sizes below 8 have a bin each; above, each power of two is split in 8.
const BINS: usize = 30 * 8;

#[derive(Debug, Clone, Copy)]
struct Span {
    page: u32,
    pages: u32,
    /// Neighbours in the pool, by address.
    before: u32,
    after: u32,
    /// Neighbours in the bin's list, while free; else [`TAKEN`].
    previous: u32,
    next: u32,
}

impl Span {
    fn is_free(&self) -> bool {
        self.previous != TAKEN
    }
}

/// A handle to allocated pages; it is given back exactly once.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Allocation {
    span: u32,
    /// First page.
    pub(crate) page: u32,
}

/// The free and used spans of a pool of pages.
#[derive(Debug)]
pub(crate) struct Allocator {
    spans: Vec<Span>,
    unused: Vec<u32>,
    heads: [u32; BINS],
    /// Which bins have a hole: one bit each.
    occupied: [u64; BINS.div_ceil(64)],
    /// The span with the highest address.
    last: u32,
    free_pages: u64,
}

impl Allocator {
    /// An allocator of nothing; [`Allocator::grow`] adds pages.
    pub(crate) fn new() -> Self {
        Self {
            spans: Vec::new(),
            unused: Vec::new(),
            heads: [NONE; BINS],
            occupied: [0; BINS.div_ceil(64)],
            last: NONE,
            free_pages: 0,
        }
    }

    /// Adds `pages` behind those that are there.
    pub(crate) fn grow(&mut self, pages: u32) {
        let page = match self.spans.get(self.last as usize) {
            Some(last) => last.page + last.pages,
            None => 0,
        };
        let span = self.new_span(Span {
            page,
            pages,
            before: self.last,
            after: NONE,
            previous: TAKEN,
            next: NONE,
        });
        if self.last != NONE {
            self.spans[self.last as usize].after = span;
        }
        self.last = span;
        self.give(span);
    }

    pub(crate) fn free_pages(&self) -> u64 {
        self.free_pages
    }

    /// `pages` (> 0) contiguous pages.
    pub(crate) fn allocate(&mut self, pages: u32) -> Option<Allocation> {
        let span = self.exact_fit(pages).or_else(|| self.good_fit(pages))?;
        self.unlink(span);
        let Span { page, pages: found, after, .. } = self.spans[span as usize];
        self.spans[span as usize].previous = TAKEN;
        if found > pages {
            let rest = self.new_span(Span {
                page: page + pages,
                pages: found - pages,
                before: span,
                after,
                previous: NONE,
                next: NONE,
            });
            self.spans[span as usize].pages = pages;
            self.spans[span as usize].after = rest;
            match self.spans.get_mut(after as usize) {
                Some(after) => after.before = rest,
                None => self.last = rest,
            }
            self.link(rest);
        }
        Some(Allocation { span, page })
    }

    /// Gives pages back; free neighbours become one hole.
    #[expect(clippy::needless_pass_by_value, reason = "an allocation is given back once")]
    pub(crate) fn free(&mut self, allocation: Allocation) {
        self.give(allocation.span);
    }

    /// The span becomes a hole.
    fn give(&mut self, mut span: u32) {
        let before = self.spans[span as usize].before;
        if self.spans.get(before as usize).is_some_and(Span::is_free) {
            self.unlink(before);
            self.merge(before, span);
            span = before;
        }
        let after = self.spans[span as usize].after;
        if self.spans.get(after as usize).is_some_and(Span::is_free) {
            self.unlink(after);
            self.merge(span, after);
        }
        self.link(span);
    }

    /// A hole of the bin in which `pages` lies, if one of the first few is large enough.
    fn exact_fit(&self, pages: u32) -> Option<u32> {
        let mut span = self.heads[bin_below(pages)];
        for _ in 0..EXACT_FIT_TRIES {
            let found = self.spans.get(span as usize)?;
            if found.pages >= pages {
                return Some(span);
            }
            span = found.next;
        }
        None
    }

    /// A hole of a bin whose every hole is large enough.
    fn good_fit(&self, pages: u32) -> Option<u32> {
        let first = bin_below(pages) + usize::from(bin_start(bin_below(pages)) < pages);
        (first / 64..self.occupied.len()).find_map(|word| {
            let mask = if word == first / 64 { u64::MAX << (first % 64) } else { u64::MAX };
            let bits = self.occupied[word] & mask;
            (bits != 0).then(|| self.heads[word * 64 + bits.trailing_zeros() as usize])
        })
    }

    /// `right` becomes part of `left`, its neighbour.
    fn merge(&mut self, left: u32, right: u32) {
        let Span { pages, after, .. } = self.spans[right as usize];
        self.spans[left as usize].pages += pages;
        self.spans[left as usize].after = after;
        match self.spans.get_mut(after as usize) {
            Some(after) => after.before = left,
            None => self.last = left,
        }
        self.unused.push(right);
    }

    fn link(&mut self, span: u32) {
        let bin = bin_below(self.spans[span as usize].pages);
        let head = self.heads[bin];
        self.spans[span as usize].previous = NONE;
        self.spans[span as usize].next = head;
        if let Some(head) = self.spans.get_mut(head as usize) {
            head.previous = span;
        }
        self.heads[bin] = span;
        self.occupied[bin / 64] |= 1 << (bin % 64);
        self.free_pages += u64::from(self.spans[span as usize].pages);
    }

    fn unlink(&mut self, span: u32) {
        let Span { previous, next, pages, .. } = self.spans[span as usize];
        if let Some(next) = self.spans.get_mut(next as usize) {
            next.previous = previous;
        }
        match self.spans.get_mut(previous as usize) {
            Some(previous) => previous.next = next,
            None => {
                let bin = bin_below(pages);
                self.heads[bin] = next;
                if next == NONE {
                    self.occupied[bin / 64] &= !(1 << (bin % 64));
                }
            }
        }
        self.free_pages -= u64::from(pages);
    }

    fn new_span(&mut self, span: Span) -> u32 {
        match self.unused.pop() {
            Some(index) => {
                self.spans[index as usize] = span;
                index
            }
            None => {
                self.spans.push(span);
                #[expect(
                    clippy::cast_possible_truncation,
                    reason = "at most one span for each u32 page"
                )]
                {
                    (self.spans.len() - 1) as u32
                }
            }
        }
    }
}

/// The bin of the largest start that is at most `pages` (> 0).
fn bin_below(pages: u32) -> usize {
    match pages.ilog2() {
        0..3 => pages as usize,
        power => ((power as usize - 2) << 3) + ((pages >> (power - 3)) as usize & 7),
    }
}

/// The smallest size in a bin.
fn bin_start(bin: usize) -> u32 {
    #[expect(clippy::cast_possible_truncation, reason = "bins are few")]
    let bin = bin as u32;
    match bin >> 3 {
        0 => bin,
        power => (8 + (bin & 7)) << (power - 1),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_bin_holds_the_sizes_from_its_start_to_the_next() {
        for pages in (1..5000).chain([u32::MAX - 1, u32::MAX]) {
            let bin = bin_below(pages);
            assert!(bin < BINS);
            assert!(bin_start(bin) <= pages, "{pages}");
            assert!(bin + 1 == BINS || bin_start(bin + 1) > pages, "{pages}");
        }
    }

    #[test]
    fn a_full_pool_of_equal_objects_takes_one_more_after_each_that_is_freed() {
        let mut pool = Allocator::new();
        pool.grow(1441 * 10);
        let mut objects: Vec<_> = (0..10).map(|_| pool.allocate(1441).unwrap()).collect();
        assert!(pool.allocate(1).is_none());
        for index in [3, 7, 0, 9, 4] {
            let freed = objects.swap_remove(index % objects.len());
            let page = freed.page;
            pool.free(freed);
            let taken = pool.allocate(1441).expect("the hole has just the size");
            assert_eq!(taken.page, page);
            objects.push(taken);
        }
    }

    #[test]
    fn an_object_may_span_steps_that_were_added_one_by_one() {
        let mut pool = Allocator::new();
        for _ in 0..4 {
            pool.grow(100);
        }
        let object = pool.allocate(400).expect("neighbouring steps are one hole");
        assert_eq!(object.page, 0);
        pool.grow(100);
        assert_eq!(pool.allocate(100).map(|more| more.page), Some(400));
    }

    proptest! {
        /// Against a map of which page is whose: no overlap, nothing lost, everything merges again.
        #[test]
        fn allocations_never_overlap_and_all_space_comes_back(
            steps in prop::collection::vec((any::<bool>(), 1u32..300, any::<prop::sample::Index>()), 1..300)
        ) {
            let mut pool = Allocator::new();
            let mut owner = vec![false; 4096];
            for _ in 0..4 {
                pool.grow(1024);
            }
            let mut held: Vec<(Allocation, u32)> = Vec::new();
            for (free, pages, which) in steps {
                if free && !held.is_empty() {
                    let (allocation, pages) = held.swap_remove(which.index(held.len()));
                    let start = allocation.page as usize;
                    owner[start..start + pages as usize].fill(false);
                    pool.free(allocation);
                } else if let Some(allocation) = pool.allocate(pages) {
                    let start = allocation.page as usize;
                    let range = &mut owner[start..start + pages as usize];
                    prop_assert!(range.iter().all(|taken| !taken));
                    range.fill(true);
                    held.push((allocation, pages));
                }
                let used = owner.iter().filter(|taken| **taken).count() as u64;
                prop_assert_eq!(pool.free_pages(), 4096 - used);
            }
            for (allocation, _) in held {
                pool.free(allocation);
            }
            prop_assert_eq!(pool.allocate(4096).map(|all| all.page), Some(0));
        }
    }
}
