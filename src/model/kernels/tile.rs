//! The innermost loops: a few rows times one panel, with all sums in registers.

use super::NR;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Formats of a panel, as constants that a loop is compiled for.
pub const F32: u8 = 0;
pub const F16: u8 = 1;
pub const BF16: u8 = 2;

/// A set of instructions.
pub trait Simd {
    /// Rows of the largest tile.
    const ROWS: usize;
    /// Whether the tile reads f16 and bf16. Where not, a panel is widened before its tiles.
    const WIDENS: bool;

    /// `sums[i][j]` becomes fma(x[i][k], panel[k][j], sums[i][j]) for k from 0 up to `inputs`, in this order.
    ///
    /// # Safety
    /// The machine has the instructions. `x` points to `M` rows of `inputs` numbers, `stride` apart, and `panel` to
    /// `inputs` x [`NR`] numbers of `FORMAT`. `M` is at most `ROWS`.
    unsafe fn tile<const M: usize, const FORMAT: u8>(
        inputs: usize,
        x: *const f32,
        stride: usize,
        panel: *const u8,
        sums: &mut [[f32; NR]; M],
    );
}

/// Any machine. On aarch64 the compiler makes NEON of it, which is always there; on an x86-64 without FMA each
/// multiply-add is a call of the C library: slow, and the same bits.
pub struct Portable;

impl Simd for Portable {
    const ROWS: usize = 4;
    const WIDENS: bool = false;

    unsafe fn tile<const M: usize, const FORMAT: u8>(
        inputs: usize,
        x: *const f32,
        stride: usize,
        panel: *const u8,
        sums: &mut [[f32; NR]; M],
    ) {
        /// Columns at a time: M x 16 sums fit into NEON's registers.
        const COLUMNS: usize = 16;
        debug_assert_eq!(FORMAT, F32, "panels are widened before");
        // SAFETY: the caller's; a panel of F32 comes from a slice of f32, so it is aligned.
        let panel = unsafe { std::slice::from_raw_parts(panel.cast::<[f32; NR]>(), inputs) };
        // SAFETY: the caller's.
        let x: [&[f32]; M] = std::array::from_fn(|i| unsafe {
            std::slice::from_raw_parts(x.add(i * stride), inputs)
        });
        for first in (0..NR).step_by(COLUMNS) {
            let mut part = [[0.0_f32; COLUMNS]; M];
            for i in 0..M {
                part[i].copy_from_slice(&sums[i][first..first + COLUMNS]);
            }
            for (k, row) in panel.iter().enumerate() {
                for i in 0..M {
                    for j in 0..COLUMNS {
                        part[i][j] = x[i][k].mul_add(row[first + j], part[i][j]);
                    }
                }
            }
            for i in 0..M {
                sums[i][first..first + COLUMNS].copy_from_slice(&part[i]);
            }
        }
    }
}

/// 8 rows x 2 vectors of 16: of 32 registers 16 hold sums, enough for two units of four cycles each.
#[cfg(target_arch = "x86_64")]
pub struct Avx512;

#[cfg(target_arch = "x86_64")]
impl Simd for Avx512 {
    const ROWS: usize = 8;
    const WIDENS: bool = true;

