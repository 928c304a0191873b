//! A client for each kind of store, built when the first read needs it and not before.
//!
//! Credentials and endpoints are each provider's own: its environment variables, then its metadata service.

use super::digest::{MANIFEST_SUFFIX, SHA256_SUFFIX};
use super::{Catalogue, ModelUri, StorageConfig, StorageError, hub};
use http::{HeaderMap, HeaderValue, header};
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
    ReqwestConnector,
};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::path::Path;
use object_store::{ClientOptions, ObjectStore, RetryConfig};
use percent_encoding::percent_decode_str;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use url::Url;

/// An object's store, and its place in it.
#[derive(Clone)]
pub(super) struct Location {
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) path: Path,
    /// For errors and logs, and the key of the cache.
    pub(super) uri: String,
    /// A revision that pins the content by itself (a commit).
    pub(super) revision: Option<String>,
    /// When the store wants to be asked again.
    pub(super) pause: Arc<Pause>,
    /// What the hub lists of the repository.
    pub(super) listing: Option<Arc<Vec<hub::RepoFile>>>,
    /// Whether other objects can be asked for: a signed URL is good for one.
    pub(super) has_siblings: bool,
}

impl Location {
    /// Another object in the same folder.
    pub(super) fn sibling(&self, name: &str) -> Self {
        let swap = |text: &str| match text.rsplit_once('/') {
            Some((folder, _)) => format!("{folder}/{name}"),
            None => name.to_owned(),
        };
        Self {
            path: Path::from(swap(self.path.as_ref())),
            uri: swap(&self.uri),
            ..self.clone()
        }
    }

    /// The object's name in its folder.
    pub(super) fn name(&self) -> &str {
        self.path.filename().unwrap_or_default()
    }

    /// What the hub says of the object itself.
    pub(super) fn listed(&self) -> Option<&hub::RepoFile> {
        let path = self.path.as_ref();
        let listing = self.listing.as_deref()?;
        listing
            .iter()
            .find(|f| path.ends_with(&format!("/{}", f.name)))
    }

    /// Whether a sibling may exist: a listing, where there is one, says.
    pub(super) fn may_have(&self, name: &str) -> bool {
        self.has_siblings
            && self
                .listing
                .as_ref()
                .is_none_or(|l| l.iter().any(|f| f.name.rsplit('/').next() == Some(name)))
    }

    pub(super) fn manifest(&self) -> Self {
        self.sibling(&format!("{}{MANIFEST_SUFFIX}", self.name()))
    }

    pub(super) fn sha256_file(&self) -> Self {
        self.sibling(&format!("{}{SHA256_SUFFIX}", self.name()))
    }
}

/// What stores say in Retry-After. object_store's errors do not pass it on, so it is noted where answers arrive.
#[derive(Debug, Default)]
pub(super) struct Pause {
    until: Mutex<Option<Instant>>,
}

impl Pause {
    /// Longest pause that a store is granted; the load's own time-out comes on top.
    const MAX: Duration = Duration::from_secs(30);

    fn note(&self, response: &HttpResponse, now: Instant) {
        let status = response.status().as_u16();
        let seconds = response
            .headers()
            .get(header::RETRY_AFTER)
            .filter(|_| status == 429 || status >= 500)
            .and_then(|v| v.to_str().ok()?.trim().parse().ok());
        if let Some(seconds) = seconds {
            let until = now + Duration::from_secs(seconds).min(Self::MAX);
            *self.until.lock().unwrap_or_else(PoisonError::into_inner) = Some(until);
        }
    }

    /// How long the store still wants to be left alone.
    pub(super) fn left(&self, now: Instant) -> Duration {
        let until = *self.until.lock().unwrap_or_else(PoisonError::into_inner);
        until.map_or(Duration::ZERO, |u| u.saturating_duration_since(now))
    }
}

/// Builds object_store's own clients, and listens to what comes back.
#[derive(Debug)]
struct Connector {
    pause: Arc<Pause>,
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(Listening {
            // Made here for its errors: options that one client takes, all take.
            first: ReqwestConnector::default().connect(options)?,
            options: options.clone(),
            clients: Mutex::default(),
            pause: self.pause.clone(),
        }))
    }
}

