//! The server: a thread that receives, lets the engine decide, and carries out what it decided.
//!
//! It never waits for the disk. A reply that depends on a lease being durable is kept until the store's thread says so,
//! and meanwhile the next requests are served.

mod bridge;
mod effects;
mod host;
mod pace;
mod worker;

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;

use tokio::sync::{oneshot, watch};

use super::Config;
use super::leases::LeaseError;
use super::netlink::Netlink;
use super::store::{self, Loaded};
use crate::metrics::Metrics;
use bridge::Bridge;
use worker::Worker;

/// Why there is no DHCP.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The leases could not be read or kept.
    #[error("DHCP needs its leases on disk")]
    Leases(#[from] LeaseError),
    /// The bridge is not there.
    #[error("DHCP has no interface: {interface} does not exist or is not Ethernet; run `cocoon-net init` first")]
    NoInterface {
        /// The bridge.
        interface: String,
    },
    /// Another DHCP server is running.
    #[error("port 67 on {interface} is taken; stop the other DHCP server, which `ss -ulpn sport = 67` names")]
    PortTaken {
        /// The bridge.
        interface: String,
    },
    /// A system call failed.
    #[error("DHCP on {interface} cannot {doing}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The bridge.
        interface: String,
        /// What the system answered.
        source: std::io::Error,
    },
    /// The server's thread is gone, and did not say why.
    #[error("the DHCP server has died; restart the daemon, leases that were acknowledged are kept")]
    Died,
}

/// What the server is told to do.
enum Control {
    Reload(Config),
    CheckRoutes,
    Stop,
}

/// The slow parts of a start, under way: binding a packet socket waits for a grace period of the kernel's, and many
/// leases take their time to read.
#[derive(Debug)]
pub struct Preparation(JoinHandle<Result<Prepared, Error>>);

/// What a server needs to answer.
#[derive(Debug)]
struct Prepared {
    /// None where there is no bridge yet, or it could not be opened; that is tried again.
    bridge: Option<Bridge>,
    loaded: Loaded,
}

impl Preparation {
    /// Opens the bridge if it is there, and reads the leases. Nothing is answered yet; requests queue up.
    ///
    /// # Errors
    /// [`Error::Io`] when there can be no thread.
    pub fn begin(interface: &str, lease_file: &Path) -> Result<Self, Error> {
        let (owned, lease_file) = (interface.to_owned(), lease_file.to_owned());
        let prepare = move || {
            let mut netlink = Netlink::open().ok();
            let link = netlink.as_mut().and_then(|netlink| bridge::look_up(netlink, &owned).ok().flatten());
            let bridge = link.and_then(|link| Bridge::open(&owned, link).ok());
            Ok(Prepared { bridge, loaded: store::load(&lease_file)? })
        };
        let thread = std::thread::Builder::new().name("dhcp-prepare".to_owned()).spawn(prepare);
        let interface = interface.to_owned();
        Ok(Self(thread.map_err(|source| Error::Io { doing: "start a thread", interface, source })?))
    }

    fn done(self) -> Result<Prepared, Error> {
        self.0.join().map_err(|_| Error::Died)?
    }
}

/// A running DHCP server.
#[derive(Debug)]
pub struct Server {
    control: Sender<Control>,
    wake: UnixStream,
    thread: JoinHandle<()>,
    ended: oneshot::Receiver<Result<(), Error>>,
}

impl Server {
    /// Makes the routes match the leases, and starts to answer. Returns once it does.
    ///
    /// While `grants` is false no new lease is granted; those who hold one can renew it.
    ///
    /// # Errors
    /// When the bridge is missing, port 67 is taken, or the leases can be neither read nor kept.
    pub async fn start(
        preparation: Preparation,
        config: Config,
        grants: watch::Receiver<bool>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, Error> {
        let interface = config.interface.clone();
        let io = |doing| {
            let interface = interface.clone();
            move |source| Error::Io { doing, interface, source }
        };
        let (wake, woken) = UnixStream::pair().map_err(io("make a socket pair"))?;
        for end in [&wake, &woken] {
            end.set_nonblocking(true).map_err(io("set up its wake-up call"))?;
        }
        let waker = wake.try_clone().map_err(io("copy its wake-up call"))?;
        let (control, orders) = mpsc::channel();
        let (started, ready) = oneshot::channel();
        let (end, ended) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("dhcp".to_owned())
            .spawn(move || {
                let prepared = preparation.done();
                let worker = match prepared.and_then(|done| Worker::new(config, done, grants, metrics, waker)) {
                    Ok(worker) => worker,
                    // Whoever started it has gone away if this cannot be said.
                    Err(error) => return drop(started.send(Err(error))),
                };
                let _ = started.send(Ok(()));
                let _ = end.send(worker.run(&orders, &woken));
            })
            .map_err(io("start its thread"))?;
        ready.await.map_err(|_| Error::Died)??;
        Ok(Self { control, wake, thread, ended })
    }

    /// Goes by another configuration from now on. Interface and lease file stay what they are.
    ///
    /// Leases of addresses that have left the pool run out; their holders get an address of the pool when they ask to
    /// renew.
    ///
    /// # Errors
    /// [`Error::Died`] when there is no server any more.
    pub fn reload(&self, config: Config) -> Result<(), Error> {
        self.order(Control::Reload(config))
    }

    /// Makes the routes match the leases now, after something that may have cost some.
    ///
    /// # Errors
    /// [`Error::Died`] when there is no server any more.
    pub fn check_routes(&self) -> Result<(), Error> {
        self.order(Control::CheckRoutes)
    }

    /// Resolves when the server has ended without being told to. Must not be called again after that.
    pub async fn died(&mut self) -> Error {
        match (&mut self.ended).await {
            Ok(Err(error)) => error,
            Ok(Ok(())) | Err(_) => Error::Died,
        }
    }

    /// Stops: answers nothing more, saves every lease to `leases.json` and removes the journal.
    ///
    /// # Errors
    /// When the leases could not be saved; what was acknowledged is then still in the journal.
    pub async fn stop(self) -> Result<(), Error> {
        self.order(Control::Stop)?;
        let result = self.ended.await.map_err(|_| Error::Died)?;
        // It has said its last word; its thread ends now.
        drop(self.thread);
        result
    }

    fn order(&self, order: Control) -> Result<(), Error> {
        self.control.send(order).map_err(|_| Error::Died)?;
        wake(&self.wake);
        Ok(())
    }
}

/// Wakes the server's thread. If the socket is full, it is about to wake anyway.
fn wake(mut socket: &UnixStream) {
    let _ = socket.write(&[1]);
}
