use crate::support::*;

#[test]
fn memory_is_counted_and_limited() {
    let fake = Fake::start();
    fake.fakeCudaControlMemory(1 << 20);
    let (mut free, mut total, mut address) = (0, 0, 0);
    let memory = fake.alloc(1 << 19);
    assert_eq!(fake.cuMemGetInfo_v2(&mut free, &mut total), 0);
    assert_eq!((free, total), (1 << 19, 1 << 20));
    assert_eq!(fake.cuMemAlloc_v2(&mut address, (1 << 19) + 1), OUT_OF_MEMORY);
    assert_eq!(fake.cuMemFree_v2(memory), 0);
    assert_eq!(fake.cuMemAlloc_v2(&mut address, 1 << 20), 0);
    fake.assert_clean();
    assert_eq!(fake.cuMemAlloc_v2(&mut address, 0), INVALID_VALUE);
    fake.assert_caught("0 bytes");
}

#[test]
fn an_address_tells_its_allocation() {
    let fake = Fake::start();
    let (memory, host) = (fake.alloc(100), fake.pinned(100));
    let (mut base, mut bytes) = (0, 0);
    assert_eq!(fake.cuMemGetAddressRange_v2(&mut base, &mut bytes, memory + 99), 0);
    assert_eq!((base, bytes), (memory, 100));
    let ask = |attribute, address| {
        let mut answer = [0u8; 8];
        let code = fake.cuPointerGetAttribute(answer.as_mut_ptr(), attribute, address);
        (code, u64::from_le_bytes(answer))
    };
    assert_eq!(ask(2, memory + 5), (0, 2)); // MEMORY_TYPE: device
    assert_eq!(ask(2, address(host)), (0, 1)); // host
    assert_eq!(ask(11, memory + 5), (0, memory));
    assert_eq!(ask(12, memory + 5), (0, 100));
    assert_eq!(ask(2, address(&[1, 2, 3])).0, INVALID_VALUE); // pageable
    fake.assert_clean();
    assert_eq!(fake.cuMemGetAddressRange_v2(&mut base, &mut bytes, memory + 100), INVALID_VALUE);
    fake.assert_caught("in no allocation");
}

#[test]
fn only_an_allocation_is_freed_and_only_once() {
    let fake = Fake::start();
    let memory = fake.alloc(100);
    assert_eq!(fake.cuMemFree_v2(memory + 1), INVALID_VALUE);
    fake.assert_caught("not an allocation's start");
    assert_eq!(fake.cuMemFree_v2(memory), 0);
    fake.assert_clean();
    assert_eq!(fake.cuMemFree_v2(memory), INVALID_VALUE);
    fake.assert_caught("was freed");
    assert_eq!(fake.cuMemsetD8_v2(memory + 50, 0, 1), INVALID_VALUE);
    fake.assert_caught("was freed");
}

#[test]
fn a_host_that_follows_a_device_address_faults() {
    use std::os::unix::process::ExitStatusExt;
    const NAME: &str = "memory::a_host_that_follows_a_device_address_faults";
    if role().is_none() {
        let output = child(NAME, "child", &[]).output().unwrap();
        assert_eq!(output.status.signal(), Some(11), "{}", text(&output));
        return;
    }
    let fake = Fake::start();
    let memory = usize::try_from(fake.alloc(100)).unwrap();
    unsafe { std::ptr::with_exposed_provenance::<u8>(memory).read_volatile() };
}

#[test]
fn memory_given_back_before_the_end_was_seen_is_reported() {
    let fake = Fake::start();
    let (stream, memory, host) = (fake.stream(), fake.alloc(64), fake.pinned(64));
    let (seen, unseen) = (fake.event(), fake.event());
    assert_eq!(fake.cuEventRecord(seen, stream), 0);
    assert_eq!(fake.cuMemcpyDtoHAsync_v2(host.as_mut_ptr(), memory, 64, stream), 0);
    assert_eq!(fake.cuEventRecord(unseen, stream), 0);
    assert_eq!(fake.cuEventSynchronize(seen), 0); // of what came before
    fake.fakeCudaControlHold(1);
    assert_eq!(fake.cuMemFreeHost(host.as_mut_ptr()), 0);
    let first = &fake.violations()[0];
    assert!(first.contains("before the host has seen the end of cuMemcpyDtoHAsync_v2"), "{first}");
}

