//! A namespace that things run in: a thread that has left the machine's network and mounts for its own.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;
use std::{fs, io, panic, thread};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid, gettid};

use super::process::{Cmd, IntoArgs, Output, Process, eventually};

/// What belongs to the support code inside a namespace; no part of the host under test.
pub const HARNESS: &str = "/run/.harness";

const SBIN: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

type Job = Box<dyn FnOnce() + Send>;

/// A network and mount namespace, held by a thread. It goes away with the `Host`, and so does all that runs in it.
pub struct Host {
    name: String,
    tid: Pid,
    netns: u64,
    env: Mutex<BTreeMap<String, String>>,
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Host {
    /// Makes the namespaces.
    pub fn new(name: &str) -> Self {
        assert!(geteuid().is_root(), "these tests make network namespaces, which needs root: run `make test`");
        let (jobs, inbox) = channel::<Job>();
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || inbox.iter().for_each(|job| job()))
            .expect("cannot start a thread");
        let mut host = Self {
            name: name.to_owned(),
            tid: Pid::from_raw(0),
            netns: 0,
            env: Mutex::new(BTreeMap::new()),
            jobs: Some(jobs),
            thread: Some(thread),
        };
        (host.tid, host.netns) = host.enter(|| {
            leave_the_machine();
            (gettid(), netns_of("thread-self").expect("/proc is readable"))
        });
        host
    }

    /// The name given to [`Host::new`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whom `ip link ... netns PID` takes for this namespace.
    pub fn pid(&self) -> i32 {
        self.tid.as_raw()
    }

    /// Calls a function on the namespace's thread and hands back its answer, or its panic.
    pub fn enter<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> T {
        let (answer, inbox) = channel();
        let job = move || {
            let _ = answer.send(panic::catch_unwind(panic::AssertUnwindSafe(f)));
        };
        self.jobs.as_ref().expect("jobs end with the host").send(Box::new(job)).expect("the thread lives");
        match inbox.recv().expect("the thread lives") {
            Ok(answer) => answer,
            Err(panic) => panic::resume_unwind(panic),
        }
    }

