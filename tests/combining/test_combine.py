"""Deltas of several runs as one: what the combination is, what proves it, and what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from llmtune import api, cli, recipe
from llmtune.adapters import lora_join
from llmtune.adapters.delta import load_delta
from llmtune.cli.commands.combine import Weighted
from llmtune.cli.commands.several import spread
from llmtune.combining.parts import Part
from llmtune.errors import LlmtuneError, ProofError, RecipeError
from llmtune.files import read_json
from llmtune.model.base import load_model
from llmtune.model.files.locate import locate_base
from llmtune.publishing.card import card
from llmtune.recipe.model import Model
from llmtune.recipe.sections import Recipe
from llmtune.run import Run
from llmtune.training.prepare import prepare
from tests.support import runs, tiny

Train = Callable[..., Run]


def lora(**settings: Any) -> dict[str, Any]:
    """A LoRA of rank 4 in every linear layer, or as the settings say."""
    return {"kind": "full", "lr": 1e-3, "adapter": {"kind": "lora", "rank": 4, "alpha": 8, **settings}}


IA3 = {"kind": "full", "lr": 1e-3, "adapter": {"kind": "ia3"}}
FULL = {"kind": "full", "lr": 1e-3}
HEAD = {"kind": "frozen", "reach": 1, "lr": 1e-3}


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains a run on a shared base by a method, once; `base` makes a base of other values."""
    folder = tmp_path_factory.mktemp("runs")
    prepared: dict[Any, tuple[Run, dict[str, Any]]] = {}

    def trained(name: str, method: dict[str, Any], base: Any = 0, step: float = 0.1, **sections: Any) -> Run:
        run = Run(folder / f"run-{name}")
        if run.path.exists():
            return run
        if base not in prepared:
            weights = _save_base(folder / f"base-{base}", base)
            rows = tiny.write_rows(folder / "rows.jsonl", tiny.sums(20))
            file = tiny.write_recipe(folder / "recipe.json", weights, rows, FULL)
            done = prepare(recipe.load(file), folder / f"prepared-{base}", 0)
            prepared[base] = (done, done.recipe().model_dump())
        done, settings = prepared[base]
        shutil.copytree(done.path, run.path)
        settings = settings | {"method": method} | sections
        Run(run.path, Recipe.model_validate(settings)).keep_settings()
        return runs.perturbed(run, step)

    return trained


def _save_base(folder: Path, seed: Any) -> Path:
    if seed != "bf16":
        return tiny.save_base(folder, seed=seed, blocks=1)
    tiny.save_base(folder, blocks=1)
    tiny.model(blocks=1).to(torch.bfloat16).save_pretrained(folder)
    return folder


def weights(run: Run, delta: Path | None = None) -> dict[str, torch.Tensor]:
    """The base's weights in fp32, with a delta added where one is given."""
    base = load_model(locate_base(Model(base=read_json(run.delta / "base.json")["base"])))
    if delta is None:
        return dict(base.state_dict())
    tuned = load_delta(base, delta)
    merged: Any = tuned.merge_and_unload() if isinstance(tuned, PeftModel) else tuned
    return dict(merged.state_dict())


PAIRS = {
    "lora": (lora(rslora=True), lora(rank=6, targets=["q_proj", "down_proj"], ranks={"down_proj": 2}), (0.7, -0.3)),
    "bf16": (lora(init="pissa"), lora(alpha=3), (0.7, 0.3)),
    "ia3": (IA3, {**IA3, "adapter": {"kind": "ia3", "targets": ["k_proj"]}}, (0.7, 0.7)),
    "tensors": (FULL, HEAD, (0.5, 2.0)),
}
"""Methods of two runs by kind, and the weights of their deltas."""


@pytest.mark.parametrize("kind", PAIRS)
def test_linear_is_the_exact_weighted_sum_of_the_deltas(kind: str, train: Train, tmp_path: Path) -> None:
    *methods, shares = PAIRS[kind]
    base = "bf16" if kind == "bf16" else 0
    first, second = (train(f"{kind}-{name}", method, base) for name, method in zip("ab", methods, strict=True))
    run = api.combine([first, second], shares, out=tmp_path / "out")
    facts, start = run.combined, weights(first)
    assert facts
    assert facts["gap"] <= facts["bound"] < facts["shift"]
    assert facts.get("rank") == {"lora": 10, "bf16": 8}.get(kind)
    assert [one["weight"] for one in facts["runs"]] == list(shares)
    deltas = [weights(one, one.delta) for one in (first, second)]
    combined = weights(run, run.delta)
    changed = 0
    for name, value in start.items():
        expected = value + sum(share * (delta[name] - value) for share, delta in zip(shares, deltas, strict=True))
        torch.testing.assert_close(combined[name], expected, rtol=1e-5, atol=2e-6)
        changed += not torch.equal(combined[name], value)
    assert changed


