//! Quotas of tenants: the file that keeps them, and the names that tenants have in figures.
//!
//! A salt may be a secret. It is in the file and in answers to whoever asks for quotas, and in no message of a start,
//! which ends in logs, and in no metric.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use kvferry_core::key::check_salt;
use kvferry_core::{Error, ErrorCode, Result};
use kvferry_store::{Quota, Quotas, Store, TenantStatus};

use crate::json::{self, Object, Value};

/// Bytes of the file at most.
const FILE_MAX: u64 = 16 << 20;
/// The largest whole number that every reader of JSON keeps as it is.
const BYTES_MAX: u64 = (1 << 53) - 1;
/// Tenants with figures of their own at most; the others have theirs together.
const SHOWN_MAX: usize = 100;
/// Units of sizes, as `kvferry serve` takes them.
const UNITS: [(&str, u64); 5] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// Where quotas are changed and kept.
pub(crate) struct QuotaBook {
    file: Option<PathBuf>,
    /// Hides salts in figures.
    labels: Labels,
    /// Held while they are changed, so that the file has what holds.
    changing: Mutex<()>,
}

/// A tenant in `/metrics`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Shown {
    pub(crate) label: String,
    pub(crate) used_bytes: u64,
    pub(crate) objects: u64,
    pub(crate) evicted_bytes: u64,
    /// `None` for several together.
    pub(crate) quota: Option<Quota>,
}

/// Sets the quotas of a file; one that is not there has none.
///
/// # Errors
/// [`ErrorCode::InvalidArgument`] or [`ErrorCode::InvalidSalt`] with the file, the key and the remedy;
/// [`ErrorCode::System`].
pub fn load_quotas(file: &Path, store: &Store) -> Result<()> {
    let told = |error: Error| {
        let remedy = "correct the file, or start without it";
        Error::new(error.code, format!("{}: {}; {remedy}", file.display(), error.message))
    };
    let Some(text) = read(file)? else { return Ok(()) };
    let value = json::parse(&text).map_err(|error| told(Error::invalid(error)))?;
    store.set_quotas(quotas(&value).map_err(told)?).map_err(told)
}

/// What tenants are called where their salts are not told.
#[derive(Clone, Copy)]
pub(crate) struct Labels(pub(crate) [u8; 32]);

impl Labels {
    pub(crate) fn of(self, salt: &str) -> String {
        if salt.is_empty() {
            return "none".into();
        }
        blake3::keyed_hash(&self.0, salt.as_bytes()).to_hex()[..16].to_owned()
    }
}

impl QuotaBook {
    /// Sets the quotas of the file, where there is one.
    pub(crate) fn open(file: Option<&Path>, store: &Store) -> Result<Self> {
        let mut key = [0; 32];
        getrandom::fill(&mut key).map_err(|error| {
            Error::new(ErrorCode::System, format!("no random numbers: {error}"))
        })?;
        if let Some(file) = file {
            load_quotas(file, store)?;
            key = kept_key(&beside(file, ".key"), key)?;
        }
        Ok(Self { file: file.map(Path::to_owned), labels: Labels(key), changing: Mutex::default() })
    }

    /// Whether quotas outlive the server.
    pub(crate) fn is_persistent(&self) -> bool {
        self.file.is_some()
    }

    /// Changes quotas: all of it or nothing.
    pub(crate) fn change<T>(
        &self,
        store: &Store,
        change: impl FnOnce(&mut Quotas) -> Result<T>,
    ) -> Result<T> {
        let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut quotas = store.quotas();
        let changed = change(&mut quotas)?;
        quotas.check(store.pool().1)?;
        if let Some(file) = &self.file {
            replace(file, text(&quotas).as_bytes()).map_err(|error| {
                Error::system(format!("cannot write {}", file.display()), &error)
            })?;
        }
        store.set_quotas(quotas)?;
        Ok(changed)
    }

    /// What a tenant is called in figures.
    pub(crate) fn label(&self, salt: &str) -> String {
        self.labels.of(salt)
    }

    pub(crate) fn labels(&self) -> Labels {
        self.labels
    }

