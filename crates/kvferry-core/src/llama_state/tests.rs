#![expect(clippy::cast_possible_truncation, reason = "sketches are small")]

use std::ops::Range;

use allocation_counter::measure;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::*;
use crate::Result;

/// What [`write`] writes; the default is a small file that is right in every respect.
#[derive(Debug, Clone)]
struct Sketch {
    version: u32,
    tokens: Vec<u32>,
    streams: u32,
    sequence: u32,
    positions: Vec<u32>,
    /// Bytes between each cell's count of sequences and its sequence.
    extension: usize,
    transposed: bool,
    layers: Vec<Layer>,
}

fn rows(ggml_type: i32, run_bytes: u32) -> Plane {
    Plane { ggml_type, runs: 1, run_bytes }
}

impl Default for Sketch {
    fn default() -> Self {
        Self {
            version: VERSION,
            tokens: vec![5, 7, 11, 13, 17],
            streams: 1,
            sequence: 0,
            positions: (0..5).collect(),
            extension: 0,
            transposed: false,
            layers: vec![
                Layer { keys: rows(1, 6), values: rows(1, 4) },
                Layer { keys: rows(8, 3), values: rows(8, 5) },
            ],
        }
    }
}

impl Sketch {
    fn transposed() -> Self {
        let values = Plane { ggml_type: 1, runs: 3, run_bytes: 2 };
        let layers = vec![Layer { keys: rows(1, 6), values }; 2];
        Self { transposed: true, layers, ..Self::default() }
    }

    fn geometry(&self) -> Geometry {
        Geometry::new(self.transposed, self.layers.clone()).unwrap()
    }

    /// The byte of a token's state: a cell's bytes follow its position, not its slot.
    fn byte(plane: usize, run: u32, position: u32, byte: u32) -> u8 {
        let mixed = (plane as u32 + 1) * 31 + run * 7 + position * 13 + byte * 3;
        mixed.to_le_bytes()[0]
    }

    fn section(&self, out: &mut Vec<u8>) {
        let word = |out: &mut Vec<u8>, word: u32| out.extend(word.to_le_bytes());
        word(out, self.streams);
        for stream in 0..self.streams {
            if self.streams > 1 && stream != self.sequence {
                word(out, 0);
                continue;
            }
            word(out, self.positions.len() as u32);
            for position in &self.positions {
                word(out, *position);
                word(out, 1);
                out.extend(std::iter::repeat_n(0, self.extension));
                word(out, self.sequence);
            }
            word(out, u32::from(self.transposed));
            word(out, self.layers.len() as u32);
            for (index, layer) in self.layers.iter().enumerate() {
                word(out, layer.keys.ggml_type as u32);
                out.extend(u64::from(layer.keys.run_bytes).to_le_bytes());
                self.plane(out, 2 * index, layer.keys);
            }
            for (index, layer) in self.layers.iter().enumerate() {
                word(out, layer.values.ggml_type as u32);
                if self.transposed {
                    word(out, layer.values.run_bytes);
                    word(out, layer.values.runs);
                } else {
                    out.extend(u64::from(layer.values.run_bytes).to_le_bytes());
                }
                self.plane(out, 2 * index + 1, layer.values);
            }
        }
    }

    fn plane(&self, out: &mut Vec<u8>, index: usize, plane: Plane) {
        for run in 0..plane.runs {
            for position in &self.positions {
                out.extend((0..plane.run_bytes).map(|b| Self::byte(index, run, *position, b)));
            }
        }
    }

    fn write(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for word in [MAGIC, self.version, self.tokens.len() as u32] {
            out.extend(word.to_le_bytes());
        }
        out.extend(self.tokens.iter().flat_map(|token| token.to_le_bytes()));
        self.section(&mut out);
        out
    }
}

fn refusal(file: &[u8]) -> (ErrorCode, String) {
    let error = StateFile::parse(file).unwrap_err();
    (error.code, error.message)
}

fn assert_refused(file: &[u8], code: ErrorCode, part: &str) {
    let (found, message) = refusal(file);
    assert!(found == code && message.contains(part), "{found:?}: {message}");
}

fn set(file: &mut [u8], at: usize, word: u32) {
    file[at..at + 4].copy_from_slice(&word.to_le_bytes());
}

/// Offsets in the file of [`Sketch::default`], which has 5 tokens and one stream.
const STREAMS_AT: usize = 12 + 5 * 4;
const CELLS_AT: usize = STREAMS_AT + 4;
const LAYOUT_AT: usize = CELLS_AT + 4 + 5 * 12;

