//! From a request to its answer.

use super::ServerConfig;
use super::body::Body;
use super::connection::{Connection, Connections};
use super::draw::Asked;
use super::limits::{self, Allowance, CorsRequest, RateLimit};
use super::metrics::{self, Metrics};
use super::page;
use super::params;
use super::problem::Failure;
use super::request::{About, Activity, OpenRequest};
use super::timing::Timing;
use super::trace;
use crate::api::{Health, ModelEntry, Models, ReadyModel, headers};
use crate::engine::{Engine, Memory, ModelState, ModelStatus};
use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::{Body as _, Incoming};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;
use tracing::Instrument as _;

/// Of the memory limit: from the first on a warning is due, below the second the next one may be.
const MEMORY_WARN_PERCENT: u64 = 90;
const MEMORY_CALM_PERCENT: u64 = 85;

/// What every request needs.
pub(super) struct App {
    pub(super) engine: Engine,
    pub(super) config: ServerConfig,
    pub(super) started: Instant,
    /// From the process's start to the open port.
    pub(super) boot: Duration,
    pub(super) connections: Arc<Connections>,
    pub(super) activity: Activity,
    pub(super) metrics: Metrics,
    /// Requests for digits that may be open at a time.
    pub(super) requests: Arc<Semaphore>,
    /// Whether the drain has begun.
    pub(super) drain: watch::Sender<bool>,
    /// Whether a load is kept going for clients that were told to come back.
    pub(super) lingering: AtomicBool,
    rate: Option<RateLimit>,
    memory: OnceLock<Option<Memory>>,
    memory_checked_ms: AtomicU64,
    memory_near: AtomicBool,
}

/// What there is at a path.
enum Route {
    Digit(String),
    Generate,
    Models,
    Health(Probe),
    Metrics,
    OpenApi,
    Page(page::File),
    None,
}

#[derive(Clone, Copy)]
enum Probe {
    Live,
    Ready,
}

impl Route {
    fn of(path: &str) -> Self {
        let label = path.strip_prefix("/v1/digits/");
        if let Some(label) = label.filter(|l| !l.contains('/')) {
            return Self::Digit(percent_decoded(label));
        }
        match path {
            "/v1/generate" => Self::Generate,
            "/v1/models" => Self::Models,
            "/health/live" | "/health/startup" | "/health" => Self::Health(Probe::Live),
            "/health/ready" => Self::Health(Probe::Ready),
            "/metrics" => Self::Metrics,
            "/openapi.json" => Self::OpenApi,
            _ => page::file(path).map_or(Self::None, Self::Page),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Digit(_) => "digit",
            Self::Generate => "generate",
            Self::Models => "models",
            Self::Health(_) => "health",
            Self::Metrics => "metrics",
            Self::OpenApi => "openapi",
            Self::Page(_) => "page",
            Self::None => "none",
        }
    }

    fn allow(&self) -> &'static str {
        match self {
            Self::Generate => "POST, OPTIONS",
            _ => "GET, HEAD, OPTIONS",
        }
    }

    /// Whether it is for those only who have a key.
    fn is_guarded(&self) -> bool {
        matches!(
            self,
            Self::Digit(_) | Self::Generate | Self::Models | Self::Metrics
        )
    }

    /// Whether asking often costs the service anything.
    fn is_limited(&self) -> bool {
        matches!(self, Self::Digit(_) | Self::Generate | Self::Models)
    }
}

impl App {
    pub(super) fn new(
        engine: Engine,
        config: ServerConfig,
        connections: Arc<Connections>,
        started: Instant,
    ) -> Self {
        Self {
            engine,
            started,
            boot: started.elapsed(),
            connections,
            activity: Activity::new(Instant::now()),
            metrics: Metrics::default(),
            requests: Arc::new(Semaphore::new(config.requests_max)),
            drain: watch::Sender::new(false),
            lingering: AtomicBool::new(false),
            rate: config.rate_per_minute.map(RateLimit::new),
            memory: OnceLock::new(),
            memory_checked_ms: AtomicU64::new(0),
            memory_near: AtomicBool::new(false),
            config,
        }
    }

    pub(super) fn begin_drain(&self) {
        self.drain.send_replace(true);
    }

