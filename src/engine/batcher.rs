//! The step batcher: one thread that draws everyone's digits, one step of one batch at a time.
//!
//! A batch is made anew for every step, so nothing is held open and nobody waits for a digit of someone else to be
//! done. First each request in the line gets one row, then each gets a second one, and so on until the batch is full: a
//! request for one digit is drawn beside a request for a thousand from the next step on, and where it takes a place of the
//! large one, that digit pauses and goes on later. Who got a digit goes to the end of the line. Rows that nobody waits for
//! any more leave before the next step.

use super::EngineError;
use super::metrics::{BatcherMetrics, Metrics};
use super::previews::{Preview, Previews};
use crate::model::{Generator, ModelError, Row, SampleSpec};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Requests that may wait between the callers and the thread. Digits are bounded before that.
const JOBS_MAX: usize = 1024;
/// What a step should take at most: who comes waits for the step under way.
const STEP_TARGET: Duration = Duration::from_millis(5);

/// One request's digits.
pub(super) struct Job {
    specs: Vec<SampleSpec>,
    next: usize,
    /// Digits that were begun, the oldest first.
    rows: Vec<Running>,
    sender: mpsc::Sender<Drawn>,
    previews: Option<Arc<Previews>>,
    arrived: Instant,
}

impl Job {
    /// `sender` has room for every digit, so the thread never waits for a reader.
    pub(super) fn new(
        specs: Vec<SampleSpec>,
        sender: mpsc::Sender<Drawn>,
        previews: Option<Arc<Previews>>,
    ) -> Self {
        Self {
            specs,
            next: 0,
            rows: Vec::new(),
            sender,
            previews,
            arrived: Instant::now(),
        }
    }

    /// Digits that are not done.
    fn open(&self) -> usize {
        self.specs.len() - self.next + self.rows.len()
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
struct Load {
    digits: AtomicUsize,
    /// Microseconds a digit, smoothed.
    digit_us: AtomicU64,
    metrics: Metrics,
}

impl Load {
    fn new() -> Self {
        Self {
            digits: AtomicUsize::new(0),
            digit_us: AtomicU64::new(0),
            metrics: Metrics::new(),
        }
    }
}

impl Batcher {
    /// `memory` is dropped after the generator is: it stands for the memory that the generator takes.
    pub(super) fn start(
        generator: Generator,
        rows_max: usize,
        memory: impl Send + 'static,
    ) -> Self {
        let (jobs, receiver) = mpsc::channel(JOBS_MAX);
        let load = Arc::new(Load::new());
        let thread = Thread::new(generator, rows_max, receiver, load.clone());
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
            Err(mpsc::error::TrySendError::Closed(_)) => {
                self.load.digits.fetch_sub(digits, Ordering::Relaxed);
                Err(EngineError::Stopped)
            }
        }
    }

    /// Whether the thread has ended, by a panic.
    pub(super) fn is_stopped(&self) -> bool {
        self.jobs.is_closed()
    }

    /// Cheap: some fifty loads.
    pub(super) fn metrics(&self) -> BatcherMetrics {
        let open = self.load.digits.load(Ordering::Relaxed);
        self.load.metrics.snapshot(open)
    }
}

struct Thread {
    generator: Generator,
    rows_max: usize,
    receiver: mpsc::Receiver<Job>,
    load: Arc<Load>,
    line: VecDeque<Job>,
    /// How long a row takes in a batch that is not small, smoothed.
    row_time: Option<Duration>,
}

/// A digit that was begun.
struct Running {
    row: Row,
    index: usize,
    /// Whether it is in the batch of this step.
    now: bool,
    queued: Duration,
    begun: Instant,
}

impl Thread {
    fn new(
        generator: Generator,
        rows_max: usize,
        receiver: mpsc::Receiver<Job>,
        load: Arc<Load>,
    ) -> Self {
        Self {
            generator,
            rows_max: rows_max.max(2),
            receiver,
            load,
            line: VecDeque::new(),
            row_time: None,
        }
    }

    fn run(mut self) {
        loop {
            if self.line.is_empty() {
                match self.receiver.blocking_recv() {
                    Some(job) => self.line.push_back(job),
                    None => return,
                }
            }
            self.turn();
        }
    }

