//! A socket that is through the ZMTP handshake.

use std::io::{ErrorKind, IoSlice};
#[cfg(unix)]
use std::os::fd::AsFd;
use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use kvferry_core::{Error, ErrorCode, Result};
use kvferry_wire::zmtp::{Config, Connection, Event, Mechanism, SocketType, ZmtpError};
use kvferry_wire::{Dialect, MessageError, Reply, Request};
#[cfg(unix)]
use tokio::io::Interest;
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
/// Pieces of memory that are written at once.
const SLICES: usize = 16;

/// An error that names the address, and what to start when nobody is there.
pub(crate) fn unreachable(address: &Address, reason: impl std::fmt::Display) -> Error {
    Error::new(
        ErrorCode::Unreachable,
        format!("no server at {address}: {reason}; start one with `{}`", address.command()),
    )
}

/// A connected socket.
pub(crate) enum Stream {
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

    pub(crate) async fn writable(&self) -> std::io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.writable().await,
            #[cfg(unix)]
            Self::Ipc(stream) => stream.writable().await,
        }
    }

    /// Writes without a wait; how much.
    pub(crate) fn try_write(&self, from: &impl Buf) -> std::io::Result<usize> {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let filled = from.chunks_vectored(&mut slices);
        match self {
            Self::Tcp(stream) => stream.try_write_vectored(&slices[..filled]),
            #[cfg(unix)]
            Self::Ipc(stream) => stream.try_write_vectored(&slices[..filled]),
        }
    }

    /// Waits for bytes; how many came, none at the peer's end.
    async fn read(&self, room: &mut impl BufMut) -> std::io::Result<usize> {
        loop {
            let read = match self {
                Self::Tcp(stream) => {
                    stream.readable().await?;
                    stream.try_read_buf(room)
                }
                #[cfg(unix)]
                Self::Ipc(stream) => {
                    stream.readable().await?;
                    stream.try_read_buf(room)
                }
            };
            match read {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                read => return read,
            }
        }
    }

    /// The same, with bytes that go to their place by themselves.
    #[cfg(unix)]
    async fn land(&self, landing: &mut Landing) -> std::io::Result<usize> {
        match self {
            Self::Tcp(stream) => {
                stream.async_io(Interest::READABLE, || landing.receive(stream.as_fd())).await
            }
            Self::Ipc(stream) => {
                stream.async_io(Interest::READABLE, || landing.receive(stream.as_fd())).await
            }
        }
    }
}

/// One connection.
pub(crate) struct Link {
    pub(crate) address: Address,
    stream: Arc<Stream>,
    zmtp: Connection,
    input: BytesMut,
    /// A piece that goes to its place; `input` is empty then.
    landing: Option<Landing>,
    /// Bytes that are read next.
    read_next: usize,
    /// What goes out before the connection is in use, and what answers the peer's commands.
    output: BytesMut,
    uids: u64,
    /// Whose ids the server knows.
    pub(crate) dialect: Dialect,
}

impl Link {
    /// Connects and shakes hands. Waits as long as the peer lets it.
    pub(crate) async fn open(address: &Address) -> Result<Self> {
        let cannot = |error: std::io::Error| unreachable(address, error);
        let stream = Stream::connect(&address.place).await.map_err(cannot)?;
        let mut output = BytesMut::new();
        let mechanism = match &address.token {
            Some(token) => Mechanism::PlainClient(token.credentials()),
            None => Mechanism::Null,
        };
        let zmtp = Connection::new(Config::new(SocketType::Dealer, mechanism), &mut output);
        let mut link = Self {
            address: address.clone(),
            stream: Arc::new(stream),
            zmtp,
            input: BytesMut::new(),
            landing: None,
            read_next: READ,
            output,
            uids: 0,
            dialect: Dialect::Current,
        };
        loop {
            let event = link.zmtp.receive(&mut link.input, &mut link.output);
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
        let sent = self.zmtp.send(&frames, &mut self.output);
        sent.map_err(|error| Error::invalid(format!("the request cannot be sent: {error}")))?;
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

    /// The socket, for what goes out while the connection is in use.
    pub(crate) fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// What answers the peer's commands and has not gone out.
    pub(crate) fn take_output(&mut self) -> BytesMut {
        self.output.split()
    }

    /// Waits until bytes came or went. May be dropped and called again.
    async fn progress(&mut self) -> Result<()> {
        if self.output.is_empty() {
            return self.read().await;
        }
        let (stream, address) = (Arc::clone(&self.stream), self.address.clone());
        let failed = |error| unreachable(&address, error);
        tokio::select! {
            read = self.read() => return read,
            writable = stream.writable() => writable.map_err(failed)?,
        }
        match stream.try_write(&self.output) {
            Ok(written) => self.output.advance(written),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(failed(error)),
        }
        Ok(())
    }

    /// Waits until bytes came. May be dropped and called again.
    pub(crate) async fn read(&mut self) -> Result<()> {
        let Self { stream, input, zmtp, read_next, landing, .. } = self;
        // A long frame comes whole, not in parts that are copied together.
        let most = zmtp.missing(input).min(READ_MAX) + *read_next;
        input.reserve(most);
        let mut room = input.limit(most);
        let read = match landing {
            #[cfg(unix)]
            Some(landing) => stream.land(landing).await,
            _ => stream.read(&mut room).await,
        };
        match read {
            Ok(0) => Err(unreachable(&self.address, "it closed the connection")),
            Ok(_) => {
                self.read_next = READ;
                Ok(())
            }
            Err(error) => Err(unreachable(&self.address, error)),
        }
    }
}
