# tcnat: `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := all

PREFIX  ?= /usr/local
DESTDIR ?=
GO      ?= go
# Flags for `docker build`, such as --network=host where the daemon has no bridge.
DOCKER_BUILD_FLAGS ?=
# Arguments for `go test`, as in `make test TESTFLAGS='-run Docker -v ./internal/dockertest'`.
TESTFLAGS ?= ./...
# What `make test-kernel` runs there: short, long, or a package with flags of its test binary, as in
# `make test-kernel KERNELTEST='internal/e2e -test.run TestVLANUplink'`.
KERNELTEST ?= short

C_FILES = $(wildcard bpf/*.c bpf/*.h internal/bench/*.c)
STATICCHECK = $(GO) tool -modfile=.ci/lint.mod staticcheck

.PHONY: all
all: generate build ## Generate, then build

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build bin/tcnat (needs Go alone: generated files are committed)
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/tcnat ./cmd/tcnat

.PHONY: generate
generate: ## Compile the BPF programs and generate their Go (installs clang where it is missing)
	@.ci/install-tools build
	$(GO) generate ./bpf ./internal/bench

.PHONY: generate-docker
generate-docker: ## The same with the toolchain of Dockerfile.build
	docker build $(DOCKER_BUILD_FLAGS) -f Dockerfile.build -t tcnat-build .
	docker run --rm -u "$$(id -u):$$(id -g)" -v "$(CURDIR)":/src tcnat-build

.PHONY: generated
generated: ## Fail unless the generated files are what the sources give
	@sum() { cat bpf/nat_bpf* internal/bench/rig_bpf* | sha256sum; }; \
	before=$$(sum); $(MAKE) --no-print-directory generate; \
	[ "$$before" = "$$(sum)" ] || { echo "the generated files were not what the sources give: commit what make generate made" >&2; exit 1; }

.PHONY: check
check: fmt-check vet lint generated ## All that needs no privilege: formatting, vet, lint, generated files

.PHONY: fmt
fmt: ## Format Go and C
	@.ci/install-tools lint
	gofmt -w .
	clang-format-19 -i $(C_FILES)

.PHONY: fmt-check
fmt-check: ## Fail unless Go and C are formatted
	@.ci/install-tools lint
	@bad=$$(gofmt -l .); [ -z "$$bad" ] || { echo "not formatted, run make fmt:" $$bad >&2; exit 1; }
	clang-format-19 --dry-run -Werror $(C_FILES)

.PHONY: vet
vet: ## go vet
	$(GO) vet ./...

.PHONY: lint
lint: ## staticcheck, and the rules of internal/arch (who imports what, file sizes, names)
	$(STATICCHECK) ./...
	$(GO) test -count=1 ./internal/arch

.PHONY: test
test: need-root ## All tests (root; installs what they need where it is missing)
	@.ci/install-tools test
	TCNAT_TEST_REQUIRE=1 $(GO) test -count=1 -timeout 20m $(TESTFLAGS)

.PHONY: test-short
test-short: need-root ## The tests that take seconds
	$(GO) test -short -count=1 -timeout 10m $(TESTFLAGS)

.PHONY: test-long
test-long: need-root ## All tests, with the long transfers and timers too
	@.ci/install-tools test
	TCNAT_TEST_REQUIRE=1 TCNAT_TEST_LONG=1 $(GO) test -count=1 -timeout 60m $(TESTFLAGS)

.PHONY: judge
judge: need-root ## Compare 100,000 random conversations with netfilter, packet by packet (root, minutes)
	@.ci/install-tools test
	TCNAT_TEST_REQUIRE=1 TCNAT_TEST_LONG=1 $(GO) test -count=1 -timeout 30m -v -run '^TestJudge(SCTP)?$$' ./internal/judge

.PHONY: test-kernel
test-kernel: ## What matters most on Debian's kernel, in QEMU: minutes, no root
	@.ci/install-tools kernel
	.ci/test-kernel $(KERNELTEST)

.PHONY: test-kernel-long
test-kernel-long: ## All of bpf, loader and internal/e2e there: an hour or more
	@.ci/install-tools kernel
	.ci/test-kernel long

.PHONY: demo
demo: need-root build ## Show NAT and a published port in throw-away namespaces (root)
	bin/tcnat lab demo

.PHONY: bench-short
bench-short: need-root build ## Compare this NAT with others, everything a little (root; docs/performance.md has the full run)
	bin/tcnat bench --short

.PHONY: need-root
need-root:
	@[ "$$(id -u)" = 0 ] || { echo "needs root, for network namespaces and BPF: sudo env PATH=\"\$$PATH\" make $(MAKECMDGOALS)" >&2; exit 1; }

.PHONY: install
install: build ## Install the command and the boot unit under PREFIX (/usr/local)
	install -D -m 755 bin/tcnat $(DESTDIR)$(PREFIX)/sbin/tcnat
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system
	sed 's|/usr/local/sbin|$(PREFIX)/sbin|' contrib/systemd/tcnat.service >$(DESTDIR)$(PREFIX)/lib/systemd/system/tcnat.service

.PHONY: uninstall
uninstall: ## Remove what install put there
	rm -f $(DESTDIR)$(PREFIX)/sbin/tcnat $(DESTDIR)$(PREFIX)/lib/systemd/system/tcnat.service

.PHONY: versions
versions: ## Print the versions of the tools
	@$(GO) version
	@for tool in clang-19 clang-format-19 dockerd iptables nft; do \
		command -v $$tool >/dev/null && $$tool --version | head -n 1 || echo "$$tool: not installed"; done
	@echo "kernel $$(uname -r)"

.PHONY: clean
clean: ## Remove what build made (generated files stay: they are committed)
	rm -rf bin
