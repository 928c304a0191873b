//! The environment, read once and checked as a whole: every bad value is reported, by name, at the same time.

use crate::engine::{EngineConfig, Source};
use crate::model::{DeviceKind, threads_available};
use crate::server::{ApiKeys, ServerConfig};
use crate::storage::{self, ModelName, ModelUri, Place, StorageConfig};
use crate::telemetry::{LogFormat, TelemetryConfig};
use serde::Deserialize;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// One environment variable, as `--help` and the README list it.
pub struct Variable {
    pub name: &'static str,
    pub default: &'static str,
    pub meaning: &'static str,
}

const fn variable(name: &'static str, default: &'static str, meaning: &'static str) -> Variable {
    Variable {
        name,
        default,
        meaning,
    }
}

/// Every variable that the service reads, providers' own credentials and endpoints excepted.
pub const VARIABLES: &[Variable] = &[
    variable("PORT", "5000", "port to listen on; 0: any free one"),
    variable("HOST", "0.0.0.0", "address to listen on"),
    variable(
        "APP_ENV",
        "production",
        "production (JSON logs) or development (readable logs); FLASK_ENV is read where it is not set",
    ),
    variable(
        "LOG_LEVEL",
        "info",
        "error, warn, info, debug or trace, or filters such as info,image_generator=debug",
    ),
    variable(
        "DEVICE",
        "cpu",
        "cpu, cuda, metal (or mps), or auto; cuda and metal need a binary built for them",
    ),
    variable(
        "MODEL_PATH",
        "",
        "weights file, or folder that holds one; an empty or absent folder is passed over",
    ),
    variable(
        "MODEL_URI",
        "",
        "where weights are otherwise: s3://, gs://, az://, https://, hf:// or file://; with a / at its end, a folder of models by name; without it, the built-in ones",
    ),
    variable(
        "MODEL_DEFAULT",
        "",
        "of a folder of models, the one that a request without a name gets",
    ),
    variable(
        "MODEL_SHA256",
        "",
        "SHA-256 that the weights, or their .chunks.json, must have; without it, a .sha256 or .chunks.json beside them says",
    ),
    variable(
        "MODEL_PRELOAD",
        "false",
        "true: the load begins at start, and the port is open meanwhile",
    ),
    variable(
        "MODEL_IDLE_UNLOAD_SECS",
        "",
        "how long a model may be unused before it leaves memory; without it, until others need the room",
    ),
    variable(
        "MODEL_CACHE_DIR",
        "",
        "folder for fetched weights, kept for the next start; without it nothing is written to disk",
    ),
    variable(
        "MODEL_CACHE_MAX_MB",
        "10240",
        "what that folder may hold; models used longest ago leave first",
    ),
    variable(
        "MODEL_CACHE_IN_MEMORY",
        "false",
        "true: the folder is used even if its file system is memory, as Cloud Run's is",
    ),
    variable(
        "MAX_MEMORY_MB",
        "",
        "memory that the process may take; weights that would not fit are refused. Without it, the container's limit",
    ),
    variable(
        "LOAD_TIMEOUT_SECS",
        "240",
        "how long one load of the weights may take in all",
    ),
    variable(
        "STALL_TIMEOUT_SECS",
        "10",
        "how long a store may send nothing before a request to it is made again",
    ),
    variable(
        "RANGE_MB",
        "8",
        "largest range that one request to a store asks for",
    ),
    variable(
        "RANGE_CONCURRENCY",
        "64",
        "ranged requests to a store at a time",
    ),
    variable(
        "THREADS",
        "",
        "threads that compute on a CPU, 1 to 256. Without it, the processors that the container may use",
    ),
    variable(
        "BATCH_ROWS",
        "32",
        "rows that the network computes at once; a digit with guidance takes two",
    ),
    variable(
        "QUEUE_DIGITS",
        "4096",
        "digits that may wait in all; what is beyond gets 503",
    ),
    variable("MAX_DIGITS", "1000", "digits that one request may ask for"),
    variable("MAX_STEPS", "64", "steps that one request may ask for"),
    variable("MAX_BODY_BYTES", "65536", "size of a request's body"),
    variable(
        "MAX_CONNECTIONS",
        "2048",
        "connections at a time; further ones wait to be accepted",
    ),
    variable(
        "MAX_REQUESTS",
        "1024",
        "requests for digits that may be open at a time, those that wait for a cold model included; further ones get 503",
    ),
    variable(
        "RATE_LIMIT_PER_MINUTE",
        "",
        "requests to /v1 that one client may make in a minute; further ones get 429",
    ),
    variable(
        "TRUSTED_PROXIES",
        "0",
        "proxies in front that each append to X-Forwarded-For; the client is the so-manieth from the right. Cloud Run: 1",
    ),
    variable(
        "API_KEYS",
        "",
        "keys, separated by commas, one of which every request to /v1 and /metrics must carry",
    ),
    variable(
        "CORS_ORIGINS",
        "",
        "origins, separated by commas, whose web pages may ask, such as https://app.example; *: all",
    ),
    variable(
        "HEADER_TIMEOUT_SECS",
        "30",
        "how long a request's head, or its body, may take to arrive, and how long a client may take nothing of its answer",
    ),
    variable(
        "REQUEST_TIMEOUT_SECS",
        "300",
        "how long an answer may take, the load of a cold model included",
    ),
    variable(
        "DRAIN_SECS",
        "8",
        "how long open requests may go on after SIGTERM",
    ),
    variable(
        "IDLE_EXIT_SECS",
        "",
        "how long there may be no request, probes left aside, before the process ends by itself; for systemd sockets",
    ),
    variable(
        "GOOGLE_CLOUD_PROJECT",
        "",
        "project that trace ids in the log belong to",
    ),
];

