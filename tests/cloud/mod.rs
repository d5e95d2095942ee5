//! Clouds to test against: programs named `gcloud` and `ve` on the node's `PATH`, and metadata servers at their real
//! addresses on its `lo`.
//!
//! The programs are a few lines of shell that hand each call to this test over the namespace's loopback and play back
//! what it answers; the cloud itself is a [`World`] in the test's memory, which a test looks into and changes as it
//! likes. What the world does is in [`gcloud`] and [`ve`], each behaviour with the vendor documentation that it follows.
//!
//! ```no_run
//! let node = CloudNode::volcengine();
//! node.init("--node-name n1").succeeded();
//! assert_eq!(node.world().ve.attached().len(), 7);
//! node.world().faults.at(12, How::Hangs);          // the 12th call of the next command
//! ```

#![allow(dead_code, unused_imports, clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod eni;
mod gcloud;
mod metadata;
mod ve;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::ops::Deref;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

pub use eni::Eni;
pub use gcloud::{Alias, Gcloud, OTHERS, OURS, with_ours, without_ours};
pub use metadata::Server;
pub use ve::{INSTANCE, Ve};

use crate::support::{IntoArgs, Node, Output, Process, SUBNET, Vm};

/// Where the state is, unless a test says otherwise.
pub const POOL: &str = "/var/lib/cocoon/net/pool.json";

/// What a vendor's CLI leaves behind.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    /// Exit code.
    pub code: i32,
    /// One line for stderr; nothing when empty.
    pub stderr: String,
    /// Everything for stdout.
    pub stdout: String,
}

/// In which way a call goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// The API refuses, as the vendor reports it. Nothing is done.
    Refused,
    /// The CLI crashes: exit 1, words on stderr, nothing on stdout. Nothing is done.
    Crashes,
    /// It is done, and the answer is a web page.
    Junk,
    /// It is done, and the answer never comes.
    Hangs,
    /// Nothing is done, and the answer says that it was.
    Pretends,
    /// It is done, the answer never comes, and the command that called is killed (see [`CloudNode::init_killed_at`]).
    Kills,
}

/// Which calls go wrong. Calls are counted from 1 since [`Faults::reset`].
#[derive(Debug, Default)]
pub struct Faults {
    at: BTreeMap<usize, How>,
    on: Option<(String, How)>,
    /// The calls so far, as typed.
    pub calls: Vec<String>,
}

impl Faults {
    /// Forgets faults and calls.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    /// Forgets what there was, then lets the call with this number go wrong.
    pub fn at(&mut self, number: usize, how: How) {
        self.reset();
        self.at.insert(number, how);
    }

    /// Forgets what there was, then lets each call that contains these words go wrong.
    pub fn on(&mut self, words: &str, how: How) {
        self.reset();
        self.on = Some((words.to_owned(), how));
    }

    /// Calls that contain these words.
    pub fn count(&self, words: &str) -> usize {
        self.calls.iter().filter(|call| call.contains(words)).count()
    }

    /// Calls that are not mere questions.
    pub fn changes(&self) -> Vec<String> {
        let asks = |call: &&String| call.contains("describe") || call.contains("Describe");
        self.calls.iter().filter(|call| !asks(call)).cloned().collect()
    }

    fn next(&mut self, call: String) -> Option<How> {
        let on = self.on.as_ref().filter(|(words, _)| call.contains(words.as_str())).map(|(_, how)| *how);
        self.calls.push(call);
        self.at.get(&self.calls.len()).copied().or(on)
    }
}

/// Both clouds, as they are now.
#[derive(Debug, Default)]
pub struct World {
    /// Google's.
    pub gcloud: Gcloud,
    /// Volcengine's.
    pub ve: Ve,
    /// What goes wrong.
    pub faults: Faults,
    /// Looks until a change is seen: both APIs are eventually consistent.
    pub lag: usize,
    /// Time that each call takes.
    pub slow: Duration,
    /// Calls that are never answered.
    unanswered: Vec<TcpStream>,
    /// A call of [`How::Kills`] is waiting for its caller's end.
    killing: bool,
}

/// A node in a cloud. Runs commands as [`Node`] does.
pub struct CloudNode {
    node: Node,
    shared: Arc<(Mutex<World>, Condvar)>,
    platform: &'static str,
}

impl Deref for CloudNode {
    type Target = Node;

    fn deref(&self) -> &Node {
        &self.node
    }
}

impl CloudNode {
    /// A GCE instance with uplink ens4, and `gcloud`.
    pub fn gke() -> Self {
        let node = Self::bare(Node::new(), "gke");
        node.serve_metadata(Server::Google);
        node
    }

    /// The same in a VPC subnet with a shared range, with aliases of others on it.
    pub fn gke_with_range() -> Self {
        let node = Self::gke();
        node.world().gcloud.add_range("cocoon-pods", "172.20.0.0/16");
        node.world().gcloud.set_aliases(&OTHERS);
        node
    }

