//! Which form of an answer a client wants (RFC 9110, section 12.5.1).

use super::problem::Failure;
use http::{HeaderMap, header};

/// A form that drawn digits come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// One picture.
    Png,
    /// The denoising.
    Apng,
    /// A picture a part, in order of completion.
    Multipart,
    /// A record a line.
    Ndjson,
    /// A record an event.
    Events,
}

impl Form {
    /// In the order in which the server prefers them: the first is what a client gets that does not care.
    pub(super) const ALL: [Self; 5] = [
        Self::Png,
        Self::Apng,
        Self::Multipart,
        Self::Ndjson,
        Self::Events,
    ];

    pub(super) const fn media_type(self) -> &'static str {
        match self {
            Self::Png => "image/png",
            Self::Apng => "image/apng",
            Self::Multipart => "multipart/mixed",
            Self::Ndjson => "application/x-ndjson",
            Self::Events => "text/event-stream",
        }
    }
}

/// The form that `Accept` prefers.
///
/// # Errors
/// 406: it leaves room for none.
pub(super) fn form(headers: &HeaderMap) -> Result<Form, Failure> {
    if !headers.contains_key(header::ACCEPT) {
        return Ok(Form::Png);
    }
    let ranges: Vec<Range> = headers
        .get_all(header::ACCEPT)
        .into_iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .filter_map(Range::parse)
        .collect();
    let mut best: Option<(f32, Form)> = None;
    for form in Form::ALL {
        let quality = quality(&ranges, form.media_type());
        // At equal quality the earlier one stays.
        if quality > best.map_or(0.0, |(q, _)| q) {
            best = Some((quality, form));
        }
    }
    best.map(|(_, form)| form)
        .ok_or_else(|| Failure::not_acceptable(&Form::ALL.map(Form::media_type)))
}

struct Range {
    kind: String,
    subtype: String,
    quality: f32,
}

impl Range {
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(';').map(str::trim);
        let (kind, subtype) = parts.next()?.split_once('/')?;
        let quality = parts
            .find_map(|p| p.strip_prefix("q=").or(p.strip_prefix("Q=")))
            .map_or(Some(1.0), |q| q.parse().ok())?;
        Some(Self {
            kind: kind.to_ascii_lowercase(),
            subtype: subtype.to_ascii_lowercase(),
            quality: f32::clamp(quality, 0.0, 1.0),
        })
    }
}

/// By the most specific range that matches; 0 if none does.
fn quality(ranges: &[Range], media_type: &str) -> f32 {
    let (kind, subtype) = media_type.split_once('/').unwrap_or_default();
    ranges
        .iter()
        .filter_map(|r| {
            let specific = match (r.kind == kind, r.subtype == subtype) {
                (true, true) => 3,
                (true, false) if r.subtype == "*" => 2,
                _ if r.kind == "*" && r.subtype == "*" => 1,
                _ => return None,
            };
            Some((specific, r.quality))
        })
        .max_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)))
        .map_or(0.0, |(_, quality)| quality)
}

/// How long a client would rather wait (RFC 7240, `Prefer: wait=N`), in seconds.
pub(super) fn wait_secs(headers: &HeaderMap) -> Option<u64> {
    headers
        .get_all("prefer")
        .into_iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split([',', ';']))
        .find_map(|p| {
            let (name, value) = p.split_once('=')?;
            let named = name.trim().eq_ignore_ascii_case("wait");
            named
                .then(|| value.trim().trim_matches('"').parse().ok())
                .flatten()
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(accept: &str) -> Option<Form> {
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, accept.parse().unwrap());
        form(&headers).ok()
    }

    #[test]
    fn the_most_specific_range_counts_and_the_highest_quality_wins() {
        for (accept, wanted) in [
            ("*/*", Some(Form::Png)),
            ("image/png", Some(Form::Png)),
            ("image/*;q=0.5, text/html", Some(Form::Png)),
            ("text/html", None),
            ("image/png;q=0, */*", Some(Form::Apng)),
            ("image/avif,image/webp,*/*;q=0.8", Some(Form::Png)),
            // As a browser asks for an image.
            (
                "image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8",
                Some(Form::Png),
            ),
            ("image/apng, image/png;q=0.9", Some(Form::Apng)),
            ("text/event-stream", Some(Form::Events)),
            ("text/*", Some(Form::Events)),
            ("application/x-ndjson; charset=utf-8", Some(Form::Ndjson)),
            ("Application/X-NDJSON;Q=1", Some(Form::Ndjson)),
            ("multipart/mixed, application/json", Some(Form::Multipart)),
            (
                "multipart/*;q=0.2, text/event-stream;q=0.3",
                Some(Form::Events),
            ),
            ("", None),
            ("*/*;q=0", None),
            ("image/png;q=loud", None),
            ("image", None),
        ] {
            assert_eq!(chosen(accept), wanted, "{accept}");
        }
        assert_eq!(form(&HeaderMap::new()).unwrap(), Form::Png);
    }

    #[test]
    fn the_preferred_wait_is_found_among_others() {
        let wait = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("prefer", text.parse().unwrap());
            wait_secs(&headers)
        };
        assert_eq!(wait("respond-async, wait=10"), Some(10));
        assert_eq!(wait("Wait = \"3\""), Some(3));
        assert_eq!(wait("wait=soon"), None);
        assert_eq!(wait("return=minimal"), None);
    }
}
