//! Each kernel against a plain reference, on random shapes; and each set of instructions against the others, by bits.

use super::*;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Rounds of random shapes; few where every instruction is interpreted.
const ROUNDS: usize = if cfg!(miri) { 3 } else { 60 };

struct Random(ChaCha8Rng);

impl Random {
    fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    fn below(&mut self, n: usize) -> usize {
        (self.0.next_u64() % n as u64) as usize
    }

    fn size(&mut self) -> usize {
        let most = if cfg!(miri) { 70 } else { 150 };
        1 + self.below(most)
    }

    /// -1 to 1.
    fn number(&mut self) -> f32 {
        (self.0.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    fn numbers(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.number()).collect()
    }
}

/// Numbers in a format of a file: their bytes, and what they are worth.
struct Stored {
    dtype: Dtype,
    bytes: Vec<u64>,
    count: usize,
    worth: Vec<f32>,
}

impl Stored {
    fn new(dtype: Dtype, numbers: &[f32]) -> Self {
        let raw: Vec<u8> = match dtype {
            Dtype::F32 => numbers.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::F16 => numbers
                .iter()
                .flat_map(|v| f16::from_f32(*v).to_le_bytes())
                .collect(),
            _ => numbers
                .iter()
                .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
                .collect(),
        };
        let worth = match dtype {
            Dtype::F32 => numbers.to_vec(),
            Dtype::F16 => numbers.iter().map(|v| f16::from_f32(*v).to_f32()).collect(),
            _ => numbers
                .iter()
                .map(|v| bf16::from_f32(*v).to_f32())
                .collect(),
        };
        let mut bytes = vec![0_u64; raw.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut bytes)[..raw.len()].copy_from_slice(&raw);
        Self {
            dtype,
            bytes,
            count: numbers.len(),
            worth,
        }
    }

    fn raw(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.bytes)[..self.count * self.dtype.bitsize() / 8]
    }

    fn values(&self) -> Values<'_> {
        Values::new(self.dtype, self.raw())
    }

    /// As a matrix of `inputs` columns, packed.
    fn packed(mut self, inputs: usize) -> Self {
        let size = self.dtype.bitsize() / 8;
        let n = self.count * size;
        let bytes = &mut bytemuck::cast_slice_mut::<u64, u8>(&mut self.bytes)[..n];
        for panel in bytes.chunks_mut(NR * inputs * size) {
            pack(panel, inputs, size, &mut Vec::new());
        }
        self
    }
}

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

