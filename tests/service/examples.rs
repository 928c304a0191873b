//! The worked examples of `tests/examples`, each run against the service: warm, and cold for the first of them.

use crate::app::{App, grey};
use crate::stores::tools;
use image_generator::client::DigitQuery;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

fn example(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/examples");
    folder.join(name)
}

/// Runs an example, and compares the pictures that it wrote with what the service draws.
async fn run(mut command: Command, name: &str) {
    let app = App::start(&[("LOG_LEVEL", "info")]);
    let folder = TempDir::new().unwrap();
    command
        .arg(example(name))
        .arg(app.url(""))
        .arg(folder.path());
    let output = tokio::task::spawn_blocking(move || command.output());
    let output = output.await.unwrap().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(output.status.success(), "{name}: {text}");
    let query = DigitQuery {
        seed: Some(42),
        scale: Some(8),
        ..DigitQuery::default()
    };
    let seven = app.client.digit("7", &query).await.unwrap();
    let file = |file: &str| std::fs::read(folder.path().join(file)).unwrap();
    assert_eq!(file("seven.png"), seven.png, "{name}");
    let (width, height, _) = grey(&file("year.png"));
    assert_eq!((width, height), (4 * 56, 56), "{name}");
}

fn there_is(program: &str, args: &[&str]) -> bool {
    let there = Command::new(program).args(args).output();
    let there = there.is_ok_and(|o| o.status.success());
    if !there {
        println!("skipped: `{program} {}` does not run", args.join(" "));
    }
    there
}

#[tokio::test]
async fn curl() {
    if there_is("curl", &["--version"]) {
        run(Command::new("bash"), "draw.sh").await;
    }
}

#[tokio::test]
async fn python_requests() {
    let python = tools().join("python/bin/python");
    let python = python.to_str().unwrap();
    if there_is(python, &["-c", "import requests"]) {
        run(Command::new(python), "draw_requests.py").await;
    }
}

#[tokio::test]
async fn python_httpx_over_http2() {
    let python = tools().join("python/bin/python");
    let python = python.to_str().unwrap();
    if there_is(python, &["-c", "import httpx, h2"]) {
        run(Command::new(python), "draw_httpx.py").await;
    }
}

#[tokio::test]
async fn javascript_fetch() {
    if there_is("node", &["-e", "new TextDecoderStream()"]) {
        run(Command::new("node"), "draw_fetch.mjs").await;
    }
}
