//! The typed client and `draw --url`: streams, repetitions, tokens, and what a server says that is none.

use crate::app::{App, binary, grey};
use crate::stores::fault::{Fault, ObjectServer};
use crate::stores::{mnist_bytes, with};
use image_generator::api::{Digits, GenerateRequest, Record};
use image_generator::client::{Client, ClientConfig, ClientError};
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

/// Answers each connection's one request with the next of these, the last of them for ever.
async fn scripted(answers: Vec<String>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let mut at = 0;
        loop {
            let (mut socket, _) = listener.accept().await.unwrap();
            let mut request = [0; 4096];
            let _ = socket.read(&mut request).await;
            let answer = &answers[at.min(answers.len() - 1)];
            let _ = socket.write_all(answer.as_bytes()).await;
            at += 1;
        }
    });
    url
}

fn answer(status: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n{headers}\r\n{body}"
    )
}

#[tokio::test]
async fn a_server_that_says_when_to_come_back_is_asked_then() {
    let problem = r#"{"type":"t","title":"t","status":503,"detail":"d","request_id":"r"}"#;
    let busy = "retry-after: 1\r\ncontent-type: application/problem+json\r\n";
    let busy = answer("503 Service Unavailable", busy, problem);
    let good = answer(
        "200 OK",
        "content-type: application/json\r\n",
        r#"{"models":[]}"#,
    );
    let url = scripted(vec![busy.clone(), good.clone()]).await;
    let client = |url: &str, retries| {
        let config = ClientConfig {
            retries,
            ..ClientConfig::default()
        };
        Client::new(url, config).unwrap()
    };
    let asked = Instant::now();
    client(&url, 2).models().await.unwrap();
    assert!(asked.elapsed() >= Duration::from_secs(1));
    let url = scripted(vec![busy, good]).await;
    let refused = client(&url, 0).models().await.unwrap_err();
    assert_eq!(refused.status(), Some(503));
}

#[tokio::test]
async fn a_stream_tells_of_the_load_and_the_digits_and_of_a_cut() {
    let server = ObjectServer::new(mnist_bytes()).await;
    server.script(|_| Some(Fault::Late(Duration::from_millis(300))));
    let app = App::start(&with(server.env(), &[("RANGE_MB", "2")]));
    let request = GenerateRequest {
        digits: Some(Digits::Text("12".to_owned())),
        ..GenerateRequest::default()
    };
    let mut stream = app.client.stream(&request).await.unwrap();
    let mut kinds = Vec::new();
    while let Some(record) = stream.next().await {
        kinds.push(record.unwrap().kind());
    }
    for kind in ["queued", "loading", "started", "digit"] {
        assert!(kinds.contains(&kind), "{kinds:?}");
    }
    assert_eq!(kinds.last(), Some(&"done"));

    let digit = serde_json::to_string(&Record::Preview {
        index: 0,
        step: 1,
        steps: 4,
        png: String::new(),
    });
    let cut = answer("200 OK", "", &(digit.unwrap() + "\n"));
    let client = Client::new(&scripted(vec![cut]).await, ClientConfig::default()).unwrap();
    let mut stream = client.stream(&request).await.unwrap();
    stream.next().await.unwrap().unwrap();
    assert!(matches!(stream.next().await, Some(Err(ClientError::Cut))));
    assert!(stream.next().await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn google_tokens_come_from_the_metadata_server_or_from_gcloud() {
    let token = "token-of-google";
    let app = App::start(&[("API_KEYS", token)]);
    let metadata = scripted(vec![answer("200 OK", "", token)]).await;
    let folder = tempfile::tempdir().unwrap();
    let gcloud = folder.path().join("gcloud");
    std::fs::write(&gcloud, format!("#!/bin/sh\necho {token}\n")).unwrap();
    std::fs::set_permissions(&gcloud, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!(
        "{}:{}",
        folder.path().display(),
        std::env::var("PATH").unwrap()
    );
    for (identity, expected) in [("metadata", true), ("gcloud", true), ("", false)] {
        let mut command = binary();
        command.args(["draw", "42", "-o", "-", "--url", &app.url("")]);
        command.env("PATH", &path);
        command.env("GCE_METADATA_HOST", metadata.trim_start_matches("http://"));
        if !identity.is_empty() {
            command.args(["--identity", identity]);
        }
        let output = tokio::task::spawn_blocking(move || command.output());
        let output = output.await.unwrap().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.success(), expected, "{identity}: {said}");
        if expected {
            assert_eq!(grey(&output.stdout).0, 56);
        } else {
            assert!(said.contains("401"), "{said}");
        }
    }
}
