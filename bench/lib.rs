//! What the benchmarks share: ours beside a reference, measured in interleaved pairs, and one row
//! format for people and programs.
#![allow(clippy::print_stdout, reason = "a benchmark's rows are its output")]

use std::hint::black_box;
use std::time::{Duration, Instant};

/// Pairs of one row; its figures are medians over them.
const PAIRS: usize = 61;
/// How long each half of a pair runs.
const HALF: Duration = Duration::from_millis(4);

/// The rows of one benchmark.
#[derive(Default)]
pub struct Rows(Vec<serde_json::Value>);

impl Rows {
    /// Times `ours` against `reference` and prints the row. One call of either does `units` units of
    /// work; the figures are nanoseconds for one. Callers have asserted that both are correct.
    pub fn compare<T, U>(
        &mut self,
        name: &str,
        units: usize,
        mut ours: impl FnMut() -> T,
        mut reference: impl FnMut() -> U,
    ) {
        let calls = calls_in(HALF, &mut ours).max(calls_in(HALF, &mut reference));
        let mut pairs: Vec<(f64, f64)> = (0..PAIRS)
            .map(|pair| {
                // Each goes first half of the time.
                if pair % 2 == 0 {
                    let ours = time(calls, &mut ours);
                    (ours, time(calls, &mut reference))
                } else {
                    let reference = time(calls, &mut reference);
                    (time(calls, &mut ours), reference)
                }
            })
            .collect();
        let units = (calls * units) as f64;
        let mut median = |of: fn(&(f64, f64)) -> f64| {
            pairs.sort_by(|a, b| of(a).total_cmp(&of(b)));
            of(&pairs[PAIRS / 2])
        };
        let (ours, reference) = (median(|pair| pair.0), median(|pair| pair.1));
        let ratio = median(|pair| pair.0 / pair.1);
        self.row(name, ours / units, reference / units, "ns", ratio);
    }

    /// Prints the row of a limit: the median of `sample`, which gives nanoseconds for one unit of work.
    pub fn limit(&mut self, name: &str, limit: f64, mut sample: impl FnMut() -> f64) {
        let mut samples: Vec<f64> = (0..PAIRS).map(|_| sample()).collect();
        samples.sort_by(f64::total_cmp);
        let ours = samples[PAIRS / 2];
        self.row(name, ours, limit, "ns", ours / limit);
    }

    /// Prints the row of a comparison that was measured elsewhere.
    pub fn row(&mut self, name: &str, ours: f64, reference: f64, unit: &str, ratio: f64) {
        let row = serde_json::json!({
            "name": name,
            "ours": rounded(ours),
            "reference": rounded(reference),
            "unit": unit,
            "ratio": rounded(ratio),
        });
        println!(
            "{name:<62} ours {:>9} {unit}   reference {:>9} {unit}   ratio {:>6}",
            row["ours"], row["reference"], row["ratio"]
        );
        self.0.push(row);
    }

    /// Writes the rows as a JSON array to the file that `KVFERRY_BENCH_JSON` names, if it is set.
    pub fn finish(self) -> std::io::Result<()> {
        match std::env::var_os("KVFERRY_BENCH_JSON") {
            Some(file) => std::fs::write(file, format!("{:#}\n", serde_json::Value::Array(self.0))),
            None => Ok(()),
        }
    }
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

fn calls_in<T>(span: Duration, work: &mut impl FnMut() -> T) -> usize {
    let mut calls = 1;
    loop {
        let ns = time(calls, work);
        if ns >= span.as_nanos() as f64 {
            return calls;
        }
        calls *= 2;
    }
}

/// Nanoseconds of `calls` calls.
fn time<T>(calls: usize, work: &mut impl FnMut() -> T) -> f64 {
    let start = Instant::now();
    for _ in 0..calls {
        black_box(work());
    }
    start.elapsed().as_nanos() as f64
}
