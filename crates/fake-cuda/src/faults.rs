//! Settings, injected faults, counts, and the account at the end. All of it can be set from the environment (see
//! `lib.rs`) and from the program.

use crate::abi::{In, Out};
use crate::errors::name as code_name;
use crate::queue::{PROGRESS, next_random};
use crate::state::lock;
use std::collections::BTreeMap;
use std::ffi::c_char;
use std::fmt;

pub(crate) struct Config {
    /// 1000 × major + 10 × minor.
    pub(crate) version: i32,
    pub(crate) devices: usize,
    pub(crate) memory: usize,
    pub(crate) seed: u64,
    pub(crate) delay_us: u64,
    pub(crate) abort: bool,
    strict: bool,
}

impl Config {
    pub(crate) fn from_environment() -> Self {
        Self {
            version: setting("FAKECUDA_VERSION", 12080),
            devices: setting("FAKECUDA_DEVICES", 1),
            memory: setting("FAKECUDA_MEMORY", 1 << 30),
            seed: setting("FAKECUDA_SEED", 1),
            delay_us: setting("FAKECUDA_DELAY_US", 200),
            abort: setting("FAKECUDA_ABORT", 0) == 1,
            strict: setting("FAKECUDA_STRICT", 0) == 1,
        }
    }
}

/// A number from the environment; what is none ends the process, as a test with a fault that is not
/// injected would pass.
fn setting<T: std::str::FromStr>(name: &str, otherwise: T) -> T {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| refuse(name, &text)),
        Err(_) => otherwise,
    }
}

fn refuse(name: &str, text: &str) -> ! {
    eprintln!("[fake-cuda] {name}={text} is not understood");
    std::process::abort();
}

/// Numbers with colons between them.
fn numbers<const N: usize>(name: &str, text: &str) -> [u64; N] {
    let parsed: Result<Vec<u64>, _> = text.split(':').map(str::parse).collect();
    let parsed = parsed.ok().and_then(|numbers| numbers.try_into().ok());
    parsed.unwrap_or_else(|| refuse(name, text))
}

fn code_of(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[derive(Default)]
pub(crate) struct Faults {
    calls: BTreeMap<String, u64>,
    /// Name, calls until it fails, code.
    plans: Vec<(String, u64, u32)>,
    random: Option<Random>,
    /// Calls until the device is lost, code.
    lose: Option<(u64, u32)>,
    /// Calls of this name wait, after so many more.
    held: Option<(String, u64)>,
}

struct Random {
    state: u64,
    per_mille: u64,
    code: u32,
}

/// What happens at a call.
#[derive(Default)]
pub(crate) struct Fault {
    pub(crate) code: Option<u32>,
    pub(crate) lost: Option<u32>,
}

impl Faults {
    pub(crate) fn from_environment() -> Self {
        let mut faults = Self::default();
        if let Ok(text) = std::env::var("FAKECUDA_FAIL") {
            for plan in text.split(',').filter(|plan| !plan.is_empty()) {
                let Some((name, rest)) = plan.split_once(':') else {
                    refuse("FAKECUDA_FAIL", &text)
                };
                let [nth, code] = numbers("FAKECUDA_FAIL", rest);
                faults.plans.push((name.to_owned(), nth, code_of(code)));
            }
        }
        if let Ok(text) = std::env::var("FAKECUDA_FAIL_RANDOM") {
            let [state, per_mille, code] = numbers("FAKECUDA_FAIL_RANDOM", &text);
            faults.random = Some(Random { state, per_mille, code: code_of(code) });
        }
        if let Ok(text) = std::env::var("FAKECUDA_LOSE") {
            let [nth, code] = numbers("FAKECUDA_LOSE", &text);
            faults.lose = Some((nth, code_of(code)));
        }
        faults
    }

    /// Whether a call goes on; one that does not asks again.
    pub(crate) fn lets_go(&mut self, name: &str) -> bool {
        match &mut self.held {
            Some((held, left)) if held == name => {
                let goes = *left > 0;
                *left = left.saturating_sub(1);
                goes
            }
            _ => true,
        }
    }

    /// Counts a call. The names and texts of errors are never refused.
    pub(crate) fn at_call(&mut self, name: &str) -> Fault {
        *self.calls.entry(name.to_owned()).or_default() += 1;
        let mut fault = Fault::default();
        if name.starts_with("cuGetError") {
            return fault;
        }
        if let Some((left, code)) = &mut self.lose {
            *left = left.saturating_sub(1);
            if *left == 0 {
                fault.lost = Some(*code);
                self.lose = None;
            }
        }
        if let Some(random) = &mut self.random
            && next_random(&mut random.state) % 1000 < random.per_mille
        {
            fault.code = Some(random.code);
        }
        for (planned, left, code) in &mut self.plans {
            if planned == name {
                *left = left.saturating_sub(1);
                if *left == 0 {
                    fault.code = Some(*code);
                }
            }
        }
        self.plans.retain(|&(_, left, _)| left > 0);
        fault
    }
}

/// What is alive: `fakeCudaLeaks` writes it as six numbers of 64 bits, in this order.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Leaks {
    pub(crate) streams: u64,
    pub(crate) events: u64,
    /// Device memory, that of other processes included.
    pub(crate) allocations: u64,
    /// Page-locked host memory, made here or registered.
    pub(crate) registrations: u64,
    pub(crate) modules: u64,
    pub(crate) contexts: u64,
}

impl Leaks {
    /// All but the contexts.
    pub(crate) fn objects(&self) -> u64 {
        self.streams + self.events + self.allocations + self.registrations + self.modules
    }
}

