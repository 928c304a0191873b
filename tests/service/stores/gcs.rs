//! Google Cloud Storage as far as a reader sees it: an object server that wants a bearer token, and a metadata
//! server that gives one out.

use super::fault::{Fault, ObjectServer};
use super::{Env, Served, answer};
use bytes::Bytes;
use std::sync::{Arc, Mutex};

const BUCKET: &str = "models";

pub struct Gcs {
    pub objects: ObjectServer,
    metadata: Served,
    /// What the metadata server gives out.
    issued: Arc<Mutex<String>>,
}

impl Gcs {
    /// Wants the token `good`, and gives it out.
    pub async fn new(key: &str, object: impl Into<Bytes>) -> Self {
        let objects = ObjectServer::new(object).await;
        let path = format!("/{BUCKET}/{key}");
        objects.script(move |request| match request.header("authorization") {
            // object_store writes a dot as %2E.
            Some("Bearer good") if request.path.replace("%2E", ".") == path => None,
            Some("Bearer good") => Some(Fault::Status(404)),
            _ => Some(Fault::Status(401)),
        });
        let issued = Arc::new(Mutex::new("good".to_owned()));
        let token = issued.clone();
        let metadata = Served::new(move |request| {
            let asked_rightly = request
                .headers()
                .get("metadata-flavor")
                .is_some_and(|f| f == "Google")
                && request.uri().path()
                    == "/computeMetadata/v1/instance/service-accounts/default/token";
            let token = token.lock().unwrap().clone();
            async move {
                if !asked_rightly {
                    return answer(403, "");
                }
                let text = format!(
                    r#"{{"access_token": "{token}", "expires_in": 3599, "token_type": "Bearer"}}"#
                );
                answer(200, text)
            }
        })
        .await;
        Self {
            objects,
            metadata,
            issued,
        }
    }

    pub fn issue(&self, token: &str) {
        *self.issued.lock().unwrap() = token.to_owned();
    }

    pub fn env(&self, key: &str) -> Env {
        let metadata = self.metadata.address.to_string();
        vec![
            ("MODEL_URI", format!("gs://{BUCKET}/{key}")),
            (
                "GOOGLE_BASE_URL",
                format!("http://{}", self.objects.address()),
            ),
            ("GCE_METADATA_HOST", metadata.clone()),
            ("GCE_METADATA_IP", metadata),
        ]
    }
}
