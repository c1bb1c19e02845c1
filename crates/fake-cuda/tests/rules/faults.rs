use crate::support::*;
use std::ffi::{CStr, c_void};

#[test]
fn the_nth_call_fails_and_the_next_does_not() {
    let fake = Fake::start();
    fake.fail("cuMemAlloc_v2", 2, OUT_OF_MEMORY);
    let mut memory = 0;
    assert_eq!(fake.cuMemAlloc_v2(&mut memory, 16), 0);
    assert_eq!(fake.cuMemAlloc_v2(&mut memory, 16), OUT_OF_MEMORY);
    assert_eq!(fake.cuMemAlloc_v2(&mut memory, 16), 0);
    assert_eq!(fake.calls("cuMemAlloc_v2"), 3);
    assert_eq!(fake.leaks(), [0, 0, 2, 0, 0, 1]);
    fake.assert_clean();
}

#[test]
fn what_gives_back_does_so_though_it_fails() {
    let fake = Fake::start();
    let stream = fake.stream();
    fake.fail("cuStreamDestroy_v2", 1, 999);
    assert_eq!(fake.cuStreamDestroy_v2(stream), 999);
    assert_eq!(fake.leaks()[0], 0);
}

#[test]
fn an_injected_launch_failure_stays_until_the_context_is_made_anew() {
    let fake = Fake::start();
    let stream = fake.stream();
    fake.fail("cuStreamSynchronize", 1, 719);
    assert_eq!(fake.cuStreamSynchronize(stream), 719);
    assert_eq!(fake.cuCtxSynchronize(), 719);
    assert_eq!(fake.cuStreamDestroy_v2(stream), 719);
    assert_eq!(fake.cuDevicePrimaryCtxRelease_v2(0), 0);
    fake.begin();
    assert_eq!(fake.cuCtxSynchronize(), 0);
    fake.assert_clean();
}

#[test]
fn a_lost_device_answers_everyone_and_runs_nothing() {
    let fake = Fake::start();
    let (stream, event) = (fake.stream(), fake.event());
    let (memory, host) = (fake.alloc(16), fake.pinned(16));
    fake.fakeCudaControlHold(1);
    assert_eq!(fake.cuMemcpyDtoHAsync_v2(host.as_mut_ptr(), memory, 16, stream), 0);
    assert_eq!(fake.cuEventRecord(event, stream), 0);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| fake.cuEventSynchronize(event));
        fake.fakeCudaControlLose(ILLEGAL_ADDRESS);
        assert_eq!(waiter.join().unwrap(), ILLEGAL_ADDRESS); // nobody waits for ever
    });
    assert_eq!(fake.cuEventQuery(event), ILLEGAL_ADDRESS);
    assert_eq!(fake.cuStreamQuery(stream), ILLEGAL_ADDRESS);
    assert_eq!(fake.cuMemFree_v2(memory), ILLEGAL_ADDRESS);
    assert_eq!(fake.cuMemFreeHost(host.as_mut_ptr()), ILLEGAL_ADDRESS);
    assert_eq!(fake.cuEventDestroy_v2(event), ILLEGAL_ADDRESS);
    assert_eq!(fake.cuStreamDestroy_v2(stream), ILLEGAL_ADDRESS);
    assert_eq!(fake.leaks(), [0, 0, 0, 0, 0, 1]);
    fake.assert_clean();
}

#[test]
fn calls_that_are_held_are_counted_and_do_nothing_until_they_may() {
    let fake = Fake::start();
    let name = c"cuDeviceGetCount".as_ptr();
    let ask = || {
        let mut devices = 0;
        (fake.cuDeviceGetCount(&mut devices), devices)
    };
    fake.fakeCudaControlHoldCalls(name, 1);
    assert_eq!(ask(), (0, 1), "one goes on");
    std::thread::scope(|scope| {
        let asking = [(); 2].map(|()| scope.spawn(ask));
        while fake.calls("cuDeviceGetCount") < 3 {
            std::thread::yield_now();
        }
        assert_eq!(fake.cuCtxSynchronize(), 0, "calls of other names go on");
        assert!(!asking.iter().any(|asking| asking.is_finished()));
        fake.fakeCudaControlHoldCalls(name, 1);
        while !asking.iter().any(|asking| asking.is_finished()) {
            std::thread::yield_now();
        }
        assert_eq!(asking.iter().filter(|asking| asking.is_finished()).count(), 1);
        fake.fakeCudaControlHoldCalls(std::ptr::null(), 0);
    });
    fake.assert_clean();
}

#[test]
fn random_faults_follow_their_seed() {
    let run = |seed| {
        let fake = Fake::start();
        fake.fakeCudaControlFailRandom(seed, 300, 46);
        (0..100).map(|_| fake.cuCtxSynchronize()).collect::<Vec<u32>>()
    };
    let first = run(1);
    assert!(first.contains(&46) && first.contains(&0));
    assert_eq!(first, run(1));
    assert_ne!(first, run(2));
}

#[test]
fn errors_have_names() {
    let fake = Fake::load();
    let name = |code| {
        let mut name = std::ptr::null();
        let result = fake.cuGetErrorName(code, &mut name);
        (result, (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) }))
    };
    assert_eq!(name(46), (0, Some(c"CUDA_ERROR_DEVICE_UNAVAILABLE")));
    assert_eq!(name(700), (0, Some(c"CUDA_ERROR_ILLEGAL_ADDRESS")));
    assert_eq!(name(12345), (INVALID_VALUE, None));
}

fn look_up(fake: &Fake, name: &CStr, version: i32) -> (*mut c_void, i32) {
    let (mut function, mut status) = (std::ptr::null_mut(), -1);
    assert_eq!(fake.cuGetProcAddress_v2(name.as_ptr(), &mut function, version, 0, &mut status), 0);
    (function, status)
}

