//! The models there are, by name: one, or those of a catalogue, as many loaded at a time as memory has room for.
//!
//! Room is made before a model is loaded, never after: what was used longest ago leaves first, and never what is being
//! loaded or drawn with.

use super::loader::{Loaded, ModelStatus, Places, Slot};
use super::memory::{Budget, Reservation};
use super::metrics::Loads;
use super::{BatcherMetrics, EngineConfig, EngineError, LoadError, Memory, Source};
use crate::storage::{Catalogue, ModelName, Storage, StorageError};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The name of the model that is compiled in.
const BUILT_IN_NAME: &str = "mnist";
/// What a request may call whichever model is the default.
const DEFAULT_NAME: &str = "default";
/// How long a catalogue's listing is believed.
const LISTING_TTL: Duration = Duration::from_secs(30);
/// Names that no model had lately: asked for again, they cost the store nothing.
const MISSES_MAX: usize = 256;
const MISS_TTL: Duration = Duration::from_secs(10);

pub(super) struct Shelf {
    config: EngineConfig,
    budget: Arc<Budget>,
    slots: Mutex<BTreeMap<String, Arc<Slot>>>,
    listing: tokio::sync::Mutex<Option<(Instant, Vec<String>)>>,
    misses: Mutex<VecDeque<(String, Instant)>>,
    pub(super) loads: Loads,
}

/// A model that somebody draws with. It stays while this is held.
pub(super) struct InUse {
    loaded: Option<Arc<Loaded>>,
    slot: Arc<Slot>,
    budget: Arc<Budget>,
}

impl std::ops::Deref for InUse {
    type Target = Loaded;
    fn deref(&self) -> &Loaded {
        self.loaded
            .as_deref()
            .expect("it is there until it is dropped")
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.slot.touch();
        // Let go before whoever waits for room is told.
        self.loaded = None;
        self.budget.wake();
    }
}

impl Shelf {
    pub(super) fn new(config: EngineConfig) -> Self {
        let one = match &config.source {
            Source::BuiltIn => Some((BUILT_IN_NAME.to_owned(), Places::BuiltIn)),
            Source::Uri(uri) => Some((uri.stem(), Places::Uris(vec![uri.clone()]))),
            Source::Catalogue(_) => None,
        };
        let slots = one
            .into_iter()
            .map(|(name, places)| (name.clone(), Arc::new(Slot::new(name, places))));
        Self {
            budget: Arc::new(Budget::new(Memory::limit(config.memory_bytes_max))),
            slots: Mutex::new(slots.collect()),
            config,
            listing: tokio::sync::Mutex::default(),
            misses: Mutex::default(),
            loads: Loads::new(),
        }
    }

    pub(super) fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// A loaded model, by name; none: the default one.
    ///
    /// # Errors
    /// No model has the name, or its load failed.
    pub(super) async fn get(self: &Arc<Self>, name: Option<&str>) -> Result<InUse, EngineError> {
        let slot = match &self.config.source {
            Source::Catalogue(catalogue) => self.catalogued(name, catalogue).await?,
            _ => self.only(name)?,
        };
        let loaded = match Slot::get(&slot, self).await {
            Err(LoadError::Storage(StorageError::NotFound(_) | StorageError::NoWeights(_)))
                if matches!(self.config.source, Source::Catalogue(_)) =>
            {
                return Err(self.missed(slot.name()).await);
            }
            outcome => outcome?,
        };
        Ok(InUse {
            loaded: Some(loaded),
            slot,
            budget: self.budget.clone(),
        })
    }

    /// The one model of a service that has one. Its file's stem is its name.
    fn only(&self, name: Option<&str>) -> Result<Arc<Slot>, EngineError> {
        let slots = self.slots();
        let slot = slots.values().next().ok_or(EngineError::Stopped)?;
        match name {
            Some(name) if name != DEFAULT_NAME && name != slot.name() => {
                Err(EngineError::UnknownModel {
                    name: name.to_owned(),
                    known: vec![slot.name().to_owned()],
                })
            }
            _ => Ok(slot.clone()),
        }
    }

    async fn catalogued(
        &self,
        name: Option<&str>,
        catalogue: &Catalogue,
    ) -> Result<Arc<Slot>, EngineError> {
        let named = name
            .filter(|&n| n != DEFAULT_NAME)
            .or(self.config.default_model.as_deref());
        let name = match named {
            Some(name) => name.to_owned(),
            None => {
                let mut known = self.names().await;
                match (known.pop(), known.is_empty()) {
                    (Some(only), true) => only,
                    (last, _) => {
                        known.extend(last);
                        return Err(EngineError::ModelRequired { known });
                    }
                }
            }
        };
        let Ok(valid) = name.parse::<ModelName>() else {
            return Err(EngineError::UnknownModel {
                name,
                known: self.names().await,
            });
        };
        if self.has_missed(&name) {
            return Err(EngineError::UnknownModel {
                name,
                known: self.names().await,
            });
        }
        let mut slots = self.slots();
        let slot = slots
            .entry(name.clone())
            .or_insert_with(|| Arc::new(Slot::new(name, Places::Uris(catalogue.places(&valid)))));
        Ok(slot.clone())
    }

