"""PEFT alone loads what llmtune saved: LoRA from every start, adapted experts and VeRA, all in one fresh process."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmtune.adapters.delta import save_delta
from llmtune.adapters.lora_starts import INITIAL
from llmtune.model.base import Base, load_model
from tests.adapters import test_experts as experts
from tests.adapters import test_lora as lora
from tests.adapters import test_vera as vera

IDS = torch.arange(3, 40)[None]
SCRIPT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
for base, delta in json.load(sys.stdin):
    dtype = torch.bfloat16 if "bfloat16" in base else torch.float32
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), delta).eval()
    torch.save(model(torch.arange(3, 40)[None]).logits, delta + "/logits.pt")
assert "llmtune" not in sys.modules
"""
Saved = dict[tuple[Path, Path], torch.Tensor]


def starts(folder: Path) -> Saved:
    """Base, delta and live logits of LoRA from each of its starts."""
    saved = {}
    for start, adapter in lora.STARTS.items():
        (folder / INITIAL).unlink(missing_ok=True)
        tuned, base, _ = lora.inserted(folder, adapter)
        saved[base.folder, folder / start] = lora.shake(tuned)
        save_delta(tuned, dict(tuned.named_parameters()), folder / start, base, "lora")
    return saved


def adapted_experts(folder: Path) -> Saved:
    """Base, delta and live logits of LoRA on experts."""
    saved = {}
    for kind in ("qwen3_moe", "gpt_oss", "deepseek_v3"):
        base, delta = Base(experts.save_base(folder / kind, kind), "base", None, None), folder / kind / "delta"
        live = experts.adapted(load_model(base)).eval()
        before = live(IDS).logits
        torch.manual_seed(1)
        for name, parameter in live.named_parameters():
            if ".lora_B." in name:
                parameter.data.normal_(std=0.1)
        saved[base.folder, delta] = live(IDS).logits
        assert (saved[base.folder, delta] - before).abs().max() > 1e-3
        save_delta(live, dict(live.named_parameters()), delta, base, "lora")
    return saved


def vectors(folder: Path) -> Saved:
    """Base, delta and live logits of VeRA."""
    saved = {}
    for kind in ("llama", "gpt2"):
        for dtype in (torch.float32, torch.bfloat16):
            case = folder / f"{kind}-{dtype}"
            tuned, tensors, base = vera.inserted(case, kind, dtype)
            vera.shake(tensors)
            saved[base.folder, case / "delta"] = tuned(IDS).logits
            save_delta(tuned, dict(tensors), case / "delta", base, "vera")
    return saved


CASES: dict[Callable[[Path], Saved], float] = {starts: 1e-5, adapted_experts: 0.0, vectors: 0.0}
"""What is saved, and how far logits may be from the live ones."""


@pytest.mark.slow
def test_peft_alone_gives_the_logits_of_what_was_saved(tmp_path: Path) -> None:
    saved = {make: make(tmp_path / make.__name__) for make in CASES}
    folders = [[str(base), str(delta)] for live in saved.values() for base, delta in live]
    assert len(folders) == 6 + 3 + 4
    command = [sys.executable, "-c", SCRIPT]
    subprocess.run(command, input=json.dumps(folders), text=True, check=True, cwd="/")
    for make, live in saved.items():
        for (_, delta), logits in live.items():
            loaded = torch.load(delta / "logits.pt", weights_only=True)
            torch.testing.assert_close(loaded, logits, rtol=0, atol=CASES[make], msg=str(delta))
