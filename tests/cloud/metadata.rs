//! Metadata servers at their real addresses, on the node's `lo`.
//!
//! Google: <https://cloud.google.com/compute/docs/metadata/querying-metadata>: plain text, the request must carry
//! `Metadata-Flavor: Google` (else 403), the answer does too. Volcengine:
//! <https://www.volcengine.com/docs/6396/73245>: plain text at 100.96.0.96, no header.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

use crate::support::Node;

use super::{gcloud, ve};

/// What answers, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server {
    /// Google's.
    Google,
    /// Google's, at 127.0.0.1:8088 instead.
    GoogleElsewhere,
    /// Volcengine's.
    Volcengine,
    /// A captive portal in the place of Google's.
    PageForGoogle,
    /// A captive portal in the place of Volcengine's.
    PageForVolcengine,
    /// Something in the place of Volcengine's that takes questions and never answers.
    SilentForVolcengine,
}

pub(super) fn serve(node: &Node, server: Server) {
    let address = match server {
        Server::Google | Server::PageForGoogle => "169.254.169.254:80",
        Server::GoogleElsewhere => "127.0.0.1:8088",
        _ => "100.96.0.96:80",
    };
    let listener = node.enter(move || TcpListener::bind(address)).expect("the metadata address is on lo");
    thread::spawn(move || {
        let mut silent = Vec::new();
        for stream in listener.incoming().flatten() {
            if server == Server::SilentForVolcengine {
                silent.push(stream);
            } else {
                thread::spawn(move || answer(stream, server));
            }
        }
    });
}

fn answer(mut stream: TcpStream, server: Server) {
    let mut request = [0; 4096];
    let length = stream.read(&mut request).unwrap_or(0);
    let request = String::from_utf8_lossy(&request[..length]).into_owned();
    let path = request.split_whitespace().nth(1).unwrap_or_default();
    let google = matches!(server, Server::Google | Server::GoogleElsewhere);
    let (status, kind, body) = match server {
        Server::PageForGoogle | Server::PageForVolcengine => {
            ("200 OK", "text/html", Some("<!doctype html><title>Sign in</title>".to_owned()))
        }
        _ if google && !request.to_lowercase().contains("metadata-flavor: google") => {
            ("403 Forbidden", "text/html", None)
        }
        _ if google => ("200 OK", "application/text", gcloud::metadata(path)),
        _ => ("200 OK", "text/plain", ve::metadata(path)),
    };
    let (status, body) = match body {
        Some(body) => (status, body),
        None if status == "200 OK" => ("404 Not Found", "not found".to_owned()),
        None => (status, "missing required header".to_owned()),
    };
    let flavor = if google { "Metadata-Flavor: Google\r\n" } else { "" };
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{flavor}Content-Length: {length}\r\n\r\n");
    let _ = stream.write_all((head + &body).as_bytes());
}
