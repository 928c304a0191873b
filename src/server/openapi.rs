//! The description of the API (OpenAPI 3.1). What depends on the configuration or on the model is filled in where the
//! document says `x-limit`.

use super::routes::App;
use serde_json::{Map, Value, json};

const DOCUMENT: &str = include_str!("openapi.json");

impl App {
    pub(super) fn openapi(&self) -> String {
        let mut document: Value = serde_json::from_str(DOCUMENT).unwrap_or_default();
        document["info"]["version"] = env!("CARGO_PKG_VERSION").into();
        // Of a service with one model the classes are known as soon as it is loaded.
        let ready = self.engine.loaded().into_iter().filter_map(|m| m.info);
        let classes: Vec<Vec<String>> = ready.map(|i| i.header.class_names.clone()).collect();
        let classes = match &classes[..] {
            [one] => Some(&one[..]),
            _ => None,
        };
        let limits = Limits {
            digits: self.config.digits_max,
            steps: self.config.steps_max,
            classes,
        };
        limits.fill(&mut document);
        serde_json::to_string_pretty(&document).unwrap_or_default()
    }
}

struct Limits<'a> {
    digits: usize,
    steps: usize,
    classes: Option<&'a [String]>,
}

impl Limits<'_> {
    fn fill(&self, value: &mut Value) {
        match value {
            Value::Object(object) => {
                if let Some(Value::String(limit)) = object.remove("x-limit") {
                    self.set(object, &limit);
                }
                object.values_mut().for_each(|v| self.fill(v));
            }
            Value::Array(list) => list.iter_mut().for_each(|v| self.fill(v)),
            _ => {}
        }
    }

    fn set(&self, schema: &mut Map<String, Value>, limit: &str) {
        let mut put = |name: &str, value: Value| {
            schema.insert(name.to_owned(), value);
        };
        match (limit, self.classes) {
            ("digits", _) => put("maximum", self.digits.into()),
            ("steps", _) => put("maximum", self.steps.into()),
            ("list", _) => put("maxItems", self.digits.into()),
            ("text", classes) => {
                put("maxLength", self.digits.into());
                let one = |c: &String| c.len() == 1 && c.chars().all(|c| c.is_ascii_alphanumeric());
                if let Some(classes) = classes.filter(|c| c.iter().all(one)) {
                    put("pattern", format!("^[{}]+$", classes.concat()).into());
                }
            }
            ("label", Some(classes)) => put("enum", json!(classes)),
            ("index", Some(classes)) => put("maximum", (classes.len() - 1).into()),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::*;
    use serde::{Serialize, de::DeserializeOwned};

    fn schema(name: &str) -> Value {
        let document: Value = serde_json::from_str(DOCUMENT).unwrap();
        document["components"]["schemas"][name].clone()
    }

    /// The document has every field that the type has and no other, and calls those required without which the type
    /// cannot be read. `full` has all of its optional fields.
    fn agrees<T: Serialize + DeserializeOwned>(name: &str, full: &T) {
        let schema = schema(name);
        let full = serde_json::to_value(full).unwrap();
        let (full, fields) = (full.as_object().unwrap(), schema["properties"].as_object());
        let fields = fields.unwrap_or_else(|| panic!("{name} is not in the document"));
        let names = |m: &Map<String, Value>| m.keys().cloned().collect::<Vec<_>>();
        let sorted = |mut names: Vec<String>| {
            names.sort();
            names
        };
        assert_eq!(sorted(names(full)), sorted(names(fields)), "{name}");
        let none = json!([]);
        let required = schema.get("required").unwrap_or(&none).as_array().unwrap();
        for field in full.keys() {
            let mut without = full.clone();
            without.remove(field);
            let needed = serde_json::from_value::<T>(without.into()).is_err();
            let said = required.iter().any(|r| r == field);
            assert_eq!(said, needed, "{name}.{field}: required");
        }
    }

    #[test]
    fn the_document_agrees_with_the_types() {
        agrees(
            "GenerateRequest",
            &GenerateRequest {
                digits: Some(Digits::Text("1".into())),
                count: Some(1),
                seed: Some(1),
                steps: Some(1),
                guidance: Some(1.0),
                scale: Some(1),
                layout: Some(Layout::Grid),
                model: Some("m".into()),
            },
        );
        let problem = Problem {
            kind: "k".into(),
            title: "t".into(),
            status: 400,
            detail: "d".into(),
            request_id: "r".into(),
            errors: vec![FieldError {
                field: "f".into(),
                detail: "d".into(),
            }],
        };
        agrees("FieldError", &problem.errors[0]);
        agrees("Problem", &problem);
        let ready = ReadyModel {
            version: "v".into(),
            classes: vec![],
            image_size: 28,
            channels: 1,
            parameters: 1,
            device: "cpu".into(),
            origin: "file".into(),
            verified: "sha256".into(),
            default_steps: 4,
            default_guidance: 1.5,
        };
        agrees("ReadyModel", &ready);
        let entry = ModelEntry {
            name: "m".into(),
            state: "ready".into(),
            source: "s".into(),
            bytes_arrived: 1,
            bytes_total: 1,
            seconds_left: Some(1),
            error: Some("e".into()),
            ready: Some(ready),
        };
        agrees("ModelEntry", &entry);
        agrees(
            "Models",
            &Models {
                models: vec![entry],
            },
        );
        let (status, model) = ("ok".into(), "cold".into());
        agrees("Health", &Health { status, model });
        let text = || "t".to_owned();
        for record in [
            Record::Queued {
                request_id: text(),
                digits: 1,
                seed: 1,
                waiting: 1,
                columns: 1,
                rows: 1,
            },
            Record::Loading {
                model: text(),
                bytes_arrived: 1,
                bytes_total: 1,
                seconds_left: Some(1),
            },
            Record::Started {
                model: text(),
                model_version: text(),
                image_size: 1,
                channels: 1,
                steps: 1,
                guidance: 1.0,
            },
            Record::Preview {
                index: 1,
                step: 1,
                steps: 1,
                png: text(),
            },
            Record::Digit {
                index: 1,
                label: text(),
                seed: 1,
                png: text(),
            },
            Record::Done {
                digits: 1,
                seed: 1,
                model: text(),
                model_version: text(),
                timing: Default::default(),
            },
            Record::Error {
                problem,
                retry_after: Some(1),
            },
        ] {
            let kind = record.kind();
            let (first, rest) = kind.split_at(1);
            let name = format!("Record{}{rest}", first.to_uppercase());
            agrees(&name, &record);
            assert_eq!(schema(&name)["properties"]["type"]["const"], kind);
            let all = schema("Record")["oneOf"].to_string();
            assert!(all.contains(&name), "{name} is no Record");
        }
    }

    #[test]
    fn limits_are_those_of_the_configuration_and_the_model() {
        let mut document: Value = serde_json::from_str(DOCUMENT).unwrap();
        let classes = ["0", "1"].map(String::from);
        let limits = Limits {
            digits: 7,
            steps: 9,
            classes: Some(&classes),
        };
        limits.fill(&mut document);
        assert!(!document.to_string().contains("x-limit"));
        let fields = &document["components"]["schemas"]["GenerateRequest"]["properties"];
        assert_eq!(fields["count"]["maximum"], 7);
        assert_eq!(fields["steps"]["maximum"], 9);
        assert_eq!(fields["digits"]["anyOf"][0]["pattern"], "^[01]+$");
    }
}
