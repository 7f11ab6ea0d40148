"""Begin a training with the plan that a search has found."""

from __future__ import annotations

import logging
from typing import Any

from oomguard.errors import NothingFitsError
from oomguard.levers import loader
from oomguard.levers.live import read_plan
from oomguard.search import find_plan

logger = logging.getLogger("oomguard")


def adopt_found(trainer: Any) -> None:
    """Search for the most rows a pass, and have `trainer` load as many.

    Only what was run is taken over. Where nothing fits, the trainer is left as it is: the ladder
    goes on from there.
    """
    try:
        found = find_plan(trainer)
    except NothingFitsError as error:
        logger.warning("find: %s", str(error))
        return
    before = read_plan(trainer)
    if found.measured is None:
        logger.warning("find: nothing is changed. %s", "; ".join(found.notes))
        return
    loader.load_rows(trainer, found.plan)
    logger.info("find: %s", before.describe_change(read_plan(trainer)))
