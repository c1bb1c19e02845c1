//! Copies and fills.

use crate::abi::{Handle, In, MemcpyAttributes, Out, bytes_of, size_of};
use crate::clocks::{Access, Ranges, early_reader};
use crate::errors::{Failure, INVALID_VALUE, NOT_FOUND, Outcome, wrong};
use crate::memory::{DEVICE_BASE, Place};
use crate::queue::{Op, Turn, Work};
use crate::state::{State, Wait, call, waiting_call};

/// One contiguous copy.
pub(crate) struct Piece {
    pub(crate) to: Place,
    pub(crate) from: Source,
    pub(crate) bytes: u64,
}

pub(crate) enum Source {
    At(Place),
    /// Read while the call ran.
    Staged(Box<[u8]>),
}

impl State {
    /// Does an operation whose turn has come. Memory is looked up only now; what is gone is an illegal address.
    pub(crate) fn execute(&mut self, stream: Handle, op: Op) {
        let context = self.streams.get(&stream).map_or(0, |stream| stream.context);
        let done = match op.work {
            Work::Mark(mark) => {
                if let Some(mark) = mark {
                    self.event_reached(&mark, op.id);
                }
                Ok(())
            }
            Work::Copies(pieces) => {
                pieces.iter().try_for_each(|piece| self.copy_piece(piece, context))
            }
            Work::Fill { to, value, bytes } => self.fill(to, value, bytes, context),
            Work::Kernel { table, count } => {
                let done = self.run_kernel(table, count, context, op.stamp, op.clock);
                self.clocks.end_kernel();
                done
            }
            Work::HostFunction { .. } => Ok(()),
        };
        if let Err(Failure::Wrong(code, message)) = done {
            let code = if code == INVALID_VALUE { crate::errors::ILLEGAL_ADDRESS } else { code };
            self.report(&format!(
                "an operation in stream {stream:#x}, when its turn came: {message} ({})",
                crate::errors::name(code)
            ));
            self.break_context(context, code);
        }
    }

    pub(crate) fn copy_piece(&self, piece: &Piece, context: Handle) -> Outcome {
        let to = self.pointer(piece.to, piece.bytes, context, true)?;
        let from = match &piece.from {
            Source::At(place) => self.pointer(*place, piece.bytes, context, false)?.cast_const(),
            Source::Staged(bytes) => bytes.as_ptr(),
        };
        // SAFETY: both were just found to be `bytes` long; memory that nobody registered is the caller's word.
        unsafe { std::ptr::copy(from, to, size_of(piece.bytes)) };
        Ok(())
    }

    fn fill(&self, to: Place, value: u8, bytes: u64, context: Handle) -> Outcome {
        let to = self.pointer(to, bytes, context, true)?;
        // SAFETY: it was just found to be `bytes` long.
        unsafe { std::ptr::write_bytes(to, value, size_of(bytes)) };
        Ok(())
    }

    /// Reads what is at a place now.
    pub(crate) fn stage(&self, place: Place, bytes: u64, context: Handle) -> Outcome<Source> {
        let from = self.pointer(place, bytes, context, false)?;
        // SAFETY: it was just found to be `bytes` long; memory that nobody registered is the caller's word.
        let now = unsafe { std::slice::from_raw_parts(from, size_of(bytes)) };
        Ok(Source::Staged(now.into()))
    }

