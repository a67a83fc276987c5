//! Counts what test harnesses report.

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Totals {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) ignored: u64,
}

impl Totals {
    /// Sums the harness's closing lines: `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
    pub(crate) fn read(output: &str) -> Self {
        let mut totals = Self::default();
        for result in output.lines().filter_map(|line| line.strip_prefix("test result: ")) {
            let Some((_, counts)) = result.split_once(". ") else { continue };
            for count in counts.split("; ") {
                let Some((number, what)) = count.split_once(' ') else { continue };
                let Ok(number) = number.parse::<u64>() else { continue };
                match what {
                    "passed" => totals.passed += number,
                    "failed" => totals.failed += number,
                    "ignored" => totals.ignored += number,
                    _ => {}
                }
            }
        }
        totals
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }

    /// `: 12 passed, 1 failed` since `before`.
    pub(crate) fn since(self, before: Self) -> String {
        format!(": {} passed, {} failed", self.passed - before.passed, self.failed - before.failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_of_several_harnesses_are_summed() {
        let output = "running 3 tests\n\
            test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s\n\
            noise: test result: ok. 50 passed; 0 failed\n\
            test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 4 filtered out; finished in 1.02s\n";
        assert_eq!(Totals::read(output), Totals { passed: 4, failed: 2, ignored: 1 });
    }

    #[test]
    fn a_harness_that_broke_off_reports_nothing() {
        assert_eq!(Totals::read("running 2 tests\ntest a ... ok\n"), Totals::default());
        assert_eq!(Totals::read("test result: strange"), Totals::default());
    }
}