#[derive(Debug)]
struct Listening {
    first: HttpClient,
    options: ClientOptions,
    /// One a runtime. A connection is driven by the runtime that opened it: handed to another one it would bring its bytes
    /// to the wrong processor's cache, and break off when its own runtime ends.
    clients: Mutex<HashMap<tokio::runtime::Id, HttpClient>>,
    pause: Arc<Pause>,
}

impl Listening {
    fn client(&self) -> Result<HttpClient, HttpError> {
        let here = tokio::runtime::Handle::current().id();
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(&here) {
            return Ok(client.clone());
        }
        let made = match clients.len() {
            0 => self.first.clone(),
            _ => ReqwestConnector::default()
                .connect(&self.options)
                .map_err(|e| HttpError::new(HttpErrorKind::Unknown, e))?,
        };
        Ok(clients.entry(here).or_insert(made).clone())
    }
}

#[async_trait::async_trait]
impl HttpService for Listening {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let response = self.client()?.execute(request).await?;
        self.pause.note(&response, Instant::now());
        Ok(response)
    }
}

/// Ending of the name of a sharded model's index.
pub(super) const INDEX_SUFFIX: &str = ".safetensors.index.json";

/// Builds the client of a remote URI.
pub(super) async fn locate(
    uri: &ModelUri,
    config: &StorageConfig,
) -> Result<Location, StorageError> {
    use_ring();
    let pause = Arc::<Pause>::default();
    let connector = || Connector {
        pause: pause.clone(),
    };
    let failed = |error: object_store::Error| StorageError::Client {
        uri: uri.to_string(),
        source: Arc::new(error),
    };
    let (store, path): (Arc<dyn ObjectStore>, Path) = match uri {
        ModelUri::S3 { bucket, key } => {
            let plain = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"]
                .into_iter()
                .find_map(|name| std::env::var(name).ok());
            let options =
                options(config).with_allow_http(plain.is_some_and(|e| e.starts_with("http://")));
            let store = AmazonS3Builder::from_env()
                .with_bucket_name(bucket)
                .with_client_options(options)
                .with_http_connector(connector())
                .with_retry(no_retry())
                .build();
            (Arc::new(store.map_err(failed)?), Path::from(key.as_str()))
        }
        ModelUri::Gs { bucket, key } => {
            // The metadata server speaks plain HTTP, and so does a local stand-in.
            let options = options(config).with_allow_http(true);
            let store = GoogleCloudStorageBuilder::from_env()
                .with_bucket_name(bucket)
                .with_client_options(options)
                .with_http_connector(connector())
                .with_retry(no_retry())
                .build();
            (Arc::new(store.map_err(failed)?), Path::from(key.as_str()))
        }
        ModelUri::Az { container, key } => {
            let plain = ["AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"]
                .into_iter()
                .find_map(|name| std::env::var(name).ok());
            let options =
                options(config).with_allow_http(plain.is_some_and(|e| e.starts_with("http://")));
            let store = MicrosoftAzureBuilder::from_env()
                .with_container_name(container)
                .with_client_options(options)
                .with_http_connector(connector())
                .with_retry(no_retry())
                .build();
            (Arc::new(store.map_err(failed)?), Path::from(key.as_str()))
        }
        ModelUri::Http(url) => (
            http_store(url, HeaderMap::new(), connector(), config).map_err(failed)?,
            path_of(url).map_err(failed)?,
        ),
        ModelUri::Hub {
            repo,
            revision,
            file,
        } => {
            let hub = hub::Hub::from_env().map_err(|source| StorageError::Client {
                uri: uri.to_string(),
                source,
            })?;
            let repository = hub.resolve(repo, revision, config).await?;
            let listed = |name: &str| repository.files.iter().any(|f| f.name == name);
            let index = file.replace(".safetensors", INDEX_SUFFIX);
            let file = if !listed(file) && listed(&index) {
                &index
            } else {
                file
            };
            let url = hub.file_url(repo, &repository.commit, file);
            return Ok(Location {
                store: http_store(&url, hub.headers(), connector(), config).map_err(failed)?,
                path: path_of(&url).map_err(failed)?,
                uri: format!("hf://{repo}@{revision}/{file}"),
                revision: Some(repository.commit),
                pause,
                listing: Some(Arc::new(repository.files)),
                has_siblings: true,
            });
        }
        ModelUri::File(_) => unreachable!("files are read without a client"),
    };
    Ok(Location {
        store,
        path,
        uri: uri.to_string(),
        revision: None,
        pause,
        listing: None,
        has_siblings: !matches!(uri, ModelUri::Http(url) if url.query().is_some()),
    })
}

