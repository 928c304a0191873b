//! A model that is cold, loading or ready; one load at a time, for everyone who waits.

use super::batcher::Batcher;
use super::{EngineConfig, LoadError, Memory, Source};
use crate::model::{self, Generator, Header, ModelError, open_device};
use crate::storage::{Origin, Progress, Storage, StorageError, hex};
use crate::telemetry::chain;
use sha2::{Digest as _, Sha256};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Times that a load is begun anew because the object was replaced under it, or the cached copy was damaged.
const RESTARTS_MAX: usize = 3;

/// What a loaded model is.
#[derive(Debug)]
pub struct ModelInfo {
    pub name: String,
    /// The first 16 hexadecimal digits of the weights' SHA-256.
    pub version: String,
    pub header: Header,
    /// `cpu`, `cuda` or `metal`.
    pub device: &'static str,
    /// `built-in`, `file`, `cache` or `store`.
    pub origin: &'static str,
}

impl ModelInfo {
    /// The class that a text names: by its name, or by its index.
    pub fn label(&self, text: &str) -> Option<usize> {
        let by_name = self.header.class_names.iter().position(|name| name == text);
        by_name.or_else(|| {
            text.parse()
                .ok()
                .filter(|&i: &usize| i < self.header.class_names.len())
        })
    }
}

/// Where a load's time went.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadTimes {
    /// Opening and reading, verification included.
    pub fetch: Duration,
    /// From the last byte to a network that can draw.
    pub build: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelState {
    Cold,
    Loading,
    Ready,
}

/// What a model is doing, for whoever asks.
#[derive(Clone, Debug)]
pub struct ModelStatus {
    pub name: String,
    pub source: String,
    pub state: ModelState,
    pub bytes_arrived: u64,
    /// 0 while unknown.
    pub bytes_total: u64,
    /// Of the load that failed last.
    pub error: Option<LoadError>,
    pub info: Option<Arc<ModelInfo>>,
}

/// A model with its thread.
pub(super) struct Loaded {
    pub(super) info: Arc<ModelInfo>,
    pub(super) times: LoadTimes,
    pub(super) batcher: Batcher,
}

type Outcome = Result<Arc<Loaded>, LoadError>;

enum State {
    Cold {
        error: Option<LoadError>,
    },
    Loading {
        outcome: Arc<watch::Sender<Option<Outcome>>>,
        progress: Arc<Progress>,
    },
    Ready(Arc<Loaded>),
}

/// The place of one model.
pub(super) struct Slot {
    config: EngineConfig,
    state: Mutex<State>,
}

impl Slot {
    pub(super) fn new(config: EngineConfig) -> Self {
        Self {
            config,
            state: Mutex::new(State::Cold { error: None }),
        }
    }

