"""Short ways to write a recipe: each loads as what it is short for, keeps its line, and is refused by name if wrong."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtune import recipe
from llmtune.errors import FieldError, RecipeError
from llmtune.methods.kinds import METHODS
from llmtune.recipe import other_tools
from llmtune.recipe.sections import Recipe
from llmtune.recipe.shorthand import ALONE
from tests.support.recipes import GOOD, load_error, method, write
from tests.support.schema import violations

LORA = "{kind: full, adapter: {kind: lora}}"
SHORT = {
    "full": "{kind: full}",
    "gradual": "{kind: gradual}",
    "lora": LORA,
    "ia3": "{kind: full, adapter: {kind: ia3}}",
    "dora": "{kind: full, adapter: {kind: lora, dora: true}}",
    "rslora": "{kind: full, adapter: {kind: lora, rslora: true}}",
    "pissa": "{kind: full, adapter: {kind: lora, init: pissa}}",
    "{adapter: lora}": LORA,
    "{kind: lora}": LORA,
    "{adapter: lora, lr: 1.0e-4}": "{kind: full, lr: 1.0e-4, adapter: {kind: lora}}",
    "{adapter: {kind: lora, rank: 8}}": "{kind: full, adapter: {kind: lora, rank: 8}}",
    "{kind: lora, rank: 8, lr: 1.0e-4}": "{kind: full, lr: 1.0e-4, adapter: {kind: lora, rank: 8}}",
    "{kind: dora, adapter: {rank: 8}}": "{kind: full, adapter: {kind: lora, dora: true, rank: 8}}",
    "{kind: lora, adapter: lora}": LORA,
    "{kind: gradual, adapter: dora}": "{kind: gradual, adapter: {kind: lora, dora: true}}",
    "{kind: gradual, adapter: {kind: dora, rank: 8}}": "{kind: gradual, adapter: {kind: lora, dora: true, rank: 8}}",
    "{adapter: none}": "{kind: full}",
}


def resolved(file: Path, *overrides: str) -> dict[str, Any]:
    """What a recipe is after loading, as its run shows it."""
    return dict(yaml.safe_load(recipe.dump(recipe.load(file, list(overrides)))))


@pytest.mark.parametrize(("short", "long"), SHORT.items())
def test_short_method_is_shown_written_out(tmp_path: Path, short: str, long: str) -> None:
    shown = resolved(write(tmp_path, method(short)))
    assert shown == resolved(write(tmp_path, method(long)))
    assert resolved(write(tmp_path, GOOD), f"method={short}") == shown
    assert shown["method"]["kind"] in METHODS
    assert isinstance(shown["method"]["adapter"], dict)


@pytest.mark.parametrize("text", [*SHORT, *METHODS, *ALONE])
def test_schema_takes_what_loads(text: str) -> None:
    if text != "staged":  # which needs its stages
        Recipe.model_validate(yaml.safe_load(method(text)))
    assert violations(yaml.safe_load(method(text)), recipe.schema(), recipe.schema()) == []


def test_qlora_is_lora_over_a_4bit_base(tmp_path: Path) -> None:
    for text in ("qlora", "{kind: qlora}", "{adapter: qlora}", "{adapter: {kind: qlora}}"):
        loaded = recipe.load(write(tmp_path, method(text)))
        assert (loaded.model.quantize, loaded.method.adapter.kind) == ("4bit", "lora")
        assert loaded.method_words == "QLoRA (rank 16)"
    contradictory = method("qlora").replace("{base: some/model}", "\n  base: a\n  quantize: none")
    assert load_error(write(tmp_path, contradictory)).startswith(
        "recipe.yaml:3: model.quantize: none contradicts qlora"
    )
    assert "--set model.quantize=none: " in load_error(write(tmp_path, method("qlora")), "model.quantize=none")
    assert "dora: false contradicts dora" in load_error(write(tmp_path, method("{kind: dora, dora: false}")))


@pytest.mark.parametrize(
    ("text", "overrides", "long"),
    [
        ("lora", ["method.rank=4", "method.lr=1.0e-4"], "{kind: full, lr: 1.0e-4, adapter: {kind: lora, rank: 4}}"),
        ("dora", ["method.adapter.rank=4"], "{kind: full, adapter: {kind: lora, dora: true, rank: 4}}"),
        ("gradual", ["method.bottom_ratio=0.1"], "{kind: gradual, bottom_ratio: 0.1}"),
        (
            "{kind: gradual, adapter: lora}",
            ["method.adapter.rank=4"],
            "{kind: gradual, adapter: {kind: lora, rank: 4}}",
        ),
        ("{kind: lora, rank: 8}", ["method.adapter.rank=4"], "{kind: full, adapter: {kind: lora, rank: 4}}"),
        ("{kind: lora, adapter: {rank: 8}}", ["method.rank=4"], "{kind: full, adapter: {kind: lora, rank: 4}}"),
        ("lora", ["method.adapter.rank=8", "method.rank=4"], "{kind: full, adapter: {kind: lora, rank: 4}}"),
        ("lora", ["method.adapter=ia3"], "{kind: full, adapter: {kind: ia3}}"),
        ("{kind: dora, rank: 8, lr: 1.0e-4}", ["method.adapter=ia3"], "{kind: full, lr: 1.0e-4, adapter: ia3}"),
        ("{kind: dora, rank: 8}", ["method.adapter.kind=lora"], "{kind: full, adapter: {kind: lora, rank: 8}}"),
    ],
)
def test_override_reaches_into_a_short_method(tmp_path: Path, text: str, overrides: list[str], long: str) -> None:
    assert resolved(write(tmp_path, method(text)), *overrides) == resolved(write(tmp_path, method(long)))


def test_refuses_a_key_that_stands_beside_and_in_the_adapter(tmp_path: Path) -> None:
    message = load_error(write(tmp_path, method("{kind: lora, rank: 8, adapter: {rank: 4}}")))
    assert "method.rank: is set in method.adapter.rank too; remove one of them" in message


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("{kind: lora, adapter: ia3}", [], "method.adapter: ia3 contradicts method.kind, which is lora; write one of"),
        ("{kind: lora, adapter: {kind: none}}", [], "method.adapter: none contradicts method.kind"),
        ("{kind: lora, rank: 8, adapter: lorra}", [], "method.adapter: one of none, lora"),
        ("lora", ["method.adapter=lorra"], "--set method.adapter=lorra: method.adapter: one of none, lora"),
        ("lora", ["method.adapter.kind=lorra"], "--set method.adapter.kind=lorra: method.adapter.kind: one of none"),
    ],
)
def test_second_adapter_is_told_by_its_name(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    shown = load_error(write(tmp_path, method(text)), *overrides)
    assert message in shown
    assert "lorra" not in message or shown.endswith("got 'lorra'; did you mean 'lora'?")


def test_mistake_in_a_short_method_names_its_line(tmp_path: Path) -> None:
    file = write(tmp_path, method("\n  kind: lora\n  rank: 8"))
    assert str(recipe.load(file).located(FieldError("method.adapter.rank", "no"))).startswith(f"{file}:5: method.")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("full", "full fine-tuning"),
        ("lora", "LoRA (rank 16)"),
        ("{kind: dora, rank: 4}", "DoRA (rank 4)"),
        ("{kind: lora, rslora: true}", "rsLoRA (rank 16)"),
        ("olora", "OLoRA (rank 16)"),
        ("vera", "VeRA (rank 256)"),
        ("ia3", "IA3"),
        ("bottleneck", "bottleneck adapters"),
        ("gradual", "gradual unfreezing"),
        ("lisa", "LISA"),
        ("{kind: gradual, adapter: lora}", "LoRA (rank 16) under gradual unfreezing"),
        ("{kind: frozen, adapter: ia3}", "IA3 under a frozen extractor"),
    ],
)
def test_names_a_method_in_the_words_of_the_field(text: str, words: str) -> None:
    assert Recipe.model_validate(yaml.safe_load(method(text))).method_words == words


def test_reads_keys_of_the_first_version_and_tells_the_new_ones(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD + "memory:\n  prefix: keep\n  prefix_limit_gb: 4\n")
    loaded = recipe.load(file)
    assert (loaded.memory.frozen_blocks, loaded.memory.cache_limit_gb) == ("cache", 4)
    assert loaded.notes == [
        f"{file}:5: memory.prefix is read as memory.frozen_blocks: cache; write that from now on",
        f"{file}:6: memory.prefix_limit_gb is read as memory.cache_limit_gb: 4; write that from now on",
    ]
    for old, new in (("none", "recompute"), ("auto", "auto"), ("stream", "stream")):
        assert recipe.load(write(tmp_path, GOOD), [f"memory.prefix={old}"]).memory.frozen_blocks == new
    error = load_error(write(tmp_path, GOOD + "memory:\n  prefix: kept\n"))
    assert error.startswith("recipe.yaml:5: memory.frozen_blocks: one of auto, cache")
    both = load_error(write(tmp_path, GOOD + "memory: {prefix: keep, frozen_blocks: auto}"))
    assert "memory.prefix: is the old name of memory.frozen_blocks, which is set too" in both


def test_recipe_made_in_python_fails_in_one_line_and_leaves_its_values_alone() -> None:
    values: dict[str, Any] = {"model": {"base": "a"}, "data": {"train": "b"}, "method": "lora"}
    loaded = Recipe.model_validate(values)
    assert values["method"] == "lora"
    assert (loaded.file, str(loaded.located(FieldError("train.seed", "no")))) == (None, "recipe: train.seed: no")
    assert Recipe(**{**values, "method": "dora"}).method_words == "DoRA (rank 16)"
    with pytest.raises(RecipeError, match=r"^recipe: train.epoch: unknown key; did you mean 'epochs'\?$"):
        Recipe.model_validate({**values, "train": {"epoch": 1}})
    no_recipes: tuple[Any, ...] = (5, None, [], "text")
    for nothing in no_recipes:
        with pytest.raises(RecipeError, match=r"^recipe: a section with keys such as model, data, method is expected"):
            Recipe.model_validate(nothing)


@pytest.mark.parametrize("name", [*other_tools.HERE, *other_tools.NOT_HERE])
def test_answers_a_key_of_another_tool_at_any_level(tmp_path: Path, name: str) -> None:
    expected = f"{name}: {other_tools.answer(name)}"
    assert load_error(write(tmp_path, GOOD + f"{name}: 1")) == f"recipe.yaml:4: {expected}"
    assert load_error(write(tmp_path, GOOD + f"train: {{{name}: 1}}")) == f"recipe.yaml:4: train.{expected}"
    assert load_error(write(tmp_path, GOOD), f"method.{name}=1") == f"--set method.{name}=1: method.{expected}"


def test_answers_a_whole_file_of_another_tool_in_one_line(tmp_path: Path) -> None:
    axolotl = "base_model: a/b\nload_in_4bit: true\ndatasets: [x]\nlora_r: 8\nsample_packing: true\nnum_epochs: 1\n"
    assert load_error(write(tmp_path, axolotl)) == (
        "recipe.yaml:1: base_model: unknown key; here it is model.base (and load_in_4bit is model.quantize: 4bit, "
        "datasets is data.train, lora_r is method.adapter.rank, num_epochs is train.epochs)"
    )


@pytest.mark.parametrize(("name", "key"), other_tools.HERE.items())
def test_every_key_that_is_named_instead_exists(name: str, key: str) -> None:
    """Each answer starts with a key of the recipe, and no answer is for a key that a recipe has at that place."""
    dotted = key.split(":")[0].split(",")[0].split(";")[0].split(" ")[0]
    first, *rest = dotted.split(".")
    field = Recipe.model_fields[first]
    assert not rest or rest[-1] in str(recipe.schema()["$defs"]), dotted
    assert field is not None
    assert name not in Recipe.model_fields
