//! What a socket remembers of its translations, for the way back.

use crate::{
    Addr,
    layout::{Backend, Connected, DATAGRAM_FLOWS, Datagrams, Flow, FrontendKey},
    select::Earlier,
};

impl Connected {
    #[inline(always)]
    pub const fn new(frontend: &FrontendKey, backend: &Backend, service: u32) -> Self {
        Self {
            frontend: frontend.addr,
            backend: backend.addr,
            frontend_port: frontend.port,
            backend_port: backend.port,
            service,
        }
    }

    /// The frontend, if `addr:port` is the backend this socket was sent to.
    #[inline(always)]
    pub fn frontend_of(&self, addr: &Addr, port: [u8; 2]) -> Option<(Addr, [u8; 2])> {
        (self.service != 0 && self.backend.same(addr) && self.backend_port == port)
            .then_some((self.frontend, self.frontend_port))
    }

    /// The backend this socket is connected to, if it is by way of `frontend` and `peer:port` still is its peer.
    /// Its [`Backend::id`] is not kept, and 0 here.
    #[inline(always)]
    pub fn backend_of(&self, frontend: &FrontendKey, peer: &Addr, port: [u8; 2]) -> Option<Backend> {
        (self.frontend_of(peer, port).is_some()
            && self.frontend.same(&frontend.addr)
            && self.frontend_port == frontend.port)
            .then_some(Backend { addr: self.backend, port: self.backend_port, pad: 0, id: 0 })
    }
}

impl Datagrams {
    /// The backend that the last datagram to `frontend` went to.
    // A function of its own in the kernel, for its stack.
    #[inline(never)]
    pub fn earlier(&self, frontend: &FrontendKey) -> Option<Earlier> {
        for flow in &self.flows {
            if flow.backend_id != 0 && flow.frontend_port == frontend.port && flow.frontend.same(&frontend.addr) {
                return Some(Earlier {
                    service: flow.service,
                    generation: flow.generation,
                    backend: Backend { addr: flow.backend, port: flow.backend_port, pad: 0, id: flow.backend_id },
                });
            }
        }
        None
    }

    /// The frontend that a datagram from `addr:port` answers for.
    #[inline(always)]
    pub fn frontend_of(&self, addr: &Addr, port: [u8; 2]) -> Option<(Addr, [u8; 2])> {
        for flow in &self.flows {
            if flow.service != 0 && flow.backend_port == port && flow.backend.same(addr) {
                return Some((flow.frontend, flow.frontend_port));
            }
        }
        None
    }

    /// Notes that a datagram went to `addr:port` itself: its answer must not pass for one of a frontend.
    #[inline(always)]
    pub fn forget(&mut self, addr: &Addr, port: [u8; 2]) {
        for flow in &mut self.flows {
            if flow.backend_port == port && flow.backend.same(addr) {
                *flow = Flow::default();
            }
        }
    }

    /// Remembers that `frontend` now means `backend`.
    ///
    /// A pair with the same frontend and backend is confirmed in place. A frontend that moved to another backend takes
    /// a new slot, so that an answer still on its way from the old one is translated too. Where two frontends of one
    /// socket share a backend, answers carry the frontend written to last: the only one that is waited for in practice.
    #[inline(always)]
    pub fn remember(&mut self, frontend: &FrontendKey, backend: &Backend, service: u32, generation: u32) {
        let mut slot = DATAGRAM_FLOWS;
        for place in 0..loop_bound() {
            let old = &mut self.flows[place & (DATAGRAM_FLOWS - 1)];
            if old.service == 0 {
                continue;
            }
            if old.backend_port == backend.port && old.backend.same(&backend.addr) {
                slot = place;
            } else if old.frontend_port == frontend.port && old.frontend.same(&frontend.addr) {
                old.backend_id = 0;
            }
        }
        if slot == DATAGRAM_FLOWS {
            slot = self.next as usize;
            self.next = (self.next + 1) % DATAGRAM_FLOWS as u32;
        }
        self.flows[slot & (DATAGRAM_FLOWS - 1)] = Flow {
            frontend: frontend.addr,
            backend: backend.addr,
            frontend_port: frontend.port,
            backend_port: backend.port,
            service,
            generation,
            backend_id: backend.id,
        };
    }
}

