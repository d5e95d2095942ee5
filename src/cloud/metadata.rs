//! The clouds' instance metadata, and which cloud this is.
//!
//! Plain HTTP/1.1 over one connection per question, never through a proxy. An answer counts only if it could be one:
//! status 200, not HTML, one word. A captive portal or a wildcard DNS record is not taken for a cloud.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::OnceCell;

use crate::config::Platform;
use crate::log::chain;

/// How long one question may take.
const TIMEOUT: Duration = Duration::from_secs(2);

/// No metadata value that we ask for is longer, in bytes.
const LONGEST_ANSWER: usize = 4096;

/// Google's name for the server, and the address that it stands for where the name cannot be resolved
/// (<https://cloud.google.com/compute/docs/metadata/querying-metadata>).
const GOOGLE: (&str, &str) = ("metadata.google.internal", "169.254.169.254");

/// Moves Google's server elsewhere, `HOST` or `HOST:PORT`, as it does for Google's own clients.
const GOOGLE_VARIABLE: &str = "GCE_METADATA_HOST";

/// Volcengine's server.
const VOLCENGINE: &str = "100.96.0.96";

/// Google's proof of identity, asked for and given in this header.
const FLAVOR: (&str, &str) = ("metadata-flavor", "Google");

/// Why the metadata could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    /// The server could not be reached, or ended the conversation.
    #[error("cannot read {url} from the metadata server")]
    Unreachable {
        /// What was asked for.
        url: String,
        /// What went wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It did not answer in time.
    #[error("the metadata server did not answer {url} within {} s", TIMEOUT.as_secs())]
    Silent {
        /// What was asked for.
        url: String,
    },
    /// It answered something that is not the value asked for.
    #[error("the metadata server answered {url} with {problem}, which is not the value asked for")]
    Answer {
        /// What was asked for.
        url: String,
        /// What is wrong with the answer.
        problem: String,
    },
    /// Neither cloud's metadata server answered.
    #[error(
        "cannot tell which cloud this is, no metadata server answered (gke: {}; volcengine: {}); \
         name it with --platform gke, --platform volcengine, or --platform none",
        chain(.gke), chain(.volcengine)
    )]
    NoCloud {
        /// What became of Google's.
        gke: Box<MetadataError>,
        /// What became of Volcengine's.
        volcengine: Box<MetadataError>,
    },
    /// Both answered.
    #[error(
        "cannot tell which cloud this is, the metadata servers of both answered (gke: {gke}; volcengine: {volcengine}); \
         name it with --platform gke, --platform volcengine, or --platform none"
    )]
    BothClouds {
        /// The instance according to Google's.
        gke: String,
        /// The instance according to Volcengine's.
        volcengine: String,
    },
}

/// One cloud's metadata server.
#[derive(Debug, Clone)]
pub struct Metadata {
    authority: String,
    /// Asked when the authority's name cannot be resolved.
    fallback: Option<&'static str>,
    base: &'static str,
    google: bool,
    addresses: OnceCell<Vec<SocketAddr>>,
}

impl Metadata {
    /// Google's, at `GCE_METADATA_HOST` if that is set.
    #[must_use]
    pub fn google() -> Self {
        match std::env::var(GOOGLE_VARIABLE).ok().filter(|host| !host.is_empty()) {
            Some(host) => Self::google_at(host),
            None => Self { fallback: Some(GOOGLE.1), ..Self::google_at(GOOGLE.0.to_owned()) },
        }
    }

    /// Volcengine's.
    #[must_use]
    pub fn volcengine() -> Self {
        Self::volcengine_at(VOLCENGINE.to_owned())
    }

    fn google_at(authority: String) -> Self {
        Self { authority, fallback: None, base: "/computeMetadata/v1", google: true, addresses: OnceCell::new() }
    }

    fn volcengine_at(authority: String) -> Self {
        Self { authority, fallback: None, base: "/latest/meta-data", google: false, addresses: OnceCell::new() }
    }

    /// One value, such as `/instance/name`.
    ///
    /// # Errors
    /// When the server cannot be reached, is silent, or answers something that cannot be such a value.
    pub async fn get(&self, path: &str) -> Result<String, MetadataError> {
        let url = format!("http://{}{}{path}", self.authority, self.base);
        match tokio::time::timeout(TIMEOUT, self.ask(&url, path)).await {
            Ok(Ok((response, body))) => {
                value(self.google, &response, &body).map_err(|problem| MetadataError::Answer { url, problem })
            }
            Ok(Err(source)) => Err(MetadataError::Unreachable { url, source }),
            Err(_) => Err(MetadataError::Silent { url }),
        }
    }

