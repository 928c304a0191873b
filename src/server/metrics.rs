//! What an operator watches (`GET /metrics`), in Prometheus's text format 0.0.4.

use super::routes::App;
use crate::engine::{HistogramSnapshot, Memory};
use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Upper bounds of answers' durations, in seconds: a probe takes a millisecond, a digit some ten, a cold start seconds.
const SECONDS: [f64; 14] = [
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0,
];

/// What the server counts itself; the rest is the engine's.
#[derive(Default)]
pub(super) struct Metrics(Mutex<Counts>);

#[derive(Default)]
struct Counts {
    /// By route, method and status; 0 is the status of those whose client left before there was one.
    requests: BTreeMap<(&'static str, &'static str, u16), u64>,
    durations: BTreeMap<&'static str, Durations>,
    /// By the kind of the problem.
    failures: BTreeMap<&'static str, u64>,
}

#[derive(Default)]
struct Durations {
    /// Of each bound, and of what is beyond the last.
    counts: [u64; SECONDS.len() + 1],
    sum: f64,
}

impl Metrics {
    pub(super) fn request(
        &self,
        route: &'static str,
        method: &'static str,
        status: Option<u16>,
        took: Duration,
    ) {
        let mut counts = self.lock();
        let key = (route, method, status.unwrap_or(0));
        *counts.requests.entry(key).or_default() += 1;
        let durations = counts.durations.entry(route).or_default();
        let seconds = took.as_secs_f64();
        durations.counts[SECONDS.partition_point(|&bound| bound < seconds)] += 1;
        durations.sum += seconds;
    }

