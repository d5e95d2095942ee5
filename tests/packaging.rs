//! What ships around the binary: the systemd unit and what `make install` lays down.

mod support;

use std::process::Command;

use support::{GATEWAY, Node};

const UNIT: &str = include_str!("../packaging/cocoon-net.service");

fn setting(name: &str) -> Option<&'static str> {
    UNIT.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
}

#[test]
fn the_units_capabilities_are_all_the_daemon_needs() {
    let node = Node::new();
    node.adopt("--drop-internal-access --drop-cidr 10.0.0.0/8").succeeded();
    node.ok("iptables -F FORWARD");
    node.set_sysctl("net/bridge/bridge-nf-call-iptables", "0");
    node.set_sysctl("net/ipv4/ip_forward", "0");
    node.ip(&["link del cni0"]);

    let kept: Vec<String> = setting("CapabilityBoundingSet")
        .unwrap()
        .split(' ')
        .map(|name| name.replace("CAP_", "+").to_lowercase())
        .collect();
    let mut command = vec!["setpriv".to_owned(), "--no-new-privs".to_owned()];
    command.push(format!("--bounding-set=-all,{}", kept.join(",")));
    command.push("--inh-caps=-all".to_owned());
    command.extend([env!("CARGO_BIN_EXE_cocoon-net"), "daemon", "--metrics-addr="].map(str::to_owned));
    let mut daemon = node.command(command).with_notify_socket().spawn();
    let ready = daemon.notified("READY=1", std::time::Duration::from_secs(20));
    assert!(ready, "not ready with {kept:?}: {}", daemon.stderr());

    let (a, b) = (node.vm("a"), node.vm("b"));
    assert!(a.reaches(GATEWAY));
    assert!(a.is_cut_off_from(b.address()));
    daemon.stop().succeeded();
}

#[test]
fn the_unit_runs_what_make_install_installs() {
    assert_eq!(setting("ExecStart"), Some("/usr/local/bin/cocoon-net daemon"));
    assert_eq!(setting("Type"), Some("notify"));
    let root = tempfile::tempdir().unwrap();
    let dry = |prefix: &str| {
        let args = ["-n", "install", &format!("PREFIX={prefix}"), &format!("DESTDIR={}", root.path().display())];
        let output = Command::new("make").args(args).current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let usual = dry("/usr/local");
    for path in
        ["/usr/local/bin/cocoon-net", "/usr/local/lib/systemd/system/cocoon-net.service", "/usr/local/share/man/man8"]
    {
        assert!(usual.contains(&format!("{}{path}", root.path().display())), "{path} is not installed by:\n{usual}");
    }
    assert!(dry("/usr").contains("s|/usr/local/bin/|/usr/bin/|"), "the unit follows PREFIX");
}

#[test]
fn completions_and_man_pages_come_from_the_binary() {
    let node = Node::new();
    for shell in ["bash", "zsh", "fish"] {
        let completions = node.cocoon(["completions", shell]).succeeded().stdout;
        assert!(completions.contains("drop-internal-access"), "{shell}: {completions}");
    }
    node.mkdir("/run/man");
    node.cocoon("man /run/man").succeeded();
    let page = node.read("/run/man/cocoon-net.8");
    assert!(page.contains("teardown"), "{page}");
}
