//! What a weights file says about itself: the safetensors header and the metadata in it.
//!
//! A file opens with the length of its header (u64, little endian) and the header, JSON: name, dtype, shape
//! and byte range of each tensor. Its `__metadata__` carries the architecture, so that one binary serves
//! any model of the family. Nothing in a header is believed before it was checked.

use super::ModelError;
use safetensors::tensor::{Dtype, Metadata};
use serde::{Deserialize, Serialize};

/// `format` in the metadata.
const FORMAT: &str = "image-generator.dit";
/// `format_version` in the metadata that this build reads.
const FORMAT_VERSION: &str = "1";
/// Headers of real models are some ten KB; a length beyond this is no header.
const HEADER_BYTES_MAX: u64 = 16 << 20;

/// Sizes of the transformer, as `scripts/train/dit.py` names them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Architecture {
    /// Width and height of a picture, in pixels.
    pub image_size: usize,
    /// 1 (grey) or 3 (RGB).
    pub channels: usize,
    /// Width and height of the square that becomes one token, in pixels.
    pub patch: usize,
    /// Features of a token.
    pub width: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Attention heads; divides `width`.
    pub heads: usize,
    /// Hidden features of a block's MLP.
    pub mlp_width: usize,
    /// Features of the time embedding before its MLP; even.
    pub freq_width: usize,
    /// Number of classes; label `classes` is "no class".
    pub classes: usize,
}

impl Architecture {
    /// Tokens of one picture.
    pub fn tokens(&self) -> usize {
        (self.image_size / self.patch).pow(2)
    }

    /// Values in one token's patch.
    pub fn patch_width(&self) -> usize {
        self.patch * self.patch * self.channels
    }

    /// Values in one picture, channels x height x width.
    pub fn values(&self) -> usize {
        self.image_size * self.image_size * self.channels
    }

    fn check(&self) -> Result<(), ModelError> {
        let bounds = [
            ("image_size", self.image_size, 4, 1024),
            ("channels", self.channels, 1, 3),
            ("patch", self.patch, 1, self.image_size.max(1)),
            ("width", self.width, 2, 1 << 14),
            ("depth", self.depth, 1, 1024),
            ("heads", self.heads, 1, self.width.max(1)),
            ("mlp_width", self.mlp_width, 1, 1 << 17),
            ("freq_width", self.freq_width, 2, 1 << 14),
            ("classes", self.classes, 1, 100_000),
        ];
        for (name, value, low, high) in bounds {
            if !(low..=high).contains(&value) {
                return Err(architecture(format!(
                    "`{name}` is {value}, expected {low} to {high}"
                )));
            }
        }
        let rules = [
            (self.channels != 2, "`channels` must be 1 or 3"),
            (
                self.image_size.is_multiple_of(self.patch),
                "`patch` must divide `image_size`",
            ),
            (
                self.width.is_multiple_of(self.heads),
                "`heads` must divide `width`",
            ),
            (
                self.freq_width.is_multiple_of(2),
                "`freq_width` must be even",
            ),
            (
                self.tokens() <= 4096,
                "`image_size` / `patch` gives more than 4,096 tokens",
            ),
        ];
        match rules.into_iter().find(|(holds, _)| !holds) {
            Some((_, text)) => Err(architecture(text.to_owned())),
            None => Ok(()),
        }
    }

    /// Name and shape of every tensor that the network is made of.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (d, m, p) = (self.width, self.mlp_width, self.patch_width());
        let mut all = vec![
            ("position".to_owned(), vec![self.tokens(), d]),
            ("label.weight".to_owned(), vec![self.classes + 1, d]),
        ];
        let mut linear = |name: String, output: usize, input: usize| {
            all.push((format!("{name}.weight"), vec![output, input]));
            all.push((format!("{name}.bias"), vec![output]));
        };
        linear("patch_in".to_owned(), d, p);
        linear("time1".to_owned(), d, self.freq_width);
        linear("time2".to_owned(), d, d);
        linear("ada".to_owned(), 6 * d, d);
        for i in 0..self.depth {
            linear(format!("blocks.{i}.qkv"), 3 * d, d);
            linear(format!("blocks.{i}.proj"), d, d);
            linear(format!("blocks.{i}.fc1"), m, d);
            linear(format!("blocks.{i}.fc2"), d, m);
        }
        linear("patch_out".to_owned(), p, d);
        all.extend((0..self.depth).map(|i| (format!("blocks.{i}.table"), vec![6, d])));
        all.push(("out_table".to_owned(), vec![2, d]));
        all
    }
}

/// What a request that names no value gets.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplerDefaults {
    pub steps: usize,
    pub guidance: f32,
    /// Above 1: more of the steps near the noise.
    pub shift: f32,
}

impl SamplerDefaults {
    fn check(&self) -> Result<(), ModelError> {
        if !(1..=1000).contains(&self.steps) {
            return Err(architecture(format!(
                "sampler `steps` is {}, expected 1 to 1,000",
                self.steps
            )));
        }
        if !(0.0..=100.0).contains(&self.guidance) {
            return Err(architecture(format!(
                "sampler `guidance` is {}, expected 0 to 100",
                self.guidance
            )));
        }
        if !(0.01..=100.0).contains(&self.shift) {
            return Err(architecture(format!(
                "sampler `shift` is {}, expected 0.01 to 100",
                self.shift
            )));
        }
        Ok(())
    }
}

