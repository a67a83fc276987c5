//! The node's network beside translating: the device and its address, routes, the clients in it, and ending the UDP
//! sockets of backends that are gone.

pub mod client;
pub mod datagrams;
mod device;
pub mod holder;
pub mod route;
pub mod sock_diag;

pub use client::netns_cookie;
pub use device::{Device, DeviceError, DeviceKind, ensure_device, remove_device};