/// Models right under a catalogue: weights files, and folders.
pub(super) async fn list(
    catalogue: &Catalogue,
    config: &StorageConfig,
    max: usize,
) -> Result<Vec<String>, StorageError> {
    let stem = |file: &str| file.strip_suffix(".safetensors").map(str::to_owned);
    let place = catalogue.places(&"x".parse().expect("a letter is a name"));
    let location = locate(&place[0], config).await?;
    if let Some(listing) = &location.listing {
        let names = listing.iter().filter_map(|f| match f.name.split_once('/') {
            Some((folder, "model.safetensors" | "model.safetensors.index.json")) => {
                Some(folder.to_owned())
            }
            Some(_) => None,
            None => stem(&f.name),
        });
        return Ok(names.take(max).collect());
    }
    let parts: Vec<_> = location.path.parts().collect();
    let folder = Path::from_iter(parts[..parts.len() - 1].iter().cloned());
    let list = location.store.list_with_delimiter(Some(&folder));
    let wait = config.connect_timeout + config.stall_timeout;
    let uri = catalogue.to_string();
    let found = tokio::time::timeout(wait, list)
        .await
        .map_err(|elapsed| StorageError::Unavailable {
            uri: uri.clone(),
            source: Arc::new(elapsed),
        })?
        .map_err(|e| StorageError::store(&uri, e))?;
    let files = found
        .objects
        .iter()
        .filter_map(|o| stem(o.location.filename()?));
    let folders = found
        .common_prefixes
        .iter()
        .filter_map(|p| p.filename().map(str::to_owned));
    Ok(files.chain(folders).take(max).collect())
}

/// A store whose root is the URL's host. The query, if any, goes with each request.
fn http_store(
    url: &Url,
    headers: HeaderMap,
    connector: Connector,
    config: &StorageConfig,
) -> Result<Arc<dyn ObjectStore>, object_store::Error> {
    let mut root = url.clone();
    root.set_path("");
    let mut headers = headers;
    if let Some(basic) = basic_auth(&mut root) {
        headers.insert(header::AUTHORIZATION, basic);
    }
    let options = options(config)
        .with_allow_http(true)
        .with_default_headers(headers);
    Ok(Arc::new(
        HttpBuilder::new()
            .with_url(root.as_str())
            .with_client_options(options)
            .with_http_connector(connector)
            .with_retry(no_retry())
            .build()?,
    ))
}

/// Takes user and password out of the URL, into a header that no log prints.
fn basic_auth(url: &mut Url) -> Option<HeaderValue> {
    use base64::Engine as _;
    if url.username().is_empty() && url.password().is_none() {
        return None;
    }
    // A URL can hold most signs only as %xx, which are no part of the password.
    let mut plain: Vec<u8> = percent_decode_str(url.username()).collect();
    plain.push(b':');
    plain.extend(percent_decode_str(url.password().unwrap_or_default()));
    let _ = url.set_username("");
    let _ = url.set_password(None);
    let mut value = HeaderValue::try_from(format!(
        "Basic {}",
        base64::engine::general_purpose::STANDARD.encode(plain)
    ))
    .ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn path_of(url: &Url) -> Result<Path, object_store::Error> {
    Ok(Path::from_url_path(url.path().trim_start_matches('/'))?)
}

/// Time-outs of our own per chunk stand in place of the default, which ends every long body after 30 s.
fn options(config: &StorageConfig) -> ClientOptions {
    ClientOptions::new()
        .with_connect_timeout(config.connect_timeout)
        .with_timeout_disabled()
        .with_read_timeout(config.stall_timeout)
        .with_user_agent(HeaderValue::from_static(concat!(
            "image-generator/",
            env!("CARGO_PKG_VERSION")
        )))
}

/// `fetch` retries ranges itself, keeping what arrived; a second retry below it would multiply the waits.
fn no_retry() -> RetryConfig {
    RetryConfig {
        max_retries: 0,
        ..RetryConfig::default()
    }
}

/// Makes ring the process's TLS provider, at the first use of TLS and not at start.
pub(crate) fn use_ring() {
    // An error means that it was installed before.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