/// The environment as it is: text, or nothing.
#[derive(Deserialize)]
struct Raw {
    port: Option<String>,
    host: Option<String>,
    app_env: Option<String>,
    flask_env: Option<String>,
    log_level: Option<String>,
    device: Option<String>,
    model_path: Option<String>,
    model_uri: Option<String>,
    model_default: Option<String>,
    model_sha256: Option<String>,
    model_preload: Option<String>,
    model_idle_unload_secs: Option<String>,
    model_cache_dir: Option<String>,
    model_cache_max_mb: Option<String>,
    model_cache_in_memory: Option<String>,
    max_memory_mb: Option<String>,
    load_timeout_secs: Option<String>,
    stall_timeout_secs: Option<String>,
    range_mb: Option<String>,
    range_concurrency: Option<String>,
    threads: Option<String>,
    batch_rows: Option<String>,
    queue_digits: Option<String>,
    max_digits: Option<String>,
    max_steps: Option<String>,
    max_body_bytes: Option<String>,
    max_connections: Option<String>,
    max_requests: Option<String>,
    rate_limit_per_minute: Option<String>,
    trusted_proxies: Option<String>,
    api_keys: Option<String>,
    cors_origins: Option<String>,
    header_timeout_secs: Option<String>,
    request_timeout_secs: Option<String>,
    drain_secs: Option<String>,
    idle_exit_secs: Option<String>,
    google_cloud_project: Option<String>,
}

/// A checked configuration, one part a layer.
#[derive(Clone, Debug)]
pub struct Config {
    pub listen: SocketAddr,
    pub telemetry: TelemetryConfig,
    pub engine: EngineConfig,
    pub server: ServerConfig,
    /// Whether the load begins at start.
    pub preload: bool,
    /// What is legal, and yet may not be what was meant.
    pub warnings: Vec<String>,
}

/// Everything that is wrong with the environment.
#[derive(Debug, thiserror::Error)]
#[error("the environment is not usable:\n{}", .0.iter().map(|p| format!("  {p}")).collect::<Vec<_>>().join("\n"))]
pub struct InvalidConfig(pub Vec<String>);

