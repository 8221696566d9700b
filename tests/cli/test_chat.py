"""Chat: base and tuned model answer the same lines, each in its own conversation and as it would alone."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from llmtune import recipe
from llmtune.adapters.delta import TENSORS, load_delta
from llmtune.answering import speakers
from llmtune.answering.sampling import Sampling
from llmtune.answering.speakers import Show, Speaker
from llmtune.cli import chat, main
from llmtune.cli.chat import HELP, talk
from llmtune.data.encoding.encode import prompt_ids
from llmtune.data.first_rows import shared_opening
from llmtune.errors import MachineError, ProofError, RecipeError
from llmtune.files import read_json, write_json
from llmtune.model.base import load_model
from llmtune.model.files.locate import locate_base
from llmtune.model.tokens import load_tokenizer, stop_ids
from llmtune.run import Run
from llmtune.training.prepare import prepare
from tests.support import runs, tiny

SYSTEM = {"role": "system", "content": "Add."}


class Script:
    """An answerer that counts its answers and keeps the messages that it gets."""

    def __init__(self, name: str) -> None:
        self.name, self.asked = name, list[list[dict[str, str]]]()

    def __call__(self, messages: list[dict[str, str]], sampling: Sampling, show: Show) -> str:
        self.asked.append([dict(message) for message in messages])
        self.sampling = sampling
        answer = f"[{self.name} {len(self.asked)}]\nsecond line"
        for end in range(0, len(answer), 5):
            show(answer[:end])
        return answer


def talk_to_both(lines: Iterable[str], system: str | None = None, **console: Any) -> tuple[str, Script, Script]:
    """Let two scripted speakers answer lines; returns what is printed, and both scripts."""
    base, tuned, screen = Script("base"), Script("tuned"), io.StringIO()
    pair = [Speaker("base", base, system), Speaker("tuned", tuned, system)]
    talk(pair, lines, Console(file=screen, highlight=False, **console))
    return screen.getvalue(), base, tuned


def test_prints_both_answers_in_plain_text() -> None:
    out, _, _ = talk_to_both(["hello\n", "\n", "  again  "])
    assert out.splitlines()[1:] == [
        *("base:  [base 1]", "       second line", "tuned: [tuned 1]", "       second line"),
        *("base:  [base 2]", "       second line", "tuned: [tuned 2]", "       second line"),
    ]
    assert "\x1b" not in out


def test_prints_empty_answer_as_nothing() -> None:
    screen = io.StringIO()
    talk([Speaker("base", lambda messages, sampling, show: "")], ["hello"], Console(file=screen))
    assert screen.getvalue().splitlines()[-1] == "base:  (nothing)"


def test_keeps_one_conversation_per_model() -> None:
    _, base, tuned = talk_to_both(["one", "two"], system="Be brief.")
    for script in (base, tuned):
        answer = f"[{script.name} 1]\nsecond line"
        assert script.asked[1] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "two"},
        ]


def test_reset_forgets_and_quit_ends() -> None:
    out, base, _ = talk_to_both(["one", "/reset", "two", "/quit", "three"])
    assert [len(asked) for asked in base.asked] == [1, 1]
    assert "A new conversation." in out


def test_shows_panels_side_by_side_in_terminal() -> None:
    out, _, _ = talk_to_both(["hello"], force_terminal=True, width=80, color_system=None, _environ={})
    sides = [line for line in out.splitlines() if "[base 1]" in line]
    assert len(sides) == 1
    assert sides[0].index("[base 1]") < sides[0].index("[tuned 1]")


def test_shows_long_answer_to_its_end_in_terminal() -> None:
    answer, screen = "[not]markup:" + "x" * 200 + "end", io.StringIO()
    pair = [Speaker(name, lambda messages, sampling, show: answer) for name in ("base", "tuned")]
    talk(pair, ["hello"], Console(file=screen, force_terminal=True, width=60, color_system=None, _environ={}))
    shown = "".join(line.split("│")[1].strip() for line in screen.getvalue().splitlines() if "│" in line)
    assert shown.endswith(answer)


def interrupted() -> Iterator[str]:
    """Type one line, then Ctrl-C."""
    yield "7 plus 1?"
    raise KeyboardInterrupt


def alone(run: Run, tuned: bool, messages: list[dict[str, str]]) -> str:
    """Return the answer of the base or tuned model, loaded alone and generated token by token."""
    base = locate_base(run.recipe().model)
    weights: Any = load_model(base)
    weights = load_delta(weights, run.delta) if tuned else weights
    tokenizer = load_tokenizer(base)
    ids = prompt_ids(messages, tokenizer)
    start = len(ids)
    while len(ids) < start + 12:
        with torch.no_grad():
            ids.append(int(weights(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stop_ids(base):
            break
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_base_and_tuned_answer_as_alone(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    method = {"kind": "full", "adapter": {"kind": kind}}
    run = runs.trained(tmp_path, method, step=0.3)
    loads: list[Any] = []

    def load(*arguments: Any) -> Any:
        loads.append(arguments)
        return load_model(*arguments)

    monkeypatch.setattr("llmtune.inference.placement.load_model", load)
    base, tuned = speakers.load_speakers(run)
    assert len(loads) == 1
    messages = [{"role": "user", "content": "7 plus 1?"}]
    short, shown = Sampling(max_new_tokens=12), list[str]()
    answers = {speaker.name: speaker.reply("7 plus 1?", short, shown.append) for speaker in (tuned, base)}
    assert {answer.rstrip("\ufffd") for answer in answers.values()} <= set(shown)  # half of a character is not shown
    assert answers == {"base": alone(run, False, messages), "tuned": alone(run, True, messages)}
    assert answers["base"] != answers["tuned"]
    chat.chat(run, interrupted(), short)
    assert "tuned: " in capsys.readouterr().out


def test_uses_system_prompt_shared_by_test_rows(tmp_path: Path) -> None:
    def rows(*systems: dict[str, str]) -> list[dict[str, Any]]:
        turns = [{"role": "user", "content": "1 plus 1?"}, {"role": "assistant", "content": "2"}]
        return [{"messages": [*([system] if system else []), *turns]} for system in systems]

    base = tiny.save_base(tmp_path / "base")
    file = tmp_path / "rows.jsonl"
    settings = recipe.load(tiny.write_recipe(tmp_path / "r.json", base, tiny.write_rows(file, rows(SYSTEM, SYSTEM))))
    assert shared_opening(settings.data)[0] == "Add."
    tiny.write_rows(file, rows(SYSTEM, {"role": "system", "content": "Add up."}))
    assert shared_opening(settings.data)[0] is None
    file.unlink()
    assert shared_opening(settings.data)[0] is None


def test_first_rows_of_any_kind_give_what_they_share(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
    turns = [SYSTEM, {"role": "user", "content": "1 plus 1?"}, {"role": "assistant", "content": "2"}]
    chats = tiny.write_rows(tmp_path / "chats.jsonl", [{"messages": turns, "tools": [tool]}] * 400)
    with chats.open("a") as file:
        file.write("no row, which nobody reads")
    texts = tiny.write_rows(tmp_path / "texts.jsonl", [{"text": "A text."}])
    base = tiny.save_base(tmp_path / "base")
    mixture = [{"source": str(chats), "fraction": 0.5}, {"source": str(texts), "fraction": 0.5}]
    for data in ({"train": mixture}, {"train": str(texts), "test": str(chats)}, {"train": str(texts)}):
        settings = recipe.load(tiny.write_recipe(tmp_path / "r.json", base, texts, data=data))
        system, tools = shared_opening(settings.data)
        assert (system, [one["function"]["name"] for one in tools]) == (
            (None, []) if data == {"train": str(texts)} else ("Add.", ["add"])
        )


def test_prompts_get_the_tools_and_the_values_of_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ mode }}:{{ tools | tojson if tools }};" + tiny.CHATML
    base = tiny.save_base(tmp_path / "base")
    tiny.tokenizer(template).save_pretrained(base)
    rows = tiny.write_rows(tmp_path / "some.jsonl", tiny.sums(20))
    data = {"train": str(rows), "eval_fraction": 0.2, "template": {"mode": "brief"}}
    run = runs.trained(tmp_path, base=base, data=data)
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
    write_json(run.data_file, {**read_json(run.data_file), "thinking_block": "<think></think>"})
    monkeypatch.setattr(speakers, "shared_opening", lambda data: (None, (tool,)))
    prompts: list[str] = []

    def generate(model: Any, input_ids: torch.Tensor, **_: Any) -> None:
        prompts.append(load_tokenizer(locate_base(run.recipe().model)).decode(input_ids[0]))

    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", generate)
    pair, screen = speakers.load_speakers(run), io.StringIO()
    talk(pair, ["hello"], Console(file=screen))
    (prompt,) = {*prompts}
    assert prompt.startswith('brief:[{"type": "function", "function": {"name": "add"')
    assert prompt.endswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think></think>")
    assert "Tools that the models are told of: add. None is run here.\n" in screen.getvalue()


def test_reports_full_context_and_leaves_the_conversation_as_it_was(tmp_path: Path) -> None:
    base, _ = speakers.load_speakers(runs.trained(tmp_path, {"kind": "full"}, step=0.3))
    assert base.reply("x" * 600) == speakers.TOO_LONG
    assert base.turns == []


def test_draws_by_temperature_and_seed(tmp_path: Path) -> None:
    _, tuned = speakers.load_speakers(runs.trained(tmp_path, step=0.3))

    def answer(**sampling: Any) -> str:
        tuned.turns = []
        return tuned.reply("7 plus 1?", Sampling(max_new_tokens=12, **sampling))

    state = torch.get_rng_state()
    assert answer(temperature=2.0, seed=1) == answer(temperature=2.0, seed=1)
    assert len({answer(temperature=2.0, seed=seed) for seed in range(4)}) > 1
    assert answer() == answer(seed=3)
    assert answer(temperature=2.0, top_p=1e-9) == answer(temperature=2.0, top_k=1) == answer()
    assert torch.equal(torch.get_rng_state(), state)


def test_ctrl_c_stops_an_answer_and_not_the_chat() -> None:
    def stopped(messages: list[dict[str, str]], sampling: Sampling, show: Show) -> str:
        show("half an")
        raise KeyboardInterrupt

    for terminal in (False, True):
        screen, other = io.StringIO(), Script("tuned")
        pair = [Speaker("base", stopped), Speaker("tuned", other)]
        console = Console(file=screen, force_terminal=terminal, width=80, color_system=None, _environ={})
        talk(pair, ["one", "two"], console)
        assert pair[0].turns[1] == {"role": "assistant", "content": "half an"}
        assert len(other.asked) == 2
        assert "half an" in screen.getvalue()


def test_shows_an_answer_while_it_grows() -> None:
    screen, seen = io.StringIO(), list[str]()

    def slow(messages: list[dict[str, str]], sampling: Sampling, show: Show) -> str:
        for text in ("a", "a b\n", "a b\nc"):
            show(text.strip())
            seen.append(screen.getvalue().splitlines()[-1])
        return "a b\nc"

    talk([Speaker("base", slow)], ["hello"], Console(file=screen))
    assert seen == ["base:  a", "base:  a b", "       c"]
    assert screen.getvalue().endswith("base:  a b\n       c\n")


def test_commands_change_the_conversation() -> None:
    out, base, tuned = talk_to_both(
        ["/tuned", "one", "/tuned", "two", "/base", "three", "/system Be brief.", "four", "/system"], system="Add."
    )
    assert "only the tuned model answers now\n" in out
    assert "the base model and the tuned model answer now\n" in out
    assert [asked[-1]["content"] for asked in base.asked] == ["two", "three", "four"]
    assert [asked[-1]["content"] for asked in tuned.asked] == ["one", "two"]
    assert base.asked[-1] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "four"}]
    assert out.splitlines()[-1] == "System prompt: Be brief."
    out, base, _ = talk_to_both(["/help", "/set temperature=0.7 max_new_tokens=5", "one", "/set"])
    assert HELP in out
    assert base.sampling == Sampling(temperature=0.7, max_new_tokens=5)
    assert out.splitlines()[-1] == "temperature=0.7 top_p=1 top_k=0 max_new_tokens=5 seed=0"


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/rest", "there is no /rest; did you mean '/reset'?"),
        ("/xyzzy now", "there is no /xyzzy; /help lists the commands"),
        ("/set heat=1", "there is no heat; temperature, top_p, top_k, max_new_tokens, seed"),
        ("/set temperature=hot", "temperature=hot: a number is expected"),
        ("/set temperature=-1", "temperature is a number from 0 on, not -1.0"),
        ("/set temperature=nan", "temperature is a number from 0 on, not nan"),
        ("/set top_k=-1", "top_k is a whole number from 0 on, 0 for all tokens, not -1"),
        ("/set top_p=0", "top_p is a number above 0, up to 1, not 0.0"),
        ("/set max_new_tokens=1.5", "max_new_tokens=1.5: a whole number is expected"),
        ("/set seed", "seed=: a whole number is expected"),
    ],
)
def test_never_sends_a_command_to_the_models(line: str, answer: str) -> None:
    out, base, tuned = talk_to_both([line])
    assert out.splitlines()[-1].startswith(answer)
    assert base.asked == tuned.asked == []


def test_options_open_a_conversation_with_lines_of_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run")
    monkeypatch.setattr("llmtune.cli.commands.infer.open_with", lambda *_: run)
    monkeypatch.setattr("llmtune.cli.commands.infer.require_trained", lambda _: None)
    for words, system in ((["--tuned", "--system", "Be brief."], "Be brief."), (["--tuned", "--system", ""], None)):
        base, tuned = Script("base"), Script("tuned")
        pair = [Speaker("base", base, "Add."), Speaker("tuned", tuned, "Add.")]
        monkeypatch.setattr(chat, "load_speakers", lambda _, pair=pair: pair)
        monkeypatch.setattr("sys.stdin", io.StringIO("one\n/tuned\ntwo\n"))
        assert main(["chat", str(run.path), *words, "--temperature", "1", "--top-k", "4"]) == 0
        assert [asked[-1]["content"] for asked in tuned.asked] == ["one", "two"]
        assert [asked[-1]["content"] for asked in base.asked] == ["two"]
        assert (tuned.sampling, pair[1].system) == (Sampling(1.0, top_k=4), system)
        out = capsys.readouterr().out
        assert out.startswith("Only the tuned model answers; /tuned brings the other one back.\n")
        assert ("System prompt: Be brief." in out) == (system is not None)
    assert main(["chat", str(run.path), "--top-p", "0"]) == 2
    assert capsys.readouterr().err == "llmtune: --top-p is a number above 0, up to 1, not 0.0\n"


def test_sends_a_line_with_a_space_before_its_slash() -> None:
    _, base, _ = talk_to_both([" /etc/hosts is a file"])
    assert base.asked[0][-1]["content"] == "/etc/hosts is a file"


def test_full_memory_ends_a_chat_in_one_line_that_says_what_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.trained(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total")

    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", fail)
    words = (
        r"^chat: out of memory on GPU 0: 2\.1 GB was asked for; ask for shorter .* what was trained is safe in .*delta$"
    )
    with pytest.raises(MachineError, match=words):
        chat.chat(run, ["hello"])


def test_refuses_run_without_delta(tmp_path: Path) -> None:
    run = runs.trained(tmp_path, {"kind": "full"}, step=0.3)
    (run.delta / TENSORS).unlink()
    with pytest.raises(ProofError, match="train first"):
        chat.chat(run, ["hello"])


def test_names_file_and_line_of_a_base_that_is_gone(tmp_path: Path) -> None:
    tiny.save_base(tmp_path / "base")
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sums(20))
    run = prepare(recipe.load(tiny.write_recipe(tmp_path / "r.yaml", tmp_path / "base", rows)), tmp_path / "run", 0)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:\d+: model\.base: "):
        chat.chat(run, [])
