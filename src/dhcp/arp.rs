//! Finding out whether an address is in use, by ARP probes (RFC 5227 section 2.1.1).

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::Mac;
use super::routes::Link;
use super::sockets::FrameSocket;

/// After the first probe, a second one, should the first have been lost.
const REPEAT_AFTER: Duration = Duration::from_millis(150);

/// How long an answer is listened for after the last probe was sent. The engine gives up a little earlier.
const LISTEN: Duration = Duration::from_millis(600);

const FRAME_LEN: usize = 42;

/// Ethernet and IPv4, six and four bytes long.
const KIND: [u8; 6] = [0, 1, 0x08, 0x00, 6, 4];

/// Probes that are under way. Nothing is listened to while there are none.
#[derive(Default)]
pub(super) struct Prober {
    socket: Option<FrameSocket>,
    probes: Vec<Probe>,
}

struct Probe {
    ip: Ipv4Addr,
    started: Duration,
    repeated: bool,
}

impl Prober {
    /// Asks who has an address.
    pub fn start(&mut self, link: &Link, ip: Ipv4Addr, now: Duration) -> io::Result<()> {
        let socket = match &self.socket {
            Some(socket) => socket,
            None => self.socket.insert(FrameSocket::arp(link)?),
        };
        if self.probes.is_empty() {
            socket.listen_for_arp(link, true)?;
        }
        self.probes.retain(|probe| probe.ip != ip);
        self.probes.push(Probe { ip, started: now, repeated: false });
        socket.send(&probe(link.mac, ip))
    }

    /// Forgets everything: the bridge is another one.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    /// Repeats the probes that it is time for and closes the ear when all are over. Returns when to be called again.
    pub fn tick(&mut self, link: &Link, now: Duration) -> Option<Duration> {
        let before = self.probes.len();
        self.probes.retain(|probe| now < probe.started + LISTEN);
        if self.probes.is_empty()
            && before > 0
            && let Some(Err(error)) = self.socket.as_ref().map(|socket| socket.listen_for_arp(link, false))
        {
            tracing::debug!(%error, "cannot close the ear for ARP");
            self.socket = None;
        }
        for due in self.probes.iter_mut().filter(|probe| !probe.repeated && now >= probe.started + REPEAT_AFTER) {
            due.repeated = true;
            if let Some(Err(error)) = self.socket.as_ref().map(|socket| socket.send(&probe(link.mac, due.ip))) {
                tracing::debug!(%error, ip = %due.ip, "cannot repeat an ARP probe");
            }
        }
        let next = |probe: &Probe| probe.started + if probe.repeated { LISTEN } else { REPEAT_AFTER };
        self.probes.iter().map(next).min()
    }

    /// What to wait on for answers.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().filter(|_| !self.probes.is_empty()).map(AsFd::as_fd)
    }

    /// The next station that has said that it has one of the addresses.
    pub fn answer(&self) -> io::Result<Option<(Ipv4Addr, Mac)>> {
        let Some(socket) = &self.socket else { return Ok(None) };
        let mut frame = [0; 64];
        while let Some(len) = socket.receive(&mut frame)? {
            if let Some((ip, mac)) = sender(&frame[..len])
                && self.probes.iter().any(|probe| probe.ip == ip)
            {
                return Ok(Some((ip, mac)));
            }
        }
        Ok(None)
    }
}

/// A request for an address from nobody's, so that it changes no one's idea of who has what.
fn probe(from: Mac, ip: Ipv4Addr) -> [u8; FRAME_LEN] {
    let mut frame = [0; FRAME_LEN];
    frame[0..6].copy_from_slice(&Mac::BROADCAST.0);
    frame[6..12].copy_from_slice(&from.0);
    frame[12..14].copy_from_slice(&[0x08, 0x06]);
    frame[14..20].copy_from_slice(&KIND);
    frame[20..22].copy_from_slice(&[0, 1]);
    frame[22..28].copy_from_slice(&from.0);
    frame[38..42].copy_from_slice(&ip.octets());
    frame
}

/// Which station says in an ARP packet, whatever else it is for, to have which address. The station is that of the frame:
/// it is the one whose port of the bridge is known.
fn sender(frame: &[u8]) -> Option<(Ipv4Addr, Mac)> {
    let packet = frame.get(14..FRAME_LEN).filter(|packet| packet[..6] == KIND)?;
    let mac = Mac([frame[6], frame[7], frame[8], frame[9], frame[10], frame[11]]);
    let ip = Ipv4Addr::new(packet[14], packet[15], packet[16], packet[17]);
    (mac.is_station() && !ip.is_unspecified()).then_some((ip, mac))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_claims_nothing_and_an_answer_names_its_sender() {
        let (ours, theirs) = (Mac([2, 0, 0, 0, 0, 1]), Mac([2, 0, 0, 0, 0, 2]));
        let ip = Ipv4Addr::new(10, 0, 0, 7);
        let mut frame = probe(ours, ip);
        assert_eq!(sender(&frame), None);
        frame[21] = 2;
        frame[6..12].copy_from_slice(&theirs.0);
        frame[28..32].copy_from_slice(&ip.octets());
        assert_eq!(sender(&frame), Some((ip, theirs)));
        assert_eq!(sender(&frame[..41]), None);
    }
}
