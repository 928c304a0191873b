//! From a checked request to drawn digits, in the form that the client wants.
//!
//! A picture's head waits for its first row, so that whatever can go wrong before has a status code of its own. A
//! stream's head is sent at once, and the stream says what is going on.

use super::accept::{self, Form};
use super::body::{Body, Gone, Sender};
use super::params::Draw;
use super::problem::Failure;
use super::records::{LAST_EVENT, Records};
use super::routes::App;
use super::timing::Timing;
use crate::api::{Record, headers};
use crate::engine::{
    Drawing, EngineError, Event, ModelInfo, ModelState, ModelStatus, Plan, Preview,
};
use crate::image::{Picture, Sheet, SheetEncoder, encode, encode_animation, encode_sheet, enlarge};
use crate::storage::hex;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use sha2::{Digest as _, Sha256};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant as Deadline, sleep, timeout, timeout_at};
use tracing::Instrument as _;

/// Pixels that are made into PNG on the runtime's own threads: some hundredths of a millisecond.
const PIXELS_INLINE: usize = 1 << 14;
/// Pixels of all pictures of an animation.
const ANIMATION_PIXELS_MAX: usize = 32 << 20;
/// How long a step is shown, and the result.
const STEP_SHOWN: Duration = Duration::from_millis(250);
const RESULT_SHOWN: Duration = Duration::from_millis(3000);
/// How often a stream says how the load goes.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);
/// The longest that a stream says nothing: proxies close what is silent for long.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// For how long a load goes on after a client that did not want to wait was told when to come back.
const COME_BACK: Duration = Duration::from_secs(30);

/// What a request for digits is about.
pub(super) struct Asked {
    pub(super) draw: Draw,
    pub(super) headers: HeaderMap,
    pub(super) head_only: bool,
    pub(super) request_id: String,
    pub(super) started: Instant,
}

impl App {
    pub(super) async fn draw(self: &Arc<Self>, asked: Asked) -> Result<Response<Body>, Failure> {
        let form = accept::form(&asked.headers)?;
        let permit = self
            .requests
            .clone()
            .try_acquire_owned()
            .map_err(|_| Failure::busy(self.config.requests_max, self.wait(None)))?;
        let wait_secs = accept::wait_secs(&asked.headers);
        let wait = wait_secs.map(Duration::from_secs);
        let model = asked.draw.request.model.clone();
        let mut response = match form {
            Form::Png | Form::Apng => {
                let work = self.picture(asked, form, permit);
                match wait {
                    None => work.await?,
                    Some(wait) => match timeout(wait, work).await {
                        Ok(result) => result?,
                        Err(_) => return Err(self.not_yet(model, wait)),
                    },
                }
            }
            Form::Multipart | Form::Ndjson | Form::Events => self.stream(asked, form, permit, wait),
        };
        let headers = response.headers_mut();
        if let Some(secs) = wait_secs
            && let Ok(value) = HeaderValue::try_from(format!("wait={secs}"))
        {
            headers.insert("preference-applied", value);
        }
        headers.insert(header::VARY, HeaderValue::from_static("accept, prefer"));
        Ok(response)
    }

