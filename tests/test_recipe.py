"""Recipes: a mistake is one line with place, key and nearest valid word; what is right survives a round trip."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from llmtune import recipe
from llmtune.errors import RecipeError
from llmtune.method import Facts
from llmtune.recipe import Recipe
from llmtune.yamlfile import LIMIT_BYTES

ROOT = Path(__file__).parents[1]
EXPECTED = 1
FOUND = sorted((ROOT / "recipes").rglob("*.yaml"))
FACTS = Facts(blocks=30, hidden=576, parameters=134_515_008)
GOOD = "model: {base: some/model}\ndata: {train: rows.jsonl}\nmethod: {kind: full}\n"


def write(folder: Path, text: str | bytes) -> Path:
    """A recipe file."""
    file = folder / "recipe.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def said(file: Path, *overrides: str) -> str:
    """The one line that loading a file ends in, with the folder taken out."""
    with pytest.raises(RecipeError) as caught:
        recipe.load(file, list(overrides))
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{file.parent}/", "")


def method(text: str) -> str:
    """A good recipe but for its method."""
    return GOOD.replace("{kind: full}", text)


def test_every_shipped_recipe_is_found() -> None:
    assert len(FOUND) == EXPECTED


@pytest.mark.parametrize("file", FOUND, ids=lambda file: str(file.relative_to(ROOT / "recipes")))
def test_every_shipped_recipe_loads_plans_and_fits_the_schema(file: Path) -> None:
    loaded = recipe.load(file)
    loaded.plan(Facts(blocks=16, hidden=2048, parameters=10**9))
    assert violations(yaml.safe_load(file.read_text()), recipe.schema(), recipe.schema()) == []


UNKNOWN = [
    (GOOD + "trian: {epochs: 1}", 4, "trian", "did you mean 'train'?"),
    (GOOD + "train: {epoch: 1}", 4, "train.epoch", "did you mean 'epochs'?"),
    (GOOD + "train:\n  seed: 1\n  batchsize: 1", 6, "train.batchsize", "did you mean 'batch_size'?"),
    (GOOD + "train: {learning_rate: 1}", 4, "train.learning_rate", "known here: activation_checkpointing, batch_size"),
    (GOOD + "lr: 1.0", 4, "lr", "did you mean method.lr?"),
    (GOOD + "train: {lr: 1.0}", 4, "train.lr", "did you mean method.lr?"),
    (GOOD.replace("base:", "bse:"), 1, "model.bse", "did you mean 'base'?"),
    (method("{kind: full, rank: 4}"), 3, "method.rank", "did you mean method.adapter.rank?"),
    (method("{kind: full, reaches: [1]}"), 3, "method.reaches", "unknown key for kind full; gradual has it"),
    (method("{kind: full, adapter: {kind: lora, ranks: 4}}"), 3, "method.adapter.ranks", "did you mean 'rank'?"),
    (method("{kind: full, adapter: {kind: ia3, rank: 4}}"), 3, "method.adapter.rank", "for kind ia3; lora has it"),
    (method("\n  kind: staged\n  stages:\n  - {until: 1, reachs: 0}"), 6, "method.stages.0.reachs", "'reach'?"),
]
WRONG = [
    ("data: {train: a}\nmethod: {kind: full}", 1, "model", "is missing; it needs base"),
    ("model: {base: a}\ndata: {train: a}", 1, "method", "is missing; it needs kind"),
    (GOOD.replace("base: some/model", "revision: a"), 1, "model.base", "is missing and has no default"),
    (
        GOOD.replace("{base: some/model}", "some/model"),
        1,
        "model",
        "a section is expected, got 'some/model'; write {base:",
    ),
    (GOOD.replace("some/model", "5"), 1, "model.base", "text is expected, got 5; put it in quotes"),
    (GOOD.replace("some/model", '""'), 1, "model.base", "text is expected, got ''"),
    (
        GOOD.replace("{base: some/model}", "{base: a, quantize: 4}"),
        1,
        "model.quantize",
        "one of none, 4bit is expected",
    ),
    (GOOD.replace("{base: some/model}", "{base: a, quantize: 8bit}"), 1, "model.quantize", "did you mean '4bit'?"),
    (GOOD + "train: 5", 4, "train", "a section with keys such as epochs, max_steps, batch_size is expected, got 5"),
    (GOOD + "train:", 4, "train", "a section with keys such as epochs, max_steps, batch_size is expected, got nothing"),
    (GOOD + "train: []", 4, "train", "is expected, got a list"),
    (GOOD + "train: {epochs: 0}", 4, "train.epochs", "a number > 0 is expected, got 0; the default is 2"),
    (GOOD + "train: {epochs: -1.5}", 4, "train.epochs", "a number > 0 is expected, got -1.5"),
    (GOOD + "train: {epochs: .nan}", 4, "train.epochs", "a finite number is expected, got nan"),
    (GOOD + "train: {epochs: .inf}", 4, "train.epochs", "a finite number is expected, got inf"),
    (GOOD + "train: {epochs: many}", 4, "train.epochs", "a number is expected, got 'many'; the default is 2"),
    (GOOD + "train: {epochs: true}", 4, "train.epochs", "a number is expected, got true"),
    (GOOD + 'train: {epochs: "3"}', 4, "train.epochs", "a number is expected, got '3'; write it without quotes"),
    (GOOD + "train: {batch_size: 8.0}", 4, "train.batch_size", "a whole number is expected, got 8.0"),
    (GOOD + "train: {batch_size: 0}", 4, "train.batch_size", "a number >= 1 is expected, got 0; the default is 16"),
    (GOOD + "train: {batch_size: 8e0}", 4, "train.batch_size", "write 8.0e+0"),
    (GOOD + "train: {warmup: 1.0}", 4, "train.warmup", "a number < 1 is expected, got 1.0"),
    (GOOD + "train: {schedule: cosin}", 4, "train.schedule", "did you mean 'cosine'?"),
    (GOOD + "train: {schedule: 5}", 4, "train.schedule", "one of cosine, linear, constant is expected, got 5"),
    (GOOD + "train: {activation_checkpointing: 1}", 4, "train.activation_checkpointing", "true or false is expected"),
    (GOOD + "launch: {accelerate: dpp}", 4, "launch.accelerate", "did you mean 'ddp'?"),
    (GOOD + "publish: {}", 4, "publish.repo", "is missing and has no default"),
    (GOOD + "publish: {repo: me}", 4, "publish.repo", "text such as owner/name is expected, got 'me'"),
    (GOOD + "publish: {repo: a/b, visibility: Public}", 4, "publish.visibility", "did you mean 'public'?"),
    (method("full"), 3, "method", "a section is expected, got 'full'; write {kind: full}"),
    (method("{lr: 1.0}"), 3, "method", "needs a kind: full, frozen, gradual, discriminative, staged"),
    (method("\n  kind: gradul"), 4, "method.kind", "did you mean 'gradual'?"),
    (method("{kind: [full]}"), 3, "method.kind", "is expected, got a list"),
    (method("{kind: full, lr: 1e-4}"), 3, "method.lr", "got '1e-4', which is text in YAML; write 1.0e-4"),
    (method("{kind: full, lr: 2.5E4}"), 3, "method.lr", "write 2.5e+4"),
    (method("{kind: full, lr: -1.0e-4}"), 3, "method.lr", "a number > 0 is expected, got -0.0001"),
    (method("{kind: full, adapter: lora}"), 3, "method.adapter", "write {kind: lora}"),
    (method("{kind: full, adapter: {rank: 3}}"), 3, "method.adapter", "needs a kind: none, lora, ia3, bottleneck"),
    (method("{kind: full, adapter: {kind: lorra}}"), 3, "method.adapter.kind", "did you mean 'lora'?"),
    (method("{kind: full, adapter: {kind: lora, rank: 0}}"), 3, "method.adapter.rank", "a number >= 1 is expected"),
    (
        method("{kind: full, adapter: {kind: lora, targets: all_linear}}"),
        3,
        "method.adapter.targets",
        "did you mean 'all-linear'?",
    ),
    (
        method("{kind: full, adapter: {kind: lora, targets: []}}"),
        3,
        "method.adapter.targets",
        "all-linear or a list of at least 1 is expected, got a list",
    ),
    (method("\n  kind: gradual\n  reaches:\n  - 4\n  - alll"), 7, "method.reaches.1", "did you mean 'all'?"),
    (
        method("{kind: gradual, reaches: [4, 1.5]}"),
        3,
        "method.reaches.1",
        "a whole number or a number < 1 or all is expected, got 1.5",
    ),
    (method("{kind: gradual, reaches: [4, -1]}"), 3, "method.reaches.1", "a number >= 0"),
    (method("{kind: gradual, reaches: 4}"), 3, "method.reaches", "a list is expected, got 4"),
    (method("{kind: gradual, reaches: [1, 2], lr: [1.0e-3, 1e-3]}"), 3, "method.lr.1", "write 1.0e-3"),
    (method("{kind: gradual, reaches: [1, 2], lr: [1.0]}"), 3, "method.lr", "gives 1 values for 2 reaches"),
    (method("\n  kind: gradual\n  bottom_ratio: 0.1\n  decay: 0.9"), 6, "method.decay", "not both"),
    (
        method("\n  kind: staged\n  stages:\n  - {until: 0.9}\n  - {until: 0.5}"),
        7,
        "method.stages.1.until",
        "0.5 follows",
    ),
]
BROKEN = [
    ("", 1, "", "is empty; a mapping of sections (model, data, method, ...) is expected"),
    ("# nothing but a comment\n", 1, "", "is empty"),
    ("- a\n- b\n", 1, "", "holds a list"),
    ("just words\n", 1, "", "holds a single value"),
    ("model: [\n", 2, "", "not YAML"),
    (GOOD + "train:\n\tepochs: 1\n", 5, "", "not YAML"),
    ("a: b: c\n", 1, "", "not YAML: mapping values are not allowed here"),
    (GOOD + "---\n" + GOOD, 4, "", "not YAML: but found another document"),
    (GOOD + "train: {epochs: 1}\ndata: {train: b}\n", 5, "data", "duplicate key; it stands at recipe.yaml:2 too"),
    (GOOD + "train: {seed: 1, seed: 2}", 4, "train.seed", "duplicate key"),
    ("x: &a 1\ny: *a\n", 2, "", "aliases (*a) are not allowed; write the value out"),
    ("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n", 2, "", "aliases"),
    (
        "x: !!python/object/apply:os.system [exit]\n",
        1,
        "x",
        "the tag 'tag:yaml.org,2002:python/object/apply:os.system'",
    ),
    ("x: !!python/name:os.system\n", 1, "x", "is not allowed; a recipe is plain data"),
    ("x: !mine {a: 1}\n", 1, "x", "the tag '!mine' is not allowed"),
    ("x: !!binary aGVsbG8=\n", 1, "x", "is not allowed"),
    (GOOD + "? [a]\n: 1\n", 4, "", "a key is a single word"),
    ("x: " + "[" * 40 + "]" * 40, 1, "", "nested more than 32 deep"),
    ("[" * 100_000, 1, "", "nested more than 32 deep"),
    (b"model: \x00\n", 1, "", "not YAML: special characters are not allowed"),
    (GOOD + "train: {epochs: on}", 4, "train.epochs", 'on is true in YAML; write true or false, or "on" in quotes'),
    (GOOD + "train: {activation_checkpointing: yes}", 4, "train.activation_checkpointing", "yes is true in YAML"),
    (GOOD + "train: {activation_checkpointing: Off}", 4, "train.activation_checkpointing", "Off is false in YAML"),
    (GOOD.replace("some/model", "no"), 1, "model.base", 'no is false in YAML; write true or false, or "no" in quotes'),
    (GOOD + "train: {seed: 010}", 4, "train.seed", "010 is no plain decimal number"),
    (GOOD + "train: {seed: 1:30}", 4, "train.seed", "1:30 is no plain decimal number"),
    (GOOD + "train: {seed: !!int x}", 4, "train.seed", "x is no plain decimal number"),
    (GOOD + "train: {epochs: !!float x}", 4, "train.epochs", "not a valid float: 'x'"),
    (GOOD + f"train: {{seed: {'9' * 5000}}}", 4, "train.seed", "not a valid int"),
    (GOOD.replace("{base: some/model}", "{base: a, revision: 2024-01-01}"), 1, "model.revision", "is a date in YAML"),
]


@pytest.mark.parametrize(
    ("text", "line", "key", "words"), [*UNKNOWN, *WRONG, *BROKEN], ids=lambda value: str(value)[-40:]
)
def test_a_mistake_is_told_in_one_line(tmp_path: Path, text: str | bytes, line: int, key: str, words: str) -> None:
    message = said(write(tmp_path, text))
    assert message.startswith(f"recipe.yaml:{line}: {key + ': ' if key else ''}"), message
    assert words in message


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    assert said(write(tmp_path, b"\x80\x81\xff")) == "recipe.yaml: cannot be read: it is not UTF-8 text"
    assert said(write(tmp_path, GOOD.encode("utf-16"))) == "recipe.yaml: cannot be read: it is not UTF-8 text"


def test_more_than_a_mebibyte_is_refused_unread(tmp_path: Path) -> None:
    text = GOOD + "#" * (LIMIT_BYTES - len(GOOD))
    assert recipe.load(write(tmp_path, text)).model.base == "some/model"
    assert f"{LIMIT_BYTES + 1} bytes are more than a recipe may have" in said(write(tmp_path, text + "#"))


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    assert said(tmp_path / "recip.yaml") == "recip.yaml: no such file; did you mean recipe.yaml?"
    assert said(tmp_path / "x" / "recipe.yaml") == "recipe.yaml: no such file"


def test_a_folder_and_a_device_are_no_recipes(tmp_path: Path) -> None:
    assert said(tmp_path).endswith(": is a folder; give a file")
    write(tmp_path, GOOD)
    assert said(tmp_path).endswith(f": is a folder; give a file, such as {tmp_path.name}/recipe.yaml")
    assert said(Path("/dev/null")) == "null: is not a regular file"


def test_a_byte_order_mark_and_json_are_read(tmp_path: Path) -> None:
    assert recipe.load(write(tmp_path, "\ufeff" + GOOD)).method.kind == "full"
    assert recipe.load(write(tmp_path, json.dumps(yaml.safe_load(GOOD), indent=2))).method.kind == "full"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epochs=0", "train.epochs: a number > 0 is expected, got 0"),
        ("train.epochs=1e-4", "which is text in YAML; write 1.0e-4"),
        ("train.epochs=on", "on is true in YAML"),
        ("train.epochs=[", "not YAML"),
        ("train.epochs=*a", "aliases"),
        ("train.epochs=!!python/name:os.system", "is not allowed"),
        ("train.epochs", "write it as section.key=value"),
        ("=5", "write it as section.key=value"),
        ("train.epoch=1", "train.epoch: unknown key; did you mean 'epochs'?"),
        ("trian.epochs=1", "trian: unknown key; did you mean 'train'?"),
        ("train=1", "train: a section with keys such as epochs"),
        ("model=", "model: a section with keys such as base"),
        ("method=full", "method: a section is expected, got 'full'; write {kind: full}"),
        ("method={kind: full, kind: frozen}", "method.kind: duplicate key"),
        ("method.kind=gradul", "did you mean 'gradual'?"),
        ("method.adapter=lora", "write {kind: lora}"),
        ("method.adapter.rank=3", "method.adapter: needs a kind"),
        ("model.base.x=1", "model.base is 'some/model', not a section, so 'x' cannot be set in it"),
        ("publish.visibility=public", "publish.repo: is missing"),
        ("method.stages.0.until=1", "method.stages: unknown key for kind full; staged has it"),
    ],
)
def test_a_wrong_override_names_itself_and_no_line(tmp_path: Path, override: str, words: str) -> None:
    message = said(write(tmp_path, GOOD + "train: {epochs: 1}\n"), override)
    assert message.startswith(f"--set {override}: "), message
    assert words in message
    assert "recipe.yaml" not in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.reaches.3=1", "method.reaches is a list and '3' is none of its places; valid: 0 to 2"),
        ("method.reaches.-1=1", "'-1' is none of its places"),
        ("method.reaches.first=1", "'first' is none of its places"),
        ("method.reaches.0=alll", "method.reaches.0: a number or all is expected, got 'alll'; did you mean 'all'?"),
    ],
)
def test_a_wrong_place_in_a_list_is_told(tmp_path: Path, override: str, words: str) -> None:
    message = said(write(tmp_path, method("{kind: gradual, reaches: [1, 2, all]}")), override)
    assert message.startswith(f"--set {override}: method.reaches")
    assert words in message


def test_overrides_are_applied_in_order(tmp_path: Path) -> None:
    file = write(tmp_path, method("{kind: gradual, reaches: [1, 2, all]}"))
    loaded = recipe.load(
        file,
        [
            "method.reaches.0=0.25",
            "method.adapter={kind: lora, rank: 4}",
            "method.adapter.rank=8",
            "model.revision=abc",
            "model.revision=",
            "train.epochs=3",
            "publish.repo=me/mine",
            "data.train=a=b.jsonl",
        ],
    )
    assert loaded.method.reaches == (0.25, 2, "all")
    assert loaded.method.adapter.rank == 8
    assert (loaded.model.revision, loaded.train.epochs) == (None, 3)
    assert loaded.publish is not None
    assert (loaded.publish.repo, loaded.data.train) == ("me/mine", "a=b.jsonl")


def test_an_error_found_later_knows_whether_file_or_override_wrote_the_key(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD + "train:\n  epochs: 1\n  seed: 1\n")
    loaded = recipe.load(file, ["train.seed=7", "train.schedule=linear"])
    assert str(loaded.error("train.epochs", "no")) == f"{file}:5: train.epochs: no"
    assert str(loaded.error("train.seed", "no")) == "--set train.seed=7: train.seed: no"
    assert str(loaded.error("train.keep", "no")) == f"{file}:4: train.keep: no"
    assert str(loaded.error("eval.suite", "no")) == f"{file}:1: eval.suite: no"


def test_what_the_model_cannot_follow_is_told_at_its_key(tmp_path: Path) -> None:
    loaded = recipe.load(write(tmp_path, method("\n  kind: gradual\n  reaches:\n  - 1\n  - 99")))
    with pytest.raises(RecipeError, match=r"recipe.yaml:7: method.reaches.1: reach 99 is beyond the model"):
        loaded.plan(FACTS)
    with pytest.raises(RecipeError, match=r"recipe.yaml:7: method.reaches.1: reach 99 is beyond the model"):
        loaded.resolved(FACTS, None)


def test_resolved_pins_revision_and_rates_and_keeps_its_file(tmp_path: Path) -> None:
    file = write(tmp_path, method("\n  kind: discriminative"))
    loaded = recipe.load(file)
    fixed = loaded.resolved(FACTS, "abc123")
    assert (fixed.model.revision, fixed.method.lr, fixed.method.bottom_ratio) == ("abc123", 1e-4, 0.1)
    assert fixed.plan(FACTS) == loaded.plan(FACTS)
    assert (loaded.model.revision, loaded.method.lr) == (None, None)
    assert str(fixed.error("method.kind", "no")) == f"{file}:4: method.kind: no"


EVERYTHING = """
model: {base: a, revision: "0123456", quantize: 4bit, precision: bf16}
data: {train: a.jsonl, eval: b.jsonl, test: "Übung.jsonl", max_length: 64, overlength: error, overlap: warn}
method:
  kind: staged
  adapter: {kind: lora, targets: [q_proj, v_proj], alpha: 8}
  stages:
  - {until: 0.3, reach: 0, lr: 1.0e-05}
  - {until: 0.6, reach: 0.123456789, bottom_ratio: 0.3333333333333333}
  - {until: 1, reach: all, decay: 0.9}
