//! Buffers for what passes at the moment: of thousands of clients most are silent most of the time, and hold none.

use std::sync::{Arc, Mutex, PoisonError};

/// How many buffers are kept for the next who needs one.
const SPARE: usize = 64;

/// Buffers of one size that nobody needs now.
#[derive(Clone, Debug)]
pub(super) struct Buffers {
    size: usize,
    spare: Arc<Mutex<Vec<Box<[u8]>>>>,
}

impl Buffers {
    pub(super) fn new(size: usize) -> Self {
        Self { size, spare: Arc::default() }
    }

    pub(super) fn take(&self) -> Lent<'_> {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Lent { bytes: spare.unwrap_or_else(|| vec![0; self.size].into_boxed_slice()), buffers: self }
    }
}

/// A buffer, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Lent<'a> {
    pub(super) bytes: Box<[u8]>,
    buffers: &'a Buffers,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let mut spare = self.buffers.spare.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < SPARE {
            spare.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_is_lent_again_and_only_so_many_are_kept() {
        let buffers = Buffers::new(16);
        let spare = || buffers.spare.lock().unwrap().len();
        drop(buffers.take());
        assert_eq!(spare(), 1);
        let lent: Vec<_> = (0..2 * SPARE).map(|_| buffers.take()).collect();
        assert_eq!((spare(), lent.iter().all(|lent| lent.bytes.len() == 16)), (0, true));
        drop(lent);
        assert_eq!(spare(), SPARE);
    }
}
