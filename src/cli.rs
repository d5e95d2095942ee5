//! The command line: clap types only. Completions and man pages are made from these same types.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand};
use jiff::SignedDuration;

use crate::config::{
    self, ConfigError, DEFAULT_CNI_CONF_DIR, DEFAULT_STATE_DIR, DropCidr, InterfaceName, Mtu, NodeName, Platform,
    Subnet,
};
use crate::metrics::ListenAddr;

/// Exit status of wrong usage, a bad flag value included.
pub const USAGE_STATUS: u8 = 2;

/// VPC-routable addresses and enforced egress isolation for the VMs of a microVM host
#[derive(Debug, Parser)]
#[command(name = "cocoon-net", version, propagate_version = true, after_help = AFTER_HELP)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const AFTER_HELP: &str = "\
Environment:
  COCOON_NET_LOG_LEVEL     debug, info, warn or error [default: info]
  COCOON_NET_LOG_FORMAT    text or json [default: text]
  COCOON_NET_METRICS_ADDR  default of the daemon's --metrics-addr
  COCOON_NET_CLOUD_TIMEOUT seconds to wait for a call of gcloud or ve, and for what it sets in motion

Exit status: 0 done; 1 failed; 2 wrong usage; 3 `check` looked, and the node is not as it must be.";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Claim addresses in the cloud, configure this host and write pool.json
    #[command(args_override_self = true)]
    Init(NodeArgs),
    /// Take over addresses that are routed here already, without any cloud call
    #[command(args_override_self = true)]
    Adopt(AdoptArgs),
    /// Keep the host configuration true and serve DHCP, until told to stop
    #[command(args_override_self = true)]
    Daemon(DaemonArgs),
    /// Show the pool, the leases and what isolation has dropped
    #[command(args_override_self = true)]
    Status(StatusArgs),
    /// Compare the host with pool.json; exit 3 when it is not as it must be
    #[command(args_override_self = true)]
    Check(CheckArgs),
    /// Stop the daemon, give the addresses back and remove everything of ours
    #[command(args_override_self = true)]
    Teardown(TeardownArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the man pages into a folder
    #[command(hide = true)]
    Man {
        /// The folder
        dir: PathBuf,
    },
}

/// What a node is asked to be.
#[derive(Debug, Clone, Args)]
pub struct NodeArgs {
    /// gke, volcengine or none; detected from the instance metadata when left out
    #[arg(long, value_name = "PLATFORM")]
    pub platform: Option<Platform>,
    /// Virtual node name
    #[arg(long, value_name = "NAME")]
    pub node_name: NodeName,
    /// The VMs' IPv4 subnet
    #[arg(long, value_name = "CIDR")]
    pub subnet: Subnet,
    /// Addresses in the pool, from the subnet's first host on [default: 140 for init, 253 for adopt]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = pool_size)]
    pub pool_size: Option<usize>,
    /// Address of cni0 [default: the subnet's first host]
    #[arg(long, value_name = "IP", value_parser = config::parse_address)]
    pub gateway: Option<Ipv4Addr>,
    /// The uplink [default: the default route's interface; without one ens4, on volcengine eth0]
    #[arg(long, value_name = "IF", allow_hyphen_values = true)]
    pub primary_nic: Option<InterfaceName>,
    /// Resolvers handed to the VMs, separated by commas
    #[arg(long, value_name = "LIST", default_value = "8.8.8.8,1.1.1.1", value_parser = dns)]
    pub dns: DnsList,
    /// No VM-to-VM traffic in the subnet
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false",
          action = ArgAction::Set, value_parser = switch, value_name = "BOOL", hide_default_value = true, hide_possible_values = true)]
    pub drop_internal_access: bool,
    /// VMs may not reach CIDR; can be given more than once
    #[arg(long, value_name = "CIDR", value_delimiter = ',', action = ArgAction::Append)]
    pub drop_cidr: Vec<DropCidr>,
    /// VMs may not reach the cloud's metadata service, which hands out the node's credentials
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false",
          action = ArgAction::Set, value_parser = switch, value_name = "BOOL", hide_default_value = true, hide_possible_values = true)]
    pub drop_metadata_access: bool,
    /// VMs may not open connections to the node itself, but for DHCP and ping
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false",
          action = ArgAction::Set, value_parser = switch, value_name = "BOOL", hide_default_value = true, hide_possible_values = true)]
    pub drop_host_access: bool,
    /// MTU of cni0 and of the VMs, in bytes [default: the primary NIC's]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub mtu: Option<Mtu>,
    /// Where the CNI configuration is written
    #[arg(long, value_name = "DIR", default_value = DEFAULT_CNI_CONF_DIR)]
    pub cni_conf_dir: PathBuf,
    #[command(flatten)]
    #[expect(missing_docs, reason = "a doc comment would become the help of the command")]
    pub state: StateArgs,
    #[command(flatten)]
    #[expect(missing_docs, reason = "a doc comment would become the help of the command")]
    pub dry_run: DryRunArgs,
}