    /// Asks for one copy in stream order. Driver API, API synchronization behavior, Memcpy,
    /// Asynchronous: with pageable memory "the function might be synchronous with respect to host", between host and
    /// host it is. Our reading, as older editions of that page have it: pageable to device is staged before the call
    /// returns; device to pageable returns only once done.
    fn copy(
        &mut self,
        name: &str,
        stream: Handle,
        (to, from): (Place, Place),
        bytes: u64,
    ) -> Outcome<Option<Wait>> {
        if bytes == 0 {
            return Ok(None);
        }
        let context = self.current()?;
        let to_host = !matches!(to, Place::Device(_));
        let from_host = !matches!(from, Place::Device(_));
        let waits = matches!(to, Place::Pageable(_)) || (to_host && from_host);
        let source = match from {
            Place::Pageable(_) => self.stage(from, bytes, context)?,
            _ => Source::At(from),
        };
        let turn = self.turn(stream);
        self.enter_access(name, &turn, from.watched(bytes), to.watched(bytes));
        let wait = waits.then(|| turn.clock.clone());
        let op = self.enqueue(turn, Work::Copies(vec![Piece { to, from: source, bytes }]));
        Ok(wait.map(|clock| Wait { context, ops: vec![op], clock, elsewhere: None }))
    }

    fn enter_access(
        &mut self,
        name: &str,
        turn: &Turn,
        read: Option<(u64, u64)>,
        write: Option<(u64, u64)>,
    ) {
        let reads = Ranges::union(read.into_iter().collect()).0;
        let writes = Ranges::union(write.into_iter().collect()).0;
        let what = format!("{name} in stream {:#x}", turn.stream);
        let (stamp, clock) = (turn.stamp, turn.clock.clone());
        self.access(Access { stamp, clock, reads, writes, what });
    }

    fn device_place(&self, address: u64, bytes: usize, write: bool) -> Outcome<Place> {
        if address < DEVICE_BASE {
            return Err(wrong(INVALID_VALUE, &format!("{address:#x} is no device address")));
        }
        self.place(address, bytes_of(bytes), self.current()?, write)
    }

    fn host_place(&self, address: u64, bytes: usize, write: bool) -> Outcome<Place> {
        if address >= DEVICE_BASE {
            return Err(wrong(INVALID_VALUE, &format!("{address:#x} is no host address")));
        }
        self.place(address, bytes_of(bytes), self.current()?, write)
    }
}

/// Driver API, Memory Management: in stream order. The host must leave page-locked memory alone until it has seen the end.
#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle) -> u32 {
    const NAME: &str = "cuMemcpyHtoDAsync_v2";
    waiting_call(NAME, |state| {
        let stream = state.stream(stream)?;
        let places = (state.device_place(to, bytes, true)?, state.host_place(from, bytes, false)?);
        state.copy(NAME, stream, places, bytes_of(bytes))
    })
}

/// As cuMemcpyHtoDAsync, the other way.
#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoHAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle) -> u32 {
    const NAME: &str = "cuMemcpyDtoHAsync_v2";
    waiting_call(NAME, |state| {
        let stream = state.stream(stream)?;
        let places = (state.host_place(to, bytes, true)?, state.device_place(from, bytes, false)?);
        state.copy(NAME, stream, places, bytes_of(bytes))
    })
}

/// Driver API, Memory Management. Both must be memory of the current context.
#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle) -> u32 {
    const NAME: &str = "cuMemcpyDtoDAsync_v2";
    waiting_call(NAME, |state| {
        let stream = state.stream(stream)?;
        let places =
            (state.device_place(to, bytes, true)?, state.device_place(from, bytes, false)?);
        state.copy(NAME, stream, places, bytes_of(bytes))
    })
}

/// Driver API, Memory Management: the pointers tell the type of the transfer.
#[unsafe(no_mangle)]
extern "C" fn cuMemcpyAsync(to: u64, from: u64, bytes: usize, stream: Handle) -> u32 {
    const NAME: &str = "cuMemcpyAsync";
    waiting_call(NAME, |state| {
        let (stream, context) = (state.stream(stream)?, state.current()?);
        let length = bytes_of(bytes);
        let places =
            (state.place(to, length, context, true)?, state.place(from, length, context, false)?);
        state.copy(NAME, stream, places, length)
    })
}

