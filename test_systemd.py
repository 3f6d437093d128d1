"""The deployment guide, followed word for word on a real systemd: `make test-systemd`.

The tests boot a Debian in user-mode Linux (`scripts/systemd-guest`), run there the commands of
docs/deploy.md, section by section, and look at what they have done. They take minutes, so other
test runs skip them. Each test goes on where the one before it has stopped: run all of them. With
SUITE=trixie it is Debian 13 with systemd 257, otherwise Debian 12 with systemd 252.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_HERE = Path(__file__).resolve().parent
_DIRECTORY = _HERE / "build/systemd-guest" / os.environ.get("SUITE", "bookworm")
_SERVER = "/opt/job-worker/server --config /etc/job-worker/server.toml"
_CLIENT = "/opt/job-worker/client"

pytestmark = pytest.mark.skipif(
    "JOBWORKER_SYSTEMD" not in os.environ, reason="takes minutes: make test-systemd"
)


class Guest:
    """A host with systemd, which runs scripts as root. Attribute: `password`, alice's."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._share = directory / "share"
        self._count = 0
        self.password = ""
        self._boot()

    def _boot(self) -> None:
        with (self._directory / "console").open("ab") as log:
            self._process = subprocess.Popen(
                [_HERE / "scripts/systemd-guest", "boot", self._directory],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._await("up")

    def _await(self, mark: str) -> str:
        """Return what follows the mark on its line."""
        assert self._process.stdout
        for line in self._process.stdout:
            found = re.search(rf"@{mark}\b ?(\d*)", line.decode(errors="replace"))
            if found:
                return found[1]
        raise AssertionError(f"the guest has ended; see {self._directory / 'console'}")

    def run(self, script: str, *, status: int = 0) -> str:
        """Run a script of bash; return its output. It must end with this status."""
        self._count += 1
        name = f"{os.getpid()}-{self._count}"
        (self._share / name).write_text(f"set -e; cd /root\n{script}\n")
        (self._share / f"{name}.in").write_text(f"{self.password}\n")
        assert self._process.stdin
        self._process.stdin.write(f"{name}\n".encode())
        self._process.stdin.flush()
        ended = int(self._await(name))
        output = (self._share / f"{name}.out").read_text(errors="replace")
        if ended != status:
            pytest.fail(f"{script}\n{output}\nexit status {ended}")
        return output

    def reboot(self) -> None:
        """Let the guest shut down, and boot it again with the same disk."""
        self._share.joinpath("off").write_text("systemctl poweroff\n")
        self._share.joinpath("off.in").touch()
        assert self._process.stdin
        self._process.stdin.write(b"off\n")
        self._process.stdin.flush()
        # stdin stays open until the end: otherwise the guest's console would hang up.
        with self._process as process:
            assert process.stdout
            for _ in process.stdout:
                pass
        self._boot()

    def end(self) -> None:
        """Switch it off."""
        self._process.terminate()
        self._process.communicate()


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    """A new Debian, with this project in a repository."""
    if os.geteuid() != 0:
        pytest.fail("needs root: debootstrap makes the Debian")
    for program in ("linux.uml", "debootstrap", "mke2fs"):
        if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
            pytest.fail(f"needs {program}: apt install user-mode-linux debootstrap e2fsprogs")
    subprocess.run([_HERE / "scripts/systemd-guest", "make", _DIRECTORY], check=True)
    shutil.rmtree(_DIRECTORY / "share", ignore_errors=True)
    for name in ("changes", "console"):
        (_DIRECTORY / name).unlink(missing_ok=True)
    repository = _DIRECTORY / "share/repository"
    subprocess.run(["git", "clone", "--quiet", "--bare", _HERE, repository], check=True)
    running = Guest(_DIRECTORY)
    yield running
    running.end()


def _sections() -> dict[str, list[str]]:
    """The commands of the guide, by heading: the blocks that begin with ```sh."""
    text = (_HERE / "docs/deploy.md").read_text(encoding="utf-8")
    found = {}
    for section in text.split("\n## ")[1:]:
        heading, _, body = section.partition("\n")
        found[heading] = re.findall(r"```sh\n(.*?)```", body, re.DOTALL)
    return found


_SECTIONS = _sections()
_FOLLOWED: set[str] = set()


def _follow(guest: Guest, heading: str, number: int | None = None) -> str:
    """Run the commands of a section, or only block `number`; return what they print."""
    _FOLLOWED.add(heading)
    blocks = _SECTIONS[heading]
    if number is not None:
        blocks = [blocks[number]]
    return "".join(guest.run(block.replace("REPOSITORY", "/share/repository")) for block in blocks)


def _pid(guest: Guest) -> str:
    pid = guest.run("systemctl show -p MainPID --value job-worker").strip()
    assert pid != "0", guest.run("journalctl --no-pager -u job-worker -n 20")
    return pid


def _client(guest: Guest, words: str, *, status: int = 0) -> str:
    stdin = "" if words == "login" else "</dev/null"
    return guest.run(f"{_CLIENT} {words} {stdin}", status=status)


# --- as the guide goes -------------------------------------------------------------------------


def test_install(guest: Guest) -> None:
    """The program is in place and the files are root's. Nothing runs yet."""
    told = _follow(guest, "Install")
    assert "users are missing" in told
    assert guest.run("systemctl is-active job-worker || true") == "inactive\n"
    assert guest.run("stat -c %U:%a /etc/job-worker/certs /etc/job-worker/ca") == (
        "root:700\nroot:700\n"
    )
    broken = guest.run("systemctl start job-worker 2>&1 || systemctl status job-worker || true")
    assert "/etc/job-worker/users" in broken  # the reason: there are no users
    guest.run("systemctl stop job-worker; systemctl reset-failed job-worker || true")


def test_users(guest: Guest) -> None:
    """The invitation has a password and a bundle; alice has an account."""
    told = _follow(guest, "Users")
    guest.password = told.rpartition("not in the bundle: ")[2].split()[0]
    assert "alice" in guest.run("id alice")


def test_start(guest: Guest) -> None:
    """The service is up when the command returns, and says how it is."""
    told = _follow(guest, "Start")
    assert "active (running)" in told
    assert "0 jobs, 0 streams" in guest.run("systemctl status --no-pager job-worker")
    assert re.search(r'users = "/etc/job-worker/users" +# /etc/job-worker/server.toml, line', told)


def test_first_job(guest: Guest) -> None:
    """It runs as alice, in her home."""
    told = _follow(guest, "The first job")
    assert told.endswith("alice\n/var/lib/job-worker/homes/alice\nhello\n")


def test_limits_are_felt_inside_the_unit(guest: Guest) -> None:
    """Memory, processes and CPU; the unit's cgroup is delegated."""
    eat = "run --memory 64M -- python3 -c 'bytearray(300 << 20)'"
    _client(guest, eat, status=128 + 9)
    told = _client(
        guest, "run --pids 8 -- sh -c 'for i in 1 2 3 4 5 6 7 8 9; do sleep 9 & done' 2>&1 || true"
    )
    assert "fork" in told.lower()
    busy = "import time; t = time.time()\nwhile time.time() - t < 2: pass"
    job = _client(guest, f"start --cpus 0.25 -- python3 -c '{busy}'").strip()
    _client(guest, f"wait {job}")
    # Not its CPU time, which this kernel counts by ticks: on a busy host it counts too many.
    throttled = re.search(r"throttled ([0-9.]+) s", _client(guest, f"status {job}"))
    assert throttled
    assert float(throttled[1]) > 0


def test_jobs_cannot_speak_for_the_server(guest: Guest) -> None:
    """Neither to the journal nor to systemd; and the unit's own files are closed to them."""
    _client(guest, "run -- sh -c 'logger FORGED || true; ls /run/systemd/journal || true'")
    assert "FORGED" not in guest.run("journalctl --no-pager -u job-worker")
    for path in ("/etc/job-worker/users", "/etc/job-worker/certs/server-key.pem"):
        assert "denied" in _client(guest, f"run -- sh -c 'cat {path} 2>&1 || true'")


def test_jobs_cannot_lock_their_pipes(guest: Guest) -> None:
    """The unit refuses tee(2) and vmsplice(2), and System V IPC. The server refuses splice(2)."""
    script = "import os; os.splice(os.pipe()[0], os.pipe()[1], 1)"
    assert "Errno 22" in _client(guest, f"run -- sh -c '! python3 -c \"{script}\" 2>&1'")
    assert "not permitted" in _client(guest, "run -- sh -c '! ipcmk -Q 2>&1'")


def test_logs(guest: Guest) -> None:
    """The log goes on in a new file."""
    _follow(guest, "Logs")
    _client(guest, "list")
    assert "ListJobs" in guest.run("cat /var/lib/job-worker/audit.log")
    assert "StartJob" in guest.run("cat /var/lib/job-worker/audit.log.1")


def test_reload(guest: Guest) -> None:
    """It succeeds; with a mistake in a file it fails, and the server goes on."""
    before = _pid(guest)
    _follow(guest, "Reload")
    guest.run("cp -p /etc/job-worker/users /root/users; echo broken >>/etc/job-worker/users")
    guest.run("systemctl reload job-worker", status=1)
    guest.run("cp -p /root/users /etc/job-worker/users")
    _follow(guest, "Reload")
    assert _pid(guest) == before
    _client(guest, "list")


def test_renewal(guest: Guest) -> None:
    """Server and client have new certificates; the user keeps password and token."""
    enddate = "openssl x509 -noout -serial -in "
    server = f"{enddate} /etc/job-worker/certs/server.pem"
    before = guest.run(server)
    _follow(guest, "Renewal")
    assert guest.run(server) != before
    _client(guest, "login")
    assert _client(guest, "run -- echo again") == "again\n"


def _start_counter(guest: Guest) -> str:
    """Start a job that prints numbers until the file `end` is in its home."""
    script = "i=0; until [ -e end ]; do i=$((i + 1)); echo $i; sleep 0.2; done; exit 7"
    return _client(guest, f"start -- sh -c '{script}'").strip()


def _check_counter(guest: Guest, job: str) -> None:
    """The job has run without a break; no byte of its output is lost or there twice."""
    assert "RUNNING" in _client(guest, f"status {job}")
    home = "/var/lib/job-worker/homes/alice"
    guest.run(f"touch {home}/end")
    _client(guest, f"wait {job}", status=7)
    guest.run(f"rm {home}/end")
    numbers = _client(guest, f"stream {job}").split()
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)]


