//! The network: a class-conditional diffusion transformer (DiT, Peebles & Xie 2023, arXiv 2212.09748) with one
//! adaLN projection for all blocks (adaLN-single, Chen et al. 2023, arXiv 2310.00426) that predicts the clean
//! picture. `scripts/train/dit.py` is the same network in PyTorch, and the reference that the tests hold
//! this one against.

use super::{Architecture, ModelError, Weights};
use candle_core::{D, Device, Result, Tensor};
use candle_nn::ops::{layer_norm, softmax_last_dim};
use candle_nn::{Linear, Module};

const NORM_EPS: f32 = 1e-6;

/// The network with its weights, on one device, in f32.
pub struct Dit {
    architecture: Architecture,
    patch_in: Linear,
    position: Tensor,
    label: Tensor,
    time1: Linear,
    time2: Linear,
    ada: Linear,
    blocks: Vec<Block>,
    /// The tables of all blocks, `[depth, 6, width]`.
    tables: Tensor,
    out_table: Tensor,
    patch_out: Linear,
    norm: Norm,
}

struct Block {
    qkv: Linear,
    proj: Linear,
    fc1: Linear,
    fc2: Linear,
}

/// Layer norm without weights of its own: the condition scales and shifts in their place.
struct Norm {
    one: Tensor,
    zero: Tensor,
}

impl Norm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        layer_norm(&x.contiguous()?, &self.one, &self.zero, NORM_EPS)
    }
}

/// What time and class do to each block: shifts, 1 + scales and gates, tables included.
#[derive(Clone)]
pub struct Condition {
    /// `[depth, 6, width]`
    blocks: Tensor,
    /// `[2, width]`
    out: Tensor,
}

impl Dit {
    /// Takes the tensors over. Their names and shapes were checked with the header.
    pub fn new(weights: Weights, device: &Device) -> std::result::Result<Self, ModelError> {
        let architecture = weights.header.architecture.clone();
        let take = |name: String| weights.tensor(&name, device);
        let linear = |name: &str| -> std::result::Result<Linear, ModelError> {
            Ok(Linear::new(
                take(format!("{name}.weight"))?,
                Some(take(format!("{name}.bias"))?),
            ))
        };
        let blocks = (0..architecture.depth)
            .map(|i| {
                let part = |name: &str| format!("blocks.{i}.{name}");
                Ok(Block {
                    qkv: linear(&part("qkv"))?,
                    proj: linear(&part("proj"))?,
                    fc1: linear(&part("fc1"))?,
                    fc2: linear(&part("fc2"))?,
                })
            })
            .collect::<std::result::Result<Vec<_>, ModelError>>()?;
        let (patch_in, time1, time2) = (linear("patch_in")?, linear("time1")?, linear("time2")?);
        let (ada, patch_out) = (linear("ada")?, linear("patch_out")?);
        let tables = (0..architecture.depth)
            .map(|i| take(format!("blocks.{i}.table")))
            .collect::<std::result::Result<Vec<_>, _>>()?;
        let norm = Norm {
            one: Tensor::ones(architecture.width, candle_core::DType::F32, device)?,
            zero: Tensor::zeros(architecture.width, candle_core::DType::F32, device)?,
        };
        Ok(Self {
            position: take("position".to_owned())?,
            label: take("label.weight".to_owned())?,
            out_table: take("out_table".to_owned())?,
            tables: Tensor::stack(&tables, 0)?,
            architecture,
            patch_in,
            time1,
            time2,
            ada,
            blocks,
            patch_out,
            norm,
        })
    }

