//! The Hugging Face Hub as far as a reader sees it: revisions are commits, files are somewhere else.

use super::fault::ObjectServer;
use super::wire::{Exchange, Wire};
use super::{Answer, Env, Served, answer};
use bytes::Bytes;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

pub const REPO: &str = "me/digits";
pub const TOKEN: &str = "hf_secret";

pub struct Hub {
    served: Served,
    pub wire: Wire,
    /// Where the weights really are: another host, to which the token must not go.
    pub cdn: ObjectServer,
    /// Branches and what they stand for.
    commits: Arc<Mutex<HashMap<String, String>>>,
}

impl Hub {
    /// A private repository whose branch `main` is at `commit`. `config` is its config.json, if it has one.
    pub async fn new(commit: &str, weights: impl Into<Bytes>, config: Option<String>) -> Self {
        let cdn = ObjectServer::new(weights).await;
        // Another name for the same interface, and so another host.
        let elsewhere = format!("http://localhost:{}", cdn.address().port());
        let commits = HashMap::from([("main".to_owned(), commit.to_owned())]);
        let commits = Arc::new(Mutex::new(commits));
        let wire = Wire::default();
        let (log, known) = (wire.clone(), commits.clone());
        let served = Served::new(move |request| {
            let (path, headers) = (request.uri().path(), request.headers());
            let exchange = log.begin(Exchange::new("GET", path, headers.clone()));
            let allowed = headers
                .get("authorization")
                .is_some_and(|v| v == &format!("Bearer {TOKEN}"));
            let answer = if allowed {
                route(path, &known.lock().unwrap(), config.as_deref(), &elsewhere)
            } else {
                answer(401, "")
            };
            exchange.lock().unwrap().status = answer.status().as_u16();
            std::future::ready(answer)
        })
        .await;
        Self {
            served,
            wire,
            cdn,
            commits,
        }
    }

    pub fn move_branch(&self, commit: &str) {
        self.commits
            .lock()
            .unwrap()
            .insert("main".to_owned(), commit.to_owned());
    }

    pub fn env(&self, revision_and_file: &str) -> Env {
        vec![
            ("MODEL_URI", format!("hf://{REPO}{revision_and_file}")),
            ("HF_ENDPOINT", format!("http://{}", self.served.address)),
            ("HF_TOKEN", TOKEN.to_owned()),
        ]
    }
}

fn route(path: &str, commits: &HashMap<String, String>, config: Option<&str>, cdn: &str) -> Answer {
    if let Some(revision) = path.strip_prefix(&format!("/api/models/{REPO}/revision/")) {
        let commit = match commits.get(revision) {
            Some(commit) => commit,
            None if commits.values().any(|c| c == revision) => revision,
            None => return answer(404, ""),
        };
        let beside = config.map_or("", |_| r#", {"rfilename": "config.json"}"#);
        let files = format!(r#"[{{"rfilename": "model.safetensors"}}{beside}]"#);
        return answer(
            200,
            format!(r#"{{"sha": "{commit}", "siblings": {files}}}"#),
        );
    }
    // Files of a branch would be found too; that nobody asks for them is what a test looks at.
    let file = path
        .strip_prefix(&format!("/{REPO}/resolve/"))
        .and_then(|rest| rest.split_once('/'));
    match (file, config) {
        (Some((_, "config.json")), Some(config)) => answer(200, config.to_owned()),
        (Some((commit, "model.safetensors")), _) => {
            let mut redirect = answer(302, "");
            let to = format!("{cdn}/blobs/{commit}?signature=1");
            redirect
                .headers_mut()
                .insert("location", to.parse().unwrap());
            redirect
        }
        _ => answer(404, ""),
    }
}
