//! Errors as answers (RFC 9457). Each status code is chosen here, once; the client reads what it can act on,
//! the log reads the cause.

use super::body::Body;
use crate::api::{FieldError, Problem};
use crate::engine::{EngineError, LoadError};
use crate::storage::StorageError;
use http::{HeaderValue, Response, StatusCode, header};
use std::time::Duration;

/// What went wrong, before it is an answer.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) status: StatusCode,
    /// Last part of the problem's type.
    kind: &'static str,
    title: &'static str,
    detail: Box<str>,
    errors: Vec<FieldError>,
    retry_after: Option<Duration>,
    /// Methods that the route knows.
    allow: Option<&'static str>,
    /// Whether a key would help.
    challenge: bool,
    /// The preference that was kept to (RFC 7240).
    wait_secs: Option<u32>,
}

impl Failure {
    fn new(
        status: StatusCode,
        kind: &'static str,
        title: &'static str,
        detail: impl Into<String>,
    ) -> Self {
        Self {
            status,
            kind,
            title,
            detail: detail.into().into_boxed_str(),
            errors: Vec::new(),
            retry_after: None,
            allow: None,
            challenge: false,
            wait_secs: None,
        }
    }

    /// One or more parameters that cannot be used.
    pub(super) fn invalid(errors: Vec<FieldError>) -> Self {
        let detail = errors
            .iter()
            .map(|e| format!("{}: {}", e.field, e.detail))
            .collect::<Vec<_>>()
            .join("; ");
        Self {
            errors,
            ..Self::new(
                StatusCode::BAD_REQUEST,
                "invalid-parameter",
                "A parameter is not valid",
                detail,
            )
        }
    }

    pub(super) fn field(field: &str, detail: impl Into<String>) -> Self {
        Self::invalid(vec![FieldError {
            field: field.to_owned(),
            detail: detail.into(),
        }])
    }

