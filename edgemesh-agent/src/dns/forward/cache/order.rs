/// Values in two lists, each from the one used last to the one used longest ago.
#[derive(Debug)]
pub(super) struct Order<T> {
    slots: Vec<Slot<T>>,
    free: Vec<Place>,
    /// Values used once, then those used again.
    lists: [Ends; 2],
}

/// Which list.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum List {
    Once,
    Again,
}

/// Where a value is; until that is removed.
pub(super) type Place = u32;

const NONE: Place = Place::MAX;

#[derive(Debug)]
struct Ends {
    first: Place,
    last: Place,
    length: usize,
}

#[derive(Debug)]
struct Slot<T> {
    value: Option<T>,
    list: List,
    newer: Place,
    older: Place,
}

impl<T> Default for Order<T> {
    fn default() -> Self {
        let ends = || Ends { first: NONE, last: NONE, length: 0 };
        Self { slots: Vec::new(), free: Vec::new(), lists: [ends(), ends()] }
    }
}

impl<T> Order<T> {
    pub(super) fn get(&self, place: Place) -> Option<&T> {
        self.slots.get(place as usize)?.value.as_ref()
    }

    pub(super) fn get_mut(&mut self, place: Place) -> Option<&mut T> {
        self.slots.get_mut(place as usize)?.value.as_mut()
    }

    /// Adds a value as one used once.
    pub(super) fn push(&mut self, value: T) -> Place {
        let slot = Slot { value: Some(value), list: List::Once, newer: NONE, older: NONE };
        let place = match self.free.pop() {
            Some(place) => {
                self.slots[place as usize] = slot;
                place
            }
            None => {
                self.slots.push(slot);
                (self.slots.len() - 1) as Place
            }
        };
        self.link(place, List::Once);
        place
    }

    /// Makes a value the first of those used again; where these are more than `most`, the last of them has to be used
    /// again to stay one of them.
    pub(super) fn touch(&mut self, place: Place, most: usize) {
        self.unlink(place);
        self.link(place, List::Again);
        if self.lists[List::Again as usize].length > most
            && let Some(last) = self.last(List::Again)
        {
            self.unlink(last);
            self.link(last, List::Once);
        }
    }

    /// The one used longest ago.
    pub(super) fn last(&self, list: List) -> Option<Place> {
        Some(self.lists[list as usize].last).filter(|&place| place != NONE)
    }

    pub(super) fn remove(&mut self, place: Place) -> Option<T> {
        let value = self.slots.get_mut(place as usize)?.value.take()?;
        self.unlink(place);
        self.free.push(place);
        Some(value)
    }

    fn link(&mut self, place: Place, list: List) {
        let ends = &mut self.lists[list as usize];
        let older = std::mem::replace(&mut ends.first, place);
        ends.length += 1;
        if older == NONE {
            ends.last = place;
        } else {
            self.slots[older as usize].newer = place;
        }
        let slot = &mut self.slots[place as usize];
        (slot.list, slot.newer, slot.older) = (list, NONE, older);
    }

    fn unlink(&mut self, place: Place) {
        let slot = &self.slots[place as usize];
        let (list, newer, older) = (slot.list, slot.newer, slot.older);
        let ends = &mut self.lists[list as usize];
        ends.length -= 1;
        match newer {
            NONE => ends.first = older,
            newer => self.slots[newer as usize].older = older,
        }
        let ends = &mut self.lists[list as usize];
        match older {
            NONE => ends.last = newer,
            older => self.slots[older as usize].newer = newer,
        }
    }
}