    /// A Volcengine instance with uplink eth0, eth1 to eth7, credentials, and `ve`.
    pub fn volcengine() -> Self {
        Self::volcengine_with(Node::builder().uplink("eth0").volcengine_nics().build())
    }

    /// The same with other interfaces.
    pub fn volcengine_with(node: Node) -> Self {
        let node = Self::bare(node, "volcengine");
        node.set_env("VOLCENGINE_ACCESS_KEY_ID", "AKLTexample");
        node.set_env("VOLCENGINE_SECRET_ACCESS_KEY", "secret");
        node.set_env("VOLCENGINE_REGION", ve::REGION);
        node.serve_metadata(Server::Volcengine);
        node
    }

    /// A node in neither: both programs are there, no metadata server and no credentials.
    pub fn bare(node: Node, platform: &'static str) -> Self {
        for address in ["169.254.169.254", "100.96.0.96"] {
            node.ip(&[&format!("address add {address}/32 dev lo")]);
        }
        node.remove("/etc/hosts");
        node.write("/etc/hosts", "127.0.0.1 localhost\n169.254.169.254 metadata.google.internal\n");
        let shared = Arc::new((Mutex::new(World::default()), Condvar::new()));
        let listener = node.enter(|| TcpListener::bind("127.0.0.1:0")).expect("the loopback is up");
        let port = listener.local_addr().expect("it is bound").port();
        for program in ["gcloud", "ve"] {
            node.fake_tool(program, &client(program, port));
        }
        let world = Arc::clone(&shared);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let world = Arc::clone(&world);
                thread::spawn(move || answer(stream, &world));
            }
        });
        Self { node, shared, platform }
    }

    /// The clouds. Do not hold this while a command runs.
    pub fn world(&self) -> MutexGuard<'_, World> {
        self.shared.0.lock().expect("no test panics while it holds the world")
    }

    /// Starts a metadata server at its real address.
    pub fn serve_metadata(&self, server: Server) {
        metadata::serve(&self.node, server);
    }

    fn args(&self, command: &str, more: &str) -> Vec<String> {
        format!("{command} --platform {} --node-name n1 --subnet {SUBNET} {more}", self.platform).into_args()
    }

    /// Path of the program under test.
    pub fn program(&self) -> &'static str {
        env!("CARGO_BIN_EXE_cocoon-net")
    }

    /// Starts `init` on this platform beside the test.
    #[track_caller]
    pub fn spawn_init(&self) -> Process {
        self.spawn_cocoon(self.args("init", ""))
    }

    /// `init` on this platform, with more flags.
    #[track_caller]
    pub fn init(&self, more: &str) -> Output {
        self.cocoon(self.args("init", more))
    }

    /// `init`, where each cloud call and each wait for the cloud is given this long.
    #[track_caller]
    pub fn init_within(&self, seconds: &str) -> Output {
        self.within(seconds, self.args("init", ""))
    }

    /// `teardown`, where each cloud call and each wait for the cloud is given this long.
    #[track_caller]
    pub fn teardown_within(&self, seconds: &str) -> Output {
        self.within(seconds, vec!["teardown".to_owned()])
    }

    #[track_caller]
    fn within(&self, seconds: &str, args: Vec<String>) -> Output {
        let argv = [vec![env!("CARGO_BIN_EXE_cocoon-net").to_owned()], args].concat();
        self.command(argv).env("COCOON_NET_CLOUD_TIMEOUT", seconds).run()
    }

    /// Runs a command (`init` alone is [`CloudNode::init`]), and kills it (SIGKILL) right after its call with this number was done, before the answer.
    /// Says whether it came to that call.
    #[track_caller]
    pub fn killed_at(&self, number: usize, command: &str) -> bool {
        self.world().faults.at(number, How::Kills);
        let args = if command == "init" { self.args("init", "") } else { command.into_args() };
        let mut process = self.spawn_cocoon(args);
        let called =
            process.wait_until(Duration::from_secs(30), |process| self.world().killing || !process.is_running());
        assert!(called, "the command neither made the call nor ended:\n{}", process.stderr());
        let output = process.kill_after(Duration::ZERO);
        let mut world = self.world();
        world.unanswered.clear();
        if !world.killing {
            assert!(output.status.success(), "{output}");
        }
        std::mem::take(&mut world.killing)
    }

    /// What `pool.json` says under a key.
    #[track_caller]
    pub fn state(&self, key: &str) -> serde_json::Value {
        let state: serde_json::Value = serde_json::from_str(&self.read(POOL)).expect("pool.json is JSON");
        state[key].clone()
    }

    /// How many entries a list of `pool.json` has.
    #[track_caller]
    pub fn listed(&self, key: &str) -> usize {
        self.state(key).as_array().map_or(0, Vec::len)
    }
}

