//! The network: a class-conditional diffusion transformer (DiT, Peebles & Xie 2023, arXiv 2212.09748) with one
//! adaLN projection for all blocks (adaLN-single, Chen et al. 2023, arXiv 2310.00426) that predicts the clean
//! picture. `scripts/train/dit.py` is the same network in PyTorch, and the reference that the tests hold
//! this one against.
//!
//! It is written once, against [`Ops`]: on a processor those are kernels of this crate, on an accelerator candle's tensors.

use super::accelerator::Accelerator;
use super::processor::Processor;
use super::{Architecture, ModelError, Weights};
use candle_core::{Device, Tensor};
use std::sync::Arc;

pub(super) const NORM_EPS: f32 = 1e-6;
/// Shift, 1 + scale and gate of the attention, then of the MLP.
const BLOCK_PARTS: usize = 6;
const SHIFT_1: usize = 0;
const GATE_1: usize = 2;
const SHIFT_2: usize = 3;
const GATE_2: usize = 5;

/// What the network is computed with. A value holds features of every token of some rows; where it is an output,
/// whatever was in it is lost, and its memory is used again.
pub(super) trait Ops {
    /// A weight matrix and its bias.
    type Linear;
    /// Other weights: `[n, width]`.
    type Table;
    type Value;

    /// A value without rows, to be an output.
    fn empty(&self) -> Self::Value;

    fn linear(
        &mut self,
        linear: &Self::Linear,
        x: &Self::Value,
        then: Activation,
        out: &mut Self::Value,
    ) -> Result<(), ModelError>;

    /// `onto += gate * linear(x)`: the gate is the `gate`th part of `modulation`.
    fn add_gated(
        &mut self,
        linear: &Self::Linear,
        x: &Self::Value,
        modulation: &Self::Value,
        gate: usize,
        onto: &mut Self::Value,
    ) -> Result<(), ModelError>;

    /// `linear(x)` plus the position of each token.
    fn embed(
        &mut self,
        linear: &Self::Linear,
        x: &Self::Value,
        position: &Self::Table,
        out: &mut Self::Value,
    ) -> Result<(), ModelError>;

    /// Shifts, 1 + scales and gates of each row: the table plus the row's condition, which has as many parts as the
    /// table or one that is used for each.
    fn modulation(
        &mut self,
        table: &Self::Table,
        conditions: &[&Self::Value],
        out: &mut Self::Value,
    ) -> Result<(), ModelError>;

    /// Layer norm without weights, times the part after `shift` of `modulation`, plus the part `shift`.
    fn norm_modulate(
        &mut self,
        x: &Self::Value,
        modulation: &Self::Value,
        shift: usize,
        out: &mut Self::Value,
    ) -> Result<(), ModelError>;

    /// Attention of each row's tokens to each other. `qkv`: queries, keys and values, each of all heads.
    fn attention(
        &mut self,
        qkv: &Self::Value,
        heads: usize,
        out: &mut Self::Value,
    ) -> Result<(), ModelError>;

    /// Adds a row of a table to a value of one token.
    fn add_row(
        &mut self,
        table: &Self::Table,
        row: usize,
        onto: &mut Self::Value,
    ) -> Result<(), ModelError>;

