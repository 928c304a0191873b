//! The command line's entry; everything is in the library.

use clap::Parser as _;
use image_generator::cli::Cli;
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let started = Instant::now();
    Cli::parse().run(started)
}