    pub(super) fn not_found(path: &str) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "not-found",
            "There is nothing here",
            format!("no route has the path `{}`", shown(path)),
        )
    }

    pub(super) fn method(allow: &'static str) -> Self {
        Self {
            allow: Some(allow),
            ..Self::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "method-not-allowed",
                "The route does not know this method",
                format!("allowed: {allow}"),
            )
        }
    }

    pub(super) fn not_acceptable(there_are: &[&str]) -> Self {
        Self::new(
            StatusCode::NOT_ACCEPTABLE,
            "not-acceptable",
            "No form of the answer is acceptable",
            format!("Accept: there are {}", there_are.join(", ")),
        )
    }

    pub(super) fn unauthorized() -> Self {
        Self {
            challenge: true,
            ..Self::new(
                StatusCode::UNAUTHORIZED,
                "unauthorized",
                "A key is needed",
                "send one of the service's keys, as `Authorization: Bearer KEY` or `X-API-Key: KEY`",
            )
        }
    }

    pub(super) fn rate_limited(per_minute: u32, after: Duration) -> Self {
        Self {
            retry_after: Some(after),
            ..Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                "rate-limited",
                "Too many requests",
                format!("at most {per_minute} requests a minute are answered for each client"),
            )
        }
    }

    pub(super) fn busy(requests_max: usize, after: Duration) -> Self {
        Self {
            retry_after: Some(after),
            ..Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "busy",
                "Too many requests are waiting",
                format!("{requests_max} requests for digits are open, which is all there may be"),
            )
        }
    }

    /// The client did not want to wait any longer.
    pub(super) fn preferred_wait(waited: Duration, after: Duration) -> Self {
        Self {
            retry_after: Some(after),
            wait_secs: Some(u32::try_from(waited.as_secs()).unwrap_or(u32::MAX)),
            ..Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "wait-over",
                "The answer is not there yet",
                format!(
                    "no answer within the {} s of Prefer: wait; the model is still being loaded, or others are before",
                    waited.as_secs()
                ),
            )
        }
    }

    pub(super) fn media_type() -> Self {
        let detail = "Content-Type: expected application/json";
        Self {
            errors: vec![FieldError {
                field: "Content-Type".to_owned(),
                detail: "expected application/json".to_owned(),
            }],
            ..Self::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "unsupported-media-type",
                "The body is no JSON",
                detail,
            )
        }
    }

    pub(super) fn too_large(bytes_max: usize) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "body-too-large",
            "The body is too large",
            format!("body: at most {bytes_max} bytes are read"),
        )
    }

    pub(super) fn body_timeout() -> Self {
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "body-timeout",
            "The body took too long to arrive",
            "body: it did not arrive in time",
        )
    }

    pub(super) fn body_broken() -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "body-broken",
            "The body could not be read",
            "body: it ended before it was complete",
        )
    }

    pub(super) fn request_timeout(after: Duration) -> Self {
        let detail = format!(
            "no answer within {} s; a model that was loading goes on while anyone waits for it",
            after.as_secs()
        );
        Self {
            retry_after: Some(Duration::from_secs(5)),
            ..Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "request-timeout",
                "The answer took too long",
                detail,
            )
        }
    }

    pub(super) fn panicked() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "A bug",
            "the request met a bug; its id is in the log",
        )
    }

    /// As a stream's last record says it.
    pub(super) fn problem(&self, request_id: &str) -> Problem {
        Problem {
            kind: format!("urn:image-generator:problem:{}", self.kind),
            title: self.title.to_owned(),
            status: self.status.as_u16(),
            detail: self.detail.to_string(),
            request_id: request_id.to_owned(),
            errors: self.errors.clone(),
        }
    }

    /// What was refused, as metrics name it; none for what was answered with an error of the server's own.
    pub(super) fn kind(&self) -> &'static str {
        self.kind
    }

    pub(super) fn retry_after_secs(&self) -> Option<u64> {
        // A client that comes back at once is no help to anyone.
        self.retry_after
            .map(|after| (after.as_secs_f64().ceil() as u64).max(1))
    }

    /// The answer.
    pub(super) fn into_response(self, request_id: &str) -> Response<Body> {
        let problem = self.problem(request_id);
        let body = serde_json::to_vec_pretty(&problem).unwrap_or_default();
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(secs) = self.retry_after_secs() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(secs));
        }
        if let Some(secs) = self.wait_secs
            && let Ok(value) = HeaderValue::try_from(format!("wait={secs}"))
        {
            headers.insert("preference-applied", value);
        }
        if self.challenge {
            headers.insert(
                header::WWW_AUTHENTICATE,
                HeaderValue::from_static("Bearer realm=\"image-generator\""),
            );
        }
        if let Some(allow) = self.allow {
            headers.insert(header::ALLOW, HeaderValue::from_static(allow));
        }
        response
    }
}

/// A client's text as it may be repeated: short, without control characters.
pub(super) fn shown(text: &str) -> String {
    let short: String = text.chars().take(80).collect();
    short.escape_debug().to_string()
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Load(error) => error.into(),
            EngineError::UnknownModel { name, known } => {
                let detail = format!(
                    "no model is called `{}`; there is {}",
                    shown(&name),
                    some_of(&known)
                );
                let errors = vec![FieldError {
                    field: "model".to_owned(),
                    detail: detail.clone(),
                }];
                Self {
                    errors,
                    ..Self::new(
                        StatusCode::NOT_FOUND,
                        "unknown-model",
                        "There is no such model",
                        format!("model: {detail}"),
                    )
                }
            }
            EngineError::ModelRequired { known } => Self::field(
                "model",
                format!("name one of the models; there is {}", some_of(&known)),
            ),
            EngineError::UnknownClass { label, known } => Self::field(
                "label",
                format!(
                    "`{}` is nothing that the model draws; it draws {}",
                    shown(&label),
                    some_of(&known)
                ),
            ),
            EngineError::QueueFull {
                digits_max,
                retry_after,
            } => Self {
                retry_after: Some(retry_after),
                ..Self::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "queue-full",
                    "Too many digits are waiting",
                    format!("more than {digits_max} digits are waiting; try again later"),
                )
            },
            EngineError::Model(error) => Self::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "generation-failed",
                "The digit could not be computed",
                error.to_string(),
            ),
            EngineError::Stopped => Self {
                retry_after: Some(Duration::from_secs(1)),
                ..Self::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "generator-stopped",
                    "The generator stopped",
                    "the generator stopped; the next request starts it anew",
                )
            },
        }
    }
}

