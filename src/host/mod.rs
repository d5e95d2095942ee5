//! The host configuration: desired, observed, plan, apply, verify.
