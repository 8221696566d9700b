"""The model card: a header that is YAML whatever a user wrote, facts from the run's files, no word of the data."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

import llmtune
from llmtune.errors import RecipeError
from llmtune.files import read_json, write_json
from llmtune.publishing.card import card
from llmtune.publishing.header import delta_note, front_matter, is_ours, published_weights, sign
from llmtune.publishing.markdown import code, indented, table
from llmtune.publishing.parts.pictures import loss_picture, plan_picture
from llmtune.recipe.paths import strip_paths
from llmtune.recipe.sections import Publish, Recipe, dump
from llmtune.run import Run
from tests.support import runs, tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "me/my-model"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Make a LoRA run on a private folder, with a publish section."""
    return runs.trained(tmp_path_factory.mktemp("lora"), publish={"repo": REPO})


@pytest.fixture
def write_card(trained: Run, tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes the run's card after changes to its recipe, its base's facts and its folder."""

    def write(
        recipe: dict[str, Any] | None = None,
        base: dict[str, Any] | None = None,
        change: Callable[[Run], None] = lambda run: None,
        license: dict[str, str] | None = None,
    ) -> str:
        run = Run(tmp_path / "run")
        shutil.copytree(trained.path, run.path, dirs_exist_ok=True)
        values = run.recipe().model_dump()
        for section, changed in (recipe or {}).items():
            values[section] |= changed
        run.recipe_file.write_text(dump(Recipe.model_validate(values)))
        named = {"base": "acme/tiny", "revision": COMMIT, "hub_id": "acme/tiny"} if base is None else base
        write_json(run.delta / "base.json", {**read_json(run.delta / "base.json"), **named})
        change(run)
        return card(run, license)

    return write


def test_header_names_base_license_and_datasets(write_card: Callable[..., str]) -> None:
    license = {"license": "other", "license_name": "tiny", "license_link": "LICENSE"}
    data = {"train": "acme/rows:train", "eval": "acme/rows:main:test"}
    assert front_matter(write_card({"data": data}, license=license)) == {
        "base_model": "acme/tiny",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        **license,
        "tags": ["llmtune", "lora"],
        "datasets": ["acme/rows"],
    }


def test_header_names_each_hub_data_set_once_and_no_file(write_card: Callable[..., str]) -> None:
    sources = ["acme/rows:main:train", "acme/more", "old/gone.jsonl", "/home/me/rows.jsonl", "/home/you/rows.jsonl"]
    mixture = [{"source": source, "fraction": 0.2} for source in sources]
    text = write_card({"data": {"train": mixture, "test": "acme/rows:main:test", "template": {"way": "/brief"}}})
    assert front_matter(text)["datasets"] == ["acme/more", "acme/rows"]
    assert "/home" not in text
    assert "way: /brief" in text


def test_code_on_the_card_gives_the_template_its_values(
    write_card: Callable[..., str], trained: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = {"publish": {"weights": "merged"}}
    assert "apply_chat_template" not in write_card(merged)
    base = Path(trained.recipe().model.base)
    shown = tiny.tokenizer("{{ mode }}{{ thinks }};" + tiny.CHATML)
    for values, start in (
        ({"mode": "brief", "thinks": False}, "briefFalse;"),
        ({"no-name": 1, "mode": "it's"}, "it's;"),
    ):
        code = use(write_card(merged | {"data": {"template": values}})).replace(repr(REPO), repr(str(base)))
        scope: dict[str, Any] = {}
        exec(
            code.replace("max_new_tokens=200", "max_new_tokens=2").replace(
                "\n\nmessages", "\n\nset_template(tokenizer)\nmessages"
            ),
            scope | {"set_template": lambda tokenizer: setattr(tokenizer, "chat_template", shown.chat_template)},
            scope,
        )
        assert shown.decode(scope["inputs"]["input_ids"][0]).startswith(f"{start}<|im_start|>user\nHello!")
    assert capsys.readouterr().out


def test_header_of_merged_weights_says_finetune(write_card: Callable[..., str]) -> None:
    head = front_matter(write_card({"publish": {"weights": "merged"}}))
    assert (head["base_model_relation"], head["library_name"]) == ("finetune", "transformers")
    assert "datasets" not in head
    assert "license" not in head


def test_header_of_trained_tensors_names_no_library(write_card: Callable[..., str]) -> None:
    text = write_card(base={"base": "acme/tiny", "revision": None, "hub_id": "acme/tiny", "kind": "tensors"})
    assert front_matter(text)["base_model_relation"] == "finetune"
    assert "library_name" not in front_matter(text)
    assert "trained = load_file(hf_hub_download('me/my-model', 'trained.safetensors'))" in text


def use(text: str) -> str:
    """Extract the code with which a card loads its model."""
    block = text.split("## Use\n")[1].split("\n## ")[0].splitlines()
    return "\n".join(line.removeprefix("    ") for line in block if line.startswith("    "))


def test_only_bottleneck_card_imports_llmtune(write_card: Callable[..., str]) -> None:
    named = {"base": "acme/tiny", "revision": COMMIT, "hub_id": "acme/tiny"}
    text = write_card(base={**named, "adapter": "bottleneck"})
    assert use(text).startswith("import llmtune.bottleneck\nfrom peft import PeftModel\n")
    assert f"llmtune has to be installed ({llmtune.__version__} or newer)" in text
    for other in (
        write_card(),
        write_card(base={**named, "kind": "tensors", "adapter": "none"}),
        write_card({"publish": {"weights": "merged"}}, base={**named, "adapter": "bottleneck"}),
    ):
        assert "import llmtune" not in other


@pytest.mark.slow
def test_code_on_the_card_loads_the_adapter(tmp_path: Path) -> None:
    publish = {"repo": REPO, "weights": "delta"}
    asks = (
        "import torch\nids = torch.arange(3, 20)[None]\nwith torch.no_grad():\n    tuned = model(ids).logits\n"
        "    with model.disable_adapter():\n        assert not torch.allclose(tuned, model(ids).logits)\n"
    )
    scripts = []
    # The bottleneck's code imports llmtune, so it comes last.
    for adapter in ({"kind": "lora", "rank": 4}, {"kind": "vera"}, {"kind": "bottleneck", "size": 4}):
        method = {"kind": "full", "lr": 1e-3, "adapter": adapter}
        done = runs.trained(tmp_path / str(adapter["kind"]), method, publish=publish)
        facts = read_json(done.delta / "base.json")
        write_json(done.delta / "base.json", {**facts, "base": "acme/tiny", "hub_id": "acme/tiny", "revision": COMMIT})
        code = use(card(done)).replace(f"'acme/tiny', revision='{COMMIT}'", repr(facts["base"]))
        scripts.append(code.replace(repr(REPO), repr(str(done.delta))) + "\n" + asks)
    together = "\n".join(f"exec({script!r}, {{}})" for script in scripts)
    ended = subprocess.run([sys.executable, "-c", together], capture_output=True, text=True, check=False)
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
def test_header_survives_any_text_of_a_user(write_card: Callable[..., str], text: str) -> None:
    base = {"base": text, "revision": text, "hub_id": text}
    written = write_card(base=base, license={"license": text, "license_name": text})
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


def test_card_shows_plan_recipe_and_usage(write_card: Callable[..., str], trained: Run) -> None:
    text = write_card()
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


def test_code_on_the_card_names_the_class_that_loads_the_base(write_card: Callable[..., str]) -> None:
    named = {"base": "acme/tiny", "revision": COMMIT, "hub_id": "acme/tiny"}
    text = write_card(base={**named, "loaded_by": "AutoModelForImageTextToText"})
    assert "from transformers import AutoModelForImageTextToText, AutoTokenizer" in text
    assert f"base = AutoModelForImageTextToText.from_pretrained('acme/tiny', revision='{COMMIT}')" in text
    assert "AutoModelForCausalLM" not in text


def test_card_holds_no_path_and_no_data(write_card: Callable[..., str], trained: Run) -> None:
    text = write_card(
        {"eval": {"suite": str(trained.path / "mine.yaml")}},
        base={"base": str(trained.path), "revision": None, "hub_id": None},
    )
    assert str(trained.path.parent) not in text
    assert "train: rows.jsonl" in text
    assert "suite: mine.yaml" in text
    rows = [json.loads(line) for line in (trained.path.parent / "rows.jsonl").read_text().splitlines()]
    assert not any(row["prompt"] in text for row in rows)
    assert len(rows) == 20


def test_card_shows_results_with_n_and_error(write_card: Callable[..., str]) -> None:
    def evaluate(run: Run) -> None:
        score = {"value": 0.1, "stderr": 0.07, "n": 20}
        result = {"n": 20, "of": 120, "metrics": {"exact_match": score}}
        for name in ("base", "tuned"):
            write_json(run.eval / f"{name}.json", {"results": {"held_out": result}})
        run.mark("eval", [run.eval])

    assert "Not evaluated." in write_card()
    text = write_card(change=evaluate)
    assert "| model | exact match | n |\n| --- | --- | --- |\n| base, zero-shot | 0.100 ± 0.070 | 20 of 120 |" in text
    assert "4-bit" not in text
    chosen = "The best checkpoint was chosen on these rows too"
    assert chosen not in text
    assert chosen in write_card({"train": {"keep_best": True}}, change=evaluate)
    assert chosen not in write_card({"train": {"keep_best": True}, "data": {"test": "t.jsonl"}}, change=evaluate)

    def evaluate_in_4bit(run: Run) -> None:
        evaluate(run)
        write_json(run.eval / "tuned.json", {**read_json(run.eval / "tuned.json"), "settings": {"quantize": "4bit"}})
        run.mark("eval", [run.eval])

    text = write_card(change=evaluate_in_4bit)
    assert "\n\nBase and tuned model answered over the 4-bit base that was trained.\n" in text


def test_card_shows_proof_of_merge(write_card: Callable[..., str]) -> None:
    def merge(run: Run) -> None:
        run.merged.mkdir()
        (run.merged / "model.safetensors").write_bytes(bytes(4096))
        run.mark("merge", [run.merged], dtype="bfloat16", gap=0.0123, bound=0.5, shift=3.0)

    text = write_card({"publish": {"weights": "merged"}}, change=merge)
    assert "Stored in bfloat16." in text
    assert "is 0.012 (bound 0.5); training moved logits by up to 3." in text
    assert f"| `model.safetensors` | 4,096 | `{hashlib.sha256(bytes(4096)).hexdigest()}` |" in text


def test_recognizes_own_card_until_edited(write_card: Callable[..., str]) -> None:
    text = write_card()
    assert is_ours(text)
    assert is_ours(sign("x\n"))
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
def test_reads_valid_front_matter_only(text: str, expected: dict[str, Any]) -> None:
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
def test_strips_paths_to_file_names(value: Any, expected: Any) -> None:
    assert strip_paths(value) == expected


def test_escapes_cells_code_and_blocks() -> None:
    assert table(["a|b"], [["c\nd|"]]) == "| a\\|b |\n| --- |\n| c d\\| |"
    assert code("a`b\nc") == "`a'b c`"
    assert indented("```\n# x\n\n```").splitlines() == ["    ```", "    # x", "    ", "    ```"]


def test_refuses_card_without_publish_section(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="publish: is missing; add publish"):
        card(runs.trained(tmp_path))


CONVERTED: dict[str, Any] = {
    "base": "package:llm-tiny",
    "revision": "ab" * 32,
    "hub_id": "acme/tiny",
    "converted": {"file": "tiny.gguf", "sha256": "ab" * 32, "types": {"Q4_1": 20, "F32": 4}},
    "files": {"model.safetensors": {"bytes": 9, "sha256": "cd" * 32}},
}


def test_delta_of_converted_weights_names_them_and_no_model_on_the_hub(write_card: Callable[..., str]) -> None:
    text = write_card(base=CONVERTED)
    head = front_matter(text)
    assert "base_model" not in head
    assert "base_model_relation" not in head
    sentences = [
        "The base is `package:llm-tiny`: weights converted to bf16 from tiny.gguf, which stores 20 of its 24 "
        f"tensors in Q4_1 (SHA-256 `{'ab' * 32}`).",
        f"The converted weights have the SHA-256 `{'cd' * 32}`.",
        "They come from `acme/tiny`, but are not its weights on the Hub: what was trained fits these alone.",
    ]
    assert " ".join(sentences) in text
    assert "from_pretrained('acme/tiny'" not in text
    assert "revision" not in text.split("## How it was trained")[0]
    assert "folder = Path(find_spec('llm_tiny').origin).parent" in text
    assert "source = {'pretrained_model_name_or_path': folder, 'gguf_file': 'tiny.gguf'}" in text


def test_merged_converted_weights_name_where_they_come_from_at_no_revision(write_card: Callable[..., str]) -> None:
    text = write_card({"publish": {"weights": "merged"}}, base=CONVERTED)
    assert (front_matter(text)["base_model"], front_matter(text)["base_model_relation"]) == ("acme/tiny", "finetune")
    assert "weights converted to bf16 from tiny.gguf" in text
    assert "at revision" not in text


def test_full_is_no_name_for_an_adapter(write_card: Callable[..., str]) -> None:
    text = write_card()
    assert front_matter(text)["tags"] == ["llmtune", "lora"]
    assert "Fine-tuned by `LoRA (rank 4)` with llmtune" in text


def test_scores_stand_in_the_header(write_card: Callable[..., str]) -> None:
    def evaluate(run: Run) -> None:
        metrics = {
            "exact_match": {"value": 0.25, "stderr": 0.07, "n": 20},
            "rougeL": {"value": 0.5, "stderr": None, "interval": [0.4, 0.6], "n": 19},
            "perplexity": {"value": None, "stderr": None, "n": 20},
        }
        accuracy = {"acc": {"value": 0.6, "stderr": 0.05, "n": 100}}
        results = {
            "held_out": {"shots": 0, "n": 20, "of": 25, "version": 1, "metrics": metrics},
            "arc_easy": {"shots": 0, "n": 100, "of": 2376, "version": 1.0, "metrics": accuracy},
            "mmlu_law": {"shots": 0, "n": 100, "of": 100, "version": 1.0, "metrics": accuracy, "group": "mmlu"},
            "general_questions": {"shots": 0, "n": 100, "of": 100, "version": 1, "metrics": accuracy},
        }
        for name in ("base", "tuned"):
            write_json(run.eval / f"{name}.json", {"results": results})
        run.mark("eval", [run.eval])

    head = front_matter(write_card({"data": {"test": "acme/rows:main:test"}}, change=evaluate))
    assert head["model-index"] == [
        {
            "name": "my-model",
            "results": [
                {
                    "task": {"type": "text-generation"},
                    "dataset": {
                        "type": "acme/rows",
                        "name": "held-out rows",
                        "config": "main",
                        "split": "test",
                        "args": {"num_few_shot": 0, "n": 20, "of": 25},
                    },
                    "metrics": [
                        {
                            "type": "exact_match",
                            "value": 0.25,
                            "name": "exact match",
                            "args": {"stderr": 0.07, "n": 20},
                        },
                        {"type": "rougeL", "value": 0.5, "name": "rougeL", "args": {"interval": [0.4, 0.6], "n": 19}},
                    ],
                },
                {
                    "task": {"type": "text-generation"},
                    "dataset": {
                        "type": "arc-easy",
                        "name": "arc_easy",
                        "args": {"num_few_shot": 0, "n": 100, "of": 2376, "version": "1.0"},
                    },
                    "metrics": [{"type": "acc", "value": 0.6, "name": "acc", "args": {"stderr": 0.05, "n": 100}}],
                },
                {
                    "task": {"type": "text-generation"},
                    "dataset": {
                        "type": "general-questions",
                        "name": "llmtune's general questions",
                        "args": {"num_few_shot": 0, "n": 100, "of": 100, "version": "1"},
                    },
                    "metrics": [{"type": "acc", "value": 0.6, "name": "acc", "args": {"stderr": 0.05, "n": 100}}],
                },
            ],
        }
    ]


def test_card_shows_pictures_of_plan_and_loss(write_card: Callable[..., str]) -> None:
    def train(run: Run) -> None:
        losses = [{"step": step, "loss": 4.0 / step, "lr": {"1": 1e-3}} for step in range(1, 6)]
        run.log_file.write_text("".join(json.dumps(one) + "\n" for one in [*losses, {"step": 5, "eval_loss": 0.9}]))
        plan_, loss = plan_picture(run), loss_picture(run)
        assert loss is not None
        for picture, label in ((plan_, "What trains when"), (loss, "Loss by step: training loss from")):
            root = ElementTree.fromstring(picture.svg)  # an image of its own has to be XML
            assert root.tag == "{http://www.w3.org/2000/svg}svg"
            assert root[0].text == picture.words
            assert picture.words.startswith(label)
            used = set(re.findall(r"var\((--\w+)\)", picture.svg))
            assert used <= set(re.findall(r"(--\w+):", picture.svg))
            assert "http" not in picture.svg.replace("http://www.w3.org/2000/svg", "")

    assert "figures/loss.svg" not in write_card()
    text = write_card(change=train)
    assert "![What trains when, by learning rate: steps 1-" in text
    assert "one validation, 0.9](figures/loss.svg)\n\nLoss by step, mean cross-entropy per answer token" in text


LORA = {"kind": "lora", "rank": 4}


@pytest.mark.parametrize(
    ("adapter", "enabled", "weights", "note"),
    [
        (LORA, True, "delta", None),
        ({"kind": "vera"}, False, "delta", None),
        ({"kind": "none"}, True, "merged", None),
        ({"kind": "none"}, False, "delta", "since merge.enabled is false; to load it takes the code on its card"),
        ({"kind": "bottleneck", "size": 4, "form": "parallel"}, True, "merged", None),
        (
            {"kind": "bottleneck", "size": 4, "form": "sequential"},
            True,
            "delta",
            "since no full weights can be made of it; to load it takes llmtune and the code on its card",
        ),
    ],
)
def test_publishes_what_stock_libraries_load_unless_it_cannot_be_made(
    trained: Run, adapter: dict[str, Any], enabled: bool, weights: str, note: str | None
) -> None:
    values = trained.recipe().model_dump()
    values["method"] = {"kind": "full", "lr": 1e-3, "adapter": adapter}
    values["merge"]["enabled"] = enabled
    settings = Recipe.model_validate(values)
    assert published_weights(settings) == weights
    assert (delta_note(settings) or "").endswith(note or "")
    assert (delta_note(settings) is None) == (note is None)
    asked = settings.model_copy(update={"publish": Publish(repo=REPO, weights="delta")})
    assert (published_weights(asked), delta_note(asked)) == ("delta", None)