    /// The largest tenants, and the others together.
    pub(crate) fn shown(&self, mut tenants: Vec<TenantStatus>) -> Vec<Shown> {
        tenants.sort_by_key(|tenant| std::cmp::Reverse(tenant.used_bytes));
        let others = tenants.split_off(tenants.len().min(SHOWN_MAX));
        let mut shown: Vec<_> = tenants
            .into_iter()
            .map(|tenant| Shown {
                label: self.label(&tenant.cache_salt),
                used_bytes: tenant.used_bytes,
                objects: tenant.objects,
                evicted_bytes: tenant.evicted_bytes,
                quota: Some(tenant.quota),
            })
            .collect();
        shown.sort_by(|a, b| a.label.cmp(&b.label));
        if !others.is_empty() {
            let sum = |figure: fn(&TenantStatus) -> u64| others.iter().map(figure).sum();
            shown.push(Shown {
                label: "other".into(),
                used_bytes: sum(|tenant| tenant.used_bytes),
                objects: sum(|tenant| tenant.objects),
                evicted_bytes: sum(|tenant| tenant.evicted_bytes),
                quota: None,
            });
        }
        shown
    }
}

/// All quotas of a document: `{"default":…,"tenants":{SALT:…}}`.
pub(crate) fn quotas(value: &Value) -> Result<Quotas> {
    let mut quotas = Quotas::default();
    for (name, value) in members(value, "the whole", &["default", "tenants"])? {
        if name == "default" {
            quotas.default = quota(members(value, name, &["cap", "guarantee"])?, name)?;
            continue;
        }
        let Value::Object(tenants) = value else {
            return Err(Error::invalid("tenants is no object: give {\"SALT\":{\"cap\":…}}"));
        };
        for (number, (salt, value)) in tenants.iter().enumerate() {
            let place = format!("tenants, number {}", number + 1);
            check_salt(salt)
                .map_err(|error| Error::new(error.code, format!("{place}: {}", error.message)))?;
            let quota = quota(members(value, &place, &["cap", "guarantee"])?, &place)?;
            if let Some(cap) = quota.cap.filter(|cap| *cap < quota.guarantee) {
                return Err(Error::invalid(format!(
                    "{place}: cap, {cap} bytes, is below guarantee, {}: raise it or guarantee less",
                    quota.guarantee
                )));
            }
            quotas.named.insert(salt.clone(), quota);
        }
    }
    Ok(quotas)
}

/// The members of an object that has no others.
pub(crate) fn members<'a>(
    value: &'a Value,
    place: &str,
    known: &[&str],
) -> Result<&'a [(String, Value)]> {
    let Value::Object(members) = value else {
        return Err(Error::invalid(format!(
            "{place} is no object: give one with {}",
            known.join(", ")
        )));
    };
    if let Some((name, _)) = members.iter().find(|(name, _)| !known.contains(&name.as_str())) {
        let nearest = known.iter().min_by_key(|known| distance(name, known)).unwrap_or(&"");
        return Err(Error::invalid(format!(
            "{place} has a key {name:?}: did you mean {nearest:?}? It takes {}",
            known.join(", ")
        )));
    }
    Ok(members)
}

/// What `cap` and `guarantee` of these say; others are somebody else's.
pub(crate) fn quota(members: &[(String, Value)], place: &str) -> Result<Quota> {
    let mut quota = Quota::default();
    for (name, value) in members {
        let size = match value {
            Value::Null if name == "cap" => None,
            Value::Whole(bytes) if *bytes <= BYTES_MAX => Some(*bytes),
            Value::Text(text) => bytes(text),
            _ => None,
        };
        match (name.as_str(), size) {
            ("cap", Some(_)) => quota.cap = size,
            ("cap", None) if *value == Value::Null => quota.cap = None,
            ("guarantee", Some(bytes)) => quota.guarantee = bytes,
            ("cap" | "guarantee", None) => {
                let or_none = if name == "cap" { ", or null for none" } else { "" };
                return Err(Error::invalid(format!(
                    "{place}: {name} is {value}: give whole bytes below 2^53, or a size such as \"512MiB\" \
                     (B, KiB, MiB, GiB, TiB){or_none}"
                )));
            }
            _ => {}
        }
    }
    Ok(quota)
}

