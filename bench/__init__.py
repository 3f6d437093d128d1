"""The benchmarks: `python -m bench` for the short ones, `python -m bench.long` for the long one."""
