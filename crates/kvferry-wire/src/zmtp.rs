//! ZMTP 3.x (RFC 23 and 37) for DEALER and ROUTER, with the mechanisms NULL and PLAIN (RFC 24),
//! without I/O: [`Connection::receive`] takes bytes as they arrive and gives events, what must be
//! sent is appended to a buffer.
//!
//! Every length is checked when it is announced. Nothing is reserved for bytes that have not
//! arrived, and frames are slices of the input: whoever keeps a frame keeps the buffer that it came
//! in.
//!
//! ```
//! use bytes::BytesMut;
//! use kvferry_wire::zmtp::{Config, Connection, Event, SocketType};
//!
//! let (mut to_server, mut to_client) = (BytesMut::new(), BytesMut::new());
//! let mut client = Connection::new(Config::null(SocketType::Dealer), &mut to_server);
//! let mut server = Connection::new(Config::null(SocketType::Router), &mut to_client);
//! assert_eq!(server.receive(&mut to_server, &mut to_client).unwrap(), None);
//! assert_eq!(client.receive(&mut to_client, &mut to_server).unwrap(), Some(Event::Ready));
//! client.send(&["hello", "there"], &mut to_server).unwrap();
//! assert_eq!(server.receive(&mut to_server, &mut to_client).unwrap(), Some(Event::Ready));
//! let message = vec!["hello".into(), "there".into()];
//! assert_eq!(
//!     server.receive(&mut to_server, &mut to_client).unwrap(),
//!     Some(Event::Message(message))
//! );
//! ```

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::output::Output;

/// Bytes of a greeting.
const GREETING: usize = 64;
/// Bytes of a greeting after which the peer's version is known.
const GREETING_VERSION: usize = 11;
/// Bytes of a greeting before the mechanism.
const GREETING_MECHANISM: usize = 12;
/// The version that we speak: 3.1 adds commands to 3.0, no framing.
const VERSION: [u8; 2] = [3, 1];

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;
/// Bytes of a long frame's header.
const LONG_HEADER: usize = 9;

/// What a peer may make us hold. A connection holds at most one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Frames of a message; 16 unless told.
    pub frames_max: usize,
    /// Bytes of a message's frames together; 8 MiB unless told.
    pub message_bytes_max: usize,
    /// Bytes of a command's body; 512 unless told.
    pub command_bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl Limits {
    /// What there is unless told.
    pub const DEFAULT: Self =
        Self { frames_max: 16, message_bytes_max: 8 << 20, command_bytes_max: 512 };

    /// The last of a message's frames, and those before it.
    ///
    /// # Errors
    /// A message that has no frame, or exceeds the limits.
    pub fn check<'a, T: AsRef<[u8]>>(&self, frames: &'a [T]) -> Result<(&'a T, &'a [T])> {
        let Some((last, before)) = frames.split_last() else {
            return Err(ZmtpError::OutOfTurn("a message without frames"));
        };
        if frames.len() > self.frames_max {
            return Err(ZmtpError::TooManyFrames(self.frames_max));
        }
        let bytes = frames.iter().map(|frame| frame.as_ref().len()).sum::<usize>();
        if bytes > self.message_bytes_max {
            return Err(ZmtpError::MessageTooLong(self.message_bytes_max));
        }
        Ok((last, before))
    }

    /// Appends a message to what goes to a peer after its [`Event::Ready`], all or nothing; long frames are not
    /// copied.
    ///
    /// # Errors
    /// As [`Limits::check`].
    pub fn put(&self, frames: &[Bytes], output: &mut Output) -> Result<()> {
        let (last, before) = self.check(frames)?;
        for (more, frame) in before.iter().map(|frame| (MORE, frame)).chain([(0, last)]) {
            put_header(more, frame.len(), output.tail());
            output.put(frame);
        }
        Ok(())
    }
}

/// What we are to the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketType {
    /// The client's side.
    Dealer,
    /// The server's side.
    Router,
}

