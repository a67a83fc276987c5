//! The rows from one node to another: what its clients get there, by which path, and how fast.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::path::{Path, paths};
use super::{NODE_PORT, PLAIN};
use crate::demo::check;
use crate::demo::example::{Backend, ExampleService, Examples};
use crate::demo::table::Row;
use crate::lab::{App, Connection, Measure, Node, Pod, Transport, eventually};

/// Bounds each step, on a busy machine too.
const STEP: Duration = Duration::from_secs(5);
/// Exchanges per measured path.
const ROUNDS: u32 = 20;
/// What is sent there and back at once.
const BULK: u64 = 16 << 20;

/// From one node to another.
pub(super) struct Way<'a> {
    from: &'a Node,
    client: Pod,
    to: &'a str,
    /// Where the other node's own servers are reached.
    plain: IpAddr,
}

impl<'a> Way<'a> {
    pub(super) fn new(from: &'a Node, client: &Pod, to: &'a str, plain: IpAddr) -> Self {
        Self { from, client: client.within(STEP), to, plain }
    }

    pub(super) fn row(&self, what: &str, expected: &str, got: Result<String>) -> Row {
        let what = format!("{} -> {}: {what}", self.from.name(), self.to);
        Row { what, expected: expected.to_owned(), got, figures: None }
    }

    /// Waits for the first connection that is answered, and keeps it.
    pub(super) fn first(&self, examples: &Examples, within: Duration) -> Result<Connection> {
        let target = self.frontend(examples, App::Tcp)?;
        let mut first = None;
        eventually(within, &format!("the first connection to {}", self.to), || {
            first = Some(self.client.open(Transport::Tcp, target)?);
            Ok(true)
        })?;
        first.context("there is no first connection")
    }

    /// The paths that carry connections of pods.
    pub(super) fn in_use(&self) -> Result<String> {
        let paths = paths(self.from, self.to)?;
        let used: Vec<String> = paths.iter().filter(|path| path.streams > 0).map(Path::describe).collect();
        Ok(used.join(", "))
    }

    /// Waits until new connections take `path`; tells which one they take.
    pub(super) fn becomes(&self, path: &str, within: Duration) -> Result<String> {
        let mut taken = String::new();
        // What they take instead is told by the row.
        let _ = eventually(within, path, || {
            taken = paths(self.from, self.to)?.first().map_or_else(|| "not connected".to_owned(), Path::describe);
            Ok(taken == path)
        });
        Ok(taken)
    }

    /// What has gone through relays so far, either way.
    pub(super) fn relayed_bytes(&self) -> Result<u64> {
        Ok(paths(self.from, self.to)?.iter().filter(|path| path.is_relayed()).map(Path::bytes).sum())
    }

    /// A row for every port of every Service with a pod on the other node, by its address, and the rows by name.
    pub(super) fn services(&self, examples: &Examples) -> Vec<Row> {
        let services = examples.services();
        let mut rows = Vec::new();
        for (service, backend) in self.there(&services) {
            if let Some(frontend) = service.frontend {
                let what = format!("{} to {frontend}", word(service.app));
                rows.push(self.visit(&what, &backend.pod, service.app, Ok(frontend)));
            }
        }
        rows.extend(self.by_name(examples));
        rows
    }

    /// The web server on the other node by the name of its Service, and pods there by their own.
    pub(super) fn by_name(&self, examples: &Examples) -> Vec<Row> {
        let services = examples.services();
        let mut rows = Vec::new();
        for (service, backend) in self.there(&services) {
            let name = match service.frontend {
                Some(_) if service.app != App::Http => continue,
                Some(_) => format!("{}.default.svc.cluster.local", service.name),
                None => format!("{}.{}.default.svc.cluster.local", backend.pod, service.name),
            };
            let port = service.frontend.unwrap_or(backend.address).port();
            let target = self.look_up(&name).map(|ip| SocketAddr::new(ip, port));
            rows.push(self.visit(&format!("{} to {name}", word(service.app)), &backend.pod, service.app, target));
        }
        rows
    }

