//! The command line: serve, draw, inspect, fetch, pack, health.

use crate::api::{Digits, GenerateRequest, Layout, Record};
use crate::client::{Auth, Client, ClientConfig};
use crate::config::{Config, VARIABLES};
use crate::engine::{self, DrawRequest, Engine, ModelState, Source};
use crate::image::{Grid, Picture, Sheet, decode, encode_sheet};
use crate::model::{self, Header};
use crate::storage::{self, ModelUri, Progress, Storage};
use crate::{server, telemetry};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use sha2::Digest as _;
use std::error::Error;
use std::io::{BufRead as _, BufReader, IsTerminal as _, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The environment, or the command line, is not usable (EX_USAGE of sysexits).
const EXIT_USAGE: u8 = 64;

/// Draws handwritten digits: as an HTTP service, or straight to a file.
#[derive(Parser)]
#[command(name = "image-generator", version, after_help = environment())]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Serve HTTP (the default)
    Serve,
    /// Draw digits to a PNG file, without a server or from one
    Draw(Draw),
    /// Print what a weights file holds
    Inspect {
        /// A file, a folder, or a URI such as s3://bucket/model.safetensors
        place: String,
    },
    /// Fetch and verify weights ahead of time: into a file or folder, such as a layer of an image, or into the cache
    Fetch {
        /// Where the weights are [default: MODEL_URI]
        uri: Option<String>,
        /// The file to write, or the folder that a sharded model goes to [default: the cache, MODEL_CACHE_DIR]
        #[arg(short, long)]
        output: Option<PathBuf>,
    },
    /// Write the digests of a weights file's chunks beside it, so that it is verified while it arrives
    Pack {
        /// Weights files; put what is written next to each, in the same bucket and folder
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Size of a chunk
        #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=1024))]
        chunk_mb: u64,
    },
    /// Ask the server on this machine (HOST, PORT) whether it lives: exit code 0 or 1, as a container's HEALTHCHECK wants
    Health,
}

#[derive(Args)]
struct Draw {
    /// What to draw, a label a character
    #[arg(default_value = "0123456789")]
    digits: String,
    /// Where the PNG goes; - is standard output
    #[arg(short, long, default_value = "digits.png")]
    output: PathBuf,
    /// Draw by this server instead, such as http://localhost:5000
    #[arg(long)]
    url: Option<String>,
    /// How often the whole sequence is drawn
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    count: u64,
    /// Seed of the first digit [default: random]
    #[arg(long)]
    seed: Option<u64>,
    /// Steps from noise to digit [default: the model's]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1000))]
    steps: Option<u64>,
    /// Classifier-free guidance, 1 is none [default: the model's]
    #[arg(long)]
    guidance: Option<f64>,
    /// Each pixel becomes a square of this many pixels
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=32))]
    scale: u64,
    /// rows (one for each repetition), grid or strip
    #[arg(long)]
    layout: Option<Layout>,
    /// The model's name
    #[arg(long)]
    model: Option<String>,
    /// With --url: a Google identity token to ask with, from the metadata server or from the gcloud command
    #[arg(long, value_enum, requires = "url")]
    identity: Option<Identity>,
}

/// Where an identity token comes from.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Identity {
    Metadata,
    Gcloud,
}

fn environment() -> String {
    let mut text = String::from("Environment:\n");
    for v in VARIABLES {
        let default = if v.default.is_empty() {
            String::new()
        } else {
            format!(" [default: {}]", v.default)
        };
        text.push_str(&format!("  {:<21} {}{default}\n", v.name, v.meaning));
    }
    text.push_str(
        "\nStores read their own variables too: AWS_*, GOOGLE_*, AZURE_*, HF_ENDPOINT, HF_TOKEN.\n",
    );
    text
}

