//! Ours: what is least likely to be used again soon, for the time that it would stay, goes first.
//!
//! Every object that a request used is of a *class*, by what is known of it then: where in the request it was, how
//! often it had been used before. For each class and each age (time since the last use) the policy counts uses and
//! the time that objects waited for them, those that are gone included as long as they are remembered. Both
//! together are the hazard: uses to be expected a second. What goes is, among objects on which no other hangs, the
//! one with the least index: the most uses a second that it can be expected to have if it stays for some time, for
//! whatever time that is largest (Gittins, "Bandit processes and dynamic allocation indices", 1979; of caches:
//! Beckmann, Chen and Cidon, "LHD: improving cache hit rate by maximizing hit density", 2018).
//!
//! Classes are finer than what a short time can tell of them, so each one's hazard is drawn to that of its group,
//! and the group's to a prior, the more the fewer uses it has seen: no figure here comes from any one trace.

use std::time::Instant;

use super::links::{Links, List, NONE, reserve};
use super::{Eviction, Use};
use crate::table::Table;

/// Ages are told apart in so many buckets: the first ends at 8 s, and each next one at √2 times that.
const BUCKETS: usize = 22;
const FIRST_AGE: f64 = 8.0;
/// Ticks of the clock in a second: a u32 of them lasts for two years.
const TICKS: f64 = 64.0;
/// Uses between two looks at what has been learned, or so many ticks.
const LEARN_USES: usize = 1024;
const LEARN_TICKS: u32 = 10 * 64;
/// Steps of ageing with each use, until the round is done that a look begins: more than a use can cause.
const AGE_STEPS: usize = 32;
/// Uses of one request that bring steps: it takes half a millisecond at most.
const AGE_USES_MAX: usize = 256;
/// Uses after which what was learned before counts for half: what engines ask changes from day to day.
const HALVE_USES: usize = 1 << 20;
/// What is remembered of objects that are not there: so many for each that is, and so many more.
const GONE: usize = 2;
const GONE_MIN: usize = 16_384;
/// Uses that the prior of a group counts for, and those that a group counts for in its classes.
const GROUP_PRIOR: f64 = 10.0;
const CLASS_PRIOR: f64 = 5.0;

const KINDS_OF_USED: u16 = 7;
const LENGTHS: u16 = 16;
/// A request's last chunk, new, by how many new ones the request has.
const NEW_TAIL: u16 = 0;
/// A request's last chunk, used before: where prompts are cut into blocks, the last is often not a whole one.
const USED_TAIL: u16 = NEW_TAIL + 2 * LENGTHS;
/// Used before, by how often.
const USED: u16 = USED_TAIL + 1;
/// New, by how many follow and how many new ones the request has.
const NEW: u16 = USED + KINDS_OF_USED;
const CLASSES: usize = (NEW + 2 * LENGTHS * LENGTHS) as usize;
const GROUPS: usize = 4;

/// An object that was used: there, or remembered.
#[derive(Debug, Clone, Copy)]
struct Known {
    key: Key,
    /// When it was last used.
    used: u32,
    /// Where it is; [`NONE`] when it is only remembered.
    place: u32,
    class: u16,
    /// The bucket, and [`LISTED`].
    bucket: u8,
    /// Uses, up to 255.
    uses: u8,
}

const _: () = assert!(size_of::<Known>() == 16);

/// Of [`Known::bucket`]: in its cell's list of those that may go, or in the list of what is gone.
const LISTED: u8 = 0x80;

impl Known {
    fn bucket(&self) -> usize {
        usize::from(self.bucket & !LISTED)
    }

    fn is_listed(&self) -> bool {
        self.bucket & LISTED != 0
    }
}

/// Half of a key. With two million of them remembered, one new object in 2,000 is taken for one that is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key(u32);

impl Key {
    #[expect(clippy::cast_possible_truncation, reason = "the lower half")]
    fn of(key: u64) -> Self {
        Self(key as u32)
    }

    /// A table takes low, middle and high bits of it, so all depend on the key.
    fn hash(self) -> u64 {
        u64::from(self.0).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}

/// An object that is only remembered: the number of what is known of it, and its key, without which a table that grows
/// would have to look each of them up.
#[derive(Debug, Clone, Copy)]
struct Gone {
    known: u32,
    key: Key,
}

/// An object that is there: the number of what is known of it, and two bits.
#[derive(Debug, Clone, Copy)]
struct Object(u32);

/// It may go, as far as the index is concerned.
const FREE: u32 = 1 << 31;
/// Nothing hangs on it.
const LEAF: u32 = 1 << 30;

impl Object {
    fn known(self) -> u32 {
        self.0 & !(FREE | LEAF)
    }

