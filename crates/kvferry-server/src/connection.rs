//! One connection: bytes in, answers out, with a bound and a deadline for everything.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use kvferry_store::Departure;
use kvferry_wire::zmtp::{Config, Connection, Event, SocketType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};

use crate::service::{Peer, Service};

/// From connecting to READY.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// From a message's first byte to its last, and for a peer to take an answer.
const MESSAGE: Duration = Duration::from_secs(30);
/// What is read at once, and what an idle connection keeps.
const READ: usize = 16 << 10;
/// Answers are sent when there is this much of them, if not before.
const WRITE: usize = 256 << 10;
/// Bytes of unfinished messages that all connections may hold together.
const UNFINISHED_MAX: usize = 256 << 20;

/// What all connections hold of messages that have not arrived whole.
#[derive(Debug, Default)]
pub(crate) struct Unfinished(AtomicUsize);

/// One connection's part of it.
struct Part<'a> {
    all: &'a Unfinished,
    bytes: usize,
}

impl Part<'_> {
    /// `false` when there is no room for `bytes`.
    fn set(&mut self, bytes: usize) -> bool {
        if bytes <= self.bytes {
            self.all.0.fetch_sub(self.bytes - bytes, Ordering::Relaxed);
            self.bytes = bytes;
            return true;
        }
        let more = bytes - self.bytes;
        self.bytes = bytes;
        self.all.0.fetch_add(more, Ordering::Relaxed) + more <= UNFINISHED_MAX
    }
}

impl Drop for Part<'_> {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// Serves the connection until it ends; says who ended it.
pub(crate) async fn serve(
    mut stream: TcpStream,
    service: &Service,
    peer: &mut Peer,
    unfinished: &Unfinished,
) -> Departure {
    let error = match talk(&mut stream, service, peer, unfinished).await {
        Ok(()) => return Departure::Ended, // the peer's kernel said so
        Err(error) => error,
    };
    match error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Departure::Ended,
        _ => {
            service.drop_message(label(&error));
            Departure::GivenUp
        }
    }
}

async fn talk(
    stream: &mut TcpStream,
    service: &Service,
    peer: &mut Peer,
    unfinished: &Unfinished,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut part = Part { all: unfinished, bytes: 0 };
    let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
    let mut zmtp = Connection::new(Config::null(SocketType::Router), &mut output);
    let mut deadline = Some(Instant::now() + HANDSHAKE);
    loop {
        send(stream, &mut output).await?;
        input.reserve(READ);
        let read = stream.read_buf(&mut input);
        let read = match deadline {
            Some(deadline) => {
                timeout_at(deadline, read).await.map_err(|_| io::ErrorKind::TimedOut)?
            }
            None => read.await, // an idle connection costs little; its end is noticed
        };
        if read? == 0 {
            return Ok(());
        }
        let mut ready = false;
        while let Some(event) = zmtp.receive(&mut input, &mut output).map_err(Malformed::io)? {
            match event {
                Event::Message(frames) => {
                    ready = true;
                    if let Some(reply) = service.answer(peer, &frames, std::time::Instant::now()) {
                        zmtp.send(&reply, &mut output).map_err(Malformed::io)?;
                    }
                }
                Event::Ready => ready = true,
                _ => {}
            }
            if output.len() > WRITE {
                send(stream, &mut output).await?;
            }
        }
        if !part.set(input.len()) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        if zmtp.is_ready() {
            deadline = match (input.is_empty(), deadline) {
                (true, _) => None,
                (false, Some(deadline)) if !ready => Some(deadline), // the same message goes on
                (false, _) => Some(Instant::now() + MESSAGE),
            };
        }
        if input.is_empty() && input.capacity() > READ {
            input = BytesMut::new(); // a large message came: an idle peer does not keep its space
        }
    }
}

async fn send(stream: &mut TcpStream, output: &mut BytesMut) -> io::Result<()> {
    if !output.is_empty() {
        let sent = timeout(MESSAGE, stream.write_all(output)).await;
        sent.map_err(|_| io::ErrorKind::TimedOut)??;
        output.clear();
    }
    Ok(())
}

/// A protocol error on its way through `io::Error`.
#[derive(Debug)]
struct Malformed(kvferry_wire::zmtp::ZmtpError);

impl Malformed {
    fn io(error: kvferry_wire::zmtp::ZmtpError) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, Self(error))
    }
}

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl std::error::Error for Malformed {}

fn label(error: &io::Error) -> &'static str {
    let malformed = error.get_ref().and_then(|inner| inner.downcast_ref::<Malformed>());
    match (malformed, error.kind()) {
        (Some(malformed), _) => malformed.0.label(),
        (None, io::ErrorKind::TimedOut) => "deadline",
        (None, io::ErrorKind::OutOfMemory) => "unfinished_messages",
        (None, _) => "connection",
    }
}
