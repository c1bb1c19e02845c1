//! The driver that a test runs on, an engine on it, and what only the fake one can do.

use std::ffi::{CString, c_char, c_void};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use cudarc::driver::sys::{self, CUcontext, CUresult, CUstream};

/// Names the test that a child process runs.
const CHILD: &str = "KVFERRY_CUDA_TEST";
/// Set by `npm run test:gpu`: the tests run on the machine's own driver.
const GPU: &str = "KVFERRY_TEST_GPU";
const LIMIT: Duration = Duration::from_secs(120);

/// A driver to run a test on.
#[derive(Clone, Copy)]
pub(crate) enum On {
    /// The fake one, with these variables in the environment.
    Fake(&'static [(&'static str, &'static str)]),
    /// The fake one without this function.
    Without(&'static str),
    /// None at all.
    Nothing,
}

pub(crate) const CUDA_12_4: On = On::Fake(&[("FAKECUDA_VERSION", "12040")]);
pub(crate) const CUDA_12_8: On = On::Fake(&[("FAKECUDA_VERSION", "12080")]);
pub(crate) const CUDA_13: On = On::Fake(&[("FAKECUDA_VERSION", "13000")]);

/// Runs `body` in a process of its own for each of the drivers; on the machine's own driver instead, once,
/// where that is asked for and `needs_fake` is not set.
pub(crate) fn on(test: &str, drivers: &[On], needs_fake: bool, body: impl Fn()) {
    if env::var(CHILD).is_ok_and(|child| child == test) {
        return body();
    }
    if env::var_os(GPU).is_some() {
        if needs_fake {
            return skip(test, "it needs the fake driver");
        }
        return run_child(test, child(test));
    }
    if drivers.is_empty() {
        return skip(test, "it needs a GPU");
    }
    let Some(fake) = fake_library().filter(|fake| fake.exists()) else {
        return skip(test, "there is no libfake_cuda.so: cargo build -p fake-cuda");
    };
    for (number, driver) in drivers.iter().enumerate() {
        let folder = Folder::new(&format!("{test}_{number}"));
        let mut command = child(test);
        command.env("LD_LIBRARY_PATH", &folder.0).env("FAKECUDA_STRICT", "1");
        let library = folder.0.join("libcuda.so");
        match driver {
            On::Fake(variables) => {
                std::os::unix::fs::symlink(&fake, library).unwrap();
                command.envs(variables.iter().copied());
            }
            On::Without(function) => fs::write(library, without(&fake, function)).unwrap(),
            On::Nothing => {}
        }
        run_child(test, command);
    }
}

pub(crate) fn skip(test: &str, reason: &str) {
    // Past the capture of passed tests.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {reason}");
}

/// This very test, in another process.
pub(crate) fn child(test: &str) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(CHILD, test);
    command
}

/// Runs a child; it must succeed, and not hang.
pub(crate) fn run_child(test: &str, mut command: Command) {
    let mut child =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("a child process");
    let mut stdout = child.stdout.take().unwrap();
    let mut stderr = child.stderr.take().unwrap();
    let said = [
        thread::spawn(move || {
            let mut text = Vec::new();
            let _ = stdout.read_to_end(&mut text);
            text
        }),
        thread::spawn(move || {
            let mut text = Vec::new();
            let _ = stderr.read_to_end(&mut text);
            text
        }),
    ];
    let started = Instant::now();
    let ended = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if started.elapsed() > LIMIT {
            let _ = child.kill();
            break None;
        }
        thread::sleep(Duration::from_millis(5));
    };
    let said = said.map(|thread| String::from_utf8_lossy(&thread.join().unwrap()).into_owned());
    let said = said.join("\n");
    match ended {
        None => panic!("{test} on {command:?} hangs:\n{said}"),
        Some(status) if !status.success() => panic!("{test} on {command:?}, {status}:\n{said}"),
        Some(_) if !said.contains("1 passed") => panic!("{test} did not run:\n{said}"),
        Some(_) => {}
    }
}

fn fake_library() -> Option<PathBuf> {
    let executable = env::current_exe().unwrap();
    let target = executable.ancestors().nth(2)?;
    // `cargo build` and `cargo test` leave it in places of their own: the newer one counts.
    let places = [target.join("libfake_cuda.so"), target.join("deps/libfake_cuda.so")];
    places.into_iter().max_by_key(|place| fs::metadata(place).and_then(|of| of.modified()).ok())
}

/// The library with a function's name struck out.
fn without(fake: &Path, function: &str) -> Vec<u8> {
    let mut library = fs::read(fake).unwrap();
    let name = format!("\0{function}\0").into_bytes();
    let mut struck = 0;
    for at in 0..library.len() - name.len() {
        if library[at..at + name.len()] == name[..] {
            library[at + 1] = b'x';
            struck += 1;
        }
    }
    assert!(struck > 0, "{function} is in the fake driver");
    library
}

