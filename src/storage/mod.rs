//! BYTES: from a model's URI to its verified bytes, in order, by way of a disk cache where there is one.
//!
//! Promises: one object version a read, never two mixed; a digest that was asked for is checked before the
//! last chunk is given out; a wait is bounded, a transient fault is retried and what has arrived is kept; no
//! partial file is ever visible under a cache key. Nothing here knows of tensors or of HTTP status codes.

mod cache;
mod client;
mod error;
mod fetch;
mod file;
mod hub;
mod uri;

pub(crate) use client::use_ring;
pub use error::StorageError;
pub(crate) use file::holds_weights;
pub use uri::{InvalidUri, ModelUri};

use bytes::Bytes;
use cache::{Cache, Pending};
use fetch::Opened;
use sha2::{Digest, Sha256};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::task::AbortHandle;

/// How objects are fetched and kept.
#[derive(Clone, Debug)]
pub struct StorageConfig {
    /// Where verified objects are kept; none: nothing touches the disk.
    pub cache_dir: Option<PathBuf>,
    /// SHA-256 that the weights must have.
    pub sha256: Option<[u8; 32]>,
    /// Bytes of one ranged request.
    pub range_bytes: u64,
    /// Ranged requests at a time. What waits in memory is bounded by `range_bytes` x this.
    pub range_concurrency: usize,
    /// How long a connection may take.
    pub connect_timeout: Duration,
    /// How long a response may send nothing before its request is given up and made again.
    pub stall_timeout: Duration,
    /// Attempts at one range before the read fails.
    pub attempts_max: u32,
}

impl Default for StorageConfig {
    fn default() -> Self {
        Self {
            cache_dir: None,
            sha256: None,
            range_bytes: 8 << 20,
            range_concurrency: 8,
            connect_timeout: Duration::from_secs(5),
            stall_timeout: Duration::from_secs(10),
            attempts_max: 6,
        }
    }
}

/// How far a read has come. Shared with whoever shows it.
#[derive(Debug, Default)]
pub struct Progress {
    total: AtomicU64,
    arrived: AtomicU64,
}

impl Progress {
    /// Bytes of the object; 0 while unknown.
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// Bytes that have arrived.
    pub fn arrived(&self) -> u64 {
        self.arrived.load(Ordering::Relaxed)
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

impl Storage {
    pub fn new(config: StorageConfig) -> Self {
        Self { config }
    }

    /// Opens the weights. The first request goes out here; the rest follows as the chunks are taken.
    ///
    /// # Errors
    /// [`StorageError`]; a store that cannot be reached is no error where the cache holds a copy of it.
    pub async fn open(
        &self,
        uri: &ModelUri,
        progress: Arc<Progress>,
    ) -> Result<Weights, StorageError> {
        if let ModelUri::File(path) = uri {
            let file = file::open(path)?;
            let beside = file::beside(&file.path)?;
            return Ok(Weights::new(
                file.into_reader(),
                Origin::File,
                beside,
                self.config.sha256,
                progress,
            ));
        }
        let cache = self
            .config
            .cache_dir
            .as_ref()
            .map(|dir| Cache::new(dir.clone(), uri));
        let cached = cache.as_ref().and_then(Cache::entry);
        let location = client::locate(uri, &self.config).await;
        let opened = match location {
            Ok(location) => {
                fetch::open(location, cached.as_ref().map(|c| &c.version), &self.config).await
            }
            Err(error) => Err(error),
        };
        let object = match (opened, cached, &cache) {
            (Ok(Opened::Unchanged), Some(entry), Some(cache)) => {
                tracing::debug!(uri = %uri, "the cached copy is current");
                return Ok(Weights::new(
                    cache.read(&entry)?,
                    Origin::Cache,
                    entry.beside.clone(),
                    self.config.sha256,
                    progress,
                )
                .expecting(cache.clone(), entry.sha256));
            }
            // A verified copy serves better than no answer, but never against a store that says no.
            (Err(error), Some(entry), Some(cache)) if error.is_transient() => {
                tracing::warn!(uri = %uri, error = %error, "the store cannot be asked; using the cached copy");
                return Ok(Weights::new(
                    cache.read(&entry)?,
                    Origin::Cache,
                    entry.beside.clone(),
                    self.config.sha256,
                    progress,
                )
                .expecting(cache.clone(), entry.sha256));
            }
            (Ok(Opened::Object(object)), ..) => object,
            (Ok(Opened::Unchanged), ..) => {
                return Err(StorageError::Protocol(
                    "the store says that an object is unchanged which was never fetched".to_owned(),
                ));
            }
            (Err(error), ..) => return Err(error),
        };
        let beside = client::beside(uri, &object.location.clone(), &self.config).await?;
        let pending = match &cache {
            None => None,
            Some(cache) => match cache.begin(&object.version, beside.clone()) {
                Ok(pending) => pending,
                // A cache that cannot be written costs the next start a download, not this one its answer.
                Err(error) => {
                    tracing::warn!(error = %error, "the model is not cached");
                    None
                }
            },
        };
        let mut weights = Weights::new(
            fetch::stream(object, self.config.clone(), progress.clone()),
            Origin::Store,
            beside,
            self.config.sha256,
            progress,
        );
        weights.pending = pending;
        Ok(weights)
    }
}

/// Bytes of weights, in order, chunk by chunk. Blocks: to be read off the async runtime.
///
/// The last chunk is followed by the end only if everything was verified; else by the error.
pub struct Weights {
    reader: Reader,
    origin: Origin,
    beside: Option<String>,
    progress: Arc<Progress>,
    size: u64,
    seen: u64,
    hash: Sha256,
    wanted: Option<[u8; 32]>,
    digest: Option<[u8; 32]>,
    cached: Option<(Cache, [u8; 32])>,
    pending: Option<Pending>,
    cancelled: Arc<AtomicBool>,
    over: bool,
}

/// Ends the read when dropped: the thread that takes the chunks gets [`StorageError::Cancelled`] next.
pub struct CancelOnDrop {
    cancelled: Arc<AtomicBool>,
    feed: Option<AbortHandle>,
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
        if let Some(feed) = &self.feed {
            feed.abort();
        }
    }
}

/// Whatever yields the next chunk; `size` is what it will yield in all.
pub(crate) struct Reader {
    pub(crate) size: u64,
    /// The task that fetches ahead, where there is one.
    pub(crate) feed: Option<AbortHandle>,
    pub(crate) next: Box<dyn FnMut() -> Option<Result<Bytes, StorageError>> + Send>,
}

impl Weights {
    fn new(
        reader: Reader,
        origin: Origin,
        beside: Option<String>,
        wanted: Option<[u8; 32]>,
        progress: Arc<Progress>,
    ) -> Self {
        let size = reader.size;
        progress.total.store(size, Ordering::Relaxed);
        progress.arrived.store(0, Ordering::Relaxed);
        Self {
            reader,
            origin,
            beside,
            progress,
            size,
            seen: 0,
            hash: Sha256::new(),
            wanted,
            digest: None,
            cached: None,
            pending: None,
            cancelled: Arc::default(),
            over: false,
        }
    }

