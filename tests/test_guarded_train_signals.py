"""A supervised training that is told to stop: it ends in a checkpoint, or at once."""

from __future__ import annotations

import functools
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests import tiny
from tests.lives import Event, lives, make, steps_made, undisturbed

if TYPE_CHECKING:
    from pathlib import Path

    import torch


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return lives(tmp_path / "journal", monkeypatch)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return undisturbed(tmp_path_factory.mktemp("twin"))


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_ends_in_a_checkpoint_from_which_nothing_is_lost(
    number: signal.Signals,
    error: type[BaseException],
    tmp_path: Path,
    life: Any,
    twin: dict[str, torch.Tensor],
) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    life()
    trainer = make(tmp_path, Event(2, functools.partial(signal.raise_signal, number)))
    with pytest.raises(error) as raised:
        trainer.train()
    if error is SystemExit:
        assert raised.value.args == (143,)
    assert max(path.name for path in tmp_path.glob("checkpoint-*")) == "checkpoint-3"
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    life()
    trainer = make(tmp_path)
    steps_made(trainer)
    trainer.train()
    assert trainer.made == [4, 5, 6]
    assert tiny.largest_difference(tiny.weights(trainer), twin) == 0


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, life: Any) -> None:
    def press_twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    life()
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Event(1, press_twice)).train()
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_a_signal_handler_of_the_scripts_own_stays(tmp_path: Path, life: Any) -> None:
    seen: list[int] = []
    former = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        life()
        trainer = make(tmp_path, Event(1, lambda: signal.raise_signal(signal.SIGTERM)), max_steps=2)
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, former)
    assert seen == [signal.SIGTERM]
    assert trainer.state.global_step == 2