def test_restart(guest: Guest) -> None:
    """Jobs go on; a stop with a start later is the same to them. New jobs run, too."""
    job = _start_counter(guest)
    before = _pid(guest)
    _follow(guest, "Restart")
    assert _pid(guest) != before
    guest.run("systemctl stop job-worker")
    told = guest.run(f"{_SERVER} status", status=1)
    assert "1 job" in told
    guest.run("systemctl start job-worker")
    assert _client(guest, "run -- echo new") == "new\n"
    _check_counter(guest, job)
    assert "does not splice" not in guest.run("journalctl --no-pager -u job-worker")


def test_stop_of_the_jobs(guest: Guest) -> None:
    """With the command while no server runs, or with their unit. Each has a grace."""
    for command in (
        f"systemctl stop job-worker; {_SERVER} stop --jobs",
        "systemctl stop job-worker-jobs",
    ):
        polite = _client(
            guest, "start -- sh -c 'trap \"exit 3\" TERM; while :; do :; done'"
        ).strip()
        deaf = _client(guest, "start -- sh -c 'trap \"\" TERM; while :; do :; done'").strip()
        guest.run(command)
        assert guest.run("pgrep -f trap || true") == ""
        guest.run("systemctl start job-worker")
        for job, how in {polite: '"exit_code": 3', deaf: '"signal": 9'}.items():
            told = _client(guest, f"status --json {job}")
            assert how in told
            assert "SERVER_SHUTDOWN" in told