/// Where the state is.
#[derive(Debug, Clone, Args)]
pub struct StateArgs {
    /// Where pool.json lives
    #[arg(long, value_name = "DIR", default_value = DEFAULT_STATE_DIR)]
    pub state_dir: PathBuf,
}

/// How to look ahead.
#[derive(Debug, Clone, Copy, Args)]
pub struct DryRunArgs {
    /// Print what would change, exactly, and change nothing
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false",
          action = ArgAction::Set, value_parser = switch, value_name = "BOOL", hide_default_value = true, hide_possible_values = true)]
    pub dry_run: bool,
    /// With --dry-run: print it as JSON
    #[arg(long, requires = "dry_run")]
    pub json: bool,
}

/// `adopt`
#[derive(Debug, Clone, Args)]
pub struct AdoptArgs {
    #[command(flatten)]
    #[expect(missing_docs, reason = "a doc comment would become the help of the command")]
    pub node: NodeArgs,
    /// Apply the rules now; otherwise they take effect when the daemon starts
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false",
          action = ArgAction::Set, value_parser = switch, value_name = "BOOL", hide_default_value = true, hide_possible_values = true)]
    pub manage_iptables: bool,
}

/// `daemon`
#[derive(Debug, Clone, Args)]
pub struct DaemonArgs {
    #[command(flatten)]
    #[expect(missing_docs, reason = "a doc comment would become the help of the command")]
    pub state: StateArgs,
    /// Where leases are kept [default: leases.json in the state directory]
    #[arg(long, value_name = "FILE", value_parser = lease_file)]
    pub lease_file: Option<PathBuf>,
    /// How long a lease lasts, such as 24h or 1h30m
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = lease_time)]
    pub lease_time: Duration,
    /// Addresses that one bridge port may hold; 0: no limit
    #[arg(long, value_name = "N", default_value_t = 8, allow_negative_numbers = true)]
    pub port_lease_limit: u32,
    /// Write no rules; isolation is then not enforced, and said not to be
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false",
          action = ArgAction::Set, value_parser = switch, value_name = "BOOL", hide_default_value = true, hide_possible_values = true)]
    pub skip_iptables: bool,
    /// Where /metrics and /healthz are served: HOST:PORT, or :PORT for all addresses; empty turns it off
    #[arg(long, value_name = "ADDR", env = "COCOON_NET_METRICS_ADDR", default_value = ":9092")]
    pub metrics_addr: ListenAddr,
    /// Time between two full passes over the host, beside those that events cause
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration)]
    pub reconcile_interval: Duration,
    /// Take cni0 down while isolation is wanted and could not be verified for 10 s
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false",
          action = ArgAction::Set, value_parser = switch, value_name = "BOOL", hide_default_value = true, hide_possible_values = true)]
    pub quarantine: bool,
}

/// `status`
#[derive(Debug, Clone, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    #[expect(missing_docs, reason = "a doc comment would become the help of the command")]
    pub state: StateArgs,
    /// Print it as JSON
    #[arg(long)]
    pub json: bool,
}

/// `check`
#[derive(Debug, Clone, Args)]
pub struct CheckArgs {
    #[command(flatten)]
    #[expect(missing_docs, reason = "a doc comment would become the help of the command")]
    pub state: StateArgs,
    /// Print it as JSON
    #[arg(long)]
    pub json: bool,
    /// Prove it live: two throwaway namespaces on cni0 try to reach each other and every drop target
    #[arg(long)]
    pub probe: bool,
}

