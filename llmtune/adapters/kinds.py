"""The list of adapters: a new kind is imported here and added to `AnyAdapter`."""

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field

from llmtune.adapters.base import AdapterSpec
from llmtune.adapters.bottleneck import Bottleneck
from llmtune.adapters.ia3 import Ia3
from llmtune.adapters.lora import Lora
from llmtune.adapters.none import NoAdapter
from llmtune.adapters.vera import Vera

AnyAdapter = NoAdapter | Lora | Ia3 | Bottleneck | Vera
KINDS: dict[str, type[AdapterSpec]] = {
    get_args(spec.model_fields["kind"].annotation)[0]: spec for spec in get_args(AnyAdapter)
}
"""The class of each kind by the name that a recipe writes."""


def _expand_none(value: object) -> object:
    """Let a recipe write `adapter: none`."""
    return {"kind": "none"} if value in (None, "none") else value


_ByKind = Annotated[AnyAdapter, Field(discriminator="kind")]
Adapter = Annotated[_ByKind, BeforeValidator(_expand_none, json_schema_input_type=_ByKind | Literal["none"] | None)]
