//! Moves the bytes of opened files into the caller's memory: many chunks at once, each checked as it lands.
//!
//! A few threads, one a processor, each drive their share of the connections and copy what comes straight to where
//! it belongs; so a byte is in the cache of the processor that copies and checks it. Two more threads follow them
//! where they are needed: one computes a SHA-256 in order, one writes the disk cache. Nothing is given back before
//! all of it is verified.

use super::cache::Partial;
use super::digest::{Expected, hex};
use super::fetch::{Body, Remote};
use super::plan::{Chunk, Landed, Segment, chunks};
use super::{OpenFile, Progress, Source, StorageConfig, StorageError};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use sha2::{Digest as _, Sha256};
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Threads that fetch; more than this do not make a network faster.
const LANES_MAX: usize = 8;
/// How often a chunk with a wrong digest is fetched again: a byte may flip on the way, but not every time.
const DIGEST_TRIES: u32 = 2;
/// Objects up to this size are hashed even where nobody gave a digest: it costs milliseconds, and gives the model
/// a version that does not depend on where it came from.
const HASHED_ANYWAY_BYTES: u64 = 64 << 20;
/// How much longer than the fetch the disk cache may take before the rest of it is left to the next start.
const CACHE_GRACE: Duration = Duration::from_millis(200);

/// How a file's bytes were verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verified {
    /// Nobody gave a digest: length, header and version were checked.
    Length,
    /// Every chunk, against a manifest.
    Chunks,
    Sha256,
}

/// What is known of a file once all of it has arrived.
pub(super) struct Filled {
    pub(super) sha256: Option<[u8; 32]>,
    pub(super) verified: Verified,
}

/// One file's part in the transfer.
struct Task<'f> {
    source: Where<'f>,
    expected: &'f Expected,
    /// BLAKE3 of chunks on a disk, where they have one.
    on_disk: Vec<Option<[u8; 32]>>,
    /// The last chunk's index tells how many there are.
    count: usize,
    hashed: bool,
}

#[derive(Clone, Copy)]
enum Where<'f> {
    Disk(&'f File),
    Store(&'f Remote),
}

struct Job<'a> {
    file: usize,
    chunk: Chunk<'a>,
    body: Option<Body>,
}

/// A chunk that has landed and may be hashed and written to the cache.
#[derive(Clone)]
struct Message<'a> {
    file: usize,
    chunk: Landed<'a>,
    digest: Option<[u8; 32]>,
    /// Whether it came from the very file that the cache would write.
    from_cache: bool,
}

