//! Errors on their way into JavaScript.

/// An error whose reason is `CODE: message`; `ts/errors.ts` reads it.
pub(crate) fn to_napi(error: kvferry_core::Error) -> napi::Error {
    napi::Error::from_reason(error.to_string())
}
