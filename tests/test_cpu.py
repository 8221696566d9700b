"""What is installed for a step on CPUs, and what is left out where it would do harm."""

from types import SimpleNamespace
from typing import Any

import pytest
from peft.tuners.lora.layer import Linear
from torch import nn

from llmtune import cpu
from llmtune.adapter import insert
from llmtune.model import facts
from tests import tiny, training

LORA = {"kind": "full", "lr": 0.01, "adapter": {"kind": "lora", "rank": 2}}


def installed(method: dict[str, Any], **options: int) -> tuple[set[str], bool]:
    """The classes of the modules that compute in another way, and whether the embedding's gradient is sparse."""
    model = tiny.model("llama", blocks=2, tied=True)
    recipe = training.spec(method)
    model = insert(model, recipe, recipe.method.plan(facts(model)), training.BASE)
    cpu.install(model, SimpleNamespace(**{"bf16": True, "gradient_checkpointing": False, "world_size": 1, **options}))
    changed = {type(module).__name__ for module in model.modules() if "forward" in vars(module)}
    return changed, bool(model.get_input_embeddings().sparse)


def test_every_part_is_installed_where_it_applies() -> None:
    assert installed({"kind": "full", "lr": 0.01}) == ({"LlamaRMSNorm", "LlamaMLP", nn.Linear.__name__}, True)
    assert {"LlamaRMSNorm", "LlamaMLP", Linear.__name__} <= installed(LORA)[0]


@pytest.mark.parametrize(
    ("how", "missing"), [({"gradient_checkpointing": True}, "LlamaMLP"), ({"bf16": False}, "Linear")], ids=str
)
def test_what_checkpointing_or_fp32_make_useless_is_left_out(how: dict[str, bool], missing: str) -> None:
    every = installed({"kind": "full", "lr": 0.01})[0]
    assert installed({"kind": "full", "lr": 0.01}, **how)[0] == every - {missing}


def test_among_several_processes_gradients_stay_dense() -> None:
    assert not installed({"kind": "full", "lr": 0.01}, world_size=2)[1]
