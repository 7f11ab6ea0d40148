"""Draws the second step of an estimate: allocated bytes by category.

    python benchmarks/timeline.py docs/prediction.svg

Needs matplotlib.
"""

from __future__ import annotations

import sys

import matplotlib as mpl
from matplotlib import pyplot as plt
from transformers import LlamaConfig

from oomguard import Estimate, estimate
from oomguard.memory.timeline import Mark
from oomguard.prediction.result import CATEGORIES

_GIB = 2**30
_POINTS = 500
_PARTS = CATEGORIES[:-1]
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)


def curves(found: Estimate) -> tuple[list[list[float]], list[tuple[int, str]]]:
    """GiB of each category after every event of the second step, and where its phases begin."""
    if found.timeline is None:
        return [], []
    events = found.timeline.events
    begins = [i for i, event in enumerate(events) if event == Mark("forward")]
    live: dict[int, int] = {}
    now = dict.fromkeys(_PARTS, 0)
    rows: list[list[float]] = []
    marks: list[tuple[int, str]] = []
    for index, event in enumerate(events):
        if isinstance(event, Mark):
            if index >= begins[-1] and event.phase in {"forward", "backward", "optimizer step"}:
                marks.append((len(rows), event.phase))
            continue
        key, nbytes = event
        size = live.pop(key) if nbytes < 0 else nbytes
        now[found.timeline.category[key]] += -size if nbytes < 0 else size
        if nbytes >= 0:
            live[key] = nbytes
        if index >= begins[-1]:
            rows.append([now[part] / _GIB for part in _PARTS])
    step = -(-len(rows) // _POINTS)
    return rows[::step], [(position // step, phase) for position, phase in marks]


def main() -> None:
    """Draw."""
    found = estimate(
        LLAMA_8B,
        quantization="nf4",
        max_length=2048,
        gradient_checkpointing=True,
        card="H100 80GB HBM3",
    )
    rows, marks = curves(found)
    mpl.rcParams["svg.hashsalt"] = "oomguard"
    figure, axes = plt.subplots(figsize=(9, 4))
    labels = [part.replace("_", " ") for part in _PARTS]
    axes.stackplot(range(len(rows)), *zip(*rows, strict=True), labels=labels, rasterized=False)
    for position, phase in marks:
        axes.axvline(position, color="black", linewidth=0.5)
        axes.annotate(phase, (position, axes.get_ylim()[1]), fontsize=8, rotation=20)
    axes.set_xlabel("one optimizer step, allocation by allocation")
    axes.set_xticks([])
    axes.set_ylabel("allocated (GiB)")
    axes.set_xlim(0, len(rows))
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.subplots_adjust(bottom=0.28)
    figure.savefig(sys.argv[1], metadata={"Date": None})


if __name__ == "__main__":
    main()
