"""Answers of models whose rows cannot share a start: transformers generates them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedModel

from llmtune.inference.passes import left_padded

Choose = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
"""Chooses the next tokens (B,) by logits (B, V) of the rows at these places in a batch."""


class _Chosen(LogitsProcessor):  # type: ignore[misc, unused-ignore]
    """Leaves `generate` no other token than the one that is chosen for the row at each place."""

    def __init__(self, choose: Choose, places: Sequence[int]) -> None:
        self._choose, self._places = choose, places

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        """Return scores (B, V) of which all but the chosen tokens' are minus infinity."""
        tokens = self._choose(scores, self._places)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def generated(
    model: PreTrainedModel,
    rows: list[list[int]],
    stop: set[int],
    new_tokens: int,
    choose: Choose | None,
    places: Sequence[int],
) -> list[list[int]]:
    """The tokens after rows, padded on the left, through the first stop token; `choose` is told the rows' places."""
    processors = [_Chosen(choose, places)] if choose else []
    ids, mask = left_padded(rows, model.device)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": new_tokens, "logits_processor": processors}
    options |= {"eos_token_id": sorted(stop), "pad_token_id": 0, "use_cache": True}
    output: torch.Tensor = model.generate(input_ids=ids, attention_mask=mask, **options)
    return [_through_stop(answer, stop) for answer in output[:, ids.shape[1] :].tolist()]


def _through_stop(tokens: list[int], stop: set[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[: end + 1]