def test_ties_and_dare_join_tensors_as_published(train: Train, tmp_path: Path) -> None:
    first, second = train("tensors-a", FULL), train("tensors-b", HEAD)
    start, *tuned = (weights(first, delta) for delta in (None, first.delta, second.delta))
    ties = weights(first, api.combine([first, second], (0.7, 0.3), "ties", density=0.25, out=tmp_path / "t").delta)
    dare = [
        weights(first, api.combine([first, second], (1, 1), "dare", density=0.25, seed=seed, out=tmp_path / name).delta)
        for name, seed in (("x", 3), ("y", 3), ("z", 4))
    ]
    name = "model.layers.0.mlp.down_proj.weight"
    one, two = (delta[name] - start[name] for delta in tuned)
    kept = [part * (part.abs() >= part.abs().flatten().topk(part.numel() // 4).values[-1]) for part in (one, two)]
    sign = torch.where(sum(kept) >= 0, 1, -1)  # type: ignore[arg-type]
    agreeing = [part.sign() == sign for part in kept]
    total = 0.7 * kept[0] * agreeing[0] + 0.3 * kept[1] * agreeing[1]
    expected = total / (agreeing[0].int() + agreeing[1].int()).clamp(min=1)
    torch.testing.assert_close(ties[name] - start[name], expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(dare[0][name], dare[1][name])
    assert not torch.equal(dare[0][name], dare[2][name])
    difference = dare[0][name] - start[name]
    choices = torch.stack([torch.zeros_like(one), 4 * one, 4 * two, 4 * (one + two)])
    assert ((choices - difference).abs().min(0).values < 1e-5).all()
    assert 0.4 < (difference == 0).float().mean() < 0.7  # (1 - 0.25)^2


@pytest.mark.parametrize("how", ["ties", "dare"])
def test_ties_and_dare_keep_the_rank_of_adapters(how: str, train: Train, tmp_path: Path) -> None:
    first, second = train("bf16-a", lora(init="pissa"), "bf16"), train("bf16-b", lora(alpha=3), "bf16")
    run = api.combine([first, second], (0.7, -0.3), how, out=tmp_path / "out")
    assert run.combined
    assert run.combined["rank"] == 4
    assert run.combined["gap"] < 1e-5
    assert (run.combined["density"], run.combined["seed"]) == (0.5, 0 if how == "dare" else None)


def test_refuses_a_delta_that_is_not_the_live_combination(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(lora_join.JOINED_BY, "linear", "linear")  # PEFT's own: it sums A and B apart
    with pytest.raises(ProofError, match=r"from those of the live combination, over the bound .* nothing was written"):
        api.combine([train("plain", lora()), train("other", lora(), step=0.2)], out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


REFUSED = {
    "one run": (["plain"], {}, 2, "needs two runs or more"),
    "same": (["plain", "plain"], {}, 2, "holds the same delta as .*run-plain; name each run once"),
    "no run": (["plain", "nothing"], {}, 2, "holds no run"),
    "untrained": (["plain", "untrained"], {}, 4, "nothing is trained yet"),
    "base": (
        ["plain", "base"],
        {},
        2,
        r"was trained on .*base-1, and .* on .*base-0, whose model.safetensors differs",
    ),
    "kind": (["plain", "tensors-a"], {}, 2, "trained the model's own tensors, and .* an adapter \\(LoRA\\)"),
    "dora": (["dora", "plain"], {}, 2, "DoRA's magnitudes do not add up"),
    "vera": (["vera", "plain"], {}, 2, "deltas of VeRA do not add up .* LoRA, IA3 and trained tensors do"),
    "ranks": (
        ["plain", "rank6"],
        {"how": "ties"},
        2,
        "the ranks 4, 6 are to be joined.*--how linear joins any",
    ),
    "ia3": (["ia3-a", "ia3-b"], {"how": "ties"}, 2, "PEFT has no ties for IA3; try --how linear"),
    "weights": (["plain", "rank6"], {"weights": [1.0]}, 2, "1 for 2 runs; give one for each"),
    "nan": (["plain", "rank6"], {"weights": [1.0, float("nan")]}, 2, "--weights nan: is not a finite number"),
    "zero": (["plain", "rank6"], {"weights": [0.0, 0.0]}, 2, "are all 0"),
    "how": (["plain", "rank6"], {"how": "tie"}, 2, "did you mean 'ties'"),
    "density": (["plain", "rank6"], {"how": "dare", "density": 0.0}, 2, "should be above 0 and at most 1"),
    "unused": (["plain", "rank6"], {"density": 0.5}, 2, "linear keeps every value"),
    "changed": (["plain", "changed"], {}, 5, "adapter_config.json: was changed after `llmtune train`"),
}


@pytest.fixture(scope="module")
def folders(train: Train) -> dict[str, Path]:
    """The folders of runs by name, among them some that cannot be combined."""
    methods = {
        "plain": lora(),
        "rank6": lora(rank=6),
        "dora": lora(dora=True),
        "vera": {**FULL, "adapter": {"kind": "vera", "rank": 4}},
        "tensors-a": FULL,
        "ia3-a": IA3,
        "ia3-b": PAIRS["ia3"][1],
        "untrained": lora(alpha=2),
        "changed": lora(alpha=4),
    }
    made = {name: train(name, method) for name, method in methods.items()}
    made["base"] = train("base", lora(), base=1)
    made["untrained"].forget("train")
    config = made["changed"].delta / "adapter_config.json"
    config.write_text(config.read_text().replace("CAUSAL_LM", "causal_lm"))
    return {name: run.path for name, run in made.items()} | {"nothing": made["base"].path.parent}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_cannot_be_combined_in_one_line(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    names, options, code, message = REFUSED[case]
    with pytest.raises(LlmtuneError, match=message) as error:
        api.combine([folders[name] for name in names], out=tmp_path / "out", **options)  # type: ignore[arg-type]
    assert error.value.exit_code == code
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "reason"),
    [("target_parameters", "experts that are one tensor"), ("trainable_token_indices", "adapters with new tokens")],
)
def test_refuses_adapters_that_peft_cannot_join(
    key: str, reason: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Part, "config", {key: ["one"]})
    with pytest.raises(RecipeError, match=reason):
        api.combine([folders["plain"], folders["rank6"]], out=tmp_path / "out")


def test_writes_over_no_folder_that_holds_something(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / ".lock").touch()  # of another command that took the folder for a run
    with pytest.raises(RecipeError, match=r"is not empty \(mine.txt\)"):
        api.combine([folders["plain"], folders["rank6"]], out=tmp_path)
    with pytest.raises(RecipeError, match=r"mine.txt: is a file; choose a folder with --out"):
        api.combine([folders["plain"], folders["rank6"]], out=tmp_path / "mine.txt")


def test_a_combination_is_a_run_that_nothing_trained(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.reload_here(monkeypatch)
    first, second = train("plain", lora()), train("rank6", lora(rank=6))
    words = ["combine", str(first.path), str(second.path), "--weights", "0.75", "-0.25", "--out", str(tmp_path / "ab")]
    assert cli.main(words) == 0
    assert "combined from run-plain (weight 0.75) and run-rank6 (weight -0.25)" in capsys.readouterr().out
    run = Run(tmp_path / "ab")
    assert sorted(file.name for file in run.path.iterdir()) == ["data.json", "delta", "manifest.json", "recipe.yaml"]
    assert "# Nothing trained by it: run-plain was combined with run-rank6." in run.recipe_file.read_text()
    assert api.merge(run, set=["merge.dtype=float32"])["gap"] < 1e-5
    page = api.report(run).read_text()
    assert "Combined from run-plain (weight 0.75) and run-rank6 (weight -0.25) by the weighted sum" in page
    text = card(Run(run.path, run.recipe().model_validate(_publishing(run))))
    assert "`combined from run-plain (weight 0.75)" in text
    assert "- merge" in text
    for claim in (
        "Training by",
        "No training step",
        "What trained when",
        "Fine-tuned by",
        "How it was trained",
        "training moved",
    ):
        assert claim not in page + text
    for options in ([], ["--overwrite"]):
        (run.delta / "adapter_model.safetensors").write_bytes(b"")
        assert cli.main(["train", str(run.path), *options]) == 2
        assert "was combined from other runs, and nothing trains there" in capsys.readouterr().err


def _publishing(run: Run) -> dict[str, Any]:
    return run.recipe().model_dump() | {"publish": {"repo": "me/both", "weights": "delta"}}


def test_tells_held_out_rows_that_another_run_trained_on(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tiny.sums(30)
    files = {"a": rows[5:], "test": rows[:5], "b": rows[3:]}
    named = {name: str(tiny.write_rows(tmp_path / f"{name}.jsonl", some)) for name, some in files.items()}
    first = train("held-a", lora(), data={"train": named["a"], "eval_fraction": 0.2, "test": named["test"]})
    second = train("held-b", lora(), step=0.2, data={"train": named["b"], "eval_fraction": 0.05})
    run = api.combine([first, second], out=tmp_path / "out")
    seen = run.combined["held_out"]["trained"]["run-held-b"] if run.combined else 0
    assert 0 < seen <= 2
    assert f"{seen} of 5 held-out rows of run-held-a are training rows of run-held-b" in capsys.readouterr().out
    assert "are training rows of run-held-b" in api.report(run).read_text()


def test_weights_are_every_number_behind_the_option() -> None:
    weights = ("--weights", Weighted.fits)
    weights = ("--weights", Weighted.fits)
    assert spread(["a", "b", "--weights", "0.7", "-0.3", "--how", "ties"], *weights) == [
        *("a", "b", "--weights=0.7", "--weights=-0.3", "--how", "ties")
    ]
    assert spread(["--weights=1", "2", "a", "3"], *weights) == ["--weights=1", "--weights=2", "a", "3"]
    assert spread(["a", "--weights"], *weights) == ["a", "--weights"]
