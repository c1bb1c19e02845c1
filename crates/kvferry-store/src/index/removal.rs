//! Taking one object out by name, whatever its age.

use super::{Handle, Index};
use crate::pool::Grant;

impl Index {
    /// Takes the object out, without an event; `None` when it is gone or pinned.
    pub(crate) fn remove_unpinned(&mut self, handle: Handle) -> Option<Grant> {
        self.object(handle).filter(|object| object.pins == 0)?;
        let object = self.take(handle.index)?;
        self.tenants.forget_idle(object.tenant);
        Some(object.grant)
    }
}