    /// Answers every request, whatever happens.
    pub(super) async fn answer(
        app: Arc<Self>,
        connection: Arc<Connection>,
        peer: IpAddr,
        request: Request<Incoming>,
    ) -> Response<Body> {
        let id = trace::request_id(request.headers());
        let span = tracing::info_span!("request", request_id = id, trace = tracing::field::Empty);
        if let Some(trace) = trace::trace_id(request.headers()) {
            span.record("trace", trace);
        }
        let route = Route::of(request.uri().path());
        let client = limits::client(peer, app.config.trusted_proxies, request.headers());
        let about = About {
            span: span.clone(),
            method: method_name(request.method()),
            path: request.uri().path().to_owned(),
            route: route.name(),
            client,
        };
        let cors = CorsRequest::of(request.method(), request.headers());
        let allow = route.allow();
        let mut open = OpenRequest::new(&app, &connection, about);
        let allowance = match &app.rate {
            Some(rate) if route.is_limited() && request.method() != Method::OPTIONS => {
                Some(rate.take(client, Instant::now()))
            }
            _ => None,
        };
        let work = app.route(route, request, &id, allowance, open.started());
        let work =
            std::panic::AssertUnwindSafe(timeout(app.config.request_timeout, work)).catch_unwind();
        let result = match work.instrument(span).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(Failure::request_timeout(app.config.request_timeout)),
            Err(_) => Err(Failure::panicked()),
        };
        let mut response = result.unwrap_or_else(|failure| {
            app.metrics.failed(failure.kind());
            failure.into_response(&id)
        });
        let headers = response.headers_mut();
        finish(headers, &id);
        if let Some(allowance) = allowance {
            allowance.describe(headers);
        }
        limits::cors(&app.config, &cors, Some(allow), headers);
        if !headers.contains_key("server-timing") {
            let mut timing = Timing::new(app.boot);
            timing.set("total", open.started().elapsed());
            headers.insert("server-timing", timing.header());
        }
        open.answered(response.status().as_u16(), response.body().is_end_stream());
        response.body_mut().keep(open);
        response
    }

    async fn route(
        self: &Arc<Self>,
        route: Route,
        request: Request<Incoming>,
        id: &str,
        allowance: Option<Allowance>,
        started: Instant,
    ) -> Result<Response<Body>, Failure> {
        if request.method() == Method::OPTIONS {
            return Ok(options(route.allow()));
        }
        if matches!(route, Route::None) {
            return Err(Failure::not_found(request.uri().path()));
        }
        let method = match route {
            Route::Generate => [Method::POST, Method::POST],
            _ => [Method::GET, Method::HEAD],
        };
        if !method.contains(request.method()) {
            return Err(Failure::method(route.allow()));
        }
        if route.is_guarded() {
            limits::authorize(&self.config.api_keys, request.headers())?;
        }
        allowance.map_or(Ok(()), Allowance::check)?;
        let (parts, body) = request.into_parts();
        let asked = |draw| Asked {
            draw,
            head_only: parts.method == Method::HEAD,
            request_id: id.to_owned(),
            started,
            headers: parts.headers.clone(),
        };
        match route {
            Route::Digit(label) => {
                let draw = params::one(&label, parts.uri.query(), &self.config)?;
                self.draw(asked(draw)).await
            }
            Route::Generate => {
                if !is_json(&parts.headers) {
                    return Err(Failure::media_type());
                }
                let body = self.body(body).await?;
                self.draw(asked(params::many(&body, &self.config)?)).await
            }
            Route::Models => Ok(json(StatusCode::OK, &self.models().await)),
            Route::Health(probe) => Ok(self.probe(probe)),
            Route::Metrics => Ok(text(metrics::CONTENT_TYPE, self.metrics_text())),
            Route::OpenApi => Ok(text("application/json", self.openapi())),
            Route::Page(file) => Ok(file.answer(&parts.headers)),
            Route::None => Err(Failure::not_found(parts.uri.path())),
        }
    }

    fn probe(&self, probe: Probe) -> Response<Body> {
        match (probe, *self.drain.borrow()) {
            (Probe::Live, _) => json(StatusCode::OK, &self.health("ok")),
            // Cold counts as ready: the request that this lets through is what warms it.
            (Probe::Ready, false) => json(StatusCode::OK, &self.health("ready")),
            (Probe::Ready, true) => json(StatusCode::SERVICE_UNAVAILABLE, &self.health("draining")),
        }
    }

    /// The whole body, if it is small and comes in time.
    async fn body(&self, body: Incoming) -> Result<Bytes, Failure> {
        let bytes_max = self.config.body_bytes_max;
        match timeout(
            self.config.header_timeout,
            Limited::new(body, bytes_max).collect(),
        )
        .await
        {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(Failure::too_large(bytes_max)),
            Ok(Err(_)) => Err(Failure::body_broken()),
            Err(_) => Err(Failure::body_timeout()),
        }
    }

    fn health(&self, status: &str) -> Health {
        let states: Vec<ModelState> = self.engine.loaded().into_iter().map(|m| m.state).collect();
        let any = |state| states.contains(&state);
        let state = if any(ModelState::Ready) {
            ModelState::Ready
        } else if any(ModelState::Loading) {
            ModelState::Loading
        } else {
            ModelState::Cold
        };
        Health {
            status: status.to_owned(),
            model: state_name(state).to_owned(),
        }
    }

    async fn models(&self) -> Models {
        Models {
            models: self.engine.models().await.into_iter().map(entry).collect(),
        }
    }

    pub(super) fn memory_limit(&self) -> Option<Memory> {
        *self
            .memory
            .get_or_init(|| Memory::limit(self.config.memory_bytes_max))
    }

    /// Whether the process is near its memory limit. Warns when it comes there; looks at most once a second.
    pub(super) fn check_memory(&self) -> bool {
        let now = self.started.elapsed().as_millis() as u64;
        let before = self.memory_checked_ms.load(Ordering::Relaxed);
        let lately = now < before + 1000;
        let mine = !lately
            && self
                .memory_checked_ms
                .compare_exchange(before, now, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        let was_near = self.memory_near.load(Ordering::Relaxed);
        let Some(limit) = self.memory_limit().filter(|_| mine) else {
            return was_near;
        };
        let resident = Memory::resident_bytes();
        let percent = resident.saturating_mul(100) / limit.limit_bytes.max(1);
        let from = match was_near {
            true => MEMORY_CALM_PERCENT,
            false => MEMORY_WARN_PERCENT,
        };
        let near = percent >= from;
        self.memory_near.store(near, Ordering::Relaxed);
        if near && !was_near {
            tracing::warn!(
                resident_mb = resident >> 20,
                limit_mb = limit.limit_bytes >> 20,
                limit_from = limit.limit_from,
                "memory is near its limit"
            );
        }
        near
    }
}

