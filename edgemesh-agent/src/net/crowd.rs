//! How much of what all clients share one client may hold at a time.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

/// Places that clients hold, so many at most each; in all no more than there are places elsewhere. Clones are one.
#[derive(Clone, Debug)]
pub struct Crowd {
    most: usize,
    held: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

/// A client's place, until dropped.
#[derive(Debug)]
pub struct Seat {
    crowd: Crowd,
    client: IpAddr,
}

impl Crowd {
    /// Of which one client may hold `most` places.
    pub fn new(most: usize) -> Self {
        Self { most, held: Arc::default() }
    }

    /// None if the client has as many as it may have.
    pub fn seat(&self, client: IpAddr) -> Option<Seat> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let count = held.entry(client).or_insert(0);
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(Seat { crowd: self.clone(), client })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut held = self.crowd.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = held.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn a_client_has_its_share_and_no_more_and_leaves_nothing_behind() {
        let crowd = Crowd::new(2);
        let (one, other) = (Ipv4Addr::new(10, 244, 1, 1).into(), Ipv4Addr::new(10, 244, 1, 2).into());
        let seats = [crowd.seat(one), crowd.seat(one)];
        assert!(seats.iter().all(Option::is_some) && crowd.seat(one).is_none());
        assert!(crowd.seat(other).is_some());
        drop(seats);
        assert!(crowd.held.lock().unwrap().is_empty());
        assert!(crowd.seat(one).is_some());
    }
}