fn split(file: &[u8], state: &StateFile, tokens: Range<u32>) -> Vec<u8> {
    let mut payload = state.geometry().encode();
    state
        .for_each_segment(tokens, |segment| {
            assert_eq!(segment.payload_offset, payload.len() as u64, "payloads have no gaps");
            let start = segment.file_offset as usize;
            payload.extend(&file[start..start + segment.length as usize]);
            Ok(())
        })
        .unwrap();
    payload
}

fn chunks(tokens: u32, chunk: u32) -> impl Iterator<Item = Range<u32>> {
    (0..tokens).step_by(chunk as usize).map(move |start| start..(start + chunk).min(tokens))
}

fn assemble(plan: &AssemblePlan, payloads: &[(Range<u32>, Vec<u8>)]) -> Vec<u8> {
    let mut file = vec![0; plan.file_bytes() as usize];
    let mut written = vec![false; file.len()];
    let mut put = |at: u64, bytes: &[u8]| {
        for (offset, byte) in (at as usize..).zip(bytes) {
            assert!(!std::mem::replace(&mut written[offset], true), "byte {offset} comes twice");
            file[offset] = *byte;
        }
    };
    for piece in plan.pieces() {
        put(piece.offset, &piece.bytes);
    }
    for (tokens, payload) in payloads {
        plan.for_each_segment(tokens.clone(), |segment| {
            let start = segment.payload_offset as usize;
            put(segment.file_offset, &payload[start..start + segment.length as usize]);
            Ok(())
        })
        .unwrap();
    }
    assert!(written.into_iter().all(|byte| byte), "every byte comes from somewhere");
    file
}

/// Splits into chunks and assembles the leading `hit` tokens.
fn round_trip(sketch: &Sketch, chunk: u32, hit: u32) -> Vec<u8> {
    let file = sketch.write();
    let state = StateFile::parse(&file).unwrap();
    assert_eq!(state.tokens(), sketch.tokens);
    assert_eq!((state.streams(), state.sequence()), (sketch.streams, sketch.sequence));
    assert_eq!(*state.geometry(), sketch.geometry());
    let payloads: Vec<_> =
        chunks(hit, chunk).map(|tokens| (tokens.clone(), split(&file, &state, tokens))).collect();
    for (tokens, payload) in &payloads {
        let bytes = state.geometry().chunk_payload_bytes(tokens.end - tokens.start).unwrap();
        assert_eq!(payload.len() as u64, bytes);
        let descriptor = &payload[..state.geometry().descriptor_bytes() as usize];
        assert_eq!(Geometry::decode(descriptor).unwrap(), *state.geometry());
    }
    let tokens = &state.tokens()[..hit as usize];
    let plan =
        AssemblePlan::new(state.geometry(), tokens, sketch.streams, sketch.sequence).unwrap();
    assemble(&plan, &payloads)
}

/// The file that the engine saves of the leading `tokens`: cells in order of position.
fn prefix(sketch: &Sketch, tokens: u32) -> Vec<u8> {
    let positions = (0..tokens).collect();
    let tokens = sketch.tokens[..tokens as usize].to_vec();
    Sketch { tokens, positions, ..sketch.clone() }.write()
}

#[test]
fn chunks_come_back_as_the_file_that_the_engine_saved() {
    for sketch in [
        Sketch::default(),
        Sketch::transposed(),
        Sketch { streams: 3, sequence: 1, ..Sketch::default() },
        Sketch { streams: 3, sequence: 2, ..Sketch::transposed() },
        Sketch { sequence: 4, ..Sketch::default() },
    ] {
        for chunk in 1..=5 {
            assert_eq!(round_trip(&sketch, chunk, 5), sketch.write(), "{sketch:?} by {chunk}");
            assert_eq!(round_trip(&sketch, chunk, 4), prefix(&sketch, 4), "a shorter prefix");
        }
    }
}

#[test]
fn cells_are_found_by_position_wherever_their_slot_is() {
    for whole in [Sketch::default(), Sketch::transposed()] {
        let shuffled = Sketch { positions: vec![3, 4, 0, 2, 1], ..whole.clone() };
        assert_eq!(round_trip(&shuffled, 2, 5), whole.write());
    }
}

