"""The tensors of a base's files as the parameters of its model, read some at a time."""

from collections import defaultdict
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from llmtune.model.base import Base
from llmtune.model.files.report import COMPUTED
from llmtune.model.files.stored import stored_tensors
from llmtune.model.parts import converted_keys, load_partly, parameter_names


class UnsupportedError(Exception):
    """A model that cannot be merged part by part; its words say why."""


class StoredWeights:
    """What a base's files hold, by the names of its model's parameters and stored buffers."""

    def __init__(self, base: Base, model: PreTrainedModel) -> None:
        """Read names and shapes alone; raises UnsupportedError where a parameter is not stored in its own shape."""
        self._base, self._model = base, model
        self.tensors = stored_tensors(base.folder, base.name)
        state = model.state_dict(keep_vars=True)
        first: dict[int, str] = {}
        for name, tensor in state.items():
            first.setdefault(id(tensor), name)
        names = parameter_names(model, list(self.tensors))
        self.owner = {key: first[id(state[name])] for key, name in names.items() if name in state}
        """Stored tensor -> the name of what it is, or is a part of; of a tied matrix the first name."""
        self.keys: dict[str, list[str]] = defaultdict(list)
        """The stored tensors that something is made of."""
        for key, name in self.owner.items():
            self.keys[name].append(key)
        self.converted = {self.owner[key] for key in converted_keys(model, list(self.owner))}
        """What transformers changes as it loads it, not only its name."""
        for name in first.values():
            self._check(name, list(state[name].shape))

    def _check(self, name: str, shape: list[int]) -> None:
        if name not in self.keys:
            raise UnsupportedError(f"{name} is not stored under a name of its own")
        if name not in self.converted and any(self.tensors[key].shape != shape for key in self.keys[name]):
            raise UnsupportedError(f"{name} is not stored in its own shape")

    def dropped(self, key: str) -> bool:
        """Whether a stored tensor has no place in a merged folder, as the model computes it."""
        return key not in self.owner and bool(COMPUTED.search(key))

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Parameters and buffers by name, in fp32 if they are real numbers; the caller may change them in place."""
        plain = {name: self.keys[name] for name in names if name not in self.converted}
        tensors: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            for name, keys in plain.items():
                first, *others = (self._read(key, files, stack) for key in keys)
                if not all(torch.equal(first, other) for other in others):
                    raise UnsupportedError(f"{keys[0]} and {keys[1]} are one matrix in the model, and not in the files")
                tensors[name] = first.float() if first.is_floating_point() else first
        return tensors | self._convert([name for name in names if name in self.converted])

    def _read(self, key: str, files: dict[Path, Any], stack: ExitStack) -> torch.Tensor:
        file = self.tensors[key].file
        if file not in files:
            files[file] = stack.enter_context(safe_open(file, framework="pt"))
        tensor: torch.Tensor = files[file].get_tensor(key)
        return tensor

    def _convert(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Parameters that transformers makes of stored tensors of other shapes, such as the experts of a block."""
        if not names:
            return {}
        keys = {key for name in names for key in self.keys[name]}
        kind, config = type(self._model), self._model.config
        state = load_partly(self._base.name, kind, config, self.tensors, keys, torch.float32).state_dict()
        return {name: state[name] for name in names}
