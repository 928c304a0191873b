//! Who may ask, how often, and from where: API keys, a token bucket a client, the origins of web pages.

use super::ServerConfig;
use super::problem::Failure;
use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use subtle::ConstantTimeEq as _;

/// Clients whose buckets are remembered; of more, those who have asked least lately are forgotten.
const BUCKETS_MAX: usize = 1 << 16;

/// Keys that open the service. Only their digests are kept, so no dump, log or comparison gives one away.
#[derive(Clone, Default)]
pub struct ApiKeys(Vec<[u8; 32]>);

impl ApiKeys {
    pub fn new<'a>(keys: impl IntoIterator<Item = &'a str>) -> Self {
        let digest = |key: &str| Sha256::digest(key).into();
        Self(keys.into_iter().map(digest).collect())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Compares with every key, in a time that says nothing of any.
    fn has(&self, key: &[u8]) -> bool {
        let given: [u8; 32] = Sha256::digest(key).into();
        let mut found = subtle::Choice::from(0);
        for known in &self.0 {
            found |= known.ct_eq(&given);
        }
        found.into()
    }
}

impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} keys", self.0.len())
    }
}

/// # Errors
/// 401: keys are asked for, and none of them was given.
pub(super) fn authorize(keys: &ApiKeys, headers: &HeaderMap) -> Result<(), Failure> {
    if keys.is_empty() {
        return Ok(());
    }
    let bearer = headers.get(header::AUTHORIZATION).and_then(|v| {
        let (scheme, key) = v.to_str().ok()?.split_once(' ')?;
        scheme
            .eq_ignore_ascii_case("bearer")
            .then(|| key.trim().as_bytes())
    });
    // Where `Authorization` is taken by the platform's own tokens.
    let own = headers.get("x-api-key").map(HeaderValue::as_bytes);
    match [bearer, own].into_iter().flatten().any(|k| keys.has(k)) {
        true => Ok(()),
        false => Err(Failure::unauthorized()),
    }
}

/// The address of the client. Each of `proxies` trusted proxies has appended to X-Forwarded-For whom it was asked by, so
/// the client is the so-manieth from the right; what stands left of it anyone can have written.
pub(super) fn client(peer: IpAddr, proxies: usize, headers: &HeaderMap) -> IpAddr {
    if proxies == 0 {
        return peer;
    }
    let values = headers.get_all("x-forwarded-for").into_iter();
    let texts = values.filter_map(|v| v.to_str().ok());
    let hops: Vec<&str> = texts.flat_map(|v| v.split(',')).map(str::trim).collect();
    hops.len()
        .checked_sub(proxies)
        .and_then(|i| address(hops[i]))
        .unwrap_or(peer)
}

/// With or without a port.
fn address(text: &str) -> Option<IpAddr> {
    let bare = text.trim_start_matches('[').trim_end_matches(']');
    bare.parse()
        .ok()
        .or_else(|| text.parse::<SocketAddr>().ok().map(|a| a.ip()))
}

/// A token bucket for each client.
pub(super) struct RateLimit {
    per_minute: u32,
    buckets: Mutex<HashMap<IpAddr, Bucket>>,
}

struct Bucket {
    tokens: f64,
    at: Instant,
}

/// What a client has left.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Allowance {
    pub(super) allowed: bool,
    left: u32,
    per_minute: u32,
    /// Until there is one more, or the next.
    next: Duration,
}

impl RateLimit {
    pub(super) fn new(per_minute: u32) -> Self {
        Self {
            per_minute,
            buckets: Mutex::default(),
        }
    }

    /// Takes a token, if there is one.
    pub(super) fn take(&self, client: IpAddr, now: Instant) -> Allowance {
        let most = f64::from(self.per_minute);
        let per_second = most / 60.0;
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= BUCKETS_MAX {
            forget(&mut buckets, now);
        }
        let bucket = buckets.entry(network(client)).or_insert(Bucket {
            tokens: most,
            at: now,
        });
        let passed = now.saturating_duration_since(bucket.at).as_secs_f64();
        bucket.tokens = (bucket.tokens + passed * per_second).min(most);
        bucket.at = now;
        let allowed = bucket.tokens >= 1.0;
        if allowed {
            bucket.tokens -= 1.0;
        }
        let missing = 1.0 - bucket.tokens.fract();
        Allowance {
            allowed,
            left: bucket.tokens as u32,
            per_minute: self.per_minute,
            next: Duration::from_secs_f64(missing / per_second),
        }
    }
}

/// Who has not asked for a minute has a full bucket, which is what a client without one gets. If those were too few, the
/// rest goes too: rather a limit that is too mild for a minute than memory without bound.
fn forget(buckets: &mut HashMap<IpAddr, Bucket>, now: Instant) {
    let minute = Duration::from_secs(60);
    buckets.retain(|_, b| now.saturating_duration_since(b.at) < minute);
    if buckets.len() >= BUCKETS_MAX {
        buckets.clear();
    }
}

