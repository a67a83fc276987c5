//! `events` on a terminal: a line as each comes.

use std::net::IpAddr;

use crate::status::{EventLine, EventRow};

/// The head of the columns.
pub const EVENTS_HEAD: &str =
    "TIME (UTC)       CALL      FROM                  FRONTEND                  BACKEND                   SERVICE\n";

/// One line under [`EVENTS_HEAD`].
pub fn event(line: &EventLine) -> String {
    match line {
        EventLine::Lost { lost } => format!("... {lost} events were lost: this command did not keep up\n"),
        EventLine::Event(row) => {
            let backend = row.backend.map_or_else(|| "REFUSED".to_owned(), |backend| backend.to_string());
            let service = row.service.as_deref().unwrap_or("-");
            format!(
                "{:<15}  {:<8}  {:<20}  {:<24}  {backend:<24}  {service}\n",
                clock(row.time),
                row.call,
                from(row),
                row.frontend
            )
        }
    }
}

/// An address of the client, of the family it called; else what there is.
fn from(row: &EventRow) -> String {
    let v6 = row.frontend.starts_with('[');
    let ip: Option<&IpAddr> = row.from.iter().find(|ip| ip.is_ipv6() == v6).or_else(|| row.from.first());
    ip.map_or_else(|| format!("netns {}", row.netns), ToString::to_string)
}

/// The time of day.
fn clock(time: f64) -> String {
    let micros = (time * 1e6) as u64;
    let (seconds, micros) = (micros / 1_000_000, micros % 1_000_000);
    format!("{:02}:{:02}:{:02}.{micros:06}", seconds / 3600 % 24, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> EventRow {
        EventRow {
            time: 86_400.0 + 3_661.5,
            call: "connect".to_owned(),
            service: Some("default/web".to_owned()),
            frontend: "10.96.0.10:80/TCP".to_owned(),
            backend: Some("10.244.1.11:8080".parse().unwrap()),
            netns: 4,
            from: vec!["fd00::5".parse().unwrap(), "10.244.1.5".parse().unwrap()],
            socket: 9,
        }
    }

    #[test]
    fn an_event_is_a_line_under_its_head() {
        let line = event(&EventLine::Event(row()));
        assert_eq!(
            line,
            "01:01:01.500000  connect   10.244.1.5            10.96.0.10:80/TCP         10.244.1.11:8080          default/web\n"
        );
        for (word, value) in
            [("FROM", "10.244.1.5"), ("FRONTEND", "10.96"), ("BACKEND", "10.244.1.11"), ("SERVICE", "default")]
        {
            assert_eq!(EVENTS_HEAD.find(word), line.find(value), "{word}");
        }
    }

    #[test]
    fn what_is_not_known_is_not_made_up() {
        let refused = EventRow { backend: None, service: None, from: vec![], ..row() };
        let line = event(&EventLine::Event(refused));
        assert!(line.contains("REFUSED") && line.contains("netns 4") && line.ends_with("-\n"), "{line}");
        assert!(event(&EventLine::Lost { lost: 3 }).contains("3 events were lost"));
    }

    #[test]
    fn both_kinds_of_lines_survive_json() {
        for line in [EventLine::Event(row()), EventLine::Lost { lost: 7 }] {
            let text = serde_json::to_string(&line).unwrap();
            assert_eq!(serde_json::from_str::<EventLine>(&text).unwrap(), line, "{text}");
        }
    }
}
