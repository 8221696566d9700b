"""Recipe mistakes: each is one line with place, key and nearest valid word, from a file or from an override."""

from pathlib import Path

import pytest
import yaml

from llmtune import recipe
from tests.support.recipes import GOOD, load_error, method, write
from tests.support.schema import violations

UNKNOWN = [
    (GOOD + "trian: {epochs: 1}", 4, "trian", "did you mean 'train'?"),
    (GOOD + "train: {epoch: 1}", 4, "train.epoch", "did you mean 'epochs'?"),
    (GOOD + "train:\n  seed: 1\n  batchsize: 1", 6, "train.batchsize", "did you mean 'batch_size'?"),
    (GOOD + "train: {learning_rate: 1}", 4, "train.learning_rate", "unknown key; here it is method.lr"),
    (GOOD + "train: {colour: 1}", 4, "train.colour", "known here: activation_checkpointing, batch_size"),
    (GOOD + "lr: 1.0", 4, "lr", "did you mean method.lr?"),
    (GOOD + "train: {lr: 1.0}", 4, "train.lr", "did you mean method.lr?"),
    (GOOD.replace("base:", "bse:"), 1, "model.bse", "did you mean 'base'?"),
    (method("{kind: full, rank: 4}"), 3, "method.rank", "did you mean method.adapter.rank?"),
    (method("{kind: full, reaches: [1]}"), 3, "method.reaches", "unknown key for kind full; gradual has it"),
    (method("{kind: full, adapter: {kind: lora, rnk: 4}}"), 3, "method.adapter.rnk", "did you mean 'rank'?"),
    (
        method("{kind: full, adapter: {kind: ia3, rank: 4}}"),
        3,
        "method.adapter.rank",
        "for kind ia3; lora and vera have it",
    ),
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
        "one of none, 4bit, 8bit is expected",
    ),
    (GOOD.replace("{base: some/model}", "{base: a, quantize: 4bits}"), 1, "model.quantize", "did you mean '4bit'?"),
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
    (
        GOOD + "eval: {metrics: [json, rogue]}",
        4,
        "eval.metrics.1",
        "text such as regex:^[A-Z]+$ is expected, got 'rogue'",
    ),
    (GOOD + "eval: {metrics: [rogue]}", 4, "eval.metrics.0", "did you mean 'rouge'?"),
    (GOOD + "eval: {metrics: ['regex:(a']}", 4, "eval.metrics.0", "regex:(a is no regular expression: missing )"),
    (GOOD + "publish: {}", 4, "publish.repo", "is missing and has no default"),
    (GOOD + "publish: {repo: me}", 4, "publish.repo", "text such as owner/name is expected, got 'me'"),
    (GOOD + "publish: {repo: a/b, visibility: Public}", 4, "publish.visibility", "did you mean 'public'?"),
    (method("ful"), 3, "method", "one of full, frozen, gradual"),
    (method("ful"), 3, "method", "or a section, is expected, got 'ful'; did you mean 'full'?"),
    (method("lroa"), 3, "method", "did you mean 'lora'?"),
    (method("{kind: lorra}"), 3, "method.kind", "did you mean 'lora'?"),
    (method("{lr: 1.0}"), 3, "method", "needs a kind: full, frozen, gradual, discriminative, staged"),
    (method("\n  kind: gradul"), 4, "method.kind", "did you mean 'gradual'?"),
    (method("{kind: [full]}"), 3, "method.kind", "is expected, got a list"),
    (method("{kind: full, lr: 1e-4}"), 3, "method.lr", "got '1e-4', which is text in YAML; write 1.0e-4"),
    (method("{kind: full, lr: 2.5E4}"), 3, "method.lr", "write 2.5e+4"),
    (method("{kind: full, lr: -1.0e-4}"), 3, "method.lr", "a number > 0 is expected, got -0.0001"),
    (method("{kind: full, adapter: lorra}"), 3, "method.adapter", "one of none, lora, ia3"),
    (method("{adapter: {kind: lora, rnk: 3}}"), 3, "method.adapter.rnk", "did you mean 'rank'?"),
    (method("\n  kind: lora\n  rank: 0"), 5, "method.adapter.rank", "a number >= 1 is expected"),
    (method("{kind: lora, reaches: [1]}"), 3, "method.reaches", "unknown key for kind full; gradual has it"),
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
MIXTURES = [
    (["a.jsonl", {"source": "b.jsonl", "fraction": 0.5}], "data.train.0", "write {source: a.jsonl, fraction: ...}"),
    ([{"source": "a"}], "data.train.0.fraction", "is missing and has no default"),
    ([{"source": "a", "fraction": 0}], "data.train.0.fraction", "a number > 0 is expected, got 0"),
    (
        [{"source": "a", "fraction": 0.9}, {"source": "b", "fraction": 2}],
        "data.train.1.fraction",
        "a number <= 1 is expected, got 2",
    ),
    (
        [{"source": "a", "fraction": 0.9}, {"source": "b", "weight": 1}],
        "data.train.1.weight",
        "unknown key; known here: fraction, source",
    ),
    (
        [{"source": "a", "fraction": 0.9}, {"source": "b", "fraction": 0.2}],
        "data.train",
        "the fractions sum to 1.1, not to 1; in the same proportions they are 0.8182, 0.1818",
    ),
    (
        [{"source": "a", "fraction": 0.5}, {"source": "./a", "fraction": 0.5}],
        "data.train.1.source",
        "./a is source 0 too; name it once, with both fractions",
    ),
    ([], "data.train", "text or a list of at least 1 is expected"),
    ({"source": "a", "fraction": 1}, "data.train", "text or a list is expected, got a section"),
]


