# Shorthands; nothing needs them.

# build the programs and run the tests
test *ARGS:
    ./test.sh {{ ARGS }}

# everything that must pass before a change lands
ci:
    .ci/run

# what the compiler and the linters say
lint:
    cargo clippy --locked --workspace --all-targets -- -D warnings

# move a file through a domain, with nothing installed
demo FILE="Cargo.lock":
    cargo run --locked --release -p domainctl -- demo {{ quote(FILE) }}

# format the sources
fmt:
    cargo fmt --all

# static programs and the container image
image:
    deploy/image

# what runs on a node: chart, metrics, systemd, containers (the last two as root)
node:
    tests/chart.sh
    tests/metrics.sh
    tests/systemd.sh
    tests/containers.sh
