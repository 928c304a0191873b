//! Where weights are: a URI, parsed once.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use url::Url;

/// A place that weights can be read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelUri {
    /// `file:///path` or a plain path: a weights file, or a folder that holds one.
    File(PathBuf),
    /// `s3://bucket/key`
    S3 { bucket: String, key: String },
    /// `gs://bucket/key`
    Gs { bucket: String, key: String },
    /// `az://container/key`, of the account in AZURE_STORAGE_ACCOUNT_NAME
    Az { container: String, key: String },
    /// `https://host/path`, with a query if it has one (signed URLs)
    Http(Url),
    /// `hf://owner/repo[@revision][/file]`
    Hub {
        repo: String,
        revision: String,
        file: String,
    },
}

/// Why a text is no model URI.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected gs://, s3://, az://, https://, hf:// or file:// and the weights' place, got `{shown}`: {why}"
)]
pub struct InvalidUri {
    shown: String,
    why: &'static str,
}

impl FromStr for ModelUri {
    type Err = InvalidUri;

    fn from_str(text: &str) -> Result<Self, InvalidUri> {
        // A URL may carry a secret in its query or user part, so neither is repeated.
        let shown = text.split(['?', '#']).next().unwrap_or_default();
        let shown = if shown.contains('@') && !shown.starts_with("hf://") {
            "a URI with a user part".to_owned()
        } else {
            shown.to_owned()
        };
        let invalid = |why| InvalidUri {
            shown: shown.clone(),
            why,
        };
        if text.chars().any(char::is_control) {
            return Err(invalid("it has a control character"));
        }
        let (scheme, rest) = text
            .split_once("://")
            .ok_or_else(|| invalid("it has no scheme"))?;
        let object = || -> Result<(String, String), InvalidUri> {
            match rest.split_once('/') {
                Some((bucket, key)) if !bucket.is_empty() && !key.is_empty() => {
                    Ok((bucket.to_owned(), key.to_owned()))
                }
                _ => Err(invalid("it needs a bucket and a key, bucket/key")),
            }
        };
        if matches!(scheme, "s3" | "gs" | "az") && rest.ends_with('/') {
            return Err(invalid(
                "a folder of models is not supported yet; name one object",
            ));
        }
        match scheme {
            "s3" => object().map(|(bucket, key)| Self::S3 { bucket, key }),
            "gs" => object().map(|(bucket, key)| Self::Gs { bucket, key }),
            "az" => object().map(|(container, key)| Self::Az { container, key }),
            "http" | "https" => {
                let url = Url::parse(text).map_err(|_| invalid("it is no valid URL"))?;
                if url.path().len() < 2 || url.path().ends_with('/') {
                    return Err(invalid("it needs a path to a file"));
                }
                Ok(Self::Http(url))
            }
            "hf" => hub(rest)
                .ok_or_else(|| invalid("it needs owner/repo, then @revision and /file if wanted")),
            "file" => {
                let path = rest.strip_prefix("localhost").unwrap_or(rest);
                if !path.starts_with('/') {
                    return Err(invalid("a file URI needs an absolute path, file:///path"));
                }
                Ok(Self::File(PathBuf::from(path)))
            }
            _ => Err(invalid("the scheme is unknown")),
        }
    }
}

fn hub(rest: &str) -> Option<ModelUri> {
    let mut parts = rest.splitn(3, '/');
    let (owner, repo, file) = (parts.next()?, parts.next()?, parts.next());
    let (repo, revision) = repo.split_once('@').unwrap_or((repo, "main"));
    let file = file.unwrap_or("model.safetensors");
    let safe = |s: &str| {
        !s.is_empty()
            && s != "."
            && s != ".."
            && s.chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    (safe(owner) && safe(repo) && safe(revision) && file.split('/').all(safe)).then(|| {
        ModelUri::Hub {
            repo: format!("{owner}/{repo}"),
            revision: revision.to_owned(),
            file: file.to_owned(),
        }
    })
}

impl ModelUri {
    /// The last part of the path without its ending: what the model is called until its header is read.
    pub fn stem(&self) -> String {
        let path = match self {
            Self::File(path) => path.display().to_string(),
            Self::S3 { key, .. } | Self::Gs { key, .. } | Self::Az { key, .. } => key.clone(),
            Self::Http(url) => url.path().to_owned(),
            Self::Hub { repo, .. } => repo.clone(),
        };
        let name = path
            .trim_end_matches('/')
            .rsplit('/')
            .next()
            .unwrap_or("model");
        name.strip_suffix(".safetensors").unwrap_or(name).to_owned()
    }
}

/// Fit for logs and answers: without user, password and query.
impl fmt::Display for ModelUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file://{}", path.display()),
            Self::S3 { bucket, key } => write!(f, "s3://{bucket}/{key}"),
            Self::Gs { bucket, key } => write!(f, "gs://{bucket}/{key}"),
            Self::Az { container, key } => write!(f, "az://{container}/{key}"),
            Self::Http(url) => {
                let port = url.port().map(|p| format!(":{p}")).unwrap_or_default();
                write!(
                    f,
                    "{}://{}{port}{}",
                    url.scheme(),
                    url.host_str().unwrap_or_default(),
                    url.path()
                )
            }
            Self::Hub {
                repo,
                revision,
                file,
            } => write!(f, "hf://{repo}@{revision}/{file}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scheme_parses_and_shows_itself() {
        for (text, shown) in [
            (
                "s3://digits/v3/model.safetensors",
                "s3://digits/v3/model.safetensors",
            ),
            ("gs://digits/m", "gs://digits/m"),
            ("az://box/m.safetensors", "az://box/m.safetensors"),
            (
                "https://u:p@h.example:8443/m.safetensors?sig=secret",
                "https://h.example:8443/m.safetensors",
            ),
            ("hf://me/digits", "hf://me/digits@main/model.safetensors"),
            (
                "hf://me/digits@v1.0/sub/m.safetensors",
                "hf://me/digits@v1.0/sub/m.safetensors",
            ),
            (
                "file:///models/m.safetensors",
                "file:///models/m.safetensors",
            ),
        ] {
            assert_eq!(text.parse::<ModelUri>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn what_is_no_place_is_refused_and_secrets_are_not_repeated() {
        for text in [
            "",
            "model",
            "s3://",
            "s3://bucket",
            "s3://bucket/",
            "gs:///key",
            "ftp://h/x",
            "https://h",
            "https://h/",
            "hf://owner",
            "hf://o/r/../x",
            "hf://o/r@a%2fb",
            "file://x/y",
            "s3://b/k\n",
        ] {
            assert!(text.parse::<ModelUri>().is_err(), "{text}");
        }
        let text = "ftp://user:hunter2@host/x?token=hunter2"
            .parse::<ModelUri>()
            .unwrap_err()
            .to_string();
        assert!(!text.contains("hunter2"), "{text}");
    }
}