@pytest.mark.parametrize(("text", "line", "key", "words"), [*UNKNOWN, *WRONG], ids=lambda value: str(value)[-40:])
def test_reports_a_mistake_in_one_line(tmp_path: Path, text: str | bytes, line: int, key: str, words: str) -> None:
    message = load_error(write(tmp_path, text))
    assert message.startswith(f"recipe.yaml:{line}: {key + ': ' if key else ''}"), message
    assert words in message


@pytest.mark.parametrize(("mixture", "key", "words"), MIXTURES, ids=lambda value: str(value)[-40:])
def test_reports_a_wrong_mixture_in_one_line(tmp_path: Path, mixture: object, key: str, words: str) -> None:
    text = GOOD.replace("train: rows.jsonl", f"train: {yaml.safe_dump(mixture, default_flow_style=True).strip()}")
    message = load_error(write(tmp_path, text.replace("data: {", "data: {\n ")))
    assert message.startswith(f"recipe.yaml:3: {key}: "), message
    assert words in message
    override = f"data.train={yaml.safe_dump(mixture, default_flow_style=True, width=1000).strip()}"
    assert load_error(write(tmp_path, GOOD), override).endswith(message.partition(": ")[2])


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
        ("method=ful", "got 'ful'; did you mean 'full'?"),
        ("method.kind=qlora2", "method.kind: one of full, frozen"),
        ("method={kind: full, kind: frozen}", "method.kind: duplicate key"),
        ("method.kind=gradul", "did you mean 'gradual'?"),
        ("method.adapter=lorra", "got 'lorra'; did you mean 'lora'?"),
        ("method.adapter.rank=3", "method.adapter: needs a kind"),
        ("model.base.x=1", "model.base is 'some/model', not a section, so 'x' cannot be set in it"),
        ("publish.visibility=public", "publish.repo: is missing"),
        ("method.stages.0.until=1", "method.stages: unknown key for kind full; staged has it"),
    ],
)
def test_names_a_wrong_override_and_no_line(tmp_path: Path, override: str, words: str) -> None:
    message = load_error(write(tmp_path, GOOD + "train: {epochs: 1}\n"), override)
    assert message.startswith(f"--set {override}: "), message
    assert words in message
    assert "recipe.yaml" not in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.reaches.3=1", "method.reaches is a list and '3' is not an index of it; try 0 to 2"),
        ("method.reaches.-1=1", "'-1' is not an index of it"),
        ("method.reaches.first=1", "'first' is not an index of it"),
        ("method.reaches.0=alll", "method.reaches.0: a number or all is expected, got 'alll'; did you mean 'all'?"),
    ],
)
def test_reports_a_wrong_index_of_a_list(tmp_path: Path, override: str, words: str) -> None:
    message = load_error(write(tmp_path, method("{kind: gradual, reaches: [1, 2, all]}")), override)
    assert message.startswith(f"--set {override}: method.reaches")
    assert words in message


# Rules across keys, and floats that JSON has no word for, are beyond a JSON schema.
BEYOND = ("lr: [1.0]}", "decay: 0.9", "{until: 0.5}", ".nan", ".inf", "8.0}", "regex:(a")


@pytest.mark.parametrize("text", [text for text, *_ in [*UNKNOWN, *WRONG] if not any(mark in text for mark in BEYOND)])
def test_schema_rejects_what_does_not_load(text: str) -> None:
    root = recipe.schema()
    assert violations(yaml.safe_load(text), root, root) != []