/// A size as people write it.
fn bytes(text: &str) -> Option<u64> {
    let (number, unit) = UNITS
        .iter()
        .find_map(|(name, unit)| text.strip_suffix(name).map(|number| (number, *unit)))
        .unwrap_or((text, 1));
    let (whole, part) = number.trim_end().split_once('.').unwrap_or((number.trim_end(), "0"));
    let digits = |text: &str| {
        let all = !text.is_empty() && text.len() <= 18 && text.bytes().all(|b| b.is_ascii_digit());
        text.parse::<u128>().ok().filter(|_| all)
    };
    let part_of = 10_u128.pow(u32::try_from(part.len().min(18)).unwrap_or(18));
    let unit = u128::from(unit);
    let bytes = digits(whole)? * unit + digits(part)? * unit / part_of;
    u64::try_from(bytes).ok().filter(|bytes| *bytes <= BYTES_MAX)
}

/// How many letters differ, about: those that are missing, too many or others.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (line, one) in a.chars().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = line + 1;
        for (column, other) in b.iter().enumerate() {
            let changed = diagonal + usize::from(one != *other);
            diagonal = row[column + 1];
            row[column + 1] = changed.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[b.len()]
}

/// A quota, as files and answers have it.
pub(crate) fn members_of(quota: Quota) -> Object {
    let cap = quota.cap.map_or_else(|| "null".to_owned(), |cap| cap.to_string());
    Object::new().raw("cap", cap).raw("guarantee", quota.guarantee)
}

/// The file's text: a tenant on each line.
fn text(quotas: &Quotas) -> String {
    let mut text = format!("{{\n\"default\":{},\n\"tenants\":{{", members_of(quotas.default).end());
    for (place, (salt, quota)) in quotas.named.iter().enumerate() {
        text += if place == 0 { "\n" } else { ",\n" };
        text += &format!("{}:{}", json::quoted(salt), members_of(*quota).end());
    }
    text + "\n}\n}\n"
}

fn beside(file: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(file);
    name.push(suffix);
    name.into()
}

/// What is in a file; `None` where there is none.
fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    let cannot =
        |error: &io::Error| Error::system(format!("cannot read {}", path.display()), error);
    let file = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(cannot(&error)),
        Ok(found) if !found.is_file() => {
            let what = format!("{} is no file: give another one", path.display());
            return Err(Error::invalid(what));
        }
        Ok(_) => File::open(path).map_err(|error| cannot(&error))?,
    };
    let mut text = Vec::new();
    file.take(FILE_MAX + 1).read_to_end(&mut text).map_err(|error| cannot(&error))?;
    if text.len() as u64 > FILE_MAX {
        let what = format!("{} has more than {FILE_MAX} bytes: name fewer tenants", path.display());
        return Err(Error::invalid(what));
    }
    Ok(Some(text))
}

/// The key that labels are made with, so that they outlive the server: `fresh` where there is none yet.
fn kept_key(path: &Path, fresh: [u8; 32]) -> Result<[u8; 32]> {
    let Some(text) = read(path)? else {
        let hex: String = fresh.iter().map(|byte| format!("{byte:02x}")).collect();
        replace(path, format!("{hex}\n").as_bytes()).map_err(|error| {
            let doing = format!("cannot write {} (make its directory, writable)", path.display());
            Error::system(doing, &error)
        })?;
        return Ok(fresh);
    };
    let hex = std::str::from_utf8(&text).ok().map(str::trim);
    let key = hex.and_then(|hex| blake3::Hash::from_hex(hex).ok());
    key.map(|key| *key.as_bytes()).ok_or_else(|| {
        Error::invalid(format!(
            "{} is no key of 64 hex digits: remove it, and tenants get other labels",
            path.display()
        ))
    })
}

