//! The product as its users meet it: processes, sockets, stores and files.

mod app;
mod http_api;
mod parity;
mod same_bytes;
