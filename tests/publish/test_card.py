"""The model card: a header that is YAML whatever a user wrote, facts from the run's files, no word of the data."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import llmtune
from llmtune.errors import RecipeError
from llmtune.files import read_json, write_json
from llmtune.publish import card as card_module
from llmtune.publish.card import card, code, front_matter, indented, is_ours, seal, shorten, table
from llmtune.recipe.sections import Recipe
from llmtune.run import Run
from tests.support import runs

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "me/my-model"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A LoRA run on a private folder, with a publish section."""
    return runs.trained(tmp_path_factory.mktemp("lora"), publish={"repo": REPO})


@pytest.fixture
def made(trained: Run, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that gives the run's card after changes to its recipe's values and its base's facts."""

    def write(recipe: dict[str, Any] | None = None, base: dict[str, Any] | None = None, **more: Any) -> str:
        facts = read_json(trained.delta / "base.json")
        named = {"base": "acme/tiny", "revision": COMMIT, "hub_id": "acme/tiny"} if base is None else base
        values = trained.recipe().model_dump()
        for section, changed in (recipe or {}).items():
            values[section] |= changed
        settings = Recipe.model_validate(values)
        monkeypatch.setattr(Run, "recipe", lambda run: settings)
        read = card_module.read_json
        monkeypatch.setattr(
            card_module, "read_json", lambda path: {**facts, **named} if path.name == "base.json" else read(path)
        )
        return card(trained, **more)

    return write


def test_the_header_says_what_the_hub_needs_to_know(made: Any) -> None:
    license = {"license": "other", "license_name": "tiny", "license_link": "LICENSE"}
    data = {"train": "acme/rows:train", "eval": "acme/rows:test"}
    assert front_matter(made({"data": data}, license=license)) == {
        "base_model": "acme/tiny",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        **license,
        "tags": ["llmtune", "full", "lora"],
        "datasets": ["acme/rows"],
    }


def test_merged_weights_are_a_finetune_for_transformers(made: Any) -> None:
    head = front_matter(made({"publish": {"weights": "merged"}}))
    assert (head["base_model_relation"], head["library_name"]) == ("finetune", "transformers")
    assert "datasets" not in head
    assert "license" not in head


def test_trained_tensors_name_no_library_that_could_not_load_them(made: Any) -> None:
    text = made(base={"base": "acme/tiny", "revision": None, "hub_id": "acme/tiny", "kind": "tensors"})
    assert front_matter(text)["base_model_relation"] == "finetune"
    assert "library_name" not in front_matter(text)
    assert "trained = load_file(hf_hub_download('me/my-model', 'trained.safetensors'))" in text


def use(text: str) -> str:
    """The code that a card says to load its model with."""
    block = text.split("## Use\n")[1].split("\n## ")[0].splitlines()
    return "\n".join(line.removeprefix("    ") for line in block if line.startswith("    "))


def test_only_the_card_of_a_bottleneck_adapter_says_what_peft_lacks(made: Any) -> None:
    named = {"base": "acme/tiny", "revision": COMMIT, "hub_id": "acme/tiny"}
    text = made(base={**named, "adapter": "bottleneck"})
    assert use(text).startswith("import llmtune.bottleneck\nfrom peft import PeftModel\n")
    assert f"llmtune has to be installed ({llmtune.__version__} or newer)" in text
    for other in (
        made(),
        made(base={**named, "kind": "tensors", "adapter": "none"}),
        made({"publish": {"weights": "merged"}}, base={**named, "adapter": "bottleneck"}),
    ):
        assert "import llmtune" not in other


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [{"kind": "bottleneck", "size": 4}, {"kind": "lora", "rank": 4}])
def test_the_code_on_a_card_loads_the_adapter(tmp_path: Path, adapter: dict[str, Any]) -> None:
    done = runs.trained(tmp_path, {"kind": "full", "lr": 1e-3, "adapter": adapter}, publish={"repo": REPO})
    facts = read_json(done.delta / "base.json")
    write_json(done.delta / "base.json", {**facts, "base": "acme/tiny", "hub_id": "acme/tiny", "revision": COMMIT})
    code = use(card(done)).replace(f"'acme/tiny', revision='{COMMIT}'", repr(facts["base"]))
    asks = (
        "import torch\nids = torch.arange(3, 20)[None]\nwith torch.no_grad():\n    tuned = model(ids).logits\n"
        "    with model.disable_adapter():\n        assert not torch.allclose(tuned, model(ids).logits)\n"
    )
    code = code.replace(repr(REPO), repr(str(done.delta))) + "\n" + asks
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


NASTY = [
    "a: b # c",
    "x\n---\ninjected: true\n---\n# Owned",
    "{{ 7 * 7 }} {% for x in y %}",
    "'\"`| <script>alert(1)</script>",
    "!!python/object/apply:os.system ['true']",
    "null",
    "- item\n- item",
    "\u2028\x85é你",
]