    /// A read of a cache entry, which must still have the digest that it was written with.
    fn expecting(mut self, cache: Cache, digest: [u8; 32]) -> Self {
        self.cached = Some((cache, digest));
        self
    }

    /// Lets whoever waits for this read give it up.
    pub fn cancel_on_drop(&self) -> CancelOnDrop {
        CancelOnDrop {
            cancelled: self.cancelled.clone(),
            feed: self.reader.feed.clone(),
        }
    }

    pub fn origin(&self) -> Origin {
        self.origin
    }

    /// The text of the `config.json` next to the weights, where there is one.
    pub fn beside(&self) -> Option<&str> {
        self.beside.as_deref()
    }

    /// Bytes in all.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// SHA-256 of all bytes, once the end was reached.
    pub fn digest(&self) -> Option<[u8; 32]> {
        self.digest
    }

    fn verify(&mut self) -> Result<(), StorageError> {
        if self.seen != self.size {
            return Err(StorageError::Truncated {
                expected: self.size,
                actual: self.seen,
            });
        }
        let digest: [u8; 32] = std::mem::take(&mut self.hash).finalize().into();
        if let Some((cache, expected)) = &self.cached
            && digest != *expected
        {
            cache.put_aside();
            return Err(StorageError::CacheCorrupt);
        }
        if let Some(expected) = self.wanted.filter(|&w| w != digest) {
            return Err(StorageError::Digest {
                expected: hex(&expected),
                actual: hex(&digest),
            });
        }
        self.digest = Some(digest);
        Ok(())
    }

    /// Makes what was read the cache's entry. Called when the bytes have proved to be usable weights: the
    /// cache never holds what could not be served.
    ///
    /// A cache that cannot be written is logged and does not matter to the caller.
    pub fn keep(mut self) {
        if let (Some(pending), Some(digest)) = (self.pending.take(), self.digest)
            && let Err(error) = pending.publish(digest)
        {
            tracing::warn!(error = %error, "the model is not cached");
        }
    }

    /// Puts a cached copy aside of which no model could be made. What is kept was a model once, so it is
    /// damaged, and where the damage is in the header it shows before the digest does. False: not from the cache.
    pub fn put_aside(&self) -> bool {
        let Some((cache, _)) = &self.cached else {
            return false;
        };
        cache.put_aside();
        true
    }

    fn advance(&mut self, chunk: &Bytes) {
        self.seen += chunk.len() as u64;
        self.hash.update(chunk);
        if self.origin != Origin::Store {
            // What comes over the network is counted as it arrives, not as it is taken.
            self.progress.arrived.store(self.seen, Ordering::Relaxed);
        }
        if let Some(pending) = &mut self.pending
            && let Err(error) = pending.write(chunk)
        {
            tracing::warn!(error = %error, "the model is not cached");
            self.pending = None;
        }
    }
}

impl Iterator for &mut Weights {
    type Item = Result<Bytes, StorageError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.over {
            return None;
        }
        let next = (self.reader.next)();
        if self.cancelled.load(Ordering::Relaxed) {
            self.over = true;
            return Some(Err(StorageError::Cancelled));
        }
        match next {
            Some(Ok(chunk)) => {
                self.advance(&chunk);
                return Some(Ok(chunk));
            }
            Some(Err(error)) => {
                self.over = true;
                // A cached file that is short or unreadable is as bad as one with wrong bytes.
                if let Some((cache, _)) = &self.cached {
                    cache.put_aside();
                    return Some(Err(StorageError::CacheCorrupt));
                }
                return Some(Err(error));
            }
            None => self.over = true,
        }
        self.verify().err().map(Err)
    }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The 32 bytes of a SHA-256 in hexadecimal.
pub fn parse_digest(text: &str) -> Option<[u8; 32]> {
    let mut digest = [0; 32];
    if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, pair) in digest.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(digest)
}