impl SocketType {
    const fn name(self) -> &'static str {
        match self {
            Self::Dealer => "DEALER",
            Self::Router => "ROUTER",
        }
    }

    /// RFC 23's table of valid combinations.
    fn accepts(self, peer: &[u8]) -> bool {
        match self {
            Self::Dealer => matches!(peer, b"REP" | b"DEALER" | b"ROUTER"),
            Self::Router => matches!(peer, b"REQ" | b"DEALER" | b"ROUTER"),
        }
    }
}

/// How the peers know each other. Neither encrypts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mechanism {
    /// Not at all.
    Null,
    /// We send a name and a password, of at most 255 bytes each.
    PlainClient(Credentials),
    /// The peer sends them, and [`Event::Credentials`] asks for a verdict.
    PlainServer,
    /// Whichever of NULL and PLAIN the peer names, which has to do so first: libzmq does, once it has seen our
    /// version. With PLAIN we are the server, with NULL nobody is asked who it is.
    NullOrPlainServer,
}

impl Mechanism {
    const fn name(&self) -> &'static str {
        match self {
            Self::Null => "NULL",
            Self::PlainClient(_) | Self::PlainServer => "PLAIN",
            Self::NullOrPlainServer => "NULL or PLAIN",
        }
    }
}

/// A name and a password.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The name.
    pub username: Bytes,
    /// The password.
    pub password: Bytes,
}

impl std::fmt::Debug for Credentials {
    /// Without the password, which has no place in a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("username", &self.username).finish_non_exhaustive()
    }
}

/// What a connection is set up with.
#[derive(Debug, Clone)]
pub struct Config {
    /// Our side.
    pub socket_type: SocketType,
    /// The mechanism, which the peer must name too.
    pub mechanism: Mechanism,
    /// The limits.
    pub limits: Limits,
}

impl Config {
    /// NULL, with the default limits.
    pub fn null(socket_type: SocketType) -> Self {
        Self::new(socket_type, Mechanism::Null)
    }

    /// The default limits.
    pub fn new(socket_type: SocketType, mechanism: Mechanism) -> Self {
        Self { socket_type, mechanism, limits: Limits::default() }
    }
}

/// What has happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// PLAIN: the peer wants to be let in. Nothing more is received before [`Connection::accept`]
    /// or [`Connection::reject`].
    Credentials(Credentials),
    /// The handshake is done, messages may be sent. Comes once.
    Ready,
    /// A whole message, of at least one frame.
    Message(Vec<Bytes>),
}

