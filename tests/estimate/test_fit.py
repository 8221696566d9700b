"""`llmtune plan --gpu` says whether a recipe fits a card, which nearest recipe does, and how long it takes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune import terminal
from llmtune.advising import here
from llmtune.cli import main
from llmtune.data.row import Row
from llmtune.errors import RecipeError
from llmtune.estimate import activations
from llmtune.estimate.cards import CARDS, CONTEXT, Card, find_card
from llmtune.estimate.fit import changes
from llmtune.estimate.lengths import estimated
from llmtune.recipe.sections import Recipe
from tests.support import tiny

FULL, LORA = {"kind": "full", "lr": 1e-3}, {"kind": "full", "lr": 1e-3, "adapter": {"kind": "lora", "rank": 4}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 0.4 million parameters."""
    return tiny.save_base(tmp_path_factory.mktemp("base"), blocks=2, hidden=128, tied=False)


def ask(folder: Path, base: Path, method: dict[str, Any], *words: str, **sections: Any) -> list[str]:
    """The words of a command that plans a recipe."""
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.sums(40))
    file = tiny.write_recipe(folder / "recipe.json", base, rows, method, **sections)
    return ["plan", str(file), *words]


def card(monkeypatch: pytest.MonkeyPatch, megabytes: float) -> None:
    """Let there be a card named small with so much memory for a run."""
    monkeypatch.setitem(CARDS, "small", Card("small", CONTEXT + round(megabytes * 1e6), 1e12))
    monkeypatch.setattr(terminal.console, "width", 200)


def answer(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The memory that a command tells as JSON."""
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    return {**plan["memory"], "steps": plan["steps"]}


def test_recipe_that_fits_is_told_with_pass_and_time(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card(monkeypatch, 1000)
    words = ask(tmp_path, base, FULL, "--gpu", "small", eval={"suite": "quick"})
    memory = answer(words, capsys)
    assert memory["pass"]["checkpointing"] is False
    # Two blocks as small wait for their launches.
    assert memory["seconds"] == pytest.approx(memory["steps"] * 2 * 0.003)
    (stage,) = memory["stages"]
    assert stage["gradients"] * 2 < stage["optimizer"]
    assert memory["evaluation"] > 2**31  # answers alone take 2 GiB
    assert memory["fits"] is False
    assert main(words) == 0
    assert "it does not fit: training fits, the evaluation needs 2.1 GB at the least" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("megabytes", "instead"),
    [(5.5, ["train.optimizer=adamw_8bit"]), (1.95, ["method=lora", "model.quantize=4bit"])],
)
def test_nearest_recipe_that_fits_is_told(
    tmp_path: Path,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    megabytes: float,
    instead: list[str],
) -> None:
    card(monkeypatch, megabytes)
    words = ask(tmp_path, base, FULL, "--gpu", "small", model={"base": str(base), "precision": "bf16"})
    memory = answer(words, capsys)
    assert memory["fits"] is False
    assert memory["missing"].startswith("one row of ")
    assert memory["instead"]["set"] == instead
    assert memory["instead"]["fits"] is True


def test_this_machine_is_told_what_lowers_it_and_rough_figures_are_said(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(activations, "_measured", refuse)
    monkeypatch.setattr(here, "free_bytes", lambda device: 10**5)
    monkeypatch.setattr(terminal.console, "width", 400)
    assert main(ask(tmp_path, base, FULL)) == 0
    output = capsys.readouterr().out
    assert "it does not fit: one row of " in output
    assert "what lowers it: data.max_length" in output
    assert "no change of the recipe" not in output  # none was tried
    assert "activations are judged by the shapes of matrices" in output


def test_changes_go_from_the_least_to_the_most() -> None:
    sections = {"model": {"base": "x"}, "data": {"train": "y"}}
    heavy = {"activation_checkpointing": False, "micro_batch_size": 4}
    first = ["train.activation_checkpointing=auto", "train.micro_batch_size=1", "train.micro_batch_tokens=null"]
    lora = {**sections, "method": LORA, "train": heavy}
    assert list(changes(Recipe.model_validate(lora))) == [first, [*first, "model.quantize=4bit"]]
    assert list(changes(Recipe.model_validate({**sections, "method": FULL}))) == [
        ["train.optimizer=adamw_8bit"],
        ["method=lora"],
        ["method=lora", "model.quantize=4bit"],
    ]


def test_plan_without_a_card_judges_this_machine(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal.console, "width", 200)
    words = ask(tmp_path, base, LORA)
    assert main(words) == 0
    output = capsys.readouterr().out
    assert "memory on this machine, " in output
    assert "it fits: passes of up to " in output
    assert "estimated from characters; llmtune check counts tokens" in output
    assert main(["check", *words[1:]]) == 0
    assert "estimated" not in capsys.readouterr().out


def test_plan_on_a_machine_with_a_known_card_tells_the_time(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(here, "launch_device", lambda launch: torch.device("cuda", 0))
    monkeypatch.setattr(here, "free_bytes", lambda device: 10**10)
    monkeypatch.setattr(here, "card_rate", lambda device: 1e12)
    monkeypatch.setattr(terminal.console, "width", 300)
    words = ask(tmp_path, base, FULL, model={"base": str(base), "precision": "bf16"})
    memory = answer(words, capsys)
    assert memory["seconds"] == pytest.approx(memory["steps"] * 2 * 0.003)
    assert main(words) == 0
    output = capsys.readouterr().out
    assert "memory on this machine's cuda:0, 10.0 GB free" in output
    assert "at 40% of the rate that its maker states" in output


def test_unknown_card_is_one_line_with_the_nearest(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(ask(tmp_path, base, FULL, "--gpu", "a100-8")) == 2
    assert capsys.readouterr().err.splitlines() == [
        "llmtune: --gpu a100-8: is no card that llmtune knows; did you mean 'a100-80'? A number of GB is taken too"
    ]


def test_card_like_no_other_is_answered_with_all() -> None:
    with pytest.raises(RecipeError) as caught:
        find_card("zzz")
    known = "h200, h100, a100-80, a100-40, l40s, rtx4090, rtx3090, t4. A number of GB is taken too"
    assert str(caught.value) == f"--gpu zzz: is no card that llmtune knows; it knows {known}"


def test_card_is_found_by_name_or_by_size() -> None:
    assert find_card("H100").rate == 989e12
    assert find_card("24").memory == find_card("24GB").memory == 24 * 10**9
    assert find_card("24").rate is None
    assert all(card.memory > 10**10 and card.rate for card in CARDS.values())


def test_lengths_are_estimated_from_characters() -> None:
    rows = [Row("a", ({"role": "user", "content": "x" * 35}, {"role": "assistant", "content": "y" * 70}), "a:1")] * 2
    lengths = estimated(rows, 1024)
    assert (lengths.rows, lengths.longest, lengths.tokens) == (2, 10 + 20 + 12, 84)
    assert lengths.supervised == pytest.approx(20 / 42)
    assert estimated(rows, 16).longest == 16
