//! The network in Rust against the one in PyTorch: tensors that `scripts/train/golden.py` wrote.

use candle_core::{DType, Device, Tensor};
use image_generator::model::{self, Dit, Generator, ModelError, SampleSpec, Weights};
use std::collections::HashMap;

/// How far two implementations may lie apart, relative where values are larger than 1.
const TOLERANCE: f32 = 1e-4;

struct Golden {
    tensors: HashMap<String, Tensor>,
    guidance: f32,
}

impl Golden {
    fn read(bytes: &[u8], weights: &[u8]) -> Self {
        let (_, header) = safetensors::SafeTensors::read_metadata(bytes).unwrap();
        let metadata = header.metadata().clone().unwrap();
        assert_eq!(
            metadata["weights_sha256"],
            sha256(weights),
            "the golden tensors belong to other weights: run scripts/train/golden.py"
        );
        Self {
            tensors: candle_core::safetensors::load_buffer(bytes, &Device::Cpu).unwrap(),
            guidance: metadata["guidance"].parse().unwrap(),
        }
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let flat = self.tensors[name].flatten_all().unwrap();
        flat.to_dtype(DType::F32).unwrap().to_vec1().unwrap()
    }

    fn labels(&self, name: &str) -> Vec<usize> {
        let labels: Vec<i64> = self.tensors[name].to_vec1().unwrap();
        labels.into_iter().map(|l| l as usize).collect()
    }
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    image_generator::storage::hex(&sha2::Sha256::digest(bytes))
}

fn weights(bytes: &'static [u8]) -> Weights {
    model::from_bytes(bytes).unwrap()
}

fn assert_near(ours: &[f32], theirs: &[f32], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    let off = |(a, b): (&f32, &f32)| (a - b).abs() / b.abs().max(1.0);
    let worst = ours.iter().zip(theirs).map(off).fold(0.0, f32::max);
    assert!(worst <= TOLERANCE, "{what} is off by {worst}");
    // Two constant tensors would agree for the wrong reason.
    assert!(
        theirs.iter().any(|v| (v - theirs[0]).abs() > 0.01),
        "{what} says nothing"
    );
}

/// `[C, H, W]` to `[tokens, patch * patch * C]`, written apart from the code under test.
fn patches(picture: &[f32], channels: usize, size: usize, patch: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(picture.len());
    for (top, left) in (0..size)
        .step_by(patch)
        .flat_map(|y| (0..size).step_by(patch).map(move |x| (y, x)))
    {
        for (y, x) in (top..top + patch).flat_map(|y| (left..left + patch).map(move |x| (y, x))) {
            out.extend((0..channels).map(|c| picture[(c * size + y) * size + x]));
        }
    }
    out
}

fn forward_agrees(bytes: &'static [u8], golden: &[u8], net: impl Fn(Weights) -> Dit) {
    let golden = Golden::read(golden, bytes);
    let weights = weights(bytes);
    let a = weights.header.architecture.clone();
    let mut net = net(weights);
    let (times, labels) = (golden.floats("forward.t"), golden.labels("forward.label"));
    let conditions: Vec<_> = times
        .iter()
        .zip(&labels)
        .map(|(&t, &l)| net.condition(t, l).unwrap())
        .collect();
    let values = a.channels * a.image_size * a.image_size;
    let tokens = |name: &str| -> Vec<f32> {
        let pictures = golden.floats(name);
        let one = |p| patches(p, a.channels, a.image_size, a.patch);
        pictures.chunks_exact(values).flat_map(one).collect()
    };
    let (mut trace, mut output) = (Vec::new(), Vec::new());
    net.forward(
        &tokens("forward.x"),
        &conditions,
        Some(&mut trace),
        &mut output,
    )
    .unwrap();

    let mut blocks = 0;
    for (i, block) in trace.iter().enumerate() {
        let name = format!("forward.block.{i}");
        if golden.tensors.contains_key(&name) {
            assert_near(block, &golden.floats(&name), &name);
            blocks += 1;
        }
    }
    assert!(blocks >= 2, "{blocks} blocks were compared");
    assert_near(&output, &tokens("forward.output"), "forward.output");
}

