//! Where the tests' weights come from: real stores in processes of their own (`s3`, `azure`), stand-ins for what
//! has none (`gcs`, `hub`), and an object server that fails on request (`fault`).

pub mod azure;
pub mod fault;
pub mod folder;
pub mod gcs;
pub mod hub;
pub mod proxy;
pub mod s3;
pub mod wire;

use crate::app::App;
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use image_generator::client::{ClientError, DigitQuery, Image};
use sha2::{Digest as _, Sha256};
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::{AbortHandle, JoinSet};

/// Variables for the service.
pub type Env = Vec<(&'static str, String)>;

/// Variables of a store, and others.
pub fn with(mut env: Env, others: &[(&'static str, &str)]) -> Env {
    env.extend(others.iter().map(|&(name, value)| (name, value.to_owned())));
    env
}

/// A weights file of 56 KB: 12 x 12 pixels, 3 channels.
pub fn small() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/small.safetensors")
}

/// Its bytes.
pub fn small_bytes() -> Bytes {
    Bytes::from(std::fs::read(small()).unwrap())
}

/// The default model's bytes: 7.7 MB, several ranges of a megabyte.
pub fn mnist_bytes() -> Bytes {
    Bytes::from_static(image_generator::model::BUILT_IN)
}

/// The default model in several files with an index, as Hugging Face's libraries write it.
pub fn shards(folder: &Path, n: usize) {
    use serde_json::{Map, Value, json};
    let bytes = mnist_bytes();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let metadata = header.remove("__metadata__");
    let mut weight_map = Map::new();
    for shard in 0..n {
        let name = format!("model-{shard:05}.safetensors");
        let (mut part, mut data) = (Map::new(), Vec::new());
        if shard == 0 {
            part.extend(metadata.clone().map(|m| ("__metadata__".to_owned(), m)));
        }
        for (tensor, entry) in header.iter().skip(shard).step_by(n) {
            let mut entry = entry.clone();
            let at = |i: usize| 8 + length + entry["data_offsets"][i].as_u64().unwrap() as usize;
            let tensor_bytes = &bytes[at(0)..at(1)];
            let (start, end) = (data.len(), data.len() + tensor_bytes.len());
            entry["data_offsets"] = json!([start, end]);
            data.extend_from_slice(tensor_bytes);
            weight_map.insert(tensor.clone(), name.clone().into());
            part.insert(tensor.clone(), entry);
        }
        let text = Value::from(part).to_string();
        let file = [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &data].concat();
        std::fs::write(folder.join(name), file).unwrap();
    }
    let index = json!({ "metadata": {}, "weight_map": weight_map }).to_string();
    std::fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
}

/// The version that the service gives weights: the first 16 digits of their SHA-256.
pub fn version(weights: &[u8]) -> String {
    image_generator::storage::hex(&Sha256::digest(weights)[..8])
}

/// Asks for a digit that every model here can draw, always the same one.
pub async fn ask(app: &App) -> Result<Image, ClientError> {
    let query = DigitQuery {
        seed: Some(1),
        ..DigitQuery::default()
    };
    app.client.digit("1", &query).await
}

/// Draws it, and makes sure that it came from these very weights.
pub async fn draw(app: &App, weights: &[u8]) -> Image {
    let image = ask(app).await.unwrap();
    assert_eq!(image.model_version, version(weights));
    image
}

/// A problem document in place of a digit.
#[derive(Debug, PartialEq)]
pub struct Refusal {
    pub status: u16,
    /// The last part of the problem's type.
    pub kind: String,
    pub detail: String,
    pub retry_after: Option<Duration>,
}

/// Asks for the digit, which cannot be had; the service is up and its model cold afterwards.
pub async fn refusal(app: &App) -> Refusal {
    let refusal = refused(ask(app).await);
    app.client.health("live").await.unwrap();
    assert_eq!(app.client.health("ready").await.unwrap().model, "cold");
    let failed = |l: &serde_json::Value| {
        l["severity"] == "ERROR" && l["message"] == "the model could not be loaded"
    };
    app.logged(failed).await;
    refusal
}

pub fn refused(result: Result<Image, ClientError>) -> Refusal {
    match result {
        Err(ClientError::Problem {
            problem,
            retry_after,
        }) => Refusal {
            status: problem.status,
            kind: problem.kind.rsplit(':').next().unwrap().to_owned(),
            detail: problem.detail,
            retry_after,
        },
        other => panic!("not a problem document: {other:?}"),
    }
}

/// All files below a folder.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for path in std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .map(|e| e.unwrap().path())
    {
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found
}

/// Makes ring the tests' own TLS provider, without which no client can be built.
fn use_ring() {
    // An error means that it was installed before.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// Where scripts/test-tools installs the stores.
pub fn tools() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/test-tools")
}

/// A store as a process that ends when its standard input closes, which it does however the tests end.
struct Process {
    child: Child,
    /// The words of its first line: the port, and how to sign.
    words: Vec<String>,
}

impl Process {
    fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{command:?}: {e}; run scripts/test-tools"));
        // Read to its end, or a store that logs every request stops when the pipe is full.
        let mut stderr = child.stderr.take().unwrap();
        let complaints = std::thread::spawn(move || std::io::read_to_string(&mut stderr));
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        if words.len() < 3 {
            let _ = child.kill();
            panic!("{command:?} did not start: {:?}", complaints.join());
        }
        Self { child, words }
    }

    fn address(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.words[0].parse::<u16>().unwrap()).into()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

type Answer = http::Response<UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>>;

/// An answer with the whole of its body.
fn answer(status: u16, body: impl Into<Bytes>) -> Answer {
    let body = Full::new(body.into())
        .map_err(|e| match e {})
        .boxed_unsync();
    http::Response::builder().status(status).body(body).unwrap()
}

/// A hyper server on a free port of the loopback interface. Dropped, it closes its port and its connections.
struct Served {
    address: SocketAddr,
    accept: AbortHandle,
}

impl Served {
    async fn new<F>(handler: impl Fn(http::Request<Incoming>) -> F + Clone + Send + 'static) -> Self
    where
        F: Future<Output = Answer> + Send,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let accept = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                let handler = handler.clone();
                let service = hyper::service::service_fn(move |request| {
                    let answer = handler(request);
                    async { Ok::<_, std::convert::Infallible>(answer.await) }
                });
                let http = hyper::server::conn::http1::Builder::new();
                connections.spawn(http.serve_connection(TokioIo::new(socket), service));
            }
        });
        Self {
            address,
            accept: accept.abort_handle(),
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.accept.abort();
    }
}
