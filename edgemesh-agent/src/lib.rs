//! The EdgeMesh node agent as a library; `main.rs` is only its command line.
//!
//! Data flows one way: a source ([`kube`]) delivers [`model::Event`]s, the [`model::Builder`] turns them into immutable
//! [`model::ServiceTable`]s, and consumers ([`dataplane`]) compare each table with the one before. [`app`] puts the parts
//! together.

pub mod admin;
pub mod alias;
pub mod allocator;
pub mod app;
pub mod cleanup;
pub mod conditions;
pub mod config;
pub mod dataplane;
pub mod dns;
pub mod health;
mod inotify;
pub mod kube;
pub mod lifecycle;
pub mod mesh;
pub mod metrics;
pub mod model;
pub mod net;
pub mod proxy;
pub mod show;
pub mod snapshot;
pub mod socks5;
pub mod status;
pub mod telemetry;
pub mod tunnel;
