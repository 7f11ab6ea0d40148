from __future__ import annotations

import sysconfig
from typing import Any

from oomguard.watch.stacks import allocated_by_site, growing_sites

LIBRARY = f"{sysconfig.get_path('purelib')}/torch/nn/functional.py"


def block(size: int, *frames: tuple[str, int, str], state: str = "active_allocated") -> Any:
    told = [{"filename": name, "line": line, "name": called} for name, line, called in frames]
    return {"size": size, "state": state, "frames": told}


STEP = (("train.py", 41, "on_step_end"), ("train.py", 90, "main"))


def test_the_lines_of_ones_own_code_that_allocated_more_are_told_the_most_first() -> None:
    weights = block(1000, ("model.py", 3, "load"))
    before = [{"blocks": [weights, block(10, (LIBRARY, 7, "linear"), *STEP)]}]
    after = [
        {"blocks": [weights, *[block(10, (LIBRARY, 7, "linear"), *STEP)] * 5]},
        {"blocks": [block(20, ("eval.py", 5, "evaluate"))]},
    ]
    assert growing_sites(allocated_by_site(before), allocated_by_site(after)) == (
        "train.py:41 on_step_end < train.py:90 main",
        "eval.py:5 evaluate",
    )


def test_free_blocks_and_those_without_frames_are_left_out() -> None:
    blocks = [block(5, *STEP, state="inactive"), block(5), {"size": 5, "state": "active_allocated"}]
    assert not allocated_by_site([{"blocks": blocks}])


def test_where_no_code_is_ones_own_the_librarys_is_told() -> None:
    (site,) = allocated_by_site([{"blocks": [block(5, (LIBRARY, 7, "linear"))]}])
    assert site == ("functional.py:7 linear",)
