//! What the benchmarks share: one row format for people and programs.
