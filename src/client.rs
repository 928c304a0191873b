//! The typed HTTP client: what the command line draws with, and what the tests ask with.

use crate::api::{GenerateRequest, Health, Models, Problem, Record, headers};
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use std::sync::Arc;
use std::time::{Duration, Instant};
use url::Url;

/// A token is fetched anew so long before its end.
const TOKEN_SPARE: Duration = Duration::from_secs(120);
/// How long an identity token is used whose end cannot be read; Google's last for an hour.
const TOKEN_LIFE: Duration = Duration::from_secs(45 * 60);
/// Before the first repetition where the server does not say; twice as long before each further one.
const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_MOST: Duration = Duration::from_secs(10);
/// Longest record that is read.
const RECORD_BYTES_MAX: usize = 64 << 20;

/// Talks to one server. Cheap to clone; connections are kept and shared.
///
/// Every call is given up when its future is dropped, and the server then takes what was asked for out of its queue.
#[derive(Clone, Debug)]
pub struct Client {
    base: Url,
    http: reqwest::Client,
    auth: Arc<Auth>,
    token: Arc<tokio::sync::Mutex<Option<Token>>>,
    retries: u32,
    timeout: Duration,
}

/// How to talk to a server.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// HTTP/2 without TLS from the first byte (h2c). Over TLS the protocol is negotiated.
    pub http2_prior_knowledge: bool,
    pub auth: Auth,
    /// One of the server's own keys (API_KEYS).
    pub api_key: Option<String>,
    /// From the request to the end of the answer, repetitions included; a cold server loads its model meanwhile.
    pub timeout: Duration,
    /// How often a request is repeated that the server answered with 429 or 503, or that did not reach it. The server's
    /// Retry-After is kept.
    pub retries: u32,
}

/// What a request says of who makes it.
#[derive(Clone, Default)]
pub enum Auth {
    #[default]
    None,
    /// `Authorization: Bearer` with this.
    Bearer(String),
    /// An identity token of Google Cloud from the metadata server, for the server's URL as audience: inside Google Cloud.
    GoogleMetadata,
    /// An identity token from the `gcloud` command: on a developer's machine.
    Gcloud,
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Bearer(_) => "Bearer(..)",
            Self::GoogleMetadata => "GoogleMetadata",
            Self::Gcloud => "Gcloud",
        })
    }
}

