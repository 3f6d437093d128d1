"""The version of job-worker, which `client --version` and `server --version` print.

`pyproject.toml` has the same number.
"""

__all__ = ["VERSION"]

VERSION = "0.1.0"
