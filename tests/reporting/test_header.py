"""The top of the page: the method in the field's words, the base and what was done to it, the key numbers."""

from pathlib import Path
from typing import Any

import pytest

from llmtune.files import write_json
from llmtune.plan.distances import Everything
from llmtune.reporting.header import conversion_in_words, method_title
from tests.support.pages import empty, falling, page, stage, with_log

LORA = {"kind": "lora", "rank": 16, "alpha": 32}


@pytest.mark.parametrize(
    ("method", "title"),
    [
        ({"kind": "full"}, "Full fine-tuning"),
        ({"kind": "full", "adapter": LORA}, "LoRA (rank 16, alpha 32)"),
        ({"kind": "full", "adapter": {**LORA, "dora": True}}, "DoRA (rank 16, alpha 32)"),
        ({"kind": "full", "adapter": {**LORA, "rslora": True}}, "LoRA (rank 16, alpha 32, rank-stabilized)"),
        ({"kind": "full", "adapter": {"kind": "ia3"}}, "IA3"),
        ({"kind": "gradual", "adapter": LORA}, "LoRA (rank 16, alpha 32), gradual unfreezing"),
        ({"kind": "discriminative"}, "Discriminative rates"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_names_the_method_as_the_field_does(tmp_path: Path, method: dict[str, Any], title: str) -> None:
    assert method_title(empty(tmp_path, method=method).recipe()) == title


def test_lora_on_a_4_bit_base_is_qlora(tmp_path: Path) -> None:
    run = empty(tmp_path, method={"kind": "full", "adapter": LORA}, model={"base": "me/base", "quantize": "4bit"})
    assert method_title(run.recipe()) == "QLoRA (rank 16, alpha 32)"


@pytest.mark.parametrize(
    ("converted", "words"),
    [
        ({}, None),
        (
            {"file": "a.gguf", "types": {"Q4_1": 210, "F32": 62}},
            "a copy converted from a GGUF file: 210 of 272 tensors stored in 4 bits (Q4_1)",
        ),
        (
            {"types": {"Q6_K": 10, "Q4_K": 90, "F16": 100}},
            "a copy converted from a GGUF file: 90 of 200 tensors stored in 4 bits (Q4_K), "
            "10 of 200 tensors stored in 6 bits (Q6_K)",
        ),
        ({"types": {"BF16": 3, "IQ2_XXS": None, "F32": "x"}}, "a copy converted from a GGUF file"),
        ({"file": None, "types": [1]}, "a copy converted from a GGUF file"),
    ],
    ids=str,
)
def test_says_what_a_converted_base_was(converted: dict[str, Any], words: str | None) -> None:
    assert conversion_in_words(converted) == words


def test_page_says_on_which_copy_a_delta_was_trained(tmp_path: Path) -> None:
    run = with_log(empty(tmp_path), [stage(0, 40, Everything(), {"0": 1e-3})], falling({"0": 1e-3}))
    run.delta.mkdir()
    write_json(run.delta / "base.json", {"converted": {"file": "m.gguf", "types": {"Q4_1": 210, "F32": 62}}})
    assert "trained ona copy converted from a GGUF file: 210 of 272 tensors stored in 4 bits (Q4_1)" in page(run).text


def test_hashes_are_behind_a_fold_and_not_above_it(tmp_path: Path) -> None:
    run = with_log(empty(tmp_path), [stage(0, 40, Everything(), {"0": 1e-3})], falling({"0": 1e-3}))
    run.mark("train", [run.log_file])
    digest = run.manifest()["steps"]["train"]["files"]["log.jsonl"]["sha256"]
    page(run)
    text = run.report_file.read_text()
    assert text.count(digest) == 1
    before, _, _ = text.partition(digest)
    assert before.count("<details") == before.count("</details") + 1