    /// The loaded model. Starts the load if it is cold, else waits for the one under way.
    ///
    /// # Errors
    /// Why the load failed. The slot is cold again then.
    pub(super) async fn get(slot: &Arc<Self>) -> Outcome {
        let mut receiver = {
            let mut state = slot.lock();
            match &*state {
                State::Ready(loaded) if !loaded.batcher.is_stopped() => return Ok(loaded.clone()),
                State::Loading { outcome, .. } => outcome.subscribe(),
                State::Ready(_) | State::Cold { .. } => {
                    // Subscribed before the task starts, which ends when nobody is.
                    let (outcome, receiver) = watch::channel(None);
                    let (outcome, progress) = (Arc::new(outcome), Arc::new(Progress::default()));
                    *state = State::Loading {
                        outcome: outcome.clone(),
                        progress: progress.clone(),
                    };
                    tokio::spawn(run(slot.clone(), outcome, progress));
                    receiver
                }
            }
        };
        match receiver.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().unwrap_or(Err(LoadError::Cancelled)),
            Err(_) => Err(LoadError::Cancelled),
        }
    }

    /// The loaded model, if there is one.
    pub(super) fn ready(&self) -> Option<Arc<Loaded>> {
        match &*self.lock() {
            State::Ready(loaded) => Some(loaded.clone()),
            State::Cold { .. } | State::Loading { .. } => None,
        }
    }

    pub(super) fn name(&self) -> String {
        match (&*self.lock(), &self.config.source) {
            (State::Ready(loaded), _) => loaded.info.name.clone(),
            (_, Source::BuiltIn) => "mnist".to_owned(),
            (_, Source::Uri(uri)) => uri.stem(),
        }
    }

    pub(super) fn is_called(&self, name: &str) -> bool {
        let stem = match &self.config.source {
            Source::BuiltIn => "mnist".to_owned(),
            Source::Uri(uri) => uri.stem(),
        };
        name == "default" || name == stem || name == self.name()
    }

    pub(super) fn status(&self) -> ModelStatus {
        let source = match &self.config.source {
            Source::BuiltIn => "built-in".to_owned(),
            Source::Uri(uri) => uri.to_string(),
        };
        let name = self.name();
        let state = self.lock();
        let cold = ModelStatus {
            name,
            source,
            state: ModelState::Cold,
            bytes_arrived: 0,
            bytes_total: 0,
            error: None,
            info: None,
        };
        match &*state {
            State::Cold { error } => ModelStatus {
                error: error.clone(),
                ..cold
            },
            State::Loading { progress, .. } => ModelStatus {
                state: ModelState::Loading,
                bytes_arrived: progress.arrived(),
                bytes_total: progress.total(),
                ..cold
            },
            State::Ready(loaded) => {
                let bytes = loaded.info.header.file_bytes;
                ModelStatus {
                    state: ModelState::Ready,
                    bytes_arrived: bytes,
                    bytes_total: bytes,
                    info: Some(loaded.info.clone()),
                    ..cold
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Loads, and tells everyone. Gives up when nobody waits: on a platform that bills by request the processor
/// stops outside of requests, and a load must not outlive the last of them.
async fn run(
    slot: Arc<Slot>,
    outcome: Arc<watch::Sender<Option<Outcome>>>,
    progress: Arc<Progress>,
) {
    let work = tokio::time::timeout(slot.config.load_timeout, load(&slot.config, &progress));
    tokio::pin!(work);
    let result = loop {
        tokio::select! {
            result = &mut work => break result.unwrap_or(Err(LoadError::Timeout(slot.config.load_timeout))),
            () = outcome.closed() => {
                let mut state = slot.lock();
                // Somebody may have come between the last one's leaving and this line.
                if outcome.receiver_count() == 0 {
                    tracing::info!("nobody waits for the model any more; its load is given up");
                    *state = State::Cold { error: None };
                    return;
                }
            }
        }
    };
    match &result {
        Ok(loaded) => tracing::info!(
            model = loaded.info.name,
            version = loaded.info.version,
            origin = loaded.info.origin,
            device = loaded.info.device,
            bytes = loaded.info.header.file_bytes,
            fetch_ms = loaded.times.fetch.as_millis() as u64,
            build_ms = loaded.times.build.as_millis() as u64,
            resident_mb = Memory::resident_bytes() >> 20,
            "model ready"
        ),
        Err(error) => tracing::error!(error = chain(error), "the model could not be loaded"),
    }
    *slot.lock() = match &result {
        Ok(loaded) => State::Ready(loaded.clone()),
        Err(error) => State::Cold {
            error: Some(error.clone()),
        },
    };
    outcome.send_replace(Some(result));
}

async fn load(config: &EngineConfig, progress: &Arc<Progress>) -> Outcome {
    let Source::Uri(uri) = &config.source else {
        let (config, started) = (config.clone(), Instant::now());
        return blocking(move || {
            let weights = read([Ok::<_, LoadError>(model::BUILT_IN)], None, &config)?;
            let version: [u8; 32] = Sha256::digest(model::BUILT_IN).into();
            start(weights, version, "built-in", started.elapsed(), &config)
        })
        .await;
    };
    let storage = Storage::new(config.storage.clone());
    let mut restarts = 0;
    loop {
        let (config, started) = (config.clone(), Instant::now());
        let mut bytes = storage.open(uri, progress.clone()).await?;
        let _cancel_on_drop = bytes.cancel_on_drop();
        let result = blocking(move || {
            let beside = bytes.beside().map(str::to_owned);
            let chunks = (&mut bytes).map(|chunk| chunk.map_err(LoadError::from));
            let weights = read(chunks, beside.as_deref(), &config)?;
            let digest = bytes.digest().ok_or(LoadError::Cancelled)?;
            let origin = match bytes.origin() {
                Origin::Store => "store",
                Origin::Cache => "cache",
                Origin::File => "file",
            };
            let loaded = start(weights, digest, origin, started.elapsed(), &config)?;
            bytes.keep();
            Ok(loaded)
        })
        .await;
        match result {
            Err(LoadError::Storage(StorageError::Changed | StorageError::CacheCorrupt))
                if restarts < RESTARTS_MAX =>
            {
                restarts += 1;
                tracing::warn!(restarts, "the load begins anew");
            }
            result => return result,
        }
    }
}

async fn blocking(work: impl FnOnce() -> Outcome + Send + 'static) -> Outcome {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(LoadError::Panicked))
}

struct Read {
    weights: model::Weights,
    device: candle_core::Device,
}

fn read(
    chunks: impl IntoIterator<Item = Result<impl AsRef<[u8]>, LoadError>>,
    beside: Option<&str>,
    config: &EngineConfig,
) -> Result<Read, LoadError> {
    let device = open_device(config.device)?;
    let weights = model::read(chunks, beside, |header| admit(header, config))?;
    Ok(Read { weights, device })
}

/// Refuses weights that would not fit, before the first tensor is allocated.
fn admit(header: &Header, config: &EngineConfig) -> Result<(), LoadError> {
    const MB: u64 = 1 << 20;
    let Some(limit) = Memory::limit(config.memory_bytes_max) else {
        return Ok(());
    };
    let (needed, used) = (header.resident_bytes(), Memory::resident_bytes());
    if used + needed <= limit.limit_bytes {
        return Ok(());
    }
    Err(LoadError::TooLarge {
        needed_mb: needed.div_ceil(MB),
        used_mb: used.div_ceil(MB),
        limit_mb: limit.limit_bytes / MB,
        limit_from: limit.limit_from,
    })
}

fn start(
    read: Read,
    digest: [u8; 32],
    origin: &'static str,
    fetch: Duration,
    config: &EngineConfig,
) -> Outcome {
    let started = Instant::now();
    let Read { weights, device } = read;
    let name = match device {
        candle_core::Device::Cpu => "cpu",
        candle_core::Device::Cuda(_) => "cuda",
        candle_core::Device::Metal(_) => "metal",
    };
    let mut generator = Generator::new(weights, &device, config.threads)?;
    check(&mut generator)?;
    let header = generator.header().clone();
    let info = Arc::new(ModelInfo {
        name: header.name.clone(),
        version: hex(&digest[..8]),
        header,
        device: name,
        origin,
    });
    let batcher = Batcher::start(generator, config.batch_rows_max);
    Ok(Arc::new(Loaded {
        info,
        times: LoadTimes {
            fetch,
            build: started.elapsed(),
        },
        batcher,
    }))
}

/// One step of one digit: weights full of NaN are found here and not in an answer, and pages are warm.
fn check(generator: &mut Generator) -> Result<(), ModelError> {
    let spec = model::SampleSpec {
        label: 0,
        seed: 0,
        steps: 1,
        guidance: 1.0,
    };
    generator.draw(&[spec]).map(|_| ())
}
