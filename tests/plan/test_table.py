"""The plan table as JSON and in words."""

import json
from pathlib import Path

import pytest

from llmtune.errors import LlmtuneError
from llmtune.files import write_json
from llmtune.plan.distances import Drawn, Top
from llmtune.plan.table import BaseName, CacheSize, PlanTable, StageRow

LISA = Drawn(1, 5, frozenset({1, 2}), frozenset({0, 3}))
FIRST = StageRow(0, 1500, 0.5, Top(1), 1e-3, 0.5, {0: 1e-3, 1: 5e-4}, {0: 2, 1: 9}, {0: 8, 1: 90})
SECOND = StageRow(1500, 3000, 1.0, LISA, 2.5e-4, 1.0, dict.fromkeys(range(4), 2.5e-4), {0: 1, 1: 2, 2: 2, 3: 1}, {0: 8})
TABLE = PlanTable(
    base=BaseName("me/base", "abc", "me/base"),
    method="staged",
    adapter="lora",
    blocks=2,
    parameters=1000,
    trained=98,
    adapted={"q_proj": 2},
    quantized=0,
    delta_bytes=392,
    states_bytes=4000,
    frozen_blocks=CacheSize([1], 64),
    steps=3000,
    stages=[FIRST, SECOND],
    notes=["a note"],
)


def test_table_survives_its_file(tmp_path: Path) -> None:
    write_json(tmp_path / "plan.json", TABLE.to_json())
    assert PlanTable.read(tmp_path / "plan.json") == TABLE
    assert json.loads(json.dumps(TABLE.to_json())) == TABLE.to_json()
    stored = json.loads((tmp_path / "plan.json").read_text())
    assert stored["base"] == {"name": "me/base", "revision": "abc", "hub_id": "me/base"}
    assert stored["stages"][0]["trains"] == {"kind": "top", "reach": 1}
    assert stored["stages"][0]["rates"] == {"0": 1e-3, "1": 5e-4}
    assert stored["stages"][0]["trained"] == 98
    assert stored["frozen_blocks"] == {"boundaries": [1], "bytes_per_token": 64, "bytes": None}


@pytest.mark.parametrize("fields", [{}, {"stages": [{"reach": None}]}, [1]], ids=str)
def test_refuses_a_file_of_another_version_in_one_line(tmp_path: Path, fields: object) -> None:
    write_json(tmp_path / "plan.json", fields)
    with pytest.raises(LlmtuneError, match=r"plan\.json: was written by another version of llmtune; start a new run$"):
        PlanTable.read(tmp_path / "plan.json")


def test_tokens_make_the_cache_a_size() -> None:
    assert TABLE.with_tokens(10).frozen_blocks == CacheSize([1], 64, 640)


def test_row_names_steps_distances_and_rates() -> None:
    assert (FIRST.steps_in_words, SECOND.steps_in_words) == ("1-1,500", "1,501-3,000")
    assert (FIRST.distances_in_words, SECOND.distances_in_words) == ("0 .. 1", "0 .. 3")
    assert (FIRST.rates_in_words, SECOND.rates_in_words) == ("1e-3 .. 5e-4", "2.5e-4")


def test_row_counts_what_trains_at_one_time() -> None:
    assert (FIRST.count_tensors, FIRST.trained) == (11, 98)
    assert SECOND.count_tensors == 1 + 2 + 1


def test_refuses_a_file_that_lacks_a_field(tmp_path: Path) -> None:
    table = TABLE.to_json()
    del table["steps"]
    with pytest.raises(ValueError, match="steps"):
        PlanTable.from_json(table)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("parameters", None),
        ("parameters", 0),
        ("blocks", 1 << 70),
        ("stages", []),
        ("trained", float("nan")),
        ("notes", None),
        ("base", {"name": None, "revision": None, "hub_id": None}),
    ],
)
def test_refuses_a_file_with_a_value_of_another_kind_in_one_line(tmp_path: Path, key: str, value: object) -> None:
    write_json(tmp_path / "plan.json", {**TABLE.to_json(), key: value})
    with pytest.raises(LlmtuneError, match="was written by another version of llmtune"):
        PlanTable.read(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("key", "value"), [("rates", {"0": None}), ("rates", {}), ("trains", {"kind": "top"}), ("lr", "x")]
)
def test_refuses_a_stage_with_a_value_of_another_kind_in_one_line(tmp_path: Path, key: str, value: object) -> None:
    table = TABLE.to_json()
    table["stages"][0][key] = value
    write_json(tmp_path / "plan.json", table)
    with pytest.raises(LlmtuneError, match="was written by another version of llmtune"):
        PlanTable.read(tmp_path / "plan.json")
