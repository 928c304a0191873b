//! The same digit is the same bytes, whatever else is drawn, and by however many threads.

use candle_core::Device;
use image_generator::engine::{DrawRequest, Engine, EngineConfig, Event};
use image_generator::model::{self, Generator, Row, SampleSpec};
use std::collections::HashMap;

/// Digits of every class, with few steps and some, with guidance and without.
fn specs() -> Vec<SampleSpec> {
    (0..200)
        .map(|i| SampleSpec {
            label: i % 10,
            seed: 1000 + i as u64,
            steps: [4, 2, 2, 1, 1, 1, 3, 1, 1, 1][i / 2 % 10],
            guidance: if i % 4 == 0 { 1.5 } else { 1.0 },
        })
        .collect()
}

fn generator(threads: usize) -> Generator {
    let weights = model::from_bytes(model::BUILT_IN).unwrap();
    Generator::new(weights, &Device::Cpu, threads).unwrap()
}

/// Draws with `rows` digits in every step, of which each leaves as soon as it is done, and another joins.
fn in_batches(generator: &mut Generator, specs: &[SampleSpec], rows: usize) -> Vec<Vec<u8>> {
    let mut waiting = specs.iter().enumerate();
    let mut running: Vec<(usize, Row)> = Vec::new();
    let mut done = vec![Vec::new(); specs.len()];
    loop {
        while running.len() < rows
            && let Some((i, &spec)) = waiting.next()
        {
            running.push((i, generator.start(spec)));
        }
        if running.is_empty() {
            return done;
        }
        generator
            .step(&mut running.iter_mut().map(|(_, row)| row).collect::<Vec<_>>())
            .unwrap();
        running.retain(|(i, row)| {
            if row.done() {
                done[*i] = generator.finish(row).unwrap();
            }
            !row.done()
        });
    }
}

#[test]
fn digits_are_the_same_bytes_alone_and_in_batches_of_every_size_with_any_number_of_threads() {
    let specs = specs();
    let mut one = generator(1);
    let alone: Vec<Vec<u8>> = specs
        .iter()
        .map(|&spec| one.draw(&[spec]).unwrap().remove(0))
        .collect();
    let distinct: std::collections::HashSet<_> = alone.iter().collect();
    assert_eq!(distinct.len(), specs.len(), "the test says nothing");
    let sizes = |most| (1..=most).chain([16, 33, specs.len()]);
    // Three threads do not divide the rows evenly.
    for (threads, most) in [(1, 8), (2, 8), (3, 3)] {
        let mut generator = generator(threads);
        for rows in sizes(most) {
            let together = in_batches(&mut generator, &specs, rows);
            assert!(together == alone, "{rows} at a time, {threads} threads");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn digits_are_the_same_bytes_under_concurrent_load_and_with_previews() {
    let specs = specs();
    let expected = in_batches(&mut generator(1), &specs, 16);
    let expected: HashMap<u64, Vec<u8>> = specs.iter().map(|s| s.seed).zip(expected).collect();
    for threads in [1, 2] {
        let engine = Engine::new(EngineConfig {
            threads,
            ..EngineConfig::default()
        });
        let request = |label: usize, seed, steps, guidance, count| DrawRequest {
            model: None,
            labels: vec![label.to_string(); count],
            seed,
            steps: Some(steps),
            guidance: Some(guidance),
        };
        // Something large beside them, the whole time.
        let noise = engine
            .prepare(request(3, 9_000_000, 16, 1.5, 1000))
            .await
            .unwrap()
            .start()
            .unwrap();
        let tasks: Vec<_> = specs
            .iter()
            .map(|&spec| {
                let engine = engine.clone();
                let request = request(spec.label, spec.seed, spec.steps, spec.guidance, 1);
                tokio::spawn(async move {
                    let plan = engine.prepare(request).await.unwrap();
                    let mut drawing = if spec.seed % 2 == 0 {
                        plan.start_with_previews().unwrap()
                    } else {
                        plan.start().unwrap()
                    };
                    let mut steps = vec![0];
                    loop {
                        match drawing.event().await.unwrap().unwrap() {
                            Event::Preview(preview) => steps.push(preview.step),
                            Event::Digit(digit) => {
                                assert!(drawing.event().await.is_none());
                                assert!(steps.is_sorted() && steps[steps.len() - 1] < spec.steps);
                                return (digit.seed, digit.pixels);
                            }
                        }
                    }
                })
            })
            .collect();
        for task in tasks {
            let (seed, pixels) = task.await.unwrap();
            assert!(pixels == expected[&seed], "seed {seed}, {threads} threads");
        }
        drop(noise);
        let (_, metrics) = engine.metrics().remove(0);
        assert_eq!(metrics.digits_failed, 0);
        assert!(metrics.digits_drawn >= specs.len() as u64);
    }
}

/// An estimate is what the step before the last one draws, and a row without one costs nothing.
#[test]
fn the_estimate_after_the_last_step_is_the_picture() {
    let mut generator = generator(2);
    let spec = SampleSpec {
        label: 4,
        seed: 1,
        steps: 3,
        guidance: 1.5,
    };
    let (mut plain, mut shown) = (generator.start(spec), generator.start(spec));
    shown.keep_estimate();
    assert_eq!(generator.estimate(&shown), None);
    let mut estimates = Vec::new();
    while !shown.done() {
        generator.step(&mut [&mut plain, &mut shown]).unwrap();
        estimates.push(generator.estimate(&shown).unwrap());
    }
    assert_eq!(generator.estimate(&plain), None);
    assert_eq!(estimates[2], generator.finish(&plain).unwrap());
    assert_ne!(estimates[0], estimates[2]);
}