#[test]
fn device_memory_freed_before_the_end_was_seen_is_reported() {
    for late in [0, 1] {
        let fake = Fake::start();
        let (stream, memory) = (fake.stream(), fake.alloc(64));
        fake.fakeCudaControlHold(late);
        assert_eq!(fake.cuMemsetD8Async(memory, 1, 64, stream), 0);
        assert_eq!(fake.cuMemFree_v2(memory), 0);
        let first = &fake.violations()[0];
        assert!(first.contains("before the host has seen the end of cuMemsetD8Async"), "{first}");
    }
}

#[test]
fn given_back_after_the_end_was_seen_is_right() {
    let fake = Fake::start();
    let (stream, event) = (fake.stream(), fake.event());
    let (memory, host) = (fake.alloc(64), fake.pinned(64));
    let mut own = vec![0u8; 64];
    assert_eq!(fake.cuMemHostRegister_v2(own.as_mut_ptr(), 64, 0), 0);
    assert_eq!(fake.cuMemcpyDtoHAsync_v2(host.as_mut_ptr(), memory, 64, stream), 0);
    assert_eq!(fake.cuMemcpyHtoDAsync_v2(memory, own.as_ptr(), 64, stream), 0);
    assert_eq!(fake.cuEventRecord(event, stream), 0);
    while fake.cuEventQuery(event) == NOT_READY {}
    assert_eq!(fake.cuMemFreeHost(host.as_mut_ptr()), 0);
    assert_eq!(fake.cuMemHostUnregister(own.as_mut_ptr()), 0);
    assert_eq!(fake.cuMemFree_v2(memory), 0);
    fake.assert_clean();
}

#[test]
fn unregistering_while_a_copy_runs_is_reported() {
    let fake = Fake::start();
    let (stream, memory) = (fake.stream(), fake.alloc(64));
    let mut own = vec![0u8; 64];
    assert_eq!(fake.cuMemHostRegister_v2(own.as_mut_ptr(), 64, 0), 0);
    fake.fakeCudaControlHold(1);
    assert_eq!(fake.cuMemcpyDtoHAsync_v2(own.as_mut_ptr(), memory, 64, stream), 0);
    assert_eq!(fake.cuMemHostUnregister(own.as_mut_ptr()), 0);
    fake.assert_caught("before the host has seen the end");
    fake.fakeCudaControlHold(0);
    assert_eq!(fake.cuStreamSynchronize(stream), ILLEGAL_ADDRESS); // and the copy finds it gone
    fake.assert_caught("not page-locked (any more)");
}

#[test]
fn registered_ranges_do_not_overlap_and_are_mapped() {
    let fake = Fake::start();
    let mut own = vec![0u8; 100];
    let start = own.as_mut_ptr();
    assert_eq!(fake.cuMemHostRegister_v2(start, 50, 0), 0);
    assert_eq!(fake.cuMemHostRegister_v2(unsafe { start.add(49) }, 50, 0), 712);
    assert_eq!(fake.cuMemHostRegister_v2(unsafe { start.add(50) }, 50, 0), 0);
    assert_eq!(fake.cuMemHostUnregister(start), 0);
    fake.assert_clean();
    assert_eq!(fake.cuMemHostUnregister(start), 713);
    fake.assert_caught("not the start of a registered range");
    let nowhere = std::ptr::with_exposed_provenance_mut(1 << 44);
    assert_eq!(fake.cuMemHostRegister_v2(nowhere, 4096, 0), INVALID_VALUE);
    fake.assert_caught("not mapped");
    assert_eq!(fake.cuMemFreeHost(unsafe { start.add(50) }), INVALID_VALUE);
    fake.assert_caught("not from cuMemHostAlloc");
}