/// Driver API, API synchronization behavior, Memcpy, Synchronous: in the legacy default stream; from page-locked memory
/// "the function is synchronous with respect to the host"; from pageable memory it returns once that was staged, "but the
/// DMA to final destination may not have completed".
#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoD_v2(to: u64, from: u64, bytes: usize) -> u32 {
    const NAME: &str = "cuMemcpyHtoD_v2";
    waiting_call(NAME, |state| {
        let places = (state.device_place(to, bytes, true)?, state.host_place(from, bytes, false)?);
        let stream = state.stream(0)?;
        let staged = matches!(places.1, Place::Pageable(_));
        let _ = state.copy(NAME, stream, places, bytes_of(bytes))?;
        Ok((!staged && bytes > 0).then(|| state.wait_for_stream(stream)))
    })
}

/// The same page: "the function returns only once the copy has completed".
#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoH_v2(to: u64, from: u64, bytes: usize) -> u32 {
    const NAME: &str = "cuMemcpyDtoH_v2";
    waiting_call(NAME, |state| {
        let places = (state.host_place(to, bytes, true)?, state.device_place(from, bytes, false)?);
        let stream = state.stream(0)?;
        let _ = state.copy(NAME, stream, places, bytes_of(bytes))?;
        Ok((bytes > 0).then(|| state.wait_for_stream(stream)))
    })
}

fn memset(
    name: &str,
    state: &mut State,
    to: u64,
    value: u8,
    bytes: usize,
    stream: Handle,
) -> Outcome {
    let stream = state.stream(stream)?;
    let place = state.device_place(to, bytes, true)?;
    let bytes = bytes_of(bytes);
    if bytes > 0 {
        let turn = state.turn(stream);
        state.enter_access(name, &turn, None, place.watched(bytes));
        state.enqueue(turn, Work::Fill { to: place, value, bytes });
    }
    Ok(())
}

/// Driver API, API synchronization behavior, Memset: in the legacy default stream and "asynchronous with respect to the
/// host except when the target is pinned host memory", which is not modelled.
#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8_v2(to: u64, value: u8, bytes: usize) -> u32 {
    const NAME: &str = "cuMemsetD8_v2";
    call(NAME, |state| memset(NAME, state, to, value, bytes, 0))
}

/// The same page: "always asynchronous with respect to the host".
#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8Async(to: u64, value: u8, bytes: usize, stream: Handle) -> u32 {
    const NAME: &str = "cuMemsetD8Async";
    call(NAME, |state| memset(NAME, state, to, value, bytes, stream))
}

/// `CUmemcpySrcAccessOrder`.
#[derive(Clone, Copy, PartialEq)]
enum SourceOrder {
    Stream,
    DuringCall,
    Any,
}

/// The arguments that both forms of the batch share.
struct Batch {
    to: In<u64>,
    from: In<u64>,
    sizes: In<usize>,
    count: usize,
    attributes: In<MemcpyAttributes>,
    starts: In<usize>,
    kinds: usize,
}

impl Batch {
    /// The source order of each copy. Driver API, cuMemcpyBatchAsync: an entry of attrs applies from the copy that attrsIdxs
    /// names for it; "the first entry in attrsIdxs must always be 0. Also, each entry must be greater than the previous entry and the last
    /// entry should be less than count. Furthermore, numAttrs must be lesser than or equal to count".
    fn orders(&self) -> Outcome<Vec<SourceOrder>> {
        let bad = |message: &str| Err(wrong(INVALID_VALUE, message));
        if self.count == 0 || self.kinds == 0 || self.kinds > self.count {
            return bad("count and numAttrs must be at least 1, and numAttrs at most count");
        }
        let (starts, attributes) =
            (self.starts.slice(self.kinds)?, self.attributes.slice(self.kinds)?);
        let rising = starts.windows(2).all(|pair| pair[0] < pair[1]);
        if starts[0] != 0 || !rising || starts[self.kinds - 1] >= self.count {
            return bad("attrsIdxs must begin with 0, rise, and stay below count");
        }
        let mut orders = Vec::with_capacity(self.count);
        for (kind, attribute) in attributes.iter().enumerate() {
            let order = match attribute.source_access_order {
                1 => SourceOrder::Stream,
                2 => SourceOrder::DuringCall,
                3 => SourceOrder::Any,
                other => return bad(&format!("there is no source access order {other}")),
            };
            let hints = [attribute.source_location, attribute.destination_location];
            if attribute.flags > 1 || hints.iter().any(|hint| hint.kind > 4) {
                return bad("unknown flags or location hints");
            }
            let end = starts.get(kind + 1).copied().unwrap_or(self.count);
            orders.resize(end, order);
        }
        Ok(orders)
    }
}

