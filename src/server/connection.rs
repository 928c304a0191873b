//! Connections: how many there may be, who must leave for others, and how one ends.
//!
//! A connection without an open request holds a place that somebody else may need. When all places are taken, the one
//! that has been silent longest leaves, so that silent connections, however many, keep nobody out.

use super::routes::App;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::Watcher;
use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep, timeout};

/// In the drain, a connection on which nothing happens for so long is closed.
const QUIET: Duration = Duration::from_millis(100);

/// The places for connections.
pub(super) struct Connections {
    places: Arc<Semaphore>,
    all: Mutex<HashMap<u64, Arc<Connection>>>,
    next: AtomicU64,
    started: Instant,
}

/// What is known of one connection.
pub(super) struct Connection {
    open: AtomicUsize,
    /// When it was last heard of, in milliseconds since the server's start.
    active_ms: AtomicU64,
    /// Whether the peer does not take what is sent.
    stalled: AtomicBool,
    leave: Notify,
    started: Instant,
}

impl Connection {
    pub(super) fn begin(&self) {
        self.open.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn end(&self) {
        self.open.fetch_sub(1, Ordering::AcqRel);
        self.touch();
    }

    fn touch(&self) {
        let now = self.started.elapsed().as_millis() as u64;
        self.active_ms.store(now, Ordering::Relaxed);
    }

    fn is_quiet(&self) -> bool {
        self.open.load(Ordering::Acquire) == 0 && !self.stalled.load(Ordering::Relaxed)
    }

    /// Resolves when nobody waits for anything on it.
    async fn quiet(&self) {
        let mut since = Instant::now();
        while since.elapsed() < QUIET {
            sleep(QUIET / 4).await;
            if !self.is_quiet() {
                since = Instant::now();
            }
        }
    }
}

/// A connection's place, free again when it is dropped.
pub(super) struct Place {
    connections: Arc<Connections>,
    key: u64,
    pub(super) connection: Arc<Connection>,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.all().remove(&self.key);
    }
}

impl Connections {
    pub(super) fn new(most: usize) -> Self {
        Self {
            places: Arc::new(Semaphore::new(most)),
            all: Mutex::default(),
            next: AtomicU64::new(0),
            started: Instant::now(),
        }
    }

    /// A place, now or as soon as there is one.
    pub(super) async fn place(self: &Arc<Self>) -> Place {
        let permit = match self.places.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => {
                self.send_away();
                let permit = self.places.clone().acquire_owned().await;
                permit.expect("the semaphore is never closed")
            }
        };
        let connection = Arc::new(Connection {
            open: AtomicUsize::new(0),
            active_ms: AtomicU64::new(0),
            stalled: AtomicBool::new(false),
            leave: Notify::new(),
            started: self.started,
        });
        connection.touch();
        let key = self.next.fetch_add(1, Ordering::Relaxed);
        self.all().insert(key, connection.clone());
        Place {
            connections: self.clone(),
            key,
            connection,
            _permit: permit,
        }
    }

    /// Makes the connection leave on which nothing has happened for longest.
    pub(super) fn send_away(&self) {
        let mut all = self.all();
        let idle = all.iter().filter(|(_, c)| c.is_quiet());
        let longest = idle.min_by_key(|(_, c)| c.active_ms.load(Ordering::Relaxed));
        let Some(key) = longest.map(|(key, _)| *key) else {
            return;
        };
        if let Some(connection) = all.remove(&key) {
            connection.leave.notify_one();
        }
    }

    pub(super) fn count(&self) -> usize {
        self.all().len()
    }

    fn all(&self) -> MutexGuard<'_, HashMap<u64, Arc<Connection>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves one connection until it ends, is sent away, or falls quiet in the drain.
pub(super) async fn serve(
    stream: TcpStream,
    peer: IpAddr,
    app: Arc<App>,
    place: Place,
    watcher: Watcher,
) {
    let connection = place.connection.clone();
    let work = answer(stream, peer, app.clone(), connection.clone(), watcher);
    let quiet = async {
        let mut drain = app.drain.subscribe();
        // The sender is in `app`, so it is there.
        let _ = drain.wait_for(|begun| *begun).await;
        connection.quiet().await;
    };
    tokio::select! {
        () = work => {}
        () = connection.leave.notified() => {}
        () = quiet => {}
    }
}

async fn answer(
    stream: TcpStream,
    peer: IpAddr,
    app: Arc<App>,
    connection: Arc<Connection>,
    watcher: Watcher,
) {
    let head_timeout = app.config.header_timeout;
    // A connection that says nothing holds a place only for as long as a head may take.
    if !matches!(timeout(head_timeout, stream.readable()).await, Ok(Ok(()))) {
        return;
    }
    let _ = stream.set_nodelay(true);
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .max_buf_size(64 << 10)
        .header_read_timeout(head_timeout);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(20))
        .max_concurrent_streams(256)
        .max_send_buf_size(64 << 10)
        .max_header_list_size(64 << 10);
    let io = Watched {
        stream,
        connection: connection.clone(),
        stall: head_timeout,
        stalled: None,
    };
    let service = hyper::service::service_fn(move |request| {
        let (app, connection) = (app.clone(), connection.clone());
        async move {
            Ok::<_, std::convert::Infallible>(App::answer(app, connection, peer, request).await)
        }
    });
    let work = watcher.watch(
        builder
            .serve_connection(TokioIo::new(io), service)
            .into_owned(),
    );
    if let Err(error) = work.await {
        tracing::debug!(error = %error, "a connection ended early");
    }
}

/// A socket whose peer must take what is sent to it, in time.
struct Watched {
    stream: TcpStream,
    connection: Arc<Connection>,
    stall: Duration,
    /// Since when the peer has taken nothing.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Watched {
    fn watch<T>(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            if self.stalled.take().is_some() {
                self.connection.stalled.store(false, Ordering::Relaxed);
            }
            return written;
        }
        self.connection.stalled.store(true, Ordering::Relaxed);
        let stall = self.stall;
        let timer = self.stalled.get_or_insert_with(|| Box::pin(sleep(stall)));
        if timer.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Poll::Pending
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.watch(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, bytes);
        self.watch(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
