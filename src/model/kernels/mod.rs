//! The arithmetic of the network on a processor: products with fused ends, norm, attention.
//!
//! The promise: the same bytes on every processor. Each element of a product is one chain of fused multiply-adds
//! over the inputs, in their order; sums of a row have 16 lanes, added in one fixed order; exponentials are a polynomial of
//! this module's own. None of that depends on how wide the vectors are, how the work is blocked, what else is in
//! the batch or how many threads there are, and IEEE 754 fixes the rest. So AVX-512, AVX2, NEON and plain Rust
//! may be chosen at run time, and nobody can see from a picture which of them drew it.
//!
//! Weights keep the file's number format and are widened to f32 on their way into the registers, which is exact.
//! [`pack`] brings them into the order that the products read: panels of [`NR`] output features, and in a panel all
//! output features of the first input, then of the second. That is the same number of bytes, so it is done in place.
//!
//! This is the only module with `unsafe`, of two kinds: calling code that is compiled for a processor's extensions, after
//! [`Isa::detect`] has seen them, and the loads of the innermost loops ([`tile`]), whose bounds [`linear`] checks once a
//! product. Everything else is plain Rust, vectorised by the compiler under the same extensions.

mod tile;

use half::{bf16, f16};
use safetensors::Dtype;
use tile::Simd;

#[cfg(target_endian = "big")]
compile_error!("weights are read in place, in the little-endian order of their file");

/// Output features of a panel.
pub const NR: usize = 32;
/// Lanes of a row's sums.
const LANES: usize = 16;

/// Which instructions compute. Every variant is there on the machine that [`Isa::detect`] or [`Isa::all`] ran on, and
/// only they make one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Isa {
    /// The fastest one of this machine.
    pub fn detect() -> Self {
        Self::all()[0]
    }

    /// All of this machine, the fastest first.
    pub fn all() -> Vec<Self> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
        {
            if is_x86_feature_detected!("avx512f") {
                all.push(Self(Kind::Avx512));
            }
            all.push(Self(Kind::Avx2));
        }
        all.push(Self(Kind::Portable));
        all
    }
}

/// Work that is compiled once for each set of instructions.
trait Work {
    /// # Safety
    /// The machine has the instructions of `S`.
    unsafe fn run<S: Simd>(self);
}

fn dispatch(isa: Isa, work: impl Work) {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    unsafe fn avx512(work: impl Work) {
        // SAFETY: the caller's.
        unsafe { work.run::<tile::Avx512>() }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn avx2(work: impl Work) {
        // SAFETY: the caller's.
        unsafe { work.run::<tile::Avx2>() }
    }
    // SAFETY: an `Isa` is made by `Isa::all` alone, which has seen the instructions.
    unsafe {
        match isa.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => avx512(work),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => avx2(work),
            Kind::Portable => work.run::<tile::Portable>(),
        }
    }
}

/// Numbers in one of the formats of a weights file.
#[derive(Clone, Copy)]
pub enum Values<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

impl<'a> Values<'a> {
    /// `bytes` are whole numbers of a format that the header check lets through, and aligned for them.
    pub fn new(dtype: Dtype, bytes: &'a [u8]) -> Self {
        match dtype {
            Dtype::F32 => Self::F32(bytemuck::cast_slice(bytes)),
            Dtype::F16 => Self::F16(bytemuck::cast_slice(bytes)),
            Dtype::BF16 => Self::Bf16(bytemuck::cast_slice(bytes)),
            other => unreachable!("the header check lets no {other} through"),
        }
    }

    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F16(v) => v.len(),
            Self::Bf16(v) => v.len(),
        }
    }

    /// Those from `at` on, `n` of them.
    pub fn part(&self, at: usize, n: usize) -> Self {
        match self {
            Self::F32(v) => Self::F32(&v[at..at + n]),
            Self::F16(v) => Self::F16(&v[at..at + n]),
            Self::Bf16(v) => Self::Bf16(&v[at..at + n]),
        }
    }

    /// Writes them to `out`, which is as long.
    #[inline(always)]
    pub fn widen(&self, out: &mut [f32]) {
        match self {
            Self::F32(v) => out.copy_from_slice(v),
            Self::F16(v) => {
                assert_eq!(v.len(), out.len());
                for (out, v) in out.iter_mut().zip(*v) {
                    *out = widen_f16(v.to_bits());
                }
            }
            Self::Bf16(v) => {
                assert_eq!(v.len(), out.len());
                for (out, v) in out.iter_mut().zip(*v) {
                    *out = f32::from_bits(u32::from(v.to_bits()) << 16);
                }
            }
        }
    }
}