impl CloudNode {
    /// All is there: seven ENIs attached, twenty addresses on each, all of them in `pool.json`.
    #[track_caller]
    pub fn assert_seven_enis(&self) {
        let world = self.world();
        let enis = world.ve.secondary();
        assert_eq!(enis.len(), 7, "{enis:#?}");
        assert!(enis.iter().all(|eni| eni.status == "InUse" && eni.secondary.len() == 20), "{enis:#?}");
        let ids = world.ve.ids();
        drop(world);
        let mut recorded: Vec<String> = serde_json::from_value(self.state("eniIDs")).expect("ids are strings");
        recorded.sort();
        assert_eq!(recorded, ids);
        assert_eq!(self.listed("ips"), 140);
        assert!(self.state("pendingClaim").is_null());
    }

    /// Nothing is left: no ENI but the primary one, and no `pool.json`.
    #[track_caller]
    pub fn assert_no_enis(&self) {
        assert_eq!(self.world().ve.ids(), Vec::<String>::new());
        assert!(!self.exists(POOL), "pool.json is still there:\n{}", self.read(POOL));
    }
}

impl Drop for CloudNode {
    fn drop(&mut self) {
        if let Ok(mut world) = self.shared.0.lock() {
            world.unanswered.clear();
        }
    }
}

/// The program on `PATH`: sends its name, some variables and its arguments, each ended by a zero byte; gets back a line
/// with the exit code, a line for stderr, and the rest for stdout.
fn client(program: &str, port: u16) -> String {
    format!(
        r#"#!/bin/bash
# Hands the call to the cloud of the test, and plays back what it answers.
exec 3<>/dev/tcp/127.0.0.1/{port} || exit 97
printf '%s\0' {program} "${{VOLCENGINE_ACCESS_KEY_ID:+id}}${{VOLCENGINE_ACCESS_KEY:+,key}}${{VOLCENGINE_SECRET_KEY:+,secret}},$VOLCENGINE_REGION" "$#" "$@" >&3
IFS= read -r code <&3 || exit 98
IFS= read -r stderr <&3
[ -z "$stderr" ] || printf '%s\n' "$stderr" >&2
cat <&3
exit "$code"
"#
    )
}

fn answer(mut stream: TcpStream, shared: &(Mutex<World>, Condvar)) {
    let mut reader = BufReader::new(stream.try_clone().expect("a socket can be duplicated"));
    let mut word = || {
        let mut bytes = Vec::new();
        reader.read_until(0, &mut bytes).ok()?;
        bytes.pop();
        String::from_utf8(bytes).ok()
    };
    let read = (|| {
        let (program, env) = (word()?, word()?);
        let count: usize = word()?.parse().ok()?;
        Some((program, env, (0..count).map(|_| word()).collect::<Option<Vec<_>>>()?))
    })();
    let Some((program, env, args)) = read else { return };
    let slow = shared.0.lock().expect("the world is whole").slow;
    thread::sleep(slow);

    let mut world = shared.0.lock().expect("the world is whole");
    let how = world.faults.next(format!("{program} {}", args.join(" ")));
    let lag = world.lag;
    let gcloud = program == "gcloud";
    let done = match how {
        Some(How::Refused) => {
            if gcloud {
                gcloud::refusal(&args)
            } else {
                ve::refusal(&args)
            }
        }
        Some(How::Crashes) => Answer { code: 1, stderr: "Traceback: connection reset".to_owned(), ..Answer::default() },
        Some(How::Pretends) => {
            if gcloud {
                gcloud::success(&args)
            } else {
                ve::success(&args)
            }
        }
        _ if gcloud => world.gcloud.call(&args, lag),
        _ => world.ve.call(&args, &env, lag),
    };
    let done = match how {
        Some(How::Junk) => Answer { stdout: "<html><title>Sign in</title></html>\n".to_owned(), ..Answer::default() },
        Some(How::Hangs | How::Kills) => {
            world.killing = how == Some(How::Kills);
            world.unanswered.push(stream);
            return;
        }
        _ => done,
    };
    drop(world);
    let _ = stream.write_all(format!("{}\n{}\n{}", done.code, done.stderr, done.stdout).as_bytes());
    let _ = stream.shutdown(Shutdown::Both);
}

/// The address that a VM is given when it asks the node's daemon for one.
#[track_caller]
pub fn lease(vm: &Vm) -> String {
    let output = vm.run("udhcpc -i eth0 -f -q -n -t 10 -T 1 -s /bin/true").succeeded();
    let said = output.stdout.clone() + &output.stderr;
    let words: Vec<&str> = said.split_whitespace().collect();
    let at = words.windows(2).position(|pair| pair == ["lease", "of"]);
    at.and_then(|at| words.get(at + 2)).map(ToString::to_string).unwrap_or_else(|| panic!("no lease: {output}"))
}

/// The value after a flag.
pub fn flag<'a>(args: &'a [String], name: &str) -> Option<&'a str> {
    let at = args.iter().position(|arg| arg == name)?;
    args.get(at + 1).map(String::as_str)
}
