//! Logging.

use std::io::{self, IsTerminal};

use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, util::SubscriberInitExt};

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, clap::ValueEnum)]
pub enum LogFormat {
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Sends the log to standard error; `RUST_LOG` chooses what, `info` by default.
///
/// # Errors
///
/// `RUST_LOG` is malformed, or a log is installed already.
pub fn init(format: LogFormat) -> anyhow::Result<()> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(text) if !text.is_empty() => {
            EnvFilter::try_new(&text).map_err(|error| anyhow::anyhow!("cannot use RUST_LOG='{text}': {error}"))?
        }
        // The libraries below us repeat at info and warn what our own conditions say better.
        _ => EnvFilter::new(
            "info,aya=warn,hyper=error,kube=error,libp2p=error,netlink_packet_route=error,quinn=error,tower=error",
        ),
    };
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let lines = match format {
        LogFormat::Text => lines.with_ansi(io::stderr().is_terminal()).with_target(false).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(lines).try_init()?;
    Ok(())
}
