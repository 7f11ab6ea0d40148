"""How many tokens a step trains on, told by the shapes of what the model is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from oomguard.watch.quiet import Quiet

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class TokenCount:
    """Counts padded tokens of the forward passes that are trained on, as a hook before them.

    It looks at shapes only, so it waits for no device. Compiled code has no trace of it: there
    nothing is counted. A model that is copied or pickled while it is counted takes a copy along.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._quiet = Quiet("Not all tokens are counted")

    def attach(self, model: torch.nn.Module) -> RemovableHandle:
        """Count from here on until the handle is removed."""
        return model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Add the tokens of one pass."""
        if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
            return
        with self._quiet:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if isinstance(ids, torch.Tensor) and not ids.is_floating_point():
                self._tokens += ids.numel()
            elif isinstance(embeds := kwargs.get("inputs_embeds"), torch.Tensor):
                self._tokens += embeds.shape[:-1].numel()

    def take(self) -> int | None:
        """Tokens since the last call; `None` where none were seen."""
        tokens, self._tokens = self._tokens, 0
        return tokens or None