#[test]
fn the_batch_has_the_form_of_the_version_asked_for() {
    let fake = Fake::start();
    let batch = c"cuMemcpyBatchAsync";
    let (old, status) = look_up(&fake, batch, 12080);
    assert!(!old.is_null() && status == 0);
    assert_eq!(look_up(&fake, batch, 12999), (old, 0));
    assert_eq!(look_up(&fake, batch, 12040), (std::ptr::null_mut(), 2)); // asks for too little
    assert_eq!(look_up(&fake, batch, 13000), (old, 0)); // the newest that this driver has
    fake.fakeCudaControlVersion(13000);
    let (new, status) = look_up(&fake, batch, 13000);
    assert!(!new.is_null() && new != old && status == 0);
    assert_eq!(look_up(&fake, batch, 12080), (old, 0));
    fake.fakeCudaControlVersion(12040);
    assert_eq!(look_up(&fake, batch, 12080), (std::ptr::null_mut(), 1));
    assert!(!look_up(&fake, c"cuMemAlloc", 12000).0.is_null());
    assert_eq!(look_up(&fake, c"cuNothing", 12000), (std::ptr::null_mut(), 1));
    fake.assert_clean();
    assert_eq!(fake.batch(&[], STREAM_ORDER, fake.stream()).0, NOT_FOUND);
    fake.assert_caught("version 12040 has no such function");
}

#[test]
fn the_form_of_cuda_13_has_no_index() {
    let fake = Fake::start();
    let (stream, memory, host) = (fake.stream(), fake.alloc(8), fake.pinned(8));
    let (to, from, sizes, starts) = ([memory], [address(host)], [8usize], [0usize]);
    let kinds = [Attributes(STREAM_ORDER, [0; 4], 0)];
    let copy = || {
        fake.cuMemcpyBatchAsync_v2(
            to.as_ptr(),
            from.as_ptr(),
            sizes.as_ptr(),
            1,
            kinds.as_ptr(),
            starts.as_ptr(),
            1,
            stream,
        )
    };
    assert_eq!(copy(), NOT_FOUND);
    fake.assert_caught("no such function");
    fake.fakeCudaControlVersion(13000);
    host.fill(3);
    assert_eq!(copy(), 0);
    let mut back = [0; 8];
    assert_eq!(fake.cuMemcpyDtoHAsync_v2(back.as_mut_ptr(), memory, 8, stream), 0);
    assert_eq!(back, [3; 8]);
    fake.assert_clean();
}

#[test]
fn a_name_that_is_struck_out_is_found_nowhere() {
    let mut library = std::fs::read(built()).unwrap();
    let entry = b"\0cuMemcpyBatchAsync\0";
    while let Some(at) = library.windows(entry.len()).position(|window| window == entry) {
        library[at + 1] = b'x';
    }
    let fake = Fake::load_bytes(&library);
    fake.begin();
    assert!(!fake.exports("cuMemcpyBatchAsync"));
    assert!(fake.exports("cuMemcpyAsync"));
    assert!(look_up(&fake, c"cuMemcpyBatchAsync", 12080).0.is_null());
}

const STRICT: &str = "faults::strict_mode_ends_a_process_that_did_wrong";

#[test]
fn strict_mode_ends_a_process_that_did_wrong() {
    let strict = ("FAKECUDA_STRICT", "1");
    match role().as_deref() {
        None => {
            for (role, code, words) in [
                ("clean", 0, ""),
                ("leak", 86, "alive: 1 streams, 0 events"),
                ("violation", 86, "1 violations"),
            ] {
                let output = child(STRICT, role, &[strict]).output().unwrap();
                assert_eq!(output.status.code(), Some(code), "{role}: {}", text(&output));
                assert!(text(&output).contains(words));
            }
            let lenient = child(STRICT, "leak", &[]).output().unwrap();
            assert_eq!(lenient.status.code(), Some(0));
            assert!(text(&lenient).contains("alive: 1 streams"));
        }
        Some(role) => {
            let fake = Fake::start();
            let stream = fake.stream();
            if role != "leak" {
                assert_eq!(fake.cuStreamDestroy_v2(stream), 0);
                assert_eq!(fake.cuDevicePrimaryCtxRelease_v2(0), 0);
            }
            if role == "violation" {
                fake.cuStreamDestroy_v2(stream);
            }
        }
    }
}

#[test]
fn the_environment_injects_faults() {
    const NAME: &str = "faults::the_environment_injects_faults";
    if role().is_none() {
        let environment = [
            ("FAKECUDA_VERSION", "13000"),
            ("FAKECUDA_FAIL", "cuMemAlloc_v2:2:2,cuStreamCreate:1:46"),
            ("FAKECUDA_LOSE", "9:719"),
        ];
        let output = child(NAME, "child", &environment).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        let wrong = child(NAME, "child", &[("FAKECUDA_FAIL", "cuInit")]).output().unwrap();
        assert!(text(&wrong).contains("FAKECUDA_FAIL=cuInit is not understood"));
        return;
    }
    let fake = Fake::start(); // three calls
    let (mut version, mut stream, mut memory) = (0, 0, 0);
    assert_eq!(fake.cuDriverGetVersion(&mut version), 0);
    assert_eq!(version, 13000);
    assert_eq!(fake.cuStreamCreate(&mut stream, 0), 46);
    assert_eq!(fake.cuMemAlloc_v2(&mut memory, 1), 0);
    assert_eq!(fake.cuMemAlloc_v2(&mut memory, 1), OUT_OF_MEMORY);
    assert_eq!(fake.cuCtxSynchronize(), 0);
    assert_eq!(fake.cuCtxSynchronize(), 719); // the ninth
}
