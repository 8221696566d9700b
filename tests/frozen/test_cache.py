"""Cached outputs of frozen blocks: equal to the full model's, reused, never wrong, off where they must be."""

import os
import shutil
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from llmtune.frozen import cache
from llmtune.frozen.boundary import Span, choose_boundaries
from llmtune.frozen.cache import CachePolicy, FrozenBlocks
from llmtune.frozen.check import CHECKED_ROWS
from llmtune.frozen.stand_in import StubbedDecoder
from llmtune.frozen.store import DATA, MANIFEST, OutputWriter, StoredOutputs, make_room
from llmtune.kernels import install
from llmtune.kernels.cpu import attention
from llmtune.kernels.rows import Inputs, JoinedRows
from llmtune.machine import processes
from llmtune.training.checkpoint import complete_checkpoints
from tests.support import tiny
from tests.support.cached import CALM, GRADUAL, KINDS, LORA, assert_equal, fit

FROZEN: dict[str, Any] = {"kind": "frozen", "reach": 2, "lr": 0.1}
METHODS: dict[str, dict[str, Any]] = {
    "frozen": FROZEN,
    "head only": {"kind": "frozen", "reach": 0, "lr": 0.1},
    "gradual": GRADUAL,
    "lora on top": {**FROZEN, "adapter": LORA},
    "staged lora": {**GRADUAL, "adapter": LORA},
}
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_cached_path_matches_full_model(tmp_path: Path, method: str, tied: bool) -> None:
    ours = fit(tmp_path, METHODS[method], model=tiny.model(blocks=4, tied=tied))
    assert ours[0].startswith("frozen blocks: cached below block " + ("2, 3" if "all" in str(METHODS[method]) else ""))
    assert_equal(ours, fit(tmp_path, METHODS[method], model=tiny.model(blocks=4, tied=tied), keep=False))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_cached_path_matches_full_model_in_every_architecture(tmp_path: Path, kind: str) -> None:
    settings: dict[str, Any] = CALM.get(kind, {})
    ours, full = (
        fit(
            tmp_path,
            GRADUAL,
            model=tiny.model(kind, blocks=4, **settings),
            steps=6,
            eval_steps=4,
            always=True,
            keep=keep,
        )
        for keep in (True, False)
    )
    assert "cached below block 2, 3" in ours[0]
    assert_equal(ours, full)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.slow
def test_cached_path_matches_full_model_with_accumulated_and_grouped_batches(
    tmp_path: Path, checkpointing: bool
) -> None:
    options: dict[str, Any] = {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "grouped": True,
        "gradient_checkpointing": checkpointing,
    }
    assert_equal(fit(tmp_path, GRADUAL, **options), fit(tmp_path, GRADUAL, keep=False, **options))


def test_skips_cached_blocks(tmp_path: Path) -> None:
    model = tiny.model(blocks=4)
    fit(tmp_path, FROZEN)
    ran: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, arguments, output: ran.append(len(arguments[0])))
    assert "reused below block 2" in fit(tmp_path, FROZEN, model=model)[0]
    tried = [2, 1, 1, 1]
    assert ran == [1, *tried, 1], "more than the inspection, four passes that try to join rows, and one of the check"


def test_frees_weights_that_no_coming_stage_runs(tmp_path: Path) -> None:
    line, _, _, trainer = fit(tmp_path, FROZEN)
    assert "kB of weights freed" in line
    sizes = [sum(p.numel() for p in block.parameters()) for block in trainer.model.model.layers]
    assert sizes[:2] == [0, 0]
    assert all(sizes[2:])
    assert "freed" not in fit(tmp_path, GRADUAL)[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["default", "dora"])
def test_lora_in_bf16_gives_the_bits_of_peft(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = {**FROZEN, "reach": 4, "adapter": LORA | {"dora": kind == "dora"}}
    ours = fit(tmp_path, method, keep=False, bf16=True, model=tiny.model(blocks=4).bfloat16())
    monkeypatch.setattr(install, "skip_input_casts", lambda model: None)
    plain = fit(tmp_path, method, keep=False, bf16=True, model=tiny.model(blocks=4).bfloat16())
    assert ours[1] == plain[1]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(ours[2], plain[2], strict=True) for name in b)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["frozen", "lora on top"])
def test_cached_path_is_as_accurate_as_batching_in_bf16(tmp_path: Path, method: str) -> None:
    runs = [
        fit(tmp_path, METHODS[method], keep=keep, bf16=True, model=tiny.model(blocks=4).bfloat16())
        for keep in (True, False)
    ]
    assert "cached below block 2" in runs[0][0]
    ours, full = ([entry["loss"] for entry in run[1] if "loss" in entry] for run in runs)
    assert ours == pytest.approx(full, rel=2e-3)