    fn may_go(self) -> bool {
        self.0 & (FREE | LEAF) == FREE | LEAF
    }

    /// Whether it was set before.
    fn set(&mut self, bit: u32, on: bool) -> bool {
        let before = self.0 & bit != 0;
        self.0 = if on { self.0 | bit } else { self.0 & !bit };
        before
    }
}

/// Objects of one class and age.
#[derive(Debug, Clone, Copy, Default)]
struct Cell {
    /// All of them, least recently used first.
    all: List,
    /// Those that may go.
    free: List,
    count: u32,
    /// The sum of the ticks at which they were used.
    used: u64,
    /// Uses of objects of this age.
    uses: f64,
    /// Objects that left at this age, used or forgotten, and the seconds that they had been of it.
    left: f64,
    left_seconds: f64,
    /// Its place in the order in which cells are emptied.
    rank: u32,
}

pub(super) struct Hazard {
    started: Option<Instant>,
    now: u32,
    objects: Vec<Object>,
    known: Vec<Known>,
    unused: Vec<u32>,
    /// What is gone; of what is there the index knows the place.
    by_key: Table<Gone>,
    /// Of each cell's lists of all.
    all: Links,
    /// Of each cell's lists of those that may go, and of what is gone.
    free: Links,
    /// What is remembered and not there, what went first first.
    gone: List,
    gone_count: usize,
    resident: usize,
    cells: Vec<Cell>,
    /// Classes that anything was of.
    classes: Vec<u16>,
    /// Cells, those of the least index first; those of classes of which nothing is learned yet last.
    order: Vec<u32>,
    /// Which of them have anything that may go: one bit each, in that order.
    occupied: Vec<u64>,
    uses_since: usize,
    learned: u32,
    /// Cells that this round of ageing has still to look at.
    aging: usize,
    /// Uses since what had been learned was last halved.
    uses: usize,
}

impl Default for Hazard {
    fn default() -> Self {
        Self {
            started: None,
            now: 0,
            objects: Vec::new(),
            known: Vec::new(),
            unused: Vec::new(),
            by_key: Table::default(),
            all: Links::default(),
            free: Links::default(),
            gone: List::default(),
            gone_count: 0,
            resident: 0,
            cells: vec![Cell { rank: NONE, ..Cell::default() }; CLASSES * BUCKETS],
            classes: Vec::new(),
            order: Vec::new(),
            occupied: Vec::new(),
            uses_since: 0,
            learned: 0,
            aging: 0,
            uses: 0,
        }
    }
}

fn cell_of(class: u16, bucket: usize) -> usize {
    usize::from(class) * BUCKETS + bucket
}

/// The age at which each bucket begins, in seconds; that of one more is where the last one ends.
const BEGINS: [f64; BUCKETS + 1] = {
    let mut begins = [0.0; BUCKETS + 1];
    let mut bucket = 1;
    while bucket <= BUCKETS {
        let doubled = (1 << ((bucket - 1) / 2)) as f64;
        let half = if bucket % 2 == 0 { std::f64::consts::SQRT_2 } else { 1.0 };
        begins[bucket] = FIRST_AGE * doubled * half;
        bucket += 1;
    }
    begins
};

fn width(bucket: usize) -> f64 {
    BEGINS[bucket + 1] - BEGINS[bucket]
}

fn seconds(ticks: u32) -> f64 {
    f64::from(ticks) / TICKS
}

fn group_of(class: u16) -> usize {
    match class {
        NEW_TAIL..USED_TAIL => 0,
        USED_TAIL => 1,
        USED..NEW => 2,
        _ => 3,
    }
}

/// How many bits a number has, up to what classes tell apart.
fn bits(number: usize) -> u16 {
    u16::try_from(usize::BITS - number.leading_zeros()).unwrap_or(LENGTHS).min(LENGTHS - 1)
}

/// The class of chunk `at` of a request of `chunks`, of which the first `known` were used before; `uses` of it
/// before this one.
fn class_of(at: usize, chunks: usize, known: usize, uses: u8) -> u16 {
    // More than the one chunk that all prompts of an application may begin with: a conversation goes on.
    let new = u16::from(known > 1) * LENGTHS + bits(chunks.saturating_sub(known));
    match (at + 1 == chunks, uses) {
        (true, 0) => NEW_TAIL + new,
        (true, _) => USED_TAIL,
        (false, 0) => NEW + new * LENGTHS + bits(chunks - 1 - at),
        (false, uses) => {
            USED + match uses {
                1..=3 => u16::from(uses) - 1,
                4..=5 => 3,
                6..=8 => 4,
                9..=15 => 5,
                _ => 6,
            }
        }
    }
}

impl Hazard {
    /// What is known of an object that is gone.
    fn find_gone(&self, key: u64) -> Option<u32> {
        let key = Key::of(key);
        self.by_key.find(key.hash(), |gone| gone.key == key).map(|gone| gone.known)
    }

