"""The bench: all tools train the same tokens, what differs is WRONG, it goes on where it was, its tables are true."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import bench, cells, contest, process, rates, rows, store, summary, tables, targets
from benchmarks.arms import ARMS, Shape, operations
from benchmarks.cells import Cell, Planned
from benchmarks.tools import llamafactory, trainer
from benchmarks.tools.clock import Clock
from llmtune.files import read_json, write_json
from llmtune.machine.memory import TUNABLES
from tests.support import tiny

LORA = Cell("135M", "80", "lora")


def options(tmp_path: Path, *more: str) -> list[str]:
    """Options for a bench on a tiny model in fp32."""
    tiny.save_base(tmp_path / "base", blocks=10, tied=True, max_position_embeddings=2048)
    fixed = {"--model": tmp_path / "base", "--out": tmp_path / "results.json", "--work": tmp_path / "work"}
    fixed |= {"--precision": Path("fp32"), "--steps": Path("2"), "--batch": Path("4")}
    return [*(str(part) for pair in fixed.items() for part in pair), *more]


def ready(tmp_path: Path, cell: Cell) -> contest.Contest:
    """What is trained in a cell on a tiny model."""
    return bench.contest_of(bench.parse(options(tmp_path)), cell)


def run(tool: str, repeat: int, seconds: float, **more: Any) -> dict[str, Any]:
    """A run of LoRA whose figures are all one number."""
    figures: dict[str, Any] = dict.fromkeys(summary.MEDIANS, seconds) | {
        "first_loss": 2.0,
        "gemm_gflops": 400.0,
        "tokens": 9,
    }
    figures |= {"losses": [2.0, 1.5, 1.2, 0.1]}
    when = {"date": "2026-11-27T10:00:00", "commit": "abc", "settings": {"precision": "bf16", "batch": 8, "steps": 16}}
    place = {"size": "135M", "rows": "80", "arm": "lora", "tool": tool, "repeat": repeat}
    return {**place, **when, **figures, **more}


@pytest.mark.slow
def test_feeds_every_tool_the_same_tokens_and_llmtune_starts_as_the_plain_model(tmp_path: Path) -> None:
    chosen = options(tmp_path, "--only", "135M/80/frozen-3", "--tools", "llmtune", "trainer-tuned")
    assert bench.main(chosen) == 0
    runs = {run["tool"]: run for run in read_json(tmp_path / "results.json")["runs"]}
    assert runs["llmtune"]["losses"] == pytest.approx(runs["trainer-tuned"]["losses"], rel=1e-3)
    assert runs["llmtune"]["first_loss"] == pytest.approx(plain_loss(tmp_path), rel=1e-5)
    assert all(run["wall_s"] > run["seconds"] and run["peak_rss_mb"] > 100 for run in runs.values())


def plain_loss(tmp_path: Path) -> float:
    """The mean loss of the untrained model on the bench's first batch."""
    batch = rows.in_order(ready(tmp_path, LORA).examples, 4, 1)[:4]
    model, total, count = tiny.model(blocks=10, tied=True, max_position_embeddings=2048), 0.0, 0
    for row in batch:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def test_other_tools_train_the_rows_that_llmtune_does(tmp_path: Path) -> None:
    entered = ready(tmp_path, LORA)
    (tmp_path / "run").mkdir()
    job, clock = contest.write_job(entered, "trainer", tmp_path / "run"), Clock()
    assert trainer.train(job, clock)["tokens"] == entered.tokens
    assert clock.losses[0] == pytest.approx(plain_loss(tmp_path), rel=1e-5)
    assert len(clock.losses) == job["steps"] == 2
    assert clock.figures()["seconds"] > 0
    written = llamafactory.settings(job, tmp_path, 10)
    assert (written["max_steps"], written["lora_rank"], written["lora_target"]) == (2, 16, "all")
    top = llamafactory.what_trains(ARMS["lora-top"], 10)["lora_target"].split(",")
    assert (len(top), top[0], top[-1]) == (56, "layers.2.self_attn.q_proj", "layers.9.mlp.down_proj")
    assert llamafactory.what_trains(ARMS["frozen"], 10)["freeze_trainable_layers"] == 4