def test_builds_a_deeper_boundary_from_a_lower_one(tmp_path: Path) -> None:
    fit(tmp_path, FROZEN)
    model = tiny.model(blocks=4)
    ran: list[torch.Size] = []
    model.model.layers[1].mlp.register_forward_hook(lambda module, arguments, output: ran.append(arguments[0].shape))
    method = {"kind": "gradual", "reaches": [1, 2], "lr": 0.1}
    ours = fit(tmp_path, method, model=model)
    assert "cached below block 3" in ours[0]
    assert "reused below block 2" in ours[0]
    assert len(ran) <= 2 * (1 + CHECKED_ROWS) + 1
    assert_equal(ours, fit(tmp_path, method, model=tiny.model(blocks=4), keep=False))


@pytest.mark.parametrize("short", [attention.SHORT, 0], ids=["masked", "in blocks"])
@pytest.mark.parametrize(
    "method", [FROZEN, {"kind": "gradual", "reaches": [1, 2], "lr": 0.1}], ids=["frozen", "gradual"]
)
def test_outputs_are_built_of_joined_rows_and_equal_those_of_padded_ones(
    tmp_path: Path, method: dict[str, Any], short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SHORT", short)
    joined: list[bool] = []
    forward = StubbedDecoder.forward

    def watched(decoder: StubbedDecoder, *arguments: Any) -> torch.Tensor:
        join = decoder.join

        def joining(inputs: Inputs, rows: list[int], lengths: Sequence[int]) -> tuple[Inputs, JoinedRows | None]:
            assert join is not None
            prepared = join(inputs, rows, lengths)
            joined.append(prepared[1] is not None or len(set(lengths)) == 1)
            return prepared

        decoder.join = joining if join else None
        states = forward(decoder, *arguments)
        decoder.join = join
        return states

    def padding(decoder: StubbedDecoder, *arguments: Any) -> torch.Tensor:
        decoder.join = None
        return forward(decoder, *arguments)

    def outputs(folder: Path) -> torch.Tensor:
        assert "cached below block" in fit(folder, method, always=True, steps=2)[0]
        files = sorted((folder / "cache").glob(f"*/{DATA}"), key=lambda file: file.parent.name)
        return torch.cat([torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32) for file in files])

    monkeypatch.setattr(StubbedDecoder, "forward", watched)
    ours = outputs(tmp_path / "joined")
    assert joined
    assert all(joined)
    monkeypatch.setattr(StubbedDecoder, "forward", padding)
    padded = outputs(tmp_path / "padded")
    assert (ours - padded).norm() <= 1e-6 * padded.norm()


def test_never_uses_outputs_of_another_model(tmp_path: Path) -> None:
    fit(tmp_path, FROZEN)
    ours = fit(tmp_path, FROZEN, model=tiny.model(blocks=4, seed=1))
    assert "differ from the full model's" in ours[0]
    assert_equal(ours, fit(tmp_path, FROZEN, model=tiny.model(blocks=4, seed=1), keep=False))


@pytest.mark.slow
def test_resume_in_any_stage_ends_bit_equal(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "grouped": True}
    uninterrupted = fit(tmp_path, GRADUAL, **settings)
    checkpoints = complete_checkpoints(tmp_path / "out")
    assert len(checkpoints) == 7
    saved = tmp_path / "saved"
    shutil.copytree(tmp_path / "out", saved)
    for fresh in (False, True):
        for step in (2, 6, 8, 12):
            if fresh:
                shutil.rmtree(tmp_path / "cache")
            again = fit(tmp_path, GRADUAL, resume=str(saved / f"step-{step:06d}"), **settings)
            assert again[1] == [entry for entry in uninterrupted[1] if entry["step"] > step]


def damage_data(folder: Path) -> None:
    content = bytearray((folder / DATA).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / DATA).write_bytes(content)


def cut_data(folder: Path) -> None:
    (folder / DATA).write_bytes((folder / DATA).read_bytes()[:-4])


def damage_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")