impl fmt::Display for Leaks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { streams, events, allocations, registrations, modules, contexts } = self;
        write!(
            f,
            "{streams} streams, {events} events, {allocations} allocations, {registrations} pinned ranges, \
             {modules} modules, {contexts} contexts"
        )
    }
}

/// Has the account given when the process ends.
pub(crate) fn at_exit() {
    // SAFETY: the function stays loaded (see build.rs) and needs nothing that is gone by then.
    let refused = unsafe { libc::atexit(account) };
    if refused != 0 {
        eprintln!("[fake-cuda] no account will be given at exit");
    }
}

extern "C" fn account() {
    const STRICT_EXIT_CODE: i32 = 86;
    let state = lock();
    let (leaks, violations) = (state.leaks(None), state.violations.len());
    let wrong = violations > 0 || leaks.objects() + leaks.contexts > 0;
    if wrong {
        eprintln!("[fake-cuda] at exit: {violations} violations; alive: {leaks}");
    }
    if wrong && state.config.strict {
        // SAFETY: ends the process at once, as it is about to.
        unsafe { libc::_exit(STRICT_EXIT_CODE) };
    }
}

/// Sets the driver's version: 12040, 12080, 12090, 13000.
#[unsafe(no_mangle)]
extern "C" fn fakeCudaControlVersion(version: i32) {
    lock().config.version = version;
}

/// Sets the bytes of each device.
#[unsafe(no_mangle)]
extern "C" fn fakeCudaControlMemory(bytes: usize) {
    lock().config.memory = bytes;
}

/// Chooses delays and orders anew, with delays up to `delay_us` microseconds.
#[unsafe(no_mangle)]
extern "C" fn fakeCudaControlSchedule(seed: u64, delay_us: u64) {
    let mut state = lock();
    state.queue.seed(seed);
    state.config.delay_us = delay_us;
}

/// While `held` is not 0, nothing that was asked for runs: queries answer NOT_READY, and a call that waits does so until
/// another thread lets go.
#[unsafe(no_mangle)]
extern "C" fn fakeCudaControlHold(held: i32) {
    lock().queue.held = held != 0;
    PROGRESS.notify_all();
}

/// But for the next `pass`, calls of `name` wait before they do anything, counted already, until this is called again or all
/// is reset; with a null name, none does.
#[unsafe(no_mangle)]
extern "C" fn fakeCudaControlHoldCalls(name: In<c_char>, pass: u64) {
    lock().faults.held = name.text().ok().map(|name| (name, pass));
    PROGRESS.notify_all();
}

/// While `capturing` is not 0, some thread captures a graph in the global mode.
#[unsafe(no_mangle)]
extern "C" fn fakeCudaControlCapture(capturing: i32) {
    lock().capturing = capturing != 0;
}

/// The `nth` call of `name` from now on (1: the next) answers with `code`. A code such as ILLEGAL_ADDRESS or LAUNCH_FAILED
/// stays for every later call. What gives something back does so all the same. Names are the exported ones, with
/// their `_v2`. Returns 0, or 1 for a null name or an `nth` of 0.
#[unsafe(no_mangle)]
extern "C" fn fakeCudaControlFail(name: In<c_char>, nth: u64, code: u32) -> i32 {
    match name.text() {
        Ok(name) if nth > 0 => {
            lock().faults.plans.push((name, nth, code));
            0
        }
        _ => 1,
    }
}

/// Any call answers with `code`, about `per_mille` of 1000 of them, as the seed has it; 0 ends it.
#[unsafe(no_mangle)]
extern "C" fn fakeCudaControlFailRandom(seed: u64, per_mille: u64, code: u32) {
    let random = (per_mille > 0).then_some(Random { state: seed, per_mille, code });
    lock().faults.random = random;
}

/// The device is lost now: all calls that need a context answer with `code` (700 or 719, say) until the primary context is
/// released by all, and what was asked for does not run.
#[unsafe(no_mangle)]
extern "C" fn fakeCudaControlLose(code: u32) {
    eprintln!("[fake-cuda] the device is lost: {}", code_name(code));
    lock().lose_devices(code);
}

/// Forgets violations, counts and faults to come. What is alive stays.
#[unsafe(no_mangle)]
extern "C" fn fakeCudaControlReset() {
    let mut state = lock();
    state.violations.clear();
    state.faults = Faults::default();
    PROGRESS.notify_all();
}

/// How often `name` was called, failed calls included; with a null name, all calls.
#[unsafe(no_mangle)]
extern "C" fn fakeCudaCalls(name: In<c_char>) -> u64 {
    let state = lock();
    match name.text() {
        Ok(name) => state.faults.calls.get(&name).copied().unwrap_or(0),
        Err(_) => state.faults.calls.values().sum(),
    }
}

/// The number of violations.
#[unsafe(no_mangle)]
extern "C" fn fakeCudaViolations() -> u64 {
    lock().violations.len() as u64
}

/// Writes violation `index`, from 0 on, as UTF-8 without a NUL, cut to `room` bytes. Returns its whole length, 0
/// where there is none.
#[unsafe(no_mangle)]
extern "C" fn fakeCudaViolation(index: usize, text: Out<u8>, room: usize) -> usize {
    let state = lock();
    let Some(violation) = state.violations.get(index) else { return 0 };
    let cut = &violation.as_bytes()[..violation.len().min(room)];
    if text.set_all(cut).is_err() {
        return 0;
    }
    violation.len()
}

/// Writes what is alive: six 64-bit numbers: streams, events, allocations, pinned ranges, modules, contexts.
#[unsafe(no_mangle)]
extern "C" fn fakeCudaLeaks(leaks: Out<Leaks>) {
    let state = lock();
    leaks.set_unless_null(state.leaks(None));
}
