//! Who may ask what over HTTP: tokens, and what a browser must not do for another site's page.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use hyper::body::Incoming;
use hyper::header::{self, HeaderMap};
use hyper::{Request, StatusCode};

use super::{Answered, Refusal, Route};
use crate::tokens::{Role, Tokens};

/// Whom HTTP answers.
pub(crate) struct Guard {
    /// `None`: whoever reaches it.
    pub(crate) tokens: Option<Arc<Tokens>>,
    /// Others than this machine reach it, by names that nobody here knows.
    pub(crate) public: bool,
}

impl Guard {
    /// Whether the request's token opens the route.
    pub(super) fn check(&self, headers: &HeaderMap, route: Route) -> Answered<()> {
        let (Some(tokens), Some(wanted)) = (&self.tokens, route.role()) else { return Ok(()) };
        let mut given = headers.get_all(header::AUTHORIZATION).iter();
        let token = match (given.next(), given.next()) {
            (Some(one), None) => bearer(one.as_bytes()),
            _ => None,
        };
        let role = token.and_then(|token| tokens.role(token));
        if role == Some(wanted) || role == Some(Role::Admin) {
            return Ok(());
        }
        let wanted = wanted.name();
        let (status, message) = match role {
            Some(_) => (StatusCode::FORBIDDEN, format!("this takes the {wanted} token")),
            None => (
                StatusCode::UNAUTHORIZED,
                format!(
                    "this takes the header Authorization: Bearer TOKEN, with the {wanted} token"
                ),
            ),
        };
        Err(Refusal::new(status, "UNAUTHORIZED", message))
    }
}

/// What follows `Bearer `.
fn bearer(authorization: &[u8]) -> Option<&[u8]> {
    const SCHEME: &[u8] = b"bearer ";
    let (scheme, token) = authorization.split_at_checked(SCHEME.len())?;
    scheme.eq_ignore_ascii_case(SCHEME).then(|| token.trim_ascii_start())
}

/// A page of another site must not get at us by a name that it made resolve to loopback (DNS rebinding). A public
/// server has names of its own; a page of another site has no token for it.
pub(super) fn check_host(request: &Request<Incoming>, public: bool) -> Answered<String> {
    let mut given = request.headers().get_all(header::HOST).iter();
    let (Some(host), None) = (given.next(), given.next()) else {
        let message = "a request has one Host header";
        return Err(Refusal::new(StatusCode::BAD_REQUEST, "INVALID_ARGUMENT", message));
    };
    let host = host.to_str().unwrap_or_default();
    let named = request.uri().authority().map_or(host, |authority| authority.as_str());
    if public || (is_loopback(host) && is_loopback(named)) {
        return Ok(host.to_owned());
    }
    let message = "this server answers for localhost and loopback addresses only; \
        from elsewhere, forward its port (ssh -L)";
    Err(Refusal::new(StatusCode::FORBIDDEN, "UNSUPPORTED_OPTION", message))
}

/// `localhost` or a loopback address, with or without a port.
fn is_loopback(authority: &str) -> bool {
    let (name, port) = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, port)) => {
            let loopback = address.parse().is_ok_and(|address: Ipv6Addr| address.is_loopback());
            return loopback && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port));
        }
        None => authority.split_once(':').map_or((authority, "0"), |(name, port)| (name, port)),
    };
    let loopback = name.eq_ignore_ascii_case("localhost")
        || name.parse().is_ok_and(|address: Ipv4Addr| address.is_loopback());
    loopback && is_port(port)
}

fn is_port(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit()) && text.parse::<u16>().is_ok()
}

/// A page of another site may make a browser send requests, but none of this media type without asking first
/// (CORS), and none without its origin.
pub(super) fn check_origin(headers: &HeaderMap, host: &str) -> Answered<()> {
    let foreign = headers.get_all(header::ORIGIN).iter().any(|origin| {
        let own = origin.to_str().ok().and_then(|origin| origin.strip_prefix("http://"));
        !own.is_some_and(|own| own.eq_ignore_ascii_case(host))
    });
    if foreign {
        let message = "requests of other sites' pages are refused";
        return Err(Refusal::new(StatusCode::FORBIDDEN, "UNSUPPORTED_OPTION", message));
    }
    let media = headers.get(header::CONTENT_TYPE).and_then(|media| media.to_str().ok());
    let media = media.and_then(|media| media.split(';').next()).unwrap_or_default();
    if !media.trim().eq_ignore_ascii_case("application/json") {
        let message = "send content-type: application/json";
        let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
        return Err(Refusal::new(status, "INVALID_ARGUMENT", message));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_loopback_are_answered_for() {
        for host in [
            "localhost",
            "LocalHost:1",
            "127.0.0.1",
            "127.9.8.7:65535",
            "[::1]",
            "[::1]:80",
            "[0:0::1]",
        ] {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "",
            ":80",
            "localhost.",
            "localhost:",
            "localhost:65536",
            "localhost:+1",
            "localhost:80:80",
            "localhost.example.org",
            "127.0.0.1.example.org",
            "127.0.0.1@example.org",
            "user@localhost",
            "128.0.0.1",
            "0.0.0.0",
            "127.1",
            "2130706433",
            "::1",
            "[::1",
            "[::1]80",
            "[::2]",
            "[::ffff:127.0.0.1]",
            "example.org",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
