"""Conversations as ShareGPT writes them: turns with from and value."""

from llmtune.data.formats.base import Format
from llmtune.data.formats.chat import conversation, is_sharegpt
from llmtune.data.formats.turns import SHAREGPT as KEYS

SHAREGPT = Format(
    "sharegpt",
    ("conversations",),
    ("tools", "system"),
    is_sharegpt,
    lambda where, record: conversation(where, record, KEYS),
)
