//! An engine for tests, in a process of its own: it has memory on device 0 and a stream, and does what each line that it
//! is sent says. Its driver is whatever `libcuda.so.1` is here. Each line is answered by one, "ok …" or "failed …";
//! the end of its input ends it.
//!
//! | line | what it does, and answers |
//! | --- | --- |
//! | `uuid` | the device's UUID |
//! | `alloc BYTES`, `free NUMBER` | memory; its number |
//! | `export NUMBER` | its handle for other processes |
//! | `fill NUMBER SEED` | noise all over it |
//! | `compute NUMBER OFFSET BYTES VALUE` | a fill in the stream |
//! | `read NUMBER OFFSET BYTES` | the bytes |
//! | `write NUMBER OFFSET HEX` | |
//! | `record`, `destroy` | an interprocess event behind all that the stream was asked; its handle |
//! | `hold 1`, `hold 0` | on the fake driver, what was asked of the device does not run, or does |
//! | `looked` | on the fake driver, when another process has asked whether the last event is over |
#![allow(unsafe_code, reason = "calls C functions as cuda.h declares them")]
#![allow(clippy::unwrap_used, reason = "it is part of tests")]
#![allow(clippy::undocumented_unsafe_blocks, reason = "see above")]

use std::io::Write as _;
use std::time::{Duration, Instant};

use libloading::Library;

const NON_BLOCKING: u32 = 1;
/// Without timing, for other processes.
const INTERPROCESS: u32 = 2 | 4;
const LIMIT: Duration = Duration::from_secs(60);

macro_rules! functions {
    ($(fn $name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        #[allow(non_snake_case, reason = "the driver's names")]
        impl Driver {
            $(fn $name(&self, $($arg: $type),*) $(-> $result)? {
                type Function = unsafe extern "C" fn($($type),*) $(-> $result)?;
                let function = unsafe { self.0.get::<Function>(stringify!($name)) };
                unsafe { function.unwrap()($($arg),*) }
            })*
        }
    };
}

functions! {
    fn cuInit(flags: u32) -> u32;
    fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: i32) -> u32;
    fn cuDevicePrimaryCtxRetain(context: *mut u64, device: i32) -> u32;
    fn cuDevicePrimaryCtxRelease_v2(device: i32) -> u32;
    fn cuCtxSetCurrent(context: u64) -> u32;
    fn cuStreamCreate(stream: *mut u64, flags: u32) -> u32;
    fn cuStreamSynchronize(stream: u64) -> u32;
    fn cuStreamDestroy_v2(stream: u64) -> u32;
    fn cuEventCreate(event: *mut u64, flags: u32) -> u32;
    fn cuEventRecord(event: u64, stream: u64) -> u32;
    fn cuEventDestroy_v2(event: u64) -> u32;
    fn cuIpcGetEventHandle(handle: *mut [u8; 64], event: u64) -> u32;
    fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> u32;
    fn cuMemFree_v2(address: u64) -> u32;
    fn cuIpcGetMemHandle(handle: *mut [u8; 64], address: u64) -> u32;
    fn cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, bytes: usize, stream: u64) -> u32;
    fn cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, bytes: usize, stream: u64) -> u32;
    fn cuMemsetD8Async(to: u64, value: u8, bytes: usize, stream: u64) -> u32;
    fn fakeCudaControlHold(held: i32);
    fn fakeCudaEventLooks(event: u64) -> u64;
}

struct Driver(Library);

/// The answer to a line, or why there is none.
type Answer = Result<String, String>;