struct Transfer<'f, 'a> {
    tasks: Vec<Task<'f>>,
    config: &'f StorageConfig,
    progress: &'f Progress,
    stop: &'f watch::Sender<bool>,
    failure: Mutex<Option<StorageError>>,
    disk: Mutex<VecDeque<Job<'a>>>,
    network: Mutex<VecDeque<Job<'a>>>,
    /// Objects without ranges: all chunks of each.
    streams: Mutex<Vec<(usize, Vec<Chunk<'a>>, Body)>>,
}

/// Fills all segments of all files. Blocks.
pub(super) fn fill(
    files: &mut [OpenFile],
    segments: Vec<Vec<Segment<'_>>>,
    config: &StorageConfig,
    progress: &Progress,
    stop: &watch::Sender<bool>,
) -> Result<Vec<Filled>, StorageError> {
    let started = Instant::now();
    let mut partials: Vec<Option<Partial>> = files.iter_mut().map(|f| f.partial.take()).collect();
    let outcome = {
        let mut bodies: Vec<Option<Body>> = files.iter_mut().map(|f| f.body.take()).collect();
        let tasks = files
            .iter()
            .zip(&partials)
            .map(|(f, partial)| Task::new(f, partial.as_ref()))
            .collect();
        let transfer = Transfer {
            tasks,
            config,
            progress,
            stop,
            failure: Mutex::default(),
            disk: Mutex::default(),
            network: Mutex::default(),
            streams: Mutex::default(),
        };
        for (i, segments) in segments.into_iter().enumerate() {
            transfer.enqueue(i, &files[i], segments, bodies[i].take())?;
        }
        transfer.run(&mut partials, started)
    };
    for (file, partial) in files.iter_mut().zip(partials) {
        match (&outcome, partial) {
            // Bytes that proved wrong are not what the next start should go on with.
            (Err(StorageError::Digest { .. } | StorageError::Protocol(_)), Some(partial)) => {
                partial.discard();
            }
            (_, partial) => file.partial = partial,
        }
    }
    outcome
}

impl<'f> Task<'f> {
    fn new(file: &'f OpenFile, partial: Option<&Partial>) -> Self {
        let count = super::plan::chunk_count(file.size, file.chunk_bytes);
        let hashed = file.expected.sha256.is_some()
            || file.expected.manifest.is_none() && file.size <= HASHED_ANYWAY_BYTES;
        let none = || vec![None; count];
        let (source, on_disk) = match &file.source {
            Source::Disk { file: disk, blake3 } => (
                Where::Disk(disk),
                blake3
                    .as_ref()
                    .map_or_else(none, |b| b.iter().copied().map(Some).collect()),
            ),
            Source::Store(remote) => (
                Where::Store(remote),
                partial.map_or_else(none, |p| p.done().to_vec()),
            ),
        };
        Self {
            source,
            expected: &file.expected,
            on_disk,
            count,
            hashed,
        }
    }

    /// What a chunk must be, by whoever vouches for it.
    fn promised(&self, index: usize) -> Option<[u8; 32]> {
        let manifest = self.expected.manifest.as_ref()?;
        manifest.blake3.get(index).copied()
    }
}

impl<'f, 'a> Transfer<'f, 'a> {
    /// Cuts a file into jobs. What has been read of it already is written to its place.
    fn enqueue(
        &self,
        file: usize,
        open: &OpenFile,
        segments: Vec<Segment<'a>>,
        body: Option<Body>,
    ) -> Result<(), StorageError> {
        let mut cut = chunks(open.size, open.chunk_bytes, segments)?;
        let task = &self.tasks[file];
        if let Where::Disk(_) = task.source {
            let jobs = cut.into_iter().map(|chunk| Job {
                file,
                chunk,
                body: None,
            });
            lock(&self.disk).extend(jobs);
            return Ok(());
        }
        let mut rest = &open.head[..];
        for chunk in &mut cut {
            rest = chunk.write(rest);
            if rest.is_empty() {
                break;
            }
        }
        self.progress.add(open.head.len());
        if let (Where::Store(remote), Some(body)) = (task.source, body) {
            if !remote.ranged {
                lock(&self.streams).push((file, cut, body));
                return Ok(());
            }
            // The answer that goes on where the head ended belongs to the first chunk that is not full.
            let mut body = Some(body);
            let jobs = cut.into_iter().map(|chunk| Job {
                file,
                body: if chunk.is_full() { None } else { body.take() },
                chunk,
            });
            self.sort(jobs);
        } else {
            self.sort(cut.into_iter().map(|chunk| Job {
                file,
                chunk,
                body: None,
            }));
        }
        Ok(())
    }

    /// To the disk what an earlier process left there, to the network what it did not.
    fn sort(&self, jobs: impl Iterator<Item = Job<'a>>) {
        let (mut disk, mut network) = (lock(&self.disk), lock(&self.network));
        for job in jobs {
            let known = self.tasks[job.file].on_disk[job.chunk.index].is_some();
            let fresh = job.chunk.rest().start == job.chunk.range.start;
            if known && fresh {
                disk.push_back(job);
            } else {
                network.push_back(job);
            }
        }
    }

