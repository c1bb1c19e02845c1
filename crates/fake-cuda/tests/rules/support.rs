//! The library by dlopen, and what most tests begin with.

use libloading::Library;
use std::ffi::{CString, c_char, c_void};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

pub(crate) const INVALID_VALUE: u32 = 1;
pub(crate) const OUT_OF_MEMORY: u32 = 2;
pub(crate) const NOT_INITIALIZED: u32 = 3;
pub(crate) const INVALID_CONTEXT: u32 = 201;
pub(crate) const INVALID_HANDLE: u32 = 400;
pub(crate) const NOT_FOUND: u32 = 500;
pub(crate) const NOT_READY: u32 = 600;
pub(crate) const ILLEGAL_ADDRESS: u32 = 700;
pub(crate) const STREAM_CAPTURE_UNSUPPORTED: u32 = 900;
pub(crate) const RELAXED: u32 = 2;
pub(crate) const NON_BLOCKING: u32 = 1;

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct IpcHandle(pub(crate) [u8; 64]);

/// CUmemcpyAttributes: order, two locations, flags.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Attributes(pub(crate) u32, pub(crate) [i32; 4], pub(crate) u32);

pub(crate) const STREAM_ORDER: u32 = 1;
pub(crate) const DURING_CALL: u32 = 2;
pub(crate) const ANY_ORDER: u32 = 3;

pub(crate) type HostFn = extern "C" fn(*mut c_void);

pub(crate) struct Fake {
    library: Library,
}

