//! Fetched files on a disk, so that the next start downloads nothing, and an interrupted one only the rest.
//!
//! A file is written chunk by chunk as it arrives, in any order, under a temporary name. A journal beside it
//! gets a record of each chunk after the chunk was written: its digest, and a check of the record itself. Whatever
//! moment the process is killed at, the journal's whole records name chunks that can be read again, and each is checked
//! against its digest before it is used. A complete file is renamed, then its entry, small JSON with all digests: a
//! crash between leaves no entry, never a wrong one.
//!
//! Several processes may share the folder: the journal is locked by whoever writes, and others do without.

use super::digest::{hex, hex_digests, parse_digest};
use super::fetch::Version;
use super::plan::{Landed, chunk_count};
use super::{StorageConfig, StorageError};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Part of the folder's name: another layout gets another folder.
const LAYOUT: &str = "v2";
/// index, BLAKE3 of the chunk, check of the record
const RECORD_BYTES: usize = 4 + 32 + 8;
/// A journal's first line is some hundred bytes.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// The place of one file in the cache.
#[derive(Clone, Debug)]
pub(super) struct Cache {
    dir: PathBuf,
    bytes_max: u64,
    /// Hash of the URI, 32 hexadecimal digits.
    key: String,
    uri: String,
}

/// What the cache holds of a URI.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Entry {
    uri: String,
    pub(super) version: Version,
    file: String,
    pub(super) chunk_bytes: u64,
    #[serde(with = "hex_digests")]
    pub(super) blake3: Vec<[u8; 32]>,
    /// Of the whole file, where it was computed or vouched for.
    sha256: Option<String>,
    /// Whether somebody's digest was checked when the file was fetched.
    pub(super) verified: bool,
    /// The `config.json` next to the weights.
    pub(super) beside: Option<String>,
}

impl Entry {
    pub(super) fn sha256(&self) -> Option<[u8; 32]> {
        self.sha256.as_deref().and_then(parse_digest)
    }
}

/// A journal's first line.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Head {
    uri: String,
    version: Version,
    chunk_bytes: u64,
}

impl Cache {
    /// None where the configuration has no folder, or one that is better not used; the log says why.
    pub(super) fn new(config: &StorageConfig, uri: &str) -> Option<Self> {
        let dir = config.cache_dir.as_ref()?;
        if !config.cache_in_memory
            && let Some(kind) = memory_backed(dir)
        {
            tracing::warn!(dir = %dir.display(), kind, "the cache is off: its folder is in memory, where the weights would be held twice; MODEL_CACHE_IN_MEMORY=true turns it on all the same");
            return None;
        }
        Some(Self {
            dir: dir.join(LAYOUT),
            bytes_max: config.cache_bytes_max,
            key: hex(&Sha256::digest(uri.as_bytes())[..16]),
            uri: uri.to_owned(),
        })
    }

    /// The entry, if there is one and its file has the length that it says.
    pub(super) fn entry(&self) -> Option<Entry> {
        let text = fs::read(self.entry_path()).ok()?;
        let entry: Entry = serde_json::from_slice(&text).ok()?;
        // The name of the file is our own; whatever else stands there was not written by us.
        let ours = entry.uri == self.uri && entry.file == self.data_name(&entry.version);
        let whole =
            fs::metadata(self.dir.join(&entry.file)).is_ok_and(|m| m.len() == entry.version.size);
        let digests = entry.chunk_bytes > 0
            && entry.blake3.len() == chunk_count(entry.version.size, entry.chunk_bytes);
        (ours && whole && digests).then_some(entry)
    }

    /// Opens an entry's file, and notes that it was used.
    pub(super) fn open(&self, entry: &Entry) -> Result<File, StorageError> {
        let path = self.dir.join(&entry.file);
        let file = File::open(&path).map_err(StorageError::io("open", &path))?;
        // The age of the entry decides what leaves first. A read-only cache keeps its order.
        if let Ok(text) = File::options().append(true).open(self.entry_path()) {
            let _ = text.set_modified(SystemTime::now());
        }
        Ok(file)
    }

