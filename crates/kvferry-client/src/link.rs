//! A socket that is through the ZMTP handshake.

#[cfg(unix)]
use std::os::fd::AsFd;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use kvferry_core::{Error, ErrorCode, Result};
use kvferry_wire::zmtp::{Config, Connection, Event, Mechanism, SocketType, ZmtpError};
use kvferry_wire::{Dialect, MessageError, Output, Reply, Request};
#[cfg(unix)]
use tokio::io::Interest;
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
#[cfg(unix)]
use tokio::net::UnixStream;

use crate::address::{Address, Place};
use crate::frames::Landing;

/// Bytes that are read at once.
const READ: usize = 64 << 10;
/// The same while a long frame arrives.
const READ_MAX: usize = 512 << 10;
/// The same after a piece that went to its place: the next one's begin, of which little shall have to be copied there.
const BEGIN: usize = 4 << 10;
/// Bytes that may wait for the socket before no more messages are taken.
const WRITE: usize = 256 << 10;

/// An error that names the address, and what to start when nobody is there.
pub(crate) fn unreachable(address: &Address, reason: impl std::fmt::Display) -> Error {
    Error::new(
        ErrorCode::Unreachable,
        format!("no server at {address}: {reason}; start one with `{}`", address.command()),
    )
}

/// A connected socket.
enum Stream {
    Tcp(TcpStream),
    #[cfg(unix)]
    Ipc(UnixStream),
}

impl Stream {
    async fn connect(place: &Place) -> std::io::Result<Self> {
        match place {
            Place::Tcp { host, port } => {
                let candidates = Address::resolve(host, *port).await?;
                let stream = TcpStream::connect(&*candidates).await?;
                let _ = stream.set_nodelay(true); // without it requests go late, and still go
                Ok(Self::Tcp(stream))
            }
            #[cfg(unix)]
            Place::Ipc(path) => UnixStream::connect(path).await.map(Self::Ipc),
            #[cfg(not(unix))]
            Place::Ipc(_) => Err(std::io::ErrorKind::Unsupported.into()),
        }
    }
}

/// One connection.
pub(crate) struct Link {
    address: Address,
    stream: Stream,
    zmtp: Connection,
    input: BytesMut,
    /// A piece that goes to its place; `input` is empty then.
    landing: Option<Landing>,
    /// Bytes that are read next.
    read_next: usize,
    output: Output,
    uids: u64,
    /// Whose ids the server knows.
    pub(crate) dialect: Dialect,
}

impl Link {
    /// Connects and shakes hands. Waits as long as the peer lets it.
    pub(crate) async fn open(address: &Address) -> Result<Self> {
        let cannot = |error: std::io::Error| unreachable(address, error);
        let stream = Stream::connect(&address.place).await.map_err(cannot)?;
        let mut output = Output::default();
        let mechanism = match &address.token {
            Some(token) => Mechanism::PlainClient(token.credentials()),
            None => Mechanism::Null,
        };
        let zmtp = Connection::new(Config::new(SocketType::Dealer, mechanism), output.tail());
        let mut link = Self {
            address: address.clone(),
            stream,
            zmtp,
            input: BytesMut::new(),
            landing: None,
            read_next: READ,
            output,
            uids: 0,
            dialect: Dialect::Current,
        };
        loop {
            let event = link.zmtp.receive(&mut link.input, link.output.tail());
            match event.map_err(|error| link.not_let_in(error))? {
                Some(Event::Ready) => return Ok(link),
                Some(_) | None => link.progress().await?,
            }
        }
    }

