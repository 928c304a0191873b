//! Bytes to tensors: a safetensors file straight into the tensors' own memory.
//!
//! All tensors of a model lie in one [`Arena`], in the number format of the file, each aligned. Whoever has the
//! bytes writes them into [`Slot`]s, in any order and from several sides at once; nothing is copied a second time, and
//! there never is a whole-file buffer.

use super::arena::{ALIGN_BYTES, Arena};
use super::header::TensorEntry;
use super::{Header, ModelError};
use candle_core::{Device, Tensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use safetensors::Dtype;
use std::collections::HashMap;
use std::ops::Range;

/// The header and every tensor of a model, as the file has them.
pub struct Weights {
    pub header: Header,
    arena: Arena,
    places: HashMap<String, (usize, Range<usize>)>,
}

/// A tensor's memory, and which bytes of which file belong there.
pub struct Slot<'a> {
    /// Index of the file, from 0.
    pub file: usize,
    pub range: Range<u64>,
    pub bytes: &'a mut [u8],
}

impl Weights {
    /// Memory for the tensors of a header, still zero.
    ///
    /// # Errors
    /// [`ModelError::Memory`]
    pub fn allocate(header: Header) -> Result<Self, ModelError> {
        let mut places = HashMap::with_capacity(header.tensors.len());
        let mut at = 0_usize;
        for (i, entry) in header.tensors.iter().enumerate() {
            places.insert(entry.name.clone(), (i, at..at + entry.bytes));
            at = (at + entry.bytes).next_multiple_of(ALIGN_BYTES);
        }
        Ok(Self {
            arena: Arena::new(at)?,
            header,
            places,
        })
    }

    /// Every tensor's memory, in the order of the files. Together the slots of a file cover all that follows its
    /// header.
    pub fn slots(&mut self) -> Vec<Slot<'_>> {
        let mut rest: &mut [u8] = &mut self.arena;
        let mut slots = Vec::with_capacity(self.header.tensors.len());
        for entry in &self.header.tensors {
            let (bytes, after) = rest.split_at_mut(entry.bytes);
            let padding = entry.bytes.next_multiple_of(ALIGN_BYTES) - entry.bytes;
            rest = &mut after[padding..];
            slots.push(Slot {
                file: entry.file,
                range: entry.range(),
                bytes,
            });
        }
        slots
    }

    /// What the header says of a tensor, and where in [`Weights::bytes`] its values lie.
    pub(super) fn place(&self, name: &str) -> Result<(&TensorEntry, Range<usize>), ModelError> {
        let place = self.places.get(name).cloned();
        let (i, range) = place.ok_or_else(|| ModelError::TensorMissing {
            name: name.to_owned(),
        })?;
        Ok((&self.header.tensors[i], range))
    }

    /// All tensors.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.arena
    }

    /// What the header says of a tensor, and its little-endian values.
    ///
    /// # Errors
    /// [`ModelError::TensorMissing`]
    pub fn tensor_bytes(&self, name: &str) -> Result<(&TensorEntry, &[u8]), ModelError> {
        let (entry, range) = self.place(name)?;
        Ok((entry, &self.arena[range]))
    }

    /// A copy of a tensor's values.
    ///
    /// # Errors
    /// [`ModelError::TensorMissing`]
    pub fn values(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        let (entry, bytes) = self.tensor_bytes(name)?;
        let mut values = Vec::with_capacity(entry.shape.iter().product());
        convert(entry.dtype, bytes, &mut values);
        Ok(values)
    }

    /// A copy of a tensor in f32 on a device.
    ///
    /// # Errors
    /// [`ModelError::TensorMissing`], or the device's own.
    pub fn tensor(&self, name: &str, device: &Device) -> Result<Tensor, ModelError> {
        let (entry, _) = self.tensor_bytes(name)?;
        let shape = entry.shape.as_slice();
        Ok(Tensor::from_vec(self.values(name)?, shape, device)?)
    }
}

/// Reads a whole weights file that is in memory already.
///
/// # Errors
/// A [`ModelError`] for bytes that are no usable weights.
pub fn from_bytes(bytes: &[u8]) -> Result<Weights, ModelError> {
    let (header, data) = split_header(bytes)?;
    let header = Header::parse(&[header], None)?;
    let (expected, actual) = (header.file_bytes(), bytes.len() as u64);
    if actual != expected {
        return Err(ModelError::Length { expected, actual });
    }
    let mut weights = Weights::allocate(header)?;
    let mut data = data;
    for slot in weights.slots() {
        let (now, rest) = data.split_at(slot.bytes.len());
        slot.bytes.copy_from_slice(now);
        data = rest;
    }
    Ok(weights)
}

/// The header of a file and what follows it.
fn split_header(bytes: &[u8]) -> Result<(&[u8], &[u8]), ModelError> {
    let short = |expected: usize| ModelError::Length {
        expected: expected as u64,
        actual: bytes.len() as u64,
    };
    let first = bytes.first_chunk::<8>().ok_or_else(|| short(8))?;
    let length = Header::length(*first)?;
    bytes.split_at_checked(length).ok_or_else(|| short(length))
}

/// Appends little-endian values of `dtype` to `out` as f32. `bytes` holds whole values.
fn convert(dtype: Dtype, bytes: &[u8], out: &mut Vec<f32>) {
    // Converted in small blocks: the vectorised conversions want aligned numbers, which network bytes are not.
    const BLOCK: usize = 1024;
    match dtype {
        Dtype::F32 => out.extend(
            bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b)),
        ),
        Dtype::F16 => {
            let mut block = [f16::ZERO; BLOCK];
            for part in bytes.as_chunks::<2>().0.chunks(BLOCK) {
                part.iter()
                    .zip(&mut block)
                    .for_each(|(b, v)| *v = f16::from_le_bytes(*b));
                let start = out.len();
                out.resize(start + part.len(), 0.0);
                block[..part.len()].convert_to_f32_slice(&mut out[start..]);
            }
        }
        Dtype::BF16 => out.extend(
            bytes
                .as_chunks::<2>()
                .0
                .iter()
                .map(|b| bf16::from_le_bytes(*b).to_f32()),
        ),
        other => unreachable!("the header check lets no {other} through"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_agree_with_the_safetensors_crate() {
        let ours = from_bytes(super::super::BUILT_IN).unwrap();
        let reference =
            candle_core::safetensors::load_buffer(super::super::BUILT_IN, &Device::Cpu).unwrap();
        assert_eq!(ours.header.tensors.len(), reference.len());
        for (name, tensor) in reference {
            let theirs = tensor.to_dtype(candle_core::DType::F32).unwrap();
            let theirs = theirs.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(ours.values(&name).unwrap(), theirs, "{name}");
        }
    }

    #[test]
    fn every_truncation_and_excess_is_an_error() {
        let bytes = super::super::BUILT_IN;
        for n in [0, 7, 8, 100, 5000, bytes.len() / 2, bytes.len() - 1] {
            let result = from_bytes(&bytes[..n]);
            assert!(
                matches!(result.err(), Some(ModelError::Length { .. })),
                "{n} bytes"
            );
        }
        let result = from_bytes(&[bytes, &[0]].concat());
        assert!(matches!(result.err(), Some(ModelError::Length { .. })));
    }
}
