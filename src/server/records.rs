//! How a stream's records are written: as lines of JSON, as events, or as the parts of a multipart body.

use super::accept::Form;
use super::body::{Gone, Sender};
use super::problem::Failure;
use crate::api::{Problem, Record, headers};
use crate::image::{Picture, encode};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

/// The id of a stream's last event. A browser's EventSource connects again when a stream ends, and says which event was
/// its last: it is told that there is nothing more.
pub(super) const LAST_EVENT: &str = "end";

/// Writes the records of one stream.
pub(super) struct Records {
    form: Form,
    sender: Sender,
    boundary: String,
}

impl Records {
    pub(super) fn new(form: Form, sender: Sender, boundary: String) -> Self {
        Self {
            form,
            sender,
            boundary,
        }
    }

    /// Resolves when the client has left.
    pub(super) async fn closed(&self) {
        self.sender.closed().await;
    }

    /// Of a multipart body only the digits are parts.
    ///
    /// # Errors
    /// The client has left, or does not read.
    pub(super) async fn send(&mut self, record: &Record) -> Result<(), Gone> {
        match text(self.form, record) {
            Some(text) => self.sender.send(text).await,
            None => Ok(()),
        }
    }

    pub(super) fn wants_previews(&self) -> bool {
        self.form != Form::Multipart
    }

    pub(super) async fn preview(
        &mut self,
        index: usize,
        step: usize,
        steps: usize,
        picture: &Picture,
    ) -> Result<(), Gone> {
        let record = Record::Preview {
            index: index as u64,
            step: step as u64,
            steps: steps as u64,
            png: STANDARD.encode(encode(picture)),
        };
        self.send(&record).await
    }

    pub(super) async fn digit(
        &mut self,
        index: usize,
        label: &str,
        seed: u64,
        png: Vec<u8>,
    ) -> Result<(), Gone> {
        if self.form == Form::Multipart {
            return self.part(index, label, seed, &png).await;
        }
        let record = Record::Digit {
            index: index as u64,
            label: label.to_owned(),
            seed,
            png: STANDARD.encode(png),
        };
        self.send(&record).await
    }

    async fn part(&mut self, index: usize, label: &str, seed: u64, png: &[u8]) -> Result<(), Gone> {
        // Names of classes may have characters that a header may not.
        let label = utf8_percent_encode(label, NON_ALPHANUMERIC);
        let head = format!(
            "--{}\r\ncontent-type: image/png\r\ncontent-length: {}\r\ncontent-disposition: inline; filename=\"{index}.png\"\r\n{}: {index}\r\n{}: {label}\r\n{}: {seed}\r\n\r\n",
            self.boundary,
            png.len(),
            headers::INDEX,
            headers::LABEL,
            headers::SEED,
        );
        let part = [head.as_bytes(), png, b"\r\n"].concat();
        self.sender.send(Bytes::from(part)).await
    }

    pub(super) async fn done(mut self, record: &Record) {
        let end = match self.form {
            Form::Multipart => Some(format!("--{}--\r\n", self.boundary)),
            _ => text(self.form, record),
        };
        self.end(end.unwrap_or_default()).await;
    }

    pub(super) async fn failed(mut self, failure: &Failure, request_id: &str) {
        let problem = failure.problem(request_id);
        let retry_after = failure.retry_after_secs();
        let end = match self.form {
            Form::Multipart => problem_part(&self.boundary, &problem),
            _ => text(
                self.form,
                &Record::Error {
                    problem,
                    retry_after,
                },
            )
            .unwrap_or_default(),
        };
        self.end(end).await;
    }

    async fn end(&mut self, text: String) {
        if self.sender.send(text).await.is_ok() {
            self.sender.finish().await;
        }
    }
}

fn problem_part(boundary: &str, problem: &Problem) -> String {
    let json = serde_json::to_string_pretty(problem).unwrap_or_default();
    format!(
        "--{boundary}\r\ncontent-type: application/problem+json\r\ncontent-length: {}\r\n\r\n{json}\r\n--{boundary}--\r\n",
        json.len()
    )
}

fn text(form: Form, record: &Record) -> Option<String> {
    let json = serde_json::to_string(record).unwrap_or_default();
    match form {
        Form::Ndjson => Some(json + "\n"),
        Form::Events => {
            let last = matches!(record, Record::Done { .. } | Record::Error { .. });
            let id = match last {
                true => format!("id: {LAST_EVENT}\n"),
                false => String::new(),
            };
            Some(format!("event: {}\n{id}data: {json}\n\n", record.kind()))
        }
        Form::Multipart | Form::Png | Form::Apng => None,
    }
}
