"""Ollama: a Modelfile whose template gives what the chat template gives, on a proved GGUF file."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from llmtune.exporting import ollama, step
from llmtune.exporting.chat_format import ChatFormat, chat_format
from llmtune.files import write_json
from llmtune.model.base import Base
from llmtune.publishing.files import exported as published
from llmtune.publishing.parts.gguf import gguf_section
from llmtune.run import Run
from tests.support import tiny
from tests.support.public_templates import CHATML, PUBLIC
from tests.support.templates import TEMPLATES

TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And now?"},
]
SYSTEM = {"role": "system", "content": "Count."}
BRINGS_A_PROMPT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + tiny.CHATML
)


def form_of(template: str, stops: tuple[str, ...], bos: str = "") -> ChatFormat | None:
    """The format of a template, whose BOS the tokenizer adds by itself where there is one."""
    tokenizer = tiny.tokenizer(template)
    if bos:
        tokenizer.bos_token = bos
    return chat_format(tokenizer, list(stops), {}, bool(bos), [])


def test_modelfile_has_the_template_in_go_the_rows_prompt_and_every_stop_token(exported: Run, tmp_path: Path) -> None:
    run = Run(Path(shutil.copytree(exported.path, tmp_path / "Orders")))
    facts = step.export(run, "ollama:q8_0")
    folder = run.exported / "ollama"
    assert (folder / "Modelfile").read_text() == (
        "FROM ./Orders-Q8_0.gguf\nPARAMETER num_ctx 512\nPARAMETER temperature 0\n"
        'PARAMETER stop "<|im_start|>"\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "%"\n'
        'TEMPLATE """{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}'
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}{{ if not $last }}<|im_end|>\n{{ end }}'
        '{{ end }}{{ if and (ne .Role "assistant") $last }}<|im_start|>assistant\n{{ end }}{{ end }}"""\n'
    )
    assert sorted(run.manifest()["steps"]["export"]["forms"]) == ["gguf:q8_0", "ollama"]
    assert (folder / facts["file"]).stat().st_ino == (run.exported / "gguf" / facts["file"]).stat().st_ino
    assert ollama.summary(folder, facts)[-1].endswith("ollama && ollama create orders -f Modelfile")
    assert "it stops at <|im_start|>, <|im_end|>, %" in ollama.summary(folder, facts)[1]


def test_modelfile_has_the_system_prompt_that_the_rows_share_or_the_templates_own(
    exported: Run, tmp_path: Path
) -> None:
    run = Run(Path(shutil.copytree(exported.path, tmp_path / "run")))
    rows = [{"messages": [SYSTEM, *TURNS[:2]]}, {"messages": [SYSTEM, *TURNS[2:], TURNS[1]]}]
    data = {"test": str(tiny.write_rows(tmp_path / "test.jsonl", rows))}
    (run.merged / "chat_template.jinja").write_text(BRINGS_A_PROMPT)
    write_json(run.data_file, {"thinking_block": "<think></think>"})
    base = Base(run.merged, "", None, None)
    assert ollama.modelfile(run, base, "a.gguf")[0].endswith('"""\nSYSTEM """Be kind."""\n')
    settings = run.recipe()
    shared = Run(run.path, settings.model_copy(update={"data": settings.data.model_copy(update=data)}))
    text, has_template = ollama.modelfile(shared, base, "a.gguf")
    assert text.endswith('<|im_start|>assistant\n<think></think>{{ end }}{{ end }}"""\nSYSTEM """Count."""\n')
    assert has_template
    tiny.write_rows(Path(data["test"]), [rows[0]] * 25 + [{"messages": TURNS[:2]}])  # more than the samples
    assert ollama.modelfile(shared, base, "a.gguf")[0].endswith('"""\nSYSTEM """Be kind."""\n')


@pytest.mark.parametrize(
    ("template", "stops", "bos"),
    [
        (CHATML, ("<|im_end|>",), ""),
        (PUBLIC["llama3"].template, ("<|eot_id|>",), "<|begin_of_text|>"),
        (PUBLIC["qwen3"].template, ("<|im_end|>",), ""),
        (PUBLIC["deepseek r1"].template, (PUBLIC["deepseek r1"].end,), ""),
        (BRINGS_A_PROMPT, ("<|im_end|>",), ""),
    ],
)
def test_format_renders_what_the_chat_template_renders(template: str, stops: tuple[str, ...], bos: str) -> None:
    form = form_of(template, stops, bos)
    assert form is not None
    tokenizer = tiny.tokenizer(template)
    tokenizer.bos_token = bos or None
    for messages in ([*TURNS], [SYSTEM, *TURNS], [SYSTEM, TURNS[0]], TURNS[:1]):
        expected = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        assert form.render(messages) == expected.removeprefix(bos)


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_template_that_is_more_than_text_around_turns_is_left_out(name: str) -> None:
    public = PUBLIC[name]
    assert form_of(public.template, public.stops or (public.end,)) is None
    assert form_of(TEMPLATES["chatml"].replace("<|im_end|>", '"""<|im_end|>'), ("<|im_end|>",)) is None


def test_published_card_tells_what_the_export_proved_and_no_prompt_of_the_rows(exported: Run, tmp_path: Path) -> None:
    run = Run(Path(shutil.copytree(exported.path, tmp_path / "Orders")))
    step.export(run, "ollama:q8_0")
    shutil.rmtree(run.exported / "gguf")
    run.mark("export", [run.exported], forms={"ollama": run.manifest()["steps"]["export"]["forms"]["ollama"]})
    file = run.exported / "ollama" / "Modelfile"
    text = file.read_text()
    assert {name: one for name, one in published(run).items() if isinstance(one, bytes)} == {file.name: text.encode()}
    assert published(run)["Orders-Q8_0.gguf"] == file.parent / "Orders-Q8_0.gguf"
    card = "\n".join(gguf_section(run, "me/Orders"))
    proof = run.manifest()["steps"]["export"]["forms"]["ollama"]
    assert f"`Orders-Q8_0.gguf` gives {proof['equal']} of {proof['rows']} greedy answers of the merged model" in card
    assert "    hf download me/Orders Orders-Q8_0.gguf Modelfile --local-dir .\n" in card
    assert "    ollama create orders -f Modelfile\n" in card
    assert "SYSTEM" not in card
    file.write_text(text + 'SYSTEM """A secret\nof the rows."""\n')
    run.mark("export", [run.exported], forms={"ollama": proof})
    assert published(run)["Modelfile"] == text.encode()
    assert "add it as a SYSTEM line" in "\n".join(gguf_section(run, "me/Orders"))
    template = tiny.CHATML + "{# A secret\nof the rows. #}"
    (run.merged / "chat_template.jinja").write_text(template)
    assert published(run)["Modelfile"] == file.read_bytes()
