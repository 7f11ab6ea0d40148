"""What a person is told of growing memory."""

from __future__ import annotations

import pytest

from oomguard.watch.creep import Creep
from oomguard.watch.inquiry import Conclusion
from oomguard.watch.wording import tell


@pytest.mark.parametrize(
    ("full", "said"),
    [
        (None, ""),
        ((530, 530), " At this rate it is full at step 530."),
        ((9200, 11400), " At this rate it is full between steps 9,200 and 11,400."),
    ],
)
def test_when_the_card_is_full_is_one_step_or_between_two(
    full: tuple[int, int] | None, said: str
) -> None:
    creep = Creep(
        bytes_per_step=2 * 2**20,
        steps=100,
        bytes_so_far=200 * 2**20,
        phase="train",
        full_at_step=full,
        confidence=0.9,
        since_step=33,
    )
    message = tell(Conclusion(creep), 133, "GPU memory").message
    assert message.startswith(
        "GPU memory grows by 2.00 MiB a step since step 33, 200.00 MiB so far, in the training "
        f"steps.{said} What to do: "
    )
