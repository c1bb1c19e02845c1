//! Copying pieces of memory with what this processor has.
//!
//! KV memory is much larger than the caches, and a plain store reads the line first that it then fills.
//! Non-temporal stores do not. Two things more decide how fast they are, both measured (docs/benchmarks.md): the
//! processor's own prefetchers follow several streams at once, so four pieces are copied side by side; and they
//! begin anew at each page, so the next pieces are fetched into the second cache while these are copied.

use std::ops::Range;
use std::ptr;

use crate::folded::FoldSpans;

/// Bytes that lie together on both sides.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span {
    pub(crate) to: *mut u8,
    pub(crate) from: *const u8,
    pub(crate) bytes: usize,
    /// As many bytes that will be read soon, or null. They need not exist.
    pub(crate) ahead: *const u8,
    /// Where [`Kernel::copy_twice`] puts the very bytes that it writes to `to`.
    pub(crate) keep: *mut u8,
}

impl Span {
    /// Of no bytes.
    pub(crate) const NONE: Self = Self {
        to: ptr::null_mut(),
        from: ptr::null(),
        bytes: 0,
        ahead: ptr::null(),
        keep: ptr::null_mut(),
    };

    /// The rest of it, behind so many bytes.
    pub(crate) fn behind(self, bytes: usize) -> Self {
        Self {
            to: self.to.wrapping_add(bytes),
            from: self.from.wrapping_add(bytes),
            bytes: self.bytes - bytes,
            ..self
        }
    }
}

/// Copies each span. Nobody else sees all that was written before [`Kernel::fence`].
///
/// # Safety
/// The processor has what the function is made for; each span can be read and written, and no byte that is
/// written belongs to another span or is read.
type CopySpans = unsafe fn(&[Span]);

/// A way to copy.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kernel {
    name: &'static str,
    copy: CopySpans,
    copy_twice: CopySpans,
    /// Of those that can.
    pub(crate) fold: Option<FoldSpans>,
}

/// Spans from here on are copied side by side; shorter ones have ended before their streams are recognised.
pub(crate) const SIDE_BY_SIDE: usize = 1024;
/// From here on spans need no prefetch of ours.
pub(crate) const LONG: usize = 32 << 10;
/// Bytes of the prefetch ahead, where spans are not copied side by side.
const AHEAD: usize = 2048;
/// Shorter spans are memcpy's.
const SHORT: usize = 128;
/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;
/// Bytes of one turn of the loops.
pub(crate) const TURN: usize = 4 * LINE;
/// Spans that are copied side by side.
const STREAMS: usize = 4;

impl Kernel {
    /// The best one of this processor.
    pub(crate) fn best() -> Self {
        Self::all().next().unwrap_or(Self::PLAIN)
    }

    /// What any processor has.
    const PLAIN: Self =
        Self { name: "memcpy", copy: plain::<false>, copy_twice: plain::<true>, fold: None };

    /// All that this processor can run, the best first.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        [
            #[cfg(target_arch = "x86_64")]
            is_x86_feature_detected!("avx512f").then_some(Self {
                name: "AVX-512",
                copy: avx512::copy::<false>,
                copy_twice: avx512::copy::<true>,
                fold: crate::folded::best(),
            }),
            #[cfg(target_arch = "x86_64")]
            is_x86_feature_detected!("avx2").then_some(Self {
                name: "AVX2",
                copy: avx2::copy::<false>,
                copy_twice: avx2::copy::<true>,
                fold: None,
            }),
            // Untested: there was no such machine.
            #[cfg(target_arch = "aarch64")]
            Some(Self {
                name: "NEON",
                copy: neon::copy::<false>,
                copy_twice: neon::copy::<true>,
                fold: None,
            }),
            Some(Self::PLAIN),
        ]
        .into_iter()
        .flatten()
    }

    /// "AVX-512", "AVX2", "NEON" or "memcpy".
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// Copies the spans; call [`Kernel::fence`] before telling anybody.
    ///
    /// # Safety
    /// Each span can be read and written, and no byte that is written belongs to another span or is read.
    pub(crate) unsafe fn copy(&self, spans: &[Span]) {
        // SAFETY: the caller's promise; `all` has only what the processor can run.
        unsafe { (self.copy)(spans) };
    }

    /// The same, and puts the same bytes to [`Span::keep`]: what is there was written, whoever changes the source
    /// meanwhile.
    ///
    /// # Safety
    /// As for [`Kernel::copy`]; so many bytes can be written there too.
    pub(crate) unsafe fn copy_twice(&self, spans: &[Span]) {
        // SAFETY: the caller's promise; `all` has only what the processor can run.
        unsafe { (self.copy_twice)(spans) };
    }

    /// How many spans later those of so many bytes are read, as far as it helps to say so in [`Span::ahead`].
    pub(crate) fn ahead(bytes: usize) -> Option<usize> {
        match bytes {
            0..SIDE_BY_SIDE => Some((AHEAD / bytes.max(1)).clamp(1, 8)),
            SIDE_BY_SIDE..LONG => Some(STREAMS),
            _ => None,
        }
    }

    /// Makes what was copied visible before whatever this thread writes later.
    pub(crate) fn fence(&self) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: every x86-64 processor has this barrier, which touches no memory.
        unsafe {
            std::arch::x86_64::_mm_sfence();
        };
        #[cfg(target_arch = "aarch64")]
        // SAFETY: a barrier touches no memory. `stnp` is ordered by nothing weaker.
        unsafe {
            std::arch::asm!("dmb ishst", options(nostack, preserves_flags));
        };
    }
}