/// Why a connection must be closed. [`ZmtpError::label`] is the name to count it under.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ZmtpError {
    /// The peer speaks ZMTP 1 or 2, of libzmq before 4.0.
    #[error("the peer speaks ZMTP {0}; ZMTP 3 is needed (libzmq 4.0 or later)")]
    Version(u8),
    /// The greeting is not ZMTP's.
    #[error("malformed greeting: {0}")]
    MalformedGreeting(&'static str),
    /// The peers do not name the same mechanism.
    #[error("the peer's mechanism is {theirs:?}, ours is {ours}")]
    Mechanism {
        /// What the peer named.
        theirs: String,
        /// What we named.
        ours: &'static str,
    },
    /// A frame's flags have bits that mean nothing.
    #[error("malformed frame: flags {0:#04x}")]
    MalformedFrame(u8),
    /// A command is not formed as its RFC says.
    #[error("malformed command: {0}")]
    MalformedCommand(&'static str),
    /// A message before the handshake was done, or a command that has no place here.
    #[error("unexpected {0}")]
    Unexpected(&'static str),
    /// The metadata of READY or INITIATE.
    #[error("malformed metadata: {0}")]
    MalformedMetadata(&'static str),
    /// A socket type that does not go with ours.
    #[error("the peer is a {theirs:?} socket, which does not go with {ours}")]
    SocketType {
        /// The peer's.
        theirs: String,
        /// Ours.
        ours: &'static str,
    },
    /// More frames than the limit.
    #[error("a message of more than {0} frames")]
    TooManyFrames(usize),
    /// More bytes than the limit.
    #[error("a message of more than {0} bytes")]
    MessageTooLong(usize),
    /// A command longer than the limit.
    #[error("a command of {0} bytes")]
    CommandTooLong(u64),
    /// The peer sent an ERROR.
    #[error("the peer refuses: {0:?}")]
    Refused(String),
    /// We sent before [`Event::Ready`], gave a verdict that nobody asked for, or have credentials
    /// longer than 255 bytes.
    #[error("out of turn: {0}")]
    OutOfTurn(&'static str),
}

impl ZmtpError {
    /// A name for counters.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Version(_) => "zmtp_version",
            Self::MalformedGreeting(_) => "zmtp_greeting",
            Self::Mechanism { .. } => "zmtp_mechanism",
            Self::MalformedFrame(_) => "zmtp_frame",
            Self::MalformedCommand(_) => "zmtp_command",
            Self::Unexpected(_) => "zmtp_unexpected",
            Self::MalformedMetadata(_) => "zmtp_metadata",
            Self::SocketType { .. } => "zmtp_socket_type",
            Self::TooManyFrames(_) => "zmtp_too_many_frames",
            Self::MessageTooLong(_) => "zmtp_message_too_long",
            Self::CommandTooLong(_) => "zmtp_command_too_long",
            Self::Refused(_) => "zmtp_refused",
            Self::OutOfTurn(_) => "zmtp_out_of_turn",
        }
    }
}

impl From<ZmtpError> for kvferry_core::Error {
    fn from(error: ZmtpError) -> Self {
        Self::new(kvferry_core::ErrorCode::Protocol, error.to_string())
    }
}

type Result<T, E = ZmtpError> = std::result::Result<T, E>;

/// Where the handshake is, named by what comes next from the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Greeting,
    /// PLAIN server.
    Hello,
    /// PLAIN server: our caller's verdict.
    Verdict,
    /// PLAIN server.
    Initiate,
    /// PLAIN client.
    Welcome,
    Ready,
    Traffic,
}

/// One peer's connection. After an error it is of no more use.
#[derive(Debug)]
pub struct Connection {
    config: Config,
    state: State,
    frames: Vec<Bytes>,
    /// How many of them are copies, see [`Connection::keep_frames`].
    kept: usize,
    bytes: usize,
}

impl Connection {
    /// A new connection; appends our greeting to `output`, or as much of it as does not depend on the peer's.
    pub fn new(config: Config, output: &mut BytesMut) -> Self {
        let greeting = greeting(&config.mechanism);
        output.extend_from_slice(match config.mechanism {
            Mechanism::NullOrPlainServer => &greeting[..GREETING_MECHANISM],
            _ => &greeting,
        });
        Self { config, state: State::Greeting, frames: Vec::new(), kept: 0, bytes: 0 }
    }

    /// Whether the handshake is done.
    pub fn is_ready(&self) -> bool {
        self.state == State::Traffic
    }

    /// Bytes that are missing of the frame that `input` begins with, as far as its length is here and is allowed.
    pub fn missing(&self, input: &[u8]) -> usize {
        self.long(input).map_or(0, |(_, length)| (LONG_HEADER + length).saturating_sub(input.len()))
    }

    /// The message whose last frame `input` begins with, if that is a long one that has not arrived whole: the frames
    /// before it, what is here of its bytes, and how many it has.
    pub fn begun<'a>(&'a self, input: &'a [u8]) -> Option<(&'a [Bytes], &'a [u8], usize)> {
        let (_, length) = self.long(input).filter(|(flags, _)| *flags == LONG)?;
        let here = &input[LONG_HEADER..];
        (here.len() < length).then_some((&self.frames, here, length))
    }

    /// Takes that message from the front of `input`, which holds no more of its bytes then. Those that are missing the
    /// caller takes from the stream before it goes on with [`Connection::receive`].
    pub fn take_begun(&mut self, input: &mut BytesMut) -> Vec<Bytes> {
        if self.begun(input).is_none() {
            return Vec::new();
        }
        input.clear();
        (self.bytes, self.kept) = (0, 0);
        std::mem::take(&mut self.frames)
    }

    /// Flags and length of the long frame that `input` begins with, if its header is here and allowed.
    fn long(&self, input: &[u8]) -> Option<(u8, usize)> {
        let (flags, header) = input.split_first().filter(|(flags, _)| *flags & LONG != 0)?;
        let length = header.first_chunk().filter(|_| self.is_ready())?;
        let length = self.admit(*flags, u64::from_be_bytes(*length)).ok()?;
        Some((*flags, length))
    }

    /// Bytes of the frames that are here of a message whose last frame is not; `None` between
    /// messages.
    pub fn unfinished(&self) -> Option<usize> {
        (!self.frames.is_empty()).then_some(self.bytes)
    }

    /// Takes what it can from the front of `input`, which holds the bytes that arrived and were not
    /// taken yet, and appends to `output` what the peer must be answered. `None`: more bytes are
    /// needed (or a verdict, see [`Event::Credentials`]). Call it until it says so.
    ///
    /// # Errors
    /// Anything against the protocol or the limits; the connection is to be closed then, after
    /// `output` is sent, which may hold the reason.
    pub fn receive(
        &mut self,
        input: &mut BytesMut,
        output: &mut BytesMut,
    ) -> Result<Option<Event>> {
        if self.state == State::Greeting {
            if !self.receive_greeting(input, output)? {
                return Ok(None);
            }
            self.begin(output)?;
        }
        while self.state != State::Verdict {
            let Some((flags, body)) = self.next_frame(input)? else { break };
            let event = if flags & COMMAND == 0 {
                self.take_frame(flags, body)
            } else {
                self.command(&body, output)?
            };
            if event.is_some() {
                return Ok(event);
            }
        }
        self.keep_frames();
        Ok(None)
    }

    /// Copies the frames of a message that goes on: the input that they came in may be many times
    /// their size. Each is copied once at most.
    fn keep_frames(&mut self) {
        for frame in &mut self.frames[self.kept..] {
            *frame = Bytes::copy_from_slice(frame);
        }
        self.kept = self.frames.len();
    }

    /// Appends a message of at least one frame. All or nothing.
    ///
    /// # Errors
    /// Before [`Event::Ready`], and when the message exceeds our own limits, which are the peer's
    /// too.
    pub fn send(&self, frames: &[impl AsRef<[u8]>], output: &mut BytesMut) -> Result<()> {
        self.may_send()?;
        let (last, before) = self.config.limits.check(frames)?;
        before.iter().for_each(|frame| put_frame(MORE, frame.as_ref(), output));
        put_frame(0, last.as_ref(), output);
        Ok(())
    }

    /// The same; long frames are not copied.
    ///
    /// # Errors
    /// As [`Connection::send`].
    pub fn send_shared(&self, frames: &[Bytes], output: &mut Output) -> Result<()> {
        self.may_send()?;
        self.config.limits.put(frames, output)
    }

    fn may_send(&self) -> Result<()> {
        match self.state {
            State::Traffic => Ok(()),
            _ => Err(ZmtpError::OutOfTurn("a message before the handshake is done")),
        }
    }

    /// Lets the peer in whose [`Event::Credentials`] came.
    ///
    /// # Errors
    /// When no verdict is awaited.
    pub fn accept(&mut self, output: &mut BytesMut) -> Result<()> {
        self.verdict()?;
        put_frame(COMMAND, b"\x07WELCOME", output);
        self.state = State::Initiate;
        Ok(())
    }

    /// Turns the peer away whose [`Event::Credentials`] came, with a reason of at most 255 bytes.
    /// The connection is to be closed after `output` is sent.
    ///
    /// # Errors
    /// When no verdict is awaited.
    pub fn reject(&mut self, reason: &str, output: &mut BytesMut) -> Result<()> {
        self.verdict()?;
        put_error(reason, output);
        Ok(())
    }

    fn verdict(&self) -> Result<()> {
        match self.state {
            State::Verdict => Ok(()),
            _ => Err(ZmtpError::OutOfTurn("a verdict that nobody asked for")),
        }
    }

    /// Checks what is there of the greeting, so that a peer of another kind is refused at its first
    /// wrong byte: such peers wait for us and send no more. Takes the greeting when it is whole.
    fn receive_greeting(&mut self, input: &mut BytesMut, output: &mut BytesMut) -> Result<bool> {
        let ours = &mut self.config.mechanism;
        let greeting = &input[..input.len().min(GREETING)];
        match greeting.first() {
            None => return Ok(false),
            Some(0xff) => {}
            // ZMTP 1.0 begins with a frame, of one byte when the peer has no identity.
            Some(1) => return Err(ZmtpError::Version(1)),
            Some(_) => return Err(ZmtpError::MalformedGreeting("no signature")),
        }
        if greeting.get(9).is_some_and(|byte| *byte != 0x7f) {
            return Err(ZmtpError::MalformedGreeting("no signature"));
        }
        // Revision 0 is ZMTP 1.0 behind a signature, 1 and 2 are ZMTP 2.
        match greeting.get(GREETING_VERSION - 1) {
            Some(0) => return Err(ZmtpError::Version(1)),
            Some(1 | 2) => return Err(ZmtpError::Version(2)),
            _ => {}
        }
        if greeting.len() < GREETING {
            return Ok(false);
        }
        let (mechanism, as_server) = (&greeting[GREETING_MECHANISM..32], greeting[32]);
        let name = mechanism.split(|byte| *byte == 0).next().unwrap_or_default();
        if mechanism[name.len()..].iter().any(|byte| *byte != 0) {
            return Err(ZmtpError::MalformedGreeting("the mechanism goes on after its end"));
        }
        let chosen = match (&*ours, name) {
            (Mechanism::NullOrPlainServer, b"NULL") => Some(Mechanism::Null),
            (Mechanism::NullOrPlainServer, b"PLAIN") => Some(Mechanism::PlainServer),
            _ => None,
        };
        if let Some(chosen) = chosen {
            output.extend_from_slice(&self::greeting(&chosen)[GREETING_MECHANISM..]);
            *ours = chosen;
        }
        if name != ours.name().as_bytes() {
            let theirs = String::from_utf8_lossy(name).into_owned();
            return Err(ZmtpError::Mechanism { theirs, ours: ours.name() });
        }
        let roles_match = match ours {
            Mechanism::Null => true,
            Mechanism::PlainClient(_) => as_server == 1,
            Mechanism::PlainServer | Mechanism::NullOrPlainServer => as_server == 0,
        };
        if !roles_match {
            return Err(ZmtpError::MalformedGreeting("one of the peers must be PLAIN's server"));
        }
        input.advance(GREETING);
        Ok(true)
    }

    /// The first command, if it is ours to send.
    fn begin(&mut self, output: &mut BytesMut) -> Result<()> {
        self.state = match &self.config.mechanism {
            Mechanism::Null => {
                self.put_metadata(b"\x05READY", output);
                State::Ready
            }
            Mechanism::PlainServer | Mechanism::NullOrPlainServer => State::Hello,
            Mechanism::PlainClient(Credentials { username, password }) => {
                let mut hello = BytesMut::from(&b"\x05HELLO"[..]);
                for text in [username, password] {
                    let length = u8::try_from(text.len()).map_err(|_| {
                        ZmtpError::OutOfTurn("a name or a password has at most 255 bytes")
                    })?;
                    hello.put_u8(length);
                    hello.put_slice(text);
                }
                put_frame(COMMAND, &hello, output);
                State::Welcome
            }
        };
        Ok(())
    }

    /// The next whole frame. Its header is checked as soon as it is there.
    fn next_frame(&self, input: &mut BytesMut) -> Result<Option<(u8, Bytes)>> {
        let Some(&flags) = input.first() else { return Ok(None) };
        if flags & !(MORE | LONG | COMMAND) != 0 || flags & (MORE | COMMAND) == MORE | COMMAND {
            return Err(ZmtpError::MalformedFrame(flags));
        }
        let (header, length) = if flags & LONG == 0 {
            let Some(&length) = input.get(1) else { return Ok(None) };
            (2, u64::from(length))
        } else {
            let Some(length) = input[1..].first_chunk() else { return Ok(None) };
            (LONG_HEADER, u64::from_be_bytes(*length))
        };
        let length = self.admit(flags, length)?;
        if input.len() < header + length {
            return Ok(None);
        }
        input.advance(header);
        Ok(Some((flags, input.split_to(length).freeze())))
    }

    /// Checks a frame's announced length.
    fn admit(&self, flags: u8, length: u64) -> Result<usize> {
        let Limits { frames_max, message_bytes_max, command_bytes_max } = self.config.limits;
        let fits = |max: usize| usize::try_from(length).ok().filter(|length| *length <= max);
        if flags & COMMAND != 0 {
            return fits(command_bytes_max).ok_or(ZmtpError::CommandTooLong(length));
        }
        if self.state != State::Traffic {
            return Err(ZmtpError::Unexpected("message before the handshake is done"));
        }
        if self.frames.len() >= frames_max {
            return Err(ZmtpError::TooManyFrames(frames_max));
        }
        fits(message_bytes_max.saturating_sub(self.bytes))
            .ok_or(ZmtpError::MessageTooLong(message_bytes_max))
    }

    fn take_frame(&mut self, flags: u8, body: Bytes) -> Option<Event> {
        self.bytes += body.len();
        self.frames.push(body);
        if flags & MORE != 0 {
            return None;
        }
        self.bytes = 0;
        self.kept = 0;
        Some(Event::Message(std::mem::take(&mut self.frames)))
    }

    fn command(&mut self, command: &Bytes, output: &mut BytesMut) -> Result<Option<Event>> {
        let (name, body) = split_command(command)?;
        match (self.state, name) {
            (_, b"ERROR") => {
                let reason = split_short(body)
                    .and_then(|(reason, rest)| rest.is_empty().then_some(reason))
                    .ok_or(ZmtpError::MalformedCommand("ERROR"))?;
                return Err(ZmtpError::Refused(String::from_utf8_lossy(reason).into_owned()));
            }
            (State::Traffic, b"PING") => put_pong(body, output)?,
            // PONG, SUBSCRIBE, CANCEL and whatever later versions add mean nothing to us.
            (State::Traffic, name) if !HANDSHAKE.contains(&name) => {}
            (State::Hello, b"HELLO") => {
                let (username, password) =
                    split_hello(body).ok_or(ZmtpError::MalformedCommand("HELLO"))?;
                self.state = State::Verdict;
                return Ok(Some(Event::Credentials(Credentials {
                    username: command.slice_ref(username),
                    password: command.slice_ref(password),
                })));
            }
            (State::Welcome, b"WELCOME") if body.is_empty() => {
                self.put_metadata(b"\x08INITIATE", output);
                self.state = State::Ready;
            }
            (State::Initiate, b"INITIATE") => {
                self.check_metadata(body, output)?;
                self.put_metadata(b"\x05READY", output);
                self.state = State::Traffic;
                return Ok(Some(Event::Ready));
            }
            (State::Ready, b"READY") => {
                self.check_metadata(body, output)?;
                self.state = State::Traffic;
                return Ok(Some(Event::Ready));
            }
            _ => return Err(ZmtpError::Unexpected("command")),
        }
        Ok(None)
    }

    /// Walks all properties; only the socket type matters to us.
    fn check_metadata(&self, mut metadata: &[u8], output: &mut BytesMut) -> Result<()> {
        let mut socket_type = None;
        while !metadata.is_empty() {
            let (name, value, rest) =
                split_property(metadata).ok_or(ZmtpError::MalformedMetadata("a property"))?;
            if name.eq_ignore_ascii_case(b"Socket-Type") && socket_type.replace(value).is_some() {
                return Err(ZmtpError::MalformedMetadata("two socket types"));
            }
            metadata = rest;
        }
        let theirs = socket_type.ok_or(ZmtpError::MalformedMetadata("no socket type"))?;
        let ours = self.config.socket_type;
        if ours.accepts(theirs) {
            return Ok(());
        }
        put_error("Invalid socket type", output);
        let theirs = String::from_utf8_lossy(theirs).into_owned();
        Err(ZmtpError::SocketType { theirs, ours: ours.name() })
    }

    fn put_metadata(&self, command: &[u8], output: &mut BytesMut) {
        let mut body = BytesMut::from(command);
        let socket_type = self.config.socket_type.name();
        body.put_slice(b"\x0bSocket-Type");
        body.put_uint(socket_type.len() as u64, 4);
        body.put_slice(socket_type.as_bytes());
        put_frame(COMMAND, &body, output);
    }
}

