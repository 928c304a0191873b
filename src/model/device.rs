//! Which processor computes. A device that was asked for and is not there is an error, never a silent CPU.

use super::ModelError;
use candle_core::Device;
use serde::Deserialize;
use std::fmt;

/// The value of `DEVICE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    Cpu,
    Cuda,
    Metal,
    /// The best one that this binary was built for and this machine has.
    Auto,
}

impl std::str::FromStr for DeviceKind {
    type Err = ();
    fn from_str(s: &str) -> Result<Self, ()> {
        match s.to_ascii_lowercase().as_str() {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda),
            // PyTorch's name for Apple's GPU, which the service before this one used.
            "mps" | "metal" => Ok(Self::Metal),
            "auto" => Ok(Self::Auto),
            _ => Err(()),
        }
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Metal => "metal",
            Self::Auto => "auto",
        })
    }
}

impl DeviceKind {
    /// Whether this binary was compiled for the device.
    pub fn compiled_in(self) -> bool {
        match self {
            Self::Cpu | Self::Auto => true,
            Self::Cuda => cfg!(feature = "cuda"),
            Self::Metal => cfg!(feature = "metal"),
        }
    }
}

/// Opens the device.
///
/// # Errors
/// [`ModelError::Device`] where the binary was built without it, or the machine has none.
pub fn open(kind: DeviceKind) -> Result<Device, ModelError> {
    match kind {
        DeviceKind::Cpu => Ok(Device::Cpu),
        DeviceKind::Cuda | DeviceKind::Metal if !kind.compiled_in() => {
            Err(ModelError::Device(format!(
                "DEVICE is {kind}, but this binary was built without it: build with `--features {kind}`"
            )))
        }
        DeviceKind::Cuda => Device::new_cuda(0).map_err(|e| unavailable(kind, e)),
        DeviceKind::Metal => Device::new_metal(0).map_err(|e| unavailable(kind, e)),
        DeviceKind::Auto => Ok([DeviceKind::Cuda, DeviceKind::Metal]
            .into_iter()
            .filter(|k| k.compiled_in())
            .find_map(|k| open(k).ok())
            .unwrap_or(Device::Cpu)),
    }
}

fn unavailable(kind: DeviceKind, error: candle_core::Error) -> ModelError {
    ModelError::Device(format!(
        "DEVICE is {kind}, but no such device could be opened: {error}"
    ))
}
