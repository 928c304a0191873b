//! The least that can bring a file into memory: what `tests/bench/cold.py` holds a start from the disk cache against.
//!
//!     plain_read FILE
//!
//! One thread reads the file into one fresh buffer of its size, on huge pages. Prints one line of JSON when all of it is
//! there, and stays until its input ends.

use memmap2::{Advice, MmapOptions};
use std::error::Error;
use std::fs::File;
use std::io::Read as _;
use std::time::Instant;

fn main() -> Result<(), Box<dyn Error>> {
    let started = Instant::now();
    let path = std::env::args().nth(1).ok_or("no file")?;
    let mut file = File::open(path)?;
    let size = usize::try_from(file.metadata()?.len())?;
    let mut memory = MmapOptions::new().len(size).map_anon()?;
    let _ = memory.advise(Advice::HugePage);
    file.read_exact(&mut memory)?;
    println!(
        r#"{{"message":"weights resident","bytes":{size},"load_ms":{:.3}}}"#,
        started.elapsed().as_secs_f64() * 1e3
    );
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
