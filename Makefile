# `make` alone lists what there is. `make test` and `make demo` install what they need and run alone on a clean machine.

PREFIX  ?= /usr/local
DESTDIR ?=
BINDIR   = $(PREFIX)/bin
UNITDIR  = $(PREFIX)/lib/systemd/system
MANDIR   = $(PREFIX)/share/man/man8
CARGO   ?= cargo

# Root's tools are often not on a user's PATH, and rustup's not on root's.
export PATH := $(PATH):$(HOME)/.cargo/bin:/usr/local/sbin:/usr/sbin:/sbin
export DEBIAN_FRONTEND = noninteractive

# What the tests and the demo run, as PROGRAM:APT-PACKAGE.
TOOLS = cc:build-essential ip:iproute2 iptables:iptables xtables-legacy-multi:iptables ipset:ipset nft:nftables \
        modprobe:kmod sysctl:procps setpriv:util-linux ping:iputils-ping strace:strace udhcpc:udhcpc \
        dhclient:isc-dhcp-client dhcpcd:dhcpcd-base perfdhcp:kea-admin \
        /usr/lib/cni/bridge:containernetworking-plugins

# Tests wait for the network more than they compute.
TEST_THREADS ?= $(shell expr $$(nproc) \* 4)
NEXTEST := $(shell PATH="$(PATH)" cargo nextest --version >/dev/null 2>&1 && echo yes)

.DEFAULT_GOAL := help
.PHONY: help build test demo bench-drops bench-isolation bench-drift bench-dhcp lint fmt install tools root rust

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: rust ## Build target/release/cocoon-net
	$(CARGO) build --release --locked

test: root tools rust ## Run every test, in network namespaces of their own (root)
ifeq ($(NEXTEST),yes)
	$(CARGO) nextest run --locked --no-fail-fast --retries 2 --test-threads $(TEST_THREADS)
	$(CARGO) test --locked --quiet --doc
else
	RUST_TEST_THREADS=$(TEST_THREADS) $(CARGO) test --locked --no-fail-fast
endif

demo: root tools rust ## Show, on a node made of namespaces, what isolation changes (root)
	@$(CARGO) test --locked --quiet --test demo

bench-drops: root tools rust ## Time 1000 drops against a bare iptables-restore (root)
	@$(CARGO) bench --locked --quiet --bench drops

bench-isolation: root tools rust ## Count packets per second through the node, with none to 1000 drop targets (root)
	@$(CARGO) bench --locked --quiet --bench isolation

bench-drift: root tools rust ## Measure what it costs to keep isolation true while someone undoes it (root)
	@$(CARGO) bench --locked --quiet --bench drift

bench-dhcp: TOOLS += dnsmasq:dnsmasq-base kea-dhcp4:kea-dhcp4-server ss:iproute2
bench-dhcp: root tools rust ## Compare DHCP with dnsmasq and Kea at 256 to 16384 leases (root)
	@$(CARGO) bench --locked --quiet --bench dhcp

lint: rust ## Check format, lints and documentation
	@$(CARGO) fmt --version >/dev/null 2>&1 && $(CARGO) clippy --version >/dev/null 2>&1 || rustup component add rustfmt clippy
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(CARGO) clippy --locked --test demo -- -D warnings
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" $(CARGO) doc --locked --quiet --no-deps --document-private-items
	@if $(CARGO) deny --version >/dev/null 2>&1; then $(CARGO) deny --locked check bans licenses sources; fi

fmt: rust ## Format the code
	$(CARGO) fmt

install: build ## Install binary, unit, man pages and completions below DESTDIR/PREFIX
	install -D -m 0755 target/release/cocoon-net $(DESTDIR)$(BINDIR)/cocoon-net
	install -d $(DESTDIR)$(UNITDIR) $(DESTDIR)$(MANDIR)
	sed 's|/usr/local/bin/|$(BINDIR)/|' packaging/cocoon-net.service >$(DESTDIR)$(UNITDIR)/cocoon-net.service
	chmod 0644 $(DESTDIR)$(UNITDIR)/cocoon-net.service
	target/release/cocoon-net man $(DESTDIR)$(MANDIR)
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions
	install -d $(DESTDIR)$(PREFIX)/share/zsh/site-functions
	install -d $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	target/release/cocoon-net completions bash >$(DESTDIR)$(PREFIX)/share/bash-completion/completions/cocoon-net
	target/release/cocoon-net completions zsh >$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_cocoon-net
	target/release/cocoon-net completions fish >$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/cocoon-net.fish

root:
	@[ "$$(id -u)" = 0 ] || { echo 'Network namespaces need root: sudo -E env PATH="$$PATH" make $(MAKECMDGOALS)' >&2; exit 1; }

rust:
	@command -v $(CARGO) >/dev/null || { echo 'cargo is missing: install Rust from https://rustup.rs' >&2; exit 1; }

tools:
	@missing=; for pair in $(TOOLS); do \
		command -v $${pair%%:*} >/dev/null || missing="$$missing $${pair#*:}"; \
	done; \
	[ -z "$$missing" ] || { \
		echo "Missing:$$missing"; \
		command -v apt-get >/dev/null || { echo "There is no apt-get here: install these another way" >&2; exit 1; }; \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing; \
	}
	@[ -e /proc/sys/net/bridge ] || modprobe br_netfilter || { \
		echo "This kernel has no br_netfilter, which filters between bridge ports: the tests need one that has it" >&2; exit 1; }
