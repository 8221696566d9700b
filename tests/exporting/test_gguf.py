"""GGUF: the file is the merged model to another reader, or nothing is exported."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GgufConfig
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from llmtune.errors import MachineError, ProofError
from llmtune.exporting import step
from llmtune.exporting.gguf import architecture, converter, form, llama_cpp, types, write
from llmtune.exporting.gguf.vocabulary import Vocabulary, find_pre
from llmtune.exporting.rows import Prompts
from llmtune.model.base import Base
from llmtune.model.files.converted import Converted
from llmtune.run import Run
from tests.exporting.conftest import FULL, MakeMerged, give_merges
from tests.support import runs, tiny

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "bf16", {}),
    "llama-3.1": ("llama", "f16", {"rope_parameters": LLAMA3, "tied": False}),
    "mistral": ("mistral", "f32", {"sliding_window": None}),
    "qwen2": ("qwen2", "q8_0", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", "q4_0", {"head_dim": 16}),
}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def gguf_of(run: Run) -> Path:
    """The GGUF file of a run."""
    return next(run.exported.rglob("*.gguf"))


def nothing_exported(run: Run) -> bool:
    """Whether neither the folder nor the manifest has an export."""
    files = [file for file in run.exported.rglob("*") if file.is_file()] if run.exported.exists() else []
    return not files and "export" not in run.manifest()["steps"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("mistral", "qwen3") else ()) for name in KINDS]
)
def test_file_is_the_merged_model_to_transformers(merged: MakeMerged, name: str) -> None:
    kind, quantized, more = KINDS[name]
    run = merged(kind, **more)
    facts = step.export(run, f"gguf:{quantized}")
    pre = "qwen2" if name == "qwen2" else "gpt-2"  # whose class splits text by itself
    assert (facts["rows"], facts["stops"], facts["pre"]) == (20, ["<|im_end|>"], pre)
    assert facts["gap"] <= facts["bound"]
    assert facts["gap_read"] < 1e-6
    if not quantized.startswith("q"):
        assert facts["equal"] == 20
        assert facts["gap"] < 1e-6
    file = gguf_of(run)
    options = {"head_dim": 16} if name == "qwen3" else {"rope_parameters": LLAMA3} if name == "llama-3.1" else {}
    read = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        **options,
    )
    live = AutoModelForCausalLM.from_pretrained(run.merged, dtype=torch.float32)
    ids = torch.arange(100, 160)[None]
    with torch.inference_mode():
        gap = float((read(ids).logits - live(ids).logits).abs().max())
    assert gap <= facts["bound"] + 1e-5
    assert run.verify("export").keys() == set(facts["files"])
    factors = [one.data.tolist() for one in GGUFReader(file).tensors if one.name == "rope_freqs.weight"]
    assert len(factors) == (name == "llama-3.1")
    assert not factors or factors[0][::3] == pytest.approx([1, 8])


def test_file_holds_vocabulary_template_and_stop_tokens(exported: Run) -> None:
    facts = exported.manifest()["steps"]["export"]["forms"]["gguf:q8_0"]
    assert facts["stops"] == ["<|im_start|>", "<|im_end|>", "%"]
    assert facts["files"] == ["exported/gguf/Orders-Q8_0.gguf"]
    fields = {name: field.contents() for name, field in GGUFReader(gguf_of(exported)).fields.items() if "." in name}
    ids = [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom", "padding")]
    assert (ids, fields["tokenizer.ggml.add_bos_token"]) == ([2, 1, 7, 0], False)
    assert fields["tokenizer.ggml.tokens"][-3:] == ["pl", "12", "[PAD261]"]
    assert fields["tokenizer.ggml.merges"] == ["p l", "1 2"]
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert fields["tokenizer.ggml.token_type"][-1] == 5
    assert fields["tokenizer.chat_template"] == (exported.merged / "chat_template.jinja").read_text()


def test_text_is_split_as_training_split_it_where_transformers_does_not_know_the_name(merged: MakeMerged) -> None:
    run = merged()
    for folder in (run.merged, Path(run.recipe().model.base)):
        give_merges(folder, DIGITS)
    run.mark("merge", [run.merged])
    assert step.export(run, "gguf:q8_0")["pre"] == "smollm"
    give_merges(Path(run.recipe().model.base))


def test_weights_in_another_order_are_refused_with_both_answers(
    merged: MakeMerged, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = merged()
    monkeypatch.setattr(write, "row_order", lambda *_: None)
    gap = r"the largest gap of its logits to those of its weights in q4_0 is .* \(bound 0\.0001\)"
    answers = r"its answers differ on \d+ of 20 rows: row \d+ has '.+', and the merged model answers '.+'"
    with pytest.raises(ProofError, match=f"{gap}, and {answers}; nothing was exported"):
        step.export(run, "gguf:q4_0")
    assert nothing_exported(run)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("ends", {"eos": 1}, "does not stop at '<|im_end|>', where the tuned model ends its answers"),
        ("pre", "qwen2", "its tokenizer reads '.*' as .*, not as"),
        ("size", 261, "has 261 tokens, and the tuned model has 262"),
    ],
)
def test_tokens_that_differ_are_refused(
    merged: MakeMerged, monkeypatch: pytest.MonkeyPatch, part: str, value: Any, message: str
) -> None:
    run = merged()
    add = Vocabulary.add

    def add_another(own: Vocabulary, writer: Any) -> None:
        changed = Vocabulary(own.folder, own.tokenizer, own.stop, own.size, own.pre)
        vars(changed)[part] = value
        add(changed, writer)

    monkeypatch.setattr(Vocabulary, "add", add_another)
    with pytest.raises(ProofError, match=message.replace("|", r"\|")):
        step.export(run, "gguf")
    assert nothing_exported(run)


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("gemma2", {}, r"the gguf package alone writes llama, mistral, qwen2, qwen3, not gemma2; llama\.cpp's own"),
        ("mistral", {"sliding_window": 64}, "this mistral has a window of 64 tokens"),
        ("llama", {"rope_parameters": YARN}, "this llama has rotary positions of kind yarn"),
        ("llama", {"hidden_act": "gelu"}, "this llama has the activation gelu"),
    ],
)
def test_refuses_an_architecture_by_name(kind: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(MachineError, match=f"{message}.*--llama-cpp"):
        architecture.architecture_name(tiny.config(kind, **more))


def test_refuses_a_tokenizer_before_anything_is_merged(tmp_path: Path) -> None:
    run = runs.trained(tmp_path)
    with pytest.raises(MachineError, match="base: the gguf package alone writes tokenizers of bytes with merges"):
        step.export(run, "gguf")
    assert nothing_exported(run)
    assert not run.merged.exists()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "gpt-2"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, {**BYTES, "use_regex": True}]}}, "smollm"),
        ({"pattern": "qwen2", "normalizer": {"type": "NFC"}}, "qwen2"),
        ({"pattern": "llama-bpe", "ignore_merges": True}, "llama-bpe"),
        ({"pattern": "llama-bpe"}, None),
        ({"pre_tokenizer": {**BYTES, "use_regex": False}}, None),
        ({"pre_tokenizer": {**BYTES, "use_regex": True, "add_prefix_space": True}}, None),
        ({"normalizer": {"type": "Lowercase"}}, None),
        ({"byte_fallback": True}, None),
        ({"merges": []}, None),
    ],
)
def test_names_how_a_tokenizer_splits_text_or_refuses_it(changes: dict[str, Any], name: str | None) -> None:
    content: dict[str, Any] = {
        "model": {"type": "BPE", "merges": ["a b"]},
        "pre_tokenizer": {**BYTES, "use_regex": True},
    }
    for key, value in changes.items():
        if key == "pattern":
            pattern = {"Regex": GGUF_PRE_TOKENIZER_SPLITS[value]}
            steps = [{**SPLIT, "pattern": pattern}, {**BYTES, "use_regex": False}]
            content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        elif key in ("ignore_merges", "byte_fallback", "merges"):
            content["model"][key] = value
        else:
            content[key] = value
    tokenizer: Any = SimpleNamespace(backend_tokenizer=SimpleNamespace(to_str=lambda: json.dumps(content)))
    if name is None:
        with pytest.raises(MachineError, match=r"the base: .*llama\.cpp's own converter may"):
            find_pre(tokenizer, "the base")
    else:
        assert find_pre(tokenizer, "the base") == name


def test_takes_the_way_to_split_text_from_the_file_that_a_base_came_from(exported: Run, tmp_path: Path) -> None:
    file = gguf_of(exported)
    assert form._pre(Base(tmp_path, str(file), None, None, Converted(file.name, "", {}))) == "gpt-2"


def test_refuses_a_disk_that_is_too_small_before_it_writes(merged: MakeMerged, monkeypatch: pytest.MonkeyPatch) -> None:
    run = merged()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(MachineError, match=r"exporting needs .* kB of disk, but only 1\.0 kB is free"):
        step.export(run, "gguf:q8_0")
    assert nothing_exported(run)


def test_refuses_a_number_that_f16_cannot_hold(merged: MakeMerged) -> None:
    run = merged()
    weights = load_file(run.merged / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, run.merged / "model.safetensors", {"format": "pt"})
    run.mark("merge", [run.merged])
    with pytest.raises(ProofError, match=r"up_proj\.weight holds 9.98e\+04, which f16 cannot; export gguf:bf16"):
        step.export(run, "gguf:f16")
    assert nothing_exported(run)


def test_refuses_an_adapter_that_cannot_be_merged(tmp_path: Path) -> None:
    adapter = {"kind": "bottleneck", "size": 4, "form": "sequential"}
    run = runs.trained(tmp_path, {**FULL, "adapter": adapter}, merge={"enabled": False})
    with pytest.raises(ProofError, match="a sequential bottleneck cannot be merged"):
        step.export(run, "gguf")
    assert nothing_exported(run)


@pytest.mark.parametrize("kind", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "f16", "bf16", "f32"])
def test_each_type_rounds_by_no_more_than_its_step(kind: str) -> None:
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    error = np.abs(types.rounded(values, kind) - values).reshape(4, 2, 32)
    blocks = np.abs(values).reshape(4, 2, 32).max(-1, keepdims=True)
    steps = {
        "q8_0": 1 / 254,
        "q5_1": 1 / 31,
        "q5_0": 1 / 16,
        "q4_1": 1 / 15,
        "q4_0": 1 / 8,
        "f16": 2**-11,
        "bf16": 2**-8,
    }
    assert (error <= blocks * steps.get(kind, 0) * 1.01).all()
    assert types.stored(values, kind).nbytes == types.stored_bytes(kind, [4, 64])
    assert types.type_of(kind, [64]).name == "F32"
    assert types.type_of(kind, [4, 20]).name == ("BF16" if kind.startswith("q") else kind.upper())


CONVERTER = """
import shutil, sys
words = sys.argv[1:]
if words[words.index("--outtype") + 1] == "f32":
    sys.exit("Model Tiny is not supported")
