"""Runs a local shell script on a server, shows its output as it comes, and exits as it does.

    PYTHONPATH=. .venv/bin/python examples/remote_script.py script.sh argument

The server, the certificates and the token are those of the environment: JOBWORKER_SERVER,
JOBWORKER_CERTS, and JOBWORKER_TOKEN, which `client login` prints.
"""

import os
import sys
from pathlib import Path

from client import Client, ClientError


def main(script: str, *arguments: str) -> int:
    """Run the script; return its exit code, or 125 if it has none."""
    with Client(
        os.environ.get("JOBWORKER_SERVER", "127.0.0.1:50051"),
        certs=os.environ.get("JOBWORKER_CERTS", "certs"),
        token=os.environ["JOBWORKER_TOKEN"],
    ) as client:
        job_id = client.start("sh", ["-s", *arguments], stdin=True)
        try:
            client.write_input(job_id, Path(script).read_bytes())
        except ClientError as error:
            if error.code != "FAILED_PRECONDITION":  # the script ended before its last line
                raise
        chunks = client.stream(job_id)
        for chunk in chunks:
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
    return 125 if chunks.end is None or chunks.end.exit_code is None else chunks.end.exit_code


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except ClientError as error:
        sys.exit(f"remote_script: {error}")
