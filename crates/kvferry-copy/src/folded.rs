//! Copies that are summed on their way: each line is folded into the checksum while it is in a register, which takes
//! no time where memory is what copies wait for. And the sum is that of what was written, whoever changes the source
//! meanwhile.
//!
//! Folding is that of Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction" (Intel,
//! 2009): what comes before the last turn of bytes is multiplied by x^2048, modulo the polynomial, and added to it. The
//! turn that is left has the remainder of all bytes.

use crate::kernels::{Span, TURN};

/// Lanes that are copied side by side.
pub(crate) const LANES: usize = 4;

/// Spans of a lane whose bytes are summed together.
#[derive(Debug)]
pub(crate) struct Run {
    /// What they are of, for the caller.
    pub(crate) stretch: usize,
    /// How many there are, at least one.
    pub(crate) spans: usize,
    /// Added to their first eight bytes before these are folded.
    pub(crate) seed: u64,
    /// Their bytes, once they are copied.
    pub(crate) bytes: u64,
    /// What is left of them then.
    pub(crate) folded: [u8; TURN],
}

impl Run {
    /// Of one span.
    pub(crate) fn new(stretch: usize, seed: u64) -> Self {
        Self { stretch, spans: 1, seed, bytes: 0, folded: [0; TURN] }
    }
}

/// A lane: spans that are copied one after the other, and the runs that they are.
pub(crate) type Lane<'a> = (&'a [Span], &'a mut [Run]);