impl Config {
    /// Reads the process's environment.
    ///
    /// # Errors
    /// [`InvalidConfig`] with every problem there is.
    pub fn from_env() -> Result<Self, InvalidConfig> {
        // Not `std::env::vars`, which panics at a name or value that is no UTF-8, whosever it is.
        Self::from_vars(std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        }))
    }

    /// Reads the given variables.
    ///
    /// # Errors
    /// [`InvalidConfig`] with every problem there is.
    pub fn from_vars(
        vars: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, InvalidConfig> {
        // Deploy files tend to set a variable to nothing where they mean to leave it out.
        let vars = vars
            .into_iter()
            .filter(|(_, value)| !value.trim().is_empty());
        let raw: Raw = envy::from_iter(vars).map_err(|e| InvalidConfig(vec![e.to_string()]))?;
        let mut check = Check::default();
        let config = build(raw, &mut check);
        if check.problems.is_empty() {
            Ok(config)
        } else {
            Err(InvalidConfig(check.problems))
        }
    }
}

/// Collects problems, so that one bad value does not hide another.
#[derive(Default)]
struct Check {
    problems: Vec<String>,
}

impl Check {
    fn problem(&mut self, name: &str, value: &str, expected: &str) {
        self.problems.push(format!(
            "{name} is `{}`, expected {expected}",
            value.escape_debug()
        ));
    }

    /// A number in a range, or the default that the table of variables states.
    fn number<T: FromStr + PartialOrd + std::fmt::Display + Copy>(
        &mut self,
        name: &str,
        value: Option<String>,
        low: T,
        high: T,
    ) -> T {
        let default = VARIABLES
            .iter()
            .find(|v| v.name == name)
            .and_then(|v| v.default.parse().ok())
            .unwrap_or(low);
        self.optional_number(name, value, low, high)
            .unwrap_or(default)
    }

    fn optional_number<T: FromStr + PartialOrd + std::fmt::Display + Copy>(
        &mut self,
        name: &str,
        value: Option<String>,
        low: T,
        high: T,
    ) -> Option<T> {
        let value = value?;
        match value
            .trim()
            .parse()
            .ok()
            .filter(|n| (low..=high).contains(n))
        {
            Some(number) => Some(number),
            None => {
                self.problem(
                    name,
                    &value,
                    &format!("a whole number from {low} to {high}"),
                );
                None
            }
        }
    }

    fn flag(&mut self, name: &str, value: Option<String>) -> bool {
        self.parsed(name, value, "true or false", |t| match t {
            "true" | "1" => Some(true),
            "false" | "0" => Some(false),
            _ => None,
        })
        .unwrap_or_default()
    }

    fn seconds(&mut self, name: &str, value: Option<String>, low: u64, high: u64) -> Duration {
        Duration::from_secs(self.number(name, value, low, high))
    }

    fn parsed<T>(
        &mut self,
        name: &str,
        value: Option<String>,
        expected: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let value = value?;
        let parsed = parse(value.trim());
        if parsed.is_none() {
            self.problem(name, &value, expected);
        }
        parsed
    }
}

