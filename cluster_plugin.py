"""A pytest plugin: a Slurm cluster on this machine, for the tests that need one.

The fixture `cluster` brings it up once. With `--slurm` the servers of the other tests run their
jobs on it, unless a test gives them a configuration of its own; so

    pytest --slurm test_service.py test_restart.py

runs the tests of the service and of restarts over a cluster, except those that
`_NOT_OVER_A_CLUSTER` names. The first test of test_survival.py can run over one, too. Without root
or without Slurm's programs the tests are skipped. With JOBWORKER_REQUIRE_SLURM=1 each of them that
is skipped, for whatever reason, has failed, and so has each of test_slurmworker.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from testcluster import PROGRAMS, Cluster
from testkit import TEST_CONFIG
from users import SEEDED_USERS

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    _Report = Generator[None, pytest.TestReport, pytest.TestReport]

_HERE = Path(__file__).resolve().parent
_NOT_OVER_A_CLUSTER = {
    "test_status_tells_every_field_of_a_running_and_of_a_finished_job": (
        "without limits and without a node; test_job_runs_on_a_node has the fields of a cluster"
    ),
    "test_page_of_a_list_has_at_most_100_jobs_and_as_many_as_asked_for": (
        "needs 120 jobs, which take a minute; other tests read pages of jobs of a cluster"
    ),
    "test_every_client_can_receive_a_page_of_a_list": (
        "needs 40 jobs; test_slurmworker.py has a job with as many arguments"
    ),
    "test_jobs_cannot_splice_where_the_service_cannot_tee": (
        "a job of a cluster has no pipe of the server: srun has it, and passes the bytes on"
    ),
    "test_worker_that_cannot_be_made_leaves_the_jobs_to_the_next": (
        "the TMPDIR is on the node; test_jobs_of_a_cluster_are_refused_to_another_worker has a "
        "worker that cannot be made"
    ),
}
"""The tests that cannot hold over a cluster, each with the reason."""


def missing() -> str:
    """Return why there can be no cluster here; "" if there can."""
    if os.geteuid():
        return "a cluster needs root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    packages = "apt-get install slurmctld slurmd slurm-client munge"
    return f"no {', '.join(absent)}; run: {packages}" if absent else ""


def _is_required() -> bool:
    return os.environ.get("JOBWORKER_REQUIRE_SLURM") == "1"


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """Run a cluster, with a configuration of servers beside its slurm.conf."""
    epilog = f"Epilog={_HERE}/deploy/slurm-epilog"
    with (
        tempfile.TemporaryDirectory(prefix="cluster-") as name,
        Cluster(Path(name), more=epilog) as cluster,
    ):
        config = Path(name) / "server.toml"
        users = Path(name) / "users"
        users.touch(0o600)
        # Jobs run as an account of the cluster; nobody is one everywhere.
        users.write_text(
            "".join(
                f"{user.name}:{user.role.value}:{user.password_hash}:nobody\n"
                for user in SEEDED_USERS
            )
        )
        config.write_text(
            f'[server]\naccounts = "host"\nusers = "{users}"\nuids = "71000-71999"\n'
            f'[slurm]\nconf = "{cluster.conf}"\n'
        )
        yield cluster


@contextlib.contextmanager
def used_by_servers(cluster: Cluster) -> Iterator[None]:
    """Have the servers that tests start within this context run their jobs on the cluster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TEST_CONFIG, str(cluster.directory / "server.toml"))
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption("--slurm", action="store_true", help="the tests' servers use a Slurm cluster")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--slurm`, leave out what cannot hold over a cluster."""
    if config.getoption("--slurm"):
        left_out = [item for item in items if item.name.split("[")[0] in _NOT_OVER_A_CLUSTER]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> _Report:
    """With JOBWORKER_REQUIRE_SLURM=1, a test over a cluster that is skipped has failed."""
    report = yield
    is_over_a_cluster = item.config.getoption("--slurm") or item.path.name == "test_slurmworker.py"
    if report.skipped and is_over_a_cluster and _is_required():
        report.outcome = "failed"
        report.longrepr = f"JOBWORKER_REQUIRE_SLURM=1, but this test was skipped: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A controller and two nodes with 64 cores each, as they say."""
    if problem := missing():
        if _is_required():
            pytest.fail(problem)
        pytest.skip(problem)
    with running() as cluster:
        yield cluster


@pytest.fixture(scope="session", autouse=True)
def servers_use_a_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have the servers of the tests run their jobs on the cluster, if `--slurm` says so."""
    if not request.config.getoption("--slurm"):
        yield
        return
    with used_by_servers(request.getfixturevalue("cluster")):
        yield
