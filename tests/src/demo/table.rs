//! The demo's tables as text.

use anyhow::Result;

/// One line of a table: what was tried, and what came of it.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) what: String,
    pub(super) expected: String,
    pub(super) got: Result<String>,
    /// Two measurements, beside each other.
    pub(super) figures: Option<[String; 2]>,
}

impl Row {
    /// Whether the client got what was expected.
    pub(super) fn passed(&self) -> bool {
        self.got.as_ref().is_ok_and(|got| *got == self.expected)
    }
}

/// Rows, and what their figures are of.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) figures: [&'static str; 2],
    /// Explains the figures, below them.
    pub(super) note: &'static str,
    pub(super) rows: Vec<Row>,
}

impl Table {
    /// How many rows did not pass.
    pub(super) fn failed(&self) -> usize {
        self.rows.iter().filter(|row| !row.passed()).count()
    }

    /// The table with columns as wide as they need to be.
    pub(super) fn render(&self) -> String {
        let [one, other] = self.figures;
        let header = ["", "what", "expected", "got", one, other].map(str::to_owned);
        let lines: Vec<[String; 6]> = std::iter::once(header).chain(self.rows.iter().map(cells)).collect();
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
        text.push(self.note.to_owned());
        text.join("\n")
    }
}

fn cells(row: &Row) -> [String; 6] {
    let verdict = if row.passed() { "ok" } else { "FAILED" };
    let got = match &row.got {
        Ok(got) => got.clone(),
        Err(error) => format!("{error:#}"),
    };
    let [one, other] = row.figures.clone().unwrap_or_default();
    [verdict.to_owned(), row.what.clone(), row.expected.clone(), got, one, other]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_failures_show() {
        let row = |what: &str, got: &str, figures: Option<[&str; 2]>| Row {
            what: what.to_owned(),
            expected: "b".to_owned(),
            got: Ok(got.to_owned()),
            figures: figures.map(|pair| pair.map(str::to_owned)),
        };
        let rows = vec![row("short", "b", Some(["21.0 µs", "20.0 µs"])), row("longer one", "c", None)];
        let table = Table { figures: ["connect()", "direct"], note: "a note", rows };
        let text = table.render();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "        what        expected  got  connect()  direct");
        assert_eq!(lines[1], "ok      short       b         b    21.0 µs    20.0 µs");
        assert_eq!(lines[2], "FAILED  longer one  b         c");
        assert_eq!(lines[3], "a note");
        assert_eq!(table.failed(), 1);
    }
}
