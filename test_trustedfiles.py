"""Tests of the trust in files: who could replace, change or read them."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jwt
import pytest

import trustedfiles
from testkit import GUARD_S, NOBODY, clean_environment
from trustedfiles import READ_FLAGS, TrustedFiles, UntrustedFileError, check, open_private

_HERE = Path(__file__).resolve().parent
_as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def path(public: Path) -> Path:
    """A file in two directories, all of them as they should be."""
    directory = public / "outer" / "inner"
    directory.mkdir(parents=True)
    for each in (directory, directory.parent):
        each.chmod(0o755)
    path = directory / "file"
    path.write_text("content")
    path.chmod(0o600)
    return path


def _refusal(path: Path, *, private: bool = True) -> str:
    with pytest.raises(UntrustedFileError) as caught:
        check(path, private=private)
    return str(caught.value)


def _read(path: Path) -> bytes:
    return TrustedFiles({path: READ_FLAGS}, private=True).read(path)


def test_file_of_ours_is_trusted(path: Path) -> None:
    """Also through links, with `..`, and below /tmp, where everybody can write."""
    assert _read(path) == b"content"
    link = path.parent.parent / "link"
    link.symlink_to(path.parent / ".." / "inner" / "file")
    check(link, private=True)
    (path.parent.parent / "dir").symlink_to("inner")
    check(path.parent.parent / "dir" / ".." / "dir" / "file", private=True)
    check(path.parent / "missing", private=True)


@_as_root
@pytest.mark.parametrize("step", [0, 1, 2])
def test_whatever_belongs_to_somebody_else_is_refused(path: Path, step: int) -> None:
    """The file, its directory, and the directory above that."""
    foreign = [path, *path.parents][step]
    os.chown(foreign, NOBODY, NOBODY)
    assert _refusal(path, private=False) == (
        f"{foreign} belongs to uid {NOBODY}, who could change it and what is in it; "
        f"run: chown 0 {foreign}, or use another place"
    )
    with pytest.raises(UntrustedFileError):
        _read(path)


@_as_root
def test_link_of_somebody_else_is_refused(path: Path) -> None:
    """Its owner could let it lead elsewhere, even if it leads to a file of ours now."""
    link = path.parent / "link"
    link.symlink_to(path)
    os.lchown(link, NOBODY, NOBODY)
    assert f"{link} belongs to uid {NOBODY}" in _refusal(link)


@_as_root
@pytest.mark.parametrize("step", [1, 2])
def test_directories_behind_a_link_are_checked(path: Path, public: Path, step: int) -> None:
    """Those of the target, too."""
    link = public / "link"
    link.symlink_to(path)
    foreign = [path, *path.parents][step]
    os.chown(foreign, NOBODY, NOBODY)
    assert f"{foreign} belongs to" in _refusal(link)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(("mode", "remedy"), [(0o777, "o-w"), (0o757, "o-w"), (0o775, "g-w")])
def test_directory_in_which_others_can_write_is_refused(
    path: Path, step: int, mode: int, remedy: str
) -> None:
    """The sticky bit makes it safe: what belongs to us cannot be replaced there."""
    directory = [path, *path.parents][step]
    directory.chmod(mode)
    if os.geteuid() and remedy == "g-w":
        pytest.skip("the group may be a user's own")
    assert f"run: chmod {remedy} {directory}" in _refusal(path, private=False)
    directory.chmod(mode | 0o1000)
    check(path, private=True)


@pytest.mark.parametrize("mode", [0o606, 0o602, 0o620])
@pytest.mark.parametrize("private", [True, False])
def test_file_that_others_can_write_is_refused(path: Path, mode: int, private: bool) -> None:
    """Also if jobs run as our own user."""
    if os.geteuid() and mode == 0o620:
        pytest.skip("the group may be a user's own")
    path.chmod(mode)
    assert f"could read or change {path}; run: chmod go" in _refusal(path, private=private)


def test_file_that_others_can_read_is_refused_if_it_is_private(path: Path) -> None:
    """A certificate is public, its key is not."""
    path.chmod(0o644)
    check(path)
    assert _refusal(path).endswith(f"run: chmod go= {path}")
    certificate, key = path.with_name("a.pem"), path.with_name("a-key.pem")
    for each in (certificate, key):
        each.touch()
        each.chmod(0o644)
    check(certificate, private=True)
    assert _refusal(key).endswith(f"run: chmod go= {key}")


def test_modes_behind_a_closed_directory_do_not_matter(path: Path) -> None:
    """Nobody else gets there."""
    path.chmod(0o666)
    path.parent.chmod(0o777)
    path.parent.parent.chmod(0o700)
    assert _read(path) == b"content"


@_as_root
def test_group_of_the_owner_alone_may_write(path: Path) -> None:
    """Many systems give each user a group with the same number, and umask 002. Not root."""
    path.chmod(0o660)
    assert _refusal(path)
    owners = trustedfiles._OWNERS
    owners.add(NOBODY)
    try:
        os.chown(path, NOBODY, NOBODY)
        check(path, private=True)
        os.chown(path, NOBODY, NOBODY - 1)
        assert _refusal(path)
    finally:
        owners.remove(NOBODY)


@_as_root
def test_trust_is_checked_at_every_read(path: Path) -> None:
    """And of the file that was opened, even if another has its name meanwhile."""
    files = TrustedFiles({path: READ_FLAGS}, private=True)
    assert files.read(path) == b"content"
    foreign = path.with_name("foreign")
    foreign.touch(0o600)
    os.chown(foreign, NOBODY, NOBODY)
    files.open_with(lambda _: os.open(foreign, os.O_RDONLY))
    with pytest.raises(UntrustedFileError, match=f"belongs to uid {NOBODY}"):
        files.read(path)


@pytest.mark.parametrize("kind", ["fifo", "directory"])
def test_what_is_no_file_is_refused_at_once(path: Path, kind: str) -> None:
    """A FIFO that nobody writes to keeps nobody waiting."""
    path.unlink()
    os.mkfifo(path, 0o600) if kind == "fifo" else path.mkdir(0o700)
    with pytest.raises(UntrustedFileError, match="is not a regular file"):
        _read(path)
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_CREAT):
        with pytest.raises(UntrustedFileError, match="is not a regular file"):
            os.close(open_private(path, flags))


def test_links_in_a_circle_are_missing_files(path: Path) -> None:
    """Whoever reads the file gets the kernel's error."""
    path.unlink()
    path.symlink_to(path.name)
    check(path)
    with pytest.raises(OSError, match="symbolic links"):
        _read(path)


