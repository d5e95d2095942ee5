//! Noticing legacy iptables at work.
//!
//! The legacy backend sends no events, but every `iptables-legacy` and `iptables-legacy-restore` holds the lock file
//! while it changes a table, and closes it when it has. So inotify(7) on that file is as good as an event. It is a
//! hint, not a proof: who has another /run, or no lock, is noticed by the look each second.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;

use super::WatchError;

/// Where iptables keeps its lock unless `XTABLES_LOCKFILE` says otherwise.
const DEFAULT_LOCK: &str = "/run/xtables.lock";

/// Watches the lock file of legacy iptables.
pub(super) struct LockFile {
    inotify: AsyncFd<Descriptor>,
    path: PathBuf,
    watched: bool,
}

/// [`Inotify`] as tokio wants it.
struct Descriptor(Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl LockFile {
    /// Opens the inotify descriptor; [`LockFile::attach`] does the rest.
    pub(super) fn open() -> Result<Self, WatchError> {
        let path = std::env::var_os("XTABLES_LOCKFILE").map_or_else(|| PathBuf::from(DEFAULT_LOCK), PathBuf::from);
        let failed = |source| WatchError::Subscribe { what: "changes of the iptables lock file", source };
        let inotify =
            Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).map_err(|errno| failed(errno.into()))?;
        #[expect(deprecated, reason = "its successor is unsafe for no need of ours; the descriptor is owned and stays")]
        let inotify = AsyncFd::new(Descriptor(inotify)).map_err(failed)?;
        let mut lock = Self { inotify, path, watched: false };
        lock.attach();
        Ok(lock)
    }

    /// Starts watching the file if it is not watched yet: it comes into being with the first legacy command, and a
    /// boot script may replace it.
    pub(super) fn attach(&mut self) {
        if !self.watched {
            let flags = AddWatchFlags::IN_CLOSE | AddWatchFlags::IN_DELETE_SELF;
            self.watched = self.inotify.get_ref().0.add_watch(&self.path, flags).is_ok();
        }
    }

    /// Whether the file is there and watched.
    pub(super) fn is_attached(&self) -> bool {
        self.watched
    }

    /// Waits until someone lets go of the lock. Cancel safe.
    pub(super) async fn released(&mut self) {
        while let Ok(mut ready) = self.inotify.readable().await {
            let events = ready.get_inner().0.read_events();
            ready.clear_ready();
            let Ok(events) = events else { continue };
            if events
                .iter()
                .any(|event| event.mask.intersects(AddWatchFlags::IN_IGNORED | AddWatchFlags::IN_DELETE_SELF))
            {
                self.watched = false;
                self.attach();
            }
            return;
        }
        // The runtime is shutting down.
        std::future::pending::<()>().await;
    }

    /// Forgets what has been reported so far.
    pub(super) fn drain(&mut self) {
        while !matches!(self.inotify.get_ref().0.read_events(), Err(Errno::EAGAIN) | Ok(_)) {}
    }
}
