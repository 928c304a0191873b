//! From seeds to pictures: Euler steps along the flow from noise to a digit.
//!
//! Flow matching (Lipman et al. 2023, arXiv 2210.02747) with classifier-free guidance (Ho & Salimans 2022,
//! arXiv 2207.12598) on the predicted picture. The unit of work is one step of some rows: each row has its own
//! time, so rows may join and leave a batch between steps, and what else is in the batch does not change them.

use super::dit::Condition;
use super::{Dit, Header, ModelError, Weights, noise};
use candle_core::Device;
use std::collections::HashMap;

/// Memory for conditions that are kept: those of the default steps of all digits take a fiftieth of it.
const CONDITIONS_BYTES_MAX: usize = 16 << 20;

/// What fixes one picture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleSpec {
    /// Below the model's number of classes.
    pub label: usize,
    pub seed: u64,
    /// At least 1.
    pub steps: usize,
    /// 1: none. Above: closer to the class, less varied.
    pub guidance: f32,
}

/// One picture on its way from noise.
pub struct Row {
    spec: SampleSpec,
    /// Times from 0 to 1, one more than steps.
    grid: Vec<f64>,
    step: usize,
    /// `[tokens, patch_width]`
    x: Vec<f32>,
    /// The clean picture that the last step predicted, guidance included. Kept for rows that show it.
    estimate: Option<Vec<f32>>,
}

impl Row {
    /// Steps taken so far.
    pub fn step(&self) -> usize {
        self.step
    }

    pub fn done(&self) -> bool {
        self.step == self.spec.steps
    }

    /// Keeps what each step predicts, for [`Generator::estimate`].
    pub fn keep_estimate(&mut self) {
        self.estimate.get_or_insert_default();
    }

    /// Rows that the network computes for the next step: with and without the class, where they differ.
    pub fn cost(&self) -> usize {
        if self.spec.guidance == 1.0 { 1 } else { 2 }
    }
}

/// A network ready to draw.
pub struct Generator {
    header: Header,
    net: Dit,
    conditions: HashMap<(u32, usize), Condition>,
    /// Memory of a step, used again by the next one: what goes into the network, and what comes out.
    x: Vec<f32>,
    clean: Vec<f32>,
}

impl Generator {
    /// Builds the network from its weights. On a processor, `threads` compute.
    ///
    /// # Errors
    /// [`ModelError`] if a tensor is missing or the device fails.
    pub fn new(weights: Weights, device: &Device, threads: usize) -> Result<Self, ModelError> {
        let header = weights.header.clone();
        Ok(Self::of(header, Dit::new(weights, device, threads)?))
    }