    /// A command to run in here.
    pub fn command(&self, args: impl IntoArgs) -> Cmd<'_> {
        Cmd::new(self, args.into_args())
    }

    /// Runs a command to its end, whatever that is.
    pub fn run(&self, args: impl IntoArgs) -> Output {
        self.command(args).run()
    }

    /// Runs a command that must succeed, and gives its stdout.
    #[track_caller]
    pub fn ok(&self, args: impl IntoArgs) -> String {
        self.run(args).succeeded().stdout
    }

    /// Starts a command that runs beside the test, until it is dropped.
    pub fn spawn(&self, args: impl IntoArgs) -> Process {
        self.command(args).spawn()
    }

    /// Runs lines of `ip` in one process; all must succeed.
    #[track_caller]
    pub fn ip(&self, lines: &[&str]) {
        self.command("ip -batch -").stdin(lines.join("\n")).run().succeeded();
    }

    /// Sets a variable for everything that is run here from now on.
    pub fn set_env(&self, key: &str, value: &str) {
        self.env.lock().unwrap().insert(key.to_owned(), value.to_owned());
    }

    /// The environment of what is run here.
    pub fn environment(&self) -> BTreeMap<String, String> {
        let mut env = BTreeMap::from([
            ("HOME".to_owned(), format!("{HARNESS}/home")),
            ("LC_ALL".to_owned(), "C".to_owned()),
            ("PATH".to_owned(), format!("{HARNESS}/bin:{SBIN}")),
        ]);
        env.extend(self.env.lock().unwrap().clone());
        env
    }

    /// The content of a file.
    #[track_caller]
    pub fn read(&self, path: impl AsRef<Path>) -> String {
        let path = path.as_ref();
        self.try_read(path).unwrap_or_else(|error| panic!("{}: cannot read {}: {error}", self.name, path.display()))
    }

    /// The content of a file that may not be there.
    pub fn try_read(&self, path: impl AsRef<Path>) -> io::Result<String> {
        let path = path.as_ref().to_owned();
        self.enter(move || fs::read_to_string(path))
    }

    /// The content of a JSON file.
    #[track_caller]
    pub fn read_json(&self, path: impl AsRef<Path>) -> serde_json::Value {
        let text = self.read(path);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("not JSON: {error}: {text}"))
    }

    /// Writes a file, making the directories on its way.
    #[track_caller]
    pub fn write(&self, path: impl AsRef<Path>, content: impl Into<Vec<u8>>) {
        let (path, content) = (path.as_ref().to_owned(), content.into());
        let shown = path.display().to_string();
        self.enter(move || {
            fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
            fs::write(path, content)
        })
        .unwrap_or_else(|error| panic!("{}: cannot write {shown}: {error}", self.name));
    }

    /// Removes a file.
    #[track_caller]
    pub fn remove(&self, path: impl AsRef<Path>) {
        let path = path.as_ref().to_owned();
        self.enter(move || fs::remove_file(path)).expect("the file is there to be removed");
    }

    /// Whether there is something at a path.
    pub fn exists(&self, path: impl AsRef<Path>) -> bool {
        let path = path.as_ref().to_owned();
        self.enter(move || path.exists())
    }

    /// Makes a directory and those on its way.
    pub fn mkdir(&self, path: impl AsRef<Path>) {
        let path = path.as_ref().to_owned();
        self.enter(move || fs::create_dir_all(path)).expect("cannot make a directory");
    }

    /// Reads a sysctl, in slash notation: `net/ipv4/ip_forward`.
    #[track_caller]
    pub fn sysctl(&self, key: &str) -> String {
        self.read(format!("/proc/sys/{key}")).trim().to_owned()
    }

    /// Sets a sysctl of this network namespace, in slash notation.
    #[track_caller]
    pub fn set_sysctl(&self, key: &str, value: &str) {
        assert!(key.starts_with("net/"), "{key} belongs to the whole machine, not to a namespace");
        let path = format!("/proc/sys/{key}");
        let value = value.to_owned();
        self.enter(move || fs::write(path, value)).unwrap_or_else(|error| panic!("cannot set {key}: {error}"));
    }

    /// The interface's MAC address.
    pub fn mac_of(&self, interface: &str) -> String {
        self.read(format!("/sys/class/net/{interface}/address")).trim().to_owned()
    }

    /// Waits until the kernel has noticed that both ends of a cable are up, and has given this one its IPv6 address.
    #[track_caller]
    pub fn wait_for_carrier(&self, interface: &str) {
        let (state, name) = (format!("/sys/class/net/{interface}/operstate"), format!(" {interface}\n"));
        let up = self.enter(move || {
            eventually(Duration::from_secs(5), || {
                let up = fs::read_to_string(&state).is_ok_and(|state| state.trim() == "up");
                up && fs::read_to_string("/proc/thread-self/net/if_inet6")
                    .is_ok_and(|addresses| addresses.contains(&name))
            })
        });
        assert!(up, "{}: {interface} did not come up", self.name);
    }

    /// The processes that run in this network namespace.
    pub fn processes(&self) -> Vec<Pid> {
        let running = |pid: &Pid| netns_of(&pid.to_string()).is_ok_and(|netns| netns == self.netns);
        let entries = fs::read_dir("/proc").expect("/proc is readable").flatten();
        entries
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .map(Pid::from_raw)
            .filter(running)
            .filter(|pid| *pid != Pid::this())
            .collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // What a killed program left running would keep the namespace alive.
        for pid in if self.netns == 0 { Vec::new() } else { self.processes() } {
            let _ = kill(pid, Signal::SIGKILL);
        }
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Panics unless the calling thread is in a network namespace other than the test's own and the machine's.
pub fn assert_private() {
    let here = netns_of("thread-self").expect("cannot tell the network namespace of this thread");
    let own = netns_of("self").expect("cannot tell the network namespace of this process");
    assert_ne!(here, own, "refusing to change the test's own network namespace");
    match netns_of("1") {
        Ok(machine) => assert_ne!(here, machine, "refusing to change the machine's network namespace"),
        // A container may not look at process 1. What a machine always has, and a namespace of ours never, is hardware.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => assert_no_hardware(),
        Err(error) => panic!("cannot tell the machine's network namespace: {error}"),
    }
}

fn assert_no_hardware() {
    let interfaces = fs::read_to_string("/proc/thread-self/net/dev").expect("/proc is readable");
    let names = interfaces.lines().filter_map(|line| Some(line.split_once(':')?.0.trim()));
    let hardware: Vec<_> = names.filter(|name| Path::new(&format!("/sys/class/net/{name}/device")).exists()).collect();
    assert!(hardware.is_empty(), "refusing to change a network namespace that has {hardware:?}");
}

fn netns_of(process: &str) -> io::Result<u64> {
    Ok(fs::metadata(format!("/proc/{process}/ns/net"))?.ino())
}

/// Takes the calling thread to a fresh network and mount namespace.
fn leave_the_machine() {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("cannot make namespaces; is this root?");
    assert_private();
    // From here on, mounts and network are this thread's own.
    private_mounts()
        .unwrap_or_else(|(what, error)| panic!("cannot mount {what} in a private mount namespace: {error}"));
    shadow(Path::new("/etc"), &["cni", "cron.d"]).expect("cannot lay out a private /etc");
    for dir in ["bin", "home"] {
        fs::create_dir_all(format!("{HARNESS}/{dir}")).expect("cannot write to a private /run");
    }
    for dir in ["/etc/cron.d", "/run/lock", "/var/lib/dhcp", "/var/lib/dhcpcd", "/var/lib/misc"] {
        fs::create_dir_all(dir).expect("cannot write to a private /run or /var/lib");
    }
    quiet_kernel().expect("cannot set this namespace's sysctls");
}

fn private_mounts() -> Result<(), (&'static str, nix::Error)> {
    let none = None::<&str>;
    let none_flag = MsFlags::empty();
    let step = |what, result: nix::Result<()>| result.map_err(|error| (what, error));
    step("/ as private", mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none))?;
    step("/tmp", mount(Some("/tmp"), "/tmp", none, MsFlags::MS_BIND, none))?;
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    step("/ read-only", mount(none, "/", none, read_only, none))?;
    step("/sys", mount(Some("sysfs"), "/sys", Some("sysfs"), none_flag, none))?;
    step("/run", mount(Some("tmpfs"), "/run", Some("tmpfs"), none_flag, Some("mode=755")))?;
    step("/var/lib", mount(Some("tmpfs"), "/var/lib", Some("tmpfs"), none_flag, Some("mode=755")))
}

