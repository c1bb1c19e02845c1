//! MessagePack, as much as the messages need: a strict reader over a byte slice and a writer whose
//! output is LMCache's (msgspec's) byte for byte.

use std::fmt;
use std::sync::Arc;

use rmp::Marker;
use rmp::encode::ByteBuf;

/// Elements that a list of names or counters may have.
const SHORT_MAX: usize = 1024;
/// How deep an ignored or opaque value may nest.
const DEPTH_MAX: u32 = 16;

/// A frame that is not what the message's grammar says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Malformed {
    /// The field or parameter; empty for the frame itself.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// Fewer bytes than announced.
    #[error("the frame ends before the value does")]
    Truncated,
    /// The frame goes on after its value.
    #[error("{0} bytes follow the value")]
    Trailing(usize),
    /// Another type.
    #[error("expected {expected}, found {found}")]
    Type {
        /// The type of the grammar.
        expected: &'static str,
        /// The type in the frame.
        found: &'static str,
    },
    /// An integer that is negative or too large.
    #[error("{0} is out of range")]
    Range(i128),
    /// A string that is not UTF-8.
    #[error("the string is not UTF-8")]
    NotUtf8,
    /// A key that is there twice.
    #[error("the key is there twice")]
    Duplicate,
    /// A key without a default that is not there.
    #[error("the key is missing")]
    Missing,
    /// Nesting beyond 16 levels.
    #[error("values nest deeper than {DEPTH_MAX} levels")]
    Depth,
    /// A list or map of more entries than it ever has.
    #[error("{0} entries are too many")]
    TooLong(usize),
    /// An element type without a known size.
    #[error("no element type of this name is known")]
    Dtype,
    /// Two lists that belong together differ in length, or a value differs from its siblings.
    #[error("{0}")]
    Inconsistent(&'static str),
}

impl Problem {
    /// A name for counters.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Truncated => "truncated",
            Self::Trailing(_) => "trailing_bytes",
            Self::Type { .. } => "wrong_type",
            Self::Range(_) => "out_of_range",
            Self::NotUtf8 => "not_utf8",
            Self::Duplicate => "duplicate_key",
            Self::Missing => "missing_key",
            Self::Depth => "too_deep",
            Self::TooLong(_) => "too_long",
            Self::Dtype => "unknown_dtype",
            Self::Inconsistent(_) => "inconsistent",
        }
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.field {
            "" => self.problem.fmt(f),
            field => write!(f, "{field}: {}", self.problem),
        }
    }
}

impl std::error::Error for Malformed {}

impl From<Problem> for Malformed {
    fn from(problem: Problem) -> Self {
        Self { field: "", problem }
    }
}

pub(crate) type Result<T, E = Malformed> = std::result::Result<T, E>;

/// Names the field of an error that has none yet: the innermost name is kept.
pub(crate) fn within<T>(field: &'static str, result: Result<T>) -> Result<T> {
    result.map_err(|e| if e.field.is_empty() { Malformed { field, ..e } } else { e })
}

/// Fills a map's field, once.
pub(crate) fn once<T>(slot: &mut Option<T>, field: &'static str, value: Result<T>) -> Result<()> {
    match slot.replace(within(field, value)?) {
        None => Ok(()),
        Some(_) => Err(Malformed { field, problem: Problem::Duplicate }),
    }
}

/// The value of a map's field that has no default.
pub(crate) fn required<T>(slot: Option<T>, field: &'static str) -> Result<T> {
    slot.ok_or(Malformed { field, problem: Problem::Missing })
}

/// Decodes a whole frame: bytes that follow the value are an error.
pub(crate) fn frame<'a, T>(
    bytes: &'a [u8],
    decode: impl FnOnce(&mut Reader<'a>) -> Result<T>,
) -> Result<T> {
    let mut reader = Reader { rest: bytes };
    let value = decode(&mut reader)?;
    match reader.rest.len() {
        0 => Ok(value),
        left => Err(Problem::Trailing(left).into()),
    }
}