    /// One picture, or a sheet that leaves row by row.
    async fn picture(
        self: &Arc<Self>,
        asked: Asked,
        form: Form,
        permit: OwnedSemaphorePermit,
    ) -> Result<Response<Body>, Failure> {
        let draw = asked.draw;
        let plan = self.engine.prepare(draw.request.clone()).await?;
        let info = plan.info().clone();
        let sheet = sheet(&draw, &info);
        draw.check_pixels(sheet.size)?;
        let mut answer = HeaderMap::new();
        self.describe(&mut answer, &plan, &draw, form);
        answer.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static(form.media_type()),
        );
        let mut timing = Timing::new(self.boot);
        timing.load(plan.load_wait, plan.load_times());
        let unchanged = draw.seeded && matches_etag(&asked.headers, &answer);
        if unchanged || asked.head_only {
            if unchanged {
                answer.remove(header::CONTENT_TYPE);
            }
            answer.insert("server-timing", timing.header());
            let mut response = Response::new(Body::default());
            if unchanged {
                *response.status_mut() = StatusCode::NOT_MODIFIED;
            }
            *response.headers_mut() = answer;
            return Ok(response);
        }
        if form == Form::Apng {
            return animation(plan, &draw, sheet, answer, timing).await;
        }
        let count = plan.specs.len();
        let mut rows = Rows::new(plan.start()?, sheet, count);
        let first = rows.next(&mut timing).await?;
        let mut response = if sheet.grid.rows == 1 {
            let png = off_runtime(row_pixels(&sheet), move || encode_sheet(sheet, &first)).await?;
            Response::new(Body::from(png))
        } else {
            let (sender, body) = Body::stream(self.config.header_timeout);
            let deadline = (asked.started + self.config.request_timeout).into();
            let work = async move {
                let _permit = permit;
                if let Err(failure) = stream_rows(rows, first, sender, deadline).await {
                    tracing::warn!(problem = failure.kind(), "a sheet could not be completed");
                }
            };
            tokio::spawn(work.in_current_span());
            Response::new(body)
        };
        answer.insert("server-timing", timing.header());
        *response.headers_mut() = answer;
        Ok(response)
    }

    /// Records, from now on to the end.
    fn stream(
        self: &Arc<Self>,
        asked: Asked,
        form: Form,
        permit: OwnedSemaphorePermit,
        wait: Option<Duration>,
    ) -> Response<Body> {
        let last = asked.headers.get("last-event-id");
        if form == Form::Events && last.is_some_and(|id| id == LAST_EVENT) {
            let mut response = Response::new(Body::default());
            *response.status_mut() = StatusCode::NO_CONTENT;
            return response;
        }
        let boundary = format!(
            "digit-{:032x}",
            u128::from(asked.draw.request.seed) ^ random()
        );
        let media_type = match form {
            Form::Multipart => format!("multipart/mixed; boundary={boundary}"),
            _ => form.media_type().to_owned(),
        };
        let seed = asked.draw.request.seed;
        let (sender, body) = Body::stream(self.config.header_timeout);
        let head_only = asked.head_only;
        if !head_only {
            let app = self.clone();
            let records = Records::new(form, sender, boundary);
            let work = async move {
                let _permit = permit;
                app.narrate(asked, records, wait).await;
            };
            tokio::spawn(work.in_current_span());
        }
        let mut response = Response::new(match head_only {
            true => Body::default(),
            false => body,
        });
        let headers = response.headers_mut();
        if let Ok(value) = HeaderValue::try_from(media_type) {
            headers.insert(header::CONTENT_TYPE, value);
        }
        headers.insert(headers::SEED, HeaderValue::from(seed));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        // nginx and what is built of it hold streams back otherwise.
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        headers.insert("server-timing", Timing::new(self.boot).header());
        response
    }

    /// Tells a stream's reader everything, and always how it ended.
    async fn narrate(self: &Arc<Self>, asked: Asked, mut records: Records, wait: Option<Duration>) {
        let deadline = Deadline::from_std(asked.started) + self.config.request_timeout;
        let (request_id, started) = (asked.request_id.clone(), asked.started);
        let model = asked.draw.request.model.clone();
        let until = wait.map_or(deadline, |w| deadline.min(Deadline::from_std(started) + w));
        let outcome = match timeout_at(until, self.wait_for_model(&asked, &mut records)).await {
            Ok(Ok(plan)) => match timeout_at(deadline, self.tell(&asked, plan, &mut records)).await
            {
                Ok(outcome) => outcome,
                Err(_) => Err(Failure::request_timeout(self.config.request_timeout).into()),
            },
            Ok(Err(stop)) => Err(stop),
            Err(_) => Err(match wait {
                Some(wait) if until < deadline => self.not_yet(model, wait),
                _ => Failure::request_timeout(self.config.request_timeout),
            }
            .into()),
        };
        match outcome {
            Ok(done) => records.done(&done).await,
            Err(Stop::Failed(failure)) => {
                self.metrics.failed(failure.kind());
                records.failed(&failure, &request_id).await;
            }
            Err(Stop::Gone) => {}
        }
    }

    /// Until the model is loaded, with its progress meanwhile. A client that leaves gives up its share in the load.
    async fn wait_for_model(
        self: &Arc<Self>,
        asked: &Asked,
        records: &mut Records,
    ) -> Result<Plan, Stop> {
        let draw = &asked.draw;
        let queued = || Record::Queued {
            request_id: asked.request_id.clone(),
            digits: draw.request.labels.len() as u64,
            seed: draw.request.seed,
            waiting: self.digits_open(),
            columns: draw.grid.columns as u64,
            rows: draw.grid.rows as u64,
        };
        records.send(&queued()).await?;
        let prepare = self.engine.prepare(draw.request.clone());
        tokio::pin!(prepare);
        let (mut said, mut said_at) = (None, Instant::now());
        // Soon for the first time, so that a reader learns what it waits for.
        let mut pause = Duration::from_millis(20);
        loop {
            tokio::select! {
                biased;
                plan = &mut prepare => return Ok(plan?),
                () = records.closed() => return Err(Stop::Gone),
                () = sleep(pause) => pause = PROGRESS_EVERY,
            }
            let now = self.loading(draw.request.model.as_deref()).map(progress);
            if now == said && said_at.elapsed() < SILENCE_MAX {
                continue;
            }
            records.send(&now.clone().unwrap_or_else(&queued)).await?;
            (said, said_at) = (now, Instant::now());
        }
    }

    /// The digits, and what they look like on their way.
    async fn tell(
        self: &Arc<Self>,
        asked: &Asked,
        plan: Plan,
        records: &mut Records,
    ) -> Result<Record, Stop> {
        let (draw, info) = (&asked.draw, plan.info().clone());
        let sheet = sheet(draw, &info);
        draw.check_pixels(sheet.size)?;
        let mut timing = Timing::new(self.boot);
        timing.load(plan.load_wait, plan.load_times());
        let first = plan.specs.first().copied();
        let mut drawing = if records.wants_previews() {
            plan.start_with_previews()?
        } else {
            plan.start()?
        };
        if let Some(first) = first {
            let started = Record::Started {
                model: info.name.clone(),
                model_version: info.version.clone(),
                image_size: sheet.size as u64,
                channels: sheet.channels as u64,
                steps: first.steps as u64,
                guidance: first.guidance,
            };
            records.send(&started).await?;
        }
        loop {
            let event = tokio::select! {
                event = drawing.event() => event,
                () = records.closed() => return Err(Stop::Gone),
                () = sleep(SILENCE_MAX) => {
                    let queued = Record::Queued {
                        request_id: asked.request_id.clone(),
                        digits: draw.request.labels.len() as u64,
                        seed: draw.request.seed,
                        waiting: self.digits_open(),
                        columns: draw.grid.columns as u64,
                        rows: draw.grid.rows as u64,
                    };
                    records.send(&queued).await?;
                    continue;
                }
            };
            match event.transpose()? {
                None => break,
                Some(Event::Preview(Preview {
                    index,
                    step,
                    steps,
                    pixels,
                })) => {
                    let picture = picture(&sheet, pixels);
                    records.preview(index, step, steps, &picture).await?;
                }
                Some(Event::Digit(digit)) => {
                    timing.digit(&digit);
                    let label = info.header.class_names.get(digit.label);
                    let label = label.map(String::as_str).unwrap_or_default();
                    let (index, seed) = (digit.index, digit.seed);
                    let (picture, scale) = (picture(&sheet, digit.pixels), sheet.scale);
                    let make = move || encode(&enlarge(&picture, scale));
                    let png = off_runtime((sheet.size * scale).pow(2), make).await?;
                    records.digit(index, label, seed, png).await?;
                }
            }
        }
        timing.set("total", asked.started.elapsed());
        Ok(Record::Done {
            digits: draw.request.labels.len() as u64,
            seed: draw.request.seed,
            model: info.name.clone(),
            model_version: info.version.clone(),
            timing: timing.record(),
        })
    }

    /// What the client is told whose patience is over. The load goes on until it should have come back.
    fn not_yet(self: &Arc<Self>, model: Option<String>, waited: Duration) -> Failure {
        let after = self.wait(model.as_deref());
        if self.loading(model.as_deref()).is_some() && !self.lingering.swap(true, Ordering::AcqRel)
        {
            let app = self.clone();
            let request = crate::engine::DrawRequest {
                model,
                labels: Vec::new(),
                seed: 0,
                steps: None,
                guidance: None,
            };
            tokio::spawn(async move {
                // A failure is in the log, and the next request tries again.
                let _ = timeout(after + COME_BACK, app.engine.prepare(request)).await;
                app.lingering.store(false, Ordering::Release);
            });
        }
        Failure::preferred_wait(waited, after)
    }

    /// How long a request that comes now would wait: for the rest of the load, and for those before it.
    fn wait(&self, model: Option<&str>) -> Duration {
        let load = match self.loading(model) {
            // Before the first byte nobody knows.
            Some(status) => status.left.unwrap_or(Duration::from_secs(2)),
            None => Duration::ZERO,
        };
        let queue = self.engine.metrics().into_iter().map(|(_, m)| {
            let a_digit = m.step_seconds.sum / (m.digits_drawn.max(1) as f64);
            Duration::from_secs_f64((m.digits_open as f64 * a_digit).min(3600.0))
        });
        (load + queue.max().unwrap_or_default()).max(Duration::from_secs(1))
    }

    fn loading(&self, model: Option<&str>) -> Option<ModelStatus> {
        let mut loading = self
            .engine
            .loaded()
            .into_iter()
            .filter(|m| m.state == ModelState::Loading);
        match model {
            Some(name) if name != "default" => loading.find(|m| m.name == name),
            _ => loading.next(),
        }
    }

    fn digits_open(&self) -> u64 {
        self.engine
            .metrics()
            .iter()
            .map(|(_, m)| m.digits_open)
            .sum()
    }

    /// Headers that name what is drawn, so that it can be drawn again.
    fn describe(&self, headers: &mut HeaderMap, plan: &Plan, draw: &Draw, form: Form) {
        let info = plan.info();
        headers.insert(headers::SEED, HeaderValue::from(draw.request.seed));
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
            "{} {} {} {:?} {}",
            form.media_type(),
            info.version,
            info.device,
            draw.grid,
            draw.scale
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
        // A seeded answer may be reused for a while without asking: the weights behind a name may be replaced. What a
        // key was needed for is kept by nobody else.
        let cache = match (draw.seeded, self.config.api_keys.is_empty()) {
            (true, true) => "public, max-age=300",
            (true, false) => "private, max-age=300",
            (false, _) => "no-store",
        };
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(cache));
    }
}