    /// Lets requests come and go, and takes one step.
    fn turn(&mut self) {
        while let Ok(job) = self.receiver.try_recv() {
            self.line.push_back(job);
        }
        self.drop_abandoned();
        let rows = self.choose();
        if rows > 0 {
            self.step(rows);
        }
    }

    /// Lets go of whatever nobody waits for.
    fn drop_abandoned(&mut self) {
        let load = &self.load;
        self.line.retain(|job| {
            let abandoned = job.sender.is_closed();
            if abandoned {
                load.digits.fetch_sub(job.open(), Ordering::Relaxed);
                let digits = &load.metrics.digits_abandoned;
                digits.fetch_add(job.open() as u64, Ordering::Relaxed);
            }
            !abandoned
        });
    }

    /// Makes the batch of the next step, and says how many rows of the network it has.
    fn choose(&mut self) -> usize {
        let rows_min = self.generator.batch_rows_min();
        let most = batch_rows(self.row_time, rows_min, self.rows_max);
        for running in self.line.iter_mut().flat_map(|job| &mut job.rows) {
            running.now = false;
        }
        let mut rows = 0;
        for place in 0.. {
            let before = rows;
            for job in &mut self.line {
                if rows >= most {
                    return rows;
                }
                if job.rows.len() == place
                    && let Some(&spec) = job.specs.get(job.next)
                {
                    let mut row = self.generator.start(spec);
                    if job.previews.is_some() {
                        row.keep_estimate();
                    }
                    let begun = Instant::now();
                    let queued = begun - job.arrived;
                    self.load.metrics.queue.add_duration(queued);
                    job.rows.push(Running {
                        row,
                        index: job.next,
                        now: false,
                        queued,
                        begun,
                    });
                    job.next += 1;
                }
                if let Some(running) = job.rows.get_mut(place) {
                    running.now = true;
                    rows += running.row.cost();
                }
            }
            if rows == before {
                break;
            }
        }
        rows
    }

    fn step(&mut self, rows: usize) {
        let metrics = &self.load.metrics;
        metrics.rows_running.store(rows as u64, Ordering::Relaxed);
        let running = self.line.iter_mut().flat_map(|job| &mut job.rows);
        let mut batch: Vec<&mut Row> = running.filter(|r| r.now).map(|r| &mut r.row).collect();
        let digits = batch.len() as u32;
        let started = Instant::now();
        let result = self.generator.step(&mut batch);
        let took = started.elapsed();
        metrics.step.add_duration(took);
        metrics.rows.add(rows as f64);
        if rows >= self.generator.batch_rows_min() {
            let row_time = took / rows as u32;
            self.row_time = Some(
                self.row_time
                    .map_or(row_time, |before| (before * 7 + row_time) / 8),
            );
        }
        if let Err(error) = &result {
            tracing::error!(error = %error, rows, "a step failed");
        }
        let mut served = VecDeque::new();
        for mut job in std::mem::take(&mut self.line) {
            let before = job.rows.len();
            match &result {
                Ok(()) => self.hand_out(&mut job, took / digits),
                Err(error) => self.give_up(&mut job, error),
            }
            if job.open() == 0 {
                continue;
            }
            // Who got a digit goes to the end of the line.
            if job.rows.len() < before {
                served.push_back(job);
            } else {
                self.line.push_back(job);
            }
        }
        self.line.append(&mut served);
    }

    /// Sends what the last step has finished, and previews of what it has not.
    fn hand_out(&self, job: &mut Job, digit_step: Duration) {
        let mut i = 0;
        while i < job.rows.len() {
            let running = &job.rows[i];
            if !running.row.done() {
                if running.now
                    && let Some(previews) = &job.previews
                    && let Some(pixels) = self.generator.estimate(&running.row)
                {
                    previews.put(Preview {
                        index: running.index,
                        step: running.row.step(),
                        steps: job.specs[running.index].steps,
                        pixels,
                    });
                }
                i += 1;
                continue;
            }
            let done = job.rows.remove(i);
            let digit_us = digit_step.as_micros() as u64 * done.row.step() as u64;
            let before = self.load.digit_us.load(Ordering::Relaxed);
            let smoothed = if before == 0 {
                digit_us
            } else {
                (7 * before + digit_us) / 8
            };
            self.load.digit_us.store(smoothed, Ordering::Relaxed);
            let pixels = self.generator.finish(&done.row);
            if let Err(error) = &pixels {
                tracing::error!(error = %error, "a digit failed");
            }
            self.send(job, done, pixels);
        }
    }