def test_llamafactory_trains_the_same_rows_without_an_audio_library_and_counts_what_it_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_exp(keys: dict[str, Any], callbacks: list[Any]) -> None:
        import torchaudio  # type: ignore[import-not-found]
        from datasets import load_from_disk

        assert find_spec("torchaudio") is torchaudio.__spec__
        assert (keys["dataset"] is not None, keys["disable_shuffling"]) == (True, True)
        seen = load_from_disk(keys["tokenized_path"])["train"]
        assert [row["input_ids"] for row in seen] == [row["input_ids"] for row in given]
        Path(keys["output_dir"]).mkdir()
        tokens = sum(map(sum, seen["attention_mask"])) if keys["include_num_input_tokens_seen"] == "non_padding" else 0
        write_json(Path(keys["output_dir"]) / "trainer_state.json", {"num_input_tokens_seen": tokens})

    for name in ("llamafactory", "llamafactory.train", "llamafactory.train.tuner", "torchaudio"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["llamafactory.train.tuner"].run_exp = run_exp  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "torchaudio")
    entered = ready(tmp_path, LORA)
    (tmp_path / "run").mkdir()
    job = contest.write_job(entered, "llamafactory-best", tmp_path / "run")
    given = read_json(Path(job["examples"]))
    assert llamafactory.train(job, Clock())["tokens"] == entered.tokens


