//! A figure and how far its repetitions lie apart.

use anyhow::{Result, ensure};

/// The quantiles of one figure's repetitions, in the unit of the samples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) min: f64,
    pub(crate) lower_quartile: f64,
    pub(crate) median: f64,
    pub(crate) upper_quartile: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// # Errors
    ///
    /// When there are no samples.
    pub(crate) fn of(samples: impl IntoIterator<Item = f64>) -> Result<Self> {
        let mut samples: Vec<f64> = samples.into_iter().collect();
        ensure!(!samples.is_empty(), "nothing was measured");
        samples.sort_unstable_by(f64::total_cmp);
        let at = |fraction| quantile(&samples, fraction);
        Ok(Self { min: at(0.0), lower_quartile: at(0.25), median: at(0.5), upper_quartile: at(0.75), max: at(1.0) })
    }
}

/// Between two samples it is their weighted mean.
fn quantile(sorted: &[f64], fraction: f64) -> f64 {
    let place = fraction * (sorted.len().saturating_sub(1)) as f64;
    let at = |index: f64| sorted.get(index as usize).copied().unwrap_or(f64::NAN);
    let (below, above) = (at(place.floor()), at(place.ceil()));
    below + (above - below) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_on_and_between_the_samples() {
        let spread = Spread::of([4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!(spread, Spread { min: 1.0, lower_quartile: 1.75, median: 2.5, upper_quartile: 3.25, max: 4.0 });
        let one = Spread::of([7.0]).unwrap();
        assert_eq!((one.min, one.median, one.max), (7.0, 7.0, 7.0));
        Spread::of([]).unwrap_err();
    }
}
