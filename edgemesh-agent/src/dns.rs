//! Cluster DNS on the node.

pub mod zone;
