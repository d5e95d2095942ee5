//! cocoon-net gives the VMs of a microVM host VPC-routable addresses and isolates their egress.
//!
//! Every command that changes the host is the same journey, and the modules are its stations:
//!
//! ```text
//! arguments or pool.json -> NodeConfig -> desired -> observed -> plan -> apply -> verify -> persist
//!                           (valid)       (pure)     (read)     (pure)  (effects) (re-plan: empty)
//! ```
//!
//! | where | what |
//! |---|---|
//! | [`cli`] | the command line, as clap types |
//! | [`commands`] | one file per command, each the story of that command |
//! | [`config`] | the validated request: what a node is asked to be |
//! | [`pool`] | `pool.json`, the state that `init` and `adopt` leave to the daemon |
//! | [`files`] | durable writes and locks |
//! | [`host`] | desired, observed, plan, apply; firewall, links, sysctl, CNI; the live probe |
//! | [`reconcile`] | one pass over the host, and what follows from it: health, grants, counters, quarantine |
//! | [`systemd`] | what the service manager is told |
//! | [`watch`] | kernel events and ticks in, "reconcile now" out |
//! | [`dhcp`] | the lease engine (pure), the lease store (durable), the server (effects) |
//! | [`cloud`] | the clouds that lend the addresses: GKE, Volcengine, none |
//! | [`command`] | the only place that starts a process |
//! | [`log`] | errors on one line, and no line over and over |
//! | `netlink` | netfilter's own netlink subsystems, by hand |
//! | [`metrics`] | the metrics registry and its HTTP end |

pub mod cli;
pub mod cloud;
pub mod command;
pub mod commands;
pub mod config;
pub mod dhcp;
pub mod files;
pub mod host;
pub mod log;
pub mod metrics;
mod netlink;
pub mod pool;
pub mod reconcile;
pub mod systemd;
pub mod watch;
