//! What keeps late writes out of the pool.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use kvferry_core::cache::{Memory, Permit};
use kvferry_core::{Error, ErrorCode, Result};

const CLOSED: usize = 1 << (usize::BITS - 1);
/// Bytes that one pass through the gate writes, so that closing it waits for microseconds.
const PIECE: usize = 64 << 10;
const YIELDS: usize = 1000;
/// Between two looks whether a write that takes long is over.
pub(crate) const LOOK: Duration = Duration::from_millis(1);

/// Open while the connection that granted slots lives. When its socket closes, or an instance is
/// unregistered, the server takes the slots for free and grants them to others: by then the gate is
/// shut, and no write is under way.
#[derive(Debug, Default)]
pub(crate) struct Gate(AtomicUsize);

impl Gate {
    /// Lets no more writes begin, and waits for those that have as long as our own take; `false` when some go on: a
    /// GPU's take as long as the GPU does.
    pub(crate) fn shut(&self) -> bool {
        self.0.fetch_or(CLOSED, Ordering::AcqRel);
        for _ in 0..YIELDS {
            if self.is_quiet() {
                return true;
            }
            thread::yield_now();
        }
        self.is_quiet()
    }

    /// Whether it is shut, and no write is under way.
    pub(crate) fn is_quiet(&self) -> bool {
        self.0.load(Ordering::Acquire) == CLOSED
    }

    fn pass(self: &Arc<Self>) -> Result<Writer> {
        self.0.fetch_add(1, Ordering::AcqRel);
        let writer = Writer(Arc::clone(self));
        if self.0.load(Ordering::Acquire) & CLOSED != 0 {
            return Err(Error::new(
                ErrorCode::Unreachable,
                "the connection ended while state was copied; nothing of it was stored",
            ));
        }
        Ok(writer)
    }
}

struct Writer(Arc<Gate>);

impl Drop for Writer {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A pool whose writes go through a gate. Reads need not: what they see is checked after them.
pub(crate) struct Gated {
    pub(crate) memory: Arc<dyn Memory>,
    pub(crate) gate: Arc<Gate>,
}

impl Memory for Gated {
    fn bytes(&self) -> u64 {
        self.memory.bytes()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        self.memory.read(offset, into)
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        let mut at = offset;
        for piece in from.chunks(PIECE) {
            let _writer = self.gate.pass()?;
            self.memory.write(at, piece)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn is_mapped(&self, offset: u64, bytes: u64) -> bool {
        self.memory.is_mapped(offset, bytes)
    }

    fn map(&self, offset: u64, bytes: u64) -> Result<()> {
        self.memory.map(offset, bytes)
    }

    fn guarded(&self) -> Option<&Arc<dyn Memory>> {
        Some(&self.memory)
    }

    fn permit(&self) -> Result<Permit> {
        self.gate.pass().map(Permit::holding)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Bytes(Mutex<Vec<u8>>);

    impl Memory for Bytes {
        fn bytes(&self) -> u64 {
            u64::MAX
        }

        fn read(&self, _offset: u64, _into: &mut [u8]) -> Result<()> {
            Ok(())
        }

        fn write(&self, _offset: u64, from: &[u8]) -> Result<()> {
            self.0.lock().unwrap().extend_from_slice(from);
            Ok(())
        }
    }

    #[test]
    fn nothing_is_written_after_the_gate_was_shut_however_many_were_writing() {
        let memory = Arc::new(Bytes::default());
        let gate = Arc::new(Gate::default());
        let writers = 4;
        let started = std::sync::Barrier::new(writers + 1);
        thread::scope(|scope| {
            for _ in 0..writers {
                scope.spawn(|| {
                    let gated =
                        Gated { memory: Arc::<Bytes>::clone(&memory), gate: Arc::clone(&gate) };
                    started.wait();
                    while gated.write(0, &[1; 100]).is_ok() {}
                    assert_eq!(gated.write(0, &[1]).unwrap_err().code, ErrorCode::Unreachable);
                });
            }
            started.wait();
            assert!(gate.shut());
            let written = memory.0.lock().unwrap().len();
            thread::yield_now();
            assert_eq!(memory.0.lock().unwrap().len(), written);
            assert!(gate.shut(), "again does nothing");
        });
    }

    #[test]
    fn a_write_that_takes_long_holds_nobody_up_and_is_told() {
        let gate = Arc::new(Gate::default());
        let memory = Gated { memory: Arc::new(Bytes::default()), gate: Arc::clone(&gate) };
        let permit = memory.permit().unwrap();
        assert!(!gate.shut());
        assert!(memory.permit().is_err(), "no more begin");
        assert!(!gate.is_quiet());
        drop(permit);
        assert!(gate.is_quiet() && gate.shut());
    }
}
