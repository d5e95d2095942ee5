//! The thread's loop: wait, receive, decide, do.

use std::collections::VecDeque;
use std::io::Read as _;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::watch;

use super::bridge::{self, Bridge, LinkWatch};
use super::effects::Waiting;
use super::pace::Pace;
use super::{Control, Error, Prepared, wake};
use crate::dhcp::arp::Prober;
use crate::dhcp::engine::{Engine, Now, Settings};
use crate::dhcp::netlink::Netlink;
use crate::dhcp::reply::Parameters;
use crate::dhcp::routes::{self, Station};
use crate::dhcp::store::{Outcome, Store};
use crate::dhcp::wire::{Kind, Malformed, Request};
use crate::dhcp::{Config, Mac};
use crate::dhcp::{addresses::Port, frame};
use crate::log::LogLimit;
use crate::metrics::Metrics;

/// Requests decided on before their effects are carried out together.
const BATCH: usize = 64;

/// The longest frame that is read; the rest of a longer one holds nothing that is needed.
const FRAME_LEN: usize = 2048;

/// How often the routes are compared with the leases, and a bridge that went away is looked for.
const CHECK_INTERVAL: Duration = Duration::from_secs(30);

/// Time between two looks at the bridge while links keep changing.
const LINK_PAUSE: Duration = Duration::from_millis(100);

/// A difference between the clocks that grows by more than this was set, not drifted.
const CLOCK_STEP: SignedDuration = SignedDuration::from_secs(2);

/// The server's thread.
pub(super) struct Worker {
    pub(super) config: Config,
    pub(super) engine: Engine,
    pub(super) store: Store,
    pub(super) netlink: Netlink,
    pub(super) bridge: Option<Bridge>,
    pub(super) prober: Prober,
    pub(super) metrics: Arc<Metrics>,
    /// Replies that wait for their lease to be durable, by the number of their batch.
    pub(super) waiting: VecDeque<Waiting>,
    pub(super) batch: u64,
    outcomes: Receiver<Outcome>,
    links: LinkWatch,
    grants: watch::Receiver<bool>,
    start: Instant,
    /// Wall clock less monotonic clock, as last seen.
    offset: Timestamp,
    next_check: Duration,
    /// Until then news of links wait.
    next_news: Duration,
    pace: Pace,
    pub(super) log: LogLimit,
}

impl Worker {
    /// Does everything that comes before the first answer.
    pub fn new(
        config: Config,
        prepared: Prepared,
        grants: watch::Receiver<bool>,
        metrics: Arc<Metrics>,
        waker: UnixStream,
    ) -> Result<Self, Error> {
        let io = |doing| {
            let interface = config.interface.clone();
            move |source| Error::Io { doing, interface, source }
        };
        let links = LinkWatch::open().map_err(io("watch its interface"))?;
        let mut netlink = Netlink::open().map_err(io("open a netlink socket"))?;
        let link = bridge::look_up(&mut netlink, &config.interface)?;
        let link = link.ok_or_else(|| Error::NoInterface { interface: config.interface.clone() })?;
        let Prepared { bridge, loaded } = prepared;
        // A port of the bridge that was can be claimed anew once the old claim is gone.
        let bridge = match bridge.filter(|bridge| bridge.link.index == link.index) {
            Some(mut bridge) => {
                bridge.link = link;
                bridge
            }
            None => Bridge::open(&config.interface, link)?,
        };
        let (leases, lost, missing) = (loaded.leases.clone(), loaded.lost, loaded.missing);
        let (report, outcomes) = mpsc::channel();
        let store = Store::start(loaded, move |outcome| {
            // If the server is gone, nobody wants to know.
            let _ = report.send(outcome);
            wake(&waker);
        })?;
        let engine = Engine::new(settings(&config), &config.addresses);
        let mut worker = Self {
            engine,
            store,
            netlink,
            bridge: Some(bridge),
            prober: Prober::default(),
            metrics,
            waiting: VecDeque::new(),
            batch: 0,
            outcomes,
            links,
            grants,
            start: Instant::now(),
            offset: Timestamp::now(),
            next_check: CHECK_INTERVAL,
            next_news: Duration::ZERO,
            pace: Pace::default(),
            log: LogLimit::default(),
            config,
        };
        let now = worker.now();
        worker.engine.restore(leases, now);
        worker.meet_the_host(lost, missing, now)?;
        worker.update_gauges();
        Ok(worker)
    }

