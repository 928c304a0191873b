//! Stores that fail while weights are loaded: what can be mended by trying again is, the rest is said.

use crate::app::App;
use crate::stores::fault::{Fault, Gate, ObjectServer};
use crate::stores::{ask, draw, mnist_bytes, refusal, refused, small_bytes, with};
use futures_util::future::join_all;
use sha2::{Digest as _, Sha256};
use std::time::Duration;
use tokio::net::TcpListener;

/// Ranges of a megabyte, eight of them, two at a time; silence counts as failure after a second.
const RANGES: &[(&str, &str)] = &[
    ("RANGE_MB", "1"),
    ("RANGE_CONCURRENCY", "2"),
    ("STALL_TIMEOUT_SECS", "1"),
];

#[tokio::test]
async fn one_fault_in_mid_load_costs_no_digit() {
    let faults = [
        Fault::Status(500),
        Fault::Busy {
            status: 503,
            retry_after_secs: 1,
        },
        Fault::Busy {
            status: 429,
            retry_after_secs: 1,
        },
        Fault::Hangup,
        Fault::Silence,
        Fault::Reset { after: 300_000 },
        Fault::Stall { after: 300_000 },
        Fault::Short { missing: 10_000 },
        Fault::Late(Duration::from_millis(200)),
    ];
    let nth = [1, 3]
        .into_iter()
        .flat_map(|n| faults.iter().map(move |f| (n, f.clone())));
    let one = |(n, fault): (usize, Fault)| async move {
        let server = ObjectServer::new(mnist_bytes()).await;
        server.nth(n, fault.clone());
        let app = App::start(&with(server.env(), RANGES));
        let result = ask(&app).await;
        let image = result.unwrap_or_else(|e| panic!("{fault:?} of request {n}: {e:?}"));
        assert_eq!(image.model_version, crate::stores::version(&mnist_bytes()));
        // What had arrived before the fault is not fetched again, but for what lay in buffers.
        let sent = server.wire.body_bytes();
        assert!(
            sent < mnist_bytes().len() as u64 + (1 << 20),
            "{fault:?}: {sent}"
        );
    };
    // A few at a time: what they wait for are clocks.
    for some in nth.collect::<Vec<_>>().chunks(6) {
        join_all(some.iter().cloned().map(one)).await;
    }
}

#[tokio::test]
async fn an_answer_that_contradicts_its_request_is_never_believed() {
    for fault in [
        Fault::Less { missing: 1000 },
        Fault::ContentRange("bytes 5-1048580/7740000".to_owned()),
        Fault::ContentRange("bytes 0-1048575/*".to_owned()),
        Fault::ContentRange("pages 1-2/3".to_owned()),
    ] {
        let server = ObjectServer::new(mnist_bytes()).await;
        server.nth(3, fault.clone());
        let app = App::start(&with(server.env(), RANGES));
        match ask(&app).await {
            Ok(image) => assert_eq!(image.model_version, crate::stores::version(&mnist_bytes())),
            refusal => {
                let refusal = refused(refusal);
                assert!(matches!(refusal.status, 502 | 503));
            }
        }
        server.heal();
        draw(&app, &mnist_bytes()).await;
    }
}

#[tokio::test]
async fn an_object_that_is_replaced_in_mid_load_is_loaded_anew_and_never_mixed() {
    // The same length and header: only its version tells the new object from the old one.
    let mut other = mnist_bytes().to_vec();
    let last = other.len() - 1;
    other[last] ^= 1;
    for (n, other, heeds_conditions) in [
        (3, other.clone(), true),
        (3, other, false),
        (2, small_bytes().to_vec(), true),
        (2, small_bytes().to_vec(), false),
    ] {
        let server = ObjectServer::new(mnist_bytes()).await;
        if !heeds_conditions {
            server.ignore_conditions();
        }
        server.nth(n, Fault::Replace(other.clone().into()));
        let app = App::start(&with(server.env(), RANGES));
        draw(&app, &other).await;
    }
}

#[tokio::test]
async fn a_flipped_byte_is_found_by_the_digest_and_the_next_request_tries_again() {
    let server = ObjectServer::new(mnist_bytes()).await;
    server.script(|request| {
        request
            .range
            .contains(&5_000_000)
            .then_some(Fault::Flip { at: 5_000_000 })
    });
    let digest = image_generator::storage::hex(&Sha256::digest(mnist_bytes()));
    let app = App::start(&with(
        with(server.env(), RANGES),
        &[("MODEL_SHA256", &digest)],
    ));
    let refusal = refusal(&app).await;
    assert_eq!((refusal.status, &*refusal.kind), (502, "weights-digest"));
    server.heal();
    draw(&app, &mnist_bytes()).await;
}

