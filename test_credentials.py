"""Tests of `whoami`, and of what the client says about a token or certificate that expires."""

from __future__ import annotations

import json
import re
import subprocess
import time
from typing import TYPE_CHECKING, Any

import jwt
import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from testkit import ClientProgram, ServerProgram

_DAY_S = 24 * 60 * 60


def _token(expires_in_s: int, **claims: Any) -> str:
    """Make a token that no server has signed, which says that it expires then."""
    claims = {"sub": "user", "role": "user", "exp": int(time.time()) + expires_in_s} | claims
    return jwt.encode(claims, "k" * 32)


def _make_certificate(directory: Path, name: str, certs: Path, days: int) -> Path:
    """Make NAME.pem and NAME-key.pem, signed by the client CA in `certs`; return NAME.pem."""
    key, request, path = (directory / f"{name}{end}.pem" for end in ("-key", "-request", ""))
    _openssl(
        *("req", "-new", "-nodes", "-subj", f"/CN={name}", "-newkey", "ec"),
        *("-pkeyopt", "ec_paramgen_curve:P-256", "-keyout", key, "-out", request),
    )
    signer = ("-CA", certs / "client-ca.pem", "-CAkey", certs / "client-ca-key.pem")
    _openssl(
        *("x509", "-req", "-in", request, *signer, "-set_serial", "1"),
        *("-days", str(days), "-out", path),
    )
    return path


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def test_whoami_shows_user_role_server_and_when_token_and_certificate_expire(
    cli: ClientProgram, program: ServerProgram, certs: Path
) -> None:
    """A token lasts 30 days, a certificate that was just made a year."""
    lines = dict(line.split(maxsplit=1) for line in cli.read("whoami").splitlines())
    assert lines["user"] == lines["role"] == "user"
    assert lines["server"] == program.address
    assert lines["profile"] == "-"
    moment = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
    assert re.fullmatch(rf"expires {moment} \(in (29|30) days\)", lines["token"])
    assert re.fullmatch(
        rf"{re.escape(str(certs))}/client.pem, expires {moment} \(in 36[45] days\)",
        lines["certificate"],
    )


def test_whoami_in_json_has_the_same(cli: ClientProgram, program: ServerProgram) -> None:
    """The times are in the form of RFC 3339."""
    facts = json.loads(cli.read("whoami", "--json"))
    assert list(facts) == [
        *("user", "role", "server", "profile"),
        *("token_expires_at", "session_expires_at", "certificate", "certificate_expires_at"),
    ]
    assert facts["server"] == program.address
    for name in ("token_expires_at", "session_expires_at", "certificate_expires_at"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", facts[name])


def test_whoami_asks_no_server(cli: ClientProgram) -> None:
    """It works where there is none."""
    assert cli.read("whoami", "--server", "localhost:1").startswith("user        user\n")


def test_token_that_expires_within_14_days_is_told_in_advance(cli: ClientProgram) -> None:
    """On stderr, with the command that renews it; output and exit status stay as they are."""
    cli.environment["JOBWORKER_TOKEN"] = _token(3 * _DAY_S + 60)
    status, stdout, stderr = cli.run("whoami")
    assert (status, stdout[:8]) == (0, b"user    ")
    assert re.fullmatch(
        r"client: your token expires \S+ \S+ UTC \(in 3 days\); run: client login -u USER\n", stderr
    )
    cli.environment["JOBWORKER_TOKEN"] = _token(14 * _DAY_S + 60)
    assert cli.read("whoami")


def test_certificate_that_expires_within_14_days_is_told_in_advance(
    cli: ClientProgram, certs: Path, tmp_path: Path
) -> None:
    """Every command tells it, also those that ask the server."""
    path = _make_certificate(tmp_path, "soon", certs, days=1)
    key = tmp_path / "soon-key.pem"
    options = ("-u", "user", "-p", "user", "--cert", str(path), "--key", str(key))
    status, _, stderr = cli.run("login", *options)
    assert status == 0
    assert re.fullmatch(
        r"client: your client certificate expires \S+ \S+ UTC \(today\); ask the server's operator "
        r"for a new one\n",
        stderr,
    )


def test_whoami_shows_since_when_a_token_has_expired(cli: ClientProgram) -> None:
    """With the command that gets a new one, and where the new one belongs."""
    cli.environment["JOBWORKER_TOKEN"] = _token(-2 * _DAY_S - 60)
    assert re.search(
        r"^token       expired \S+ \S+ UTC \(2 days ago\); run: client login -u USER$",
        cli.read("whoami"),
        re.MULTILINE,
    )


def test_refused_token_that_has_expired_is_explained(cli: ClientProgram) -> None:
    """With the day, and the command that gets a new one."""
    cli.environment["JOBWORKER_TOKEN"] = _token(-_DAY_S)
    assert re.search(
        r"; your token expired \d{4}-\d\d-\d\d \d\d:\d\d UTC; run: client login -u USER, and set "
        r"JOBWORKER_TOKEN to the new token, or unset it\n$",
        cli.fail("list"),
    )


def test_refused_token_of_another_certificate_is_explained(cli: ClientProgram, certs: Path) -> None:
    """The token has the thumbprint of the certificate that it was issued to."""
    options = ("--cert", str(certs / "other.pem"), "--key", str(certs / "other-key.pem"))
    assert cli.fail("list", *options).endswith(
        "; your token belongs to another client certificate than the one in use; run: client login "
        "-u USER, and set JOBWORKER_TOKEN to the new token, or unset it\n"
    )


@pytest.mark.parametrize(
    "token", ["a.b.c", "nothing", "...", "a.bnVsbA.c", "a.e30.c", "a.eyJleHAiOiJ4In0.c"]
)
def test_whoami_with_what_is_no_token_is_told(cli: ClientProgram, token: str) -> None:
    """Whether or not the middle of it is JSON."""
    assert cli.fail("whoami", "-t", token) == (
        "client: this is not a token of job-worker; run: client login -u USER\n"
    )


def test_whoami_tells_of_a_short_token_how_long_it_lasts(cli: ClientProgram) -> None:
    """In seconds or minutes, and that only a call in that time renews it."""
    now = int(time.time())
    session = {"iat": now, "auth_time": now, "session_exp": now + 30 * _DAY_S}
    lines = cli.read("whoami", "-t", _token(600, **session))
    assert re.search(r"^token .* UTC \(in (9|10) min\)$", lines, re.MULTILINE)
    assert re.search(
        r"^session .* days\); the token is renewed while you use it, after 10 min without a call "
        r"log in again$",
        lines,
        re.MULTILINE,
    )
    alone = cli.read("whoami", "-t", _token(30 * _DAY_S))
    assert "renewed" not in alone