impl Cli {
    /// Runs the command; the exit code says how it went.
    pub fn run(self, started: Instant) -> ExitCode {
        let config = match Config::from_env() {
            Ok(config) => config,
            Err(error) => {
                eprintln!("{error}");
                return ExitCode::from(EXIT_USAGE);
            }
        };
        let result = match self.command.unwrap_or(Command::Serve) {
            Command::Serve => serve(config, started),
            Command::Draw(draw) => draw.run(config),
            Command::Inspect { place } => inspect(&place, config),
            Command::Fetch { uri, output } => fetch(uri, output, config),
            Command::Pack { files, chunk_mb } => pack(&files, chunk_mb),
            Command::Health => health(config.listen),
        };
        match result {
            Ok(()) => ExitCode::SUCCESS,
            // Whoever reads the output has read enough, as `| head` does.
            Err(error) if is_broken_pipe(&*error) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("error: {}", telemetry::chain(&*error));
                ExitCode::FAILURE
            }
        }
    }
}

type Outcome = Result<(), Box<dyn Error>>;

fn is_broken_pipe(error: &(dyn Error + 'static)) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

/// The port is open before there is a runtime to serve it: whoever connects meanwhile waits in its queue.
fn serve(config: Config, started: Instant) -> Outcome {
    let listener = match listenfd::ListenFd::from_env().take_tcp_listener(0) {
        // systemd holds the socket (LISTEN_FDS), and goes on holding it when this process ends.
        Ok(Some(listener)) => listener,
        Ok(None) => std::net::TcpListener::bind(config.listen)
            .map_err(|e| format!("cannot listen on {} (HOST, PORT): {e}", config.listen))?,
        Err(e) => return Err(format!("the socket of LISTEN_FDS is no TCP listener: {e}").into()),
    };
    listener.set_nonblocking(true)?;
    telemetry::init(&config.telemetry, false);
    let address = listener.local_addr()?;
    tracing::info!(%address, version = env!("CARGO_PKG_VERSION"), "listening");
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    let runtime = runtime()?;
    let drained = runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let engine = Engine::new(config.engine);
        engine.watch_idle();
        if config.preload {
            let engine = engine.clone();
            // A failure is in the log, and the first request tries again.
            tokio::spawn(async move { engine.load().await.map(drop) });
        }
        Ok::<_, std::io::Error>(
            server::serve(listener, engine, config.server, started, shutdown_signal()?).await,
        )
    })?;
    tracing::info!(requests_left = drained.requests_left, "stopped");
    // A load or a batch that nobody will hear of is not waited for.
    runtime.shutdown_background();
    Ok(())
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
}

/// Resolves at SIGTERM (platforms) or SIGINT (Ctrl-C). Registered at once, so that none is missed.
fn shutdown_signal() -> std::io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut term, mut int) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    })
}

/// Logs of a command: warnings, readable, on standard error.
fn quiet_log(config: &Config) {
    telemetry::init(
        &telemetry::TelemetryConfig {
            format: telemetry::LogFormat::Pretty,
            level: "warn".to_owned(),
            ..config.telemetry.clone()
        },
        true,
    );
}

impl Draw {
    fn run(self, config: Config) -> Outcome {
        quiet_log(&config);
        let runtime = runtime()?;
        let png = match &self.url {
            Some(url) => runtime.block_on(self.remote(url))?,
            None => runtime.block_on(self.local(config))?,
        };
        write(&self.output, &png)
    }