/// One client has a whole /64 of IPv6.
fn network(client: IpAddr) -> IpAddr {
    match client.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

impl Allowance {
    pub(super) fn check(self) -> Result<(), Failure> {
        match self.allowed {
            true => Ok(()),
            false => Err(Failure::rate_limited(self.per_minute, self.next)),
        }
    }

    /// `RateLimit` and `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers-10).
    pub(super) fn describe(self, headers: &mut HeaderMap) {
        let policy = format!("\"minute\";q={};w=60", self.per_minute);
        let limit = format!(
            "\"minute\";r={};t={}",
            self.left,
            self.next.as_secs_f64().ceil() as u64
        );
        for (name, text) in [("ratelimit-policy", policy), ("ratelimit", limit)] {
            let value = HeaderValue::try_from(text).expect("names and numbers");
            headers.insert(HeaderName::from_static(name), value);
        }
    }
}

/// What pages of other origins may do (the Fetch standard, CORS protocol).
pub(super) fn cors(
    config: &ServerConfig,
    request: &CorsRequest,
    allow: Option<&str>,
    answer: &mut HeaderMap,
) {
    if config.cors_origins.is_empty() {
        return;
    }
    // Also where the origin is not on the list: a cache must not give its answer to one that is.
    answer.append(header::VARY, HeaderValue::from_static("origin"));
    let Some(origin) = &request.origin else {
        return;
    };
    let any = config.cors_origins.iter().any(|o| o == "*");
    let listed = config.cors_origins.iter().any(|o| origin == o);
    if !any && !listed {
        return;
    }
    let allowed = if any {
        HeaderValue::from_static("*")
    } else {
        origin.clone()
    };
    answer.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, allowed);
    answer.insert(
        header::ACCESS_CONTROL_EXPOSE_HEADERS,
        HeaderValue::from_static(
            "etag, preference-applied, ratelimit, ratelimit-policy, retry-after, server-timing, x-model, x-model-version, x-request-id, x-seed",
        ),
    );
    if request.preflight
        && let Some(Ok(allow)) = allow.map(HeaderValue::try_from)
    {
        answer.insert(header::ACCESS_CONTROL_ALLOW_METHODS, allow);
        answer.insert(
            header::ACCESS_CONTROL_ALLOW_HEADERS,
            HeaderValue::from_static(
                "accept, authorization, content-type, if-none-match, last-event-id, prefer, traceparent, x-api-key, x-request-id",
            ),
        );
        answer.insert(
            header::ACCESS_CONTROL_MAX_AGE,
            HeaderValue::from_static("600"),
        );
    }
}

/// What a request says of the page that made it.
pub(super) struct CorsRequest {
    origin: Option<HeaderValue>,
    preflight: bool,
}

impl CorsRequest {
    pub(super) fn of(method: &Method, headers: &HeaderMap) -> Self {
        Self {
            origin: headers.get(header::ORIGIN).cloned(),
            preflight: method == Method::OPTIONS
                && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forged_address_is_not_believed() {
        let peer: IpAddr = [10, 0, 0, 1].into();
        let of = |proxies, values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append("x-forwarded-for", HeaderValue::from_static(value));
            }
            client(peer, proxies, &headers).to_string()
        };
        assert_eq!(of(0, &["1.1.1.1"]), "10.0.0.1");
        assert_eq!(of(1, &["6.6.6.6, 1.1.1.1"]), "1.1.1.1");
        assert_eq!(of(1, &["6.6.6.6", "1.1.1.1"]), "1.1.1.1");
        assert_eq!(of(2, &["6.6.6.6, 1.1.1.1, 2.2.2.2"]), "1.1.1.1");
        assert_eq!(of(2, &["1.1.1.1"]), "10.0.0.1");
        assert_eq!(of(1, &["nonsense"]), "10.0.0.1");
        assert_eq!(of(1, &[]), "10.0.0.1");
        assert_eq!(of(1, &["1.1.1.1:4711"]), "1.1.1.1");
        assert_eq!(of(1, &["[2001:db8::1]:443"]), "2001:db8::1");
    }

    #[test]
    fn a_bucket_refills_and_is_never_more_than_full() {
        let (limit, start) = (RateLimit::new(2), Instant::now());
        let (a, b): (IpAddr, IpAddr) = ([1, 1, 1, 1].into(), [2, 2, 2, 2].into());
        assert!(limit.take(a, start).allowed && limit.take(a, start).allowed);
        let refused = limit.take(a, start);
        assert!(!refused.allowed && refused.next == Duration::from_secs(30));
        assert!(limit.take(b, start).allowed, "others have their own");
        let later = start + Duration::from_secs(31);
        assert!(limit.take(a, later).allowed && !limit.take(a, later).allowed);
        let much_later = start + Duration::from_secs(3600);
        assert_eq!(limit.take(a, much_later).left, 1);
    }

    #[test]
    fn a_client_with_a_network_of_addresses_has_one_bucket() {
        let (limit, now) = (RateLimit::new(1), Instant::now());
        assert!(limit.take("2001:db8::1".parse().unwrap(), now).allowed);
        assert!(!limit.take("2001:db8::2".parse().unwrap(), now).allowed);
        assert!(limit.take("2001:db8:0:1::1".parse().unwrap(), now).allowed);
        for i in 0..(BUCKETS_MAX as u32 + 10) {
            limit.take(IpAddr::from(i.to_be_bytes()), now);
        }
        assert!(limit.buckets.lock().unwrap().len() <= BUCKETS_MAX);
    }

    #[test]
    fn keys_are_told_apart_and_never_shown() {
        let keys = ApiKeys::new(["alpha", "beta"]);
        let with = |name: &'static str, value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, HeaderValue::from_static(value));
            authorize(&keys, &headers).is_ok()
        };
        assert!(with("authorization", "Bearer beta") && with("x-api-key", "alpha"));
        assert!(!with("authorization", "Bearer gamma") && !with("authorization", "Basic alpha"));
        assert!(!with("x-api-key", "") && authorize(&keys, &HeaderMap::new()).is_err());
        assert_eq!(format!("{keys:?}"), "2 keys");
        assert!(authorize(&ApiKeys::default(), &HeaderMap::new()).is_ok());
    }
}
