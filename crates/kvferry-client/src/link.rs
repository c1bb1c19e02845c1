//! A socket that is through the ZMTP handshake.

use bytes::{Bytes, BytesMut};
use kvferry_core::{Error, ErrorCode, Result};
use kvferry_wire::zmtp::{Config, Connection, Event, SocketType};
use kvferry_wire::{Dialect, MessageError, Reply, Request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::address::Address;

/// Bytes that are read at once.
const READ: usize = 64 << 10;
/// Bytes that may wait for the socket before no more messages are taken.
const WRITE: usize = 256 << 10;

/// An error that names the address, and what to start when nobody is there.
pub(crate) fn unreachable(address: &Address, reason: impl std::fmt::Display) -> Error {
    Error::new(
        ErrorCode::Unreachable,
        format!("no server at {address}: {reason}; start one with `{}`", address.command()),
    )
}

/// One connection.
pub(crate) struct Link {
    address: Address,
    stream: TcpStream,
    zmtp: Connection,
    input: BytesMut,
    output: BytesMut,
    uids: u64,
    /// Whose ids the server knows.
    pub(crate) dialect: Dialect,
}

impl Link {
    /// Connects and shakes hands. Waits as long as the peer lets it.
    pub(crate) async fn open(address: &Address) -> Result<Self> {
        let cannot = |error: std::io::Error| unreachable(address, error);
        let candidates = address.resolve().await.map_err(cannot)?;
        let stream = TcpStream::connect(&*candidates).await.map_err(cannot)?;
        let _ = stream.set_nodelay(true); // without it requests go late, and still go
        let mut output = BytesMut::new();
        let zmtp = Connection::new(Config::null(SocketType::Dealer), &mut output);
        let mut link = Self {
            address: address.clone(),
            stream,
            zmtp,
            input: BytesMut::new(),
            output,
            uids: 0,
            dialect: Dialect::Current,
        };
        loop {
            let event = link.zmtp.receive(&mut link.input, &mut link.output);
            match event.map_err(|error| link.broken(error))? {
                Some(Event::Ready) => return Ok(link),
                Some(_) | None => link.progress().await?,
            }
        }
    }

    /// Sends a request and waits for its reply; for the time before the connection is in use.
    pub(crate) async fn exchange(&mut self, request: &Request) -> Result<Reply> {
        let uid = self.ask(request, self.dialect)?;
        let (_, payload) = self.answer(&[&uid]).await?;
        Reply::decode(request.operation(), &payload).map_err(|error| self.broken(error))
    }

    /// Sends a request, and gives its uid.
    pub(crate) fn ask(&mut self, request: &Request, dialect: Dialect) -> Result<Bytes> {
        let mut frames = request.encode(self.uid(), dialect);
        self.send(&frames)?;
        Ok(frames.swap_remove(0))
    }

    /// Waits for the reply to one of these requests: its uid, and what comes after its header. Replies
    /// to others are dropped. May be dropped and called again.
    pub(crate) async fn answer(&mut self, uids: &[&Bytes]) -> Result<(Bytes, Vec<Bytes>)> {
        loop {
            while let Some(mut reply) = self.next_message()? {
                if reply.len() < 2 {
                    return Err(self.broken(MessageError::TooFewFrames(reply.len())));
                }
                if uids.contains(&&reply[0]) {
                    let payload = reply.split_off(2);
                    return Ok((reply.swap_remove(0), payload));
                }
            }
            self.progress().await?;
        }
    }

    /// A uid that none of the requests so far had.
    pub(crate) fn uid(&mut self) -> u64 {
        self.uids += 1;
        self.uids
    }

    /// A message that has arrived whole.
    pub(crate) fn next_message(&mut self) -> Result<Option<Vec<Bytes>>> {
        loop {
            let event = self.zmtp.receive(&mut self.input, &mut self.output);
            match event.map_err(|error| self.broken(error))? {
                Some(Event::Message(frames)) => return Ok(Some(frames)),
                Some(_) => {}
                None => return Ok(None),
            }
        }
    }

    /// The error of a peer that is no such server, or another version of it.
    pub(crate) fn broken(&self, error: impl std::fmt::Display) -> Error {
        let message = format!("what listens at {} breaks the protocol: {error}", self.address);
        Error::new(ErrorCode::Protocol, message)
    }

    /// Whether more messages should be given to [`Link::send`].
    pub(crate) fn has_room(&self) -> bool {
        self.output.len() < WRITE
    }

    /// Appends a message to what goes out; an error when it is too long.
    pub(crate) fn send(&mut self, frames: &[Bytes]) -> Result<()> {
        let sent = self.zmtp.send(frames, &mut self.output);
        sent.map_err(|error| Error::invalid(format!("the request cannot be sent: {error}")))
    }

    /// Waits until bytes came or went. May be dropped and called again.
    pub(crate) async fn progress(&mut self) -> Result<()> {
        self.input.reserve(READ);
        let (mut reader, mut writer) = self.stream.split();
        let (read, bytes) = tokio::select! {
            read = reader.read_buf(&mut self.input) => (true, read),
            sent = writer.write_buf(&mut self.output), if !self.output.is_empty() => (false, sent),
        };
        match bytes {
            Ok(0) if read => Err(unreachable(&self.address, "it closed the connection")),
            Ok(_) => Ok(()),
            Err(error) => Err(unreachable(&self.address, error)),
        }
    }
}