    async fn remote(&self, url: &str) -> Result<Vec<u8>, Box<dyn Error>> {
        let variable = |name| std::env::var(name).ok().filter(|t: &String| !t.is_empty());
        let auth = match (self.identity, variable("IMAGE_GENERATOR_TOKEN")) {
            (Some(Identity::Metadata), _) => Auth::GoogleMetadata,
            (Some(Identity::Gcloud), _) => Auth::Gcloud,
            (None, Some(token)) => Auth::Bearer(token),
            (None, None) => Auth::None,
        };
        let client = Client::new(
            url,
            ClientConfig {
                auth,
                api_key: variable("IMAGE_GENERATOR_API_KEY"),
                retries: 5,
                ..ClientConfig::default()
            },
        )?;
        // At scale 1: what is sent is small, and the sheet is made here, as the server would make it.
        let request = GenerateRequest {
            digits: Some(Digits::Text(self.digits.clone())),
            count: Some(self.count),
            seed: self.seed,
            steps: self.steps,
            guidance: self.guidance,
            scale: None,
            layout: self.layout,
            model: self.model.clone(),
        };
        let mut stream = client.stream(&request).await?;
        let mut show = Show::default();
        let (mut grid, mut cells) = (Grid::square(1), Vec::new());
        let broken = || "the server sent something that is no digit";
        while let Some(record) = stream.next().await {
            match record? {
                Record::Queued {
                    digits, columns, ..
                } if cells.is_empty() => {
                    let digits = usize::try_from(digits)?;
                    // A server's word is not taken for how much memory that is.
                    if digits as u64 > self.digits.chars().count() as u64 * self.count {
                        return Err(broken().into());
                    }
                    grid = Grid::with_columns(usize::try_from(columns)?, digits);
                    cells = vec![None; digits];
                }
                Record::Loading {
                    bytes_arrived,
                    bytes_total,
                    ..
                } if bytes_total > 0 => {
                    show.at(BYTES_BAR, bytes_total, bytes_arrived);
                }
                Record::Digit { index, png, .. } => {
                    let bytes = STANDARD.decode(png)?;
                    let picture = decode(&bytes).ok_or_else(broken)?;
                    let cell = usize::try_from(index).ok().and_then(|i| cells.get_mut(i));
                    *cell.ok_or_else(broken)? = Some(picture);
                    let done = cells.iter().flatten().count();
                    show.at(DIGITS_BAR, cells.len() as u64, done as u64);
                }
                Record::Done {
                    model,
                    model_version,
                    seed,
                    ..
                } => {
                    show.end();
                    eprintln!("drawn by {model} {model_version} with seed {seed}");
                }
                _ => {}
            }
        }
        let cells: Vec<Picture> = cells.into_iter().flatten().collect();
        let first = cells.first().ok_or_else(broken)?;
        let sheet = Sheet {
            grid,
            size: first.height,
            channels: first.channels,
            scale: self.scale as usize,
        };
        if cells.len() > grid.columns * grid.rows
            || cells.iter().any(|c| {
                (c.width, c.height, c.channels) != (sheet.size, sheet.size, sheet.channels)
            })
        {
            return Err(broken().into());
        }
        Ok(encode_sheet(sheet, &cells))
    }

    async fn local(&self, mut config: Config) -> Result<Vec<u8>, Box<dyn Error>> {
        for warning in &config.warnings {
            tracing::warn!("{warning}");
        }
        if self.digits.is_empty() {
            return Err("there is nothing to draw".into());
        }
        if self.guidance.is_some_and(|g| !(0.0..=100.0).contains(&g)) {
            return Err("--guidance: expected 0 to 100".into());
        }
        let once: Vec<String> = self.digits.chars().map(String::from).collect();
        let total = once.len() * self.count as usize;
        // One process, one request: there is nobody to protect from a long one.
        config.engine.queue_digits_max = total.max(config.engine.queue_digits_max);
        let engine = Engine::new(config.engine);
        let seed = self
            .seed
            .unwrap_or_else(|| u64::from(getrandom::u32().unwrap_or_default()));
        let labels = once.iter().cycle().take(total).cloned().collect();
        let request = DrawRequest {
            model: self.model.clone(),
            labels,
            seed,
            steps: self.steps.map(|s| s as usize),
            guidance: self.guidance.map(|g| g as f32),
        };
        let plan = watched(&engine, engine.prepare(request)).await?;
        let info = plan.info().clone();
        let (size, channels) = (
            info.header.architecture.image_size,
            info.header.architecture.channels,
        );
        let mut drawing = plan.start()?;
        let mut cells = vec![Picture::black(size, size, channels); total];
        let bar = if total > 50 {
            bar(total as u64, DIGITS_BAR)
        } else {
            ProgressBar::hidden()
        };
        while let Some(digit) = drawing.next().await {
            let digit = digit?;
            cells[digit.index].pixels = digit.pixels;
            bar.inc(1);
        }
        bar.finish_and_clear();
        let grid = match self.layout.unwrap_or(if once.len() == 1 {
            Layout::Grid
        } else {
            Layout::Rows
        }) {
            Layout::Rows => Grid::with_columns(once.len(), total),
            Layout::Grid => Grid::square(total),
            Layout::Strip => Grid::with_columns(total, total),
        };
        eprintln!("drawn by {} {} with seed {seed}", info.name, info.version);
        let sheet = Sheet {
            grid,
            size,
            channels,
            scale: self.scale as usize,
        };
        Ok(encode_sheet(sheet, &cells))
    }
}

