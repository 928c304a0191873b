//! What crossed the wire between the service and a store.

use crate::app::PATIENCE;
use http::HeaderMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// One request, and what was sent in answer so far.
#[derive(Clone, Debug)]
pub struct Exchange {
    pub method: String,
    /// With the query.
    pub path: String,
    pub headers: HeaderMap,
    /// 0 while there is no answer.
    pub status: u16,
    /// Bytes of the object that were sent.
    pub sent: Range<u64>,
}

impl Exchange {
    pub fn new(method: &str, path: &str, headers: HeaderMap) -> Self {
        Self {
            method: method.to_owned(),
            path: path.to_owned(),
            headers,
            status: 0,
            sent: 0..0,
        }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// `bytes=a-b` as it stands in a request, its end exclusive; `bytes=a-` ends at the largest number.
pub fn requested_range(headers: &HeaderMap) -> Option<Range<u64>> {
    let text = headers.get("range")?.to_str().ok()?;
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let end = match last {
        "" => u64::MAX,
        last => last.parse::<u64>().ok()? + 1,
    };
    Some(first.parse().ok()?..end)
}

/// All exchanges of a store, in the order of their requests.
#[derive(Clone, Default)]
pub struct Wire(Arc<Mutex<Vec<Arc<Mutex<Exchange>>>>>);

impl Wire {
    /// Records a request; what is sent in answer is written into what this returns.
    pub fn begin(&self, exchange: Exchange) -> Arc<Mutex<Exchange>> {
        let exchange = Arc::new(Mutex::new(exchange));
        self.0.lock().unwrap().push(exchange.clone());
        exchange
    }

    pub fn exchanges(&self) -> Vec<Exchange> {
        let all = self.0.lock().unwrap();
        all.iter().map(|e| e.lock().unwrap().clone()).collect()
    }

    /// The exchanges so far, which are forgotten.
    pub fn take(&self) -> Vec<Exchange> {
        let all = std::mem::take(&mut *self.0.lock().unwrap());
        all.iter().map(|e| e.lock().unwrap().clone()).collect()
    }

    /// Bytes of objects that were sent in all.
    pub fn body_bytes(&self) -> u64 {
        let length = |e: &Exchange| e.sent.end - e.sent.start;
        self.exchanges().iter().map(length).sum()
    }

    /// How often each byte of an object was sent, where there is no other object.
    pub fn times_sent(&self, object_bytes: usize) -> Vec<u32> {
        let mut times = vec![0; object_bytes];
        for exchange in self.exchanges() {
            let (start, end) = (exchange.sent.start as usize, exchange.sent.end as usize);
            times[start..end].iter_mut().for_each(|n| *n += 1);
        }
        times
    }

    /// Waits until the exchanges are as wanted.
    pub async fn until(&self, wanted: impl Fn(&[Exchange]) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !wanted(&self.exchanges()) {
            assert!(Instant::now() < deadline, "{:#?}", self.exchanges());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
