//! Cluster DNS on the node.

pub mod forward;
pub mod zone;