/// A bar on standard error, if that is a terminal.
fn bar(length: u64, template: &str) -> ProgressBar {
    let style =
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(length).with_style(style)
}

const BYTES_BAR: &str =
    "fetching weights {bar:30} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left";
const DIGITS_BAR: &str = "drawing {bar:30} {pos}/{len} digits, {per_sec}, {eta} left";

/// One bar at a time: the load's, then the digits'.
#[derive(Default)]
struct Show(Option<(&'static str, ProgressBar)>);

impl Show {
    fn at(&mut self, template: &'static str, length: u64, position: u64) {
        if self.0.as_ref().is_none_or(|(shown, _)| *shown != template) {
            self.end();
            self.0 = Some((template, bar(length, template)));
        }
        if let Some((_, bar)) = &self.0 {
            bar.set_position(position);
        }
    }

    fn end(&mut self) {
        if let Some((_, bar)) = self.0.take() {
            bar.finish_and_clear();
        }
    }
}

/// Waits for work that may load a model, and shows how far the load is.
async fn watched<T>(engine: &Engine, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    let mut shown: Option<ProgressBar> = None;
    loop {
        tokio::select! {
            result = &mut work => {
                if let Some(bar) = shown {
                    bar.finish_and_clear();
                }
                return result;
            }
            () = tokio::time::sleep(Duration::from_millis(100)) => {
                if let Some(status) = engine.loaded().into_iter().find(|m| m.state == ModelState::Loading && m.bytes_total > 0) {
                    shown.get_or_insert_with(|| bar(status.bytes_total, BYTES_BAR)).set_position(status.bytes_arrived);
                }
            }
        }
    }
}

fn write(output: &Path, bytes: &[u8]) -> Outcome {
    if output == Path::new("-") {
        return Ok(std::io::stdout().write_all(bytes)?);
    }
    std::fs::write(output, bytes)
        .map_err(|e| format!("cannot write `{}`: {e}", output.display()))?;
    if std::io::stderr().is_terminal() {
        eprintln!("wrote {}", output.display());
    }
    Ok(())
}

fn inspect(place: &str, config: Config) -> Outcome {
    quiet_log(&config);
    let header = if place == "built-in" {
        model::from_bytes(model::BUILT_IN)?.header
    } else {
        runtime()?.block_on(header(place_of(place)?, config))?
    };
    print_header(&header)?;
    Ok(())
}

/// A URI, or a path.
fn place_of(text: &str) -> Result<ModelUri, storage::InvalidUri> {
    if text.contains("://") {
        text.parse()
    } else {
        Ok(ModelUri::File(PathBuf::from(text)))
    }
}

/// The headers alone: the rest is not fetched.
async fn header(uri: ModelUri, config: Config) -> Result<Header, Box<dyn Error>> {
    let storage = storage::StorageConfig {
        cache_dir: None,
        sha256: None,
        first_bytes: 64 << 10,
        ..config.engine.storage
    };
    let mut opened = Storage::new(storage)
        .open(&uri, Arc::<Progress>::default())
        .await?;
    Ok(engine::headers(&mut opened).await?.0)
}

fn pack(files: &[PathBuf], chunk_mb: u64) -> Outcome {
    for path in files {
        let failed = |what: &str, path: &Path, e: std::io::Error| {
            format!("cannot {what} `{}`: {e}", path.display())
        };
        let file = std::fs::File::open(path).map_err(|e| failed("open", path, e))?;
        let size = file
            .metadata()
            .map_err(|e| failed("inspect", path, e))?
            .len();
        let bar = bar(
            size,
            "computing digests {bar:30} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left",
        );
        let manifest = storage::Manifest::of(bar.wrap_read(&file), chunk_mb << 20)
            .map_err(|e| failed("read", path, e))?;
        bar.finish_and_clear();
        let mut name = path.as_os_str().to_owned();
        name.push(storage::MANIFEST_SUFFIX);
        let output = PathBuf::from(name);
        let text = serde_json::to_string_pretty(&manifest)?;
        std::fs::write(&output, &text).map_err(|e| failed("write", &output, e))?;
        println!(
            "{}: {} chunks; MODEL_SHA256={}",
            output.display(),
            manifest.blake3.len(),
            storage::hex(&sha2::Sha256::digest(&text))
        );
    }
    Ok(())
}

/// How long connecting, and each read, may take; an engine's own time-out for the whole check is longer.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(2);

/// By hand and without a runtime: a container asks every few seconds, often on a fraction of a processor.
fn health(listen: SocketAddr) -> Outcome {
    let address = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => (Ipv4Addr::LOCALHOST, listen.port()).into(),
        IpAddr::V6(ip) if ip.is_unspecified() => (Ipv6Addr::LOCALHOST, listen.port()).into(),
        _ => listen,
    };
    let status = status_line(address).map_err(|e| format!("{address} does not answer: {e}"))?;
    match status.split(' ').nth(1) {
        Some("200") => Ok(()),
        _ => Err(format!("{address} answers `{}`", status.escape_debug()).into()),
    }
}

fn status_line(address: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, HEALTH_TIMEOUT)?;
    stream.set_read_timeout(Some(HEALTH_TIMEOUT))?;
    write!(
        stream,
        "GET /health/live HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n"
    )?;
    let mut line = String::new();
    // Whatever listens there, no more than a status line is read of it.
    BufReader::new(stream.take(256)).read_line(&mut line)?;
    Ok(line.trim_end().to_owned())
}

