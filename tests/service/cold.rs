//! The cold path: digests and manifests, shards, what a kill leaves behind, what a full disk costs, who waits for what.

use crate::app::{App, PATIENCE, binary};
use crate::stores::fault::{Fault, Gate, ObjectServer};
use crate::stores::folder::FolderServer;
use crate::stores::{
    Env, ask, draw, files, mnist_bytes, refusal, shards, small_bytes, version, with,
};
use image_generator::storage::{Manifest, hex};
use sha2::{Digest as _, Sha256};
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;

/// Chunks of a megabyte, four at a time; silence counts as failure after a second.
const CHUNKS: &[(&str, &str)] = &[
    ("RANGE_MB", "1"),
    ("RANGE_CONCURRENCY", "4"),
    ("STALL_TIMEOUT_SECS", "1"),
];

fn manifest(bytes: &[u8]) -> Vec<u8> {
    serde_json::to_vec(&Manifest::of(bytes, 1 << 20).unwrap()).unwrap()
}

async fn verified(app: &App) -> String {
    let models = app.client.models().await.unwrap().models;
    models[0].ready.as_ref().unwrap().verified.clone()
}

#[tokio::test]
async fn digests_beside_the_weights_are_found_and_checked() {
    let sha256 = format!(
        "{}  model.safetensors\n",
        hex(&Sha256::digest(mnist_bytes()))
    );
    let pinned = manifest(&mnist_bytes());
    let pin = hex(&Sha256::digest(&pinned));
    for (beside, env, expected) in [
        (None, None, "length"),
        (Some((".sha256", sha256.into_bytes())), None, "sha256"),
        (Some((".chunks.json", pinned.clone())), None, "chunks"),
        (
            Some((".chunks.json", pinned)),
            Some(("MODEL_SHA256", &*pin)),
            "chunks",
        ),
    ] {
        let server = ObjectServer::new(mnist_bytes()).await;
        if let Some((ending, bytes)) = beside {
            server.put_beside(ending, bytes);
        }
        let env = with(with(server.env(), CHUNKS), env.as_slice());
        let app = App::start(&env);
        draw(&app, &mnist_bytes()).await;
        assert_eq!(verified(&app).await, expected);
        let unverified = |l: &serde_json::Value| l["message"].to_string().contains("no digest");
        assert_eq!(
            app.log().iter().any(unverified),
            expected == "length",
            "the log says it where nobody gave a digest"
        );
    }
}

#[tokio::test]
async fn digests_that_cannot_be_read_or_belong_to_other_bytes_are_errors_and_not_passed_over() {
    let server = ObjectServer::new(small_bytes()).await;
    for (ending, bytes, kind) in [
        (".sha256", b"not a digest".to_vec(), "weights-invalid"),
        (".sha256", vec![b'0'; 64], "weights-digest"),
        (".chunks.json", b"{}".to_vec(), "weights-invalid"),
        (
            ".chunks.json",
            manifest(&mnist_bytes()),
            "store-unavailable",
        ),
        (
            ".chunks.json",
            manifest(&vec![7; small_bytes().len()]),
            "weights-digest",
        ),
    ] {
        server.put_beside(".sha256", hex(&Sha256::digest(small_bytes())));
        server.put_beside(".chunks.json", manifest(&small_bytes()));
        if ending == ".sha256" {
            // A manifest would outweigh it.
            server.remove_beside(".chunks.json");
        }
        server.put_beside(ending, bytes);
        let app = App::start(&with(server.env(), CHUNKS));
        let refusal = refusal(&app).await;
        assert_eq!(refusal.kind, kind, "{ending}: {refusal:?}");
        server.remove_beside(".sha256");
        server.remove_beside(".chunks.json");
        draw(&app, &small_bytes()).await;
    }
}

