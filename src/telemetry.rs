//! Logs: one JSON object a line in production, with the fields that Google Cloud Logging reads (severity,
//! message, time, trace); readable lines in development.

use serde_json::{Map, Value, json};
use std::fmt;
use std::io::IsTerminal as _;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime as Clock};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Json,
    Pretty,
}

#[derive(Clone, Debug)]
pub struct TelemetryConfig {
    pub format: LogFormat,
    /// As `EnvFilter` reads it.
    pub level: String,
    /// Google Cloud project that trace ids belong to.
    pub project: Option<String>,
}

/// Sends logs of the whole process to standard output (or, for commands whose output that is, to standard
/// error). A second call does nothing.
pub fn init(config: &TelemetryConfig, stderr: bool) {
    let filter = EnvFilter::new(&config.level);
    let writer = move || -> Box<dyn std::io::Write> {
        if stderr {
            Box::new(std::io::stderr())
        } else {
            Box::new(std::io::stdout())
        }
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer);
    let _ = match config.format {
        LogFormat::Pretty => {
            // Colours are for eyes: a file or a pipe gets none.
            let terminal = match stderr {
                true => std::io::stderr().is_terminal(),
                false => std::io::stdout().is_terminal(),
            };
            builder.with_target(false).with_ansi(terminal).try_init()
        }
        LogFormat::Json => {
            let fields = tracing_subscriber::fmt::format::JsonFields::new();
            builder
                .fmt_fields(fields)
                .event_format(CloudLogging {
                    project: config.project.clone(),
                })
                .try_init()
        }
    };
}

/// Events as Cloud Logging's structured logs.
struct CloudLogging {
    project: Option<String>,
}

impl<S, N> FormatEvent<S, N> for CloudLogging
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut time = String::new();
        Clock.format_time(&mut Writer::new(&mut time))?;
        let mut line = Map::new();
        line.insert(
            "severity".to_owned(),
            json!(severity(*event.metadata().level())),
        );
        line.insert("message".to_owned(), json!(""));
        line.insert("time".to_owned(), json!(time));
        line.insert("target".to_owned(), json!(event.metadata().target()));
        for span in context.event_scope().into_iter().flatten() {
            let extensions = span.extensions();
            // The fields are kept as the text of a JSON object, see `init`.
            if let Some(fields) = extensions.get::<tracing_subscriber::fmt::FormattedFields<N>>()
                && let Ok(Value::Object(fields)) = serde_json::from_str(&fields.fields)
            {
                line.extend(fields);
            }
        }
        event.record(&mut Fields(&mut line));
        if let Some(Value::String(trace)) = line.remove("trace") {
            let name = self.project.as_ref().map_or(trace.clone(), |project| {
                format!("projects/{project}/traces/{trace}")
            });
            line.insert("logging.googleapis.com/trace".to_owned(), json!(name));
        }
        let text = serde_json::to_string(&line).map_err(|_| fmt::Error)?;
        writeln!(writer, "{text}")
    }
}

fn severity(level: Level) -> &'static str {
    match level {
        Level::ERROR => "ERROR",
        Level::WARN => "WARNING",
        Level::INFO => "INFO",
        Level::DEBUG | Level::TRACE => "DEBUG",
    }
}

/// Writes an event's fields into a JSON object. Strings are escaped there, so a field cannot forge a line.
struct Fields<'a>(&'a mut Map<String, Value>);

impl Fields<'_> {
    fn put(&mut self, field: &Field, value: Value) {
        self.0.insert(field.name().to_owned(), value);
    }
}

impl Visit for Fields<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, json!(value));
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, json!(value));
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, json!(value));
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, json!(value));
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, json!(value));
    }
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, json!(format!("{value:?}")));
    }
}

/// An error with its causes, for the log.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // A transparent error repeats its cause.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