/// Our greeting.
fn greeting(mechanism: &Mechanism) -> [u8; GREETING] {
    let mut greeting = [0; GREETING];
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    greeting[10..GREETING_MECHANISM].copy_from_slice(&VERSION);
    let name = mechanism.name();
    greeting[GREETING_MECHANISM..GREETING_MECHANISM + name.len()].copy_from_slice(name.as_bytes());
    greeting[32] = (*mechanism == Mechanism::PlainServer).into();
    greeting
}

/// The commands that end or belong to a handshake.
const HANDSHAKE: [&[u8]; 4] = [b"HELLO", b"WELCOME", b"INITIATE", b"READY"];

/// A command's body is its name, with its length before it, and what the command says.
fn split_command(command: &[u8]) -> Result<(&[u8], &[u8])> {
    let malformed = ZmtpError::MalformedCommand("no name");
    let (length, rest) = command.split_first().ok_or(malformed.clone())?;
    match rest.split_at_checked((*length).into()) {
        Some((name, body)) if !name.is_empty() => Ok((name, body)),
        _ => Err(malformed),
    }
}

fn split_hello(body: &[u8]) -> Option<(&[u8], &[u8])> {
    let (username, rest) = split_short(body)?;
    let (password, rest) = split_short(rest)?;
    rest.is_empty().then_some((username, password))
}