# --- the program --------------------------------------------------------------------------------


@pytest.fixture
def copy(public: Path) -> Path:
    """A copy of the program, which everybody can enter."""
    directory = public / "program"
    directory.mkdir()
    directory.chmod(0o755)
    for path in _HERE.glob("*.py"):
        if not path.name.startswith(("test", "conftest")) and "plugin" not in path.name:
            shutil.copy(path, directory)
    shutil.copy(_HERE / "server", directory)
    return directory


def _start(copy: Path, certs: Path, environment: dict[str, str] | None = None) -> str:
    """Start the server in the copy, without its users file; return its error."""
    options = ("--users", str(copy / "no-users"), "--limits", "off", "--certs", str(certs))
    run = subprocess.run(
        [sys.executable, str(copy / "server.py"), *options, "--state-dir", str(copy / "state")],
        env=clean_environment() | {"PYTHONDONTWRITEBYTECODE": "1"} | (environment or {}),
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    return run.stderr


_GOES_ON = "No such file or directory"  # the server has checked its code before


@_as_root
def test_code_that_others_can_change_is_refused(copy: Path, certs: Path) -> None:
    """Each file of the program, whether it is loaded at the start or not, and the directory."""
    assert _GOES_ON in _start(copy, certs)
    (copy / "__pycache__").mkdir(exist_ok=True)
    cached = copy / "__pycache__" / f"worker.{sys.implementation.cache_tag}.pyc"
    cached.touch()
    for path in (copy / "worker.py", copy / "leader.py", copy / "server", cached):
        mode = path.stat().st_mode
        path.chmod(0o666)
        assert f"server: jobs could read or change {path}; run: chmod go-w" in _start(copy, certs)
        path.chmod(mode)
    os.chown(copy / "cgroupfs.py", NOBODY, NOBODY)
    assert f"server: {copy / 'cgroupfs.py'} belongs to uid {NOBODY}" in _start(copy, certs)
    os.chown(copy / "cgroupfs.py", 0, 0)
    copy.chmod(0o777)
    assert f"files in {copy}; run: chmod o-w {copy}" in _start(copy, certs)
    copy.chmod(0o755)
    assert _GOES_ON in _start(copy, certs)


@_as_root
def test_packages_and_places_of_packages_are_code(copy: Path, certs: Path, public: Path) -> None:
    """A directory on Python's path in which others can write; a package there."""
    place = public / "place"
    place.mkdir()
    place.chmod(0o777)
    environment = {"PYTHONPATH": str(place)}
    assert f"run: chmod o-w {place}" in _start(copy, certs, environment=environment)
    place.chmod(0o755)
    shutil.copytree(Path(jwt.__file__).parent, place / "jwt")
    assert _GOES_ON in _start(copy, certs, environment=environment)
    environment["LD_LIBRARY_PATH"] = f"/usr/lib:{place}"
    assert _GOES_ON in _start(copy, certs, environment=environment)
    place.chmod(0o757)
    environment["PYTHONPATH"] = ""
    assert f"run: chmod o-w {place}" in _start(copy, certs, environment=environment)
    place.chmod(0o755)
    environment["PYTHONPATH"] = str(place)
    (place / "jwt" / "api_jws.py").chmod(0o646)
    assert f"{place}/jwt/api_jws.py; run" in _start(copy, certs, environment=environment)


@_as_root
def test_present_directory_is_a_place_of_code_if_python_looks_there(
    copy: Path, public: Path
) -> None:
    """A program that has the server as a module, and runs in a directory of somebody else."""
    here = public / "here"
    here.mkdir()
    run = functools.partial(
        subprocess.run,
        [sys.executable, "-c", "import trustedfiles; trustedfiles.check_code()"],
        cwd=here,
        env=clean_environment() | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    here.chmod(0o755)
    assert run().returncode == 0
    here.chmod(0o777)
    assert f"run: chmod o-w {here}" in run().stderr
