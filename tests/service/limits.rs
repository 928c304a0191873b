//! What one client may do to the others: keys, rates, addresses, silent and greedy connections, the drain.

use crate::app::{App, PATIENCE, binary};
use crate::stores::fault::{Fault, ObjectServer};
use crate::stores::{mnist_bytes, with};
use image_generator::client::{Auth, Client, ClientConfig, DigitQuery};
use reqwest::Response;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const NO_ENV: &[(&str, &str)] = &[];

async fn ask(app: &App, path: &str, headers: &[(&str, &str)]) -> Response {
    let mut request = reqwest::Client::new().get(app.url(path));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.send().await.unwrap()
}

#[tokio::test]
async fn a_client_has_a_rate_and_others_have_their_own() {
    let app = App::start(&[("RATE_LIMIT_PER_MINUTE", "3"), ("TRUSTED_PROXIES", "1")]);
    let from = |forwarded: &'static str| [("x-forwarded-for", forwarded)];
    for left in ["2", "1", "0"] {
        let answer = ask(&app, "/v1/digits/1", &from("1.1.1.1")).await;
        assert_eq!(answer.status(), 200);
        let limit = answer.headers()["ratelimit"].to_str().unwrap();
        assert!(
            limit.starts_with(&format!("\"minute\";r={left};t=")),
            "{limit}"
        );
        assert_eq!(answer.headers()["ratelimit-policy"], "\"minute\";q=3;w=60");
    }
    // Whatever the client writes there itself stands left of what the proxy appends.
    let refused = ask(&app, "/v1/digits/1", &from("9.9.9.9, 1.1.1.1")).await;
    assert_eq!(refused.status(), 429);
    let after: u64 = refused.headers()["retry-after"]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!((1..=20).contains(&after), "{after}");
    assert_eq!(
        ask(&app, "/v1/digits/1", &from("1.1.1.1, 2.2.2.2"))
            .await
            .status(),
        200
    );
    assert_eq!(
        ask(&app, "/health/live", &from("1.1.1.1")).await.status(),
        200
    );
    let metrics = ask(&app, "/metrics", &[]).await.text().await.unwrap();
    assert!(
        metrics.contains("image_generator_problems_total{problem=\"rate-limited\"} 1"),
        "{metrics}"
    );
}

#[tokio::test]
async fn without_a_trusted_proxy_the_header_counts_for_nothing() {
    let app = App::start(&[("RATE_LIMIT_PER_MINUTE", "1")]);
    assert_eq!(
        ask(&app, "/v1/models", &[("x-forwarded-for", "1.1.1.1")])
            .await
            .status(),
        200
    );
    assert_eq!(
        ask(&app, "/v1/models", &[("x-forwarded-for", "2.2.2.2")])
            .await
            .status(),
        429
    );
}

#[tokio::test]
async fn only_who_has_a_key_is_drawn_for_and_no_key_is_logged() {
    let app = App::start(&[
        ("API_KEYS", "first-secret, second-secret"),
        ("LOG_LEVEL", "debug"),
    ]);
    let refused = ask(&app, "/v1/digits/1", &[("x-api-key", "wrong-secret")]).await;
    assert_eq!(refused.status(), 401);
    assert!(
        refused.headers()["www-authenticate"]
            .to_str()
            .unwrap()
            .starts_with("Bearer")
    );
    for headers in [
        [("x-api-key", "first-secret")],
        [("authorization", "Bearer second-secret")],
    ] {
        let answer = ask(&app, "/v1/digits/1?seed=1", &headers).await;
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()["cache-control"], "private, max-age=300");
    }
    for open in ["/", "/health/ready", "/openapi.json"] {
        assert_eq!(ask(&app, open, &[]).await.status(), 200, "{open}");
    }
    assert_eq!(ask(&app, "/metrics", &[]).await.status(), 401);
    let config = ClientConfig {
        auth: Auth::Bearer("first-secret".to_owned()),
        ..ClientConfig::default()
    };
    let client = Client::new(&app.url(""), config).unwrap();
    client.digit("1", &DigitQuery::default()).await.unwrap();
    app.logged(|l| l["status"] == 401).await;
    assert!(!format!("{:?}", app.log()).contains("secret"));
}

#[tokio::test]
async fn pages_of_listed_origins_may_ask() {
    let app = App::start(&[("CORS_ORIGINS", "https://a.example")]);
    let preflight = |origin: &'static str| {
        reqwest::Client::new()
            .request(http::Method::OPTIONS, app.url("/v1/generate"))
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .send()
    };
    let allowed = preflight("https://a.example").await.unwrap();
    assert_eq!(allowed.status(), 204);
    assert_eq!(
        allowed.headers()["access-control-allow-origin"],
        "https://a.example"
    );
    assert_eq!(
        allowed.headers()["access-control-allow-methods"],
        "POST, OPTIONS"
    );
    let other = preflight("https://b.example").await.unwrap();
    assert!(!other.headers().contains_key("access-control-allow-origin"));
    let answer = ask(&app, "/v1/models", &[("origin", "https://a.example")]).await;
    assert_eq!(
        answer.headers()["access-control-allow-origin"],
        "https://a.example"
    );
    let vary = answer
        .headers()
        .get_all("vary")
        .iter()
        .any(|v| v == "origin");
    assert!(vary, "{:?}", answer.headers());
}

