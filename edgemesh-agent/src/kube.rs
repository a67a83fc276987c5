//! Metadata sources.