/// f16 to f32, exactly, without branches: the compiler makes vectors of it on any machine.
#[inline(always)]
fn widen_f16(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff) << 13;
    // The exponents differ by 112; multiplying also gives subnormals their exponent.
    let value = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
    // Infinity and NaN have come out with a finite exponent.
    let special = if magnitude >= 0x7c00 << 13 {
        0xff << 23
    } else {
        0
    };
    f32::from_bits(value.to_bits() | special | sign)
}

/// A packed matrix, see [`pack`]: `outputs` x `inputs` numbers.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    pub values: Values<'a>,
    pub inputs: usize,
    pub outputs: usize,
}

/// Brings one panel into the order of the products, in place. `panel` holds up to [`NR`] rows of `inputs` numbers of
/// `size` bytes as the file has them. `scratch` is reused from panel to panel.
pub fn pack(panel: &mut [u8], inputs: usize, size: usize, scratch: &mut Vec<u8>) {
    fn transpose<const SIZE: usize>(panel: &mut [u8], inputs: usize, scratch: &mut Vec<u8>) {
        let rows = panel.len() / (inputs * SIZE);
        scratch.clear();
        scratch.extend_from_slice(panel);
        let (from, to) = (
            scratch.as_chunks::<SIZE>().0,
            panel.as_chunks_mut::<SIZE>().0,
        );
        if rows == NR {
            // The usual case, with a number of rows that the compiler knows: 700 MB in a sixth of a second.
            for (input, to) in to.as_chunks_mut::<NR>().0.iter_mut().enumerate() {
                for (row, to) in to.iter_mut().enumerate() {
                    *to = from[row * inputs + input];
                }
            }
            return;
        }
        for (input, to) in to.chunks_exact_mut(rows).enumerate() {
            for (row, to) in to.iter_mut().enumerate() {
                *to = from[row * inputs + input];
            }
        }
    }
    match size {
        2 => transpose::<2>(panel, inputs, scratch),
        _ => transpose::<4>(panel, inputs, scratch),
    }
}

/// Rows of numbers, `stride` apart.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub values: &'a [f32],
    pub stride: usize,
    pub count: usize,
}

impl<'a> Rows<'a> {
    /// Rows of `width` that follow each other.
    pub fn new(values: &'a [f32], width: usize) -> Self {
        Self {
            values,
            stride: width,
            count: values.len() / width,
        }
    }
}

/// What becomes of a product's result.
#[derive(Clone, Copy)]
pub enum Then<'a> {
    Store,
    /// GELU, with its approximation by tanh.
    Gelu,
    Silu,
    /// Row t is multiplied by `gates[row_of[t] * stride..]` and added to what is there.
    AddGated {
        gates: &'a [f32],
        stride: usize,
        row_of: &'a [u32],
    },
    /// The `row_of[t]`th row of a table is added to row t.
    AddRow {
        table: Values<'a>,
        row_of: &'a [u32],
    },
}

/// A product with its fused end: `out[t] = then(bias + matrix * x[t])`.
pub struct Linear<'a> {
    pub x: Rows<'a>,
    pub matrix: Matrix<'a>,
    /// None: zero.
    pub bias: Option<Values<'a>>,
    pub then: Then<'a>,
}