fn sampling_agrees(bytes: &'static [u8], golden: &[u8], net: impl Fn(Weights) -> Dit) {
    let golden = Golden::read(golden, bytes);
    let mut generator = {
        let weights = weights(bytes);
        Generator::of(weights.header.clone(), net(weights))
    };
    let header = generator.header().clone();
    let a = &header.architecture;
    let values = a.channels * a.image_size * a.image_size;
    let noise = golden.floats("sample.noise");
    let labels = golden.labels("sample.label");
    let spec = |label| SampleSpec {
        label,
        seed: 0,
        steps: header.sampler.steps,
        guidance: header.sampler.guidance,
    };
    assert_eq!(header.sampler.guidance, golden.guidance);
    let mut rows: Vec<_> = labels
        .iter()
        .zip(noise.chunks_exact(values))
        .map(|(&label, noise)| generator.start_from(spec(label), noise))
        .collect();
    for step in 0..header.sampler.steps {
        generator
            .step(&mut rows.iter_mut().collect::<Vec<_>>())
            .unwrap();
        let ours: Vec<f32> = rows.iter().flat_map(|r| generator.picture(r)).collect();
        let name = format!("sample.step.{step}");
        assert_near(&ours, &golden.floats(&name), &name);
    }
    let bytes: Vec<u8> = golden.tensors["sample.bytes"]
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap();
    for (row, theirs) in rows.iter().zip(bytes.chunks_exact(values)) {
        let plane = a.image_size * a.image_size;
        for (i, &ours) in generator.finish(row).unwrap().iter().enumerate() {
            let theirs = theirs[i % a.channels * plane + i / a.channels];
            // A value within the tolerance of a half may round either way.
            assert!(
                ours.abs_diff(theirs) <= 1,
                "pixel {i}: {ours}, not {theirs}"
            );
        }
    }
}

const SMALL: &[u8] = include_bytes!("../golden/small.safetensors");
const SMALL_GOLDEN: &[u8] = include_bytes!("../golden/small-golden.safetensors");
const MNIST_GOLDEN: &[u8] = include_bytes!("../golden/mnist-golden.safetensors");

fn kernels(weights: Weights) -> Dit {
    Dit::new(weights, &Device::Cpu, 2).unwrap()
}

/// What an accelerator computes with.
fn tensors(weights: &Weights) -> Dit {
    Dit::of_tensors(weights, &Device::Cpu).unwrap()
}

#[test]
fn a_small_colour_model_runs_forward_as_in_pytorch() {
    forward_agrees(SMALL, SMALL_GOLDEN, kernels);
    forward_agrees(SMALL, SMALL_GOLDEN, |w| tensors(&w));
}

#[test]
fn a_small_colour_model_samples_as_in_pytorch() {
    sampling_agrees(SMALL, SMALL_GOLDEN, kernels);
    sampling_agrees(SMALL, SMALL_GOLDEN, |w| tensors(&w));
}

#[test]
fn the_default_model_runs_forward_as_in_pytorch() {
    forward_agrees(model::BUILT_IN, MNIST_GOLDEN, kernels);
    forward_agrees(model::BUILT_IN, MNIST_GOLDEN, |w| tensors(&w));
}

#[test]
fn the_default_model_samples_as_in_pytorch() {
    sampling_agrees(model::BUILT_IN, MNIST_GOLDEN, kernels);
    sampling_agrees(model::BUILT_IN, MNIST_GOLDEN, |w| tensors(&w));
}

/// Whatever number of the weights is none, it comes out as an error and never as a grey picture.
#[test]
fn a_weight_that_is_not_a_number_is_an_error_wherever_it_is() {
    let (mut bytes, header) = (SMALL.to_vec(), weights(SMALL).header);
    let mut at = header.files[0].header_bytes as usize;
    for tensor in &header.tensors {
        assert_eq!(tensor.dtype, safetensors::Dtype::F16);
        let sound = bytes[at..at + 2].to_vec();
        // 0x7e01: a NaN that is not the usual one.
        bytes[at..at + 2].copy_from_slice(&[0x01, 0x7e]);
        let broken = model::from_bytes(&bytes).unwrap();
        for net in [tensors(&broken), kernels(broken)] {
            let spec = SampleSpec {
                label: 0,
                seed: 5,
                steps: 2,
                guidance: 1.0,
            };
            let drawn = Generator::of(header.clone(), net).draw(&[spec]);
            assert!(
                matches!(drawn, Err(ModelError::NotFinite { seed: 5, step: 2 })),
                "{}: {drawn:?}",
                tensor.name
            );
        }
        bytes[at..at + 2].copy_from_slice(&sound);
        at += tensor.bytes;
    }
}
