//! Where an answer's time went (the Server-Timing header of the W3C), in milliseconds.

use crate::engine::{Digit, LoadTimes};
use http::HeaderValue;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

/// Names and durations, in the order in which time passes.
#[derive(Clone, Debug)]
pub(super) struct Timing(Vec<(&'static str, Duration)>);

impl Timing {
    /// `boot`: from the process's start to the open port.
    pub(super) fn new(boot: Duration) -> Self {
        Self(vec![("boot", boot)])
    }

    pub(super) fn set(&mut self, name: &'static str, duration: Duration) {
        match self.0.iter_mut().find(|(n, _)| *n == name) {
            Some(entry) => entry.1 = duration,
            None => self.0.push((name, duration)),
        }
    }

    fn at_least(&mut self, name: &'static str, duration: Duration) {
        let before = self.0.iter().find(|(n, _)| *n == name);
        let before = before.map_or(Duration::ZERO, |(_, d)| *d);
        self.set(name, before.max(duration));
    }

    /// What the load was made of concerns only the requests that waited for it.
    pub(super) fn load(&mut self, waited: Duration, times: LoadTimes) {
        self.set("load", waited);
        if waited > Duration::from_millis(1) {
            self.set("fetch", times.fetch);
            self.set("build", times.build);
        }
    }

    /// Digits of one request overlap; the longest of each counts.
    pub(super) fn digit(&mut self, digit: &Digit) {
        self.at_least("queue", digit.queued);
        self.at_least("steps", digit.drawn);
    }

    pub(super) fn header(&self) -> HeaderValue {
        let mut text = String::new();
        for (name, duration) in &self.0 {
            let comma = if text.is_empty() { "" } else { ", " };
            let _ = write!(text, "{comma}{name};dur={:.2}", ms(*duration));
        }
        HeaderValue::try_from(text).expect("names and numbers")
    }

    pub(super) fn record(&self) -> BTreeMap<String, f64> {
        let entry = |(name, duration): &(&str, Duration)| {
            ((*name).to_owned(), (ms(*duration) * 100.0).round() / 100.0)
        };
        self.0.iter().map(entry).collect()
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