/// Puts a whole file in another's place, for its owner only; whatever stops in between leaves one of the two.
fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let new = beside(path, ".new");
    let _ = fs::remove_file(&new); // of a server that was stopped half-way
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(&new)?;
    let written = file.write_all(text).and_then(|()| file.sync_all());
    drop(file);
    if let Err(error) = written.and_then(|()| fs::rename(&new, path)) {
        let _ = fs::remove_file(&new); // the first error says more
        return Err(error);
    }
    #[cfg(unix)]
    {
        let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty());
        File::open(directory.unwrap_or_else(|| Path::new(".")))?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Quotas> {
        quotas(&json::parse(text.as_bytes()).map_err(Error::invalid)?)
    }

    fn refused(text: &str) -> String {
        parsed(text).unwrap_err().message
    }

    #[test]
    fn sizes_are_bytes_or_what_people_write() {
        let sizes = [
            ("0", 0),
            ("1", 1),
            ("7B", 7),
            ("1.5 KiB", 1536),
            ("4GiB", 4 << 30),
            ("1TiB", 1 << 40),
        ];
        for (text, size) in sizes {
            assert_eq!(bytes(text), Some(size), "{text}");
        }
        for text in
            ["", "B", "-1", "1GB", "1.", ".5", "1.5.1", "9999999TiB", "+1", "1e3", "0x1", "٣"]
        {
            assert_eq!(bytes(text), None, "{text}");
        }
    }

    #[test]
    fn what_is_written_reads_back_as_the_same() {
        let salts = ["", "a\"b", "ü\n", "default"];
        let named = salts.map(|salt| (salt.to_owned(), Quota { cap: Some(9), guarantee: 7 }));
        let default = Quota { cap: None, guarantee: 1 };
        let all = Quotas { named: named.into(), default };
        assert_eq!(parsed(&text(&all)).unwrap(), all);
        assert_eq!(parsed(&text(&Quotas::default())).unwrap(), Quotas::default());
        assert_eq!(parsed("{}").unwrap(), Quotas::default());
    }

    #[test]
    fn what_is_wrong_is_named_but_no_salt() {
        let secret = r#"{"tenants":{"a":{},"s3cret":QUOTA}}"#;
        let of = |quota: &str| refused(&secret.replace("QUOTA", quota));
        for (message, part) in [
            (of(r#"{"cap":-1}"#), "tenants, number 2: cap is a negative number"),
            (of(r#"{"cap":1.5}"#), "cap is a fraction"),
            (of(r#"{"cap":"lots"}"#), "cap is \"lots\""),
            (of(r#"{"guarantee":null}"#), "guarantee is null"),
            (of(r#"{"garantee":1}"#), "did you mean \"guarantee\"? It takes cap, guarantee"),
            (of(r#"{"caps":1}"#), "did you mean \"cap\"?"),
            (of(r#"{"cap":1,"guarantee":2}"#), "number 2: cap, 1 bytes, is below guarantee, 2"),
            (of("[]"), "tenants, number 2 is no object"),
            (of("{},\"s3cret\":{}"), "a name comes twice"),
            (of("{\"cap\":1"), "line 1 column"),
            (refused(r#"{"tenant":{}}"#), "did you mean \"tenants\"?"),
            (refused(r#"{"tenants":[]}"#), "tenants is no object"),
            (refused("[]"), "the whole is no object"),
            (
                refused(r#"{"tenants":{"s3cret/":{}}}"#),
                "tenants, number 1: a salt must not contain '/'",
            ),
            (refused(&"{\"a\":".repeat(1000)), "recursion"),
        ] {
            assert!(message.contains(part), "{part}: {message}");
            assert!(!message.contains("s3cret"), "{message}");
        }
    }

    #[test]
    fn the_largest_hundred_are_shown_and_the_others_together() {
        let book = QuotaBook { file: None, labels: Labels([7; 32]), changing: Mutex::default() };
        let tenant = |used: u64| TenantStatus {
            cache_salt: format!("{used}"),
            quota: Quota::default(),
            named: false,
            used_bytes: used,
            objects: 1,
            evicted_objects: 0,
            evicted_bytes: 2,
        };
        assert_eq!(book.shown((0..100).map(tenant).collect()).len(), 100);
        let shown = book.shown((0..103).map(tenant).collect());
        assert_eq!(shown.len(), 101);
        let other = Shown {
            label: "other".into(),
            used_bytes: 1 + 2,
            objects: 3,
            evicted_bytes: 6,
            quota: None,
        };
        assert_eq!(shown[100], other);
        assert_eq!(book.label(""), "none");
        assert_eq!(book.label("a").len(), 16);
        let others = QuotaBook { file: None, labels: Labels([8; 32]), changing: Mutex::default() };
        assert_ne!(book.label("a"), others.label("a"));
    }
}
