"""Runs shell commands at the same time, each as a job of its own, and says how each of them ended.

    PYTHONPATH=. python3 examples/parallel.py 'sleep 1; echo slow' 'echo quick; exit 3'

It uses the library (`make library`), without a server: jobs end with this program.
"""

import sys

from worker import Limits, Worker


def main(commands: list[str]) -> int:
    """Run the commands; return how many of them failed."""
    failed = 0
    with Worker(limits=Limits(memory_bytes=256 * 1024 * 1024, pids=100)) as worker:
        jobs = [worker.start("sh", ["-c", command], name="parallel") for command in commands]
        for job_id, command in zip(jobs, commands, strict=True):
            with worker.stream(job_id) as chunks:
                output = b"".join(chunks).decode(errors="replace")
            job = worker.wait(job_id)
            failed += job.exit_code != 0
            end = f"killed by signal {job.signal}" if job.signal else f"exit code {job.exit_code}"
            print(f"{command}: {end}", output, sep="\n", end="")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 255))
