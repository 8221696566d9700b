"""Chat templates of many kinds, and the slow and plain way to encode a conversation with one of them."""

# ruff: noqa: E501 - a template in many short lines is harder to read

from transformers import PreTrainedTokenizerBase

from llmtune.data.encoding.encode import IGNORED
from llmtune.data.encoding.rules import Rules
from llmtune.data.encoding.template import Renderer
from llmtune.data.encoding.turns import Answers
from llmtune.data.example import Example
from llmtune.data.row import Row
from tests.support import tiny

_GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{% if role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
# Like Qwen3: thoughts before the last question are removed, and the last answer always gets a think block.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% set parts = m['content'].split('</think>') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '' %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ parts[-1].lstrip('\\n') }}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}" + _GENERATION
)
# Like TRL's Qwen3 for training: every answer has a think block, an empty one where it has no thought.
THOUGHTS_KEPT = THINKING.replace("{% if loop.index0 > ns.last %}", "").replace(
    "</think>\\n\\n' }}{% endif %}", "</think>\\n\\n' }}"
)
CHATML_TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
TEMPLATES = {
    "chatml": tiny.CHATML,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "llama2": LLAMA2,
    "qwen3": THINKING,
    "thoughts kept": THOUGHTS_KEPT,
    # Like DeepSeek R1: a thought is removed from every answer but the last.
    "thoughts removed": "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' and not loop.last %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}{{ '<|im_start|>' + m['role'] + '\\n' + c + '<|im_end|>\\n' }}"
    "{% endfor %}" + _GENERATION,
    "system in the first question": "{% set s = '<<' + messages[0]['content'] + '>>' if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + s + m['content'] | trim + ' [/INST]' }}"
    "{% set s = '' %}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
    "system in the last question": "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}{% if "
    "messages[0]['role'] == 'system' and (loop.last or loop.index0 == messages | length - 2) %}{{ messages[0]['content'] + "
    "'\\n\\n' }}{% endif %}{{ m['content'] + '[/INST]' }}{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% endif %}{% endfor %}",
    "default system": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nToday is ' + "
    "strftime_now('%Y') + '.<|im_end|>\\n' }}{% endif %}{% for m in messages %}" + CHATML_TURN + "{% endfor %}" + _GENERATION,
    "loop.last": "{% for m in messages %}" + CHATML_TURN.replace("<|im_end|>\\n", "<|im_end|>")
    + "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}"
    "{% endif %}",
    "counts turns": "{% for m in messages %}{{ loop.index }}" + CHATML_TURN + "{% endfor %}{% if add_generation_prompt %}"
    "{{ (messages | length + 1) | string + '<|im_start|>assistant\\n' }}{% endif %}",
    "names the length": "{{ messages | length }}{% for m in messages %}" + CHATML_TURN + "{% endfor %}" + _GENERATION,
    "no special tokens": "{% for m in messages %}{{ '### ' + m['role'] + ':\\n' + m['content'] }}{% if m['role'] == 'assistant' "
    "%}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}",
    "every answer stripped on the left": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'].lstrip() + "
    "'<|im_end|>\\n' }}{% endfor %}" + _GENERATION,
    "opens a block": "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n<a> ' + m['content'] + "
    "'<|im_end|>\\n' }}{% else %}" + CHATML_TURN + "{% endif %}{% endfor %}" + _GENERATION,
    "two kinds of answers": "{% for m in messages %}{% if m['role'] == 'assistant' and loop.index0 % 4 == 3 %}"
    "{{ '<|im_start|>assistant\\n' + '* ' + m['content'] + '<|im_end|>\\n' }}{% else %}" + CHATML_TURN + "{% endif %}{% endfor %}"
    + _GENERATION,
    "changes late": "{% for m in messages %}" + CHATML_TURN + "{% endfor %}{% if messages | length > 9 %}{{ 'long ' }}{% endif %}"
    + _GENERATION,
}  # fmt: skip
SPECIAL = {
    LLAMA3: ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    GEMMA: ("<bos>", "<end_of_turn>", "<start_of_turn>"),
}
"""Special tokens of a template, where they are not `<s>`, `</s>` or those of ChatML: BOS, and the end of a turn."""


def special_tokens(template: str) -> tuple[str, ...]:
    """The special tokens of a template: BOS first, then the end of a turn."""
    return SPECIAL.get(template) or (("<|im_start|>", "<|im_end|>") if "<|im_end|>" in template else ("<s>", "</s>"))


def find_answers(tokenizer: PreTrainedTokenizerBase, stop: set[int], rules: Rules | None = None) -> Answers:
    """What finds answers with a tokenizer's template."""
    stops = tuple(text for text in (tokenizer.decode([token]) for token in sorted(stop)) if text)
    return Answers(Renderer(tokenizer), stops, rules or Rules(1 << 30))


def label_slowly(
    row: Row, examples: list[Example], tokenizer: PreTrainedTokenizerBase, stop: set[int]
) -> list[list[int]]:
    """The labels of a row's examples, each turn rendered and tokenized alone; raises RecipeError as the last turn does."""
    answers = find_answers(tokenizer, stop)
    left = [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]
    turns = {index: answers.at(row, index) for index in left[:-1]} | {left[-1]: answers.last(row)}
    labels = []
    for example in reversed(examples):
        last, ids = turns[left.pop()], example.input_ids
        assert last is not None
        prompt = _ids(tokenizer, last.end[: last.prompt])
        assert ids[: len(prompt)] == prompt
        assert example.prompt_size == len(prompt)
        assert tokenizer.decode(ids) == tokenizer.decode(_ids(tokenizer, last.end))
        labels.append([IGNORED] * len(prompt) + ids[len(prompt) :])
        for index in list(left):
            turn = turns[index]
            texts = [] if turn is None else [(turn.end[: turn.learned], turn.end)]
            if turn is not None and turn.prompt > turn.generation:  # as a template writes it without an empty block
                before = turn.end[: turn.generation]
                texts.append((before, before + turn.end[turn.prompt :]))
            for start, end in ((_ids(tokenizer, before), _ids(tokenizer, text)) for before, text in texts):
                if index in left and prompt[: len(start)] == start and prompt[: len(end)] == end:
                    labels[-1][len(start) : len(end)] = end[len(start) :]
                    left.remove(index)
    return labels[::-1]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
