use crate::support::*;
use std::ffi::c_void;
use std::sync::mpsc::{Receiver, Sender, channel};

#[test]
fn a_destroyed_stream_is_refused_and_its_work_still_runs() {
    let fake = Fake::start();
    let (stream, memory) = (fake.stream(), fake.alloc(4));
    assert_eq!(fake.cuMemsetD8Async(memory, 7, 4, stream), 0);
    assert_eq!(fake.cuStreamDestroy_v2(stream), 0);
    assert_eq!(fake.cuCtxSynchronize(), 0);
    let mut back = [0; 4];
    assert_eq!(fake.cuMemcpyDtoH_v2(back.as_mut_ptr(), memory, 4), 0);
    assert_eq!(back, [7; 4]);
    fake.assert_clean();
    assert_eq!(fake.cuStreamSynchronize(stream), INVALID_HANDLE);
    fake.assert_caught("was destroyed");
    assert_eq!(fake.cuStreamDestroy_v2(stream), INVALID_HANDLE);
    fake.assert_caught("was destroyed");
    assert_eq!(fake.cuStreamQuery(12345), INVALID_HANDLE);
    fake.assert_caught("there is no stream");
    assert_eq!(fake.cuStreamDestroy_v2(0), INVALID_HANDLE);
    fake.assert_caught("default stream cannot");
}

#[test]
fn work_is_late_and_in_order() {
    let fake = Fake::start();
    let (stream, memory, host) = (fake.stream(), fake.alloc(64), fake.pinned(64));
    fake.fakeCudaControlHold(1);
    assert_eq!(fake.cuMemsetD8Async(memory, 1, 64, stream), 0);
    assert_eq!(fake.cuMemsetD8Async(memory, 2, 32, stream), 0);
    assert_eq!(fake.cuMemcpyDtoHAsync_v2(host.as_mut_ptr(), memory, 64, stream), 0);
    assert_eq!(fake.cuStreamQuery(stream), NOT_READY);
    assert_eq!(host[0], 0);
    fake.fakeCudaControlHold(0);
    assert_eq!(fake.cuStreamSynchronize(stream), 0);
    assert_eq!(fake.cuStreamQuery(stream), 0);
    assert_eq!((host[31], host[32]), (2, 1));
    fake.assert_clean();
}

#[test]
fn the_source_is_read_when_its_turn_comes() {
    let fake = Fake::start();
    let (stream, memory, host) = (fake.stream(), fake.alloc(1), fake.pinned(1));
    fake.fakeCudaControlHold(1);
    host[0] = 1;
    assert_eq!(fake.cuMemcpyHtoDAsync_v2(memory, host.as_ptr(), 1, stream), 0);
    host[0] = 2;
    fake.fakeCudaControlHold(0);
    assert_eq!(fake.cuStreamSynchronize(stream), 0);
    assert_eq!(fake.cuMemcpyDtoH_v2(host.as_mut_ptr(), memory, 1), 0);
    assert_eq!(host[0], 2);
}

#[test]
fn the_legacy_stream_orders_blocking_streams_and_no_others() {
    let fake = Fake::start();
    let memory = fake.alloc(64);
    let (first, second) = (fake.blocking_stream(), fake.blocking_stream());
    assert_eq!(fake.cuMemsetD8Async(memory, 1, 64, first), 0);
    assert_eq!(fake.cuMemsetD8_v2(memory, 2, 64), 0);
    assert_eq!(fake.cuMemsetD8Async(memory, 3, 64, second), 0);
    assert_eq!(fake.cuStreamSynchronize(0), 0);
    let mut back = [0; 64];
    assert_eq!(fake.cuMemcpyDtoH_v2(back.as_mut_ptr(), memory, 64), 0);
    assert_eq!(back, [3; 64]);
    fake.assert_clean();
    assert_eq!(fake.cuMemsetD8_v2(memory, 4, 64), 0);
    assert_eq!(fake.cuMemsetD8Async(memory, 5, 64, fake.stream()), 0);
    fake.assert_caught("race");
}

#[test]
fn the_per_thread_stream_is_not_modelled() {
    let fake = Fake::start();
    assert_eq!(fake.cuStreamSynchronize(2), 801);
    fake.assert_caught("per-thread");
}

struct Told<'a> {
    fake: &'a Fake,
    tell: Sender<(u32, i32)>,
    host: *mut u8,
}

extern "C" fn called(data: *mut c_void) {
    let told = unsafe { &*data.cast::<Told>() };
    let touched = told.fake.fakeCudaHostAccess(told.host, 1, 0);
    told.tell.send((told.fake.cuCtxSynchronize(), touched)).unwrap();
}

#[test]
fn a_host_function_runs_in_its_stream_and_may_call_nothing() {
    let fake = Fake::start();
    let (stream, memory, host) = (fake.stream(), fake.alloc(1), fake.pinned(1));
    let (tell, told): (_, Receiver<_>) = channel();
    let mut data = Told { fake: &fake, tell, host: host.as_mut_ptr() };
    assert_eq!(fake.cuMemcpyDtoHAsync_v2(host.as_mut_ptr(), memory, 1, stream), 0);
    assert_eq!(fake.cuLaunchHostFunc(stream, called, (&raw mut data).cast()), 0);
    assert_eq!(told.recv().unwrap(), (800, 0));
    fake.assert_caught("called from a host function");
    assert_eq!(fake.cuStreamSynchronize(stream), 0);
    assert_eq!(host[0], 0xCD);
}

#[test]
fn a_call_that_would_spoil_another_threads_capture_is_one_of_a_relaxed_thread() {
    let fake = Fake::start();
    let (stream, event) = (fake.stream(), fake.event());
    assert_eq!(fake.cuEventRecord(event, stream), 0);
    assert_eq!(fake.cuStreamSynchronize(stream), 0);
    fake.fakeCudaControlCapture(1);
    assert_eq!(fake.cuEventQuery(event), STREAM_CAPTURE_UNSUPPORTED);
    fake.assert_caught("which it spoils");
    let mut mode = RELAXED;
    assert_eq!(fake.cuThreadExchangeStreamCaptureMode(&mut mode), 0);
    assert_eq!(mode, 0, "the thread's mode before: global");
    assert_eq!(fake.cuEventQuery(event), 0);
    assert_eq!(fake.cuThreadExchangeStreamCaptureMode(&mut mode), 0);
    assert_eq!(mode, RELAXED);
    mode = 3;
    assert_eq!(fake.cuThreadExchangeStreamCaptureMode(&mut mode), INVALID_VALUE);
    fake.assert_caught("no capture mode 3");
    fake.fakeCudaControlCapture(0);
    assert_eq!(fake.cuEventQuery(event), 0);
}
