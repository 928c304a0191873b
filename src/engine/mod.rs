//! TIME: when weights are loaded, what is drawn next, and what is given up.
//!
//! The first request that needs weights starts the load; all others that come meanwhile wait for the same
//! one. A load that failed, or that nobody waits for any more, leaves the model cold, and the next request
//! tries again. Digits are drawn by one thread a model, step by step, in batches that requests join and leave
//! between steps. Every queue is bounded. Nothing here knows of HTTP.

mod ahead;
mod batcher;
mod error;
mod loader;
mod memory;
mod metrics;
mod previews;
mod shelf;

pub use ahead::fetch_files;
pub use error::{EngineError, LoadError};
pub(crate) use loader::headers;
pub use loader::{LoadTimes, ModelInfo, ModelState, ModelStatus};
pub use memory::Memory;
pub use metrics::{BatcherMetrics, HistogramSnapshot, LoadMetrics};
pub use previews::Preview;

use crate::model::{DeviceKind, SampleSpec, threads_available};
use crate::storage::{Catalogue, ModelUri, StorageConfig};
use batcher::{Drawn, Job};
use previews::Previews;
use shelf::{InUse, Shelf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Where the weights are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Those compiled into the binary.
    BuiltIn,
    Uri(ModelUri),
    /// Models by name.
    Catalogue(Catalogue),
}

/// What the engine may use, and what it draws with.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    pub source: Source,
    pub storage: StorageConfig,
    pub device: DeviceKind,
    /// Bytes that the process may take, beside what the container allows.
    pub memory_bytes_max: Option<u64>,
    /// How long one load may take in all.
    pub load_timeout: Duration,
    /// Threads that compute, on a processor.
    pub threads: usize,
    /// Rows that the network computes at once; a digit drawn with guidance takes two.
    pub batch_rows_max: usize,
    /// Digits that may wait or be drawn at a time; what is beyond is refused at once.
    pub queue_digits_max: usize,
    /// Of a catalogue, the model that a request without a name gets.
    pub default_model: Option<String>,
    /// How long a model may be unused before it is unloaded; none: until its memory is needed.
    pub idle_unload: Option<Duration>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            source: Source::BuiltIn,
            storage: StorageConfig::default(),
            device: DeviceKind::Cpu,
            memory_bytes_max: None,
            load_timeout: Duration::from_secs(240),
            threads: threads_available(),
            batch_rows_max: 32,
            queue_digits_max: 4096,
            default_model: None,
            idle_unload: None,
        }
    }
}

/// What a request asks for. Numbers are in range; whether the classes exist, the model says.
#[derive(Clone, Debug)]
pub struct DrawRequest {
    /// The model's name; none: the one that is served.
    pub model: Option<String>,
    /// Class names or indexes, one a digit, in order.
    pub labels: Vec<String>,
    /// Seed of the first digit; each next one has the next number.
    pub seed: u64,
    /// None: the model's own default.
    pub steps: Option<usize>,
    pub guidance: Option<f32>,
}

/// Draws digits. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    shelf: Arc<Shelf>,
    queue_digits_max: usize,
}

impl Engine {
    /// Starts nothing: no thread, no client, no read.
    pub fn new(config: EngineConfig) -> Self {
        Self {
            queue_digits_max: config.queue_digits_max,
            shelf: Arc::new(Shelf::new(config)),
        }
    }

    /// Begins to unload models that nobody uses, if the configuration asks for it. Called within a runtime.
    pub fn watch_idle(&self) {
        self.shelf.watch_idle();
    }

    /// Loads the weights, if they are not loaded, and finds out what exactly is to be drawn.
    ///
    /// Dropping the future gives up a load that only it was waiting for.
    ///
    /// # Errors
    /// [`EngineError`]: the load failed, the model or a class is unknown.
    pub async fn prepare(&self, request: DrawRequest) -> Result<Plan, EngineError> {
        let asked = Instant::now();
        let loaded = self.shelf.get(request.model.as_deref()).await?;
        let specs = specs(&request, &loaded.info)?;
        Ok(Plan {
            load_wait: asked.elapsed(),
            specs,
            loaded,
            digits_max: self.queue_digits_max,
        })
    }

    /// Every model, a catalogue's cold ones included, and what it is doing.
    pub async fn models(&self) -> Vec<ModelStatus> {
        self.shelf.models().await
    }

    /// The models that have been asked for, without asking any store.
    pub fn loaded(&self) -> Vec<ModelStatus> {
        self.shelf.loaded()
    }

    /// What each loaded model's batcher has done since it was loaded, by name.
    pub fn metrics(&self) -> Vec<(String, BatcherMetrics)> {
        self.shelf.metrics()
    }

    /// What the loads of all models have come to since the start.
    pub fn load_metrics(&self) -> LoadMetrics {
        self.shelf.loads.snapshot()
    }

    /// Loads the default model without drawing.
    ///
    /// # Errors
    /// [`EngineError`]
    pub async fn load(&self) -> Result<Arc<ModelInfo>, EngineError> {
        let loaded = self.shelf.get(None).await?;
        Ok(loaded.info.clone())
    }
}

