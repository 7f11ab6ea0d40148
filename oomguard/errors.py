"""The errors a user can meet; every one says what to change."""

from __future__ import annotations

import torch


class OomguardError(Exception):
    """Base of all errors that oomguard raises on its own account."""


class ConfigurationError(OomguardError, ValueError):
    """A ladder, plan or setting that cannot work; raised before training starts."""


class NothingFitsError(ConfigurationError):
    """A search found no plan that fits the card."""


class UnsupportedTrainerError(OomguardError, TypeError):
    """A trainer, or a setting of it, under which a recovery could not be exact."""


class LadderExhaustedError(OomguardError, torch.OutOfMemoryError):
    """Memory ran out and no rung was left to take.

    It is a `torch.OutOfMemoryError` too, so that code which handles those keeps working. Weights,
    optimizer state and data position are those after the last complete optimizer step.
    """
