//! The least that can bring an object into memory: what `tests/bench/cold.py` holds a cold start against.
//!
//!     raw_sockets HOST:PORT PATH [CONNECTIONS]
//!
//! Each connection asks for its share of the object in one ranged request and reads it straight into its part of one
//! buffer on huge pages. No retries, no pinned version, no digest: two connections are the limit for a fast store, and
//! one is a plain GET. Prints one line of JSON when all of it is there, and stays until its input ends, so that its
//! memory can be looked at.

use memmap2::{Advice, MmapOptions};
use std::error::Error;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Instant;

fn main() -> Result<(), Box<dyn Error>> {
    let started = Instant::now();
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().ok_or("no address")?;
    let path = arguments.next().ok_or("no path")?;
    let connections = arguments.next().map_or(Ok(2), |n| n.parse::<usize>())?;

    let size = request(&address, "HEAD", &path, None)?.1;
    let mut memory = MmapOptions::new().len(size).map_anon()?;
    // Advice: without huge pages the same takes half as long again.
    let _ = memory.advise(Advice::HugePage);
    let share = size.div_ceil(connections);
    let read = std::thread::scope(|scope| {
        let (address, path) = (&address, &path);
        let threads: Vec<_> = memory
            .chunks_mut(share)
            .enumerate()
            .map(|(i, part)| scope.spawn(move || fill(address, path, i * share, part)))
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().expect("no thread panics"))
            .sum::<Result<usize, String>>()
    })?;
    println!(
        r#"{{"message":"weights resident","bytes":{read},"load_ms":{:.3}}}"#,
        started.elapsed().as_secs_f64() * 1e3
    );
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn fill(address: &str, path: &str, start: usize, part: &mut [u8]) -> Result<usize, String> {
    let range = (start, start + part.len() - 1);
    let mut read = || -> std::io::Result<usize> {
        let (mut stream, length) = request(address, "GET", path, Some(range))?;
        if length != part.len() {
            return Err(std::io::ErrorKind::InvalidData.into());
        }
        let early = stream.buffer().len();
        stream.read_exact(&mut part[..early])?;
        stream.into_inner().read_exact(&mut part[early..])?;
        Ok(part.len())
    };
    read().map_err(|e| format!("bytes {range:?}: {e}"))
}

/// Sends a request and reads the head of its answer: the connection, and the Content-Length.
fn request(
    address: &str,
    method: &str,
    path: &str,
    range: Option<(usize, usize)>,
) -> std::io::Result<(BufReader<TcpStream>, usize)> {
    let mut stream = TcpStream::connect(address)?;
    let range = range.map_or(String::new(), |(first, last)| {
        format!("Range: bytes={first}-{last}\r\n")
    });
    let head = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\n{range}\r\n");
    stream.write_all(head.as_bytes())?;
    let mut stream = BufReader::new(stream);
    let (mut length, mut line) = (None, String::new());
    let mut status = None;
    while line != "\r\n" {
        line.clear();
        if stream.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let lower = line.to_ascii_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().ok();
        }
        status.get_or_insert(lower);
    }
    match (status, length) {
        (Some(status), Some(length)) if status.contains(" 20") => Ok((stream, length)),
        (status, _) => Err(std::io::Error::other(status.unwrap_or_default())),
    }
}
