//! One object, by many ranges at once, given out in order.
//!
//! The first request asks for the first range and learns size and version from its answer; every other range
//! is pinned to that version (If-Match), and its answer is checked against it, for there are stores that
//! ignore the condition. A range that breaks off goes on where it stopped.

use super::client::Location;
use super::error::is_out_of_range;
use super::{Progress, Reader, StorageConfig, StorageError};
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use object_store::{GetOptions, GetRange, GetResult, ObjectMeta, ObjectStoreExt as _};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// A `config.json` is some hundred bytes.
const SMALL_BYTES_MAX: u64 = 1 << 20;

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

/// An object whose first answer has begun to arrive.
pub(super) struct Object {
    pub(super) location: Location,
    pub(super) version: Version,
    first: BoxStream<'static, object_store::Result<Bytes>>,
    /// Whether the store answers ranges.
    ranged: bool,
}

pub(super) enum Opened {
    /// It is as it was when `known` was fetched.
    Unchanged,
    Object(Object),
}

/// Makes the first request, conditional where a version is known already.
pub(super) async fn open(
    location: Location,
    known: Option<&Version>,
    config: &StorageConfig,
) -> Result<Opened, StorageError> {
    if let (Some(revision), Some(known)) = (&location.revision, known)
        && known.revision.as_ref() == Some(revision)
    {
        return Ok(Opened::Unchanged);
    }
    let mut attempt = 0;
    let (result, ranged) = loop {
        match first_answer(&location, known, config).await {
            Ok(answer) => break answer,
            Err(error) if error.is_transient() && attempt + 1 < config.attempts_max => {
                tracing::debug!(attempt, error = %error, "the first request is made again");
                sleep(backoff(attempt)).await;
                attempt += 1;
            }
            Err(error) => return Err(error),
        }
    };
    let Some(result) = result else {
        return Ok(Opened::Unchanged);
    };
    let version = Version::new(&result.meta, location.revision.clone());
    // A store that ignores If-None-Match sends the object again; its body is dropped unread.
    if version.is_identity() && known == Some(&version) {
        return Ok(Opened::Unchanged);
    }
    Ok(Opened::Object(Object {
        location,
        version,
        first: result.into_stream(),
        ranged,
    }))
}

/// The first answer, and whether it is a range; none: not modified.
async fn first_answer(
    location: &Location,
    known: Option<&Version>,
    config: &StorageConfig,
) -> Result<(Option<GetResult>, bool), StorageError> {
    let if_none_match = known.and_then(|k| k.etag.clone());
    let range = Some(GetRange::Bounded(0..config.range_bytes));
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
#[error("no bytes for {0:?}")]
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
    match timeout(
        config.connect_timeout + config.stall_timeout,
        location.store.get_opts(&location.path, options),
    )
    .await
    {
        Ok(result) => result.map_err(Failed::Store),
        Err(_) => Err(Failed::Stalled(
            config.connect_timeout + config.stall_timeout,
        )),
    }
}

/// The whole object as a blocking reader. A task of the runtime fetches ahead of it, by a bounded number of
/// ranges, and ends when the reader is dropped.
pub(super) fn stream(object: Object, config: StorageConfig, progress: Arc<Progress>) -> Reader {
    let size = object.version.size;
    let (sender, mut receiver) = mpsc::channel(1);
    let feed = tokio::spawn(feed(object, config, progress, sender));
    // The task ends with the reader too: its channel is closed then.
    Reader {
        size,
        feed: Some(feed.abort_handle()),
        next: Box::new(move || receiver.blocking_recv()),
    }
}