shutil.copyfile({file!r}, words[words.index("--outfile") + 1])
"""


def test_llama_cpps_converter_writes_and_the_proof_stays(
    exported: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(Path(shutil.copytree(exported.path, tmp_path / "run")))
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "llama.cpp"))
    with pytest.raises(MachineError, match=r"llama\.cpp: holds no convert_hf_to_gguf\.py; get it with: git clone"):
        step.export(run, "gguf:q8_0")
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / converter.SCRIPT).write_text(CONVERTER.format(file=str(gguf_of(exported))))
    facts = step.export(run, "gguf:q8_0")
    assert (facts["written_by"], facts["rows"]) == ("llama.cpp's converter", 20)
    with pytest.raises(MachineError, match=r"converter cannot write this model: Model Tiny is not supported"):
        step.export(run, "gguf:f32")
    with pytest.raises(MachineError, match="converter writes bf16, f16, f32, q8_0, not q4_0"):
        step.export(run, "gguf:q4_0")


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for llama-cpp-python: it answers every prompt with its last two tokens, and reads text as `ids`."""
    answers: dict[str, Any] = {"file": None, "ids": [3, 4]}

    def load(file: str, **_: Any) -> Any:
        answers["file"] = file
        return SimpleNamespace(
            tokenize=lambda text, **_: answers["ids"], generate=lambda prompt, **_: iter([*prompt[-2:], 9, 9])
        )

    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=load, __version__="0.3"))
    return answers


