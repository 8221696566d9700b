"""The day that a chat template writes into prompts: fixed for a run, so that it reads the same tomorrow."""

import re
from collections.abc import Mapping
from datetime import date
from typing import Any

from llmtune.data.encoding.template import variables

DATE, NOW = "date_string", "strftime_now"
"""The variable by which templates take the day, and the function by which they ask for it."""
_FORMAT = re.compile(NOW + r"\(\s*(['\"])(.*?)\1\s*\)")


def writes_day(template: str | None, values: Mapping[str, Any]) -> bool:
    """Whether a template writes the day on which it is rendered, whatever these values say."""
    return NOW in (template or "") and DATE not in values


def day_notes(template: str | None, values: Mapping[str, Any]) -> list[str]:
    """A note where a template writes the day, and takes none from a run."""
    if not writes_day(template, with_day(template, values, date.today())):
        return []
    return ["the chat template writes the day into rows, and takes none: on another day, prompts differ a little"]


def with_day(template: str | None, values: Mapping[str, Any], day: date) -> dict[str, Any]:
    """The values with the day, as the template itself would write it; as they are where it takes no day."""
    written = _FORMAT.search(template or "")
    if template is None or written is None or DATE in values or DATE not in variables(template):
        return dict(values)
    return {**values, DATE: day.strftime(written[2])}
