//! TENSORS: safetensors bytes to a network, and a network to pictures.
//!
//! Everything here is synchronous and deterministic: a seed fixes the noise, the noise and the request's
//! parameters fix the picture, whatever else is drawn in the same batch. Nothing here knows of tokio, hyper
//! or object stores; bytes come in as an iterator of chunks, pictures go out as bytes.

mod accelerator;
mod arena;
mod device;
mod dit;
mod error;
mod generator;
mod header;
#[allow(
    unsafe_code,
    reason = "calls of code for a processor's extensions, and its loads"
)]
mod kernels;
mod noise;
mod processor;
mod threads;
mod weights;

pub use arena::{ALIGN_BYTES, Arena};
pub use device::{DeviceKind, open as open_device};
pub use dit::Dit;
pub use error::ModelError;
pub use generator::{Generator, Row, SampleSpec, to_bytes};
pub use header::{Architecture, FileLayout, Header, SamplerDefaults, TensorEntry};
pub use noise::noise;
pub use threads::threads_available;
pub use weights::{Slot, Weights, from_bytes};

/// The weights compiled into the binary: the digits model that `scripts/train` made.
pub static BUILT_IN: &[u8] = include_bytes!("mnist.safetensors");
