//! Map layouts and selection logic shared by the eBPF programs and the agent.
//!
//! Everything here is `no_std`, allocates nothing and compiles for both `bpfel-unknown-none` and the host, so that the
//! very code the kernel runs is property-tested on the host against a plain model.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_op_in_unsafe_fn)]

mod addr;
pub mod alias;
pub mod checksum;
pub mod layout;
pub mod nat;
pub mod select;
pub mod sockets;

pub use addr::Addr;
