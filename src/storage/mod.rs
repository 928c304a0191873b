//! BYTES: from a model's URI to its verified bytes in the caller's memory, by way of a disk cache where there is one.
//!
//! The path: [`Storage::open`] finds the files of a model and makes the first request of each; [`Opened::head`] gives out
//! their headers; [`Opened::fill`] brings everything else straight to where the caller wants it, by many ranges at once.
//!
//! Promises: one object version a read, never two mixed; nothing is given back that did not match the digest that
//! somebody vouched for; every wait is bounded, a transient fault is retried and what has arrived is kept; no partial
//! file is ever visible under a cache key. Nothing here knows of tensors or of HTTP status codes.

mod cache;
mod client;
mod digest;
mod error;
mod fetch;
mod file;
mod fill;
mod hub;
mod plan;
mod progress;
mod uri;

pub(crate) use client::use_ring;
pub use digest::{CHUNK_BYTES, MANIFEST_SUFFIX, Manifest, hex, parse_digest};
pub use error::StorageError;
pub(crate) use file::holds_weights;
pub use fill::Verified;
pub use plan::Segment;
pub use progress::Progress;
pub use uri::{Catalogue, InvalidUri, ModelName, ModelUri, Place};

use cache::{Cache, Entry, Partial};
use client::{INDEX_SUFFIX, Location};
use digest::{Beside, Expected};
use fetch::{Body, Remote};
use futures_util::StreamExt as _;
use futures_util::stream::{self, TryStreamExt as _};
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Files that one sharded model may have.
pub(crate) const SHARDS_MAX: usize = 1024;
/// Shards whose first request is under way at a time.
const SHARDS_AT_A_TIME: usize = 16;
/// Models that a catalogue lists at most.
const LISTED_MAX: usize = 1000;
/// Chunks of a local file that has no manifest.
const DISK_CHUNK_BYTES: u64 = 4 << 20;

/// How objects are fetched and kept.
#[derive(Clone, Debug)]
pub struct StorageConfig {
    /// Where verified objects are kept; none: nothing touches the disk.
    pub cache_dir: Option<PathBuf>,
    /// What the cache may hold in all.
    pub cache_bytes_max: u64,
    /// Whether a cache in memory is used all the same.
    pub cache_in_memory: bool,
    /// SHA-256 that the weights, or their manifest, must have.
    pub sha256: Option<[u8; 32]>,
    /// What the first request asks for: any header, and the whole of a small model. At most 1 MiB.
    pub first_bytes: u64,
    /// Largest range that one request asks for.
    pub range_bytes: u64,
    /// Ranged requests at a time.
    pub range_concurrency: usize,
    /// How long a connection may take.
    pub connect_timeout: Duration,
    /// How long a response may send nothing before its request is given up and made again.
    pub stall_timeout: Duration,
    /// Attempts in a row without a byte before the read fails.
    pub attempts_max: u32,
}

impl Default for StorageConfig {
    fn default() -> Self {
        Self {
            cache_dir: None,
            cache_bytes_max: 10 << 30,
            cache_in_memory: false,
            sha256: None,
            first_bytes: fetch::FIRST_BYTES_MAX,
            range_bytes: 8 << 20,
            range_concurrency: 64,
            connect_timeout: Duration::from_secs(5),
            stall_timeout: Duration::from_secs(10),
            attempts_max: 6,
        }
    }
}

/// Where bytes came from, for the log and the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    Store,
    Cache,
    File,
}

/// Reads models from wherever a [`ModelUri`] points.
#[derive(Clone, Debug)]
pub struct Storage {
    config: StorageConfig,
}

/// The files of a model, at one version each, of which little more than the headers has been read.
pub struct Opened {
    files: Vec<OpenFile>,
    config: StorageConfig,
    progress: Arc<Progress>,
    stop: Arc<watch::Sender<bool>>,
}

struct OpenFile {
    size: u64,
    chunk_bytes: u64,
    /// What has been read of it, from its start.
    head: Vec<u8>,
    /// An answer that goes on where the head ends.
    body: Option<Body>,
    source: Source,
    cache: Option<Cache>,
    /// What the cache holds of it, and will be read.
    entry: Option<Entry>,
    partial: Option<Partial>,
    expected: Expected,
    /// A text that is another one when the bytes are.
    identity: String,
    place: FilePlace,
}

