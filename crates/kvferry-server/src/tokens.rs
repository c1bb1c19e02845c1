//! Who may do what: the file of tokens, and whose one a peer gives.
//!
//! Tokens are secrets: no message, log or figure has one, and the server keeps hashes only.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use kvferry_core::{Error, ErrorCode, Result};

/// Bytes of the file at most.
const FILE_MAX: u64 = 64 << 10;
/// Bytes of a token: fewer could be guessed, and PLAIN carries no more.
const TOKEN_MIN: usize = 32;
const TOKEN_MAX: usize = 255;

/// What a token is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Storing and loading.
    Data,
    /// The same, and what concerns everybody: figures, events, quotas, clearing.
    Admin,
    /// Metrics over HTTP.
    Metrics,
}

impl Role {
    const ALL: [Self; 3] = [Self::Data, Self::Admin, Self::Metrics];

    /// Its name in the file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Admin => "admin",
            Self::Metrics => "metrics",
        }
    }

    /// The role of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.name() == name)
    }
}

/// The three tokens of a server, as hashes: comparing those takes the same time whatever is given.
pub(crate) struct Tokens {
    key: [u8; 32],
    hashes: [(Role, blake3::Hash); 3],
}

impl Tokens {
    /// Those of a file, which has to have all three, each another.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let mut key = [0; 32];
        getrandom::fill(&mut key).map_err(|error| {
            Error::new(ErrorCode::System, format!("no random numbers: {error}"))
        })?;
        let text = read(path)?;
        let lines = lines(path, &text)?;
        let of = |role: Role| -> Result<(Role, blake3::Hash)> {
            let token = lines.iter().find(|(known, _)| *known == role).ok_or_else(|| {
                refuse(path, format!("there is no line {} = TOKEN: add one", role.name()))
            })?;
            Ok((role, blake3::keyed_hash(&key, token.1.as_bytes())))
        };
        let hashes = [of(Role::Data)?, of(Role::Admin)?, of(Role::Metrics)?];
        let [(_, data), (_, admin), (_, metrics)] = hashes;
        if data == admin || data == metrics || admin == metrics {
            return Err(refuse(path, "two of the tokens are the same: make three"));
        }
        Ok(Self { key, hashes })
    }

    #[cfg(test)]
    pub(crate) fn from(tokens: [&[u8]; 3]) -> Self {
        let key = [7; 32];
        let [data, admin, metrics] = tokens.map(|token| blake3::keyed_hash(&key, token));
        Self { key, hashes: [(Role::Data, data), (Role::Admin, admin), (Role::Metrics, metrics)] }
    }

    /// Whose token this is. All are compared, so that the time does not tell which.
    pub(crate) fn role(&self, given: &[u8]) -> Option<Role> {
        let given = blake3::keyed_hash(&self.key, given);
        self.hashes.iter().fold(None, |found, (role, hash)| match *hash == given {
            true => Some(*role),
            false => found,
        })
    }
}

/// The first token of these roles that a file has, for whoever asks a server.
///
/// # Errors
/// [`ErrorCode::InvalidArgument`] with the file, the line and the remedy; [`ErrorCode::System`].
pub fn read_token(path: &Path, roles: &[Role]) -> Result<String> {
    let text = read(path)?;
    let lines = lines(path, &text)?;
    let token = roles.iter().find_map(|role| lines.iter().find(|(known, _)| known == role));
    token.map(|(_, token)| (*token).to_owned()).ok_or_else(|| {
        let names: Vec<_> = roles.iter().map(|role| role.name()).collect();
        refuse(path, format!("there is no line {} = TOKEN: add one", names.join(" or ")))
    })
}

fn refuse(path: &Path, what: impl std::fmt::Display) -> Error {
    Error::invalid(format!("token file {}: {what}", path.display()))
}

/// `NAME = TOKEN` on each line that is neither empty nor a comment.
fn lines<'a>(path: &Path, text: &'a str) -> Result<Vec<(Role, &'a str)>> {
    let mut found: Vec<(Role, &str)> = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let refuse = |what: &str| Err(refuse(path, format!("line {number}: {what}")));
        let Some((name, token)) = line.split_once('=') else {
            return refuse("write NAME = TOKEN, or begin a comment with #");
        };
        let Some(role) = Role::from_name(name.trim()) else {
            return refuse("the name is none of data, admin, metrics");
        };
        let token = token.trim();
        if !(TOKEN_MIN..=TOKEN_MAX).contains(&token.len()) {
            return refuse("a token has 32 to 255 characters: make one with openssl rand -hex 32");
        }
        // What a header Authorization: Bearer takes.
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~+/=".contains(&byte);
        if !token.bytes().all(fits) {
            return refuse("a token has letters, digits and -._~+/= only");
        }
        if found.iter().any(|(known, _)| *known == role) {
            return refuse("the name comes twice: remove one");
        }
        found.push((role, token));
    }
    Ok(found)
}

