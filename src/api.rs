//! What travels over HTTP: the bodies that the server reads and writes and the client writes and reads.

use serde::{Deserialize, Serialize};

/// Body of `POST /v1/generate`. Every field may be left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerateRequest {
    /// What to draw, in order. Default: "0123456789".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digits: Option<Digits>,
    /// How often the whole sequence is drawn. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
    /// Seed of the first digit; each next one has the next number. Default: a random one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Steps from noise to digit: fewer are faster, more are finer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Classifier-free guidance: 1 is none, more is closer to the class and less varied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guidance: Option<f64>,
    /// Each pixel becomes a square of this many pixels. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<Layout>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}

/// A text with a label a character, or a list of labels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a text of digits such as \"2026\", or a list of labels"
)]
pub enum Digits {
    Text(String),
    List(Vec<LabelText>),
}

/// A label by index or by class name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a label: a whole number, or a class name"
)]
pub enum LabelText {
    Index(u64),
    Name(String),
}

/// How a sheet is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// A row for each repetition of `digits`. The default where `digits` has more than one label.
    Rows,
    /// As square as can be. The default for one label.
    Grid,
    /// All in one row.
    Strip,
}

impl std::str::FromStr for Layout {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "rows" => Ok(Self::Rows),
            "grid" => Ok(Self::Grid),
            "strip" => Ok(Self::Strip),
            _ => Err("expected rows, grid or strip".to_owned()),
        }
    }
}

/// Body of every error (RFC 9457, `application/problem+json`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Problem {
    #[serde(rename = "type")]
    pub kind: String,
    pub title: String,
    pub status: u16,
    pub detail: String,
    pub request_id: String,
    /// The fields at fault, by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldError {
    pub field: String,
    pub detail: String,
}

/// One record of a streamed answer (`application/x-ndjson`: a line; `text/event-stream`: an event of its type's name).
///
/// A stream begins with `queued`, at once, and ends with `done` or `error`. One that ends without either was cut.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Record {
    /// The request is valid as far as that can be said without the model. Sent again now and then while it waits.
    Queued {
        request_id: String,
        /// Digits that will be drawn.
        digits: u64,
        /// Seed of the first digit.
        seed: u64,
        /// Digits of all requests that wait or are being drawn.
        waiting: u64,
        /// How the digits lie in a sheet.
        columns: u64,
        rows: u64,
    },
    /// The model is being loaded.
    Loading {
        model: String,
        bytes_arrived: u64,
        /// 0 while unknown.
        bytes_total: u64,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seconds_left: Option<u64>,
    },
    /// The model is there, and the digits are in the queue.
    Started {
        model: String,
        model_version: String,
        image_size: u64,
        channels: u64,
        steps: u64,
        guidance: f32,
    },
    /// What a digit is heading for. One that came too fast for the reader is left out.
    Preview {
        index: u64,
        /// Steps taken, from 1.
        step: u64,
        steps: u64,
        /// A PNG file at scale 1, as base64.
        png: String,
    },
    /// A digit that is done. They come in order of completion.
    Digit {
        index: u64,
        label: String,
        seed: u64,
        /// A PNG file, as base64.
        png: String,
    },
    /// All digits have been sent.
    Done {
        digits: u64,
        seed: u64,
        model: String,
        model_version: String,
        /// Milliseconds by what they were spent on, as in Server-Timing.
        timing: std::collections::BTreeMap<String, f64>,
    },
    /// Nothing more will come.
    Error {
        problem: Problem,
        /// Seconds after which another try makes sense.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        retry_after: Option<u64>,
    },
}

impl Record {
    /// The `type` field.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Queued { .. } => "queued",
            Self::Loading { .. } => "loading",
            Self::Started { .. } => "started",
            Self::Preview { .. } => "preview",
            Self::Digit { .. } => "digit",
            Self::Done { .. } => "done",
            Self::Error { .. } => "error",
        }
    }
}

/// Body of `GET /v1/models`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Models {
    pub models: Vec<ModelEntry>,
}

/// What a model is and what it is doing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelEntry {
    pub name: String,
    /// `cold`, `loading` or `ready`.
    pub state: String,
    /// Where the weights come from, without secrets.
    pub source: String,
    pub bytes_arrived: u64,
    /// 0 while unknown.
    pub bytes_total: u64,
    /// While it is loading: until the rest has arrived, at the speed so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds_left: Option<u64>,
    /// Why the last load failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Once it is ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<ReadyModel>,
}

/// What is known of a model once it is loaded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReadyModel {
    pub version: String,
    pub classes: Vec<String>,
    pub image_size: usize,
    pub channels: usize,
    pub parameters: u64,
    pub device: String,
    /// `built-in`, `file`, `cache` or `store`.
    pub origin: String,
    /// `sha256`, `chunks`, or `length` where nobody gave a digest.
    pub verified: String,
    pub default_steps: usize,
    pub default_guidance: f32,
}

/// Body of the health routes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    pub status: String,
    /// `cold`, `loading` or `ready`.
    pub model: String,
}

/// Response headers that say what was drawn, so that it can be drawn again.
pub mod headers {
    pub const SEED: &str = "x-seed";
    pub const MODEL: &str = "x-model";
    pub const MODEL_VERSION: &str = "x-model-version";
    pub const REQUEST_ID: &str = "x-request-id";
    /// Of a part of `multipart/mixed`: the digit's place in the request.
    pub const INDEX: &str = "x-index";
    /// Of a part of `multipart/mixed`: the class's name, percent-encoded.
    pub const LABEL: &str = "x-label";
}
