//! A strict fake CUDA driver: a `libcuda.so.1` for tests, found through LD_LIBRARY_PATH or loaded by path.
//!
//! It moves real bytes between host memory and memory that stands in for a device's, in stream order, late, on
//! a thread of its own. What a real driver would let pass, and would turn into wrong bytes now and then, is
//! reported here every time: the races by vector clocks, which follow the order that the program asked for and
//! not the order in which things happened to run.
//!
//! **Every rule is our reading of NVIDIA's documentation.** The tests that run on both passed on a real driver too
//! (`npm run test:gpu`), which lets pass most of what is refused here. Each rule names the place that it comes from:
//! *Driver API* is the CUDA Driver API reference, *Guide* the CUDA C++ Programming Guide. "Our reading" marks what those
//! do not say in so many words; it is then the stricter one.
//!
//! A misuse is a **violation**: printed to stderr, kept in a list, and answered with the error code that the
//! reference names, where it names one. Exports beside the driver's own:
//!
//! | what | where |
//! | --- | --- |
//! | `fakeCudaHostAccess` | `clocks.rs`: the host touches pinned memory |
//! | `fakeCudaEventLooks` | `ipc.rs`: how often other processes asked about an event |
//! | `fakeCudaControl…`, `fakeCudaCalls`, `fakeCudaViolation…`, `fakeCudaLeaks` | `faults.rs` |
//!
//! The environment, read at the first call:
//!
//! | variable | meaning |
//! | --- | --- |
//! | `FAKECUDA_VERSION` | driver version, 12080 unless told |
//! | `FAKECUDA_DEVICES` | devices, 1 unless told |
//! | `FAKECUDA_MEMORY` | bytes of each device, 1 GiB unless told |
//! | `FAKECUDA_SEED` | chooses delays and orders |
//! | `FAKECUDA_DELAY_US` | longest delay of an operation in microseconds, 200 unless told |
//! | `FAKECUDA_FAIL` | `NAME:NTH:CODE`, with commas between: the NTH call of NAME from now fails with CODE |
//! | `FAKECUDA_FAIL_RANDOM` | `SEED:PER_MILLE:CODE`: any call may fail |
//! | `FAKECUDA_LOSE` | `NTH:CODE`: the device is lost at the NTH call |
//! | `FAKECUDA_ABORT` | `1`: abort at the first violation |
//! | `FAKECUDA_STRICT` | `1`: end the process with code 86 if there was a violation or something leaked |
//!
//! Not modelled: more than one CUDA process racing on the same memory, memory pools, graphs, managed memory,
//! peer access, the per-thread default stream, PTX (a known entry name stands for a known kernel).
#![cfg(target_os = "linux")]
#![allow(unsafe_code, reason = "a C interface over raw memory")]
#![allow(non_snake_case, reason = "the driver's names")]

mod abi;
mod backing;
mod clocks;
mod contexts;
mod copies;
mod errors;
mod events;
mod faults;
mod ipc;
mod kernels;
mod memory;
mod queue;
mod state;
mod streams;
mod symbols;
