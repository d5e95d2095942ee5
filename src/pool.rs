//! `pool.json`, the state of a node.
