"""Every rule of advice.yaml holds for its case and is silent for the other one; together they advise as measured."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtune.advising import first
from llmtune.advising.choice import choose
from llmtune.advising.facts import Facts
from llmtune.advising.first import CANDIDATES, first_advice
from llmtune.advising.recall import Remembered, Score
from llmtune.advising.rules import ADVICE, Rule, applying, load_rules
from llmtune.errors import RecipeError

RULES = load_rules()
SMALL: dict[str, Any] = {"parameters": 135_000_000, "device": "cpu", "rows": 2000, "epochs": 2, "lora_fits": True}
RULE = {
    "id": "one",
    "when": {"rows": {"below": 10}},
    "advice": "try it",
    "source": "a paper",
    "confidence": "low",
    "case": {"fires": {"rows": 1}, "silent": {"rows": 10}},
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_rule_fires_and_is_silent_in_its_cases(rule: Rule) -> None:
    assert rule.holds(Facts(**rule.case.fires))
    assert not rule.holds(Facts(**{**rule.case.fires, **rule.case.silent}))
    assert not rule.holds(Facts())  # what is not known meets no condition


@pytest.mark.parametrize(
    ("facts", "advised"),
    [
        ({"kind": "labels"}, "frozen"),
        ({"kind": "labels", "minutes": 4}, "frozen"),
        ({"kind": "labels", "device": "gpu"}, "lora"),
        ({"kind": "json", "rows": 700}, "frozen"),
        ({"kind": "json", "rows": 20_000, "minutes": 60}, "lora"),
        ({"kind": "json", "device": "gpu"}, "lora"),
        ({"kind": "text"}, "lora"),
        ({"kind": "text", "parameters": 8_000_000_000, "device": "gpu", "lora_fits": False}, "qlora"),
        ({"kind": "text", "parameters": 8_000_000_000, "device": "gpu", "rows": 200_000}, "full"),
    ],
)
def test_advises_what_was_measured_best(facts: dict[str, Any], advised: str) -> None:
    choice = choose(CANDIDATES, applying(RULES, Facts(**{**SMALL, **facts})))
    assert choice is not None
    assert choice.arm == advised
    assert "confidence" in choice.reason


@pytest.mark.parametrize(("free", "fits"), [(3000, True), (2999, False)])
def test_init_counts_the_memory_that_a_container_leaves(monkeypatch: pytest.MonkeyPatch, free: int, fits: bool) -> None:
    known: list[Facts] = []

    def applying(_: object, facts: Facts) -> list[Rule]:
        known.append(facts)
        return []

    monkeypatch.setattr(first, "applying", applying)
    monkeypatch.setattr(first, "parameters_of", lambda _: 1000)
    monkeypatch.setattr(first, "count_gpus", lambda: 0)
    monkeypatch.setattr(first, "free_memory", lambda: free)
    first_advice("base", 2000, "text", 0, 2)
    assert [one.lora_fits for one in known] == [fits]


def test_what_was_measured_on_like_data_goes_before_rules_and_differences_within_errors_do_not() -> None:
    rules = applying(RULES, Facts(**{**SMALL, "kind": "labels"}))

    def advised(lora: float, error: float, higher: bool = True) -> str:
        arms = {"frozen": Score(0.5, error, 2.0), "lora": Score(lora, error, 4.0)}
        before = Remembered("2026-11-27", "m", 10, "labels", 2000, 9, 30, "exact_match", higher, arms)
        choice = choose(("lora", "frozen"), rules, [before])
        assert choice is not None
        assert "compare measured on 2026-11-27" in choice.reason
        return choice.arm

    assert advised(0.8, 0.02) == "lora"
    assert advised(0.8, 0.02, higher=False) == "frozen"
    assert advised(0.52, 0.02) == "frozen"
    # What was measured and does not fit is no advice.
    assert choose([], rules) is None


@pytest.mark.parametrize(
    ("change", "line", "words"),
    [
        ({"when": {"rowz": 5}}, 3, "rules.0.when.rowz: rule one: there is no fact rowz; did you mean 'rows'?"),
        ({"when": {"rows": {"under": 5}}}, 3, "a range is {from: A}, {below: B}, or both, in numbers"),
        ({"when": {"kind": "label"}}, 3, "kind is one of labels, json, text"),
        ({"about": "lorra"}, 2, "no method lorra; did you mean 'lora'?"),
        ({"prefer": 2}, 2, "speaks of no method"),
        ({"confidence": "sure"}, 2, "rule one: Input should be 'high', 'medium' or 'low'"),
        ({"case": {"fires": {"rows": [1, 2]}, "silent": {}}}, 2, "a fact is one value"),
        ({"case": None}, 2, "rules.0.case"),
    ],
)
def test_bad_rule_is_named_with_its_line(tmp_path: Path, change: dict[str, Any], line: int, words: str) -> None:
    file = tmp_path / "advice.yaml"
    file.write_text(yaml.safe_dump({"rules": [{**RULE, **change}]}, sort_keys=False))
    with pytest.raises(RecipeError) as caught:
        load_rules(file)
    assert str(caught.value).startswith(f"{file}:")
    assert words in str(caught.value)
    at = int(str(caught.value).split(":")[1])
    assert at >= line


def test_every_rule_says_who_says_so() -> None:
    assert ADVICE.is_file()
    assert len({rule.id for rule in RULES}) == len(RULES) >= 30
    assert all(rule.source and rule.advice for rule in RULES)
