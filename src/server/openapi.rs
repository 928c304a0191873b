//! The description of the API (OpenAPI 3.1), with this server's own limits.

use super::ServerConfig;

const DOCUMENT: &str = include_str!("openapi.json");

pub(super) fn document(_config: &ServerConfig) -> String {
    DOCUMENT.to_owned()
}