    #[inline(always)]
    unsafe fn tile<const M: usize, const FORMAT: u8>(
        inputs: usize,
        x: *const f32,
        stride: usize,
        panel: *const u8,
        sums: &mut [[f32; NR]; M],
    ) {
        // SAFETY: the caller's.
        unsafe { tile_avx512::<M, FORMAT>(inputs, x, stride, panel, sums) }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
unsafe fn tile_avx512<const M: usize, const FORMAT: u8>(
    inputs: usize,
    x: *const f32,
    stride: usize,
    panel: *const u8,
    sums: &mut [[f32; NR]; M],
) {
    #[target_feature(enable = "avx512f")]
    unsafe fn load<const FORMAT: u8>(panel: *const u8, at: usize) -> __m512 {
        // SAFETY: the caller's: 16 numbers lie from `at` on. Nothing is asked of the alignment.
        unsafe {
            match FORMAT {
                F32 => _mm512_loadu_ps(panel.cast::<f32>().add(at)),
                F16 => _mm512_cvtph_ps(_mm256_loadu_si256(panel.cast::<u16>().add(at).cast())),
                _ => {
                    let bits = _mm256_loadu_si256(panel.cast::<u16>().add(at).cast());
                    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))
                }
            }
        }
    }
    // SAFETY: `x` is read at i < M, k < inputs; the panel at k * NR to k * NR + 31; `sums` at its own rows.
    unsafe {
        let mut c = [[_mm512_setzero_ps(); 2]; M];
        for i in 0..M {
            c[i][0] = _mm512_loadu_ps(sums[i].as_ptr());
            c[i][1] = _mm512_loadu_ps(sums[i].as_ptr().add(16));
        }
        for k in 0..inputs {
            let b0 = load::<FORMAT>(panel, k * NR);
            let b1 = load::<FORMAT>(panel, k * NR + 16);
            for (i, c) in c.iter_mut().enumerate() {
                let a = _mm512_set1_ps(*x.add(i * stride + k));
                c[0] = _mm512_fmadd_ps(a, b0, c[0]);
                c[1] = _mm512_fmadd_ps(a, b1, c[1]);
            }
        }
        for i in 0..M {
            _mm512_storeu_ps(sums[i].as_mut_ptr(), c[i][0]);
            _mm512_storeu_ps(sums[i].as_mut_ptr().add(16), c[i][1]);
        }
    }
}

/// 4 rows x 2 vectors of 8, twice: of 16 registers 8 hold sums.
#[cfg(target_arch = "x86_64")]
pub struct Avx2;

#[cfg(target_arch = "x86_64")]
impl Simd for Avx2 {
    const ROWS: usize = 4;
    const WIDENS: bool = true;

    #[inline(always)]
    unsafe fn tile<const M: usize, const FORMAT: u8>(
        inputs: usize,
        x: *const f32,
        stride: usize,
        panel: *const u8,
        sums: &mut [[f32; NR]; M],
    ) {
        // SAFETY: the caller's.
        unsafe { tile_avx2::<M, FORMAT>(inputs, x, stride, panel, sums) }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile_avx2<const M: usize, const FORMAT: u8>(
    inputs: usize,
    x: *const f32,
    stride: usize,
    panel: *const u8,
    sums: &mut [[f32; NR]; M],
) {
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load<const FORMAT: u8>(panel: *const u8, at: usize) -> __m256 {
        // SAFETY: the caller's: 8 numbers lie from `at` on. Nothing is asked of the alignment.
        unsafe {
            match FORMAT {
                F32 => _mm256_loadu_ps(panel.cast::<f32>().add(at)),
                F16 => _mm256_cvtph_ps(_mm_loadu_si128(panel.cast::<u16>().add(at).cast())),
                _ => {
                    let bits = _mm_loadu_si128(panel.cast::<u16>().add(at).cast());
                    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))
                }
            }
        }
    }
    // SAFETY: `x` is read at i < M, k < inputs; the panel at k * NR to k * NR + 31; `sums` at its own rows.
    unsafe {
        for first in [0, 16] {
            let mut c = [[_mm256_setzero_ps(); 2]; M];
            for i in 0..M {
                c[i][0] = _mm256_loadu_ps(sums[i].as_ptr().add(first));
                c[i][1] = _mm256_loadu_ps(sums[i].as_ptr().add(first + 8));
            }
            for k in 0..inputs {
                let b0 = load::<FORMAT>(panel, k * NR + first);
                let b1 = load::<FORMAT>(panel, k * NR + first + 8);
                for (i, c) in c.iter_mut().enumerate() {
                    let a = _mm256_set1_ps(*x.add(i * stride + k));
                    c[0] = _mm256_fmadd_ps(a, b0, c[0]);
                    c[1] = _mm256_fmadd_ps(a, b1, c[1]);
                }
            }
            for i in 0..M {
                _mm256_storeu_ps(sums[i].as_mut_ptr().add(first), c[i][0]);
                _mm256_storeu_ps(sums[i].as_mut_ptr().add(first + 8), c[i][1]);
            }
        }
    }
}
