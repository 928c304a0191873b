//! The Hugging Face Hub: a revision becomes a commit once, and every request names the commit.
//!
//! HF_ENDPOINT (default <https://huggingface.co>) and HF_TOKEN are the Hub's own variables.

use super::digest::parse_digest;
use super::error::Cause;
use super::{StorageConfig, StorageError};
use http::{HeaderMap, HeaderValue, header};
use serde::Deserialize;
use std::sync::Arc;
use url::Url;

pub(super) struct Hub {
    endpoint: Url,
    token: Option<HeaderValue>,
}

/// A repository at one commit.
pub(super) struct Repository {
    pub(super) commit: String,
    pub(super) files: Vec<RepoFile>,
}

/// One file of a repository.
pub(super) struct RepoFile {
    /// With its folders.
    pub(super) name: String,
    /// Of files in large-file storage, which weights are.
    pub(super) sha256: Option<[u8; 32]>,
}

#[derive(Deserialize)]
struct RevisionInfo {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    #[serde(default)]
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
}

impl From<Sibling> for RepoFile {
    fn from(sibling: Sibling) -> Self {
        Self {
            name: sibling.rfilename,
            sha256: sibling.lfs.and_then(|lfs| parse_digest(&lfs.sha256)),
        }
    }
}

impl Hub {
    pub(super) fn from_env() -> Result<Self, Cause> {
        let endpoint =
            std::env::var("HF_ENDPOINT").unwrap_or_else(|_| "https://huggingface.co".to_owned());
        let endpoint = Url::parse(&endpoint).map_err(|e| Arc::new(e) as Cause)?;
        let token = match std::env::var("HF_TOKEN") {
            Ok(token) if !token.trim().is_empty() => {
                let mut value = HeaderValue::try_from(format!("Bearer {}", token.trim()))
                    .map_err(|e| Arc::new(e) as Cause)?;
                value.set_sensitive(true);
                Some(value)
            }
            _ => None,
        };
        Ok(Self { endpoint, token })
    }

    /// Sent to the Hub alone: the HTTP client drops the token where a redirect leads to another host.
    pub(super) fn headers(&self) -> HeaderMap {
        self.token
            .iter()
            .map(|token| (header::AUTHORIZATION, token.clone()))
            .collect()
    }

    pub(super) fn file_url(&self, repo: &str, commit: &str, file: &str) -> Url {
        self.at(&format!("{repo}/resolve/{commit}/{file}"))
    }

    fn at(&self, path: &str) -> Url {
        let mut url = self.endpoint.clone();
        url.set_path(&format!(
            "{}/{path}",
            self.endpoint.path().trim_end_matches('/')
        ));
        url
    }

    /// Asks which commit a branch, tag or commit stands for, and what files it has.
    pub(super) async fn resolve(
        &self,
        repo: &str,
        revision: &str,
        config: &StorageConfig,
    ) -> Result<Repository, StorageError> {
        let uri = format!("hf://{repo}@{revision}");
        let unavailable = |e: reqwest::Error| StorageError::Unavailable {
            uri: uri.clone(),
            source: Arc::new(e.without_url()),
        };
        let client = reqwest::Client::builder()
            .connect_timeout(config.connect_timeout)
            .timeout(config.stall_timeout)
            .build()
            .map_err(unavailable)?;
        let mut url = self.at(&format!("api/models/{repo}/revision/{revision}"));
        // With the digests of large files.
        url.set_query(Some("blobs=true"));
        let response = client
            .get(url)
            .headers(self.headers())
            .send()
            .await
            .map_err(unavailable)?;
        match response.error_for_status_ref() {
            Ok(_) => {}
            Err(error) => {
                let source = Arc::new(error.without_url()) as Cause;
                return Err(match response.status().as_u16() {
                    401 | 403 => StorageError::Denied { uri, source },
                    404 => StorageError::NotFound(uri),
                    408 | 429 | 500..=599 => StorageError::Unavailable { uri, source },
                    _ => StorageError::Unexpected { uri, source },
                });
            }
        }
        let info: RevisionInfo = response.json().await.map_err(unavailable)?;
        if info.sha.is_empty() || !info.sha.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(StorageError::Protocol(
                "the hub names no commit for the revision".to_owned(),
            ));
        }
        Ok(Repository {
            commit: info.sha,
            files: info.siblings.into_iter().map(RepoFile::from).collect(),
        })
    }
}
