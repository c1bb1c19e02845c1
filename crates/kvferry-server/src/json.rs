//! JSON, as much as answers and requests need of it.

use std::collections::HashSet;
use std::fmt::{self, Write as _};

use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// An object that is written member by member.
pub(crate) struct Object(String);

impl Object {
    pub(crate) fn new() -> Self {
        Self("{".into())
    }

    /// A member that is JSON already, or prints as it: a whole number, `true`, another object.
    #[must_use]
    pub(crate) fn raw(mut self, name: &str, value: impl fmt::Display) -> Self {
        if self.0.len() > 1 {
            self.0.push(',');
        }
        let _ = write!(self.0, "{}:{value}", quoted(name)); // writing into a String cannot fail
        self
    }

    #[must_use]
    pub(crate) fn text(self, name: &str, value: &str) -> Self {
        self.raw(name, quoted(value))
    }

    /// Null where it is no number of JSON's.
    #[must_use]
    pub(crate) fn number(self, name: &str, value: f64) -> Self {
        if value.is_finite() { self.raw(name, value) } else { self.raw(name, "null") }
    }

    pub(crate) fn end(mut self) -> String {
        self.0.push('}');
        self.0
    }
}

/// A list of values that are JSON already.
pub(crate) fn array(values: impl IntoIterator<Item = String>) -> String {
    let values: Vec<String> = values.into_iter().collect();
    format!("[{}]", values.join(","))
}

/// A text with its quotation marks.
pub(crate) fn quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\0'..='\x1f' => {
                let _ = write!(quoted, "\\u{:04x}", u32::from(c));
            }
            _ => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// A value that was read; members are in their order, and no name comes twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Value {
    Null,
    Boolean(bool),
    Whole(u64),
    Text(String),
    Object(Vec<(String, Value)>),
    /// Something that nobody asks for, and what it is.
    Other(&'static str),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Boolean(value) => value.fmt(f),
            Self::Whole(value) => value.fmt(f),
            Self::Text(text) => f.write_str(&quoted(text)),
            Self::Object(_) => f.write_str("an object"),
            Self::Other(what) => f.write_str(what),
        }
    }
}

/// Reads a text that is one value and nothing else. The error says what is wrong and where, and nothing of what is
/// there: it may be a secret.
pub(crate) fn parse(text: &[u8]) -> Result<Value, String> {
    serde_json::from_slice(text).map_err(|error| format!("no JSON: {error}"))
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Reader)
    }
}

struct Reader;

impl<'de> Visitor<'de> for Reader {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Boolean(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Whole(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(u64::try_from(value).map_or(Value::Other("a negative number"), Value::Whole))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Value, E> {
        Ok(Value::Other("a fraction, or too large"))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Value::Other("a list"))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let (mut members, mut names) = (Vec::new(), HashSet::new());
        while let Some(name) = map.next_key::<String>()? {
            if !names.insert(name.clone()) {
                return Err(A::Error::custom("a name comes twice"));
            }
            members.push((name, map.next_value()?));
        }
        Ok(Value::Object(members))
    }
}

/// Whether the text says `{"confirm":true}` and nothing else but perhaps a `salt`, which is told.
pub(crate) fn confirmation(text: &[u8]) -> Option<Option<String>> {
    let Ok(Value::Object(members)) = parse(text) else { return None };
    let confirmed = |(name, value): &(String, Value)| {
        name == "confirm" && matches!(value, Value::Boolean(true))
    };
    let salt = members.iter().find_map(|(name, value)| match value {
        Value::Text(salt) if name == "salt" => Some(salt.clone()),
        _ => None,
    });
    let known = 1 + usize::from(salt.is_some());
    (members.iter().any(confirmed) && members.len() == known).then_some(salt)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn what_is_written_reads_back_as_the_same() {
        let nasty = "\0\x01\n\"\\/ü\u{2028}\u{10ffff}";
        let written = Object::new()
            .text(nasty, nasty)
            .raw("n", u64::MAX)
            .number("f", 1.0e-9)
            .number("nan", f64::NAN)
            .raw("o", Object::new().end())
            .end();
        let read: Value = serde_json::from_str(&written).unwrap();
        let f = 1.0e-9;
        assert_eq!(read, json!({ nasty: nasty, "n": u64::MAX, "f": f, "nan": null, "o": {} }));
    }

    #[test]
    fn a_confirmation_says_so_and_nothing_else() {
        for text in [r#"{"confirm":true}"#, " \r\n{\t\"confirm\" : true } \n"] {
            assert_eq!(confirmation(text.as_bytes()), Some(None), "{text}");
            assert_eq!(serde_json::from_str::<Value>(text).unwrap(), json!({ "confirm": true }));
        }
        let salted = confirmation(br#"{"salt":"a","confirm":true}"#);
        assert_eq!(salted, Some(Some("a".into())));
        for text in [
            "",
            r#"{"salt":"a"}"#,
            r#"{"confirm":true,"salt":null}"#,
            "{}",
            "true",
            r#"{"confirm":false}"#,
            r#"{"confirm":"true"}"#,
            r#"{"confirm":1}"#,
            r#"{"confirm":true,}"#,
            r#"{"confirm":true,"a":1}"#,
            r#"{"confirm":true}}"#,
            r#"{"con firm":true}"#,
            r#"[{"confirm":true}]"#,
            "\u{feff}{\"confirm\":true}",
        ] {
            assert_eq!(confirmation(text.as_bytes()), None, "{text}");
        }
    }
}