/// A folder that goes with the value.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let folder = env::temp_dir().join(format!("kvferry_cuda_{}_{name}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The device and the driver, in a line.
pub(crate) fn describe() -> String {
    let (mut name, mut version) = ([0 as c_char; 256], 0);
    unsafe {
        done(sys::cuDeviceGetName(name.as_mut_ptr(), 256, 0));
        done(sys::cuDriverGetVersion(&raw mut version));
    }
    let name: String = name
        .iter()
        .take_while(|byte| **byte != 0)
        .map(|byte| char::from(byte.cast_unsigned()))
        .collect();
    format!("CUDA device 0: {name}, driver of CUDA {}.{}", version / 1000, version % 1000 / 10)
}

pub(crate) fn done(result: CUresult) {
    assert_eq!(result, CUresult::CUDA_SUCCESS);
}

/// An engine on a device, in its primary context, which is current on this thread.
pub(crate) struct Engine {
    pub(crate) device: i32,
    context: CUcontext,
    pub(crate) stream: CUstream,
    captured: CUstream,
    allocations: Vec<u64>,
}

impl Engine {
    pub(crate) fn new(device: i32) -> Self {
        let (mut context, mut stream) = (std::ptr::null_mut(), std::ptr::null_mut());
        unsafe {
            done(sys::cuInit(0));
            done(sys::cuDevicePrimaryCtxRetain(&raw mut context, device));
            done(sys::cuCtxPushCurrent_v2(context));
            done(sys::cuStreamCreate(&raw mut stream, 1));
        }
        Self { device, context, stream, captured: std::ptr::null_mut(), allocations: Vec::new() }
    }

    pub(crate) fn stream(&self) -> u64 {
        self.stream.addr() as u64
    }

    pub(crate) fn allocate(&mut self, bytes: u64) -> u64 {
        let mut address = 0;
        unsafe { done(sys::cuMemAlloc_v2(&raw mut address, bytes.try_into().unwrap())) };
        self.allocations.push(address);
        address
    }

    pub(crate) fn free(&mut self, address: u64) {
        self.allocations.retain(|known| *known != address);
        unsafe { done(sys::cuMemFree_v2(address)) };
    }

    /// Fills memory, as compute would, in the engine's stream.
    pub(crate) fn compute(&self, address: u64, value: u8, bytes: u64) {
        let bytes = bytes.try_into().unwrap();
        unsafe { done(sys::cuMemsetD8Async(address, value, bytes, self.stream)) };
    }

    /// Some 10 ms of compute, so that what does not wait for it is early. The fake driver is late at will.
    pub(crate) fn busy(&mut self) {
        const BYTES: u64 = 256 << 20;
        if Fake::here().is_none() {
            let (from, to) = (self.allocate(BYTES), self.allocate(BYTES));
            (0..64).for_each(|_| self.copy(to, from, BYTES));
        }
    }

    /// Begins to capture a graph in the global mode, on a stream that computes nothing else, or ends it.
    pub(crate) fn capture(&mut self, on: bool) {
        if let Some(fake) = Fake::here() {
            return fake.capture(on);
        }
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
        if on {
            unsafe {
                done(sys::cuStreamCreate(&raw mut self.captured, 1));
                done(sys::cuStreamBeginCapture_v2(self.captured, mode));
            }
            return;
        }
        let mut graph = std::ptr::null_mut();
        unsafe {
            done(sys::cuStreamEndCapture(self.captured, &raw mut graph));
            done(sys::cuGraphDestroy(graph));
            done(sys::cuStreamDestroy_v2(self.captured));
        }
    }

    /// A kernel reads where no memory is: the device is lost to this process.
    pub(crate) fn crash(&self) {
        let text = concat!(include_str!("../../src/cuda/copy_pieces.ptx"), "\0");
        let (mut module, mut kernel) = (std::ptr::null_mut(), std::ptr::null_mut());
        let (mut nowhere, mut count, mut reserved) = (16u64, 1u32, 0u32);
        let mut parameters: [*mut c_void; 3] =
            [(&raw mut nowhere).cast(), (&raw mut count).cast(), (&raw mut reserved).cast()];
        unsafe {
            done(sys::cuModuleLoadData(&raw mut module, text.as_ptr().cast()));
            let name = c"kvferry_copy_pieces".as_ptr();
            done(sys::cuModuleGetFunction(&raw mut kernel, module, name));
            let (parameters, none) = (parameters.as_mut_ptr(), std::ptr::null_mut());
            done(sys::cuLaunchKernel(kernel, 1, 1, 1, 32, 1, 1, 0, self.stream, parameters, none));
        }
    }

