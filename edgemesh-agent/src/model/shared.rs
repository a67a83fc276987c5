use std::{collections::HashSet, hash::Hash, sync::Arc};

use super::{Object, Place};

/// Fewer values than this are never worth a sweep.
const FIRST_SWEEP: usize = 1024;

/// Makes equal values share one allocation; those that nobody else holds any more are dropped now and then.
#[derive(Debug)]
pub(crate) struct Shared<T: ?Sized> {
    values: HashSet<Arc<T>>,
    sweep_at: usize,
}

impl<T: ?Sized> Default for Shared<T> {
    fn default() -> Self {
        Self { values: HashSet::new(), sweep_at: FIRST_SWEEP }
    }
}

impl<T: Eq + Hash + ?Sized> Shared<T> {
    /// The one allocation of this value.
    pub(super) fn one(&mut self, value: &mut Arc<T>) {
        if let Some(known) = self.values.get(value) {
            *value = Arc::clone(known);
            return;
        }
        if self.values.len() >= self.sweep_at {
            self.values.retain(|value| Arc::strong_count(value) > 1);
            // Costs a constant for each value ever added.
            self.sweep_at = FIRST_SWEEP.max(2 * self.values.len());
        }
        self.values.insert(Arc::clone(value));
    }
}

impl Shared<Place> {
    /// Lets the endpoints of an object share their places.
    ///
    /// An object that somebody else holds, too, stays as it is: a copy would cost more than it saves.
    pub(crate) fn share(&mut self, object: &mut Object) {
        let (Object::EndpointSlice(set) | Object::Endpoints(set)) = object else { return };
        let Some(set) = Arc::get_mut(set) else { return };
        for endpoint in set.subsets.iter_mut().flat_map(|subset| &mut subset.endpoints) {
            self.one(&mut endpoint.place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_become_one_allocation() {
        let mut shared = Shared::<str>::default();
        let [mut a, mut b, mut c] = ["edge", "edge", "cloud"].map(Arc::from);
        for value in [&mut a, &mut b, &mut c] {
            shared.one(value);
        }
        assert!(Arc::ptr_eq(&a, &b) && !Arc::ptr_eq(&a, &c));
        assert_eq!((&*b, &*c), ("edge", "cloud"));
    }

    #[test]
    fn values_that_nobody_holds_are_dropped() {
        let mut shared = Shared::<str>::default();
        let mut kept: Arc<str> = "kept".into();
        shared.one(&mut kept);
        for n in 0..10 * FIRST_SWEEP {
            shared.one(&mut n.to_string().into());
        }
        assert!(shared.values.len() <= FIRST_SWEEP, "{}", shared.values.len());
        let mut again: Arc<str> = "kept".into();
        shared.one(&mut again);
        assert!(Arc::ptr_eq(&kept, &again));
    }
}
