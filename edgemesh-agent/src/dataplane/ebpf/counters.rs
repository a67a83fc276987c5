//! Reading the counters, many at a time: there may be one for each backend of each frontend, and while they are read no
//! change is applied.

use std::{collections::HashMap, io, os::fd::AsFd as _};

use aya::util::nr_cpus;
use edgemesh_common::layout::{CounterKey, Counters};

use super::{Count, Ebpf, Error, addr_of, socket_addr, sum, sys};

/// How many elements are asked for at once: a few hundred KiB on a machine with many CPUs, and far more than one bucket
/// ever holds.
const BATCH: usize = 1024;

impl Ebpf {
    pub(super) fn read_counters(&self) -> Result<Vec<Count>, Error> {
        let mut counts = Vec::with_capacity(self.installed.len());
        let mut own = HashMap::with_capacity(self.installed.len());
        for (key, installed) in &self.installed {
            own.insert(installed.set.service, counts.len());
            counts.push(count_of(addr_of(key), None, installed.retired));
        }
        self.each_counter(|key, value| {
            let Some(installed) = self.services.get(&key.service).and_then(|frontend| self.installed.get(frontend))
            else {
                return;
            };
            let Some(own) = own.get(&key.service).and_then(|place| counts.get_mut(*place)) else { return };
            match installed.set.backends.iter().find(|backend| backend.id == key.backend) {
                Some(backend) => {
                    let count = count_of(own.frontend, Some(socket_addr(backend)), value);
                    counts.push(count);
                }
                // A backend that has just gone counts with its frontend, as it will once it is retired.
                None => {
                    own.connects += value.connects;
                    own.datagrams += value.datagrams;
                    own.refused += value.refused;
                }
            }
        })
        .map_err(|error| Error::Kernel { attempt: "read the counters".to_owned(), error: error.to_string() })?;
        Ok(counts)
    }

    /// Hands over every element of `COUNTERS`, summed up over the CPUs, once.
    fn each_counter(&self, mut take: impl FnMut(CounterKey, Counters)) -> io::Result<()> {
        let cpus = nr_cpus().map_err(|(_, error)| error)?;
        let map = self.opened.counters_fd.as_fd();
        let mut keys = vec![CounterKey::default(); BATCH];
        let mut values = vec![Counters::default(); BATCH * cpus];
        let mut position = None;
        loop {
            let batch = sys::lookup_batch(map, &mut position, &mut keys, &mut values, cpus)?;
            for (key, values) in keys.iter().zip(values.chunks(cpus)).take(batch.count) {
                take(*key, values.iter().fold(Counters::default(), sum));
            }
            if batch.last {
                return Ok(());
            }
        }
    }
}

fn count_of(frontend: crate::model::FrontendAddr, backend: Option<std::net::SocketAddr>, value: Counters) -> Count {
    Count { frontend, backend, connects: value.connects, datagrams: value.datagrams, refused: value.refused }
}
