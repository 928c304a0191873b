//! Weights on a disk.

use super::{Reader, StorageError};
use bytes::Bytes;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Bytes read at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// An open weights file and where it is.
pub(super) struct WeightsFile {
    pub(super) path: PathBuf,
    file: File,
    size: u64,
}

/// Opens a weights file, or the one in a folder: `model.safetensors`, or else the only one.
pub(super) fn open(path: &Path) -> Result<WeightsFile, StorageError> {
    let path = if path.is_dir() {
        inside(path)?
    } else {
        path.to_owned()
    };
    let file = File::open(&path).map_err(StorageError::io("open", &path))?;
    let size = file
        .metadata()
        .map_err(StorageError::io("inspect", &path))?
        .len();
    Ok(WeightsFile { path, file, size })
}

fn inside(folder: &Path) -> Result<PathBuf, StorageError> {
    let usual = folder.join("model.safetensors");
    if usual.is_file() {
        return Ok(usual);
    }
    let mut found = weights_in(folder)?;
    match (found.pop(), found.is_empty()) {
        (Some(only), true) => Ok(only),
        _ => Err(StorageError::NoWeights(folder.to_owned())),
    }
}

fn weights_in(folder: &Path) -> Result<Vec<PathBuf>, StorageError> {
    let entries = std::fs::read_dir(folder).map_err(StorageError::io("list", folder))?;
    Ok(entries
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors") && p.is_file())
        .collect())
}

/// Whether a path that may be a mounted, still empty folder has any weights.
pub(crate) fn holds_weights(path: &Path) -> bool {
    if path.is_dir() {
        weights_in(path).is_ok_and(|found| !found.is_empty())
    } else {
        path.exists()
    }
}

/// The text of the `config.json` next to a file.
pub(super) fn beside(path: &Path) -> Result<Option<String>, StorageError> {
    let config = path.with_file_name("config.json");
    match std::fs::read_to_string(&config) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(StorageError::io("read", &config)(e)),
    }
}

impl WeightsFile {
    pub(super) fn into_reader(self) -> Reader {
        let Self {
            path,
            mut file,
            size,
        } = self;
        let mut left = size;
        let next = move || {
            let mut chunk = vec![0; CHUNK_BYTES.min(usize::try_from(left).unwrap_or(CHUNK_BYTES))];
            if chunk.is_empty() {
                return None;
            }
            match file.read(&mut chunk) {
                Ok(0) => None,
                Ok(n) => {
                    chunk.truncate(n);
                    left -= n as u64;
                    Some(Ok(Bytes::from(chunk)))
                }
                Err(e) => Some(Err(StorageError::io("read", &path)(e))),
            }
        };
        Reader {
            size,
            feed: None,
            next: Box::new(next),
        }
    }
}
