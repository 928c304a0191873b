//! moto: an S3 server that checks signatures, users' policies and conditions.

use super::proxy::Proxy;
use super::{Env, Process, tools, use_ring};
use bytes::Bytes;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::{ObjectStoreExt as _, path::Path};
use std::net::SocketAddr;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError, Weak};

const BUCKET: &str = "models";

/// One user's view of the server. Tests that run at the same time share the process, and name their objects
/// differently.
pub struct S3 {
    process: Arc<Process>,
    store: AmazonS3,
}

impl S3 {
    pub fn start() -> Self {
        use_ring();
        static RUNNING: Mutex<Weak<Process>> = Mutex::new(Weak::new());
        let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        let process = running.upgrade().unwrap_or_else(|| {
            let python = tools().join("python/bin/python");
            let mut command = Command::new(python);
            Arc::new(Process::start(
                command.args(["-c", include_str!("s3_server.py")]),
            ))
        });
        *running = Arc::downgrade(&process);
        let store = AmazonS3Builder::new()
            .with_endpoint(format!("http://{}", process.address()))
            .with_allow_http(true)
            .with_region("us-east-1")
            .with_bucket_name(BUCKET)
            .with_access_key_id(&process.words[1])
            .with_secret_access_key(&process.words[2])
            .build()
            .unwrap();
        Self { process, store }
    }

    pub fn address(&self) -> SocketAddr {
        self.process.address()
    }

    pub async fn put(&self, key: &str, bytes: impl Into<Bytes>) {
        let payload = bytes.into().into();
        self.store.put(&Path::from(key), payload).await.unwrap();
    }

    /// What the service needs to read an object by way of the proxy.
    pub fn env(&self, proxy: &Proxy, key: &str) -> Env {
        vec![
            ("MODEL_URI", format!("s3://{BUCKET}/{key}")),
            ("AWS_ENDPOINT_URL", format!("http://{}", proxy.address())),
            ("AWS_REGION", "us-east-1".to_owned()),
            ("AWS_ACCESS_KEY_ID", self.process.words[1].clone()),
            ("AWS_SECRET_ACCESS_KEY", self.process.words[2].clone()),
        ]
    }
}