/// Copies the lanes. Nobody else sees all that was written before [`crate::kernels::Kernel::fence`].
///
/// # Safety
/// The processor has what the function is made for; each span [`fits`], can be read and written, and no byte that is
/// written belongs to another span or is read.
pub(crate) type FoldSpans = unsafe fn([Lane<'_>; LANES]);

/// Whether a span can be folded.
pub(crate) fn fits(span: &Span) -> bool {
    span.bytes > 0 && span.bytes.is_multiple_of(TURN) && span.to.addr().is_multiple_of(8)
}

/// What this processor can fold with.
#[cfg(target_arch = "x86_64")]
pub(crate) fn best() -> Option<FoldSpans> {
    let can = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("vpclmulqdq");
    can.then_some(avx512::copy)
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;
    use std::slice::{Iter, IterMut};

    use kvferry_core::copy_sums::StretchSum;

    use super::*;
    use crate::kernels::x86::{SANITIZED, prefetch};
    use crate::kernels::{LINE, LONG};

    /// Elements of eight bytes of a line.
    const ELEMENTS: usize = LINE / 8;
    /// Of the first and the second eight bytes of sixteen. A product of two such numbers is one power too high.
    const FACTORS: [u64; 2] = [power(8 * TURN + 64 - 1), power(8 * TURN - 1)];

    /// x^`exponent` modulo the polynomial.
    const fn power(mut exponent: usize) -> u64 {
        let mut power = 1 << 63;
        while exponent > 0 {
            power = power >> 1 ^ if power & 1 == 1 { StretchSum::POLYNOMIAL } else { 0 };
            exponent -= 1;
        }
        power
    }

    struct Copying<'a> {
        spans: Iter<'a, Span>,
        runs: IterMut<'a, Run>,
        /// The run that the span is of, and how many of its spans are left.
        run: Option<&'a mut Run>,
        left: usize,
        span: Span,
        /// Bytes of it that are copied.
        at: usize,
        /// How many elements of each line that is read go to the second of the two lines that they lie in.
        shift: usize,
        /// Which elements of the line before and of the line make one that is written.
        pick: __m512i,
        before: __m512i,
        folded: [__m512i; TURN / LINE],
        /// Added once, to what is folded of the run's first turn.
        seed: __m512i,
    }

    impl<'a> Copying<'a> {
        #[target_feature(enable = "avx512f")]
        fn new((spans, runs): Lane<'a>) -> Self {
            let zero = _mm512_setzero_si512();
            Self {
                spans: spans.iter(),
                runs: runs.iter_mut(),
                run: None,
                left: 0,
                span: Span::NONE,
                at: 0,
                shift: 0,
                pick: zero,
                before: zero,
                folded: [zero; TURN / LINE],
                seed: zero,
            }
        }

        /// Begins the next span; `false`: there is none.
        #[target_feature(enable = "avx512f")]
        fn next(&mut self) -> bool {
            if self.left == 0 {
                self.end_run();
                self.run = self.runs.next();
                if let Some(run) = &self.run {
                    self.left = run.spans;
                    self.seed = _mm512_set_epi64(0, 0, 0, 0, 0, 0, 0, run.seed.cast_signed());
                    self.folded = [_mm512_setzero_si512(); TURN / LINE];
                }
            }
            let Some(span) = self.spans.next() else { return false };
            self.left -= 1;
            if let Some(run) = &mut self.run {
                run.bytes += span.bytes as u64;
            }
            self.span = *span;
            if span.bytes < LONG
                && let Some(next) = self.spans.as_slice().first()
            {
                self.span.ahead = next.from;
            }
            self.at = 0;
            self.shift = span.to.addr() % LINE / 8;
            let numbers = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
            #[expect(clippy::cast_possible_wrap, reason = "at most eight")]
            let first = _mm512_set1_epi64((ELEMENTS - self.shift) as i64);
            self.pick = _mm512_add_epi64(numbers, first);
            true
        }

        #[target_feature(enable = "avx512f")]
        fn end_run(&mut self) {
            let Some(run) = self.run.take() else { return };
            for (to, folded) in run.folded.chunks_exact_mut(LINE).zip(self.folded) {
                // SAFETY: there is room for one line.
                unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), folded) };
            }
        }

        /// Copies the span's next turn, and folds it.
        ///
        /// # Safety
        /// The span has one.
        #[inline]
        #[target_feature(enable = "avx512f,vpclmulqdq")]
        unsafe fn turn(&mut self, factors: __m512i) {
            let from = self.span.from.wrapping_add(self.at);
            // Of the line in which the turn begins.
            let to = self.span.to.wrapping_add(self.at).wrapping_sub(8 * self.shift);
            let mut before = self.before;
            for (number, folded) in self.folded.iter_mut().enumerate() {
                let at = number * LINE;
                if !self.span.ahead.is_null() {
                    prefetch(self.span.ahead.wrapping_add(self.at + at));
                }
                // SAFETY: the caller lets the line be read.
                let line = unsafe { _mm512_loadu_si512(from.wrapping_add(at).cast()) };
                let written = _mm512_permutex2var_epi64(before, self.pick, line);
                let to = to.wrapping_add(at);
                if self.at + at == 0 && self.shift > 0 {
                    let mask = 0xff << self.shift;
                    // SAFETY: what the mask leaves of the line is the span's beginning, which may be written.
                    unsafe { _mm512_mask_storeu_epi64(to.cast(), mask, written) };
                } else if SANITIZED {
                    // SAFETY: a whole line of the span, to an aligned address.
                    unsafe { _mm512_store_si512(to.cast(), written) };
                } else {
                    // SAFETY: as above.
                    unsafe { _mm512_stream_si512(to.cast(), written) };
                }
                before = line;
                let first = _mm512_clmulepi64_epi128::<0x00>(*folded, factors);
                let second = _mm512_clmulepi64_epi128::<0x11>(*folded, factors);
                *folded = _mm512_ternarylogic_epi64::<0x96>(first, second, line);
            }
            self.folded[0] = _mm512_xor_si512(self.folded[0], self.seed);
            self.seed = _mm512_setzero_si512();
            self.before = before;
            self.at += TURN;
            if self.at == self.span.bytes && self.shift > 0 {
                let rest = _mm512_permutex2var_epi64(before, self.pick, before);
                let mask = 0xff >> (ELEMENTS - self.shift);
                // SAFETY: what the mask leaves of the line is the span's end.
                unsafe { _mm512_mask_storeu_epi64(to.wrapping_add(TURN).cast(), mask, rest) };
            }
        }
    }

    #[target_feature(enable = "avx512f,vpclmulqdq")]
    pub(super) unsafe fn copy(lanes: [Lane<'_>; LANES]) {
        let [first, second] = FACTORS.map(u64::cast_signed);
        let factors = _mm512_set_epi64(second, first, second, first, second, first, second, first);
        let mut lanes = lanes.map(|lane| Copying::new(lane));
        loop {
            let mut is_over = true;
            for lane in &mut lanes {
                if lane.at < lane.span.bytes || lane.next() {
                    // SAFETY: a span that fits has whole turns, and this one has some left.
                    unsafe { lane.turn(factors) };
                    is_over = false;
                }
            }
            if is_over {
                return;
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use kvferry_core::copy_sums::StretchSum;

    use super::*;
    use crate::kernels::{Kernel, LINE};

    /// Lays spans of these lengths into memory, each `to_at` and `from_at` bytes behind where a line begins, copies them
    /// in lanes, and compares all of the memory and the sums with what a loop over bytes makes of it.
    fn check(lengths: [&[usize]; LANES], to_at: usize, from_at: usize) {
        let Some(fold) = best() else { return };
        let room = |bytes: usize| bytes.next_multiple_of(LINE) + 3 * LINE;
        let total: usize = lengths.iter().flat_map(|lane| lane.iter().copied()).map(room).sum();
        let from: Vec<u8> = (0..251u8).cycle().take(total + 4 * LINE).collect();
        let mut to = vec![0xee; total + 4 * LINE];
        let mut expected = to.clone();
        let mut to_place = to.as_ptr().align_offset(LINE) + to_at;
        let mut from_place = from.as_ptr().align_offset(LINE) + from_at;
        let start = to.as_mut_ptr();
        let mut bytes = Vec::new();
        let spans = lengths.map(|lane| {
            let mut all = Vec::new();
            let spans: Vec<Span> = lane
                .iter()
                .map(|length| {
                    let source = &from[from_place..][..*length];
                    expected[to_place..][..*length].copy_from_slice(source);
                    all.extend_from_slice(source);
                    let span = Span {
                        to: start.wrapping_add(to_place),
                        from: source.as_ptr(),
                        bytes: *length,
                        ..Span::NONE
                    };
                    assert!(fits(&span));
                    to_place += room(*length);
                    from_place += room(*length);
                    span
                })
                .collect();
            bytes.push(all);
            spans
        });
        let mut runs = spans.each_ref().map(|spans| {
            // The first span alone is a run, as it begins a stretch.
            let first = (!spans.is_empty()).then(|| Run::new(0, StretchSum::SEED));
            let rest = (spans.len() > 1).then(|| Run { spans: spans.len() - 1, ..Run::new(0, 0) });
            first.into_iter().chain(rest).collect::<Vec<Run>>()
        });
        let mut lanes =
            runs.iter_mut().zip(&spans).map(|(runs, spans)| (&spans[..], &mut runs[..]));
        let lanes = [(); LANES].map(|()| lanes.next().unwrap());
        // SAFETY: the spans lie apart in `to`, and within both; they fit.
        unsafe { fold(lanes) };
        Kernel::best().fence();
        assert!(to == expected, "{lengths:?} at {to_at} from {from_at}");
        for (runs, bytes) in runs.iter().zip(&bytes) {
            let [first, rest @ ..] = &runs[..] else { continue };
            let mut joined = StretchSum::from_folded(&first.folded);
            for run in rest {
                joined.update_folded(&run.folded, run.bytes);
            }
            joined.update(b"behind");
            let length: u64 = runs.iter().map(|run| run.bytes).sum();
            assert_eq!(length, bytes.len() as u64);
            let mut whole = StretchSum::new();
            whole.update(bytes);
            whole.update(b"behind");
            assert_eq!(whole.finish(), joined.finish(), "{lengths:?} at {to_at} from {from_at}");
        }
    }

    #[test]
    fn lanes_are_copied_and_summed_as_a_byte_loop_does_at_any_shift_and_length() {
        if best().is_none() {
            let why = "this processor has no AVX-512 or no VPCLMULQDQ";
            let _ = writeln!(std::io::stderr(), "SKIPPED folding: {why}");
        }
        for to_at in (0..LINE).step_by(8) {
            for from_at in [0, 1, 16, 63] {
                check([&[TURN]; LANES], to_at, from_at);
                check([&[4 * TURN], &[], &[TURN, 2 * TURN, TURN], &[1 << 15]], to_at, from_at);
                check([&[], &[3 * TURN, 1 << 16], &[], &[]], to_at, from_at);
            }
        }
        check([&[]; LANES], 0, 0);
        check([&[1 << 20]; LANES], 16, 16);
    }

    #[test]
    fn what_does_not_lie_at_elements_or_end_with_a_turn_does_not_fit() {
        let span = |to: usize, bytes| Span {
            to: std::ptr::without_provenance_mut(to),
            bytes,
            ..Span::NONE
        };
        assert!(fits(&span(4096 + 8, TURN)) && fits(&span(4096 + 56, 5 * TURN)));
        assert!(!fits(&span(4096 + 4, TURN)) && !fits(&span(4096, TURN + LINE)));
    }
}
