//! HTTP: connections in, digits out. The one place that knows status codes.
//!
//! HTTP/1.1 and HTTP/2 without TLS on one port: TLS ends at the platform's front. Whatever a client does, it
//! gets an answer in bounded time and costs a bounded amount of memory.

mod params;
mod problem;
mod routes;
mod trace;

use crate::engine::Engine;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use routes::App;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

/// Bounds of the HTTP layer.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    pub digits_max: usize,
    pub steps_max: usize,
    pub body_bytes_max: usize,
    pub connections_max: usize,
    /// For a request's head, and again for its body.
    pub header_timeout: Duration,
    pub request_timeout: Duration,
    /// How long open requests may go on after the shutdown signal.
    pub drain: Duration,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            digits_max: 1000,
            steps_max: 64,
            body_bytes_max: 65_536,
            connections_max: 2048,
            header_timeout: Duration::from_secs(30),
            request_timeout: Duration::from_secs(300),
            drain: Duration::from_secs(8),
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
    let connections = Arc::new(Semaphore::new(config.connections_max));
    let app = Arc::new(App {
        engine,
        config,
        boot: started.elapsed(),
        open: AtomicUsize::new(0),
        draining: AtomicBool::new(false),
    });
    let graceful = GracefulShutdown::new();
    tokio::pin!(shutdown);
    loop {
        let accepted = async {
            let permit = connections.clone().acquire_owned().await;
            (listener.accept().await, permit)
        };
        let ((accepted, permit), stream) = tokio::select! {
            () = &mut shutdown => break,
            (accepted, permit) = accepted => match accepted {
                Ok((stream, _)) => (((), permit), stream),
                Err(error) => {
                    // Out of file descriptors, say: connections that end will free some.
                    tracing::warn!(error = %error, "a connection could not be accepted");
                    sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
        };
        let () = accepted;
        let (app, watcher) = (app.clone(), graceful.watcher());
        tokio::spawn(async move {
            let _permit = permit;
            connection(stream, app, watcher).await;
        });
    }
    drop(listener);
    app.draining.store(true, Ordering::Relaxed);
    let open = app.open.load(Ordering::Relaxed);
    tracing::info!(requests_open = open, "shutting down");
    if timeout(app.config.drain, graceful.shutdown()).await.is_ok() {
        return Drained { requests_left: 0 };
    }
    // Idle or silent connections do not count: nobody waits for an answer on them.
    Drained {
        requests_left: app.open.load(Ordering::Relaxed),
    }
}

async fn connection(
    stream: TcpStream,
    app: Arc<App>,
    watcher: hyper_util::server::graceful::Watcher,
) {
    // A connection that says nothing holds a place only for as long as a head may take.
    if !matches!(
        timeout(app.config.header_timeout, stream.readable()).await,
        Ok(Ok(()))
    ) {
        return;
    }
    let _ = stream.set_nodelay(true);
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(app.config.header_timeout);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(20))
        .max_concurrent_streams(256)
        .max_header_list_size(64 << 10);
    let service = hyper::service::service_fn(move |request| {
        let app = app.clone();
        async move { Ok::<_, std::convert::Infallible>(App::answer(app, request).await) }
    });
    let connection = watcher.watch(
        builder
            .serve_connection(TokioIo::new(stream), service)
            .into_owned(),
    );
    if let Err(error) = connection.await {
        tracing::debug!(error = %error, "a connection ended early");
    }
}