#[tokio::test]
async fn a_load_that_fails_tells_everyone_who_waits_and_the_next_request_tries_again() {
    let server = ObjectServer::new(small_bytes()).await;
    server.always(Fault::Hangup);
    let app = App::start(&server.env());
    let waiting = join_all((0..20).map(|_| ask(&app))).await;
    for result in waiting {
        let refusal = refused(result);
        assert_eq!((refusal.status, &*refusal.kind), (503, "store-unavailable"));
        assert!(
            refusal
                .retry_after
                .is_some_and(|r| r >= Duration::from_secs(1))
        );
        assert!(
            !refusal.detail.contains("127.0.0.1"),
            "addresses stay in the log"
        );
    }
    let failed = |l: &serde_json::Value| l["message"] == "the model could not be loaded";
    app.logged(failed).await;
    let failures = app.log().iter().filter(|l| failed(l)).count();
    assert_eq!(failures, 1, "one load failed for all of them");
    assert!(app.client.models().await.unwrap().models[0].error.is_some());
    server.heal();
    draw(&app, &small_bytes()).await;
    assert!(app.client.models().await.unwrap().models[0].error.is_none());
}

#[tokio::test]
async fn a_store_that_refuses_connections_is_a_503_with_retry_after() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let app = App::start(&[("MODEL_URI", format!("http://{address}/model.safetensors"))]);
    let refusal = refusal(&app).await;
    assert_eq!((refusal.status, &*refusal.kind), (503, "store-unavailable"));
    assert!(refusal.retry_after.is_some());
}

#[tokio::test]
async fn a_store_that_says_no_is_not_asked_twice() {
    for (status, kind) in [
        (401, "weights-denied"),
        (403, "weights-denied"),
        (404, "weights-not-found"),
        (410, "weights-not-found"),
    ] {
        let server = ObjectServer::new(small_bytes()).await;
        server.always(Fault::Status(status));
        let app = App::start(&server.env());
        let refusal = refusal(&app).await;
        assert_eq!((refusal.status, &*refusal.kind), (502, kind));
        assert_eq!(server.wire.exchanges().len(), 1, "{status}");
    }
}

#[tokio::test]
async fn a_load_ends_at_its_time_out() {
    let server = ObjectServer::new(small_bytes()).await;
    server.always(Fault::Stall { after: 10_000 });
    let app = App::start(&with(server.env(), &[("LOAD_TIMEOUT_SECS", "1")]));
    let refusal = refusal(&app).await;
    assert_eq!((refusal.status, &*refusal.kind), (503, "load-timeout"));
    assert!(refusal.retry_after.is_some());
    server.heal();
    draw(&app, &small_bytes()).await;
}

#[tokio::test]
async fn a_load_goes_on_while_anyone_waits_and_ends_when_nobody_does() {
    let server = ObjectServer::new(small_bytes()).await;
    let gate = Gate::closed();
    server.nth(1, Fault::Wait(gate.clone()));
    let app = App::start(&server.env());
    let url = app.url("/v1/digits/1?seed=1");
    let spawn = || {
        let request = reqwest::get(url.clone());
        tokio::spawn(async move { request.await.unwrap().error_for_status().unwrap() })
    };
    // Which of the two is the first does not matter: one leaves, one stays.
    let (leaves, stays) = (spawn(), spawn());
    server.wire.until(|e| e.len() == 1).await;
    leaves.abort();
    let _ = leaves.await;
    gate.open();
    stays.await.unwrap();
    assert_eq!(
        server.wire.times_sent(small_bytes().len()),
        vec![1; small_bytes().len()]
    );

    let server = ObjectServer::new(small_bytes()).await;
    server.always(Fault::Wait(Gate::closed()));
    let app = App::start(&server.env());
    let alone = tokio::spawn(reqwest::get(app.url("/v1/digits/1")));
    server.wire.until(|e| e.len() == 1).await;
    alone.abort();
    app.logged(|l| l["message"].to_string().contains("nobody waits"))
        .await;
    assert_eq!(app.client.health("ready").await.unwrap().model, "cold");
    server.heal();
    draw(&app, &small_bytes()).await;
}
