use crate::support::*;
use std::ffi::{CStr, c_void};

const PTX: &CStr = c".version 7.0\n.target sm_70\n.address_size 64\n.visible .entry kvferry_copy_pieces(\n.param .u64 a, .param .u32 b, .param .u32 c) { ret; }\n.visible .entry another() { ret; }";
const NAME: &CStr = c"kvferry_copy_pieces";

struct Kernel<'a> {
    fake: &'a Fake,
    module: u64,
    function: u64,
}

impl<'a> Kernel<'a> {
    fn load(fake: &'a Fake) -> Self {
        let (mut module, mut function) = (0, 0);
        assert_eq!(fake.cuModuleLoadData(&mut module, PTX.as_ptr()), 0);
        assert_eq!(fake.cuModuleGetFunction(&mut function, module, NAME.as_ptr()), 0);
        Self { fake, module, function }
    }

    fn launch(&self, table: u64, count: u32, stream: u64) -> u32 {
        let zero = 0u32;
        let parameters = [
            (&raw const table).cast::<c_void>(),
            (&raw const count).cast(),
            (&raw const zero).cast(),
        ];
        let null = std::ptr::null();
        self.fake.cuLaunchKernel(
            self.function,
            4,
            1,
            1,
            128,
            1,
            1,
            0,
            stream,
            parameters.as_ptr(),
            null,
        )
    }
}

/// The records as a pinned table.
fn table(fake: &Fake, records: &[[u64; 3]]) -> u64 {
    let table = fake.pinned(records.len() * 24);
    for (bytes, word) in table.chunks_exact_mut(8).zip(records.iter().flatten()) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    address(table)
}

#[test]
fn images_and_names_are_checked() {
    let fake = Fake::start();
    let (mut module, mut function) = (0, 0);
    assert_eq!(fake.cuModuleLoadData(&mut module, c"int main() {}".as_ptr()), 218);
    fake.assert_caught("no PTX text");
    let kernel = Kernel::load(&fake);
    assert_eq!(
        fake.cuModuleGetFunction(&mut function, kernel.module, c"absent".as_ptr()),
        NOT_FOUND
    );
    fake.assert_clean();
    assert_eq!(fake.cuModuleUnload(kernel.module), 0);
    assert_eq!(fake.cuModuleUnload(kernel.module), INVALID_HANDLE);
    fake.assert_caught("was unloaded");
    assert_eq!(kernel.launch(0, 0, fake.stream()), INVALID_HANDLE);
    fake.assert_caught("unloaded module");
}

#[test]
fn a_kernel_copies_its_pieces_in_stream_order() {
    let fake = Fake::start();
    let kernel = Kernel::load(&fake);
    let (stream, memory, host) = (fake.stream(), fake.alloc(16), fake.pinned(8));
    host.copy_from_slice(b"ABCDEFGH");
    let records = [[memory, address(host) + 4, 4], [memory + 4, memory + 8, 4]];
    let table = table(&fake, &records);
    assert_eq!(fake.cuMemsetD8Async(memory, b'x', 16, stream), 0);
    assert_eq!(kernel.launch(table, 2, stream), 0);
    let mut back = [0; 8];
    assert_eq!(fake.cuMemcpyDtoHAsync_v2(back.as_mut_ptr(), memory, 8, stream), 0);
    assert_eq!(&back, b"EFGHxxxx");
    assert_eq!(fake.cuModuleUnload(kernel.module), 0);
    fake.assert_clean();
}

#[test]
fn a_kernel_s_pieces_race_like_copies() {
    for seed in 0..10 {
        let fake = Fake::start();
        fake.fakeCudaControlSchedule(seed, 300);
        let kernel = Kernel::load(&fake);
        let (stream, other, memory) = (fake.stream(), fake.stream(), fake.alloc(16));
        let table = table(&fake, &[[memory, memory + 8, 8]]);
        assert_eq!(kernel.launch(table, 1, stream), 0);
        assert_eq!(fake.cuMemsetD8Async(memory, 1, 1, other), 0);
        assert_eq!(fake.cuStreamSynchronize(other), 0); // the end of the other is seen first
        assert_eq!(fake.cuStreamSynchronize(stream), 0);
        fake.assert_caught("race");
    }
}

#[test]
fn a_table_is_left_alone_until_the_kernel_has_ended() {
    let fake = Fake::start();
    let kernel = Kernel::load(&fake);
    let (stream, memory) = (fake.stream(), fake.alloc(16));
    let pointer = table(&fake, &[[memory, memory + 8, 8]]);
    let pointer = std::ptr::with_exposed_provenance::<u8>(usize::try_from(pointer).unwrap());
    assert_eq!(kernel.launch(pointer.expose_provenance() as u64, 1, stream), 0);
    assert_eq!(fake.fakeCudaHostAccess(pointer, 24, 1), 1);
    fake.assert_caught("the table of kvferry_copy_pieces");
    assert_eq!(fake.cuModuleUnload(kernel.module), 0);
    fake.assert_caught("unloaded before");
}

#[test]
fn a_wrong_piece_is_an_illegal_address_that_stays() {
    let own = [0u8; 8];
    for (record, words) in [
        ([0, 8, 9], "passes the end"),
        ([0, 100, 1], "in no allocation"),
        ([0, 1 << 52, 1], "pageable"),
    ] {
        let fake = Fake::start();
        let kernel = Kernel::load(&fake);
        let (stream, memory) = (fake.stream(), fake.alloc(16));
        let from = if record[1] == 1 << 52 { address(&own) } else { memory + record[1] };
        let table = table(&fake, &[[memory + record[0], from, record[2]]]);
        assert_eq!(kernel.launch(table, 1, stream), 0);
        assert_eq!(fake.cuStreamSynchronize(stream), ILLEGAL_ADDRESS);
        fake.assert_caught(words);
        assert_eq!(fake.cuMemsetD8Async(memory, 1, 1, stream), ILLEGAL_ADDRESS);
        assert_eq!(fake.cuMemFree_v2(memory), ILLEGAL_ADDRESS);
        assert_eq!(fake.leaks()[2], 0); // freed all the same
        assert_eq!(fake.cuModuleUnload(kernel.module), ILLEGAL_ADDRESS);
        assert_eq!(fake.leaks()[4], 0);
        fake.assert_clean();
    }
}

#[test]
fn pieces_do_not_depend_on_each_other() {
    let fake = Fake::start();
    let kernel = Kernel::load(&fake);
    let (stream, memory) = (fake.stream(), fake.alloc(16));
    let table = table(&fake, &[[memory, memory + 8, 4], [memory + 3, memory + 12, 4]]);
    assert_eq!(kernel.launch(table, 2, stream), 0);
    assert_eq!(fake.cuStreamSynchronize(stream), 0);
    fake.assert_caught("depend on each other");
}
