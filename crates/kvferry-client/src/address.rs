//! Where a server listens, and what it is shown.

use std::fmt::{self, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use bytes::Bytes;
use kvferry_core::{Error, ErrorCode, Result};
use kvferry_wire::zmtp::Credentials;

/// What a server lets its holder in for. It has no place in a log, and is in no message.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(Bytes);

impl Token {
    /// A token of 1 to 255 bytes.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidArgument`].
    pub fn new(text: impl Into<String>) -> Result<Self> {
        let text = Bytes::from(text.into());
        match text.len() {
            1..=255 => Ok(Self(text)),
            bytes => Err(Error::invalid(format!(
                "the token has {bytes} bytes: give one of 1 to 255, as the server's file has it"
            ))),
        }
    }

    pub(crate) fn credentials(&self) -> Credentials {
        Credentials { username: Bytes::from_static(b"kvferry"), password: self.0.clone() }
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

/// Where the socket is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    Tcp { host: String, port: u16 },
    Ipc(PathBuf),
}

/// A socket, and what is shown there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) place: Place,
    pub(crate) token: Option<Token>,
    /// Tokens of a chunk that a server there must have, for the command that starts one.
    pub(crate) chunk_size: Option<u32>,
}

/// What `kvferry serve` has when it is not told.
const CHUNK_SIZE: u32 = 256;

impl Address {
    /// `tcp://host:port`, `host:port` or `ipc:///path`. Other hosts than this one take a token: without one, whoever
    /// is there could be anybody, and so could the client.
    pub(crate) fn parse(text: &str, token: Option<Token>) -> Result<Self> {
        let (place, local) = place(text)?;
        if !local && token.is_none() {
            return Err(Error::new(
                ErrorCode::UnsupportedOption,
                format!(
                    "address {text:?} is not loopback (localhost, 127.0.0.1, ::1): give the token of the server \
                     there (token, tokenFile, KVFERRY_TOKEN)"
                ),
            ));
        }
        Ok(Self { place, token, chunk_size: None })
    }

    /// What starts a server there.
    pub(crate) fn command(&self) -> String {
        let mut command = String::from("npx kvferry serve");
        // Writing into a String cannot fail.
        let _ = match &self.place {
            Place::Ipc(path) => write!(command, " --ipc {}", path.display()),
            Place::Tcp { host, port } => match host.as_str() {
                "localhost" | "127.0.0.1" => write!(command, " --port {port}"),
                _ if is_loopback(host) => write!(command, " --port {port} --host {host}"),
                _ => write!(command, " --port {port} --host {host} --listen-public"),
            },
        };
        if self.token.is_some() {
            command.push_str(" --token-file FILE");
        }
        if let Some(chunk_size) = self.chunk_size.filter(|size| *size != CHUNK_SIZE) {
            let _ = write!(command, " --chunk-size {chunk_size}");
        }
        command
    }

    /// The addresses to try; loopback, whatever the resolver says, for names that mean it.
    pub(crate) async fn resolve(host: &str, port: u16) -> std::io::Result<Vec<SocketAddr>> {
        let all = tokio::net::lookup_host((host, port)).await?;
        let any = !is_loopback(host);
        Ok(all.filter(|address| any || address.ip().is_loopback()).collect())
    }
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
}

/// The place, and whether it is on this machine.
fn place(text: &str) -> Result<(Place, bool)> {
    if let Some(path) = text.strip_prefix("ipc://") {
        let path = PathBuf::from(path);
        if !cfg!(unix) || !path.is_absolute() {
            return Err(Error::new(
                ErrorCode::UnsupportedOption,
                format!(
                    "address {text:?}: ipc:// takes an absolute path, on systems with Unix sockets"
                ),
            ));
        }
        return Ok((Place::Ipc(path), true));
    }
    let bare = text.strip_prefix("tcp://").unwrap_or(text);
    if let Some((scheme, _)) = bare.split_once("://") {
        return Err(Error::new(
            ErrorCode::UnsupportedOption,
            format!(
                "address {text:?}: {scheme}:// is not offered, use tcp://host:port or ipc:///path"
            ),
        ));
    }
    let invalid = || Error::invalid(format!("address {text:?} is not of the form tcp://host:port"));
    let (host, port) = bare.rsplit_once(':').ok_or_else(invalid)?;
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(invalid)?;
    if host.is_empty() {
        return Err(invalid());
    }
    Ok((Place::Tcp { host: host.to_owned(), port }, is_loopback(host)))
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Ipc(path) => write!(f, "ipc://{}", path.display()),
            Place::Tcp { host, port } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Place::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_addresses_are_taken_with_and_without_scheme() {
        for (text, shown) in [
            ("tcp://localhost:5555", "tcp://localhost:5555"),
            ("127.0.0.1:1", "tcp://127.0.0.1:1"),
            ("tcp://127.9.9.9:65535", "tcp://127.9.9.9:65535"),
            ("tcp://[::1]:5555", "tcp://[::1]:5555"),
            ("ipc:///run/kvferry/socket", "ipc:///run/kvferry/socket"),
        ] {
            assert_eq!(Address::parse(text, None).unwrap().to_string(), shown);
        }
    }

    #[test]
    fn the_command_has_what_differs_from_its_defaults() {
        for (text, chunk_size, command) in [
            ("tcp://localhost:5555", None, "npx kvferry serve --port 5555"),
            ("127.0.0.1:1", Some(256), "npx kvferry serve --port 1"),
            ("[::1]:7", Some(64), "npx kvferry serve --port 7 --host ::1 --chunk-size 64"),
            ("ipc:///run/k/s", None, "npx kvferry serve --ipc /run/k/s"),
        ] {
            let address = Address::parse(text, None).unwrap();
            assert_eq!(Address { chunk_size, ..address }.command(), command);
        }
    }

    #[test]
    fn other_hosts_take_a_token_which_is_never_told() {
        let token = Token::new("s3cret").unwrap();
        let address = Address::parse("tcp://10.0.0.1:5555", Some(token)).unwrap();
        let command =
            "npx kvferry serve --port 5555 --host 10.0.0.1 --listen-public --token-file FILE";
        assert_eq!(address.command(), command);
        for told in [format!("{address:?}"), address.to_string()] {
            assert!(told.contains("10.0.0.1") && !told.contains("s3cret"), "{told}");
        }
        for bad in [String::new(), "s3cret".repeat(50)] {
            let error = Token::new(bad).unwrap_err();
            assert!(!error.message.contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn others_are_refused_by_name() {
        for (text, code) in [
            ("tcp://10.0.0.1:5555", ErrorCode::UnsupportedOption),
            ("example.org:5555", ErrorCode::UnsupportedOption),
            ("localhost.example.org:5555", ErrorCode::UnsupportedOption),
            ("ipc://relative", ErrorCode::UnsupportedOption),
            ("inproc://socket", ErrorCode::UnsupportedOption),
            ("localhost", ErrorCode::InvalidArgument),
            ("localhost:", ErrorCode::InvalidArgument),
            ("localhost:0", ErrorCode::InvalidArgument),
            ("localhost:65536", ErrorCode::InvalidArgument),
            (":5555", ErrorCode::InvalidArgument),
            ("", ErrorCode::InvalidArgument),
        ] {
            let error = Address::parse(text, None).unwrap_err();
            assert_eq!(error.code, code, "{text:?}");
            assert!(error.message.contains(text));
        }
    }
}
