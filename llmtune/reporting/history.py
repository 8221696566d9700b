"""What log.jsonl tells: losses, validations, rates, time and memory, however many pieces the run was trained in."""

from dataclasses import dataclass

from llmtune.reporting.values import JSON, mapping, number, text, whole
from llmtune.run_log import Record

Point = tuple[float, float]


@dataclass(frozen=True)
class History:
    """The steps of a run in order, each once, and its validations."""

    steps: list[Record]
    validations: list[Record]
    others: list[Record]

    @property
    def losses(self) -> list[Point]:
        """Training losses that are finite, by step."""
        return _points(self.steps, "loss")

    @property
    def validation_losses(self) -> list[Point]:
        """Validation losses that are finite, by step."""
        return _points(self.validations, "eval_loss")

    @property
    def speeds(self) -> list[Point]:
        """Tokens a second of steps that were timed, by step."""
        return [point for point in _points(self.steps, "tokens_per_s") if point[1] > 0]

    @property
    def last_step(self) -> int:
        """The last step that was logged, 0 for none."""
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def seconds(self) -> float | None:
        """Training time; None where it is not known."""
        return self._last("seconds")

    @property
    def tokens(self) -> float | None:
        """Tokens that were read; None where they are not known."""
        return self._last("tokens")

    @property
    def peak_memory_mb(self) -> float | None:
        """The most memory in use, in MiB; None where it is not known."""
        return max((value for record in self.steps if (value := number(record.get("peak_memory_mb")))), default=None)

    @property
    def rates(self) -> list[tuple[int, dict[int, float]]]:
        """Steps with their learning rates by distance."""
        by_step = ((record["step"], _rates(mapping(record.get("lr")))) for record in self.steps)
        return [(step, rates) for step, rates in by_step if rates]

    @property
    def notes(self) -> list[str]:
        """What training said of frozen blocks, and of rows that stay padded."""
        keys = ("frozen_blocks", "rows")
        return [note for record in self.others for key in keys if (note := text(record.get(key)))]

    @property
    def warnings(self) -> list[str]:
        """What training warned of, and the losses that are no finite numbers."""
        told = [warning for record in self.others if (warning := text(record.get("warning")))]
        return [*dict.fromkeys(told), *self._not_finite()]

    def _not_finite(self) -> list[str]:
        lines = []
        gaps = len(self.steps) - len(self.losses)
        if gaps:
            lines.append(f"{gaps:,} of {len(self.steps):,} training losses are not finite; they are not drawn.")
        lost = [record["step"] for record in self.validations if number(record["eval_loss"]) is None]
        if lost:
            steps = ", ".join(f"{step:,}" for step in lost[:8]) + (", ..." if len(lost) > 8 else "")
            lines.append(f"The validation loss is not finite at step {steps}.")
        return lines

    def _last(self, key: str) -> float | None:
        return next((value for record in reversed(self.steps) if (value := number(record.get(key)))), None)


def read_history(log: list[Record]) -> History:
    """Sort the records of a log; of a step that was logged twice, the later record counts."""
    known = [record for record in log if whole(record.get("step")) is not None]
    steps = {record["step"]: record for record in known if "loss" in record or "lr" in record}
    validations = {record["step"]: record for record in known if "eval_loss" in record}
    others = [record for record in known if {"frozen_blocks", "rows", "warning", "memory", "time"} & set(record)]
    return History([steps[step] for step in sorted(steps)], [validations[s] for s in sorted(validations)], others)


def _points(records: list[Record], key: str) -> list[Point]:
    return [(record["step"], value) for record in records if (value := number(record.get(key))) is not None]


def _rates(lr: JSON) -> dict[int, float]:
    """Return rates by distance, without what is no distance or no rate."""
    pairs = ((key, number(value)) for key, value in lr.items() if key.isascii() and key.isdecimal() and len(key) < 6)
    return {int(key): value for key, value in pairs if value is not None and value >= 0}
