//! The clouds that lend the addresses.