fn done(call: &str, code: u32) -> Result<(), String> {
    if code == 0 { Ok(()) } else { Err(format!("{call} says {code}")) }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

struct Engine {
    driver: Driver,
    stream: u64,
    /// Address and bytes; none of what was freed.
    memory: Vec<Option<(u64, usize)>>,
    events: Vec<u64>,
}

impl Engine {
    fn start() -> Self {
        let driver = Driver(unsafe { Library::new("libcuda.so.1") }.unwrap());
        let (mut context, mut stream) = (0, 0);
        done("cuInit", driver.cuInit(0)).unwrap();
        let retained = driver.cuDevicePrimaryCtxRetain(&raw mut context, 0);
        done("cuDevicePrimaryCtxRetain", retained).unwrap();
        done("cuCtxSetCurrent", driver.cuCtxSetCurrent(context)).unwrap();
        done("cuStreamCreate", driver.cuStreamCreate(&raw mut stream, NON_BLOCKING)).unwrap();
        Self { driver, stream, memory: Vec::new(), events: Vec::new() }
    }

    fn obey(&mut self, line: &str) -> Answer {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| words[at].parse::<usize>().unwrap();
        match words[0] {
            "uuid" => {
                let mut uuid = [0; 16];
                done("cuDeviceGetUuid", self.driver.cuDeviceGetUuid_v2(&raw mut uuid, 0))?;
                Ok(hex(&uuid))
            }
            "alloc" => {
                let (mut address, bytes) = (0, number(1));
                done("cuMemAlloc", self.driver.cuMemAlloc_v2(&raw mut address, bytes))?;
                self.memory.push(Some((address, bytes)));
                Ok((self.memory.len() - 1).to_string())
            }
            "free" => {
                let (address, _) = self.memory[number(1)].take().unwrap();
                done("cuMemFree", self.driver.cuMemFree_v2(address))?;
                Ok(String::new())
            }
            "export" => {
                let mut handle = [0; 64];
                let (address, _) = self.memory[number(1)].unwrap();
                let told = self.driver.cuIpcGetMemHandle(&raw mut handle, address);
                done("cuIpcGetMemHandle", told)?;
                Ok(hex(&handle))
            }
            "fill" => {
                let ((address, bytes), seed) = (self.memory[number(1)].unwrap(), number(2));
                let noise = |at: usize| ((at * 7 + seed * 13) % 251).to_le_bytes()[0];
                self.write(address, &(0..bytes).map(noise).collect::<Vec<u8>>())
            }
            "write" => {
                let (address, _) = self.memory[number(1)].unwrap();
                self.write(address + number(2) as u64, &from_hex(words[3]))
            }
            "compute" => {
                let (address, _) = self.memory[number(1)].unwrap();
                let (to, bytes) = (address + number(2) as u64, number(3));
                let value = words[4].parse().unwrap();
                let asked = self.driver.cuMemsetD8Async(to, value, bytes, self.stream);
                done("cuMemsetD8Async", asked).map(|()| String::new())
            }
            "read" => {
                let (address, _) = self.memory[number(1)].unwrap();
                let (from, mut bytes) = (address + number(2) as u64, vec![0; number(3)]);
                let (to, length) = (bytes.as_mut_ptr(), bytes.len());
                let asked = self.driver.cuMemcpyDtoHAsync_v2(to, from, length, self.stream);
                done("cuMemcpyDtoHAsync", asked)?;
                self.synchronize()?;
                Ok(hex(&bytes))
            }
            "record" => {
                let (mut event, mut handle) = (0, [0; 64]);
                done("cuEventCreate", self.driver.cuEventCreate(&raw mut event, INTERPROCESS))?;
                self.events.push(event);
                done("cuEventRecord", self.driver.cuEventRecord(event, self.stream))?;
                let told = self.driver.cuIpcGetEventHandle(&raw mut handle, event);
                done("cuIpcGetEventHandle", told)?;
                Ok(hex(&handle))
            }
            "destroy" => {
                let event = self.events.pop().unwrap();
                done("cuEventDestroy", self.driver.cuEventDestroy_v2(event))?;
                Ok(String::new())
            }
            "hold" => {
                self.driver.fakeCudaControlHold(words[1].parse().unwrap());
                Ok(String::new())
            }
            "looked" => {
                let (event, since) = (*self.events.last().unwrap(), Instant::now());
                while self.driver.fakeCudaEventLooks(event) == 0 {
                    if since.elapsed() > LIMIT {
                        return Err("nobody has looked".to_owned());
                    }
                    std::thread::yield_now();
                }
                Ok(String::new())
            }
            other => Err(format!("{other} is no order")),
        }
    }

    fn write(&self, to: u64, bytes: &[u8]) -> Answer {
        let asked = self.driver.cuMemcpyHtoDAsync_v2(to, bytes.as_ptr(), bytes.len(), self.stream);
        done("cuMemcpyHtoDAsync", asked)?;
        self.synchronize()
    }

    fn synchronize(&self) -> Answer {
        let ended = self.driver.cuStreamSynchronize(self.stream);
        done("cuStreamSynchronize", ended).map(|()| String::new())
    }

    fn end(self) {
        let Self { driver, stream, memory, events } = self;
        let mut codes = vec![driver.cuStreamSynchronize(stream), driver.cuStreamDestroy_v2(stream)];
        codes.extend(events.into_iter().map(|event| driver.cuEventDestroy_v2(event)));
        codes.extend(memory.into_iter().flatten().map(|(it, _)| driver.cuMemFree_v2(it)));
        codes.push(driver.cuDevicePrimaryCtxRelease_v2(0));
        assert!(codes.iter().all(|code| *code == 0), "{codes:?}");
    }
}

fn main() {
    let mut engine = Engine::start();
    let mut out = std::io::stdout();
    for line in std::io::stdin().lines() {
        let answer = match engine.obey(&line.unwrap()) {
            Ok(answer) => format!("ok {answer}"),
            Err(why) => format!("failed {why}"),
        };
        writeln!(out, "{answer}").unwrap();
        out.flush().unwrap();
    }
    engine.end();
}
