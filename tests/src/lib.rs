//! The lab, and the programs and tests that use it.
//!
//! [`lab`] raises real agents in network namespaces on one machine. [`probe`] is the other half: the code of the
//! `lab-probe` binary, which runs inside pods and nodes, serves and makes connections there, and reports over a pipe.

pub mod demo;
pub mod lab;
pub mod probe;
