use crate::support::*;

#[test]
fn ranges_stay_in_one_allocation() {
    let fake = Fake::start();
    let (first, _second) = (fake.alloc(100), fake.alloc(100));
    let host = fake.pinned(200);
    assert_eq!(fake.cuMemcpyHtoD_v2(first, host.as_ptr(), 100), 0);
    fake.assert_clean();
    for (to, bytes) in [(first, 101), (first + 100, 1), (first - 1, 1), (first, usize::MAX)] {
        assert_eq!(fake.cuMemcpyHtoD_v2(to, host.as_ptr(), bytes), INVALID_VALUE);
    }
    assert_eq!(fake.violations().len(), 4);
}

#[test]
fn host_ranges_stay_in_one_registration() {
    let fake = Fake::start();
    let (stream, memory) = (fake.stream(), fake.alloc(100));
    let mut own = vec![0u8; 100];
    let start = own.as_mut_ptr();
    assert_eq!(fake.cuMemHostRegister_v2(start, 50, 0), 0);
    assert_eq!(fake.cuMemHostRegister_v2(unsafe { start.add(50) }, 25, 0), 0);
    assert_eq!(fake.cuMemcpyHtoDAsync_v2(memory, start, 50, stream), 0);
    fake.assert_clean();
    assert_eq!(fake.cuMemcpyHtoDAsync_v2(memory, start, 51, stream), INVALID_VALUE);
    fake.assert_caught("only partly");
    assert_eq!(
        fake.cuMemcpyDtoHAsync_v2(unsafe { start.add(70) }, memory, 10, stream),
        INVALID_VALUE
    );
    fake.assert_caught("only partly");
    assert_eq!(fake.cuMemHostUnregister(start), 0); // with a copy under way
    assert!(!fake.violations().is_empty());
}

#[test]
fn directions_are_as_named() {
    let fake = Fake::start();
    let (stream, memory, host) = (fake.stream(), fake.alloc(8), fake.pinned(8));
    host.copy_from_slice(b"12345678");
    let [low, high] = [address(host), memory];
    assert_eq!(fake.cuMemcpyAsync(high, low, 8, stream), 0);
    assert_eq!(fake.cuMemcpyDtoDAsync_v2(memory + 4, memory, 4, stream), 0);
    assert_eq!(fake.cuStreamSynchronize(stream), 0);
    assert_eq!(fake.cuMemcpyDtoH_v2(host.as_mut_ptr(), memory, 8), 0);
    assert_eq!(host, b"12341234");
    fake.assert_clean();
    assert_eq!(fake.cuMemcpyDtoDAsync_v2(memory, low, 8, stream), INVALID_VALUE);
    fake.assert_caught("no device address");
    let device = std::ptr::with_exposed_provenance_mut(usize::try_from(memory).unwrap());
    assert_eq!(fake.cuMemcpyDtoHAsync_v2(device, memory, 8, stream), INVALID_VALUE);
    fake.assert_caught("no host address");
    assert_eq!(fake.cuMemcpyAsync(memory, 0, 8, stream), INVALID_VALUE);
    fake.assert_caught("null pointer");
}

#[test]
fn pageable_memory_is_staged_or_waited_for() {
    let fake = Fake::start();
    let (stream, memory) = (fake.stream(), fake.alloc(8));
    let mut own = [1u8; 8];
    fake.fakeCudaControlHold(1);
    assert_eq!(fake.cuMemcpyHtoDAsync_v2(memory, own.as_ptr(), 8, stream), 0);
    own.fill(9); // already read
    fake.fakeCudaControlHold(0);
    assert_eq!(fake.cuMemcpyDtoHAsync_v2(own.as_mut_ptr(), memory, 8, stream), 0);
    assert_eq!(own, [1; 8]); // already there
    fake.assert_clean();
}