    /// Moves a damaged entry out of the way; the bytes stay for whoever wants to know why, until room is needed.
    pub(super) fn put_aside(&self, entry: &Entry) {
        let path = self.dir.join(&entry.file);
        let _ = fs::rename(&path, path.with_extension("corrupt"));
        let _ = fs::remove_file(self.entry_path());
        tracing::warn!(uri = %self.uri, "a damaged cache entry was put aside");
    }

    /// Starts a file, or goes on with what an interrupted process left of the same version.
    ///
    /// None where there is nothing to write to: the version has no identity to ask for later, the file is larger
    /// than the cache, or another process is writing it.
    ///
    /// # Errors
    /// What the disk says.
    pub(super) fn begin(
        &self,
        version: &Version,
        chunk_bytes: u64,
    ) -> Result<Option<Partial>, StorageError> {
        if !version.is_identity() {
            return Ok(None);
        }
        if version.size > self.bytes_max {
            tracing::warn!(uri = %self.uri, bytes = version.size, bytes_max = self.bytes_max, "the model is larger than the cache (MODEL_CACHE_MAX_MB)");
            return Ok(None);
        }
        fs::create_dir_all(&self.dir).map_err(StorageError::io("create", &self.dir))?;
        let name = self.data_name(version);
        let path = self.dir.join(&name).with_extension("journal");
        let Some(journal) = lock(&path)? else {
            tracing::info!(uri = %self.uri, "another process is writing this model to the cache");
            return Ok(None);
        };
        self.make_room(version.size, &name)?;
        let head = Head {
            uri: self.uri.clone(),
            version: version.clone(),
            chunk_bytes,
        };
        Partial::open(self.clone(), head, name, journal).map(Some)
    }

    fn entry_path(&self) -> PathBuf {
        self.dir.join(format!("{}.json", self.key))
    }

    /// One name a version: what another version left is never taken for this one's.
    fn data_name(&self, version: &Version) -> String {
        let text = serde_json::to_vec(version).expect("a version is plain data");
        let id = hex(&Sha256::digest(text)[..8]);
        format!("{}-{id}.safetensors", self.key)
    }

    /// Removes what was used longest ago until `bytes` more fit, and what no entry needs any more.
    fn make_room(&self, bytes: u64, keep: &str) -> Result<(), StorageError> {
        let list = fs::read_dir(&self.dir).map_err(StorageError::io("list", &self.dir))?;
        let mut entries = Vec::new();
        let mut needed = std::collections::HashSet::new();
        let mut loose = Vec::new();
        for path in list.flatten().map(|e| e.path()) {
            if path.extension().is_some_and(|e| e == "json") {
                let entry = fs::read(&path)
                    .ok()
                    .and_then(|text| serde_json::from_slice::<Entry>(&text).ok());
                if let Some(entry) = entry {
                    needed.insert(entry.file.clone());
                    entries.push((modified(&path), path, entry));
                }
            } else {
                loose.push(path);
            }
        }
        for path in loose {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let stem = name.split('.').next().unwrap_or_default();
            if needed.contains(&*name) || keep.starts_with(stem) {
                continue;
            }
            // A partial file that somebody is writing is locked through its journal.
            let journal = path.with_extension("journal");
            let busy = journal.exists()
                && File::open(&journal).is_ok_and(|journal| journal.try_lock().is_err());
            let own = stem.starts_with(&self.key);
            let aged = modified(&path)
                .elapsed()
                .is_ok_and(|age| age.as_secs() > 24 * 3600);
            if !busy && (own || aged || path.extension().is_some_and(|e| e == "corrupt")) {
                let _ = fs::remove_file(&path);
            }
        }
        let mut used: u64 = fs::read_dir(&self.dir)
            .map_err(StorageError::io("list", &self.dir))?
            .flatten()
            .filter_map(|e| e.metadata().ok())
            .map(|m| m.len())
            .sum();
        entries.sort_by_key(|(modified, ..)| *modified);
        for (_, path, entry) in entries {
            if used + bytes <= self.bytes_max {
                break;
            }
            if entry.file == keep {
                continue;
            }
            tracing::info!(
                uri = entry.uri,
                "the cache is full: its oldest model leaves"
            );
            let _ = fs::remove_file(path);
            let _ = fs::remove_file(self.dir.join(&entry.file));
            used = used.saturating_sub(entry.version.size);
        }
        Ok(())
    }
}