train: {epochs: 1.5, max_steps: 7, weight_decay: 0, save_every: 1}
launch: {accelerate: multi_cpu, processes: 2}
eval: {suite: none, limit: 5}
merge: {enabled: false}
publish: {repo: me/my-model_1.0, weights: merged}
"""


@pytest.mark.parametrize("text", [GOOD, EVERYTHING, method("{kind: gradual, adapter: none}")])
@pytest.mark.parametrize("fix", [False, True], ids=["loose", "resolved"])
def test_dump_and_load_give_the_same_recipe(tmp_path: Path, text: str, fix: bool) -> None:
    loaded = recipe.load(write(tmp_path, text))
    loaded = loaded.resolved(FACTS, "no") if fix else loaded
    dumped = recipe.dump(loaded)
    again = recipe.load(write(tmp_path, dumped))
    assert again.model_dump() == loaded.model_dump()
    assert recipe.dump(again) == dumped


def test_a_dump_writes_every_default_out(tmp_path: Path) -> None:
    plain = yaml.safe_load(recipe.dump(recipe.load(write(tmp_path, GOOD))))
    assert set(plain) == set(Recipe.model_fields)
    for name in ("model", "data", "train", "launch", "eval", "merge"):
        assert set(plain[name]) == set(Recipe.model_fields[name].annotation.model_fields)
    assert plain["method"]["adapter"] == {"kind": "none"}
    assert plain["publish"] is None


def test_a_recipe_cannot_be_changed(tmp_path: Path) -> None:
    loaded = recipe.load(write(tmp_path, GOOD))
    for section, key in (
        (loaded, "train"),
        (loaded.train, "epochs"),
        (loaded.method, "lr"),
        (loaded.method.adapter, "kind"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 1)


def violations(value: Any, rule: dict[str, Any], root: dict[str, Any], where: str = "recipe") -> list[str]:
    """What of a value breaks a JSON schema, for the words of it that recipes use."""
    handled = {"$ref", "$defs", "type", "properties", "required", "additionalProperties", "items", "anyOf", "oneOf"}
    handled |= {"enum", "const", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "minItems"}
    handled |= {"pattern", "discriminator", "title", "description", "default", "examples"}
    assert set(rule) <= handled, set(rule) - handled
    if "$ref" in rule:
        return violations(value, root["$defs"][rule["$ref"].rsplit("/", 1)[1]], root, where)
    for union in ("anyOf", "oneOf"):
        if union in rule:
            tried = [violations(value, option, root, where) for option in rule[union]]
            return [] if [] in tried else [f"{where}: fits none of {len(tried)}: {tried}"]
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None)}
    kinds["number"] = (int, float)
    if "type" in rule and (
        not isinstance(value, kinds[rule["type"]]) or (isinstance(value, bool) != (rule["type"] == "boolean"))
    ):
        return [f"{where}: {value!r} is no {rule['type']}"]
    wrong = [
        "enum" in rule and value not in rule["enum"],
        "const" in rule and value != rule["const"],
        "minimum" in rule and value < rule["minimum"],
        "maximum" in rule and value > rule["maximum"],
        "exclusiveMinimum" in rule and value <= rule["exclusiveMinimum"],
        "exclusiveMaximum" in rule and value >= rule["exclusiveMaximum"],
        "minLength" in rule and len(value) < rule["minLength"],
        "minItems" in rule and len(value) < rule["minItems"],
        "pattern" in rule and not re.search(rule["pattern"], value),
    ]
    found = [f"{where}: {value!r} breaks {rule}"] if any(wrong) else []
    if isinstance(value, dict):
        found += [f"{where}: {key} is missing" for key in rule.get("required", []) if key not in value]
        assert rule["additionalProperties"] is False
        for key, inner in value.items():
            known = rule["properties"].get(key)
            found += violations(inner, known, root, f"{where}.{key}") if known else [f"{where}: {key} is unknown"]
    if isinstance(value, list):
        found += [text for item in value for text in violations(item, rule["items"], root, where)]
    return found


@pytest.mark.parametrize(
    "text", [GOOD, EVERYTHING, method("{kind: gradual, adapter: none, lr: [1.0e-3, 1.0e-4, 1.0e-5]}")]
)
def test_the_schema_accepts_what_loads(tmp_path: Path, text: str) -> None:
    loaded = recipe.load(write(tmp_path, text))
    root = recipe.schema()
    assert violations(yaml.safe_load(text), root, root) == []
    assert violations(yaml.safe_load(recipe.dump(loaded)), root, root) == []


# Rules across keys, and floats that JSON has no word for, are beyond a JSON schema.
BEYOND = ("lr: [1.0]}", "decay: 0.9", "{until: 0.5}", ".nan", ".inf", "8.0}")


@pytest.mark.parametrize("text", [text for text, *_ in [*UNKNOWN, *WRONG] if not any(mark in text for mark in BEYOND)])
def test_the_schema_refuses_what_does_not_load(text: str) -> None:
    root = recipe.schema()
    assert violations(yaml.safe_load(text), root, root) != []


def test_every_key_of_the_schema_is_described() -> None:
    root = recipe.schema()
    for section in root["$defs"].values():
        for key, rule in section["properties"].items():
            assert rule.get("description"), (section["title"], key)
