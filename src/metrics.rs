//! The metrics registry and its HTTP end.