/// The kinds that a value of several types is told apart by.
pub(crate) enum Kind {
    String,
    Float,
    Other,
}

/// Reads values from the front of a slice. Nothing is allocated for a length before as many bytes
/// are known to be there.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(bytes).ok_or(Problem::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(Problem::Truncated)?;
        self.rest = rest;
        Ok(*taken)
    }

    fn length_u8(&mut self) -> Result<usize> {
        Ok(usize::from(u8::from_be_bytes(self.array()?)))
    }

    fn length_u16(&mut self) -> Result<usize> {
        Ok(usize::from(u16::from_be_bytes(self.array()?)))
    }

    fn length_u32(&mut self) -> Result<usize> {
        usize::try_from(u32::from_be_bytes(self.array()?)).map_err(|_| Problem::Truncated.into())
    }

    fn marker(&mut self) -> Result<Marker> {
        let [byte] = self.array()?;
        Ok(Marker::from_u8(byte))
    }

    /// What kind of value comes next.
    pub(crate) fn kind(&self) -> Kind {
        match self.peek() {
            Some(Marker::FixStr(_) | Marker::Str8 | Marker::Str16 | Marker::Str32) => Kind::String,
            Some(Marker::F32 | Marker::F64) => Kind::Float,
            _ => Kind::Other,
        }
    }

    fn peek(&self) -> Option<Marker> {
        self.rest.first().map(|byte| Marker::from_u8(*byte))
    }

    fn integer_of(&mut self, marker: Marker, expected: &'static str) -> Result<i128> {
        Ok(match marker {
            Marker::FixPos(value) => value.into(),
            Marker::FixNeg(value) => value.into(),
            Marker::U8 => u8::from_be_bytes(self.array()?).into(),
            Marker::U16 => u16::from_be_bytes(self.array()?).into(),
            Marker::U32 => u32::from_be_bytes(self.array()?).into(),
            Marker::U64 => u64::from_be_bytes(self.array()?).into(),
            Marker::I8 => i8::from_be_bytes(self.array()?).into(),
            Marker::I16 => i16::from_be_bytes(self.array()?).into(),
            Marker::I32 => i32::from_be_bytes(self.array()?).into(),
            Marker::I64 => i64::from_be_bytes(self.array()?).into(),
            other => return Err(unexpected(expected, other)),
        })
    }

    /// An integer in the range of `T`; `i128` takes all that MessagePack has.
    pub(crate) fn integer<T: TryFrom<i128>>(&mut self) -> Result<T> {
        let marker = self.marker()?;
        let value = self.integer_of(marker, "an integer")?;
        T::try_from(value).map_err(|_| Problem::Range(value).into())
    }

    /// An integer in the range of `T`, or nil.
    pub(crate) fn integer_or_nil<T: TryFrom<i128>>(&mut self) -> Result<Option<T>> {
        if self.nil() { Ok(None) } else { self.integer().map(Some) }
    }

    /// Takes a nil if there is one.
    pub(crate) fn nil(&mut self) -> bool {
        let nil = self.peek() == Some(Marker::Null);
        if nil {
            self.rest = &self.rest[1..];
        }
        nil
    }

    pub(crate) fn boolean(&mut self) -> Result<bool> {
        match self.marker()? {
            Marker::True => Ok(true),
            Marker::False => Ok(false),
            other => Err(unexpected("a boolean", other)),
        }
    }

    /// An integer parameter of its own frame: LMCache applies `int()` to those, so a boolean will
    /// do.
    pub(crate) fn coerced_integer(&mut self) -> Result<u64> {
        match self.peek() {
            Some(Marker::True | Marker::False) => self.boolean().map(u64::from),
            _ => self.integer(),
        }
    }

    /// A boolean parameter of its own frame: LMCache applies `bool()` to those, so an integer will
    /// do.
    pub(crate) fn coerced_bool(&mut self) -> Result<bool> {
        match self.peek() {
            Some(Marker::True | Marker::False) => self.boolean(),
            _ => Ok(self.integer::<i128>()? != 0),
        }
    }

    /// A float; as for msgspec, an integer will do.
    #[expect(clippy::cast_precision_loss, reason = "as Python's float(int)")]
    pub(crate) fn float(&mut self) -> Result<f64> {
        Ok(match self.marker()? {
            Marker::F32 => f32::from_be_bytes(self.array()?).into(),
            Marker::F64 => f64::from_be_bytes(self.array()?),
            other => self.integer_of(other, "a number")? as f64,
        })
    }

    pub(crate) fn str(&mut self) -> Result<&'a str> {
        let length = match self.marker()? {
            Marker::FixStr(length) => length.into(),
            Marker::Str8 => self.length_u8()?,
            Marker::Str16 => self.length_u16()?,
            Marker::Str32 => self.length_u32()?,
            other => return Err(unexpected("a string", other)),
        };
        str::from_utf8(self.take(length)?).map_err(|_| Problem::NotUtf8.into())
    }

    pub(crate) fn string(&mut self) -> Result<String> {
        self.str().map(str::to_owned)
    }

    pub(crate) fn bytes(&mut self) -> Result<&'a [u8]> {
        let length = match self.marker()? {
            Marker::Bin8 => self.length_u8()?,
            Marker::Bin16 => self.length_u16()?,
            Marker::Bin32 => self.length_u32()?,
            other => return Err(unexpected("bytes", other)),
        };
        self.take(length)
    }

    /// The bytes of an extension of this type.
    pub(crate) fn extension(&mut self, wanted: u8) -> Result<&'a [u8]> {
        let length = match self.marker()? {
            Marker::FixExt1 => 1,
            Marker::FixExt2 => 2,
            Marker::FixExt4 => 4,
            Marker::FixExt8 => 8,
            Marker::FixExt16 => 16,
            Marker::Ext8 => self.length_u8()?,
            Marker::Ext16 => self.length_u16()?,
            Marker::Ext32 => self.length_u32()?,
            other => return Err(unexpected("an extension", other)),
        };
        let [found] = self.array()?;
        if found != wanted {
            return Err(Problem::Inconsistent("no extension of this type is known").into());
        }
        self.take(length)
    }

    /// Bytes of a known number.
    pub(crate) fn fixed_bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let bytes = self.bytes()?.try_into();
        bytes.map_err(|_| Problem::Inconsistent("tokens have 16 bytes and hashes 32").into())
    }

    /// The length of an array; there are at least as many bytes left.
    pub(crate) fn array_len(&mut self) -> Result<usize> {
        let length = match self.marker()? {
            Marker::FixArray(length) => length.into(),
            Marker::Array16 => self.length_u16()?,
            Marker::Array32 => self.length_u32()?,
            other => return Err(unexpected("an array", other)),
        };
        if length > self.rest.len() { Err(Problem::Truncated.into()) } else { Ok(length) }
    }

    /// The number of a map's entries; there are at least twice as many bytes left.
    pub(crate) fn map_len(&mut self) -> Result<usize> {
        let length = match self.marker()? {
            Marker::FixMap(length) => length.into(),
            Marker::Map16 => self.length_u16()?,
            Marker::Map32 => self.length_u32()?,
            other => return Err(unexpected("a map", other)),
        };
        if length > self.rest.len() / 2 { Err(Problem::Truncated.into()) } else { Ok(length) }
    }

    /// Elements that each take at least `bytes_min` bytes, which bounds what is reserved.
    pub(crate) fn list<T>(
        &mut self,
        bytes_min: usize,
        mut element: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        let length = self.array_len()?;
        if length > self.rest.len() / bytes_min {
            return Err(Problem::Truncated.into());
        }
        let mut list = Vec::with_capacity(length);
        for _ in 0..length {
            list.push(element(self)?);
        }
        Ok(list)
    }

    pub(crate) fn integers<T: TryFrom<i128>>(&mut self) -> Result<Vec<T>> {
        self.list(1, Self::integer)
    }

    /// A list that is short in any honest message, whatever its elements take in memory.
    pub(crate) fn short_list<T>(
        &mut self,
        element: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        let length = self.array_len()?;
        self.short(length, element)
    }

    /// The same of a map's entries; `entry` reads key and value.
    pub(crate) fn short_map<T>(
        &mut self,
        entry: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        let length = self.map_len()?;
        self.short(length, entry)
    }

    fn short<T>(
        &mut self,
        length: usize,
        mut element: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        if length > SHORT_MAX {
            return Err(Problem::TooLong(length).into());
        }
        (0..length).map(|_| element(self)).collect()
    }

    /// Token ids: the one list that is long, so it has its own loop and is built in place.
    pub(crate) fn token_ids(&mut self) -> Result<Arc<[u32]>> {
        let length = self.array_len()?;
        let mut tokens: Arc<[u32]> = std::iter::repeat_n(0, length).collect();
        for token in Arc::make_mut(&mut tokens) {
            *token = match *self.rest {
                [value @ 0..=0x7f, ref rest @ ..] => {
                    self.rest = rest;
                    value.into()
                }
                [0xcd, a, b, ref rest @ ..] => {
                    self.rest = rest;
                    u16::from_be_bytes([a, b]).into()
                }
                [0xce, a, b, c, d, ref rest @ ..] => {
                    self.rest = rest;
                    u32::from_be_bytes([a, b, c, d])
                }
                _ => self.integer()?,
            };
        }
        Ok(tokens)
    }

    /// The bytes of a map that nobody looks into, or nil.
    pub(crate) fn opaque_map_or_nil(&mut self) -> Result<Option<&'a [u8]>> {
        match self.peek() {
            Some(Marker::FixMap(_) | Marker::Map16 | Marker::Map32) => self.skip().map(Some),
            _ if self.nil() => Ok(None),
            Some(other) => Err(unexpected("a map", other)),
            None => Err(Problem::Truncated.into()),
        }
    }

    /// Steps over one value of any kind and returns its bytes; its strings must be UTF-8.
    pub(crate) fn skip(&mut self) -> Result<&'a [u8]> {
        let before = self.rest;
        self.skip_nested(DEPTH_MAX)?;
        Ok(&before[..before.len() - self.rest.len()])
    }

    fn skip_nested(&mut self, depth: u32) -> Result<()> {
        let nested = match self.peek().ok_or(Problem::Truncated)? {
            Marker::FixArray(_) | Marker::Array16 | Marker::Array32 => self.array_len()?,
            Marker::FixMap(_) | Marker::Map16 | Marker::Map32 => self.map_len()? * 2,
            _ => return self.skip_scalar(),
        };
        let depth = depth.checked_sub(1).ok_or(Problem::Depth)?;
        (0..nested).try_for_each(|_| self.skip_nested(depth))
    }

    fn skip_scalar(&mut self) -> Result<()> {
        let marker = self.peek().ok_or(Problem::Truncated)?;
        if matches!(marker, Marker::FixStr(_) | Marker::Str8 | Marker::Str16 | Marker::Str32) {
            return self.str().map(drop);
        }
        if matches!(marker, Marker::Bin8 | Marker::Bin16 | Marker::Bin32) {
            return self.bytes().map(drop);
        }
        self.marker()?;
        let length = match marker {
            Marker::Null | Marker::True | Marker::False => 0,
            Marker::F32 => 4,
            Marker::F64 => 8,
            // An extension's length does not count its type byte.
            Marker::FixExt1 => 2,
            Marker::FixExt2 => 3,
            Marker::FixExt4 => 5,
            Marker::FixExt8 => 9,
            Marker::FixExt16 => 17,
            Marker::Ext8 => self.length_u8()? + 1,
            Marker::Ext16 => self.length_u16()? + 1,
            Marker::Ext32 => self.length_u32()?.saturating_add(1),
            other => return self.integer_of(other, "a value").map(drop),
        };
        self.take(length).map(drop)
    }
}