def test_rows_are_turns_of_the_sample_in_order_and_none_twice_before_its_end() -> None:
    for length, work in cells.WORK.items():
        made = rows.joined_rows(length, work.batch * work.steps)
        assert made == rows.joined_rows(length, work.batch * work.steps)
        roles = [[message["role"] for message in row["messages"]] for row in made]
        assert all(row == ["system", *["user", "assistant"] * (len(row) // 2)] for row in roles)
        asked = [message["content"] for row in made for message in row["messages"] if message["role"] == "user"]
        assert len(set(asked[:600])) > 0.95 * len(asked[:600])
        # A turn takes SmolLM2 41 tokens, a row 12 more.
        tokens = 12 + 41.3 * sum(len(row) // 2 for row in roles) / len(roles)
        assert tokens == pytest.approx(int(length), rel=0.05)


def test_batches_hold_every_row_once_per_epoch(tmp_path: Path) -> None:
    examples = ready(tmp_path, LORA).examples
    batches = rows.in_order(examples, 4, 3)
    ids = sorted(example.input_ids for example in examples)
    assert len(batches) == 24
    assert all(sorted(row["input_ids"] for row in batches[start : start + 8]) == ids for start in (0, 8, 16))
    assert [row["input_ids"] for row in batches[:8]] != [row["input_ids"] for row in batches[8:16]]


def test_tuned_tools_get_what_llmtunes_training_process_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    plain, tuned = (contest.environment(tool, tmp_path) for tool in ("trainer", "trainer-tuned"))
    assert plain["OMP_NUM_THREADS"] == tuned["OMP_NUM_THREADS"]
    assert (TUNABLES in plain, TUNABLES in tuned) == (False, True)
    assert {name for name in cells.TOOLS if name.endswith(cells.TUNED)} == {
        "trainer-tuned",
        "trl-best",
        "llamafactory-best",
    }


def test_measures_a_command_with_all_that_it_starts(tmp_path: Path) -> None:
    below = "import time; held = bytearray(200 * 2**20); time.sleep(0.7)"
    above = f"import subprocess, sys; held = bytearray(100 * 2**20); subprocess.run([sys.executable, '-c', {below!r}])"
    taken = process.measure([sys.executable, "-c", above], {}, tmp_path)
    assert (taken.code, taken.wall_s > 0.7) == (0, True)
    assert 300 < taken.peak_rss_mb < 400
    failed = process.measure([sys.executable, "-c", "import sys; sys.exit('no room')"], {}, tmp_path)
    assert failed.error == "exit code 1: no room"


def test_counts_the_operations_of_the_plan() -> None:
    shape = Shape(blocks=30, block=100, head=1000)
    counts = {name: operations(arm, shape, 10, 2) for name, arm in ARMS.items()}
    assert counts["full"] == 10 * 30 * 100 * 6 + 2 * 1000 * 6
    assert counts["lora"] == 10 * 30 * 100 * 4 + 2 * 1000 * 4 == counts["qlora"]
    assert counts["frozen"] == 10 * 100 * (2 * 26 + 4 * 6) + 2 * 1000 * 4
    assert counts["frozen-3"] == 10 * 100 * (2 * 26 + 3 * 4 * 6) + 3 * 2 * 1000 * 4
    assert counts["lora-top"] == 10 * 100 * (2 * 22 + 3 * 8 * 4) + 3 * 2 * 1000 * 4
    assert counts["gradual-3"] == 10 * 100 * (2 * 30 + 4 * 6 + 30 * 6) + 2 * 1000 * (4 + 4 + 6)


def test_sets_hold_every_target_and_runs_are_interleaved(tmp_path: Path) -> None:
    named = {(arm, shape) for arm, shapes in targets.TIMES.items() for shape in shapes}
    assert named == {(cell.arm, f"{cell.size}/{cell.rows}") for cell in cells.DEFAULT}
    assert set(cells.DEFAULT) < set(cells.FULL)
    planned = bench.plan(bench.parse(["--arms", "qlora", "--tools", "trl", "llmtune", "--repeats", "2"]), False)
    assert [(run.cell.rows, run.tool) for run in planned[:2]] == [("80", "llmtune"), ("80", "trl")]
    assert [(run.repeat, run.tool) for run in planned[6:8]] == [(1, "trl"), (1, "llmtune")]
    assert {run.tool for run in bench.plan(bench.parse(["full"]), True)} == set(cells.TOOLS)
    with pytest.raises(SystemExit, match="nearest: 135M/80/lora"):
        bench.plan(bench.parse(["--only", "135M/80/laro"]), False)
    assert all(path.is_absolute() for path in vars(bench.parse(["--work", "there"])).values() if isinstance(path, Path))
    with pytest.raises(SystemExit, match="has no LLaMA-Factory; `make bench-llamafactory`"):
        bench.main(["--llamafactory", str(tmp_path / "none")])


def test_goes_on_where_it_was_and_keeps_no_cell_of_two_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []

    def fake(entered: contest.Contest, tool: str, interpreter: str, folder: Path) -> dict[str, Any]:
        if len(made) == 2:
            made.append("interrupted")
            raise KeyboardInterrupt
        made.append(tool)
        return {**dict.fromkeys(summary.MEDIANS, 2.0), "losses": [2.0], "tokens": 9, "gemm_gflops": 1.0}

    monkeypatch.setattr(bench, "run_tool", fake)
    monkeypatch.setattr(bench, "gemm_rate", lambda dtype: 1e11)
    words = options(tmp_path, "--only", "135M/80/lora", "--tools", "llmtune", "trainer", "trainer-tuned")
    assert bench.main(words) == 130
    assert bench.main(words) == bench.main(words) == 0
    assert made == ["llmtune", "trainer", "interrupted", "trainer-tuned"]
    assert "1/1 135M/80/lora trainer-tuned; about 0:" in capsys.readouterr().err
    monkeypatch.setattr(store, "code", lambda: "changed")
    assert bench.main([*words, "--tools", "llmtune"]) == 0
    assert [run["tool"] for run in read_json(tmp_path / "results.json")["runs"]] == ["llmtune"]


def test_processors_of_one_name_and_two_generations_share_no_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "CPUINFO", tmp_path / "cpuinfo")
    files = set()
    for family, model in (("25", "17"), ("26", "2")):
        core = f"cpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\n"
        store.CPUINFO.write_text(f"processor\t: 0\n{core}\nprocessor\t: 1\n{core}")
        files.add(store.default_file())
        assert f"AMD EPYC (family {family}, model {model}), " in store.describe(store.machine())
    assert len(files) == 2
    assert store.default_file().name.startswith("amd-epyc-26-2-")
    kept, unnamed = tmp_path / "results.json", {"cpu": "AMD EPYC", "cores": store.machine()["cores"], "memory_gb": 25}
    named = {**unnamed, "family": "25", "model": "17"}
    for other, words in ((named, "family 25, model 17"), (unnamed, "family not recorded")):
        write_json(kept, {"machine": other, "runs": []})
        with pytest.raises(SystemExit, match=words):
            store.Store(kept)
    write_json(kept, {"machine": {**store.machine(), "memory_gb": 1}, "runs": []})
    assert store.Store(kept).runs == []


def test_a_failed_run_is_told_and_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = store.Store(tmp_path / "results.json")
    planned, group = Planned(LORA, "trainer", 0), store.group_of({"precision": "bf16", "batch": 8, "steps": 16})
    kept.add(planned, group, "", {"error": "signal 9", "gemm_gflops": 1.0})
    assert not kept.done(planned, group, "")
    assert bench.report(kept, [planned]) == 1
    assert "135M/80/lora trainer: failed: signal 9" in capsys.readouterr().err


def test_compares_pairs_and_marks_what_trained_something_else() -> None:
    pairs = [(0, 1.0, 4.0), (1, 3.0, 6.0), (2, 2.0, 6.0)]
    runs = [run(tool, at, s) for at, ours, trl in pairs for tool, s in (("trl", trl), ("llmtune", ours))]
    runs += [run("trainer", 0, 0.1, first_loss=2.03), run("trl-best", 0, 0.1, tokens=8)]
    runs += [run("trainer-tuned", 0, 0.1, losses=[2.0, 1.5, 1.25, 0.2]), run("trl", 3, 6.0), run("llmtune", 3, 2.0)]
    runs += [{**run(tool, 4, 0.1), "error": "no room"} for tool in ("llamafactory", "trl")]
    rows = {row["tool"]: row for row in summary.summarize(runs)}
    assert next(iter(rows)) == "llmtune"
    assert (rows["llmtune"]["wall_s"], rows["llmtune"]["wall_s_spread"]) == (2.0, 2.0)
    assert (rows["trl"]["times_step"], rows["trl"]["memory"]) == (3.0, pytest.approx(1 / 3))
    assert rows["trainer"]["wrong"] == "first loss 2.0300, llmtune 2.0000"
    assert rows["trl-best"]["wrong"] == "8 tokens, llmtune 9"
    assert rows["trainer-tuned"]["wrong"] == "loss 1.2500 at step 3, llmtune 1.2000"
    later = [run("llmtune", 0, 2.0), run("trainer", 0, 6.0, date="2026-11-27T10:21:00")]
    assert "times_step" not in summary.summarize(later)[1], "the machine may be faster by then"
    gradual = [run(tool, 0, 2.0, arm="gradual-3", losses=[2.0, at]) for tool, at in (("llmtune", 1.5), ("trl", 1.1))]
    assert all("wrong" not in row for row in summary.summarize(gradual))
    # What is WRONG or failed is no measure of llmtune, however fast it was.
    assert targets.judge(list(rows.values()))[0] == [
        "lora", "135M/80", "3.00 of 1.5: hit (trl)", "3.00 of 1.5: hit (trl)", "0.33 of 0.55: hit (trl)"
    ]  # fmt: skip
    table = tables.figures(list(rows.values()))
    figures = "6.000 ± 1.000 | 3.00 | 6.0 ± 1.0 | 3.00 | 0.01 | 0.33 | 2.0000 | 6.0000 | 6.00"
    assert f"| lora | trl | {figures} | 4, 1 failed |" in table
    assert "failed: no room" in table
    assert "WRONG: first loss 2.0300, llmtune 2.0000" in table


def test_a_heading_tells_that_the_code_was_not_the_commits() -> None:
    facts = {"cpu": "one", "family": "", "cores": 2, "memory_gb": 8}
    result = {"machine": facts, "versions": {}, "runs": [run("llmtune", 0, 2.0, commit="abc1234 with changes")]}
    assert tables.heading(result).startswith("### one, 2 cores, 8 GB of memory\n\nMeasured 2026-11-27, ")
    assert "commit abc1234 with changes." in tables.heading(result)


def test_a_missed_target_is_a_miss() -> None:
    rows = summary.summarize([run("llmtune", 0, 2.0), run("trainer-tuned", 0, 2.9), run("trainer", 0, 9.0)])
    assert targets.judge(rows)[0][2:4] == ["1.45 of 1.5: **miss** (trainer-tuned)"] * 2
    assert targets.judge(rows)[0][4] == "0.69 of 0.55: **miss** (trainer-tuned)"


def test_documents_show_the_results_of_every_machine() -> None:
    text = tables.DOCUMENT.read_text()
    assert len(tables.MARKS.findall(text)) == 1
    assert text == tables.page(text, tables.all_results()), "run: python -m benchmarks.tables"
    for result in tables.all_results():
        for one in result["runs"]:
            if one["size"] == "135M" and "error" not in one:
                rows_trained = one["settings"]["batch"] * len(one["losses"])
                assert one["tokens"] / rows_trained == pytest.approx(int(one["rows"]), rel=0.05)


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