struct Token {
    header: HeaderValue,
    until: Instant,
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            http2_prior_knowledge: false,
            auth: Auth::None,
            api_key: None,
            timeout: Duration::from_secs(300),
            retries: 0,
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
    /// A stream that ended without its closing record.
    #[error("the answer broke off before its end")]
    Cut,
    #[error("a record of the answer cannot be read")]
    Record(#[source] serde_json::Error),
    #[error("there is no identity token: {0}")]
    Token(String),
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}

impl ClientError {
    /// The status code of the answer, if there was one.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Problem { problem, .. } => Some(problem.status),
            Self::Unexpected { status, .. } => Some(status.as_u16()),
            _ => None,
        }
    }

    /// How long to wait before another try, if another try makes sense.
    fn retry_after(&self, tries: u32) -> Option<Duration> {
        let own = RETRY_FIRST
            .saturating_mul(1 << tries.min(10))
            .min(RETRY_MOST);
        match self {
            Self::Problem {
                problem,
                retry_after,
            } if matches!(problem.status, 429 | 503) => Some(retry_after.unwrap_or(own)),
            // What answers while a service starts, a platform's front for one.
            Self::Unexpected { status, .. } if matches!(status.as_u16(), 429 | 502 | 503 | 504) => {
                Some(own)
            }
            Self::Transport(error) if error.is_connect() || error.is_request() => Some(own),
            _ => None,
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
        let mut builder = reqwest::Client::builder();
        if config.http2_prior_knowledge {
            builder = builder.http2_prior_knowledge();
        }
        if let Some(key) = config.api_key {
            let mut value = HeaderValue::try_from(key).map_err(|_| invalid())?;
            value.set_sensitive(true);
            let name = http::HeaderName::from_static("x-api-key");
            builder = builder.default_headers([(name, value)].into_iter().collect());
        }
        Ok(Self {
            base,
            http: builder.build()?,
            auth: Arc::new(config.auth),
            token: Arc::default(),
            retries: config.retries,
            timeout: config.timeout,
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
        let png = header::HeaderValue::from_static("image/png");
        let request = self.http.get(url).header(header::ACCEPT, png);
        self.within(async { image(self.send(request).await?).await })
            .await
    }

    /// Draws a sheet.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn generate(&self, request: &GenerateRequest) -> Result<Image, ClientError> {
        let request = self.http.post(self.url("v1/generate")).json(request);
        let request = request.header(header::ACCEPT, "image/png");
        self.within(async { image(self.send(request).await?).await })
            .await
    }

    /// Draws digits, and tells of everything as it happens: of a cold server's load, of each step, of each digit.
    ///
    /// # Errors
    /// [`ClientError`]; what goes wrong later, [`Stream::next`] says.
    pub async fn stream(&self, request: &GenerateRequest) -> Result<Stream, ClientError> {
        let request = self.http.post(self.url("v1/generate")).json(request);
        let request = request.header(header::ACCEPT, "application/x-ndjson");
        let until = Instant::now() + self.timeout;
        let response = self.within(self.send(request)).await?;
        Ok(Stream {
            response,
            text: BytesMut::new(),
            ended: false,
            until,
            timeout: self.timeout,
        })
    }

    /// What the server serves, and what it is doing.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn models(&self) -> Result<Models, ClientError> {
        self.json("v1/models").await
    }

    /// One of the health routes: `live`, `ready` or `startup`.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn health(&self, probe: &str) -> Result<Health, ClientError> {
        self.json(&format!("health/{probe}")).await
    }

    async fn json<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let request = self.http.get(self.url(path));
        self.within(async { Ok(self.send(request).await?.json().await?) })
            .await
    }

    async fn within<T>(
        &self,
        work: impl Future<Output = Result<T, ClientError>>,
    ) -> Result<T, ClientError> {
        match tokio::time::timeout(self.timeout, work).await {
            Ok(result) => result,
            Err(_) => Err(ClientError::Timeout(self.timeout)),
        }
    }

    /// The answer, if it is a good one. Repeats what may be repeated: nothing that is asked here changes anything.
    async fn send(
        &self,
        request: reqwest::RequestBuilder,
    ) -> Result<reqwest::Response, ClientError> {
        let mut tries = 0;
        loop {
            let again = request.try_clone();
            let error = match self.once(again).await {
                Ok(response) => return Ok(response),
                Err(error) => error,
            };
            match error.retry_after(tries) {
                Some(pause) if tries < self.retries => tokio::time::sleep(pause).await,
                _ => return Err(error),
            }
            tries += 1;
        }
    }

    async fn once(
        &self,
        request: Option<reqwest::RequestBuilder>,
    ) -> Result<reqwest::Response, ClientError> {
        let mut request = request.ok_or(ClientError::Cut)?;
        if let Some(token) = self.token().await? {
            request = request.header(header::AUTHORIZATION, token);
        }
        checked(request.send().await?).await
    }

    async fn token(&self) -> Result<Option<HeaderValue>, ClientError> {
        match &*self.auth {
            Auth::None => return Ok(None),
            Auth::Bearer(text) => return bearer(text).map(Some),
            Auth::GoogleMetadata | Auth::Gcloud => {}
        }
        // Held while one is fetched: whoever comes meanwhile waits for the same.
        let mut token = self.token.lock().await;
        if let Some(known) = token.as_ref().filter(|t| t.until > Instant::now()) {
            return Ok(Some(known.header.clone()));
        }
        let text = match &*self.auth {
            Auth::Gcloud => gcloud_token().await?,
            _ => self.metadata_token().await?,
        };
        let header = bearer(text.trim())?;
        let until = Instant::now() + life(text.trim());
        *token = Some(Token {
            header: header.clone(),
            until,
        });
        Ok(Some(header))
    }

    /// GCE_METADATA_HOST names another metadata server, as it does for Google's own libraries.
    async fn metadata_token(&self) -> Result<String, ClientError> {
        let host = std::env::var("GCE_METADATA_HOST");
        let host = host.unwrap_or_else(|_| "metadata.google.internal".to_owned());
        let mut url = Url::parse(&format!(
            "http://{host}/computeMetadata/v1/instance/service-accounts/default/identity"
        ))
        .map_err(|_| ClientError::Url(host))?;
        let audience = self.base.origin().ascii_serialization();
        url.query_pairs_mut().append_pair("audience", &audience);
        let request = self.http.get(url).header("metadata-flavor", "Google");
        let answer = request.timeout(Duration::from_secs(10)).send().await;
        let told = |e: reqwest::Error| ClientError::Token(crate::telemetry::chain(&e));
        let answer = answer.and_then(reqwest::Response::error_for_status);
        answer.map_err(told)?.text().await.map_err(told)
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

/// The records of one answer. Dropping it gives up what is not drawn yet.
#[derive(Debug)]
pub struct Stream {
    response: reqwest::Response,
    text: BytesMut,
    ended: bool,
    until: Instant,
    timeout: Duration,
}

impl Stream {
    /// The next record; none after the closing one.
    ///
    /// # Errors
    /// [`ClientError::Problem`] if the server had to give up, [`ClientError::Cut`] if the closing record is missing.
    pub async fn next(&mut self) -> Option<Result<Record, ClientError>> {
        if self.ended {
            return None;
        }
        let until = tokio::time::Instant::from_std(self.until);
        let record = match tokio::time::timeout_at(until, self.record()).await {
            Ok(record) => record,
            Err(_) => Err(ClientError::Timeout(self.timeout)),
        };
        self.ended = !matches!(&record, Ok(record) if record.kind() != "done");
        Some(record)
    }

    async fn record(&mut self) -> Result<Record, ClientError> {
        loop {
            if let Some(end) = self.text.iter().position(|&b| b == b'\n') {
                let line = self.text.split_to(end + 1);
                let record = serde_json::from_slice(&line).map_err(ClientError::Record)?;
                return match record {
                    Record::Error {
                        problem,
                        retry_after,
                    } => Err(ClientError::Problem {
                        problem: Box::new(problem),
                        retry_after: retry_after.map(Duration::from_secs),
                    }),
                    record => Ok(record),
                };
            }
            if self.text.len() > RECORD_BYTES_MAX {
                return Err(ClientError::Cut);
            }
            match self.response.chunk().await {
                Ok(Some(bytes)) => self.text.extend_from_slice(&bytes),
                Ok(None) | Err(_) => return Err(ClientError::Cut),
            }
        }
    }
}

async fn gcloud_token() -> Result<String, ClientError> {
    let run = || {
        let mut command = std::process::Command::new("gcloud");
        command.args(["auth", "print-identity-token"]).output()
    };
    let output = tokio::task::spawn_blocking(run).await;
    match output {
        Ok(Ok(output)) if output.status.success() => {
            Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        }
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.lines().last().unwrap_or_default();
            Err(ClientError::Token(format!("gcloud says: {said}")))
        }
        Ok(Err(error)) => Err(ClientError::Token(format!("gcloud cannot be run: {error}"))),
        Err(_) => Err(ClientError::Token("gcloud was not waited for".to_owned())),
    }
}