/// Rows of `out` are `stride` apart. `scratch` is reused from product to product.
///
/// # Panics
/// Where the sizes do not fit each other.
pub fn linear(isa: Isa, job: Linear<'_>, out: &mut [f32], stride: usize, scratch: &mut Vec<f32>) {
    dispatch(
        isa,
        LinearWork {
            keep: job.matrix.outputs,
            job,
            out,
            stride,
            scratch,
        },
    );
}

struct LinearWork<'a> {
    job: Linear<'a>,
    out: &'a mut [f32],
    stride: usize,
    /// Output features that are wanted: a padded panel has more.
    keep: usize,
    scratch: &'a mut Vec<f32>,
}

impl Work for LinearWork<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's.
        unsafe { self.product::<S>() }
    }
}

impl LinearWork<'_> {
    /// # Safety
    /// As of [`Work::run`].
    #[inline(always)]
    unsafe fn product<S: Simd>(self) {
        let Self {
            job,
            out,
            stride,
            keep,
            scratch,
        } = self;
        let Matrix {
            values,
            inputs,
            outputs,
        } = job.matrix;
        let x = job.x;
        if x.count == 0 || outputs == 0 {
            return;
        }
        // What the loads of the tiles rely on.
        assert!(inputs >= 1 && x.values.len() >= (x.count - 1) * x.stride + inputs);
        assert_eq!(values.len(), inputs * outputs);
        if let Some(bias) = job.bias {
            assert_eq!(bias.len(), outputs);
        }
        if let Then::AddGated { row_of, .. } | Then::AddRow { row_of, .. } = job.then {
            assert_eq!(row_of.len(), x.count);
        }
        for first in (0..keep).step_by(NR) {
            let columns = NR.min(outputs - first);
            let mut start = [0.0; NR];
            if let Some(bias) = job.bias {
                bias.part(first, columns).widen(&mut start[..columns]);
            }
            let mut panel = values.part(first * inputs, columns * inputs);
            let whole = columns == NR;
            if !whole || !(S::WIDENS || matches!(panel, Values::F32(_))) {
                scratch.resize(inputs * NR, 0.0);
                for input in 0..inputs {
                    let (row, rest) = scratch[input * NR..][..NR].split_at_mut(columns);
                    panel.part(input * columns, columns).widen(row);
                    rest.fill(0.0);
                }
                panel = Values::F32(&scratch[..inputs * NR]);
            }
            let tiles = Tiles {
                x,
                inputs,
                start: &start,
                then: job.then,
                outputs,
                first,
                columns: columns.min(keep - first),
            };
            let at = Place {
                out: &mut *out,
                stride,
            };
            // SAFETY: the panel has NR numbers for each input, and the rows were checked above.
            unsafe {
                match panel {
                    Values::F32(v) => tiles.run::<S, { tile::F32 }>(v.as_ptr().cast(), at),
                    Values::F16(v) => tiles.run::<S, { tile::F16 }>(v.as_ptr().cast(), at),
                    Values::Bf16(v) => tiles.run::<S, { tile::BF16 }>(v.as_ptr().cast(), at),
                }
            }
        }
    }
}

/// All rows through one panel.
struct Tiles<'a> {
    x: Rows<'a>,
    inputs: usize,
    start: &'a [f32; NR],
    then: Then<'a>,
    outputs: usize,
    /// The panel's first output feature.
    first: usize,
    /// Its output features; what is beyond them is left out.
    columns: usize,
}

struct Place<'a> {
    out: &'a mut [f32],
    stride: usize,
}

