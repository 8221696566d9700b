"""The top of the page: the method in the field's words, the base and what was done to it, the key numbers."""

from pathlib import Path
from typing import Any

import pytest

from llmtune.files import write_json
from llmtune.plan.distances import Everything
from llmtune.reporting.header import conversion_in_words
from tests.support.pages import empty, falling, page, stage, with_log


@pytest.mark.parametrize(
    ("converted", "words"),
    [
        ({}, None),
        (
            {"file": "a.gguf", "types": {"Q4_1": 210, "F32": 62}},
            "weights converted from a.gguf, which stores 210 of its 272 tensors in Q4_1",
        ),
        (
            {"types": {"Q6_K": 10, "Q4_K": 90, "F16": 100}},
            "weights converted from a .gguf file, which stores 10 of its 200 tensors in Q6_K and 90 in Q4_K",
        ),
        ({"types": {"BF16": 3, "IQ2_XXS": None}}, "weights converted from a .gguf file, which stores none quantized"),
        ({"file": None, "types": [1]}, None),
    ],
    ids=str,
)
def test_says_what_a_converted_base_was(converted: dict[str, Any], words: str | None) -> None:
    assert conversion_in_words(converted) == words


def test_page_says_on_which_copy_a_delta_was_trained(tmp_path: Path) -> None:
    run = with_log(empty(tmp_path), [stage(0, 40, Everything(), {"0": 1e-3})], falling({"0": 1e-3}))
    run.delta.mkdir()
    write_json(run.delta / "base.json", {"converted": {"file": "m.gguf", "types": {"Q4_1": 210, "F32": 62}}})
    assert "trained onweights converted from m.gguf, which stores 210 of its 272 tensors in Q4_1" in page(run).text


def test_hashes_are_behind_a_fold_and_not_above_it(tmp_path: Path) -> None:
    run = with_log(empty(tmp_path), [stage(0, 40, Everything(), {"0": 1e-3})], falling({"0": 1e-3}))
    run.mark("train", [run.log_file])
    digest = run.manifest()["steps"]["train"]["files"]["log.jsonl"]["sha256"]
    page(run)
    text = run.report_file.read_text()
    assert text.count(digest) == 1
    before, _, _ = text.partition(digest)
    assert before.count("<details") == before.count("</details") + 1
