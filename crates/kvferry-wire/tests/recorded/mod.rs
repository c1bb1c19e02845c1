//! Traffic between real peers, from `test/wire/`.

use bytes::Bytes;

/// One message.
pub(crate) struct Recorded {
    /// The recording's file.
    pub(crate) file: &'static str,
    /// Its place in the recording.
    pub(crate) step: u64,
    /// From a client, else from a server.
    pub(crate) request: bool,
    /// The operation, as LMCache names it; a number for one that it does not know.
    pub(crate) operation: String,
    /// The frames.
    pub(crate) frames: Vec<Bytes>,
}

impl std::fmt::Display for Recorded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { file, step, request, operation, frames } = self;
        let kind = if *request { "request" } else { "reply" };
        write!(f, "{file} step {step}, {kind} {operation}: {frames:?}")
    }
}

const FILES: [&str; 7] = [
    "extra.json",
    "lmcache_bench_engine_driven_shm.json",
    "lmcache_bench_lmcache_driven_cpu.json",
    "lmcache_driven_cuda.json",
    "roundtrip_pickle.json",
    "roundtrip_shm.json",
    "vllm_life1.json",
];

/// All messages of all recordings.
pub(crate) fn messages() -> Vec<Recorded> {
    let mut messages = Vec::new();
    for file in FILES {
        let path = format!("{}/../../test/wire/{file}", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        let steps: Vec<serde_json::Value> = serde_json::from_slice(&text).unwrap();
        for step in steps {
            messages.push(Recorded {
                file,
                step: step["step"].as_u64().unwrap(),
                request: step["direction"] == "client->server",
                operation: match &step["op"] {
                    serde_json::Value::String(name) => name.clone(),
                    other => other.to_string(),
                },
                frames: step["frames_hex"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|frame| from_hex(frame.as_str().unwrap()))
                    .collect(),
            });
        }
    }
    messages
}

fn from_hex(hex: &str) -> Bytes {
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}