    fn silu(&mut self, x: &Self::Value, out: &mut Self::Value) -> Result<(), ModelError>;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Activation {
    None,
    /// With its approximation by tanh.
    Gelu,
    Silu,
}

/// The weights, in a device's own form.
pub(super) struct Network<L, T> {
    heads: usize,
    patch_in: L,
    position: T,
    label: T,
    time1: L,
    time2: L,
    ada: L,
    blocks: Vec<Block<L, T>>,
    out_table: T,
    patch_out: L,
}

struct Block<L, T> {
    qkv: L,
    proj: L,
    fc1: L,
    fc2: L,
    table: T,
}

/// What time and class do to a row, before each block's own table is added.
pub(super) struct Conditioned<V> {
    /// `[6 * width]`
    ada: V,
    /// `[width]`
    both: V,
}

/// Memory of a forward pass, used again by the next one.
pub(super) struct Buffers<V> {
    tokens: V,
    normed: V,
    wide: V,
    hidden: V,
    modulation: V,
}

impl<V: Default> Default for Buffers<V> {
    fn default() -> Self {
        Self::new(V::default)
    }
}

impl<V> Buffers<V> {
    pub(super) fn new(empty: impl Fn() -> V) -> Self {
        Self {
            tokens: empty(),
            normed: empty(),
            wide: empty(),
            hidden: empty(),
            modulation: empty(),
        }
    }
}

/// Sees the output of each block.
pub(super) type Trace<'a, V> = Option<&'a mut dyn FnMut(&V)>;

/// Names of all [`Network`] weights that are matrices of a linear layer, without `.weight` and `.bias`.
pub(super) fn linear_names(architecture: &Architecture) -> Vec<String> {
    let outer = ["patch_in", "time1", "time2", "ada", "patch_out"].map(str::to_owned);
    let blocks = (0..architecture.depth)
        .flat_map(|i| ["qkv", "proj", "fc1", "fc2"].map(|part| format!("blocks.{i}.{part}")));
    outer.into_iter().chain(blocks).collect()
}

impl<L, T> Network<L, T> {
    /// Takes each part by its name.
    pub(super) fn new(
        architecture: &Architecture,
        mut linear: impl FnMut(&str) -> Result<L, ModelError>,
        mut table: impl FnMut(&str) -> Result<T, ModelError>,
    ) -> Result<Self, ModelError> {
        let blocks = (0..architecture.depth)
            .map(|i| {
                let part = |name: &str| format!("blocks.{i}.{name}");
                Ok(Block {
                    qkv: linear(&part("qkv"))?,
                    proj: linear(&part("proj"))?,
                    fc1: linear(&part("fc1"))?,
                    fc2: linear(&part("fc2"))?,
                    table: table(&part("table"))?,
                })
            })
            .collect::<Result<_, ModelError>>()?;
        Ok(Self {
            heads: architecture.heads,
            patch_in: linear("patch_in")?,
            position: table("position")?,
            label: table("label.weight")?,
            time1: linear("time1")?,
            time2: linear("time2")?,
            ada: linear("ada")?,
            blocks,
            out_table: table("out_table")?,
            patch_out: linear("patch_out")?,
        })
    }

    /// `waves`: see [`waves`].
    pub(super) fn condition<O: Ops<Linear = L, Table = T>>(
        &self,
        ops: &mut O,
        waves: &O::Value,
        label: usize,
    ) -> Result<Conditioned<O::Value>, ModelError> {
        let (mut hidden, mut both, mut ada) = (ops.empty(), ops.empty(), ops.empty());
        ops.linear(&self.time1, waves, Activation::Silu, &mut hidden)?;
        ops.linear(&self.time2, &hidden, Activation::None, &mut both)?;
        ops.add_row(&self.label, label, &mut both)?;
        ops.silu(&both, &mut hidden)?;
        ops.linear(&self.ada, &hidden, Activation::None, &mut ada)?;
        Ok(Conditioned { ada, both })
    }

    /// The predicted clean picture of each row. `trace` sees the output of each block.
    pub(super) fn forward<O: Ops<Linear = L, Table = T>>(
        &self,
        ops: &mut O,
        x: &O::Value,
        conditions: &[&Conditioned<O::Value>],
        buffers: &mut Buffers<O::Value>,
        mut trace: Trace<'_, O::Value>,
        out: &mut O::Value,
    ) -> Result<(), ModelError> {
        let ada: Vec<&O::Value> = conditions.iter().map(|c| &c.ada).collect();
        let both: Vec<&O::Value> = conditions.iter().map(|c| &c.both).collect();
        let Buffers {
            tokens,
            normed,
            wide,
            hidden,
            modulation,
        } = buffers;
        ops.embed(&self.patch_in, x, &self.position, tokens)?;
        for block in &self.blocks {
            ops.modulation(&block.table, &ada, modulation)?;
            ops.norm_modulate(tokens, modulation, SHIFT_1, normed)?;
            ops.linear(&block.qkv, normed, Activation::None, wide)?;
            ops.attention(wide, self.heads, normed)?;
            ops.add_gated(&block.proj, normed, modulation, GATE_1, tokens)?;
            ops.norm_modulate(tokens, modulation, SHIFT_2, normed)?;
            ops.linear(&block.fc1, normed, Activation::Gelu, hidden)?;
            ops.add_gated(&block.fc2, hidden, modulation, GATE_2, tokens)?;
            if let Some(trace) = &mut trace {
                trace(tokens);
            }
        }
        ops.modulation(&self.out_table, &both, modulation)?;
        ops.norm_modulate(tokens, modulation, SHIFT_1, normed)?;
        ops.linear(&self.patch_out, normed, Activation::None, out)
    }
}

/// The time embedding: cosines, then sines, of falling frequency. By libm and not by the platform, so that they are the
/// same on every machine.
fn waves(time: f32, freq_width: usize) -> Vec<f32> {
    let half = freq_width / 2;
    let angle =
        |i: usize| 1000.0 * time * libm::expf(-libm::logf(10_000.0) * i as f32 / half as f32);
    let cosines = (0..half).map(|i| libm::cosf(angle(i)));
    cosines
        .chain((0..half).map(|i| libm::sinf(angle(i))))
        .collect()
}

/// The network with its weights, on one device.
pub struct Dit {
    architecture: Architecture,
    side: Side,
}

enum Side {
    Processor(Processor),
    Accelerator(Box<Accelerator>),
}

/// The condition of one row: cheap to clone, and the same for every row of that time and class.
#[derive(Clone)]
pub struct Condition(Given);

#[derive(Clone)]
enum Given {
    Processor(Arc<Conditioned<Vec<f32>>>),
    Accelerator(Arc<Conditioned<Tensor>>),
}

impl Dit {
    /// Takes the tensors over. Their names and shapes were checked with the header. On a processor `threads` compute;
    /// an accelerator has its own.
    ///
    /// # Errors
    /// [`ModelError`] if a tensor is missing or the device fails.
    pub fn new(weights: Weights, device: &Device, threads: usize) -> Result<Self, ModelError> {
        let architecture = weights.header.architecture.clone();
        let side = match device {
            Device::Cpu => Side::Processor(Processor::new(weights, threads)?),
            _ => Side::Accelerator(Box::new(Accelerator::new(&weights, device)?)),
        };
        Ok(Self { architecture, side })
    }