impl Tiles<'_> {
    /// # Safety
    /// As of [`Work::run`]; `panel` has [`NR`] x `inputs` numbers of `FORMAT`, `x` has `inputs` numbers in every row.
    #[inline(always)]
    unsafe fn run<S: Simd, const FORMAT: u8>(&self, panel: *const u8, mut at: Place<'_>) {
        let mut row = 0;
        while row < self.x.count {
            let left = (self.x.count - row).min(S::ROWS);
            // SAFETY: the caller's; `left` rows are left.
            unsafe {
                match left {
                    1 => self.tile::<S, FORMAT, 1>(panel, row, &mut at),
                    2 => self.tile::<S, FORMAT, 2>(panel, row, &mut at),
                    3 => self.tile::<S, FORMAT, 3>(panel, row, &mut at),
                    4 => self.tile::<S, FORMAT, 4>(panel, row, &mut at),
                    5 => self.tile::<S, FORMAT, 5>(panel, row, &mut at),
                    6 => self.tile::<S, FORMAT, 6>(panel, row, &mut at),
                    7 => self.tile::<S, FORMAT, 7>(panel, row, &mut at),
                    _ => self.tile::<S, FORMAT, 8>(panel, row, &mut at),
                }
            }
            row += left;
        }
    }

    /// # Safety
    /// As above, and there are `M` rows from `row` on.
    #[inline(always)]
    unsafe fn tile<S: Simd, const FORMAT: u8, const M: usize>(
        &self,
        panel: *const u8,
        row: usize,
        at: &mut Place<'_>,
    ) {
        if M > S::ROWS {
            // Never taken: said so that no code is made for it.
            return;
        }
        let mut results = [*self.start; M];
        // SAFETY: the caller's.
        unsafe {
            let x = self.x.values.as_ptr().add(row * self.x.stride);
            S::tile::<M, FORMAT>(self.inputs, x, self.x.stride, panel, &mut results);
        }
        for (i, result) in results.iter_mut().enumerate() {
            let row = row + i;
            let out = &mut at.out[row * at.stride + self.first..][..self.columns];
            match self.then {
                Then::Store => {}
                Then::Gelu => result.iter_mut().for_each(|v| *v = gelu(*v)),
                Then::Silu => result.iter_mut().for_each(|v| *v = silu_of(*v)),
                Then::AddGated {
                    gates,
                    stride,
                    row_of,
                } => {
                    let at = row_of[row] as usize * stride + self.first;
                    let gates = &gates[at..][..self.columns];
                    if let (Ok(out), Ok(gates)) = (
                        <&mut [f32; NR]>::try_from(&mut *out),
                        <&[f32; NR]>::try_from(gates),
                    ) {
                        for i in 0..NR {
                            out[i] = gates[i].mul_add(result[i], out[i]);
                        }
                    } else {
                        for ((out, gate), result) in out.iter_mut().zip(gates).zip(&*result) {
                            *out = gate.mul_add(*result, *out);
                        }
                    }
                    continue;
                }
                Then::AddRow { table, row_of } => {
                    let at = row_of[row] as usize * self.outputs + self.first;
                    let mut added = [0.0; NR];
                    let part = table.part(at, self.columns);
                    part.widen(&mut added[..self.columns]);
                    for i in 0..NR {
                        result[i] += added[i];
                    }
                }
            }
            if let Ok(out) = <&mut [f32; NR]>::try_from(&mut *out) {
                *out = *result;
            } else {
                out.copy_from_slice(&result[..self.columns]);
            }
        }
    }
}

/// Layer norm without weights of its own, then `* scale + shift` of the row's condition.
pub struct NormModulate<'a> {
    pub x: Rows<'a>,
    pub eps: f32,
    /// Row t has its shifts from `row_of[t] * stride + at` on, and behind them its scales.
    pub modulation: &'a [f32],
    pub stride: usize,
    pub at: usize,
    pub row_of: &'a [u32],
}

/// Rows of `out` follow each other.
pub fn norm_modulate(isa: Isa, job: NormModulate<'_>, out: &mut [f32]) {
    dispatch(isa, NormWork { job, out });
}

struct NormWork<'a> {
    job: NormModulate<'a>,
    out: &'a mut [f32],
}

