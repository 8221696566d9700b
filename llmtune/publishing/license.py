"""The license of a base, by its card, in the form that the Hub takes."""

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelInfo

from llmtune.errors import PublishError
from llmtune.model.base import Base
from llmtune.publishing.endpoint import page_of
from llmtune.publishing.header import front_matter
from llmtune.recipe.paths import strip_paths
from llmtune.recipe.sections import Publish


def read_license(publish: Publish, base: Base, info: ModelInfo | None) -> dict[str, str]:
    """Read the base's license from its card; raises PublishError if a public copy of the base may not be allowed.

    `info` is what the Hub says of the base; None where it says nothing, or is not asked.
    """
    readme = base.folder / "README.md"
    fields = front_matter(readme.read_text(encoding="utf-8", errors="replace")) if readme.is_file() else {}
    if not fields and info is not None and info.card_data is not None:
        fields = info.card_data.to_dict()  # type: ignore[no-untyped-call]
    license = license_fields(fields, base.hub_id)
    if publish.visibility == "public":
        if info is not None and info.gated:
            raise PublishError(
                f"the base {base.hub_id} is gated, so its tuned copy is not made public; "
                "try publish.visibility: private"
            )
        if "license" not in license:
            raise PublishError(
                f"the license of {strip_paths(base.name)} is unknown, so nothing is made public; "
                "try publish.visibility: private"
            )
    return license


def license_fields(fields: Mapping[str, Any], hub_id: str | None) -> dict[str, str]:
    """Return a card's license, license_name and license_link as texts; empty where it names none.

    The Hub takes one license: several are an "other" one, named after all of them, with a link to the base's card.
    """
    names = fields.get("license")
    listed = [
        name for name in (names if isinstance(names, list) else [names]) if isinstance(name, str) and name.strip()
    ]
    if not listed:
        return {}
    more = {key: fields[key] for key in ("license_name", "license_link") if isinstance(fields.get(key), str)}
    if len(set(listed)) == 1:
        return {"license": listed[0], **more}
    name = "-and-".join(re.sub(r"[^a-z0-9.]+", "-", one.lower()).strip("-") for one in dict.fromkeys(listed))
    link = {"license_link": page_of(hub_id)} if hub_id else {}
    return {"license": "other", "license_name": name, **link, **more}
