"""The list of methods; no other module asks which method a recipe names."""

from typing import Annotated, get_args

from pydantic import Field

from llmtune.methods.base import BaseMethod
from llmtune.methods.discriminative import Discriminative
from llmtune.methods.frozen import Frozen
from llmtune.methods.full import Full
from llmtune.methods.gradual import Gradual
from llmtune.methods.lisa import Lisa
from llmtune.methods.staged import Staged

Method = Annotated[Full | Frozen | Gradual | Discriminative | Staged | Lisa, Field(discriminator="kind")]
"""A recipe's `method` section: add a new one's class here."""
METHODS: dict[str, type[BaseMethod]] = {
    get_args(one.model_fields["kind"].annotation)[0]: one for one in get_args(get_args(Method)[0])
}
"""The classes by the recipe's `method.kind`."""