impl State {
    /// Driver API, cuMemcpyBatchAsync: "The batch as a whole executes in stream order but copies within a batch are not
    /// guaranteed to execute in any specific order"; "specifying any dependent copies within a batch will result in
    /// undefined behavior". Not in the legacy default stream ("Must not be legacy NULL stream"; our reading:
    /// nor the per-thread one).
    ///
    /// Source access order STREAM: "the source will be accessed in stream order". DURING_API_CALL: "can be
    /// out of stream order and all accesses must be complete before the API call returns". ANY: "can be out of stream
    /// order and the accesses can happen even after the API call returns": meant for sources of which "it's known that no
    /// prior operations in the stream can be accessing the memory". So ANY reads device memory at once here, before
    /// the work that the stream has yet to do, and host memory at once or later, as the seed has it; in the clocks
    /// it is a reader that knows only what the host knew.
    ///
    /// Our reading of pageable memory: a source is staged under DURING_API_CALL and ANY; in stream order it is
    /// refused, and so is a pageable destination.
    fn batch(&mut self, name: &str, batch: &Batch, stream: Handle, failed: &mut usize) -> Outcome {
        if stream <= 2 {
            return Err(wrong(INVALID_VALUE, "a batch cannot go into a default stream"));
        }
        let (stream, context) = (self.stream(stream)?, self.current()?);
        let orders = batch.orders()?;
        let (to, from) = (batch.to.slice(batch.count)?, batch.from.slice(batch.count)?);
        let sizes = batch.sizes.slice(batch.count)?;
        let mut pieces = Vec::with_capacity(batch.count);
        let (mut reads, mut writes) = (Vec::new(), Vec::new());
        let (mut early, mut during) = (Vec::new(), Vec::new());
        for (i, &order) in orders.iter().enumerate() {
            *failed = i;
            let bytes = bytes_of(sizes[i]);
            if bytes == 0 {
                return Err(wrong(INVALID_VALUE, &format!("copy {i} of the batch has 0 bytes")));
            }
            let target = self.place(to[i], bytes, context, true)?;
            let source = self.place(from[i], bytes, context, false)?;
            if matches!(target, Place::Pageable(_)) {
                return Err(wrong(INVALID_VALUE, &format!("{:#x} is pageable", to[i])));
            }
            let is_pageable = matches!(source, Place::Pageable(_));
            if is_pageable && order == SourceOrder::Stream {
                return Err(wrong(
                    INVALID_VALUE,
                    &format!("{:#x} is pageable, and cannot be read in stream order", from[i]),
                ));
            }
            let at_once = match order {
                SourceOrder::Stream => false,
                SourceOrder::DuringCall => true,
                SourceOrder::Any => {
                    !matches!(source, Place::Pinned(_)) || self.queue.random().is_multiple_of(2)
                }
            };
            let list = match order {
                SourceOrder::Stream => &mut reads,
                SourceOrder::DuringCall => &mut during,
                SourceOrder::Any => &mut early,
            };
            list.extend(source.watched(bytes));
            writes.extend(target.watched(bytes));
            let source =
                if at_once { self.stage(source, bytes, context)? } else { Source::At(source) };
            pieces.push(Piece { to: target, from: source, bytes });
        }
        *failed = usize::MAX;
        self.enter_batch(name, stream, [reads, during, early], writes, pieces);
        Ok(())
    }

