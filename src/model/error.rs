//! What can be wrong with weights, or with what they compute.

/// Why weights could not become a generator, or a generator could not draw. Cheap to clone: one failed
/// load answers many waiting requests.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ModelError {
    /// The file is no safetensors file, or contradicts itself.
    #[error("not a valid safetensors file: {0}")]
    Format(String),
    /// The bytes end before the header says they do, or go on after it.
    #[error("the weights hold {actual} bytes where their header describes {expected}")]
    Length { expected: u64, actual: u64 },
    /// The metadata does not describe a network that this binary can build.
    #[error("the weights do not describe a network that can be built: {0}")]
    Architecture(String),
    /// A tensor that the architecture needs is absent.
    #[error("tensor `{name}` is missing")]
    TensorMissing { name: String },
    /// A tensor has another shape than the architecture says.
    #[error("tensor `{name}` has shape {actual:?}, the architecture needs {expected:?}")]
    TensorShape {
        name: String,
        expected: Vec<usize>,
        actual: Vec<usize>,
    },
    /// A tensor has a number format that cannot be read.
    #[error("tensor `{name}` has dtype {dtype}; F32, F16 and BF16 can be read")]
    TensorDtype { name: String, dtype: String },
    /// The system gives no memory for the tensors.
    #[error("no memory for {bytes} bytes of weights: {reason}")]
    Memory { bytes: u64, reason: String },
    /// The device was not compiled in, or is not there.
    #[error("{0}")]
    Device(String),
    /// The network answered with a number that is none.
    #[error(
        "the network computed a value that is not finite (digit with seed {seed}, step {step})"
    )]
    NotFinite { seed: u64, step: usize },
    /// candle failed.
    #[error("tensor computation failed: {0}")]
    Compute(String),
}

impl From<candle_core::Error> for ModelError {
    fn from(error: candle_core::Error) -> Self {
        Self::Compute(error.to_string())
    }
}
