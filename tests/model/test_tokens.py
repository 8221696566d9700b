"""A base's tokenizer is made safe to train with, or refused in one line; rows keep the limits of the model."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from llmtune import recipe
from llmtune.errors import RecipeError
from llmtune.model.base import Base, build_skeleton
from llmtune.model.tokens import Limits, load_tokenizer, model_limits, stop_ids
from llmtune.training.prepare import examine
from tests.support import architectures, tiny


def base(folder: Path, **more: Any) -> Base:
    """A tiny base in a folder."""
    return Base(tiny.save_base(folder, **more), "b", None, None)


def set_token(base: Base, **tokens: str | None) -> None:
    """Change keys of a base's tokenizer_config.json."""
    file = base.folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **tokens}))


def examined(base: Base, rows: list[dict[str, Any]], **data: Any) -> Any:
    """What `check` finds in rows for a base."""
    file = tiny.write_rows(base.folder.parent / "rows.jsonl", rows)
    section = {"train": str(file), "eval_fraction": 0, **data}
    return examine(recipe.load(tiny.write_recipe(base.folder.parent / "r.yaml", base.folder, file, data=section)), 0)


def test_pads_with_a_token_that_the_model_has(tmp_path: Path) -> None:
    own = base(tmp_path / "own")
    assert load_tokenizer(own).pad_token == "<|pad|>"
    added = base(tmp_path / "added")
    set_token(added, pad_token="[PAD]")
    assert load_tokenizer(added).pad_token == "<|im_end|>"
    neither = base(tmp_path / "neither")
    set_token(neither, pad_token=None, eos_token=None)
    assert load_tokenizer(neither).pad_token == "<|pad|>"  # its config.json names it
    assert examined(neither, tiny.sums(4)).data.train


def test_refuses_a_folder_without_tokenizer(tmp_path: Path) -> None:
    bare = base(tmp_path / "base")
    for file in bare.folder.glob("tok*"):
        file.unlink()
    with pytest.raises(RecipeError, match=r"^model.base: b has no tokenizer \(no tokenizer.json\); copy "):
        load_tokenizer(bare)


def test_takes_the_default_of_named_templates(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = {"default": tiny.CHATML, "rag": "x"}
    tokenizer.save_pretrained(folder.folder)
    assert load_tokenizer(folder).chat_template == tiny.CHATML
    tokenizer.chat_template = {"tool_use": tiny.CHATML, "rag": tiny.CHATML}
    (folder.folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder.folder)
    with pytest.raises(RecipeError, match=r"b has 2 chat templates \(rag, tool_use\), and none is named default; "):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for %}", "Expected an expression, got 'end of statement block' (line 1)"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(9) %}x{% endfor %}{% endfor %}"
         "{% endfor %}", "it takes over 1 s"),
        ("{{ 10**(10**10) }}", "it takes over 1 s"),
        ("{{ 'a' * 10**10 }}", "it takes over 1 GB of memory"),
        ("{% set n = 10**5 %}{{ 'a' * (n * n) }}", "it takes over 1 GB of memory"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_refuses_a_template_that_never_ends(
    tmp_path: Path, template: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtune.model.tokens.RENDER_SECONDS", 1)
    folder = base(tmp_path / "base")
    (folder.folder / "chat_template.jinja").write_text(template)
    began = time.monotonic()
    with pytest.raises(RecipeError) as caught:
        load_tokenizer(folder)
    assert str(caught.value) == f"model.base: b: its chat template cannot be read: {words}"
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 1 / 0 }}", "fails on this conversation: ZeroDivisionError: division by zero"),
        ("{{ 1 + 'a' }}", "fails on this conversation: TypeError: unsupported operand"),
        ("{{ messages[99]['content'] }}", "rejects this conversation: list object has no element 99"),
        ("{{ raise_exception('a\\nb') }}", "rejects this conversation: "),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails on this conversation: RecursionError"),
    ],
)
def test_names_the_row_on_which_a_template_fails(tmp_path: Path, template: str, words: str) -> None:
    folder = base(tmp_path / "base")
    (folder.folder / "chat_template.jinja").write_text(template)
    with pytest.raises(RecipeError) as caught:
        examined(folder, tiny.sums(4))
    assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}:1: the chat template {words}")
    assert "\n" not in str(caught.value)


def test_stops_at_tokens_that_the_model_has(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    file = folder.folder / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [2, 10**9]}))
    assert stop_ids(folder) == {2}
    for value, words in ((10**9, "ends generation at token 1000000000 "), ([], "names no token that ends generation")):
        file.write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(RecipeError, match=f"b {words}"):
            stop_ids(folder)
    file.write_text("")
    with pytest.raises(RecipeError, match=r"generation_config.json"):
        stop_ids(folder)


def test_stops_where_the_language_model_of_a_larger_one_stops(tmp_path: Path) -> None:
    folder = Base(architectures.save_vision_base(tmp_path / "b"), "b", None, None)
    (folder.folder / "generation_config.json").unlink()
    assert stop_ids(folder) == {2}
    assert load_tokenizer(folder).pad_token_id == 0


@pytest.mark.parametrize(
    ("kind", "more", "positions"),
    [
        ("gpt2", {"n_positions": 64, "max_position_embeddings": 64}, 64),
        ("opt", {"max_position_embeddings": 64, "ffn_dim": 64, "word_embed_proj_dim": 32}, 64),
        ("llama", {}, None),
        ("mixtral", {}, None),
        ("gpt_neox", {}, None),
    ],
)
def test_knows_which_models_learned_their_positions(
    tmp_path: Path, kind: str, more: dict[str, Any], positions: int | None
) -> None:
    assert model_limits(build_skeleton(base(tmp_path / kind, kind=kind, **more))) == Limits(259, positions)


def test_rows_over_learned_positions_are_over_length(tmp_path: Path) -> None:
    learned = base(tmp_path / "base", kind="gpt2", n_positions=64, max_position_embeddings=64)
    found = examined(learned, [*tiny.sums(4), {"prompt": "3 plus 3? " * 12, "completion": "6", "id": "long"}]).data
    assert found.findings["over_length"]["train"] == {"rows": 1, "ids": ["long"], "of": 5, "dropped": 1, "cut": 0}
    assert max(len(example.input_ids) for example in found.train) <= 64
    assert found.findings["notes"][0] == "the model learned 64 positions, so max_length is 64, not 1024"


def test_names_a_token_that_the_model_has_no_embedding_of(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    tokenizer.save_pretrained(folder.folder)
    assert examined(folder, tiny.sums(4)).data.train
    with pytest.raises(
        RecipeError, match=r"rows.jsonl:5: has the token '<\|new\|>' with the id 259, but the model has 259"
    ):
        examined(folder, [*tiny.sums(4), {"prompt": "a <|new|> b", "completion": "c"}])
