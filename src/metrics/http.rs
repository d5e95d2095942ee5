//! `/metrics` and `/healthz` over HTTP/1.1.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use super::Metrics;

/// The text format 0.0.4, as the Go program answers it.
const EXPOSITION: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Connections served at once; a scraper needs one. More wait in the listen queue.
const MAX_CONNECTIONS: usize = 32;

/// How long a client may take to send a request's head, and an idle connection stays open.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);

/// Whether isolation is what `pool.json` asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It is, or none is asked for.
    Healthy,
    /// It is not, and why.
    Unhealthy(String),
}

/// Where to listen, as `--metrics-addr` says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenAddr {
    /// The empty text: do not listen.
    Off,
    /// `:PORT`: every address of the host, of both families where the host has both.
    All(u16),
    /// `HOST:PORT`: the addresses that `HOST` stands for.
    Host(String),
}

/// Why the metrics cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// Not an address to listen on.
    #[error("`{0}` is not an address to listen on: write :PORT or HOST:PORT, such as :9092, or nothing to turn it off")]
    Address(String),
    /// The port is taken, or the address is not this host's.
    #[error("cannot listen on {addr} for metrics; choose another --metrics-addr, or an empty one to turn it off")]
    Listen {
        /// The address.
        addr: ListenAddr,
        /// What the system answered.
        source: io::Error,
    },
}

/// A running HTTP end. It stops when this is dropped.
#[derive(Debug)]
pub struct Endpoint {
    local_addr: SocketAddr,
    task: JoinHandle<()>,
}

impl Endpoint {
    /// The address it listens on, with the port that the kernel chose when 0 was asked for.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FromStr for ListenAddr {
    type Err = MetricsError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() {
            return Ok(Self::Off);
        }
        let bad = || MetricsError::Address(text.to_owned());
        let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
        let port = port.parse::<u16>().map_err(|_| bad())?;
        if host.is_empty() {
            return Ok(Self::All(port));
        }
        let bracketed = host.starts_with('[') && host.ends_with(']');
        if host.contains(':') && !bracketed || host.contains(char::is_whitespace) {
            return Err(bad());
        }
        Ok(Self::Host(text.to_owned()))
    }
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("no address"),
            Self::All(port) => write!(f, ":{port}"),
            Self::Host(addr) => f.write_str(addr),
        }
    }
}

/// Starts to answer `/metrics` and `/healthz`; `None` when that is turned off. Must be called on a tokio runtime.
///
/// # Errors
/// [`MetricsError::Listen`] when the address cannot be listened on.
pub async fn serve(
    addr: &ListenAddr,
    metrics: Arc<Metrics>,
    health: watch::Receiver<Health>,
) -> Result<Option<Endpoint>, MetricsError> {
    let failed = |source| MetricsError::Listen { addr: addr.clone(), source };
    let listener = match addr {
        ListenAddr::Off => return Ok(None),
        ListenAddr::All(port) => listen_everywhere(*port).map_err(failed)?,
        ListenAddr::Host(host) => TcpListener::bind(host).await.map_err(failed)?,
    };
    let local_addr = listener.local_addr().map_err(failed)?;
    tracing::info!(address = %local_addr, "serving metrics");
    Ok(Some(Endpoint { local_addr, task: tokio::spawn(accept(listener, metrics, health)) }))
}

/// Listens on the IPv6 wildcard address for both families, or on the IPv4 one where the host has no IPv6.
fn listen_everywhere(port: u16) -> io::Result<TcpListener> {
    let both = || {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
        socket.set_only_v6(false)?;
        listen(socket, (Ipv6Addr::UNSPECIFIED, port).into())
    };
    match both() {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
            listen(socket, (Ipv4Addr::UNSPECIFIED, port).into())
        }
        result => result,
    }
}

fn listen(socket: Socket, addr: SocketAddr) -> io::Result<TcpListener> {
    // A restarted daemon must not wait for the last scrape's connection to leave TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    socket.listen(128)?;
    TcpListener::from_std(socket.into())
}