fn unexpected(expected: &'static str, found: Marker) -> Malformed {
    let found = match found {
        Marker::Null => "nil",
        Marker::True | Marker::False => "a boolean",
        Marker::F32 | Marker::F64 => "a float",
        Marker::FixStr(_) | Marker::Str8 | Marker::Str16 | Marker::Str32 => "a string",
        Marker::Bin8 | Marker::Bin16 | Marker::Bin32 => "bytes",
        Marker::FixArray(_) | Marker::Array16 | Marker::Array32 => "an array",
        Marker::FixMap(_) | Marker::Map16 | Marker::Map32 => "a map",
        Marker::FixPos(_)
        | Marker::FixNeg(_)
        | Marker::U8
        | Marker::U16
        | Marker::U32
        | Marker::U64
        | Marker::I8
        | Marker::I16
        | Marker::I32
        | Marker::I64 => "an integer",
        Marker::Reserved => "the reserved byte 0xc1",
        _ => "an extension",
    };
    Problem::Type { expected, found }.into()
}

/// Appends values in the shortest form, as msgspec does. Lengths are those of values in memory; the
/// format's limit of 2^32 elements is far above a message's size limit.
#[derive(Default)]
pub(crate) struct Writer {
    out: ByteBuf,
}

impl Writer {
    pub(crate) fn finish(self) -> bytes::Bytes {
        self.out.into_vec().into()
    }