@pytest.mark.parametrize("text", NASTY)
def test_whatever_a_user_wrote_the_header_is_the_yaml_that_was_meant(made: Any, text: str) -> None:
    base = {"base": text, "revision": text, "hub_id": text}
    written = made(base=base, license={"license": text, "license_name": text})
    assert written.startswith("---\n")
    header, rest = written[4:].split("\n---\n", 1)
    head = yaml.safe_load(header)
    assert (head["base_model"], head["license"], head["license_name"]) == (text, text, text)
    assert set(head) <= {
        "base_model",
        "base_model_relation",
        "library_name",
        "pipeline_tag",
        "license",
        "license_name",
        "tags",
    }
    assert rest.startswith("\n# my-model\n")
    outside = "\n".join(line for line in rest.splitlines() if not line.startswith("    "))
    assert "\n# Owned" not in outside
    assert "49" not in outside.split("## Use")[0]


def test_the_card_tells_the_plan_the_recipe_and_how_to_load(made: Any, trained: Run) -> None:
    text = made()
    plan = read_json(trained.plan_file)
    stage = plan["stages"][0]
    counts = f"{sum(stage['tensors'].values())} | {stage['trained']:,}"
    row = f"| 1 | 1-{stage['end']} | all layers | 1 .. 2 | {counts} | 1e-3 |"
    assert row in text
    assert f"base = AutoModelForCausalLM.from_pretrained('acme/tiny', revision='{COMMIT}')" in text
    assert "model = PeftModel.from_pretrained(base, 'me/my-model')" in text
    assert "    method:\n      kind: full\n" in text
    sums = trained.manifest()["steps"]["train"]["files"]["delta/adapter_model.safetensors"]
    assert f"| `adapter_model.safetensors` | {sums['bytes']:,} | `{sums['sha256']}` |" in text


def test_no_path_and_no_word_of_the_data_is_in_it(made: Any, trained: Run) -> None:
    text = made(
        {"eval": {"suite": str(trained.path / "mine.yaml")}},
        base={"base": str(trained.path), "revision": None, "hub_id": None},
    )
    assert str(trained.path.parent) not in text
    assert "train: rows.jsonl" in text
    assert "suite: mine.yaml" in text
    rows = [json.loads(line) for line in (trained.path.parent / "rows.jsonl").read_text().splitlines()]
    assert not any(row["prompt"] in text for row in rows)
    assert len(rows) == 20


def test_results_come_with_n_error_and_limit(made: Any, trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Not evaluated." in made()
    rows = [{"model": "base", "n": "20", "exact match": "0.10 ± 0.07", "limit": "20"}]
    monkeypatch.setattr(card_module, "results", lambda run: rows)
    monkeypatch.setattr(Run, "done", lambda run, step: step == "eval")
    text = made()
    assert "| model | n | exact match | limit |\n| --- | --- | --- | --- |\n| base | 20 | 0.10 ± 0.07 | 20 |" in text


def test_merged_weights_come_with_their_proof(made: Any, trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"merged/model.safetensors": {"bytes": 4096, "sha256": "ab" * 32}}
    step = {"files": weights, "dtype": "bfloat16", "gap": 0.0123, "bound": 0.5, "shift": 3.0}
    monkeypatch.setattr(Run, "manifest", lambda run: {"steps": {"merge": step}})
    text = made({"publish": {"weights": "merged"}})
    assert "Stored in bfloat16." in text
    assert "is 0.012 (bound 0.5); training moved logits by up to 3." in text
    assert f"| `model.safetensors` | 4,096 | `{'ab' * 32}` |" in text


def test_a_card_is_ours_until_a_letter_changes(made: Any) -> None:
    text = made()
    assert is_ours(text)
    assert is_ours(seal("x\n"))
    assert not is_ours(text.replace("my-model", "My-model", 1))
    assert not is_ours(text + "more\n")
    assert not is_ours("# Mine\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\n---\n# A", {"license": "mit"}),
        ("---\r\nlicense: mit\r\n---\r\n# A", {"license": "mit"}),
        ("# A\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- a\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("", {}),
    ],
)
def test_a_header_is_read_or_there_is_none(text: str, expected: dict[str, Any]) -> None:
    assert front_matter(text) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/ann/rows.jsonl", "rows.jsonl"),
        ("~/rows.jsonl", "rows.jsonl"),
        ("C:\\Users\\ann\\rows.csv", "rows.csv"),
        ("\\\\server\\share\\rows.csv", "rows.csv"),
        ("owner/name:train", "owner/name:train"),
        ({"a": ["/x/y", 1, None], "b": (True, "/z")}, {"a": ["y", 1, None], "b": (True, "z")}),
    ],
)
def test_a_path_is_shortened_to_its_name(value: Any, expected: Any) -> None:
    assert shorten(value) == expected


def test_nothing_ends_a_cell_a_line_of_code_or_a_block() -> None:
    assert table(["a|b"], [["c\nd|"]]) == "| a\\|b |\n| --- |\n| c d\\| |"
    assert code("a`b\nc") == "`a'b c`"
    assert indented("```\n# x\n\n```").splitlines() == ["    ```", "    # x", "    ", "    ```"]


def test_a_run_without_a_place_to_publish_has_no_card(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="publish: is not in the recipe"):
        card(runs.trained(tmp_path))
