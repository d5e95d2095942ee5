//! The metrics registry and its HTTP end.
//!
//! Sample names, HELP and TYPE lines of the DHCP metrics are the Go program's, so that dashboards and alerts go on
//! working. The exposition is the Prometheus text format 0.0.4, which every scraper accepts.

mod http;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tokio::sync::{mpsc, oneshot};

pub use http::{Endpoint, Health, ListenAddr, MetricsError, serve};

/// How long a scrape waits for what is brought up to date for it.
const SCRAPE_WAIT: Duration = Duration::from_millis(500);

/// Upper bounds in seconds of the reconcile histogram: a pass that finds nothing takes milliseconds, one that has to
/// wait for the iptables lock takes seconds.
const RECONCILE_BUCKETS: [f64; 10] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CidrLabel {
    cidr: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VersionLabel {
    version: &'static str,
}

/// Everything the daemon counts. Cheap to update from any thread.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    lease_active: Gauge,
    lease_total: Family<ResultLabel, Counter>,
    pool_available: Gauge,
    dhcp_dropped: Family<ReasonLabel, Counter>,
    port_limit_refusals: Counter,
    isolation_enforced: Gauge,
    drift_repairs: Family<KindLabel, Counter>,
    reconcile_errors: Counter,
    drop_packets: Family<CidrLabel, Counter>,
    drop_packets_seen: Mutex<HashMap<(String, &'static str), u64>>,
    reconcile_seconds: Histogram,
    scrapes: OnceLock<mpsc::Sender<oneshot::Sender<()>>>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// A registry with every metric at zero.
    #[must_use]
    pub fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("cocoon_net"),
            lease_active: Gauge::default(),
            lease_total: Family::default(),
            pool_available: Gauge::default(),
            dhcp_dropped: Family::default(),
            port_limit_refusals: Counter::default(),
            isolation_enforced: Gauge::default(),
            drift_repairs: Family::default(),
            reconcile_errors: Counter::default(),
            drop_packets: Family::default(),
            drop_packets_seen: Mutex::default(),
            reconcile_seconds: Histogram::new(RECONCILE_BUCKETS),
            scrapes: OnceLock::new(),
        };
        metrics.register();
        metrics
    }

    /// Registers in alphabetical order, which is the order the Go program answers in. The library ends each help text
    /// with a full stop.
    fn register(&mut self) {
        let version = Family::<VersionLabel, Gauge>::default();
        version.get_or_create(&VersionLabel { version: env!("CARGO_PKG_VERSION") }).set(1);

        let to = &mut self.registry;
        to.register("build_info", "Version of the running program, always 1", version);
        to.register(
            "dhcp_dropped",
            "Number of DHCP packets dropped without an answer by reason",
            self.dhcp_dropped.clone(),
        );
        to.register("dhcp_lease_active", "Number of active (unexpired) DHCP leases", self.lease_active.clone());
        to.register("dhcp_lease", "Number of DHCP lease grant attempts by result", self.lease_total.clone());
        to.register("dhcp_pool_available", "Number of unallocated IPs in the DHCP pool", self.pool_available.clone());
        to.register(
            "dhcp_port_limit_refusals",
            "Number of DHCP requests refused because their bridge port holds its limit of addresses",
            self.port_limit_refusals.clone(),
        );
        to.register("drift_repairs", "Number of repairs of the host configuration by kind", self.drift_repairs.clone());
        to.register("drop_packets", "Number of VM packets dropped by destination range", self.drop_packets.clone());
        to.register(
            "isolation_enforced",
            "Whether the isolation that pool.json asks for is verified to hold (1) or not (0)",
            self.isolation_enforced.clone(),
        );
        to.register("reconcile_errors", "Number of failed reconcile passes", self.reconcile_errors.clone());
        to.register("reconcile_seconds", "Duration of a reconcile pass in seconds", self.reconcile_seconds.clone());
    }

    /// Counts a lease that was granted or renewed.
    pub fn lease_granted(&self) {
        self.lease_total.get_or_create(&ResultLabel { result: "ok" }).inc();
    }

    /// Counts a lease that was asked for and not granted.
    pub fn lease_failed(&self) {
        self.lease_total.get_or_create(&ResultLabel { result: "failed" }).inc();
    }

    /// Sets how many leases are held and how many addresses of the pool are free.
    pub fn set_leases(&self, active: usize, available: usize) {
        self.lease_active.set(i64::try_from(active).unwrap_or(i64::MAX));
        self.pool_available.set(i64::try_from(available).unwrap_or(i64::MAX));
    }

    /// Counts a DHCP packet that got no answer, by a word for the reason, such as `malformed`.
    pub fn dhcp_dropped(&self, reason: &'static str) {
        self.dhcp_dropped.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// Counts a DHCP request refused by `--port-lease-limit`.
    pub fn port_limit_refused(&self) {
        self.port_limit_refusals.inc();
    }

    /// Sets whether the isolation that was asked for is verified to hold.
    pub fn set_isolation_enforced(&self, enforced: bool) {
        self.isolation_enforced.set(i64::from(enforced));
    }

    /// Counts a repair of the host configuration.
    pub fn drift_repaired(&self, kind: &str) {
        self.drift_repairs.get_or_create(&KindLabel { kind: kind.to_owned() }).inc();
    }

    /// Counts a reconcile pass that failed.
    pub fn reconcile_failed(&self) {
        self.reconcile_errors.inc();
    }

    /// Takes in the duration of a reconcile pass.
    pub fn reconcile_took(&self, duration: Duration) {
        self.reconcile_seconds.observe(duration.as_secs_f64());
    }

    /// Takes in what the kernel's counter of a dropped range reads now in a chain. That counter starts over when its rule
    /// is made anew; the metric only grows.
    pub fn drop_packets_read(&self, cidr: &str, chain: &'static str, reading: u64) {
        let mut seen = self.drop_packets_seen.lock().unwrap_or_else(PoisonError::into_inner);
        let last = seen.insert((cidr.to_owned(), chain), reading).unwrap_or(0);
        let grown = if reading >= last { reading - last } else { reading };
        self.drop_packets.get_or_create(&CidrLabel { cidr: cidr.to_owned() }).inc_by(grown);
    }

    /// Where scrapes announce themselves from now on, for whoever brings up to date what is only read now and then. Each
    /// waits, but not for long, to be told that this is done.
    pub fn scrapes(&self) -> mpsc::Receiver<oneshot::Sender<()>> {
        let (sender, receiver) = mpsc::channel(1);
        // Whoever asked first stays the one.
        let _ = self.scrapes.set(sender);
        receiver
    }

    async fn announce_scrape(&self) {
        let Some(scrapes) = self.scrapes.get() else { return };
        let (done, told) = oneshot::channel();
        let wait = async {
            if scrapes.send(done).await.is_ok() {
                let _ = told.await;
            }
        };
        let _ = tokio::time::timeout(SCRAPE_WAIT, wait).await;
    }

    /// The exposition in the Prometheus text format 0.0.4.
    #[must_use]
    pub fn render(&self) -> String {
        let mut open_metrics = String::new();
        // Writing to a String cannot fail.
        let _ = prometheus_client::encoding::text::encode_registry(&mut open_metrics, &self.registry);
        as_prometheus_text(&open_metrics)
    }
}

