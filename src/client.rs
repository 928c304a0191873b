//! The typed HTTP client: what the command line draws with, and what the tests ask with.

use crate::api::{GenerateRequest, Health, Models, Problem, headers};
use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use std::time::Duration;
use url::Url;

/// Talks to one server. Cheap to clone; connections are kept and shared.
#[derive(Clone, Debug)]
pub struct Client {
    base: Url,
    http: reqwest::Client,
}

/// How to talk to a server.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// HTTP/2 without TLS from the first byte (h2c). Over TLS the protocol is negotiated.
    pub http2_prior_knowledge: bool,
    /// Sent as `Authorization: Bearer`: an identity token of Google Cloud, say.
    pub bearer: Option<String>,
    /// From the request to the end of the answer; a cold server loads its model meanwhile.
    pub timeout: Duration,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            http2_prior_knowledge: false,
            bearer: None,
            timeout: Duration::from_secs(300),
        }
    }
}

/// Parameters of one digit; what is none, the server chooses.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DigitQuery {
    pub seed: Option<u64>,
    pub steps: Option<u64>,
    pub guidance: Option<f64>,
    pub scale: Option<u64>,
    pub model: Option<String>,
}

/// A PNG and what the server says of it.
#[derive(Clone, Debug)]
pub struct Image {
    /// A complete PNG file.
    pub png: Bytes,
    /// Seed of the first digit: with it, the same picture can be drawn again.
    pub seed: u64,
    pub model: String,
    pub model_version: String,
    /// All headers, `etag` and `server-timing` among them.
    pub headers: HeaderMap,
}

/// Why there is no picture.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("`{0}` is no http or https URL")]
    Url(String),
    /// The server answered with an error of its own.
    #[error("{} ({}): {}", problem.title, problem.status, problem.detail)]
    Problem {
        problem: Box<Problem>,
        retry_after: Option<Duration>,
    },
    /// Something answered that is not this service.
    #[error("unexpected answer {status}: {body}")]
    Unexpected { status: StatusCode, body: String },
    #[error("the server cannot be reached, or broke off")]
    Transport(#[from] reqwest::Error),
}

impl ClientError {
    /// The status code of the answer, if there was one.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Problem { problem, .. } => Some(problem.status),
            Self::Unexpected { status, .. } => Some(status.as_u16()),
            Self::Url(_) | Self::Transport(_) => None,
        }
    }
}

impl Client {
    /// A client of the server at `base`, such as `http://localhost:5000`.
    ///
    /// # Errors
    /// [`ClientError::Url`] if `base` is no HTTP URL.
    pub fn new(base: &str, config: ClientConfig) -> Result<Self, ClientError> {
        let invalid = || ClientError::Url(base.to_owned());
        let base = Url::parse(base).map_err(|_| invalid()).and_then(|u| {
            if matches!(u.scheme(), "http" | "https") {
                Ok(u)
            } else {
                Err(invalid())
            }
        })?;
        crate::storage::use_ring();
        let mut builder = reqwest::Client::builder().timeout(config.timeout);
        if config.http2_prior_knowledge {
            builder = builder.http2_prior_knowledge();
        }
        if let Some(token) = config.bearer {
            let mut value =
                http::HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| invalid())?;
            value.set_sensitive(true);
            builder =
                builder.default_headers([(header::AUTHORIZATION, value)].into_iter().collect());
        }
        Ok(Self {
            base,
            http: builder.build()?,
        })
    }

    /// Draws one digit.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn digit(&self, label: &str, query: &DigitQuery) -> Result<Image, ClientError> {
        let mut url = self.url("v1/digits/");
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().push(label);
        }
        let texts = [
            ("seed", query.seed.map(|v| v.to_string())),
            ("steps", query.steps.map(|v| v.to_string())),
            ("guidance", query.guidance.map(|v| v.to_string())),
            ("scale", query.scale.map(|v| v.to_string())),
            ("model", query.model.clone()),
        ];
        for (name, value) in texts {
            if let Some(value) = value {
                url.query_pairs_mut().append_pair(name, &value);
            }
        }
        image(self.http.get(url).send().await?).await
    }

    /// Draws a sheet.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn generate(&self, request: &GenerateRequest) -> Result<Image, ClientError> {
        image(
            self.http
                .post(self.url("v1/generate"))
                .json(request)
                .send()
                .await?,
        )
        .await
    }

    /// What the server serves, and what it is doing.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn models(&self) -> Result<Models, ClientError> {
        Ok(checked(self.http.get(self.url("v1/models")).send().await?)
            .await?
            .json()
            .await?)
    }

    /// One of the health routes: `live`, `ready` or `startup`.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn health(&self, probe: &str) -> Result<Health, ClientError> {
        Ok(checked(
            self.http
                .get(self.url(&format!("health/{probe}")))
                .send()
                .await?,
        )
        .await?
        .json()
        .await?)
    }

    fn url(&self, path: &str) -> Url {
        let mut url = self.base.clone();
        url.set_path(&format!(
            "{}/{path}",
            self.base.path().trim_end_matches('/')
        ));
        url
    }
}

async fn image(response: reqwest::Response) -> Result<Image, ClientError> {
    let response = checked(response).await?;
    let headers = response.headers().clone();
    let text = |name: &str| {
        headers
            .get(name)
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default()
            .to_owned()
    };
    let is_png = headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|t| t == "image/png");
    if !is_png {
        return Err(unexpected(response).await);
    }
    let (seed, model, model_version) = (
        text(headers::SEED).parse().unwrap_or_default(),
        text(headers::MODEL),
        text(headers::MODEL_VERSION),
    );
    Ok(Image {
        png: response.bytes().await?,
        seed,
        model,
        model_version,
        headers,
    })
}

async fn checked(response: reqwest::Response) -> Result<reqwest::Response, ClientError> {
    if response.status().is_success() {
        return Ok(response);
    }
    let retry_after = response
        .headers()
        .get(header::RETRY_AFTER)
        .and_then(|v| v.to_str().ok()?.parse().ok())
        .map(Duration::from_secs);
    if response
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|t| t == "application/problem+json")
    {
        return Err(ClientError::Problem {
            problem: Box::new(response.json().await?),
            retry_after,
        });
    }
    Err(unexpected(response).await)
}

async fn unexpected(response: reqwest::Response) -> ClientError {
    let status = response.status();
    let body = response
        .text()
        .await
        .unwrap_or_default()
        .chars()
        .take(300)
        .collect();
    ClientError::Unexpected { status, body }
}