enum FilePlace {
    Disk(PathBuf),
    Store(Location),
}

enum Source {
    Disk {
        file: File,
        /// Digests of its chunks, where they are known.
        blake3: Option<Vec<[u8; 32]>>,
    },
    Store(Box<Remote>),
}

impl Storage {
    pub fn new(config: StorageConfig) -> Self {
        Self { config }
    }

    /// Finds the files of a model. The first request of each goes out here.
    ///
    /// # Errors
    /// [`StorageError`]; a store that cannot be reached is no error where the cache holds a copy.
    pub async fn open(
        &self,
        uri: &ModelUri,
        progress: Arc<Progress>,
    ) -> Result<Opened, StorageError> {
        let files = match uri {
            ModelUri::File(path) => {
                let paths = file::find(path)?;
                let open = |path: &PathBuf| self.open_file(path);
                paths.iter().map(open).collect::<Result<Vec<_>, _>>()?
            }
            _ => self.open_remote(uri, &progress).await?,
        };
        if files.len() > 1 && self.config.sha256.is_some() {
            return Err(StorageError::Protocol(
                "MODEL_SHA256 is the digest of one file, and the model has several: let a .sha256 file or a manifest lie beside each"
                    .to_owned(),
            ));
        }
        progress.begin(files.iter().map(|f| f.size).sum(), Instant::now());
        Ok(Opened {
            files,
            config: self.config.clone(),
            progress,
            stop: Arc::new(watch::channel(false).0),
        })
    }

    /// Opens the first of several places that has a model.
    ///
    /// # Errors
    /// As [`Storage::open`]; [`StorageError::NotFound`] if none has one.
    pub async fn open_first(
        &self,
        uris: &[ModelUri],
        progress: &Arc<Progress>,
    ) -> Result<Opened, StorageError> {
        let mut missing = None;
        for uri in uris {
            match self.open(uri, progress.clone()).await {
                Err(error @ (StorageError::NotFound(_) | StorageError::NoWeights(_))) => {
                    missing.get_or_insert(error);
                }
                result => return result,
            }
        }
        Err(missing.unwrap_or_else(|| StorageError::NotFound("a model".to_owned())))
    }

    /// The names of a catalogue's models, sorted; none where it cannot be listed.
    ///
    /// # Errors
    /// [`StorageError`]
    pub async fn list(&self, catalogue: &Catalogue) -> Result<Option<Vec<String>>, StorageError> {
        let mut names = match catalogue {
            Catalogue::File(folder) => file::list(folder)?,
            Catalogue::Http(_) => return Ok(None),
            _ => client::list(catalogue, &self.config, LISTED_MAX).await?,
        };
        names.retain(|name| name.parse::<ModelName>().is_ok());
        names.sort();
        names.dedup();
        names.truncate(LISTED_MAX);
        Ok(Some(names))
    }

    fn open_file(&self, path: &std::path::Path) -> Result<OpenFile, StorageError> {
        let (file, size, identity) = file::open(path)?;
        let beside = file::digests_beside(path)?;
        let uri = path.display().to_string();
        let expected = Expected::choose(&uri, size, self.config.sha256, beside)?;
        let manifest = expected.manifest.as_ref();
        Ok(OpenFile {
            size,
            chunk_bytes: manifest.map_or(DISK_CHUNK_BYTES, |m| m.chunk_bytes),
            head: Vec::new(),
            body: None,
            source: Source::Disk { file, blake3: None },
            cache: None,
            entry: None,
            partial: None,
            expected,
            identity,
            place: FilePlace::Disk(path.to_owned()),
        })
    }

