"""Speed measurements; each file is one command, `make bench` runs all."""
