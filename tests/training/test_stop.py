"""A request to stop: at once while there is no step to lose, with a checkpoint afterwards."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate import PartialState
from transformers import TrainerControl, TrainerState, TrainingArguments

from llmtune.launch.process import EXIT_FILE
from llmtune.training.stop import IN_STEPS, Stop

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
def test_stops_at_once_before_the_first_step(stop: Stop, number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert not stop.requested


@pytest.mark.parametrize("number", NUMBERS)
def test_waits_for_the_checkpoint_in_a_step_unless_stopped_twice(
    stop: Stop, number: signal.Signals, tmp_path: Path
) -> None:
    args, state, control = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerState(), TrainerControl()
    stop.on_step_begin(args, state, control)
    signal.raise_signal(number)
    stop.on_step_end(args, state, control)
    assert control.should_save
    assert control.should_training_stop
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


def test_answers_in_words_that_say_what_a_stop_leads_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    monkeypatch.setenv(EXIT_FILE, str(tmp_path / "code"))
    PartialState(cpu=True)
    stop = Stop()
    assert not (tmp_path / "code.answer").exists()  # it would end at once
    stop.on_step_begin(TrainingArguments(output_dir=str(tmp_path)), TrainerState(), TrainerControl())
    assert (tmp_path / "code.answer").read_text() == IN_STEPS
    assert "press Ctrl-C again to end at once" in IN_STEPS
    for number, handler in zip(NUMBERS, before, strict=True):
        signal.signal(number, handler)


def test_signal_after_another_process_asked_to_stop_is_no_second_one(stop: Stop, tmp_path: Path) -> None:
    stop.on_step_begin(TrainingArguments(output_dir=str(tmp_path)), TrainerState(), TrainerControl())
    stop.requested = True  # as the processes agree at a step's end
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
