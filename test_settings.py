"""Tests of the settings: the keys of the file, errors in it, and the limits of a job."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import settings
from limits import NO_LIMITS, Limits
from settings import (
    CEILINGS,
    DEFAULTS,
    IN_ALL,
    JOB_OUTPUT_BYTES,
    PER_USER,
    Config,
    ConfigError,
    LimitError,
    Quota,
    Requests,
    load_config,
)
from worker import Retention

if TYPE_CHECKING:
    from collections.abc import Callable

    Load = Callable[[str | bytes], Config]

_GIB = 1 << 30
_MIB = 1 << 20
_KIB = 1 << 10
_NO_CEILINGS = Config(ceilings=NO_LIMITS)


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a configuration file with the given text."""
    path = tmp_path / "limits.toml"

    def load(text: str | bytes) -> Config:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_config(path)

    return load


# --- what a file says ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *("", "\n# nothing\n", "[defaults]\n[ceilings]\n"),
        "[per_user]\n[in_all]\n[per_job]\n[requests]\n[retention]\n",
    ],
)
def test_what_the_file_does_not_name_keeps_its_constant(load: Load, text: str) -> None:
    """A file may be empty."""
    assert load(text) == Config() == Config(DEFAULTS, CEILINGS)


def test_constants_are_sound() -> None:
    """The defaults are the library's, and no default is above its ceiling."""
    assert Limits() == DEFAULTS
    for field in Limits.__slots__:
        default, ceiling = getattr(DEFAULTS, field), getattr(CEILINGS, field)
        assert ceiling is not None
        assert default is None or default <= ceiling


@pytest.mark.parametrize("table", ["defaults", "ceilings"])
@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("cpu_cores = 2", "cpu_cores", 2),
        ("cpu_cores = 1.5", "cpu_cores", 1.5),
        ("memory = 536870913", "memory_bytes", 536870913),
        ('memory = "1.5G"', "memory_bytes", 3 << 29),
        ("swap = 0", "swap_bytes", 0),
        ('io_read = "60M"', "io_read_bps", 60 * _MIB),
        ('io_write = "70 MiB"', "io_write_bps", 70 * _MIB),
        ("io_read_iops = 800", "io_read_iops", 800),
        ("io_write_iops = 900", "io_write_iops", 900),
        ("pids = 1000", "pids", 1000),
        *((f'{key} = "unlimited"', kind.field, None) for key, kind in settings._KEYS.items()),
    ],
)
def test_key_sets_its_field_and_no_other(
    load: Load, table: str, line: str, field: str, value: float | None
) -> None:
    """A size is an integer or text; "unlimited" removes a limit."""
    before: Any = getattr(Config(), table)
    assert load(f"[{table}]\n{line}\n") == replace(
        Config(), **{table: replace(before, **{field: value})}
    )


_QUOTA_LINES: list[tuple[str, str, float | None]] = [
    ("running_jobs = 1", "running_jobs", 1),
    ('running_jobs = "unlimited"', "running_jobs", None),
    ("starts_per_second = 0.5", "starts_per_second", 0.5),
    ("starts_per_second = 7", "starts_per_second", 7),
    ('starts_per_second = "unlimited"', "starts_per_second", None),
    ("start_burst = 1", "start_burst", 1),
    ('start_burst = "unlimited"', "start_burst", None),
    ('kept_output = "1.5G"', "output_bytes", 3 << 29),
    ("kept_output = 1", "output_bytes", 1),
    ('kept_output = "unlimited"', "output_bytes", None),
    ("streams = 1", "streams", 1),
    ("streams = 100000", "streams", 100_000),
]


