//! Weights on a disk: one file, a folder with one, or a sharded model with its index.

use super::StorageError;
use super::client::INDEX_SUFFIX;
use super::digest::{Beside, MANIFEST_SUFFIX, SHA256_SUFFIX};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// The files of a model: its one file, or its shards by name.
///
/// # Errors
/// [`StorageError::NoWeights`] for a folder without weights, or with several.
pub(super) fn find(path: &Path) -> Result<Vec<PathBuf>, StorageError> {
    let path = if path.is_dir() {
        inside(path)?
    } else {
        path.to_owned()
    };
    if !path.to_string_lossy().ends_with(INDEX_SUFFIX) {
        return Ok(vec![path]);
    }
    let text = fs::read(&path).map_err(StorageError::io("read", &path))?;
    let shards = shards(&path.display().to_string(), &text)?;
    Ok(shards
        .iter()
        .map(|name| path.with_file_name(name))
        .collect())
}

/// The usual name, the usual index, or else the only weights there are.
fn inside(folder: &Path) -> Result<PathBuf, StorageError> {
    for usual in ["model.safetensors", "model.safetensors.index.json"] {
        let path = folder.join(usual);
        if path.is_file() {
            return Ok(path);
        }
    }
    let mut found = weights_in(folder)?;
    match (found.pop(), found.is_empty()) {
        (Some(only), true) => Ok(only),
        _ => Err(StorageError::NoWeights(folder.to_owned())),
    }
}

fn weights_in(folder: &Path) -> Result<Vec<PathBuf>, StorageError> {
    let entries = fs::read_dir(folder).map_err(StorageError::io("list", folder))?;
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

/// Models in a folder: weights files, and folders that hold weights.
pub(super) fn list(folder: &Path) -> Result<Vec<String>, StorageError> {
    let entries = fs::read_dir(folder).map_err(StorageError::io("list", folder))?;
    let name = |path: PathBuf| {
        if path.is_dir() {
            let name = path.file_name()?.to_str()?.to_owned();
            holds_weights(&path).then_some(name)
        } else if path.extension()? == "safetensors" {
            Some(path.file_stem()?.to_str()?.to_owned())
        } else {
            None
        }
    };
    Ok(entries.flatten().filter_map(|e| name(e.path())).collect())
}

/// What Hugging Face's libraries write beside shards.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The names of an index's files, sorted.
///
/// # Errors
/// A text that is no index, or names files elsewhere.
pub(super) fn shards(uri: &str, text: &[u8]) -> Result<Vec<String>, StorageError> {
    let invalid = |why: String| StorageError::Index {
        uri: uri.to_owned(),
        why,
    };
    let index: Index = serde_json::from_slice(text).map_err(|e| invalid(e.to_string()))?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    if names.is_empty() || names.len() > super::SHARDS_MAX {
        return Err(invalid(format!(
            "it names {} files, expected 1 to {}",
            names.len(),
            super::SHARDS_MAX
        )));
    }
    let plain = |name: &String| {
        !name.is_empty()
            && !name.starts_with('.')
            && name
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    match names.iter().find(|name| !plain(name)) {
        Some(name) => Err(invalid(format!(
            "`{}` is no name of a file beside it",
            name.escape_debug()
        ))),
        None => Ok(names.into_iter().collect()),
    }
}

/// The text of the `config.json` next to a file.
pub(super) fn config_beside(path: &Path) -> Result<Option<String>, StorageError> {
    let config = path.with_file_name("config.json");
    let text = read_if_there(&config)?;
    text.map(|bytes| {
        String::from_utf8(bytes)
            .map_err(|e| StorageError::Protocol(format!("`{}`: {e}", config.display())))
    })
    .transpose()
}

/// The digests next to a file.
pub(super) fn digests_beside(path: &Path) -> Result<Beside, StorageError> {
    let with = |suffix: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    Ok(Beside {
        manifest: read_if_there(&with(MANIFEST_SUFFIX))?,
        sha256: read_if_there(&with(SHA256_SUFFIX))?,
        stated: None,
    })
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, StorageError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(StorageError::io("read", path)(e)),
    }
}

/// An open file, its size, and a text that changes when it does.
pub(super) fn open(path: &Path) -> Result<(File, u64, String), StorageError> {
    let file = File::open(path).map_err(StorageError::io("open", path))?;
    let meta = file.metadata().map_err(StorageError::io("inspect", path))?;
    let identity = format!(
        "{} {} {} {}.{}",
        path.display(),
        meta.ino(),
        meta.len(),
        meta.mtime(),
        meta.mtime_nsec()
    );
    Ok((file, meta.len(), identity))
}
