"""Kept outputs of blocks that do not train: equal to the plain path's, reused, never wrong, off where they must be."""

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune.frozen import store
from llmtune.frozen.boundary import Span, choose_boundaries
from llmtune.frozen.cache import PROBED, CachePolicy, FrozenBlocks
from llmtune.frozen.store import DATA, MANIFEST, OutputWriter, StoredOutputs, make_room, os
from llmtune.train import planned
from llmtune.train.checkpoint import complete_checkpoints
from tests.support import tiny
from tests.support.cached import CALM, GRADUAL, KINDS, LORA, assert_equal, fit

FROZEN = {"kind": "frozen", "reach": 2, "lr": 0.1}
METHODS = {
    "frozen": FROZEN,
    "head only": {"kind": "frozen", "reach": 0, "lr": 0.1},
    "gradual": GRADUAL,
    "lora on top": {**FROZEN, "adapter": LORA},
    "staged lora": {**GRADUAL, "adapter": LORA},
}
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_are_the_plain_paths(tmp_path: Path, method: str, tied: bool) -> None:
    ours = fit(tmp_path, METHODS[method], model=tiny.model(blocks=4, tied=tied))
    assert ours[0].startswith("frozen blocks: kept below block " + ("2, 3" if "all" in str(METHODS[method]) else ""))
    assert_equal(ours, fit(tmp_path, METHODS[method], model=tiny.model(blocks=4, tied=tied), keep=False))


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_gives_the_plain_paths_losses_and_gradients(tmp_path: Path, kind: str) -> None:
    runs = [
        fit(tmp_path, GRADUAL, model=tiny.model(kind, blocks=4, **CALM.get(kind, {})), steps=6, eval_steps=4, **keep)
        for keep in ({"always": True}, {"keep": False})
    ]
    assert "kept below block 2, 3" in runs[0][0]
    assert_equal(*runs)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_accumulated_and_grouped_batches_are_the_plain_paths(tmp_path: Path, checkpointing: bool) -> None:
    more = {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "grouped": True,
        "gradient_checkpointing": checkpointing,
    }
    assert_equal(fit(tmp_path, GRADUAL, **more), fit(tmp_path, GRADUAL, keep=False, **more))


def test_the_blocks_below_do_not_run(tmp_path: Path) -> None:
    model = tiny.model(blocks=4)
    fit(tmp_path, FROZEN)
    ran: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, arguments, output: ran.append(len(arguments[0])))
    assert "reused below block 2" in fit(tmp_path, FROZEN, model=model)[0]
    assert len(ran) <= 1 + 1 + PROBED, "more than a look and the probe"


def test_weights_that_no_coming_stage_runs_are_let_go(tmp_path: Path) -> None:
    said, _, _, made = fit(tmp_path, FROZEN)
    assert "MB of weights let go" in said
    sizes = [sum(p.numel() for p in block.parameters()) for block in made.model.model.layers]
    assert sizes[:2] == [0, 0]
    assert all(sizes[2:])
    assert "let go" not in fit(tmp_path, GRADUAL)[0]


@pytest.mark.parametrize("kind", ["default", "dora"])
def test_lora_in_bf16_gives_the_bits_of_peft(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = {**FROZEN, "reach": 4, "adapter": LORA | {"dora": kind == "dora"}}
    ours = fit(tmp_path, method, keep=False, bf16=True, model=tiny.model(blocks=4).bfloat16())
    monkeypatch.setattr(planned, "skip_input_casts", lambda model: None)
    plain = fit(tmp_path, method, keep=False, bf16=True, model=tiny.model(blocks=4).bfloat16())
    assert ours[1] == plain[1]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(ours[2], plain[2], strict=True) for name in b)


@pytest.mark.parametrize("method", ["frozen", "lora on top"])
def test_in_bf16_the_kept_path_is_as_near_as_batching(tmp_path: Path, method: str) -> None:
    runs = [
        fit(tmp_path, METHODS[method], keep=keep, bf16=True, model=tiny.model(blocks=4).bfloat16())
        for keep in (True, False)
    ]
    assert "kept below block 2" in runs[0][0]
    ours, plain = ([entry["loss"] for entry in run[1] if "loss" in entry] for run in runs)
    assert ours == pytest.approx(plain, rel=2e-3)


