"""What a comparison says: who wins and why, whatever finished, and what its table shows."""

import json
from typing import Any

import pytest

from llmtune.arms.stored import checked, read_comparison
from llmtune.arms.table import table
from llmtune.arms.times import seconds_to
from llmtune.arms.verdict import conclude
from llmtune.errors import RecipeError
from llmtune.files import write_json
from tests.support.comparisons import arm, baseline, comparison, curve, scratch


def test_best_score_wins_where_the_data_tell() -> None:
    known = conclude(comparison([arm("full", [0.3, 0.31], seconds=5), arm("lora", [0.6, 0.61])]))
    assert (known["winner"], known["ranking"]) == ("lora", ["lora", "full"])
    first, second, third = known["sentences"]
    assert first == ("lora wins: exact match 0.605 ± 0.035 on 200 held-out rows, mean of 2 seeds, the best of 2 arms.")
    assert second == "full (by 0.300 ± 0.032) is measurably worse."
    assert third == "It takes 1:40 a training, 1.0 GB of memory and a delta of 10.0 MB; no baseline was measured."
    assert json.loads(json.dumps(known))["winner"] == "lora"


@pytest.mark.parametrize(
    ("costs", "reason"),
    [
        ({"seconds": 50}, "it trains in the least time (0:50 against 1:40)"),
        ({"seconds": 95, "peak": 5 * 10**8}, "it takes the least memory (500 MB against 1.0 GB)"),
        ({"seconds": 95, "delta": 10**5}, "it has the smallest delta (100 kB against 10.0 MB)"),
    ],
)
def test_cheapest_wins_within_one_standard_error(costs: dict[str, Any], reason: str) -> None:
    known = conclude(comparison([arm("lora", 0.61), arm("frozen", 0.605, **costs)]))
    assert known["winner"] == "frozen"
    assert "within one standard error of the best, lora" in known["sentences"][0]
    assert reason in known["sentences"][1]
    assert "rows could tell" in known["sentences"][1]
    assert "One seed an arm" in known["notes"][0]


def test_farther_arms_lose_by_score_though_the_data_cannot_tell() -> None:
    """Nine rows of 200 apart, on rows that both could have right: not measured, and more than one standard error."""
    near = arm("frozen", 0.6, seconds=10)
    near["seeds"][0]["rows"]["score"][:9] = [0.0] * 9
    near["seeds"][0]["rows"]["score"][150:155] = [1.0] * 5
    known = conclude(comparison([arm("lora", 0.6), near, arm("full", 0.1), arm("ia3", 0.1)]))
    assert known["winner"] == "lora"
    assert known["sentences"][1].startswith("No difference was measured to frozen (0.020 ± 0.019; about 1,400 rows")


def test_says_that_a_baseline_beats_every_arm() -> None:
    arms, baselines = [arm("lora", 0.5), arm("full", 0.2)], [baseline("tf-idf", 0.8), baseline("zero-shot", 0.0)]
    known = conclude(comparison(arms, baselines))
    assert known["sentences"][2].endswith(
        "but a linear model over TF-IDF (by 0.300 ± 0.032) is measurably better than every arm."
    )
    cells = {row["arm"]: row["verdict"] for row in table(comparison(arms, baselines), known)}
    assert cells["tf-idf"] == "better than every arm: +0.300 ± 0.032"
    assert cells["zero-shot"].startswith("worse than the best arm: -0.5")


def test_shows_the_three_advantages() -> None:
    arms = [arm("lora", 0.6), arm("lora", 0.4, size=0.1)]
    scratches = [scratch(0.2, end=2.5), scratch(0.1, size=0.1)]
    known = conclude(comparison(arms, [baseline("zero-shot", 0.1), *scratches]))["advantages"]
    assert [one["difference"] for one in known["transfer"]["gaps"]] == pytest.approx([0.4, 0.3])
    assert "+0.300 ± 0.032 with 10% of the rows" in known["transfer"]["words"]
    assert known["better"]["gaps"][0]["difference"] == pytest.approx(0.5)
    assert known["quicker"]["seconds"] == {"tuned": 25.0, "scratch": 100.0}
    assert known["quicker"]["words"].endswith("in 0:25 against 1:40, 4.0 times as fast")
    without = conclude(comparison(arms))["advantages"]
    assert all("--baselines" in one["words"] and not one["measured"] for one in without.values())


