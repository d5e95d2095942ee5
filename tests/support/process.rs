//! Commands run inside a namespace.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::host::{HARNESS, Host};

/// Arguments, as a list or as one string of words between blanks.
pub trait IntoArgs {
    /// The list.
    fn into_args(self) -> Vec<String>;
}

impl IntoArgs for &str {
    fn into_args(self) -> Vec<String> {
        self.split_whitespace().map(str::to_owned).collect()
    }
}

impl IntoArgs for String {
    fn into_args(self) -> Vec<String> {
        self.as_str().into_args()
    }
}

impl IntoArgs for &String {
    fn into_args(self) -> Vec<String> {
        self.as_str().into_args()
    }
}

impl<S: ToString, const N: usize> IntoArgs for [S; N] {
    fn into_args(self) -> Vec<String> {
        self.iter().map(ToString::to_string).collect()
    }
}

impl<S: ToString> IntoArgs for &[S] {
    fn into_args(self) -> Vec<String> {
        self.iter().map(ToString::to_string).collect()
    }
}

impl<S: ToString> IntoArgs for Vec<S> {
    fn into_args(self) -> Vec<String> {
        self.as_slice().into_args()
    }
}

impl<S: ToString> IntoArgs for &Vec<S> {
    fn into_args(self) -> Vec<String> {
        self.as_slice().into_args()
    }
}

/// A command that is about to run.
#[must_use = "it does nothing until it is run or spawned"]
pub struct Cmd<'h> {
    host: &'h Host,
    args: Vec<String>,
    env: BTreeMap<String, String>,
    stdin: Vec<u8>,
    timeout: Duration,
    notify: Option<UnixDatagram>,
}

impl<'h> Cmd<'h> {
    pub(super) fn new(host: &'h Host, args: Vec<String>) -> Self {
        let env = host.environment();
        Self { host, args, env, stdin: Vec::new(), timeout: Duration::from_secs(60), notify: None }
    }

    /// Sets a variable for this run.
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.env.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Gives it something to read.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// How long [`Cmd::run`] waits before it kills and panics; 60 s unless set.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Listens for what the process tells systemd; see [`Process::notified`].
    pub fn with_notify_socket(self) -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let path = format!("{HARNESS}/notify-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let address = path.clone();
        let socket = self.host.enter(move || UnixDatagram::bind(address)).expect("cannot bind a notify socket");
        Self { notify: Some(socket), ..self.env("NOTIFY_SOCKET", &path) }
    }

    /// Runs it to its end.
    #[track_caller]
    pub fn run(self) -> Output {
        let timeout = self.timeout;
        self.start(false).wait(timeout)
    }

    /// Starts it; it is killed when the [`Process`] is dropped, and when the test dies.
    #[track_caller]
    pub fn spawn(self) -> Process {
        self.start(true)
    }

    #[track_caller]
    fn start(self, beside_the_test: bool) -> Process {
        let [program, args @ ..] = self.args.as_slice() else { panic!("a command needs a program") };
        let (stdin, stdout, stderr) = (file(), file(), file());
        (&stdin).write_all(&self.stdin).expect("cannot write a temporary file");
        (&stdin).rewind().expect("cannot rewind a temporary file");

        let dirs = self.env["PATH"].clone();
        let name = program.clone();
        let found = self.host.enter(move || find(&name, &dirs));
        let program =
            found.unwrap_or_else(|| panic!("`{program}` is not installed; `make test` installs what tests use"));

        let mut command = if beside_the_test {
            // The namespace's thread is the parent: its end, with or without Drop, is the child's.
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig", "KILL"]).arg(program);
            command
        } else {
            Command::new(program)
        };
        command.args(args).env_clear().envs(&self.env).current_dir("/");
        let stdio = |file: &File| Stdio::from(file.try_clone().expect("cannot duplicate a file descriptor"));
        command.stdin(stdio(&stdin)).stdout(stdio(&stdout)).stderr(stdio(&stderr));
        let argv = self.args.join(" ");
        let child = self.host.enter(move || command.spawn());
        let child = child.unwrap_or_else(|error| panic!("{}: cannot run `{argv}`: {error}", self.host.name()));
        Process { argv, child, stdout, stderr, notify: self.notify, said: String::new() }
    }
}

/// What a command left behind.
#[derive(Debug, Clone)]
pub struct Output {
    /// The command line.
    pub argv: String,
    /// How it ended.
    pub status: ExitStatus,
    /// All of its stdout.
    pub stdout: String,
    /// All of its stderr.
    pub stderr: String,
}

