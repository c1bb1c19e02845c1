//! Whose objects are: model, shape and tenant, each kept once however many objects it has.

use std::collections::HashMap;
use std::sync::Arc;

use kvferry_core::events::EventSpace;
use kvferry_core::key::Layout;

use crate::state::Registered;

/// Spaces that are kept before those without objects are looked for.
const PRUNE_MIN: usize = 1024;

/// What an object's identity is a hash of, besides its tokens.
pub(crate) struct Space {
    /// [`space`] of it.
    pub(crate) id: [u8; 32],
    pub(crate) registered: Arc<Registered>,
    /// What listeners are told of it.
    pub(crate) event: Arc<EventSpace>,
}

impl Space {
    pub(crate) fn new(id: [u8; 32], registered: Arc<Registered>, salt: &str) -> Self {
        let Layout { model_name, world_size, .. } = &registered.layout;
        let event = Arc::new(EventSpace {
            model_name: model_name.clone(),
            world_size: *world_size,
            cache_salt: salt.to_owned(),
        });
        Self { id, registered, event }
    }

    /// Bytes of its texts, which have no bound in common with what refers to them.
    pub(crate) fn bytes(&self) -> usize {
        2 * self.event.model_name.len() + self.event.cache_salt.len()
    }
}

/// The spaces that anything refers to.
#[derive(Default)]
pub(crate) struct Spaces {
    by_id: HashMap<[u8; 32], Arc<Space>>,
    prune_at: usize,
}

impl Spaces {
    /// The space of this id.
    pub(crate) fn get(
        &mut self,
        id: [u8; 32],
        registered: &Arc<Registered>,
        salt: &str,
    ) -> Arc<Space> {
        if let Some(known) = self.by_id.get(&id) {
            return Arc::clone(known);
        }
        if self.by_id.len() >= self.prune_at {
            self.by_id.retain(|_, space| Arc::strong_count(space) > 1);
            // Twice as many as are left: each insertion pays for a constant part of the next round.
            self.prune_at = PRUNE_MIN.max(2 * self.by_id.len());
        }
        let space = Arc::new(Space::new(id, Arc::clone(registered), salt));
        self.by_id.insert(id, Arc::clone(&space));
        space
    }
}

/// What, besides its tokens, tells an object from others: model, shape and tenant.
pub(crate) fn space(layout: &Layout, salt: &str) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for text in [&layout.model_name, salt, layout.dtype.name()] {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    }
    let slots = layout.num_physical_slots.map_or(0, |slots| u64::from(slots) + 1);
    let plane = u64::from(layout.single_plane);
    for number in [layout.world_size, layout.num_layers, layout.hidden_dim_size].map(u64::from) {
        hasher.update(&number.to_le_bytes());
    }
    hasher.update(&slots.to_le_bytes());
    hasher.update(&plane.to_le_bytes());
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
pub(crate) fn test_space() -> Arc<Space> {
    use kvferry_core::key::Dtype;
    let layout = Layout {
        model_name: "m".into(),
        world_size: 1,
        block_size: 1,
        num_layers: 1,
        hidden_dim_size: 1,
        dtype: Dtype::new("uint8").unwrap(),
        single_plane: true,
        num_physical_slots: None,
    };
    Arc::new(Space::new([0; 32], Arc::new(Registered { layout, object_bytes: 1 }), ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spaces_that_nothing_refers_to_are_forgotten_and_others_are_kept_once() {
        let registered = Arc::clone(&test_space().registered);
        let mut spaces = Spaces::default();
        let id = |number: usize| {
            let mut id = [0; 32];
            id[..8].copy_from_slice(&number.to_le_bytes());
            id
        };
        let held = spaces.get(id(0), &registered, "held");
        for number in 1..10 * PRUNE_MIN {
            spaces.get(id(number), &registered, "s");
        }
        assert!(spaces.by_id.len() <= PRUNE_MIN, "{} are kept", spaces.by_id.len());
        assert!(Arc::ptr_eq(&held, &spaces.get(id(0), &registered, "held")));
    }
}