def test_a_deeper_boundary_is_built_from_a_lower_one(tmp_path: Path) -> None:
    fit(tmp_path, FROZEN)
    model, ran = tiny.model(blocks=4), []
    model.model.layers[1].mlp.register_forward_hook(lambda module, arguments, output: ran.append(arguments[0].shape))
    method = {"kind": "gradual", "reaches": [1, 2], "lr": 0.1}
    ours = fit(tmp_path, method, model=model)
    assert "kept below block 3" in ours[0]
    assert "reused below block 2" in ours[0]
    assert len(ran) <= 2 * (1 + PROBED) + 1
    assert_equal(ours, fit(tmp_path, method, model=tiny.model(blocks=4), keep=False))


def test_another_models_outputs_are_not_used(tmp_path: Path) -> None:
    fit(tmp_path, FROZEN)
    ours = fit(tmp_path, FROZEN, model=tiny.model(blocks=4, seed=1))
    assert "differ from the plain path's" in ours[0]
    assert_equal(ours, fit(tmp_path, FROZEN, model=tiny.model(blocks=4, seed=1), keep=False))


@pytest.mark.slow
def test_resumed_in_any_stage_ends_bit_equal(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "grouped": True}
    whole = fit(tmp_path, GRADUAL, **settings)
    checkpoints = complete_checkpoints(tmp_path / "out")
    assert len(checkpoints) == 7
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "out", kept)
    for fresh in (False, True):
        for step in (2, 6, 8, 12):
            if fresh:
                shutil.rmtree(tmp_path / "cache")
            again = fit(tmp_path, GRADUAL, resume=str(kept / f"step-{step:06d}"), **settings)
            assert again[1] == [entry for entry in whole[1] if entry["step"] > step]


def damage_data(folder: Path) -> None:
    content = bytearray((folder / DATA).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / DATA).write_bytes(content)


def cut_data(folder: Path) -> None:
    (folder / DATA).write_bytes((folder / DATA).read_bytes()[:-4])


def damage_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")


def foreign(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"base": "tiny"', '"base": "other"'))


@pytest.mark.parametrize("damage", [damage_data, cut_data, damage_manifest, foreign])
def test_a_damaged_or_foreign_file_is_built_again(tmp_path: Path, damage: Any) -> None:
    fit(tmp_path, FROZEN)
    (folder,) = (tmp_path / "cache").iterdir()
    whole = (folder / DATA).read_bytes()
    damage(folder)
    ours = fit(tmp_path, FROZEN)
    assert "kept below block 2" in ours[0]
    assert "1 damaged or foreign, never used" in ours[0]
    assert (folder / DATA).read_bytes() == whole
    assert "reused" in fit(tmp_path, FROZEN)[0]


def test_other_rows_or_another_base_share_nothing(tmp_path: Path) -> None:
    facts = CachePolicy(tmp_path, {"base": "a"}, None, 2**30, False)
    rows = [[5, 6, 7], [8, 9]]
    found = set()
    for keeping, data in ((facts, rows), (replace(facts, facts={"base": "b"}), rows), (facts, [[5, 6], [7, 8, 9]])):
        made = FrozenBlocks(data, keeping)
        made.begin(tiny.model(blocks=4), [Span(2, 99)], {"model.norm.weight": 0}, torch.enable_grad)
        found.add(tuple(sorted(folder.name for folder in tmp_path.iterdir())))
    assert len(found) == 3


def test_dropout_in_the_prefix_is_seen(tmp_path: Path) -> None:
    embedding = {"embd_pdrop": 0.1, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    for kind, more in (("gpt2", embedding), ("llama", {"attention_dropout": 0.1})):
        said = fit(tmp_path, FROZEN, model=tiny.model(kind, blocks=4, **more), steps=8)[0]
        assert "computed at every step" in said
        assert "is 0.1" in said
    top = {**FROZEN, "adapter": LORA | {"dropout": 0.5}}
    ours = fit(tmp_path, top)
    assert "kept below block 2" in ours[0]
    assert_equal(ours, fit(tmp_path, top, keep=False))


def test_a_norm_that_works_below_the_blocks_and_trains_is_seen(tmp_path: Path) -> None:
    model = tiny.model("bloom", blocks=4, hidden_dropout=0.0, attention_dropout=0.0)
    ours = fit(tmp_path, {**FROZEN, "adapter": LORA}, model=model)
    assert "kept below block 2" in ours[0]
    model = tiny.model("bloom", blocks=4, hidden_dropout=0.0, attention_dropout=0.0)
    assert "works below the blocks and trains" in fit(tmp_path, FROZEN, model=model)[0]


def full_disk(*arguments: Any) -> None:
    """What writing to a disk without room ends in."""
    raise OSError(28, "No space left on device")


def test_a_full_disk_costs_the_saving_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: Usage(2**30, 2**30, 2**20))
    ours = fit(tmp_path, FROZEN)
    assert "not kept: no room for" in ours[0]
    assert not list((tmp_path / "cache").iterdir())
    assert_equal(ours, fit(tmp_path, FROZEN, keep=False))


def test_a_disk_that_fills_up_costs_the_saving_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OutputWriter, "add", full_disk)
    ours = fit(tmp_path, FROZEN)
    assert "not kept: [Errno 28] No space left" in ours[0]
    assert not list((tmp_path / "cache").iterdir())
    assert_equal(ours, fit(tmp_path, FROZEN, keep=False))


