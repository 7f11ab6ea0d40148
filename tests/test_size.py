import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomguard.errors import ConfigurationError
from oomguard.memory.size import format_bytes, parse_bytes

POWERS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "MB": 10**6, "GB": 10**9}


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("2GiB", 2 * 2**30),
        ("512MiB", 512 * 2**20),
        ("1.5 GiB", 3 * 2**29),
        (" 100 bytes ", 100),
        ("0 bytes", 0),
        ("12 gib", 12 * 2**30),
        ("24GB", 24 * 10**9),
        ("4096", 4096),
        ("0.3 KiB", 307),
    ],
)
def test_a_size_is_read(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@given(st.integers(min_value=0, max_value=10**6), st.sampled_from(sorted(POWERS)))
def test_a_whole_number_of_units_is_exact(count: int, unit: str) -> None:
    assert parse_bytes(f"{count}{unit}") == count * POWERS[unit]
    assert parse_bytes(f"{count}.00 {unit.upper()}") == count * POWERS[unit]


@given(st.integers(min_value=0))
def test_bytes_as_a_number_stay_as_they_are(size_bytes: int) -> None:
    assert parse_bytes(size_bytes) == size_bytes


@given(st.integers(min_value=0, max_value=2**50))
def test_a_printed_size_reads_back_to_its_two_decimals(size_bytes: int) -> None:
    text = format_bytes(size_bytes)
    unit_bytes = {"bytes": 1, **POWERS}[text.split(" ")[1]]
    assert abs(parse_bytes(text) - size_bytes) <= 0.005 * unit_bytes + 1


@given(st.text())
def test_any_other_text_is_refused_as_a_configuration_error(text: str) -> None:
    refusal = ""
    try:
        assert parse_bytes(text) >= 0
    except ConfigurationError as error:
        refusal = str(error)
    assert not refusal or refusal.startswith(f"{text!r} is not a size")


@pytest.mark.parametrize(
    "wrong", [-1, True, 2.5, None, "", "GiB", "2 G", "-1GiB", "1e3", "2GiBs", "1,5 GiB", "٣GiB"]
)
def test_what_is_no_size_is_a_value_error(wrong: int | str) -> None:
    with pytest.raises(ValueError, match="is not a size: give"):
        parse_bytes(wrong)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 bytes"),
        (1024, "1024 bytes"),
        (1025, "1.00 KiB"),
        (20 * 2**20, "20.00 MiB"),
        (2**30, "1024.00 MiB"),
        (2 * 2**30, "2.00 GiB"),
        (84946124800, "79.11 GiB"),
    ],
)
def test_sizes_print_as_in_the_messages_of_pytorch(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text
