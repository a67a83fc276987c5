//! The node's network beside translating: the device and its address, routes, the clients in it, who is outside, and
//! ending the UDP sockets of backends that are gone.

pub mod client;
pub mod crowd;
pub mod datagrams;
mod device;
pub mod guard;
pub mod holder;
mod keepalive;
pub mod picture;
pub mod route;
pub mod sock_diag;
pub mod socket_filter;
pub mod uplinks;

pub use client::netns_cookie;
pub use device::{Device, DeviceError, DeviceKind, ensure_device, remove_device};
pub use keepalive::keep_alive;