def test_a_cache_that_cannot_be_written_costs_the_saving_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert "not kept: " in fit(tmp_path, FROZEN)[0]


def test_outputs_that_differ_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = StoredOutputs.read
    monkeypatch.setattr(StoredOutputs, "read", lambda self, rows, tokens: read(self, rows, tokens).mul_(1.001))
    ours = fit(tmp_path, FROZEN)
    assert "differ from the plain path's" in ours[0]
    assert_equal(ours, fit(tmp_path, FROZEN, keep=False))


def test_what_does_not_fit_the_limit_is_not_kept(tmp_path: Path) -> None:
    ours = fit(tmp_path, FROZEN, limit=1000)
    assert "would pass memory.cache_limit_gb" in ours[0]
    assert not (tmp_path / "cache").exists()


def test_one_pass_over_the_rows_is_not_kept(tmp_path: Path) -> None:
    assert "too few passes" in fit(tmp_path, FROZEN, steps=6, eval_strategy="no")[0]
    assert fit(tmp_path, {"kind": "full", "lr": 0.1}, steps=12)[0] == ""


def test_what_was_used_longest_ago_makes_room(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "states.bin").write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    make_room(tmp_path, 100, 200, set())
    assert [folder.name for folder in tmp_path.iterdir()] == ["new"]
    make_room(tmp_path, 100, 100, {tmp_path / "new"})
    assert [folder.name for folder in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize(
    ("wanted", "kept", "limit", "always", "expected"),
    [
        ([Span(20, 300)], set(), 9, False, [20]),
        ([Span(20, 100)], set(), 9, False, []),
        ([Span(20, 100)], set(), 9, True, [20]),
        ([Span(20, 100)], {20}, 9, False, [20]),
        ([Span(20, 300)], set(), 0, False, []),
        ([Span(28, 20), Span(10, 300)], set(), 9, False, [10]),
        ([Span(20, 80), Span(10, 80), Span(0, 80)], set(), 9, False, [10, 20]),
        ([Span(20, 80), Span(10, 80), Span(0, 80)], set(), 1, False, []),
        ([Span(20, 60)], {10}, 9, False, [20]),
    ],
)
def test_what_saves_most_is_chosen(wanted: Any, kept: Any, limit: int, always: bool, expected: Any) -> None:
    assert choose_boundaries(wanted, kept, 100, 1, limit, always) == expected
