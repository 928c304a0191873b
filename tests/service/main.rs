//! The product as its users meet it: processes, sockets, stores and files.

mod app;
mod bad_weights;
mod cache;
mod catalogue;
mod client;
mod cold;
mod examples;
mod faults;
mod forms;
mod http_api;
mod limits;
mod parity;
mod remote;
mod same_bytes;
mod sources;
mod stores;
