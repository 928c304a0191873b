//! Weights from stores of every kind: what is drawn from them, and what crosses the wire for it.

use crate::app::{App, binary};
use crate::stores::azure::Azure;
use crate::stores::fault::{Fault, ObjectServer};
use crate::stores::gcs::Gcs;
use crate::stores::hub::{self, Hub, TOKEN};
use crate::stores::proxy::Proxy;
use crate::stores::s3::S3;
use crate::stores::{ask, draw, mnist_bytes, refusal, refused, small, small_bytes, with};
use base64::Engine as _;
use bytes::Bytes;
use std::io::Write as _;
use tokio::task::JoinSet;

/// The digit, drawn from the file itself.
async fn digit_of_the_file() -> Bytes {
    let app = App::start(&[("MODEL_PATH", small())]);
    draw(&app, &small_bytes()).await.png
}

#[tokio::test]
async fn the_first_digit_comes_from_a_signed_s3_store() {
    let s3 = S3::start();
    s3.put("first/model.safetensors", small_bytes()).await;
    let proxy = Proxy::before(s3.address()).await;
    let app = App::start(&s3.env(&proxy, "first/model.safetensors"));
    app.client.health("ready").await.unwrap();
    assert!(
        proxy.wire.exchanges().is_empty(),
        "nothing is fetched before it is needed"
    );
    assert_eq!(
        draw(&app, &small_bytes()).await.png,
        digit_of_the_file().await
    );
    let entry = &app.client.models().await.unwrap().models[0];
    assert_eq!(entry.source, "s3://models/first/model.safetensors");
    assert_eq!(entry.ready.as_ref().unwrap().origin, "store");
}

#[tokio::test]
async fn a_hundred_first_requests_share_one_fetch() {
    let s3 = S3::start();
    s3.put("shared/model.safetensors", mnist_bytes()).await;
    let proxy = Proxy::before(s3.address()).await;
    let env = s3.env(&proxy, "shared/model.safetensors");
    let app = App::start(&with(env, &[("RANGE_MB", "1")]));
    let mut requests = JoinSet::new();
    for _ in 0..100 {
        let client = app.client.clone();
        requests.spawn(async move {
            let query = image_generator::client::DigitQuery {
                seed: Some(5),
                steps: Some(1),
                ..Default::default()
            };
            client.digit("7", &query).await.unwrap().png
        });
    }
    let digits = requests.join_all().await;
    assert!(digits.iter().all(|d| *d == digits[0]));
    let times = proxy.wire.times_sent(mnist_bytes().len());
    assert!(
        times.iter().all(|&n| n == 1),
        "each byte crosses the wire once"
    );
    // Asked for beside the object, and not there: its digests.
    let beside = |e: &crate::stores::wire::Exchange| e.status == 404;
    let mut exchanges = proxy.wire.exchanges();
    assert_eq!(exchanges.iter().filter(|e| beside(e)).count(), 2);
    exchanges.retain(|e| !beside(e));
    assert_eq!(exchanges.len(), mnist_bytes().len().div_ceil(1 << 20));
    assert!(exchanges.iter().all(|e| e.method == "GET"));
    // All that follows the first is pinned to its version.
    assert!(
        exchanges[1..]
            .iter()
            .all(|e| e.header("if-match").is_some())
    );
    let loads = app
        .log()
        .iter()
        .filter(|l| l["message"] == "model ready")
        .count();
    assert_eq!(loads, 1);
}

#[tokio::test]
async fn a_wrong_s3_secret_is_a_problem_for_every_request_and_no_byte_is_sent() {
    let s3 = S3::start();
    s3.put("secret/model.safetensors", small_bytes()).await;
    let proxy = Proxy::before(s3.address()).await;
    let env = s3.env(&proxy, "secret/model.safetensors");
    let app = App::start(&with(env, &[("AWS_SECRET_ACCESS_KEY", "wrong")]));
    for _ in 0..2 {
        let refusal = refusal(&app).await;
        assert_eq!((refusal.status, &*refusal.kind), (502, "weights-denied"));
    }
    assert!(proxy.wire.exchanges().iter().all(|e| e.status == 403));
    assert_eq!(proxy.wire.body_bytes(), 0);
}

#[tokio::test]
async fn an_object_that_is_not_there_is_a_problem_until_it_is() {
    let s3 = S3::start();
    let proxy = Proxy::before(s3.address()).await;
    let app = App::start(&s3.env(&proxy, "late/model.safetensors"));
    let refusal = refusal(&app).await;
    assert_eq!((refusal.status, &*refusal.kind), (502, "weights-not-found"));
    s3.put("late/model.safetensors", small_bytes()).await;
    draw(&app, &small_bytes()).await;
}

#[tokio::test]
async fn a_digit_from_azure_is_the_same() {
    let Some(azure) = Azure::start() else {
        // Not `eprintln`, which nobody sees of a test that passes.
        let _ = writeln!(
            std::io::stderr(),
            "skipped, without azurite (see scripts/test-tools): Azure"
        );
        return;
    };
    azure.put("v1/model.safetensors", small_bytes()).await;
    let proxy = Proxy::before(azure.address()).await;
    let app = App::start(&azure.env(&proxy, "v1/model.safetensors"));
    assert_eq!(
        draw(&app, &small_bytes()).await.png,
        digit_of_the_file().await
    );
    let times = proxy.wire.times_sent(small_bytes().len());
    assert!(times.iter().all(|&n| n == 1));

    let wrong = base64::engine::general_purpose::STANDARD.encode("wrong");
    let env = azure.env(&proxy, "v1/model.safetensors");
    let app = App::start(&with(env, &[("AZURE_STORAGE_ACCOUNT_KEY", &wrong)]));
    let refusal = refusal(&app).await;
    assert_eq!((refusal.status, &*refusal.kind), (502, "weights-denied"));
}

