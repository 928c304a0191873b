//! What the step batcher and the loads have done, as numbers that anyone may read at any time without stopping them.

use super::LoadTimes;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of durations, in seconds.
const SECONDS: &[f64] = &[
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0,
];
/// Upper bounds of numbers of rows.
const ROWS: &[f64] = &[
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0,
];

/// Counts of one batcher, since its model was loaded.
#[derive(Debug)]
pub(super) struct Metrics {
    pub(super) queue: Histogram,
    pub(super) step: Histogram,
    pub(super) rows: Histogram,
    pub(super) digits_drawn: AtomicU64,
    pub(super) digits_failed: AtomicU64,
    pub(super) digits_abandoned: AtomicU64,
    pub(super) rows_running: AtomicU64,
}

impl Metrics {
    pub(super) fn new() -> Self {
        Self {
            queue: Histogram::new(SECONDS),
            step: Histogram::new(SECONDS),
            rows: Histogram::new(ROWS),
            digits_drawn: AtomicU64::new(0),
            digits_failed: AtomicU64::new(0),
            digits_abandoned: AtomicU64::new(0),
            rows_running: AtomicU64::new(0),
        }
    }

    pub(super) fn snapshot(&self, digits_open: usize) -> BatcherMetrics {
        BatcherMetrics {
            queue_seconds: self.queue.snapshot(),
            step_seconds: self.step.snapshot(),
            batch_rows: self.rows.snapshot(),
            digits_drawn: self.digits_drawn.load(Ordering::Relaxed),
            digits_failed: self.digits_failed.load(Ordering::Relaxed),
            digits_abandoned: self.digits_abandoned.load(Ordering::Relaxed),
            digits_open: digits_open as u64,
            rows_running: self.rows_running.load(Ordering::Relaxed),
        }
    }
}

/// A batcher's numbers at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct BatcherMetrics {
    /// From a request's arrival to the first step, of each digit.
    pub queue_seconds: HistogramSnapshot,
    /// Of each step.
    pub step_seconds: HistogramSnapshot,
    /// Rows that the network computed in each step; a digit with guidance is two.
    pub batch_rows: HistogramSnapshot,
    pub digits_drawn: u64,
    pub digits_failed: u64,
    /// Digits that were queued, and that nobody waited for in the end.
    pub digits_abandoned: u64,
    /// Digits that wait or are being drawn now.
    pub digits_open: u64,
    /// Rows of the step under way, or of the last one.
    pub rows_running: u64,
}

/// Where weights can come from.
const ORIGINS: [&str; 4] = ["built-in", "cache", "file", "store"];
/// Upper bounds of a load's phases, in seconds.
const LOAD_SECONDS: &[f64] = &[
    0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 240.0,
];

/// Counts of all loads.
#[derive(Debug)]
pub(super) struct Loads {
    done: [AtomicU64; 4],
    bytes: [AtomicU64; 4],
    pub(super) failed: AtomicU64,
    pub(super) given_up: AtomicU64,
    fetch: Histogram,
    build: Histogram,
}

impl Loads {
    pub(super) fn new() -> Self {
        Self {
            done: Default::default(),
            bytes: Default::default(),
            failed: AtomicU64::new(0),
            given_up: AtomicU64::new(0),
            fetch: Histogram::new(LOAD_SECONDS),
            build: Histogram::new(LOAD_SECONDS),
        }
    }

    pub(super) fn done(&self, origin: &str, bytes: u64, times: LoadTimes) {
        if let Some(i) = ORIGINS.iter().position(|o| *o == origin) {
            self.done[i].fetch_add(1, Ordering::Relaxed);
            self.bytes[i].fetch_add(bytes, Ordering::Relaxed);
        }
        self.fetch.add_duration(times.fetch);
        self.build.add_duration(times.build);
    }

    pub(super) fn snapshot(&self) -> LoadMetrics {
        let by_origin = |counts: &[AtomicU64; 4]| {
            let counts = counts.iter().map(|c| c.load(Ordering::Relaxed));
            ORIGINS.into_iter().zip(counts).collect()
        };
        LoadMetrics {
            done: by_origin(&self.done),
            bytes: by_origin(&self.bytes),
            failed: self.failed.load(Ordering::Relaxed),
            given_up: self.given_up.load(Ordering::Relaxed),
            fetch_seconds: self.fetch.snapshot(),
            build_seconds: self.build.snapshot(),
        }
    }
}

/// The numbers of all loads at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadMetrics {
    /// Loads that ended well, by where the weights came from.
    pub done: Vec<(&'static str, u64)>,
    /// Their bytes.
    pub bytes: Vec<(&'static str, u64)>,
    pub failed: u64,
    /// Loads that nobody waited for any more.
    pub given_up: u64,
    pub fetch_seconds: HistogramSnapshot,
    pub build_seconds: HistogramSnapshot,
}

/// Counts of values by size.
#[derive(Debug)]
pub(super) struct Histogram {
    bounds: &'static [f64],
    counts: Vec<AtomicU64>,
    /// In millionths.
    sum: AtomicU64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self {
            bounds,
            counts: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(),
            sum: AtomicU64::new(0),
        }
    }

    pub(super) fn add(&self, value: f64) {
        let bucket = self.bounds.partition_point(|&bound| bound < value);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum
            .fetch_add((value * 1e6).round() as u64, Ordering::Relaxed);
    }

    pub(super) fn add_duration(&self, value: Duration) {
        self.add(value.as_secs_f64());
    }

    fn snapshot(&self) -> HistogramSnapshot {
        let mut count = 0;
        let mut below = Vec::with_capacity(self.counts.len());
        for (i, n) in self.counts.iter().enumerate() {
            count += n.load(Ordering::Relaxed);
            if let Some(&bound) = self.bounds.get(i) {
                below.push((bound, count));
            }
        }
        HistogramSnapshot {
            below,
            count,
            sum: self.sum.load(Ordering::Relaxed) as f64 / 1e6,
        }
    }
}

/// A histogram at one moment, counted up as Prometheus has it.
#[derive(Clone, Debug, PartialEq)]
pub struct HistogramSnapshot {
    /// Upper bounds, and how many values were at most that.
    pub below: Vec<(f64, u64)>,
    pub count: u64,
    pub sum: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_count_up_and_keep_the_sum() {
        let histogram = Histogram::new(&[1.0, 2.0, 4.0]);
        for value in [0.5, 1.0, 1.5, 4.0, 9.0] {
            histogram.add(value);
        }
        let snapshot = histogram.snapshot();
        assert_eq!(snapshot.below, [(1.0, 2), (2.0, 3), (4.0, 4)]);
        assert_eq!((snapshot.count, snapshot.sum), (5, 16.0));
    }
}
