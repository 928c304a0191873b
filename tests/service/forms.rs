//! The forms that digits come in, and what a client learns while it waits.

use crate::app::{App, PATIENCE, grey};
use crate::stores::fault::{Fault, ObjectServer};
use crate::stores::{mnist_bytes, with};
use base64::Engine as _;
use bytes::BytesMut;
use image_generator::api::Record;
use reqwest::Response;
use std::time::{Duration, Instant};

const NO_ENV: &[(&str, &str)] = &[];
const SHEET: &str = r#"{"digits": "0123456789", "count": 10, "seed": 7, "steps": 8}"#;

async fn post(app: &App, accept: &str, body: &str) -> Response {
    reqwest::Client::new()
        .post(app.url("/v1/generate"))
        .header("accept", accept)
        .header("content-type", "application/json")
        .body(body.to_owned())
        .send()
        .await
        .unwrap()
}

async fn get(app: &App, path: &str, accept: &str) -> Response {
    let request = reqwest::Client::new().get(app.url(path));
    request.header("accept", accept).send().await.unwrap()
}

/// Reads records, each with the time at which it was there.
async fn records(mut response: Response, since: Instant) -> Vec<(Duration, Record)> {
    assert_eq!(response.headers()["content-type"], "application/x-ndjson");
    let (mut text, mut found) = (BytesMut::new(), Vec::new());
    while let Some(bytes) = response.chunk().await.unwrap() {
        text.extend_from_slice(&bytes);
        while let Some(end) = text.iter().position(|&b| b == b'\n') {
            let line = text.split_to(end + 1);
            found.push((since.elapsed(), serde_json::from_slice(&line).unwrap()));
        }
    }
    assert!(text.is_empty(), "half a record: {text:?}");
    found
}

/// Whether there is a picture in these bytes, or a part of one.
fn has_png(bytes: &[u8]) -> bool {
    let has = |what: &[u8]| bytes.windows(what.len()).any(|w| w == what);
    has(b"IDAT") || has(b"\"type\":\"digit\"")
}

fn png(text: &str) -> (usize, usize, Vec<u8>) {
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(text)
        .unwrap();
    grey(&bytes)
}

#[tokio::test]
async fn a_sheet_leaves_row_by_row_and_is_the_same_file() {
    let app = App::start(&[("THREADS", "1")]);
    app.client.digit("0", &Default::default()).await.unwrap();
    let asked = Instant::now();
    let mut response = post(&app, "image/png", SHEET).await;
    assert!(response.headers().get("content-length").is_none());
    let (mut file, mut times) = (BytesMut::new(), Vec::new());
    while let Some(bytes) = response.chunk().await.unwrap() {
        file.extend_from_slice(&bytes);
        times.push((asked.elapsed(), bytes.len()));
    }
    let (first, last) = (times[0].0, times[times.len() - 1].0);
    println!("a sheet of 100, 8 steps: {times:?}");
    assert!(times.len() >= 5 && first < last / 2, "{times:?}");
    // A row of the sheet, drawn alone, is the row of the sheet.
    let (width, height, pixels) = grey(&file);
    assert_eq!((width, height), (280, 280));
    let row = r#"{"digits": "0123456789", "seed": 57, "steps": 8}"#;
    let alone = post(&app, "*/*", row).await.bytes().await.unwrap();
    assert_eq!(grey(&alone).2, pixels[5 * 28 * 280..6 * 28 * 280]);
    // What the command line makes in one go is the same, byte for byte.
    let draw = ["draw", "--seed=7", "--steps=8", "--count=10", "-o", "-"];
    let output = crate::app::binary().args(draw).output().unwrap();
    assert!(output.stdout == file, "the same bytes");
}

