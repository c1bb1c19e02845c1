//! One error type for every crate: a code that programs match on, and a message that names the
//! value and the remedy.

use std::fmt;

/// What went wrong. The set is closed; `ts/errors.ts` documents each code for users.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorCode {
    /// An argument is out of its range or of the wrong type. The same call fails again.
    InvalidArgument,
    /// A token id is not an integer, or out of range; the message names its position.
    InvalidToken,
    /// A salt holds a forbidden character or is too long.
    InvalidSalt,
    /// An engine's state file does not follow its grammar.
    InvalidState,
    /// The model cannot be cached (sliding window, recurrent state); the message names the reason.
    UnsupportedModel,
    /// A part of the cache's identity could not be read from the engine and was not passed in.
    IdentityUnknown,
    /// The platform lacks what the call needs, or the addon's binary is missing.
    UnsupportedPlatform,
    /// An option that this version does not offer.
    UnsupportedOption,
    /// The handle was closed.
    Closed,
    /// The caller's signal aborted the call.
    Aborted,
    /// The deadline passed.
    Timeout,
    /// No server answers at the address.
    Unreachable,
    /// The server wants a token, or another one.
    Unauthorized,
    /// The peer broke the protocol, or speaks another version.
    Protocol,
    /// The address is already in use.
    AddressInUse,
    /// Another live server owns the shared-memory pool of this name.
    PoolInUse,
    /// Another live process has the disk tier's directory.
    DiskInUse,
    /// Shared memory cannot hold the pool; the message has both sizes.
    PoolTooLarge,
    /// There is no usable CUDA driver, device or symbol; the message says which, and the remedy.
    CudaUnavailable,
    /// A call of the CUDA driver failed; the message names it, CUDA's error and what it means.
    CudaFailed,
    /// The operating system refused; the message has its reason.
    System,
    /// A bug in kvferry.
    Internal,
}

impl ErrorCode {
    /// The name that crosses into JavaScript as `error.code`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InvalidArgument => "INVALID_ARGUMENT",
            Self::InvalidToken => "INVALID_TOKEN",
            Self::InvalidSalt => "INVALID_SALT",
            Self::InvalidState => "INVALID_STATE",
            Self::UnsupportedModel => "UNSUPPORTED_MODEL",
            Self::IdentityUnknown => "IDENTITY_UNKNOWN",
            Self::UnsupportedPlatform => "UNSUPPORTED_PLATFORM",
            Self::UnsupportedOption => "UNSUPPORTED_OPTION",
            Self::Closed => "CLOSED",
            Self::Aborted => "ABORTED",
            Self::Timeout => "TIMEOUT",
            Self::Unreachable => "UNREACHABLE",
            Self::Unauthorized => "UNAUTHORIZED",
            Self::Protocol => "PROTOCOL",
            Self::AddressInUse => "ADDRESS_IN_USE",
            Self::PoolInUse => "POOL_IN_USE",
            Self::DiskInUse => "DISK_IN_USE",
            Self::PoolTooLarge => "POOL_TOO_LARGE",
            Self::CudaUnavailable => "CUDA_UNAVAILABLE",
            Self::CudaFailed => "CUDA_FAILED",
            Self::System => "SYSTEM",
            Self::Internal => "INTERNAL",
        }
    }
}

/// An [`ErrorCode`] and the message for a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// What went wrong.
    pub code: ErrorCode,
    /// The value that was refused and what to do about it, in one or two sentences.
    pub message: String,
}

/// The result of everything that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `code` that tells `message`.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// [`ErrorCode::InvalidArgument`].
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidArgument, message)
    }

    /// [`ErrorCode::System`]: what was being done, and the system's reason.
    pub fn system(doing: impl fmt::Display, reason: &std::io::Error) -> Self {
        Self::new(ErrorCode::System, format!("{doing}: {reason}"))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.as_str(), self.message)
    }
}

impl std::error::Error for Error {}
