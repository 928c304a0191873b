//! Bytes to tensors: chunks of a safetensors file, in order, straight into the tensors' own buffers.
//!
//! A chunk may end anywhere, in the middle of a number too. Each value is converted to f32 as it arrives, and
//! a full buffer is handed to candle, which takes it over without a copy: at no time is there a second copy
//! of the weights, and never a whole-file buffer.

use super::{Header, ModelError};
use candle_core::{DType, Device, Tensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use safetensors::Dtype;
use std::collections::HashMap;

/// The header and every tensor of a weights file, on the device, in f32.
pub struct Weights {
    pub header: Header,
    pub tensors: HashMap<String, Tensor>,
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

/// Reads a whole weights file from its chunks. `admit` sees the header before the first tensor is allocated
/// and may refuse it; `beside` is the text of a `config.json` next to the file.
///
/// # Errors
/// The first error of `chunks` or `admit`, or a [`ModelError`] for bytes that are no usable weights.
pub fn read<E: From<ModelError>>(
    chunks: impl IntoIterator<Item = Result<impl AsRef<[u8]>, E>>,
    beside: Option<&str>,
    device: &Device,
    admit: impl FnOnce(&Header) -> Result<(), E>,
) -> Result<Weights, E> {
    let mut chunks = chunks.into_iter();
    let (header, first) = read_header(&mut chunks, beside)?;
    admit(&header)?;

    let mut assembly = Assembly::new(&header, device);
    assembly.push(&first)?;
    drop(first);
    for chunk in chunks {
        assembly.push(chunk?.as_ref())?;
    }
    let tensors = assembly.finish()?;
    Ok(Weights { header, tensors })
}

/// Tensors in the making: those before `at` are done, the one at `at` is being filled.
struct Assembly<'a> {
    header: &'a Header,
    device: &'a Device,
    at: usize,
    buffer: Vec<f32>,
    /// The first bytes of a value whose rest is in the next chunk.
    rest: Vec<u8>,
    seen: u64,
    tensors: HashMap<String, Tensor>,
}

impl<'a> Assembly<'a> {
    fn new(header: &'a Header, device: &'a Device) -> Self {
        let mut assembly = Self {
            header,
            device,
            at: 0,
            buffer: Vec::new(),
            rest: Vec::new(),
            seen: header.header_bytes,
            tensors: HashMap::new(),
        };
        assembly.start();
        assembly
    }

    fn start(&mut self) {
        if let Some(entry) = self.header.tensors.get(self.at) {
            self.buffer = Vec::with_capacity(entry.shape.iter().product());
        }
    }

    fn push(&mut self, mut chunk: &[u8]) -> Result<(), ModelError> {
        self.seen += chunk.len() as u64;
        while !chunk.is_empty() {
            let Some(entry) = self.header.tensors.get(self.at) else {
                return Err(ModelError::Length {
                    expected: self.header.file_bytes,
                    actual: self.seen,
                });
            };
            let size = entry.dtype.bitsize() / 8;
            let missing = self.buffer.capacity().min(entry.bytes / size) - self.buffer.len();
            if self.rest.is_empty() {
                let whole = (chunk.len() / size).min(missing) * size;
                convert(entry.dtype, &chunk[..whole], &mut self.buffer);
                chunk = &chunk[whole..];
                if whole / size < missing {
                    self.rest.extend_from_slice(chunk);
                    chunk = &[];
                }
            } else {
                let n = (size - self.rest.len()).min(chunk.len());
                self.rest.extend_from_slice(&chunk[..n]);
                chunk = &chunk[n..];
                if self.rest.len() == size {
                    convert(entry.dtype, &self.rest, &mut self.buffer);
                    self.rest.clear();
                }
            }
            self.complete()?;
        }
        Ok(())
    }

    /// Hands every full buffer to candle, empty tensors included.
    fn complete(&mut self) -> Result<(), ModelError> {
        while let Some(entry) = self.header.tensors.get(self.at) {
            if self.buffer.len() < entry.shape.iter().product() {
                break;
            }
            let tensor = Tensor::from_vec(
                std::mem::take(&mut self.buffer),
                entry.shape.as_slice(),
                self.device,
            )?;
            debug_assert_eq!(tensor.dtype(), DType::F32);
            self.tensors.insert(entry.name.clone(), tensor);
            self.at += 1;
            self.start();
        }
        Ok(())
    }

    fn finish(mut self) -> Result<HashMap<String, Tensor>, ModelError> {
        self.complete()?;
        if self.at < self.header.tensors.len() {
            return Err(ModelError::Length {
                expected: self.header.file_bytes,
                actual: self.seen,
            });
        }
        Ok(self.tensors)
    }
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

    fn built_in(chunk: usize) -> Weights {
        read(
            super::super::BUILT_IN
                .chunks(chunk)
                .map(Ok::<_, ModelError>),
            None,
            &Device::Cpu,
            |_| Ok(()),
        )
        .unwrap()
    }

    #[test]
    fn any_chunking_gives_the_same_tensors() {
        let whole = built_in(usize::MAX);
        for chunk in [1 << 20, 4097, 1001] {
            let parts = built_in(chunk);
            for (name, tensor) in &whole.tensors {
                let a = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let b = parts.tensors[name]
                    .flatten_all()
                    .unwrap()
                    .to_vec1::<f32>()
                    .unwrap();
                assert_eq!(a, b, "{name} in chunks of {chunk}");
            }
        }
    }

    #[test]
    fn bytes_agree_with_the_safetensors_crate() {
        let ours = built_in(65_537);
        let reference =
            candle_core::safetensors::load_buffer(super::super::BUILT_IN, &Device::Cpu).unwrap();
        assert_eq!(ours.tensors.len(), reference.len());
        for (name, tensor) in reference {
            let a = tensor
                .to_dtype(DType::F32)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap();
            assert_eq!(
                a,
                ours.tensors[&name]
                    .flatten_all()
                    .unwrap()
                    .to_vec1::<f32>()
                    .unwrap(),
                "{name}"
            );
        }
    }

    #[test]
    fn every_truncation_and_excess_is_an_error() {
        let bytes = super::super::BUILT_IN;
        for n in [0, 7, 8, 100, 5000, bytes.len() / 2, bytes.len() - 1] {
            let result = read(
                [Ok::<_, ModelError>(&bytes[..n])],
                None,
                &Device::Cpu,
                |_| Ok(()),
            );
            assert!(
                matches!(result.err(), Some(ModelError::Length { .. })),
                "{n} bytes"
            );
        }
        let result = read(
            [Ok::<_, ModelError>(bytes), Ok(&[0])],
            None,
            &Device::Cpu,
            |_| Ok(()),
        );
        assert!(matches!(result.err(), Some(ModelError::Length { .. })));
    }
}
