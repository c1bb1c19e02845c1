use crate::support::*;

#[test]
fn an_event_tells_when_its_stream_has_come_so_far() {
    let fake = Fake::start();
    let (stream, memory) = (fake.stream(), fake.alloc(4));
    let (start, end) = (fake.event(), fake.event());
    assert_eq!(fake.cuEventQuery(start), 0); // never recorded
    fake.fakeCudaControlHold(1);
    assert_eq!(fake.cuEventRecord(start, stream), 0);
    assert_eq!(fake.cuMemsetD8Async(memory, 1, 4, stream), 0);
    assert_eq!(fake.cuEventRecord(end, stream), 0);
    assert_eq!(fake.cuEventQuery(end), NOT_READY);
    let mut elapsed = -1.0;
    assert_eq!(fake.cuEventElapsedTime(&mut elapsed, start, end), NOT_READY);
    fake.fakeCudaControlHold(0);
    assert_eq!(fake.cuEventSynchronize(end), 0);
    assert_eq!(fake.cuEventQuery(start), 0);
    assert_eq!(fake.cuEventElapsedTime(&mut elapsed, start, end), 0);
    assert!(elapsed >= 0.0);
    fake.assert_clean();
}

#[test]
fn a_wait_is_for_the_record_before_it() {
    let fake = Fake::start();
    let (first, second, event) = (fake.stream(), fake.stream(), fake.event());
    let memory = fake.alloc(4);
    assert_eq!(fake.cuStreamWaitEvent(second, event, 0), 0); // nothing recorded: nothing to wait for
    assert_eq!(fake.cuMemsetD8Async(memory, 1, 4, first), 0);
    assert_eq!(fake.cuEventRecord(event, first), 0);
    assert_eq!(fake.cuMemsetD8Async(memory, 2, 4, second), 0);
    fake.assert_caught("race");
}

#[test]
fn a_destroyed_event_is_refused() {
    let fake = Fake::start();
    let (stream, event) = (fake.stream(), fake.event());
    fake.fakeCudaControlHold(1);
    assert_eq!(fake.cuEventRecord(event, stream), 0);
    assert_eq!(fake.cuEventDestroy_v2(event), 0); // does not wait
    fake.fakeCudaControlHold(0);
    fake.assert_clean();
    for code in [
        fake.cuEventQuery(event),
        fake.cuEventSynchronize(event),
        fake.cuEventRecord(event, stream),
        fake.cuStreamWaitEvent(stream, event, 0),
        fake.cuEventDestroy_v2(event),
    ] {
        assert_eq!(code, INVALID_HANDLE);
    }
    assert_eq!(fake.violations().len(), 5);
}

#[test]
fn times_need_timing_and_a_record() {
    let fake = Fake::start();
    let (stream, timed) = (fake.stream(), fake.event());
    let (mut untimed, mut elapsed) = (0, 0.0);
    assert_eq!(fake.cuEventCreate(&mut untimed, 2), 0);
    assert_eq!(fake.cuEventRecord(untimed, stream), 0);
    assert_eq!(fake.cuStreamSynchronize(stream), 0);
    assert_eq!(fake.cuEventElapsedTime(&mut elapsed, timed, timed), INVALID_HANDLE);
    fake.assert_caught("never recorded");
    assert_eq!(fake.cuEventElapsedTime(&mut elapsed, untimed, untimed), INVALID_HANDLE);
    fake.assert_caught("without timing");
    for flags in [4, 8] {
        assert_eq!(fake.cuEventCreate(&mut untimed, flags), INVALID_VALUE);
        fake.assert_caught("no event flags");
    }
}
