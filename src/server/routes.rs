//! From a request to its answer.

use super::ServerConfig;
use super::params::{self, Draw};
use super::problem::Failure;
use super::trace;
use crate::api::{Health, ModelEntry, Models, ReadyModel, headers};
use crate::engine::{Digit, Engine, ModelState, ModelStatus, Plan};
use crate::image::{Picture, assemble, encode, enlarge};
use crate::storage::hex;
use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use sha2::{Digest as _, Sha256};
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::time::timeout;
use tracing::Instrument as _;

pub(super) type Body = Full<Bytes>;

/// How long a seeded answer may be reused without asking: the weights behind a name may be replaced.
const CACHE_SEEDED: &str = "public, max-age=300";

/// What every request needs.
pub(super) struct App {
    pub(super) engine: Engine,
    pub(super) config: ServerConfig,
    /// From the process's start to the open port.
    pub(super) boot: Duration,
    pub(super) open: AtomicUsize,
    pub(super) draining: AtomicBool,
}

/// Counts a request as open until its answer is made or its client leaves.
struct OpenRequest(Arc<App>);

impl OpenRequest {
    fn new(app: &Arc<App>) -> Self {
        app.open.fetch_add(1, Ordering::Relaxed);
        Self(app.clone())
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl App {
    /// Answers every request, whatever happens.
    pub(super) async fn answer(app: Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        let _open = OpenRequest::new(&app);
        let started = Instant::now();
        let id = trace::request_id(request.headers());
        let span = tracing::info_span!("request", request_id = id, trace = tracing::field::Empty);
        if let Some(trace) = trace::trace_id(request.headers()) {
            span.record("trace", trace);
        }
        let method = request.method().clone();
        let path = request.uri().path().to_owned();
        let work =
            std::panic::AssertUnwindSafe(timeout(app.config.request_timeout, app.route(request)))
                .catch_unwind()
                .instrument(span.clone());
        let result = match work.await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(Failure::request_timeout(app.config.request_timeout)),
            Err(_) => Err(Failure::panicked()),
        };
        let mut response = result.unwrap_or_else(|failure| failure.into_response(&id));
        finish(response.headers_mut(), &id);
        let status = response.status().as_u16();
        let _in_span = span.enter();
        let duration_ms = (started.elapsed().as_secs_f64() * 100_000.0).round() / 100.0;
        // Probes come every few seconds and say nothing new.
        if status < 400 && path.starts_with("/health") {
            tracing::debug!(%method, path, status, duration_ms, "request");
        } else {
            tracing::info!(%method, path, status, duration_ms, "request");
        }
        response
    }

    async fn route(&self, request: Request<Incoming>) -> Result<Response<Body>, Failure> {
        let path = request.uri().path();
        if let Some(label) = path
            .strip_prefix("/v1/digits/")
            .filter(|l| !l.contains('/'))
        {
            get_only(&request)?;
            let label = percent_decoded(label);
            let draw = params::one(&label, request.uri().query(), &self.config)?;
            return self.draw(draw, request.headers()).await;
        }
        match path {
            "/v1/generate" => {
                if request.method() != Method::POST {
                    return Err(Failure::method("POST"));
                }
                let headers = request.headers().clone();
                if !is_json(&headers) {
                    return Err(Failure::media_type());
                }
                let body = self.body(request.into_body()).await?;
                self.draw(params::many(&body, &self.config)?, &headers)
                    .await
            }
            "/v1/models" => {
                get_only(&request)?;
                Ok(json(StatusCode::OK, &self.models().await))
            }
            "/health/live" | "/health/startup" | "/health" => {
                get_only(&request).map(|()| json(StatusCode::OK, &self.health("ok")))
            }
            "/health/ready" => {
                get_only(&request).map(|()| match self.draining.load(Ordering::Relaxed) {
                    // Cold counts as ready: the request that this lets through is what warms it.
                    false => json(StatusCode::OK, &self.health("ready")),
                    true => json(StatusCode::SERVICE_UNAVAILABLE, &self.health("draining")),
                })
            }
            "/" => get_only(&request).map(|()| index()),
            _ => Err(Failure::not_found(path)),
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

    async fn draw(&self, draw: Draw, request: &HeaderMap) -> Result<Response<Body>, Failure> {
        if !accepts_png(request) {
            return Err(Failure::not_acceptable());
        }
        let seed = draw.request.seed;
        let plan = self.engine.prepare(draw.request.clone()).await?;
        let architecture = &plan.info().header.architecture;
        let (size, channels) = (architecture.image_size, architecture.channels);
        draw.check_pixels(size)?;
        let mut answer = HeaderMap::new();
        describe(&mut answer, &plan, &draw, seed);
        if draw.seeded && matches_etag(request, &answer) {
            let mut response = Response::new(Body::default());
            *response.status_mut() = StatusCode::NOT_MODIFIED;
            *response.headers_mut() = answer;
            return Ok(response);
        }
        let mut timing = Timing::new(self.boot, &plan);
        let count = plan.specs.len();
        let mut drawing = plan.start()?;
        let mut cells: Vec<Option<Picture>> = vec![None; count];
        while let Some(digit) = drawing.next().await {
            let digit = digit?;
            timing.digit(&digit);
            cells[digit.index] = Some(Picture {
                width: size,
                height: size,
                channels,
                pixels: digit.pixels,
            });
        }
        let started = Instant::now();
        let (grid, scale) = (draw.grid, draw.scale);
        let make = move || {
            let cells: Vec<Picture> = cells.into_iter().flatten().collect();
            encode(&enlarge(&assemble(grid, &cells), scale))
        };
        // A digit is encoded in microseconds; a sheet is work for another thread.
        let png = if count * scale * scale <= 16 {
            make()
        } else {
            tokio::task::spawn_blocking(make)
                .await
                .map_err(|_| Failure::panicked())?
        };
        timing.encode = started.elapsed();
        answer.insert("server-timing", timing.header());
        answer.insert(header::CONTENT_TYPE, HeaderValue::from_static("image/png"));
        let mut response = Response::new(Body::from(png));
        *response.headers_mut() = answer;
        Ok(response)
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

fn state_name(state: ModelState) -> &'static str {
    match state {
        ModelState::Cold => "cold",
        ModelState::Loading => "loading",
        ModelState::Ready => "ready",
    }
}

fn get_only(request: &Request<Incoming>) -> Result<(), Failure> {
    match *request.method() {
        Method::GET | Method::HEAD => Ok(()),
        _ => Err(Failure::method("GET, HEAD")),
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

/// Whether `Accept` leaves room for image/png (RFC 9110, section 12.5.1: the most specific range counts).
fn accepts_png(headers: &HeaderMap) -> bool {
    let mut best: Option<(u8, f32)> = None;
    for value in headers.get_all(header::ACCEPT) {
        for range in value.to_str().unwrap_or_default().split(',') {
            let mut parts = range.split(';').map(str::trim);
            let specific = match parts
                .next()
                .unwrap_or_default()
                .to_ascii_lowercase()
                .as_str()
            {
                "image/png" => 3,
                "image/*" => 2,
                "*/*" => 1,
                _ => continue,
            };
            let quality = parts
                .find_map(|p| p.strip_prefix("q=")?.parse().ok())
                .unwrap_or(1.0);
            if best.is_none_or(|(s, _)| specific > s) {
                best = Some((specific, quality));
            }
        }
    }
    match best {
        Some((_, quality)) => quality > 0.0,
        None => !headers.contains_key(header::ACCEPT),
    }
}

/// Headers that name what is drawn, so that it can be drawn again.
fn describe(headers: &mut HeaderMap, plan: &Plan, draw: &Draw, seed: u64) {
    let info = plan.info();
    headers.insert(headers::SEED, HeaderValue::from(seed));
    headers.insert(
        headers::MODEL,
        HeaderValue::try_from(&info.name).unwrap_or(HeaderValue::from_static("unnamed")),
    );
    headers.insert(
        headers::MODEL_VERSION,
        HeaderValue::try_from(&info.version).unwrap_or(HeaderValue::from_static("unknown")),
    );
    let mut hash = Sha256::new();
    hash.update(format!(
        "{} {} {:?} {}",
        info.version, info.device, draw.grid, draw.scale
    ));
    for spec in &plan.specs {
        hash.update(format!(
            " {} {} {} {}",
            spec.label,
            spec.seed,
            spec.steps,
            spec.guidance.to_bits()
        ));
    }
    let etag = format!("\"{}\"", hex(&hash.finalize()[..16]));
    headers.insert(
        header::ETAG,
        HeaderValue::try_from(etag).expect("hexadecimal digits in quotes"),
    );
    let cache = if draw.seeded {
        CACHE_SEEDED
    } else {
        "no-store"
    };
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(cache));
}

fn matches_etag(request: &HeaderMap, answer: &HeaderMap) -> bool {
    let Some(etag) = answer.get(header::ETAG).and_then(|v| v.to_str().ok()) else {
        return false;
    };
    let given = request
        .get_all(header::IF_NONE_MATCH)
        .into_iter()
        .filter_map(|v| v.to_str().ok());
    given
        .flat_map(|v| v.split(','))
        .map(|t| t.trim().trim_start_matches("W/"))
        .any(|t| t == etag || t == "*")
}

/// Where the time went (the Server-Timing header), in milliseconds.
struct Timing {
    boot: Duration,
    load_wait: Duration,
    fetch: Duration,
    build: Duration,
    queue: Duration,
    steps: Duration,
    encode: Duration,
}

impl Timing {
    fn new(boot: Duration, plan: &Plan) -> Self {
        let load = plan.load_times();
        let none = Duration::ZERO;
        Self {
            boot,
            load_wait: plan.load_wait,
            fetch: load.fetch,
            build: load.build,
            queue: none,
            steps: none,
            encode: none,
        }
    }

    /// Digits of one request overlap; the longest of each counts.
    fn digit(&mut self, digit: &Digit) {
        self.queue = self.queue.max(digit.queued);
        self.steps = self.steps.max(digit.drawn);
    }

    fn header(&self) -> HeaderValue {
        let mut text = String::new();
        let mut entry = |name: &str, duration: Duration| {
            let comma = if text.is_empty() { "" } else { ", " };
            let _ = write!(
                text,
                "{comma}{name};dur={:.2}",
                duration.as_secs_f64() * 1000.0
            );
        };
        entry("boot", self.boot);
        entry("load", self.load_wait);
        // What the load was made of concerns only the requests that waited for it.
        if self.load_wait > Duration::from_millis(1) {
            entry("fetch", self.fetch);
            entry("build", self.build);
        }
        entry("queue", self.queue);
        entry("steps", self.steps);
        entry("encode", self.encode);
        HeaderValue::try_from(text).expect("names and numbers")
    }
}

fn json(status: StatusCode, body: &impl serde::Serialize) -> Response<Body> {
    let mut response = Response::new(Body::from(
        serde_json::to_vec_pretty(body).unwrap_or_default(),
    ));
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn index() -> Response<Body> {
    const TEXT: &str = "image-generator draws handwritten digits.\n\n\
        GET  /v1/digits/{label}   one digit as PNG; query: seed, steps, guidance, scale, model\n\
        POST /v1/generate         a sheet as PNG; JSON: digits, count, seed, steps, guidance, scale, layout, model\n\
        GET  /v1/models           what is served and what it is doing\n\
        GET  /health/live, /health/ready, /health/startup\n";
    let mut response = Response::new(Body::from(TEXT));
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    response
}

fn finish(headers: &mut HeaderMap, id: &str) {
    if let Ok(id) = HeaderValue::try_from(id) {
        headers.insert(headers::REQUEST_ID, id);
    }
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accept_is_read_by_the_most_specific_range() {
        for (accept, wanted) in [
            ("*/*", true),
            ("image/png", true),
            ("image/*;q=0.5, text/html", true),
            ("text/html", false),
            ("image/png;q=0, */*", false),
            ("image/avif,image/webp,*/*;q=0.8", true),
            ("", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, accept.parse().unwrap());
            assert_eq!(accepts_png(&headers), wanted, "{accept}");
        }
        assert!(accepts_png(&HeaderMap::new()));
    }

    #[test]
    fn labels_in_paths_are_decoded() {
        assert_eq!(percent_decoded("T-shirt%2Ftop"), "T-shirt/top");
        assert_eq!(percent_decoded("a+b&c%20d"), "a+b&c d");
    }
}