#[test]
fn contiguous_bytes_are_one_segment() {
    let file = Sketch::default().write();
    let state = StateFile::parse(&file).unwrap();
    let count = |tokens| {
        let mut count = 0;
        let each = |_| {
            count += 1;
            Ok(())
        };
        state.for_each_segment(tokens, each).unwrap();
        count
    };
    assert_eq!(count(1..4), 4, "keys and values of two layers");

    let file = Sketch::transposed().write();
    let state = StateFile::parse(&file).unwrap();
    let mut lengths = Vec::new();
    let each = |segment: Segment| {
        lengths.push(segment.length);
        Ok(())
    };
    state.for_each_segment(0..5, each).unwrap();
    assert_eq!(lengths, [30, 30, 30, 30], "runs of all tokens touch");
}

#[test]
fn a_range_outside_of_the_file_is_refused() {
    let state = StateFile::parse(&Sketch::default().write()).unwrap();
    for tokens in [0..6, 5..6, 5..5] {
        let error = state.for_each_segment(tokens, |_| Ok(())).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidArgument);
    }
}

#[test]
fn every_truncated_file_is_refused() {
    for sketch in [Sketch::default(), Sketch { streams: 2, ..Sketch::transposed() }] {
        let file = sketch.write();
        for length in 0..file.len() {
            // Cut behind the keys it looks like a model without values.
            assert!(StateFile::parse(&file[..length]).is_err(), "{length} bytes");
        }
    }
}

#[test]
fn other_versions_are_refused_by_number() {
    for version in [2, 4] {
        let file = Sketch { version, ..Sketch::default() }.write();
        assert_refused(&file, ErrorCode::InvalidState, &format!("version {version} "));
    }
    let mut file = Sketch::default().write();
    set(&mut file, 0, 0x6767_736e);
    assert_refused(&file, ErrorCode::InvalidState, "0x6767736e");
}

#[test]
fn counts_beyond_the_file_are_refused_before_anything_is_allocated() {
    let whole = Sketch::default().write();
    for (at, what) in
        [(8, "tokens"), (STREAMS_AT, "streams"), (CELLS_AT, "cells"), (LAYOUT_AT + 4, "layers")]
    {
        let mut file = whole.clone();
        set(&mut file, at, u32::MAX);
        assert_refused(&file, ErrorCode::InvalidState, what);
    }
}

#[test]
fn rows_whose_size_overflows_are_refused() {
    let mut file = Sketch::default().write();
    file[LAYOUT_AT + 12..LAYOUT_AT + 20].fill(0xff);
    assert_refused(&file, ErrorCode::InvalidState, "rows of 18446744073709551615 bytes");
    let mut file = Sketch::default().write();
    file[LAYOUT_AT + 12..LAYOUT_AT + 20].fill(0);
    assert!(StateFile::parse(&file).is_err(), "rows without bytes");
}

#[test]
fn what_llama_cpp_accepts_and_nobody_saves_is_refused() {
    let whole = Sketch::default().write();
    let cell = |slot: usize| CELLS_AT + 4 + slot * 12;
    for (at, word, why) in [
        (12 + 4, u32::MAX, "token 1 is negative"),
        (cell(2), 1, "two cells are at position 1"),
        (cell(2), 5, "cell 2 is at position 5 of 5"),
        (cell(2), u32::MAX, "cell 2 is at position 4294967295 of 5"),
        (cell(3) + 4, 2, "cell 3 is of 2 sequences"),
        (cell(3) + 4, 0, "cell 3 is of 0 sequences"),
        (cell(3) + 8, 1, "cell 3 is of sequence 1"),
        (LAYOUT_AT, 2, "2 for transposed"),
        (LAYOUT_AT + 4, 0, "0 layers"),
        (STREAMS_AT, 0, "0 streams"),
    ] {
        let mut file = whole.clone();
        set(&mut file, at, word);
        assert_refused(&file, ErrorCode::InvalidState, why);
    }
    let mut longer = whole.clone();
    longer.push(0);
    assert_refused(&longer, ErrorCode::InvalidState, "1 bytes follow");

    let none = Sketch { tokens: vec![], positions: vec![], ..Sketch::default() };
    assert!(StateFile::parse(&none.write()).is_err(), "a file of no tokens");

    let mut file = Sketch { streams: 2, ..Sketch::default() }.write();
    let stream = whole[CELLS_AT..].to_vec();
    file.truncate(file.len() - 4);
    file.extend(stream);
    assert_refused(&file, ErrorCode::InvalidState, "more than one sequence");

    let fewer = Sketch { tokens: vec![1, 2, 3], ..Sketch::default() }.write();
    assert_refused(&fewer, ErrorCode::InvalidState, "5 cells for 3 tokens");

    let mut file = Sketch { streams: 2, sequence: 1, ..Sketch::default() }.write();
    for slot in 0..5 {
        set(&mut file, cell(slot) + 4 + 8, 0);
    }
    assert_refused(&file, ErrorCode::InvalidState, "stream 1 holds cells of sequence 0");
}

