//! One remote object, by ranges that are all of the same version.
//!
//! The first request asks for the first MB and learns size and version from its answer; every other range is
//! pinned to that version (If-Match), and its answer is checked against it, for there are stores that ignore the
//! condition. A range that breaks off goes on where it stopped; one that stalls is given up and asked for again.

use super::client::Location;
use super::digest::CHUNK_BYTES;
use super::error::is_out_of_range;
use super::plan::Chunk;
use super::{Progress, StorageConfig, StorageError};
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use object_store::{GetOptions, GetRange, GetResult, ObjectMeta, ObjectStoreExt as _};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::time::{sleep, timeout};

const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// A range that comes more slowly than this, its stall time-out apart, is asked for again over another connection.
const BYTES_A_SECOND_MIN: u64 = 256 << 10;
/// How often a store may refuse what it has allowed before: credentials expire, and the client gets new ones.
const DENIED_TRIES: u32 = 3;
/// The most that the first request may ask for. No chunk is smaller, so its answer never reaches into a second one.
pub(super) const FIRST_BYTES_MAX: u64 = *CHUNK_BYTES.start();
/// A `config.json` is some hundred bytes; the manifest of 1 TB in chunks of 8 MB has 9 MB.
const SMALL_BYTES_MAX: u64 = 16 << 20;

pub(super) type Body = BoxStream<'static, object_store::Result<Bytes>>;

/// What tells one state of an object from another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Version {
    pub(super) size: u64,
    pub(super) etag: Option<String>,
    pub(super) modified: i64,
    pub(super) revision: Option<String>,
}

impl Version {
    fn new(meta: &ObjectMeta, revision: Option<String>) -> Self {
        Self {
            size: meta.size,
            etag: meta.e_tag.clone(),
            modified: meta.last_modified.timestamp(),
            revision,
        }
    }

    /// Whether another answer is about the same state.
    fn matches(&self, meta: &ObjectMeta) -> bool {
        self.size == meta.size
            && match (&self.etag, &meta.e_tag) {
                (Some(a), Some(b)) => a == b,
                _ => self.modified == meta.last_modified.timestamp(),
            }
    }

    /// Whether the store can be asked later if this is still the current state.
    pub(super) fn is_identity(&self) -> bool {
        self.etag.is_some() || self.revision.is_some()
    }

    /// RFC 9110 wants a strong validator in If-Match.
    fn strong_etag(&self) -> Option<String> {
        self.etag.clone().filter(|etag| !etag.starts_with("W/"))
    }
}

pub(super) enum Opened {
    /// It is as it was when `known` was fetched.
    Unchanged,
    /// The object, and the body of its first answer.
    Object(Box<Remote>, Body),
}

/// An object at one version.
pub(super) struct Remote {
    pub(super) location: Location,
    pub(super) version: Version,
    /// Whether the store answers ranges. Else its first body is all there is.
    pub(super) ranged: bool,
    config: StorageConfig,
    progress: Arc<Progress>,
}

/// Makes the first request, conditional where a version is known already.
pub(super) async fn open(
    location: Location,
    known: Option<&Version>,
    config: &StorageConfig,
    progress: &Arc<Progress>,
) -> Result<Opened, StorageError> {
    if let (Some(revision), Some(known)) = (&location.revision, known)
        && known.revision.as_ref() == Some(revision)
    {
        return Ok(Opened::Unchanged);
    }
    let first = || first_answer(&location, known, config);
    let (result, ranged) = retried(&location, config, first).await?;
    let Some(result) = result else {
        return Ok(Opened::Unchanged);
    };
    let version = Version::new(&result.meta, location.revision.clone());
    // A store that ignores If-None-Match sends the object again; its body is dropped unread.
    if version.is_identity() && known == Some(&version) {
        return Ok(Opened::Unchanged);
    }
    let remote = Remote {
        location,
        version,
        ranged,
        config: config.clone(),
        progress: progress.clone(),
    };
    Ok(Opened::Object(Box::new(remote), result.into_stream()))
}

/// Tries until it succeeds, fails for good, or has failed often enough.
async fn retried<T, F: Future<Output = Result<T, StorageError>>>(
    location: &Location,
    config: &StorageConfig,
    attempt: impl Fn() -> F,
) -> Result<T, StorageError> {
    let mut failed = 0;
    loop {
        match attempt().await {
            Err(error) if error.is_transient() && failed + 1 < config.attempts_max => {
                tracing::debug!(uri = location.uri, failed, error = %error, "a request is made again");
                pause(location, failed).await;
                failed += 1;
            }
            result => return result,
        }
    }
}

