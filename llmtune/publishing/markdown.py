"""Text as Markdown that no content can break out of."""

import re
from collections.abc import Sequence


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Format a Markdown table; what would end a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(re.sub(r"\s+", " ", str(cell)).replace("|", r"\|") for cell in row) + " |" for row in lines
    )


def code(text: str) -> str:
    """Format text as Markdown code in a line; nothing in it can end the code or the line."""
    return "`" + re.sub(r"\s+", " ", text).replace("`", "'") + "`"


def indented(text: str) -> str:
    """Format text as a code block that no content can end."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def picture(words: str, file: str) -> str:
    """Format a picture of the repository; nothing in the words that describe it can end them."""
    plain = re.sub(r"[\s\\\[\]]+", " ", words)
    return f"![{plain}]({file})"
