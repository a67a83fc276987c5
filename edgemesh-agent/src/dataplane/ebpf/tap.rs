//! Events, from the programs' ring buffer.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd as _,
    time::{Duration, SystemTime},
};

use aya::maps::{Array, MapData, RingBuf};
use edgemesh_common::layout::{
    self, CALL_CONNECT, CALL_CONNECT_REFUSED, CALL_DATAGRAM, CALL_DATAGRAM_REFUSED, Settings,
};

use super::{Ebpf, kernel, sys, wanted::addr_of};
use crate::dataplane::{
    Error,
    events::{Call, Event, Events, Ring},
};

/// The maps that events need.
pub(super) struct Tap {
    pub(super) settings: Array<MapData, Settings>,
    pub(super) events: RingBuf<MapData>,
}

impl Ebpf {
    /// Where events come from. None if it was asked for before.
    ///
    /// # Errors
    ///
    /// Events that an earlier agent asked for cannot be switched off.
    pub fn events(&mut self) -> Result<Option<Events>, Error> {
        let Some(Tap { mut settings, events }) = self.opened.tap.take() else { return Ok(None) };
        let mut switch = move |on: bool| {
            let wanted = Settings { events: u32::from(on) };
            settings.set(0, wanted, 0).map_err(|error| kernel("switch events on or off", &error))
        };
        switch(false)?;
        Ok(Some(Events::new(Box::new(switch), Box::new(events))))
    }
}

impl Ring for RingBuf<MapData> {
    fn read(&mut self, wait: Duration, take: &mut dyn FnMut(Event)) -> io::Result<()> {
        if !self.drain(take) && !wait.is_zero() {
            sys::wait_readable(self.as_fd(), wait)?;
            self.drain(take);
        }
        Ok(())
    }
}

trait Drain {
    /// Whether there were any.
    fn drain(&mut self, take: &mut dyn FnMut(Event)) -> bool;
}

impl Drain for RingBuf<MapData> {
    fn drain(&mut self, take: &mut dyn FnMut(Event)) -> bool {
        let mut any = false;
        while let Some(item) = self.next() {
            any = true;
            let size = size_of::<layout::Event>();
            let Some(bytes) = item.get(..size) else { continue };
            // SAFETY: as many bytes as an `Event` has, which any bits are one of; they need not be aligned.
            let event: layout::Event = unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) };
            let (now, monotonic) = (SystemTime::now(), sys::monotonic());
            if let Some(event) = event_of(&event, now, monotonic) {
                take(event);
            }
        }
        any
    }
}

/// None for a kind of call that is not known.
fn event_of(event: &layout::Event, now: SystemTime, monotonic: u64) -> Option<Event> {
    let (call, refused) = match event.call {
        CALL_CONNECT => (Call::Connect, false),
        CALL_CONNECT_REFUSED => (Call::Connect, true),
        CALL_DATAGRAM => (Call::Datagram, false),
        CALL_DATAGRAM_REFUSED => (Call::Datagram, true),
        _ => return None,
    };
    let backend = SocketAddr::new(IpAddr::from(event.backend), u16::from_be_bytes(event.backend_port));
    Some(Event {
        time: now - Duration::from_nanos(monotonic.saturating_sub(event.time)),
        netns: event.netns,
        socket: event.socket,
        frontend: addr_of(&event.frontend),
        backend: (!refused).then_some(backend),
        call,
    })
}

#[cfg(test)]
mod tests {
    use edgemesh_common::{
        Addr,
        layout::{FrontendKey, UDP},
    };

    use super::*;

    #[test]
    fn an_event_is_told_in_the_agents_own_terms() {
        let ip = |text: &str| Addr::from(text.parse::<IpAddr>().unwrap());
        let raw = layout::Event {
            time: 7_000_000_000,
            netns: 11,
            socket: 12,
            frontend: FrontendKey::new(ip("10.96.0.10"), 53u16.to_be_bytes(), UDP),
            backend: ip("10.244.1.1"),
            backend_port: 5300u16.to_be_bytes(),
            call: CALL_DATAGRAM,
            ..layout::Event::default()
        };
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let event = event_of(&raw, now, 9_000_000_000).unwrap();
        assert_eq!(event.time, now - Duration::from_secs(2));
        assert_eq!(event.frontend.to_string(), "10.96.0.10:53/UDP");
        assert_eq!((event.backend, event.call), (Some("10.244.1.1:5300".parse().unwrap()), Call::Datagram));
        let refused = layout::Event { call: CALL_CONNECT_REFUSED, backend: Addr::default(), ..raw };
        let event = event_of(&refused, now, 0).unwrap();
        assert_eq!((event.backend, event.call, event.time), (None, Call::Connect, now));
        assert_eq!(event_of(&layout::Event { call: 99, ..raw }, now, 0), None);
    }
}
