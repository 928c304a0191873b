//! One request from its head to the last byte of its answer: what is counted, measured and logged of it.

use super::connection::Connection;
use super::routes::App;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tracing::Span;

/// Whether anything is going on.
pub(super) struct Activity {
    open: AtomicUsize,
    last: Mutex<Instant>,
}

impl Activity {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            open: AtomicUsize::new(0),
            last: Mutex::new(now),
        }
    }

    /// Requests whose answers are not complete.
    pub(super) fn open(&self) -> usize {
        self.open.load(Ordering::Acquire)
    }

    fn begin(&self) {
        self.open.fetch_add(1, Ordering::AcqRel);
    }

    /// What probes and scrapers do keeps nobody awake.
    fn end(&self, route: &str) {
        if !is_probe(route) {
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        }
        self.open.fetch_sub(1, Ordering::AcqRel);
    }

    /// Resolves when nothing has been asked for as long as `idle`; never without.
    pub(super) async fn idle(&self, idle: Option<Duration>) {
        let Some(idle) = idle else {
            return std::future::pending().await;
        };
        loop {
            let last = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
            let left = idle.saturating_sub(last.elapsed());
            if left.is_zero() && self.open() == 0 {
                return;
            }
            tokio::time::sleep(left.max(Duration::from_millis(100))).await;
        }
    }
}

fn is_probe(route: &str) -> bool {
    route == "health" || route == "metrics"
}

/// Counts a request as open until its answer has been handed over or its client has left, and then says how it went.
pub(super) struct OpenRequest {
    app: Arc<App>,
    connection: Arc<Connection>,
    pub(super) about: About,
    started: Instant,
    /// None until there is an answer.
    status: Option<u16>,
    bytes: u64,
    end: End,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// The client left, or does not read.
    Left,
    Complete,
    /// The answer's maker failed in the middle.
    Broken,
}

/// What the log says of a request.
pub(super) struct About {
    pub(super) span: Span,
    pub(super) method: &'static str,
    pub(super) path: String,
    /// The path as metrics name it: without what clients make up.
    pub(super) route: &'static str,
    pub(super) client: IpAddr,
}

impl OpenRequest {
    pub(super) fn new(app: &Arc<App>, connection: &Arc<Connection>, about: About) -> Self {
        app.activity.begin();
        connection.begin();
        Self {
            app: app.clone(),
            connection: connection.clone(),
            about,
            started: Instant::now(),
            status: None,
            bytes: 0,
            end: End::Left,
        }
    }

    pub(super) fn started(&self) -> Instant {
        self.started
    }

    pub(super) fn answered(&mut self, status: u16, empty: bool) {
        self.status = Some(status);
        if empty {
            self.end = End::Complete;
        }
    }

    pub(super) fn sent(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }

    pub(super) fn complete(&mut self) {
        self.end = End::Complete;
    }

    pub(super) fn broken(&mut self) {
        self.end = End::Broken;
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        let took = self.started.elapsed();
        self.connection.end();
        let About {
            span,
            method,
            path,
            route,
            client,
        } = &self.about;
        self.app.metrics.request(route, method, self.status, took);
        self.app.check_memory();
        let _in_span = span.enter();
        let (status, bytes) = (self.status.unwrap_or_default(), self.bytes);
        let duration_ms = (took.as_secs_f64() * 100_000.0).round() / 100.0;
        let end = match (self.end, self.status) {
            (End::Complete, Some(_)) => "complete",
            (End::Broken, _) => "broken off",
            _ => "client left",
        };
        // Probes and scrapes come every few seconds and say nothing new.
        if (200..400).contains(&status) && is_probe(route) {
            tracing::debug!(method, path, status, duration_ms, bytes, end, client = %client, "request");
        } else {
            tracing::info!(method, path, status, duration_ms, bytes, end, client = %client, "request");
        }
        // The last act: the drain waits for it.
        self.app.activity.end(route);
    }
}
