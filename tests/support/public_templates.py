"""Chat templates as public models have them, written anew from what they render, and what an answer is with each."""

# ruff: noqa: E501, RUF001 - a template in many short lines is harder to read, and DeepSeek's tokens are no ASCII

import json
from collections.abc import Callable
from dataclasses import dataclass, field

_CALL = "{% set f = c.function %}"
_GENERATE = "{% if add_generation_prompt %}"


@dataclass(frozen=True)
class Public:
    """A template, and by which rule a model with it writes answers; None where the template has no way."""

    template: str
    special: tuple[str, ...]
    """BOS, the token that ends texts, and the others."""
    end: str
    """What ends an answer."""
    stops: tuple[str, ...] = ()
    """What generation stops at, where that is more than `end`."""
    before: str = ""
    """What the model says before the content."""
    thought: Callable[[str], str] | None = None
    """How it writes reasoning that the row has in a field, up to `before`."""
    inline: Callable[[str], str] | None = None
    """How it writes reasoning that the row has in think tags, where that is not as in the row."""
    call: Callable[[str, dict[str, str]], str] | None = None
    """How it writes a tool call."""
    takes_tools: bool = True
    block: str = ""
    """The empty thinking block that it puts before an answer without reasoning."""
    partly: tuple[str, ...] = ()
    """Kinds of rows of which the last answer alone can be learned: with the others they are refused."""
    refused: dict[str, str] = field(default_factory=dict)
    """Kinds of rows that are refused, with the words of the error."""


def _json(name: str, arguments: dict[str, str], key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {json.dumps(arguments)}}}'


def _think(text: str) -> str:
    return f"<think>\n{text}\n</think>\n\n"


LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content | trim %}{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
    "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\n' }}{% if tools %}{{ 'Environment: ipython\\n' }}{% endif %}"
    "{{ 'Cutting Knowledge Date: December 2023\\nToday Date: ' + date_string + '\\n\\n' + s + '<|eot_id|>' }}"
    "{% for m in messages %}{% if m.role == 'user' and loop.first and tools %}{{ '<|start_header_id|>user<|end_header_id|>\\n\\nGiven the following functions, call one:\\n\\n' }}"
    "{% for t in tools %}{{ t | tojson(indent=4) + '\\n\\n' }}{% endfor %}{{ m.content | trim + '<|eot_id|>' }}"
    "{% elif m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}{% set c = m.tool_calls[0] %}"
    + _CALL
    + "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n{\"name\": \"' + f.name + '\", \"parameters\": ' + f.arguments | tojson + '}<|eot_id|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content | tojson + '<|eot_id|>' }}"
    "{% else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    + _GENERATE
    + "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_QWEN_HEAD = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}{{ '# Tools\\n<tools>' }}"
    "{% for t in tools %}{{ '\\n' + t | tojson }}{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}"
    "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}{% elif m.role == 'assistant' %}"
    "{% set content = m.content %}{% set thought = '' %}{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1] %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\\n' }}"
)
_QWEN_TOOL = (
    "{{ '<|im_end|>\\n' }}{% elif m.role == 'tool' %}{% if loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% endif %}{% endfor %}" + _GENERATE + "{{ '<|im_start|>assistant\\n' }}"
)
QWEN3 = (
    _QWEN_HEAD
    + "{% if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}{% else %}{{ content }}{% endif %}"
    "{% for c in m.tool_calls %}" + _CALL + "{% if not loop.first or content %}{{ '\\n' }}{% endif %}"
    "{{ '<tool_call>\\n{\"name\": \"' + f.name + '\", \"arguments\": ' + f.arguments | tojson + '}\\n</tool_call>' }}{% endfor %}"
    + _QWEN_TOOL
    + "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
QWEN35 = (
    _QWEN_HEAD
    + "{% if loop.index0 > ns.last %}{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}{{ content.lstrip('\\n') }}"
    "{% for c in m.tool_calls %}" + _CALL + "{{ '<tool_call>\\n<function=' + f.name + '>' }}"
    "{% for k, v in f.arguments.items() %}{{ '\\n<parameter=' + k + '>\\n' + v + '\\n</parameter>' }}{% endfor %}{{ '\\n</function>\\n</tool_call>' }}{% endfor %}"
    + _QWEN_TOOL
    + "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% else %}{{ '<think>\\n' }}{% endif %}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\\n\\n' %}{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (s if loop.first else '') + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    + _GENERATE
    + "{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set messages = messages[1:] %}{% endif %}{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{% if tools and m == users[-1] %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{% if loop.last and s is defined %}{{ '[INST] ' + s + '\\n\\n' + m.content + '[/INST]' }}{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}"
    + _CALL
    + "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    "{{ '{\"name\": \"' + f.name + '\", \"arguments\": ' + f.arguments | tojson + ', \"id\": \"' + c.id + '\"}' + (', ' if not loop.last else ']' + eos_token) }}{% endfor %}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] {\"content\": ' + m.content + ', \"call_id\": \"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"
)
_DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' and m.tool_calls %}{{ '<｜Assistant｜><｜tool▁calls▁begin｜>' }}{% for c in m.tool_calls %}{{ '<｜tool▁call▁begin｜>' + c.type + '<｜tool▁sep｜>' + c.function.name + '\\n```json\\n' + c.function.arguments + '\\n```<｜tool▁call▁end｜>' }}{% endfor %}"
    "{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}{% elif m.role == 'assistant' %}{{ ('' if loop.previtem.role == 'tool' else '<｜Assistant｜>') + CONTENT + '<｜end▁of▁sentence｜>' }}"
    "{% elif m.role == 'tool' %}{{ '<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜><｜tool▁outputs▁end｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<｜Assistant｜>OPEN' }}{% endif %}"
)
DEEPSEEK_V3 = _DEEPSEEK.replace("CONTENT", "m.content").replace("OPEN", "")
DEEPSEEK_R1 = _DEEPSEEK.replace("CONTENT", "m.content.split('</think>')[-1]").replace("OPEN", "<think>\\n")
GPT_OSS = (
    "{{ '<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\\nCurrent date: ' + strftime_now('%Y-%m-%d') + '\\n\\nReasoning: ' + (reasoning_effort or 'medium') + '\\n\\n# Valid channels: analysis, commentary, final.<|end|>' }}"
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
    "{% if s or tools %}{{ '<|start|>developer<|message|>' }}{% if s %}{{ '# Instructions\\n\\n' + s }}{% endif %}{% if tools %}{{ '# Tools\\n\\nnamespace functions {\\n' }}"
    "{% for t in tools %}{{ '// ' + t.function.description + '\\ntype ' + t.function.name + ' = (_: {' }}{% for k, v in t.function.parameters.properties.items() %}{{ '\\n' + k + ': ' + v.type + ',' }}{% endfor %}{{ '}) => any;\\n' }}{% endfor %}"
    "{{ '}' }}{% endif %}{{ '<|end|>' }}{% endif %}"
    "{% set ns = namespace(name='') %}{% for m in messages %}{% if m.tool_calls %}{% set later = messages[loop.index0 + 1:] | selectattr('role', 'equalto', 'assistant') | rejectattr('tool_calls', 'defined') | list %}"
    "{% if m.thinking and not later %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}{% set c = m.tool_calls[0] %}"
    "{% set ns.name = c.function.name %}{{ '<|start|>assistant to=functions.' + c.function.name + '<|channel|>commentary json<|message|>' + c.function.arguments | tojson + '<|call|>' }}"
    "{% elif m.role == 'assistant' and loop.last and not add_generation_prompt %}{% if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{% elif m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|start|>functions.' + ns.name + ' to=assistant<|channel|>commentary<|message|>' + m.content | tojson + '<|end|>' }}"
    "{% else %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    + _GENERATE
    + "{{ '<|start|>assistant' }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    + _GENERATE
    + "{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
GRANITE = (
    "{% set s = messages[0].content if messages[0].role == 'system' else 'Knowledge Cutoff Date: April 2024.' %}"
    "{{ '<|start_of_role|>system<|end_of_role|>' + s + '<|end_of_text|>\\n' }}{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}"
    "{% if tools %}{{ '<|start_of_role|>available_tools<|end_of_role|>' + tools | tojson(indent=4) + '<|end_of_text|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content }}{% if m.tool_calls %}{{ '<|tool_call|>[' }}{% for c in m.tool_calls %}"
    + _CALL
    + "{{ '{\"name\": \"' + f.name + '\", \"arguments\": ' + f.arguments | tojson + '}' + (', ' if not loop.last else '') }}{% endfor %}{{ ']' }}{% endif %}{{ '<|end_of_text|>\\n' }}{% endfor %}"
    + _GENERATE
    + "{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
SMOLLM3 = (
    "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}{% set s = messages[0].content if messages[0].role == 'system' else 'You are a helpful AI assistant named SmolLM.' %}"
    "{{ '<|im_start|>system\\n## Metadata\\n\\nReasoning Mode: ' + ('/think' if enable_thinking else '/no_think') + '\\n\\n## Custom Instructions\\n\\n' + s + '\\n\\n' }}"
    "{% if xml_tools is defined %}{{ xml_tools | tojson }}{% endif %}{{ '<|im_end|>\\n' }}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' + ('' if enable_thinking else '<think>\\n\\n</think>\\n') + m.content.lstrip('\\n') + '<|im_end|>\\n' }}"
    "{% elif m.role != 'system' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    + _GENERATE
    + "{{ '<|im_start|>assistant\\n' + ('' if enable_thinking else '<think>\\n\\n</think>\\n') }}{% endif %}"
)
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
# Its answers end with what starts the next turn.
GLM = (
    "{{ '[gMASK]<sop>' }}{% if tools %}{{ '<|system|>\\n# Tools\\n<tools>\\n' }}{% for t in tools %}{{ t | tojson + '\\n' }}{% endfor %}{{ '</tools>' }}{% endif %}"
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content %}{% set thought = '' %}{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1] %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|assistant|>\\n<think>' + (thought | trim if loop.index0 > ns.last else '') + '</think>' }}{% if content.strip() %}{{ '\\n' + content.strip() }}{% endif %}"
    "{% for c in m.tool_calls %}"
    + _CALL
    + "{{ '\\n<tool_call>' + f.name + '\\n' }}{% for k, v in f.arguments.items() %}{{ '<arg_key>' + k + '</arg_key>\\n<arg_value>' + v + '</arg_value>\\n' }}{% endfor %}{{ '</tool_call>' }}{% endfor %}"
    "{% elif m.role == 'tool' %}{{ '<|observation|>\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}{% else %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endif %}{% endfor %}"
    + _GENERATE
    + "{{ '<|assistant|>' }}{% if enable_thinking is defined and not enable_thinking %}{{ '\\n<think></think>' }}{% endif %}{% endif %}"
)
# Its generation prompt has an empty block that no rendered answer has.
GEMMA4 = (
    "{{ bos_token }}{% if enable_thinking is defined and enable_thinking or tools or messages[0].role == 'system' %}{{ '<|turn>system\\n' }}{% if enable_thinking is defined and enable_thinking %}{{ '<|think|>' }}{% endif %}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}{% for t in tools or [] %}{{ '<|tool>declaration:' + t.function.name + '{description:' + t.function.description + ',parameters:' + t.function.parameters.properties.keys() | join(',') + '}<tool|>' }}{% endfor %}{{ '<turn|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}{% for c in m.tool_calls %}"
    + _CALL
    + "{{ '<|tool_call>call:' + f.name + '{' }}{% for k, v in f.arguments | dictsort %}{{ k + ':<|\"|>' + v + '<|\"|>' }}{% endfor %}{{ '}<tool_call|>' }}{% endfor %}"
    "{{ m.content | trim + '<turn|>\\n' }}{% endfor %}"
    + _GENERATE
    + "{{ '<|turn>model\\n' }}{% if not enable_thinking | default(false) %}{{ '<|channel>thought\\n<channel|>' }}{% endif %}{% endif %}"
)

_IM = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
_DS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
PUBLIC = {
    "llama3": Public(
        LLAMA3,
        ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        "<|eot_id|>",
        call=lambda name, arguments: _json(name, arguments, "parameters"),
    ),
    "qwen3": Public(
        QWEN3,
        _IM,
        "<|im_end|>",
        thought=_think,
        call=lambda name, arguments: f"<tool_call>\n{_json(name, arguments)}\n</tool_call>",
        block="<think>\n\n</think>\n\n",
    ),
    # Its generation prompt opens the block.
    "qwen3.5": Public(
        QWEN35,
        _IM,
        "<|im_end|>",
        thought=lambda text: f"{text}\n</think>\n\n",
        inline=lambda text: f"{text}\n</think>\n\n",
        call=lambda name, arguments: (
            f"<tool_call>\n<function={name}>\n"
            + "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
            + "</function>\n</tool_call>"
        ),
        block="\n</think>\n\n",
    ),
    "gemma3": Public(
        GEMMA3,
        ("<bos>", "<end_of_turn>", "<start_of_turn>"),
        "<end_of_turn>",
        takes_tools=False,
        refused={"tool in the middle, no tools": "rejects this conversation: Conversation roles must alternate"},
    ),
    "mistral": Public(
        MISTRAL,
        ("<s>", "</s>"),
        "</s>",
        before=" ",
        call=lambda name, arguments: f'[TOOL_CALLS] [{_json(name, arguments)[:-1]}, "id": "call12345"}}]',
    ),
    "deepseek v3": Public(
        DEEPSEEK_V3,
        _DS,
        "<｜end▁of▁sentence｜>",
        takes_tools=False,
        call=lambda name, arguments: (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"
            f"{name}\n```json\n{json.dumps(arguments)}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        ),
    ),
    # Its generation prompt opens a thought, but behind a tool's result, and it then renders none.
    "deepseek r1": Public(
        DEEPSEEK_R1,
        _DS,
        "<｜end▁of▁sentence｜>",
        call=lambda name, arguments: "<｜tool▁calls▁begin｜>",
        partly=("tool in the middle, no tools",),
        takes_tools=False,
        refused={
            "reasoning": "has reasoning_content, but the chat template does not render it; use data.reasoning: drop",
            "inline reasoning": r"drops the reasoning of an answer \(<think> in its content\): 'hmm'; use data.reasoning",
        }
        | dict.fromkeys(
            ("one turn", "several turns", "system"),
            r"changes the text before an answer: '<think>\\n' becomes",
        ),
    ),
    "gpt-oss": Public(
        GPT_OSS,
        ("<|startoftext|>", "<|return|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"),
        "<|return|>",
        stops=("<|return|>", "<|call|>"),
        before="<|channel|>final<|message|>",
        thought=lambda text: f"<|channel|>analysis<|message|>{text}<|end|><|start|>assistant",
        call=lambda name, arguments: (
            f" to=functions.{name}<|channel|>commentary json<|message|>{json.dumps(arguments)}"
        ),
    ),
    "phi4": Public(
        PHI4, ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|im_sep|>"), "<|im_end|>", takes_tools=False
    ),
    "granite": Public(
        GRANITE,
        ("<|endoftext|>", "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        "<|end_of_text|>",
        call=lambda name, arguments: f"<|tool_call|>[{_json(name, arguments)}]",
    ),
    "smollm3": Public(SMOLLM3, _IM, "<|im_end|>", thought=_think, takes_tools=False),
    "glm": Public(
        GLM,
        ("[gMASK]", "<|endoftext|>", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        "<|user|>",
        stops=("<|endoftext|>", "<|user|>", "<|observation|>"),
        thought=lambda text: f"\n<think>{text}</think>\n",
        inline=lambda text: f"\n<think>{text}</think>\n",
        call=lambda name, arguments: (
            f"<tool_call>{name}\n"
            + "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in arguments.items())
            + "</tool_call>"
        ),
        block="\n<think></think>\n",
    ),
    "gemma4": Public(
        GEMMA4,
        ("<bos>", "<turn|>", "<|turn>"),
        "<turn|>",
        call=lambda name, arguments: (
            f"<|tool_call>call:{name}{{"
            + ",".join(f'{key}:<|"|>{value}<|"|>' for key, value in arguments.items())
            + "}<tool_call|>"
        ),
    ),
    "chatml": Public(CHATML, _IM, "<|im_end|>", takes_tools=False),
}