async fn feed(
    object: Object,
    config: StorageConfig,
    progress: Arc<Progress>,
    sender: mpsc::Sender<Result<Bytes, StorageError>>,
) {
    let Object {
        location,
        version,
        first,
        ranged,
    } = object;
    let concurrency = config.range_concurrency.max(1);
    let size = version.size;
    let reader = Arc::new(RangeReader {
        location,
        version,
        config,
        progress,
    });
    if !ranged {
        return reader.pass_on(first, &sender).await;
    }
    let mut first = Some(first);
    let mut ranges = split(size, reader.config.range_bytes).into_iter();
    let mut under_way = VecDeque::with_capacity(concurrency);
    loop {
        // Each range is a task of its own: it goes on while the ones before it are being taken.
        while under_way.len() < concurrency
            && let Some(range) = ranges.next()
        {
            let (reader, body) = (reader.clone(), first.take());
            under_way.push_back(AbortOnDrop(tokio::spawn(async move {
                reader.read(range, body).await
            })));
        }
        let Some(next) = under_way.pop_front() else {
            return;
        };
        if !forward(next.join().await, &sender).await {
            return;
        }
    }
}

/// Passes chunks or the error on; false: nobody listens, or it is over.
async fn forward(
    result: Result<Vec<Bytes>, StorageError>,
    sender: &mpsc::Sender<Result<Bytes, StorageError>>,
) -> bool {
    match result {
        Ok(chunks) => {
            for chunk in chunks {
                if sender.send(Ok(chunk)).await.is_err() {
                    return false;
                }
            }
            true
        }
        Err(error) => {
            let _ = sender.send(Err(error)).await;
            false
        }
    }
}

