//! MODEL_URI with a / at its end: models by name, as many in memory as there is room for.

use crate::app::App;
use crate::stores::azure::Azure;
use crate::stores::folder::FolderServer;
use crate::stores::{Env, mnist_bytes, proxy::Proxy, refused, shards, small_bytes, version, with};
use image_generator::client::{ClientError, DigitQuery, Image};
use serde_json::Value;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;

async fn ask(app: &App, model: &str) -> Result<Image, ClientError> {
    let query = DigitQuery {
        seed: Some(1),
        steps: Some(1),
        model: (!model.is_empty()).then(|| model.to_owned()),
        ..DigitQuery::default()
    };
    app.client.digit("1", &query).await
}

async fn states(app: &App) -> Vec<(String, String)> {
    let models = app.client.models().await.unwrap().models;
    models.into_iter().map(|m| (m.name, m.state)).collect()
}

fn named(all: &[(&str, &str)]) -> Vec<(String, String)> {
    let owned = |&(a, b): &(&str, &str)| (a.to_owned(), b.to_owned());
    all.iter().map(owned).collect()
}

fn uri(folder: &Path) -> Env {
    vec![("MODEL_URI", format!("file://{}/", folder.display()))]
}

/// A valid model of so many MB whose weights are all zero: of its file no block exists on the disk.
fn blank(path: &Path, mb: usize) {
    let (width, mlp) = (256, 1024);
    let block = 4 * width * width + 2 * width * mlp + 3 * width + width + mlp + width + 6 * width;
    let depth = mb * (1 << 20) / (4 * block);
    let config = serde_json::json!({
        "image_size": 12, "channels": 1, "patch": 4, "width": width, "depth": depth, "heads": 4,
        "mlp_width": mlp, "freq_width": 16, "classes": 3,
    });
    let architecture: image_generator::model::Architecture =
        serde_json::from_value(config.clone()).unwrap();
    let mut header = serde_json::Map::new();
    header.insert(
        "__metadata__".to_owned(),
        serde_json::json!({
            "format": "image-generator.dit", "format_version": "1", "name": "blank",
            "config": config.to_string(),
            "sampler": r#"{"steps": 1, "guidance": 1.0, "shift": 1.0}"#,
            "classes": r#"["0", "1", "2"]"#,
        }),
    );
    let mut at = 0;
    for (name, shape) in architecture.tensors() {
        let end = at + 4 * shape.iter().product::<usize>();
        let entry =
            serde_json::json!({ "dtype": "F32", "shape": shape, "data_offsets": [at, end] });
        header.insert(name, entry);
        at = end;
    }
    let text = Value::from(header).to_string();
    let mut file = File::create(path).unwrap();
    file.write_all(&(text.len() as u64).to_le_bytes()).unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.set_len((8 + text.len() + at) as u64).unwrap();
}

#[tokio::test]
async fn models_of_a_folder_are_loaded_by_name_when_they_are_asked_for() {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("digits.safetensors"), mnist_bytes()).unwrap();
    std::fs::write(folder.path().join("colours.safetensors"), small_bytes()).unwrap();
    std::fs::create_dir(folder.path().join("sharded")).unwrap();
    shards(&folder.path().join("sharded"), 2);
    std::fs::write(folder.path().join("notes.txt"), "no model").unwrap();
    let app = App::start(&uri(folder.path()));
    let cold = named(&[("colours", "cold"), ("digits", "cold"), ("sharded", "cold")]);
    assert_eq!(states(&app).await, cold);
    let image = ask(&app, "digits").await.unwrap();
    assert_eq!(
        (image.model, image.model_version),
        ("digits".to_owned(), version(&mnist_bytes()))
    );
    assert_eq!(ask(&app, "sharded").await.unwrap().png, image.png);
    let image = ask(&app, "colours").await.unwrap();
    assert_eq!(image.model_version, version(&small_bytes()));
    assert!(states(&app).await.iter().all(|(_, state)| state == "ready"));

    // Without a name there is nothing to choose by, unless the configuration does.
    let refusal = refused(ask(&app, "").await);
    assert_eq!((refusal.status, &*refusal.kind), (400, "invalid-parameter"));
    assert!(
        refusal.detail.contains("colours, digits, sharded"),
        "{refusal:?}"
    );
    let app = App::start(&with(uri(folder.path()), &[("MODEL_DEFAULT", "digits")]));
    assert_eq!(ask(&app, "").await.unwrap().model, "digits");
    assert_eq!(ask(&app, "default").await.unwrap().model, "digits");
}

