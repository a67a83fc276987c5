//! The lab, and the programs and tests that use it.
//!
//! [`lab`] raises real agents in network namespaces on one machine. [`probe`] is the other half: the code of the
//! `lab-probe` binary, which runs inside pods and nodes, serves and makes connections there, and reports over a pipe.
//! [`meta_server`] is KubeEdge's metaServer as agents at the edge meet it; the agent's own tests use it, too.

pub mod demo;
pub mod lab;
pub mod meta_server;
pub mod probe;
