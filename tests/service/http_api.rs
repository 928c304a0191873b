//! Requests and answers, with the built-in weights.

use crate::app::{App, PATIENCE, grey};
use image_generator::api::{Digits, GenerateRequest, Layout};
use image_generator::client::{Client, ClientConfig, ClientError, DigitQuery, Image};
use std::io::Write as _;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const NO_ENV: &[(&str, &str)] = &[];

fn seeded(seed: u64) -> DigitQuery {
    DigitQuery {
        seed: Some(seed),
        ..DigitQuery::default()
    }
}

fn sheet(digits: &str, seed: u64) -> GenerateRequest {
    GenerateRequest {
        digits: Some(Digits::Text(digits.to_owned())),
        seed: Some(seed),
        ..GenerateRequest::default()
    }
}

/// The cell of a sheet of 28 x 28 digits.
fn cell(image: &Image, column: usize, row: usize) -> Vec<u8> {
    let (width, _, pixels) = grey(&image.png);
    (0..28)
        .flat_map(|y| {
            let at = (row * 28 + y) * width + column * 28;
            pixels[at..at + 28].to_vec()
        })
        .collect()
}

#[tokio::test]
async fn a_digit_is_a_grey_png_that_can_be_drawn_again() {
    let app = App::start(NO_ENV);
    assert_eq!(app.client.health("ready").await.unwrap().model, "cold");
    let first = app.client.digit("7", &DigitQuery::default()).await.unwrap();
    let (width, height, pixels) = grey(&first.png);
    assert_eq!((width, height), (28, 28));
    assert!(pixels.iter().any(|&p| p > 200), "there is ink");
    assert!(pixels.iter().filter(|&&p| p < 50).count() > 400, "on black");
    assert_eq!(first.headers["cache-control"], "no-store");

    let again = app.client.digit("7", &seeded(first.seed)).await.unwrap();
    assert_eq!(again.png, first.png);
    assert_eq!(again.headers["etag"], first.headers["etag"]);
    assert_ne!(
        app.client
            .digit("7", &seeded(first.seed + 1))
            .await
            .unwrap()
            .png,
        first.png
    );
    assert_eq!(app.client.health("ready").await.unwrap().model, "ready");

    let fresh = reqwest::Client::new()
        .get(app.url(&format!("/v1/digits/7?seed={}", first.seed)))
        .header("if-none-match", again.headers["etag"].clone())
        .send()
        .await
        .unwrap();
    assert_eq!(fresh.status(), 304);
    assert!(fresh.bytes().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_digit_does_not_depend_on_what_is_drawn_beside_it() {
    let app = App::start(&[("BATCH_ROWS", "8")]);
    let alone = app.client.digit("3", &seeded(102)).await.unwrap();
    let (_, _, alone) = grey(&alone.png);
    let big = GenerateRequest {
        count: Some(6),
        layout: Some(Layout::Rows),
        ..sheet("0123456789", 100)
    };
    let (fives, three) = (sheet("55", 7), seeded(102));
    let (other, big, mixed) = tokio::join!(
        app.client.generate(&fives),
        app.client.generate(&big),
        app.client.digit("3", &three),
    );
    assert_eq!(grey(&mixed.unwrap().png).2, alone);
    // The third digit of the sheet has seed 102, but is a two.
    assert_ne!(cell(big.as_ref().unwrap(), 2, 0), alone);
    let (width, height, _) = grey(&big.unwrap().png);
    assert_eq!((width, height), (280, 168));
    assert_eq!(grey(&other.unwrap().png).0, 56);
    let strip = app.client.generate(&sheet("993", 100)).await.unwrap();
    assert_eq!(cell(&strip, 2, 0), alone);
}

#[tokio::test]
async fn both_http_versions_answer_on_one_port() {
    let app = App::start(NO_ENV);
    let config = ClientConfig {
        http2_prior_knowledge: true,
        ..ClientConfig::default()
    };
    let h2c = Client::new(&app.url(""), config).unwrap();
    let one = app.client.digit("4", &seeded(1)).await.unwrap();
    let two = h2c.digit("4", &seeded(1)).await.unwrap();
    assert_eq!(one.png, two.png);
    let raw = reqwest::Client::builder()
        .http2_prior_knowledge()
        .build()
        .unwrap();
    let answer = raw.get(app.url("/health/live")).send().await.unwrap();
    assert_eq!(answer.version(), http::Version::HTTP_2);
}

#[tokio::test]
async fn bad_input_is_answered_with_a_problem_that_names_the_field() {
    let app = App::start(&[("MAX_DIGITS", "100"), ("MAX_BODY_BYTES", "1000")]);
    let long = format!(r#"{{"digits": "{}"}}"#, "1".repeat(2000));
    let json = "application/json";
    for (method, path, kind, body, status, field) in [
        ("GET", "/v1/digits/11", "", "", 400, "label"),
        ("GET", "/v1/digits/x", "", "", 400, "label"),
        ("GET", "/v1/digits/", "", "", 400, "label"),
        ("GET", "/v1/digits/7?guidance=NaN", "", "", 400, "guidance"),
        ("GET", "/v1/digits/7?guidance=inf", "", "", 400, "guidance"),
        ("GET", "/v1/digits/7?steps=65", "", "", 400, "steps"),
        ("GET", "/v1/digits/7?seed=-1", "", "", 400, "seed"),
        ("GET", "/v1/digits/7?size=3", "", "", 400, "size"),
        ("GET", "/v1/digits/7?model=vgg", "", "", 404, "model"),
        (
            "POST",
            "/v1/generate",
            json,
            r#"{"count": 11}"#,
            400,
            "count",
        ),
        (
            "POST",
            "/v1/generate",
            json,
            r#"{"colour": 1}"#,
            400,
            "colour",
        ),
        (
            "POST",
            "/v1/generate",
            json,
            r#"{"digits": "1a"}"#,
            400,
            "label",
        ),
        ("POST", "/v1/generate", json, "[]", 400, "body"),
        (
            "POST",
            "/v1/generate",
            "text/plain",
            "{}",
            415,
            "Content-Type",
        ),
        ("POST", "/v1/generate", json, &long, 413, ""),
        ("POST", "/v1/digits/7", json, "", 405, ""),
        ("GET", "/v1/generate", "", "", 405, ""),
        ("GET", "/v2/digits", "", "", 404, ""),
    ] {
        let answer = reqwest::Client::new()
            .request(method.parse().unwrap(), app.url(path))
            .header("content-type", kind)
            .header("x-request-id", "mine-1")
            .body(body.to_owned())
            .send()
            .await
            .unwrap();
        let what = format!("{method} {path} {body:.60}");
        assert_eq!(answer.status(), status, "{what}");
        assert_eq!(
            answer.headers()["content-type"],
            "application/problem+json",
            "{what}"
        );
        if status == 405 {
            assert!(answer.headers().contains_key("allow"), "{what}");
        }
        let problem: image_generator::api::Problem = answer.json().await.unwrap();
        assert_eq!(
            (problem.status, &*problem.request_id),
            (status, "mine-1"),
            "{what}"
        );
        if !field.is_empty() {
            assert_eq!(problem.errors[0].field, field, "{what}");
        }
    }
    app.client.digit("7", &DigitQuery::default()).await.unwrap();
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_back() {
    let app = App::start(&[("QUEUE_DIGITS", "4"), ("MAX_DIGITS", "4")]);
    let long = GenerateRequest {
        steps: Some(64),
        ..sheet("0123", 1)
    };
    let (one, two) = tokio::join!(app.client.generate(&long), app.client.generate(&long));
    let refused = one.and(two).expect_err("there is room for one of them");
    assert_eq!(refused.status(), Some(503));
    let ClientError::Problem { retry_after, .. } = refused else {
        panic!("{refused}");
    };
    assert!(retry_after.is_some_and(|r| r >= Duration::from_secs(1)));
    app.client.generate(&long).await.unwrap();
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_digits_along() {
    let app = App::start(&[("QUEUE_DIGITS", "1000"), ("BATCH_ROWS", "2")]);
    app.client.digit("0", &seeded(0)).await.unwrap();
    let body = r#"{"digits": "0", "count": 1000, "steps": 64}"#;
    let head = format!(
        "POST /v1/generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let one = sheet("0", 1);
    let probe = || app.client.generate(&one);
    // Until its digits fill the queue; a probe that comes before them takes their place.
    let socket = loop {
        let mut socket = TcpStream::connect(app.address).await.unwrap();
        socket.write_all(head.as_bytes()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        if probe().await.is_err() {
            break socket;
        }
    };
    drop(socket);
    let wait = async { while probe().await.is_err() {} };
    tokio::time::timeout(PATIENCE, wait)
        .await
        .expect("the queue empties");
}

#[tokio::test]
async fn sigterm_lets_open_requests_finish_and_closes_the_port() {
    let mut app = App::start(NO_ENV);
    app.client.digit("0", &seeded(0)).await.unwrap();
    // A silent connection must not hold the process up.
    let mut silent = TcpStream::connect(app.address).await.unwrap();
    silent.write_all(b"GET /v1/dig").await.unwrap();
    // Few enough digits that a busy machine draws them before the drain ends.
    let request = sheet("0123456789", 5);
    let client = app.client.clone();
    let open = tokio::spawn(async move { client.generate(&request).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    app.signal("TERM");
    let image = open.await.unwrap().unwrap();
    assert_eq!(grey(&image.png).1, 28);
    assert!(app.ended().await.success());
    assert!(TcpStream::connect(app.address).await.is_err());
    let mut rest = Vec::new();
    let _ = silent.read_to_end(&mut rest).await;
}

#[tokio::test]
async fn log_lines_are_what_cloud_logging_reads() {
    let app = App::start(&[("GOOGLE_CLOUD_PROJECT", "p1")]);
    let trace = "0af7651916cd43dd8448eb211c80319c";
    reqwest::Client::new()
        .get(app.url("/v1/digits/7"))
        .header("x-cloud-trace-context", format!("{trace}/1;o=1"))
        .header("x-request-id", "r-1")
        .send()
        .await
        .unwrap();
    let line = app.logged(|l| l["path"] == "/v1/digits/7").await;
    assert_eq!(line["severity"], "INFO");
    assert_eq!(line["message"], "request");
    assert_eq!(line["request_id"], "r-1");
    assert!(
        line["logging.googleapis.com/trace"]
            .as_str()
            .unwrap()
            .ends_with(trace)
    );
    assert!(app.log().iter().all(serde_json::Value::is_object));
}

#[test]
fn a_bad_environment_is_reported_at_once_with_exit_code_64() {
    let output = crate::app::binary()
        .envs([
            ("PORT", "70000"),
            ("DEVICE", "tpu"),
            ("MAX_MEMORY_MB", "lots"),
        ])
        .env("MODEL_URI", "ftp://x/y")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(64));
    let text = String::from_utf8(output.stderr).unwrap();
    for name in ["PORT", "DEVICE", "MAX_MEMORY_MB", "MODEL_URI"] {
        assert!(text.contains(name), "{name}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn health_asks_the_server_on_this_machine() {
    let app = App::start(NO_ENV);
    let port = app.address.port().to_string();
    let health = |host: &str| {
        let output = crate::app::binary()
            .arg("health")
            .envs([("HOST", host), ("PORT", &port)])
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    // Nobody connects to 0.0.0.0, which a container listens on.
    for host in ["127.0.0.1", "0.0.0.0"] {
        assert_eq!(health(host), (Some(0), String::new()));
    }
    drop(app);
    let (code, text) = health("0.0.0.0");
    assert_eq!(code, Some(1));
    assert!(
        text.contains(&format!("127.0.0.1:{port} does not answer")),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_draws_the_same_with_and_without_a_server() {
    let app = App::start(NO_ENV);
    let draw = |url: &[&str]| {
        let output = crate::app::binary()
            .args(["draw", "2026", "--seed", "5", "--scale", "2", "-o", "-"])
            .args(url)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        output.stdout
    };
    let local = draw(&[]);
    let (width, height, _) = grey(&local);
    assert_eq!((width, height), (4 * 56, 56));
    assert_eq!(draw(&["--url", &app.url("")]), local);
}

#[test]
fn inspect_prints_what_a_file_holds_and_says_what_is_wrong() {
    let inspect = |place: &str| {
        let output = crate::app::binary()
            .args(["inspect", place])
            .output()
            .unwrap();
        (
            output.status.success(),
            String::from_utf8([output.stdout, output.stderr].concat()).unwrap(),
        )
    };
    let small = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/golden/small.safetensors"
    );
    let (good, text) = inspect(small);
    assert!(good && text.contains("12 x 12, 3 channels"), "{text}");
    let mut broken = tempfile::NamedTempFile::new().unwrap();
    broken
        .write_all(&std::fs::read(small).unwrap()[..20_000])
        .unwrap();
    let (good, text) = inspect(broken.path().to_str().unwrap());
    assert!(!good && text.starts_with("error: "), "{text}");
}
