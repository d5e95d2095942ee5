//! Kernel events and ticks in, reconcile requests out.