#[test]
fn models_that_cannot_be_cached_are_named() {
    let masked = Sketch { positions: vec![2, 3, 4], ..Sketch::default() }.write();
    assert_refused(&masked, ErrorCode::UnsupportedModel, "sliding-window");

    let mut two_caches = Sketch::default().write();
    Sketch { positions: vec![3, 4], ..Sketch::default() }.section(&mut two_caches);
    assert_refused(&two_caches, ErrorCode::UnsupportedModel, "sliding-window");

    for extension in [8, 12] {
        for tokens in [1, 5] {
            let multi = Sketch { extension, ..Sketch::default() };
            assert_refused(&prefix(&multi, tokens), ErrorCode::UnsupportedModel, "M-RoPE");
        }
    }

    let keys_only = &Sketch::default().write()[..LAYOUT_AT + 8 + (12 + 30) + (12 + 15)];
    assert_refused(keys_only, ErrorCode::UnsupportedModel, "latent attention");

    let mut recurrent = Sketch::default().write();
    recurrent.extend([1, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
    assert_refused(&recurrent, ErrorCode::InvalidState, "hybrid");
}

#[test]
fn descriptors_are_strict() {
    for sketch in [Sketch::default(), Sketch::transposed()] {
        let geometry = sketch.geometry();
        let encoded = geometry.encode();
        assert_eq!(encoded.len() as u64, geometry.descriptor_bytes());
        assert_eq!(Geometry::decode(&encoded).unwrap(), geometry);
        for length in 0..encoded.len() {
            assert!(Geometry::decode(&encoded[..length]).is_err(), "{length} bytes");
        }
        let mut longer = encoded.clone();
        longer.push(0);
        assert!(Geometry::decode(&longer).is_err());
    }
    let encoded = Sketch::default().geometry().encode();
    for (at, byte, why) in [(0, b'k', "KVLG"), (4, 2, "format 2"), (5, 2, "2 for transposed")] {
        let mut bad = encoded.clone();
        bad[at] = byte;
        let error = Geometry::decode(&bad).unwrap_err();
        assert!(error.message.contains(why), "{error}");
    }
    let mut two_runs = encoded.clone();
    two_runs[HEADER_RUNS_AT] = 2;
    assert!(Geometry::decode(&two_runs).unwrap_err().message.contains("one run"));
    let mut empty = encoded;
    empty[HEADER_RUNS_AT..HEADER_RUNS_AT + 4].fill(0);
    assert!(Geometry::decode(&empty).is_err(), "values without bytes");
}

/// Where the first layer's values say their runs: after the header, and type and bytes of keys and
/// the type of values.
const HEADER_RUNS_AT: usize = 10 + 12;

#[test]
fn a_plan_refuses_what_no_file_can_hold() {
    let geometry = Sketch::default().geometry();
    for (tokens, streams, sequence) in
        [(&[][..], 1, 0), (&[1], 0, 0), (&[1], STREAMS_MAX + 1, 0), (&[1], 2, 2)]
    {
        let error = AssemblePlan::new(&geometry, tokens, streams, sequence).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidArgument);
    }
    let error = AssemblePlan::new(&geometry, &[1, 1 << 31], 1, 0).unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidToken);
    let widest = Plane { ggml_type: 0, runs: u32::MAX, run_bytes: u32::MAX };
    let layer = Layer { keys: rows(0, 1), values: widest };
    let wide = Geometry::new(true, vec![layer]).unwrap();
    assert!(AssemblePlan::new(&wide, &[1, 2], 1, 0).is_err(), "2^65 bytes do not wrap");
    assert!(Geometry::new(true, vec![layer; 2]).is_err(), "nor do those of one token");
}

fn runner() -> TestRunner {
    let cases = std::env::var("KVFERRY_FUZZ_CASES").ok().and_then(|cases| cases.parse().ok());
    TestRunner::new(Config {
        cases: cases.unwrap_or(20_000),
        failure_persistence: None,
        ..Config::default()
    })
}

