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

/// A tensor's memory, and which bytes of the file belong there.
pub struct Slot<'a> {
    pub file: Range<u64>,
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

    /// Every tensor's memory, in the order of the file.
    pub fn slots(&mut self) -> Vec<Slot<'_>> {
        let mut rest: &mut [u8] = &mut self.arena;
        let mut file = self.header.header_bytes;
        let mut slots = Vec::with_capacity(self.header.tensors.len());
        for entry in &self.header.tensors {
            let (bytes, after) = rest.split_at_mut(entry.bytes);
            let padding = entry.bytes.next_multiple_of(ALIGN_BYTES) - entry.bytes;
            rest = &mut after[padding..];
            slots.push(Slot {
                file: file..file + entry.bytes as u64,
                bytes,
            });
            file += entry.bytes as u64;
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

/// Reads chunks up to the end of the header. Also given back: what arrived beyond it.
///
/// # Errors
/// The first error of `chunks`, or a [`ModelError`] for bytes that are no usable header.
pub fn read_header<E: From<ModelError>>(
    chunks: &mut impl Iterator<Item = Result<impl AsRef<[u8]>, E>>,
    beside: Option<&str>,
) -> Result<(Header, Vec<u8>), E> {
    let mut head = Vec::new();
    let mut header_bytes = None;
    loop {
        if let Some(n) = header_bytes.filter(|&n| head.len() >= n) {
            let header = Header::parse(&head[..n], beside)?;
            return Ok((header, head.split_off(n)));
        }
        let Some(chunk) = chunks.next() else {
            let expected = header_bytes.unwrap_or(8) as u64;
            return Err(ModelError::Length {
                expected,
                actual: head.len() as u64,
            }
            .into());
        };
        head.extend_from_slice(chunk?.as_ref());
        if header_bytes.is_none()
            && let Some(first) = head.first_chunk::<8>()
        {
            header_bytes = Some(Header::length(*first)?);
        }
    }
}

/// Reads a whole weights file from its chunks, which may end anywhere. `admit` sees the header before memory is
/// taken and may refuse it; `beside` is the text of a `config.json` next to the file.
///
/// # Errors
/// The first error of `chunks` or `admit`, or a [`ModelError`] for bytes that are no usable weights.
pub fn read<E: From<ModelError>>(
    chunks: impl IntoIterator<Item = Result<impl AsRef<[u8]>, E>>,
    beside: Option<&str>,
    admit: impl FnOnce(&Header) -> Result<(), E>,
) -> Result<Weights, E> {
    let mut chunks = chunks.into_iter();
    let (header, first) = read_header(&mut chunks, beside)?;
    admit(&header)?;
    let expected = header.file_bytes;
    let mut seen = header.header_bytes;
    let mut weights = Weights::allocate(header)?;
    let mut slots = weights.slots().into_iter();
    let mut into: &mut [u8] = &mut [];
    let mut push = |mut chunk: &[u8]| {
        seen += chunk.len() as u64;
        while !chunk.is_empty() {
            if into.is_empty() {
                let Some(slot) = slots.next() else {
                    break;
                };
                into = slot.bytes;
            }
            let n = chunk.len().min(into.len());
            let (now, rest) = std::mem::take(&mut into).split_at_mut(n);
            now.copy_from_slice(&chunk[..n]);
            (into, chunk) = (rest, &chunk[n..]);
        }
        seen
    };
    let mut actual = push(&first);
    drop(first);
    for chunk in chunks {
        actual = push(chunk?.as_ref());
    }
    if actual != expected {
        return Err(ModelError::Length { expected, actual }.into());
    }
    Ok(weights)
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

    fn read_built_in(
        chunks: impl IntoIterator<Item = &'static [u8]>,
    ) -> Result<Weights, ModelError> {
        read(chunks.into_iter().map(Ok), None, |_| Ok(()))
    }

    fn built_in(chunk: usize) -> Weights {
        read_built_in(super::super::BUILT_IN.chunks(chunk)).unwrap()
    }

    #[test]
    fn any_chunking_gives_the_same_tensors() {
        let whole = built_in(usize::MAX);
        for chunk in [1 << 20, 4097, 1001] {
            let parts = built_in(chunk);
            for name in whole.places.keys() {
                let (_, a) = whole.tensor_bytes(name).unwrap();
                let (_, b) = parts.tensor_bytes(name).unwrap();
                assert_eq!(a, b, "{name} in chunks of {chunk}");
            }
        }
    }

    #[test]
    fn values_agree_with_the_safetensors_crate() {
        let ours = built_in(65_537);
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
            let result = read_built_in([&bytes[..n]]);
            assert!(
                matches!(result.err(), Some(ModelError::Length { .. })),
                "{n} bytes"
            );
        }
        let result = read_built_in([bytes, &[0]]);
        assert!(matches!(result.err(), Some(ModelError::Length { .. })));
    }
}