/// [`DATAGRAM_FLOWS`], read where the compiler cannot know it: a loop it unrolls needs more stack than a program has.
#[inline(always)]
fn loop_bound() -> usize {
    static FLOWS: usize = DATAGRAM_FLOWS;
    // SAFETY: a plain read of a static.
    unsafe { core::ptr::read_volatile(&raw const FLOWS) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::UDP;
    use proptest::prelude::*;

    fn addr(n: u8) -> Addr {
        Addr([n; 16])
    }

    fn frontend(n: u8) -> FrontendKey {
        FrontendKey::new(addr(n), [0, 53], UDP)
    }

    fn backend(n: u8) -> Backend {
        Backend { addr: addr(100 + n), port: [0, 54], pad: 0, id: 1000 + u32::from(n) }
    }

    #[test]
    fn a_connected_socket_answers_only_for_its_own_backend() {
        let state = Connected::new(&frontend(1), &backend(1), 9);
        assert_eq!(state.frontend_of(&addr(101), [0, 54]), Some((addr(1), [0, 53])));
        assert_eq!(state.frontend_of(&addr(101), [0, 55]), None, "same host, other port");
        assert_eq!(state.frontend_of(&addr(102), [0, 54]), None, "connected elsewhere since");
        assert_eq!(Connected::default().frontend_of(&addr(0), [0, 0]), None, "never translated");
    }

    #[test]
    fn an_answer_on_its_way_from_the_previous_backend_is_still_translated() {
        let mut state = Datagrams::default();
        state.remember(&frontend(1), &backend(1), 9, 1);
        state.remember(&frontend(1), &backend(2), 9, 2);
        assert_eq!(state.frontend_of(&addr(101), [0, 54]), Some((addr(1), [0, 53])));
        assert_eq!(state.frontend_of(&addr(102), [0, 54]), Some((addr(1), [0, 53])));
        assert_eq!(state.earlier(&frontend(1)).map(|e| e.backend), Some(backend(2)));
    }

    #[test]
    fn a_connected_socket_that_names_its_peer_stays_with_its_backend() {
        let state = Connected::new(&frontend(1), &backend(1), 9);
        let of = |f: &FrontendKey, peer: Addr, port| state.backend_of(f, &peer, port).map(|b| (b.addr, b.port));
        assert_eq!(of(&frontend(1), addr(101), [0, 54]), Some((addr(101), [0, 54])));
        assert_eq!(of(&frontend(2), addr(101), [0, 54]), None, "another Service");
        assert_eq!(of(&frontend(1), addr(102), [0, 54]), None, "connected elsewhere since");
        assert_eq!(of(&frontend(1), addr(0), [0, 0]), None, "not connected any more");
    }

    #[test]
    fn the_answer_to_a_datagram_sent_to_a_backend_itself_is_left_alone() {
        let mut state = Datagrams::default();
        state.remember(&frontend(1), &backend(1), 9, 1);
        state.remember(&frontend(2), &backend(2), 9, 1);
        state.forget(&addr(101), [0, 54]);
        assert_eq!(state.frontend_of(&addr(101), [0, 54]), None);
        assert_eq!(state.frontend_of(&addr(102), [0, 54]), Some((addr(2), [0, 53])), "others stay");
        state.remember(&frontend(1), &backend(1), 9, 1);
        assert_eq!(state.frontend_of(&addr(101), [0, 54]), Some((addr(1), [0, 53])), "until it is sent to again");
    }

    #[test]
    fn two_frontends_on_one_backend_answer_as_the_one_written_to_last() {
        let mut state = Datagrams::default();
        for n in [1, 2, 1] {
            state.remember(&frontend(n), &backend(7), u32::from(n), 1);
            assert_eq!(state.frontend_of(&addr(107), [0, 54]), Some((addr(n), [0, 53])));
        }
        assert_eq!(state.next, 1, "one slot serves them all");
    }

    proptest! {
        /// The plain model: the list of (frontend, backend) pairs in the order written, newest last.
        #[test]
        fn remembers_the_last_sixteen_pairs(writes in proptest::collection::vec((0u8..20, 0u8..20), 1..60)) {
            let mut state = Datagrams::default();
            let mut slots: Vec<(u8, u8)> = Vec::new();
            let mut choice = std::collections::HashMap::new();
            for (f, b) in writes {
                state.remember(&frontend(f), &backend(b), 1, 1);
                // A backend has one slot; a new one pushes the oldest slot out.
                match slots.iter_mut().find(|(_, backend)| *backend == b) {
                    Some(slot) => {
                        if slot.0 != f && choice.get(&slot.0) == Some(&b) {
                            choice.remove(&slot.0);
                        }
                        slot.0 = f;
                    }
                    None => {
                        if slots.len() == DATAGRAM_FLOWS {
                            let (gone, with) = slots.remove(0);
                            if choice.get(&gone) == Some(&with) {
                                choice.remove(&gone);
                            }
                        }
                        slots.push((f, b));
                    }
                }
                choice.insert(f, b);
                for n in 0..20 {
                    let answered = slots.iter().find(|(_, b)| *b == n).map(|(f, _)| (addr(*f), [0, 53]));
                    prop_assert_eq!(state.frontend_of(&addr(100 + n), [0, 54]), answered);
                    let earlier = state.earlier(&frontend(n)).map(|e| e.backend.id);
                    prop_assert_eq!(earlier, choice.get(&n).map(|b| 1000 + u32::from(*b)));
                }
            }
        }
    }
}