    /// The error of a handshake that failed.
    fn not_let_in(&self, error: ZmtpError) -> Error {
        let Address { token, .. } = &self.address;
        let at = &self.address;
        if self.input.starts_with(b"HTTP/") {
            let message = format!(
                "what listens at {at} speaks HTTP: give the other address that the server printed, tcp://…"
            );
            return Error::new(ErrorCode::Protocol, message);
        }
        let refusal = match (&error, token) {
            (ZmtpError::Mechanism { theirs, .. }, None) if theirs == "PLAIN" => {
                format!(
                    "the server at {at} wants a token: give token or tokenFile, or set KVFERRY_TOKEN"
                )
            }
            (ZmtpError::Refused(_), Some(_)) => format!(
                "the server at {at} does not know this token: give that of its file (--token-file)"
            ),
            (ZmtpError::Mechanism { theirs, .. }, Some(_)) if theirs == "NULL" => {
                let message = format!(
                    "the server at {at} takes no token: leave it out (token, tokenFile, KVFERRY_TOKEN), or \
                     start the server with --token-file FILE"
                );
                return Error::new(ErrorCode::UnsupportedOption, message);
            }
            _ => return self.broken(error),
        };
        Error::new(ErrorCode::Unauthorized, refusal)
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
            let event = self.zmtp.receive(&mut self.input, self.output.tail());
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
        self.output.remaining() < WRITE
    }

    /// Appends a message to what goes out; an error when it is too long.
    pub(crate) fn send(&mut self, frames: &[Bytes]) -> Result<()> {
        let sent = self.zmtp.send_shared(frames, &mut self.output);
        sent.map_err(|error| Error::invalid(format!("the request cannot be sent: {error}")))
    }

    /// Lets a piece that has begun to arrive go to its place, if `landing` knows one, which is `Session::landing`.
    pub(crate) fn land(&mut self, landing: impl FnOnce(&[Bytes], &[u8], usize) -> Option<Landing>) {
        if cfg!(unix)
            && let Some((before, here, length)) = self.zmtp.begun(&self.input)
            && let Some(landing) = landing(before, here, length)
        {
            self.zmtp.take_begun(&mut self.input);
            self.landing = Some(landing);
        }
    }

    /// The uid of a piece that lies in its place now.
    pub(crate) fn landed(&mut self) -> Option<Bytes> {
        let landed = self.landing.take_if(|landing| landing.has_ended())?;
        self.read_next = BEGIN;
        Some(landed.uid)
    }

    /// Waits until bytes came or went. May be dropped and called again.
    pub(crate) async fn progress(&mut self) -> Result<()> {
        let Self { input, output, zmtp, read_next, landing, .. } = self;
        // A long frame comes whole, not in parts that are copied together.
        let most = zmtp.missing(input).min(READ_MAX) + *read_next;
        input.reserve(most);
        let mut room = input.limit(most);
        let (read, bytes) = match (&mut self.stream, landing) {
            #[cfg(unix)]
            (Stream::Tcp(stream), Some(landing)) => {
                let (reader, writer) = stream.split();
                let stream: &TcpStream = reader.as_ref();
                let receive = || landing.receive(stream.as_fd());
                pump(stream.async_io(Interest::READABLE, receive), writer, output).await
            }
            #[cfg(unix)]
            (Stream::Ipc(stream), Some(landing)) => {
                let (reader, writer) = stream.split();
                let stream: &UnixStream = reader.as_ref();
                let receive = || landing.receive(stream.as_fd());
                pump(stream.async_io(Interest::READABLE, receive), writer, output).await
            }
            (Stream::Tcp(stream), _) => {
                let (mut reader, writer) = stream.split();
                pump(reader.read_buf(&mut room), writer, output).await
            }
            #[cfg(unix)]
            (Stream::Ipc(stream), _) => {
                let (mut reader, writer) = stream.split();
                pump(reader.read_buf(&mut room), writer, output).await
            }
        };
        match bytes {
            Ok(0) if read => Err(unreachable(&self.address, "it closed the connection")),
            Ok(_) => {
                if read {
                    self.read_next = READ;
                }
                Ok(())
            }
            Err(error) => Err(unreachable(&self.address, error)),
        }
    }
}

/// Waits until bytes were read (`true`) or written; how many.
async fn pump(
    read: impl Future<Output = std::io::Result<usize>>,
    mut writer: impl AsyncWrite + Unpin,
    output: &mut Output,
) -> (bool, std::io::Result<usize>) {
    tokio::select! {
        read = read => (true, read),
        sent = writer.write_buf(output), if output.has_remaining() => (false, sent),
    }
}