#[tokio::test]
async fn a_byte_that_flips_on_the_way_is_fetched_again_where_a_manifest_tells() {
    let server = ObjectServer::new(mnist_bytes()).await;
    server.put_beside(".chunks.json", manifest(&mnist_bytes()));
    let mut flips = 1;
    server.script(move |request| {
        let hit = request.range.contains(&5_000_000) && flips > 0;
        hit.then(|| {
            flips -= 1;
            Fault::Flip { at: 5_000_000 }
        })
    });
    let app = App::start(&with(server.env(), CHUNKS));
    draw(&app, &mnist_bytes()).await;
    let sent = server.wire.body_bytes() - mnist_bytes().len() as u64;
    assert_eq!(sent, 1 << 20, "one chunk, and no more, was fetched again");

    // Not every time: a byte that is wrong at the store is an error.
    server.script(|request| {
        let hit = request.range.contains(&5_000_000);
        hit.then_some(Fault::Flip { at: 5_000_000 })
    });
    let app = App::start(&with(server.env(), CHUNKS));
    let refusal = refusal(&app).await;
    assert_eq!((refusal.status, &*refusal.kind), (502, "weights-digest"));
    server.heal();
    draw(&app, &mnist_bytes()).await;
}

#[tokio::test]
async fn credentials_that_expire_in_mid_load_are_asked_for_again() {
    let server = ObjectServer::new(mnist_bytes()).await;
    for status in [401, 403] {
        server.nth(4, Fault::Status(status));
        draw(&App::start(&with(server.env(), CHUNKS)), &mnist_bytes()).await;
    }
    // But not for ever.
    server.script(|request| (request.n > 3).then_some(Fault::Status(403)));
    let refusal = refusal(&App::start(&with(server.env(), CHUNKS))).await;
    assert_eq!((refusal.status, &*refusal.kind), (502, "weights-denied"));
}

#[tokio::test]
async fn a_killed_load_goes_on_where_it_was() {
    let folder = TempDir::new().unwrap();
    let cache = folder.path().to_str().unwrap();
    let server = ObjectServer::new(mnist_bytes()).await;
    let env = with(
        with(server.env(), CHUNKS),
        &[
            ("MODEL_CACHE_DIR", cache),
            ("RANGE_CONCURRENCY", "1"),
            ("MODEL_PRELOAD", "true"),
        ],
    );
    // Ten kills, each at another moment: when so many requests have come, the next is not answered.
    for kill in 0..10 {
        let gate = Gate::closed();
        let (stop, held) = (1 + kill % 5, gate.clone());
        server.script(move |request| (request.n > stop).then(|| Fault::Wait(held.clone())));
        let before = server.wire.exchanges().len();
        let app = App::start(&env);
        let until = async { server.wire.until(|e| e.len() > before + stop).await };
        // Once nearly all is in the cache there are fewer requests than that, and the load ends.
        let ready = app.logged(|l| l["message"] == "model ready");
        tokio::select! {
            () = until => {}
            _ = ready => {}
        }
        app.signal("KILL");
        gate.open();
    }
    server.heal();
    server.wire.take();
    let app = App::start(&env);
    draw(&app, &mnist_bytes()).await;
    let sent = server.wire.body_bytes();
    assert!(sent <= 2 << 20, "{sent} bytes were fetched after ten kills");
    // The last one left an entry, and nothing else.
    let left = files(folder.path());
    assert_eq!(left.len(), 2, "{left:?}");
    server.wire.take();
    draw(&App::start(&env), &mnist_bytes()).await;
    assert_eq!(server.wire.body_bytes(), 0);
}

#[tokio::test]
async fn what_a_killed_load_left_of_another_version_is_not_used() {
    let folder = TempDir::new().unwrap();
    let cache = folder.path().to_str().unwrap();
    let server = ObjectServer::new(mnist_bytes()).await;
    let env = with(with(server.env(), CHUNKS), &[("MODEL_CACHE_DIR", cache)]);
    let gate = Gate::closed();
    let held = gate.clone();
    server.script(move |request| (request.n > 5).then(|| Fault::Wait(held.clone())));
    {
        let app = App::start(&with(env.clone(), &[("MODEL_PRELOAD", "true")]));
        server.wire.until(|e| e.len() > 5).await;
        app.signal("KILL");
    }
    gate.open();
    server.heal();
    let mut other = mnist_bytes().to_vec();
    let last = other.len() - 1;
    other[last] ^= 1;
    server.replace(other.clone());
    draw(&App::start(&env), &other).await;
    assert_eq!(files(folder.path()).len(), 2, "{:?}", files(folder.path()));
}