    fn run(
        &self,
        partials: &mut [Option<Partial>],
        started: Instant,
    ) -> Result<Vec<Filled>, StorageError> {
        let reading: Vec<Option<File>> = partials
            .iter()
            .map(|p| p.as_ref().and_then(|p| p.data().try_clone().ok()))
            .collect();
        let caching = partials.iter().any(Option::is_some);
        let hashing = self.tasks.iter().any(|t| t.hashed);
        let give_up_at = Mutex::new(None);
        std::thread::scope(|scope| {
            let (to_hasher, hashed) = channel::<Message<'a>>();
            let (to_writer, written) = channel::<Message<'a>>();
            let hasher = hashing.then(|| scope.spawn(|| self.hash(hashed)));
            let give_up_at = &give_up_at;
            let writer = caching.then(|| scope.spawn(move || write(partials, written, give_up_at)));
            let to = Outlets {
                hasher: hashing.then_some(to_hasher),
                writer: caching.then_some(to_writer),
            };
            // What lies on the disk first: it may turn out to be damaged, and is fetched then like the rest.
            let jobs = lock(&self.disk).len();
            let reading = &reading;
            self.lanes(scope, jobs, &to, |lane| self.disk_lane(reading, lane));
            let jobs = lock(&self.network).len() + lock(&self.streams).len();
            self.lanes(scope, jobs, &to, move |lane| {
                if let Err(error) = self.network_lane(jobs, lane) {
                    self.fail(error);
                }
            });
            drop(to);
            let digests = hasher.map(|h| h.join().unwrap_or_default());
            let grace = CACHE_GRACE.max(started.elapsed() / 10);
            *lock(give_up_at) = Some(Instant::now() + grace);
            if let Some(writer) = writer {
                let _ = writer.join();
            }
            if let Some(error) = lock(&self.failure).take() {
                return Err(error);
            }
            if *self.stop.borrow() {
                return Err(StorageError::Cancelled);
            }
            self.judge(digests.unwrap_or_default())
        })
    }

    /// Runs lanes on as many threads as there is work for, this one among them.
    fn lanes<'scope>(
        &'scope self,
        scope: &'scope std::thread::Scope<'scope, '_>,
        jobs: usize,
        to: &Outlets<'a>,
        lane: impl Fn(&Outlets<'a>) + Send + Sync + 'scope + Copy,
    ) where
        'a: 'scope,
        'f: 'scope,
    {
        if jobs == 0 {
            return;
        }
        let others: Vec<_> = (1..lane_count(jobs))
            .map(|_| {
                let to = to.clone();
                scope.spawn(move || lane(&to))
            })
            .collect();
        lane(to);
        for other in others {
            if other.join().is_err() {
                self.fail(StorageError::Protocol(
                    "a fetching thread panicked".to_owned(),
                ));
            }
        }
    }

    fn disk_lane(&self, partials: &[Option<File>], to: &Outlets<'a>) {
        while !self.is_over() {
            let Some(mut job) = lock(&self.disk).pop_front() else {
                return;
            };
            let task = &self.tasks[job.file];
            let (file, own) = match task.source {
                Where::Disk(file) => (file, false),
                Where::Store(..) => match &partials[job.file] {
                    Some(file) => (file, true),
                    None => {
                        lock(&self.network).push_back(job);
                        continue;
                    }
                },
            };
            let index = job.chunk.index;
            let expected = task.promised(index).or(task.on_disk[index]);
            if expected.is_some() {
                job.chunk.hash_on_the_way();
            }
            let read = job.chunk.read_from(file);
            let right =
                read.is_ok() && expected.is_none_or(|expected| job.chunk.digest() == expected);
            let bytes = job.chunk.range.end - job.chunk.range.start;
            if right {
                self.progress.add(bytes as usize);
                to.land(job.file, job.chunk, expected, own);
            } else if own {
                tracing::warn!(
                    chunk = index,
                    "a chunk of the cache is damaged and is fetched again"
                );
                job.chunk.reset();
                lock(&self.network).push_back(job);
            } else {
                self.fail(match (read, task.on_disk[index]) {
                    (Err(error), None) if error.kind() != std::io::ErrorKind::UnexpectedEof => {
                        StorageError::Read(std::sync::Arc::new(error))
                    }
                    (Err(_), None) => StorageError::Truncated {
                        expected: job.chunk.range.end,
                        actual: job.chunk.range.start,
                    },
                    (Ok(()), None) => wrong_chunk(index),
                    (_, Some(_)) => StorageError::CacheCorrupt,
                });
            }
        }
    }

