//! Where a server listens.

use std::fmt::{self, Write as _};
use std::net::{IpAddr, SocketAddr};

use kvferry_core::{Error, ErrorCode, Result};

/// A loopback host and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address {
    host: String,
    port: u16,
    /// Tokens of a chunk that a server there must have, for the command that starts one.
    pub(crate) chunk_size: Option<u32>,
}

/// What `kvferry serve` has when it is not told.
const CHUNK_SIZE: u32 = 256;

impl Address {
    /// `tcp://host:port` or `host:port`. Only loopback hosts are offered: the protocol neither
    /// encrypts nor asks who is there.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let bare = text.strip_prefix("tcp://").unwrap_or(text);
        if let Some((scheme, _)) = bare.split_once("://") {
            return Err(Error::new(
                ErrorCode::UnsupportedOption,
                format!("address {text:?}: {scheme}:// is not offered, use tcp://host:port"),
            ));
        }
        let invalid =
            || Error::invalid(format!("address {text:?} is not of the form tcp://host:port"));
        let (host, port) = bare.rsplit_once(':').ok_or_else(invalid)?;
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(invalid)?;
        if host.is_empty() {
            return Err(invalid());
        }
        let loopback = host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
        if !loopback {
            return Err(Error::new(
                ErrorCode::UnsupportedOption,
                format!(
                    "address {text:?}: only loopback hosts are offered (localhost, 127.0.0.1, ::1)"
                ),
            ));
        }
        Ok(Self { host: host.to_owned(), port, chunk_size: None })
    }

    /// What starts a server there.
    pub(crate) fn command(&self) -> String {
        let mut command = format!("npx kvferry serve --port {}", self.port);
        if !matches!(&*self.host, "localhost" | "127.0.0.1") {
            command.push_str(" --host ");
            command.push_str(&self.host);
        }
        if let Some(chunk_size) = self.chunk_size.filter(|size| *size != CHUNK_SIZE) {
            let _ = write!(command, " --chunk-size {chunk_size}"); // writing into a String cannot fail
        }
        command
    }

    /// The addresses to try, loopback whatever the resolver says.
    pub(crate) async fn resolve(&self) -> std::io::Result<Vec<SocketAddr>> {
        let all = tokio::net::lookup_host((self.host.as_str(), self.port)).await?;
        Ok(all.filter(|address| address.ip().is_loopback()).collect())
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "tcp://[{}]:{}", self.host, self.port),
            false => write!(f, "tcp://{}:{}", self.host, self.port),
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
        ] {
            assert_eq!(Address::parse(text).unwrap().to_string(), shown);
        }
    }

    #[test]
    fn the_command_has_what_differs_from_its_defaults() {
        for (text, chunk_size, command) in [
            ("tcp://localhost:5555", None, "npx kvferry serve --port 5555"),
            ("127.0.0.1:1", Some(256), "npx kvferry serve --port 1"),
            ("[::1]:7", Some(64), "npx kvferry serve --port 7 --host ::1 --chunk-size 64"),
        ] {
            assert_eq!(Address { chunk_size, ..Address::parse(text).unwrap() }.command(), command);
        }
    }

    #[test]
    fn others_are_refused_by_name() {
        for (text, code) in [
            ("tcp://10.0.0.1:5555", ErrorCode::UnsupportedOption),
            ("example.org:5555", ErrorCode::UnsupportedOption),
            ("localhost.example.org:5555", ErrorCode::UnsupportedOption),
            ("ipc:///tmp/socket", ErrorCode::UnsupportedOption),
            ("localhost", ErrorCode::InvalidArgument),
            ("localhost:", ErrorCode::InvalidArgument),
            ("localhost:0", ErrorCode::InvalidArgument),
            ("localhost:65536", ErrorCode::InvalidArgument),
            (":5555", ErrorCode::InvalidArgument),
            ("", ErrorCode::InvalidArgument),
        ] {
            let error = Address::parse(text).unwrap_err();
            assert_eq!(error.code, code, "{text:?}");
            assert!(error.message.contains(text));
        }
    }
}