/// Why a stream ends early.
enum Stop {
    Gone,
    Failed(Box<Failure>),
}

impl From<Gone> for Stop {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Failed(Box::new(failure))
    }
}

impl From<EngineError> for Stop {
    fn from(error: EngineError) -> Self {
        Failure::from(error).into()
    }
}

/// Digits as they are done, to rows of a sheet in their order.
struct Rows {
    drawing: Drawing,
    sheet: Sheet,
    cells: Vec<Option<Picture>>,
    next: usize,
}

impl Rows {
    fn new(drawing: Drawing, sheet: Sheet, count: usize) -> Self {
        Self {
            drawing,
            sheet,
            cells: vec![None; count],
            next: 0,
        }
    }

    /// The cells of the next row, once they are all drawn. Empty after the last row.
    async fn next(&mut self, timing: &mut Timing) -> Result<Vec<Picture>, EngineError> {
        let start = self.next * self.sheet.grid.columns;
        let end = (start + self.sheet.grid.columns).min(self.cells.len());
        while self.cells[start..end].iter().any(Option::is_none) {
            let Some(digit) = self.drawing.next().await else {
                return Err(EngineError::Stopped);
            };
            let digit = digit?;
            timing.digit(&digit);
            self.cells[digit.index] = Some(picture(&self.sheet, digit.pixels));
        }
        self.next += 1;
        let cells = self.cells[start..end].iter_mut();
        Ok(cells.filter_map(Option::take).collect())
    }
}

