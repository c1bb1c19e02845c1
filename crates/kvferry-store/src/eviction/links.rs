//! Doubly linked lists of numbers: the links in one vector, a list no more than its ends.

pub(crate) const NONE: u32 = u32::MAX;

/// One list's ends.
#[derive(Debug, Clone, Copy)]
pub(crate) struct List {
    pub(crate) first: u32,
    last: u32,
}

impl Default for List {
    fn default() -> Self {
        Self { first: NONE, last: NONE }
    }
}

/// The neighbours of each number. A number is in one list at most.
#[derive(Debug, Default)]
pub(crate) struct Links(Vec<[u32; 2]>);

impl Links {
    /// So many numbers, from 0 on.
    pub(crate) fn grow(&mut self, numbers: usize) {
        if numbers > self.0.len() {
            reserve(&mut self.0, numbers);
            self.0.resize(numbers, [NONE; 2]);
        }
    }

    /// Puts it behind the last.
    pub(crate) fn push(&mut self, list: &mut List, number: u32) {
        self.0[number as usize] = [list.last, NONE];
        match self.0.get_mut(list.last as usize) {
            Some(last) => last[1] = number,
            None => list.first = number,
        }
        list.last = number;
    }

    /// Takes it out of the list that it is in.
    pub(crate) fn unlink(&mut self, list: &mut List, number: u32) {
        let [previous, next] = std::mem::replace(&mut self.0[number as usize], [NONE; 2]);
        match self.0.get_mut(previous as usize) {
            Some(previous) => previous[1] = next,
            None => list.first = next,
        }
        match self.0.get_mut(next as usize) {
            Some(next) => next[0] = previous,
            None => list.last = previous,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.0.capacity() * size_of::<[u32; 2]>()
    }
}

/// Room for `length`, and for an eighth more: twice as much is more than what is remembered may take.
pub(crate) fn reserve<T>(all: &mut Vec<T>, length: usize) {
    if length > all.capacity() {
        all.reserve_exact(length + length / 8 + 64 - all.len());
    }
}