fn specs(request: &DrawRequest, info: &ModelInfo) -> Result<Vec<SampleSpec>, EngineError> {
    let sampler = &info.header.sampler;
    let (steps, guidance) = (
        request.steps.unwrap_or(sampler.steps),
        request.guidance.unwrap_or(sampler.guidance),
    );
    let spec = |(i, label): (usize, &String)| {
        let label = info.label(label).ok_or_else(|| EngineError::UnknownClass {
            label: label.clone(),
            known: info.header.class_names.clone(),
        })?;
        Ok(SampleSpec {
            label,
            seed: request.seed.wrapping_add(i as u64),
            steps,
            guidance,
        })
    };
    request.labels.iter().enumerate().map(spec).collect()
}

/// What will be drawn, and by which model. Nothing is queued yet.
pub struct Plan {
    /// How long the request waited for the model.
    pub load_wait: Duration,
    /// What is drawn, by index.
    pub specs: Vec<SampleSpec>,
    loaded: InUse,
    digits_max: usize,
}

impl Plan {
    /// The model that draws.
    pub fn info(&self) -> &Arc<ModelInfo> {
        &self.loaded.info
    }

    /// How long the model's load took, whenever that was.
    pub fn load_times(&self) -> LoadTimes {
        self.loaded.times
    }

    /// Queues the digits. Dropping the drawing takes out what is not drawn yet.
    ///
    /// # Errors
    /// [`EngineError::QueueFull`] at once, never a wait.
    pub fn start(self) -> Result<Drawing, EngineError> {
        self.queue(None)
    }

    /// The same, and [`Drawing::event`] also gives previews.
    ///
    /// # Errors
    /// As [`Plan::start`].
    pub fn start_with_previews(self) -> Result<Drawing, EngineError> {
        self.queue(Some(Arc::default()))
    }

    /// The same, and no preview is left out: they are kept until [`Drawing::event`] gives them, after the last digit too.
    ///
    /// # Errors
    /// As [`Plan::start`].
    pub fn start_with_every_preview(self) -> Result<Drawing, EngineError> {
        self.queue(Some(Arc::new(Previews::every())))
    }

    fn queue(self, previews: Option<Arc<Previews>>) -> Result<Drawing, EngineError> {
        let (sender, receiver) = mpsc::channel(self.specs.len().max(1));
        let job = Job::new(self.specs.clone(), sender, previews.clone());
        self.loaded.batcher.submit(job, self.digits_max)?;
        Ok(Drawing {
            left: self.specs.len(),
            specs: self.specs,
            receiver,
            _loaded: self.loaded,
            previews,
        })
    }
}

/// One finished digit of a drawing.
#[derive(Debug)]
pub struct Digit {
    /// Its place in the request.
    pub index: usize,
    pub label: usize,
    pub seed: u64,
    /// Height x width x channels.
    pub pixels: Vec<u8>,
    /// From the request's arrival in the queue to the first step.
    pub queued: Duration,
    /// From the first step to the last.
    pub drawn: Duration,
}

/// What a drawing has to tell.
#[derive(Debug)]
pub enum Event {
    /// A digit on its way. Those that nobody fetched in time are left out.
    Preview(Preview),
    Digit(Digit),
}

/// Digits on their way, in order of completion.
pub struct Drawing {
    specs: Vec<SampleSpec>,
    receiver: mpsc::Receiver<Drawn>,
    previews: Option<Arc<Previews>>,
    left: usize,
    /// The model stays while somebody draws with it.
    _loaded: InUse,
}

impl Drawing {
    /// The next digit to be done; none after the last.
    ///
    /// # Errors
    /// [`EngineError::Model`] if the digit could not be computed, [`EngineError::Stopped`] if the generator ended.
    pub async fn next(&mut self) -> Option<Result<Digit, EngineError>> {
        if self.left == 0 {
            return None;
        }
        let drawn = self.receiver.recv().await;
        Some(self.digit(drawn))
    }

    /// The next digit to be done, or a preview of one that is not; none after the last digit. Digits that are done go
    /// before previews. Dropping the future loses nothing.
    ///
    /// # Errors
    /// As [`Drawing::next`].
    pub async fn event(&mut self) -> Option<Result<Event, EngineError>> {
        let Some(previews) = self.previews.clone() else {
            return Some(self.next().await?.map(Event::Digit));
        };
        if self.left == 0 {
            let rest = previews.every.then(|| previews.take()).flatten();
            return rest.map(|preview| Ok(Event::Preview(preview)));
        }
        loop {
            if let Ok(drawn) = self.receiver.try_recv() {
                return Some(self.digit(Some(drawn)).map(Event::Digit));
            }
            if let Some(preview) = previews.take() {
                return Some(Ok(Event::Preview(preview)));
            }
            tokio::select! {
                drawn = self.receiver.recv() => {
                    return Some(self.digit(drawn).map(Event::Digit));
                }
                () = previews.changed() => {}
            }
        }
    }

    fn digit(&mut self, drawn: Option<Drawn>) -> Result<Digit, EngineError> {
        let Some(drawn) = drawn else {
            self.left = 0;
            return Err(EngineError::Stopped);
        };
        self.left -= 1;
        let spec = self.specs[drawn.index];
        Ok(Digit {
            index: drawn.index,
            label: spec.label,
            seed: spec.seed,
            pixels: drawn.pixels?,
            queued: drawn.queued,
            drawn: drawn.drawn,
        })
    }
}
