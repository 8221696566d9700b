"""LLaMA-Factory, by the interpreter of its own virtual environment: `python -m benchmarks.tools.llamafactory JOB.json`.

It gets encoded rows, as `tokenized_path`, and pads batches to multiples of 8 tokens. The base is in bf16, what trains
in fp32. As documented it checkpoints activations; at its best it does not. Where the top blocks train, it leaves the
final norm as it is: its key for more modules would take the norms of all blocks.
"""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.arms import ARMS, LORA, Arm
from benchmarks.tools.clock import Clock, arguments, serve

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PLACES = {name: "self_attn" if name in LINEAR[:4] else "mlp" for name in LINEAR}


def what_trains(arm: Arm, blocks: int) -> dict[str, Any]:
    """The keys that say what an arm trains, in a model of so many blocks."""
    quantized = {"quantization_bit": 4, "quantization_method": "bnb"} if arm.quantize else {}
    if arm.lora:
        top = range(blocks - arm.top, blocks) if arm.top else ()
        layers = [f"layers.{block}.{PLACES[name]}.{name}" for block in top for name in LINEAR] or ["all"]
        sizes = {"lora_rank": LORA["rank"], "lora_alpha": LORA["alpha"], "lora_target": ",".join(layers)}
        return {"finetuning_type": "lora", **sizes, **quantized}
    if arm.top:
        return {"finetuning_type": "freeze", "freeze_trainable_layers": arm.top}
    return {"finetuning_type": "full"}


def settings(job: dict[str, Any], rows: Path, blocks: int) -> dict[str, Any]:
    """The keys of a LLaMA-Factory recipe for a job whose rows are in a folder."""
    return {
        **arguments(job),
        "gradient_accumulation_steps": 1,
        "stage": "sft",
        "do_train": True,
        "dataset": "rows",  # asked for, and then not read
        "model_name_or_path": job["base"],
        "tokenized_path": str(rows),
        "template": "empty",
        "disable_shuffling": True,
        "include_num_input_tokens_seen": "non_padding",
        "disable_gradient_checkpointing": job["tuned"],
        **what_trains(ARMS[job["arm"]], blocks),
    }


def train(job: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """Train, save as the tool does, and count the tokens."""
    from datasets import Dataset, DatasetDict

    stand_in_for_audio()
    from llamafactory.train.tuner import run_exp  # type: ignore[import-not-found]

    examples = json.loads(Path(job["examples"]).read_text())
    encoded = [{**example, "attention_mask": [1] * len(example["input_ids"])} for example in examples]
    rows = Path(job["folder"]) / "encoded"
    DatasetDict({"train": Dataset.from_list(encoded)}).save_to_disk(str(rows))
    blocks = json.loads((Path(job["base"]) / "config.json").read_text())["num_hidden_layers"]
    chosen = settings(job, rows, blocks)
    run_exp(chosen, callbacks=[clock])
    state = json.loads((Path(chosen["output_dir"]) / "trainer_state.json").read_text())
    return {"tokens": state["num_input_tokens_seen"]}


def stand_in_for_audio() -> None:
    """Let LLaMA-Factory import torchaudio, which it uses for audio alone: no index has a build for every torch."""
    module = ModuleType("torchaudio")
    # transformers looks for the package, and a module without a spec raises ValueError there.
    module.__spec__ = ModuleSpec("torchaudio", None)
    sys.modules.setdefault("torchaudio", module)


if __name__ == "__main__":
    serve(train)