#[tokio::test]
async fn a_damaged_chunk_of_an_interrupted_load_is_fetched_again() {
    let folder = TempDir::new().unwrap();
    let cache = folder.path().to_str().unwrap();
    let server = ObjectServer::new(mnist_bytes()).await;
    let env = with(with(server.env(), CHUNKS), &[("MODEL_CACHE_DIR", cache)]);
    let gate = Gate::closed();
    let held = gate.clone();
    server.script(move |request| {
        let last = request.range.contains(&(mnist_bytes().len() as u64 - 1));
        last.then(|| Fault::Wait(held.clone()))
    });
    let app = App::start(&with(env.clone(), &[("MODEL_PRELOAD", "true")]));
    let journal = || {
        let all = files(folder.path());
        all.into_iter()
            .find(|p| p.extension().is_some_and(|e| e == "journal"))
    };
    // Seven records after the first line: every chunk but the last one is there.
    let deadline = std::time::Instant::now() + PATIENCE;
    let whole = |path: &Path| {
        let bytes = std::fs::read(path).unwrap_or_default();
        let line = bytes
            .iter()
            .position(|&b| b == b'\n')
            .unwrap_or(bytes.len());
        (bytes.len() - line) / 44 >= 7
    };
    while !journal().is_some_and(|path| whole(&path)) {
        assert!(
            std::time::Instant::now() < deadline,
            "{:?}",
            files(folder.path())
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop(app);
    gate.open();
    server.heal();
    let part = journal().unwrap().with_extension("part");
    let mut bytes = std::fs::read(&part).unwrap();
    bytes[3_500_000] ^= 1;
    std::fs::write(&part, bytes).unwrap();
    server.wire.take();
    draw(&App::start(&env), &mnist_bytes()).await;
    let times = server.wire.times_sent(mnist_bytes().len());
    assert_eq!(times[3_500_000], 1, "the damaged chunk came again");
    assert_eq!(times[2_500_000], 0, "its neighbour did not");
}

#[tokio::test]
async fn a_full_disk_costs_no_digit_and_leaves_nothing() {
    let folder = TempDir::new().unwrap();
    let server = ObjectServer::new(mnist_bytes()).await;
    let env = with(
        with(server.env(), CHUNKS),
        &[
            ("MODEL_CACHE_DIR", folder.path().to_str().unwrap()),
            ("MODEL_CACHE_IN_MEMORY", "true"),
        ],
    );
    // A file system of 4 MB that only the service sees.
    let mount = format!(
        "mount -t tmpfs -o size=4m tmpfs '{}' && exec \"$0\"",
        folder.path().display()
    );
    let possible = std::process::Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", &mount, "true"])
        .status();
    if !possible.is_ok_and(|status| status.success()) {
        eprintln!(
            "skipped: no file system can be mounted here (unshare, or user namespaces, are missing)"
        );
        return;
    }
    let app = App::start_by(
        &["unshare", "--map-root-user", "--mount", "sh", "-c", &mount],
        &env,
    );
    draw(&app, &mnist_bytes()).await;
    let line = app
        .logged(|l| l["message"] == "the model is not cached")
        .await;
    assert!(
        line["error"].to_string().contains("No space left"),
        "{line}"
    );
    let inside = format!("/proc/{}/root{}", app.id(), folder.path().display());
    assert_eq!(files(Path::new(&inside)), Vec::<std::path::PathBuf>::new());
}

#[tokio::test]
async fn a_folder_in_memory_is_no_cache_unless_asked_for() {
    if !Path::new("/dev/shm").is_dir() {
        eprintln!("skipped: there is no file system in memory at /dev/shm");
        return;
    }
    let folder = TempDir::new_in("/dev/shm").unwrap();
    let server = ObjectServer::new(small_bytes()).await;
    let env = with(
        server.env(),
        &[("MODEL_CACHE_DIR", folder.path().to_str().unwrap())],
    );
    let app = App::start(&env);
    draw(&app, &small_bytes()).await;
    app.logged(|l| l["severity"] == "WARNING" && l["message"].to_string().contains("in memory"))
        .await;
    assert!(files(folder.path()).is_empty());
    let env = with(env, &[("MODEL_CACHE_IN_MEMORY", "true")]);
    draw(&App::start(&env), &small_bytes()).await;
    assert_eq!(files(folder.path()).len(), 2);
}

#[tokio::test]
async fn several_processes_may_share_a_cache() {
    let folder = TempDir::new().unwrap();
    let cache = folder.path().to_str().unwrap();
    let server = ObjectServer::new(mnist_bytes()).await;
    let env = with(with(server.env(), CHUNKS), &[("MODEL_CACHE_DIR", cache)]);
    let apps: Vec<App> = (0..4).map(|_| App::start(&env)).collect();
    let bytes = mnist_bytes();
    let digits = apps.iter().map(|app| draw(app, &bytes));
    futures_util::future::join_all(digits).await;
    assert_eq!(files(folder.path()).len(), 2, "{:?}", files(folder.path()));
    server.wire.take();
    draw(&App::start(&env), &mnist_bytes()).await;
    assert_eq!(server.wire.body_bytes(), 0);
}

#[tokio::test]
async fn a_preload_opens_the_port_at_once_and_needs_nobody_to_wait() {
    let server = ObjectServer::new(mnist_bytes()).await;
    let gate = Gate::closed();
    server.always(Fault::Wait(gate.clone()));
    let app = App::start(&with(
        with(server.env(), CHUNKS),
        &[("MODEL_PRELOAD", "true")],
    ));
    server.wire.until(|e| !e.is_empty()).await;
    assert_eq!(app.client.health("ready").await.unwrap().model, "loading");
    // Whoever asks meanwhile may leave: the load goes on.
    let impatient = tokio::time::timeout(Duration::from_millis(100), ask(&app)).await;
    assert!(impatient.is_err());
    server.heal();
    gate.open();
    app.logged(|l| l["message"] == "model ready").await;
    assert_eq!(
        server.wire.times_sent(mnist_bytes().len()),
        vec![1; mnist_bytes().len()]
    );
}

#[tokio::test]
async fn progress_can_be_seen_while_weights_arrive() {
    let server = ObjectServer::new(mnist_bytes()).await;
    let gate = Gate::closed();
    let held = gate.clone();
    server.script(move |request| (request.n > 3).then(|| Fault::Wait(held.clone())));
    let app = App::start(&with(
        with(server.env(), CHUNKS),
        &[("MODEL_PRELOAD", "true")],
    ));
    server.wire.until(|e| e.len() > 3).await;
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let model = app.client.models().await.unwrap().models.remove(0);
        assert_eq!(model.state, "loading");
        let total = mnist_bytes().len() as u64;
        if model.bytes_total == total && model.bytes_arrived > 1 << 20 {
            assert!(model.bytes_arrived < total && model.seconds_left.is_some());
            break;
        }
        assert!(std::time::Instant::now() < deadline, "{model:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    gate.open();
    app.logged(|l| l["message"] == "model ready").await;
}

#[tokio::test]
async fn a_sharded_model_draws_what_the_whole_one_draws() {
    let whole = {
        let server = ObjectServer::new(mnist_bytes()).await;
        draw(&App::start(&server.env()), &mnist_bytes()).await.png
    };
    let folder = TempDir::new().unwrap();
    shards(folder.path(), 3);
    let by_path: Env = vec![("MODEL_PATH", folder.path().to_str().unwrap().to_owned())];
    assert_eq!(ask(&App::start(&by_path)).await.unwrap().png, whole);

    let server = FolderServer::new(folder.path()).await;
    let cache = TempDir::new().unwrap();
    let env = with(
        vec![("MODEL_URI", server.url("model.safetensors.index.json"))],
        &[
            ("MODEL_CACHE_DIR", cache.path().to_str().unwrap()),
            ("RANGE_MB", "1"),
        ],
    );
    assert_eq!(ask(&App::start(&env)).await.unwrap().png, whole);
    // Every shard and its entry.
    assert_eq!(files(cache.path()).len(), 6);
    let app = App::start(&env);
    assert_eq!(ask(&app).await.unwrap().png, whole);
    let models = app.client.models().await.unwrap().models;
    assert_eq!(models[0].ready.as_ref().unwrap().origin, "cache");

    // A shard that is missing, and an index that leads elsewhere.
    std::fs::remove_file(folder.path().join("model-00002.safetensors")).unwrap();
    let env = vec![("MODEL_URI", server.url("model.safetensors.index.json"))];
    let refused = refusal(&App::start(&env)).await;
    assert_eq!((refused.status, &*refused.kind), (502, "weights-not-found"));
    let index = folder.path().join("model.safetensors.index.json");
    std::fs::write(&index, r#"{"weight_map": {"a": "../../etc/passwd"}}"#).unwrap();
    let refused = refusal(&App::start(&env)).await;
    assert_eq!((refused.status, &*refused.kind), (502, "weights-invalid"));
}

#[tokio::test]
async fn weights_are_fetched_and_packed_ahead_of_time() {
    let server = ObjectServer::new(mnist_bytes()).await;
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("models/digits.safetensors");
    let args = ["fetch", "-o", file.to_str().unwrap()].map(str::to_owned);
    let env = with(server.env(), CHUNKS);
    let output = command(args.to_vec(), env.clone()).await;
    assert!(output.0, "{}", output.1);
    assert!(output.1.contains("not verified"), "{}", output.1);
    assert_eq!(std::fs::read(&file).unwrap(), mnist_bytes());
    let packed = command(vec!["pack".into(), file.to_str().unwrap().into()], vec![]).await;
    assert!(
        packed.0 && packed.1.contains("MODEL_SHA256="),
        "{}",
        packed.1
    );
    // The file with its digests is a model that is verified chunk by chunk.
    let path: Env = vec![("MODEL_PATH", file.to_str().unwrap().to_owned())];
    let app = App::start(&path);
    ask(&app).await.unwrap();
    assert_eq!(verified(&app).await, "chunks");

    // Into a folder that is not there yet.
    let models = format!("{}/", folder.path().join("layer").display());
    let args = ["fetch", "-o", &models].map(str::to_owned);
    assert!(command(args.to_vec(), env.clone()).await.0);
    let path: Env = vec![("MODEL_PATH", models)];
    let app = App::start(&path);
    ask(&app).await.unwrap();
    assert_eq!(verified(&app).await, "sha256");

    // Into the cache: the next start downloads nothing.
    let cache = folder.path().join("cache");
    let env = with(env, &[("MODEL_CACHE_DIR", cache.to_str().unwrap())]);
    assert!(command(vec!["fetch".into()], env.clone()).await.0);
    server.wire.take();
    let app = App::start(&env);
    assert_eq!(
        ask(&app).await.unwrap().model_version,
        version(&mnist_bytes())
    );
    assert_eq!(server.wire.body_bytes(), 0);

    let nowhere = command(vec!["fetch".into()], server.env()).await;
    assert!(
        !nowhere.0 && nowhere.1.contains("MODEL_CACHE_DIR"),
        "{}",
        nowhere.1
    );
}

/// Runs the binary: whether it succeeded, and what it said.
async fn command(args: Vec<String>, env: Env) -> (bool, String) {
    let run = move || {
        let mut command = binary();
        command.args(args).envs(env);
        command.output().unwrap()
    };
    let output = tokio::task::spawn_blocking(run).await.unwrap();
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}