    fn network_lane(&self, jobs: usize, to: &Outlets<'a>) -> Result<(), StorageError> {
        // A runtime of its own, and with it a pool of connections: this thread reads the sockets, and copies what it has
        // just read.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| StorageError::Read(std::sync::Arc::new(e)))?;
        let wide = self.config.range_concurrency.div_ceil(lane_count(jobs));
        let mut stop = self.stop.subscribe();
        runtime.block_on(async {
            tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => Ok(()),
                result = self.fetch_all(wide, to) => result,
            }
        })
    }

    async fn fetch_all(&self, wide: usize, to: &Outlets<'a>) -> Result<(), StorageError> {
        while let Some((file, mut chunks, body)) = { lock(&self.streams).pop() } {
            let Where::Store(remote) = self.tasks[file].source else {
                continue;
            };
            for chunk in &mut chunks {
                if self.wants_digest(file, chunk.index, to) {
                    chunk.hash_on_the_way();
                }
            }
            remote.read_all(&mut chunks, body).await?;
            for chunk in chunks {
                let digest = self.digest(file, &chunk, to);
                if digest.is_some_and(|d| self.tasks[file].promised(chunk.index).unwrap_or(d) != d)
                {
                    return Err(wrong_chunk(chunk.index));
                }
                to.land(file, chunk, digest, false);
            }
        }
        let mut running = FuturesUnordered::new();
        loop {
            while running.len() < wide
                && let Some(job) = { lock(&self.network).pop_front() }
            {
                running.push(self.fetch(job, to));
            }
            match running.next().await {
                Some(result) => result?,
                None => return Ok(()),
            }
        }
    }

    async fn fetch(&self, mut job: Job<'a>, to: &Outlets<'a>) -> Result<(), StorageError> {
        let task = &self.tasks[job.file];
        let Where::Store(remote) = task.source else {
            return Ok(());
        };
        if self.wants_digest(job.file, job.chunk.index, to) {
            job.chunk.hash_on_the_way();
        }
        for _ in 0..DIGEST_TRIES {
            remote.read_chunk(&mut job.chunk, job.body.take()).await?;
            let digest = self.digest(job.file, &job.chunk, to);
            let promised = task.promised(job.chunk.index);
            if promised.is_none_or(|promised| Some(promised) == digest) {
                to.land(job.file, job.chunk, digest, false);
                return Ok(());
            }
            tracing::warn!(
                chunk = job.chunk.index,
                "a chunk arrived with a wrong digest"
            );
            self.progress
                .take_back(job.chunk.range.end - job.chunk.range.start);
            job.chunk.reset();
        }
        Err(wrong_chunk(job.chunk.index))
    }

    /// A chunk's digest, where somebody needs it.
    fn digest(&self, file: usize, chunk: &Chunk<'_>, to: &Outlets<'_>) -> Option<[u8; 32]> {
        self.wants_digest(file, chunk.index, to)
            .then(|| chunk.digest())
    }

    fn wants_digest(&self, file: usize, index: usize, to: &Outlets<'_>) -> bool {
        self.tasks[file].promised(index).is_some() || to.writer.is_some()
    }

