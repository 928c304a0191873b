//! Where weights are: a URI, parsed once. One that ends in `/` is a catalogue: every model under it has a name.

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
        if rest.ends_with('/') {
            return Err(invalid("it names a folder; name one object"));
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

/// What MODEL_URI names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    Model(ModelUri),
    Catalogue(Catalogue),
}

impl FromStr for Place {
    type Err = InvalidUri;

    fn from_str(text: &str) -> Result<Self, InvalidUri> {
        if text.ends_with('/') {
            text.parse().map(Self::Catalogue)
        } else {
            text.parse().map(Self::Model)
        }
    }
}

/// A folder of models: each a weights file, or a folder that holds one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Catalogue {
    File(PathBuf),
    S3 { bucket: String, prefix: String },
    Gs { bucket: String, prefix: String },
    Az { container: String, prefix: String },
    Http(Url),
    Hub { repo: String, revision: String },
}

impl FromStr for Catalogue {
    type Err = InvalidUri;

    /// `text` ends in `/`.
    fn from_str(text: &str) -> Result<Self, InvalidUri> {
        let folder = |key: &str| match key.rsplit_once('/') {
            Some((folder, _)) => format!("{folder}/"),
            None => String::new(),
        };
        // What is a place of models is a place of the model `x`, without the `x`; but `hf://owner/x` is a repository.
        let under = text.strip_prefix("hf://").map_or("", |rest| {
            if rest.matches('/').count() == 1 {
                "/"
            } else {
                ""
            }
        });
        let model = format!("{text}{under}x").parse::<ModelUri>()?;
        Ok(match model {
            ModelUri::File(path) => Self::File(path.parent().map(PathBuf::from).unwrap_or(path)),
            ModelUri::S3 { bucket, key } => Self::S3 {
                bucket,
                prefix: folder(&key),
            },
            ModelUri::Gs { bucket, key } => Self::Gs {
                bucket,
                prefix: folder(&key),
            },
            ModelUri::Az { container, key } => Self::Az {
                container,
                prefix: folder(&key),
            },
            ModelUri::Http(mut url) => {
                let path = folder(url.path());
                url.set_path(&path);
                Self::Http(url)
            }
            ModelUri::Hub { repo, revision, .. } => Self::Hub { repo, revision },
        })
    }
}

impl Catalogue {
    /// Where a model of that name may be, likeliest first.
    pub fn places(&self, name: &ModelName) -> Vec<ModelUri> {
        let name = &name.0;
        if let Self::File(folder) = self {
            return vec![
                ModelUri::File(folder.join(format!("{name}.safetensors"))),
                ModelUri::File(folder.join(name)),
            ];
        }
        [
            format!("{name}.safetensors"),
            format!("{name}/model.safetensors"),
            format!("{name}/model.safetensors.index.json"),
        ]
        .into_iter()
        .map(|file| self.at(file))
        .collect()
    }

    fn at(&self, file: String) -> ModelUri {
        match self {
            Self::File(folder) => ModelUri::File(folder.join(file)),
            Self::S3 { bucket, prefix } => ModelUri::S3 {
                bucket: bucket.clone(),
                key: format!("{prefix}{file}"),
            },
            Self::Gs { bucket, prefix } => ModelUri::Gs {
                bucket: bucket.clone(),
                key: format!("{prefix}{file}"),
            },
            Self::Az { container, prefix } => ModelUri::Az {
                container: container.clone(),
                key: format!("{prefix}{file}"),
            },
            Self::Http(url) => {
                let mut url = url.clone();
                let path = format!("{}{file}", url.path());
                url.set_path(&path);
                ModelUri::Http(url)
            }
            Self::Hub { repo, revision } => ModelUri::Hub {
                repo: repo.clone(),
                revision: revision.clone(),
                file,
            },
        }
    }
}

/// Fit for logs and answers, as [`ModelUri`] is.
impl fmt::Display for Catalogue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hub { repo, revision } => write!(f, "hf://{repo}@{revision}/"),
            _ => self.at(String::new()).fmt(f),
        }
    }
}

/// A name that a model in a catalogue may have: no path, no hidden file, nothing that a store would read otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelName(String);

impl FromStr for ModelName {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let plain = text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        let first = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        if plain && first && text.len() <= 64 {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidName)
        }
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The text is no name of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a model's name has up to 64 letters, digits, `-`, `_` and `.`, and begins with a letter or digit"
)]
pub struct InvalidName;

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

    #[test]
    fn a_catalogue_knows_where_its_models_may_be() {
        for (text, shown, place) in [
            ("s3://b/", "s3://b/", "s3://b/kmnist.safetensors"),
            (
                "gs://b/p/q/",
                "gs://b/p/q/",
                "gs://b/p/q/kmnist.safetensors",
            ),
            ("az://c/p/", "az://c/p/", "az://c/p/kmnist.safetensors"),
            (
                "https://u:secret@h/models/",
                "https://h/models/",
                "https://h/models/kmnist.safetensors",
            ),
            (
                "hf://o/r/",
                "hf://o/r@main/",
                "hf://o/r@main/kmnist.safetensors",
            ),
            (
                "hf://o/r@v1/",
                "hf://o/r@v1/",
                "hf://o/r@v1/kmnist.safetensors",
            ),
            ("file:///m/", "file:///m", "file:///m/kmnist.safetensors"),
        ] {
            let Ok(Place::Catalogue(catalogue)) = text.parse::<Place>() else {
                panic!("{text}");
            };
            assert_eq!(
                catalogue.to_string().trim_end_matches('/'),
                shown.trim_end_matches('/')
            );
            let name = "kmnist".parse::<ModelName>().unwrap();
            assert_eq!(catalogue.places(&name)[0].to_string(), place);
        }
        for text in ["s3:///", "hf://o/", "ftp://x/", "/", "x/"] {
            assert!(text.parse::<Place>().is_err(), "{text}");
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_no_names() {
        for name in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "a%2fb",
            "-x",
            ".x",
            "a b",
            "a\u{0}",
            "\u{e9}",
            &"x".repeat(65),
        ] {
            assert!(name.parse::<ModelName>().is_err(), "{name}");
        }
        for name in ["mnist", "v1.2_x-3", "7"] {
            assert_eq!(name.parse::<ModelName>().unwrap().to_string(), name);
        }
    }
}
