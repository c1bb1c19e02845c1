//! Modules and kernels. PTX is not run: the name of an entry stands for what the fake does.

use crate::abi::{Handle, In, Out, range};
use crate::clocks::{Access, Clock, Ranges, Stamp};
use crate::copies::{Piece, Source};
use crate::errors::{
    Failure, ILLEGAL_ADDRESS, INVALID_CONTEXT, INVALID_HANDLE, INVALID_PTX, INVALID_VALUE,
    MISALIGNED_ADDRESS, NOT_FOUND, Outcome, wrong,
};
use crate::memory::Place;
use crate::queue::Work;
use crate::state::{State, call};
use std::ffi::c_char;

/// Copies the pieces of a table: parameters are the table's address (u64), the number of its records (u32) and 0
/// (u32); a record is {u64 destination, u64 source, u64 bytes}, each address of the device or of page-locked memory.
const COPY_PIECES: &str = "kvferry_copy_pieces";
const RECORD_BYTES: u64 = 24;

pub(crate) struct Module {
    pub(crate) context: Handle,
    /// Handles of the entries that are known here, by name.
    functions: Vec<(String, Handle)>,
    /// Its last launch.
    launched: Option<Stamp>,
}

/// Driver API, Module Management: `image` may be PTX as a text that ends with NUL. Our reading:
/// `INVALID_PTX` for a text without `.version`, `.target` or an entry.
#[unsafe(no_mangle)]
extern "C" fn cuModuleLoadData(module: Out<Handle>, image: In<c_char>) -> u32 {
    call("cuModuleLoadData", |state| {
        let context = state.current()?;
        module.require()?;
        let text = image.text()?;
        let names: Vec<String> = text.split(".entry").skip(1).map(first_word).collect();
        let is_ptx = text.contains(".version") && text.contains(".target");
        if !is_ptx || names.is_empty() {
            return Err(wrong(INVALID_PTX, "the image is no PTX text with an entry"));
        }
        let known = names.into_iter().filter(|name| name == COPY_PIECES);
        let functions = known.map(|name| (name, state.new_handle())).collect();
        let handle = state.new_handle();
        state.modules.insert(handle, Module { context, functions, launched: None });
        module.set(handle)
    })
}

fn first_word(text: &str) -> String {
    let is_part = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '_' | '$');
    text.trim_start().chars().take_while(is_part).collect()
}

/// Driver API, Module Management: `NOT_FOUND` where no function has the name.
#[unsafe(no_mangle)]
extern "C" fn cuModuleGetFunction(function: Out<Handle>, module: Handle, name: In<c_char>) -> u32 {
    call("cuModuleGetFunction", |state| {
        let name = name.text()?;
        let module = state.module(module)?;
        let found = module.functions.iter().find(|(known, _)| *known == name);
        function.set(found.ok_or(Failure::Code(NOT_FOUND))?.1)
    })
}

/// Driver API, Module Management: the handles of its functions are invalid afterwards. Our reading: no launch may be
/// under way, which none is once the context is broken.
#[unsafe(no_mangle)]
extern "C" fn cuModuleUnload(module: Handle) -> u32 {
    call("cuModuleUnload", |state| {
        let Module { launched, context, .. } = *state.module(module)?;
        let is_over = |stamp| state.clocks.host.knows(stamp) || state.broken(context).is_some();
        if launched.is_some_and(|stamp| !is_over(stamp)) {
            state.report("a module is unloaded before the host has seen the end of its kernels");
        }
        state.modules.remove(&module);
        Ok(())
    })
}