#[test]
fn a_synchronous_upload_from_pageable_memory_is_only_staged() {
    let fake = Fake::start();
    let (stream, memory, host) = (fake.stream(), fake.alloc(8), fake.pinned(8));
    assert_eq!(fake.cuMemcpyHtoD_v2(memory, host.as_ptr(), 8), 0);
    assert_eq!(fake.cuMemsetD8Async(memory, 1, 8, stream), 0); // pinned: it has ended
    assert_eq!(fake.cuStreamSynchronize(stream), 0);
    fake.assert_clean();
    assert_eq!(fake.cuMemcpyHtoD_v2(memory, [0u8; 8].as_ptr(), 8), 0);
    assert_eq!(fake.cuMemsetD8Async(memory, 1, 8, stream), 0);
    fake.assert_caught("race");
}

#[test]
fn a_batch_copies_each_piece() {
    let fake = Fake::start();
    let (stream, memory, host) = (fake.stream(), fake.alloc(8), fake.pinned(8));
    host.copy_from_slice(b"abcdefgh");
    let at = address(host);
    let copies = [(memory + 6, at, 2), (memory, at + 2, 3), (memory + 3, at + 5, 3)];
    assert_eq!(fake.batch(&copies, STREAM_ORDER, stream), (0, usize::MAX));
    let mut back = [0; 8];
    assert_eq!(fake.cuMemcpyDtoHAsync_v2(back.as_mut_ptr(), memory, 8, stream), 0);
    assert_eq!(&back, b"cdefghab");
    fake.assert_clean();
}

#[test]
fn a_batch_names_the_copy_that_is_wrong() {
    let fake = Fake::start();
    let (stream, memory, host) = (fake.stream(), fake.alloc(8), fake.pinned(8));
    let at = address(host);
    let wrong = [(memory, at, 4), (memory + 4, at + 4, 5)];
    assert_eq!(fake.batch(&wrong, STREAM_ORDER, stream), (INVALID_VALUE, 1));
    fake.assert_caught("passes the end");
    assert_eq!(fake.batch(&[(memory, at, 0)], STREAM_ORDER, stream), (INVALID_VALUE, 0));
    fake.assert_caught("0 bytes");
    let own = [0u8; 8];
    let upload = [(memory, address(&own), 8)];
    assert_eq!(fake.batch(&upload, DURING_CALL, stream), (0, usize::MAX));
    fake.assert_clean();
    assert_eq!(fake.batch(&upload, STREAM_ORDER, stream), (INVALID_VALUE, 0));
    fake.assert_caught("pageable");
    assert_eq!(fake.batch(&[(address(&own), memory, 8)], STREAM_ORDER, stream).0, INVALID_VALUE);
    fake.assert_caught("pageable");
}

#[test]
fn a_batch_s_arguments_are_checked() {
    let fake = Fake::start();
    let (stream, memory, host) = (fake.stream(), fake.alloc(8), fake.pinned(8));
    let copies = [(memory, address(host), 8)];
    for (order, stream, words) in [
        (STREAM_ORDER, 0, "default stream"),
        (STREAM_ORDER, 1, "default stream"),
        (STREAM_ORDER, 2, "default stream"),
        (0, stream, "no source access order"),
        (4, stream, "no source access order"),
    ] {
        assert_eq!(fake.batch(&copies, order, stream), (INVALID_VALUE, usize::MAX));
        fake.assert_caught(words);
    }
    assert_eq!(fake.batch(&[], STREAM_ORDER, stream).0, INVALID_VALUE);
    fake.assert_caught("at least 1");
    let (to, from, sizes) = ([memory, memory + 4], [address(host), address(host) + 4], [4usize; 2]);
    let kinds = [Attributes(STREAM_ORDER, [0; 4], 0), Attributes(STREAM_ORDER, [0; 4], 1)];
    for (starts, code) in
        [([0, 1], 0), ([1, 1], INVALID_VALUE), ([0, 0], INVALID_VALUE), ([0, 2], INVALID_VALUE)]
    {
        let mut failed = 0;
        let result = fake.cuMemcpyBatchAsync(
            to.as_ptr(),
            from.as_ptr(),
            sizes.as_ptr(),
            2,
            kinds.as_ptr(),
            starts.as_ptr(),
            2,
            &mut failed,
            stream,
        );
        assert_eq!(result, code);
    }
    assert_eq!(fake.violations().len(), 3);
}