unsafe fn plain<const TWICE: bool>(spans: &[Span]) {
    for span in spans {
        // SAFETY: the caller's promise.
        unsafe { copy_bytes::<TWICE>(span, 0..span.bytes) };
    }
}

/// Copies some of a span's bytes.
#[inline]
unsafe fn copy_bytes<const TWICE: bool>(span: &Span, bytes: Range<usize>) {
    let mut from = span.from.wrapping_add(bytes.start);
    if TWICE {
        let keep = span.keep.wrapping_add(bytes.start);
        // SAFETY: the caller lets the bytes be read, and kept.
        unsafe { ptr::copy_nonoverlapping(from, keep, bytes.len()) };
        from = keep;
    }
    // SAFETY: and written.
    unsafe { ptr::copy_nonoverlapping(from, span.to.wrapping_add(bytes.start), bytes.len()) };
}

/// The loops, for one instruction set: `turn` copies four lines to an aligned address without caching them,
/// `line` one; `prefetch` fetches a line, which need not exist, into the second cache.
macro_rules! kernel {
    ($name:ident, $feature:literal, $turn:ident, $line:ident, $prefetch:ident) => {
        mod $name {
            use super::*;

            /// See [`CopySpans`].
            #[target_feature(enable = $feature)]
            pub(super) unsafe fn copy<const TWICE: bool>(spans: &[Span]) {
                let longest = spans.iter().map(|span| span.bytes).max().unwrap_or(0);
                if longest < SIDE_BY_SIDE {
                    // SAFETY: the caller's promise.
                    unsafe { one_by_one::<TWICE>(spans) };
                } else {
                    // SAFETY: as above.
                    unsafe { side_by_side::<TWICE>(spans) };
                }
            }

            #[target_feature(enable = $feature)]
            unsafe fn one_by_one<const TWICE: bool>(spans: &[Span]) {
                for span in spans {
                    if !span.ahead.is_null() {
                        for line in (0..span.bytes).step_by(LINE) {
                            $prefetch(span.ahead.wrapping_add(line));
                        }
                    }
                    // SAFETY: the caller's promise.
                    let span = unsafe { edges::<TWICE>(*span) };
                    // SAFETY: as above; they are whole turns.
                    unsafe { turns::<TWICE>(&span) };
                }
            }

            #[target_feature(enable = $feature)]
            unsafe fn side_by_side<const TWICE: bool>(spans: &[Span]) {
                let mut streams = [Span::NONE; STREAMS];
                let mut next = spans.iter();
                loop {
                    for stream in &mut streams {
                        while stream.bytes == 0
                            && let Some(span) = next.next()
                        {
                            // SAFETY: the caller's promise.
                            *stream = unsafe { edges::<TWICE>(*span) };
                        }
                    }
                    let step = streams.iter().map(|stream| stream.bytes).min().unwrap_or(0);
                    if step == 0 {
                        break;
                    }
                    for at in (0..step).step_by(TURN) {
                        for stream in &streams {
                            if !stream.ahead.is_null() {
                                for line in [0, LINE, 2 * LINE, 3 * LINE] {
                                    $prefetch(stream.ahead.wrapping_add(at + line));
                                }
                            }
                            // SAFETY: no stream has fewer bytes than `step`.
                            unsafe { $turn::<TWICE>(stream, at) };
                        }
                    }
                    for Span { to, from, bytes, ahead, keep } in &mut streams {
                        *to = to.wrapping_add(step);
                        *from = from.wrapping_add(step);
                        *keep = keep.wrapping_add(step);
                        *bytes -= step;
                        if !ahead.is_null() {
                            *ahead = ahead.wrapping_add(step);
                        }
                    }
                }
                for stream in &streams {
                    // SAFETY: what `edges` left, less whole turns.
                    unsafe { turns::<TWICE>(stream) };
                }
            }

            #[inline]
            #[target_feature(enable = $feature)]
            unsafe fn turns<const TWICE: bool>(span: &Span) {
                for at in (0..span.bytes).step_by(TURN) {
                    // SAFETY: the caller's whole turns, to an aligned address.
                    unsafe { $turn::<TWICE>(span, at) };
                }
            }

            /// Copies what comes before the first aligned address and after the last whole turn; the rest is left.
            #[inline]
            #[target_feature(enable = $feature)]
            unsafe fn edges<const TWICE: bool>(span: Span) -> Span {
                let bytes = span.bytes;
                if bytes < SHORT {
                    // SAFETY: the caller's promise.
                    unsafe { copy_bytes::<TWICE>(&span, 0..bytes) };
                    return Span { bytes: 0, ..span };
                }
                let head = span.to.addr().wrapping_neg() % LINE;
                if head > 0 {
                    // SAFETY: within the span, as all that follows.
                    unsafe { copy_bytes::<TWICE>(&span, 0..head) };
                }
                let whole = (bytes - head) / TURN * TURN;
                let mut at = head + whole;
                while at + LINE <= bytes {
                    // SAFETY: a line to an aligned address.
                    unsafe { $line::<TWICE>(&span, at) };
                    at += LINE;
                }
                if at < bytes {
                    // SAFETY: as above.
                    unsafe { copy_bytes::<TWICE>(&span, at..bytes) };
                }
                Span {
                    to: span.to.wrapping_add(head),
                    from: span.from.wrapping_add(head),
                    keep: span.keep.wrapping_add(head),
                    bytes: whole,
                    ..span
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    use std::arch::x86_64::*;

    use super::{LINE, Span};

    /// Non-temporal stores are assembly, which AddressSanitizer does not look into.
    pub(crate) const SANITIZED: bool = cfg!(kvferry_sanitized);

    #[inline]
    pub(crate) fn prefetch(from: *const u8) {
        // SAFETY: a hint, which reads nothing and may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) };
    }

    /// The line at `at`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn line_512<const TWICE: bool>(span: &Span, at: usize) {
        // SAFETY: the caller lets the line be read.
        let line = unsafe { _mm512_loadu_si512(span.from.wrapping_add(at).cast()) };
        if TWICE {
            // SAFETY: and kept.
            unsafe { _mm512_storeu_si512(span.keep.wrapping_add(at).cast(), line) };
        }
        let to = span.to.wrapping_add(at).cast();
        if SANITIZED {
            // SAFETY: and written, to an aligned address.
            unsafe { _mm512_store_si512(to, line) };
        } else {
            // SAFETY: as above.
            unsafe { _mm512_stream_si512(to, line) };
        }
    }

    /// The four lines at `at`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn turn_512<const TWICE: bool>(span: &Span, at: usize) {
        for line in [0, LINE, 2 * LINE, 3 * LINE] {
            // SAFETY: the caller lets four lines be copied.
            unsafe { line_512::<TWICE>(span, at + line) };
        }
    }

    /// The line at `at`.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn line_256<const TWICE: bool>(span: &Span, at: usize) {
        for at in [at, at + LINE / 2] {
            // SAFETY: the caller lets the line be read.
            let half = unsafe { _mm256_loadu_si256(span.from.wrapping_add(at).cast()) };
            if TWICE {
                // SAFETY: and kept.
                unsafe { _mm256_storeu_si256(span.keep.wrapping_add(at).cast(), half) };
            }
            let to = span.to.wrapping_add(at).cast();
            if SANITIZED {
                // SAFETY: and written, to an aligned address.
                unsafe { _mm256_store_si256(to, half) };
            } else {
                // SAFETY: as above.
                unsafe { _mm256_stream_si256(to, half) };
            }
        }
    }

    /// The four lines at `at`.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn turn_256<const TWICE: bool>(span: &Span, at: usize) {
        for line in [0, LINE, 2 * LINE, 3 * LINE] {
            // SAFETY: the caller lets four lines be copied.
            unsafe { line_256::<TWICE>(span, at + line) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
use x86::{line_256, line_512, prefetch, turn_256, turn_512};

#[cfg(target_arch = "x86_64")]
kernel!(avx512, "avx512f", turn_512, line_512, prefetch);
#[cfg(target_arch = "x86_64")]
kernel!(avx2, "avx2", turn_256, line_256, prefetch);

/// Compiled, and never run: there was no machine to test it on.
#[cfg(target_arch = "aarch64")]
mod arm {
    use std::arch::asm;

    use super::{LINE, Span};

    #[inline]
    pub(super) fn prefetch(from: *const u8) {
        // SAFETY: a hint, which reads nothing and may name any address.
        unsafe {
            asm!("prfm pldl2keep, [{from}]", from = in(reg) from, options(nostack, preserves_flags));
        }
    }

    /// The line at `at`.
    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) unsafe fn line<const TWICE: bool>(span: &Span, at: usize) {
        let from = span.from.wrapping_add(at);
        let keep = span.keep.wrapping_add(at); // means nothing without TWICE
        // SAFETY: the caller lets a line be read, kept and written.
        unsafe {
            asm!(
                "ldp {a:q}, {b:q}, [{from}]",
                "ldp {c:q}, {d:q}, [{from}, #32]",
                "stnp {a:q}, {b:q}, [{to}]",
                "stnp {c:q}, {d:q}, [{to}, #32]",
                "cbz {twice}, 2f",
                "stp {a:q}, {b:q}, [{keep}]",
                "stp {c:q}, {d:q}, [{keep}, #32]",
                "2:",
                a = out(vreg) _, b = out(vreg) _, c = out(vreg) _, d = out(vreg) _,
                from = in(reg) from, to = in(reg) span.to.wrapping_add(at), keep = in(reg) keep,
                twice = in(reg) u64::from(TWICE),
                options(nostack, preserves_flags),
            );
        }
    }

    /// The four lines at `at`.
    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) unsafe fn turn<const TWICE: bool>(span: &Span, at: usize) {
        for line in [0, LINE, 2 * LINE, 3 * LINE] {
            // SAFETY: the caller lets four lines be copied.
            unsafe { self::line::<TWICE>(span, at + line) };
        }
    }
}

#[cfg(target_arch = "aarch64")]
use arm::{line, prefetch, turn};

#[cfg(target_arch = "aarch64")]
kernel!(neon, "neon", turn, line, prefetch);

#[cfg(test)]
mod tests {
    use super::*;

    const SLACK: usize = 320;

    /// Lays spans of these lengths into memory, copies them with each kernel, and compares all of the memory with
    /// what a loop over bytes makes of it.
    fn check(lengths: &[usize], to_at: usize, from_at: usize) {
        let total: usize = lengths.iter().map(|bytes| bytes + SLACK).sum::<usize>() + SLACK;
        let from: Vec<u8> = (0..251u8).cycle().take(total).collect();
        let both = Kernel::all().flat_map(|kernel| [(kernel, false), (kernel, true)]);
        for (kernel, twice) in both {
            let mut kept = vec![0xee; total];
            let mut to = vec![0xee; total];
            let mut expected = to.clone();
            // Whatever the allocator's alignment, `at` is the address's distance from a line.
            let aligned = |start: *const u8, at: usize| start.align_offset(LINE) + at;
            let mut to_place = aligned(to.as_ptr(), to_at);
            let mut from_place = aligned(from.as_ptr(), from_at);
            let start = to.as_mut_ptr();
            let mut spans = Vec::new();
            for bytes in lengths {
                for (to, from) in
                    expected[to_place..].iter_mut().zip(&from[from_place..]).take(*bytes)
                {
                    *to = *from;
                }
                let (to, from) =
                    (start.wrapping_add(to_place), from.as_ptr().wrapping_add(from_place));
                let keep = kept.as_mut_ptr().wrapping_add(to_place);
                spans.push(Span { to, from, bytes: *bytes, ahead: from, keep });
                to_place += bytes + LINE; // each as far from a line as its lengths make it
                from_place += bytes + LINE;
            }
            if twice {
                // SAFETY: the spans lie apart in `to` and `kept`, and within all three.
                unsafe { kernel.copy_twice(&spans) };
            } else {
                // SAFETY: as above.
                unsafe { kernel.copy(&spans) };
            }
            kernel.fence();
            let same = to == expected && (!twice || kept == expected);
            assert!(same, "{}: {lengths:?} at {to_at} from {from_at}", kernel.name());
        }
    }

    #[test]
    fn every_kernel_copies_what_a_byte_loop_does_at_any_alignment_and_length() {
        let edges = [LINE, SHORT, TURN, SIDE_BY_SIDE];
        let lengths = edges.iter().flat_map(|edge| [edge - 1, *edge, edge + 1, edge + LINE - 1]);
        for length in lengths.chain([0, 1, 7, 2 * TURN + 3]) {
            for to_at in 0..LINE {
                check(&[length], to_at, (to_at * 7) % LINE);
                check(&[length; 5], to_at, 1);
            }
        }
        for length in [4095, 4096, LONG - 1, LONG, LONG + 1] {
            for to_at in [0, 1, 63] {
                check(&[length; 3], to_at, 0);
                check(&[length; 9], to_at, 17);
            }
        }
    }

    #[test]
    fn spans_side_by_side_may_have_any_lengths() {
        let lengths = [0, 5000, 64, 1, 40_000, 128, 4096, 4096, 300, 1024, 70_001, 0, 255, 256, 1];
        for from in 0..lengths.len() {
            check(&lengths[from..], 0, 0);
            check(&lengths[..from], 3, 62);
        }
        let short: Vec<usize> = lengths.into_iter().filter(|bytes| *bytes < SIDE_BY_SIDE).collect();
        check(&short, 0, 5);
        check(&[], 0, 0);
    }
}
