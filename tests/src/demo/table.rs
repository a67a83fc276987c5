//! The demo's table as text.

use std::time::Duration;

use super::check::Row;

/// Renders the rows, the columns as wide as they need to be.
pub(super) fn render(rows: &[Row]) -> String {
    let header = ["", "what", "expected", "got", "connect()", "direct"].map(str::to_owned);
    let lines: Vec<[String; 6]> = std::iter::once(header).chain(rows.iter().map(cells)).collect();
    let mut widths = [0; 6];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let render = |line: &[String; 6]| {
        let padded: Vec<String> = line.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        padded.join("  ").trim_end().to_owned()
    };
    let mut text: Vec<String> = lines.iter().map(render).collect();
    text.push(
        "connect(): median through the ClusterIP; direct: median to the pods themselves, taking turns".to_owned(),
    );
    text.join("\n")
}

fn cells(row: &Row) -> [String; 6] {
    let verdict = if row.passed() { "ok" } else { "FAILED" };
    let got = match &row.got {
        Ok(got) => got.clone(),
        Err(error) => format!("{error:#}"),
    };
    let median = |median: Option<Duration>| median.map(micros).unwrap_or_default();
    [
        verdict.to_owned(),
        row.what.clone(),
        row.expected.clone(),
        got,
        median(row.medians.map(|(through, _)| through)),
        median(row.medians.map(|(_, direct)| direct)),
    ]
}

fn micros(duration: Duration) -> String {
    format!("{:.1} µs", duration.as_secs_f64() * 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_failures_show() {
        let row = |what: &str, got: &str, medians| Row {
            what: what.to_owned(),
            expected: "b".to_owned(),
            got: Ok(got.to_owned()),
            medians,
        };
        let micros = Duration::from_micros;
        let rows = [row("short", "b", Some((micros(21), micros(20)))), row("longer one", "c", None)];
        let text = render(&rows);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "        what        expected  got  connect()  direct");
        assert_eq!(lines[1], "ok      short       b         b    21.0 µs    20.0 µs");
        assert_eq!(lines[2], "FAILED  longer one  b         c");
    }
}