fn some_of(names: &[String]) -> String {
    let mut text = names
        .iter()
        .take(20)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    if names.len() > 20 {
        text.push_str(&format!(" and {} more", names.len() - 20));
    }
    text
}

impl From<LoadError> for Failure {
    fn from(error: LoadError) -> Self {
        // The store's own words, addresses and credentials' names stay in the log.
        let (status, kind, detail) = match &error {
            LoadError::Storage(storage) => match storage {
                StorageError::NotFound(_) => (
                    StatusCode::BAD_GATEWAY,
                    "weights-not-found",
                    "the weights do not exist where they are said to be".to_owned(),
                ),
                StorageError::Denied { .. } => (
                    StatusCode::BAD_GATEWAY,
                    "weights-denied",
                    "the store refuses access to the weights".to_owned(),
                ),
                StorageError::Digest { .. } | StorageError::Chunk { .. } => (
                    StatusCode::BAD_GATEWAY,
                    "weights-digest",
                    storage.to_string(),
                ),
                StorageError::DigestFile { .. } | StorageError::Index { .. } => (
                    StatusCode::BAD_GATEWAY,
                    "weights-invalid",
                    "a file beside the weights, their digest or index, is not valid; the log says why"
                        .to_owned(),
                ),
                StorageError::NoWeights(_) => (
                    StatusCode::BAD_GATEWAY,
                    "weights-not-found",
                    "the folder holds no weights, or several".to_owned(),
                ),
                StorageError::Client { .. } => (
                    StatusCode::BAD_GATEWAY,
                    "store-client",
                    "the client for the store of the weights cannot be built; the log says why"
                        .to_owned(),
                ),
                StorageError::Io { .. } | StorageError::Read(_) => (
                    StatusCode::BAD_GATEWAY,
                    "weights-unreadable",
                    "the weights cannot be read; the log says why".to_owned(),
                ),
                StorageError::Unexpected { .. } | StorageError::Protocol(_) => (
                    StatusCode::BAD_GATEWAY,
                    "store-answer",
                    "the store of the weights answered unexpectedly; the log says how".to_owned(),
                ),
                StorageError::Unavailable { .. }
                | StorageError::Truncated { .. }
                | StorageError::Changed
                | StorageError::CacheCorrupt
                | StorageError::Cancelled => (
                    StatusCode::SERVICE_UNAVAILABLE,
                    "store-unavailable",
                    "the store of the weights cannot be reached or is failing".to_owned(),
                ),
            },
            LoadError::Model(crate::model::ModelError::Device(text)) => {
                (StatusCode::INTERNAL_SERVER_ERROR, "device", text.clone())
            }
            LoadError::Model(model) => (
                StatusCode::BAD_GATEWAY,
                "weights-invalid",
                model.to_string(),
            ),
            LoadError::TooLarge { .. } => (
                StatusCode::INSUFFICIENT_STORAGE,
                "model-too-large",
                error.to_string(),
            ),
            LoadError::Timeout(_) => (
                StatusCode::SERVICE_UNAVAILABLE,
                "load-timeout",
                error.to_string(),
            ),
            LoadError::Cancelled => (
                StatusCode::SERVICE_UNAVAILABLE,
                "load-cancelled",
                error.to_string(),
            ),
            LoadError::Panicked => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "internal",
                error.to_string(),
            ),
        };
        let retry_after =
            (status == StatusCode::SERVICE_UNAVAILABLE).then_some(Duration::from_secs(2));
        Self {
            retry_after,
            ..Self::new(status, kind, "The model could not be loaded", detail)
        }
    }
}