/// Sends a sheet's rows. A reader that leaves takes what is not drawn yet out of the queue.
async fn stream_rows(
    mut rows: Rows,
    first: Vec<Picture>,
    mut sender: Sender,
    deadline: Deadline,
) -> Result<(), Failure> {
    let sheet = rows.sheet;
    let (mut encoder, head) = SheetEncoder::new(sheet);
    let (mut cells, mut before) = (first, head);
    let mut ignored = Timing::new(Duration::ZERO);
    for row in 0..sheet.grid.rows {
        if row > 0 {
            cells = tokio::select! {
                cells = timeout_at(deadline, rows.next(&mut ignored)) => match cells {
                    Ok(cells) => cells?,
                    Err(_) => return Err(Failure::request_timeout(Duration::ZERO)),
                },
                () = sender.closed() => return Ok(()),
            };
        }
        let work = move || {
            let mut bytes = before;
            bytes.extend(encoder.row(&cells));
            (encoder, bytes)
        };
        let bytes;
        (encoder, bytes) = off_runtime(row_pixels(&sheet), work).await?;
        if sender.send(bytes).await.is_err() {
            return Ok(());
        }
        (cells, before) = (Vec::new(), Vec::new());
    }
    sender.finish().await;
    Ok(())
}

/// The denoising, a frame a step, and the result.
async fn animation(
    plan: Plan,
    draw: &Draw,
    sheet: Sheet,
    mut answer: HeaderMap,
    mut timing: Timing,
) -> Result<Response<Body>, Failure> {
    let count = plan.specs.len();
    let steps = plan.specs.first().map_or(1, |s| s.steps);
    let pixels = sheet.grid.columns * sheet.grid.rows * (sheet.size * sheet.scale).pow(2) * steps;
    if pixels > ANIMATION_PIXELS_MAX {
        return Err(Failure::field(
            "scale",
            format!(
                "the animation would have {pixels} pixels in all, at most {ANIMATION_PIXELS_MAX} are drawn; take a smaller scale, fewer digits or fewer steps"
            ),
        ));
    }
    let black = Picture::black(sheet.size, sheet.size, sheet.channels);
    let mut frames = vec![vec![black; count]; steps];
    let mut drawing = plan.start_with_every_preview()?;
    while let Some(event) = drawing.event().await {
        match event? {
            Event::Preview(p) => frames[p.step - 1][p.index].pixels = p.pixels,
            Event::Digit(digit) => {
                timing.digit(&digit);
                frames[steps - 1][digit.index].pixels = digit.pixels;
            }
        }
    }
    let grid = draw.grid;
    let make = move || {
        let frame = |(step, cells): (usize, &Vec<Picture>)| {
            let shown = if step + 1 == steps {
                RESULT_SHOWN
            } else {
                STEP_SHOWN
            };
            let whole = crate::image::assemble(grid, cells);
            (enlarge(&whole, sheet.scale), shown)
        };
        let frames: Vec<(Picture, Duration)> = frames.iter().enumerate().map(frame).collect();
        encode_animation(&frames)
    };
    let started = Instant::now();
    let apng = tokio::task::spawn_blocking(make)
        .await
        .map_err(|_| Failure::panicked())?;
    timing.set("encode", started.elapsed());
    answer.insert("server-timing", timing.header());
    let mut response = Response::new(Body::from(apng));
    *response.headers_mut() = answer;
    Ok(response)
}

/// A digit is encoded in microseconds; a large row is work for another thread.
async fn off_runtime<T: Send + 'static>(
    pixels: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Failure> {
    if pixels <= PIXELS_INLINE {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Failure::panicked())
}

fn row_pixels(sheet: &Sheet) -> usize {
    sheet.grid.columns * (sheet.size * sheet.scale).pow(2)
}

fn sheet(draw: &Draw, info: &ModelInfo) -> Sheet {
    let architecture = &info.header.architecture;
    Sheet {
        grid: draw.grid,
        size: architecture.image_size,
        channels: architecture.channels,
        scale: draw.scale,
    }
}

fn picture(sheet: &Sheet, pixels: Vec<u8>) -> Picture {
    Picture {
        width: sheet.size,
        height: sheet.size,
        channels: sheet.channels,
        pixels,
    }
}

fn progress(status: ModelStatus) -> Record {
    Record::Loading {
        model: status.name,
        bytes_arrived: status.bytes_arrived,
        bytes_total: status.bytes_total,
        seconds_left: status.left.map(|left| left.as_secs_f64().ceil() as u64),
    }
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

fn random() -> u128 {
    let half = || u128::from(getrandom::u64().unwrap_or_default());
    half() << 64 | half()
}