    fn enter_batch(
        &mut self,
        name: &str,
        stream: Handle,
        [reads, during, early]: [Vec<(u64, u64)>; 3],
        writes: Vec<(u64, u64)>,
        mut pieces: Vec<Piece>,
    ) {
        let all: Vec<_> = [&reads, &during, &early].into_iter().flatten().copied().collect();
        let (writes, twice) = Ranges::union(writes);
        let dependent = twice.or_else(|| writes.common(&Ranges::union(all).0));
        if let Some((from, to)) = dependent {
            self.report(&format!(
                "{name}: copies of one batch depend on each other at {from:#x}..{to:#x}"
            ));
        }
        if !during.is_empty() {
            self.host_access(during, Vec::new());
        }
        if !early.is_empty() {
            let mut clock = self.clocks.host.clone();
            // As other early reads of this stream are: reads do not race with reads.
            let reader = early_reader(stream);
            if let Some(stream) = self.streams.get(&stream) {
                clock.join(&stream.early);
            }
            let stamp = clock.tick(reader);
            if let Some(stream) = self.streams.get_mut(&stream) {
                stream.early = clock.clone();
                stream.clock.join(&clock);
            }
            let what = format!("{name} in stream {stream:#x}, reading in ANY order");
            let (reads, writes) = (Ranges::union(early).0, Ranges::default());
            self.access(Access { stamp, clock, reads, writes, what });
        }
        let turn = self.turn(stream);
        let what = format!("{name} in stream {stream:#x}");
        let (stamp, clock) = (turn.stamp, turn.clock.clone());
        self.access(Access { stamp, clock, reads: Ranges::union(reads).0, writes, what });
        let first = size_of(self.queue.random() % bytes_of(pieces.len()));
        pieces.rotate_left(first);
        self.enqueue(turn, Work::Copies(pieces));
    }
}

/// Driver API of CUDA 12.8 and 12.9, Memory Management. `failIdx`: "the index of the copy where a failure was encountered. The
/// value will be SIZE_MAX if the error doesn't pertain to any specific copy".
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "the driver's signature")]
extern "C" fn cuMemcpyBatchAsync(
    to: In<u64>,
    from: In<u64>,
    sizes: In<usize>,
    count: usize,
    attributes: In<MemcpyAttributes>,
    starts: In<usize>,
    kinds: usize,
    fail: Out<usize>,
    stream: Handle,
) -> u32 {
    const NAME: &str = "cuMemcpyBatchAsync";
    call(NAME, |state| {
        state.require_version(12080)?;
        fail.require()?;
        let batch = Batch { to, from, sizes, count, attributes, starts, kinds };
        let mut failed = usize::MAX;
        let done = state.batch(NAME, &batch, stream, &mut failed);
        fail.set(failed)?;
        done
    })
}

/// Driver API of CUDA 13, Memory Management: the same without `failIdx`.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "the driver's signature")]
extern "C" fn cuMemcpyBatchAsync_v2(
    to: In<u64>,
    from: In<u64>,
    sizes: In<usize>,
    count: usize,
    attributes: In<MemcpyAttributes>,
    starts: In<usize>,
    kinds: usize,
    stream: Handle,
) -> u32 {
    const NAME: &str = "cuMemcpyBatchAsync_v2";
    call(NAME, |state| {
        state.require_version(13000)?;
        let batch = Batch { to, from, sizes, count, attributes, starts, kinds };
        state.batch(NAME, &batch, stream, &mut 0)
    })
}

impl State {
    /// A real driver of an older version does not have the symbol.
    fn require_version(&self, version: i32) -> Outcome {
        if self.config.version >= version {
            return Ok(());
        }
        Err(wrong(
            NOT_FOUND,
            &format!("a driver of version {} has no such function", self.config.version),
        ))
    }
}
