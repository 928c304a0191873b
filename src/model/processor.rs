//! The network on a processor: which thread computes which tokens, and the operations of one thread.
//!
//! Where there are rows enough, each thread takes groups of whole rows through the whole network and waits for nobody. Where
//! there are not, the threads share all rows' tokens between them and meet once a block, before the attention, for
//! the one thing that they need of each other: keys and values. Either way an element is computed in one order
//! only, see [`kernels`], so the split does not show in the result.

use super::dit::{Activation, Buffers, Conditioned, NORM_EPS, Network, Ops, Trace, linear_names};
use super::kernels::{
    self, Attention, AttentionScratch, Isa, Linear as Product, Matrix, NR, NormModulate, Rows,
    Then, Values,
};
use super::threads::{Barrier, Threads};
use super::{Architecture, ModelError, Weights};
use safetensors::Dtype;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Tokens that a thread takes through the network at a time: enough that reading the weights is nothing beside it, and few
/// enough that their values stay in its own cache and that a thread that comes late finds some left.
const GROUP_TOKENS_MAX: usize = 64;
/// Fewer tokens are not worth a thread: reading the weights would take longer than computing with them.
const MEMBER_TOKENS_MIN: usize = 4;

pub(super) struct Processor {
    shared: Arc<Shared>,
    threads: Threads,
}

/// What all threads see.
struct Shared {
    isa: Isa,
    architecture: Architecture,
    /// Frozen: the linear layers' weights in the kernels' order, everything as the file had it else.
    weights: Weights,
    network: Network<Linear, Table>,
    scratch: Vec<Mutex<Scratch>>,
    /// Keys and values of each member's tokens. Two of each: while the slower ones still read those of one block, the
    /// faster ones may write those of the next.
    exchange: Vec<[RwLock<Vec<f32>>; 2]>,
    /// What goes into the network and what comes out, `[rows, tokens, patch_width]`.
    x: RwLock<Vec<f32>>,
    out: Mutex<Vec<f32>>,
}

/// Where in the arena a tensor lies.
struct Place {
    dtype: Dtype,
    bytes: Range<usize>,
}

struct Linear {
    weight: Place,
    bias: Place,
    inputs: usize,
    outputs: usize,
}

struct Table(Place);

impl Processor {
    pub(super) fn new(mut weights: Weights, threads: usize) -> Result<Self, ModelError> {
        let architecture = weights.header.architecture.clone();
        let threads = Threads::new(threads);
        pack(&mut weights, threads.count());
        let place = |name: &str| {
            let (entry, bytes) = weights.place(name)?;
            let (dtype, shape) = (entry.dtype, entry.shape.clone());
            Ok::<_, ModelError>((Place { dtype, bytes }, shape))
        };
        let network = Network::new(
            &architecture,
            |name| {
                let (weight, shape) = place(&format!("{name}.weight"))?;
                Ok(Linear {
                    weight,
                    bias: place(&format!("{name}.bias"))?.0,
                    inputs: shape[1],
                    outputs: shape[0],
                })
            },
            |name| Ok(Table(place(name)?.0)),
        )?;
        let shared = Arc::new(Shared {
            isa: Isa::detect(),
            architecture,
            weights,
            network,
            scratch: (0..threads.count()).map(|_| Mutex::default()).collect(),
            exchange: (0..threads.count()).map(|_| Default::default()).collect(),
            x: RwLock::default(),
            out: Mutex::default(),
        });
        Ok(Self { shared, threads })
    }

    /// Two for each thread: none waits for another, and each reads the weights from the nearer caches.
    pub(super) fn batch_rows_min(&self) -> usize {
        2 * self.threads.count()
    }

    pub(super) fn condition(
        &mut self,
        waves: &Vec<f32>,
        label: usize,
    ) -> Result<Conditioned<Vec<f32>>, ModelError> {
        let mut scratch = lock(&self.shared.scratch[0]);
        let mut member = Member {
            shared: &self.shared,
            tokens: 0..1,
            team: None,
            work: &mut scratch.work,
        };
        self.shared.network.condition(&mut member, waves, label)
    }

