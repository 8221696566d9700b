"""Runs on rows with tools, with reasoning and of plain text, from the check of the data to the card."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmtune import recipe, terminal
from llmtune.answering.sampling import Sampling
from llmtune.answering.speakers import load_speakers
from llmtune.evaluation.results import Answer
from llmtune.evaluation.step import evaluate
from llmtune.files import read_json
from llmtune.merging.step import merge
from llmtune.publishing.card import card
from llmtune.reporting.page import render
from llmtune.run import Run
from llmtune.training.loop import train
from llmtune.training.prepare import prepare
from tests.support import runs, tiny
from tests.support.pages import Page

# Like Qwen3's: tools and calls as JSON, and a think block where there is a thought.
TEMPLATE = (
    "{{ greeting }}{% if tools %}{{ '<|im_start|>system\\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.reasoning_content %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>\\n' }}{{ {'name': c.function.name, 'arguments': "
    "c.function.arguments} | tojson }}{{ '\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PARAMETERS: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "warmth", "description": "Degrees.", "parameters": PARAMETERS},
}


def tool_row(place: int) -> dict[str, Any]:
    """A row whose answer is a call."""
    call = {"type": "function", "function": {"name": "warmth", "arguments": {"city": f"Ulm {place}"}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    question = {"role": "user", "content": f"How warm is Ulm {place}?"}
    return {"id": f"r{place}", "messages": [question, answer], "tools": [TOOL]}


def thought_row(place: int) -> dict[str, Any]:
    """A row whose answer follows a thought."""
    answer = {"role": "assistant", "content": str(2 * place), "reasoning_content": f"Twice {place}."}
    return {"id": f"r{place}", "messages": [{"role": "user", "content": f"{place} plus {place}?"}, answer]}


def answering(monkeypatch: pytest.MonkeyPatch, answers: list[str]) -> None:
    """Let both models answer the held-out rows so, by the digit at the end of the question."""
    tokenizer = tiny.tokenizer()

    def greedy(model: Any, prompts: list[list[int]], *_: Any) -> list[list[int]]:
        digits = ([char for char in tokenizer.decode(prompt) if char.isdigit()][-1] for prompt in prompts)
        return [[*tokenizer(answers[int(digit)], add_special_tokens=False)["input_ids"], 2] for digit in digits]

    monkeypatch.setattr("llmtune.evaluation.loaded_model.greedy", greedy)


def evaluated(folder: Path, rows: list[dict[str, Any]], **data: Any) -> tuple[Run, list[Answer], str]:
    """Evaluate a run whose test rows are the first three; returns it, its answers, and what it prints and publishes."""
    base = tiny.save_base(folder / "base", max_position_embeddings=1024)
    tiny.tokenizer(TEMPLATE).save_pretrained(base)
    files = {
        name: tiny.write_rows(folder / f"{name}.jsonl", part)
        for name, part in (("train", rows[3:]), ("test", rows[:3]))
    }
    data |= {**{name: str(file) for name, file in files.items()}, "eval_fraction": 0.2}
    run = runs.trained(folder, base=base, data=data, eval=runs.QUICK, publish={"repo": "me/mine"})
    stored = evaluate(run)
    return run, stored["tuned"]["rows"], card(run) + Page(render(run)).text


def test_tool_calls_are_asked_with_their_tools_and_compared_by_structure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = '<tool_call>{"arguments":{"city":"Ulm 0"},"name":"warmth"}</tool_call>'
    answering(monkeypatch, [right, right, "It is warm."])
    run, rows, shown = evaluated(tmp_path, [tool_row(place) for place in range(12)])
    assert [row["exact_match"] for row in rows] == [True, False, False]
    assert rows[1]["answer"] == '<tool_call>\n{"name": "warmth", "arguments": {"city": "Ulm 1"}}\n</tool_call>'
    assert json.dumps(TOOL["function"]["description"]) in rows[0]["prompt"]
    assert read_json(run.eval / "base.json")["results"]["held_out_few_shot"]["shots"] == 2
    terminal.scores(run)
    assert all("Compared: tool calls." in text for text in (shown, capsys.readouterr().out))


@pytest.mark.parametrize("reasoning", ["learn", "context", "drop"])
def test_what_follows_a_thought_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reasoning: str) -> None:
    answering(monkeypatch, ["<think>\nNothing.\n</think>\n\n0", "2", "<think>\n4"])
    run, rows, shown = evaluated(
        tmp_path, [thought_row(place) for place in range(12)], reasoning=reasoning, template={"greeting": "Hm. "}
    )
    is_dropped = reasoning == "drop"
    assert [row["exact_match"] for row in rows] == [not is_dropped, True, False]
    assert rows[2]["answer"] == ("<think>\nTwice 2.\n</think>\n\n4" if reasoning == "learn" else "4")
    assert all(row["prompt"].startswith("Hm. <|im_start|>user\n") for row in rows)
    settings = read_json(run.eval / "settings.json")
    assert settings["template"] == {"greeting": "Hm. "}
    longest = len("<think>\nTwice 2.\n</think>\n\n4") + 1
    assert settings["held_out"]["decoding"]["new_tokens"] == (3 if is_dropped else -(-longest * 3 // 2))
    assert ("thoughts are not compared" in shown) != is_dropped


def test_plain_texts_go_from_check_to_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.reload_here(monkeypatch)
    base = tiny.save_base(tmp_path / "base")
    texts = [{"text": f"Once upon a time there were {n} geese. " * (1 + n % 3)} for n in range(24)]
    data = {"train": str(tiny.write_rows(tmp_path / "texts.jsonl", texts)), "eval_fraction": 0.2, "max_length": 64}
    sections: dict[str, Any] = {"data": data, "eval": runs.QUICK, "publish": {"repo": "me/mine"}}
    file = tiny.write_recipe(tmp_path / "recipe.json", base, base, **sections)
    run = prepare(recipe.load(file), tmp_path / "run", 0)
    train(run)
    stored = evaluate(run)
    before, after = (stored[name]["results"]["held_out"]["metrics"]["perplexity"] for name in ("base", "tuned"))
    assert (after["value"] or 0) < 0.9 * (before["value"] or 0)
    assert after["n"] == 5
    merge(run)
    terminal.prepared(run)
    terminal.scores(run)
    shown = f"{after['value']:.3f}"
    assert all(shown in text for text in (capsys.readouterr().out, card(run), Page(render(run)).text))
    assert load_speakers(run)[1].reply("Once upon", Sampling(max_new_tokens=2)) is not None
