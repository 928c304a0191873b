//! Weights that cannot be served: each is a problem with its reason, the process stays up, nothing bad is kept,
//! and the next request draws from what has been mended.

use crate::app::App;
use crate::stores::fault::ObjectServer;
use crate::stores::{draw, files, mnist_bytes, refusal, small_bytes, with};
use bytes::Bytes;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A weights file, taken apart.
struct Parts {
    header: Value,
    data: Vec<u8>,
}

impl Parts {
    fn of(file: &[u8]) -> Self {
        let (length, rest) = file.split_first_chunk::<8>().unwrap();
        let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
        Self {
            header: serde_json::from_slice(header).unwrap(),
            data: data.to_vec(),
        }
    }

    fn join(&self) -> Bytes {
        let header = serde_json::to_vec(&self.header).unwrap();
        let length = (header.len() as u64).to_le_bytes();
        [&length[..], &header, &self.data].concat().into()
    }
}

/// The small model with something changed.
fn changed(change: impl FnOnce(&mut Parts)) -> Bytes {
    let mut parts = Parts::of(&small_bytes());
    change(&mut parts);
    parts.join()
}

fn with_metadata(name: &str, value: &str) -> Bytes {
    changed(|p| p.header["__metadata__"][name] = value.into())
}

/// The file with its metadata moved to a config.json.
pub fn without_metadata(file: &[u8]) -> (Bytes, String) {
    let mut parts = Parts::of(file);
    let mut metadata = parts
        .header
        .as_object_mut()
        .unwrap()
        .remove("__metadata__")
        .unwrap();
    for (name, value) in metadata.as_object_mut().unwrap() {
        if matches!(&**name, "config" | "sampler" | "classes") {
            *value = serde_json::from_str(value.as_str().unwrap()).unwrap();
        }
    }
    (parts.join(), metadata.to_string())
}

/// Bytes, and a word of the reason that must be given.
fn cases() -> Vec<(&'static str, Bytes, &'static str)> {
    let small = small_bytes();
    let longer = |n: u64| [&n.to_le_bytes()[..], &small[8..]].concat().into();
    vec![
        ("nothing", Bytes::new(), ""),
        ("five bytes", small.slice(..5), "bytes"),
        ("half a header", small.slice(..1000), "bytes"),
        (
            "half the tensors",
            small.slice(..small.len() / 2),
            "describes",
        ),
        ("one byte less", small.slice(..small.len() - 1), "describes"),
        (
            "one byte more",
            [&small[..], b"x"].concat().into(),
            "describes",
        ),
        (
            "a web page",
            Bytes::from_static(b"<!doctype html><title>Sign in</title>"),
            "header",
        ),
        ("a header longer than the file", longer(1 << 20), "bytes"),
        ("a header longer than memory", longer(u64::MAX), "header"),
        (
            "a header that is no JSON",
            changed(|p| p.header = json!("{")),
            "safetensors",
        ),
        (
            "a tensor of another shape",
            changed(|p| p.header["ada.weight"]["shape"] = json!([32, 192])),
            "ada.weight",
        ),
        (
            "a shape whose size overflows",
            changed(|p| p.header["ada.weight"]["shape"] = json!([1_u64 << 40, 1_u64 << 40])),
            "overflow",
        ),
        (
            "a dtype that cannot be read",
            changed(|p| p.header["ada.weight"]["dtype"] = json!("I16")),
            "ada.weight",
        ),
        (
            "overlapping tensors",
            changed(|p| p.header["ada.weight"]["data_offsets"] = json!([0, 12288])),
            "ada.weight",
        ),
        (
            "a tensor outside of the file",
            changed(|p| p.header["ada.weight"]["data_offsets"] = json!([1_000_000, 1_012_288])),
            "offset",
        ),
        (
            "a tensor that is missing",
            changed(|p| {
                let tensors = p.header.as_object_mut().unwrap();
                let tensor = tensors.remove("ada.bias").unwrap();
                tensors.insert("ada.bios".to_owned(), tensor);
            }),
            "ada.bias",
        ),
        (
            "another format version",
            with_metadata("format_version", "2"),
            "version",
        ),
        (
            "another architecture",
            with_metadata("format", "somebody.unet"),
            "somebody.unet",
        ),
        (
            "sizes that do not divide",
            with_metadata("config", &config("heads", 5)),
            "heads",
        ),
        (
            "a width of nothing",
            with_metadata("config", &config("width", 0)),
            "width",
        ),
        (
            "a class without a name",
            with_metadata("classes", r#"["red", "green"]"#),
            "class",
        ),
        ("no description", without_metadata(&small).0, "config"),
        (
            "NaN",
            changed(|p| {
                let end = p.header["patch_out.bias"]["data_offsets"][1]
                    .as_u64()
                    .unwrap() as usize;
                p.data[end - 2..end].fill(0xff);
            }),
            "finite",
        ),
    ]
}

fn config(name: &str, value: u64) -> String {
    let parts = Parts::of(&small_bytes());
    let text = parts.header["__metadata__"]["config"].as_str().unwrap();
    let mut config: Value = serde_json::from_str(text).unwrap();
    config[name] = value.into();
    config.to_string()
}

#[tokio::test]
async fn bad_weights_are_a_problem_with_a_reason_and_never_kept() {
    for (name, bytes, reason) in cases() {
        let server = ObjectServer::new(bytes).await;
        let folder = TempDir::new().unwrap();
        let env = with(
            server.env(),
            &[("MODEL_CACHE_DIR", folder.path().to_str().unwrap())],
        );
        let app = App::start(&env);
        let refusal = refusal(&app).await;
        // Of an object without a byte there is no first range: it is the store that says so.
        let kind = if name == "nothing" {
            "store-answer"
        } else {
            "weights-invalid"
        };
        assert_eq!(
            (refusal.status, &*refusal.kind),
            (502, kind),
            "{name}: {refusal:?}"
        );
        assert!(refusal.detail.contains(reason), "{name}: {refusal:?}");
        assert!(
            files(folder.path()).is_empty(),
            "{name}: {:?}",
            files(folder.path())
        );

        server.replace(small_bytes());
        draw(&app, &small_bytes()).await;
        assert!(!files(folder.path()).is_empty());
    }
}

#[tokio::test]
async fn weights_that_do_not_fit_into_memory_are_refused_with_both_numbers() {
    let server = ObjectServer::new(mnist_bytes()).await;
    let folder = TempDir::new().unwrap();
    let cache = folder.path().to_str().unwrap();
    let env = with(
        server.env(),
        &[
            ("MAX_MEMORY_MB", "1"),
            ("MODEL_CACHE_DIR", cache),
            ("RANGE_MB", "1"),
            ("RANGE_CONCURRENCY", "1"),
        ],
    );
    let app = App::start(&env);
    let refusal = refusal(&app).await;
    assert_eq!((refusal.status, &*refusal.kind), (507, "model-too-large"));
    assert!(
        refusal.detail.contains("8 MB") && refusal.detail.contains("limit is 1 MB"),
        "{refusal:?}"
    );
    assert!(files(folder.path()).is_empty());
    assert!(
        server.wire.body_bytes() < mnist_bytes().len() as u64 / 2,
        "it is refused by its header"
    );
}
