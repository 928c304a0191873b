//! Queries and bodies to what is to be drawn. Everything that does not need the model is checked here, every
//! bad field is named, and all of them at once.

use super::ServerConfig;
use super::problem::{Failure, shown};
use crate::api::{Digits, FieldError, GenerateRequest, LabelText, Layout};
use crate::engine::DrawRequest;
use crate::image::Grid;

/// Guidance beyond this draws caricatures.
const GUIDANCE_MAX: f64 = 10.0;
const SCALE_MAX: u64 = 32;
/// Longest class name that a request may use.
const LABEL_BYTES_MAX: usize = 64;
/// Pixels of one answer; 32 MiB of grey.
const PIXELS_MAX: usize = 32 << 20;

/// A checked request.
#[derive(Debug)]
pub(super) struct Draw {
    pub(super) request: DrawRequest,
    pub(super) grid: Grid,
    pub(super) scale: usize,
    /// Whether the client chose the seed: the answer is then the same every time.
    pub(super) seeded: bool,
}

impl Draw {
    /// A sheet's size is known when the model is.
    pub(super) fn check_pixels(&self, image_size: usize) -> Result<(), Failure> {
        let pixels = self.grid.columns * self.grid.rows * (image_size * self.scale).pow(2);
        if pixels > PIXELS_MAX {
            return Err(Failure::field(
                "scale",
                format!(
                    "the sheet would have {pixels} pixels, at most {PIXELS_MAX} are drawn; take a smaller scale or fewer digits"
                ),
            ));
        }
        Ok(())
    }
}

#[derive(Default)]
struct Errors(Vec<FieldError>);

impl Errors {
    fn add(&mut self, field: &str, detail: impl Into<String>) {
        self.0.push(FieldError {
            field: field.to_owned(),
            detail: detail.into(),
        });
    }

    fn number<T: std::str::FromStr>(
        &mut self,
        field: &str,
        text: &str,
        expected: &str,
    ) -> Option<T> {
        let number = text.parse().ok();
        if number.is_none() {
            self.add(field, format!("`{}` is not {expected}", shown(text)));
        }
        number
    }
}

/// `GET /v1/digits/{label}?seed=&steps=&guidance=&scale=&model=`
pub(super) fn one(
    label: &str,
    query: Option<&str>,
    config: &ServerConfig,
) -> Result<Draw, Failure> {
    let mut errors = Errors::default();
    let mut body = GenerateRequest {
        digits: Some(Digits::List(vec![LabelText::Name(label.to_owned())])),
        ..GenerateRequest::default()
    };
    let mut seen = std::collections::HashSet::new();
    for (name, value) in form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
        if !seen.insert(name.clone()) {
            errors.add(&shown(&name), "it is given twice");
            continue;
        }
        match &*name {
            "seed" => {
                body.seed = errors.number(
                    "seed",
                    &value,
                    "a whole number from 0 to 18446744073709551615",
                )
            }
            "steps" => body.steps = errors.number("steps", &value, "a whole number"),
            "guidance" => body.guidance = errors.number("guidance", &value, "a number"),
            "scale" => body.scale = errors.number("scale", &value, "a whole number"),
            "model" => body.model = Some(value.into_owned()),
            _ => errors.add(
                &shown(&name),
                "there is no such parameter; there are seed, steps, guidance, scale and model",
            ),
        }
    }
    check(body, "label", config, errors)
}

/// `POST /v1/generate`
pub(super) fn many(body: &[u8], config: &ServerConfig) -> Result<Draw, Failure> {
    // Serde would also read a list as the fields in their order.
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(Failure::field("body", "expected a JSON object"));
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let body: GenerateRequest = serde_path_to_error::deserialize(&mut json).map_err(|e| {
        let path = e.path().to_string();
        Failure::field(
            if path == "." { "body" } else { &path },
            shown_error(e.inner()),
        )
    })?;
    json.end()
        .map_err(|e| Failure::field("body", shown_error(&e)))?;
    check(body, "digits", config, Errors::default())
}

fn shown_error(error: &serde_json::Error) -> String {
    let text: String = error.to_string().chars().take(300).collect();
    text.escape_debug()
        .to_string()
        .replace("\\\"", "\"")
        .replace("\\'", "'")
}