    /// What is known of an object.
    fn find(&self, used: &Use) -> Option<u32> {
        match used.place.and_then(|place| self.objects.get(place as usize)) {
            Some(object) => Some(object.known()),
            None => self.find_gone(used.key),
        }
    }

    /// An object that was not known, as it will be after its first use.
    fn remember(&mut self, key: u64, class: u16) -> u32 {
        let new =
            Known { key: Key::of(key), used: self.now, place: NONE, class, bucket: 0, uses: 1 };
        let number = match self.unused.pop() {
            Some(number) => {
                self.known[number as usize] = new;
                number
            }
            None => {
                let number = self.known.len();
                reserve(&mut self.known, number + 1);
                self.known.push(new);
                self.all.grow(number + 1);
                self.free.grow(number + 1);
                u32::try_from(number).unwrap_or(NONE)
            }
        };
        self.enter(number);
        self.list_gone(number);
        number
    }

    /// It becomes one of its class, of age 0.
    fn enter(&mut self, number: u32) {
        let Known { class, used, .. } = self.known[number as usize];
        if self.cells[cell_of(class, 0)].rank == NONE {
            self.classes.push(class);
            for bucket in 0..BUCKETS {
                let cell = cell_of(class, bucket);
                self.cells[cell].rank = u32::try_from(self.order.len()).unwrap_or(NONE);
                self.order.push(u32::try_from(cell).unwrap_or(NONE));
            }
            self.occupied.resize(self.order.len().div_ceil(64), 0);
        }
        let cell = &mut self.cells[cell_of(class, 0)];
        self.all.push(&mut cell.all, number);
        cell.count += 1;
        cell.used += u64::from(used);
    }

    /// It leaves its cell: used again, or forgotten.
    fn leave(&mut self, number: u32, is_used: bool) {
        let known = self.known[number as usize];
        let Known { class, used, .. } = known;
        let bucket = known.bucket();
        // The age counts, not the cell: what has grown older since the last look is still in the one before.
        let age = seconds(self.now.saturating_sub(used));
        let mut real = bucket;
        while real + 1 < BUCKETS && age >= BEGINS[real + 1] {
            real += 1;
        }
        let cell = &mut self.cells[cell_of(class, bucket)];
        self.all.unlink(&mut cell.all, number);
        cell.count -= 1;
        cell.used -= u64::from(used);
        let cell = &mut self.cells[cell_of(class, real)];
        cell.left += 1.0;
        cell.left_seconds += age - BEGINS[real];
        cell.uses += f64::from(u8::from(is_used));
    }

    /// It is not there, and is remembered as long as there is room for that.
    fn list_gone(&mut self, number: u32) {
        self.gone_count += 1;
        let key = self.known[number as usize].key;
        self.by_key.insert(key.hash(), Gone { known: number, key }, |gone| gone.key.hash());
        self.free.push(&mut self.gone, number);
        self.known[number as usize].bucket |= LISTED;
        let most = GONE_MIN + GONE * self.resident;
        while self.gone_count > most {
            let oldest = self.gone.first;
            if oldest == NONE || oldest == number {
                return;
            }
            self.unlist_gone(oldest);
            self.leave(oldest, false);
            self.unused.push(oldest);
        }
    }

    /// Takes it out of what is gone.
    fn unlist_gone(&mut self, number: u32) {
        self.gone_count -= 1;
        let known = &mut self.known[number as usize];
        known.bucket &= !LISTED;
        self.by_key.remove(known.key.hash(), |gone| gone.known == number);
        self.free.unlink(&mut self.gone, number);
    }

    /// Puts it into its cell's list of those that may go, if it may.
    fn list(&mut self, number: u32) {
        let place = self.known[number as usize].place as usize;
        if self.objects.get(place).is_some_and(|object| object.may_go()) {
            self.list_free(number);
        }
    }