/// The text of a file that its owner alone may read.
fn read(path: &Path) -> Result<String> {
    let cannot = |error: io::Error| {
        Error::system(format!("cannot read the token file {}", path.display()), &error)
    };
    if !fs::metadata(path).map_err(cannot)?.is_file() {
        return Err(refuse(path, "it is no file: give another one")); // a pipe would be waited for
    }
    let file = File::open(path).map_err(cannot)?;
    #[cfg(unix)]
    {
        let metadata = file.metadata().map_err(cannot)?;
        let mode = std::os::unix::fs::MetadataExt::mode(&metadata) & 0o777;
        if mode & 0o077 != 0 {
            let what = format!("others may use it (mode {mode:03o}): chmod 600 it");
            return Err(refuse(path, what));
        }
    }
    let mut text = String::new();
    let read = file.take(FILE_MAX + 1).read_to_string(&mut text);
    match read {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            Err(refuse(path, "it is no text: write it anew"))
        }
        Err(error) => Err(cannot(error)),
        Ok(_) if text.len() as u64 > FILE_MAX => {
            Err(refuse(path, format!("it has more than {FILE_MAX} bytes: give another one")))
        }
        Ok(_) => Ok(text),
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
    use std::path::PathBuf;

    use super::*;

    struct Temporary(PathBuf);

    impl Temporary {
        fn new(name: &str, text: &[u8]) -> Self {
            let name = format!("kvferry-tokens-{}-{name}", std::process::id());
            let path = std::env::temp_dir().join(name);
            let _ = fs::remove_file(&path);
            let mut options = File::options();
            let mut file =
                options.write(true).create_new(true).mode(0o600).open(&path).expect("a new file");
            file.write_all(text).expect("room for it");
            Self(path)
        }
    }

    impl Drop for Temporary {
        fn drop(&mut self) {
            let _ = fs::remove_file(&self.0);
        }
    }

    fn token(letter: &str) -> String {
        letter.repeat(TOKEN_MIN)
    }

    fn whole() -> String {
        let (data, admin, metrics) = (token("d"), token("a"), token("m"));
        format!("# ours\n\n data = {data}\nadmin={admin}==\r\n\tmetrics =\t{metrics} \n")
    }

    #[test]
    fn each_token_is_known_by_its_role_and_nothing_else_is() {
        let file = Temporary::new("roles", whole().as_bytes());
        let tokens = Tokens::open(&file.0).unwrap();
        assert_eq!(tokens.role(token("d").as_bytes()), Some(Role::Data));
        assert_eq!(tokens.role(format!("{}==", token("a")).as_bytes()), Some(Role::Admin));
        assert_eq!(tokens.role(token("m").as_bytes()), Some(Role::Metrics));
        for other in ["", "d", &token("d")[1..], &token("D"), &token("dd"), "data"] {
            assert_eq!(tokens.role(other.as_bytes()), None, "{other:?}");
        }
        let roles = [Role::Admin, Role::Data];
        assert_eq!(read_token(&file.0, &roles).unwrap(), format!("{}==", token("a")));
        let file = Temporary::new("one", format!("data = {}", token("d")).as_bytes());
        assert_eq!(read_token(&file.0, &roles).unwrap(), token("d"));
        let error = read_token(&file.0, &[Role::Metrics]).unwrap_err();
        assert!(error.message.contains("no line metrics = TOKEN"), "{error}");
    }

    #[test]
    fn what_is_wrong_is_named_by_its_line_and_no_token_is_told() {
        let secret = "s3cret".repeat(6);
        let with = |line: &str| whole().replace("# ours", &line.replace("SECRET", &secret));
        for (text, part) in [
            (with("SECRET"), "line 1: write NAME = TOKEN"),
            (with("date = SECRET"), "line 1: the name is none of data, admin, metrics"),
            (with("data = SECRET"), "line 3: the name comes twice"),
            (with("data = s3cret"), "line 1: a token has 32 to 255 characters"),
            (with(&format!("data = {}", "SECRET".repeat(8))), "line 1: a token has 32 to 255"),
            (with("data = SECRET SECRET"), "letters, digits and"),
            (with("data = SECRETé"), "letters, digits and"),
            (format!("data = {secret}\nadmin = {secret}s"), "no line metrics = TOKEN"),
            (format!("data={secret}\nadmin={secret}\nmetrics={secret}1"), "are the same"),
            (format!("#{}", " ".repeat(70_000)), "more than 65536 bytes"),
        ] {
            let file = Temporary::new("wrong", text.as_bytes());
            let error = Tokens::open(&file.0).err().unwrap();
            assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
            assert!(error.message.contains(part), "{part}: {error}");
            assert!(!error.message.contains("s3cret"), "{error}");
        }
        let file = Temporary::new("binary", b"\xff\xfe");
        assert!(Tokens::open(&file.0).err().unwrap().message.contains("it is no text"));
    }

    #[test]
    fn a_file_that_others_may_read_is_refused() {
        let file = Temporary::new("open", whole().as_bytes());
        for mode in [0o640, 0o604, 0o620, 0o602, 0o777] {
            fs::set_permissions(&file.0, fs::Permissions::from_mode(mode)).unwrap();
            let error = Tokens::open(&file.0).err().unwrap();
            assert_eq!(error.code, ErrorCode::InvalidArgument);
            assert!(error.message.contains(&format!("mode {mode:o}): chmod 600")), "{error}");
        }
        fs::set_permissions(&file.0, fs::Permissions::from_mode(0o400)).unwrap();
        Tokens::open(&file.0).unwrap();
        let error = Tokens::open(&std::env::temp_dir()).err().unwrap();
        assert!(error.message.contains("it is no file"), "{error}");
        let error = Tokens::open(Path::new("/nothing/there")).err().unwrap();
        assert_eq!(error.code, ErrorCode::System);
    }
}