/// The first answer, and whether it is a range; none: not modified.
async fn first_answer(
    location: &Location,
    known: Option<&Version>,
    config: &StorageConfig,
) -> Result<(Option<GetResult>, bool), StorageError> {
    let if_none_match = known.and_then(|k| k.etag.clone());
    let range = Some(GetRange::Bounded(
        0..config.first_bytes.clamp(1, FIRST_BYTES_MAX),
    ));
    let options = GetOptions {
        if_none_match: if_none_match.clone(),
        range,
        ..GetOptions::default()
    };
    match request(location, options, config).await {
        Ok(result) => Ok((Some(result), true)),
        Err(Failed::Store(object_store::Error::NotModified { .. })) => Ok((None, true)),
        // A plain file server without ranges: one answer with everything in it.
        Err(Failed::Store(object_store::Error::NotSupported { .. })) => {
            let options = GetOptions {
                if_none_match,
                ..GetOptions::default()
            };
            request(location, options, config)
                .await
                .map(|result| (Some(result), false))
                .map_err(|e| e.into_error(location))
        }
        Err(other) => Err(other.into_error(location)),
    }
}

enum Failed {
    Store(object_store::Error),
    Stalled(Duration),
}

#[derive(Debug, thiserror::Error)]
#[error("too few bytes for {0:?}")]
struct Stalled(Duration);

impl Failed {
    fn into_error(self, location: &Location) -> StorageError {
        match self {
            Self::Store(error) => StorageError::store(&location.uri, error),
            Self::Stalled(after) => StorageError::Unavailable {
                uri: location.uri.clone(),
                source: Arc::new(Stalled(after)),
            },
        }
    }
}

async fn request(
    location: &Location,
    options: GetOptions,
    config: &StorageConfig,
) -> Result<GetResult, Failed> {
    let wait = config.connect_timeout + config.stall_timeout;
    match timeout(wait, location.store.get_opts(&location.path, options)).await {
        Ok(result) => result.map_err(Failed::Store),
        Err(_) => Err(Failed::Stalled(wait)),
    }
}

