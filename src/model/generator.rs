//! From seeds to pictures: Euler steps along the flow from noise to a digit.
//!
//! Flow matching (Lipman et al. 2023, arXiv 2210.02747) with classifier-free guidance (Ho & Salimans 2022,
//! arXiv 2207.12598) on the predicted picture. The unit of work is one step of some rows: each row has its own
//! time, so rows may join and leave a batch between steps, and what else is in the batch does not change them.

use super::dit::Condition;
use super::{Dit, Header, ModelError, Weights, noise};
use candle_core::{Device, Tensor};
use std::collections::HashMap;

/// Conditions kept, each some ten KB: more than the default steps of all digits, with and without class.
const CONDITIONS_MAX: usize = 1024;

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
}

impl Row {
    /// Steps taken so far.
    pub fn step(&self) -> usize {
        self.step
    }

    pub fn done(&self) -> bool {
        self.step == self.spec.steps
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
    device: Device,
    conditions: HashMap<(u32, usize), Condition>,
}

impl Generator {
    /// Builds the network from its weights.
    ///
    /// # Errors
    /// [`ModelError`] if a tensor is missing or the device fails.
    pub fn new(weights: Weights, device: Device) -> Result<Self, ModelError> {
        let header = weights.header.clone();
        let net = Dit::new(weights, &device)?;
        Ok(Self {
            header,
            net,
            device,
            conditions: HashMap::new(),
        })
    }

    pub fn header(&self) -> &Header {
        &self.header
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
        }
    }

    /// Takes one step in every row. None may be done.
    ///
    /// # Errors
    /// The error of the whole batch. A row whose own values are not finite is found by [`Generator::finish`].
    pub fn step(&mut self, rows: &mut [&mut Row]) -> Result<(), ModelError> {
        let a = &self.header.architecture;
        let (tokens, patch, none) = (a.tokens(), a.patch_width(), a.classes);
        let mut x =
            Vec::with_capacity(rows.iter().map(|r| r.cost()).sum::<usize>() * tokens * patch);
        let mut conditions = Vec::new();
        for row in rows.iter() {
            let time = row.grid[row.step] as f32;
            x.extend_from_slice(&row.x);
            conditions.push(self.condition(time, row.spec.label)?);
            if row.cost() == 2 {
                x.extend_from_slice(&row.x);
                conditions.push(self.condition(time, none)?);
            }
        }
        let x = Tensor::from_vec(x, (conditions.len(), tokens, patch), &self.device)?;
        let clean = self
            .net
            .forward(&x, &conditions, None)?
            .flatten_all()?
            .to_vec1::<f32>()?;
        let mut clean = clean.chunks_exact(tokens * patch);
        for row in rows.iter_mut() {
            let (now, then) = (row.grid[row.step], row.grid[row.step + 1]);
            let share = ((then - now) / (1.0 - now)) as f32;
            let with = clean.next().unwrap_or_default();
            if row.cost() == 2 {
                let without = clean.next().unwrap_or_default();
                let guidance = row.spec.guidance;
                for ((x, &c), &u) in row.x.iter_mut().zip(with).zip(without) {
                    *x += share * (u + guidance * (c - u) - *x);
                }
            } else {
                for (x, &c) in row.x.iter_mut().zip(with) {
                    *x += share * (c - *x);
                }
            }
            row.step += 1;
        }
        Ok(())
    }

    /// The picture as it stands, `[channels, height, width]`, about -1 to 1.
    pub fn picture(&self, row: &Row) -> Vec<f32> {
        let mut picture = vec![0.0; row.x.len()];
        for (token, pixel) in self.places() {
            picture[pixel] = row.x[token];
        }
        picture
    }

    /// The pixels of a finished row, height x width x channels.
    ///
    /// # Errors
    /// [`ModelError::NotFinite`] if the network's numbers ran away.
    pub fn finish(&self, row: &Row) -> Result<Vec<u8>, ModelError> {
        let picture = self.picture(row);
        if picture.iter().any(|v| !v.is_finite()) {
            return Err(ModelError::NotFinite {
                seed: row.spec.seed,
                step: row.step,
            });
        }
        Ok(to_bytes(&picture, self.header.architecture.channels))
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
        // Computed for one row at a time, whatever the batch: its products then have one shape, and one result.
        let fresh = self.net.condition(time, label)?;
        if self.conditions.len() >= CONDITIONS_MAX {
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