    /// Puts it into its cell's list of those that may go.
    fn list_free(&mut self, number: u32) {
        let known = &mut self.known[number as usize];
        let cell = &mut self.cells[cell_of(known.class, known.bucket())];
        known.bucket |= LISTED;
        self.free.push(&mut cell.free, number);
        let rank = cell.rank as usize;
        self.occupied[rank / 64] |= 1 << (rank % 64);
    }

    /// Takes it out of its cell's list of those that may go, if it is in it.
    fn unlist(&mut self, number: u32) {
        let known = &mut self.known[number as usize];
        if !known.is_listed() {
            return;
        }
        known.bucket &= !LISTED;
        let cell = &mut self.cells[cell_of(known.class, known.bucket())];
        self.free.unlink(&mut cell.free, number);
        if cell.free.first == NONE {
            let rank = cell.rank as usize;
            self.occupied[rank / 64] &= !(1 << (rank % 64));
        }
    }

    /// Moves what has grown older to the cells of its age: a round over all cells, of which a call takes so many steps
    /// and the next one goes on. Many objects that were stored at once become older at once.
    fn age(&mut self, steps: usize) {
        for _ in 0..steps {
            let Some(left) = self.aging.checked_sub(1) else { return };
            let bucket = BUCKETS - 2 - left % (BUCKETS - 1); // young ones first: what is old goes all the way
            let cell = cell_of(self.classes[left / (BUCKETS - 1)], bucket);
            if !self.move_oldest(cell, bucket) {
                self.aging = left;
            }
        }
    }

    /// Moves the oldest of a cell to the next one, if it has that age.
    fn move_oldest(&mut self, at: usize, bucket: usize) -> bool {
        let oldest = self.cells[at].all.first;
        let Some(known) = self.known.get(oldest as usize) else { return false };
        if seconds(self.now.saturating_sub(known.used)) < BEGINS[bucket + 1] {
            return false;
        }
        let used = u64::from(known.used);
        let may_go = known.is_listed() && known.place != NONE;
        if may_go {
            self.unlist(oldest);
        }
        let from = &mut self.cells[at];
        self.all.unlink(&mut from.all, oldest);
        from.count -= 1;
        from.used -= used;
        let into = &mut self.cells[at + 1];
        self.all.push(&mut into.all, oldest);
        into.count += 1;
        into.used += used;
        self.known[oldest as usize].bucket += 1;
        if may_go {
            self.list_free(oldest);
        }
        true
    }

    /// The uses that a class has seen at each age, and the seconds that objects of it waited for them.
    #[expect(clippy::cast_precision_loss, reason = "sums of seconds")]
    fn seen(&self, class: u16) -> [[f64; 2]; BUCKETS] {
        let mut seen = [[0.0; 2]; BUCKETS];
        let mut older = 0.0;
        for bucket in (0..BUCKETS).rev() {
            let cell = &self.cells[cell_of(class, bucket)];
            let count = f64::from(cell.count);
            let ages = count * seconds(self.now) - cell.used as f64 / TICKS;
            let waiting = (ages - count * BEGINS[bucket]).max(0.0);
            seen[bucket] = [cell.uses, older * width(bucket) + cell.left_seconds + waiting];
            older += count + cell.left;
        }
        seen
    }

