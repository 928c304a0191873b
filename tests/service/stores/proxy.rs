//! A proxy before a store, which notes what crosses the wire.

use super::wire::{Exchange, Wire};
use super::{Answer, Served, answer, use_ring};
use futures_util::TryStreamExt as _;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Frame, Incoming};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

pub struct Proxy {
    served: Served,
    pub wire: Wire,
}

impl Proxy {
    pub async fn before(store: SocketAddr) -> Self {
        use_ring();
        let client = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .unwrap();
        let wire = Wire::default();
        let log = wire.clone();
        let served = Served::new(move |request| {
            let path = request.uri().path_and_query().unwrap().to_string();
            let exchange = log.begin(Exchange::new(
                request.method().as_str(),
                &path,
                request.headers().clone(),
            ));
            pass_on(
                client.clone(),
                request,
                format!("http://{store}{path}"),
                exchange,
            )
        })
        .await;
        Self { served, wire }
    }

    pub fn address(&self) -> SocketAddr {
        self.served.address
    }
}

/// With all headers as they came, `Host` among them: the signature covers them.
async fn pass_on(
    client: reqwest::Client,
    request: http::Request<Incoming>,
    url: String,
    exchange: Arc<Mutex<Exchange>>,
) -> Answer {
    let (head, body) = request.into_parts();
    let body = body
        .collect()
        .await
        .map(http_body_util::Collected::to_bytes);
    let sent = client
        .request(head.method, url)
        .headers(head.headers)
        .body(body.unwrap_or_default())
        .send();
    let theirs = match sent.await {
        Ok(theirs) => theirs,
        Err(error) => return answer(502, error.to_string()),
    };
    let is_object = matches!(theirs.status().as_u16(), 200 | 206);
    let start = theirs
        .headers()
        .get("content-range")
        .and_then(|v| {
            v.to_str()
                .ok()?
                .strip_prefix("bytes ")?
                .split('-')
                .next()?
                .parse()
                .ok()
        })
        .unwrap_or(0);
    {
        let mut exchange = exchange.lock().unwrap();
        exchange.status = theirs.status().as_u16();
        exchange.sent = start..start;
    }
    let mut ours = http::Response::builder().status(theirs.status());
    for (name, value) in theirs.headers() {
        // How the store frames its answers and keeps its connections is between the two of us.
        if !matches!(name.as_str(), "connection" | "transfer-encoding") {
            ours = ours.header(name, value);
        }
    }
    let frames = theirs
        .bytes_stream()
        .inspect_ok(move |chunk| {
            if is_object {
                exchange.lock().unwrap().sent.end += chunk.len() as u64;
            }
        })
        .map_ok(Frame::data)
        .map_err(Into::into);
    ours.body(StreamBody::new(frames).boxed_unsync()).unwrap()
}