/// Lays a writable directory over one of the machine's, which stays readable behind it; all entries are as they were
/// but for those left out.
pub(super) fn shadow(dir: &Path, left_out: &[&str]) -> io::Result<()> {
    let none = None::<&str>;
    let behind = Path::new(HARNESS).join(dir.strip_prefix("/").unwrap_or(dir));
    if behind.exists() {
        return left_out.iter().try_for_each(|name| fs::remove_file(dir.join(name)));
    }
    fs::create_dir_all(&behind)?;
    mount(Some(dir), &behind, none, MsFlags::MS_BIND, none)?;
    mount(none, &behind, none, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY, none)?;
    mount(Some("tmpfs"), dir, Some("tmpfs"), MsFlags::empty(), Some("mode=755"))?;
    for entry in
        fs::read_dir(&behind)?.flatten().filter(|entry| !left_out.iter().any(|name| entry.file_name() == *name))
    {
        // A relative link would lead elsewhere from behind, so links are copied, not linked to.
        let target = entry.path().read_link().unwrap_or_else(|_| entry.path());
        symlink(target, dir.join(entry.file_name()))?;
    }
    Ok(())
}

/// Makes a fresh namespace behave like a fresh host.
fn quiet_kernel() -> io::Result<()> {
    // A fresh namespace has these at 1, where a host that never loaded br_netfilter has them at 0 or not at all.
    for key in ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"] {
        fs::write(format!("/proc/sys/net/bridge/{key}"), "0").map_err(|error| {
            io::Error::other(format!("net.bridge.{key}: {error} (is br_netfilter loaded? `make test` loads it)"))
        })?;
    }
    // Link-local addresses count at once, instead of after a second of duplicate address detection.
    for scope in ["all", "default"] {
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{scope}/accept_dad"), "0");
    }
    Ok(())
}

/// Makes a file executable; for use inside a namespace.
pub fn make_executable(path: &Path) -> io::Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

/// Whether an address is of version 6; a scope (`%eth0`) may follow.
pub fn is_v6(address: &str) -> bool {
    let bare = address.split('%').next().unwrap_or(address);
    matches!(bare.parse(), Ok(IpAddr::V6(_)))
}