/// A text with its length in one byte before it.
fn split_short(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first()?;
    rest.split_at_checked((*length).into())
}

/// A property of the metadata: its name, its value, and the bytes after it.
fn split_property(metadata: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (name, rest) = split_short(metadata)?;
    let (length, rest) = rest.split_first_chunk()?;
    let (value, rest) = rest.split_at_checked(u32::from_be_bytes(*length).try_into().ok()?)?;
    let is_name = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.+".contains(byte);
    (!name.is_empty() && name.iter().all(is_name)).then_some((name, value, rest))
}

/// PING has a time to live, which is the sender's business, and a context to repeat.
fn put_pong(ping: &[u8], output: &mut BytesMut) -> Result<()> {
    const TTL: usize = 2;
    const CONTEXT_MAX: usize = 16;
    let context = ping
        .get(TTL..)
        .filter(|context| context.len() <= CONTEXT_MAX)
        .ok_or(ZmtpError::MalformedCommand("PING"))?;
    put_frame(COMMAND, &[b"\x04PONG", context].concat(), output);
    Ok(())
}

fn put_error(reason: &str, output: &mut BytesMut) {
    let reason = &reason.as_bytes()[..reason.len().min(255)];
    let mut body = BytesMut::from(&b"\x05ERROR"[..]);
    body.put_uint(reason.len() as u64, 1);
    body.put_slice(reason);
    put_frame(COMMAND, &body, output);
}

fn put_frame(flags: u8, body: &[u8], output: &mut BytesMut) {
    put_header(flags, body.len(), output);
    output.put_slice(body);
}

fn put_header(flags: u8, length: usize, output: &mut BytesMut) {
    match u8::try_from(length) {
        Ok(length) => output.put_slice(&[flags, length]),
        Err(_) => {
            output.put_u8(flags | LONG);
            output.put_u64(length as u64);
        }
    }
}
