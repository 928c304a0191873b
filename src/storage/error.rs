//! Why bytes could not be had.

use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Cheap to clone: one failed load answers many waiting requests, and keeps its cause.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StorageError {
    #[error("`{0}` does not exist")]
    NotFound(String),
    #[error("the store refuses access to `{uri}`")]
    Denied { uri: String, source: Cause },
    /// No answer, a broken answer, or an answer that says "later": worth another try.
    #[error("the store of `{uri}` cannot be reached or is failing")]
    Unavailable { uri: String, source: Cause },
    #[error("the store of `{uri}` answered unexpectedly")]
    Unexpected { uri: String, source: Cause },
    #[error("the store broke its protocol: {0}")]
    Protocol(String),
    #[error("the client for `{uri}` cannot be built")]
    Client { uri: String, source: Cause },
    #[error("the object was replaced while it was being read")]
    Changed,
    #[error("{actual} of {expected} bytes arrived")]
    Truncated { expected: u64, actual: u64 },
    #[error("the weights have SHA-256 {actual}, expected is {expected}")]
    Digest { expected: String, actual: String },
    #[error("chunk {index} of the weights has another digest than their manifest says")]
    Chunk { index: usize },
    /// A file that says what the weights' digest is, and cannot be read.
    #[error("`{uri}` is no digest of the weights: {why}")]
    DigestFile { uri: String, why: String },
    #[error("`{uri}` is no index of weights: {why}")]
    Index { uri: String, why: String },
    #[error("the cached copy is damaged and was put aside")]
    CacheCorrupt,
    #[error("cannot {what} `{}`", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        source: Arc<std::io::Error>,
    },
    /// An open file cannot be read any more.
    #[error("the weights cannot be read")]
    Read(#[source] Arc<std::io::Error>),
    #[error("the folder `{}` holds no weights: expected model.safetensors, or exactly one *.safetensors", .0.display())]
    NoWeights(PathBuf),
    #[error("the read was given up")]
    Cancelled,
}

/// A shared cause, so that errors can be cloned.
pub type Cause = Arc<dyn std::error::Error + Send + Sync>;

impl StorageError {
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| match source.kind() {
            std::io::ErrorKind::NotFound => Self::NotFound(path.display().to_string()),
            _ => Self::Io {
                what,
                path,
                source: Arc::new(source),
            },
        }
    }

    /// Whether the same read may succeed in a while.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Unavailable { .. } | Self::Truncated { .. } | Self::Changed | Self::Cancelled
        )
    }

    /// Sorts an error of object_store into what the caller can do about it.
    pub(crate) fn store(uri: impl std::fmt::Display, error: object_store::Error) -> Self {
        use object_store::Error as E;
        let uri = uri.to_string();
        match &error {
            E::NotFound { .. } => return Self::NotFound(uri),
            E::Precondition { .. } => return Self::Changed,
            E::PermissionDenied { .. } | E::Unauthenticated { .. } => {
                return Self::Denied {
                    uri,
                    source: Arc::new(error),
                };
            }
            E::Generic { .. } | E::NotSupported { .. } => {}
            _ => {
                return Self::Unexpected {
                    uri,
                    source: Arc::new(error),
                };
            }
        }
        match http_status(&error) {
            Some(401 | 403) => Self::Denied {
                uri,
                source: Arc::new(error),
            },
            Some(404 | 410) => Self::NotFound(uri),
            Some(412) => Self::Changed,
            Some(408 | 425 | 429 | 500..=599) => Self::Unavailable {
                uri,
                source: Arc::new(error),
            },
            Some(_) => Self::Unexpected {
                uri,
                source: Arc::new(error),
            },
            None if is_untrusted(&error) => Self::Unexpected {
                uri,
                source: Arc::new(error),
            },
            // No answer at all: refused, reset, timed out, a name that does not resolve.
            None => Self::Unavailable {
                uri,
                source: Arc::new(error),
            },
        }
    }
}

/// Whether the other side is not who it says it is: that does not mend itself.
fn is_untrusted(error: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(error), |e| e.source())
        .any(|e| e.to_string().contains("invalid peer certificate"))
}

/// Whether a store answered that an object has no such range.
pub(crate) fn is_out_of_range(error: &object_store::Error) -> bool {
    http_status(error) == Some(416)
}

/// The status of the response behind an error. object_store keeps its type private, so its text is read.
fn http_status(error: &(dyn std::error::Error + 'static)) -> Option<u16> {
    std::iter::successors(Some(error), |e| e.source()).find_map(|e| {
        let text = e.to_string();
        let after = text.split("status code: ").nth(1)?;
        after.get(..3)?.parse().ok()
    })
}
