"""Judges transformers' report of loading a base: what is missing, has no place, or has another shape."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from llmtune.errors import FieldError

COMPUTED = re.compile(
    r"\.(masked_bias|causal_mask|inv_freq|cos_cached|sin_cached)$|\.(attn|attention|self_attn)\.bias$"
)
"""What older versions of an architecture stored and newer ones compute: causal masks and rotary frequencies."""
_NAMED = 3
_TRIED = 20
_MADE_BY = {
    "_orig_mod.": "torch.compile",
    "module.": "a parallel wrapper",
    "base_model.model.": "PEFT",
    "_fsdp_wrapped_module.": "FSDP",
    "_forward_module.": "DeepSpeed",
}


def refuse_differences(name: str, report: Mapping[str, Any]) -> None:
    """Raise FieldError for a base whose stored tensors are not those of its model.

    `report` is what transformers gives with `output_loading_info`; what an architecture ties, recomputes or ignores is
    not in it.
    """
    missing = report.get("missing_keys") or ()
    unexpected = [key for key in report.get("unexpected_keys") or () if not COMPUTED.search(key)]
    mismatched = sorted(report.get("mismatched_keys") or (), key=str)
    if missing and unexpected:
        raise FieldError("model.base", f"{name}: {_renamed(missing, unexpected)}")
    if missing:
        words = f"its files lack {_listed(missing)}, which would start at random; download it again, or try another"
        raise FieldError("model.base", f"{name}: {words}")
    if mismatched:
        key, stored, expected = mismatched[0]
        others = f" (and {len(mismatched) - 1} more tensors differ)" if mismatched[1:] else ""
        words = f"{key} is stored as {list(stored)}, but config.json makes it {list(expected)}{others}"
        raise FieldError("model.base", f"{name}: {words}; config.json and weights are of different models")
    if unexpected:
        words = f"its files hold {_listed(unexpected)}, which the model of its config.json has no place for"
        raise FieldError("model.base", f"{name}: {words}: they would be lost; correct config.json, or take them out")


def _renamed(missing: Collection[str], unexpected: Collection[str]) -> str:
    """What to say where the files have other names than the model: by a common prefix, where there is one."""
    prefix = _prefix(missing, unexpected)
    if prefix:
        by = next((f" (as {maker} writes them)" for start, maker in _MADE_BY.items() if prefix.startswith(start)), "")
        return f"its tensors' names start with {prefix!r}{by}, and the model's do not; save it without that prefix"
    return (
        f"its files lack {_listed(missing)}, and hold {_listed(unexpected)}, which the model of its config.json has "
        "no place for; is config.json another model's?"
    )


def _prefix(missing: Collection[str], unexpected: Collection[str]) -> str:
    """The beginning that turns most names into ones that are missing; "" where there is none."""
    parts = [key.split(".") for key in unexpected]
    common = [names[0] for names in zip(*parts, strict=False) if len(set(names)) == 1]
    sample, expected = sorted(unexpected)[:_TRIED], set(missing)
    for length in range(1, len(common) + 1):
        start = ".".join(common[:length]) + "."
        fitting = [key for key in sample if _fits(key.removeprefix(start), expected)]
        if 2 * len(fitting) > len(sample):
            return start
    return ""


def _fits(key: str, expected: set[str]) -> bool:
    """Whether a name is expected, with the model's own prefix before it or without."""
    return key in expected or any(other.endswith(f".{key}") for other in expected)


def _listed(keys: Collection[str]) -> str:
    """The first names, and how many there are."""
    first = sorted(keys)[:_NAMED]
    more = f", ... ({len(keys)} tensors)" if len(keys) > len(first) else ""
    return ", ".join(first) + more
