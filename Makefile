# `make` lists what there is to do. Everything works from a clean clone with nothing else typed.

CHANNEL ?= dev
BROKER ?= mqtt://127.0.0.1:1883
NODE ?= node-1
NODES ?= 50
SECONDS ?= 60

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

# All programs are built together: one at a time, cargo would build what they share anew for each.
programs := $(or $(CARGO_TARGET_DIR),target)/debug

##@ See it
.PHONY: help demo
help: ## This list
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\nCHANNEL=%s BROKER=%s NODE=%s NODES=%s SECONDS=%s\n' \
	  '$(CHANNEL)' '$(BROKER)' '$(NODE)' '$(NODES)' '$(SECONDS)'

demo: build ## A release, from a folder through a broker to five devices, and an update of it
	@bash tests/demo.sh

##@ Use it
.PHONY: broker publish watch status agent fleet rehearse build
broker: build ## Run a broker on 127.0.0.1:1883, its data in data/
	@$(programs)/mpypi-broker serve

publish: build ## Publish channels/CHANNEL to BROKER
	@$(programs)/mpypi publish channels/$(CHANNEL) --broker $(BROKER)

watch: build ## Publish channels/CHANNEL to BROKER again at every change
	@$(programs)/mpypi watch channels/$(CHANNEL) --broker $(BROKER)

status: build ## What CHANNEL holds on BROKER and what its nodes say
	@$(programs)/mpypi status $(CHANNEL) --broker $(BROKER)

agent: build ## Run one simulated device NODE on CHANNEL, its files in node/NODE
	@$(programs)/mpypi-agent run --broker $(BROKER) --channel $(CHANNEL) --root node/$(NODE) --node $(NODE)

fleet: build ## Run NODES simulated devices on CHANNEL
	@$(programs)/mpypi-agent fleet --broker $(BROKER) --channel $(CHANNEL) --nodes $(NODES)

rehearse: build ## Let channels/CHANNEL go to NODES simulated devices on a bad day, with a broker of their own
	@$(programs)/mpypi rehearse channels/$(CHANNEL) --nodes $(NODES) --profile hostile --for 90s

build:
	@[ -x $(programs)/mpypi-agent ] || echo 'building the programs: the first time takes a few minutes' >&2
	@cargo build --quiet --workspace --bins

##@ Check it
.PHONY: test judges bench cluster engines fuzz soak fmt fmt-check lint doc deny readme ci clean
test: build ## All tests; those with foreign programs use mosquitto, fetched if it is not there
	@bash tests/peers.sh
	cargo test -q --workspace --doc
	@if command -v cargo-nextest > /dev/null; then set -x; cargo nextest run --workspace; \
	else set -x; cargo test --workspace --lib --bins --tests; fi

judges: build ## Others' suites and clients against the broker, fetched once; CASES='gmqtt/*' for some
	@python3 tests/judges/judge.py --broker $(programs)/mpypi-broker --only $(or $(CASES),'*')

bench: ## The broker beside mosquitto and nginx, and ten thousand devices; BENCH=--quick for a look
	@bash tests/peers.sh
	@bash tests/nginx.sh
	cargo build --release --workspace --bins
	cargo bench -p mpypi-tests --bench broker -- $(BENCH)
	cargo bench -p mpypi-tests --bench http -- $(BENCH)
	cargo bench -p mpypi-tests --bench readers -- $(BENCH)
	cargo bench -p mpypi-tests --bench fleet -- $(BENCH)
	cargo bench -p mpypi-tests --bench things -- $(BENCH)

.PHONY: bench-broker
bench-broker: bench

soak: build ## Ten times as many hostile packets and power cuts as the tests have; all cuts of a device; 4 MiB at 50 KB/s; larger fleets
	MPYPI_PACKETS=10000000 MPYPI_ROUNDS=2000 cargo test -p mpypi-tests --test mpypi -- \
	  --test-threads 1 --nocapture a_million_hostile hundreds_of_power_cuts
	MPYPI_ALL_CUTS=1 cargo test -p mpypi-tests --test mpypi -- device_store
	MPYPI_UPLOAD=4194304 cargo test -p mpypi-tests --test mpypi -- over_a_poor_line
	MPYPI_NODES=2000 cargo test -p mpypi-tests --test mpypi -- --nocapture killed_five_times
	MPYPI_EDGE_NODES=1000 cargo test -p mpypi-tests --test mpypi -- --nocapture many_devices_on_an_edge
	MPYPI_NODES=2000 MPYPI_SEEDS=20 cargo test --release -p mpypi-agent-sim --lib -- after_a_hostile_day
	MPYPI_ROLLOUT_NODES=2000 MPYPI_SEEDS=5 cargo test -p mpypi-tests --test mpypi -- --nocapture \
	  a_release_that_crashes_on_one_device_in_twenty

cluster: build ## Kill nodes of a cluster of NATS: 20 times while 300 packages are published, and under 2,000 devices
	@bash tests/nats.sh
	MPYPI_CLUSTER_ROUNDS=20 MPYPI_CLUSTER_NODES=2000 cargo test -p mpypi-tests --test mpypi -- --test-threads 1 --nocapture \
	  after_a_node_was_killed a_fleet_on_three_nodes

engines: build ## The report of one fleet on our broker, mosquitto, one node of NATS, three, and an edge of three; NODES= for more
	@bash tests/peers.sh
	@bash tests/nats.sh
	@MPYPI_ENGINE_NODES=$(NODES) cargo test -q -p mpypi-tests --test mpypi -- --ignored --nocapture the_same_fleet_on_each_engine

fuzz: ## Fuzz what reads bytes of strangers, each target for SECONDS
	@bash .ci/fuzz $(SECONDS)

fmt: ## Format the code
	cargo fmt --all
	cargo fmt --manifest-path fuzz/Cargo.toml

fmt-check:
	cargo fmt --all --check
	cargo fmt --manifest-path fuzz/Cargo.toml --check

lint: ## Clippy with warnings denied, and what the crates must not depend on
	cargo clippy --workspace --all-targets -- -D warnings
	@# The protocol does no I/O: it has no business with a runtime.
	@if cargo tree -p mpypi-protocol -e normal --prefix none | grep -E '^(tokio|mio|socket2|async-[a-z]+) '; \
	then echo 'error: mpypi-protocol depends on a runtime' >&2; exit 1; fi

doc: ## The documentation, with warnings denied
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps

deny: ## Licences, banned crates, sources and known holes of what we depend on
	@bash .ci/deny

readme: build
	@bash tests/readme.sh

# The tests come last, so that their summary is the last thing CI says.
ci: fmt-check lint doc deny readme rehearse fuzz-a-little judges test ## Everything CI does

fuzz-a-little:
	@bash .ci/fuzz 10 steady

clean: ## Remove what was built and what broker, agent and fleet left
	cargo clean
	rm -rf data node fleet