    pub(super) fn failed(&self, kind: &'static str) {
        *self.lock().failures.entry(kind).or_default() += 1;
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl App {
    pub(super) fn metrics_text(&self) -> String {
        let mut text = Text::default();
        self.about_requests(&mut text);
        self.about_batches(&mut text);
        self.about_models(&mut text);
        self.about_process(&mut text);
        text.0
    }

    fn about_requests(&self, text: &mut Text) {
        let counts = self.metrics.lock();
        text.family(
            "requests_total",
            "counter",
            "Requests by route, method and status; status 0: the client left before there was one.",
        );
        for ((route, method, status), n) in &counts.requests {
            let labels = [
                ("route", *route),
                ("method", *method),
                ("status", &status.to_string()),
            ];
            text.sample("requests_total", &labels, n);
        }
        text.family(
            "request_duration_seconds",
            "histogram",
            "From a request's head to the end of its answer.",
        );
        for (route, durations) in &counts.durations {
            let mut count = 0;
            let mut below = Vec::new();
            for (i, n) in durations.counts.iter().enumerate() {
                count += n;
                below.extend(SECONDS.get(i).map(|&bound| (bound, count)));
            }
            let snapshot = HistogramSnapshot {
                below,
                count,
                sum: durations.sum,
            };
            text.histogram("request_duration_seconds", &[("route", *route)], &snapshot);
        }
        text.family(
            "problems_total",
            "counter",
            "Requests that were rejected or failed, by the problem they were answered with.",
        );
        for (kind, n) in &counts.failures {
            text.sample("problems_total", &[("problem", *kind)], n);
        }
        drop(counts);
        text.gauge(
            "requests_open",
            "Requests whose answers are not complete.",
            self.activity.open(),
        );
        let waiting = self.config.requests_max - self.requests.available_permits();
        text.gauge("digit_requests_open", "Of them, those for digits.", waiting);
        text.gauge(
            "digit_requests_limit",
            "How many of those there may be (MAX_REQUESTS).",
            self.config.requests_max,
        );
        text.gauge("connections_open", "Connections.", self.connections.count());
        text.gauge(
            "connections_limit",
            "How many there may be (MAX_CONNECTIONS).",
            self.config.connections_max,
        );
    }

    fn about_batches(&self, text: &mut Text) {
        let batchers = self.engine.metrics();
        let mut counters =
            |name: &str,
             help: &str,
             kind: &str,
             value: fn(&crate::engine::BatcherMetrics) -> u64| {
                text.family(name, kind, help);
                for (model, m) in &batchers {
                    text.sample(name, &[("model", model)], value(m));
                }
            };
        counters(
            "digits_drawn_total",
            "Digits drawn, since the model was loaded.",
            "counter",
            |m| m.digits_drawn,
        );
        counters(
            "digits_failed_total",
            "Digits that could not be computed.",
            "counter",
            |m| m.digits_failed,
        );
        counters(
            "digits_abandoned_total",
            "Digits whose client left before they were drawn.",
            "counter",
            |m| m.digits_abandoned,
        );
        counters(
            "queue_digits",
            "Digits that wait or are being drawn.",
            "gauge",
            |m| m.digits_open,
        );
        counters(
            "batch_rows_running",
            "Rows of the step under way, or of the last one.",
            "gauge",
            |m| m.rows_running,
        );
        let mut histograms =
            |name: &str,
             help: &str,
             value: fn(&crate::engine::BatcherMetrics) -> &HistogramSnapshot| {
                text.family(name, "histogram", help);
                for (model, m) in &batchers {
                    text.histogram(name, &[("model", model)], value(m));
                }
            };
        histograms(
            "queue_seconds",
            "From a request's arrival to the first step, of each digit.",
            |m| &m.queue_seconds,
        );
        histograms("step_seconds", "Duration of each step.", |m| {
            &m.step_seconds
        });
        histograms(
            "batch_rows",
            "Rows that the network computed in each step; a digit with guidance is two.",
            |m| &m.batch_rows,
        );
    }

    fn about_models(&self, text: &mut Text) {
        let loads = self.engine.load_metrics();
        text.family(
            "model_loads_total",
            "counter",
            "Loads of models by outcome; those that ended well by where the weights came from.",
        );
        for (origin, n) in &loads.done {
            text.sample(
                "model_loads_total",
                &[("outcome", "ready"), ("origin", *origin)],
                n,
            );
        }
        text.sample(
            "model_loads_total",
            &[("outcome", "failed"), ("origin", "")],
            loads.failed,
        );
        text.sample(
            "model_loads_total",
            &[("outcome", "given up"), ("origin", "")],
            loads.given_up,
        );
        text.family("model_loaded_bytes_total", "counter", "Bytes of weights that were loaded, by where they came from: from the cache, none of them were fetched.");
        for (origin, bytes) in &loads.bytes {
            text.sample("model_loaded_bytes_total", &[("origin", *origin)], bytes);
        }
        text.family("model_load_seconds", "histogram", "Phases of loads: fetch is reading and verifying, build is from the last byte to a network that draws.");
        text.histogram(
            "model_load_seconds",
            &[("phase", "fetch")],
            &loads.fetch_seconds,
        );
        text.histogram(
            "model_load_seconds",
            &[("phase", "build")],
            &loads.build_seconds,
        );
        let models = self.engine.loaded();
        text.family(
            "model_state",
            "gauge",
            "1 for the state that a model is in.",
        );
        for model in &models {
            for state in [
                crate::engine::ModelState::Cold,
                crate::engine::ModelState::Loading,
                crate::engine::ModelState::Ready,
            ] {
                let labels = [
                    ("model", model.name.as_str()),
                    ("state", super::routes::state_name(state)),
                ];
                text.sample("model_state", &labels, u8::from(model.state == state));
            }
        }
        text.family(
            "model_arrived_bytes",
            "gauge",
            "Bytes of a model's weights that are there.",
        );
        for model in &models {
            text.sample(
                "model_arrived_bytes",
                &[("model", model.name.as_str())],
                model.bytes_arrived,
            );
        }
    }

    fn about_process(&self, text: &mut Text) {
        text.gauge(
            "boot_seconds",
            "From the process's start to the open port.",
            self.boot.as_secs_f64(),
        );
        text.gauge(
            "uptime_seconds",
            "Since the process's start.",
            self.started.elapsed().as_secs_f64(),
        );
        text.gauge(
            "resident_memory_bytes",
            "Memory that the process takes.",
            Memory::resident_bytes(),
        );
        if let Some(limit) = self.memory_limit() {
            text.gauge(
                "memory_limit_bytes",
                "Memory that it may take: MAX_MEMORY_MB or the container's limit.",
                limit.limit_bytes,
            );
            text.gauge(
                "memory_near_limit",
                "1 from 90 % of the limit on.",
                u8::from(self.check_memory()),
            );
        }
    }
}

/// All names begin with what they belong to.
const PREFIX: &str = "image_generator_";

#[derive(Default)]
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(
            self.0,
            "# HELP {PREFIX}{name} {help}\n# TYPE {PREFIX}{name} {kind}"
        );
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.family(name, "gauge", help);
        self.sample(name, &[], value);
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let _ = write!(self.0, "{PREFIX}{name}");
        for (i, (label, text)) in labels.iter().enumerate() {
            let separator = if i == 0 { '{' } else { ',' };
            let text = text
                .replace('\\', "\\\\")
                .replace('"', "\\\"")
                .replace('\n', "\\n");
            let _ = write!(self.0, "{separator}{label}=\"{text}\"");
        }
        let end = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.0, "{end} {value}");
    }

    fn histogram(&mut self, name: &str, labels: &[(&str, &str)], histogram: &HistogramSnapshot) {
        let bucket = format!("{name}_bucket");
        for (bound, count) in &histogram.below {
            let bound = bound.to_string();
            self.sample(&bucket, &[labels, &[("le", &bound)]].concat(), count);
        }
        self.sample(
            &bucket,
            &[labels, &[("le", "+Inf")]].concat(),
            histogram.count,
        );
        self.sample(&format!("{name}_sum"), labels, histogram.sum);
        self.sample(&format!("{name}_count"), labels, histogram.count);
    }
}
