//! The network's operations composed of candle's tensor operations, for CUDA and Metal.

use super::dit::{Activation, Buffers, Conditioned, NORM_EPS, Network, Ops};
use super::{Architecture, ModelError, Weights};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::{layer_norm, silu, softmax_last_dim};
use candle_nn::{Linear, Module};

pub(super) struct Accelerator {
    architecture: Architecture,
    network: Network<Linear, Tensor>,
    ops: Tensors,
    buffers: Buffers<Tensor>,
}

impl Accelerator {
    /// Copies the tensors to the device, in f32.
    pub(super) fn new(weights: &Weights, device: &Device) -> Result<Self, ModelError> {
        let architecture = weights.header.architecture.clone();
        let take = |name: &str| weights.tensor(name, device);
        let linear = |name: &str| {
            let bias = take(&format!("{name}.bias"))?;
            Ok(Linear::new(take(&format!("{name}.weight"))?, Some(bias)))
        };
        let network = Network::new(&architecture, linear, take)?;
        let ops = Tensors {
            one: Tensor::ones(architecture.width, DType::F32, device)?,
            zero: Tensor::zeros(architecture.width, DType::F32, device)?,
        };
        Ok(Self {
            architecture,
            network,
            buffers: Buffers::new(|| ops.empty()),
            ops,
        })
    }

    pub(super) fn condition(
        &mut self,
        waves: Vec<f32>,
        label: usize,
    ) -> Result<Conditioned<Tensor>, ModelError> {
        let n = waves.len();
        let waves = Tensor::from_vec(waves, (1, n), self.ops.zero.device())?;
        self.network.condition(&mut self.ops, &waves, label)
    }

    pub(super) fn forward(
        &mut self,
        x: &[f32],
        conditions: &[&Conditioned<Tensor>],
        trace: Option<&mut Vec<Vec<f32>>>,
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let a = &self.architecture;
        let shape = (conditions.len(), a.tokens(), a.patch_width());
        let x = Tensor::from_slice(x, shape, self.ops.zero.device())?;
        let mut seen = Vec::new();
        let mut see = |value: &Tensor| seen.push(value.clone());
        let mut result = self.ops.empty();
        self.network.forward(
            &mut self.ops,
            &x,
            conditions,
            &mut self.buffers,
            trace.is_some().then_some(&mut see),
            &mut result,
        )?;
        if let Some(trace) = trace {
            for value in seen {
                trace.push(value.flatten_all()?.to_vec1()?);
            }
        }
        *out = result.flatten_all()?.to_vec1()?;
        Ok(())
    }
}

/// Values are `[rows, tokens, features]`, or `[1, features]` of a condition; modulations `[rows, parts, width]`.
struct Tensors {
    one: Tensor,
    zero: Tensor,
}

impl Ops for Tensors {
    type Linear = Linear;
    type Table = Tensor;
    type Value = Tensor;

    fn empty(&self) -> Tensor {
        self.zero.clone()
    }

    fn linear(
        &mut self,
        linear: &Linear,
        x: &Tensor,
        then: Activation,
        out: &mut Tensor,
    ) -> Result<(), ModelError> {
        let y = linear.forward(x)?;
        *out = match then {
            Activation::None => y,
            Activation::Gelu => y.gelu()?,
            Activation::Silu => silu(&y)?,
        };
        Ok(())
    }

    fn add_gated(
        &mut self,
        linear: &Linear,
        x: &Tensor,
        modulation: &Tensor,
        gate: usize,
        onto: &mut Tensor,
    ) -> Result<(), ModelError> {
        let gated = linear
            .forward(x)?
            .broadcast_mul(&modulation.narrow(1, gate, 1)?)?;
        *onto = (&*onto + gated)?;
        Ok(())
    }

    fn embed(
        &mut self,
        linear: &Linear,
        x: &Tensor,
        position: &Tensor,
        out: &mut Tensor,
    ) -> Result<(), ModelError> {
        *out = linear.forward(x)?.broadcast_add(position)?;
        Ok(())
    }

    fn modulation(
        &mut self,
        table: &Tensor,
        conditions: &[&Tensor],
        out: &mut Tensor,
    ) -> Result<(), ModelError> {
        let (parts, width) = table.dims2()?;
        let ones = (0..parts).map(|i| if i % 3 == 1 { 1.0_f32 } else { 0.0 });
        let ones = Tensor::from_iter(ones, table.device())?.reshape((parts, 1))?;
        let rows = conditions.len();
        let conditions = Tensor::cat(conditions, 0)?.reshape((rows, (), width))?;
        *out = conditions.broadcast_add(&table.broadcast_add(&ones)?)?;
        Ok(())
    }

    fn norm_modulate(
        &mut self,
        x: &Tensor,
        modulation: &Tensor,
        shift: usize,
        out: &mut Tensor,
    ) -> Result<(), ModelError> {
        *out = layer_norm(&x.contiguous()?, &self.one, &self.zero, NORM_EPS)?
            .broadcast_mul(&modulation.narrow(1, shift + 1, 1)?)?
            .broadcast_add(&modulation.narrow(1, shift, 1)?)?;
        Ok(())
    }

    fn attention(
        &mut self,
        qkv: &Tensor,
        heads: usize,
        out: &mut Tensor,
    ) -> Result<(), ModelError> {
        let (rows, tokens, three) = qkv.dims3()?;
        let width = three / 3;
        let qkv = qkv.reshape((rows, tokens, 3, heads, width / heads))?;
        let part = |i: usize| {
            qkv.narrow(2, i, 1)?
                .squeeze(2)?
                .transpose(1, 2)?
                .contiguous()
        };
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let scale = 1.0 / ((width / heads) as f64).sqrt();
        let scores = (q.matmul(&k.transpose(D::Minus1, D::Minus2)?.contiguous()?)? * scale)?;
        *out = softmax_last_dim(&scores)?
            .matmul(&v)?
            .transpose(1, 2)?
            .reshape((rows, tokens, width))?;
        Ok(())
    }

    fn add_row(&mut self, table: &Tensor, row: usize, onto: &mut Tensor) -> Result<(), ModelError> {
        *onto = (&*onto + table.narrow(0, row, 1)?)?;
        Ok(())
    }

    fn silu(&mut self, x: &Tensor, out: &mut Tensor) -> Result<(), ModelError> {
        *out = silu(x)?;
        Ok(())
    }
}