fn entry(model: ModelStatus) -> ModelEntry {
    let ready = model.info.map(|info| ReadyModel {
        version: info.version.clone(),
        classes: info.header.class_names.clone(),
        image_size: info.header.architecture.image_size,
        channels: info.header.architecture.channels,
        parameters: info.header.parameters(),
        device: info.device.to_owned(),
        origin: info.origin.to_owned(),
        verified: info.verified.to_owned(),
        default_steps: info.header.sampler.steps,
        default_guidance: info.header.sampler.guidance,
    });
    ModelEntry {
        name: model.name,
        state: state_name(model.state).to_owned(),
        source: model.source,
        bytes_arrived: model.bytes_arrived,
        bytes_total: model.bytes_total,
        seconds_left: model.left.map(|left| left.as_secs_f64().ceil() as u64),
        error: model.error.map(|e| e.to_string()),
        ready,
    }
}

pub(super) fn state_name(state: ModelState) -> &'static str {
    match state {
        ModelState::Cold => "cold",
        ModelState::Loading => "loading",
        ModelState::Ready => "ready",
    }
}

/// The methods that there are; whatever else a client makes up is no name in the metrics.
fn method_name(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "OPTIONS" => "OPTIONS",
        "PUT" => "PUT",
        "PATCH" => "PATCH",
        "DELETE" => "DELETE",
        _ => "other",
    }
}

fn percent_decoded(text: &str) -> String {
    // A path's `+` is a plus and no space, so it is kept from the form's decoding.
    let pair = format!("={}", text.replace('+', "%2B").replace('&', "%26"));
    form_urlencoded::parse(pair.as_bytes())
        .next()
        .map(|(_, value)| value.into_owned())
        .unwrap_or_default()
}

fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers
        .get(header::CONTENT_TYPE)
        .and_then(|v| v.to_str().ok())
        .unwrap_or_default();
    let kind = kind
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json"))
}

fn json(status: StatusCode, body: &impl serde::Serialize) -> Response<Body> {
    let body = serde_json::to_string_pretty(body).unwrap_or_default();
    let mut response = text("application/json", body);
    *response.status_mut() = status;
    response
}

fn text(kind: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn options(allow: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::default());
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    headers.insert(header::ALLOW, HeaderValue::from_static(allow));
    response
}

/// What every answer says.
fn finish(headers: &mut HeaderMap, id: &str) {
    if let Ok(id) = HeaderValue::try_from(id) {
        headers.insert(headers::REQUEST_ID, id);
    }
    for (name, value) in [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    // The page has one of its own.
    headers
        .entry(header::CONTENT_SECURITY_POLICY)
        .or_insert(HeaderValue::from_static(
            "default-src 'none'; frame-ancestors 'none'",
        ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_in_paths_are_decoded() {
        assert_eq!(percent_decoded("T-shirt%2Ftop"), "T-shirt/top");
        assert_eq!(percent_decoded("a+b&c%20d"), "a+b&c d");
    }
}
