//! How far a load has come, for whoever waits.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Shared between those who fetch and those who show it.
#[derive(Debug, Default)]
pub struct Progress {
    total: AtomicU64,
    arrived: AtomicU64,
    started: Mutex<Option<Instant>>,
}

impl Progress {
    /// Bytes of all files; 0 while unknown.
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// Bytes that are where they belong.
    pub fn arrived(&self) -> u64 {
        self.arrived.load(Ordering::Relaxed)
    }

    /// How long the rest will take at the speed so far; none before there is one.
    pub fn left(&self, now: Instant) -> Option<Duration> {
        let started = (*self.started.lock().unwrap_or_else(PoisonError::into_inner))?;
        let (total, arrived) = (self.total(), self.arrived());
        if arrived == 0 || total == 0 {
            return None;
        }
        let passed = now.saturating_duration_since(started);
        let rest = total.saturating_sub(arrived) as f64 / arrived as f64;
        Some(passed.mul_f64(rest))
    }

    pub(super) fn begin(&self, total: u64, now: Instant) {
        self.total.store(total, Ordering::Relaxed);
        self.arrived.store(0, Ordering::Relaxed);
        *self.started.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
    }

    pub(super) fn add(&self, bytes: usize) {
        self.arrived.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// What arrived proved wrong.
    pub(super) fn take_back(&self, bytes: u64) {
        self.arrived.fetch_sub(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_follows_from_the_speed_so_far() {
        let (progress, start) = (Progress::default(), Instant::now());
        assert_eq!(progress.left(start), None);
        progress.begin(1000, start);
        assert_eq!(progress.left(start), None);
        progress.add(250);
        let left = progress.left(start + Duration::from_secs(2)).unwrap();
        assert_eq!(left, Duration::from_secs(6));
        progress.take_back(250);
        assert_eq!(progress.left(start), None);
    }
}