    /// The condition of one row: `time` from 0 (noise) to 1 (picture), `label` up to `classes` ("no class").
    pub fn condition(&self, time: f32, label: usize) -> Result<Condition> {
        let half = self.architecture.freq_width / 2;
        let angle =
            |i: usize| 1000.0 * time * libm::expf(-libm::logf(10_000.0) * i as f32 / half as f32);
        let mut waves: Vec<f32> = (0..half).map(|i| libm::cosf(angle(i))).collect();
        waves.extend((0..half).map(|i| libm::sinf(angle(i))));
        let waves = Tensor::from_vec(waves, (1, 2 * half), self.label.device())?;
        let time = self.time2.forward(&self.time1.forward(&waves)?.silu()?)?;
        let both = (time + self.label.narrow(0, label, 1)?)?;
        let ada = self
            .ada
            .forward(&both.silu()?)?
            .reshape((1, 6, self.architecture.width))?;
        Ok(Condition {
            blocks: scales_plus_one(&self.tables.broadcast_add(&ada)?)?,
            out: scales_plus_one(&self.out_table.broadcast_add(&both)?)?,
        })
    }

    /// The predicted clean picture of each row. `x`: `[rows, tokens, patch_width]`, one condition a row.
    ///
    /// `trace` receives the output of each block, `[rows, tokens, width]`.
    pub fn forward(
        &self,
        x: &Tensor,
        conditions: &[Condition],
        mut trace: Option<&mut Vec<Tensor>>,
    ) -> Result<Tensor> {
        let blocks: Vec<&Tensor> = conditions.iter().map(|c| &c.blocks).collect();
        let blocks = Tensor::stack(&blocks, 0)?;
        let outs: Vec<&Tensor> = conditions.iter().map(|c| &c.out).collect();
        let outs = Tensor::stack(&outs, 0)?;
        let mut h = self.patch_in.forward(x)?.broadcast_add(&self.position)?;
        for (i, block) in self.blocks.iter().enumerate() {
            let m = blocks.narrow(1, i, 1)?.squeeze(1)?;
            h = self.block(block, h, &m)?;
            if let Some(trace) = trace.as_deref_mut() {
                trace.push(h.clone());
            }
        }
        let h = modulate(&self.norm.forward(&h)?, &outs, 0)?;
        self.patch_out.forward(&h)
    }

    /// `m`: `[rows, 6, width]`: shift, 1 + scale, gate of the attention, then of the MLP.
    fn block(&self, block: &Block, x: Tensor, m: &Tensor) -> Result<Tensor> {
        let (rows, tokens, width) = x.dims3()?;
        let heads = self.architecture.heads;
        let h = modulate(&self.norm.forward(&x)?, m, 0)?;
        let qkv = block
            .qkv
            .forward(&h)?
            .reshape((rows, tokens, 3, heads, width / heads))?;
        let part = |i: usize| {
            qkv.narrow(2, i, 1)?
                .squeeze(2)?
                .transpose(1, 2)?
                .contiguous()
        };
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let scale = 1.0 / ((width / heads) as f64).sqrt();
        let weights = softmax_last_dim(&(q.matmul(&k.t()?)? * scale)?)?;
        let h = weights
            .matmul(&v)?
            .transpose(1, 2)?
            .reshape((rows, tokens, width))?;
        let x = (x + block.proj.forward(&h)?.broadcast_mul(&m.narrow(1, 2, 1)?)?)?;
        let h = modulate(&self.norm.forward(&x)?, m, 3)?;
        let h = block.fc2.forward(&block.fc1.forward(&h)?.gelu()?)?;
        x + h.broadcast_mul(&m.narrow(1, 5, 1)?)?
    }
}

/// x * (1 + scale) + shift, with the shift at `at` and 1 + scale after it. `m`: `[rows, n, width]`.
fn modulate(x: &Tensor, m: &Tensor, at: usize) -> Result<Tensor> {
    x.broadcast_mul(&m.narrow(1, at + 1, 1)?)?
        .broadcast_add(&m.narrow(1, at, 1)?)
}

/// Adds 1 to every third row from the second on, which is where the scales are.
fn scales_plus_one(m: &Tensor) -> Result<Tensor> {
    let n = m.dim(D::Minus2)?;
    let ones: Vec<f32> = (0..n).map(|i| if i % 3 == 1 { 1.0 } else { 0.0 }).collect();
    m.broadcast_add(&Tensor::from_vec(ones, (n, 1), m.device())?)
}
