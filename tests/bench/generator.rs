//! Draws batches for `generator.py`, which says when: one line in, one line out.
//!
//!     generator [THREADS [WEIGHTS]]
//!
//! A line is "batch steps guidance"; the answer is how many seconds the batch took, from seeds to pixels. Without
//! HTTP, queue or PNG: this measures the network and the sampler alone.

use candle_core::Device;
use image_generator::model::{self, Generator, SampleSpec};
use std::io::{BufRead as _, Write as _};
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let threads = match arguments.next() {
        Some(threads) => threads.parse()?,
        None => model::threads_available(),
    };
    let bytes = match arguments.next() {
        Some(path) => std::fs::read(path)?,
        None => model::BUILT_IN.to_vec(),
    };
    let weights = model::from_bytes(&bytes)?;
    let mut generator = Generator::new(weights, &Device::Cpu, threads)?;
    let classes = generator.header().architecture.classes;
    let mut seed = 0;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let mut fields = line.split_whitespace();
        let mut field = || fields.next().ok_or("a line is: batch steps guidance");
        let batch: usize = field()?.parse()?;
        let steps: usize = field()?.parse()?;
        let guidance: f32 = field()?.parse()?;
        let specs: Vec<SampleSpec> = (0..batch)
            .map(|i| SampleSpec {
                label: i % classes,
                seed: seed + i as u64,
                steps,
                guidance,
            })
            .collect();
        seed += batch as u64;
        let started = Instant::now();
        generator.draw(&specs)?;
        println!("{}", started.elapsed().as_secs_f64());
        std::io::stdout().flush()?;
    }
    Ok(())
}