    pub(super) fn forward(
        &mut self,
        x: &[f32],
        conditions: Vec<Arc<Conditioned<Vec<f32>>>>,
        trace: Option<&mut Vec<Vec<f32>>>,
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let shared = &self.shared;
        let tokens = shared.architecture.tokens();
        {
            let mut own = lock_to_write(&shared.x);
            own.clear();
            own.extend_from_slice(x);
        }
        lock(&shared.out).resize(x.len(), 0.0);
        let all = 0..conditions.len() * tokens;
        if let Some(trace) = trace {
            let mut see = |value: &Vec<f32>| trace.push(value.clone());
            shared.compute(0, all, None, &conditions, Some(&mut see))?;
        } else {
            self.compute(conditions)?;
        }
        out.clear();
        out.extend_from_slice(&lock(&self.shared.out));
        Ok(())
    }

    fn compute(&mut self, conditions: Vec<Arc<Conditioned<Vec<f32>>>>) -> Result<(), ModelError> {
        let shared = self.shared.clone();
        let tokens = shared.architecture.tokens();
        let failed = Arc::new(Mutex::new(None));
        let failure = failed.clone();
        let note = move |result: Result<(), ModelError>| {
            if let Err(error) = result {
                *lock(&failure) = Some(error);
            }
        };
        match Split::new(conditions.len(), tokens, self.threads.count()) {
            Split::Groups(groups) => {
                let next = AtomicUsize::new(0);
                self.threads.apart(groups.len(), move |member| {
                    while let Some(group) = groups.get(next.fetch_add(1, Ordering::Relaxed)) {
                        note(shared.compute(member, group.clone(), None, &conditions, None));
                    }
                });
            }
            Split::Team(members_max) => {
                let barrier = Barrier::default();
                self.threads.together(members_max, move |member, members| {
                    let _guard = barrier.guard();
                    let parts = even(conditions.len() * tokens, members, 1);
                    let own = parts[member].clone();
                    let team = (members > 1).then_some(Team {
                        member,
                        parts: &parts,
                        barrier: &barrier,
                        turn: 0,
                    });
                    note(shared.compute(member, own, team, &conditions, None));
                });
            }
        }
        let failed = lock(&failed).take();
        failed.map_or(Ok(()), Err)
    }
}

impl Shared {
    /// The network for some tokens, from `x` to `out`.
    fn compute(
        &self,
        scratch: usize,
        tokens: Range<usize>,
        team: Option<Team<'_>>,
        conditions: &[Arc<Conditioned<Vec<f32>>>],
        trace: Trace<'_, Vec<f32>>,
    ) -> Result<(), ModelError> {
        let a = &self.architecture;
        let row_tokens = a.tokens();
        let values = tokens.start * a.patch_width()..tokens.end * a.patch_width();
        let rows = tokens.start / row_tokens..tokens.end.div_ceil(row_tokens);
        let conditions: Vec<&Conditioned<Vec<f32>>> =
            conditions[rows.clone()].iter().map(|c| &**c).collect();
        let mut scratch = lock(&self.scratch[scratch]);
        let Scratch {
            buffers,
            x,
            out,
            work,
        } = &mut *scratch;
        x.clear();
        x.extend_from_slice(&read(&self.x)[values.clone()]);
        work.row_of.clear();
        work.position_of.clear();
        for token in tokens.clone() {
            work.row_of.push((token / row_tokens - rows.start) as u32);
            work.position_of.push((token % row_tokens) as u32);
        }
        let mut member = Member {
            shared: self,
            tokens,
            team,
            work,
        };
        self.network
            .forward(&mut member, x, &conditions, buffers, trace, out)?;
        lock(&self.out)[values].copy_from_slice(out);
        Ok(())
    }

    fn values(&self, place: &Place) -> Values<'_> {
        Values::new(place.dtype, &self.weights.bytes()[place.bytes.clone()])
    }
}