@pytest.mark.parametrize(
    ("ids", "merged", "message"),
    [
        ([3, 4], [[7, 2], [6, 2], [5, 2], [1, 5]], None),
        (
            [3, 4],
            [[7, 3], [6, 3], [5, 3], [2, 5]],
            r"llama\.cpp answers 4 of 4 rows otherwise .* row 1 has '7 2', and .* '7 3'",
        ),
        ([3], [], r"llama\.cpp reads 'a text' as \[3\], not as \[3, 4\]"),
    ],
)
def test_llama_cpp_answers_the_rows_where_it_is_installed(
    llama: dict[str, Any], ids: list[int], merged: list[list[int]], message: str | None
) -> None:
    llama["ids"] = ids
    tokenizer: Any = Mock(return_value=SimpleNamespace(input_ids=[3, 4]))
    tokenizer.decode = lambda ids: " ".join(map(str, ids))
    prompts = Prompts([[1, 7, 2], [1, 6, 2], [1, 5, 2], [1, 1, 6]][: len(merged)], 2, {2})
    if message is None:
        facts = llama_cpp.compare(Path("a.gguf"), tokenizer, ["a text"], prompts, merged)
        assert facts == {"version": "0.3", "equal": 3}
    else:
        with pytest.raises(ProofError, match=message):
            llama_cpp.compare(Path("a.gguf"), tokenizer, ["a text"], prompts, merged)
    assert llama["file"] == "a.gguf"
