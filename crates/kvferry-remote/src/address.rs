//! The addresses of remotes.

use kvferry_core::{Error, Result};
use url::Url;

/// The user and the password of Redis where the URL has none.
const USERNAME: &str = "KVFERRY_REDIS_USERNAME";
const PASSWORD: &str = "KVFERRY_REDIS_PASSWORD";
/// Begins every key unless the URL says otherwise.
const PREFIX: &str = "kvferry";
const FORMS: &str = "give one like redis://127.0.0.1:6379/0, rediss://…, redis+cluster://host-a:6379,host-b:6379, \
    rediss+cluster://… or s3://bucket/prefix?region=eu-west-1&endpoint=https://s3.example";

/// What a URL says.
pub(crate) struct Address {
    pub(crate) engine: Engine,
    pub(crate) prefix: String,
    /// The URL without credentials.
    pub(crate) place: String,
}

pub(crate) enum Engine {
    Redis(Servers),
    S3(Bucket),
}

#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Servers {
    /// Host and port of each; of a single one, its own.
    pub(crate) nodes: Vec<(String, u16)>,
    pub(crate) is_cluster: bool,
    pub(crate) tls: bool,
    pub(crate) database: i64,
    pub(crate) username: Option<String>,
    pub(crate) password: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bucket {
    pub(crate) name: String,
    pub(crate) region: Option<String>,
    pub(crate) endpoint: Option<String>,
}

pub(crate) fn parse(url: &str) -> Result<Address> {
    parse_with(url, |name| std::env::var(name).ok().filter(|value| !value.is_empty()))
}

