//! A model that is cold, loading or ready; one load at a time, for everyone who waits.

use super::batcher::Batcher;
use super::memory::Reservation;
use super::shelf::Shelf;
use super::{BatcherMetrics, LoadError, Memory};
use crate::model::{self, Generator, Header, ModelError, Weights, open_device};
use crate::storage::{
    Arrived, ModelUri, Opened, Origin, Progress, Segment, Storage, StorageError, Verified, hex,
};
use crate::telemetry::chain;
use sha2::{Digest as _, Sha256};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Times that a load is begun anew because the object was replaced under it, or the cached copy was damaged.
const RESTARTS_MAX: usize = 3;

/// What a loaded model is.
#[derive(Debug)]
pub struct ModelInfo {
    /// What requests call it.
    pub name: String,
    /// 16 hexadecimal digits that are others when the weights are: of their SHA-256 where it is known.
    pub version: String,
    pub header: Header,
    /// `cpu`, `cuda` or `metal`.
    pub device: &'static str,
    /// `built-in`, `file`, `cache` or `store`.
    pub origin: &'static str,
    /// `sha256`, `chunks`, or `length` where nobody gave a digest.
    pub verified: &'static str,
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
    /// Until the rest has arrived, at the speed so far.
    pub left: Option<Duration>,
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

/// Where one model's weights may be, likeliest first; none: they are compiled in.
#[derive(Clone, Debug)]
pub(super) enum Places {
    BuiltIn,
    Uris(Vec<ModelUri>),
}

/// The place of one model.
pub(super) struct Slot {
    name: String,
    places: Places,
    state: Mutex<State>,
    used: Mutex<Instant>,
}

impl Slot {
    pub(super) fn new(name: String, places: Places) -> Self {
        Self {
            name,
            places,
            state: Mutex::new(State::Cold { error: None }),
            used: Mutex::new(Instant::now()),
        }
    }

