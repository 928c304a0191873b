//! A client for each kind of store, built when the first read needs it and not before.
//!
//! Credentials and endpoints are each provider's own: its environment variables, then its metadata service.

use super::error::Cause;
use super::fetch;
use super::{ModelUri, StorageConfig, StorageError, hub};
use http::{HeaderMap, HeaderValue, header};
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::path::Path;
use object_store::{ClientOptions, ObjectStore, RetryConfig};
use percent_encoding::percent_decode_str;
use std::sync::Arc;
use url::Url;

/// An object's store, and its place in it.
#[derive(Clone)]
pub(super) struct Location {
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) path: Path,
    /// For errors and logs.
    pub(super) uri: String,
    /// A revision that pins the content by itself (a commit).
    pub(super) revision: Option<String>,
    /// Where a `config.json` lies next to the weights.
    pub(super) beside: Option<Path>,
}

/// Builds the client of a remote URI.
pub(super) async fn locate(
    uri: &ModelUri,
    config: &StorageConfig,
) -> Result<Location, StorageError> {
    use_ring();
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
                .with_retry(no_retry())
                .build();
            (Arc::new(store.map_err(failed)?), Path::from(key.as_str()))
        }
        ModelUri::Http(url) => (
            http_store(url, HeaderMap::new(), config).map_err(failed)?,
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
            let url = hub.file_url(repo, &repository.commit, file);
            let beside = repository
                .files
                .iter()
                .any(|f| f == "config.json")
                .then(|| path_of(&hub.file_url(repo, &repository.commit, "config.json")));
            return Ok(Location {
                store: http_store(&url, hub.headers(), config).map_err(failed)?,
                path: path_of(&url).map_err(failed)?,
                uri: uri.to_string(),
                revision: Some(repository.commit),
                beside: beside.transpose().map_err(failed)?,
            });
        }
        ModelUri::File(_) => unreachable!("files are read without a client"),
    };
    Ok(Location {
        store,
        path,
        uri: uri.to_string(),
        revision: None,
        beside: None,
    })
}

/// The text of the `config.json` next to an object, where the store lists one.
pub(super) async fn beside(
    uri: &ModelUri,
    location: &Location,
    config: &StorageConfig,
) -> Result<Option<String>, StorageError> {
    let Some(path) = &location.beside else {
        return Ok(None);
    };
    let text = fetch::small(location, path, config).await?;
    String::from_utf8(text)
        .map(Some)
        .map_err(|e| StorageError::Unexpected {
            uri: uri.to_string(),
            source: Arc::new(e) as Cause,
        })
}

/// A store whose root is the URL's host. The query, if any, goes with each request.
fn http_store(
    url: &Url,
    headers: HeaderMap,
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