#[tokio::test]
async fn the_denoising_is_an_animation_that_ends_with_the_digit() {
    let app = App::start(NO_ENV);
    let path = "/v1/digits/7?seed=3&steps=6&scale=2";
    let still = get(&app, path, "image/png").await.bytes().await.unwrap();
    let answer = get(&app, path, "image/apng").await;
    assert_eq!(answer.headers()["content-type"], "image/apng");
    let etag = answer.headers()["etag"].clone();
    let moving = answer.bytes().await.unwrap();
    // Without animation a viewer shows the digit.
    assert_eq!(grey(&moving), grey(&still));
    let mut reader = png::Decoder::new(std::io::Cursor::new(&moving))
        .read_info()
        .unwrap();
    let frames = reader.info().animation_control().unwrap().num_frames;
    assert_eq!(frames, 6, "one for each step");
    let mut frame = vec![0; reader.output_buffer_size().unwrap()];
    let mut seen = Vec::new();
    for _ in 0..=frames {
        reader.next_frame(&mut frame).unwrap();
        seen.push(frame.clone());
    }
    assert_eq!(seen[6], grey(&still).2, "the result comes last");
    assert_ne!(seen[1], seen[6], "and something else first");
    // No step is left out, whatever else is drawn: the same bytes, and a way to know it.
    let (again, _) = tokio::join!(get(&app, path, "image/apng"), post(&app, "*/*", SHEET));
    assert_eq!(again.headers()["etag"], etag);
    assert_eq!(again.bytes().await.unwrap(), moving);
    assert_ne!(get(&app, path, "image/png").await.headers()["etag"], etag);
}

#[tokio::test]
async fn parts_come_with_their_label_seed_and_index() {
    let app = App::start(NO_ENV);
    let body = r#"{"digits": "314", "count": 2, "seed": 9}"#;
    let answer = post(&app, "multipart/mixed", body).await;
    let kind = answer.headers()["content-type"]
        .to_str()
        .unwrap()
        .to_owned();
    let boundary = kind.strip_prefix("multipart/mixed; boundary=").unwrap();
    let bytes = answer.bytes().await.unwrap();
    let mut seen = Vec::new();
    let mut rest = &bytes[..];
    let open = format!("--{boundary}\r\n");
    while let Some(part) = rest.strip_prefix(open.as_bytes()) {
        let end = part.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
        let head = std::str::from_utf8(&part[..end]).unwrap();
        let value = |name: &str| {
            let line = head.lines().find_map(|l| l.strip_prefix(name));
            line.unwrap().to_owned()
        };
        let length: usize = value("content-length: ").parse().unwrap();
        let png = &part[end + 4..end + 4 + length];
        let (index, label, seed) = (value("x-index: "), value("x-label: "), value("x-seed: "));
        let alone = format!("/v1/digits/{label}?seed={seed}");
        let alone = get(&app, &alone, "*/*").await.bytes().await.unwrap();
        assert_eq!(alone, png, "{head}");
        seen.push((index.parse::<u64>().unwrap(), label, seed));
        rest = part[end + 4 + length..].strip_prefix(b"\r\n").unwrap();
    }
    assert_eq!(rest, format!("--{boundary}--\r\n").as_bytes());
    seen.sort();
    let expected = ["3", "1", "4", "3", "1", "4"];
    for (i, (index, label, seed)) in seen.iter().enumerate() {
        assert_eq!((*index, &**label), (i as u64, expected[i]));
        assert_eq!(*seed, (9 + i).to_string());
    }
    assert_eq!(seen.len(), 6);
}

#[tokio::test]
async fn records_tell_of_each_step_and_digit_and_how_it_ended() {
    let app = App::start(NO_ENV);
    let body = r#"{"digits": "20", "seed": 5, "steps": 8, "scale": 3}"#;
    let answer = post(&app, "application/x-ndjson", body).await;
    assert_eq!(answer.headers()["x-seed"], "5");
    let records = records(answer, Instant::now()).await;
    let kinds: Vec<&str> = records.iter().map(|(_, r)| r.kind()).collect();
    assert_eq!(kinds[0], "queued");
    assert!(
        kinds.contains(&"started") && kinds.contains(&"preview"),
        "{kinds:?}"
    );
    assert_eq!(kinds.iter().filter(|k| **k == "digit").count(), 2);
    let Record::Done {
        digits: 2,
        seed: 5,
        timing,
        ..
    } = &records.last().unwrap().1
    else {
        panic!("{records:?}");
    };
    assert!(timing["total"] > 0.0 && timing.contains_key("steps"));
    for (_, record) in &records {
        match record {
            Record::Digit {
                index,
                label,
                seed,
                png: text,
            } => {
                let path = format!("/v1/digits/{label}?seed={seed}&steps=8&scale=3");
                let alone = get(&app, &path, "*/*").await.bytes().await.unwrap();
                assert_eq!(png(text), grey(&alone));
                assert_eq!(*seed, 5 + index);
            }
            Record::Preview {
                step,
                steps: 8,
                png: text,
                ..
            } => {
                assert!((1..8).contains(step));
                assert_eq!(png(text).0, 28);
            }
            _ => {}
        }
    }
}