def test_metrics_are_scraped(guest: Guest) -> None:
    """With a line in the settings and a restart."""
    line = 'metrics = "127.0.0.1:9464"'
    guest.run(f"sed -i '/^listen/a {line}' /etc/job-worker/server.toml")
    guest.run("systemctl restart job-worker")
    page = guest.run("curl -sS http://127.0.0.1:9464/metrics")
    assert "\njobworker_jobs{" in page


def test_server_is_back_after_a_kill(guest: Guest) -> None:
    """systemd starts it again. Tokens stay valid, and jobs have kept running."""
    job = _start_counter(guest)
    before = _pid(guest)
    guest.run(f"kill -KILL {before}")
    guest.run(
        "for i in $(seq 60); do systemctl is-active -q job-worker && break; sleep 1; done\n"
        "systemctl is-active job-worker"
    )
    assert _pid(guest) not in ("0", before)
    assert _client(guest, "run -- echo back") == "back\n"
    _check_counter(guest, job)


def test_reboot(guest: Guest) -> None:
    """The service is up again by itself. It knows how the jobs have ended."""
    job = _start_counter(guest)
    guest.reboot()
    guest.run("systemctl start job-worker")  # waits for a start that is under way
    assert _client(guest, "run -- echo rebooted") == "rebooted\n"
    assert "shutdown" in _client(guest, f"status {job}")