#[tokio::test]
async fn names_that_lead_out_of_the_folder_are_no_models() {
    let folder = TempDir::new().unwrap();
    let inside = folder.path().join("inside");
    std::fs::create_dir(&inside).unwrap();
    std::fs::write(folder.path().join("secret.safetensors"), small_bytes()).unwrap();
    std::fs::write(inside.join("one.safetensors"), small_bytes()).unwrap();
    let server = FolderServer::new(&inside).await;
    for env in [uri(&inside), vec![("MODEL_URI", server.url(""))]] {
        let app = App::start(&env);
        for name in [
            "nobody",
            "../secret",
            "..",
            "..%2fsecret",
            "/etc/passwd",
            "one.safetensors/../../secret",
            "http://127.0.0.1/x",
            "one\u{0}",
            "one?x=1",
            &"x".repeat(65),
        ] {
            let refusal = refused(ask(&app, name).await);
            assert_eq!(
                (refusal.status, &*refusal.kind),
                (404, "unknown-model"),
                "{name}"
            );
        }
        assert_eq!(ask(&app, "one").await.unwrap().model, "one");
    }
    let outside = |e: &crate::stores::wire::Exchange| {
        !e.path.starts_with("/one") && !e.path.starts_with("/nobody")
    };
    let strange: Vec<_> = server
        .wire
        .exchanges()
        .into_iter()
        .filter(outside)
        .collect();
    assert!(strange.is_empty(), "{strange:#?}");
}

/// By Azure, because moto's check of signatures fails for any listing of a folder, boto3's own included.
#[tokio::test]
async fn a_store_is_listed_with_credentials() {
    let Some(azure) = Azure::start() else {
        // Not `eprintln`, which nobody sees of a test that passes.
        let _ = writeln!(
            std::io::stderr(),
            "skipped, without azurite (see scripts/test-tools): a listing"
        );
        return;
    };
    azure.put("shelf/digits.safetensors", mnist_bytes()).await;
    azure
        .put("shelf/deep/model.safetensors", small_bytes())
        .await;
    azure.put("other/x.safetensors", small_bytes()).await;
    let proxy = Proxy::before(azure.address()).await;
    let app = App::start(&azure.env(&proxy, "shelf/"));
    let cold = named(&[("deep", "cold"), ("digits", "cold")]);
    assert_eq!(states(&app).await, cold, "{:#?}", app.log());
    assert_eq!(
        ask(&app, "deep").await.unwrap().model_version,
        version(&small_bytes())
    );
    assert_eq!(refused(ask(&app, "x").await).status, 404);
}

#[tokio::test]
async fn the_model_used_longest_ago_makes_room_and_memory_is_never_exceeded() {
    const MODEL_MB: usize = 60;
    const LIMIT_MB: u64 = 170;
    let folder = TempDir::new().unwrap();
    for name in ["a", "b", "c"] {
        blank(&folder.path().join(format!("{name}.safetensors")), MODEL_MB);
    }
    let env = with(uri(folder.path()), &[("MAX_MEMORY_MB", "170")]);
    let app = App::start(&env);
    let peak = app.peak_memory();
    for (name, left) in [
        ("a", ""),
        ("b", ""),
        ("a", ""),
        ("c", "b"),
        ("b", "a"),
        ("c", ""),
    ] {
        let before = unloaded(&app).len();
        ask(&app, name).await.unwrap();
        let gone = unloaded(&app)[before..].concat();
        assert_eq!(gone, left, "after {name}");
    }
    // All three at once, again and again: some wait for room, and all are drawn.
    let mut asked = tokio::task::JoinSet::new();
    for i in 0..24 {
        let client = app.client.clone();
        asked.spawn(async move {
            let query = DigitQuery {
                model: Some(["a", "b", "c"][i % 3].to_owned()),
                steps: Some(1),
                ..DigitQuery::default()
            };
            client.digit("1", &query).await.map(drop)
        });
    }
    for result in asked.join_all().await {
        result.unwrap();
    }
    let peak = peak.stop();
    assert!(
        (2 * MODEL_MB as u64..=LIMIT_MB).contains(&(peak >> 20)),
        "{} MB",
        peak >> 20
    );
}

/// The names of the models that left, in order.
fn unloaded(app: &App) -> Vec<String> {
    let left = |l: Value| {
        (l["message"] == "a model was unloaded to make room")
            .then(|| l["model"].as_str().unwrap().to_owned())
    };
    app.log().into_iter().filter_map(left).collect()
}

#[tokio::test]
async fn a_model_larger_than_all_memory_is_refused_without_unloading_another() {
    let folder = TempDir::new().unwrap();
    blank(&folder.path().join("small.safetensors"), 20);
    blank(&folder.path().join("large.safetensors"), 200);
    let app = App::start(&with(uri(folder.path()), &[("MAX_MEMORY_MB", "120")]));
    ask(&app, "small").await.unwrap();
    let refusal = refused(ask(&app, "large").await);
    assert_eq!((refusal.status, &*refusal.kind), (507, "model-too-large"));
    let expected = named(&[("large", "cold"), ("small", "ready")]);
    assert_eq!(states(&app).await, expected);
}

#[tokio::test]
async fn a_model_that_nobody_uses_leaves_memory_and_comes_back() {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("one.safetensors"), small_bytes()).unwrap();
    let app = App::start(&with(
        uri(folder.path()),
        &[("MODEL_IDLE_UNLOAD_SECS", "1")],
    ));
    let first = ask(&app, "").await.unwrap();
    app.logged(|l| l["message"] == "an idle model was unloaded")
        .await;
    assert_eq!(app.client.health("ready").await.unwrap().model, "cold");
    tokio::time::timeout(Duration::from_secs(30), async {
        assert_eq!(ask(&app, "").await.unwrap().png, first.png);
    })
    .await
    .unwrap();
}