impl Work for NormWork<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { job, out } = self;
        let width = job.x.stride;
        for (t, (x, out)) in job
            .x
            .values
            .chunks_exact(width)
            .zip(out.chunks_exact_mut(width))
            .enumerate()
        {
            let mean = sum(x, |v| v) / width as f32;
            let variance = sum(x, |v| (v - mean) * (v - mean)) / width as f32;
            let inverse = 1.0 / (variance + job.eps).sqrt();
            let at = job.row_of[t] as usize * job.stride + job.at;
            let (shift, scale) = job.modulation[at..at + 2 * width].split_at(width);
            for (((out, &x), &shift), &scale) in out.iter_mut().zip(x).zip(shift).zip(scale) {
                *out = ((x - mean) * inverse).mul_add(scale, shift);
            }
        }
    }
}

/// Attention of some tokens of one row, one head.
pub struct Attention<'a> {
    /// Queries, each of `features` numbers.
    pub queries: Rows<'a>,
    pub features: usize,
    /// `features` x tokens, in whole panels: what is beyond the tokens is anything finite.
    pub keys: &'a [f32],
    /// tokens x `features`, in whole panels.
    pub values: &'a [f32],
    pub tokens: usize,
    pub scale: f32,
}

/// Rows of `out` are `stride` apart. `scratch` is reused from call to call.
pub fn attention(
    isa: Isa,
    job: Attention<'_>,
    out: &mut [f32],
    stride: usize,
    scratch: &mut AttentionScratch,
) {
    dispatch(
        isa,
        AttentionWork {
            job,
            out,
            stride,
            scratch,
        },
    );
}

#[derive(Default)]
pub struct AttentionScratch {
    scores: Vec<f32>,
    unused: Vec<f32>,
}

/// Queries at a time: their scores stay in the nearest cache, whatever the number of tokens.
const QUERIES: usize = 16;

struct AttentionWork<'a> {
    job: Attention<'a>,
    out: &'a mut [f32],
    stride: usize,
    scratch: &'a mut AttentionScratch,
}

impl Work for AttentionWork<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self {
            job,
            out,
            stride,
            scratch: AttentionScratch { scores, unused },
        } = self;
        let (tokens, features, queries) = (job.tokens, job.features, job.queries);
        let padded = tokens.next_multiple_of(NR);
        scores.resize(QUERIES * padded, 0.0);
        for start in (0..queries.count).step_by(QUERIES) {
            let count = QUERIES.min(queries.count - start);
            let product = LinearWork {
                job: Linear {
                    x: Rows {
                        values: &queries.values[start * queries.stride..],
                        count,
                        ..queries
                    },
                    matrix: Matrix {
                        values: Values::F32(job.keys),
                        inputs: features,
                        outputs: padded,
                    },
                    bias: None,
                    then: Then::Store,
                },
                out: &mut *scores,
                stride: padded,
                keep: tokens,
                scratch: &mut *unused,
            };
            // SAFETY: the caller's.
            unsafe { product.product::<S>() };
            for row in scores.chunks_exact_mut(padded).take(count) {
                softmax(&mut row[..tokens], job.scale);
            }
            let product = LinearWork {
                job: Linear {
                    x: Rows {
                        values: scores,
                        stride: padded,
                        count,
                    },
                    matrix: Matrix {
                        values: Values::F32(job.values),
                        inputs: tokens,
                        outputs: features.next_multiple_of(NR),
                    },
                    bias: None,
                    then: Then::Store,
                },
                out: &mut out[start * stride..],
                stride,
                keep: features,
                scratch: &mut *unused,
            };
            // SAFETY: the caller's.
            unsafe { product.product::<S>() };
        }
    }
}

