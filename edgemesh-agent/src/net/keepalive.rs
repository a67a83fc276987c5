//! Finding out that the other end of a silent connection is there no more.

use std::{io, os::fd::AsFd};

use nix::sys::socket::{setsockopt, sockopt};

/// For how long a connection is silent until its other end is asked, in seconds.
const IDLE: u32 = 60;
/// How long an answer may take, in seconds.
const INTERVAL: u32 = 10;
/// How often it is asked.
const COUNT: u32 = 3;

/// Has the kernel end a TCP connection with `ETIMEDOUT` when its other end has answered nothing for 90 s: a pod or a
/// client that vanished with its node or its network says nothing, and what waits for it would wait for ever.
///
/// An end that is there and merely does not read goes on answering.
///
/// # Errors
///
/// It is no TCP socket.
pub fn keep_alive(socket: &impl AsFd) -> io::Result<()> {
    setsockopt(socket, sockopt::TcpKeepIdle, &IDLE)?;
    setsockopt(socket, sockopt::TcpKeepInterval, &INTERVAL)?;
    setsockopt(socket, sockopt::TcpKeepCount, &COUNT)?;
    Ok(setsockopt(socket, sockopt::KeepAlive, &true)?)
}
