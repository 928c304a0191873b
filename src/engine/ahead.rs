//! Weights fetched ahead of time: for the layer of an image, or for a cache that later starts read from.

use super::loader::{fill, headers};
use super::{EngineConfig, LoadError};
use crate::model::Weights;
use crate::storage::{ModelUri, Progress, Storage, StorageError, Verified, hex};
use sha2::{Digest as _, Sha256};
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Fetches and verifies a model: to `output`, or into the cache. Says what was done.
///
/// A file is written under a temporary name and renamed when it is whole, so what stands under `output` is never part of
/// a model.
///
/// # Errors
/// [`LoadError`]: the store's, the disk's, or bytes that are no usable weights.
pub async fn fetch_files(
    config: EngineConfig,
    uri: ModelUri,
    output: Option<PathBuf>,
    progress: Arc<Progress>,
) -> Result<String, LoadError> {
    let storage = Storage::new(config.storage.clone());
    let mut opened = storage.open(&uri, progress).await?;
    let (header, heads, beside) = headers(&mut opened).await?;
    let work = move || -> Result<String, LoadError> {
        let mut weights = Weights::allocate(header)?;
        let names = opened.names();
        let arrived = fill(opened, &mut weights, &heads, beside.clone())?;
        let verified = match arrived.verified {
            Verified::Sha256 => "verified by SHA-256",
            Verified::Chunks => "verified chunk by chunk",
            Verified::Length => "not verified: nobody gave a digest",
        };
        let what = format!(
            "{} bytes, {verified}, version {}",
            weights.header.file_bytes(),
            arrived.version
        );
        match output {
            None => arrived.keep(),
            Some(output) => write(&output, &names, &heads, &mut weights, beside)?,
        }
        Ok(what)
    };
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(LoadError::Panicked))
}

/// One file to the path itself, or into it if it is a folder; several into a folder, with their index.
fn write(
    output: &Path,
    names: &[String],
    heads: &[Vec<u8>],
    weights: &mut Weights,
    beside: Option<String>,
) -> Result<(), LoadError> {
    let named_folder = output.to_string_lossy().ends_with('/');
    let single = heads.len() == 1 && !output.is_dir() && !named_folder;
    let folder = if single {
        output.parent().unwrap_or(Path::new("."))
    } else {
        output
    };
    fs::create_dir_all(folder).map_err(StorageError::io("create", folder))?;
    let mut paths: Vec<PathBuf> = match heads.len() {
        1 if single => vec![output.to_owned()],
        1 => vec![folder.join("model.safetensors")],
        _ => names.iter().map(|name| folder.join(name)).collect(),
    };
    if heads.len() > 1 {
        let map: serde_json::Map<_, _> = weights
            .header
            .tensors
            .iter()
            .map(|t| (t.name.clone(), names[t.file].clone().into()))
            .collect();
        let text = serde_json::json!({ "metadata": {}, "weight_map": map }).to_string();
        write_whole(&folder.join("model.safetensors.index.json"), |file| {
            file.write_all(text.as_bytes())
        })?;
    }
    if let Some(text) = beside {
        write_whole(&folder.join("config.json"), |file| {
            file.write_all(text.as_bytes())
        })?;
    }
    let slots = weights.slots();
    for (i, path) in paths.drain(..).enumerate() {
        let mut digest = Sha256::new();
        write_whole(&path, |file| {
            digest.update(&heads[i]);
            file.write_all(&heads[i])?;
            for slot in slots.iter().filter(|s| s.file == i) {
                digest.update(&*slot.bytes);
                file.write_all(slot.bytes)?;
            }
            Ok(())
        })?;
        // So that whoever reads the file later can verify it too.
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let line = format!("{}  {name}\n", hex(&digest.finalize()));
        let beside = path.with_file_name(format!("{name}.sha256"));
        write_whole(&beside, |file| file.write_all(line.as_bytes()))?;
    }
    Ok(())
}

fn write_whole(
    path: &Path,
    content: impl FnOnce(&mut File) -> std::io::Result<()>,
) -> Result<(), StorageError> {
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&temporary)?;
        content(&mut file)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|e| {
        let _ = fs::remove_file(&temporary);
        StorageError::io("write", path)(e)
    })
}