fn modified(path: &Path) -> SystemTime {
    fs::metadata(path)
        .and_then(|m| m.modified())
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Opens a journal and locks it against other processes; none: one of them has it.
fn lock(path: &Path) -> Result<Option<File>, StorageError> {
    for _ in 0..3 {
        let journal = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(path)
            .map_err(StorageError::io("open", path))?;
        if journal.try_lock().is_err() {
            return Ok(None);
        }
        // Whoever had the lock before may have finished, and removed the name that was opened.
        let (mine, named) = (journal.metadata(), fs::metadata(path));
        if let (Ok(mine), Ok(named)) = (mine, named)
            && mine.ino() == named.ino()
        {
            return Ok(Some(journal));
        }
    }
    Ok(None)
}

/// A file in the making. Holds the journal's lock; dropped, it stays for the next process to go on with.
pub(super) struct Partial {
    cache: Cache,
    head: Head,
    name: String,
    data: File,
    data_path: PathBuf,
    journal: File,
    /// Seed of the records' checks: another journal's records are worth nothing here.
    seal: [u8; 32],
    done: Vec<Option<[u8; 32]>>,
}

impl Partial {
    fn open(
        cache: Cache,
        head: Head,
        name: String,
        mut journal: File,
    ) -> Result<Self, StorageError> {
        let data_path = cache.dir.join(&name).with_extension("part");
        let failed = StorageError::io("write", &data_path);
        let mut text = Vec::new();
        journal
            .read_to_end(&mut text)
            .map_err(StorageError::io("read", &data_path))?;
        let resumed = replay(&text, &head).filter(|_| data_path.exists());
        let open = || -> std::io::Result<File> {
            let data = File::options()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .open(&data_path)?;
            data.set_len(head.version.size)?;
            Ok(data)
        };
        let data = open().map_err(failed)?;
        let (seal, done, end) = match resumed {
            Some(replayed) => replayed,
            None => {
                let line = head_line(&head);
                let seal = blake3::hash(&line).into();
                journal
                    .set_len(0)
                    .and_then(|()| journal.write_all_at(&line, 0))
                    .map_err(StorageError::io("write", &data_path))?;
                let count = chunk_count(head.version.size, head.chunk_bytes);
                (seal, vec![None; count], line.len())
            }
        };
        // What follows the last whole record was cut off by a kill.
        journal
            .set_len(end as u64)
            .map_err(StorageError::io("write", &data_path))?;
        Ok(Self {
            cache,
            head,
            name,
            data,
            data_path,
            journal,
            seal,
            done,
        })
    }

    pub(super) fn data(&self) -> &File {
        &self.data
    }

    /// Digests of the chunks that an earlier process has written.
    pub(super) fn done(&self) -> &[Option<[u8; 32]>] {
        &self.done
    }

    /// Writes a chunk, then its record.
    pub(super) fn write(
        &mut self,
        chunk: &Landed<'_>,
        digest: [u8; 32],
    ) -> Result<(), StorageError> {
        let failed = StorageError::io("write", &self.data_path);
        let write = || -> std::io::Result<()> {
            let mut at = chunk.start;
            for piece in &chunk.pieces {
                self.data.write_all_at(piece, at)?;
                at += piece.len() as u64;
            }
            let end = self.journal.metadata()?.len();
            self.journal
                .write_all_at(&record(&self.seal, chunk.index, &digest), end)
        };
        write().map_err(failed)?;
        self.done[chunk.index] = Some(digest);
        Ok(())
    }

    /// Makes a complete file the cache's entry.
    pub(super) fn publish(
        self,
        sha256: Option<[u8; 32]>,
        verified: bool,
        beside: Option<String>,
    ) -> Result<(), StorageError> {
        let Self {
            cache,
            head,
            name,
            data_path,
            journal,
            done,
            ..
        } = self;
        let blake3: Option<Vec<_>> = done.into_iter().collect();
        let Some(blake3) = blake3 else {
            return Ok(());
        };
        // Not synced: flushing 700 MB would hold up whoever waits, and bytes that a power cut loses are found by their
        // digests when they are read.
        let path = cache.dir.join(&name);
        fs::rename(&data_path, &path).map_err(StorageError::io("rename", &data_path))?;
        let entry = Entry {
            uri: cache.uri.clone(),
            version: head.version,
            file: name.clone(),
            chunk_bytes: head.chunk_bytes,
            blake3,
            sha256: sha256.map(|d| hex(&d)),
            verified,
            beside,
        };
        let text = serde_json::to_vec(&entry).expect("an entry is plain data");
        let temporary = path.with_extension("entry");
        fs::write(&temporary, text).map_err(StorageError::io("write", &temporary))?;
        // Last: before this line the old entry still stands, and the old bytes with it.
        fs::rename(&temporary, cache.entry_path())
            .map_err(StorageError::io("rename", &temporary))?;
        let _ = fs::remove_file(path.with_extension("journal"));
        drop(journal);
        cache.make_room(0, &name)
    }

    /// Removes all of it: what was written is not worth keeping.
    pub(super) fn discard(self) {
        let _ = fs::remove_file(&self.data_path);
        let _ = fs::remove_file(self.data_path.with_extension("journal"));
    }
}

fn head_line(head: &Head) -> Vec<u8> {
    let mut line = serde_json::to_vec(head).expect("a head is plain data");
    line.push(b'\n');
    line
}

fn record(seal: &[u8; 32], index: usize, digest: &[u8; 32]) -> [u8; RECORD_BYTES] {
    let mut record = [0; RECORD_BYTES];
    record[..4].copy_from_slice(&(index as u32).to_le_bytes());
    record[4..36].copy_from_slice(digest);
    let check = blake3::keyed_hash(seal, &record[..36]);
    record[36..].copy_from_slice(&check.as_bytes()[..8]);
    record
}

type Replayed = ([u8; 32], Vec<Option<[u8; 32]>>, usize);

/// What a journal says: its seal, the digests of its chunks, and where its last whole record ends. None if it
/// belongs to something else.
fn replay(text: &[u8], head: &Head) -> Option<Replayed> {
    let end = text.iter().take(HEAD_BYTES_MAX).position(|&b| b == b'\n')? + 1;
    let found: Head = serde_json::from_slice(&text[..end]).ok()?;
    if found != *head {
        return None;
    }
    let seal: [u8; 32] = blake3::hash(&text[..end]).into();
    let mut done = vec![None; chunk_count(head.version.size, head.chunk_bytes)];
    let mut whole = end;
    for record in text[end..].chunks_exact(RECORD_BYTES) {
        let (index, digest) = record[..36].split_at(4);
        let index = u32::from_le_bytes(index.try_into().ok()?) as usize;
        let digest: [u8; 32] = digest.try_into().ok()?;
        if self::record(&seal, index, &digest) != *record {
            break;
        }
        let Some(place) = done.get_mut(index) else {
            break;
        };
        *place = Some(digest);
        whole += RECORD_BYTES;
    }
    Some((seal, done, whole))
}

/// What a folder's file system is called, if it is memory: on Cloud Run all of the container's own is.
fn memory_backed(dir: &Path) -> Option<String> {
    let on_cloud_run = std::env::var_os("K_SERVICE").is_some();
    // The folder may not exist yet; the nearest one above it that does is where it will be.
    let existing = dir.ancestors().find_map(|a| a.canonicalize().ok())?;
    let kind = file_system(&fs::read_to_string("/proc/self/mountinfo").ok()?, &existing)?;
    let memory = matches!(kind.as_str(), "tmpfs" | "ramfs" | "rootfs")
        // Disks and buckets that are mounted into a Cloud Run container have file systems of their own.
        || on_cloud_run && !(kind.starts_with("ext") || kind.starts_with("fuse") || kind.starts_with("nfs") || kind == "xfs");
    memory.then_some(kind)
}

/// The type of the file system that holds a path, by the text of /proc/self/mountinfo.
fn file_system(mounts: &str, path: &Path) -> Option<String> {
    let mut best: Option<(usize, &str)> = None;
    for line in mounts.lines() {
        let (place, kind) = line.split_once(" - ")?;
        let place = place.split(' ').nth(4)?.replace("\\040", " ");
        let depth = Path::new(&place).components().count();
        // A later mount on the same place hides the earlier one.
        if path.starts_with(&place) && best.is_none_or(|(d, _)| depth >= d) {
            best = Some((depth, kind.split(' ').next()?));
        }
    }
    best.map(|(_, kind)| kind.to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::plan::{Segment, chunks};
    use super::*;

    const CHUNK: u64 = 1000;

    fn cache(dir: &Path, uri: &str, bytes_max: u64) -> Cache {
        let config = StorageConfig {
            cache_dir: Some(dir.to_owned()),
            cache_bytes_max: bytes_max,
            cache_in_memory: true,
            ..StorageConfig::default()
        };
        Cache::new(&config, uri).unwrap()
    }

    fn version(size: u64, etag: &str) -> Version {
        serde_json::from_value(serde_json::json!({
            "size": size, "etag": etag, "modified": 1, "revision": null,
        }))
        .unwrap()
    }

    fn bytes(size: u64) -> Vec<u8> {
        (0..size).map(|i| (i * 7 % 251) as u8).collect()
    }

    /// Writes those chunks of `bytes` that `wanted` picks.
    fn write(partial: &mut Partial, bytes: &[u8], wanted: impl Fn(usize) -> bool) {
        let mut memory = bytes.to_vec();
        let segment = Segment {
            range: 0..bytes.len() as u64,
            bytes: &mut memory,
        };
        for mut chunk in chunks(bytes.len() as u64, CHUNK, vec![segment]).unwrap() {
            if wanted(chunk.index) {
                chunk.write(&bytes[chunk.range.start as usize..chunk.range.end as usize]);
                let digest = chunk.digest();
                partial.write(&chunk.land(), digest).unwrap();
            }
        }
    }

    fn fill(cache: &Cache, etag: &str, size: u64) {
        let mut partial = cache.begin(&version(size, etag), CHUNK).unwrap().unwrap();
        write(&mut partial, &bytes(size), |_| true);
        partial.publish(None, true, None).unwrap();
    }

    #[test]
    fn any_prefix_of_the_journal_names_only_chunks_that_are_there() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path(), "s3://b/k", 1 << 20);
        let (version, bytes) = (version(4500, "a"), bytes(4500));
        let mut partial = cache.begin(&version, CHUNK).unwrap().unwrap();
        write(&mut partial, &bytes, |i| i != 2);
        let path = partial.data_path.with_extension("journal");
        drop(partial);
        let journal = fs::read(&path).unwrap();
        let mut seen = Vec::new();
        for cut in 0..=journal.len() {
            fs::write(&path, &journal[..cut]).unwrap();
            let partial = cache.begin(&version, CHUNK).unwrap().unwrap();
            let done: Vec<usize> = (0..5).filter(|&i| partial.done()[i].is_some()).collect();
            seen.push(done.len());
            for i in done {
                let range = i * 1000..(i * 1000 + 1000).min(4500);
                let mut found = vec![0; range.len()];
                partial
                    .data()
                    .read_exact_at(&mut found, range.start as u64)
                    .unwrap();
                let digest: [u8; 32] = blake3::hash(&found).into();
                assert_eq!(partial.done()[i], Some(digest), "cut at {cut}, chunk {i}");
            }
        }
        assert_eq!(
            (seen[0], seen.last()),
            (0, Some(&4)),
            "and all of it names all that was written"
        );
        assert!(seen.windows(2).all(|w| w[0] <= w[1]));
    }

    #[test]
    fn a_flipped_byte_in_the_journal_ends_it_there() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path(), "s3://b/k", 1 << 20);
        let (version, bytes) = (version(4500, "a"), bytes(4500));
        let mut partial = cache.begin(&version, CHUNK).unwrap().unwrap();
        write(&mut partial, &bytes, |_| true);
        let path = partial.data_path.with_extension("journal");
        let right = partial.done().to_vec();
        drop(partial);
        let journal = fs::read(&path).unwrap();
        for at in 0..journal.len() {
            let mut broken = journal.clone();
            broken[at] ^= 0x10;
            fs::write(&path, &broken).unwrap();
            let partial = cache.begin(&version, CHUNK).unwrap().unwrap();
            let done = partial.done().iter().zip(&right);
            let wrong = done.filter(|(found, right)| found.is_some() && found != right);
            assert_eq!(wrong.count(), 0, "byte {at}");
            assert!(partial.done().iter().any(Option::is_none), "byte {at}");
        }
    }

    #[test]
    fn an_interrupted_file_is_finished_and_becomes_the_entry() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path(), "s3://b/k", 1 << 20);
        let (version, bytes) = (version(4500, "a"), bytes(4500));
        let mut partial = cache.begin(&version, CHUNK).unwrap().unwrap();
        write(&mut partial, &bytes, |i| i < 3);
        assert!(
            cache.begin(&version, CHUNK).unwrap().is_none(),
            "one at a time"
        );
        drop(partial);
        assert!(cache.entry().is_none());
        let mut partial = cache.begin(&version, CHUNK).unwrap().unwrap();
        write(&mut partial, &bytes, |i| i >= 3);
        let digest = [7; 32];
        partial
            .publish(Some(digest), true, Some("{}".to_owned()))
            .unwrap();
        let entry = cache.entry().unwrap();
        assert_eq!(
            (entry.sha256(), entry.beside.as_deref(), entry.blake3.len()),
            (Some(digest), Some("{}"), 5)
        );
        let mut found = vec![0; 4500];
        cache
            .open(&entry)
            .unwrap()
            .read_exact_at(&mut found, 0)
            .unwrap();
        assert_eq!(found, bytes);
        let names: Vec<_> = fs::read_dir(&cache.dir)
            .unwrap()
            .map(|e| e.unwrap().path())
            .collect();
        assert_eq!(names.len(), 2, "nothing else is left: {names:?}");
    }

    #[test]
    fn a_new_version_replaces_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path(), "s3://b/k", 1 << 20);
        fill(&cache, "a", 4500);
        fill(&cache, "b", 3000);
        assert_eq!(cache.entry().unwrap().version.size, 3000);
        assert_eq!(fs::read_dir(&cache.dir).unwrap().count(), 2);
    }

    #[test]
    fn what_was_used_longest_ago_leaves_first() {
        let dir = tempfile::tempdir().unwrap();
        let caches: Vec<Cache> = ["a", "b", "c"]
            .iter()
            .map(|k| cache(dir.path(), &format!("s3://b/{k}"), 10_000))
            .collect();
        for (i, at) in [(0, 100), (1, 200)] {
            fill(&caches[i], "v", 4000);
            let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(at);
            let entry = File::options()
                .append(true)
                .open(caches[i].entry_path())
                .unwrap();
            entry.set_modified(time).unwrap();
        }
        caches[0].open(&caches[0].entry().unwrap()).unwrap();
        fill(&caches[2], "v", 4000);
        let there: Vec<bool> = caches.iter().map(|c| c.entry().is_some()).collect();
        assert_eq!(there, [true, false, true]);
        assert!(
            caches[1]
                .begin(&version(10_001, "v"), CHUNK)
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn file_systems_are_found_by_their_deepest_mount() {
        let mounts = "22 1 0:20 / / rw - overlay overlay rw\n\
            23 22 0:21 / /tmp rw,nosuid shared:1 - tmpfs tmpfs rw\n\
            24 23 8:1 / /tmp/my\\040disk rw - ext4 /dev/sda1 rw\n";
        for (path, kind) in [
            ("/var/cache", "overlay"),
            ("/tmp/x", "tmpfs"),
            ("/tmp/my disk/x", "ext4"),
            ("/tmpx", "overlay"),
        ] {
            assert_eq!(
                file_system(mounts, Path::new(path)).as_deref(),
                Some(kind),
                "{path}"
            );
        }
    }
}
