//! What crosses the C interface. Handles are numbers that no memory lies at.

use crate::errors::{Failure, INVALID_VALUE, Outcome, wrong};
use std::ffi::{CStr, c_char};

/// A stream, event, context, module or function; 0 is null.
pub(crate) type Handle = u64;

/// A pointer that a result is written through.
#[repr(transparent)]
pub(crate) struct Out<T>(*mut T);

impl<T> Out<T> {
    pub(crate) fn set(&self, value: T) -> Outcome {
        self.require()?;
        // SAFETY: not null; the C interface asks the caller for memory that a T fits into.
        unsafe { self.0.write(value) };
        Ok(())
    }

    /// Refuses null, before anything is made that could not be told.
    pub(crate) fn require(&self) -> Outcome {
        if self.0.is_null() {
            return Err(wrong(INVALID_VALUE, "the pointer for the result is null"));
        }
        Ok(())
    }

    /// What is there before, for a pointer that is read through too.
    pub(crate) fn get(&self) -> Outcome<T>
    where
        T: Copy,
    {
        self.require()?;
        // SAFETY: not null; the C interface asks the caller for a value that is there.
        Ok(unsafe { self.0.read() })
    }

    pub(crate) fn set_unless_null(&self, value: T) {
        if !self.0.is_null() {
            // SAFETY: not null; the C interface asks the caller for memory that a T fits into.
            unsafe { self.0.write(value) };
        }
    }

    /// Writes `values` one behind the other, from this pointer on.
    pub(crate) fn set_all(&self, values: &[T]) -> Outcome
    where
        T: Copy,
    {
        self.require()?;
        // SAFETY: not null; the caller says, as the C interface has it, that so many fit.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.0, values.len()) };
        Ok(())
    }
}

/// A pointer that arguments are read through during the call.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct In<T>(*const T);

impl<T: Copy> In<T> {
    pub(crate) fn slice(&self, count: usize) -> Outcome<&[T]> {
        if self.is_null() {
            return Err(wrong(INVALID_VALUE, "an array that is read is null"));
        }
        // SAFETY: not null; the C interface asks the caller for `count` values that stay during the call.
        Ok(unsafe { std::slice::from_raw_parts(self.0, count) })
    }

    pub(crate) fn is_null(&self) -> bool {
        self.0.is_null()
    }
}

impl In<c_char> {
    /// The text up to its NUL; what is not UTF-8 is replaced.
    pub(crate) fn text(&self) -> Outcome<String> {
        if self.is_null() {
            return Err(wrong(INVALID_VALUE, "a text that is read is null"));
        }
        // SAFETY: not null; the C interface asks the caller for a text that ends with NUL.
        Ok(unsafe { CStr::from_ptr(self.0) }.to_string_lossy().into_owned())
    }
}

/// `CUmemcpyAttributes` (Driver API, Data types).
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct MemcpyAttributes {
    pub(crate) source_access_order: u32,
    pub(crate) source_location: MemLocation,
    pub(crate) destination_location: MemLocation,
    pub(crate) flags: u32,
}

/// `CUmemLocation` (Driver API, Data types).
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct MemLocation {
    pub(crate) kind: u32,
    pub(crate) id: i32,
}

/// `CUipcMemHandle` (Driver API, Data types).
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct IpcHandle(pub(crate) [u8; 64]);

/// A length as the bytes of an address range.
pub(crate) fn bytes_of(count: usize) -> u64 {
    count as u64
}

/// An address or a length that fits this machine.
pub(crate) fn size_of(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// `address..address + bytes`, or an error where that passes the end of addresses.
pub(crate) fn range(address: u64, bytes: u64) -> Result<(u64, u64), Failure> {
    let end = address.checked_add(bytes);
    end.map(|end| (address, end))
        .ok_or_else(|| wrong(INVALID_VALUE, &format!("{bytes} bytes at {address:#x} overflow")))
}