def test_backup(guest: Guest) -> None:
    """What the backup has comes back: users, uids, jobs, homes. The server is not stopped."""
    before = _pid(guest)
    job = _client(guest, "start -- sh -c 'echo kept >kept'").strip()
    _client(guest, f"wait {job}")
    _follow(guest, "Backup", 0)
    assert _pid(guest) == before
    guest.run(f"{_SERVER} user role alice admin; rm /var/lib/job-worker/homes/alice/kept")
    _client(guest, "login")
    _follow(guest, "Backup", 1)
    assert guest.run(f"{_SERVER} user list") == "alice\tuser\t-\n"
    _client(guest, "login")
    assert _client(guest, "run -- sh -c 'whoami; cat kept'") == "alice\nkept\n"
    assert job in _client(guest, "list --json")


def test_upgrade(guest: Guest) -> None:
    """The new version runs after one command; settings, users and tokens stay."""
    guest.run(
        "git clone -q /share/repository /root/new; cd /root/new\n"
        "git config user.name n; git config user.email e\n"
        "sed -i 's/^VERSION.*=.*/VERSION = \"9.9.9\"/' version.py; git commit -qam new\n"
        "git push -q origin HEAD"
    )
    before, job = _pid(guest), _start_counter(guest)
    _follow(guest, "Upgrade")
    assert _pid(guest) != before
    _check_counter(guest, job)
    assert guest.run(f"{_SERVER} --version") == "job-worker 9.9.9\n"
    assert "9.9.9" in guest.run(f"{_SERVER} status")
    assert _client(guest, "run -- echo upgraded") == "upgraded\n"


def test_upgrade_that_cannot_work_changes_nothing(guest: Guest) -> None:
    """The old program keeps running."""
    before = _pid(guest)
    guest.run(
        "cp -p /etc/job-worker/server.toml /root/; echo '[typo]' >>/etc/job-worker/server.toml"
    )
    told = guest.run("cd /usr/local/src/job-worker; make install 2>&1 || true")
    assert "typo: unknown" in told
    assert "is as it was" in told
    guest.run("cp -p /root/server.toml /etc/job-worker/")
    assert _pid(guest) == before
    _client(guest, "list")


def test_uninstall(guest: Guest) -> None:
    """Nothing of the program is left, and after the last commands nothing at all."""
    _follow(guest, "Uninstall", 0)
    assert guest.run("systemctl is-active job-worker || true") == "inactive\n"
    assert guest.run("ls /opt; ls /etc/systemd/system | grep job-worker || true") == ""
    assert guest.run("ls -d /etc/job-worker /var/lib/job-worker").count("\n") == 2
    _follow(guest, "Uninstall", 1)
    left = (
        "ls -d /etc/job-worker /var/lib/job-worker /etc/logrotate.d/job-worker 2>/dev/null || true"
    )
    assert guest.run(left) == ""


def test_every_section_of_the_guide_was_followed() -> None:
    """If all tests of this module ran."""
    assert {heading for heading, blocks in _SECTIONS.items() if blocks} == _FOLLOWED
