"""The bench: every tool trains on the same tokens, the first losses are the model's own, and the counts are right."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench, rates, results
from benchmarks.arms import ARMS, Shape, operations
from llmtune.data.rows import read
from llmtune.files import read_json, shipped_folder
from tests.support import tiny


def options(tmp_path: Path, *more: str) -> list[str]:
    """Options for a bench on a tiny model in fp32."""
    tiny.save_base(tmp_path / "base", blocks=10, tied=True)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sums(40))
    fixed = {"--model": tmp_path / "base", "--data": rows, "--out": tmp_path / "results.json", "--precision": "fp32"}
    return [
        *(str(part) for pair in fixed.items() for part in pair),
        "--steps",
        "2",
        "--batch",
        "4",
        "--repeats",
        "1",
        *more,
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("arm", "tools"), [("frozen-3", ["llmtune", "trainer"]), ("lora-top8", bench.TOOLS)])
def test_feeds_every_tool_the_same_tokens_and_llmtune_starts_as_the_plain_model(
    tmp_path: Path, arm: str, tools: Sequence[str]
) -> None:
    bench.main(options(tmp_path, "--arms", arm, "--tools", *tools))
    results = read_json(tmp_path / "results.json")
    assert [run.get("error") for run in results["runs"]] == [None] * len(tools)
    rows = {row["tool"]: row for row in results["rows"]}
    assert set(rows) == set(tools)
    assert len({row["tokens"] for row in rows.values()}) == 1
    for tool in tools[1:]:
        assert rows["llmtune"]["losses"] == pytest.approx(rows[tool]["losses"], rel=1e-3)
    assert rows["llmtune"]["losses"][0] == pytest.approx(plain_loss(tmp_path), rel=1e-5)
    keys = {"arm", "tool", "seconds_per_step", "tokens_per_s", "peak_rss_mb", "wall_s", "final_loss", "utilization"}
    assert all({*keys, "wall_s_spread"} <= set(row) for row in rows.values())


def plain_loss(tmp_path: Path) -> float:
    """The mean loss of the untrained model on the bench's first batch."""
    parsed = bench.parse(options(tmp_path))
    ready = bench.prepare(parsed, tmp_path)
    batch = bench.batches(ready["examples"], parsed.batch, 1, False)[: parsed.batch]
    model, total, count = tiny.model(blocks=10, tied=True), 0.0, 0
    for row in batch:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def test_batches_hold_every_row_once_per_epoch(tmp_path: Path) -> None:
    parsed = bench.parse(options(tmp_path))
    ready = bench.prepare(parsed, tmp_path)
    assert len(ready["examples"]) == 8
    for grouped in (False, True):
        rows = bench.batches(ready["examples"], 4, 3, grouped)
        assert len(rows) == 24
        ids = sorted(example.input_ids for example in ready["examples"])
        assert all(sorted(row["input_ids"] for row in rows[start : start + 8]) == ids for start in (0, 8, 16))
    records = [json.loads(line) for line in Path(ready["rows"]).read_text().splitlines()]
    assert [row["id"] for row in records] == [example.id for example in ready["examples"]]


def test_trains_on_the_shipped_sample_by_default(tmp_path: Path) -> None:
    tiny.save_base(tmp_path / "base")
    ready = bench.prepare(bench.parse(["--model", str(tmp_path / "base")]), tmp_path)
    assert len(ready["examples"]) == 160
    sample = {row.id for row in read(str(shipped_folder("sample") / "train.jsonl"))}
    assert {example.id for example in ready["examples"]} < sample


def test_counts_the_operations_of_the_plan() -> None:
    shape = Shape(blocks=30, block=100, head=1000)
    counts = {name: operations(arm, shape, 10, 2) for name, arm in ARMS.items()}
    assert counts["full"] == 10 * 30 * 100 * 6 + 2 * 1000 * 6
    assert counts["lora"] == 10 * 30 * 100 * 4 + 2 * 1000 * 4 == counts["qlora"]
    assert counts["frozen"] == 10 * 100 * (2 * 26 + 4 * 6) + 2 * 1000 * 4
    assert counts["frozen-10"] == 10 * 100 * (2 * 26 + 10 * 4 * 6) + 10 * 2 * 1000 * 4
    assert counts["lora-top8"] == 10 * 100 * (2 * 22 + 3 * 8 * 4) + 3 * 2 * 1000 * 4
    assert counts["gradual-3"] == 10 * 100 * (2 * 30 + 4 * 6 + 30 * 6) + 2 * 1000 * (4 + 4 + 6)


def test_repeats_longer_arms_less_and_each_at_least_once() -> None:
    assert [bench.rounds(arm, 3) for arm in ("lora", "frozen-3", "frozen-10")] == [3, 1, 1]
    assert [bench.rounds(arm, 6) for arm in ("lora", "frozen-3", "frozen-10")] == [6, 2, 1]


def test_summarizes_by_arm_and_tool() -> None:
    def run(tool: str, repeat: int, seconds: float) -> dict[str, Any]:
        figures = dict.fromkeys(results.MEDIANS, seconds)
        more = {"tokens": 1, "padding": 0.1, "frozen_blocks": "", "losses": [1.0]}
        return {"arm": "full", "tool": tool, "repeat": repeat, **figures, **more}

    pairs = [(0, 1.0, 4.0), (1, 3.0, 6.0), (2, 2.0, 6.0)]
    runs = [run(tool, at, seconds) for at, ours, trl in pairs for tool, seconds in (("llmtune", ours), ("trl", trl))]
    rows = results.summarize([*runs, {"arm": "full", "tool": "trainer", "repeat": 0, "error": "no room"}])
    assert [(row["tool"], row["runs"]) for row in rows] == [("llmtune", 3), ("trl", 3), ("trainer", 0)]
    assert (rows[0]["wall_s"], rows[0]["wall_s_spread"]) == (2.0, 2.0)
    assert (rows[1]["times"], rows[1]["memory"]) == (3.0, pytest.approx(1 / 3))
    table = results.table(rows)
    assert "| full | trl | 6.000 | 3.00 | 6 | 6 | 0.33 | 6.0 | 6.000 | 6.00 |" in table
    assert "failed: no room" in table


def test_rates_go_on_where_they_ended_and_tell_what_the_default_loses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "sums", tmp_path / "rates.jsonl"
    data.mkdir()
    tiny.write_rows(data / "train.jsonl", tiny.sums(30))
    tiny.write_rows(data / "validation.jsonl", tiny.sums(34)[30:])
    fixed = {"--data": data, "--model": tiny.save_base(tmp_path / "base"), "--arms": "frozen", "--out": out}
    counts = {"--steps": 2, "--rows": 20, "--held-out": 4, "--answers": 2}
    words = [str(part) for pair in {**fixed, **counts}.items() for part in pair]
    rates.main([*words, "--factors", "1"])
    first = out.read_text()
    rates.main([*words, "--factors", "1", "0.0316"])  # 3e-05, which YAML would read as a text
    assert out.read_text().startswith(first)
    default, lower = map(json.loads, out.read_text().splitlines())
    assert (default["lr"], lower["lr"], default["asked"]) == ([9.5e-4], [3e-5], 2)
    assert default["loss"] != lower["loss"]
    out.write_text("".join(json.dumps(p | {"exact": e}) + "\n" for p, e in ((default, 0.5), (lower, 1.0))))
    capsys.readouterr()
    rates.main([*words, "--table"])
    assert "| sums | frozen | 2 | 9.5e-4 | 3e-5 of 2 | 0.500 / 1.000 | 50.0 |" in capsys.readouterr().out