#[tokio::test]
async fn every_answer_has_what_browsers_and_operators_expect() {
    let app = App::start(NO_ENV);
    for path in [
        "/",
        "/page.js",
        "/v1/models",
        "/v1/digits/1",
        "/v1/digits/x",
        "/none",
        "/metrics",
        "/health/live",
    ] {
        let answer = ask(&app, path, &[]).await;
        let headers = answer.headers();
        for name in [
            "x-request-id",
            "server-timing",
            "content-security-policy",
            "referrer-policy",
        ] {
            assert!(headers.contains_key(name), "{path} lacks {name}");
        }
        assert_eq!(headers["x-content-type-options"], "nosniff", "{path}");
        assert_eq!(headers["x-frame-options"], "DENY", "{path}");
    }
    let client = reqwest::Client::new();
    for path in [
        "/",
        "/v1/models",
        "/v1/digits/1?seed=1",
        "/health/live",
        "/openapi.json",
    ] {
        let (head, get) = (
            client.head(app.url(path)).send(),
            client.get(app.url(path)).send(),
        );
        let (head, get) = (head.await.unwrap(), get.await.unwrap());
        assert_eq!(head.status(), get.status(), "{path}");
        for name in ["content-type", "etag", "cache-control"] {
            assert_eq!(
                head.headers().get(name),
                get.headers().get(name),
                "{path} {name}"
            );
        }
        assert!(head.bytes().await.unwrap().is_empty());
    }
    let options = client.request(http::Method::OPTIONS, app.url("/v1/digits/1"));
    assert_eq!(
        options.send().await.unwrap().headers()["allow"],
        "GET, HEAD, OPTIONS"
    );
}

#[tokio::test]
async fn only_so_many_requests_wait_for_a_cold_model() {
    let server = ObjectServer::new(mnist_bytes()).await;
    server.script(|_| Some(Fault::Late(Duration::from_millis(1500))));
    let app = App::start(&with(server.env(), &[("MAX_REQUESTS", "2")]));
    let one = || ask(&app, "/v1/digits/1?seed=1", &[]);
    let three = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        one().await
    };
    let (first, second, third) = tokio::join!(one(), one(), three);
    assert_eq!(
        (first.status(), second.status()),
        (http::StatusCode::OK, http::StatusCode::OK)
    );
    assert_eq!(third.status(), 503);
    assert!(third.headers().contains_key("retry-after"));
    assert_eq!(one().await.status(), 200);
}

/// Whether the peer has closed the connection, and after how long.
async fn closed(mut socket: TcpStream) -> Duration {
    let since = Instant::now();
    let mut rest = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, socket.read_to_end(&mut rest))
        .await
        .expect("the connection is closed");
    since.elapsed()
}

