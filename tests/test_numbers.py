"""Numbers for people: one way to write each kind."""

import pytest

from llmtune.numbers import count, duration, number, rate, size


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (6.6, "0:07"), (201, "3:21"), (3599.6, "1:00:00"), (3723, "1:02:03")]
)
def test_durations_read_as_on_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (950, "950"),
        (12_345, "12,345"),
        (999_949, "999,949"),
        (999_950, "1M"),
        (4_884_480, "4.884M"),
        (134_515_008, "134.5M"),
        (999_949_999, "999.9M"),
        (999_950_000, "1B"),
        (8.03e9, "8.03B"),
        (1.2e12, "1200B"),
    ],
)
def test_counts_keep_four_digits(value: float, text: str) -> None:
    assert count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-3, "1e-3"), (2.5e-4, "2.5e-4"), (1.26e-5, "1.3e-5"), (0.0, "0"), (3.0, "3e0"), (float("inf"), "inf")],
)
def test_rates_keep_two_digits(value: float, text: str) -> None:
    assert rate(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.7, "1.0 kB"),
        (1500, "1.5 kB"),
        (99_940, "99.9 kB"),
        (99_960, "100 kB"),
        (999_400, "999 kB"),
        (999_600, "1.0 MB"),
        (269_000_000, "269 MB"),
        (2.5e12, "2.5 TB"),
    ],
)
def test_sizes_count_in_powers_of_1000(value: float, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "yes"), (False, "no"), (None, "none"), (12_345, "12,345"), (0.123456, "0.1235"), ("bf16", "bf16")],
)
def test_values_of_json_files_read_as_text(value: object, text: str) -> None:
    assert number(value) == text
