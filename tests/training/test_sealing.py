"""What completes a checkpoint beside the training: its failures are told, and hide no other one."""

import errno
import os

import pytest

from llmtune.errors import TrainingError
from llmtune.training.sealing import Sealing


def fail() -> None:
    """Be a checkpoint that the disk has no room for."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def train(ends_with: BaseException | None) -> None:
    """Train with a checkpoint that cannot be completed, up to an error."""
    with Sealing() as sealing:
        with sealing.after_the_last(beside=True) as then:
            then(fail)
        if ends_with is not None:
            raise ends_with


def test_a_failure_at_the_end_of_a_training_is_raised() -> None:
    with pytest.raises(OSError, match="No space left"):
        train(ends_with=None)


@pytest.mark.parametrize("error", [TrainingError("the loss is nan"), KeyboardInterrupt("again")])
def test_a_failure_is_told_beside_what_ended_the_training_and_not_in_its_place(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(type(error)) as caught:
        train(ends_with=error)
    assert caught.value is error
    line = "llmtune: the newest checkpoint could not be completed: [Errno 28] No space left on device\n"
    assert capsys.readouterr().err == line
