"""Chat: two models, two conversations, one line for both; base and tuned answer as each would alone."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from llmtune import chat, recipe
from llmtune.adapters.delta import TENSORS, load_delta, save_delta
from llmtune.adapters.insert import insert, trained_tensors
from llmtune.chat import Speaker, talk
from llmtune.data.encode import prompt_ids
from llmtune.errors import ProofError
from llmtune.methods.kinds import Facts
from llmtune.model.base import load_model, load_tokenizer, locate_base, stop_ids
from llmtune.run import Run, create
from tests.support import tiny

SYSTEM = {"role": "system", "content": "Add."}


class Script:
    """An answerer that says how often it was asked and remembers what it was given."""

    def __init__(self, name: str) -> None:
        self.name, self.asked = name, list[list[dict[str, str]]]()

    def __call__(self, messages: list[dict[str, str]]) -> str:
        self.asked.append([dict(message) for message in messages])
        return f"[{self.name} {len(self.asked)}]\nsecond line"


def told(lines: Any, system: str | None = None, **console: Any) -> tuple[str, Script, Script]:
    base, tuned, screen = Script("base"), Script("tuned"), io.StringIO()
    pair = [Speaker("base", base, system), Speaker("tuned", tuned, system)]
    talk(pair, lines, Console(file=screen, highlight=False, **console))
    return screen.getvalue(), base, tuned


def test_both_answer_each_line_in_plain_text() -> None:
    out, _, _ = told(["hello\n", "\n", "  again  "])
    assert out.splitlines()[1:] == [
        *("base:  [base 1]", "       second line", "tuned: [tuned 1]", "       second line"),
        *("base:  [base 2]", "       second line", "tuned: [tuned 2]", "       second line"),
    ]
    assert "\x1b" not in out


def test_an_empty_answer_is_said_to_be_one() -> None:
    screen = io.StringIO()
    talk([Speaker("base", lambda messages: "")], ["hello"], Console(file=screen))
    assert screen.getvalue().splitlines()[-1] == "base:  (nothing)"


def test_each_model_keeps_its_own_conversation() -> None:
    _, base, tuned = told(["one", "two"], system="Be brief.")
    for script in (base, tuned):
        said = f"[{script.name} 1]\nsecond line"
        assert script.asked[1] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": said},
            {"role": "user", "content": "two"},
        ]


def test_reset_forgets_and_quit_ends() -> None:
    out, base, _ = told(["one", "/reset", "two", "/quit", "three"])
    assert [len(asked) for asked in base.asked] == [1, 1]
    assert "forgotten" in out


def test_a_terminal_shows_panels_side_by_side() -> None:
    out, _, _ = told(["hello"], force_terminal=True, width=80, color_system=None, _environ={})
    sides = [line for line in out.splitlines() if "[base 1]" in line]
    assert len(sides) == 1
    assert sides[0].index("[base 1]") < sides[0].index("[tuned 1]")


def test_a_terminal_shows_a_long_answer_to_its_end() -> None:
    answer, screen = "[not]markup:" + "x" * 200 + "end", io.StringIO()
    pair = [Speaker(name, lambda messages: answer) for name in ("base", "tuned")]
    talk(pair, ["hello"], Console(file=screen, force_terminal=True, width=60, color_system=None, _environ={}))
    shown = "".join(line.split("│")[1].strip() for line in screen.getvalue().splitlines() if "│" in line)
    assert shown == answer


def interrupted() -> Iterator[str]:
    yield "7 plus 1?"
    raise KeyboardInterrupt


def made(folder: Path, method: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> Run:
    """A trained run on a tiny base whose delta changes what the model says."""
    base_folder = tiny.save_base(folder / "base")
    train = tiny.write_rows(folder / "train.jsonl", rows or tiny.sums(20))
    settings = recipe.load(tiny.write_recipe(folder / "recipe.json", base_folder, train, method))
    run = create(settings, folder / "run")
    base = locate_base(settings.model)
    plan = settings.plan(Facts(2, 32, 1000))
    live = insert(load_model(base), settings.method.adapter, plan, base)
    tensors = trained_tensors(live, plan)
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.add_(torch.randn_like(tensor) * 0.3)
    save_delta(live, dict(tensors), run.delta, base, settings.method.adapter.kind)
    return run


def alone(run: Run, tuned: bool, messages: list[dict[str, str]]) -> str:
    """What the base or tuned model says, loaded for itself and generated token by token."""
    base = locate_base(run.recipe().model)
    weights: Any = load_model(base)
    weights = load_delta(weights, run.delta) if tuned else weights
    tokenizer = load_tokenizer(base)
    ids = prompt_ids(messages, tokenizer)
    start = len(ids)
    while len(ids) < start + chat.NEW_TOKENS:
        with torch.no_grad():
            ids.append(int(weights(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stop_ids(base):
            break
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_base_and_tuned_answer_as_each_would_alone(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat, "NEW_TOKENS", 12)
    method = {"kind": "full", "adapter": {"kind": kind}}
    run = made(tmp_path, method)
    loads: list[Any] = []
    load = load_model
    monkeypatch.setattr("llmtune.chat.load_model", lambda *given: (loads.append(given), load(*given))[1])
    base, tuned = chat.speakers(run)
    assert len(loads) == (1 if kind == "lora" else 2)
    asked = [{"role": "user", "content": "7 plus 1?"}]
    answers = {speaker.name: speaker.reply("7 plus 1?") for speaker in (tuned, base)}
    assert answers == {"base": alone(run, False, asked), "tuned": alone(run, True, asked)}
    assert answers["base"] != answers["tuned"]
    chat.chat(run, interrupted())
    assert "tuned: " in capsys.readouterr().out


def test_a_shared_system_prompt_of_the_test_rows_is_used(tmp_path: Path) -> None:
    def rows(*systems: dict[str, str]) -> list[dict[str, Any]]:
        turns = [{"role": "user", "content": "1 plus 1?"}, {"role": "assistant", "content": "2"}]
        return [{"messages": [*([system] if system else []), *turns]} for system in systems]

    base = tiny.save_base(tmp_path / "base")
    file = tmp_path / "rows.jsonl"
    settings = recipe.load(tiny.write_recipe(tmp_path / "r.json", base, tiny.write_rows(file, rows(SYSTEM, SYSTEM))))
    assert chat.system_prompt(settings) == "Add."
    tiny.write_rows(file, rows(SYSTEM, {"role": "system", "content": "Add up."}))
    assert chat.system_prompt(settings) is None
    file.unlink()
    assert chat.system_prompt(settings) is None


def test_a_full_context_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "NEW_TOKENS", 4)
    base, _ = chat.speakers(made(tmp_path, {"kind": "full"}))
    assert base.reply("x" * 600) == chat.TOO_LONG


def test_without_a_delta_the_command_says_what_to_do_first(tmp_path: Path) -> None:
    run = made(tmp_path, {"kind": "full"})
    (run.delta / TENSORS).unlink()
    with pytest.raises(ProofError, match="train first"):
        chat.chat(run, ["hello"])
