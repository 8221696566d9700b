"""The reasoning before an answer: as a field of its own, or inline between think tags at the start of the content."""

import re

from llmtune.data.row import Message

FIELDS = ("reasoning_content", "thinking")
"""Keys under which chat templates take reasoning; the first is the usual one."""
_INLINE = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_TAG = r"[\w:|]*(?:think|thought|reason)[\w:|]*"
_BLOCK = rf"(?:<({_TAG})>\s*</\1>|\[THINK\]\s*\[/THINK\]|<\|channel>thought\s*<channel\|>)\s*"
_EMPTY = re.compile(rf"\s*{_BLOCK}", re.IGNORECASE)
_EMPTY_AT_END = re.compile(rf"{_BLOCK}\Z", re.IGNORECASE)
_OPEN = re.compile(rf"(?:<({_TAG})>|(\[THINK\]))\s*\Z", re.IGNORECASE)
_CLOSE = re.compile(r"\s*(?:</([\w:|]+)>|(\[/THINK\]))?\s*")
_TAIL = 60
"""Characters at the end of a prompt that may open a block."""


def split_thought(message: Message) -> tuple[str, str]:
    """Return a turn's reasoning ("" for none) and its content without it."""
    content = message["content"]
    for key in FIELDS:
        if (message.get(key) or "").strip():
            return message[key], content
    inline = _INLINE.match(content)
    return (inline[1], content[inline.end() :]) if inline else ("", content)


def without_thought(message: Message) -> Message:
    """Return a turn without its reasoning."""
    if message["role"] != "assistant":
        return message
    kept = {key: value for key, value in message.items() if key not in FIELDS}
    inline = _INLINE.match(message["content"])
    return {**kept, "content": message["content"][inline.end() :]} if inline else kept


def write_thought(message: Message, form: str) -> Message:
    """Return a turn with its reasoning under the key `form`, or "inline" in its content."""
    reasoning = message.get(FIELDS[0])
    if not reasoning or not reasoning.strip() or form == FIELDS[0]:
        return message
    kept = {key: value for key, value in message.items() if key != FIELDS[0]}
    if form == "inline":
        return {**kept, "content": f"<think>\n{reasoning.strip()}\n</think>\n\n{message['content']}"}
    return {**kept, form: reasoning}


def empty_block_end(text: str, start: int, limit: int) -> int:
    """Return where the empty thinking block ends that a template put at `start` of a text; `start` for none.

    The prompt before `start` may have opened it. The block ends at `limit` at most, where the content starts.
    """
    match = _EMPTY.match(text, start)
    if match is None and (opened := _OPEN.search(text[max(0, start - _TAIL) : start])):
        closed = _CLOSE.match(text, start)
        is_closed = closed and (closed[1] or "").lower() == (opened[1] or "").lower() and (closed[1] or closed[2])
        match = closed if is_closed else None
    if match is None or len(text[start : match.end()].rstrip()) > limit - start:
        return start
    return min(match.end(), limit)


def before_block(prompt: str) -> str:
    """Return a prompt without the empty thinking block at its end, if it has one."""
    tail = max(0, len(prompt) - _TAIL)
    match = _EMPTY_AT_END.search(prompt, tail)
    return prompt[: match.start()] if match else prompt


def after_thought(text: str, thought_end: int, limit: int, bare: str) -> int:
    """Return where what follows a thought starts: behind the tag that closes it, and at `limit` at most.

    `bare` is the text of the same answer without its thought; both end alike.
    """
    common = 0
    most = min(len(text) - thought_end, len(bare))
    while common < most and text[-1 - common] == bare[-1 - common]:
        common += 1
    start = max(thought_end, len(text) - common)
    closed = _CLOSE.match(text, start)
    is_close = closed and (start == thought_end or closed[1] or closed[2])
    return min(closed.end(), limit) if closed and is_close else start