    /// Serves until it is told to stop.
    pub fn run(mut self, orders: &Receiver<Control>, woken: &UnixStream) -> Result<(), Error> {
        loop {
            self.wait(woken)?;
            drain(woken);
            self.settle()?;
            for order in orders.try_iter() {
                match order {
                    Control::Reload(config) => self.reload(config),
                    Control::CheckRoutes => self.repair_routes(),
                    Control::Stop => return self.stop(),
                }
            }
            self.follow_the_clock()?;
            let frames = self.serve()?;
            self.answer_probes()?;
            self.tick()?;
            self.update_gauges();
            // A full batch means that more waits.
            let nap = self.pace.found(frames, self.now().monotonic).filter(|_| frames < BATCH);
            nap.into_iter().for_each(std::thread::sleep);
        }
    }

    pub(super) fn now(&self) -> Now {
        Now { monotonic: self.start.elapsed(), wall: Timestamp::now() }
    }

    fn may_grant(&self) -> bool {
        *self.grants.borrow()
    }

    /// Sleeps until there is something to do.
    fn wait(&mut self, woken: &UnixStream) -> Result<(), Error> {
        let now = self.now().monotonic;
        let probes = self.bridge.as_ref().and_then(|bridge| self.prober.tick(&bridge.link, now));
        let for_news = now >= self.next_news;
        let news_due = (!for_news).then_some(self.next_news);
        let next = [self.engine.next_tick(), probes, news_due, Some(self.next_check)].into_iter().flatten().min();
        let left = next.unwrap_or(self.next_check).saturating_sub(now);
        // Rounded up, so that what is due is due.
        let millis = i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);