/// A task that does not outlive whoever waits for it.
struct AbortOnDrop<T>(JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl<T> AbortOnDrop<Result<T, StorageError>> {
    async fn join(mut self) -> Result<T, StorageError> {
        (&mut self.0).await.unwrap_or(Err(StorageError::Cancelled))
    }
}

fn split(size: u64, range_bytes: u64) -> Vec<Range<u64>> {
    (0..size)
        .step_by(usize::try_from(range_bytes).unwrap_or(usize::MAX))
        .map(|start| start..(start + range_bytes).min(size))
        .collect()
}

struct RangeReader {
    location: Location,
    version: Version,
    config: StorageConfig,
    progress: Arc<Progress>,
}

impl RangeReader {
    /// A body that comes in one piece, from a store without ranges: nothing can be resumed, and chunks pass as
    /// they come.
    async fn pass_on(
        &self,
        mut body: BoxStream<'static, object_store::Result<Bytes>>,
        sender: &mpsc::Sender<Result<Bytes, StorageError>>,
    ) {
        let stall = self.config.stall_timeout;
        loop {
            let chunk = match timeout(stall, body.next()).await {
                Ok(None) => return,
                Ok(Some(chunk)) => chunk.map_err(|e| StorageError::store(&self.location.uri, e)),
                Err(_) => Err(Failed::Stalled(stall).into_error(&self.location)),
            };
            let over = chunk.is_err();
            if let Ok(chunk) = &chunk {
                self.progress
                    .arrived
                    .fetch_add(chunk.len() as u64, Ordering::Relaxed);
            }
            if sender.send(chunk).await.is_err() || over {
                return;
            }
        }
    }

    /// All chunks of one range. `body` is its answer, where it has one already.
    async fn read(
        &self,
        range: Range<u64>,
        mut body: Option<BoxStream<'static, object_store::Result<Bytes>>>,
    ) -> Result<Vec<Bytes>, StorageError> {
        let mut chunks = Vec::new();
        let mut at = range.start;
        let mut attempt = 0;
        loop {
            let before = at;
            let outcome = self
                .attempt(at..range.end, body.take(), &mut chunks, &mut at)
                .await;
            let error = match outcome {
                Ok(()) if at == range.end => return Ok(chunks),
                Ok(()) => StorageError::Truncated {
                    expected: range.end,
                    actual: at,
                },
                Err(error) => error,
            };
            // What is going forward may go on; what is not gets a bounded number of tries.
            attempt = if at > before { 0 } else { attempt + 1 };
            if !error.is_transient()
                || matches!(error, StorageError::Changed)
                || attempt >= self.config.attempts_max
            {
                return Err(error);
            }
            tracing::debug!(start = at, end = range.end, attempt, error = %error, "a range is asked for again");
            sleep(backoff(attempt)).await;
        }
    }

    async fn attempt(
        &self,
        range: Range<u64>,
        body: Option<BoxStream<'static, object_store::Result<Bytes>>>,
        chunks: &mut Vec<Bytes>,
        at: &mut u64,
    ) -> Result<(), StorageError> {
        let mut body = match body {
            Some(body) => body,
            None => {
                let options = GetOptions {
                    range: Some(GetRange::Bounded(range.clone())),
                    if_match: self.version.strong_etag(),
                    ..GetOptions::default()
                };
                let result = request(&self.location, options, &self.config)
                    .await
                    .map_err(|e| match e {
                        // The range was in the object before: a shorter one has taken its place, in a store
                        // that ignores the condition.
                        Failed::Store(error) if is_out_of_range(&error) => StorageError::Changed,
                        other => other.into_error(&self.location),
                    })?;
                if !self.version.matches(&result.meta) {
                    return Err(StorageError::Changed);
                }
                result.into_stream()
            }
        };
        let stall = self.config.stall_timeout;
        while let Some(chunk) = timeout(stall, body.next())
            .await
            .map_err(|_| Failed::Stalled(stall).into_error(&self.location))?
        {
            let chunk = chunk.map_err(|e| StorageError::store(&self.location.uri, e))?;
            *at += chunk.len() as u64;
            if *at > range.end {
                return Err(StorageError::Protocol(format!(
                    "more bytes than asked for, in {}..{}",
                    range.start, range.end
                )));
            }
            self.progress
                .arrived
                .fetch_add(chunk.len() as u64, Ordering::Relaxed);
            chunks.push(chunk);
        }
        Ok(())
    }
}

/// The wait before try `attempt`: doubling, half of it random, so that many instances do not come back at once.
fn backoff(attempt: u32) -> Duration {
    let whole = BACKOFF_FIRST
        .saturating_mul(1 << attempt.min(10))
        .min(BACKOFF_MAX);
    let random = f64::from(getrandom::u32().unwrap_or(u32::MAX / 2)) / f64::from(u32::MAX);
    whole.mul_f64(0.5 + 0.5 * random)
}

/// A whole small file next to an object.
pub(super) async fn small(
    location: &Location,
    path: &object_store::path::Path,
    config: &StorageConfig,
) -> Result<Vec<u8>, StorageError> {
    let store = |e| StorageError::store(&location.uri, e);
    let read = async {
        let result = location.store.get(path).await.map_err(store)?;
        if result.meta.size > SMALL_BYTES_MAX {
            return Err(StorageError::Protocol(format!(
                "`{path}` has {} bytes, at most {SMALL_BYTES_MAX} are read",
                result.meta.size
            )));
        }
        Ok(result.bytes().await.map_err(store)?.to_vec())
    };
    timeout(config.connect_timeout + config.stall_timeout, read)
        .await
        .map_err(|_| Failed::Stalled(config.stall_timeout).into_error(location))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cover_every_byte_once() {
        for (size, range) in [(0, 8), (1, 8), (8, 8), (9, 8), (1000, 7)] {
            let ranges = split(size, range);
            assert_eq!(ranges.iter().map(|r| r.end - r.start).sum::<u64>(), size);
            assert!(
                ranges
                    .windows(2)
                    .all(|w| w[0].end == w[1].start && w[0].end - w[0].start == range)
            );
        }
    }

    #[test]
    fn waits_grow_and_stay_bounded() {
        for attempt in 0..40 {
            let wait = backoff(attempt);
            assert!(wait <= BACKOFF_MAX && wait >= BACKOFF_FIRST / 2, "{wait:?}");
        }
    }
}
