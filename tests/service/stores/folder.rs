//! A plain file server: the files of a folder, as they are when they are asked for, with ranges and ETags.

use super::wire::{Exchange, Wire, requested_range};
use super::{Answer, Served, answer};
use http::header;
use std::path::{Path, PathBuf};

pub struct FolderServer {
    served: Served,
    pub wire: Wire,
}

impl FolderServer {
    pub async fn new(folder: &Path) -> Self {
        let (folder, wire) = (folder.to_owned(), Wire::default());
        let log = wire.clone();
        let served = Served::new(move |request: http::Request<_>| {
            let (head, _) = request.into_parts();
            let exchange = log.begin(Exchange::new(
                head.method.as_str(),
                head.uri.path(),
                head.headers.clone(),
            ));
            let path = folder.join(head.uri.path().trim_start_matches('/'));
            async move {
                let (answer, sent) = get(path, &head.headers);
                let mut exchange = exchange.lock().unwrap();
                exchange.status = answer.status().as_u16();
                exchange.sent = sent;
                answer
            }
        })
        .await;
        Self { served, wire }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.served.address)
    }
}

fn get(path: PathBuf, headers: &http::HeaderMap) -> (Answer, std::ops::Range<u64>) {
    let Ok(bytes) = std::fs::read(path) else {
        return (answer(404, ""), 0..0);
    };
    let etag = format!("\"{}\"", super::version(&bytes));
    let is = |name| {
        headers
            .get(name)
            .is_some_and(|v| v.as_bytes() == etag.as_bytes())
    };
    if headers.contains_key(header::IF_MATCH) && !is(header::IF_MATCH) {
        return (answer(412, ""), 0..0);
    }
    if is(header::IF_NONE_MATCH) {
        return (answer(304, ""), 0..0);
    }
    let size = bytes.len() as u64;
    let (status, range) = match requested_range(headers) {
        Some(range) => (206, range.start.min(size)..range.end.min(size)),
        None => (200, 0..size),
    };
    let part = bytes[range.start as usize..range.end as usize].to_vec();
    let mut answer = answer(status, part);
    let headers = answer.headers_mut();
    headers.insert(header::ETAG, etag.parse().unwrap());
    headers.insert(
        header::LAST_MODIFIED,
        "Sun, 01 Nov 2026 00:00:00 GMT".parse().unwrap(),
    );
    if status == 206 {
        let content_range = format!("bytes {}-{}/{size}", range.start, range.end - 1);
        headers.insert(header::CONTENT_RANGE, content_range.parse().unwrap());
    }
    (answer, range)
}