fn check(
    body: GenerateRequest,
    labels_field: &str,
    config: &ServerConfig,
    mut errors: Errors,
) -> Result<Draw, Failure> {
    let labels = labels(body.digits, labels_field, &mut errors);
    let count = body.count.unwrap_or(1);
    let total = u64::try_from(labels.len())
        .unwrap_or(u64::MAX)
        .saturating_mul(count);
    if count == 0 {
        errors.add("count", "it is 0, expected at least 1");
    } else if total > config.digits_max as u64 {
        let field = if count > 1 { "count" } else { labels_field };
        errors.add(
            field,
            format!(
                "{total} digits are asked for, at most {} are drawn at once",
                config.digits_max
            ),
        );
    }
    if let Some(steps) = body.steps
        && !(1..=config.steps_max as u64).contains(&steps)
    {
        errors.add(
            "steps",
            format!("it is {steps}, expected 1 to {}", config.steps_max),
        );
    }
    if let Some(guidance) = body.guidance
        && !(0.0..=GUIDANCE_MAX).contains(&guidance)
    {
        errors.add(
            "guidance",
            format!("it is {guidance}, expected 0 to {GUIDANCE_MAX}"),
        );
    }
    let scale = body.scale.unwrap_or(1);
    if !(1..=SCALE_MAX).contains(&scale) {
        errors.add("scale", format!("it is {scale}, expected 1 to {SCALE_MAX}"));
    }
    if body
        .model
        .as_ref()
        .is_some_and(|m| m.is_empty() || m.len() > 256)
    {
        errors.add("model", "a model's name has 1 to 256 bytes");
    }
    if !errors.0.is_empty() {
        return Err(Failure::invalid(errors.0));
    }
    let total = total as usize;
    let grid = match body.layout.unwrap_or(if labels.len() == 1 {
        Layout::Grid
    } else {
        Layout::Rows
    }) {
        Layout::Rows => Grid::with_columns(labels.len(), total),
        Layout::Grid => Grid::square(total),
        Layout::Strip => Grid::with_columns(total, total),
    };
    // Numbers that JavaScript holds exactly, so that a seed survives any client.
    let seed = body
        .seed
        .unwrap_or_else(|| u64::from(getrandom::u32().unwrap_or_default()));
    let labels = labels.iter().cycle().take(total).cloned().collect();
    Ok(Draw {
        request: DrawRequest {
            model: body.model,
            labels,
            seed,
            steps: body.steps.map(|s| s as usize),
            guidance: body.guidance.map(|g| g as f32),
        },
        grid,
        scale: scale as usize,
        seeded: body.seed.is_some(),
    })
}

/// Whether a class exists the model says, when it is loaded; what can be no class of any model is refused now.
fn labels(digits: Option<Digits>, field: &str, errors: &mut Errors) -> Vec<String> {
    let labels: Vec<String> = match digits {
        None => ('0'..='9').map(String::from).collect(),
        Some(Digits::Text(text)) => text.chars().map(String::from).collect(),
        Some(Digits::List(list)) => list
            .into_iter()
            .map(|label| match label {
                LabelText::Index(i) => i.to_string(),
                LabelText::Name(name) => name,
            })
            .collect(),
    };
    if labels.is_empty() {
        errors.add(field, "there is nothing to draw");
    }
    let possible = |l: &String| {
        !l.is_empty()
            && l.len() <= LABEL_BYTES_MAX
            && l.chars()
                .all(|c| c.is_alphanumeric() || "-_ ./+&'".contains(c))
    };
    if let Some(bad) = labels.iter().find(|l| !possible(l)) {
        errors.add(field, format!("`{}` is no label", shown(bad)));
    }
    labels
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(result: Result<Draw, Failure>) -> String {
        format!("{:?}", result.expect_err("it should be refused"))
    }

    #[test]
    fn queries_name_every_bad_field_at_once() {
        let config = ServerConfig::default();
        let text = fields(one(
            "7",
            Some("seed=-1&steps=0&guidance=NaN&scale=99&colour=red&model="),
            &config,
        ));
        for field in ["seed", "steps", "guidance", "scale", "colour", "model"] {
            assert!(
                text.contains(&format!("field: \"{field}\"")),
                "{field}: {text}"
            );
        }
        assert!(fields(one("7", Some("seed=1&seed=2"), &config)).contains("twice"));
        assert!(fields(one("7", Some("seed=18446744073709551616"), &config)).contains("seed"));
        assert!(fields(one("<b>", None, &config)).contains("label"));
        assert!(
            one(
                "7",
                Some("seed=18446744073709551615&steps=8&guidance=2.5&scale=4"),
                &config
            )
            .is_ok()
        );
    }

    #[test]
    fn bodies_name_the_field_at_fault() {
        let config = ServerConfig::default();
        for (body, field) in [
            (r#"{"digits": "12", "seed": "x"}"#, "seed"),
            (r#"{"digits": "12", "colour": 1}"#, "colour"),
            (r#"{"digits": ""}"#, "digits"),
            (r#"{"digits": [1, {}]}"#, "digits"),
            (r#"{"count": 0}"#, "count"),
            (r#"{"count": 1e3}"#, "count"),
            (r#"{"count": 100001}"#, "count"),
            (r#"{"guidance": 1e400}"#, "guidance"),
            (r#"{"layout": "spiral"}"#, "layout"),
            ("{} {}", "body"),
            ("[1", "body"),
            ("", "body"),
        ] {
            let text = fields(many(body.as_bytes(), &config));
            assert!(
                text.contains(&format!("field: \"{field}")),
                "{body}: {text}"
            );
        }
    }

    #[test]
    fn sheets_are_laid_out_as_asked() {
        let config = ServerConfig::default();
        let grid = |body: &str| many(body.as_bytes(), &config).unwrap().grid;
        assert_eq!(
            grid(r#"{"digits": "2026"}"#),
            Grid {
                columns: 4,
                rows: 1
            }
        );
        assert_eq!(
            grid(r#"{"digits": "2026", "count": 3}"#),
            Grid {
                columns: 4,
                rows: 3
            }
        );
        assert_eq!(
            grid(r#"{"digits": "7", "count": 9}"#),
            Grid {
                columns: 3,
                rows: 3
            }
        );
        assert_eq!(
            grid(r#"{"digits": [2, "0"], "count": 2, "layout": "strip"}"#),
            Grid {
                columns: 4,
                rows: 1
            }
        );
        let draw = many(
            b"{\"digits\": \"2026\", \"count\": 2, \"seed\": 5}",
            &config,
        )
        .unwrap();
        assert_eq!(draw.request.labels.concat(), "20262026");
    }
}