@pytest.mark.parametrize(
    ("table", "line", "field", "value"),
    [
        *(("per_user", *quota) for quota in _QUOTA_LINES),
        *(("in_all", *quota) for quota in _QUOTA_LINES),
        ("per_user", "streams = 100001", "streams", 100_001),
        ("per_user", 'streams = "unlimited"', "streams", None),
        ("requests", 'size = "4K"', "size", 4 * _KIB),
        ("requests", "size = 2147483647", "size", 2 * _GIB - 1),
        ("requests", "args = 0", "args", 0),
        ("requests", 'arg_length = "1K"', "arg_length", _KIB),
        ("requests", "arg_length = 1", "arg_length", 1),
        ("retention", 'age = "12h"', "age_s", 12 * 3600),
        ("retention", "age = 0.5", "age_s", 0.5),
        ("retention", "age = 0", "age_s", 0),
        ("retention", 'age = "unlimited"', "age_s", None),
        ("retention", "jobs = 1", "jobs", 1),
        ("retention", 'jobs = "unlimited"', "jobs", None),
        ("retention", 'output = "2G"', "output_bytes", 2 * _GIB),
        ("retention", "output = 0", "output_bytes", 0),
        ("retention", 'output = "unlimited"', "output_bytes", None),
        ("retention", 'argv = "1M"', "argv_bytes", _MIB),
        ("retention", 'argv = "unlimited"', "argv_bytes", None),
    ],
)
def test_key_of_a_ceiling_sets_its_field_and_no_other(
    load: Load, table: str, line: str, field: str, value: float | None
) -> None:
    """For one user, all users and a request, with the lowest and the highest value."""
    before: Any = getattr(Config(), table)
    assert load(f"[{table}]\n{line}\n") == replace(
        Config(), **{table: replace(before, **{field: value})}
    )


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ('kept_output = "100M"', 100 * _MIB),
        ("kept_output = 1", 1),
        ('kept_output = "unlimited"', None),
    ],
)
def test_kept_output_per_job_is_set(load: Load, line: str, value: int | None) -> None:
    """The table `per_job` has one key."""
    assert load(f"[per_job]\n{line}\n") == Config(job_output_bytes=value)


def test_ceiling_of_one_user_may_be_above_that_of_all(load: Load) -> None:
    """Such a quota has no effect, and is not an error."""
    loaded = load("[per_user]\nrunning_jobs = 9\n[in_all]\nrunning_jobs = 8\n")
    assert (loaded.per_user.running_jobs, loaded.in_all.running_jobs) == (9, 8)


def test_no_user_can_have_all_there_is() -> None:
    """By default a user at every quota leaves at least as much to the others."""
    for field in Quota.__slots__:
        assert getattr(IN_ALL, field) >= 2 * getattr(PER_USER, field), field
    assert PER_USER.output_bytes is not None
    assert PER_USER.output_bytes >= JOB_OUTPUT_BYTES


def test_finished_jobs_leave_room_for_output_of_running_ones() -> None:
    """By default retention keeps less output than one user may have."""
    kept = Config().retention.output_bytes
    assert kept is not None
    assert PER_USER.output_bytes is not None
    assert JOB_OUTPUT_BYTES <= kept <= PER_USER.output_bytes - JOB_OUTPUT_BYTES


@pytest.mark.parametrize(
    ("table", "fields"),
    [
        ("defaults", Limits.__slots__),
        ("ceilings", Limits.__slots__),
        ("per_user", Quota.__slots__),
        ("in_all", Quota.__slots__),
        ("requests", Requests.__slots__),
        ("retention", Retention.__slots__),
    ],
)
def test_every_field_has_a_key(table: str, fields: tuple[str, ...]) -> None:
    """One key sets each field."""
    assert sorted(kind.field for kind in settings.TABLES[table].values()) == sorted(fields)


@pytest.mark.parametrize(
    ("table", "name"),
    [(table, name) for table in settings.TABLES for name in settings.TABLES[table]],
)
def test_constant_is_a_value_that_the_file_may_have(table: str, name: str) -> None:
    """The range of a key includes its default."""
    key = settings.TABLES[table][name]
    constant = getattr(getattr(Config(), table, Config()), key.field)
    if constant is None and not key.may_be_unlimited:
        return  # a rule of the library takes the place of a constant
    assert key.value("unlimited" if constant is None else constant) == constant


@pytest.mark.parametrize(
    "text",
    [
        "defaults.pids = 7\nceilings.pids = 8",
        '"defaults".pids = 7\n[ceilings]\n"pids" = 8',
        "defaults = { pids = 7 }\nceilings = { pids = 8 }",
        "[ceilings] # pids = 9\r\npids = 8\r\n[defaults]\r\npids = 7\r\n",
    ],
)
def test_every_way_to_write_toml_is_the_same(load: Load, text: str) -> None:
    """Dotted and quoted keys, inline tables, any order, any line end."""
    loaded = load(text)
    assert (loaded.defaults.pids, loaded.ceilings.pids) == (7, 8)


# --- what is wrong with it -----------------------------------------------------------------