/// exp(scale * (x - max)) / sum.
#[inline(always)]
fn softmax(row: &mut [f32], scale: f32) {
    let factor = scale * std::f32::consts::LOG2_E;
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (blocks, rest) = row.as_chunks::<LANES>();
    for block in blocks {
        for (lane, &v) in lanes.iter_mut().zip(block) {
            *lane = if v > *lane { v } else { *lane };
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(rest) {
        *lane = if v > *lane { v } else { *lane };
    }
    let max = lanes
        .iter()
        .fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    let offset = -max * factor;
    for v in row.iter_mut() {
        *v = exp2(v.mul_add(factor, offset));
    }
    let inverse = 1.0 / sum(row, |v| v);
    for v in row.iter_mut() {
        *v *= inverse;
    }
}

/// What time and class do to each row: `out = table + condition`, with 1 added where a scale is, which is every third
/// part of `width` from the second on. A condition has as many numbers as the table, or `width`, used for each part.
pub fn modulation(isa: Isa, table: Values<'_>, condition: &[f32], width: usize, out: &mut [f32]) {
    dispatch(
        isa,
        ModulationWork {
            table,
            condition,
            width,
            out,
        },
    );
}

struct ModulationWork<'a> {
    table: Values<'a>,
    condition: &'a [f32],
    width: usize,
    out: &'a mut [f32],
}

impl Work for ModulationWork<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        self.table.widen(self.out);
        let parts = self.out.chunks_exact_mut(self.width).enumerate();
        for (i, part) in parts {
            let one = if i % 3 == 1 { 1.0 } else { 0.0 };
            let at = i * self.width % self.condition.len();
            for (v, &c) in part.iter_mut().zip(&self.condition[at..]) {
                *v = (*v + c) + one;
            }
        }
    }
}

/// In place.
pub fn silu(isa: Isa, values: &mut [f32]) {
    struct SiluWork<'a>(&'a mut [f32]);
    impl Work for SiluWork<'_> {
        #[inline(always)]
        unsafe fn run<S: Simd>(self) {
            for v in self.0 {
                *v = silu_of(*v);
            }
        }
    }
    dispatch(isa, SiluWork(values));
}

/// The sum of f over a row: lane i has every 16th element from i on, in order; then lanes are added in halves.
#[inline(always)]
fn sum(row: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (blocks, rest) = row.as_chunks::<LANES>();
    for block in blocks {
        for i in 0..LANES {
            lanes[i] += f(block[i]);
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(rest) {
        *lane += f(v);
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// 2^t within 2 units of the last place; 2^-126 below -126, infinity from 128 on, NaN for NaN.
#[inline(always)]
fn exp2(t: f32) -> f32 {
    /// Adding it leaves the nearest whole number in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    // Comparisons that are false for NaN, so that it comes out again.
    let t = if t < -126.0 { -126.0 } else { t };
    let t = if t > 128.0 { 128.0 } else { t };
    let shifted = t + ROUND;
    let r = t - (shifted - ROUND);
    // Least greatest relative error on -0.5 to 0.5 (2e-9 before rounding), with 1 for 2^0.
    let mut p = 0.000_153_533_62_f32;
    p = p.mul_add(r, 0.001_339_887_4);
    p = p.mul_add(r, 0.009_618_437);
    p = p.mul_add(r, 0.055_503_324);
    p = p.mul_add(r, 0.240_226_48);
    p = p.mul_add(r, std::f32::consts::LN_2);
    p = p.mul_add(r, 1.0);
    // The whole part goes to the exponent.
    let value = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
    if t.is_nan() { t } else { value }
}

/// x / (1 + e^(-x)).
#[inline(always)]
fn silu_of(x: f32) -> f32 {
    x / (1.0 + exp2(x * -std::f32::consts::LOG2_E))
}

/// 0.5 x (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3), which is x / (1 + e^(-2u)).
#[inline(always)]
fn gelu(x: f32) -> f32 {
    const LINEAR: f32 = -2.302_208_2;
    const CUBIC: f32 = -0.102_943_24;
    x / (1.0 + exp2(x * (x * x).mul_add(CUBIC, LINEAR)))
}

#[cfg(test)]
mod tests;
