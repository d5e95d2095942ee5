//! The only place that starts a process.
//!
//! Every child runs in a process group of its own, with `LC_ALL=C`, stdout and stderr apart and bounded, and a
//! deadline that covers everything: when it passes, or when the caller goes away, the whole group is killed.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

/// How long a host tool (`iptables-restore`, `sysctl`, ...) may take unless told otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the end of a killed process is waited for: it may be stuck in the kernel.
const REAP_LIMIT: Duration = Duration::from_secs(1);

/// Output past this many bytes is an error: no tool we call has a reason to print more.
const OUTPUT_LIMIT: u64 = 64 << 20;

/// Folders looked in after `PATH`: systemd units and cron often run without the sbin folders.
const SBIN: [&str; 4] = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin"];

/// A process to run: program, arguments, standard input, environment and deadline.
#[derive(Debug, Clone)]
#[must_use = "a command does nothing until it is run"]
pub struct Command {
    program: String,
    args: Vec<String>,
    env: Vec<(String, String)>,
    stdin: Vec<u8>,
    timeout: Duration,
}

/// What a process left behind.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Everything it wrote to stdout.
    pub stdout: Vec<u8>,
    /// Everything it wrote to stderr, trimmed; bytes that are not UTF-8 are replaced.
    pub stderr: String,
}

/// Why a process did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The program is neither on `PATH` nor in the sbin folders.
    #[error("`{program}` was not found on PATH or in the sbin folders; install it and try again")]
    NotFound {
        /// The program's name.
        program: String,
    },
    /// The process could not be started, or its pipes failed.
    #[error("cannot run `{argv}`")]
    Io {
        /// The command line.
        argv: String,
        /// What the system answered.
        source: std::io::Error,
    },
    /// It ran past its deadline and was killed.
    #[error("`{argv}` did not finish within {} s and was killed", .after.as_secs_f32())]
    Timeout {
        /// The command line.
        argv: String,
        /// The deadline.
        after: Duration,
    },
    /// It ended with a status other than 0.
    #[error("`{argv}` failed ({status}){}", colon(.stderr))]
    Failed {
        /// The command line.
        argv: String,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to stderr.
        stderr: String,
    },
    /// It wrote more than any tool has a reason to.
    #[error("`{argv}` wrote more than {} MiB", OUTPUT_LIMIT >> 20)]
    TooMuchOutput {
        /// The command line.
        argv: String,
    },
}

impl CommandError {
    /// The exit code, when the process ran and ended by itself.
    #[must_use]
    pub fn exit_code(&self) -> Option<i32> {
        match self {
            Self::Failed { status, .. } => status.code(),
            _ => None,
        }
    }
}

impl Command {
    /// A command without arguments, with empty standard input and [`DEFAULT_TIMEOUT`].
    pub fn new(program: impl Into<String>) -> Self {
        Self { program: program.into(), args: Vec::new(), env: Vec::new(), stdin: Vec::new(), timeout: DEFAULT_TIMEOUT }
    }