    /// SHA-256 of each file that wants one, over its chunks in order.
    fn hash(&self, landed: Receiver<Message<'a>>) -> HashMap<usize, [u8; 32]> {
        struct Order<'a> {
            next: usize,
            early: HashMap<usize, Landed<'a>>,
            sha256: Sha256,
        }
        let mut orders: HashMap<usize, Order<'a>> = HashMap::new();
        for Message { file, chunk, .. } in landed {
            if !self.tasks[file].hashed || self.is_over() {
                continue;
            }
            let order = orders.entry(file).or_insert_with(|| Order {
                next: 0,
                early: HashMap::new(),
                sha256: Sha256::new(),
            });
            order.early.insert(chunk.index, chunk);
            while let Some(chunk) = order.early.remove(&order.next) {
                for piece in chunk.pieces {
                    order.sha256.update(piece);
                }
                order.next += 1;
            }
        }
        let done = orders
            .into_iter()
            .filter(|(file, order)| order.next == self.tasks[*file].count);
        done.map(|(file, order)| (file, order.sha256.finalize().into()))
            .collect()
    }

    fn judge(&self, digests: HashMap<usize, [u8; 32]>) -> Result<Vec<Filled>, StorageError> {
        let empty: [u8; 32] = Sha256::digest([]).into();
        let judge = |(i, task): (usize, &Task<'_>)| {
            let computed = match digests.get(&i) {
                None if task.count == 0 => Some(empty),
                digest => digest.copied(),
            };
            if let Some(expected) = task.expected.sha256 {
                return match computed {
                    Some(actual) if actual == expected => Ok(Filled {
                        sha256: computed,
                        verified: Verified::Sha256,
                    }),
                    Some(actual) => Err(StorageError::Digest {
                        expected: hex(&expected),
                        actual: hex(&actual),
                    }),
                    None => Err(StorageError::Cancelled),
                };
            }
            Ok(match &task.expected.manifest {
                Some(manifest) => Filled {
                    sha256: Some(manifest.sha256),
                    verified: Verified::Chunks,
                },
                None => Filled {
                    sha256: computed,
                    verified: Verified::Length,
                },
            })
        };
        self.tasks.iter().enumerate().map(judge).collect()
    }

    /// The first error is the one that counts; it stops everyone.
    fn fail(&self, error: StorageError) {
        lock(&self.failure).get_or_insert(error);
        self.stop.send_replace(true);
    }

    fn is_over(&self) -> bool {
        *self.stop.borrow()
    }
}

/// As many lanes as there is work for, one a processor.
fn lane_count(jobs: usize) -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    processors.min(LANES_MAX).min(jobs).max(1)
}

fn wrong_chunk(index: usize) -> StorageError {
    StorageError::Chunk { index }
}

/// Where chunks go once they have landed.
#[derive(Clone)]
struct Outlets<'a> {
    hasher: Option<Sender<Message<'a>>>,
    writer: Option<Sender<Message<'a>>>,
}

impl<'a> Outlets<'a> {
    fn land(&self, file: usize, chunk: Chunk<'a>, digest: Option<[u8; 32]>, from_cache: bool) {
        let message = Message {
            file,
            chunk: chunk.land(),
            digest,
            from_cache,
        };
        // A receiver that is gone has failed and said so.
        if let Some(hasher) = &self.hasher {
            let _ = hasher.send(message.clone());
        }
        if let Some(writer) = &self.writer {
            let _ = writer.send(message);
        }
    }
}

/// Writes the cache behind the load. It has no say in the load: a disk that fails or is too slow costs the next start a
/// download, not this one its answer.
fn write(
    partials: &mut [Option<Partial>],
    landed: Receiver<Message<'_>>,
    give_up_at: &Mutex<Option<Instant>>,
) {
    for message in landed {
        if lock(give_up_at).is_some_and(|at| Instant::now() > at) {
            tracing::info!("the disk is slower than the load; the next start fetches the rest");
            return;
        }
        let (Some(partial), Some(digest), false) = (
            &mut partials[message.file],
            message.digest,
            message.from_cache,
        ) else {
            continue;
        };
        if let Err(error) = partial.write(&message.chunk, digest) {
            tracing::warn!(error = %crate::telemetry::chain(&error), "the model is not cached");
            if let Some(partial) = partials[message.file].take() {
                partial.discard();
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