macro_rules! functions {
    ($(fn $name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        #[allow(non_snake_case, clippy::too_many_arguments, reason = "the driver's names and signatures")]
        impl Fake {
            $(pub(crate) fn $name(&self, $($arg: $type),*) $(-> $result)? {
                type Function = unsafe extern "C" fn($($type),*) $(-> $result)?;
                let function = unsafe { self.library.get::<Function>(stringify!($name)) };
                unsafe { function.unwrap()($($arg),*) }
            })*
        }
    };
}

functions! {
    fn cuInit(flags: u32) -> u32;
    fn cuDriverGetVersion(version: &mut i32) -> u32;
    fn cuDeviceGetCount(count: &mut i32) -> u32;
    fn cuDeviceGetName(name: *mut u8, length: i32, device: i32) -> u32;
    fn cuDevicePrimaryCtxRetain(context: &mut u64, device: i32) -> u32;
    fn cuDevicePrimaryCtxRelease_v2(device: i32) -> u32;
    fn cuCtxPushCurrent_v2(context: u64) -> u32;
    fn cuCtxPopCurrent_v2(context: &mut u64) -> u32;
    fn cuCtxSetCurrent(context: u64) -> u32;
    fn cuCtxGetCurrent(context: &mut u64) -> u32;
    fn cuCtxSynchronize() -> u32;
    fn cuStreamCreate(stream: &mut u64, flags: u32) -> u32;
    fn cuStreamDestroy_v2(stream: u64) -> u32;
    fn cuStreamSynchronize(stream: u64) -> u32;
    fn cuStreamQuery(stream: u64) -> u32;
    fn cuStreamWaitEvent(stream: u64, event: u64, flags: u32) -> u32;
    fn cuThreadExchangeStreamCaptureMode(mode: &mut u32) -> u32;
    fn cuLaunchHostFunc(stream: u64, function: HostFn, data: *mut c_void) -> u32;
    fn cuEventCreate(event: &mut u64, flags: u32) -> u32;
    fn cuEventRecord(event: u64, stream: u64) -> u32;
    fn cuEventQuery(event: u64) -> u32;
    fn cuEventSynchronize(event: u64) -> u32;
    fn cuEventElapsedTime(milliseconds: &mut f32, start: u64, end: u64) -> u32;
    fn cuEventDestroy_v2(event: u64) -> u32;
    fn cuMemAlloc_v2(address: &mut u64, bytes: usize) -> u32;
    fn cuMemFree_v2(address: u64) -> u32;
    fn cuMemGetInfo_v2(free: &mut usize, total: &mut usize) -> u32;
    fn cuMemGetAddressRange_v2(base: &mut u64, bytes: &mut usize, address: u64) -> u32;
    fn cuPointerGetAttribute(data: *mut u8, attribute: u32, address: u64) -> u32;
    fn cuMemHostAlloc(pointer: &mut *mut u8, bytes: usize, flags: u32) -> u32;
    fn cuMemFreeHost(pointer: *mut u8) -> u32;
    fn cuMemHostRegister_v2(pointer: *mut u8, bytes: usize, flags: u32) -> u32;
    fn cuMemHostUnregister(pointer: *mut u8) -> u32;
    fn cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, bytes: usize, stream: u64) -> u32;
    fn cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, bytes: usize, stream: u64) -> u32;
    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) -> u32;
    fn cuMemcpyAsync(to: u64, from: u64, bytes: usize, stream: u64) -> u32;
    fn cuMemcpyHtoD_v2(to: u64, from: *const u8, bytes: usize) -> u32;
    fn cuMemcpyDtoH_v2(to: *mut u8, from: u64, bytes: usize) -> u32;
    fn cuMemsetD8_v2(to: u64, value: u8, bytes: usize) -> u32;
    fn cuMemsetD8Async(to: u64, value: u8, bytes: usize, stream: u64) -> u32;
    fn cuMemcpyBatchAsync(to: *const u64, from: *const u64, sizes: *const usize, count: usize, attributes: *const Attributes, starts: *const usize, kinds: usize, failed: &mut usize, stream: u64) -> u32;
    fn cuMemcpyBatchAsync_v2(to: *const u64, from: *const u64, sizes: *const usize, count: usize, attributes: *const Attributes, starts: *const usize, kinds: usize, stream: u64) -> u32;
    fn cuIpcGetMemHandle(handle: &mut IpcHandle, address: u64) -> u32;
    fn cuIpcOpenMemHandle_v2(address: &mut u64, handle: IpcHandle, flags: u32) -> u32;
    fn cuIpcCloseMemHandle(address: u64) -> u32;
    fn cuIpcGetEventHandle(handle: &mut IpcHandle, event: u64) -> u32;
    fn cuIpcOpenEventHandle(event: &mut u64, handle: IpcHandle) -> u32;
    fn cuModuleLoadData(module: &mut u64, image: *const c_char) -> u32;
    fn cuModuleGetFunction(function: &mut u64, module: u64, name: *const c_char) -> u32;
    fn cuModuleUnload(module: u64) -> u32;
    fn cuLaunchKernel(function: u64, gx: u32, gy: u32, gz: u32, bx: u32, by: u32, bz: u32, shared: u32, stream: u64, parameters: *const *const c_void, extra: *const c_void) -> u32;
    fn cuGetProcAddress_v2(symbol: *const c_char, function: &mut *mut c_void, version: i32, flags: u64, status: &mut i32) -> u32;
    fn cuGetErrorName(code: u32, name: &mut *const c_char) -> u32;
    fn fakeCudaHostAccess(pointer: *const u8, bytes: usize, write: i32) -> i32;
    fn fakeCudaEventLooks(event: u64) -> u64;
    fn fakeCudaControlVersion(version: i32);
    fn fakeCudaControlMemory(bytes: usize);
    fn fakeCudaControlSchedule(seed: u64, delay_us: u64);
    fn fakeCudaControlCapture(capturing: i32);
    fn fakeCudaControlHold(held: i32);
    fn fakeCudaControlHoldCalls(name: *const c_char, pass: u64);
    fn fakeCudaControlFail(name: *const c_char, nth: u64, code: u32) -> i32;
    fn fakeCudaControlFailRandom(seed: u64, per_mille: u64, code: u32);
    fn fakeCudaControlLose(code: u32);
    fn fakeCudaControlReset();
    fn fakeCudaCalls(name: *const c_char) -> u64;
    fn fakeCudaViolations() -> u64;
    fn fakeCudaViolation(index: usize, text: *mut u8, room: usize) -> usize;
    fn fakeCudaLeaks(leaks: &mut [u64; 6]);
}

/// What cargo has built for these tests.
pub(crate) fn built() -> PathBuf {
    std::env::current_exe().unwrap().with_file_name("libfake_cuda.so")
}

impl Fake {
    /// A copy of the library, with nothing called.
    pub(crate) fn load() -> Self {
        Self::load_bytes(&std::fs::read(built()).unwrap())
    }