/// Which tokens are computed together.
#[derive(Debug, PartialEq, Eq)]
enum Split {
    /// Whole rows, each group by one thread.
    Groups(Vec<Range<usize>>),
    /// All rows, a part by each of so many threads at most.
    Team(usize),
}

impl Split {
    /// In tokens, of which a row has `tokens`.
    fn new(rows: usize, tokens: usize, threads: usize) -> Self {
        // Whole rows may leave the last thread idle for a while; up to a seventh is what the meetings would cost.
        let rounds = rows.div_ceil(threads);
        if threads == 1 || rounds * threads * 7 <= rows * 8 {
            let rows_max = (GROUP_TOKENS_MAX / tokens).max(1);
            let groups = rounds.div_ceil(rows_max) * threads;
            return Self::Groups(even(rows, groups.min(rows), tokens));
        }
        Self::Team(threads.min(rows * tokens / MEMBER_TOKENS_MIN).max(1))
    }
}

/// `n` ranges that make up `0..count`, as even as can be, in units of `unit`.
fn even(count: usize, n: usize, unit: usize) -> Vec<Range<usize>> {
    (0..n)
        .map(|i| i * count / n * unit..(i + 1) * count / n * unit)
        .collect()
}

#[derive(Default)]
struct Scratch {
    buffers: Buffers<Vec<f32>>,
    x: Vec<f32>,
    out: Vec<f32>,
    work: Work,
}

#[derive(Default)]
struct Work {
    /// The row of each token, counted from the first token's.
    row_of: Vec<u32>,
    /// The place of each token in its row.
    position_of: Vec<u32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    panel: Vec<f32>,
    attention: AttentionScratch,
}

/// A member's view of those that share the rows' tokens.
struct Team<'a> {
    member: usize,
    /// Each member's tokens.
    parts: &'a [Range<usize>],
    barrier: &'a Barrier,
    /// Exchanges so far.
    turn: usize,
}

/// The operations of one thread, on its own tokens. Values are `[tokens, features]`, modulations `[rows, parts * width]`.
struct Member<'a> {
    shared: &'a Shared,
    tokens: Range<usize>,
    team: Option<Team<'a>>,
    work: &'a mut Work,
}

impl Member<'_> {
    fn product(&mut self, linear: &Linear, x: &[f32], then: Then<'_>, out: &mut [f32]) {
        let job = Product {
            x: Rows::new(x, linear.inputs),
            matrix: Matrix {
                values: self.shared.values(&linear.weight),
                inputs: linear.inputs,
                outputs: linear.outputs,
            },
            bias: Some(self.shared.values(&linear.bias)),
            then,
        };
        kernels::linear(
            self.shared.isa,
            job,
            out,
            linear.outputs,
            &mut self.work.panel,
        );
    }
}