_KEYS = "unknown; the keys are cpu_cores, memory, swap, io_read, io_write, io_read_iops"
_TABLES = (
    "unknown; the tables are [defaults], [ceilings], [per_user], [in_all], [per_job], [requests], "
    "[all_jobs], [disk], [ending], [shutdown], [retention], [environment], [slurm] and [server]"
)
_QUOTA_KEYS = (
    "unknown; the keys are running_jobs, running_argv, streams, starts_per_second, start_burst, "
    "kept_output"
)
_SIZE = 'write a size like "256M", or "unlimited"'
_WHOLE = 'write a whole number, or "unlimited"'
_CORES = 'write a number like 0.5, or "unlimited"'
_TIME = 'write a time like "7d", or "unlimited"'


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        # Unknown tables and keys.
        ("\n[default]\npids = 1", 2, ["default: ", _TABLES]),
        ("[defaults]\n\n[ceilings]\n[extra.deep]", 4, ["extra: ", _TABLES]),
        ("pids = 1", 1, ["pids: ", _TABLES]),
        ("# x\ndefaults = 3", 2, ["defaults: ", _TABLES]),
        ("[[ceilings]]\npids = 1", 1, ["ceilings: ", _TABLES]),
        ("[defaults]\nmemroy = 1", 2, ["defaults.memroy: ", _KEYS]),
        ("[defaults]\npids = 1\n[ceilings]\nmemory_bytes = 1", 4, ["ceilings.memory_bytes: "]),
        ('[defaults]\n"cpu.cores" = 1', 2, ["defaults.cpu.cores: ", _KEYS]),
        ('[defaults]\n"mem#ory" = 1', 1, ["defaults.mem#ory: ", _KEYS]),
        # Wrong types.
        ('[defaults]\npids = "many"', 2, ["defaults.pids: ", "'many'", _WHOLE]),
        ("[defaults]\npids = 1.5", 2, ["defaults.pids: ", "1.5", _WHOLE]),
        ("[defaults]\npids = true", 2, ["defaults.pids: ", "True", _WHOLE]),
        ("[defaults]\npids = [1]", 2, ["defaults.pids: ", _WHOLE]),
        ("[defaults]\ncpu_cores = 2020-01-01", 2, ["defaults.cpu_cores: ", _CORES]),
        ('[defaults]\ncpu_cores = "1"', 2, ["defaults.cpu_cores: ", _CORES]),
        ("[ceilings]\nio_read = 1.5", 2, ["ceilings.io_read: ", "1.5", _SIZE]),
        ("[ceilings.swap]\nx = 1", 1, ["ceilings.swap: ", _SIZE]),
        # Senseless values.
        ('[defaults]\nmemory = "1X"', 2, ["defaults.memory: ", "'1X'", _SIZE]),
        ('[defaults]\nmemory = ""', 2, ["defaults.memory: ", _SIZE]),
        ('[defaults]\nmemory = "Unlimited"', 2, ["defaults.memory: ", _SIZE]),
        ('[defaults]\nmemory = "0"', 2, ["defaults.memory: ", "at least 1", _SIZE]),
        ("[defaults]\nswap = -1", 2, ["defaults.swap: ", "at least 0", "-1", _SIZE]),
        ("[ceilings]\npids = 0", 2, ["ceilings.pids: ", "at least 1", _WHOLE]),
        ("[defaults]\nio_write_iops = 0", 2, ["defaults.io_write_iops: ", _WHOLE]),
        ("[defaults]\ncpu_cores = 0.009", 2, ["defaults.cpu_cores: ", "0.01", "0.009", _CORES]),
        ("[defaults]\ncpu_cores = nan", 2, ["defaults.cpu_cores: ", "nan", _CORES]),
        ("[defaults]\ncpu_cores = inf", 2, ["defaults.cpu_cores: ", "inf", _CORES]),
        # Ceilings of users and requests.
        ("[per_user]\nrunning_job = 1", 2, ["per_user.running_job: ", _QUOTA_KEYS]),
        ("[in_all]\nkept_outputs = 1", 2, ["in_all.kept_outputs: ", _QUOTA_KEYS]),
        ("[per_job]\nstreams = 1", 2, ["per_job.streams: unknown; the keys are kept_output"]),
        (
            "[requests]\nargv = 1",
            2,
            ["requests.argv: unknown; the keys are size, args, arg_length"],
        ),
        ("per_user = 3", 1, ["per_user: ", _TABLES]),
        ("[per_user]\nrunning_jobs = 0", 2, ["per_user.running_jobs: ", "at least 1", _WHOLE]),
        ("[per_user]\nstreams = 1.0", 2, ["per_user.streams: ", "1.0", _WHOLE]),
        ("[per_user]\nstarts_per_second = 0", 2, ["per_user.starts_per_second: ", "0.01", _CORES]),
        ("[in_all]\nstarts_per_second = inf", 2, ["in_all.starts_per_second: ", "inf", _CORES]),
        ("[in_all]\nstarts_per_second = nan", 2, ["in_all.starts_per_second: ", "nan", _CORES]),
        ("[in_all]\nstart_burst = true", 2, ["in_all.start_burst: ", "True", _WHOLE]),
        ("[in_all]\nrunning_jobs = -1", 2, ["in_all.running_jobs: ", "at least 1, not -1", _WHOLE]),
        ("[in_all]\nstreams = 0", 2, ["in_all.streams: ", "at least 1", "; write a whole number"]),
        ("[in_all]\nstreams = 100001", 2, ["in_all.streams: ", "at most 100000", "a whole number"]),
        ('[per_user]\nkept_output = "1X"', 2, ["per_user.kept_output: ", "'1X'", _SIZE]),
        ("[per_job]\n\nkept_output = 0", 3, ["per_job.kept_output: ", "at least 1, not 0", _SIZE]),
        ("per_job.kept_output = [1]", 1, ["per_job.kept_output: ", "[1]", _SIZE]),
        ('[requests]\nsize = "4095"', 2, ["requests.size: ", "at least 4096, not 4095"]),
        ('[requests]\nsize = "2G"', 2, ["requests.size: ", "at most 2147483647"]),
        ("[requests]\nargs = -1", 2, ["requests.args: ", "at least 0, not -1"]),
        ("[requests]\narg_length = 0", 2, ["requests.arg_length: ", "at least 1, not 0"]),
        # How long finished jobs are kept.
        (
            "[retention]\ncount = 1",
            2,
            ["retention.count: ", "the keys are age, jobs, output, argv"],
        ),
        ('[retention]\nage = "7 days"', 2, ["retention.age: ", "'7 days' is not a time", _TIME]),
        ("[retention]\nage = -1", 2, ["retention.age: ", "at least 0, not -1", _TIME]),
        ("[retention]\nage = nan", 2, ["retention.age: ", "nan", _TIME]),
        ("[retention]\njobs = 0", 2, ["retention.jobs: ", "at least 1, not 0", _WHOLE]),
        ('[retention]\noutput = "1X"', 2, ["retention.output: ", "'1X'", _SIZE]),
        ('[retention]\nargv = "1d"', 2, ["retention.argv: ", "'1d'", _SIZE]),
        # Defaults above ceilings, told where the file causes it.
        ('[defaults]\nmemory = "16G"', 2, ["defaults.memory: ", f"{16 * _GIB}", f"{8 * _GIB}"]),
        ('\n[ceilings]\nmemory = "1M"', 3, ["ceilings.memory: ", f"{512 * _MIB}", f"{_MIB}"]),
        ("[defaults]\npids = 9\n[ceilings]\npids = 8", 2, ["defaults.pids: ", "9", "8"]),
        ("[ceilings]\ncpu_cores = 0.5", 2, ["ceilings.cpu_cores: ", "1.0", "0.5"]),
        ("[defaults]\npids = 99999", 2, ["defaults.pids: ", "4096"]),
        ("[defaults]\npids = 99999999999999999999", 2, ["defaults.pids: ", "at most"]),
        # Lines that are found however they are written, and not taken for others.
        ("defaults.memory = 0", 1, ["defaults.memory: "]),
        ('"defaults" . "memory" = 0', 1, ["defaults.memory: "]),
        ("[ 'defaults' ] # x\n\t'memory'=0", 2, ["defaults.memory: "]),
        ("\ndefaults = { pids = 1, memory = 0 }", 2, ["defaults.memory: "]),
        ("[defaults]\r\npids = 1\r\nmemory = 0\r\n", 3, ["defaults.memory: "]),
        (
            "# memory = 0\n# [defaults]\n[ceilings]\nmemory = '2G'\n[defaults]\nmemory = 0 # = 1",
            6,
            ["defaults.memory: "],
        ),
    ],
)
def test_mistake_is_told_with_its_line_and_the_right_form(
    load: Load, tmp_path: Path, text: str, line: int, parts: list[str]
) -> None:
    """For a wrong name, type or value the error has file, line, key and right form."""
    with pytest.raises(ConfigError) as caught:
        load(text)
    told = str(caught.value)
    assert told.startswith(f"{tmp_path / 'limits.toml'}, line {line}: {parts[0]}")
    assert [part for part in parts if part not in told] == []
    assert "\n" not in told


