//! State files that llama.cpp v0.5.0 saved: SmolLM2-135M, through node-llama-cpp 3.22.1.

use std::path::Path;

use kvferry_core::llama_state::{AssemblePlan, Plane, StateFile};

const F16: i32 = 1;
const Q8_0: i32 = 8;

fn rows(ggml_type: i32, run_bytes: u32) -> Plane {
    Plane { ggml_type, runs: 1, run_bytes }
}

/// 3 heads of 64 values.
const TRANSPOSED: Plane = Plane { ggml_type: F16, runs: 192, run_bytes: 2 };

#[test]
fn files_of_the_engine_come_back_byte_for_byte_from_chunks_of_one_token() {
    for (name, tokens, streams, sequence, keys, values) in [
        ("rows", 2, 1, 0, rows(F16, 384), rows(F16, 384)),
        ("transposed", 2, 1, 0, rows(F16, 384), TRANSPOSED),
        ("q8_0_keys_second_of_two_sequences", 1, 2, 1, rows(Q8_0, 204), TRANSPOSED),
    ] {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/llama_state/{name}.bin"));
        let saved = std::fs::read(path).unwrap();
        let state = StateFile::parse(&saved).unwrap();
        let geometry = state.geometry();
        assert_eq!(
            (state.tokens().len(), state.streams(), state.sequence()),
            (tokens, streams, sequence)
        );
        assert_eq!(geometry.layers().len(), 30, "{name}");
        assert!(geometry.layers().iter().all(|layer| layer.keys == keys && layer.values == values));

        let plan = AssemblePlan::new(geometry, state.tokens(), streams, sequence).unwrap();
        let mut assembled = vec![0; usize::try_from(plan.file_bytes()).unwrap()];
        let range = |offset: u64, length: u64| {
            let start = usize::try_from(offset).unwrap();
            start..start + usize::try_from(length).unwrap()
        };
        for piece in plan.pieces() {
            assembled[range(piece.offset, piece.bytes.len() as u64)].copy_from_slice(&piece.bytes);
        }
        for token in 0..u32::try_from(tokens).unwrap() {
            let mut payload = geometry.encode();
            state
                .for_each_segment(token..token + 1, |segment| {
                    payload.extend(&saved[range(segment.file_offset, segment.length)]);
                    Ok(())
                })
                .unwrap();
            plan.for_each_segment(token..token + 1, |segment| {
                assembled[range(segment.file_offset, segment.length)]
                    .copy_from_slice(&payload[range(segment.payload_offset, segment.length)]);
                Ok(())
            })
            .unwrap();
        }
        assert!(assembled == saved, "{name} differs");
    }
}