    async fn open_remote(
        &self,
        uri: &ModelUri,
        progress: &Arc<Progress>,
    ) -> Result<Vec<OpenFile>, StorageError> {
        let location = match client::locate(uri, &self.config).await {
            Ok(location) => location,
            // The hub could not say which commit is meant; perhaps one was fetched before.
            Err(error) if error.is_transient() => {
                let cache = Cache::new(&self.config, &uri.to_string());
                let cached = cache.and_then(|cache| Some((cache.entry()?, cache)));
                let Some((entry, cache)) = cached else {
                    return Err(error);
                };
                tracing::warn!(uri = %uri, error = %error, "the store cannot be asked; using the cached copy");
                return Ok(vec![self.cached(cache, entry, None)?]);
            }
            Err(error) => return Err(error),
        };
        if !location.uri.ends_with(INDEX_SUFFIX) {
            return Ok(vec![self.open_object(location, progress).await?]);
        }
        let text = fetch::small(&location, &self.config)
            .await?
            .ok_or_else(|| StorageError::NotFound(location.uri.clone()))?;
        let shards = file::shards(&location.uri, &text)?;
        let open = |name: String| self.open_object(location.sibling(&name), progress);
        stream::iter(shards)
            .map(open)
            .buffered(SHARDS_AT_A_TIME)
            .try_collect()
            .await
    }

    /// One object: asked for at the store, or read from the cache if the store says that it is unchanged.
    async fn open_object(
        &self,
        location: Location,
        progress: &Arc<Progress>,
    ) -> Result<OpenFile, StorageError> {
        let cache = Cache::new(&self.config, &location.uri);
        let cached = cache
            .as_ref()
            .and_then(|cache| Some((cache.clone(), cache.entry()?)));
        let known = cached.as_ref().map(|(_, entry)| &entry.version);
        let opened = fetch::open(location.clone(), known, &self.config, progress);
        // Without a copy to compare with, the digests will be needed: asked for at the same time, they cost no wait.
        let (opened, digests) = if cached.is_none() {
            let (opened, digests) =
                futures_util::future::join(opened, self.digests_beside(&location)).await;
            (opened, Some(digests))
        } else {
            (opened.await, None)
        };
        let (remote, body) = match (opened, cached) {
            (Ok(fetch::Opened::Unchanged), Some((cache, entry))) => {
                tracing::debug!(uri = location.uri, "the cached copy is current");
                return self.cached(cache, entry, Some(location));
            }
            // A verified copy serves better than no answer, but never against a store that says no.
            (Err(error), Some((cache, entry))) if error.is_transient() => {
                tracing::warn!(uri = location.uri, error = %error, "the store cannot be asked; using the cached copy");
                return self.cached(cache, entry, Some(location));
            }
            (Ok(fetch::Opened::Object(remote, body)), _) => (remote, body),
            (Ok(fetch::Opened::Unchanged), None) => {
                return Err(StorageError::Protocol(
                    "the store says that an object is unchanged which was never fetched".to_owned(),
                ));
            }
            (Err(error), _) => return Err(error),
        };
        let digests = match digests {
            Some(digests) => digests?,
            None => self.digests_beside(&location).await?,
        };
        let size = remote.version.size;
        let expected = Expected::choose(&location.uri, size, self.config.sha256, digests)?;
        let manifest = expected.manifest.as_ref();
        let identity = format!("{:?}", remote.version);
        Ok(OpenFile {
            size,
            chunk_bytes: manifest.map_or_else(|| self.chunk_bytes(size), |m| m.chunk_bytes),
            head: Vec::new(),
            body: Some(body),
            source: Source::Store(remote),
            cache,
            entry: None,
            partial: None,
            expected,
            identity,
            place: FilePlace::Store(location),
        })
    }

    /// A cache entry, to be read chunk by chunk against its digests.
    fn cached(
        &self,
        cache: Cache,
        entry: Entry,
        location: Option<Location>,
    ) -> Result<OpenFile, StorageError> {
        let file = cache.open(&entry)?;
        // The chunks' digests were computed when the whole had this one; no need to compute it again.
        let pinned = self.config.sha256.filter(|&p| entry.sha256() != Some(p));
        let path = PathBuf::new();
        Ok(OpenFile {
            size: entry.version.size,
            chunk_bytes: entry.chunk_bytes,
            head: Vec::new(),
            body: None,
            source: Source::Disk {
                file,
                blake3: Some(entry.blake3.clone()),
            },
            expected: Expected {
                sha256: pinned,
                manifest: None,
            },
            identity: format!("{:?}", entry.version),
            cache: Some(cache),
            entry: Some(entry),
            partial: None,
            place: location.map_or(FilePlace::Disk(path), FilePlace::Store),
        })
    }

