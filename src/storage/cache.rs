//! Verified objects on a disk, so that the next start downloads nothing.
//!
//! Two files a model, named by the hash of its URI: the bytes, and a small JSON entry that says which version
//! they are and what their digest is. Bytes are written under a temporary name and renamed after they were
//! verified; the entry is renamed last, so a crash leaves an old entry or none, never a wrong one. Several
//! processes may share the folder.

use super::fetch::Version;
use super::{ModelUri, Reader, StorageError, file, hex};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Part of the folder's name: another layout gets another folder.
const LAYOUT: &str = "v1";
/// A temporary file that nobody has written for this long belongs to a process that was killed.
const ABANDONED: Duration = Duration::from_secs(3600);

#[derive(Clone, Debug)]
pub(super) struct Cache {
    dir: PathBuf,
    /// Hash of the URI, 32 hexadecimal digits.
    key: String,
    uri: String,
}

/// What the cache holds of a URI.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Entry {
    uri: String,
    pub(super) version: Version,
    #[serde(with = "hex_digest")]
    pub(super) sha256: [u8; 32],
    file: String,
    /// The `config.json` next to the weights.
    pub(super) beside: Option<String>,
}

impl Cache {
    pub(super) fn new(dir: PathBuf, uri: &ModelUri) -> Self {
        let uri = uri.to_string();
        let key = hex(&Sha256::digest(uri.as_bytes())[..16]);
        Self {
            dir: dir.join(LAYOUT),
            key,
            uri,
        }
    }

    /// The entry, if there is one and its file has the length that it says.
    pub(super) fn entry(&self) -> Option<Entry> {
        let text = fs::read(self.entry_path()).ok()?;
        let entry: Entry = serde_json::from_slice(&text).ok()?;
        // The name of the file is our own; whatever else stands there was not written by us.
        let ours = entry.uri == self.uri && entry.file == self.file_name(&entry.sha256);
        let whole =
            fs::metadata(self.dir.join(&entry.file)).is_ok_and(|m| m.len() == entry.version.size);
        (ours && whole).then_some(entry)
    }

    pub(super) fn read(&self, entry: &Entry) -> Result<Reader, StorageError> {
        Ok(file::open(&self.dir.join(&entry.file))?.into_reader())
    }

    /// Moves a damaged entry out of the way; the bytes stay for whoever wants to know why.
    pub(super) fn put_aside(&self) {
        if let Some(entry) = fs::read(self.entry_path())
            .ok()
            .and_then(|t| serde_json::from_slice::<Entry>(&t).ok())
        {
            let path = self.dir.join(self.file_name(&entry.sha256));
            let _ = fs::rename(&path, path.with_extension("corrupt"));
        }
        let _ = fs::remove_file(self.entry_path());
        tracing::warn!(uri = %self.uri, "a damaged cache entry was put aside");
    }

    /// Starts a new entry; none where the version has no identity to ask for later.
    pub(super) fn begin(
        &self,
        version: &Version,
        beside: Option<String>,
    ) -> Result<Option<Pending>, StorageError> {
        if !version.is_identity() {
            return Ok(None);
        }
        fs::create_dir_all(&self.dir).map_err(StorageError::io("create", &self.dir))?;
        self.remove(|path| path.extension().is_some_and(|e| e == "part") && abandoned(path));
        let random = getrandom::u64().unwrap_or_default();
        let path = self.dir.join(format!(
            "{}.{}-{random:016x}.part",
            self.key,
            std::process::id()
        ));
        let file = File::create_new(&path).map_err(StorageError::io("create", &path))?;
        Ok(Some(Pending {
            cache: self.clone(),
            version: version.clone(),
            beside,
            file: BufWriter::with_capacity(1 << 18, file),
            path: TemporaryFile(path),
        }))
    }

    fn entry_path(&self) -> PathBuf {
        self.dir.join(format!("{}.json", self.key))
    }

    fn file_name(&self, sha256: &[u8; 32]) -> String {
        format!("{}-{}.safetensors", self.key, hex(&sha256[..8]))
    }

    /// Removes files of this URI that `unwanted` picks.
    fn remove(&self, unwanted: impl Fn(&Path) -> bool) {
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return;
        };
        for path in entries.flatten().map(|e| e.path()) {
            let ours = path
                .file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with(&self.key));
            if ours && unwanted(&path) {
                let _ = fs::remove_file(path);
            }
        }
    }
}

fn abandoned(path: &Path) -> bool {
    let age = fs::metadata(path)
        .and_then(|m| m.modified())
        .ok()
        .and_then(|t| t.elapsed().ok());
    age.is_some_and(|age| age > ABANDONED)
}

/// Removed when dropped, unless it was renamed before.
struct TemporaryFile(PathBuf);

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// An entry in the making.
pub(super) struct Pending {
    cache: Cache,
    version: Version,
    beside: Option<String>,
    file: BufWriter<File>,
    path: TemporaryFile,
}

impl Pending {
    pub(super) fn write(&mut self, chunk: &[u8]) -> Result<(), StorageError> {
        self.file
            .write_all(chunk)
            .map_err(StorageError::io("write", &self.path.0))
    }

    /// Makes the entry visible.
    pub(super) fn publish(self, sha256: [u8; 32]) -> Result<(), StorageError> {
        let Self {
            cache,
            version,
            beside,
            file,
            path,
        } = self;
        let failed = |what| StorageError::io(what, &path.0);
        let file = file
            .into_inner()
            .map_err(|e| failed("write")(e.into_error()))?;
        file.sync_all().map_err(failed("write"))?;
        let name = cache.file_name(&sha256);
        fs::rename(&path.0, cache.dir.join(&name)).map_err(failed("rename"))?;
        let entry = Entry {
            uri: cache.uri.clone(),
            version,
            sha256,
            file: name.clone(),
            beside,
        };
        let text = serde_json::to_vec(&entry).expect("an entry is plain data");
        let temporary = TemporaryFile(path.0.with_extension("entry.part"));
        fs::write(&temporary.0, text).map_err(StorageError::io("write", &temporary.0))?;
        // Last: before this line the old entry still stands, and the old bytes with it.
        fs::rename(&temporary.0, cache.entry_path())
            .map_err(StorageError::io("rename", &temporary.0))?;
        cache.remove(|p| p.extension().is_some_and(|e| e == "safetensors") && !p.ends_with(&name));
        Ok(())
    }
}

mod hex_digest {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(digest: &[u8; 32], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&super::hex(digest))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<[u8; 32], D::Error> {
        let text = String::deserialize(d)?;
        super::super::parse_digest(&text)
            .ok_or_else(|| serde::de::Error::custom("expected 64 hexadecimal digits"))
    }
}