fn sketches() -> impl Strategy<Value = Sketch> {
    let plane = |runs: u32| (0..40_i32, 1..=runs, 1..9_u32);
    let layer = (plane(1), plane(4));
    let shuffled = (1..40_u32).prop_flat_map(|n| {
        let tokens = prop::collection::vec(0..1_u32 << 31, n as usize);
        (tokens, Just((0..n).collect::<Vec<_>>()).prop_shuffle())
    });
    (any::<bool>(), prop::collection::vec(layer, 1..5), shuffled, 1..5_u32, 0..5_u32).prop_map(
        |(transposed, layers, (tokens, positions), streams, sequence)| Sketch {
            tokens,
            positions,
            streams,
            sequence: if streams == 1 { sequence } else { sequence % streams },
            transposed,
            layers: layers
                .into_iter()
                .map(|(keys, values)| {
                    let plane = |(ggml_type, runs, run_bytes)| Plane { ggml_type, runs, run_bytes };
                    let values = plane(values);
                    let runs = if transposed { values.runs } else { 1 };
                    Layer { keys: plane(keys), values: Plane { runs, ..values } }
                })
                .collect(),
            ..Sketch::default()
        },
    )
}

#[test]
fn any_file_survives_splitting_and_assembling() {
    runner()
        .run(&(sketches(), 1..9_u32), |(sketch, chunk)| {
            let tokens = sketch.tokens.len() as u32;
            prop_assert_eq!(round_trip(&sketch, chunk, tokens), prefix(&sketch, tokens));
            Ok(())
        })
        .unwrap();
}

#[test]
fn changed_files_are_refused_or_whole() {
    let change = (any::<prop::sample::Index>(), prop_oneof![any::<u32>(), 0..300_u32]);
    let changes = prop::collection::vec(change, 1..4);
    runner()
        .run(&(sketches(), changes, any::<prop::sample::Index>(), any::<bool>()), |input| {
            let (sketch, changes, cut, shorten) = input;
            let (mut file, mut descriptor) = (sketch.write(), sketch.geometry().encode());
            for (at, word) in changes {
                let word_at = at.index(descriptor.len() - 3);
                descriptor[word_at..word_at + 4].copy_from_slice(&word.to_le_bytes());
                // Headers are what matters: most changes go there.
                let at = at.index(file.len().min(512) / 4) * 4;
                set(&mut file, at, word);
            }
            if shorten {
                file.truncate(cut.index(file.len()));
            }
            let _ = in_proportion(&descriptor, Geometry::decode)?;
            check_any(&file)
        })
        .unwrap();
}

#[test]
fn random_bytes_are_refused_or_whole() {
    let bytes = prop::collection::vec(any::<u8>(), 0..400);
    runner()
        .run(&(bytes, any::<bool>()), |(mut file, headed)| {
            if headed && file.len() >= 8 {
                set(&mut file, 0, MAGIC);
                set(&mut file, 4, VERSION);
            }
            let _ = in_proportion(&file, Geometry::decode)?;
            check_any(&file)
        })
        .unwrap();
}

/// Bytes that may be reserved for each byte of what is parsed: the token at each position, and the slot of
/// each position, are both kept, in vectors that double.
const RESERVED_PER_BYTE: u64 = 4;
/// Bytes that may be reserved in any case: an error's words.
const RESERVED: u64 = 1 << 10;

/// Parses; what that reserves, all in all, is in proportion to the input.
fn in_proportion<T>(input: &[u8], parse: impl FnOnce(&[u8]) -> T) -> Result<T, TestCaseError> {
    let mut parsed = None;
    let reserved = measure(|| parsed = Some(parse(input))).bytes_total;
    let limit = RESERVED_PER_BYTE * input.len() as u64 + RESERVED;
    prop_assert!(reserved <= limit, "{} bytes reserved for {} bytes", reserved, input.len());
    Ok(parsed.unwrap())
}

/// Whatever parses is in proportion to the file and lies within it.
fn check_any(file: &[u8]) -> Result<(), TestCaseError> {
    let Ok(state) = in_proportion(file, StateFile::parse)? else { return Ok(()) };
    let tokens = state.tokens().len();
    prop_assert!(tokens * 4 <= file.len());
    prop_assert!(state.geometry().layers().len() * 24 <= file.len());
    let mut end = state.geometry().descriptor_bytes();
    state
        .for_each_segment(0..tokens as u32, |segment| {
            assert!(segment.file_offset + segment.length <= file.len() as u64);
            assert_eq!(segment.payload_offset, end);
            end += segment.length;
            Ok(())
        })
        .unwrap();
    prop_assert_eq!(end, state.geometry().chunk_payload_bytes(tokens as u32).unwrap());
    Ok(())
}