    pub(crate) fn load_bytes(library: &[u8]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name =
            format!("fake-cuda-{}-{}.so", std::process::id(), NEXT.fetch_add(1, Ordering::SeqCst));
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, library).unwrap();
        let library = unsafe { Library::new(&path) }.unwrap();
        std::fs::remove_file(&path).unwrap();
        Self { library }
    }

    /// A copy of the library with the primary context of device 0 current on this thread.
    pub(crate) fn start() -> Self {
        let fake = Self::load();
        fake.begin();
        fake
    }

    /// Initializes, and makes the primary context of device 0 current.
    pub(crate) fn begin(&self) -> u64 {
        assert_eq!(self.cuInit(0), 0);
        let mut context = 0;
        assert_eq!(self.cuDevicePrimaryCtxRetain(&mut context, 0), 0);
        assert_eq!(self.cuCtxSetCurrent(context), 0);
        context
    }

    pub(crate) fn exports(&self, name: &str) -> bool {
        unsafe { self.library.get::<extern "C" fn()>(name) }.is_ok()
    }

    pub(crate) fn stream(&self) -> u64 {
        let mut stream = 0;
        assert_eq!(self.cuStreamCreate(&mut stream, NON_BLOCKING), 0);
        stream
    }

    pub(crate) fn blocking_stream(&self) -> u64 {
        let mut stream = 0;
        assert_eq!(self.cuStreamCreate(&mut stream, 0), 0);
        stream
    }

    pub(crate) fn event(&self) -> u64 {
        let mut event = 0;
        assert_eq!(self.cuEventCreate(&mut event, 0), 0);
        event
    }

    pub(crate) fn alloc(&self, bytes: usize) -> u64 {
        let mut address = 0;
        assert_eq!(self.cuMemAlloc_v2(&mut address, bytes), 0);
        address
    }

    pub(crate) fn pinned(&self, bytes: usize) -> &'static mut [u8] {
        let mut pointer = std::ptr::null_mut();
        assert_eq!(self.cuMemHostAlloc(&mut pointer, bytes, 0), 0);
        unsafe { std::slice::from_raw_parts_mut(pointer, bytes) }
    }

    /// A batch with one kind of attributes, in the form of 12.8. The second is failIdx.
    pub(crate) fn batch(
        &self,
        copies: &[(u64, u64, usize)],
        order: u32,
        stream: u64,
    ) -> (u32, usize) {
        let to: Vec<u64> = copies.iter().map(|copy| copy.0).collect();
        let from: Vec<u64> = copies.iter().map(|copy| copy.1).collect();
        let sizes: Vec<usize> = copies.iter().map(|copy| copy.2).collect();
        let (attributes, starts) = ([Attributes(order, [0; 4], 0)], [0usize]);
        let mut failed = 12345;
        let code = self.cuMemcpyBatchAsync(
            to.as_ptr(),
            from.as_ptr(),
            sizes.as_ptr(),
            copies.len(),
            attributes.as_ptr(),
            starts.as_ptr(),
            1,
            &mut failed,
            stream,
        );
        (code, failed)
    }

    pub(crate) fn fail(&self, name: &str, nth: u64, code: u32) {
        let name = CString::new(name).unwrap();
        assert_eq!(self.fakeCudaControlFail(name.as_ptr(), nth, code), 0);
    }

    pub(crate) fn calls(&self, name: &str) -> u64 {
        let name = CString::new(name).unwrap();
        self.fakeCudaCalls(name.as_ptr())
    }

    pub(crate) fn leaks(&self) -> [u64; 6] {
        let mut leaks = [u64::MAX; 6];
        self.fakeCudaLeaks(&mut leaks);
        leaks
    }

    pub(crate) fn violations(&self) -> Vec<String> {
        let count = usize::try_from(self.fakeCudaViolations()).unwrap();
        let read = |index| {
            let mut text = vec![0; 2000];
            let length = self.fakeCudaViolation(index, text.as_mut_ptr(), text.len());
            text.truncate(length);
            String::from_utf8(text).unwrap()
        };
        (0..count).map(read).collect()
    }

    #[track_caller]
    pub(crate) fn assert_clean(&self) {
        assert_eq!(self.violations(), Vec::<String>::new());
    }

    /// There is one violation, with these words; it is forgotten.
    #[track_caller]
    pub(crate) fn assert_caught(&self, words: &str) {
        let violations = self.violations();
        assert!(
            violations.len() == 1 && violations[0].contains(words),
            "not one violation with {words:?}: {violations:#?}"
        );
        self.fakeCudaControlReset();
    }
}

pub(crate) fn address(of: &[u8]) -> u64 {
    of.as_ptr().expose_provenance() as u64
}

/// Runs one test of this program in a process of its own, in which `ROLE` is set.
pub(crate) fn child(test: &str, role: &str, environment: &[(&str, &str)]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]).env("ROLE", role);
    command.envs(environment.iter().copied());
    command
}

pub(crate) fn role() -> Option<String> {
    std::env::var("ROLE").ok()
}

pub(crate) fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