    async fn ask(
        &self,
        url: &str,
        path: &str,
    ) -> Result<(Response<()>, Bytes), Box<dyn std::error::Error + Send + Sync>> {
        tracing::debug!(url, "asking the metadata server");
        let addresses = self.addresses.get_or_try_init(|| self.resolve()).await?;
        let stream = TcpStream::connect(addresses.as_slice()).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let mut request = Request::get(format!("{}{path}", self.base)).header(HOST, &self.authority);
        if self.google {
            request = request.header(FLAVOR.0, FLAVOR.1);
        }
        let request = request.body(Empty::<Bytes>::new())?;
        let answer = async {
            let (parts, body) = sender.send_request(request).await?.into_parts();
            let body = Limited::new(body, LONGEST_ANSWER).collect().await?.to_bytes();
            Ok((Response::from_parts(parts, ()), body))
        };
        tokio::pin!(connection, answer);
        tokio::select! {
            answer = &mut answer => answer,
            // The connection ends by itself once it has been answered: what was read of the answer is still there.
            ended = &mut connection => match ended {
                Ok(()) => answer.await,
                Err(error) => Err(error.into()),
            },
        }
    }

    async fn resolve(&self) -> io::Result<Vec<SocketAddr>> {
        let named = with_port(&self.authority);
        match self.fallback {
            None => resolve(named).await,
            Some(fallback) => match tokio::time::timeout(TIMEOUT / 4, resolve(named)).await {
                Ok(Ok(found)) => Ok(found),
                _ => resolve(with_port(fallback)).await,
            },
        }
    }
}

/// Which cloud this is: both metadata servers are asked at once.
///
/// # Errors
/// [`MetadataError::NoCloud`] and [`MetadataError::BothClouds`].
pub async fn detect() -> Result<Platform, MetadataError> {
    detect_at(&Metadata::google(), &Metadata::volcengine()).await
}

async fn detect_at(google: &Metadata, volcengine: &Metadata) -> Result<Platform, MetadataError> {
    match tokio::join!(google.get("/instance/name"), volcengine.get("/instance-id")) {
        (Ok(_), Err(_)) => Ok(Platform::Gke),
        (Err(_), Ok(_)) => Ok(Platform::Volcengine),
        (Ok(gke), Ok(volcengine)) => Err(MetadataError::BothClouds { gke, volcengine }),
        (Err(gke), Err(volcengine)) => {
            Err(MetadataError::NoCloud { gke: Box::new(gke), volcengine: Box::new(volcengine) })
        }
    }
}

/// Resolves in a thread that nobody waits for: the C library's resolver cannot be interrupted, and a runtime that
/// shuts down would wait for it.
async fn resolve(authority: String) -> io::Result<Vec<SocketAddr>> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().name("resolver".to_owned()).spawn(move || {
        // The receiver is gone once the question has timed out.
        let _ = sender.send(authority.to_socket_addrs().map(Iterator::collect));
    })?;
    receiver.await.unwrap_or_else(|_| Err(io::Error::other("the resolver gave up")))
}

fn with_port(authority: &str) -> String {
    let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    if has_port { authority.to_owned() } else { format!("{authority}:80") }
}

