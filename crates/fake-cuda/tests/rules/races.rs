//! Order between streams and the host.

use crate::support::*;

#[test]
fn a_host_access_needs_the_end_to_be_seen() {
    let fake = Fake::start();
    let (stream, memory, host) = (fake.stream(), fake.alloc(64), fake.pinned(64));
    let start = host.as_mut_ptr();
    let see: [&dyn Fn(); 5] = [
        &|| assert_eq!(fake.cuStreamSynchronize(stream), 0),
        &|| while fake.cuStreamQuery(stream) == NOT_READY {},
        &|| assert_eq!(fake.cuCtxSynchronize(), 0),
        &|| {
            let event = fake.event();
            assert_eq!(fake.cuEventRecord(event, stream), 0);
            assert_eq!(fake.cuEventSynchronize(event), 0);
        },
        &|| {
            let event = fake.event();
            assert_eq!(fake.cuEventRecord(event, stream), 0);
            while fake.cuEventQuery(event) == NOT_READY {}
        },
    ];
    for see in see {
        assert_eq!(fake.cuMemcpyDtoHAsync_v2(start, memory, 64, stream), 0);
        see();
        assert_eq!(fake.fakeCudaHostAccess(start, 64, 0), 0);
        fake.assert_clean();
        assert_eq!(fake.cuMemcpyDtoHAsync_v2(start, memory, 32, stream), 0);
        assert_eq!(fake.fakeCudaHostAccess(unsafe { start.add(32) }, 32, 1), 0); // the other half
        assert_eq!(fake.fakeCudaHostAccess(start, 1, 0), 1);
        fake.assert_caught("race");
        see();
    }
}

#[test]
fn the_host_may_read_what_a_copy_reads() {
    let fake = Fake::start();
    let (stream, memory, host) = (fake.stream(), fake.alloc(64), fake.pinned(64));
    assert_eq!(fake.cuMemcpyHtoDAsync_v2(memory, host.as_ptr(), 64, stream), 0);
    assert_eq!(fake.fakeCudaHostAccess(host.as_ptr(), 64, 0), 0);
    assert_eq!(fake.fakeCudaHostAccess(host.as_ptr(), 64, 1), 1);
    fake.assert_caught("race");
}

#[test]
fn not_ready_tells_nothing() {
    let fake = Fake::start();
    let (stream, event) = (fake.stream(), fake.event());
    let (memory, host) = (fake.alloc(64), fake.pinned(64));
    fake.fakeCudaControlHold(1);
    assert_eq!(fake.cuMemcpyDtoHAsync_v2(host.as_mut_ptr(), memory, 64, stream), 0);
    assert_eq!(fake.cuEventRecord(event, stream), 0);
    assert_eq!(fake.cuEventQuery(event), NOT_READY);
    assert_eq!(fake.fakeCudaHostAccess(host.as_ptr(), 64, 0), 1);
    fake.assert_caught("race");
    fake.fakeCudaControlHold(0);
}

#[test]
fn events_order_streams_one_behind_the_other() {
    let fake = Fake::start();
    let memory = fake.alloc(64);
    let [a, b, c] = [fake.stream(), fake.stream(), fake.stream()];
    let [first, second] = [fake.event(), fake.event()];
    assert_eq!(fake.cuMemsetD8Async(memory, 1, 64, a), 0);
    assert_eq!(fake.cuEventRecord(first, a), 0);
    assert_eq!(fake.cuStreamWaitEvent(b, first, 0), 0);
    assert_eq!(fake.cuEventRecord(second, b), 0);
    assert_eq!(fake.cuStreamWaitEvent(c, second, 0), 0);
    assert_eq!(fake.cuMemsetD8Async(memory, 2, 64, c), 0); // after a, by way of b
    fake.assert_clean();
    assert_eq!(fake.cuMemsetD8Async(memory, 3, 64, a), 0);
    fake.assert_caught("race");
}

#[test]
fn two_streams_may_read_the_same() {
    let fake = Fake::start();
    let (memory, host, other) = (fake.alloc(64), fake.pinned(64), fake.pinned(64));
    assert_eq!(fake.cuMemcpyDtoHAsync_v2(host.as_mut_ptr(), memory, 64, fake.stream()), 0);
    assert_eq!(fake.cuMemcpyDtoHAsync_v2(other.as_mut_ptr(), memory, 64, fake.stream()), 0);
    fake.assert_clean();
    assert_eq!(fake.cuMemcpyHtoDAsync_v2(memory, other.as_ptr(), 1, fake.stream()), 0);
    assert_eq!(fake.violations().len(), 1);
}

#[test]
fn a_race_is_found_whenever_things_happen_to_run() {
    for seed in 0..50 {
        let fake = Fake::start();
        fake.fakeCudaControlSchedule(seed, seed % 3 * 100);
        let memory = fake.alloc(64);
        assert_eq!(fake.cuMemsetD8Async(memory, 1, 64, fake.stream()), 0);
        if seed % 2 == 0 {
            std::thread::yield_now();
        }
        assert_eq!(fake.cuMemsetD8Async(memory, 2, 64, fake.stream()), 0);
        fake.assert_caught("race");
        assert_eq!(fake.cuCtxSynchronize(), 0);
    }
}

#[test]
fn the_same_program_gives_the_same_report() {
    let run = || {
        let fake = Fake::start();
        let (memory, host) = (fake.alloc(4096), fake.pinned(4096));
        let streams = [fake.stream(), fake.blocking_stream(), fake.blocking_stream()];
        for i in 0..60usize {
            let (at, stream) = (i * 37 % 3900, streams[i % 3]);
            let to = unsafe { host.as_mut_ptr().add(at) };
            match i % 4 {
                0 => fake.cuMemcpyDtoHAsync_v2(to, memory + at as u64, 100, stream),
                1 => fake.cuMemcpyHtoDAsync_v2(memory + at as u64, to, 100, stream),
                2 => fake.cuMemsetD8_v2(memory + at as u64, 1, 10),
                _ => fake.cuMemsetD8Async(memory, 1, at, stream),
            };
            if i % 7 == 0 {
                assert_eq!(fake.cuStreamSynchronize(stream), 0);
            }
        }
        assert_eq!(fake.cuCtxSynchronize(), 0);
        let host = address(host);
        fake.violations()
            .iter()
            .map(|v| v.replace(&format!("{host:#x}"), "host").len())
            .collect::<Vec<_>>()
    };
    let first = run();
    assert!(first.len() > 5);
    for _ in 0..5 {
        assert_eq!(run(), first);
    }
}
