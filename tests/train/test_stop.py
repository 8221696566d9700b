"""A request to stop: at once while there is no step to lose, with a checkpoint afterwards."""

import signal
from collections.abc import Iterator

import pytest
from accelerate import PartialState
from transformers import TrainerControl

from llmtune.train.stop import Stop

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def stop() -> Iterator[Stop]:
    """A stop whose handlers are gone afterwards."""
    before = [signal.getsignal(number) for number in NUMBERS]
    PartialState(cpu=True)
    yield Stop()
    for number, handler in zip(NUMBERS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_before_the_first_step_a_stop_ends_at_once(stop: Stop, number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert not stop.asked


@pytest.mark.parametrize("number", NUMBERS)
def test_in_a_step_a_stop_waits_for_its_checkpoint_and_a_second_one_does_not(
    stop: Stop, number: signal.Signals
) -> None:
    control = TrainerControl()
    stop.on_step_begin(None, None, control)
    signal.raise_signal(number)
    stop.on_step_end(None, None, control)
    assert control.should_save
    assert control.should_training_stop
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