/// What the answer is, or what is wrong with it.
fn value(google: bool, response: &Response<()>, body: &[u8]) -> Result<String, String> {
    let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if response.status() != hyper::StatusCode::OK {
        return Err(format!("status {}", response.status()));
    }
    // Emulators behind GCE_METADATA_HOST leave the header out, so only a wrong one is held against the answer.
    if google && response.headers().contains_key(FLAVOR.0) && header(FLAVOR.0) != FLAVOR.1 {
        return Err(format!("the header Metadata-Flavor: {}", header(FLAVOR.0)));
    }
    if header(CONTENT_TYPE.as_str()).contains("html") {
        return Err("a web page".to_owned());
    }
    let text = String::from_utf8_lossy(body);
    let word = text.trim();
    let plain = |c: char| c.is_ascii_alphanumeric() || "._:/-".contains(c);
    if word.starts_with(|c: char| c.is_ascii_alphanumeric()) && word.chars().all(plain) {
        Ok(word.to_owned())
    } else {
        Err(format!("{:?}", word.chars().take(60).collect::<String>()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    /// A server on the loopback that answers every request with these bytes; it returns what it was asked.
    async fn serve(answer: &'static str) -> (String, tokio::task::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let authority = listener.local_addr().unwrap().to_string();
        let asked = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 2048];
            let length = stream.read(&mut request).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
            String::from_utf8_lossy(&request[..length]).into_owned()
        });
        (authority, asked)
    }

    const NAME: &str = "HTTP/1.1 200 OK\r\nMetadata-Flavor: Google\r\nContent-Length: 6\r\n\r\nnode-1";
    const PAGE: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>";
    const BARE_PAGE: &str = "HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n<html>x</html>";
    const MISSING: &str = "HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnone";
    const OTHER: &str = "HTTP/1.1 200 OK\r\nMetadata-Flavor: Amazon\r\nContent-Length: 6\r\n\r\nnode-1";
    const TO_THE_END: &str = "HTTP/1.0 200 OK\r\n\r\nnode-1\n";

    #[tokio::test]
    async fn google_is_asked_with_its_header() {
        let (authority, asked) = serve(NAME).await;
        assert_eq!(Metadata::google_at(authority).get("/instance/name").await.unwrap(), "node-1");
        let asked = asked.await.unwrap().to_lowercase();
        assert!(asked.starts_with("get /computemetadata/v1/instance/name http/1.1\r\n"), "{asked}");
        assert!(asked.contains("metadata-flavor: google\r\n"), "{asked}");
    }

    #[tokio::test]
    async fn a_web_page_another_flavor_and_an_error_are_no_answers() {
        for answer in [PAGE, BARE_PAGE, MISSING, OTHER, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "garbage", ""] {
            let (authority, _) = serve(answer).await;
            let error = Metadata::google_at(authority.clone()).get("/instance/name").await.unwrap_err();
            assert!(error.to_string().contains(&authority), "{answer}: {error}");
        }
    }

    #[tokio::test]
    async fn an_answer_may_end_with_the_connection() {
        let (authority, _) = serve(TO_THE_END).await;
        assert_eq!(Metadata::volcengine_at(authority).get("/instance-id").await.unwrap(), "node-1");
    }

    #[tokio::test]
    async fn a_server_that_says_nothing_is_given_two_seconds() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let silent = Metadata::volcengine_at(listener.local_addr().unwrap().to_string());
        let started = std::time::Instant::now();
        assert!(matches!(silent.get("/instance-id").await, Err(MetadataError::Silent { .. })));
        assert!(started.elapsed() < Duration::from_secs(4));
    }

    #[tokio::test]
    async fn the_cloud_whose_server_answers_is_the_platform() {
        let (google, _) = serve(NAME).await;
        let (page, _) = serve(PAGE).await;
        let found = detect_at(&Metadata::google_at(google), &Metadata::volcengine_at(page)).await;
        assert_eq!(found.unwrap(), Platform::Gke);

        let (page, _) = serve(PAGE).await;
        let (volcengine, _) = serve(NAME).await;
        let found = detect_at(&Metadata::google_at(page), &Metadata::volcengine_at(volcengine)).await;
        assert_eq!(found.unwrap(), Platform::Volcengine);
    }

    #[tokio::test]
    async fn neither_and_both_are_errors_that_name_the_flag() {
        let (one, _) = serve(PAGE).await;
        let (two, _) = serve(MISSING).await;
        let error = detect_at(&Metadata::google_at(one), &Metadata::volcengine_at(two)).await.unwrap_err();
        assert!(matches!(error, MetadataError::NoCloud { .. }) && error.to_string().contains("--platform"), "{error}");

        let (one, _) = serve(NAME).await;
        let (two, _) = serve(NAME).await;
        let error = detect_at(&Metadata::google_at(one), &Metadata::volcengine_at(two)).await.unwrap_err();
        assert!(
            matches!(error, MetadataError::BothClouds { .. }) && error.to_string().contains("--platform"),
            "{error}"
        );
    }

    #[test]
    fn a_host_is_asked_on_port_80_unless_it_names_one() {
        assert_eq!(with_port("metadata.google.internal"), "metadata.google.internal:80");
        assert_eq!(with_port("127.0.0.1:8080"), "127.0.0.1:8080");
    }
}