        let frames = self.bridge.as_ref().map(|bridge| bridge.frames.as_fd());
        let links = for_news.then(|| self.links.as_fd());
        let sources = [Some(woken.as_fd()), frames, self.prober.fd(), links];
        let mut fds: Vec<PollFd<'_>> =
            sources.into_iter().flatten().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(self.io("wait for requests")(error.into())),
        }
        let link_news = for_news && fds.last().is_some_and(|fd| fd.any().unwrap_or(true));
        if link_news {
            self.next_news = now + LINK_PAUSE;
            let index = self.bridge.as_ref().map(|bridge| bridge.link.index);
            let was_down = self.links.drain(index);
            self.follow_the_bridge()?;
            if was_down {
                self.repair_routes();
            }
        }
        Ok(())
    }

    /// Receives what is there, a batch at most, and carries out what the engine decides. Returns how many frames it was.
    fn serve(&mut self) -> Result<usize, Error> {
        let mut buffer = [0; FRAME_LEN];
        let mut steps = Vec::new();
        let (now, may_grant) = (self.now(), self.may_grant());
        let mut frames = 0;
        while frames < BATCH {
            let Some(bridge) = &self.bridge else { break };
            let len = match bridge.frames.receive(&mut buffer) {
                Ok(Some(len)) => len,
                Ok(None) => break,
                Err(error) => {
                    // ENETDOWN, once, when the bridge goes down; the link's news tell the rest.
                    tracing::debug!(%error, "cannot receive");
                    break;
                }
            };
            frames += 1;
            let Some(datagram) = frame::open(&buffer[..len]) else {
                self.dropped("bad_packet");
                continue;
            };
            if !self.is_for_us(datagram.destination) {
                self.dropped("not_for_us");
                continue;
            }
            match Request::try_from(datagram) {
                Ok(request) => {
                    let Some(port) = self.port_of(&request) else {
                        self.dropped("spoofed_sender");
                        continue;
                    };
                    tracing::trace!(?request, ?port, "received");
                    let step = self.engine.handle(&request, port, now, may_grant);
                    self.note_refusal(&request, port, &step);
                    steps.push(step);
                }
                // Another server's answers are not for us; that there is one is worth knowing.
                Err(Malformed::NotRequest) => self.dropped("not_a_request"),
                Err(reason) => {
                    let sender = datagram.sender;
                    if let Some(more) = self.log.allow("malformed") {
                        tracing::warn!(%sender, %reason, more, "a malformed DHCP message was dropped");
                    }
                    self.dropped("malformed");
                }
            }
        }
        self.carry_out(steps)?;
        Ok(frames)
    }

    /// Whether a packet to this address is meant for the server, and not for one beyond this node.
    fn is_for_us(&self, destination: Ipv4Addr) -> bool {
        let subnet = self.config.subnet.net();
        [Ipv4Addr::BROADCAST, subnet.broadcast(), self.config.gateway].contains(&destination)
    }

    /// The port that a request came in by, when that matters; `None` for a sender that is this node itself.
    fn port_of(&mut self, request: &Request) -> Option<Option<Port>> {
        match request.kind {
            Kind::Inform => Some(None),
            _ => self.port_of_station(request.sender),
        }
    }

    /// The port of the bridge behind which a station is, when ports have a limit. Stations that the bridge does not know
    /// share one. `None` for an address of the bridge or one of its ports, which no station beyond them has.
    fn port_of_station(&mut self, mac: Mac) -> Option<Option<Port>> {
        let Some(bridge) = &self.bridge else { return Some(None) };
        if mac == bridge.link.mac {
            return None;
        }
        if self.config.port_lease_limit == 0 {
            return Some(None);
        }
        match routes::station(&mut self.netlink, bridge.link.index, mac) {
            Ok(Station::Behind(port)) => Some(Some(port)),
            Ok(Station::Unknown) | Err(_) => Some(Some(Port(0))),
            Ok(Station::Ourselves) => None,
        }
    }

    fn answer_probes(&mut self) -> Result<(), Error> {
        let mut steps = Vec::new();
        while let Ok(Some((ip, by))) = self.prober.answer() {
            let Some(from) = self.port_of_station(by) else { continue };
            steps.push(self.engine.in_use(ip, by, from, self.now(), self.may_grant()));
        }
        self.carry_out(steps)
    }

    /// Ends what has run out, and looks after the routes now and then.
    fn tick(&mut self) -> Result<(), Error> {
        let now = self.now();
        if self.engine.next_tick().is_some_and(|at| at <= now.monotonic) {
            let steps = self.engine.tick(now, self.may_grant());
            self.carry_out(steps)?;
        }
        if now.monotonic >= self.next_check {
            self.next_check = now.monotonic + CHECK_INTERVAL;
            self.follow_the_bridge()?;
            self.repair_routes();
        }
        Ok(())
    }

    /// When the wall clock was set, what is written down by it is corrected.
    fn follow_the_clock(&mut self) -> Result<(), Error> {
        let now = self.now();
        let offset = now.wall.checked_sub(SignedDuration::try_from(now.monotonic).unwrap_or_default());
        let Ok(offset) = offset else { return Ok(()) };
        let step = offset.duration_since(std::mem::replace(&mut self.offset, offset));
        if step.abs() >= CLOCK_STEP {
            tracing::info!(step = %step, "the clock was set; expiries of leases are written down anew");
            self.store.correct(self.engine.leases(now))?;
        }
        Ok(())
    }

    fn reload(&mut self, config: Config) {
        self.config = Config {
            interface: std::mem::take(&mut self.config.interface),
            lease_file: std::mem::take(&mut self.config.lease_file),
            ..config
        };
        self.engine.reconfigure(settings(&self.config), &self.config.addresses);
        tracing::info!(addresses = self.config.addresses.len(), "the DHCP server goes by a new configuration");
        // Another gateway address is on the bridge, and the kernel may have dropped routes with the old one.
        self.repair_routes();
    }

    /// Saves the leases. What was granted and has become durable is still answered.
    fn stop(mut self) -> Result<(), Error> {
        let (_, nothing) = mpsc::channel();
        let outcomes = std::mem::replace(&mut self.outcomes, nothing);
        let Self { store, mut waiting, bridge, config, metrics, .. } = self;
        let stopped = store.stop();
        let durable = outcomes.try_iter().filter(|outcome| outcome.durable).map(|outcome| outcome.up_to).max();
        waiting.retain(|waiting| durable.is_some_and(|up_to| waiting.batch <= up_to));
        if let Some(bridge) = bridge {
            for Waiting { reply, .. } in &waiting {
                metrics.lease_granted();
                let _ = bridge.frames.send(&frame::seal(reply, bridge.link.mac, config.gateway));
            }
        }
        Ok(stopped?)
    }

    pub(super) fn next_outcome(&self) -> Option<Outcome> {
        self.outcomes.try_recv().ok()
    }

    pub(super) fn io(&self, doing: &'static str) -> impl FnOnce(std::io::Error) -> Error {
        let interface = self.config.interface.clone();
        move |source| Error::Io { doing, interface, source }
    }
}

fn settings(config: &Config) -> Settings {
    Settings {
        parameters: Parameters {
            gateway: config.gateway,
            subnet: config.subnet,
            dns: config.dns.clone(),
            mtu: config.mtu,
            lease_time: config.lease_time,
        },
        port_lease_limit: config.port_lease_limit,
    }
}

fn drain(mut woken: &UnixStream) {
    let mut bytes = [0; 64];
    while woken.read(&mut bytes).is_ok_and(|len| len > 0) {}
}