def replace_base(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"base": "tiny"', '"base": "other"'))


@pytest.mark.slow
@pytest.mark.parametrize("damage", [damage_data, cut_data, damage_manifest, replace_base])
def test_rebuilds_damaged_and_foreign_entries(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    fit(tmp_path, FROZEN)
    (folder,) = (tmp_path / "cache").iterdir()
    outputs = (folder / DATA).read_bytes()
    damage(folder)
    ours = fit(tmp_path, FROZEN)
    assert "cached below block 2" in ours[0]
    assert "1 damaged or foreign cache entry not used" in ours[0]
    assert (folder / DATA).read_bytes() == outputs
    assert "reused" in fit(tmp_path, FROZEN)[0]


def test_shares_nothing_between_other_rows_or_bases(tmp_path: Path) -> None:
    policy = CachePolicy(tmp_path, {"base": "a"}, None, 2**30, False)
    rows = [[5, 6, 7], [8, 9]]
    counts = []
    for other, data in ((policy, rows), (replace(policy, facts={"base": "b"}), rows), (policy, [[5, 6], [7, 8, 9]])):
        frozen_blocks = FrozenBlocks(data, other)
        frozen_blocks.begin(tiny.model(blocks=4), [Span(2, 99)], {"model.norm.weight": 0}, torch.enable_grad)
        assert frozen_blocks.kept == [2]
        counts.append(len(list(tmp_path.iterdir())))
    assert counts == [1, 2, 3]


def test_does_not_cache_above_dropout(tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "gpt2": {"embd_pdrop": 0.1, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
        "llama": {"attention_dropout": 0.1},
    }
    for kind, rates in cases.items():
        line = fit(tmp_path, FROZEN, model=tiny.model(kind, blocks=4, **rates), steps=8)[0]
        assert "frozen blocks: not cached; " in line
        assert "is 0.1" in line
    top = {**FROZEN, "adapter": LORA | {"dropout": 0.5}}
    ours = fit(tmp_path, top)
    assert "cached below block 2" in ours[0]
    assert_equal(ours, fit(tmp_path, top, keep=False))


def test_caches_above_a_norm_of_the_embeddings(tmp_path: Path) -> None:
    def model() -> PreTrainedModel:
        return tiny.model("bloom", blocks=4, hidden_dropout=0.0, attention_dropout=0.0)

    ours = fit(tmp_path, FROZEN, model=model())
    assert "cached below block 2" in ours[0]
    assert_equal(ours, fit(tmp_path, FROZEN, model=model(), keep=False))


def full_disk(*arguments: Any) -> None:
    """Write to a disk without room."""
    raise OSError(28, "No space left on device")


def test_trains_without_a_cache_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(2**30, 2**30, 2**20))
    ours = fit(tmp_path, FROZEN)
    assert "not cached: no room for" in ours[0]
    assert not list((tmp_path / "cache").iterdir())
    assert_equal(ours, fit(tmp_path, FROZEN, keep=False))


@pytest.mark.slow
def test_trains_without_a_cache_when_the_disk_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OutputWriter, "add", full_disk)
    ours = fit(tmp_path, FROZEN)
    assert "not cached: [Errno 28] No space left" in ours[0]
    assert not list((tmp_path / "cache").iterdir())
    assert_equal(ours, fit(tmp_path, FROZEN, keep=False))


def test_trains_without_a_cache_in_an_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert "not cached: " in fit(tmp_path, FROZEN)[0]


def test_drops_outputs_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = StoredOutputs.read
    monkeypatch.setattr(StoredOutputs, "read", lambda self, rows, tokens: read(self, rows, tokens).mul_(1.001))
    ours = fit(tmp_path, FROZEN)
    assert "differ from the full model's" in ours[0]
    assert_equal(ours, fit(tmp_path, FROZEN, keep=False))


def test_processes_drop_the_same_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = ({1: 0.01, 2: 0.03}, 0.04), ({1: 0.01, 2: 0.01}, 0.02)
    monkeypatch.setattr(cache, "measure_errors", lambda *_, **named: mine)
    monkeypatch.setattr(processes, "gather", lambda value: [value, other])
    frozen_blocks: Any = FrozenBlocks([], CachePolicy(tmp_path, {}, None, 0, always=False))
    frozen_blocks._outputs = {1: None, 2: None}
    (note,) = frozen_blocks._check(None)
    assert note.startswith("outputs of block 2 differ")
    assert frozen_blocks.kept == [1]


def test_does_not_cache_beyond_the_limit(tmp_path: Path) -> None:
    ours = fit(tmp_path, FROZEN, limit=1000)
    assert "kB exceed memory.cache_limit_gb" in ours[0]
    assert not (tmp_path / "cache").exists()


def test_does_not_cache_for_one_pass(tmp_path: Path) -> None:
    ran: dict[bool, list[bool]] = {}
    for keep in (True, False):
        model, passes = tiny.model(blocks=4), list[bool]()
        frozen = model.model.layers[1].mlp
        frozen.register_forward_hook(lambda module, arguments, output, to=passes: to.append(output.requires_grad))
        line = fit(tmp_path, FROZEN, steps=6, eval_strategy="no", model=model, keep=keep)[0]
        assert line == ("frozen blocks: not cached; this run is too short for caching to save time" if keep else "")
        ran[keep] = passes
    assert ran[True] == ran[False]
    assert not any(ran[True]), "a frozen block keeps what only a backward pass needs"
    assert fit(tmp_path, {"kind": "full", "lr": 0.1}, steps=12)[0] == ""


def test_evicts_the_least_recently_used_entry(tmp_path: Path) -> None:
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
def test_chooses_what_saves_most(wanted: Any, kept: Any, limit: int, always: bool, expected: Any) -> None:
    assert choose_boundaries(wanted, kept, 100, 1, limit, always) == expected
