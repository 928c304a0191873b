//! Why a digit was not drawn.

use crate::model::ModelError;
use crate::storage::StorageError;
use std::time::Duration;

/// Why a model is still cold. Cheap to clone: it answers everyone who waited.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(
        "the model needs {needed_mb} MB in memory beside the {used_mb} MB in use and {headroom_mb} MB to draw with, the limit is {limit_mb} MB ({limit_from})"
    )]
    TooLarge {
        needed_mb: u64,
        used_mb: u64,
        headroom_mb: u64,
        limit_mb: u64,
        limit_from: &'static str,
    },
    #[error("the load took longer than {0:?}")]
    Timeout(Duration),
    #[error("the load was given up")]
    Cancelled,
    #[error("the load panicked: a bug")]
    Panicked,
}

/// Why a request got no digit.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EngineError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("no model is called `{name}`; there is {}", known.join(", "))]
    UnknownModel { name: String, known: Vec<String> },
    #[error("the model draws no `{label}`; it draws {}", known.join(", "))]
    UnknownClass { label: String, known: Vec<String> },
    #[error("the request names no model; there is {}", known.join(", "))]
    ModelRequired { known: Vec<String> },
    #[error("more than {digits_max} digits are waiting")]
    QueueFull {
        digits_max: usize,
        retry_after: Duration,
    },
    #[error("the generator stopped")]
    Stopped,
}
