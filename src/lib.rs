//! A scale-to-zero container that draws handwritten digits.
//!
//! The main path of a request: [`server`] reads and checks it, [`engine`] loads the model if it is cold and
//! queues the digits, [`model`] takes one step of all rows at a time, [`image`] makes a PNG of them. The main
//! path of a load: [`storage`] fetches ranges of one object version and gives them out in order, verified;
//! [`model`] converts them straight into tensors.
//!
//! Who uses whom: `main -> cli -> server -> engine -> {model, storage}`, `server -> image`.
//!
//! - `storage` knows nothing of tensors, `model` nothing of tokio, hyper or stores, `engine` nothing of HTTP.
//! - Only `config` and `cli` read the environment, but for the stores' own credentials and endpoints.
//! - Only `server` chooses status codes.
//! - Opening the port never waits for weights. A failed load leaves the model cold; the next request tries again.
//! - Nothing is served from weights that were not verified. No partial file is visible under a cache key.
//! - Every queue, wait, retry and body has a bound, stated where it is configured.
//! - No compute on the async runtime.

// Allowed in `model::kernels` alone.
#![deny(unsafe_code)]

pub mod api;
pub mod cli;
pub mod client;
pub mod config;
pub mod engine;
pub mod image;
pub mod model;
pub mod server;
pub mod storage;
pub mod telemetry;