def test_time_to_ninety_percent_counts_from_the_same_start() -> None:
    known = conclude(comparison([arm("lora", 0.6, end=1.0), arm("full", 0.5, end=2.0)]))["results"]
    assert [one["seconds_to_90"] for one in known] == [90.0, None]
    assert seconds_to(curve(100, 1.0), 3.5) == 0.0


def test_tells_of_what_failed_and_of_a_rate_at_the_edge() -> None:
    tries = [
        {"lr": f * 1e-3, "factor": f, "steps": 9, "seconds": 1.0, "loss": 3 - f, "state": "complete"}
        for f in (0.3, 1.0)
    ]
    failed: Any = {"name": "qlora", "set": [], "size": 1.0, "status": "failed", "reason": "no GPU"}
    arms = [arm("lora", 0.6, search=tries, limited="3 times the epochs"), failed]
    known = conclude(comparison(arms))
    assert "The best rate of lora lies at the upper end of those tried; one beyond may be better" in known["notes"]
    assert "failed: qlora" in known["notes"]
    assert "lora ended before its minutes were over: 3 times the epochs" in known["notes"]
    assert known["sentences"][1] == "There is no other arm to compare it with."
    assert table(comparison(arms), known)[-1]["verdict"] == "failed: no GPU"
    nothing = conclude(comparison([failed]))
    assert (nothing["winner"], nothing["sentences"]) == (
        None,
        ["No arm has a score, so none wins.", "qlora: no GPU."],
    )


def test_one_held_out_row_has_differences_and_tells_nothing() -> None:
    """A row that both scored has a difference; none that both scored has none, and no number is made up."""
    arms, baselines = [arm("lora", 1.0, n=1), arm("full", 0.0, n=1)], [scratch(0.0, n=1)]
    known = conclude(comparison(arms, baselines))
    assert known["sentences"][0] == "lora wins: exact match 1.000 on 1 held-out row, the best of 2 arms."
    assert known["sentences"][1] == "No difference was measured to full (1.000; one row cannot tell)."
    assert "random weights (apart by 1.000)" in known["sentences"][2]
    assert table(comparison(arms, baselines), known)[1]["verdict"] == "too few rows to tell: -1.000"
    apart = [arm("lora", 1.0, n=2), arm("full", 0.0, n=2)]
    apart[0]["seeds"][0]["rows"]["score"][0] = apart[1]["seeds"][0]["rows"]["score"][1] = None
    known = conclude(comparison(apart))
    assert known["sentences"][1] == "No difference was measured to full (no row was scored by both)."
    assert table(comparison(apart), known)[1]["verdict"] == "too few rows to tell: no row was scored by both"


def test_lower_loss_wins_on_plain_texts() -> None:
    known = conclude(comparison([arm("a", 0.2), arm("b", 0.8)], metric="loss", higher_is_better=False))
    assert known["winner"] == "b"
    assert known["sentences"][0].startswith("b wins: loss 1.200")


def test_reads_back_what_is_whole_and_names_what_is_not(tmp_path: Any) -> None:
    whole = comparison([arm("lora", 0.5)], [scratch(0.1)])
    write_json(tmp_path / "compare.json", whole)
    assert read_comparison(tmp_path) == whole
    with pytest.raises(RecipeError, match=r"compare\.json: arms\.0\.status: field required"):
        checked({**whole, "arms": [{"name": "x", "set": [], "size": 1.0}]}, "compare.json")
    with pytest.raises(RecipeError, match="full has scores of 50 rows, lora of 200"):
        checked(comparison([arm("lora", 0.5), arm("full", 0.5, n=50)]), "compare.json")
    with pytest.raises(RecipeError, match=r"holds no compare\.json"):
        read_comparison(tmp_path / "none")
    (tmp_path / "compare.json").write_text("{")
    with pytest.raises(RecipeError, match=r"compare\.json: cannot be read"):
        read_comparison(tmp_path)