#[tokio::test]
async fn a_digit_from_google_cloud_storage_is_the_same() {
    let gcs = Gcs::new("model.safetensors", small_bytes()).await;
    let app = App::start(&gcs.env("model.safetensors"));
    assert_eq!(
        draw(&app, &small_bytes()).await.png,
        digit_of_the_file().await
    );
    let exchanges = gcs.objects.wire.exchanges();
    assert!(
        exchanges
            .iter()
            .all(|e| e.header("authorization") == Some("Bearer good"))
    );
}

#[tokio::test]
async fn an_expired_google_token_is_a_problem_until_there_is_a_new_one() {
    let gcs = Gcs::new("model.safetensors", small_bytes()).await;
    gcs.issue("expired");
    let app = App::start(&gcs.env("model.safetensors"));
    let refusal = refusal(&app).await;
    assert_eq!((refusal.status, &*refusal.kind), (502, "weights-denied"));
    gcs.issue("good");
    draw(&app, &small_bytes()).await;
}

#[tokio::test]
async fn a_digit_by_http_is_the_same_with_signed_urls_passwords_and_without_ranges() {
    let expected = digit_of_the_file().await;
    let server = ObjectServer::new(small_bytes()).await;

    let url = format!(
        "{}?signature=a%2Fb&expires=9",
        server.url("a%20b/model.safetensors")
    );
    let app = App::start(&[("MODEL_URI", url)]);
    assert_eq!(draw(&app, &small_bytes()).await.png, expected);
    let asked = server.wire.take();
    assert_eq!(
        asked[0].path,
        "/a%20b/model.safetensors?signature=a%2Fb&expires=9"
    );
    let entry = &app.client.models().await.unwrap().models[0];
    assert!(!entry.source.contains("signature"), "{}", entry.source);

    let url = server
        .url("model.safetensors")
        .replace("://", "://me:pass%40word@");
    let app = App::start(&[("MODEL_URI", url)]);
    assert_eq!(draw(&app, &small_bytes()).await.png, expected);
    let basic = base64::engine::general_purpose::STANDARD.encode("me:pass@word");
    let asked = server.wire.take();
    assert_eq!(
        asked[0].header("authorization"),
        Some(&*format!("Basic {basic}"))
    );
    let shown = format!("{:?}", app.log());
    assert!(!shown.contains("word"), "{shown}");

    server.always(Fault::IgnoreRange);
    let app = App::start(&server.env());
    assert_eq!(draw(&app, &small_bytes()).await.png, expected);
}

#[tokio::test]
async fn a_hub_revision_is_pinned_to_its_commit_and_the_token_stays_at_the_hub() {
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let hub = Hub::new(commit, small_bytes(), None).await;
    let app = App::start(&hub.env("@main/model.safetensors"));
    assert_eq!(
        draw(&app, &small_bytes()).await.png,
        digit_of_the_file().await
    );
    let asked = hub.wire.exchanges();
    assert_eq!(
        asked[0].path,
        format!("/api/models/{}/revision/main", hub::REPO)
    );
    assert!(
        asked
            .iter()
            .all(|e| e.header("authorization") == Some(&*format!("Bearer {TOKEN}")))
    );
    let files = asked[1..].iter().map(|e| &e.path);
    let pinned = format!("/{}/resolve/{commit}/model.safetensors", hub::REPO);
    assert!(
        files.clone().count() > 0 && files.clone().all(|p| *p == pinned),
        "{asked:#?}"
    );

    let sent = hub.cdn.wire.exchanges();
    assert!(!sent.is_empty());
    for exchange in &sent {
        assert_eq!(exchange.header("authorization"), None);
        assert!(
            exchange.path.starts_with(&format!("/blobs/{commit}")),
            "{exchange:?}"
        );
    }
}

#[tokio::test]
async fn a_hub_repository_without_metadata_is_described_by_its_config() {
    let (bare, config) = crate::bad_weights::without_metadata(&small_bytes());
    let hub = Hub::new("00ff", bare.clone(), Some(config)).await;
    let app = App::start(&hub.env(""));
    assert_eq!(draw(&app, &bare).await.png, digit_of_the_file().await);
}

#[tokio::test]
async fn a_hub_that_does_not_know_the_token_or_the_revision_is_a_problem() {
    let hub = Hub::new("00ff", small_bytes(), None).await;
    let app = App::start(&with(hub.env(""), &[("HF_TOKEN", "hf_other")]));
    let denied = refusal(&app).await;
    assert_eq!((denied.status, &*denied.kind), (502, "weights-denied"));
    let app = App::start(&hub.env("@v9"));
    let unknown = refused(ask(&app).await);
    assert_eq!((unknown.status, &*unknown.kind), (502, "weights-not-found"));
    assert!(hub.cdn.wire.exchanges().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn inspect_fetches_the_header_and_not_the_weights() {
    let server = ObjectServer::new(mnist_bytes()).await;
    let output = binary()
        .args(["inspect", &server.url("model.safetensors")])
        .output()
        .unwrap();
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(
        output.status.success() && text.contains("28 x 28"),
        "{text}"
    );
    let sent = server.wire.body_bytes();
    assert!(sent < 1 << 20, "{sent} of {}", mnist_bytes().len());
}