    /// Draws with a network that is there already, of the same header.
    pub fn of(header: Header, net: Dit) -> Self {
        Self {
            header,
            net,
            conditions: HashMap::new(),
            x: Vec::new(),
            clean: Vec::new(),
        }
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Rows from which on a row in a batch costs about as much as in any larger one.
    pub fn batch_rows_min(&self) -> usize {
        self.net.batch_rows_min()
    }

    /// A picture's first state: the noise of its seed.
    pub fn start(&self, spec: SampleSpec) -> Row {
        let a = &self.header.architecture;
        let noise = noise(spec.seed, a.values());
        self.start_from(spec, &noise)
    }

    /// The same from given noise, `[channels, height, width]`.
    pub fn start_from(&self, spec: SampleSpec, noise: &[f32]) -> Row {
        let a = &self.header.architecture;
        let mut x = vec![0.0; a.values()];
        for (token, pixel) in self.places() {
            x[token] = noise[pixel];
        }
        Row {
            spec,
            grid: time_grid(spec.steps, f64::from(self.header.sampler.shift)),
            step: 0,
            x,
            estimate: None,
        }
    }

    /// Takes one step in every row. None may be done.
    ///
    /// # Errors
    /// The error of the whole batch. A row whose own values are not finite is found by [`Generator::finish`].
    pub fn step(&mut self, rows: &mut [&mut Row]) -> Result<(), ModelError> {
        let a = &self.header.architecture;
        let (values, none) = (a.values(), a.classes);
        let mut conditions = Vec::with_capacity(2 * rows.len());
        let mut x = std::mem::take(&mut self.x);
        x.clear();
        for row in rows.iter() {
            let time = row.grid[row.step] as f32;
            x.extend_from_slice(&row.x);
            conditions.push(self.condition(time, row.spec.label)?);
            if row.cost() == 2 {
                x.extend_from_slice(&row.x);
                conditions.push(self.condition(time, none)?);
            }
        }
        self.net.forward(&x, &conditions, None, &mut self.clean)?;
        self.x = x;
        let mut clean = self.clean.chunks_exact_mut(values);
        for row in rows.iter_mut() {
            let (now, then) = (row.grid[row.step], row.grid[row.step + 1]);
            let share = ((then - now) / (1.0 - now)) as f32;
            let with = clean.next().unwrap_or_default();
            if row.cost() == 2 {
                let without = clean.next().unwrap_or_default();
                let guidance = row.spec.guidance;
                for (c, &u) in with.iter_mut().zip(&*without) {
                    *c = u + guidance * (*c - u);
                }
            }
            for (x, &c) in row.x.iter_mut().zip(&*with) {
                *x += share * (c - *x);
            }
            if let Some(estimate) = &mut row.estimate {
                estimate.clear();
                estimate.extend_from_slice(with);
            }
            row.step += 1;
        }
        Ok(())
    }

    /// The picture as it stands, `[channels, height, width]`, about -1 to 1.
    pub fn picture(&self, row: &Row) -> Vec<f32> {
        self.picture_of(&row.x)
    }

    /// The pixels of a finished row, height x width x channels.
    ///
    /// # Errors
    /// [`ModelError::NotFinite`] if the network's numbers ran away.
    pub fn finish(&self, row: &Row) -> Result<Vec<u8>, ModelError> {
        let finite = row.x.iter().all(|v| v.is_finite());
        finite
            .then(|| self.pixels(&row.x))
            .ok_or(ModelError::NotFinite {
                seed: row.spec.seed,
                step: row.step,
            })
    }

    /// The pixels of the picture that the last step was heading for; none before the first, for rows that do not
    /// keep it, and where the network's numbers ran away.
    pub fn estimate(&self, row: &Row) -> Option<Vec<u8>> {
        let estimate = row.estimate.as_ref().filter(|e| !e.is_empty())?;
        let finite = estimate.iter().all(|v| v.is_finite());
        finite.then(|| self.pixels(estimate))
    }

    fn picture_of(&self, x: &[f32]) -> Vec<f32> {
        let mut picture = vec![0.0; x.len()];
        for (token, pixel) in self.places() {
            picture[pixel] = x[token];
        }
        picture
    }

    fn pixels(&self, x: &[f32]) -> Vec<u8> {
        to_bytes(&self.picture_of(x), self.header.architecture.channels)
    }

    /// Draws whole pictures in one batch.
    ///
    /// # Errors
    /// As [`Generator::step`] and [`Generator::finish`].
    pub fn draw(&mut self, specs: &[SampleSpec]) -> Result<Vec<Vec<u8>>, ModelError> {
        let mut rows: Vec<Row> = specs.iter().map(|&s| self.start(s)).collect();
        loop {
            let mut open: Vec<&mut Row> = rows.iter_mut().filter(|r| !r.done()).collect();
            if open.is_empty() {
                break;
            }
            self.step(&mut open)?;
        }
        rows.iter().map(|r| self.finish(r)).collect()
    }

    fn condition(&mut self, time: f32, label: usize) -> Result<Condition, ModelError> {
        if let Some(known) = self.conditions.get(&(time.to_bits(), label)) {
            return Ok(known.clone());
        }
        let fresh = self.net.condition(time, label)?;
        if (self.conditions.len() + 1) * self.net.condition_bytes() > CONDITIONS_BYTES_MAX {
            self.conditions.clear();
        }
        self.conditions
            .insert((time.to_bits(), label), fresh.clone());
        Ok(fresh)
    }

    /// Where each value lies in a row of tokens, and in a picture.
    fn places(&self) -> impl Iterator<Item = (usize, usize)> {
        let a = &self.header.architecture;
        let (size, patch, channels) = (a.image_size, a.patch, a.channels);
        let across = size / patch;
        (0..size * size * channels).map(move |pixel| {
            let (c, y, x) = (pixel / (size * size), pixel / size % size, pixel % size);
            let token = y / patch * across + x / patch;
            (
                (token * patch * patch + y % patch * patch + x % patch) * channels + c,
                pixel,
            )
        })
    }
}

/// steps + 1 times from 0 (noise) to 1 (picture); a shift above 1 spends more of them near the noise (the
/// time-step shift of Esser et al. 2024, arXiv 2403.03206).
fn time_grid(steps: usize, shift: f64) -> Vec<f64> {
    (0..=steps)
        .map(|i| {
            let noise = 1.0 - i as f64 / steps as f64;
            1.0 - shift * noise / (1.0 + (shift - 1.0) * noise)
        })
        .collect()
}

/// -1..=1 to 0..=255, `[channels, height, width]` to height x width x channels.
pub fn to_bytes(picture: &[f32], channels: usize) -> Vec<u8> {
    let plane = picture.len() / channels;
    (0..picture.len())
        .map(|i| {
            ((picture[i % channels * plane + i / channels].clamp(-1.0, 1.0) + 1.0) * 127.5)
                .round_ties_even() as u8
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_grid_goes_from_noise_to_picture() {
        assert_eq!(time_grid(4, 1.0), [0.0, 0.25, 0.5, 0.75, 1.0]);
        let shifted = time_grid(4, 3.0);
        assert_eq!((shifted[0], shifted[4]), (0.0, 1.0));
        assert!(shifted.windows(2).all(|w| w[0] < w[1]) && shifted[2] < 0.5);
    }

    #[test]
    fn bytes_interleave_channels() {
        assert_eq!(
            to_bytes(&[-2.0, 1.0, 0.0, -1.0, 9.0, 0.5], 3),
            [0, 128, 255, 255, 0, 191]
        );
    }
}
