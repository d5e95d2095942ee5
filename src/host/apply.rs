//! Runs a plan. Nothing is decided here.

use ipnet::Ipv4Net;

use super::backstop::Backstop;
use super::desired::Bridge;
use super::firewall::{self, Family};
use super::links::Mac;
use super::plan::Plan;
use super::step::Step;
use super::sysctl::{self, Setting};
use super::{Host, HostError};
use crate::config::BRIDGE;
use crate::{files, host::ipset};

/// Mode of a folder that other programs read too.
const SHARED_FOLDER_MODE: u32 = 0o755;

impl Host {
    /// Takes the steps of a plan in their order and stops at the first that fails.
    ///
    /// # Errors
    /// [`HostError`], before any step when there are obstacles.
    pub(super) async fn apply(&self, plan: &Plan) -> Result<(), HostError> {
        if !plan.obstacles.is_empty() {
            return Err(HostError::Obstacle(plan.obstacles.join("; ")));
        }
        for step in &plan.steps {
            self.take(step).await?;
        }
        Ok(())
    }

    /// Takes every step of a plan, whatever the others do.
    ///
    /// # Errors
    /// All that failed, in order.
    pub(super) async fn apply_all(&self, plan: &Plan) -> Result<(), Vec<HostError>> {
        let mut failures: Vec<_> = plan.obstacles.iter().cloned().map(HostError::Obstacle).collect();
        for step in &plan.steps {
            failures.extend(self.take(step).await.err());
        }
        if failures.is_empty() { Ok(()) } else { Err(failures) }
    }

    async fn take(&self, step: &Step) -> Result<(), HostError> {
        match step {
            Step::Guard(keys) => sysctl::guard(keys).await?,
            Step::FillSet { entries, old } => ipset::fill(entries, old).await?,
            Step::Firewall { family, backend, transaction } => firewall::write(*family, *backend, transaction).await?,
            Step::Hook { family, table, dormant } => firewall::set_dormant(*family, table, *dormant)?,
            Step::DestroySet(_) => destroy_set().await?,
            Step::DestroyLeftoverSet => ipset::destroy_leftover().await?,
            Step::LowerBackstop => Backstop::open(BRIDGE)?.lower().await?,
            Step::CreateBridge { mac, bridge } => self.create_bridge(*mac, bridge).await?,
            Step::PinMac(mac) => self.links.pin_mac(self.index(BRIDGE).await?, BRIDGE, *mac).await?,
            Step::SetMtu { to, .. } => self.links.set_mtu(self.index(BRIDGE).await?, BRIDGE, *to).await?,
            Step::AddAddress(address) => self.links.add_address(self.index(BRIDGE).await?, BRIDGE, *address).await?,
            Step::RemoveAddress(address) => self.remove_address(*address).await?,
            Step::SetUp(name) => self.links.set_up(self.index(name).await?, name).await?,
            Step::SetDown(name) => self.links.set_down(self.index(name).await?, name).await?,
            Step::IsolatePort { port, isolated } => self.isolate(port, *isolated).await?,
            Step::Sysctl(settings) => {
                let settings: Vec<Setting> = settings.iter().map(|(setting, _)| setting.clone()).collect();
                let refused = sysctl::write(&settings).await?;
                if let Ok(mut given_up) = self.given_up.lock() {
                    given_up.extend(refused);
                }
            }
            Step::RemoveLocalRoute { nic, subnet } => self.remove_local_route(nic, *subnet).await?,
            Step::WriteFile { path, new, mode, .. } => {
                if let Some(folder) = path.parent() {
                    files::make_folders(folder, SHARED_FOLDER_MODE)?;
                }
                files::write_durably(path, new.as_bytes(), *mode)?;
            }
            Step::RemoveFile { path, .. } => drop(files::remove(path)?),
            Step::RemoveLeaseRoutes { subnet, .. } => {
                self.links.remove_lease_routes(self.index(BRIDGE).await?, *subnet).await?;
            }
            Step::DeleteBridge => self.links.delete(self.index(BRIDGE).await?, BRIDGE).await?,
        }
        Ok(())
    }

    async fn create_bridge(&self, mac: Mac, bridge: &Bridge) -> Result<(), HostError> {
        self.links.create_bridge(BRIDGE, mac).await?;
        let index = self.index(BRIDGE).await?;
        self.links.pin_mac(index, BRIDGE, mac).await?;
        if let Some(mtu) = bridge.mtu {
            self.links.set_mtu(index, BRIDGE, mtu).await?;
        }
        self.links.add_address(index, BRIDGE, bridge.address).await?;
        if bridge.up {
            self.links.set_up(index, BRIDGE).await?;
        }
        Ok(())
    }

    /// With the first address of a subnet the kernel removes the others of it, and with those every route, unless told to
    /// promote one (ip-sysctl.rst).
    async fn remove_address(&self, address: Ipv4Net) -> Result<(), HostError> {
        let promote = |value: &str| {
            let key = format!("net/ipv4/conf/{BRIDGE}/promote_secondaries");
            Setting { key, value: value.to_owned(), required: false }
        };
        let before = sysctl::read(&promote("1").key);
        sysctl::write(&[promote("1")]).await?;
        let removed = self.links.remove_address(self.index(BRIDGE).await?, BRIDGE, address).await;
        if let Some(before) = before.filter(|before| before != "1") {
            sysctl::write(&[promote(&before)]).await?;
        }
        Ok(removed?)
    }

    /// A port that has gone since it was looked at needs no isolation.
    async fn isolate(&self, port: &str, isolated: bool) -> Result<(), HostError> {
        match self.links.index_of(port).await? {
            Some(index) => Ok(self.links.isolate(index, port, isolated).await?),
            None => Ok(()),
        }
    }

    async fn remove_local_route(&self, nic: &str, subnet: Ipv4Net) -> Result<(), HostError> {
        Ok(self.links.remove_local_route(self.index(nic).await?, subnet).await?)
    }

    async fn index(&self, name: &str) -> Result<u32, HostError> {
        self.links.index_of(name).await?.ok_or_else(|| HostError::NoSuchInterface(name.to_owned()))
    }
}

/// Destroys the set. A rule that holds it may be stranded in the backend that is not the host's.
async fn destroy_set() -> Result<(), HostError> {
    if let Err(error) = ipset::destroy().await {
        if !error.is_refusal() || super::clear_other_backend(Family::V4).await? == 0 {
            return Err(error.into());
        }
        ipset::destroy().await?;
    }
    Ok(())
}
