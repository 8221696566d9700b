"""The delta: what was trained, the adapter or the tensors, with the base it fits."""

import importlib
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from llmtune.adapters.kinds import KINDS
from llmtune.errors import ProofError
from llmtune.files import link, write_folder, write_json
from llmtune.model.base import Base, load_config, vocabulary
from llmtune.model.blocks import unwrap
from llmtune.model.files.fingerprints import TOKENIZER, fingerprint_base, named_like
from llmtune.model.files.quantization import dequantized_format
from llmtune.model.kinds import auto_class

TENSORS = "trained.safetensors"
ADAPTER = "adapter_model.safetensors"
BASE = "base.json"
Trained = dict[str, torch.Tensor] | Path
"""Trained tensors by name, or the safetensors file that holds exactly them."""


def save_delta(
    model: nn.Module,
    tensors: Trained,
    folder: Path,
    base: Base,
    kind: str,
    start: dict[str, Any] | None = None,
    combined: dict[str, Any] | None = None,
) -> None:
    """Write what was trained and what it was trained on, completely or not at all; `tensors` are the trained ones.

    Those of a file are linked, not written again, where the delta holds them by the same names.

    `kind` is the adapter's; `start` says what training went on from, `combined` which runs were combined, if any.
    """
    # safetensors writes beside a file before it renames: a killed process would leave that in the delta.
    with write_folder(folder) as partial:
        _save_tensors(model, tensors, partial, kind)
        facts = {"base": base.name, "revision": base.revision, "hub_id": base.hub_id, "files": fingerprint_base(base)}
        converted = {"converted": asdict(base.converted)} if base.converted else {}
        added = {"added": _copy_tokenizer(base, partial)} if base.added else {}
        stored = "adapter" if isinstance(model, PeftModel) else "tensors"
        form = dequantized_format(load_config(base))
        before = {"start": start, "combined": combined, "dequantized": form}
        named = {"loaded_by": auto_class(unwrap(model).config).__name__, "kind": stored, "adapter": kind}
        write_json(
            partial / BASE,
            {**facts, **converted, **added, **{key: value for key, value in before.items() if value}, **named},
        )


def _copy_tokenizer(base: Base, folder: Path) -> dict[str, object]:
    """Copy the tokenizer with its new tokens; gives their ids, and the rows that the embeddings have with them."""
    for file in named_like(base.folder, TOKENIZER):
        shutil.copyfile(file, folder / file.name)
    return {"ids": list(base.added), "rows": vocabulary(load_config(base))}


def _save_tensors(model: nn.Module, trained: Trained, folder: Path, kind: str) -> None:
    if isinstance(trained, Path) and not isinstance(model, PeftModel):
        link(trained, folder / TENSORS)
        return
    tensors = load_file(trained) if isinstance(trained, Path) else trained
    if isinstance(model, PeftModel):
        # PEFT picks what belongs to the adapter; VeRA's random matrices are buffers, which each layer shares.
        buffers = dict(model.named_buffers(remove_duplicate=False))
        model.save_pretrained(str(folder), state_dict={**buffers, **tensors}, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        KINDS[kind].rebase(model, folder / ADAPTER)
    else:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / TENSORS)


def tensor_names(delta: Path) -> set[str]:
    """Return the names of the tensors in a delta without an adapter."""
    with safe_open(delta / TENSORS, framework="pt") as stored:
        return set(stored.keys())


def load_delta(model: PreTrainedModel, delta: Path, as_stored: bool = False) -> PreTrainedModel | PeftModel:
    """Return the tuned model from a base model and a delta folder; raises ProofError for a tensor too few or many.

    Trained tensors take the base's dtype, but with `as_stored` keep their own.
    """
    if (delta / TENSORS).is_file():
        return _load_tensors(model, delta / TENSORS, as_stored)
    if not (delta / ADAPTER).is_file():
        raise ProofError(f"{delta}: holds neither {TENSORS} nor {ADAPTER}; train first")
    for spec in KINDS.values():
        if spec.registered_by:
            importlib.import_module(spec.registered_by)
    try:
        # Without a device, PEFT reads the adapter onto a GPU that is there, whatever the model computes on.
        tuned = PeftModel.from_pretrained(model, str(delta), torch_device=str(model.device))
    except RuntimeError as error:  # torch's error for tensors of other shapes
        raise ProofError(f"{delta}: does not fit this base: {str(error).splitlines()[-1].strip()}") from error
    check_loaded(tuned, delta / ADAPTER)
    return tuned.eval()


def check_loaded(tuned: PeftModel, file: Path, name: str = "default") -> None:
    """Raise ProofError where the adapter of that name is not in the model as it is stored in a file."""
    stored = load_file(file)
    live = get_peft_model_state_dict(tuned, adapter_name=name, save_embedding_layers=False)
    _same_names(file, set(stored), set(live))
    changed = [key for key, tensor in stored.items() if not torch.equal(tensor, live[key].to(tensor.dtype).cpu())]
    if changed:
        raise ProofError(f"{file}: {changed[0]} was not loaded as stored")


def _load_tensors(model: PreTrainedModel, file: Path, as_stored: bool) -> PreTrainedModel:
    parameters = dict(model.named_parameters())
    with safe_open(file, framework="pt") as stored, torch.no_grad():
        names = set(stored.keys())
        _same_names(file, names, names & set(parameters))
        for name in names:
            tensor = stored.get_tensor(name)
            if tensor.shape != parameters[name].shape:
                raise ProofError(
                    f"{file}: {name} has shape {list(tensor.shape)}, the base {list(parameters[name].shape)}"
                )
            if as_stored:
                parameters[name].data = tensor
            else:
                parameters[name].copy_(tensor)
    return model.eval()


def _same_names(file: Path, stored: set[str], live: set[str]) -> None:
    odd = sorted(stored ^ live)
    if odd:
        where = "is not in the model" if odd[0] in stored else "is missing"
        raise ProofError(f"{file}: {odd[0]} {where} ({len(odd)} such tensors): another base, or a damaged delta")