    pub(crate) fn reserve(&mut self, bytes: usize) {
        self.out.as_mut_vec().reserve(bytes);
    }

    pub(crate) fn nil(&mut self) {
        let Ok(()) = rmp::encode::write_nil(&mut self.out);
    }

    pub(crate) fn boolean(&mut self, value: bool) {
        let Ok(()) = rmp::encode::write_bool(&mut self.out, value);
    }

    pub(crate) fn uint(&mut self, value: impl Into<u64>) {
        let Ok(_) = rmp::encode::write_uint(&mut self.out, value.into());
    }

    pub(crate) fn uint_or_nil(&mut self, value: Option<impl Into<u64>>) {
        match value {
            Some(value) => self.uint(value),
            None => self.nil(),
        }
    }

    pub(crate) fn int(&mut self, value: i64) {
        let Ok(_) = rmp::encode::write_sint(&mut self.out, value);
    }

    pub(crate) fn float(&mut self, value: f64) {
        let Ok(()) = rmp::encode::write_f64(&mut self.out, value);
    }

    pub(crate) fn str(&mut self, value: &str) {
        let Ok(()) = rmp::encode::write_str(&mut self.out, value);
    }

    pub(crate) fn bytes(&mut self, value: &[u8]) {
        let Ok(()) = rmp::encode::write_bin(&mut self.out, value);
    }

    pub(crate) fn extension(&mut self, kind: u8, value: &[u8]) {
        let kind = i8::try_from(kind).unwrap_or(i8::MAX);
        let Ok(_) = rmp::encode::write_ext_meta(&mut self.out, length_u32(value.len()), kind);
        self.raw(value);
    }

    /// Appends a value that is MessagePack already.
    pub(crate) fn raw(&mut self, value: &[u8]) {
        self.out.as_mut_vec().extend_from_slice(value);
    }

    pub(crate) fn array(&mut self, length: usize) {
        let Ok(_) = rmp::encode::write_array_len(&mut self.out, length_u32(length));
    }

    pub(crate) fn map(&mut self, length: usize) {
        let Ok(_) = rmp::encode::write_map_len(&mut self.out, length_u32(length));
    }

    pub(crate) fn uints<T: Copy + Into<u64>>(&mut self, values: &[T]) {
        self.reserve(values.len() * 5);
        self.array(values.len());
        for value in values {
            self.uint(*value);
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "no list of a message comes near 2^32")]
fn length_u32(length: usize) -> u32 {
    debug_assert!(u32::try_from(length).is_ok());
    length as u32
}
