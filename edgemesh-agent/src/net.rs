//! What the agent makes in the host's network: its device and address.

mod device;

pub use device::{Device, DeviceError, DeviceKind, ensure_device, remove_device};
