"""The prefix kept once: outputs of the blocks that do not train, computed once a row and given back at every step.

The *boundary* of a stage is the number of blocks below the lowest one that trains. In training, each of these blocks
is replaced by one that returns what was kept, so that the model's own forward still makes masks and rotary embeddings.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import nn

from llmtune import states
from llmtune.boundary import Span, choose, random_part
from llmtune.depth import blocks
from llmtune.states import States, Writer

TOKENS = {"cpu": 2048, "cuda": 16384}
PROBED = 3


@dataclass(frozen=True)
class Keeping:
    """What may be kept where: `facts` name the base and its precision, `adapter` counts where it lies in the prefix."""

    folder: Path
    facts: dict[str, Any]
    adapter: dict[str, Any] | None
    limit: int
    always: bool


class Prefix:
    """Keeps, gives back and proves the outputs of the blocks below a stage's boundary, for rows of token ids."""

    def __init__(self, rows: Sequence[list[int]], keeping: Keeping) -> None:
        self._rows, self._keeping = rows, keeping
        self._lengths = [len(row) for row in rows]
        self._states: dict[int, States] = {}
        self._given: torch.Tensor | None = None
        self._rest: tuple[None, ...] | None = None
        self._installed = 0
        self._entry: set[int] = set()
        self._gone = 0

    @property
    def kept(self) -> list[int]:
        """The boundaries whose states are at hand."""
        return sorted(self._states)

    def begin(
        self,
        model: nn.Module,
        wanted: list[Span],
        distance: dict[str, int],
        autocast: Callable[[], Any],
        before: list[int] | None = None,
    ) -> str | None:
        """Keep what the coming stages profit from; gives one line on it, None where no stage has a prefix.

        Where a run goes on, the boundaries `before` are kept, whatever would pay now: its result stays the same.
        """
        useful = sorted({span.boundary for span in wanted if span.boundary})
        if not useful:
            return None
        self._inner = model.get_base_model() if isinstance(model, PeftModel) else model
        self._blocks = list(blocks(model))
        self._autocast = autocast
        reason = random_part(self._inner, self._blocks[useful[-1] :]) or self._look()
        live = dict(model.named_parameters())
        low = [name for name, far in distance.items() if id(live[name]) in self._entry and far <= len(self._blocks)]
        if low:
            reason = f"{low[0]} works below the blocks and trains"
        if reason:
            return f"prefix: computed at every step: {reason}"
        facts = {boundary: self._facts(boundary, distance) for boundary in useful}
        folders = {boundary: self._keeping.folder / states.key(facts[boundary]) for boundary in useful}
        there = {boundary for boundary in useful if folders[boundary].exists()}
        whole = {boundary for boundary in there if states.complete(folders[boundary], facts[boundary])}
        size = sum(self._lengths) * self._width * self._dtype.itemsize
        chosen = choose(wanted, whole, len(self._rows), size, self._keeping.limit, self._keeping.always)
        if before is not None:
            chosen = [boundary for boundary in useful if boundary in before]
        missing = [boundary for boundary in chosen if boundary not in whole]
        said = [f"{len(there - whole)} damaged or foreign, never used"] if there - whole else []
        for boundary in set(chosen) - set(missing):
            self._states[boundary] = self._open(folders[boundary])
        if missing:
            states.make_room(
                self._keeping.folder, size * len(missing), self._keeping.limit, {folders[b] for b in chosen}
            )
            reason = self._build({boundary: (folders[boundary], facts[boundary]) for boundary in missing}, size)
            if reason:
                said.append(f"not kept: {reason}")
        self._keep_proved(said)
        gone = self._let_go(wanted)
        return self._report(whole, size, [*said, gone] if gone else said)

    def _keep_proved(self, said: list[str]) -> None:
        for boundary in list(self._states):
            gap, allowed = self._probe(boundary)
            if not gap <= allowed:
                del self._states[boundary]
                said.append(f"outputs of block {boundary} differ from the plain path's by {gap:.1e}: not used")

    def _report(self, whole: set[int], size: int, said: list[str]) -> str:
        reused = [boundary for boundary in self.kept if boundary in whole]
        built = [boundary for boundary in self.kept if boundary not in whole]
        for word, which in (("kept", built), ("reused", reused)):
            if which:
                said.insert(0, f"{word} below block {', '.join(map(str, which))} ({len(which) * size / 2**20:,.0f} MB)")
        if not said and size > self._keeping.limit:
            said.append(f"computed at every step: {size / 2**30:.2g} GB would pass memory.prefix_limit_gb")
        return f"prefix: {'; '.join(said) or 'computed at every step: too few passes over the rows to pay'}"

    def enter(self, boundary: int) -> None:
        """Let the blocks below a boundary return what was kept, where it was; every other block computes."""
        stand = boundary if boundary in self._states else 0
        self._installed = stand
        for index, block in enumerate(self._blocks if hasattr(self, "_blocks") else []):
            _replace(block, self._give if index < stand else None)

    def _let_go(self, wanted: list[Span]) -> str | None:
        """Free the weights of blocks that no coming stage runs: the result is made of what trained, not of them."""
        if not all(span.boundary in self._states for span in wanted):
            return None
        self._gone = min(span.boundary for span in wanted)
        freed = 0
        stays = {p.data_ptr() for block in self._blocks[self._gone :] for p in block.parameters()}
        for block in self._blocks[: self._gone]:
            for parameter in block.parameters():
                # Quantised weights are small and not made for this; shared ones are still needed.
                if type(parameter) is not nn.Parameter or parameter.data_ptr() in stays:
                    continue
                states.forget(parameter.data)
                freed += parameter.numel() * parameter.element_size()
                parameter.data = parameter.data.new_empty(0)
        return f"{freed / 2**20:,.0f} MB of weights let go"

    def end(self) -> None:
        """Let every block compute again, save those whose weights were let go."""
        if not self._gone:
            self.enter(0)

    def select(self, rows: Sequence[int], tokens: int, device: torch.device) -> None:
        """Say which rows, padded to how many tokens, the next forward pass is about."""
        if self._installed:
            self._given = self._states[self._installed].read(rows, tokens).to(device, non_blocking=True)

    # ---- the blocks' stand-ins

    def _give(self, *arguments: Any, **named: Any) -> Any:
        return self._given if self._rest is None else (self._given, *self._rest)

    def _through(self, *arguments: Any, **named: Any) -> Any:
        hidden = arguments[0] if arguments else named["hidden_states"]
        return hidden if self._rest is None else (hidden, *self._rest)

    # ---- building

    def _look(self) -> str | None:
        """Learn from the shortest row what a block returns; gives a reason where that cannot be stood in for."""
        seen: list[Any] = []
        entry: list[int] = []
        inside = {id(module) for block in self._blocks for module in block.modules()}
        outside = [module for module in self._inner.modules() if id(module) not in inside]

        def enters(module: nn.Module, arguments: Any, output: Any) -> None:
            if not seen:
                entry.extend(id(parameter) for parameter in module.parameters(recurse=False))

        handles = [module.register_forward_hook(enters) for module in outside]
        handles += [self._blocks[0].register_forward_hook(lambda module, arguments, output: seen.append(output))]
        self._forward([min(range(len(self._rows)), key=self._lengths.__getitem__)])
        for handle in handles:
            handle.remove()
        self._entry = set(entry)
        output = seen[0] if len(seen) == 1 else None
        first = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(first, torch.Tensor) or first.ndim != 3:
            return "this model's blocks do not return hidden states alone"
        if isinstance(output, tuple):
            # What else a block returns, attention weights, is asked for by nobody here; the probe sees where it is.
            self._rest = (None,) * (len(output) - 1)
        self._width, self._dtype = first.shape[-1], first.dtype
        return None

    def _facts(self, boundary: int, distance: dict[str, int]) -> dict[str, Any]:
        """What the states below a boundary depend on, as plain values."""
        inside = [tensor for block in self._blocks[:boundary] for tensor in block.parameters()]
        adapted = any(len(self._blocks) - far < boundary for far in distance.values()) and self._keeping.adapter
        ids = hashlib.sha256("\n".join(" ".join(map(str, row)) for row in self._rows).encode()).hexdigest()
        config: Any = self._inner.config
        return {
            **self._keeping.facts,
            "adapter": adapted or None,
            "attention": config._attn_implementation,
            "boundary": boundary,
            "device": inside[0].device.type,
            "dtype": str(self._dtype),
            "rows": ids,
            "versions": [torch.__version__, transformers.__version__],
            "weights": sorted({str(tensor.dtype) for tensor in inside}),
            "width": self._width,
        }

    def _open(self, folder: Path) -> States:
        return States(folder, self._lengths, self._width, self._dtype)

    def _build(self, missing: dict[int, tuple[Path, dict[str, Any]]], size: int) -> str | None:
        """Compute the states below the missing boundaries in one pass, from the highest one kept below them."""
        writers: dict[int, Writer] = {}
        try:
            for boundary, (folder, facts) in missing.items():
                writers[boundary] = Writer(folder, facts, size)
        except OSError as error:  # a full or read-only disk costs the saving, not the run
            for writer in writers.values():
                writer.discard()
            return str(error)
        self.enter(max((boundary for boundary in self._states if boundary < min(missing)), default=0))
        batch: list[int] = []

        def keeper(boundary: int) -> Callable[[nn.Module, Any, Any], None]:
            def keep(module: nn.Module, arguments: Any, output: Any) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                writers[boundary].add(hidden, [self._lengths[row] for row in batch])

            return keep

        handles = [self._blocks[boundary - 1].register_forward_hook(keeper(boundary)) for boundary in missing]
        for block in self._blocks[max(missing) :]:
            _replace(block, self._through)
        for rows in self._batches():
            batch[:] = rows
            self._forward(rows)
        for handle in handles:
            handle.remove()
        self.enter(0)
        for boundary, writer in writers.items():
            writer.seal()
            self._states[boundary] = self._open(missing[boundary][0])
        return None

    def _batches(self) -> Iterator[list[int]]:
        """Rows, longest first, in batches of a size that suits the device."""
        most = TOKENS.get(next(self._inner.parameters()).device.type, TOKENS["cpu"])
        order = states.longest_first(self._lengths)
        while order:
            count = max(1, most // self._lengths[order[0]])
            yield order[:count]
            del order[:count]

    @torch.no_grad()
    def _forward(self, rows: Sequence[int]) -> torch.Tensor:
        """The decoder's last hidden states (B, T, H) of rows, padded on the right, in evaluation mode."""
        device = next(self._inner.parameters()).device
        lengths = [self._lengths[row] for row in rows]
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : lengths[place]] = torch.tensor(self._rows[row])
            mask[place, : lengths[place]] = 1
        self.select(rows, max(lengths), device)
        training = self._inner.training
        self._inner.eval()
        with self._autocast():
            decoder: Any = self._inner.base_model
            hidden = decoder(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)[0]
        self._inner.train(training)
        return hidden.float() * mask[..., None].to(device)

    # ---- proof

    def _probe(self, boundary: int) -> tuple[float, float]:
        """How far the kept path's outputs are from the plain path's on a few rows, and how far they may be.

        Relative in the Euclidean norm. They may be as far as rounding, or twice what batching the same rows otherwise
        does to the plain path.
        """
        order = states.longest_first(self._lengths)
        rows = sorted({order[place * (len(order) - 1) // max(1, PROBED - 1)] for place in range(PROBED)})
        self.enter(0)
        plain = self._forward(rows)
        alone = [self._forward([row])[0] for row in rows]
        self.enter(boundary)
        ours = self._forward(rows)
        self.enter(0)
        apart = torch.stack([nn.functional.pad(one, (0, 0, 0, plain.shape[1] - len(one))) for one in alone])
        rounding = 1e-6 if plain_float(self._inner, self._autocast) else 2**-7
        return _gap(ours, plain), max(rounding, 2 * _gap(apart, plain))


def plain_float(model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]) -> bool:
    """Whether a model computes in fp32."""
    with autocast():
        mixed = torch.is_autocast_enabled(next(model.parameters()).device.type)
    return not mixed and all(p.dtype == torch.float32 for p in model.parameters())


def _replace(block: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Let a block compute by `forward`, or by its own again."""
    if forward is None:
        vars(block).pop("forward", None)
    else:
        vars(block)["forward"] = forward


def _gap(ours: torch.Tensor, plain: torch.Tensor) -> float:
    return float((ours - plain).norm() / plain.norm())