impl Ops for Member<'_> {
    type Linear = Linear;
    type Table = Table;
    type Value = Vec<f32>;

    fn empty(&self) -> Vec<f32> {
        Vec::new()
    }

    fn linear(
        &mut self,
        linear: &Linear,
        x: &Vec<f32>,
        then: Activation,
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let then = match then {
            Activation::None => Then::Store,
            Activation::Gelu => Then::Gelu,
            Activation::Silu => Then::Silu,
        };
        out.resize(x.len() / linear.inputs * linear.outputs, 0.0);
        self.product(linear, x, then, out);
        Ok(())
    }

    fn add_gated(
        &mut self,
        linear: &Linear,
        x: &Vec<f32>,
        modulation: &Vec<f32>,
        gate: usize,
        onto: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let row_of = std::mem::take(&mut self.work.row_of);
        let then = Then::AddGated {
            gates: &modulation[gate * linear.outputs..],
            stride: self.modulation_stride(modulation, &row_of),
            row_of: &row_of,
        };
        self.product(linear, x, then, onto);
        self.work.row_of = row_of;
        Ok(())
    }

    fn embed(
        &mut self,
        linear: &Linear,
        x: &Vec<f32>,
        position: &Table,
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let position_of = std::mem::take(&mut self.work.position_of);
        let then = Then::AddRow {
            table: self.shared.values(&position.0),
            row_of: &position_of,
        };
        out.resize(x.len() / linear.inputs * linear.outputs, 0.0);
        self.product(linear, x, then, out);
        self.work.position_of = position_of;
        Ok(())
    }

    fn modulation(
        &mut self,
        table: &Table,
        conditions: &[&Vec<f32>],
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let table = self.shared.values(&table.0);
        out.resize(conditions.len() * table.len(), 0.0);
        for (condition, out) in conditions.iter().zip(out.chunks_exact_mut(table.len())) {
            kernels::modulation(
                self.shared.isa,
                table,
                condition,
                self.shared.architecture.width,
                out,
            );
        }
        Ok(())
    }

    fn norm_modulate(
        &mut self,
        x: &Vec<f32>,
        modulation: &Vec<f32>,
        shift: usize,
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let width = self.shared.architecture.width;
        out.resize(x.len(), 0.0);
        let job = NormModulate {
            x: Rows::new(x, width),
            eps: NORM_EPS,
            modulation,
            stride: self.modulation_stride(modulation, &self.work.row_of),
            at: shift * width,
            row_of: &self.work.row_of,
        };
        kernels::norm_modulate(self.shared.isa, job, out);
        Ok(())
    }

    fn attention(
        &mut self,
        qkv: &Vec<f32>,
        heads: usize,
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let Shared {
            isa,
            architecture,
            exchange,
            ..
        } = self.shared;
        let (width, row_tokens) = (architecture.width, architecture.tokens());
        out.resize(qkv.len() / 3, 0.0);
        // Whose tokens are in this member's rows, and their keys and values, in order of the tokens.
        let mut guards = Vec::new();
        if let Some(team) = &mut self.team {
            let turn = team.turn % 2;
            team.turn += 1;
            let mut own = lock_to_write(&exchange[team.member][turn]);
            own.clear();
            for token in qkv.chunks_exact(3 * width) {
                own.extend_from_slice(&token[width..]);
            }
            drop(own);
            team.barrier.wait(team.parts.len());
            let rows = self.tokens.start / row_tokens..self.tokens.end.div_ceil(row_tokens);
            for (part, values) in team.parts.iter().zip(exchange) {
                if part.start < rows.end * row_tokens && part.end > rows.start * row_tokens {
                    guards.push((part.clone(), read(&values[turn])));
                }
            }
        }
        let first_row = self.tokens.start / row_tokens;
        let mut begin = 0;
        while begin < self.work.row_of.len() {
            let row = first_row + self.work.row_of[begin] as usize;
            let row = row * row_tokens..(row + 1) * row_tokens;
            let end = row.end.min(self.tokens.end) - self.tokens.start;
            let sources: Vec<&[f32]> = if guards.is_empty() {
                let qkv = &qkv[begin * 3 * width..end * 3 * width];
                qkv.chunks_exact(3 * width).map(|t| &t[width..]).collect()
            } else {
                let of_row = guards.iter().flat_map(|(part, values)| {
                    let end = part.end.min(row.end).max(part.start) - part.start;
                    let start = (part.start.max(row.start) - part.start).min(end);
                    values[start * 2 * width..end * 2 * width].chunks_exact(2 * width)
                });
                of_row.collect()
            };
            debug_assert_eq!(sources.len(), row_tokens);
            let features = width / heads;
            for head in 0..heads {
                let at = head * features;
                pack_head(&sources, at, width, features, self.work);
                let job = Attention {
                    queries: Rows {
                        values: &qkv[begin * 3 * width + at..],
                        stride: 3 * width,
                        count: end - begin,
                    },
                    features,
                    keys: &self.work.keys,
                    values: &self.work.values,
                    tokens: row_tokens,
                    scale: 1.0 / (features as f32).sqrt(),
                };
                let out = &mut out[begin * width + at..];
                kernels::attention(*isa, job, out, width, &mut self.work.attention);
            }
            begin = end;
        }
        Ok(())
    }

    fn add_row(
        &mut self,
        table: &Table,
        row: usize,
        onto: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let mut added = vec![0.0; onto.len()];
        let table = self.shared.values(&table.0);
        table.part(row * onto.len(), onto.len()).widen(&mut added);
        onto.iter_mut().zip(added).for_each(|(v, a)| *v += a);
        Ok(())
    }

    fn silu(&mut self, x: &Vec<f32>, out: &mut Vec<f32>) -> Result<(), ModelError> {
        out.clone_from(x);
        kernels::silu(self.shared.isa, out);
        Ok(())
    }
}

