# fcvm: everything a developer or CI runs. `make help` lists it.
#
# Nothing here needs more than Debian 12, Go and root; what is missing of
# Debian's packages, `make deps` installs.

BIN     := $(CURDIR)/bin
COUNT   ?= 1
RUN     ?=
GO      ?= go
LINT    := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X fcvm/internal/buildinfo.Version=$(VERSION)
export CGO_ENABLED := 0
export CMD
export FCVM_TEST_BIN := $(BIN)

.PHONY: help build deps unit race stress e2e e2e-kvm kvmlab lint test bench bench-pages demo docs fuzz clean
.NOTPARALLEL:

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

build: ## the three binaries, in bin/
	@mkdir -p $(BIN)
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/...

deps: ## Debian's packages that building images and running VMs need
	@scripts/deps

unit: ## unit tests, with a real userfaultfd where this user may open one
	$(GO) test ./cmd/... ./internal/... ./bench/...

race: deps ## the concurrent packages under the race detector (needs gcc)
	CGO_ENABLED=1 $(GO) test -race -short ./internal/uffd/... ./internal/pageserver/... ./internal/supervisor/... ./internal/guest/agent/... ./internal/guest/proto/...

stress: ## the race kit at length: 10 million random operations in each setup
	$(GO) test -tags stress -run TestStress -timeout 2h -v ./internal/pageserver/pstest/

e2e: build deps ## real guests; COUNT=10 repeats, RUN=clone selects
	scripts/e2e -count=$(COUNT) $(if $(RUN),-run '^TestScripts$$/$(RUN)')

e2e-kvm: build deps ## the engines' suite and end-to-end tests under KVM, in the lab; RUN, SUITE and ENGINES select
	scripts/e2e-kvm

kvmlab: build deps ## run CMD where there is a real /dev/kvm, on any machine; without CMD, a shell
	scripts/kvmlab $(LABFLAGS) $(if $(CMD),sh -c "$$CMD")

lint: ## go vet and golangci-lint
	$(GO) vet ./...
	$(GO) run $(LINT) run ./...

test: build deps lint ## everything that CI runs
	scripts/engines $(MAKE) unit e2e e2e-kvm

bench: build deps ## speed and memory, side by side with their floors
	$(GO) run ./bench $(BENCHFLAGS)

bench-pages: build deps ## the page server beside the kernel and a bare C loop; BENCHFLAGS=-quick
	$(GO) run ./bench/pages $(BENCHFLAGS)

demo: build deps ## nginx, ten clones of it, and what they share
	scripts/demo

docs: build ## docs/cli, from the commands themselves
	$(GO) generate ./cmd/fcvm

fuzz: ## every fuzz target for FUZZTIME (10s)
	scripts/fuzz

clean: ## what the build made
	rm -rf $(BIN)