fn build(raw: Raw, check: &mut Check) -> Config {
    let mut warnings = Vec::new();
    let port = check.number("PORT", raw.port, 0, u16::MAX);
    let host = check.parsed(
        "HOST",
        raw.host,
        "an IP address, such as 0.0.0.0 or ::",
        |t| {
            if t == "localhost" {
                Some([127, 0, 0, 1].into())
            } else {
                t.parse::<IpAddr>().ok()
            }
        },
    );
    let device = check
        .parsed("DEVICE", raw.device, "cpu, cuda, metal, mps or auto", |t| {
            t.parse::<DeviceKind>().ok()
        })
        .unwrap_or(DeviceKind::Cpu);
    if !device.compiled_in() {
        check.problems.push(format!("DEVICE is `{device}`, but this binary was built without it: build with `cargo build --release --features {device}`"));
    }
    let storage = StorageConfig {
        cache_dir: raw.model_cache_dir.map(PathBuf::from),
        cache_bytes_max: check.number::<u64>(
            "MODEL_CACHE_MAX_MB",
            raw.model_cache_max_mb,
            1,
            1 << 30,
        ) << 20,
        cache_in_memory: check.flag("MODEL_CACHE_IN_MEMORY", raw.model_cache_in_memory),
        sha256: check.parsed(
            "MODEL_SHA256",
            raw.model_sha256,
            "64 hexadecimal digits",
            storage::parse_digest,
        ),
        range_bytes: check.number::<u64>("RANGE_MB", raw.range_mb, 1, 1024) << 20,
        range_concurrency: check.number("RANGE_CONCURRENCY", raw.range_concurrency, 1, 256),
        stall_timeout: check.seconds("STALL_TIMEOUT_SECS", raw.stall_timeout_secs, 1, 600),
        ..StorageConfig::default()
    };
    let source = source(raw.model_path, raw.model_uri, check, &mut warnings);
    if source == Source::BuiltIn && storage.sha256.is_some() && check.problems.is_empty() {
        check.problems.push("MODEL_SHA256 is set, but neither MODEL_PATH nor MODEL_URI leads to weights that it could belong to".to_owned());
    }
    let default_model = check.parsed(
        "MODEL_DEFAULT",
        raw.model_default,
        "the name of a model",
        |t| t.parse::<ModelName>().ok().map(|name| name.to_string()),
    );
    if default_model.is_some() && !matches!(source, Source::Catalogue(_)) {
        warnings.push("MODEL_DEFAULT is set, but MODEL_URI names no folder of models (it would end in /); it is passed over".to_owned());
    }
    if storage.sha256.is_some() && matches!(source, Source::Catalogue(_)) {
        check.problems.push("MODEL_SHA256 is set, but MODEL_URI names a folder of models, which have a digest each: let a .sha256 or .chunks.json lie beside them".to_owned());
    }
    let engine = EngineConfig {
        source,
        default_model,
        idle_unload: check
            .optional_number::<u64>(
                "MODEL_IDLE_UNLOAD_SECS",
                raw.model_idle_unload_secs,
                1,
                1 << 30,
            )
            .map(Duration::from_secs),
        storage,
        device,
        memory_bytes_max: check
            .optional_number::<u64>("MAX_MEMORY_MB", raw.max_memory_mb, 1, 1 << 24)
            .map(|mb| mb << 20),
        load_timeout: check.seconds("LOAD_TIMEOUT_SECS", raw.load_timeout_secs, 1, 86_400),
        threads: check
            .optional_number("THREADS", raw.threads, 1, 256)
            .unwrap_or_else(threads_available),
        batch_rows_max: check.number("BATCH_ROWS", raw.batch_rows, 2, 4096),
        queue_digits_max: check.number("QUEUE_DIGITS", raw.queue_digits, 1, 1_000_000),
    };
    let server = ServerConfig {
        digits_max: check.number("MAX_DIGITS", raw.max_digits, 1, 100_000),
        steps_max: check.number("MAX_STEPS", raw.max_steps, 1, 1000),
        body_bytes_max: check.number("MAX_BODY_BYTES", raw.max_body_bytes, 64, 16 << 20),
        connections_max: check.number("MAX_CONNECTIONS", raw.max_connections, 1, 1_000_000),
        header_timeout: check.seconds("HEADER_TIMEOUT_SECS", raw.header_timeout_secs, 1, 3600),
        request_timeout: check.seconds("REQUEST_TIMEOUT_SECS", raw.request_timeout_secs, 1, 86_400),
        drain: check.seconds("DRAIN_SECS", raw.drain_secs, 0, 3600),
        requests_max: check.number("MAX_REQUESTS", raw.max_requests, 1, 1_000_000),
        rate_per_minute: check.optional_number(
            "RATE_LIMIT_PER_MINUTE",
            raw.rate_limit_per_minute,
            1,
            1_000_000,
        ),
        trusted_proxies: check.number("TRUSTED_PROXIES", raw.trusted_proxies, 0, 100),
        api_keys: api_keys(raw.api_keys, check),
        cors_origins: cors_origins(raw.cors_origins, check),
        idle_exit: check
            .optional_number("IDLE_EXIT_SECS", raw.idle_exit_secs, 1, 1 << 30)
            .map(Duration::from_secs),
        memory_bytes_max: engine.memory_bytes_max,
    };
    if server.digits_max > engine.queue_digits_max {
        check.problems.push(format!("MAX_DIGITS is {}, which is more than QUEUE_DIGITS, {}: such a request could never be drawn", server.digits_max, engine.queue_digits_max));
    }
    let telemetry = telemetry(
        raw.app_env,
        raw.flask_env,
        raw.log_level,
        raw.google_cloud_project,
        check,
    );
    Config {
        listen: SocketAddr::new(host.unwrap_or([0, 0, 0, 0].into()), port),
        telemetry,
        engine,
        server,
        preload: check.flag("MODEL_PRELOAD", raw.model_preload),
        warnings,
    }
}

