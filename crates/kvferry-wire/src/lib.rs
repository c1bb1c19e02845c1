//! ZMTP 3.x and the LMCache protocol, sans-IO: bytes in, values out, limits before allocation.
//!
//! Two layers that know nothing of each other:
//! - [`zmtp::Connection`] turns a byte stream into multipart messages and back;
//! - [`message`] turns the frames of a message into [`Request`]s and [`Reply`]s and back, and
//!   [`Operation`] names them.
//!
//! A server's side of one message:
//!
//! ```
//! use kvferry_wire::{Header, MessageError, Reply, Request};
//!
//! fn answer(frames: &[bytes::Bytes]) -> Result<Vec<bytes::Bytes>, MessageError> {
//!     let (header, payload) = Header::decode(frames)?;
//!     let reply = match Request::decode(header.operation, payload)? {
//!         Request::Ping { .. } => Reply::Boolean(true),
//!         Request::GetChunkSize => Reply::Integer(256),
//!         _ => Reply::None,
//!     };
//!     Ok(header.reply(&reply))
//! }
//! let frames = Request::GetChunkSize.encode(7, Default::default());
//! let reply = answer(&frames).unwrap();
//! let (header, payload) = Header::decode(&reply).unwrap();
//! assert_eq!(header.uid, frames[0]);
//! assert_eq!(Reply::decode(header.operation, payload).unwrap(), Reply::Integer(256));
//! ```

pub mod message;
mod messagepack;
mod operation;
mod output;
pub mod zmtp;

pub use message::{Header, MessageError, Reply, Request, RequestKey};
pub use messagepack::{Malformed, Problem};
pub use operation::{Dialect, Operation};
pub use output::Output;