/// Turns OpenMetrics into the text format 0.0.4. The two differ, for what is used here, in the name that the HELP and
/// TYPE lines of a counter carry: there the family's, here the sample's, which ends in `_total`.
fn as_prometheus_text(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len() + 256);
    let mut lines = open_metrics.lines().peekable();
    while let Some(line) = lines.next() {
        let help = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' '));
        let is_counter = lines.peek().is_some_and(|next| next.starts_with("# TYPE ") && next.ends_with(" counter"));
        // Writing to a String cannot fail.
        let _ = match help {
            Some((name, help)) if is_counter => {
                lines.next();
                writeln!(text, "# HELP {name}_total {help}\n# TYPE {name}_total counter")
            }
            _ => writeln!(text, "{line}"),
        };
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the Go program answered on a node with eight addresses and two leases.
    const GO_PROGRAM: &str = "\
# HELP cocoon_net_dhcp_lease_active Number of active (unexpired) DHCP leases.
# TYPE cocoon_net_dhcp_lease_active gauge
cocoon_net_dhcp_lease_active 2
# HELP cocoon_net_dhcp_lease_total Number of DHCP lease grant attempts by result.
# TYPE cocoon_net_dhcp_lease_total counter
cocoon_net_dhcp_lease_total{result=\"ok\"} 2
# HELP cocoon_net_dhcp_pool_available Number of unallocated IPs in the DHCP pool.
# TYPE cocoon_net_dhcp_pool_available gauge
cocoon_net_dhcp_pool_available 6
";

    #[test]
    fn dhcp_metrics_read_as_the_go_programs() {
        let metrics = Metrics::new();
        metrics.set_leases(2, 6);
        metrics.lease_granted();
        metrics.lease_granted();
        let text = metrics.render();
        assert!(text.contains(GO_PROGRAM), "{text}");
    }

    #[test]
    fn every_sample_follows_a_type_line_that_names_it() {
        let metrics = Metrics::new();
        metrics.lease_granted();
        metrics.lease_failed();
        metrics.dhcp_dropped("malformed");
        metrics.port_limit_refused();
        metrics.set_isolation_enforced(true);
        metrics.drift_repaired("rule");
        metrics.reconcile_failed();
        metrics.reconcile_took(Duration::from_millis(20));
        metrics.drop_packets_read("10.0.0.0/8", "FORWARD", 3);

        let text = metrics.render();
        let mut family = (String::new(), String::new());
        for line in text.lines() {
            if let Some(typed) = line.strip_prefix("# TYPE ") {
                let (name, kind) = typed.split_once(' ').unwrap();
                family = (name.to_owned(), kind.to_owned());
                continue;
            }
            if line.starts_with("# HELP ") {
                continue;
            }
            let name = line.split(['{', ' ']).next().unwrap();
            let named = match family.1.as_str() {
                "histogram" => ["_bucket", "_sum", "_count"].iter().any(|end| name == format!("{}{end}", family.0)),
                _ => name == family.0,
            };
            assert!(named, "{line} follows TYPE {family:?}");
        }
        for wanted in [
            "cocoon_net_build_info{version=\"",
            "cocoon_net_dhcp_lease_total{result=\"failed\"} 1\n",
            "cocoon_net_drift_repairs_total{kind=\"rule\"} 1\n",
            "cocoon_net_drop_packets_total{cidr=\"10.0.0.0/8\"} 3\n",
            "cocoon_net_isolation_enforced 1\n",
            "cocoon_net_reconcile_errors_total 1\n",
            "cocoon_net_reconcile_seconds_count 1\n",
        ] {
            assert!(text.contains(wanted), "{wanted} is missing in\n{text}");
        }
    }

    #[test]
    fn drop_packets_never_fall_when_the_kernel_starts_over() {
        let metrics = Metrics::new();
        for reading in [5, 9, 9, 2, 4] {
            metrics.drop_packets_read("10.0.0.0/8", "FORWARD", reading);
            metrics.drop_packets_read("10.0.0.0/8", "INPUT", 7);
        }
        assert!(metrics.render().contains("cocoon_net_drop_packets_total{cidr=\"10.0.0.0/8\"} 20\n"));
    }
}