    /// Answers for every digit of the failed batch.
    fn give_up(&self, job: &mut Job, error: &ModelError) {
        while let Some(i) = job.rows.iter().position(|r| r.now) {
            let failed = job.rows.remove(i);
            self.send(job, failed, Err(error.clone()));
        }
    }

    fn send(&self, job: &Job, running: Running, pixels: Result<Vec<u8>, ModelError>) {
        let Load {
            digits, metrics, ..
        } = &*self.load;
        digits.fetch_sub(1, Ordering::Relaxed);
        let counted = match pixels {
            Ok(_) => &metrics.digits_drawn,
            Err(_) => &metrics.digits_failed,
        };
        counted.fetch_add(1, Ordering::Relaxed);
        if let Some(previews) = &job.previews {
            previews.remove(running.index);
        }
        // Full is impossible, see `Job::new`; closed means that the client has left.
        let _ = job.sender.try_send(Drawn {
            index: running.index,
            pixels,
            queued: running.queued,
            drawn: running.begun.elapsed(),
        });
    }
}

/// Rows of a batch: as many as fit into [`STEP_TARGET`], but enough to compute at full speed.
fn batch_rows(row_time: Option<Duration>, rows_min: usize, rows_max: usize) -> usize {
    let fit = row_time.map_or(0, |time| STEP_TARGET.as_nanos() / time.as_nanos().max(1));
    (fit as usize).clamp(rows_min.min(rows_max), rows_max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model;

    fn generator() -> Generator {
        static SMALL: &[u8] = include_bytes!("../../tests/golden/small.safetensors");
        let weights = model::from_bytes(SMALL).unwrap();
        Generator::new(weights, &candle_core::Device::Cpu, 1).unwrap()
    }

    /// A batcher without its thread: a test takes each turn itself.
    fn thread(rows_max: usize) -> (Thread, Batcher) {
        let (jobs, receiver) = mpsc::channel(JOBS_MAX);
        let load = Arc::new(Load::new());
        let mut thread = Thread::new(generator(), rows_max, receiver, load.clone());
        // So that the machine's speed has no part in it.
        thread.row_time = Some(Duration::from_nanos(1));
        (thread, Batcher { jobs, load })
    }

    fn turn(thread: &mut Thread) {
        thread.turn();
        thread.row_time = Some(Duration::from_nanos(1));
    }

    fn submit(batcher: &Batcher, digits: usize, steps: usize) -> mpsc::Receiver<Drawn> {
        submit_with(batcher, digits, steps, None)
    }

    fn submit_with(
        batcher: &Batcher,
        digits: usize,
        steps: usize,
        previews: Option<Arc<Previews>>,
    ) -> mpsc::Receiver<Drawn> {
        let (sender, receiver) = mpsc::channel(digits);
        let spec = |seed| SampleSpec {
            label: 0,
            seed,
            steps,
            guidance: 1.0,
        };
        let specs = (0..digits as u64).map(spec).collect();
        batcher
            .submit(Job::new(specs, sender, previews), 1_000_000)
            .unwrap();
        receiver
    }

    #[test]
    fn one_digit_takes_its_own_steps_while_a_thousand_are_drawn() {
        let (mut thread, batcher) = thread(8);
        // Its digits have the most steps, so that none of them makes room by being done.
        let mut large = submit(&batcher, 1000, 64);
        (0..3).for_each(|_| turn(&mut thread));
        for _ in 0..5 {
            let mut single = submit(&batcher, 1, 4);
            for step in 1..=4 {
                assert!(single.try_recv().is_err(), "before step {step}");
                turn(&mut thread);
            }
            assert!(single.try_recv().unwrap().pixels.is_ok());
        }
        assert_eq!(
            batcher.metrics().batch_rows.below[3],
            (8.0, 23),
            "no batch is larger"
        );
        // What had to pause went on: nothing was begun beyond the eight of the first batch.
        assert_eq!(batcher.metrics().queue_seconds.count, 8 + 5);
        while large.try_recv().is_err() {
            turn(&mut thread);
        }
        assert_eq!(batcher.metrics().digits_drawn, 5 + 7);
        // And the eighth, which paused for five times four steps, is done as many steps later.
        (0..20).for_each(|_| turn(&mut thread));
        assert_eq!(batcher.metrics().digits_drawn, 5 + 8);
    }

    #[test]
    fn large_requests_that_fill_the_batch_take_turns() {
        let (mut thread, batcher) = thread(4);
        let mut all: Vec<_> = (0..10).map(|_| submit(&batcher, 50, 2)).collect();
        // Ten requests, four rows, two steps: after five times two steps each has had four digits' worth of turns.
        (0..20).for_each(|_| turn(&mut thread));
        let counts = all
            .iter_mut()
            .map(|receiver| std::iter::from_fn(|| receiver.try_recv().ok()).count());
        assert_eq!(counts.collect::<Vec<_>>(), [4; 10]);
    }

    #[test]
    fn who_leaves_is_out_of_the_next_step() {
        let (mut thread, batcher) = thread(8);
        let (large, mut single) = (submit(&batcher, 100, 8), submit(&batcher, 1, 8));
        turn(&mut thread);
        assert_eq!(batcher.metrics().rows_running, 8);
        drop(large);
        turn(&mut thread);
        let metrics = batcher.metrics();
        assert_eq!(metrics.rows_running, 1);
        assert_eq!((metrics.digits_open, metrics.digits_abandoned), (1, 100));
        (0..6).for_each(|_| turn(&mut thread));
        assert!(single.try_recv().unwrap().pixels.is_ok());
        assert_eq!(batcher.metrics().digits_open, 0);
    }

    #[test]
    fn a_full_queue_refuses_at_once_and_keeps_its_count() {
        let (mut thread, batcher) = thread(8);
        let _open = submit(&batcher, 90, 1);
        let refuse = |digits: usize| {
            let (sender, _receiver) = mpsc::channel(digits);
            let spec = SampleSpec {
                label: 0,
                seed: 0,
                steps: 1,
                guidance: 1.0,
            };
            batcher.submit(Job::new(vec![spec; digits], sender, None), 100)
        };
        let refused = refuse(11).unwrap_err();
        assert!(matches!(
            refused,
            EngineError::QueueFull {
                digits_max: 100,
                ..
            }
        ));
        refuse(10).unwrap();
        while batcher.metrics().digits_open > 0 {
            turn(&mut thread);
        }
    }

    #[test]
    fn previews_are_the_latest_of_each_digit_and_cost_no_memory_beyond_that() {
        let (mut thread, batcher) = thread(4);
        let previews = Arc::new(Previews::default());
        let mut receiver = submit_with(&batcher, 4, 6, Some(previews.clone()));
        let mut plain = submit(&batcher, 1, 6);
        // A reader that sleeps for three steps finds one picture a digit, that of the last step.
        (0..3).for_each(|_| turn(&mut thread));
        let seen: Vec<_> = std::iter::from_fn(|| previews.take()).collect();
        let places: Vec<_> = seen.iter().map(|p| (p.index, p.step, p.steps)).collect();
        assert_eq!(places, [(0, 3, 6), (1, 3, 6), (2, 3, 6)]);
        assert!(seen.iter().all(|p| p.pixels.len() == 12 * 12 * 3));
        while batcher.metrics().digits_open > 0 {
            turn(&mut thread);
        }
        assert_eq!(previews.take(), None, "a finished digit has none");
        let drawn = std::iter::from_fn(|| receiver.try_recv().ok());
        let digits: Vec<_> = drawn.map(|d| (d.index, d.pixels.unwrap())).collect();
        assert_eq!(digits.len(), 4);
        // Nobody's bytes depend on whether somebody looks.
        let first = digits.iter().find(|(index, _)| *index == 0).unwrap();
        assert_eq!(plain.try_recv().unwrap().pixels.unwrap(), first.1);
    }

    #[test]
    fn a_batch_is_as_large_as_its_step_may_be_long() {
        let ms = Duration::from_millis;
        assert_eq!(batch_rows(None, 4, 32), 4);
        assert_eq!(batch_rows(Some(ms(1)), 4, 32), 5);
        assert_eq!(batch_rows(Some(ms(100)), 4, 32), 4);
        assert_eq!(batch_rows(Some(Duration::from_micros(1)), 4, 32), 32);
        assert_eq!(batch_rows(Some(Duration::ZERO), 64, 32), 32);
    }
}
