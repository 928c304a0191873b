//! The step batcher: one thread that draws everyone's digits, one step of one batch at a time.
//!
//! Between two steps rows leave that are done or that nobody waits for, and others join, one of each waiting
//! request in turn, so a request for one digit is drawn beside a request for a thousand and not behind it.

use super::EngineError;
use crate::model::{Generator, ModelError, Row, SampleSpec};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Requests that may wait between the callers and the thread. Digits are bounded before that.
const JOBS_MAX: usize = 1024;

/// One request's digits.
pub(super) struct Job {
    specs: Vec<SampleSpec>,
    next: usize,
    sender: mpsc::Sender<Drawn>,
    arrived: Instant,
}

impl Job {
    /// `sender` has room for every digit, so the thread never waits for a reader.
    pub(super) fn new(specs: Vec<SampleSpec>, sender: mpsc::Sender<Drawn>) -> Self {
        Self {
            specs,
            next: 0,
            sender,
            arrived: Instant::now(),
        }
    }
}

/// One digit, done or failed.
#[derive(Debug)]
pub(super) struct Drawn {
    pub(super) index: usize,
    pub(super) pixels: Result<Vec<u8>, ModelError>,
    pub(super) queued: Duration,
    pub(super) drawn: Duration,
}

/// The thread's handle. It ends when this is dropped and its work is done.
pub(super) struct Batcher {
    jobs: mpsc::Sender<Job>,
    load: Arc<Load>,
}

/// What is waiting or being drawn, and how fast it goes.
#[derive(Default)]
struct Load {
    digits: AtomicUsize,
    /// Microseconds a digit, smoothed.
    digit_us: AtomicU64,
}

impl Batcher {
    /// `memory` is dropped after the generator is: it stands for the memory that the generator takes.
    pub(super) fn start(
        generator: Generator,
        rows_max: usize,
        memory: impl Send + 'static,
    ) -> Self {
        let (jobs, receiver) = mpsc::channel(JOBS_MAX);
        let load = Arc::new(Load::default());
        let thread = Thread {
            generator,
            rows_max: rows_max.max(2),
            receiver,
            load: load.clone(),
            waiting: VecDeque::new(),
            running: Vec::new(),
        };
        std::thread::Builder::new()
            .name("batcher".to_owned())
            .spawn(move || {
                let _memory = memory;
                thread.run();
            })
            .expect("a thread can be started");
        Self { jobs, load }
    }

    /// Queues a request.
    ///
    /// # Errors
    /// [`EngineError::QueueFull`] at once, never a wait.
    pub(super) fn submit(&self, job: Job, digits_max: usize) -> Result<(), EngineError> {
        let digits = job.specs.len();
        let before = self.load.digits.fetch_add(digits, Ordering::Relaxed);
        let full = || {
            self.load.digits.fetch_sub(digits, Ordering::Relaxed);
            let wait =
                Duration::from_micros(before as u64 * self.load.digit_us.load(Ordering::Relaxed));
            EngineError::QueueFull {
                digits_max,
                retry_after: wait.max(Duration::from_secs(1)),
            }
        };
        if before + digits > digits_max {
            return Err(full());
        }
        match self.jobs.try_send(job) {
            Ok(()) => Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => Err(full()),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(EngineError::Stopped),
        }
    }

    /// Whether the thread has ended, by a panic.
    pub(super) fn is_stopped(&self) -> bool {
        self.jobs.is_closed()
    }
}

struct Thread {
    generator: Generator,
    rows_max: usize,
    receiver: mpsc::Receiver<Job>,
    load: Arc<Load>,
    waiting: VecDeque<Job>,
    running: Vec<Running>,
}

/// A row in the batch, and who gets it.
struct Running {
    row: Row,
    index: usize,
    sender: mpsc::Sender<Drawn>,
    queued: Duration,
    begun: Instant,
}

impl Thread {
    fn run(mut self) {
        loop {
            if self.running.is_empty() && self.waiting.is_empty() {
                match self.receiver.blocking_recv() {
                    Some(job) => self.waiting.push_back(job),
                    None => return,
                }
            }
            while let Ok(job) = self.receiver.try_recv() {
                self.waiting.push_back(job);
            }
            self.drop_abandoned();
            self.join();
            if !self.running.is_empty() {
                self.step();
            }
        }
    }

    /// Lets go of whatever nobody waits for.
    fn drop_abandoned(&mut self) {
        let load = &self.load;
        let leave = |n: usize| load.digits.fetch_sub(n, Ordering::Relaxed);
        self.running.retain(|r| {
            !r.sender.is_closed() || {
                leave(1);
                false
            }
        });
        self.waiting.retain(|j| {
            !j.sender.is_closed() || {
                leave(j.specs.len() - j.next);
                false
            }
        });
    }

    /// Fills the batch: one digit of each waiting request in turn.
    fn join(&mut self) {
        let mut rows: usize = self.running.iter().map(|r| r.row.cost()).sum();
        while rows < self.rows_max {
            let Some(mut job) = self.waiting.pop_front() else {
                return;
            };
            let Some(&spec) = job.specs.get(job.next) else {
                continue;
            };
            let row = self.generator.start(spec);
            rows += row.cost();
            let begun = Instant::now();
            self.running.push(Running {
                row,
                index: job.next,
                sender: job.sender.clone(),
                queued: begun - job.arrived,
                begun,
            });
            job.next += 1;
            if job.next < job.specs.len() {
                self.waiting.push_back(job);
            }
        }
    }

    fn step(&mut self) {
        let started = Instant::now();
        let mut rows: Vec<&mut Row> = self.running.iter_mut().map(|r| &mut r.row).collect();
        let steps: usize = rows.len();
        if let Err(error) = self.generator.step(&mut rows) {
            tracing::error!(error = %error, rows = steps, "a step failed");
            for running in self.running.drain(..) {
                running.send(Err(error.clone()), &self.load);
            }
            return;
        }
        let step_us = started.elapsed().as_micros() as u64 / steps as u64;
        let mut i = 0;
        while i < self.running.len() {
            if !self.running[i].row.done() {
                i += 1;
                continue;
            }
            let done = self.running.swap_remove(i);
            let digit_us = step_us * done.row.step() as u64;
            let before = self.load.digit_us.load(Ordering::Relaxed);
            self.load.digit_us.store(
                if before == 0 {
                    digit_us
                } else {
                    (7 * before + digit_us) / 8
                },
                Ordering::Relaxed,
            );
            let pixels = self.generator.finish(&done.row);
            if let Err(error) = &pixels {
                tracing::error!(error = %error, "a digit failed");
            }
            done.send(pixels, &self.load);
        }
    }
}

impl Running {
    fn send(self, pixels: Result<Vec<u8>, ModelError>, load: &Load) {
        load.digits.fetch_sub(1, Ordering::Relaxed);
        // Full is impossible, see `Job::new`; closed means that the client has left.
        let _ = self.sender.try_send(Drawn {
            index: self.index,
            pixels,
            queued: self.queued,
            drawn: self.begun.elapsed(),
        });
    }
}