/// A problem with a key does not repeat it.
fn api_keys(text: Option<String>, check: &mut Check) -> ApiKeys {
    let text = text.unwrap_or_default();
    let keys: Vec<&str> = text.split(',').map(str::trim).collect();
    let keys: Vec<&str> = keys.into_iter().filter(|k| !k.is_empty()).collect();
    let usable = |key: &&str| key.len() >= 8 && key.bytes().all(|b| b.is_ascii_graphic());
    if !keys.iter().all(usable) || (keys.is_empty() && !text.is_empty()) {
        check
            .problems
            .push("API_KEYS has a key that is not 8 or more visible ASCII characters".to_owned());
    }
    ApiKeys::new(keys)
}

fn cors_origins(text: Option<String>, check: &mut Check) -> Vec<String> {
    let text = text.unwrap_or_default();
    let origins = text.split(',').map(|o| o.trim().trim_end_matches('/'));
    let origins: Vec<String> = origins
        .filter(|o| !o.is_empty())
        .map(str::to_owned)
        .collect();
    for origin in &origins {
        let exact =
            url::Url::parse(origin).is_ok_and(|u| u.origin().ascii_serialization() == *origin);
        if origin != "*" && !exact {
            check.problem(
                "CORS_ORIGINS",
                origin,
                "an origin, such as https://app.example",
            );
        }
    }
    origins
}

/// MODEL_PATH if it holds weights, else MODEL_URI, else the built-in weights.
fn source(
    path: Option<String>,
    uri: Option<String>,
    check: &mut Check,
    warnings: &mut Vec<String>,
) -> Source {
    let uri = uri.and_then(|text| {
        let parsed = text.trim().parse::<Place>();
        if let Err(error) = &parsed {
            check.problems.push(format!("MODEL_URI: {error}"));
        }
        parsed.ok()
    });
    let otherwise = match uri {
        None => Source::BuiltIn,
        Some(Place::Model(uri)) => Source::Uri(uri),
        Some(Place::Catalogue(catalogue)) => Source::Catalogue(catalogue),
    };
    let Some(path) = path.map(PathBuf::from) else {
        return otherwise;
    };
    if storage::holds_weights(&path) {
        return Source::Uri(ModelUri::File(path));
    }
    let shown = path.display();
    if otherwise == Source::BuiltIn && path.extension().is_some_and(|e| e == "safetensors") {
        check
            .problems
            .push(format!("MODEL_PATH is `{shown}`, which does not exist"));
    } else {
        // An image names a folder for a volume that may or may not be mounted.
        warnings.push(format!(
            "MODEL_PATH `{shown}` holds no weights; {} is used",
            if otherwise == Source::BuiltIn {
                "the built-in model"
            } else {
                "MODEL_URI"
            }
        ));
    }
    otherwise
}