    /// Small enough that every connection has work, and no smaller than is worth a request.
    fn chunk_bytes(&self, size: u64) -> u64 {
        let share = size.div_ceil(2 * self.config.range_concurrency as u64);
        let least = *CHUNK_BYTES.start();
        share
            .next_multiple_of(least)
            .clamp(least, self.config.range_bytes.max(least))
    }

    async fn text_if_there(
        &self,
        there: &Location,
        wanted: bool,
    ) -> Result<Option<Vec<u8>>, StorageError> {
        if wanted && there.may_have(there.name()) {
            fetch::small_if_there(there, &self.config).await
        } else {
            Ok(None)
        }
    }

    /// What lies beside an object and says what its bytes must be.
    async fn digests_beside(&self, location: &Location) -> Result<Beside, StorageError> {
        let (manifest, sha256) = (location.manifest(), location.sha256_file());
        let stated = location.listed().and_then(|f| f.sha256);
        let (manifest, sha256) = futures_util::future::try_join(
            self.text_if_there(&manifest, true),
            self.text_if_there(&sha256, self.config.sha256.is_none() && stated.is_none()),
        )
        .await?;
        Ok(Beside {
            manifest,
            sha256,
            stated,
        })
    }
}

/// Ends the read when dropped: the thread that fills gets [`StorageError::Cancelled`].
pub struct CancelOnDrop {
    stop: Arc<watch::Sender<bool>>,
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

/// What arrived.
pub struct Arrived {
    /// 16 hexadecimal digits that are others when the bytes are.
    pub version: String,
    /// The weakest of the files'.
    pub verified: Verified,
    pub origin: Origin,
    kept: Vec<Kept>,
}

struct Kept {
    partial: Partial,
    sha256: Option<[u8; 32]>,
    verified: bool,
    beside: Option<String>,
}

impl Opened {
    /// How many files the model has.
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Whether there are none, which is never so.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Lets whoever waits for this read give it up.
    pub fn cancel_on_drop(&self) -> CancelOnDrop {
        CancelOnDrop {
            stop: self.stop.clone(),
        }
    }

    /// The files' names, without their folders.
    pub fn names(&self) -> Vec<String> {
        let name = |file: &OpenFile| match &file.place {
            FilePlace::Disk(path) => path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            FilePlace::Store(location) => location.name().to_owned(),
        };
        self.files.iter().map(name).collect()
    }

    /// Bytes of a file.
    pub fn size(&self, file: usize) -> u64 {
        self.files[file].size
    }

    /// The first `n` bytes of a file.
    ///
    /// # Errors
    /// [`StorageError`], [`StorageError::Truncated`] if the file is shorter.
    pub async fn head(&mut self, file: usize, n: usize) -> Result<&[u8], StorageError> {
        let open = &mut self.files[file];
        if n as u64 > open.size {
            return Err(StorageError::Truncated {
                expected: n as u64,
                actual: open.size,
            });
        }
        match &open.source {
            Source::Disk { file, .. } => {
                if open.head.len() < n {
                    open.head.resize(n, 0);
                    file.read_exact_at(&mut open.head, 0)
                        .map_err(|e| StorageError::Read(Arc::new(e)))?;
                }
            }
            Source::Store(remote) => {
                remote.read_head(&mut open.head, &mut open.body, n).await?;
            }
        }
        Ok(&open.head[..n])
    }

    /// The text of the `config.json` next to the first file, where there is one.
    ///
    /// # Errors
    /// [`StorageError`]
    pub async fn config_beside(&mut self) -> Result<Option<String>, StorageError> {
        let first = &mut self.files[0];
        if let Some(text) = first.entry.as_ref().and_then(|e| e.beside.clone()) {
            return Ok(Some(text));
        }
        match &first.place {
            FilePlace::Disk(path) => file::config_beside(path),
            FilePlace::Store(location) => {
                if !location.may_have("config.json") {
                    return Ok(None);
                }
                let there = location.sibling("config.json");
                let Some(text) = fetch::small_if_there(&there, &self.config).await? else {
                    return Ok(None);
                };
                String::from_utf8(text)
                    .map(Some)
                    .map_err(|e| StorageError::Protocol(format!("`{}`: {e}", there.uri)))
            }
        }
    }

