//! MODEL_CACHE_DIR: what a second start fetches, and what lies in the folder.

use crate::app::App;
use crate::stores::fault::{Fault, ObjectServer};
use crate::stores::hub::Hub;
use crate::stores::proxy::Proxy;
use crate::stores::s3::S3;
use crate::stores::{Env, draw, files, mnist_bytes, refusal, small_bytes, with};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

fn cached(env: Env, folder: &TempDir) -> Env {
    with(env, &[("MODEL_CACHE_DIR", folder.path().to_str().unwrap())])
}

/// The file of the cache that holds these bytes.
fn copy_of(weights: &[u8], folder: &Path) -> Option<PathBuf> {
    let holds = |path: &PathBuf| std::fs::read(path).unwrap() == weights;
    files(folder).into_iter().find(holds)
}

async fn origin(app: &App) -> String {
    let models = app.client.models().await.unwrap().models;
    models[0].ready.as_ref().unwrap().origin.clone()
}

#[tokio::test]
async fn the_second_start_asks_once_and_downloads_nothing() {
    let s3 = S3::start();
    s3.put("cached/model.safetensors", mnist_bytes()).await;
    let proxy = Proxy::before(s3.address()).await;
    let folder = TempDir::new().unwrap();
    let env = with(
        cached(s3.env(&proxy, "cached/model.safetensors"), &folder),
        &[("RANGE_MB", "1")],
    );
    let first = draw(&App::start(&env), &mnist_bytes()).await;
    assert!(copy_of(&mnist_bytes(), folder.path()).is_some());
    proxy.wire.take();

    let app = App::start(&env);
    assert_eq!(draw(&app, &mnist_bytes()).await.png, first.png);
    assert_eq!(origin(&app).await, "cache");
    let asked = proxy.wire.take();
    assert_eq!(asked.len(), 1, "{asked:#?}");
    assert!(asked[0].header("if-none-match").is_some());
    assert_eq!((asked[0].status, asked[0].sent.clone()), (304, 0..0));

    // Another object under the same name is fetched, and takes the place of the old one.
    s3.put("cached/model.safetensors", small_bytes()).await;
    let app = App::start(&env);
    draw(&app, &small_bytes()).await;
    assert_eq!(origin(&app).await, "store");
    assert_eq!(
        proxy.wire.times_sent(small_bytes().len()),
        vec![1; small_bytes().len()]
    );
    assert!(copy_of(&mnist_bytes(), folder.path()).is_none());
    proxy.wire.take();
    draw(&App::start(&env), &small_bytes()).await;
    assert_eq!(proxy.wire.body_bytes(), 0);
}

#[tokio::test]
async fn a_commit_of_the_hub_is_downloaded_once_and_the_next_one_anew() {
    let hub = Hub::new("00aa", small_bytes(), None).await;
    let folder = TempDir::new().unwrap();
    let env = cached(hub.env(""), &folder);
    draw(&App::start(&env), &small_bytes()).await;
    hub.cdn.wire.take();
    draw(&App::start(&env), &small_bytes()).await;
    assert_eq!(hub.cdn.wire.body_bytes(), 0);

    hub.move_branch("00bb");
    hub.cdn.replace(mnist_bytes());
    draw(&App::start(&env), &mnist_bytes()).await;
}

#[tokio::test]
async fn a_store_that_ignores_conditions_does_not_make_the_cache_useless() {
    let server = ObjectServer::new(mnist_bytes()).await;
    server.ignore_conditions();
    let folder = TempDir::new().unwrap();
    let env = with(cached(server.env(), &folder), &[("RANGE_MB", "1")]);
    draw(&App::start(&env), &mnist_bytes()).await;
    server.wire.take();
    let app = App::start(&env);
    draw(&app, &mnist_bytes()).await;
    assert_eq!(origin(&app).await, "cache");
    assert_eq!(server.wire.exchanges().len(), 1);
}