    /// Reads memory, as compute would, in the engine's stream.
    pub(crate) fn copy(&self, to: u64, from: u64, bytes: u64) {
        let bytes = bytes.try_into().unwrap();
        unsafe { done(sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream)) };
    }

    pub(crate) fn synchronize(&self) {
        unsafe { done(sys::cuStreamSynchronize(self.stream)) };
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        unsafe { done(sys::cuMemcpyHtoD_v2(address, bytes.as_ptr().cast(), bytes.len())) };
        unsafe { done(sys::cuCtxSynchronize()) };
    }

    pub(crate) fn read(&self, address: u64, bytes: u64) -> Vec<u8> {
        let mut into = vec![0; bytes.try_into().unwrap()];
        unsafe { done(sys::cuMemcpyDtoH_v2(into.as_mut_ptr().cast(), address, into.len())) };
        into
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Whatever a test did to the device: what is alive in the end is counted.
        unsafe {
            let _ = sys::cuStreamSynchronize(self.stream);
            for address in &self.allocations {
                let _ = sys::cuMemFree_v2(*address);
            }
            let _ = sys::cuStreamDestroy_v2(self.stream);
            let mut context: CUcontext = std::ptr::null_mut();
            let popped = sys::cuCtxPopCurrent_v2(&raw mut context);
            if !thread::panicking() {
                done(popped);
                assert_eq!(context, self.context, "the engine's context is the current one");
            }
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

/// What only the fake driver can do.
pub(crate) struct Fake;

impl Fake {
    /// `None` on a real driver.
    pub(crate) fn here() -> Option<Self> {
        Self::symbol::<extern "C" fn() -> u64>("fakeCudaViolations").map(|_| Self)
    }

    fn symbol<F: Copy>(name: &str) -> Option<F> {
        unsafe { sys::culib().get::<F>(name.as_bytes()) }.ok().map(|found| *found)
    }

    /// While held, nothing that was asked of the device runs.
    pub(crate) fn hold(&self, held: bool) {
        let hold: extern "C" fn(i32) = Self::symbol("fakeCudaControlHold").unwrap();
        hold(held.into());
    }

    /// But for the next `pass`, calls of this function wait before they do anything, counted already; with `None`, none
    /// does.
    pub(crate) fn hold_calls(&self, call: Option<&str>, pass: u64) {
        let hold: extern "C" fn(*const c_char, u64) =
            Self::symbol("fakeCudaControlHoldCalls").unwrap();
        let call = call.map(|call| CString::new(call).unwrap());
        hold(call.as_ref().map_or(std::ptr::null(), |call| call.as_ptr()), pass);
    }

    /// While on, some thread captures a graph in the global mode.
    pub(crate) fn capture(&self, on: bool) {
        let capture: extern "C" fn(i32) = Self::symbol("fakeCudaControlCapture").unwrap();
        capture(on.into());
    }

    pub(crate) fn fail(&self, call: &str, nth: u64, code: u32) {
        let fail: extern "C" fn(*const c_char, u64, u32) -> i32 =
            Self::symbol("fakeCudaControlFail").unwrap();
        let call = CString::new(call).unwrap();
        assert_eq!(fail(call.as_ptr(), nth, code), 0);
    }

    /// Any call fails with `code`, about `per_mille` of 1000 of them.
    pub(crate) fn fail_at_random(&self, seed: u64, per_mille: u64, code: u32) {
        let fail: extern "C" fn(u64, u64, u32) = Self::symbol("fakeCudaControlFailRandom").unwrap();
        fail(seed, per_mille, code);
    }

    pub(crate) fn reset(&self) {
        Self::symbol::<extern "C" fn()>("fakeCudaControlReset").unwrap()();
    }

    pub(crate) fn lose(&self, code: u32) {
        Self::symbol::<extern "C" fn(u32)>("fakeCudaControlLose").unwrap()(code);
    }

    pub(crate) fn schedule(&self, seed: u64, delay_us: u64) {
        let schedule: extern "C" fn(u64, u64) = Self::symbol("fakeCudaControlSchedule").unwrap();
        schedule(seed, delay_us);
    }

    pub(crate) fn calls(&self, call: &str) -> u64 {
        let calls: extern "C" fn(*const c_char) -> u64 = Self::symbol("fakeCudaCalls").unwrap();
        let call = CString::new(call).unwrap();
        calls(call.as_ptr())
    }

    pub(crate) fn violations(&self) -> u64 {
        Self::symbol::<extern "C" fn() -> u64>("fakeCudaViolations").unwrap()()
    }

    /// Says that this process reads memory that is registered: a race where the device may still write it.
    pub(crate) fn host_reads(&self, start: usize, bytes: usize) {
        let access: extern "C" fn(u64, usize, i32) -> i32 =
            Self::symbol("fakeCudaHostAccess").unwrap();
        assert_eq!(access(start as u64, bytes, 0), 0, "the device may still write what is read");
    }

    /// Streams, events, allocations, registrations, modules, contexts.
    pub(crate) fn alive(&self) -> [u64; 6] {
        let leaks: extern "C" fn(*mut c_void) = Self::symbol("fakeCudaLeaks").unwrap();
        let mut alive = [0u64; 6];
        leaks((&raw mut alive).cast());
        alive
    }

    /// Waits until a function was called so often. Who waits in vain goes on: what comes next fails, and says more.
    pub(crate) fn await_calls(&self, call: &str, calls: u64) {
        self.await_that(|| self.calls(call) >= calls);
    }

    /// The same for anything.
    #[allow(
        clippy::unused_self,
        reason = "only what the fake driver can be made to do is awaited so"
    )]
    pub(crate) fn await_that(&self, happened: impl Fn() -> bool) {
        let started = Instant::now();
        while !happened() && started.elapsed() < LIMIT / 12 {
            thread::yield_now();
        }
    }
}
