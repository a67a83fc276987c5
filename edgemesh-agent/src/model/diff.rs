use std::{cmp::Ordering, sync::Arc};

use super::{ServiceEntry, ServiceTable};

/// One Service that differs between two tables.
#[derive(Clone, Copy, Debug)]
pub enum Change<'a> {
    Added(&'a ServiceEntry),
    Removed(&'a ServiceEntry),
    Changed { old: &'a ServiceEntry, new: &'a ServiceEntry },
}

/// What changed between two tables, in order of names.
///
/// Services that the tables share are told by their pointers, so the cost is one comparison for each of them.
pub fn changes<'a>(old: &'a ServiceTable, new: &'a ServiceTable) -> Vec<Change<'a>> {
    let (mut old, mut new) = (old.services.iter().peekable(), new.services.iter().peekable());
    let mut changes = Vec::new();
    loop {
        let order = match (old.peek(), new.peek()) {
            // Nearly all: their names need not be fetched from memory.
            (Some(a), Some(b)) if Arc::ptr_eq(a, b) => Ordering::Equal,
            (Some(a), Some(b)) => a.service.name.cmp(&b.service.name),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => return changes,
        };
        match order {
            Ordering::Less => changes.extend(old.next().map(|a| Change::Removed(a))),
            Ordering::Greater => changes.extend(new.next().map(|b| Change::Added(b))),
            Ordering::Equal => {
                if let (Some(a), Some(b)) = (old.next(), new.next())
                    && !Arc::ptr_eq(a, b)
                    && a != b
                {
                    changes.push(Change::Changed { old: a, new: b });
                }
            }
        }
    }
}
