//! A store as far away as a cloud's: so many bytes a second on each connection, and a pause before the first byte.
//!
//!     paced_store FOLDER [MB_PER_SECOND [FIRST_BYTE_MS]]
//!
//! Prints the port that it listens on (on 127.0.0.1, any free one), and ends with its input. It answers GET and HEAD with
//! one range, If-Match and If-None-Match; the bucket is a folder.
//!
//! Each connection is a thread that hands the kernel a slice when its time has come and no earlier, so no answer is ever
//! faster than the rate, counted from its first byte, however short its range is and however much the kernel would buffer.
//! A thread that the machine was late to wake makes up for it, up to a bound: what a slow reader lost, it lost.
//! `curl -r 0-8388607 -o /dev/null -w '%{speed_download} %{time_starttransfer}\n'` shows it.

use std::error::Error;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What is sent at a time: at 90 MB/s one every 2.9 ms.
const SLICE_BYTES: u64 = 256 << 10;
/// How much lateness is made up for.
const LATE_MAX: Duration = Duration::from_millis(50);

#[derive(Clone)]
struct Pace {
    bytes_per_second: f64,
    first_byte: Duration,
}

#[derive(Default)]
struct Request {
    head_only: bool,
    path: String,
    range: Option<(u64, Option<u64>)>,
    if_match: Option<String>,
    if_none_match: Option<String>,
    close: bool,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, default: f64| arguments.get(i).map_or(Ok(default), |t| t.parse());
    let folder = PathBuf::from(arguments.first().ok_or("no folder")?);
    let pace = Pace {
        bytes_per_second: number(1, 90.0)? * 1e6,
        first_byte: Duration::from_secs_f64(number(2, 30.0)? / 1e3),
    };
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?.port());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (folder, pace) = (folder.clone(), pace.clone());
            // A client that goes away is no concern of the others.
            std::thread::spawn(move || serve(stream, &folder, &pace).ok());
        }
    });
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn serve(stream: TcpStream, folder: &Path, pace: &Pace) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    while let Some(request) = receive(&mut reader)? {
        std::thread::sleep(pace.first_byte);
        answer(&request, &mut stream, folder, pace)?;
        if request.close {
            break;
        }
    }
    Ok(())
}

/// The next request; none: the client is done.
fn receive(reader: &mut BufReader<TcpStream>) -> std::io::Result<Option<Request>> {
    let mut request = Request::default();
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split(' ');
    request.head_only = words.next() == Some("HEAD");
    let target = words.next().unwrap_or_default();
    // Run:ai's client names the host here, as to a proxy.
    let path = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("/", |at| &rest[at..]),
        None => target,
    };
    path.split('?')
        .next()
        .unwrap_or_default()
        .clone_into(&mut request.path);
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let Some((name, value)) = line.split_once(':') else {
            return Ok(Some(request));
        };
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "range" => request.range = range(value),
            "if-match" => request.if_match = Some(value.to_owned()),
            "if-none-match" => request.if_none_match = Some(value.to_owned()),
            "connection" => request.close = value.eq_ignore_ascii_case("close"),
            _ => {}
        }
    }
}

fn range(value: &str) -> Option<(u64, Option<u64>)> {
    let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()))
}

fn answer(
    request: &Request,
    stream: &mut TcpStream,
    folder: &Path,
    pace: &Pace,
) -> std::io::Result<()> {
    let path = folder.join(request.path.trim_start_matches('/'));
    let outside = request.path.contains("..");
    let file = File::open(&path)
        .ok()
        .filter(|f| !outside && f.metadata().is_ok_and(|m| m.is_file()));
    let Some(mut file) = file else {
        return stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
    };
    let size = file.metadata()?.len();
    let etag = format!("\"{size:x}\"");
    let common = format!(
        "ETag: {etag}\r\nLast-Modified: Sun, 01 Nov 2026 00:00:00 GMT\r\nAccept-Ranges: bytes\r\n"
    );
    if request.if_match.as_ref().is_some_and(|t| *t != etag) {
        return stream.write_all(
            format!("HTTP/1.1 412 Precondition Failed\r\n{common}Content-Length: 0\r\n\r\n")
                .as_bytes(),
        );
    }
    if request.if_none_match.as_ref() == Some(&etag) {
        return stream.write_all(format!("HTTP/1.1 304 Not Modified\r\n{common}\r\n").as_bytes());
    }
    let (first, last) = match request.range {
        Some((first, last)) => (first, last.unwrap_or(u64::MAX).min(size - 1)),
        None => (0, size.saturating_sub(1)),
    };
    if first > last {
        return stream
            .write_all(b"HTTP/1.1 416 Range Not Satisfiable\r\nContent-Length: 0\r\n\r\n");
    }
    let length = (last + 1 - first).min(size);
    let status = match request.range {
        Some(_) => format!("206 Partial Content\r\nContent-Range: bytes {first}-{last}/{size}"),
        None => "200 OK".to_owned(),
    };
    stream.write_all(
        format!("HTTP/1.1 {status}\r\n{common}Content-Length: {length}\r\n\r\n").as_bytes(),
    )?;
    if request.head_only {
        return Ok(());
    }
    file.seek(SeekFrom::Start(first))?;
    send(&mut file, length, stream, pace)
}

fn send(file: &mut File, length: u64, stream: &mut TcpStream, pace: &Pace) -> std::io::Result<()> {
    let mut left = length;
    let mut due = Instant::now();
    while left > 0 {
        let slice = left.min(SLICE_BYTES);
        due += Duration::from_secs_f64(slice as f64 / pace.bytes_per_second);
        let now = Instant::now();
        if due > now {
            std::thread::sleep(due - now);
        } else {
            due = due.max(now - LATE_MAX);
        }
        std::io::copy(&mut (&*file).take(slice), stream)?;
        left -= slice;
    }
    Ok(())
}