    /// The other node itself: by its name in DNS, and by SOCKS5.
    pub(super) fn node(&self) -> [Row; 2] {
        let (to, name) = (self.to, format!("{}.node.cluster.local", self.to));
        let by_dns = self.look_up(&name).and_then(|ip| {
            let mut names = check::http_names(&self.client, SocketAddr::new(ip, NODE_PORT), 1)?;
            names.pop().context("nobody answered")
        });
        let by_socks5 = || -> Result<String> {
            let url = format!("http://{to}:{NODE_PORT}/");
            let proxy = ["--socks5-hostname", "169.254.96.16:10800"];
            let output = self.client.run("curl", &["-sS", "--max-time", "5", proxy[0], proxy[1], &url])?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
            let body = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            Ok(if body.contains(to) { to.to_owned() } else { body })
        };
        [
            self.row(&format!("{name}, port {NODE_PORT}"), to, by_dns),
            self.row(&format!("{to}, port {NODE_PORT}, by SOCKS5"), to, by_socks5()),
        ]
    }

    /// Much data on one connection.
    pub(super) fn bulk(&self, examples: &Examples) -> Row {
        let what = format!("{} MiB there and back, on one connection", BULK >> 20);
        let mut row = self.row(&what, "intact", Ok("intact".to_owned()));
        let host = self.from.host().within(STEP);
        let rate = |target: SocketAddr| -> Result<String> {
            let report = host.bulk(target, BULK)?;
            ensure!(report.intact && report.received == BULK, "of {BULK} bytes, {} came back as sent", report.received);
            Ok(format!("{:.0} MiB/s", (BULK >> 20) as f64 / report.took.as_secs_f64()))
        };
        let both =
            || -> Result<[String; 2]> { Ok([rate(self.frontend(examples, App::Tcp)?)?, rate(self.plain(App::Tcp)?)?]) };
        match both() {
            Ok(rates) => row.figures = Some(rates),
            Err(error) => row.got = Err(error),
        }
        row
    }

    /// A client's use of a server, by which it is told who answers; and how long one takes by the tunnel and past it.
    fn visit(&self, what: &str, who: &str, app: App, target: Result<SocketAddr>) -> Row {
        let client = &self.client;
        let answered = |target: SocketAddr| match app {
            App::Http => check::http_names(client, target, 1)?.pop().context("nobody answered"),
            App::WebSocket => Ok(client.websocket(target)?.name),
            App::Udp => Ok(client.udp(target)?.name),
            App::Tcp | App::Count | App::Reset | App::Echo | App::Source => Ok(client.tcp(target)?.name),
        };
        let (got, target) = match target {
            Ok(target) => (answered(target), Some(target)),
            Err(error) => (Err(error), None),
        };
        let mut row = self.row(what, who, got);
        if let Some(target) = target.filter(|_| row.passed()) {
            match self.medians(app, target) {
                Ok(medians) => row.figures = Some(medians),
                Err(error) => row.got = Err(error.context("could not measure it")),
            }
        }
        row
    }

    fn medians(&self, app: App, target: SocketAddr) -> Result<[String; 2]> {
        let groups = [vec![target], vec![self.plain(app)?]];
        let quantiles = self.from.host().within(STEP).measure(Measure::Visit(app), &groups, ROUNDS)?;
        let [tunnel, plain] = quantiles.as_slice() else { anyhow::bail!("two paths were not measured") };
        Ok([tunnel, plain].map(|of| format!("{:.2} ms", of.p50.as_secs_f64() * 1e3)))
    }

    fn plain(&self, app: App) -> Result<SocketAddr> {
        let (_, port) = PLAIN.into_iter().find(|(other, _)| *other == app).context("no node serves that itself")?;
        Ok(SocketAddr::new(self.plain, port))
    }

    fn frontend(&self, examples: &Examples, app: App) -> Result<SocketAddr> {
        let services = examples.services();
        let found = self.there(&services).find_map(|(service, _)| service.frontend.filter(|_| service.app == app));
        found.with_context(|| format!("no Service of {} speaks {}", self.to, word(app)))
    }

    /// The ports of Services that have a pod on the other node, with that pod.
    fn there<'s>(&self, services: &'s [ExampleService]) -> impl Iterator<Item = (&'s ExampleService, &'s Backend)> {
        let to = self.to;
        services
            .iter()
            .flat_map(|service| service.backends.iter().map(move |backend| (service, backend)))
            .filter(move |(_, backend)| backend.node == to)
    }

    fn look_up(&self, name: &str) -> Result<IpAddr> {
        let found = check::look_up(&self.client, name, "A")?;
        found.first().copied().with_context(|| format!("{name} has no address"))
    }
}

fn word(app: App) -> &'static str {
    match app {
        App::Http => "HTTP",
        App::WebSocket => "WebSocket",
        App::Udp => "UDP",
        App::Tcp | App::Count | App::Reset | App::Echo | App::Source => "TCP",
    }
}
