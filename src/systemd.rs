//! Telling systemd how the daemon is: `sd_notify(3)`, without ever waiting for it.
//!
//! The message goes out only if the socket takes it at once. A service manager that is slow to read must not hold up
//! the daemon, for while it waits nobody keeps isolation true.

use std::ffi::OsString;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use sd_notify::NotifyState;

/// Tells systemd, if it listens (`$NOTIFY_SOCKET`). What it does not take is logged at debug.
pub fn notify(states: &[NotifyState<'_>]) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let lines: Vec<String> = states.iter().map(ToString::to_string).collect();
    if let Err(error) = send(&socket, lines.join("\n").as_bytes()) {
        tracing::debug!(%error, "systemd could not be told");
    }
}

fn send(socket: &OsString, message: &[u8]) -> io::Result<()> {
    let sender = UnixDatagram::unbound()?;
    sender.set_nonblocking(true)?;
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    sender.send_to_addr(message, &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manager_that_does_not_read_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let socket = path.into_os_string();
        let sent = (0..10_000).take_while(|_| send(&socket, b"STATUS=busy").is_ok()).count();
        assert!((1..10_000).contains(&sent), "{sent} messages fit");
        let mut first = [0; 32];
        let length = manager.recv(&mut first).unwrap();
        assert_eq!(&first[..length], b"STATUS=busy");
    }
}