/// Where one tensor lies.
#[derive(Clone, Debug)]
pub struct TensorEntry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Bytes in the file; the entries of a file follow each other without gaps.
    pub bytes: usize,
    /// Which file of a sharded model it lies in, from 0.
    pub file: usize,
    /// Where it starts in that file.
    pub at: u64,
}

impl TensorEntry {
    /// Its bytes' place in its file.
    pub fn range(&self) -> std::ops::Range<u64> {
        self.at..self.at + self.bytes as u64
    }
}

/// Sizes of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileLayout {
    /// From the start of the file to its first tensor.
    pub header_bytes: u64,
    /// Of the whole file.
    pub bytes: u64,
}

/// A checked header: the tensors in the order of the file, and the network that they make.
#[derive(Clone, Debug)]
pub struct Header {
    pub name: String,
    pub architecture: Architecture,
    pub sampler: SamplerDefaults,
    /// One name a class, by label.
    pub class_names: Vec<String>,
    /// Those of the first file first, each in the order of its file.
    pub tensors: Vec<TensorEntry>,
    /// One, or the shards of a sharded model.
    pub files: Vec<FileLayout>,
}

/// The three JSON texts that describe a model: from the file's own metadata, or from a `config.json` beside it.
#[derive(Deserialize)]
struct Description {
    format: String,
    format_version: String,
    #[serde(default)]
    name: Option<String>,
    config: serde_json::Value,
    sampler: serde_json::Value,
    classes: serde_json::Value,
}

impl Header {
    /// How many bytes the header takes, from the first eight of the file.
    ///
    /// # Errors
    /// [`ModelError::Format`] if the length cannot be a header's.
    pub fn length(first: [u8; 8]) -> Result<usize, ModelError> {
        let n = u64::from_le_bytes(first);
        if !(2..=HEADER_BYTES_MAX).contains(&n) {
            return Err(ModelError::Format(format!(
                "its first 8 bytes give a header of {n} bytes, expected 2 to {HEADER_BYTES_MAX}"
            )));
        }
        Ok(8 + n as usize)
    }

    /// Whether the first file's header describes the network, so that no `config.json` is needed.
    ///
    /// # Errors
    /// [`ModelError::Format`] if it is no header.
    pub fn describes_itself(bytes: &[u8]) -> Result<bool, ModelError> {
        let metadata = parse_json(bytes)?;
        Ok(own_description(&metadata).is_some())
    }

    /// Reads the headers of a model's files, one or several. Each is the first [`Header::length`] bytes of its
    /// file; `beside` is the text of a `config.json` next to them, used where the first file does not describe
    /// itself.
    ///
    /// # Errors
    /// What contradicts the format, the architecture, or what this build can read.
    pub fn parse(files: &[impl AsRef<[u8]>], beside: Option<&str>) -> Result<Self, ModelError> {
        let mut tensors = Vec::new();
        let mut layouts = Vec::with_capacity(files.len());
        let mut description = None;
        for (file, bytes) in files.iter().enumerate() {
            let bytes = bytes.as_ref();
            let metadata = parse_json(bytes)?;
            if description.is_none() {
                description = Some(describe(&metadata, beside)?);
            }
            let header_bytes = bytes.len() as u64;
            let entries = entries(&metadata, file, header_bytes)?;
            let end = entries.last().map_or(header_bytes, |t| t.range().end);
            layouts.push(FileLayout {
                header_bytes,
                bytes: end,
            });
            tensors.extend(entries);
        }
        let description = description
            .ok_or_else(|| ModelError::Format("there is no file with a header".to_owned()))?;
        let architecture: Architecture = field("config", description.config)?;
        let sampler: SamplerDefaults = field("sampler", description.sampler)?;
        let class_names: Vec<String> = field("classes", description.classes)?;
        architecture.check()?;
        sampler.check()?;
        if class_names.len() != architecture.classes {
            return Err(self::architecture(format!(
                "{} class names for {} classes",
                class_names.len(),
                architecture.classes
            )));
        }
        check_tensors(&architecture, &tensors)?;
        Ok(Self {
            name: description.name.unwrap_or_else(|| "model".to_owned()),
            architecture,
            sampler,
            class_names,
            tensors,
            files: layouts,
        })
    }

    /// Bytes of all files.
    pub fn file_bytes(&self) -> u64 {
        self.files.iter().map(|f| f.bytes).sum()
    }

    /// Number of weights.
    pub fn parameters(&self) -> u64 {
        self.tensors
            .iter()
            .map(|t| t.shape.iter().product::<usize>() as u64)
            .sum()
    }