    /// Forgets a name that no model has.
    async fn missed(&self, name: &str) -> EngineError {
        self.slots().remove(name);
        {
            let mut misses = lock(&self.misses);
            misses.push_back((name.to_owned(), Instant::now()));
            if misses.len() > MISSES_MAX {
                misses.pop_front();
            }
        }
        EngineError::UnknownModel {
            name: name.to_owned(),
            known: self.names().await,
        }
    }

    fn has_missed(&self, name: &str) -> bool {
        let mut misses = lock(&self.misses);
        misses.retain(|(_, at)| at.elapsed() < MISS_TTL);
        misses.iter().any(|(n, _)| n == name)
    }

    /// The names of all models, as far as they are known.
    async fn names(&self) -> Vec<String> {
        let own = || self.slots().keys().cloned().collect();
        let Source::Catalogue(catalogue) = &self.config.source else {
            return own();
        };
        let mut listing = self.listing.lock().await;
        if let Some((at, names)) = &*listing
            && at.elapsed() < LISTING_TTL
        {
            return names.clone();
        }
        let storage = Storage::new(self.config.storage.clone());
        match storage.list(catalogue).await {
            Ok(Some(names)) => {
                *listing = Some((Instant::now(), names.clone()));
                names
            }
            Ok(None) => own(),
            Err(error) => {
                tracing::warn!(
                    error = crate::telemetry::chain(&error),
                    "the catalogue cannot be listed"
                );
                own()
            }
        }
    }

    /// Every model and what it is doing; those of a catalogue that were never asked for are cold.
    pub(super) async fn models(&self) -> Vec<ModelStatus> {
        let names = self.names().await;
        let mut all = self.loaded();
        if let Source::Catalogue(catalogue) = &self.config.source {
            for name in names {
                if let Ok(valid) = name.parse::<ModelName>()
                    && all.iter().all(|m| m.name != name)
                {
                    all.push(Slot::new(name, Places::Uris(catalogue.places(&valid))).status());
                }
            }
            all.sort_by(|a, b| a.name.cmp(&b.name));
        }
        all
    }

    /// The models that have been asked for, and what they are doing.
    pub(super) fn loaded(&self) -> Vec<ModelStatus> {
        self.slots().values().map(|s| s.status()).collect()
    }

    pub(super) fn metrics(&self) -> Vec<(String, BatcherMetrics)> {
        let slots = self.slots();
        let of = |slot: &Arc<Slot>| Some((slot.name().to_owned(), slot.metrics()?));
        slots.values().filter_map(of).collect()
    }

    /// Promises memory to a model, and makes room for it first.
    ///
    /// # Errors
    /// [`LoadError::TooLarge`]: it would not fit if it was alone.
    pub(super) async fn admit(&self, bytes: u64, of: &Slot) -> Result<Reservation, LoadError> {
        loop {
            let changed = self.budget.changed();
            tokio::pin!(changed);
            // Registered before the look, so that no change between the two is missed.
            changed.as_mut().enable();
            if let Some(reservation) = self.budget.reserve(bytes, Memory::resident_bytes())? {
                return Ok(reservation);
            }
            let mut ready: Vec<Arc<Slot>> = self
                .slots()
                .values()
                .filter(|s| s.name() != of.name() && s.is_ready())
                .cloned()
                .collect();
            ready.sort_by_key(|s| s.used());
            match ready.iter().find(|s| s.unload()) {
                Some(left) => tracing::info!(
                    model = left.name(),
                    for_model = of.name(),
                    "a model was unloaded to make room"
                ),
                None => tracing::info!(
                    model = of.name(),
                    "waits for room: every other model is being loaded or drawn with"
                ),
            }
            // The load's own time-out bounds this wait.
            changed.await;
        }
    }

    /// Unloads what nobody has used for as long as the configuration says. Ends with the shelf.
    pub(super) fn watch_idle(self: &Arc<Self>) {
        let Some(idle) = self.config.idle_unload else {
            return;
        };
        let shelf = Arc::downgrade(self);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(
                    (idle / 4).clamp(Duration::from_millis(100), Duration::from_secs(30)),
                )
                .await;
                let Some(shelf) = shelf.upgrade() else {
                    return;
                };
                let slots: Vec<_> = shelf.slots().values().cloned().collect();
                for slot in slots {
                    if slot.used().elapsed() >= idle && slot.unload() {
                        tracing::info!(model = slot.name(), "an idle model was unloaded");
                    }
                }
            }
        });
    }

    fn slots(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Slot>>> {
        lock(&self.slots)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