/// `teardown`
#[derive(Debug, Clone, Args)]
pub struct TeardownArgs {
    #[command(flatten)]
    #[expect(missing_docs, reason = "a doc comment would become the help of the command")]
    pub state: StateArgs,
    #[command(flatten)]
    #[expect(missing_docs, reason = "a doc comment would become the help of the command")]
    pub dry_run: DryRunArgs,
}

/// The resolvers of `--dns`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsList(pub Vec<Ipv4Addr>);

fn dns(text: &str) -> Result<DnsList, ConfigError> {
    config::parse_dns(text).map(DnsList)
}

fn pool_size(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("write a whole number of addresses, 1 or more".to_owned()),
        Ok(size) => Ok(size),
    }
}

/// A length of time as the Go program reads it: `24h`, `1h30m`, `500ms`.
fn duration(text: &str) -> Result<Duration, String> {
    let parsed = text.parse::<SignedDuration>().ok().and_then(|duration| Duration::try_from(duration).ok());
    parsed.filter(|duration| !duration.is_zero()).ok_or_else(|| "write a length of time, such as 24h or 30s".to_owned())
}

/// The journal takes the same name with another extension.
fn lease_file(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    match path.extension() {
        _ if path.file_name().is_none() => Err("name a file".to_owned()),
        Some(extension) if extension == "journal" => {
            Err("the journal of the leases gets this name; take another".to_owned())
        }
        _ => Ok(path),
    }
}

/// Seconds are what DHCP counts in, and half of the lease must be some.
fn lease_time(text: &str) -> Result<Duration, String> {
    let parsed = duration(text)?;
    if parsed < Duration::from_secs(2) { Err("a lease lasts at least 2s".to_owned()) } else { Ok(parsed) }
}

/// Reads a switch: the values that Go's `strconv.ParseBool` takes.
///
/// # Errors
/// What to write instead.
pub fn switch(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("write true or false".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn switches_are_read_as_the_go_program_reads_them() {
        let parse = |value: &str| {
            let line = ["cocoon-net", "daemon", &format!("--quarantine={value}")];
            Cli::try_parse_from(line).map(|cli| match cli.command {
                Command::Daemon(args) => args.quarantine,
                _ => unreachable!("the command is `daemon`"),
            })
        };
        for (value, on) in [("true", true), ("1", true), ("T", true), ("False", false), ("0", false)] {
            assert_eq!(parse(value).unwrap(), on, "{value}");
        }
        for bad in ["", "yes", "tRuE", "2"] {
            let error = parse(bad).unwrap_err().to_string();
            assert!(error.contains("--quarantine"), "{error}");
        }
    }

    #[test]
    fn a_lease_lasts_whole_seconds() {
        assert_eq!(lease_time("2s"), Ok(Duration::from_secs(2)));
        for bad in ["1s", "500ms", "1ns", "0s", "soon"] {
            assert!(lease_time(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_are_read_as_the_go_program_writes_them() {
        for (text, seconds) in
            [("24h", 86_400.0), ("1h30m", 5_400.0), ("1.5h", 5_400.0), ("500ms", 0.5), ("1m0s", 60.0)]
        {
            assert_eq!(duration(text).map(|duration| duration.as_secs_f64()), Ok(seconds), "{text}");
        }
        for bad in ["", "0s", "-1h", "ten", "5"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_last_of_a_repeated_flag_counts_as_it_does_for_the_go_program() {
        let args =
            ["cocoon-net", "init", "--node-name=a", "--node-name=b", "--subnet=10.0.0.0/24", "--drop-cidr=1.0.0.0/8"];
        let cli = Cli::try_parse_from(args.into_iter().chain(["--drop-cidr=2.0.0.0/8"])).unwrap();
        let Command::Init(args) = cli.command else { panic!("not init") };
        assert_eq!((args.node_name.as_str(), args.drop_cidr.len()), ("b", 2));
    }

    #[test]
    fn switches_can_be_written_as_the_go_program_takes_them() {
        let parse = |flag: &str| {
            let cli = Cli::try_parse_from(["cocoon-net", "init", "--node-name=n", "--subnet=10.0.0.0/24", flag]);
            match cli.unwrap().command {
                Command::Init(args) => args.drop_internal_access,
                other => panic!("{other:?}"),
            }
        };
        assert!(parse("--drop-internal-access") && parse("--drop-internal-access=true"));
        assert!(!parse("--drop-internal-access=false"));
    }
}
