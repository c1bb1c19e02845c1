//! The ZMTP handshake and traffic, against bytes as libzmq sends them and against ourselves.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use bytes::{Bytes, BytesMut};
use kvferry_wire::zmtp::{
    Config, Connection, Credentials, Event, Limits, Mechanism, SocketType, ZmtpError,
};

/// A greeting with libzmq's signature: its padding is a ZMTP 1.0 length, for older peers.
fn greeting(minor: u8, mechanism: &str, as_server: bool) -> Vec<u8> {
    let mut bytes = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03".to_vec();
    bytes.push(minor);
    bytes.extend(mechanism.as_bytes());
    bytes.resize(32, 0);
    bytes.push(as_server.into());
    bytes.resize(64, 0);
    bytes
}

const READY_DEALER: &[u8] = b"\x04\x29\x05READY\x0bSocket-Type\0\0\0\x06DEALER\x08Identity\0\0\0\0";

struct Peer {
    connection: Connection,
    output: BytesMut,
}

impl Peer {
    fn new(config: Config) -> Self {
        let mut output = BytesMut::new();
        Self { connection: Connection::new(config, &mut output), output }
    }

    fn router() -> Self {
        Self::new(Config::null(SocketType::Router))
    }

    /// A router that is through its handshake.
    fn ready() -> Self {
        let mut peer = Self::router();
        peer.receive(&[greeting(1, "NULL", false), READY_DEALER.to_vec()].concat()).unwrap();
        peer.output.clear();
        peer
    }

    fn receive(&mut self, bytes: &[u8]) -> Result<Vec<Event>, ZmtpError> {
        self.receive_from(&mut BytesMut::from(bytes))
    }

    fn receive_from(&mut self, input: &mut BytesMut) -> Result<Vec<Event>, ZmtpError> {
        let mut events = Vec::new();
        while let Some(event) = self.connection.receive(input, &mut self.output)? {
            events.push(event);
        }
        Ok(events)
    }
}