#[tokio::test]
async fn a_damaged_copy_is_put_aside_and_fetched_again() {
    let damages: [fn(&mut Vec<u8>); 3] = [
        |bytes| bytes[40_000] ^= 1,
        |bytes| bytes[0] ^= 1,
        |bytes| bytes.truncate(30_000),
    ];
    for damage in damages {
        let server = ObjectServer::new(small_bytes()).await;
        let folder = TempDir::new().unwrap();
        let env = cached(server.env(), &folder);
        draw(&App::start(&env), &small_bytes()).await;

        let copy = copy_of(&small_bytes(), folder.path()).unwrap();
        let mut bytes = small_bytes().to_vec();
        damage(&mut bytes);
        std::fs::write(&copy, &bytes).unwrap();
        let app = App::start(&env);
        draw(&app, &small_bytes()).await;
        assert_eq!(origin(&app).await, "store");
        assert!(
            copy_of(&small_bytes(), folder.path()).is_some(),
            "{:?}",
            files(folder.path())
        );

        server.wire.take();
        draw(&App::start(&env), &small_bytes()).await;
        assert_eq!(server.wire.body_bytes(), 0);
    }
}

#[tokio::test]
async fn a_damaged_copy_is_said_in_the_log_and_kept_for_a_look() {
    let server = ObjectServer::new(small_bytes()).await;
    let folder = TempDir::new().unwrap();
    let env = cached(server.env(), &folder);
    draw(&App::start(&env), &small_bytes()).await;
    let mut bytes = small_bytes().to_vec();
    bytes[50_000] ^= 1;
    std::fs::write(copy_of(&small_bytes(), folder.path()).unwrap(), &bytes).unwrap();
    let app = App::start(&env);
    draw(&app, &small_bytes()).await;
    app.logged(|l| l["severity"] == "WARNING" && l["message"].to_string().contains("damaged"))
        .await;
    assert!(copy_of(&bytes, folder.path()).is_some());
}

#[tokio::test]
async fn weights_with_another_digest_are_neither_served_nor_kept() {
    let server = ObjectServer::new(small_bytes()).await;
    let folder = TempDir::new().unwrap();
    let digest =
        image_generator::storage::hex(&<sha2::Sha256 as sha2::Digest>::digest(mnist_bytes()));
    let env = with(cached(server.env(), &folder), &[("MODEL_SHA256", &digest)]);
    let app = App::start(&env);
    let refusal = refusal(&app).await;
    assert_eq!((refusal.status, &*refusal.kind), (502, "weights-digest"));
    assert!(refusal.detail.contains(&digest), "{refusal:?}");
    assert_eq!(files(folder.path()), Vec::<PathBuf>::new());
    server.replace(mnist_bytes());
    draw(&app, &mnist_bytes()).await;
}

#[tokio::test]
async fn a_store_that_is_down_leaves_the_copy() {
    let server = ObjectServer::new(small_bytes()).await;
    let folder = TempDir::new().unwrap();
    let env = cached(server.env(), &folder);
    draw(&App::start(&env), &small_bytes()).await;
    drop(server);
    let app = App::start(&env);
    draw(&app, &small_bytes()).await;
    assert_eq!(origin(&app).await, "cache");
    app.logged(|l| l["severity"] == "WARNING" && l["message"].to_string().contains("cached copy"))
        .await;
}

#[tokio::test]
async fn a_store_that_says_no_does_not() {
    let server = ObjectServer::new(small_bytes()).await;
    let folder = TempDir::new().unwrap();
    let env = cached(server.env(), &folder);
    draw(&App::start(&env), &small_bytes()).await;
    for (status, kind) in [(403, "weights-denied"), (404, "weights-not-found")] {
        server.always(Fault::Status(status));
        let refusal = refusal(&App::start(&env)).await;
        assert_eq!((refusal.status, &*refusal.kind), (502, kind));
    }
}

#[tokio::test]
async fn a_cache_that_cannot_be_written_costs_no_digit() {
    let server = ObjectServer::new(small_bytes()).await;
    // A file stands where the folder would be: that stops root too.
    let file = tempfile::NamedTempFile::new().unwrap();
    let env = with(
        server.env(),
        &[("MODEL_CACHE_DIR", file.path().to_str().unwrap())],
    );
    let app = App::start(&env);
    draw(&app, &small_bytes()).await;
    app.logged(|l| l["message"] == "the model is not cached")
        .await;
}