    /// The same of candle's own tensor operations on any device: what an accelerator computes with, testable where
    /// there is none.
    ///
    /// # Errors
    /// As [`Dit::new`].
    pub fn of_tensors(weights: &Weights, device: &Device) -> Result<Self, ModelError> {
        Ok(Self {
            architecture: weights.header.architecture.clone(),
            side: Side::Accelerator(Box::new(Accelerator::new(weights, device)?)),
        })
    }

    /// Rows from which on a row in a batch costs about as much as in any larger one.
    pub(super) fn batch_rows_min(&self) -> usize {
        match &self.side {
            Side::Processor(p) => p.batch_rows_min(),
            // Whatever the caller's own bound is.
            Side::Accelerator(_) => usize::MAX,
        }
    }

    /// Bytes of one condition.
    pub fn condition_bytes(&self) -> usize {
        (BLOCK_PARTS + 1) * self.architecture.width * size_of::<f32>()
    }

    /// The condition of a row: `time` from 0 (noise) to 1 (picture), `label` up to `classes` ("no class").
    ///
    /// # Errors
    /// The device's.
    pub fn condition(&mut self, time: f32, label: usize) -> Result<Condition, ModelError> {
        let waves = waves(time, self.architecture.freq_width);
        Ok(Condition(match &mut self.side {
            Side::Processor(p) => Given::Processor(Arc::new(p.condition(&waves, label)?)),
            Side::Accelerator(a) => Given::Accelerator(Arc::new(a.condition(waves, label)?)),
        }))
    }

    /// The predicted clean picture of each row, into `out`. `x`: `[rows, tokens, patch_width]`, one condition a row.
    ///
    /// `trace` receives the output of each block, `[rows, tokens, width]`.
    ///
    /// # Errors
    /// The device's.
    ///
    /// # Panics
    /// Where `x` has another number of rows than there are conditions, or a condition comes from another network.
    pub fn forward(
        &mut self,
        x: &[f32],
        conditions: &[Condition],
        trace: Option<&mut Vec<Vec<f32>>>,
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        const FOREIGN: &str = "a condition goes to the network that made it";
        let a = &self.architecture;
        assert_eq!(x.len(), conditions.len() * a.values());
        match &mut self.side {
            Side::Processor(p) => {
                let own = |c: &Condition| match &c.0 {
                    Given::Processor(c) => c.clone(),
                    Given::Accelerator(_) => panic!("{FOREIGN}"),
                };
                p.forward(x, conditions.iter().map(own).collect(), trace, out)
            }
            Side::Accelerator(p) => {
                let own = |c| match c {
                    &Condition(Given::Accelerator(ref c)) => &**c,
                    Condition(Given::Processor(_)) => panic!("{FOREIGN}"),
                };
                p.forward(
                    x,
                    &conditions.iter().map(own).collect::<Vec<_>>(),
                    trace,
                    out,
                )
            }
        }
    }
}
