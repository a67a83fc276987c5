//! What the agent does to the node's network beside translating: its device and address, and ending the UDP sockets of
//! backends that are gone.

mod device;
pub mod sock_diag;

pub use device::{Device, DeviceError, DeviceKind, ensure_device, remove_device};
