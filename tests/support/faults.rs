//! Things that go wrong on a host, on purpose; and a look at which processes a command starts.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::{MsFlags, mount, umount};

use super::host::{HARNESS, Host, make_executable, shadow};
use super::node::{Node, cocoon};
use super::process::{IntoArgs, Output, eventually, find};

impl Host {
    /// Puts a stand-in first on `PATH` for everything that is run here. Write `exec $(real) "$@"` with
    /// [`Host::real_tool`] to go on to the tool it hides.
    pub fn fake_tool(&self, name: &str, script: &str) {
        let path = PathBuf::from(format!("{HARNESS}/bin/{name}"));
        let script = script.to_owned();
        self.enter(move || {
            // It may be a link to the real tool, which must not be written through.
            let _ = fs::remove_file(&path);
            fs::write(&path, script)?;
            make_executable(&path)
        })
        .expect("cannot write to a private /run");
    }

    /// Takes a stand-in away again.
    pub fn real_again(&self, name: &str) {
        self.remove(format!("{HARNESS}/bin/{name}"));
    }

    /// Hides a tool from everything that is run here, wherever it is installed.
    pub fn without_tool(&self, name: &str) {
        let name = name.to_owned();
        self.enter(move || {
            let _ = fs::remove_file(format!("{HARNESS}/bin/{name}"));
            for dir in ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(Path::new) {
                if !dir.is_symlink() && dir.join(&name).exists() {
                    shadow(dir, &[&name])?;
                }
            }
            Ok::<_, std::io::Error>(())
        })
        .expect("cannot lay a private directory over a folder of programs");
    }

    /// Where a tool is installed on the machine.
    #[track_caller]
    pub fn real_tool(&self, name: &str) -> PathBuf {
        let name = name.to_owned();
        let dirs = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        find(&name, dirs).unwrap_or_else(|| panic!("`{name}` is not installed; `make test` installs what tests use"))
    }

    /// Makes a directory (created if need be) or a file read-only.
    pub fn read_only(&self, path: &str) {
        let path = PathBuf::from(path);
        self.enter(move || {
            if !path.exists() {
                fs::create_dir_all(&path).expect("cannot make a directory");
            }
            let none = None::<&str>;
            mount(Some(&path), &path, none, MsFlags::MS_BIND, none)?;
            mount(none, &path, none, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY, none)
        })
        .expect("cannot remount in a private mount namespace");
    }

    /// Makes a directory (created if need be) a file system without a free byte. What it held is hidden.
    pub fn full(&self, path: &str) {
        let path = PathBuf::from(path);
        self.enter(move || {
            fs::create_dir_all(&path).expect("cannot make a directory");
            mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), Some("size=4k,mode=750")).expect("a tmpfs");
            let _ = fs::write(path.join("filler"), [0; 8192]);
        });
    }

    /// Puts an empty directory over one: `hide("/proc/sys/net/bridge")` is a kernel without br_netfilter.
    pub fn hide(&self, path: &str) {
        let path = PathBuf::from(path);
        self.enter(move || mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), Some("mode=755")))
            .expect("cannot mount in a private mount namespace");
    }

    /// Undoes the last [`Host::read_only`], [`Host::full`] or [`Host::hide`] of a path.
    pub fn unmount(&self, path: &str) {
        let path = PathBuf::from(path);
        self.enter(move || umount(&path)).expect("cannot unmount in a private mount namespace");
    }

    /// Holds an flock(2) on a file or directory until the answer is dropped.
    #[track_caller]
    pub fn hold_lock(&self, path: &str) -> File {
        let path = path.to_owned();
        let file = self.enter(|| File::open(path)).expect("cannot open what is to be locked");
        file.try_lock().expect("somebody else holds the lock");
        file
    }

    /// Waits until no process runs in here but the given ones: a killed program's children may still be at work.
    #[track_caller]
    pub fn settle(&self, kept: &[nix::unistd::Pid]) {
        let others = || self.processes().into_iter().filter(|pid| !kept.contains(pid)).count();
        assert!(eventually(Duration::from_secs(20), || others() == 0), "{}: processes keep running", self.name());
    }
}

impl Node {
    /// Runs the program under test and lists the command lines of the processes it starts, itself left out.
    #[track_caller]
    pub fn execs(&self, args: impl IntoArgs) -> (Output, Vec<String>) {
        let log = format!("{HARNESS}/execs");
        let strace = format!("strace -f -qq -e trace=execve -e signal=none -s 256 -o {log}").into_args();
        let output = self.run([strace, cocoon(args)].concat());
        let started = self.read(&log).lines().filter(|line| line.ends_with(" = 0")).skip(1).map(argv).collect();
        (output, started)
    }
}

/// `12 execve("/usr/sbin/ip", ["ip", "link"], 0x7ff...) = 0` to `ip link`.
fn argv(line: &str) -> String {
    let list = line.split_once('[').and_then(|(_, rest)| rest.split_once("], ")).map_or(line, |(list, _)| list);
    list.split(", ").map(|word| word.trim_matches('"')).collect::<Vec<_>>().join(" ")
}