#[track_caller]
fn assert_near(ours: &[f32], reference: &[f64]) {
    assert_eq!(ours.len(), reference.len());
    for (a, b) in ours.iter().zip(reference) {
        let off = (f64::from(*a) - b).abs() / b.abs().max(1.0);
        assert!(off < 2e-5, "{a}, not {b}");
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Runs `draw` with every set of instructions, and wants the same bits of each.
fn with_all(draw: impl Fn(Isa) -> Vec<f32>) -> Vec<f32> {
    let mut all = Isa::all().into_iter().map(|isa| (isa, draw(isa)));
    let (first, result) = all.next().unwrap();
    for (isa, other) in all {
        assert_eq!(bits(&result), bits(&other), "{first:?} and {isa:?} differ");
    }
    result
}

fn reference_gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
}

#[test]
fn products_agree_with_a_plain_reference_in_every_format_and_with_every_end() {
    let mut random = Random::new(1);
    for round in 0..ROUNDS {
        let (inputs, outputs, count) = (random.size(), random.size(), 1 + random.below(35));
        let stride = inputs + random.below(5);
        let dtype = DTYPES[round % 3];
        let x = random.numbers((count - 1) * stride + inputs);
        let weight = Stored::new(dtype, &random.numbers(inputs * outputs));
        let worth = weight.worth.clone();
        let weight = weight.packed(inputs);
        let bias = Stored::new(DTYPES[round / 3 % 3], &random.numbers(outputs));
        let table = Stored::new(DTYPES[round / 9 % 3], &random.numbers(4 * outputs));
        let row_of: Vec<u32> = (0..count).map(|_| random.below(4) as u32).collect();
        let gates = random.numbers(4 * (outputs + 3));
        let before = random.numbers(count * outputs);
        let ends = [
            Then::Store,
            Then::Gelu,
            Then::Silu,
            Then::AddGated {
                gates: &gates,
                stride: outputs + 3,
                row_of: &row_of,
            },
            Then::AddRow {
                table: table.values(),
                row_of: &row_of,
            },
        ];
        for then in ends {
            let ours = with_all(|isa| {
                let job = Linear {
                    x: Rows {
                        values: &x,
                        stride,
                        count,
                    },
                    matrix: Matrix {
                        values: weight.values(),
                        inputs,
                        outputs,
                    },
                    bias: Some(bias.values()),
                    then,
                };
                let mut out = before.clone();
                linear(isa, job, &mut out, outputs, &mut vec![7.0; 3]);
                out
            });
            let mut reference = Vec::new();
            for t in 0..count {
                for o in 0..outputs {
                    let products = (0..inputs)
                        .map(|k| f64::from(x[t * stride + k]) * f64::from(worth[o * inputs + k]));
                    let y = f64::from(bias.worth[o]) + products.sum::<f64>();
                    let row = row_of[t] as usize;
                    reference.push(match then {
                        Then::Store => y,
                        Then::Gelu => reference_gelu(y),
                        Then::Silu => y / (1.0 + (-y).exp()),
                        Then::AddGated { .. } => {
                            f64::from(before[t * outputs + o])
                                + f64::from(gates[row * (outputs + 3) + o]) * y
                        }
                        Then::AddRow { .. } => y + f64::from(table.worth[row * outputs + o]),
                    });
                }
            }
            assert_near(&ours, &reference);
        }
    }
}

/// The promise that makes pictures the same: a row's result does not depend on what is computed beside it.
#[test]
fn a_rows_product_is_the_same_bits_alone_and_among_others_and_is_one_chain() {
    let mut random = Random::new(2);
    for _ in 0..ROUNDS / 3 {
        let (inputs, outputs, count) = (random.size(), random.size(), 1 + random.below(20));
        let x = random.numbers(count * inputs);
        let numbers = random.numbers(inputs * outputs);
        let weight = Stored::new(Dtype::F16, &numbers);
        let worth = weight.worth.clone();
        let weight = weight.packed(inputs);
        let product = |x: &[f32]| {
            with_all(|isa| {
                let job = Linear {
                    x: Rows::new(x, inputs),
                    matrix: Matrix {
                        values: weight.values(),
                        inputs,
                        outputs,
                    },
                    bias: None,
                    then: Then::Store,
                };
                let mut out = vec![0.0; x.len() / inputs * outputs];
                linear(isa, job, &mut out, outputs, &mut Vec::new());
                out
            })
        };
        let all = product(&x);
        for (x, among) in x.chunks(inputs).zip(all.chunks(outputs)) {
            assert_eq!(bits(&product(x)), bits(among));
            for (o, &among) in among.iter().enumerate() {
                let chain = x
                    .iter()
                    .zip(&worth[o * inputs..])
                    .fold(0.0_f32, |sum, (a, b)| a.mul_add(*b, sum));
                assert_eq!(chain.to_bits(), among.to_bits());
            }
        }
    }
}

#[test]
fn packing_is_a_transposition_of_each_panel() {
    let mut random = Random::new(3);
    for size in [2, 4] {
        let (inputs, outputs) = (random.size(), random.size());
        let bytes: Vec<u8> = (0..inputs * outputs * size)
            .map(|_| random.below(256) as u8)
            .collect();
        let mut packed = bytes.clone();
        for panel in packed.chunks_mut(NR * inputs * size) {
            pack(panel, inputs, size, &mut Vec::new());
        }
        for output in 0..outputs {
            let (first, columns) = (output / NR * NR, NR.min(outputs - output / NR * NR));
            for input in 0..inputs {
                let ours = (first * inputs + input * columns + output - first) * size;
                let theirs = (output * inputs + input) * size;
                assert_eq!(packed[ours..ours + size], bytes[theirs..theirs + size]);
            }
        }
    }
}

#[test]
fn norms_agree_with_a_plain_reference() {
    let mut random = Random::new(4);
    for _ in 0..ROUNDS {
        let (width, count) = (random.size(), 1 + random.below(20));
        let x: Vec<f32> = random
            .numbers(width * count)
            .iter()
            .map(|v| 3.0 * v + 1.0)
            .collect();
        let (rows, parts) = (3, 6);
        let modulation = random.numbers(rows * parts * width);
        let row_of: Vec<u32> = (0..count).map(|_| random.below(rows) as u32).collect();
        let ours = with_all(|isa| {
            let mut out = vec![0.0; x.len()];
            let job = NormModulate {
                x: Rows::new(&x, width),
                eps: 1e-6,
                modulation: &modulation,
                stride: parts * width,
                at: 3 * width,
                row_of: &row_of,
            };
            norm_modulate(isa, job, &mut out);
            out
        });
        let mut reference = Vec::new();
        for (t, x) in x.chunks(width).enumerate() {
            let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / width as f64;
            let variance = x
                .iter()
                .map(|&v| (f64::from(v) - mean).powi(2))
                .sum::<f64>()
                / width as f64;
            let part = |i: usize, o: usize| {
                f64::from(modulation[(row_of[t] as usize * parts + i) * width + o])
            };
            reference.extend((0..width).map(|o| {
                // A row of one number has no variance, and f32 no better mean than its own.
                (f64::from(x[o]) - mean) / (variance + 1e-6).sqrt() * part(4, o) + part(3, o)
            }));
        }
        assert_near(&ours, &reference);
    }
}

#[test]
fn attention_agrees_with_a_plain_reference() {
    let mut random = Random::new(5);
    for _ in 0..ROUNDS / 2 {
        let (tokens, features) = (1 + random.below(80), random.size());
        let (count, stride) = (1 + random.below(tokens), features + 3);
        let queries = random.numbers(count * stride);
        let (k, v) = (
            random.numbers(tokens * features),
            random.numbers(tokens * features),
        );
        let mut keys = vec![0.0; tokens.next_multiple_of(NR) * features];
        let mut values = vec![0.0; features.next_multiple_of(NR) * tokens];
        for (t, i) in (0..tokens).flat_map(|t| (0..features).map(move |i| (t, i))) {
            keys[(t / NR * features + i) * NR + t % NR] = k[t * features + i];
            values[(i / NR * tokens + t) * NR + i % NR] = v[t * features + i];
        }
        let ours = with_all(|isa| {
            let mut out = vec![0.0; count * features];
            let job = Attention {
                queries: Rows {
                    values: &queries,
                    stride,
                    count,
                },
                features,
                keys: &keys,
                values: &values,
                tokens,
                scale: 0.7,
            };
            attention(
                isa,
                job,
                &mut out,
                features,
                &mut AttentionScratch::default(),
            );
            out
        });
        let mut reference = Vec::new();
        for query in queries.chunks(stride) {
            let scores = k.chunks(features).map(|key| {
                let products = query
                    .iter()
                    .zip(key)
                    .map(|(a, b)| f64::from(*a) * f64::from(*b));
                (0.7 * products.sum::<f64>()).exp()
            });
            let scores: Vec<f64> = scores.collect();
            let sum: f64 = scores.iter().sum();
            reference.extend((0..features).map(|i| {
                let weighed = scores.iter().enumerate();
                weighed
                    .map(|(t, s)| s / sum * f64::from(v[t * features + i]))
                    .sum::<f64>()
            }));
        }
        assert_near(&ours, &reference);
    }
}

#[test]
fn exponentials_are_near_at_every_size_and_keep_what_is_not_finite() {
    let all = |n: u32, f: fn(f32) -> f32, reference: fn(f64) -> f64, most: f64| {
        for i in 0..n {
            let x = (f64::from(i) / f64::from(n) * 2.0 - 1.0) * most;
            let (ours, theirs) = (f64::from(f(x as f32)), reference(f64::from(x as f32)));
            assert!(
                (ours - theirs).abs() <= theirs.abs() * 4e-6 + 1e-30,
                "{x}: {ours}, not {theirs}"
            );
        }
    };
    let n = if cfg!(miri) { 100 } else { 100_000 };
    all(n, exp2, f64::exp2, 125.9);
    all(n, silu_of, |x| x / (1.0 + (-x).exp()), 60.0);
    // Where the reference itself cancels, it says nothing.
    all(n, gelu, reference_gelu, 3.0);
    assert_eq!(exp2(0.0), 1.0);
    assert_eq!(exp2(-1e9), f32::MIN_POSITIVE);
    assert_eq!(exp2(f32::NEG_INFINITY), f32::MIN_POSITIVE);
    assert_eq!(exp2(128.0), f32::INFINITY);
    assert_eq!(gelu(-1000.0), 0.0);
    assert_eq!(gelu(1000.0), 1000.0);
    for bits in [0x7fc0_0000, 0x7fc0_0001, 0x7f80_0001, 0xffff_ffff] {
        let nan = f32::from_bits(bits);
        assert!(exp2(nan).is_nan() && gelu(nan).is_nan() && silu_of(nan).is_nan());
    }
}

#[test]
fn every_half_is_widened_exactly() {
    let step = if cfg!(miri) { 997 } else { 1 };
    for bits in (0..=u16::MAX).step_by(step) {
        let (ours, theirs) = (widen_f16(bits), f16::from_bits(bits).to_f32());
        assert!(
            ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(),
            "{bits:#06x}: {ours}, not {theirs}"
        );
    }
}

#[test]
fn not_a_number_comes_through_every_kernel() {
    for isa in Isa::all() {
        let mut row = vec![0.5_f32; 40];
        row[33] = f32::NAN;
        softmax(&mut row, 1.0);
        assert!(row.iter().all(|v| v.is_nan()), "{isa:?}");
        let mut x = vec![0.5_f32; 64];
        x[5] = f32::INFINITY;
        let mut out = vec![0.0; 64];
        let job = NormModulate {
            x: Rows::new(&x, 64),
            eps: 1e-6,
            modulation: &[1.0; 128],
            stride: 128,
            at: 0,
            row_of: &[0],
        };
        norm_modulate(isa, job, &mut out);
        assert!(out.iter().all(|v| v.is_nan()), "{isa:?}");
    }
}