#[test]
fn copies_of_a_batch_do_not_depend_on_each_other() {
    let fake = Fake::start();
    let (stream, memory, host) = (fake.stream(), fake.alloc(16), fake.pinned(16));
    let at = address(host);
    assert_eq!(fake.batch(&[(memory, at, 8), (memory + 8, at, 8)], STREAM_ORDER, stream).0, 0);
    fake.assert_clean();
    assert_eq!(fake.batch(&[(memory, at, 8), (memory + 7, at, 8)], STREAM_ORDER, stream).0, 0);
    fake.assert_caught("depend on each other");
    assert_eq!(fake.batch(&[(memory, at, 8), (memory + 8, memory, 8)], STREAM_ORDER, stream).0, 0);
    fake.assert_caught("depend on each other");
}

#[test]
fn any_order_reads_the_device_before_the_stream_s_own_work() {
    let fake = Fake::start();
    let (stream, memory, host) = (fake.stream(), fake.alloc(8), fake.pinned(8));
    assert_eq!(fake.cuMemsetD8Async(memory, 1, 8, stream), 0);
    let down = [(address(host), memory, 8)];
    assert_eq!(fake.batch(&down, STREAM_ORDER, stream).0, 0);
    assert_eq!(fake.cuStreamSynchronize(stream), 0);
    assert_eq!(host, &[1; 8]);
    fake.assert_clean();
    fake.fakeCudaControlHold(1);
    assert_eq!(fake.cuMemsetD8Async(memory, 2, 8, stream), 0);
    assert_eq!(fake.batch(&down, ANY_ORDER, stream).0, 0);
    fake.fakeCudaControlHold(0);
    fake.assert_caught("reading in ANY order");
    assert_eq!(fake.cuStreamSynchronize(stream), 0);
    assert_eq!(host, &[1; 8]); // stale
}

#[test]
fn any_order_is_right_for_a_source_that_only_the_host_writes() {
    let fake = Fake::start();
    let (stream, memory, host) = (fake.stream(), fake.alloc(8), fake.pinned(8));
    for round in 0..8 {
        assert_eq!(fake.fakeCudaHostAccess(host.as_ptr(), 8, 1), 0);
        host.fill(round);
        assert_eq!(fake.batch(&[(memory, address(host), 8)], ANY_ORDER, stream).0, 0);
        assert_eq!(fake.batch(&[(memory, address(host), 8)], ANY_ORDER, stream).0, 0);
        assert_eq!(fake.cuStreamSynchronize(stream), 0);
    }
    fake.assert_clean();
    assert_eq!(fake.batch(&[(memory, address(host), 8)], ANY_ORDER, stream).0, 0);
    assert_eq!(fake.fakeCudaHostAccess(host.as_ptr(), 8, 1), 1);
    fake.assert_caught("race");
}

#[test]
fn during_the_call_means_that_the_source_is_free_afterwards() {
    let fake = Fake::start();
    let (stream, memory, host) = (fake.stream(), fake.alloc(8), fake.pinned(8));
    fake.fakeCudaControlHold(1);
    host.fill(1);
    assert_eq!(fake.batch(&[(memory, address(host), 8)], DURING_CALL, stream).0, 0);
    assert_eq!(fake.fakeCudaHostAccess(host.as_ptr(), 8, 1), 0);
    host.fill(2);
    fake.fakeCudaControlHold(0);
    let mut back = [0; 8];
    assert_eq!(fake.cuMemcpyDtoHAsync_v2(back.as_mut_ptr(), memory, 8, stream), 0);
    assert_eq!(back, [1; 8]);
    fake.assert_clean();
    assert_eq!(fake.cuMemcpyDtoHAsync_v2(host.as_mut_ptr(), memory, 8, stream), 0);
    assert_eq!(fake.batch(&[(memory, address(host), 8)], DURING_CALL, stream).0, 0);
    fake.assert_caught("race");
}
