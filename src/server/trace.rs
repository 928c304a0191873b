//! Which request a log line belongs to.

use crate::api::headers::REQUEST_ID;
use http::HeaderMap;

/// Longest request id taken over from a client.
const ID_BYTES_MAX: usize = 128;

/// The client's request id if it is harmless, else a new one.
pub(super) fn request_id(headers: &HeaderMap) -> String {
    let harmless = |id: &&str| {
        !id.is_empty()
            && id.len() <= ID_BYTES_MAX
            && id
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    let given = headers
        .get(REQUEST_ID)
        .and_then(|v| v.to_str().ok())
        .filter(harmless);
    given.map_or_else(
        || format!("{:016x}", getrandom::u64().unwrap_or_default()),
        str::to_owned,
    )
}

/// The trace id of W3C's `traceparent`, or of Google's `X-Cloud-Trace-Context`: 32 hexadecimal digits.
pub(super) fn trace_id(headers: &HeaderMap) -> Option<&str> {
    let text = |name| {
        headers
            .get(name)
            .and_then(|v: &http::HeaderValue| v.to_str().ok())
    };
    let w3c = text("traceparent").and_then(|t| t.split('-').nth(1));
    let google = text("x-cloud-trace-context").and_then(|t| t.split(['/', ';']).next());
    let valid = |id: &&str| {
        id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()) && id.bytes().any(|b| b != b'0')
    };
    w3c.filter(valid).or(google.filter(valid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trace_ids_come_from_either_header() {
        let id = "0af7651916cd43dd8448eb211c80319c";
        for (name, value) in [
            ("traceparent", format!("00-{id}-b7ad6b7169203331-01")),
            ("x-cloud-trace-context", format!("{id}/123;o=1")),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(name, value.parse().unwrap());
            assert_eq!(trace_id(&headers), Some(id));
        }
        let mut headers = HeaderMap::new();
        headers.insert("traceparent", "00-\"}evil-1-01".parse().unwrap());
        assert_eq!(trace_id(&headers), None);
    }

    #[test]
    fn request_ids_that_could_harm_a_log_are_replaced() {
        let mut headers = HeaderMap::new();
        headers.insert(REQUEST_ID, "abc-1.2_3".parse().unwrap());
        assert_eq!(request_id(&headers), "abc-1.2_3");
        headers.insert(REQUEST_ID, "a b".parse().unwrap());
        assert_eq!(request_id(&headers).len(), 16);
    }
}
