//! `/quotas`: what tenants may have, and have.

use hyper::StatusCode;
use kvferry_core::{Error, ErrorCode, Result};
use kvferry_store::{Quotas, Store};

use super::{Answered, Refusal};
use crate::json::{self, Object, Value};
use crate::quotas::{QuotaBook, members, members_of, quota, quotas};

/// How everybody stands. Tenants that have no quota of their own are not told by name: their number is not bounded.
pub(super) fn tell(book: &QuotaBook, store: &Store) -> String {
    let mut named = Object::new();
    let mut unnamed = [0; 5];
    for tenant in store.tenants() {
        let figures = [
            ("used_bytes", tenant.used_bytes),
            ("objects", tenant.objects),
            ("evicted_objects", tenant.evicted_objects),
            ("evicted_bytes", tenant.evicted_bytes),
        ];
        if tenant.named {
            let one = figures
                .into_iter()
                .fold(members_of(tenant.quota), |one, (name, figure)| one.raw(name, figure));
            let label = book.label(&tenant.cache_salt);
            named = named.raw(&tenant.cache_salt, one.text("label", &label).end());
        } else {
            unnamed[0] += 1;
            for (sum, (_, figure)) in unnamed[1..].iter_mut().zip(figures) {
                *sum += figure;
            }
        }
    }
    let names = ["tenants", "used_bytes", "objects", "evicted_objects", "evicted_bytes"];
    let unnamed =
        names.into_iter().zip(unnamed).fold(Object::new(), |all, (name, sum)| all.raw(name, sum));
    Object::new()
        .raw("memory_bytes", store.pool().1)
        .raw("persistent", book.is_persistent())
        .raw("default", members_of(store.quotas().default).end())
        .raw("tenants", named.end())
        .raw("unnamed", unnamed.end())
        .end()
}

/// All of them anew.
pub(super) fn put_all(book: &QuotaBook, store: &Store, body: &[u8]) -> Answered<()> {
    change(book, store, body, |value, all| {
        *all = quotas(value)?;
        Ok(true)
    })
}

/// Those of each tenant that is not named.
pub(super) fn put_default(book: &QuotaBook, store: &Store, body: &[u8]) -> Answered<()> {
    change(book, store, body, |value, all| {
        all.default = quota(members(value, "the body", &["cap", "guarantee"])?, "the default")?;
        Ok(true)
    })
}

/// One tenant's.
pub(super) fn put_tenant(book: &QuotaBook, store: &Store, body: &[u8]) -> Answered<()> {
    change(book, store, body, |value, all| {
        let members = members(value, "the body", &["salt", "cap", "guarantee"])?;
        all.named.insert(salt(members)?, quota(members, "the tenant")?);
        Ok(true)
    })
}

/// It has the default again.
pub(super) fn delete_tenant(book: &QuotaBook, store: &Store, body: &[u8]) -> Answered<()> {
    change(book, store, body, |value, all| {
        let salt = salt(members(value, "the body", &["salt"])?)?;
        Ok(all.named.remove(&salt).is_some())
    })
}

fn salt(members: &[(String, Value)]) -> Result<String> {
    match members.iter().find(|(name, _)| name == "salt") {
        Some((_, Value::Text(salt))) => Ok(salt.clone()),
        _ => Err(Error::invalid("salt is missing: give the tenant's, \"\" for those without one")),
    }
}

/// `false` of the change: the tenant has none.
fn change(
    book: &QuotaBook,
    store: &Store,
    body: &[u8],
    change: impl FnOnce(&Value, &mut Quotas) -> Result<bool>,
) -> Answered<()> {
    let refused = |error: Error| {
        let status = match error.code {
            ErrorCode::System => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::BAD_REQUEST,
        };
        Refusal::new(status, error.code.as_str(), error.message)
    };
    let value = json::parse(body).map_err(|error| refused(Error::invalid(error)))?;
    match book.change(store, |quotas| change(&value, quotas)).map_err(refused)? {
        true => Ok(()),
        false => {
            let message = "this tenant has no quota of its own; GET /quotas lists those that have";
            Err(Refusal::new(StatusCode::NOT_FOUND, "NOT_FOUND", message))
        }
    }
}