fn fetch(uri: Option<String>, output: Option<PathBuf>, config: Config) -> Outcome {
    quiet_log(&config);
    let uri = match (&uri, &config.engine.source) {
        (Some(text), _) => place_of(text)?,
        (None, Source::Uri(uri)) => uri.clone(),
        (None, _) => return Err("there is nothing to fetch: give a URI, or set MODEL_URI".into()),
    };
    if output.is_none() && config.engine.storage.cache_dir.is_none() {
        return Err(
            "there is nowhere to put the weights: give --output, or set MODEL_CACHE_DIR".into(),
        );
    }
    let mut engine = config.engine;
    if output.is_some() {
        engine.storage.cache_dir = None;
    }
    let progress = Arc::<Progress>::default();
    let work = engine::fetch_files(engine, uri, output, progress.clone());
    let what = runtime()?.block_on(async {
        tokio::pin!(work);
        let mut shown: Option<ProgressBar> = None;
        loop {
            tokio::select! {
                result = &mut work => break result,
                () = tokio::time::sleep(Duration::from_millis(100)) => {
                    if progress.total() > 0 {
                        shown.get_or_insert_with(|| bar(progress.total(), BYTES_BAR)).set_position(progress.arrived());
                    }
                }
            }
        }
    })?;
    println!("{what}");
    Ok(())
}

fn print_header(header: &Header) -> std::io::Result<()> {
    let a = &header.architecture;
    let mut out = std::io::stdout().lock();
    writeln!(out, "name        {}", header.name)?;
    writeln!(
        out,
        "classes     {} ({})",
        a.classes,
        header.class_names.join(", ")
    )?;
    writeln!(
        out,
        "pictures    {0} x {0}, {1} channel{2}",
        a.image_size,
        a.channels,
        if a.channels == 1 { "" } else { "s" }
    )?;
    writeln!(
        out,
        "network     DiT, {} blocks, width {}, {} heads, mlp {}, patch {} ({} tokens)",
        a.depth,
        a.width,
        a.heads,
        a.mlp_width,
        a.patch,
        a.tokens()
    )?;
    writeln!(
        out,
        "sampler     {} steps, guidance {}, shift {}",
        header.sampler.steps, header.sampler.guidance, header.sampler.shift
    )?;
    writeln!(out, "parameters  {}", header.parameters())?;
    writeln!(
        out,
        "file        {} bytes; in memory {} bytes",
        header.file_bytes(),
        header.resident_bytes()
    )?;
    for t in &header.tensors {
        writeln!(
            out,
            "  {:<24} {:<5} {:?}",
            t.name,
            t.dtype.to_string(),
            t.shape
        )?;
    }
    Ok(())
}
