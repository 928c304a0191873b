//! HTTP: connections in, digits out. The one place that knows status codes.
//!
//! HTTP/1.1 and HTTP/2 without TLS on one port: TLS ends at the platform's front. Whatever a client does, it
//! gets an answer in bounded time and costs a bounded amount of memory.

mod accept;
mod body;
mod connection;
mod draw;
mod limits;
mod metrics;
mod openapi;
mod page;
mod params;
mod problem;
mod records;
mod request;
mod routes;
mod timing;
mod trace;

pub use limits::ApiKeys;

use crate::engine::Engine;
use connection::Connections;
use hyper_util::server::graceful::GracefulShutdown;
use routes::App;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};

/// Bounds of the HTTP layer.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    pub digits_max: usize,
    pub steps_max: usize,
    pub body_bytes_max: usize,
    pub connections_max: usize,
    /// Requests for digits that may be open at a time, those that wait for a cold model included.
    pub requests_max: usize,
    /// For a request's head, again for its body, and for a client to take the next bytes of its answer.
    pub header_timeout: Duration,
    pub request_timeout: Duration,
    /// How long open requests may go on after the shutdown signal.
    pub drain: Duration,
    /// How long there may be no request before the server ends by itself.
    pub idle_exit: Option<Duration>,
    /// Requests a minute that one client may make.
    pub rate_per_minute: Option<u32>,
    /// Proxies in front that append to X-Forwarded-For.
    pub trusted_proxies: usize,
    /// Without any, everyone may ask.
    pub api_keys: ApiKeys,
    /// Origins of the web pages that may ask, or `*`.
    pub cors_origins: Vec<String>,
    /// As the engine has it, for the metrics.
    pub memory_bytes_max: Option<u64>,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            digits_max: 1000,
            steps_max: 64,
            body_bytes_max: 65_536,
            connections_max: 2048,
            requests_max: 1024,
            header_timeout: Duration::from_secs(30),
            request_timeout: Duration::from_secs(300),
            drain: Duration::from_secs(8),
            idle_exit: None,
            rate_per_minute: None,
            trusted_proxies: 0,
            api_keys: ApiKeys::default(),
            cors_origins: Vec::new(),
            memory_bytes_max: None,
        }
    }
}

/// How a server ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Requests that were still open when the drain's time was over.
    pub requests_left: usize,
}

/// Serves until `shutdown` resolves, then stops accepting and lets open requests finish, for a while.
///
/// `started` is when the process began, for the answers' Server-Timing.
pub async fn serve(
    listener: TcpListener,
    engine: Engine,
    config: ServerConfig,
    started: Instant,
    shutdown: impl Future<Output = ()>,
) -> Drained {
    let connections = Arc::new(Connections::new(config.connections_max));
    let app = Arc::new(App::new(engine, config, connections.clone(), started));
    let graceful = GracefulShutdown::new();
    tokio::pin!(shutdown);
    let idle = app.activity.idle(app.config.idle_exit);
    tokio::pin!(idle);
    loop {
        let accepted = async {
            let (stream, peer) = listener.accept().await?;
            Ok::<_, std::io::Error>((stream, peer, connections.place().await))
        };
        tokio::select! {
            () = &mut shutdown => break,
            () = &mut idle => {
                tracing::info!("nobody has asked for anything for a while");
                break;
            }
            accepted = accepted => match accepted {
                Ok((stream, peer, place)) => {
                    let serve = connection::serve(stream, peer.ip(), app.clone(), place, graceful.watcher());
                    tokio::spawn(serve);
                }
                Err(error) => {
                    // Out of file descriptors, say: a connection that leaves frees one.
                    tracing::warn!(error = %error, "a connection could not be accepted");
                    connections.send_away();
                    sleep(Duration::from_millis(50)).await;
                }
            },
        }
    }
    drop(listener);
    app.begin_drain();
    let open = app.activity.open();
    tracing::info!(requests_open = open, "shutting down");
    if timeout(app.config.drain, graceful.shutdown()).await.is_ok() {
        return Drained { requests_left: 0 };
    }
    Drained {
        requests_left: app.activity.open(),
    }
}
