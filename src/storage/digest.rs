//! What a file's bytes must be: a SHA-256 of the whole, or a manifest with a BLAKE3 digest a chunk.
//!
//! A SHA-256 has to be computed in order, by one processor. A manifest lets every chunk be checked by whoever has
//! it, while the others are still on their way, and a chunk that is wrong is fetched again alone.

use super::StorageError;
use super::plan::chunk_count;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::io::Read;

/// Ending of a manifest's name, after the whole name of the file that it describes.
pub const MANIFEST_SUFFIX: &str = ".chunks.json";
/// Ending of the name of a file with a SHA-256, as `sha256sum` writes it.
pub(super) const SHA256_SUFFIX: &str = ".sha256";
/// Bounds of a chunk. Below, the first request could reach into a second one.
pub const CHUNK_BYTES: std::ops::RangeInclusive<u64> = 1 << 20..=1 << 30;

const FORMAT: &str = "image-generator.chunks";
const FORMAT_VERSION: u32 = 1;

/// Digests of a file's chunks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: String,
    format_version: u32,
    /// Bytes of the file.
    pub size: u64,
    /// Bytes of a chunk; the last one may be shorter.
    pub chunk_bytes: u64,
    /// SHA-256 of the whole file.
    #[serde(with = "hex_digest")]
    pub sha256: [u8; 32],
    /// BLAKE3 of each chunk.
    #[serde(with = "hex_digests")]
    pub blake3: Vec<[u8; 32]>,
}

impl Manifest {
    /// Describes what a reader yields.
    ///
    /// # Errors
    /// The reader's own.
    pub fn of(mut file: impl Read, chunk_bytes: u64) -> std::io::Result<Self> {
        let mut sha256 = Sha256::new();
        let (mut size, mut blake3) = (0, Vec::new());
        let mut chunk = Vec::new();
        loop {
            chunk.clear();
            file.by_ref().take(chunk_bytes).read_to_end(&mut chunk)?;
            if chunk.is_empty() {
                break;
            }
            size += chunk.len() as u64;
            sha256.update(&chunk);
            blake3.push(blake3::hash(&chunk).into());
        }
        Ok(Self {
            format: FORMAT.to_owned(),
            format_version: FORMAT_VERSION,
            size,
            chunk_bytes,
            sha256: sha256.finalize().into(),
            blake3,
        })
    }

    /// Reads a manifest's text.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let manifest: Self = serde_json::from_slice(text).map_err(|e| e.to_string())?;
        if manifest.format != FORMAT || manifest.format_version != FORMAT_VERSION {
            return Err(format!(
                "format `{}` version {}, this build reads `{FORMAT}` version {FORMAT_VERSION}",
                manifest.format, manifest.format_version
            ));
        }
        if !CHUNK_BYTES.contains(&manifest.chunk_bytes) {
            return Err(format!(
                "chunks of {} bytes, expected {} to {}",
                manifest.chunk_bytes,
                CHUNK_BYTES.start(),
                CHUNK_BYTES.end()
            ));
        }
        let expected = chunk_count(manifest.size, manifest.chunk_bytes);
        if manifest.blake3.len() != expected {
            return Err(format!(
                "{} digests for {expected} chunks",
                manifest.blake3.len()
            ));
        }
        Ok(manifest)
    }
}

/// What is known of a file's bytes before they arrive.
#[derive(Clone, Debug, Default)]
pub(super) struct Expected {
    /// Of the whole file, to be computed in order.
    pub(super) sha256: Option<[u8; 32]>,
    pub(super) manifest: Option<Manifest>,
}

/// What was found beside a file.
#[derive(Default)]
pub(super) struct Beside {
    pub(super) manifest: Option<Vec<u8>>,
    pub(super) sha256: Option<Vec<u8>>,
    /// By the store's own word (the Hugging Face Hub's).
    pub(super) stated: Option<[u8; 32]>,
}