    /// The loaded model. Starts the load if it is cold, else waits for the one under way.
    ///
    /// # Errors
    /// Why the load failed. The slot is cold again then.
    pub(super) async fn get(slot: &Arc<Self>, shelf: &Arc<Shelf>) -> Outcome {
        slot.touch();
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
                    tokio::spawn(run(slot.clone(), shelf.clone(), outcome, progress));
                    receiver
                }
            }
        };
        match receiver.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().unwrap_or(Err(LoadError::Cancelled)),
            Err(_) => Err(LoadError::Cancelled),
        }
    }

    /// Lets go of the model if nobody draws with it; whether there was one. Its memory is free when its reservation is.
    pub(super) fn unload(&self) -> bool {
        let mut state = self.lock();
        let idle = matches!(&*state, State::Ready(loaded) if Arc::strong_count(loaded) == 1);
        if idle {
            *state = State::Cold { error: None };
        }
        idle
    }

    pub(super) fn touch(&self) {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    pub(super) fn used(&self) -> Instant {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_ready(&self) -> bool {
        matches!(&*self.lock(), State::Ready(_))
    }

    /// What its batcher has done since it was loaded; none while it is not.
    pub(super) fn metrics(&self) -> Option<BatcherMetrics> {
        match &*self.lock() {
            State::Ready(loaded) => Some(loaded.batcher.metrics()),
            State::Cold { .. } | State::Loading { .. } => None,
        }
    }

    /// What it is called, by its place.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn status(&self) -> ModelStatus {
        let source = match &self.places {
            Places::BuiltIn => "built-in".to_owned(),
            Places::Uris(uris) => uris.first().map(ModelUri::to_string).unwrap_or_default(),
        };
        let state = self.lock();
        let cold = ModelStatus {
            name: self.name.clone(),
            source,
            state: ModelState::Cold,
            bytes_arrived: 0,
            bytes_total: 0,
            left: None,
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
                left: progress.left(Instant::now()),
                ..cold
            },
            State::Ready(loaded) => {
                let bytes = loaded.info.header.file_bytes();
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
    shelf: Arc<Shelf>,
    outcome: Arc<watch::Sender<Option<Outcome>>>,
    progress: Arc<Progress>,
) {
    let load_timeout = shelf.config().load_timeout;
    let work = tokio::time::timeout(load_timeout, load(&slot, &shelf, &progress));
    tokio::pin!(work);
    let result = loop {
        tokio::select! {
            result = &mut work => break result.unwrap_or(Err(LoadError::Timeout(load_timeout))),
            () = outcome.closed() => {
                let mut state = slot.lock();
                // Somebody may have come between the last one's leaving and this line.
                if outcome.receiver_count() == 0 {
                    tracing::info!(model = slot.name, "nobody waits for the model any more; its load is given up");
                    shelf.loads.given_up.fetch_add(1, Ordering::Relaxed);
                    *state = State::Cold { error: None };
                    return;
                }
            }
        }
    };
    match &result {
        Ok(loaded) => shelf.loads.done(
            loaded.info.origin,
            loaded.info.header.file_bytes(),
            loaded.times,
        ),
        Err(_) => {
            shelf.loads.failed.fetch_add(1, Ordering::Relaxed);
        }
    }
    match &result {
        Ok(loaded) => tracing::info!(
            model = loaded.info.name,
            version = loaded.info.version,
            origin = loaded.info.origin,
            verified = loaded.info.verified,
            device = loaded.info.device,
            bytes = loaded.info.header.file_bytes(),
            fetch_ms = loaded.times.fetch.as_millis() as u64,
            build_ms = loaded.times.build.as_millis() as u64,
            resident_mb = Memory::resident_bytes() >> 20,
            "model ready"
        ),
        Err(error) => tracing::error!(
            model = slot.name,
            error = chain(error),
            "the model could not be loaded"
        ),
    }
    *slot.lock() = match &result {
        Ok(loaded) => State::Ready(loaded.clone()),
        Err(error) => State::Cold {
            error: Some(error.clone()),
        },
    };
    outcome.send_replace(Some(result));
}

async fn load(slot: &Slot, shelf: &Arc<Shelf>, progress: &Arc<Progress>) -> Outcome {
    let Places::Uris(uris) = &slot.places else {
        return load_built_in(slot, shelf).await;
    };
    let storage = Storage::new(shelf.config().storage.clone());
    let mut restarts = 0;
    loop {
        let opened = storage.open_first(uris, progress).await?;
        match fetch(slot, shelf, opened).await {
            Err(LoadError::Storage(StorageError::Changed | StorageError::CacheCorrupt))
                if restarts < RESTARTS_MAX =>
            {
                restarts += 1;
                tracing::warn!(model = slot.name, restarts, "the load begins anew");
            }
            result => return result,
        }
    }
}

async fn load_built_in(slot: &Slot, shelf: &Arc<Shelf>) -> Outcome {
    let started = Instant::now();
    let digest: [u8; 32] = Sha256::digest(model::BUILT_IN).into();
    let memory = shelf.admit(model::BUILT_IN.len() as u64, slot).await?;
    let about = About {
        name: slot.name.clone(),
        version: hex(&digest[..8]),
        origin: "built-in",
        verified: "sha256",
    };
    let shelf = shelf.clone();
    blocking(move || {
        let weights = model::from_bytes(model::BUILT_IN)?;
        start(weights, about, started.elapsed(), &shelf, memory)
    })
    .await
}

/// One try: headers, admission, all bytes, a network that draws.
async fn fetch(slot: &Slot, shelf: &Arc<Shelf>, mut opened: Opened) -> Outcome {
    let started = Instant::now();
    let _cancel_on_drop = opened.cancel_on_drop();
    let (header, heads, beside) = match headers(&mut opened).await {
        Err(error) if opened.put_aside() => {
            tracing::warn!(
                model = slot.name,
                error = chain(&error),
                "the cached copy holds no model"
            );
            return Err(StorageError::CacheCorrupt.into());
        }
        result => result?,
    };
    let memory = shelf.admit(header.resident_bytes(), slot).await?;
    let (name, shelf) = (slot.name.clone(), shelf.clone());
    blocking(move || {
        let mut weights = Weights::allocate(header)?;
        let arrived = fill(opened, &mut weights, &heads, beside)?;
        let fetch = started.elapsed();
        let about = About {
            name,
            version: arrived.version.clone(),
            origin: match arrived.origin {
                Origin::Store => "store",
                Origin::Cache => "cache",
                Origin::File => "file",
            },
            verified: match arrived.verified {
                Verified::Sha256 => "sha256",
                Verified::Chunks => "chunks",
                Verified::Length => "length",
            },
        };
        tracing::info!(
            model = about.name,
            bytes = weights.header.file_bytes(),
            fetch_ms = fetch.as_millis() as u64,
            origin = about.origin,
            verified = about.verified,
            "weights fetched"
        );
        if arrived.verified == Verified::Length {
            tracing::info!(model = about.name, "no digest of the weights was given (MODEL_SHA256, a .sha256 file or a manifest beside them): their length, header and version were checked");
        }
        match start(weights, about, fetch, &shelf, memory) {
            Ok(loaded) => {
                arrived.keep();
                Ok(loaded)
            }
            Err(error) => {
                arrived.discard();
                Err(error)
            }
        }
    })
    .await
}

pub(crate) type Headers = (Header, Vec<Vec<u8>>, Option<String>);

/// Reads and checks the headers of a model's files: all that is known before a tensor is.
pub(crate) async fn headers(opened: &mut Opened) -> Result<Headers, LoadError> {
    let mut heads = Vec::with_capacity(opened.len());
    for file in 0..opened.len() {
        let actual = opened.size(file);
        let short = |expected: usize| ModelError::Length {
            expected: expected as u64,
            actual,
        };
        let mut expected = 8;
        if actual < expected as u64 {
            return Err(short(expected).into());
        }
        if let Some(first) = opened.head(file, 8).await?.first_chunk::<8>() {
            expected = Header::length(*first)?;
        }
        if actual < expected as u64 {
            return Err(short(expected).into());
        }
        heads.push(opened.head(file, expected).await?.to_vec());
    }
    let alone = heads.first().map(|h| Header::describes_itself(h));
    let beside = match alone.transpose()? {
        Some(true) | None => None,
        Some(false) => opened.config_beside().await?,
    };
    let header = Header::parse(&heads, beside.as_deref())?;
    for (file, layout) in header.files.iter().enumerate() {
        let (expected, actual) = (layout.bytes, opened.size(file));
        if expected != actual {
            return Err(ModelError::Length { expected, actual }.into());
        }
    }
    Ok((header, heads, beside))
}

/// Brings the bytes of all tensors to their place. `parsed` are the headers that said where that is.
pub(super) fn fill(
    opened: Opened,
    weights: &mut Weights,
    parsed: &[Vec<u8>],
    beside: Option<String>,
) -> Result<Arrived, LoadError> {
    let mut heads = parsed.to_vec();
    let mut segments: Vec<Vec<Segment<'_>>> = heads
        .iter_mut()
        .map(|head| {
            vec![Segment {
                range: 0..head.len() as u64,
                bytes: head,
            }]
        })
        .collect();
    for slot in weights.slots() {
        segments[slot.file].push(Segment {
            range: slot.range,
            bytes: slot.bytes,
        });
    }
    let arrived = opened.fill(segments, beside)?;
    // A file that was written to between the two reads would be tensors of one version under the header of another.
    if heads != parsed {
        return Err(StorageError::Changed.into());
    }
    Ok(arrived)
}

async fn blocking(work: impl FnOnce() -> Outcome + Send + 'static) -> Outcome {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(LoadError::Panicked))
}

struct About {
    name: String,
    version: String,
    origin: &'static str,
    verified: &'static str,
}

fn start(
    weights: Weights,
    about: About,
    fetch: Duration,
    shelf: &Shelf,
    mut memory: Reservation,
) -> Outcome {
    let started = Instant::now();
    let device = open_device(shelf.config().device)?;
    let device_name = match device {
        candle_core::Device::Cpu => "cpu",
        candle_core::Device::Cuda(_) => "cuda",
        candle_core::Device::Metal(_) => "metal",
    };
    let mut generator = Generator::new(weights, &device, shelf.config().threads)?;
    check(&mut generator)?;
    memory.settle();
    let info = Arc::new(ModelInfo {
        name: about.name,
        version: about.version,
        header: generator.header().clone(),
        device: device_name,
        origin: about.origin,
        verified: about.verified,
    });
    let batcher = Batcher::start(generator, shelf.config().batch_rows_max, memory);
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
