"""Side-by-side measurements; they write `benchmarks/results/<device>/<suite>.json`."""