@pytest.mark.parametrize(
    ("table", "key", "right"),
    [
        ("in_all", "streams", "a whole number"),
        ("requests", "size", 'a size like "256M"'),
        ("requests", "args", "a whole number"),
        ("requests", "arg_length", 'a size like "256M"'),
    ],
)
def test_what_costs_threads_or_memory_cannot_be_unlimited(
    load: Load, table: str, key: str, right: str
) -> None:
    """The right form in the error does not offer "unlimited"."""
    with pytest.raises(ConfigError, match=rf"line 2: {table}\.{key}: .*; write {right}$"):
        load(f'[{table}]\n{key} = "unlimited"\n')


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[defaults]\npids = 1\npids = 2\n\n", 3),
        ("[defaults]\n\nmemory = 1G\n", 3),
        ("[defaults\n", 1),
        ('[defaults]\nmemory = "1G\n', 2),
        ("[defaults]\npids = 1\n[defaults]\n", 3),
    ],
)
def test_what_is_not_toml_is_told_with_its_line(load: Load, text: str, line: int) -> None:
    """The error has the words of Python's parser."""
    with pytest.raises(ConfigError, match=rf"limits\.toml: not TOML: .* line {line}, column"):
        load(text)


def test_what_is_too_large_is_no_configuration() -> None:
    """A file without an end would be read for ever."""
    with pytest.raises(ConfigError, match=r"/dev/zero: larger than 1 MiB; name the configuration"):
        settings.ConfigFile.read(Path("/dev/zero"))


