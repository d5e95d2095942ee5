//! Durable writes and locks.