#[tokio::test]
async fn slow_heads_and_bodies_and_readers_end_and_cost_the_others_nothing() {
    let app = App::start(&[("HEADER_TIMEOUT_SECS", "1")]);
    app.client.digit("0", &DigitQuery::default()).await.unwrap();
    let drip = |text: &'static str| async {
        let mut socket = TcpStream::connect(app.address).await.unwrap();
        let since = Instant::now();
        for byte in text.bytes().cycle() {
            if socket.write_all(&[byte]).await.is_err() || since.elapsed() > PATIENCE {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        since.elapsed()
    };
    let heads = async { tokio::join!(drip("GET / HTTP/1.1\r\nx: "), drip("x"), drip("GET ")) };
    let body = async {
        let mut socket = TcpStream::connect(app.address).await.unwrap();
        let head = "POST /v1/generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{";
        socket.write_all(head.as_bytes()).await.unwrap();
        let mut answer = vec![0; 12];
        socket.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer, b"HTTP/1.1 408");
    };
    let reader = async {
        // Asks for a hundred megabytes and reads none of them.
        let mut socket = TcpStream::connect(app.address).await.unwrap();
        let ask = "GET /page.js HTTP/1.1\r\nhost: x\r\n\r\n";
        for _ in 0..10_000 {
            let sent =
                tokio::time::timeout(Duration::from_millis(500), socket.write_all(ask.as_bytes()));
            if !matches!(sent.await, Ok(Ok(()))) {
                break;
            }
        }
        let since = Instant::now();
        while socket.write_all(b"x").await.is_ok() {
            assert!(since.elapsed() < PATIENCE, "the connection stays");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let others = async {
        let mut longest = Duration::ZERO;
        for _ in 0..20 {
            let asked = Instant::now();
            app.client.health("live").await.unwrap();
            longest = longest.max(asked.elapsed());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        longest
    };
    let (heads, (), (), longest) = tokio::join!(heads, body, reader, others);
    println!("slow heads ended after {heads:?}; the others' slowest answer took {longest:?}");
    assert!(heads.0 < Duration::from_secs(5) && heads.1 < Duration::from_secs(5));
    assert!(longest < Duration::from_secs(1));
    // A connection that asked once and then falls silent ends too.
    let mut socket = TcpStream::connect(app.address).await.unwrap();
    socket
        .write_all(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    println!("an idle connection ended after {:?}", closed(socket).await);
}

#[tokio::test]
async fn silent_connections_keep_nobody_out() {
    let app = App::start(&[("MAX_CONNECTIONS", "50"), ("HEADER_TIMEOUT_SECS", "60")]);
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(TcpStream::connect(app.address).await.unwrap());
    }
    for _ in 0..3 {
        let asked = Instant::now();
        assert_eq!(ask(&app, "/v1/digits/1", &[]).await.status(), 200);
        println!(
            "among 300 silent connections on 50 places: {:?}",
            asked.elapsed()
        );
    }
    drop(silent);
}

#[tokio::test]
async fn a_half_sent_head_does_not_hold_up_the_end() {
    let mut app = App::start(&[("DRAIN_SECS", "60")]);
    app.client.digit("0", &DigitQuery::default()).await.unwrap();
    let mut half = TcpStream::connect(app.address).await.unwrap();
    half.write_all(b"GET /v1/dig").await.unwrap();
    let _silent = TcpStream::connect(app.address).await.unwrap();
    let mut kept = TcpStream::connect(app.address).await.unwrap();
    kept.write_all(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    // A stream under way is finished, and the silent ones wait for nobody.
    let body = r#"{"digits": "0123456789", "count": 3, "steps": 8}"#;
    let stream = reqwest::Client::new()
        .post(app.url("/v1/generate"))
        .header("accept", "application/x-ndjson")
        .header("content-type", "application/json")
        .body(body)
        .send()
        .await
        .unwrap();
    app.signal("TERM");
    let text = stream.text().await.unwrap();
    assert!(
        text.trim_end()
            .rsplit('\n')
            .next()
            .unwrap()
            .contains("\"done\"")
    );
    let told = Instant::now();
    assert!(app.ended().await.success());
    println!("ended {:?} after the last answer", told.elapsed());
    assert!(told.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn who_is_asked_for_nothing_leaves_by_itself() {
    let mut app = App::start(&[("IDLE_EXIT_SECS", "1")]);
    let started = Instant::now();
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        app.client.models().await.unwrap();
    }
    // Probes do not count.
    tokio::time::sleep(Duration::from_millis(600)).await;
    app.client.health("live").await.unwrap();
    assert!(app.ended().await.success());
    let took = started.elapsed();
    assert!(
        took > Duration::from_secs(3) && took < Duration::from_secs(6),
        "{took:?}"
    );
}

#[tokio::test]
async fn a_socket_of_systemd_is_served_and_outlives_the_process() {
    let tool = "systemd-socket-activate";
    if std::process::Command::new(tool)
        .arg("--version")
        .output()
        .is_err()
    {
        println!("skipped: there is no {tool}");
        return;
    }
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let service = binary();
    let mut activate = std::process::Command::new(tool);
    activate.arg("-l").arg(format!("127.0.0.1:{port}"));
    activate
        .args(["-E", "IDLE_EXIT_SECS=1"])
        .arg(service.get_program());
    activate.stdout(Stdio::null()).stderr(Stdio::null());
    let mut process = activate.spawn().unwrap();
    let url = format!("http://127.0.0.1:{port}");
    let client = Client::new(
        &url,
        ClientConfig {
            retries: 8,
            ..ClientConfig::default()
        },
    )
    .unwrap();
    let asked = Instant::now();
    client.digit("7", &DigitQuery::default()).await.unwrap();
    println!(
        "from the first connection to a digit: {:?}",
        asked.elapsed()
    );
    let since = Instant::now();
    let status = loop {
        if let Some(status) = process.try_wait().unwrap() {
            break status;
        }
        assert!(since.elapsed() < PATIENCE, "the process goes on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert!(status.success());
}

#[tokio::test]
async fn logs_have_no_colours_where_there_is_no_terminal() {
    let mut command = binary();
    command.env("APP_ENV", "development").stdout(Stdio::piped());
    let mut process = command.spawn().unwrap();
    let out = process.stdout.take().unwrap();
    let line = tokio::task::spawn_blocking(move || {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).map(|_| line)
    });
    let line = line.await.unwrap().unwrap();
    let _ = process.kill();
    let _ = process.wait();
    assert!(
        line.contains("listening") && !line.contains('\u{1b}'),
        "{line:?}"
    );
}