fn telemetry(
    app_env: Option<String>,
    flask_env: Option<String>,
    level: Option<String>,
    project: Option<String>,
    check: &mut Check,
) -> TelemetryConfig {
    let (name, value) = if app_env.is_some() {
        ("APP_ENV", app_env)
    } else {
        ("FLASK_ENV", flask_env)
    };
    let format = check.parsed(name, value, "production or development", |t| match t {
        "production" => Some(LogFormat::Json),
        "development" => Some(LogFormat::Pretty),
        _ => None,
    });
    let level = level.unwrap_or_else(|| "info".to_owned());
    if tracing_subscriber::EnvFilter::try_new(&level).is_err()
        || level
            .split(',')
            .any(|l| !l.contains('=') && l.parse::<tracing::level_filters::LevelFilter>().is_err())
    {
        check.problem(
            "LOG_LEVEL",
            &level,
            "error, warn, info, debug or trace, or filters such as info,image_generator=debug",
        );
    }
    TelemetryConfig {
        format: format.unwrap_or(LogFormat::Json),
        level,
        project,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(vars: &[(&str, &str)]) -> Result<Config, Vec<String>> {
        Config::from_vars(vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())))
            .map_err(|e| e.0)
    }

    #[test]
    fn an_empty_environment_is_enough() {
        let config = config(&[]).unwrap();
        assert_eq!(config.listen, "0.0.0.0:5000".parse().unwrap());
        assert_eq!(config.engine.source, Source::BuiltIn);
        assert_eq!(config.telemetry.format, LogFormat::Json);
        assert_eq!(config.server.digits_max, 1000);
    }

    #[test]
    fn every_bad_value_is_reported_at_once() {
        let problems = config(&[
            ("PORT", "70000"),
            ("HOST", "nowhere"),
            ("DEVICE", "tpu"),
            ("MAX_MEMORY_MB", "lots"),
            ("MODEL_URI", "ftp://host/file"),
            ("MODEL_SHA256", "abc"),
            ("APP_ENV", "staging"),
            ("LOG_LEVEL", "loud"),
            ("DRAIN_SECS", "-1"),
            ("API_KEYS", "long-enough,sh ort"),
            ("CORS_ORIGINS", "https://a.example,b.example/path"),
        ])
        .unwrap_err();
        let text = problems.join("\n");
        for name in [
            "PORT",
            "HOST",
            "DEVICE",
            "MAX_MEMORY_MB",
            "MODEL_URI",
            "MODEL_SHA256",
            "APP_ENV",
            "LOG_LEVEL",
            "DRAIN_SECS",
            "API_KEYS",
            "CORS_ORIGINS",
        ] {
            assert!(
                problems.iter().any(|p| p.starts_with(name)),
                "{name} is missing in\n{text}"
            );
        }
        assert_eq!(problems.len(), 11, "{text}");
        assert!(!text.contains("sh ort"), "a key is shown: {text}");
    }

    #[test]
    fn contradictions_are_reported() {
        let problems = config(&[("MODEL_SHA256", &"0".repeat(64))]).unwrap_err();
        assert!(problems[0].contains("MODEL_URI"), "{problems:?}");
        let problems = config(&[("MAX_DIGITS", "100"), ("QUEUE_DIGITS", "10")]).unwrap_err();
        assert!(problems[0].contains("QUEUE_DIGITS"), "{problems:?}");
        let problems = config(&[("MODEL_PATH", "/nonexistent/model.safetensors")]).unwrap_err();
        assert!(problems[0].contains("MODEL_PATH"), "{problems:?}");
    }

    #[test]
    fn flask_env_is_the_older_name() {
        assert_eq!(
            config(&[("FLASK_ENV", "development")])
                .unwrap()
                .telemetry
                .format,
            LogFormat::Pretty
        );
        assert_eq!(
            config(&[("FLASK_ENV", "development"), ("APP_ENV", "production")])
                .unwrap()
                .telemetry
                .format,
            LogFormat::Json
        );
    }

    #[test]
    fn an_unmounted_folder_is_passed_over_with_a_warning() {
        let found = config(&[
            ("MODEL_PATH", "/nonexistent/models"),
            ("MODEL_URI", "s3://b/k"),
        ])
        .unwrap();
        assert_eq!(
            found.engine.source,
            Source::Uri("s3://b/k".parse().unwrap())
        );
        assert_eq!(found.warnings.len(), 1);
        assert_eq!(config(&[("MODEL_PATH", "")]).unwrap().warnings.len(), 0);
    }

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn a_device_that_was_not_compiled_in_is_refused_in_words() {
        let problems = config(&[("DEVICE", "cuda")]).unwrap_err();
        assert!(problems[0].contains("--features cuda"), "{problems:?}");
    }

    #[test]
    fn the_readme_lists_every_variable() {
        let readme = include_str!("../README.md");
        for v in VARIABLES {
            let default = if v.default.is_empty() {
                "none".to_owned()
            } else {
                format!("`{}`", v.default)
            };
            let row = format!("| `{}` | {default} | {} |", v.name, v.meaning);
            assert!(readme.contains(&row), "the README lacks: {row}");
        }
    }
}