def test_what_is_not_utf_8_is_told_with_its_line(load: Load) -> None:
    """Some editors save other encodings."""
    with pytest.raises(ConfigError, match=r"limits\.toml, line 2: not UTF-8"):
        load(b"[defaults]\n# gro\xdf\npids = 1\n")


@pytest.mark.parametrize("name", ["absent.toml", "."])
def test_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    """It is an OSError with the path."""
    with pytest.raises(OSError, match=re.escape(str(tmp_path / name).rstrip("."))):
        load_config(tmp_path / name)


# --- what a job gets -----------------------------------------------------------------------


def test_what_a_job_does_not_ask_for_is_the_default() -> None:
    """A job gets a limit that it asks for, above or below the default."""
    assert _NO_CEILINGS.limits({}) == DEFAULTS
    asked: dict[str, Any] = {"cpu_cores": 2.5, "memory_bytes": 1, "pids": 1000}
    assert _NO_CEILINGS.limits(asked) == replace(DEFAULTS, **asked)


@pytest.mark.parametrize("field", Limits.__slots__)
def test_ceiling_can_be_reached_and_not_passed(field: str) -> None:
    """A higher value is an error with the field, the value and the ceiling."""
    ceiling = getattr(CEILINGS, field)
    assert getattr(Config().limits({field: ceiling}), field) == ceiling
    text = rf"{field} {ceiling + 1} is above this server's ceiling of {ceiling}"
    with pytest.raises(LimitError, match=re.escape(text)):
        Config().limits({field: ceiling + 1})
    assert getattr(_NO_CEILINGS.limits({field: ceiling + 1}), field) == ceiling + 1


@pytest.mark.parametrize("field", Limits.__slots__)
def test_no_limit_means_the_ceiling(field: str) -> None:
    """A job that asks for nothing gets no more than the ceiling."""
    settings = Config(defaults=NO_LIMITS)
    assert getattr(settings.limits({}), field) == getattr(CEILINGS, field)
    assert Config(NO_LIMITS, NO_LIMITS).limits({}) == NO_LIMITS


@pytest.mark.parametrize(
    "asked",
    [
        {"cpu_cores": 0.0},
        {"cpu_cores": 0.009},
        {"cpu_cores": -1.0},
        {"cpu_cores": math.nan},
        {"memory_bytes": 0},
        {"io_read_bps": 0},
        {"io_write_bps": 0},
        {"io_read_iops": 0},
        {"io_write_iops": 0},
        {"pids": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("settings", [Config(), _NO_CEILINGS], ids=["ceilings", "none"])
def test_senseless_limit_is_an_error(settings: Config, asked: dict[str, Any]) -> None:
    """The error has the field, the allowed range and the value."""
    ((field, value),) = asked.items()
    with pytest.raises(LimitError, match=rf"{field} must be at least [\d.]+, not {value}"):
        settings.limits(asked)


def test_endless_limit_is_an_error() -> None:
    """Infinity is above every ceiling; without a ceiling the kernel would not accept it."""
    with pytest.raises(LimitError, match=r"cpu_cores inf is above .* 8\.0"):
        Config().limits({"cpu_cores": math.inf})
    with pytest.raises(LimitError, match=r"cpu_cores must be at most [0-9]+, not inf"):
        Config(ceilings=NO_LIMITS).limits({"cpu_cores": math.inf})
