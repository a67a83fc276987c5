//! The table by which clients are spread over backends by their address.

use std::net::SocketAddr;

use edgemesh_common::{
    Addr,
    layout::{Backend, RING_PLACES, Ring},
    select::{mix, ring_place},
};

/// How many backends a ring can lead to; its places are of 16 bits.
pub(super) const MAX_BACKENDS: usize = u16::MAX as usize + 1;

/// Gives each place of a ring to the backend that has the highest weight for it; `backends` is neither empty nor has more
/// than [`MAX_BACKENDS`].
///
/// With the `previous` backends and their ring only the changed ones are looked at; the result is the same.
pub(super) fn ring(backends: &[Backend], previous: Option<(&[Backend], &Ring)>) -> Box<Ring> {
    let seeds: Vec<u32> = backends.iter().map(seed).collect();
    let mut ring = Box::new(Ring { places: [0; RING_PLACES] });
    let Some((old_backends, old)) = previous else {
        for (place, index) in (0u32..).zip(&mut ring.places) {
            *index = best(0..backends.len(), &seeds, place).unwrap_or(0);
        }
        return ring;
    };
    let same = |a: &Backend, b: &Backend| a.addr == b.addr && a.port == b.port;
    // Where each old backend is now, and which are new.
    let places: std::collections::HashMap<_, _> =
        backends.iter().enumerate().map(|(index, backend)| ((backend.addr, backend.port), index)).collect();
    let now: Vec<Option<usize>> = old_backends
        .iter()
        .map(|old| places.get(&(old.addr, old.port)).copied().filter(|index| same(old, &backends[*index])))
        .collect();
    let stayed: std::collections::HashSet<usize> = now.iter().flatten().copied().collect();
    let added: Vec<usize> = (0..backends.len()).filter(|index| !stayed.contains(index)).collect();
    for ((place, index), old_index) in (0u32..).zip(&mut ring.places).zip(&old.places) {
        // The best of those that stayed is known; only one that came can be better. Where it left, all are asked.
        let best = match now.get(usize::from(*old_index)).copied().flatten() {
            Some(holder) => best(added.iter().copied().chain([holder]), &seeds, place),
            None => best(0..backends.len(), &seeds, place),
        };
        *index = best.unwrap_or(0);
    }
    ring
}

/// The backend that a ring of these would lead a client to, by its index; None without any.
pub(crate) fn choice_of(client: Addr, backends: &[SocketAddr]) -> Option<usize> {
    let of = |at: &SocketAddr| Backend { addr: at.ip().into(), port: at.port().to_be_bytes(), ..Backend::default() };
    let seeds: Vec<u32> = backends.iter().map(|at| seed(&of(at))).collect();
    let place = u32::try_from(ring_place(&client)).ok()?;
    best(0..backends.len(), &seeds, place).map(usize::from)
}

/// The backend with the highest weight for a place; of two, the one with the higher seed, so that order does not matter.
fn best(candidates: impl IntoIterator<Item = usize>, seeds: &[u32], place: u32) -> Option<u16> {
    let best = candidates.into_iter().max_by_key(|index| (mix(seeds[*index], place), seeds[*index]));
    best.and_then(|index| u16::try_from(index).ok())
}

/// What a backend's weights come from: its address and port, which are the same on every node and in every run.
fn seed(backend: &Backend) -> u32 {
    let port = u32::from(u16::from_be_bytes(backend.port));
    let words = backend.addr.0.chunks_exact(4).map(|word| word.iter().fold(0, |sum, byte| sum << 8 | u32::from(*byte)));
    words.chain([port]).fold(0, mix)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn backend(n: u32) -> Backend {
        let addr = Addr::from(std::net::Ipv4Addr::from(0x0a00_0000 + n));
        Backend { addr, port: 80u16.to_be_bytes(), pad: 0, id: n }
    }

    fn backends(numbers: impl IntoIterator<Item = u32>) -> Vec<Backend> {
        numbers.into_iter().map(backend).collect()
    }

    /// The owner of each place by its address.
    fn owners(backends: &[Backend], ring: &Ring) -> Vec<Addr> {
        ring.places.iter().map(|index| backends[usize::from(*index)].addr).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn a_changed_backend_moves_only_its_own_share(
            stay in proptest::collection::btree_set(1u32..1000, 1..40),
            leave in proptest::collection::btree_set(1000u32..2000, 0..8),
            come in proptest::collection::btree_set(2000u32..3000, 0..8),
            turn in any::<proptest::sample::Index>(),
        ) {
            let before = backends(stay.iter().chain(&leave).copied());
            let mut after = backends(stay.iter().chain(&come).copied());
            let by = turn.index(after.len());
            after.rotate_left(by);
            let old = ring(&before, None);
            let new = ring(&after, None);
            let (gone, came) = (backends(leave.iter().copied()), backends(come.iter().copied()));
            let is_among = |set: &[Backend], addr: Addr| set.iter().any(|backend| backend.addr == addr);
            for (was, is) in owners(&before, &old).into_iter().zip(owners(&after, &new)) {
                prop_assert!(was == is || is_among(&gone, was) || is_among(&came, is));
            }
            prop_assert_eq!(&ring(&after, Some((&before, &old))), &new, "from the previous ring, the same");
        }
    }

    #[test]
    fn a_choice_without_a_ring_is_that_of_the_ring() {
        let set = backends(1..=9);
        let addresses: Vec<SocketAddr> =
            (1..=9).map(|n| SocketAddr::from((std::net::Ipv4Addr::from(0x0a00_0000 + n), 80))).collect();
        let ring = ring(&set, None);
        for client in 0..500 {
            let client = Addr::from(std::net::Ipv4Addr::from(0x0af4_0000 + client));
            assert_eq!(choice_of(client, &addresses), Some(usize::from(ring.places[ring_place(&client)])));
        }
        assert_eq!(choice_of(Addr::default(), &[]), None);
    }

    #[test]
    fn every_backend_has_its_share() {
        for count in [1u32, 2, 3, 12, 100] {
            let set = backends(1..=count);
            let mut shares = vec![0u32; count as usize];
            for index in ring(&set, None).places {
                shares[usize::from(index)] += 1;
            }
            let mean = f64::from(RING_PLACES as u32) / f64::from(count);
            // Five standard deviations of a binomial.
            assert!(shares.iter().all(|share| (f64::from(*share) - mean).abs() <= 5.0 * mean.sqrt()), "{shares:?}");
        }
    }
}
