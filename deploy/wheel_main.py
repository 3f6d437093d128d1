"""The command `job-worker` of the installed package, which is the client.

In the package this file is `job_worker/main.py`. The modules beside it import each other by their
plain names, as in a clone.
"""

import os
import sys


def main() -> int:
    """Run the client; return its exit status."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    try:
        import client

        return client.main()
    except KeyboardInterrupt:  # Ctrl-C during the import
        return 130