#[tokio::test]
async fn events_are_what_a_browser_reads_and_end_for_good() {
    let app = App::start(NO_ENV);
    let text = get(&app, "/v1/digits/4?seed=1", "text/event-stream").await;
    assert_eq!(text.headers()["content-type"], "text/event-stream");
    let text = text.text().await.unwrap();
    assert!(
        text.starts_with("event: queued\ndata: {\"type\":\"queued\""),
        "{text}"
    );
    let last = text.trim_end().rsplit("\n\n").next().unwrap();
    assert!(last.starts_with("event: done\nid: end\ndata: {"), "{last}");
    // The browser connects again, and is told not to.
    let again = reqwest::Client::new()
        .get(app.url("/v1/digits/4?seed=1"))
        .header("accept", "text/event-stream")
        .header("last-event-id", "end")
        .send()
        .await
        .unwrap();
    assert_eq!(again.status(), 204);
}

#[tokio::test]
async fn what_there_is_not_is_406_and_says_what_there_is() {
    let app = App::start(NO_ENV);
    let answer = get(&app, "/v1/digits/4", "image/webp").await;
    assert_eq!(answer.status(), 406);
    let problem: image_generator::api::Problem = answer.json().await.unwrap();
    for form in [
        "image/png",
        "image/apng",
        "multipart/mixed",
        "x-ndjson",
        "event-stream",
    ] {
        assert!(problem.detail.contains(form), "{problem:?}");
    }
}

/// Every answer of the store comes so much later.
async fn slow(delay: Duration) -> ObjectServer {
    let server = ObjectServer::new(mnist_bytes()).await;
    server.script(move |_| Some(Fault::Late(delay)));
    server
}