    /// Puts cached copies aside of whose headers no model could be made. What is kept was a model once, so it is damaged,
    /// and the header is read before any digest is. False: none of it is from the cache.
    pub fn put_aside(&self) -> bool {
        let mut any = false;
        for file in &self.files {
            if let (Some(cache), Some(entry)) = (&file.cache, &file.entry) {
                cache.put_aside(entry);
                any = true;
            }
        }
        any
    }

    /// Brings all bytes of all files to where they belong: a list of segments a file, which cover it. `beside` is what
    /// [`Opened::config_beside`] gave, for the cache.
    ///
    /// Blocks: to be called off the async runtime.
    ///
    /// # Errors
    /// [`StorageError`]. What has arrived stays in the cache for the next try, unless it proved wrong.
    pub fn fill(
        mut self,
        segments: Vec<Vec<Segment<'_>>>,
        beside: Option<String>,
    ) -> Result<Arrived, StorageError> {
        for file in &mut self.files {
            file.begin_cache();
        }
        let filled = fill::fill(
            &mut self.files,
            segments,
            &self.config,
            &self.progress,
            &self.stop,
        );
        if let Err(StorageError::CacheCorrupt) = &filled {
            self.put_aside();
        }
        let filled = filled?;
        Ok(self.arrived(filled, beside))
    }

    fn arrived(self, filled: Vec<fill::Filled>, beside: Option<String>) -> Arrived {
        let mut origin = Origin::File;
        let mut verified = Verified::Sha256;
        let mut all = Sha256::new();
        let mut only = None;
        let several = self.files.len() > 1;
        let mut kept = Vec::new();
        for (file, filled) in self.files.into_iter().zip(filled) {
            origin = match file.source {
                Source::Store(_) => Origin::Store,
                Source::Disk { .. } if file.entry.is_some() && origin != Origin::Store => {
                    Origin::Cache
                }
                Source::Disk { .. } => origin,
            };
            let entry_sha256 = file.entry.as_ref().and_then(Entry::sha256);
            let sha256 = filled.sha256.or(entry_sha256);
            let was_verified = file.entry.as_ref().is_some_and(|e| e.verified);
            let this = if was_verified {
                filled.verified.max(Verified::Chunks)
            } else {
                filled.verified
            };
            verified = verified.min(this);
            let digest = sha256.unwrap_or_else(|| Sha256::digest(&file.identity).into());
            all.update(digest);
            only = Some(digest);
            if let Some(partial) = file.partial {
                kept.push(Kept {
                    partial,
                    sha256,
                    verified: this > Verified::Length,
                    beside: beside.clone(),
                });
            }
        }
        let version = match only {
            Some(digest) if !several => digest,
            _ => all.finalize().into(),
        };
        Arrived {
            version: hex(&version[..8]),
            verified,
            origin,
            kept,
        }
    }
}

impl OpenFile {
    /// Makes ready to write behind the load. A cache that cannot be written costs the next start a download, not this one
    /// its answer.
    fn begin_cache(&mut self) {
        let (Source::Store(remote), Some(cache)) = (&self.source, &self.cache) else {
            return;
        };
        match cache.begin(&remote.version, self.chunk_bytes) {
            Ok(partial) => self.partial = partial,
            Err(error) => {
                tracing::warn!(error = %crate::telemetry::chain(&error), "the model is not cached");
            }
        }
    }
}

impl Arrived {
    /// Makes what arrived the cache's entry. Called when the bytes have proved to be usable weights: the cache never holds
    /// what could not be served.
    ///
    /// A cache that cannot be written is logged and does not matter to the caller.
    pub fn keep(self) {
        for kept in self.kept {
            if let Err(error) = kept
                .partial
                .publish(kept.sha256, kept.verified, kept.beside)
            {
                tracing::warn!(error = %crate::telemetry::chain(&error), "the model is not cached");
            }
        }
    }

    /// Leaves nothing of it in the cache: the bytes arrived as they were, and are no usable weights.
    pub fn discard(self) {
        for kept in self.kept {
            kept.partial.discard();
        }
    }
}