    /// Bytes that the tensors take once loaded: as many as in the file, but for what aligns each of them. An accelerator
    /// has its own copy in its own memory.
    pub fn resident_bytes(&self) -> u64 {
        let aligned = |t: &TensorEntry| t.bytes.next_multiple_of(super::ALIGN_BYTES) as u64;
        self.tensors.iter().map(aligned).sum()
    }
}

fn parse_json(header: &[u8]) -> Result<Metadata, ModelError> {
    let json = header.get(8..).unwrap_or_default();
    serde_json::from_slice(json).map_err(|e| ModelError::Format(e.to_string()))
}

/// The file's own metadata, where they describe a network.
fn own_description(metadata: &Metadata) -> Option<&std::collections::HashMap<String, String>> {
    let own = metadata.metadata().as_ref()?;
    own.contains_key("config").then_some(own)
}

fn architecture(text: String) -> ModelError {
    ModelError::Architecture(text)
}

fn field<T: serde::de::DeserializeOwned>(
    name: &str,
    value: serde_json::Value,
) -> Result<T, ModelError> {
    // In a safetensors file the values are strings that hold JSON; in a config.json they are plain JSON.
    let value = match value {
        serde_json::Value::String(text) => serde_json::from_str(&text),
        other => Ok(other),
    };
    value
        .and_then(serde_json::from_value)
        .map_err(|e| architecture(format!("`{name}`: {e}")))
}

fn describe(metadata: &Metadata, beside: Option<&str>) -> Result<Description, ModelError> {
    let description: Description = match (own_description(metadata), beside) {
        (Some(own), _) => serde_json::to_value(own)
            .and_then(serde_json::from_value)
            .map_err(|e| architecture(format!("metadata: {e}")))?,
        (None, Some(text)) => {
            serde_json::from_str(text).map_err(|e| architecture(format!("config.json: {e}")))?
        }
        (None, None) => {
            return Err(architecture(
                "the file has no `config` in its metadata, and no config.json lies beside it"
                    .to_owned(),
            ));
        }
    };
    if description.format != FORMAT || description.format_version != FORMAT_VERSION {
        return Err(architecture(format!(
            "format `{}` version `{}`, this build reads `{FORMAT}` version `{FORMAT_VERSION}`",
            description.format, description.format_version
        )));
    }
    Ok(description)
}

/// The tensors by their place in the file. Whoever wrote the header may lie: offsets must start at 0, leave
/// no gap, not overlap, and be as long as dtype and shape say.
fn entries(
    metadata: &Metadata,
    file: usize,
    header_bytes: u64,
) -> Result<Vec<TensorEntry>, ModelError> {
    let mut all: Vec<_> = metadata.tensors().into_iter().collect();
    all.sort_by_key(|(_, info)| info.data_offsets);
    let mut at = 0;
    let mut entries = Vec::with_capacity(all.len());
    for (name, info) in all {
        let (start, end) = info.data_offsets;
        let bits = info
            .shape
            .iter()
            .try_fold(info.dtype.bitsize(), |n, &d| n.checked_mul(d));
        if start != at || end < start || bits != (end - start).checked_mul(8) {
            return Err(ModelError::Format(format!(
                "tensor `{name}` of shape {:?} lies at {start}..{end}, after a tensor that ends at {at}",
                info.shape
            )));
        }
        at = end;
        entries.push(TensorEntry {
            name,
            dtype: info.dtype,
            shape: info.shape.clone(),
            bytes: end - start,
            file,
            at: header_bytes + start as u64,
        });
    }
    Ok(entries)
}

fn check_tensors(architecture: &Architecture, tensors: &[TensorEntry]) -> Result<(), ModelError> {
    let by_name: std::collections::HashMap<&str, &TensorEntry> =
        tensors.iter().map(|t| (t.name.as_str(), t)).collect();
    let needed = architecture.tensors();
    for (name, shape) in &needed {
        let entry = by_name
            .get(name.as_str())
            .ok_or_else(|| ModelError::TensorMissing { name: name.clone() })?;
        if entry.shape != *shape {
            return Err(ModelError::TensorShape {
                name: name.clone(),
                expected: shape.clone(),
                actual: entry.shape.clone(),
            });
        }
        if !matches!(entry.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(ModelError::TensorDtype {
                name: name.clone(),
                dtype: entry.dtype.to_string(),
            });
        }
    }
    if let Some(twice) = duplicate(tensors) {
        return Err(ModelError::Format(format!(
            "tensor `{twice}` is in several files"
        )));
    }
    if tensors.len() != needed.len() {
        let known: std::collections::HashSet<&str> =
            needed.iter().map(|(n, _)| n.as_str()).collect();
        let extra = tensors
            .iter()
            .find(|t| !known.contains(t.name.as_str()))
            .map_or("?", |t| &t.name);
        return Err(self::architecture(format!(
            "tensor `{extra}` belongs to no part of the network"
        )));
    }
    Ok(())
}

fn duplicate(tensors: &[TensorEntry]) -> Option<&str> {
    let mut seen = std::collections::HashSet::with_capacity(tensors.len());
    let twice = tensors.iter().find(|t| !seen.insert(t.name.as_str()));
    twice.map(|t| t.name.as_str())
}