    /// Adds one argument.
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Adds arguments.
    pub fn args<I>(mut self, args: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets a variable in the child's environment. Its value is never logged.
    pub fn env(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.push((key.into(), value.into()));
        self
    }

    /// Feeds these bytes to standard input, then closes it.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Sets the deadline for the whole run.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The command line as an operator would type it; long ones are cut.
    #[must_use]
    pub fn argv(&self) -> String {
        let mut line = self.program.clone();
        for arg in &self.args {
            line.push(' ');
            if arg.is_empty() || arg.contains(|c: char| c.is_whitespace() || "\"'$&;|<>()`\\".contains(c)) {
                line.push_str(&format!("'{}'", arg.replace('\'', r"'\''")));
            } else {
                line.push_str(arg);
            }
        }
        if line.len() > 400 {
            let cut = (0..=400).rev().find(|at| line.is_char_boundary(*at)).unwrap_or(0);
            line.truncate(cut);
            line.push_str(" ...");
        }
        line
    }

    /// Runs it and wants exit status 0. Only stdout is an answer; what stderr says is logged at debug.
    ///
    /// # Errors
    /// [`CommandError::Failed`] carries stderr when the status is not 0; otherwise as for [`Command::output`].
    pub async fn run(self) -> Result<Output, CommandError> {
        let argv = self.argv();
        let output = self.output().await?;
        if !output.status.success() {
            return Err(CommandError::Failed { argv, status: output.status, stderr: output.stderr });
        }
        if !output.stderr.is_empty() {
            tracing::debug!(command = %argv, stderr = %output.stderr, "the tool had something to say");
        }
        Ok(output)
    }

    /// Runs it, whatever its exit status means.
    ///
    /// # Errors
    /// When the program is missing, cannot be started, floods its output or runs past the deadline.
    pub async fn output(self) -> Result<Output, CommandError> {
        let argv = self.argv();
        let path = find(&self.program).ok_or_else(|| CommandError::NotFound { program: self.program.clone() })?;
        tracing::trace!(command = %argv, "starting");

        let io = |source| CommandError::Io { argv: argv.clone(), source };
        let mut child = tokio::process::Command::new(path)
            .args(&self.args)
            .env("LC_ALL", "C")
            .envs(self.env.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(io)?;
        let group = ProcessGroup::of(&child);
        remember(child.id());

        let (mut input, out, err) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let feed = async {
            if let Some(mut pipe) = input.take() {
                // A tool may end before it has read everything (EPIPE); its exit status tells the story.
                let _ = pipe.write_all(&self.stdin).await;
            }
        };
        let work = async {
            let ((), stdout, stderr, status) = tokio::join!(feed, read(out), read(err), child.wait());
            Ok::<_, std::io::Error>((stdout?, stderr?, status?))
        };
        let (stdout, stderr, status) = match tokio::time::timeout(self.timeout, work).await {
            Ok(done) => done.map_err(io)?,
            Err(_) => {
                drop(group);
                // What it has used of the processor counts as ours once it has been waited for.
                let _ = tokio::time::timeout(REAP_LIMIT, child.wait()).await;
                return Err(CommandError::Timeout { argv, after: self.timeout });
            }
        };
        group.ended();

        if stdout.len() as u64 > OUTPUT_LIMIT || stderr.len() as u64 > OUTPUT_LIMIT {
            return Err(CommandError::TooMuchOutput { argv });
        }
        Ok(Output { status, stdout, stderr: String::from_utf8_lossy(&stderr).trim().to_owned() })
    }
}

impl Output {
    /// Stdout as text; bytes that are not UTF-8 are replaced.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// The process ids of the latest children.
static CHILDREN: Mutex<VecDeque<u32>> = Mutex::new(VecDeque::new());

/// How many of them are remembered: more than one pass starts.
const REMEMBERED: usize = 64;

fn remember(child: Option<u32>) {
    if let (Some(pid), Ok(mut children)) = (child, CHILDREN.lock()) {
        children.truncate(REMEMBERED - 1);
        children.push_front(pid);
    }
}

/// Whether a process is, or was lately, a child of ours.
#[must_use]
pub fn was_started_here(pid: u32) -> bool {
    CHILDREN.lock().is_ok_and(|children| children.contains(&pid))
}

/// Where a program is: the first executable file of that name on `PATH`, then in the sbin folders.
#[must_use]
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin"));
    let folders = std::env::split_paths(&path).chain(SBIN.iter().map(PathBuf::from));
    folders
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file() && nix::unistd::access(candidate, nix::unistd::AccessFlags::X_OK).is_ok())
}

/// Kills the process group when it is dropped before [`ProcessGroup::ended`].
struct ProcessGroup(Option<Pid>);

impl ProcessGroup {
    fn of(child: &tokio::process::Child) -> Self {
        Self(child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw))
    }

    fn ended(mut self) {
        self.0 = None;
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // ESRCH: everyone is gone already, which is what we want.
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

async fn read(pipe: Option<impl AsyncRead + Unpin>) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        pipe.take(OUTPUT_LIMIT + 1).read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}

fn colon(stderr: &str) -> String {
    if stderr.is_empty() { String::new() } else { format!(": {stderr}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        Command::new("sh").args(["-c", script])
    }

    #[tokio::test]
    async fn stdout_and_stderr_are_kept_apart() {
        let output = sh("echo data; echo noise >&2").run().await.unwrap();
        assert_eq!(output.text(), "data\n");
        assert_eq!(output.stderr, "noise");
    }

    #[tokio::test]
    async fn a_failure_carries_the_exit_code_and_what_stderr_said() {
        let error = sh("echo partial; echo why >&2; exit 3").run().await.unwrap_err();
        assert_eq!(error.exit_code(), Some(3));
        assert!(error.to_string().contains("why"), "{error}");
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let error = Command::new("no-such-tool").run().await.unwrap_err();
        assert!(error.to_string().contains("`no-such-tool` was not found"), "{error}");
    }

    #[tokio::test]
    async fn a_hanging_tool_is_killed_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let pid_file = dir.path().join("pid");
        let script = format!("sleep 60 & echo $! > {}; wait", pid_file.display());
        let error = sh(&script).timeout(Duration::from_millis(300)).run().await.unwrap_err();
        assert!(matches!(error, CommandError::Timeout { .. }), "{error}");

        let grandchild = std::fs::read_to_string(&pid_file).unwrap();
        let gone = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", grandchild.trim())).unwrap_or_default();
            stat.is_empty() || stat.contains(") Z ")
        };
        for _ in 0..50 {
            if gone() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the grandchild {grandchild} is still running");
    }

    #[tokio::test]
    async fn a_tool_that_does_not_read_its_input_is_judged_by_its_exit_status() {
        let big = vec![b'x'; 1 << 20];
        assert!(sh("exit 0").stdin(big).run().await.is_ok());
    }
}