/// Driver API, Execution Control: parameters through `kernelParams`, each a pointer to a value that is copied during
/// the call; `extra` is not modelled. The function's module must be loaded, and in the current context. The grid
/// changes nothing here, but must have no dimension of 0, and a block at most 1024 threads.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "the driver's signature")]
extern "C" fn cuLaunchKernel(
    function: Handle,
    grid_x: u32,
    grid_y: u32,
    grid_z: u32,
    block_x: u32,
    block_y: u32,
    block_z: u32,
    _shared_bytes: u32,
    stream: Handle,
    parameters: In<In<u8>>,
    extra: In<u8>,
) -> u32 {
    call("cuLaunchKernel", |state| {
        let stream = state.stream(stream)?;
        let context = state.current()?;
        let mut modules = state.modules.iter();
        let owner = modules.find(|(_, m)| m.functions.iter().any(|&(_, known)| known == function));
        let Some((&owner, module)) = owner else {
            return Err(wrong(INVALID_HANDLE, "no function, or one of an unloaded module"));
        };
        if module.context != context {
            return Err(wrong(INVALID_CONTEXT, "the function belongs to another context"));
        }
        let dimensions = [grid_x, grid_y, grid_z, block_x, block_y, block_z];
        let threads = [block_x, block_y, block_z].into_iter().map(u64::from).product::<u64>();
        if dimensions.contains(&0) || threads > 1024 || grid_y > 65535 || grid_z > 65535 {
            return Err(wrong(INVALID_VALUE, &format!("grid and block are {dimensions:?}")));
        }
        if !extra.is_null() {
            return Err(wrong(INVALID_VALUE, "`extra` is not modelled"));
        }
        let parameters = parameters.slice(3)?;
        let table = number(parameters[0].slice(8)?);
        let count = number(parameters[1].slice(4)?);
        if number(parameters[2].slice(4)?) != 0 {
            return Err(wrong(INVALID_VALUE, "the reserved parameter must be 0"));
        }
        let bytes = count * RECORD_BYTES;
        let place = state.place(table, bytes, context, false)?;
        let turn = state.turn(stream);
        if let Some(module) = state.modules.get_mut(&owner) {
            module.launched = Some(turn.stamp);
        }
        let (stamp, clock) = (turn.stamp, turn.clock.clone());
        let reads = Ranges::union(place.watched(bytes).into_iter().collect()).0;
        let what = format!("the table of {COPY_PIECES} in stream {stream:#x}");
        state.access(Access { stamp, clock, reads, writes: Ranges::default(), what });
        state.clocks.begin_kernel();
        state.enqueue(turn, Work::Kernel { table: place, count });
        Ok(())
    })
}

/// A little-endian number.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

impl State {
    fn module(&self, handle: Handle) -> Outcome<&Module> {
        let current = self.current()?;
        let Some(module) = self.modules.get(&handle) else {
            return Err(wrong(
                INVALID_HANDLE,
                &format!("{handle:#x} is no module, or was unloaded"),
            ));
        };
        if module.context != current {
            return Err(wrong(INVALID_CONTEXT, "the module belongs to another context"));
        }
        Ok(module)
    }

    /// The copies of a table, as it is now. Guide, Kernels: threads run in no order, so pieces that depend on each other
    /// race. Our reading: an address that is not the device's or page-locked is an illegal one.
    pub(crate) fn run_kernel(
        &mut self,
        table: Place,
        count: u64,
        context: Handle,
        stamp: Stamp,
        clock: Clock,
    ) -> Outcome {
        if count == 0 {
            return Ok(());
        }
        if !table.address().is_multiple_of(8) {
            return Err(wrong(MISALIGNED_ADDRESS, "the table is not at a multiple of 8"));
        }
        if matches!(table, Place::Pageable(_)) {
            return Err(wrong(ILLEGAL_ADDRESS, "the table lies in pageable memory"));
        }
        let Source::Staged(records) = self.stage(table, count * RECORD_BYTES, context)? else {
            return Ok(());
        };
        let mut pieces = Vec::new();
        let (mut reads, mut writes) = (Vec::new(), Vec::new());
        for record in records.chunks_exact(24) {
            let [to, from, bytes] = [0, 8, 16].map(|at| number(&record[at..at + 8]));
            range(to, bytes)?;
            let to = self.place(to, bytes, context, true)?;
            let from = self.place(from, bytes, context, false)?;
            if matches!(to, Place::Pageable(_)) || matches!(from, Place::Pageable(_)) {
                return Err(wrong(
                    ILLEGAL_ADDRESS,
                    &format!("a kernel reaches for pageable memory: {record:x?}"),
                ));
            }
            writes.extend(to.watched(bytes));
            reads.extend(from.watched(bytes));
            pieces.push(Piece { to, from: Source::At(from), bytes });
        }
        let (reads, (writes, twice)) = (Ranges::union(reads).0, Ranges::union(writes));
        if let Some((from, to)) = twice.or_else(|| writes.common(&reads)) {
            self.report(&format!(
                "pieces of one kernel depend on each other at {from:#x}..{to:#x}"
            ));
        }
        self.access(Access { stamp, clock, reads, writes, what: COPY_PIECES.into() });
        pieces.iter().try_for_each(|piece| self.copy_piece(piece, context))
    }
}