    /// Orders the cells by what has been learned.
    fn learn(&mut self) {
        // Where there are few uses, rounds must not last for longer than it takes to grow older.
        let missing = LEARN_USES.saturating_sub(self.uses_since);
        self.uses_since = 0;
        self.learned = self.now;
        if self.aging == 0 {
            self.aging = self.classes.len() * (BUCKETS - 1);
        }
        self.age(AGE_STEPS / 4 * missing);
        let seen: Vec<_> = self.classes.iter().map(|class| self.seen(*class)).collect();
        let mut groups = [[[0.0; 2]; BUCKETS]; GROUPS];
        for (class, seen) in self.classes.iter().zip(&seen) {
            for (sum, seen) in groups[group_of(*class)].iter_mut().zip(seen) {
                sum[0] += seen[0];
                sum[1] += seen[1];
            }
        }
        let hazards = groups.map(|seen| {
            let mut hazards = [0.0; BUCKETS];
            for (bucket, [uses, waited]) in seen.into_iter().enumerate() {
                // Of what has waited for a time t, most is used within a time of the order of t, if ever.
                let prior = 0.3 / ((BEGINS[bucket] + BEGINS[bucket + 1]) / 2.0 + 30.0);
                hazards[bucket] = (uses + GROUP_PRIOR) / (waited + GROUP_PRIOR / prior);
            }
            hazards
        });
        let mut order: Vec<(f64, u32)> = Vec::with_capacity(self.order.len());
        for (class, seen) in self.classes.iter().zip(&seen) {
            let indices = indices(seen, &hazards[group_of(*class)]);
            for (bucket, index) in indices.into_iter().enumerate() {
                order.push((index, u32::try_from(cell_of(*class, bucket)).unwrap_or(NONE)));
            }
        }
        order.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        self.order.clear();
        self.occupied.fill(0);
        for (rank, (_, cell)) in order.into_iter().enumerate() {
            self.order.push(cell);
            let cell = &mut self.cells[cell as usize];
            cell.rank = u32::try_from(rank).unwrap_or(NONE);
            if cell.free.first != NONE {
                self.occupied[rank / 64] |= 1 << (rank % 64);
            }
        }
    }
}

/// The index of each age of a class: the most uses a second that are to be expected of an object of that age.
fn indices(seen: &[[f64; 2]; BUCKETS], group: &[f64; BUCKETS]) -> [f64; BUCKETS] {
    let mut hazards = [0.0; BUCKETS];
    let (mut uses, mut expected) = (CLASS_PRIOR, CLASS_PRIOR);
    for bucket in 0..BUCKETS {
        let [seen, waited] = seen[bucket];
        hazards[bucket] = (seen + CLASS_PRIOR) / (waited + CLASS_PRIOR / group[bucket]);
        uses += seen;
        expected += waited * hazards[bucket];
    }
    let scale = uses / expected; // whole classes are used more or less often than their group
    let parts = std::array::from_fn(|bucket| {
        let [seen, waited] = seen[bucket];
        let hazard = (seen + CLASS_PRIOR) / (waited + CLASS_PRIOR / (hazards[bucket] * scale));
        let used = -f64::exp_m1(-hazard * width(bucket));
        [used, used / hazard]
    });
    best_stays(&parts)
}

/// Of each bucket, the most uses a second of any stay that begins with it. `parts` has of each the share that is used
/// within it, and the seconds, more than none, that one can be expected to stay in it.
fn best_stays(parts: &[[f64; 2]; BUCKETS]) -> [f64; BUCKETS] {
    let mut indices = [0.0; BUCKETS];
    // Stays that follow each other, each the best of its first bucket: uses, seconds, and the share that is left.
    let mut stays = [[0.0; 3]; BUCKETS];
    let mut last = 0usize;
    for bucket in (0..BUCKETS).rev() {
        let [mut uses, mut seconds] = parts[bucket];
        let mut left = 1.0 - uses;
        // To go on is better as long as what follows is better than what there is.
        while let Some([more, longer, of_them]) = last.checked_sub(1).map(|next| stays[next])
            && more * seconds > uses * longer
        {
            (uses, seconds) = (uses + left * more, seconds + left * longer);
            left *= of_them;
            last -= 1;
        }
        stays[last] = [uses, seconds, left];
        last += 1;
        indices[bucket] = uses / seconds;
    }
    indices
}

impl Eviction for Hazard {
    fn request(&mut self, uses: &[Use], ranks: usize, now: Instant) {
        let since = now.saturating_duration_since(*self.started.get_or_insert(now));
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "it saturates after two years"
        )]
        let ticks = (since.as_secs_f64() * TICKS) as u32;
        self.now = self.now.max(ticks);
        let chunks = uses.len() / ranks.max(1);
        let first = uses.iter().step_by(ranks.max(1));
        let known = first.take_while(|used| self.find(used).is_some()).count();
        for (number, used) in uses.iter().enumerate().rev() {
            let at = number / ranks.max(1);
            let Some(found) = self.find(used) else {
                self.remember(used.key, class_of(at, chunks, known, 0));
                continue;
            };
            let is_gone = self.known[found as usize].place == NONE;
            match is_gone {
                true => self.unlist_gone(found),
                false => self.unlist(found),
            }
            self.leave(found, true);
            let earlier = &mut self.known[found as usize];
            earlier.class = class_of(at, chunks, known, earlier.uses);
            earlier.uses = earlier.uses.saturating_add(1);
            (earlier.used, earlier.bucket) = (self.now, 0);
            self.enter(found);
            match is_gone {
                true => self.list_gone(found),
                false => self.list(found),
            }
        }
        self.uses_since += uses.len();
        self.uses += uses.len();
        if self.uses >= HALVE_USES {
            self.uses = 0;
            for cell in &mut self.cells {
                (cell.uses, cell.left) = (cell.uses / 2.0, cell.left / 2.0);
                cell.left_seconds /= 2.0;
            }
        }
        self.age(AGE_STEPS * uses.len().min(AGE_USES_MAX));
        if self.uses_since >= LEARN_USES || self.now - self.learned >= LEARN_TICKS {
            self.learn();
        }
    }

    fn knows(&self, key: u64) -> bool {
        self.find_gone(key).is_some()
    }

    fn add(&mut self, place: u32, key: u64) {
        let number = match self.find_gone(key) {
            Some(known) => known,
            None => self.remember(key, NEW_TAIL),
        };
        self.unlist_gone(number);
        self.known[number as usize].place = place;
        self.resident += 1;
        let object = Object(number | LEAF);
        let places = place as usize + 1;
        if places > self.objects.len() {
            reserve(&mut self.objects, places);
            self.objects.resize(places, object);
        }
        self.objects[place as usize] = object;
    }

    fn release(&mut self, place: u32) {
        let object = &mut self.objects[place as usize];
        if !object.set(FREE, true) {
            let known = object.known();
            self.list(known);
        }
    }

    fn hold(&mut self, place: u32) {
        let object = &mut self.objects[place as usize];
        object.set(FREE, false);
        let known = object.known();
        self.unlist(known);
    }

    fn is_leaf(&mut self, place: u32, leaf: bool) {
        let object = &mut self.objects[place as usize];
        if object.set(LEAF, leaf) != leaf {
            let known = object.known();
            match leaf {
                true => self.list(known),
                false => self.unlist(known),
            }
        }
    }

    fn remove(&mut self, place: u32) {
        self.hold(place);
        let number = self.objects[place as usize].known();
        self.known[number as usize].place = NONE;
        self.resident -= 1;
        self.list_gone(number);
    }

    fn victim(&mut self) -> Option<u32> {
        let word = self.occupied.iter().position(|word| *word != 0)?;
        let rank = word * 64 + self.occupied[word].trailing_zeros() as usize;
        let number = self.cells[self.order[rank] as usize].free.first;
        self.known.get(number as usize).map(|known| known.place)
    }

    fn takes(&self) -> Option<(usize, usize)> {
        let known = self.known.capacity() * size_of::<Known>() + self.unused.capacity() * 4;
        let known = known + self.objects.capacity() * size_of::<Object>();
        let bytes = self.by_key.bytes() + known + self.all.bytes() + self.free.bytes();
        Some((bytes, self.resident + self.gone_count))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn all_that_has_grown_older_is_of_its_age_soon_after_a_look() {
        let begun = Instant::now();
        let later = begun + Duration::from_secs(6 * 3600);
        let uses = |keys: std::ops::Range<u64>| -> Vec<Use> {
            keys.map(|key| Use { key, place: None }).collect()
        };
        // Where there are many uses the next ones do it, and where there are few, the look itself.
        for (at_once, requests) in [(LEARN_USES as u64, 40), (1, 0)] {
            let mut hazard = Hazard::default();
            for key in 0..200 {
                hazard.request(&uses(key..key + 1), 1, begun); // all of one class, the first that there is
            }
            hazard.request(&uses(1000..1000 + at_once), 1, later);
            for _ in 0..requests {
                hazard.request(&uses(1000..1008), 1, later);
            }
            let is_old = |known: &&Known| known.bucket() == BUCKETS - 1;
            assert_eq!(hazard.known.iter().filter(is_old).count(), 200, "{at_once}");
        }
    }

    proptest! {
        #[test]
        fn of_all_stays_that_begin_with_a_bucket_the_best_counts(
            parts in prop::array::uniform22((prop_oneof![Just(0.0), Just(1.0), 0.0..1.0], 0.1..1e4))
        ) {
            let parts = parts.map(|(used, seconds)| [used, seconds]);
            for (bucket, best) in best_stays(&parts).into_iter().enumerate() {
                let (mut left, mut uses, mut stay, mut most) = (1.0, 0.0, 0.0, 0.0);
                for [used, seconds] in &parts[bucket..] {
                    uses += left * used;
                    stay += left * seconds;
                    left *= 1.0 - used;
                    most = f64::max(most, uses / stay);
                }
                prop_assert!((best - most).abs() <= 1e-12 + 1e-9 * most, "{bucket}: {best} {most}");
            }
        }
    }
}