impl Output {
    /// The exit code; -1 if a signal ended it.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    /// Its stdout as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("not JSON: {error}: {self}"))
    }

    /// Panics, with everything it said, unless it exited with 0.
    #[track_caller]
    pub fn succeeded(self) -> Self {
        self.exited(0)
    }

    /// Panics, with everything it said, if it exited with 0.
    #[track_caller]
    pub fn failed(self) -> Self {
        assert!(!self.status.success(), "wanted a failure of {self}");
        self
    }

    /// Panics, with everything it said, unless it exited with this code.
    #[track_caller]
    pub fn exited(self, code: i32) -> Self {
        assert!(self.code() == code, "wanted exit code {code} of {self}");
        self
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { argv, status, stdout, stderr } = self;
        write!(f, "`{argv}` ({status})\n--- stdout\n{stdout}\n--- stderr\n{stderr}")
    }
}

/// A process that runs beside the test. Dropping it kills it.
pub struct Process {
    argv: String,
    child: Child,
    stdout: File,
    stderr: File,
    notify: Option<UnixDatagram>,
    said: String,
}

impl Process {
    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("a pid fits"))
    }

    /// Sends a signal, unless it has ended and been waited for.
    pub fn signal(&mut self, signal: Signal) {
        if self.is_running() {
            kill(self.pid(), signal).expect("cannot signal a child");
        }
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("cannot wait for a child").is_none()
    }

    /// Kills it (SIGKILL) once this much time has passed, or sees it end before.
    pub fn kill_after(mut self, delay: Duration) -> Output {
        let end = Instant::now() + delay;
        while Instant::now() < end && self.is_running() {
            sleep(Duration::from_micros(200).min(end.saturating_duration_since(Instant::now())));
        }
        self.signal(Signal::SIGKILL);
        self.wait(Duration::from_secs(10))
    }

    /// Asks it to end (SIGTERM) and waits.
    #[track_caller]
    pub fn stop(mut self) -> Output {
        self.signal(Signal::SIGTERM);
        self.wait(Duration::from_secs(20))
    }

    /// Waits for its end; panics if that takes longer than this.
    #[track_caller]
    pub fn wait(mut self, timeout: Duration) -> Output {
        let end = Instant::now() + timeout;
        let mut nap = Duration::from_micros(200);
        loop {
            if let Some(status) = self.child.try_wait().expect("cannot wait for a child") {
                return self.output(status);
            }
            if Instant::now() > end {
                self.signal(Signal::SIGKILL);
                panic!("killed after {timeout:?}: {}", self.output(ExitStatus::from_raw(9)));
            }
            sleep(nap);
            nap = (nap * 2).min(Duration::from_millis(10));
        }
    }

    /// What it has written to stdout so far.
    pub fn stdout(&self) -> String {
        content(&self.stdout)
    }

    /// What it has written to stderr so far.
    pub fn stderr(&self) -> String {
        content(&self.stderr)
    }

    /// Waits until a condition holds on this process, for instance on its stderr; says whether it came to hold.
    pub fn wait_until(&mut self, timeout: Duration, mut condition: impl FnMut(&mut Self) -> bool) -> bool {
        eventually(timeout, || condition(self))
    }

    /// Waits until it has told systemd this line (`READY=1`, `STOPPING=1`, `WATCHDOG=1`); needs
    /// [`Cmd::with_notify_socket`]. Each telling counts once.
    pub fn notified(&mut self, line: &str, timeout: Duration) -> bool {
        let end = Instant::now() + timeout;
        loop {
            if let Some(at) = self.said.lines().position(|said| said == line) {
                self.said = self.said.lines().skip(at + 1).fold(String::new(), |text, line| text + line + "\n");
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || !self.is_running() {
                return false;
            }
            let socket = self.notify.as_ref().expect("this process has no notify socket");
            socket.set_read_timeout(Some(left.min(Duration::from_millis(50)))).expect("a timeout above zero");
            let mut message = [0; 4096];
            if let Ok(length) = socket.recv(&mut message) {
                self.said += &String::from_utf8_lossy(&message[..length]);
                self.said += "\n";
            }
        }
    }

    fn output(&self, status: ExitStatus) -> Output {
        Output { argv: self.argv.clone(), status, stdout: self.stdout(), stderr: self.stderr() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Tries until it holds or the time is up; says whether it came to hold.
pub fn eventually(timeout: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + timeout;
    let mut nap = Duration::from_micros(500);
    loop {
        if condition() {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        sleep(nap);
        nap = (nap * 2).min(Duration::from_millis(20));
    }
}

fn file() -> File {
    tempfile::tempfile().expect("cannot make a temporary file")
}

fn content(file: &File) -> String {
    let mut bytes = vec![0; usize::try_from(file.metadata().map_or(0, |data| data.len())).unwrap_or(0)];
    let length = file.read_at(&mut bytes, 0).expect("cannot read a temporary file");
    String::from_utf8_lossy(&bytes[..length]).into_owned()
}

/// Where a program is, on the `PATH` it will be given.
pub(super) fn find(program: &str, dirs: &str) -> Option<PathBuf> {
    if program.contains('/') {
        return Some(PathBuf::from(program));
    }
    std::env::split_paths(dirs).map(|dir| dir.join(program)).find(|path| path.is_file())
}
