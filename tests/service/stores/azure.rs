//! azurite: Azure's blob service, with keys and conditions.

use super::proxy::Proxy;
use super::{Env, Process, tools, use_ring};
use bytes::Bytes;
use object_store::azure::{MicrosoftAzure, MicrosoftAzureBuilder};
use object_store::{ObjectStoreExt as _, path::Path};
use std::net::SocketAddr;
use std::process::Command;

const CONTAINER: &str = "models";

pub struct Azure {
    process: Process,
    store: MicrosoftAzure,
}

impl Azure {
    /// None where it is not installed, for want of npm.
    pub fn start() -> Option<Self> {
        let folder = tools().join("azurite");
        if !folder.join("node_modules/azurite").is_dir() {
            return None;
        }
        use_ring();
        let mut command = Command::new("node");
        command
            .args(["-e", include_str!("azure_server.js"), "--"])
            .arg(folder);
        let process = Process::start(&mut command);
        let store = MicrosoftAzureBuilder::new()
            .with_endpoint(endpoint(process.address(), &process.words[1]))
            .with_allow_http(true)
            .with_container_name(CONTAINER)
            .with_account(&process.words[1])
            .with_access_key(&process.words[2])
            .build()
            .unwrap();
        Some(Self { process, store })
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
        let account = &self.process.words[1];
        vec![
            ("MODEL_URI", format!("az://{CONTAINER}/{key}")),
            ("AZURE_STORAGE_ENDPOINT", endpoint(proxy.address(), account)),
            ("AZURE_STORAGE_ACCOUNT_NAME", account.clone()),
            ("AZURE_STORAGE_ACCOUNT_KEY", self.process.words[2].clone()),
        ]
    }
}

/// Outside of Azure the account is the first part of the path.
fn endpoint(address: SocketAddr, account: &str) -> String {
    format!("http://{address}/{account}")
}
