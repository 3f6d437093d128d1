"""Tests of sizes, times and addresses as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from units import format_size, join_address, parse_address, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("0", 0), ("1", 1), ("4096", 4096), ("7B", 7), ("7 B", 7)),
        *(("1K", 1024), ("64k", 65536), ("256M", 256 << 20), ("2G", 2 << 30), ("1T", 1 << 40)),
        *(("1.5G", 3 << 29), ("0.5K", 512), ("256MB", 256 << 20), ("256MiB", 256 << 20)),
        *(("256 mib", 256 << 20), (" 1.5 GiB ", 3 << 29), ("1.0001K", 1024)),
    ],
)
def test_size_is_understood(text: str, size: int) -> None:
    """A number, possibly with a point, and a power of 1024. Fractions of a byte are dropped."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "M", "x", "1X", "1P", "-1", "+1", "1e3", "0x10", "1_000", "1,5G", ".5G", "1."),
        *("1.5.5", "1 2", "1 K B", "KiB", "1iM", "nan", "inf", "unlimited", "\u0663", "9" * 400),
        *("1M/s", "1M\n1", str(1 << 63), "8388608T"),
    ],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    """The error has the text and the right form. Sizes beyond 63 bits are refused too."""
    with pytest.raises(ValueError, match=r"is not a size; write .* 64K, 256M, 1\.5G") as caught:
        parse_size(text)
    assert str(caught.value).startswith(repr(text))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("0", 0), ("90", 90), ("1.5", 1.5), ("30s", 30), ("30m", 1800), ("12h", 43_200)),
        *(("7d", 604_800), ("2w", 1_209_600), ("7 D", 604_800), (" 0.5h ", 1800)),
    ],
)
def test_time_is_understood(text: str, seconds: float) -> None:
    """A number, possibly with a point, and a unit from seconds to weeks. No unit means seconds."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "d", "7x", "-1", "+1", "1e3", "1_000", "1,5h", ".5h", "1.", "1 2", "7 days"),
        *("1h30m", "7dd", "nan", "inf", "unlimited", "\u0663", "9" * 400, "1M\n1", str(1 << 63)),
    ],
)
def test_what_is_no_time_is_refused(text: str) -> None:
    """The error has the text and the right form."""
    with pytest.raises(ValueError, match=r"is not a time; write .* 30m, 12h, 7d") as caught:
        parse_duration(text)
    assert str(caught.value).startswith(repr(text))


@pytest.mark.parametrize(
    ("size", "text"),
    [
        *((0, "0 bytes"), (1, "1 bytes"), (1023, "1023 bytes"), (1024, "1 KiB")),
        *((1536, "1.5 KiB"), (50 << 20, "50 MiB"), (3 << 29, "1.5 GiB"), (1 << 40, "1 TiB")),
        *(((1 << 30) - 1, "1024 MiB"), (123_456_789, "117.7 MiB")),
    ],
)
def test_size_is_shown_in_its_largest_unit(size: int, text: str) -> None:
    """It has up to four digits."""
    assert format_size(size) == text


@given(st.integers(min_value=1024, max_value=1000 << 40))
def test_shown_size_can_be_typed_in_again(size: int) -> None:
    """The result differs only by the rounding to four digits."""
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.0006, abs=1)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:50051", ("127.0.0.1", 50051)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_address_is_understood_and_can_be_joined_again(text: str, address: tuple[str, int]) -> None:
    """An IPv6 address has brackets in the text only."""
    assert parse_address(text) == address
    assert join_address(*address) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "localhost", "localhost:", ":50051", "127.0.0.1:x", "127.0.0.1:-1", "::1"),
        *("127.0.0.1:65536", "::1:50051", "[::1]", "[127.0.0.1]:0", "[]:0", "127.0.0.1:1:2"),
        *("localhost:\u0663", "localhost:1 ", "unix:/run/socket"),
    ],
)
def test_text_that_is_not_host_and_port_is_refused(text: str) -> None:
    """The error shows the text and the right form."""
    with pytest.raises(ValueError, match=r"is not HOST:PORT, like 127\.0\.0\.1:50051") as caught:
        parse_address(text)
    assert str(caught.value).startswith(repr(text))