impl Remote {
    /// Reads on until `head` has `n` bytes, from the first body and then by a request of its own.
    ///
    /// # Errors
    /// [`StorageError::Truncated`] if the object is shorter than that.
    pub(super) async fn read_head(
        &self,
        head: &mut Vec<u8>,
        body: &mut Option<Body>,
        n: usize,
    ) -> Result<(), StorageError> {
        if n as u64 > self.version.size {
            return Err(StorageError::Truncated {
                expected: n as u64,
                actual: self.version.size,
            });
        }
        let mut failed = 0;
        while head.len() < n {
            let before = head.len();
            let outcome = self.read_head_once(head, body, n).await;
            failed = if head.len() > before { 0 } else { failed + 1 };
            match outcome {
                Ok(()) => {}
                Err(error) if self.may_go_on(&error, failed) => {
                    *body = None;
                    pause(&self.location, failed).await;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn read_head_once(
        &self,
        head: &mut Vec<u8>,
        body: &mut Option<Body>,
        n: usize,
    ) -> Result<(), StorageError> {
        let body = match body {
            Some(body) => body,
            None => body.insert(self.range(head.len() as u64..n as u64).await?),
        };
        while head.len() < n {
            match self.next(body).await? {
                Some(bytes) => head.extend_from_slice(&bytes),
                None => {
                    return Err(StorageError::Truncated {
                        expected: n as u64,
                        actual: head.len() as u64,
                    });
                }
            }
        }
        Ok(())
    }

    /// Fills the rest of a chunk. `body` is an answer that goes on where the chunk does, if there is one.
    pub(super) async fn read_chunk(
        &self,
        chunk: &mut Chunk<'_>,
        mut body: Option<Body>,
    ) -> Result<(), StorageError> {
        let mut failed = 0;
        while !chunk.is_full() {
            let before = chunk.rest().start;
            let outcome = self.read_chunk_once(chunk, body.take()).await;
            // What is going forward may go on; what is not gets a bounded number of tries.
            failed = if chunk.rest().start > before {
                0
            } else {
                failed + 1
            };
            match outcome {
                Ok(()) => {}
                Err(error) if self.may_go_on(&error, failed) => {
                    tracing::debug!(uri = self.location.uri, at = chunk.rest().start, failed, error = %error, "a range is asked for again");
                    pause(&self.location, failed).await;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn read_chunk_once(
        &self,
        chunk: &mut Chunk<'_>,
        body: Option<Body>,
    ) -> Result<(), StorageError> {
        let first = body.is_some();
        let mut body = match body {
            Some(body) => body,
            None => self.range(chunk.rest()).await?,
        };
        let missing = chunk.rest().end - chunk.rest().start;
        let wait = Duration::from_secs(missing / BYTES_A_SECOND_MIN) + self.config.stall_timeout;
        let deadline = Instant::now() + wait;
        while let Some(bytes) = self.next(&mut body).await? {
            if Instant::now() > deadline {
                return Err(Failed::Stalled(wait).into_error(&self.location));
            }
            let rest = chunk.write(&bytes);
            self.progress.add(bytes.len() - rest.len());
            if !rest.is_empty() {
                return Err(StorageError::Protocol(
                    "more bytes came than were asked for".to_owned(),
                ));
            }
            if chunk.is_full() {
                return Ok(());
            }
        }
        // The first answer was asked for before anybody knew how long the chunk is.
        if first && self.ranged || chunk.is_full() {
            return Ok(());
        }
        Err(StorageError::Truncated {
            expected: chunk.rest().end,
            actual: chunk.rest().start,
        })
    }

    /// Fills chunks one after the other from a body that holds the whole object: nothing can be asked for again.
    pub(super) async fn read_all(
        &self,
        chunks: &mut [Chunk<'_>],
        mut body: Body,
    ) -> Result<(), StorageError> {
        let mut chunks = chunks.iter_mut().skip_while(|c| c.is_full()).peekable();
        while let Some(bytes) = self.next(&mut body).await? {
            let mut rest = &bytes[..];
            self.progress.add(rest.len());
            while !rest.is_empty() {
                let Some(chunk) = chunks.peek_mut() else {
                    return Err(StorageError::Protocol(
                        "more bytes came than the store announced".to_owned(),
                    ));
                };
                rest = chunk.write(rest);
                if chunk.is_full() {
                    chunks.next();
                }
            }
        }
        match chunks.peek() {
            None => Ok(()),
            Some(chunk) => Err(StorageError::Truncated {
                expected: self.version.size,
                actual: chunk.rest().start,
            }),
        }
    }

    fn may_go_on(&self, error: &StorageError, failed: u32) -> bool {
        let tries = match error {
            StorageError::Changed => 0,
            StorageError::Denied { .. } => DENIED_TRIES,
            error if error.is_transient() => self.config.attempts_max,
            _ => 0,
        };
        self.ranged && failed < tries
    }

    /// The body of a range of this version.
    async fn range(&self, range: Range<u64>) -> Result<Body, StorageError> {
        let options = GetOptions {
            range: Some(GetRange::Bounded(range)),
            if_match: self.version.strong_etag(),
            ..GetOptions::default()
        };
        let result = request(&self.location, options, &self.config)
            .await
            .map_err(|e| match e {
                // The range was in the object before: a shorter one has taken its place, in a store that ignores the
                // condition.
                Failed::Store(error) if is_out_of_range(&error) => StorageError::Changed,
                other => other.into_error(&self.location),
            })?;
        if !self.version.matches(&result.meta) {
            return Err(StorageError::Changed);
        }
        Ok(result.into_stream())
    }

    /// The next bytes of a body, if they come in time.
    async fn next(&self, body: &mut Body) -> Result<Option<Bytes>, StorageError> {
        let stall = self.config.stall_timeout;
        match timeout(stall, body.next()).await {
            Ok(next) => next
                .transpose()
                .map_err(|e| StorageError::store(&self.location.uri, e)),
            Err(_) => Err(Failed::Stalled(stall).into_error(&self.location)),
        }
    }
}

/// Waits before try `failed`, or longer if the store asked for it.
async fn pause(location: &Location, failed: u32) {
    sleep(backoff(failed).max(location.pause.left(Instant::now()))).await;
}

/// Doubling, half of it random, so that many instances do not come back at once.
fn backoff(failed: u32) -> Duration {
    let whole = BACKOFF_FIRST
        .saturating_mul(1 << failed.min(10))
        .min(BACKOFF_MAX);
    let random = f64::from(getrandom::u32().unwrap_or(u32::MAX / 2)) / f64::from(u32::MAX);
    whole.mul_f64(0.5 + 0.5 * random)
}

/// A whole small file; none if there is no such file.
pub(super) async fn small(
    location: &Location,
    config: &StorageConfig,
) -> Result<Option<Vec<u8>>, StorageError> {
    match retried(location, config, || small_once(location, config)).await {
        Ok(bytes) => Ok(Some(bytes)),
        Err(StorageError::NotFound(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

async fn small_once(location: &Location, config: &StorageConfig) -> Result<Vec<u8>, StorageError> {
    let store = |e| StorageError::store(&location.uri, e);
    let read = async {
        let result = location.store.get(&location.path).await.map_err(store)?;
        if result.meta.size > SMALL_BYTES_MAX {
            return Err(StorageError::Protocol(format!(
                "`{}` has {} bytes, at most {SMALL_BYTES_MAX} are read",
                location.uri, result.meta.size
            )));
        }
        Ok(result.bytes().await.map_err(store)?.to_vec())
    };
    timeout(config.connect_timeout + config.stall_timeout, read)
        .await
        .map_err(|_| Failed::Stalled(config.stall_timeout).into_error(location))?
}

/// The same for a file that few have: a store that may not be listed answers 403 for what is not there.
pub(super) async fn small_if_there(
    location: &Location,
    config: &StorageConfig,
) -> Result<Option<Vec<u8>>, StorageError> {
    match small(location, config).await {
        Err(StorageError::Denied { .. } | StorageError::Unexpected { .. }) => Ok(None),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_stay_bounded() {
        for failed in 0..40 {
            let wait = backoff(failed);
            assert!(wait <= BACKOFF_MAX && wait >= BACKOFF_FIRST / 2, "{wait:?}");
        }
    }
}