fn message(frames: &[&'static str]) -> Event {
    Event::Message(frames.iter().map(|frame| Bytes::from_static(frame.as_bytes())).collect())
}

#[test]
fn a_stream_gives_the_same_events_however_it_is_split() {
    for minor in [0, 1] {
        let stream = [
            greeting(minor, "NULL", false),
            READY_DEALER.to_vec(),
            b"\x01\x01a\x00\x02bc".to_vec(),
            b"\x04\x0b\x04PING\0\x64ctxt".to_vec(),
            b"\x03\0\0\0\0\0\0\0\x01d\x04\x05\x04PONG\x02\0\0\0\0\0\0\0\0".to_vec(),
            b"\x04\x0a\x09SUBSCRIBE\x04\x05\x04LATE".to_vec(),
            b"\x00\x00".to_vec(),
        ]
        .concat();
        let expected = [Event::Ready, message(&["a", "bc"]), message(&["d", ""]), message(&[""])];
        let mut whole = Peer::router();
        assert_eq!(whole.receive(&stream).unwrap(), expected);
        for split in 0..=stream.len() {
            let mut peer = Peer::router();
            let mut input = BytesMut::from(&stream[..split]);
            let mut events = peer.receive_from(&mut input).unwrap();
            input.extend_from_slice(&stream[split..]);
            events.extend(peer.receive_from(&mut input).unwrap());
            assert_eq!(events, expected, "split at {split}");
            assert_eq!(peer.output, whole.output, "split at {split}");
            assert!(input.is_empty());
        }
        let mut peer = Peer::router();
        let mut input = BytesMut::new();
        let mut events = Vec::new();
        for byte in stream {
            input.extend_from_slice(&[byte]);
            events.extend(peer.receive_from(&mut input).unwrap());
        }
        assert_eq!(events, expected, "byte by byte");
    }
}

#[test]
fn the_greeting_goes_out_before_anything_came_in() {
    // libzmq sends 10 bytes and waits for ours.
    let peer = Peer::router();
    assert_eq!(peer.output.len(), 64);
    assert_eq!(peer.output[..16], *b"\xff\0\0\0\0\0\0\0\0\x7f\x03\x01NULL");
    let mut peer = Peer::router();
    assert_eq!(peer.receive(&greeting(1, "NULL", false)[..10]).unwrap(), []);
    assert_eq!(peer.output.len(), 64, "READY waits for the peer's greeting");
}

#[test]
fn a_ping_is_answered_with_its_context() {
    let mut peer = Peer::ready();
    assert_eq!(peer.receive(b"\x04\x0b\x04PING\0\x64ctxt").unwrap(), []);
    assert_eq!(peer.output[..], *b"\x04\x09\x04PONGctxt");
    assert!(Peer::ready().receive(b"\x04\x06\x04PING\0").is_err(), "no time to live");
    let long = [&b"\x04\x18\x04PING\0\0"[..], &[b'c'; 17]].concat();
    assert_eq!(Peer::ready().receive(&long), Err(ZmtpError::MalformedCommand("PING")));
}

#[test]
fn a_ping_may_come_between_the_frames_of_a_message() {
    let mut peer = Peer::ready();
    let events = peer.receive(b"\x01\x01a\x04\x07\x04PING\0\0\x00\x01b").unwrap();
    assert_eq!(events, [message(&["a", "b"])]);
    assert_eq!(peer.output[..], *b"\x04\x05\x04PONG");
}

#[test]
fn peers_of_other_versions_are_told_apart_at_their_first_bytes() {
    let cases: [(&[u8], ZmtpError); 6] = [
        (b"\x01\0", ZmtpError::Version(1)),
        (b"\xff\0\0\0\0\0\0\0\x01\x7f\0", ZmtpError::Version(1)),
        (b"\xff\0\0\0\0\0\0\0\x01\x7f\x01\x05", ZmtpError::Version(2)),
        (b"\xff\0\0\0\0\0\0\0\x01\x7f\x02", ZmtpError::Version(2)),
        (b"GET / HTTP/1.1\r\n", ZmtpError::MalformedGreeting("no signature")),
        (b"\xff\0\0\0\0\0\0\0\x01\x00", ZmtpError::MalformedGreeting("no signature")),
    ];
    for (bytes, error) in cases {
        assert_eq!(Peer::router().receive(bytes), Err(error), "{bytes:?}");
    }
    let mut later = greeting(1, "NULL", false);
    later[10] = 4;
    assert_eq!(Peer::router().receive(&later).unwrap(), [], "a later version speaks ours too");
}

#[test]
fn peers_must_name_the_same_mechanism() {
    for mechanism in ["CURVE", "PLAIN", "", "NULLL"] {
        let error = Peer::router().receive(&greeting(1, mechanism, false)).unwrap_err();
        assert_eq!(error, ZmtpError::Mechanism { theirs: mechanism.to_owned(), ours: "NULL" });
    }
    let mut padded = greeting(1, "NULL", false);
    padded[20] = b'X';
    assert!(Peer::router().receive(&padded).is_err());
}

#[test]
fn only_socket_types_that_go_together_connect() {
    for (ours, theirs, fits) in [
        (SocketType::Router, "DEALER", true),
        (SocketType::Router, "REQ", true),
        (SocketType::Router, "ROUTER", true),
        (SocketType::Router, "PUB", false),
        (SocketType::Router, "dealer", false),
        (SocketType::Dealer, "ROUTER", true),
        (SocketType::Dealer, "SUB", false),
    ] {
        let length = |n: usize| u8::try_from(n).unwrap();
        let mut ready = vec![4, length(22 + theirs.len())];
        ready.extend(b"\x05READY\x0bSOCKET-type\0\0\0");
        ready.push(length(theirs.len()));
        ready.extend(theirs.as_bytes());
        let mut peer = Peer::new(Config::null(ours));
        let result = peer.receive(&[greeting(0, "NULL", false), ready].concat());
        if fits {
            assert_eq!(result.unwrap(), [Event::Ready]);
        } else {
            let ours = if ours == SocketType::Router { "ROUTER" } else { "DEALER" };
            assert_eq!(result, Err(ZmtpError::SocketType { theirs: theirs.to_owned(), ours }));
            assert!(peer.output.ends_with(b"\x04\x1a\x05ERROR\x13Invalid socket type"));
        }
    }
}

#[test]
fn malformed_metadata_is_refused() {
    for metadata in [
        &b""[..],                                                          // no socket type
        b"\x0bSocket-Type\0\0\0\x07DEALER", // longer than what is there
        b"\x0bSocket-Type\xff\xff\xff\xffDEALER", // much longer
        b"\x0bSocket-Type\0\0\0\x06DEALER\x0bSocket-Type\0\0\0\x06DEALER", // twice
        b"\x00\0\0\0\0\x0bSocket-Type\0\0\0\x06DEALER", // a property without a name
        b"\x01 \0\0\0\0\x0bSocket-Type\0\0\0\x06DEALER", // not a name
        b"\x0bSocket-Type\0\0\0\x06DEALER\x08", // a name's length only
    ] {
        let body = [b"\x05READY", metadata].concat();
        let command = [&[4, u8::try_from(body.len()).unwrap()], &body[..]].concat();
        let result = Peer::router().receive(&[greeting(1, "NULL", false), command].concat());
        assert!(matches!(result, Err(ZmtpError::MalformedMetadata(_))), "{metadata:?}: {result:?}");
    }
}

#[test]
fn the_handshake_is_done_once_and_before_all_else() {
    let hello = greeting(1, "NULL", false);
    let early = [&hello[..], b"\x00\x01a"].concat();
    assert!(matches!(Peer::router().receive(&early), Err(ZmtpError::Unexpected(_))));
    let ping = [&hello[..], b"\x04\x07\x04PING\0\0"].concat();
    assert!(matches!(Peer::router().receive(&ping), Err(ZmtpError::Unexpected(_))));
    assert!(matches!(Peer::ready().receive(READY_DEALER), Err(ZmtpError::Unexpected(_))));
    let peer = Peer::router();
    assert!(matches!(
        peer.connection.send(&["early"], &mut BytesMut::new()),
        Err(ZmtpError::OutOfTurn(_))
    ));
}

#[test]
fn an_error_command_ends_the_connection_with_its_reason() {
    let refused = Peer::ready().receive(b"\x04\x09\x05ERROR\x02no");
    assert_eq!(refused, Err(ZmtpError::Refused("no".to_owned())));
    assert!(matches!(
        Peer::ready().receive(b"\x04\x09\x05ERROR\x03no"),
        Err(ZmtpError::MalformedCommand(_))
    ));
}

fn plain_pair(password: &'static str) -> (Peer, Peer) {
    let credentials = Credentials { username: "kvferry".into(), password: password.into() };
    let config =
        |socket_type, mechanism| Config { socket_type, mechanism, limits: Limits::default() };
    let client = Peer::new(config(SocketType::Dealer, Mechanism::PlainClient(credentials)));
    (client, Peer::new(config(SocketType::Router, Mechanism::PlainServer)))
}

#[test]
fn plain_lets_in_whom_the_server_accepts() {
    let (mut client, mut server) = plain_pair("secret");
    assert_eq!(server.receive_from(&mut client.output).unwrap(), []);
    assert_eq!(client.receive_from(&mut server.output).unwrap(), []);
    let credentials = Credentials { username: "kvferry".into(), password: "secret".into() };
    assert!(!format!("{credentials:?}").contains("secret"));
    let asked = server.receive_from(&mut client.output).unwrap();
    assert_eq!(asked, [Event::Credentials(credentials)]);
    server.connection.accept(&mut server.output).unwrap();
    assert_eq!(client.receive_from(&mut server.output).unwrap(), []);
    assert_eq!(server.receive_from(&mut client.output).unwrap(), [Event::Ready]);
    assert_eq!(client.receive_from(&mut server.output).unwrap(), [Event::Ready]);
    client.connection.send(&["a", "b"], &mut client.output).unwrap();
    assert_eq!(server.receive_from(&mut client.output).unwrap(), [message(&["a", "b"])]);
}

#[test]
fn plain_turns_away_whom_the_server_rejects() {
    let (mut client, mut server) = plain_pair("guess");
    server.receive_from(&mut client.output).unwrap();
    client.receive_from(&mut server.output).unwrap();
    // Bytes that follow the credentials wait for the verdict.
    client.output.extend_from_slice(b"\x00\x01a");
    assert_eq!(server.receive_from(&mut client.output).unwrap().len(), 1);
    assert_eq!(server.receive_from(&mut client.output).unwrap(), []);
    server.connection.reject("wrong token", &mut server.output).unwrap();
    let refused = client.receive_from(&mut server.output);
    assert_eq!(refused, Err(ZmtpError::Refused("wrong token".to_owned())));
    assert!(matches!(
        Peer::ready().connection.accept(&mut BytesMut::new()),
        Err(ZmtpError::OutOfTurn(_))
    ));
}

#[test]
fn a_server_of_both_mechanisms_takes_the_peers_and_asks_for_no_less_than_it_names() {
    let config =
        |socket_type, mechanism| Config { socket_type, mechanism, limits: Limits::default() };
    let server = || Peer::new(config(SocketType::Router, Mechanism::NullOrPlainServer));
    assert_eq!(
        server().output[..],
        *b"\xff\0\0\0\0\0\0\0\0\x7f\x03\x01",
        "libzmq goes on from here"
    );

    let (mut null, mut either) = (Peer::new(Config::null(SocketType::Dealer)), server());
    assert_eq!(either.receive_from(&mut null.output).unwrap(), []);
    assert_eq!(null.receive_from(&mut either.output).unwrap(), [Event::Ready]);
    assert_eq!(either.receive_from(&mut null.output).unwrap(), [Event::Ready]);

    let (mut plain, mut either) = (plain_pair("secret").0, server());
    assert_eq!(either.receive_from(&mut plain.output).unwrap(), []);
    assert_eq!(plain.receive_from(&mut either.output).unwrap(), []);
    let asked = either.receive_from(&mut plain.output).unwrap();
    assert!(matches!(asked[..], [Event::Credentials(_)]), "{asked:?}");
    // Nobody gets past the question by going on as with NULL.
    let mut impatient = server();
    let ready = [&greeting(1, "PLAIN", false), READY_DEALER].concat();
    assert!(matches!(impatient.receive(&ready), Err(ZmtpError::Unexpected(_))));

    for (mechanism, as_server) in [("CURVE", false), ("PLAIN", true), ("", false)] {
        assert!(server().receive(&greeting(1, mechanism, as_server)).is_err(), "{mechanism}");
    }
}

#[test]
fn plain_needs_one_client_and_one_server() {
    let (_, mut server) = plain_pair("secret");
    assert!(server.receive(&greeting(1, "PLAIN", true)).is_err());
    let (mut client, _) = plain_pair("secret");
    assert!(client.receive(&greeting(1, "PLAIN", false)).is_err());
}

#[test]
fn plain_skips_no_step() {
    let plain = greeting(1, "PLAIN", false);
    for command in [&b"\x04\x06\x05READY"[..], b"\x04\x09\x08INITIATE", READY_DEALER] {
        let (_, mut server) = plain_pair("secret");
        let result = server.receive(&[&plain, command].concat());
        assert!(matches!(result, Err(ZmtpError::Unexpected(_))), "{command:?}");
    }
    for hello in [&b"\x04\x07\x05HELLO\x09"[..], b"\x04\x09\x05HELLO\x00\x00\x00"] {
        let (_, mut server) = plain_pair("secret");
        let result = server.receive(&[&plain, hello].concat());
        assert_eq!(result, Err(ZmtpError::MalformedCommand("HELLO")), "{hello:?}");
    }
}

#[test]
fn what_is_sent_is_received_whatever_its_size() {
    let mut client = Peer::new(Config::null(SocketType::Dealer));
    let mut server = Peer::router();
    server.receive_from(&mut client.output).unwrap();
    client.receive_from(&mut server.output).unwrap();
    server.receive_from(&mut client.output).unwrap();
    let frames: Vec<Bytes> =
        [0, 1, 255, 256, 70_000].map(|length| Bytes::from(vec![7; length])).into();
    client.connection.send(&frames, &mut client.output).unwrap();
    assert_eq!(server.receive_from(&mut client.output).unwrap(), [Event::Message(frames)]);
    let nothing: [Bytes; 0] = [];
    assert!(client.connection.send(&nothing, &mut client.output).is_err());
}

#[test]
fn the_last_frame_of_a_message_can_be_taken_from_the_stream_by_the_caller() {
    let (long, after) = (vec![7; 300], b"\0\x05after");
    let message = [&b"\x01\x03uid\x02\0\0\0\0\0\0\x01\x2c"[..], &long].concat();
    let begins = 5 + 9;
    for cut in 0..=message.len() {
        let mut peer = Peer::ready();
        let mut input = BytesMut::from(&message[..cut]);
        let events = peer.receive_from(&mut input).unwrap();
        let begun = peer.connection.begun(&input);
        if !(begins..message.len()).contains(&cut) {
            assert_eq!(begun, None, "{cut} bytes: not begun, or whole");
            assert_eq!(peer.connection.take_begun(&mut input), Vec::<Bytes>::new());
            assert_eq!(events.len(), usize::from(cut == message.len()));
            continue;
        }
        assert_eq!(begun, Some((&[Bytes::from("uid")][..], &long[..cut - begins], 300)));
        assert_eq!(peer.connection.take_begun(&mut input), [Bytes::from("uid")]);
        assert!(input.is_empty());
        assert_eq!(peer.connection.unfinished(), None);
        let events = peer.receive(after).unwrap();
        assert_eq!(events, [Event::Message(vec![Bytes::from("after")])], "cut at {cut}");
    }
    // Not the last one; one of a few bytes; a command; one that is too long.
    for begun in [
        &b"\x03\0\0\0\0\0\0\x01\x2c"[..],
        b"\0\x05",
        b"\x06\0\0\0\0\0\0\x01\x2c",
        b"\x02\0\0\0\0\x01\0\0\0",
    ] {
        assert_eq!(Peer::ready().connection.begun(begun), None, "{begun:?}");
    }
}
