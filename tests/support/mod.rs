//! A network of namespaces to test cocoon-net in: a node, its VMs, and an internet.
//!
//! ```text
//!   vm a        vm b              the node                     the internet
//!   eth0        eth0    veth-a, veth-b -> cni0   ens4          node0: 10.128.0.1
//!   .11 --------- .12 ------------ 172.20.100.1  10.128.0.2 -- lo: 10.1.2.3, 192.0.2.7, 203.0.113.7, ...
//! ```
//!
//! Each box is a network namespace of its own with a private mount namespace ([`Host`]): its `/run`, `/etc`, `/var/lib`
//! and `/sys` are its own, `/` is read-only, `/tmp` is shared with the test. Nothing in it reaches the machine's
//! interfaces, tables or files, tests run in parallel, and all of it goes when the test ends, however it ends: the
//! namespaces hang on threads and processes of the test alone. Inside, the real kernel and the real tools work.
//!
//! ```no_run
//! //! What the drops keep a VM from.
//! mod support;
//! use support::{GATEWAY, INTERNET, Node};
//!
//! #[test]
//! fn a_vm_does_not_reach_its_neighbour() {
//!     let node = Node::new();                       // a fresh host: uplink ens4, no bridge, toggles 0
//!     node.adopt("--drop-internal-access").succeeded();
//!     let (a, b) = (node.vm("a"), node.vm("b"));    // plugged into cni0: .11 and .12, default route
//!     assert!(a.reaches(GATEWAY));                  // the positive control: several tries, a few seconds
//!     assert!(a.reaches(INTERNET));
//!     assert!(a.is_cut_off_from(b.address()));      // three tries, all lost
//! }
//! ```
//!
//! What there is:
//!
//! - Making things. [`Node::new`]; [`Node::builder`] for the iptables backend, more interfaces, no default route;
//!   [`Node::bridge`] for a bridge made by hand; [`Node::vm`] and [`Node::vm_builder`] (no address, another bridge).
//! - Running things, in any namespace, arguments as a list or as one string of words: `node.run("ip link")` gives an
//!   [`Output`], `node.ok("ip link")` insists on success and gives stdout, `node.spawn(...)` a [`Process`] that is killed
//!   when it is dropped, and `node.command(...)` takes an environment, standard input and a deadline.
//!   `node.cocoon(...)` runs the program under test (`node.adopt(...)` with the usual flags), `node.daemon(...)` starts it and waits for its `READY=1`,
//!   `node.execs(...)` lists the processes it starts. The environment is clean but for what [`Host::set_env`] sets.
//! - Running code: `node.enter(move || ...)` calls a closure on the namespace's thread; sockets made there stay there.
//! - Files: `read`, `read_json`, `try_read`, `write`, `exists`, `mkdir`, all as seen from inside.
//! - Faults: `fake_tool("modprobe", "#!/bin/sh\nexit 1\n")` puts a stand-in first on `PATH` (`real_tool` finds the one it
//!   hides), `read_only(dir)`, `full(dir)`, `hide(dir)`, `hold_lock(path)`, `set_sysctl`, [`Process::kill_after`], `settle` (wait until nothing
//!   but spawned processes is left running).
//! - Traffic: `reaches` and `is_cut_off_from` by ping; `tcp_reaches`, `tcp_is_cut_off_from`, `udp_reaches`,
//!   `udp_is_cut_off_from` against [`Host::echo`]; `vm.frame_reaches(&other, Frame)` for anything that is not IP.
//! - The state of a host: `node.rules("filter", "FORWARD")` lists a chain; [`Host::snapshot`] holds both iptables backends, ipsets, links, addresses, routes, sysctls and
//!   files; `node.assert_back_to(&before)` waits a moment for the kernel and shows what differs.
//!
//! A test's own functions outside `#[test]` may not `unwrap`: end a call with [`Output::succeeded`] or [`Host::ok`], which
//! panic with everything there is to say.

// Every test file is a crate of its own and uses the part it needs.
#![allow(dead_code, unused_imports, clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod faults;
mod host;
mod node;
mod process;
mod snapshot;
mod traffic;
mod vm;

pub use host::{Host, assert_private};
pub use node::{Backend, Node, NodeBuilder};
pub use process::{Cmd, IntoArgs, Output, Process, eventually};
pub use snapshot::Snapshot;
pub use traffic::{Echo, Frame, Sniffer};
pub use vm::{Vm, VmBuilder};

/// The subnet of the VMs, as most tests use it.
pub const SUBNET: &str = "172.20.100.0/24";
/// The address of `cni0` in [`SUBNET`].
pub const GATEWAY: &str = "172.20.100.1";
/// The node's own address on its uplink.
pub const NODE_ADDRESS: &str = "10.128.0.2";
/// The node's next hop.
pub const ROUTER: &str = "10.128.0.1";
/// An internet address that no test drops.
pub const INTERNET: &str = "203.0.113.7";
/// A second one.
pub const INTERNET_TOO: &str = "192.0.2.7";
/// An address within 10.0.0.0/8, behind the uplink.
pub const INSIDE_TEN: &str = "10.1.2.3";
/// The metadata service of most clouds; on the internet's `lo`.
pub const METADATA: &str = "169.254.169.254";
/// The metadata service of Volcengine; on the internet's `lo`.
pub const METADATA_VOLCENGINE: &str = "100.96.0.96";