impl Expected {
    /// The strongest of what is known. MODEL_SHA256 outweighs what lies beside the file; it may be the digest of
    /// the weights, or that of their manifest.
    ///
    /// # Errors
    /// A digest file that cannot be read: to pass over it would serve unverified what was meant to be verified.
    pub(super) fn choose(
        uri: &str,
        size: u64,
        pinned: Option<[u8; 32]>,
        beside: Beside,
    ) -> Result<Self, StorageError> {
        let unreadable = |suffix: &str, why: String| StorageError::DigestFile {
            uri: format!("{uri}{suffix}"),
            why,
        };
        let pins_manifest = |text: &Vec<u8>| pinned == Some(Sha256::digest(text).into());
        if let Some(text) = &beside.manifest
            && (pinned.is_none() || pins_manifest(text))
        {
            let manifest = Manifest::parse(text).map_err(|e| unreadable(MANIFEST_SUFFIX, e))?;
            if manifest.size != size {
                return Err(StorageError::Truncated {
                    expected: manifest.size,
                    actual: size,
                });
            }
            return Ok(Self {
                sha256: None,
                manifest: Some(manifest),
            });
        }
        let sha256 = match (pinned, &beside.sha256) {
            (Some(pinned), _) => Some(pinned),
            (None, Some(text)) => Some(parse_sha256_file(text).ok_or_else(|| {
                unreadable(
                    SHA256_SUFFIX,
                    "expected 64 hexadecimal digits, then perhaps a name".to_owned(),
                )
            })?),
            (None, None) => beside.stated,
        };
        Ok(Self {
            sha256,
            manifest: None,
        })
    }
}

/// The digest in what `sha256sum` writes: 64 digits, then perhaps a name.
fn parse_sha256_file(text: &[u8]) -> Option<[u8; 32]> {
    let text = std::str::from_utf8(text).ok()?;
    parse_digest(text.split_whitespace().next()?)
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The 32 bytes of a digest in hexadecimal.
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

const NOT_HEX: &str = "expected 64 hexadecimal digits";

pub(super) mod hex_digest {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(crate) fn serialize<S: Serializer>(digest: &[u8; 32], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&super::hex(digest))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<[u8; 32], D::Error> {
        let text = String::deserialize(d)?;
        super::parse_digest(&text).ok_or_else(|| D::Error::custom(super::NOT_HEX))
    }
}

pub(super) mod hex_digests {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(crate) fn serialize<S: Serializer>(digests: &[[u8; 32]], s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(digests.iter().map(|d| super::hex(d)))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<[u8; 32]>, D::Error> {
        let texts = Vec::<String>::deserialize(d)?;
        let parse = |text: &String| {
            super::parse_digest(text).ok_or_else(|| D::Error::custom(super::NOT_HEX))
        };
        texts.iter().map(parse).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_survives_its_own_text_and_refuses_others() {
        let bytes: Vec<u8> = (0..(5 << 20) / 2).map(|i: u32| (i % 251) as u8).collect();
        let manifest = Manifest::of(&bytes[..], 1 << 20).unwrap();
        assert_eq!(manifest.blake3.len(), 3);
        assert_eq!(manifest.sha256, <[u8; 32]>::from(Sha256::digest(&bytes)));
        let text = serde_json::to_string(&manifest).unwrap();
        assert_eq!(Manifest::parse(text.as_bytes()).unwrap(), manifest);
        for (from, to) in [
            ("\"format_version\":1", "\"format_version\":2"),
            ("\"size\":2621440", "\"size\":9621440"),
            ("\"chunk_bytes\":1048576", "\"chunk_bytes\":1"),
            ("\"size\"", "\"length\""),
            (
                "\"chunk_bytes\":1048576",
                "\"chunk_bytes\":18446744073709551615",
            ),
        ] {
            assert!(text.contains(from), "{text:.200}");
            assert!(Manifest::parse(text.replace(from, to).as_bytes()).is_err());
        }
    }

    #[test]
    fn what_the_user_pinned_outweighs_what_lies_beside() {
        let bytes = b"weights";
        let manifest = serde_json::to_vec(&Manifest::of(&bytes[..], 1 << 20).unwrap()).unwrap();
        let of = |bytes: &[u8]| -> [u8; 32] { Sha256::digest(bytes).into() };
        let sibling = format!("{}  model.safetensors\n", hex(&of(b"other"))).into_bytes();
        let choose = |pinned, manifest: Option<&Vec<u8>>| {
            let beside = Beside {
                manifest: manifest.cloned(),
                sha256: Some(sibling.clone()),
                stated: None,
            };
            Expected::choose("s3://b/k", 7, pinned, beside).unwrap()
        };
        assert!(choose(None, Some(&manifest)).manifest.is_some());
        assert!(
            choose(Some(of(&manifest)), Some(&manifest))
                .manifest
                .is_some()
        );
        let pinned = choose(Some(of(bytes)), Some(&manifest));
        assert_eq!(
            (pinned.sha256, pinned.manifest),
            (Some(of(bytes)), None),
            "a manifest that nobody pinned proves nothing against a pinned digest"
        );
        assert_eq!(choose(None, None).sha256, Some(of(b"other")));
    }
}