async fn accept(listener: TcpListener, metrics: Arc<Metrics>, health: watch::Receiver<Health>) {
    let free = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // The semaphore is never closed.
        let Ok(permit) = Arc::clone(&free).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: the next try must not spin.
                tracing::warn!(%error, "cannot accept a metrics connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (metrics, health) = (Arc::clone(&metrics), health.clone());
        tokio::spawn(async move {
            let service = hyper::service::service_fn(|request: Request<Incoming>| {
                let (metrics, health) = (&metrics, &health);
                async move { Ok::<_, Infallible>(answer(request.method(), request.uri().path(), metrics, health).await) }
            });
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                tracing::debug!(%error, "a metrics connection ended early");
            }
            drop(permit);
        });
    }
}

async fn answer(
    method: &Method,
    path: &str,
    metrics: &Metrics,
    health: &watch::Receiver<Health>,
) -> Response<Full<Bytes>> {
    if method != Method::GET && method != Method::HEAD {
        let mut refusal = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD are answered here\n".to_owned());
        refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refusal;
    }
    match path {
        "/metrics" => {
            metrics.announce_scrape().await;
            let mut exposition = text(StatusCode::OK, metrics.render());
            exposition.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(EXPOSITION));
            exposition
        }
        "/healthz" => match &*health.borrow() {
            Health::Healthy => text(StatusCode::OK, "ok\n".to_owned()),
            Health::Unhealthy(reason) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
        },
        _ => text(StatusCode::NOT_FOUND, "only /metrics and /healthz are here\n".to_owned()),
    }
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    async fn get(addr: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, addr.port())).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn a_scraper_gets_the_metrics_and_the_health_on_every_address() {
        let (health, receiver) = watch::channel(Health::Healthy);
        let endpoint = serve(&ListenAddr::All(0), Arc::new(Metrics::new()), receiver).await.unwrap().unwrap();
        let addr = endpoint.local_addr();

        let metrics = get(addr, "/metrics").await;
        assert!(metrics.starts_with("HTTP/1.1 200 OK\r\n"), "{metrics}");
        assert!(metrics.contains(&format!("content-type: {EXPOSITION}\r\n")), "{metrics}");
        assert!(metrics.contains("\ncocoon_net_dhcp_lease_active 0\n"), "{metrics}");

        assert!(get(addr, "/healthz").await.starts_with("HTTP/1.1 200 OK\r\n"));
        health.send_replace(Health::Unhealthy("drop rules are missing".to_owned()));
        let sick = get(addr, "/healthz").await;
        assert!(sick.starts_with("HTTP/1.1 503 ") && sick.contains("drop rules are missing"), "{sick}");

        assert!(get(addr, "/").await.starts_with("HTTP/1.1 404 "));
    }

    #[tokio::test]
    async fn a_taken_port_is_named() {
        let (_health, receiver) = watch::channel(Health::Healthy);
        let first = serve(&ListenAddr::All(0), Arc::new(Metrics::new()), receiver.clone()).await.unwrap().unwrap();
        let addr = ListenAddr::All(first.local_addr().port());
        let error = serve(&addr, Arc::new(Metrics::new()), receiver).await.unwrap_err();
        assert!(error.to_string().contains(&addr.to_string()), "{error}");
    }

    #[tokio::test]
    async fn the_empty_address_turns_it_off() {
        let (_health, receiver) = watch::channel(Health::Healthy);
        assert!(serve(&"".parse().unwrap(), Arc::new(Metrics::new()), receiver).await.unwrap().is_none());
    }

    #[test]
    fn addresses_to_listen_on_are_checked_before_they_are_used() {
        assert_eq!(":9092".parse::<ListenAddr>().unwrap(), ListenAddr::All(9092));
        for good in ["127.0.0.1:9092", "[::1]:9092", "localhost:0"] {
            assert_eq!(good.parse::<ListenAddr>().unwrap(), ListenAddr::Host(good.to_owned()));
        }
        for bad in ["9092", ":", ":http", ":65536", "127.0.0.1", "::1:9092", "local host:1"] {
            assert!(bad.parse::<ListenAddr>().is_err(), "{bad}");
        }
    }
}