fn bearer(token: &str) -> Result<HeaderValue, ClientError> {
    let mut value = HeaderValue::try_from(format!("Bearer {token}"))
        .map_err(|_| ClientError::Token("it has characters that no header may have".to_owned()))?;
    value.set_sensitive(true);
    Ok(value)
}

/// How long a token may be used: by its `exp`, if it is a JSON Web Token.
fn life(token: &str) -> Duration {
    use base64::Engine as _;
    #[derive(serde::Deserialize)]
    struct Claims {
        exp: u64,
    }
    let engine = base64::engine::general_purpose::URL_SAFE_NO_PAD;
    let claims = token
        .split('.')
        .nth(1)
        .and_then(|part| engine.decode(part).ok())
        .and_then(|json| serde_json::from_slice::<Claims>(&json).ok());
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    match (claims, now) {
        (Some(claims), Ok(now)) => {
            Duration::from_secs(claims.exp).saturating_sub(now + TOKEN_SPARE)
        }
        _ => TOKEN_LIFE,
    }
}

async fn image(response: reqwest::Response) -> Result<Image, ClientError> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use base64::Engine as _;

    #[test]
    fn a_token_is_used_until_shortly_before_its_end() {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs();
        let claims = format!("{{\"exp\":{}}}", now + 3600);
        let claims = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(claims);
        let left = life(&format!("head.{claims}.signature")).as_secs();
        assert!((3470..=3480).contains(&left), "{left}");
        assert_eq!(life("opaque"), TOKEN_LIFE);
        let shown = format!("{:?} {:?}", Auth::Bearer("secret".into()), bearer("secret"));
        assert!(!shown.contains("secret"), "{shown}");
    }

    #[test]
    fn what_may_be_repeated_waits_as_long_as_the_server_says() {
        let problem = |status, retry_after| ClientError::Problem {
            problem: Box::new(Problem {
                kind: String::new(),
                title: String::new(),
                status,
                detail: String::new(),
                request_id: String::new(),
                errors: Vec::new(),
            }),
            retry_after,
        };
        let told = Some(Duration::from_secs(7));
        assert_eq!(problem(503, told).retry_after(0), told);
        assert_eq!(problem(429, None).retry_after(2), Some(RETRY_FIRST * 4));
        assert_eq!(problem(429, None).retry_after(99), Some(RETRY_MOST));
        assert_eq!(problem(400, told).retry_after(0), None);
        assert_eq!(ClientError::Cut.retry_after(0), None);
    }
}
