//! JSON, as much as answers need of it.

use std::fmt::Write as _;

/// An object that is written member by member.
pub(super) struct Object(String);

impl Object {
    pub(super) fn new() -> Self {
        Self("{".into())
    }

    /// A member that is JSON already, or prints as it: a whole number, `true`, another object.
    #[must_use]
    pub(super) fn raw(mut self, name: &str, value: impl std::fmt::Display) -> Self {
        if self.0.len() > 1 {
            self.0.push(',');
        }
        let _ = write!(self.0, "{}:{value}", quoted(name)); // writing into a String cannot fail
        self
    }

    #[must_use]
    pub(super) fn text(self, name: &str, value: &str) -> Self {
        self.raw(name, quoted(value))
    }

    /// Null where it is no number of JSON's.
    #[must_use]
    pub(super) fn number(self, name: &str, value: f64) -> Self {
        if value.is_finite() { self.raw(name, value) } else { self.raw(name, "null") }
    }

    pub(super) fn end(mut self) -> String {
        self.0.push('}');
        self.0
    }
}

fn quoted(text: &str) -> String {
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

/// Whether the text is this object of one member and nothing else, however it is spaced. There is no parser of
/// JSON in the server: the first body that says more than this brings one.
pub(super) fn is_confirmation(text: &[u8]) -> bool {
    let tokens: [&[u8]; 5] = [b"{", b"\"confirm\"", b":", b"true", b"}"];
    let skip = |text: &[u8]| text.iter().take_while(|byte| b" \t\r\n".contains(byte)).count();
    let mut rest = text;
    for token in tokens {
        let Some(after) = rest[skip(rest)..].strip_prefix(token) else { return false };
        rest = after;
    }
    skip(rest) == rest.len()
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
            assert!(is_confirmation(text.as_bytes()), "{text}");
            assert_eq!(serde_json::from_str::<Value>(text).unwrap(), json!({ "confirm": true }));
        }
        for text in [
            "",
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
            assert!(!is_confirmation(text.as_bytes()), "{text}");
        }
    }
}
