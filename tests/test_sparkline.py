"""A line of text that shows how memory went."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from oomguard.report.sparkline import ASCII, BLOCKS, sparkline


def test_heights_go_from_nothing_to_the_top() -> None:
    assert sparkline([0, 50, 100], top=100, width=9) == "▁▅█"
    assert sparkline([0, 50, 100], top=200, width=9) == "▁▃▅"


def test_a_peak_between_others_is_not_lost_where_there_is_little_room() -> None:
    sizes = [10] * 1000
    sizes[617] = 100
    assert sparkline(sizes, top=100, width=10).count("█") == 1


def test_no_sizes_are_no_text() -> None:
    assert sparkline([], top=100, width=10) == ""


@given(st.lists(st.integers(0, 2**40)), st.integers(0, 2**40), st.integers(1, 200))
def test_any_sizes_fit_into_the_width_in_marks_of_the_set(
    sizes: list[int], top: int, width: int
) -> None:
    for marks in (BLOCKS, ASCII):
        line = sparkline(sizes, top=top, width=width, marks=marks)
        assert len(line) == min(len(sizes), width)
        assert set(line) <= set(marks)