impl Member<'_> {
    fn modulation_stride(&self, modulation: &[f32], row_of: &[u32]) -> usize {
        modulation.len() / row_of.last().map_or(1, |&last| last as usize + 1)
    }
}

/// Brings one head's keys and values into panels. `sources`: keys, then values of all heads, by token.
fn pack_head(sources: &[&[f32]], at: usize, width: usize, features: usize, work: &mut Work) {
    let tokens = sources.len();
    let Work { keys, values, .. } = work;
    // What is beyond the last column stays zero.
    keys.resize(tokens.next_multiple_of(NR) * features, 0.0);
    values.resize(features.next_multiple_of(NR) * tokens, 0.0);
    for (token, source) in sources.iter().enumerate() {
        let column = token / NR * NR * features + token % NR;
        for (i, &key) in source[at..at + features].iter().enumerate() {
            keys[column + i * NR] = key;
        }
        for (panel, part) in source[width + at..][..features].chunks(NR).enumerate() {
            values[(panel * tokens + token) * NR..][..part.len()].copy_from_slice(part);
        }
    }
}

/// Brings the weights of the linear layers into the kernels' order, in place, on several threads.
fn pack(weights: &mut Weights, threads: usize) {
    let names: std::collections::HashSet<String> = linear_names(&weights.header.architecture)
        .into_iter()
        .map(|name| format!("{name}.weight"))
        .collect();
    let entries = weights.header.tensors.clone();
    let mut panels = Vec::new();
    for (entry, slot) in entries.iter().zip(weights.slots()) {
        if names.contains(&entry.name) {
            let (inputs, size) = (entry.shape[1], entry.dtype.bitsize() / 8);
            let chunks = slot.bytes.chunks_mut(NR * inputs * size);
            panels.extend(chunks.map(|panel| (panel, inputs, size)));
        }
    }
    let share = panels.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for share in panels.chunks_mut(share) {
            scope.spawn(move || {
                let mut scratch = Vec::new();
                for (panel, inputs, size) in share {
                    kernels::pack(panel, *inputs, *size, &mut scratch);
                }
            });
        }
    });
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn lock_to_write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_split_evenly_between_threads_and_tokens_where_rows_are_few() {
        use Split::{Groups, Team};
        assert_eq!(Split::new(1, 16, 1), Groups(even(16, 1, 1)));
        assert_eq!(Split::new(1, 16, 2), Team(2));
        assert_eq!(Split::new(2, 16, 2), Groups(vec![0..16, 16..32]));
        assert_eq!(Split::new(3, 16, 2), Team(2));
        // No more threads than there is work for.
        assert_eq!(Split::new(1, 16, 64), Team(4));
        assert_eq!(Split::new(1, 1, 8), Team(1));
        // 32 rows of 16 tokens: eight groups of 64, four for each of two threads.
        assert_eq!(Split::new(32, 16, 2), Groups(even(32, 8, 16)));
        for (rows, tokens, threads) in (1..70).flat_map(|r| [(r, 16, 2), (r, 9, 3), (r, 256, 5)]) {
            let parts = match Split::new(rows, tokens, threads) {
                Groups(groups) => groups,
                Team(members) => even(rows * tokens, members, 1),
            };
            assert_eq!(parts[0].start, 0);
            assert_eq!(parts.last().unwrap().end, rows * tokens);
            assert!(parts.windows(2).all(|w| w[0].end == w[1].start));
            assert!(parts.iter().all(|p| !p.is_empty()));
        }
    }
}
