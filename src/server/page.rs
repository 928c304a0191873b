//! The web page and what describes the API: files of this folder, compiled in.

use super::body::Body;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use sha2::{Digest as _, Sha256};

/// The page may load its own files and ask its own server; nothing else.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub(super) struct File {
    kind: &'static str,
    bytes: &'static [u8],
}

/// The file at a path.
pub(super) fn file(path: &str) -> Option<File> {
    let (kind, bytes): (_, &[u8]) = match path {
        "/" => (
            "text/html; charset=utf-8",
            include_bytes!("page/index.html"),
        ),
        "/page.js" => (
            "text/javascript; charset=utf-8",
            include_bytes!("page/page.js"),
        ),
        "/page.css" => ("text/css; charset=utf-8", include_bytes!("page/page.css")),
        "/icon.svg" => ("image/svg+xml", include_bytes!("page/icon.svg")),
        _ => return None,
    };
    Some(File { kind, bytes })
}

impl File {
    /// Asked for again at each visit, and sent again only when another binary serves it.
    pub(super) fn answer(&self, request: &HeaderMap) -> Response<Body> {
        let etag = format!(
            "\"{}\"",
            crate::storage::hex(&Sha256::digest(self.bytes)[..8])
        );
        let known = request
            .get(header::IF_NONE_MATCH)
            .is_some_and(|v| *v == *etag);
        let mut response = match known {
            true => Response::new(Body::default()),
            false => Response::new(Body::from(self.bytes)),
        };
        if known {
            *response.status_mut() = StatusCode::NOT_MODIFIED;
        }
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(self.kind));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        headers.insert(
            header::CONTENT_SECURITY_POLICY,
            HeaderValue::from_static(PAGE_POLICY),
        );
        headers.insert(
            header::ETAG,
            HeaderValue::try_from(etag).expect("hexadecimal digits in quotes"),
        );
        response
    }
}