#[tokio::test]
async fn a_cold_stream_speaks_at_once_and_tells_how_the_load_goes() {
    let server = slow(Duration::from_millis(400)).await;
    let env = with(
        server.env(),
        &[("RANGE_MB", "1"), ("RANGE_CONCURRENCY", "2")],
    );
    let app = App::start(&env);
    let asked = Instant::now();
    let answer = post(&app, "application/x-ndjson", r#"{"digits": "7"}"#).await;
    let head = asked.elapsed();
    let records = records(answer, asked).await;
    println!(
        "cold: head after {head:?}, {:?}",
        records
            .iter()
            .map(|(t, r)| (*t, r.kind()))
            .collect::<Vec<_>>()
    );
    assert!(head < Duration::from_millis(100), "{head:?}");
    assert!(
        records[0].0 < Duration::from_millis(100),
        "{:?}",
        records[0]
    );
    let loads: Vec<(u64, u64, Option<u64>)> = records
        .iter()
        .filter_map(|(_, r)| match r {
            Record::Loading {
                bytes_arrived,
                bytes_total,
                seconds_left,
                ..
            } => Some((*bytes_arrived, *bytes_total, *seconds_left)),
            _ => None,
        })
        .collect();
    assert!(loads.iter().any(|l| l.2.is_some()), "{loads:?}");
    assert!(loads.windows(2).all(|w| w[0].0 <= w[1].0), "{loads:?}");
    let total = mnist_bytes().len() as u64;
    assert!(loads.iter().any(|l| l.1 == total), "{loads:?}");
    assert_eq!(records.last().unwrap().1.kind(), "done");
}

#[tokio::test]
async fn a_load_that_fails_after_the_head_is_the_last_record() {
    let server = ObjectServer::new(mnist_bytes()).await;
    server.script(|_| Some(Fault::Status(403)));
    let app = App::start(&server.env());
    let answer = post(&app, "application/x-ndjson", "{}").await;
    assert_eq!(answer.status(), 200);
    let records = records(answer, Instant::now()).await;
    let Record::Error { problem, .. } = &records.last().unwrap().1 else {
        panic!("{records:?}");
    };
    assert_eq!(problem.status, 502);
    let answer = post(&app, "multipart/mixed", "{}")
        .await
        .text()
        .await
        .unwrap();
    assert!(answer.contains("application/problem+json") && answer.ends_with("--\r\n"));
    let answer = post(&app, "image/png", "{}").await;
    assert_eq!(answer.status(), 502, "a picture's head waits");
}

#[tokio::test]
async fn a_client_that_does_not_want_to_wait_is_told_when_to_come_back() {
    let server = slow(Duration::from_millis(600)).await;
    let env = with(
        server.env(),
        &[("RANGE_MB", "1"), ("RANGE_CONCURRENCY", "2")],
    );
    let app = App::start(&env);
    let client = reqwest::Client::new();
    let ask = || {
        let request = client.get(app.url("/v1/digits/7?seed=1"));
        request.header("prefer", "wait=1").send()
    };
    let asked = Instant::now();
    let answer = ask().await.unwrap();
    assert_eq!(answer.status(), 503);
    assert!(asked.elapsed() < Duration::from_secs(5));
    assert_eq!(answer.headers()["preference-applied"], "wait=1");
    let after: u64 = answer.headers()["retry-after"]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!((1..10).contains(&after), "{after}");
    let drawn = async {
        loop {
            tokio::time::sleep(Duration::from_secs(after)).await;
            let answer = ask().await.unwrap();
            if answer.status() == 200 {
                return answer;
            }
        }
    };
    let answer = tokio::time::timeout(PATIENCE, drawn).await.unwrap();
    assert_eq!(answer.headers()["preference-applied"], "wait=1");
    println!("told {after} s, drawn after {:?}", asked.elapsed());
    let loads = app
        .log()
        .iter()
        .filter(|l| l["message"] == "model ready")
        .count();
    assert_eq!(loads, 1, "the load went on meanwhile");
}

#[tokio::test]
async fn a_reader_that_leaves_in_the_middle_takes_its_digits_along() {
    let app = App::start(&[("BATCH_ROWS", "2"), ("QUEUE_DIGITS", "1000")]);
    let long = r#"{"digits": "0", "count": 1000, "steps": 64}"#;
    // More than has become free by the time that the first is done.
    let some = r#"{"digits": "0", "count": 100}"#;
    for accept in ["application/x-ndjson", "image/png", "multipart/mixed"] {
        let answer = 'asked: loop {
            let mut answer = post(&app, accept, long).await;
            // Once there is a picture, the rest is in the queue.
            while let Some(chunk) = answer.chunk().await.unwrap() {
                if has_png(&chunk) {
                    break 'asked answer;
                }
            }
            // Refused: what the last probe asked for was still on its way out of the queue.
        };
        let full = post(&app, "image/png", some).await;
        assert_eq!(full.status(), 503, "{accept}: its digits fill the queue");
        drop(answer);
        let free = async {
            loop {
                let answer = post(&app, "image/png", some).await;
                if answer.status() == 200 {
                    // To its end: nothing of it is in the queue when the next round begins.
                    break answer.bytes().await.unwrap();
                }
            }
        };
        let left = Instant::now();
        tokio::time::timeout(PATIENCE, free).await.expect(accept);
        println!(
            "{accept}: the queue was free {:?} after the client left",
            left.elapsed()
        );
    }
    let left = |l: &serde_json::Value| l["end"] == "client left" && l["path"] == "/v1/generate";
    app.logged(left).await;
}

#[tokio::test]
async fn a_cut_stream_can_be_told_from_a_complete_one() {
    let mut app = App::start(&[("DRAIN_SECS", "0"), ("BATCH_ROWS", "2")]);
    let long = r#"{"digits": "0", "count": 1000, "steps": 64}"#;
    let mut answer = post(&app, "application/x-ndjson", long).await;
    answer.chunk().await.unwrap().unwrap();
    app.signal("TERM");
    let end = loop {
        match answer.chunk().await {
            Ok(Some(_)) => {}
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    assert!(end.is_err(), "the chunked body has no end");
    assert!(app.ended().await.success());
}
