use crate::support::*;

#[test]
fn nothing_works_before_init() {
    let fake = Fake::load();
    let mut count = 0;
    assert_eq!(fake.cuDeviceGetCount(&mut count), NOT_INITIALIZED);
    fake.assert_caught("before cuInit");
    assert_eq!(fake.cuDriverGetVersion(&mut count), 0);
    assert_eq!(count, 12080);
    assert_eq!(fake.cuInit(1), INVALID_VALUE);
    fake.assert_caught("flags must be 0");
    fake.begin();
    assert_eq!(fake.cuDeviceGetCount(&mut count), 0);
    assert_eq!(count, 1);
    fake.assert_clean();
}

#[test]
fn a_name_is_cut_to_its_room() {
    let fake = Fake::start();
    let mut name = [0xFFu8; 8];
    assert_eq!(fake.cuDeviceGetName(name.as_mut_ptr(), 5, 0), 0);
    assert_eq!(&name, b"Fake\0\xFF\xFF\xFF");
}

#[test]
fn the_current_context_is_a_thread_s_own() {
    let fake = Fake::start();
    let (mut address, mut current) = (0, 0);
    fake.cuCtxGetCurrent(&mut current);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            assert_eq!(fake.cuMemAlloc_v2(&mut address, 16), INVALID_CONTEXT);
            fake.assert_caught("no context is current");
            assert_eq!(fake.cuCtxSetCurrent(current), 0);
            assert_eq!(fake.cuMemAlloc_v2(&mut address, 16), 0);
        });
    });
    fake.assert_clean();
}

#[test]
fn contexts_are_pushed_and_popped() {
    let fake = Fake::load();
    let context = fake.begin();
    let mut top = 1;
    assert_eq!(fake.cuCtxSetCurrent(0), 0);
    assert_eq!(fake.cuCtxGetCurrent(&mut top), 0);
    assert_eq!(top, 0);
    assert_eq!(fake.cuCtxPushCurrent_v2(context), 0);
    assert_eq!(fake.cuCtxPushCurrent_v2(context), 0);
    assert_eq!(fake.cuCtxPopCurrent_v2(&mut top), 0);
    assert_eq!(top, context);
    assert_eq!(fake.cuCtxPopCurrent_v2(&mut top), 0);
    fake.assert_clean();
    assert_eq!(fake.cuCtxPopCurrent_v2(&mut top), INVALID_CONTEXT);
    fake.assert_caught("no context is current");
    assert_eq!(fake.cuCtxPushCurrent_v2(context + 1), INVALID_CONTEXT);
    fake.assert_caught("is no context");
}

#[test]
fn the_primary_context_ends_with_its_last_release() {
    let fake = Fake::load();
    let context = fake.begin();
    let mut again = 0;
    assert_eq!(fake.cuDevicePrimaryCtxRetain(&mut again, 0), 0);
    assert_eq!(again, context);
    assert_eq!(fake.cuDevicePrimaryCtxRelease_v2(0), 0);
    fake.alloc(16);
    fake.assert_clean();
    assert_eq!(fake.cuDevicePrimaryCtxRelease_v2(0), 0);
    fake.assert_caught("0 streams, 0 events, 1 allocations");
    assert_eq!(fake.leaks(), [0; 6]);
    assert_eq!(fake.cuCtxSynchronize(), 709);
    fake.assert_caught("current context was released");
    assert_eq!(fake.cuDevicePrimaryCtxRelease_v2(0), INVALID_CONTEXT);
    fake.assert_caught("more often than retained");
}

#[test]
fn what_belongs_to_one_context_is_refused_in_another() {
    const NAME: &str = "contexts::what_belongs_to_one_context_is_refused_in_another";
    if role().is_none() {
        let output = child(NAME, "child", &[("FAKECUDA_DEVICES", "2")]).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        return;
    }
    let fake = Fake::start();
    let (stream, event, memory) = (fake.stream(), fake.event(), fake.alloc(64));
    let mut other = 0;
    assert_eq!(fake.cuDevicePrimaryCtxRetain(&mut other, 1), 0);
    assert_eq!(fake.cuCtxSetCurrent(other), 0);
    let own = fake.stream();
    assert_eq!(fake.cuMemsetD8Async(memory, 1, 64, stream), INVALID_CONTEXT);
    fake.assert_caught("belongs to another context");
    assert_eq!(fake.cuMemsetD8Async(memory, 1, 64, own), INVALID_CONTEXT);
    fake.assert_caught("memory of another context");
    assert_eq!(fake.cuEventRecord(event, own), INVALID_HANDLE);
    fake.assert_caught("different contexts");
    assert_eq!(fake.cuMemFree_v2(memory), INVALID_CONTEXT);
    fake.assert_caught("another context");
    assert_eq!(fake.cuStreamWaitEvent(own, event, 0), 0);
    assert_eq!(fake.cuEventQuery(event), 0);
    fake.assert_clean();
}