fn parse_with(url: &str, environment: impl Fn(&str) -> Option<String>) -> Result<Address> {
    let wrong =
        |why: &str| Error::invalid(format!("the remote {:?} {why}; {FORMS}", redacted(url)));
    let (scheme, rest) = url.split_once("://").ok_or_else(|| wrong("is no URL"))?;
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let mut parameters: Vec<_> =
        url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
    let mut parameter = |name: &str| {
        let position = parameters.iter().position(|(known, _)| known == name)?;
        Some(parameters.remove(position).1)
    };
    let (engine, prefix) = match scheme {
        "redis" | "rediss" | "redis+cluster" | "rediss+cluster" => {
            let is_cluster = scheme.ends_with("+cluster");
            let (user, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
            let nodes: Option<Vec<_>> = hosts.split(',').map(node).collect();
            let nodes = nodes.ok_or_else(|| wrong("has a host that is none"))?;
            if nodes.len() > 1 && !is_cluster {
                return Err(wrong("has several hosts, which only a cluster has"));
            }
            let database = match path {
                "" => 0,
                number => number
                    .parse()
                    .ok()
                    .filter(|number| (0..=i64::from(u16::MAX)).contains(number))
                    .ok_or_else(|| wrong("has a database that is no number"))?,
            };
            if is_cluster && database != 0 {
                return Err(wrong("has a database, and a cluster has but one"));
            }
            let (username, password) = user.split_once(':').unwrap_or((user, ""));
            let decoded = |text: &str| {
                let text = percent_decoded(text)
                    .ok_or_else(|| wrong("has a user or password that is not UTF-8"))?;
                Ok::<_, Error>(Some(text).filter(|text| !text.is_empty()))
            };
            let servers = Servers {
                nodes,
                is_cluster,
                tls: scheme.starts_with("rediss"),
                database,
                username: decoded(username)?.or_else(|| environment(USERNAME)),
                password: decoded(password)?.or_else(|| environment(PASSWORD)),
            };
            let prefix = parameter("prefix");
            (Engine::Redis(servers), prefix)
        }
        "s3" => {
            if url.contains('@') {
                return Err(wrong(
                    "has credentials, which S3's URL does not take: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
                ));
            }
            let (region, endpoint) = (parameter("region"), parameter("endpoint"));
            let is_http = |text: &String| {
                Url::parse(text)
                    .is_ok_and(|it| matches!(it.scheme(), "http" | "https") && it.has_host())
            };
            // Encoded, it has come past the check above.
            if endpoint.as_ref().is_some_and(|endpoint| endpoint.contains('@')) {
                return Err(wrong(
                    "has credentials in its endpoint: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
                ));
            }
            if endpoint.as_ref().is_some_and(|endpoint| !is_http(endpoint)) {
                return Err(wrong("has an endpoint that is no http or https URL"));
            }
            let allowed =
                |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
            if authority.is_empty() || !authority.bytes().all(allowed) {
                return Err(wrong("has no bucket's name"));
            }
            let bucket = Bucket { name: authority.to_owned(), region, endpoint };
            let prefix = Some(path.trim_end_matches('/')).filter(|path| !path.is_empty());
            (Engine::S3(bucket), prefix.map(str::to_owned))
        }
        _ => return Err(wrong("is of no kind that is known")),
    };
    if let Some((name, _)) = parameters.first() {
        return Err(wrong(&format!("has the parameter {name:?}, which has no meaning here")));
    }
    let prefix = prefix.unwrap_or_else(|| PREFIX.to_owned());
    Ok(Address { engine, prefix, place: redacted(url) })
}

/// `host` or `host:port`.
fn node(text: &str) -> Option<(String, u16)> {
    // With a scheme of the web the host is checked.
    let url = Url::parse(&format!("https://{text}/")).ok()?;
    let bare = url.path() == "/" && url.query().is_none() && url.username().is_empty();
    let port = if text.ends_with(":443") { 443 } else { url.port().unwrap_or(6379) };
    let host = url.host_str().filter(|_| bare && !text.is_empty())?;
    Some((host.trim_matches(['[', ']']).to_owned(), port))
}

fn percent_decoded(text: &str) -> Option<String> {
    let form = text.replace('+', "%2B").replace('&', "%26").replace('=', "%3D");
    let (decoded, _) = url::form_urlencoded::parse(form.as_bytes()).next().unwrap_or_default();
    (!decoded.contains('\u{fffd}')).then(|| decoded.into_owned())
}

/// The URL without what may be secret: everything before the last `@`, and the values of parameters that are not known.
pub(crate) fn redacted(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").map_or(("", url), |(scheme, rest)| (scheme, rest));
    let rest = match rest.rsplit_once('@') {
        Some((_, rest)) => format!("***@{rest}"),
        None => rest.to_owned(),
    };
    let (rest, query) = rest.split_once('?').unwrap_or((&rest, ""));
    let shown: Vec<String> = query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| match pair.split_once('=') {
            Some((name, value))
                if !matches!(name, "region" | "endpoint" | "prefix") || value.contains("%40") =>
            {
                format!("{name}=***")
            }
            _ => pair.to_owned(),
        })
        .collect();
    let scheme = if scheme.is_empty() { String::new() } else { format!("{scheme}://") };
    let query = if shown.is_empty() { String::new() } else { format!("?{}", shown.join("&")) };
    format!("{scheme}{rest}{query}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none(_: &str) -> Option<String> {
        None
    }

    fn servers(url: &str) -> Servers {
        match parse_with(url, none).unwrap().engine {
            Engine::Redis(servers) => servers,
            Engine::S3(_) => panic!("{url}"),
        }
    }

    #[test]
    fn addresses_of_redis() {
        let plain = servers("redis://127.0.0.1");
        assert_eq!((plain.nodes, plain.database), (vec![("127.0.0.1".into(), 6379)], 0));
        assert!(!plain.tls && !plain.is_cluster && plain.password.is_none());
        let full = servers("rediss://me:p%40ss+%2F@[::1]:443/7");
        assert_eq!((full.nodes, full.database), (vec![("::1".into(), 443)], 7));
        assert_eq!(
            (full.username.as_deref(), full.password.as_deref()),
            (Some("me"), Some("p@ss+/"))
        );
        assert!(full.tls);
        let cluster = servers("redis+cluster://:x@a:1,b:2,c");
        assert_eq!(cluster.nodes, [("a".into(), 1), ("b".into(), 2), ("c".into(), 6379)]);
        assert!(cluster.is_cluster && cluster.username.is_none());
        let address = parse_with("redis://h/?prefix=team/a", none).unwrap();
        assert_eq!(address.prefix, "team/a");
    }

    #[test]
    fn credentials_come_from_the_environment_where_the_url_has_none() {
        let environment = |name: &str| Some(format!("{name}'s"));
        let Engine::Redis(servers) = parse_with("redis://h", environment).unwrap().engine else {
            panic!()
        };
        assert_eq!(servers.username.as_deref(), Some("KVFERRY_REDIS_USERNAME's"));
        assert_eq!(servers.password.as_deref(), Some("KVFERRY_REDIS_PASSWORD's"));
        let Engine::Redis(servers) = parse_with("redis://:own@h", environment).unwrap().engine
        else {
            panic!()
        };
        assert_eq!(servers.password.as_deref(), Some("own"));
    }

    #[test]
    fn addresses_of_s3() {
        let url = "s3://bucket/team/kv/?region=eu-west-1&endpoint=http%3A%2F%2F127.0.0.1:9000";
        let address = parse_with(url, none).unwrap();
        assert_eq!(address.prefix, "team/kv");
        let Engine::S3(bucket) = address.engine else { panic!() };
        let (region, endpoint) = (Some("eu-west-1".into()), Some("http://127.0.0.1:9000".into()));
        assert_eq!(bucket, Bucket { name: "bucket".into(), region, endpoint });
        assert_eq!(parse_with("s3://bucket", none).unwrap().prefix, "kvferry");
    }

    #[test]
    fn what_is_wrong_is_named_without_its_secrets_and_with_an_example() {
        for url in [
            "hunter2@x",
            "redis:/:hunter2@x",
            "http://:hunter2@x",
            "redis://:hunter2@",
            "redis://:hunter2@a b",
            "redis://:hunter2@a:70000",
            "redis://:hunter2@a,b",
            "redis://:hunter2@a/x",
            "redis://:hunter2@a/-1",
            "redis+cluster://:hunter2@a/1",
            "s3://b?endpoint=http%3A%2F%2Fkey%3Ahunter2%40h",
            "redis://a/?password=hunter2",
            "redis://%ffhunter2@a",
            "s3://key:hunter2@bucket",
            "s3://bucket?endpoint=http://key:hunter2@h",
            "s3://?secret=hunter2",
            "s3://bucket?endpoint=ftp://h&secret=hunter2",
        ] {
            let error = parse_with(url, none).err().unwrap_or_else(|| panic!("{url}"));
            assert!(!error.message.contains("hunter2"), "{error}");
            assert!(error.message.contains("redis://127.0.0.1:6379/0"), "{error}");
        }
    }

    #[test]
    fn the_place_that_operators_see_has_no_credentials() {
        let address = parse_with("redis://me:hunter2@h:1/2?prefix=p", none).unwrap();
        assert_eq!(address.place, "redis://***@h:1/2?prefix=p");
    }
}
