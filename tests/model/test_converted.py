"""A .gguf file is converted once, by one process, and what it stores quantized is recorded and said."""

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors import SafetensorError
from transformers import PreTrainedModel

from llmtune import recipe
from llmtune.cli.init import write_recipe
from llmtune.errors import LlmtuneError, MachineError, RecipeError
from llmtune.files import read_json
from llmtune.launch.faults import told_in_one_line
from llmtune.model.base import Base
from llmtune.model.files import converted
from llmtune.model.files.converted import Converted
from llmtune.model.files.locate import locate_base
from llmtune.recipe.sections import Model
from llmtune.training.prepare import plan_alone
from tests.support import tiny

TYPES = {"Q4_1": 2, "F32": 1}


def write_gguf(file: Path, quantized: int = 2) -> Path:
    """A .gguf file with tensors in 4 bits, two by default, and one in fp32; of no model."""
    writer = GGUFWriter(file, "llama")
    for index in range(quantized):
        values = numpy.ones((4, 32), dtype=numpy.float32) * index
        content = quants.quantize(values, GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"blk.{index}.weight", content, raw_dtype=GGMLQuantizationType.Q4_1)
    writer.add_tensor("norm.weight", numpy.ones(4, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


class Converter:
    """Stands in for transformers' conversion of a .gguf file: tiny models, one for each file that is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: list[str] = []
        self.before_return: Callable[[], None] = lambda: None
        monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", self.model)
        monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: tiny.tokenizer())

    def model(self, folder: Path, gguf_file: str, **options: object) -> PreTrainedModel:
        """A model in place of the file's."""
        self.files.append(gguf_file)
        self.before_return()
        return tiny.model(blocks=2)


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Converter:
    """A .gguf file, model.gguf, a cache of this test's own, and what converts one into the other."""
    write_gguf(tmp_path / "model.gguf")
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    return Converter(monkeypatch)


def locate(tmp_path: Path) -> Base:
    """The base of model.gguf."""
    return locate_base(Model(base=str(tmp_path / "model.gguf")))


def test_converts_a_gguf_file_once_and_records_its_types(tmp_path: Path, converter: Converter) -> None:
    first, second = locate(tmp_path), locate(tmp_path)
    assert first == second
    assert converter.files == ["model.gguf"]
    digest = hashlib.sha256((tmp_path / "model.gguf").read_bytes()).hexdigest()
    assert first.revision == digest
    assert first.converted == Converted("model.gguf", digest, TYPES)
    assert first.converted.words == "converted to bf16 from model.gguf, which stores 2 of its 3 tensors in Q4_1"
    names = {"config.json", "model.safetensors", "tokenizer.json", "converted.json"}
    assert names <= {file.name for file in first.folder.iterdir()}


def test_describes_a_folder_that_an_older_version_converted(tmp_path: Path, converter: Converter) -> None:
    folder = locate(tmp_path).folder
    (folder / "converted.json").unlink()
    again = locate(tmp_path)
    assert again.converted is not None
    assert again.converted.types == TYPES
    assert read_json(folder / "converted.json")["types"] == TYPES
    assert converter.files == ["model.gguf"]


def test_failed_conversion_leaves_nothing(tmp_path: Path, converter: Converter) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    converter.before_return = interrupt
    with pytest.raises(KeyboardInterrupt):
        locate(tmp_path)
    assert not list((tmp_path / "cache" / "gguf").iterdir())
    converter.before_return = lambda: None
    assert (locate(tmp_path).folder / "model.safetensors").is_file()


def test_removes_what_killed_conversions_left(tmp_path: Path, converter: Converter) -> None:
    digest = hashlib.sha256((tmp_path / "model.gguf").read_bytes()).hexdigest()[:16]
    for name in (f"{digest}.partial-{os.getpid()}", f".{digest}.partial-{os.getpid()}", f".{digest}.partial-ab12"):
        (tmp_path / "cache" / "gguf" / name / "sub").mkdir(parents=True)
    folder = locate(tmp_path).folder
    assert [entry.name for entry in folder.parent.iterdir()] == [digest]


def test_converted_bases_used_least_recently_leave_the_cache_but_none_that_is_in_use(
    tmp_path: Path, converter: Converter, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_use, cache = locate(tmp_path).folder, tmp_path / "cache" / "gguf"
    size = sum(file.stat().st_size for file in in_use.iterdir())
    for age, name in ((10, "used"), (20, "oldest"), (30, ".killed.partial-removed")):
        (cache / name).mkdir()
        (cache / name / "weights").write_bytes(b"x" * size)
        os.utime(cache / name, (1e9 - age,) * 2)
    os.utime(in_use, (1e8,) * 2)
    monkeypatch.setattr(converted, "LIMIT", round(3.5 * size))
    write_gguf(tmp_path / "other.gguf", quantized=3)
    newest = locate_base(Model(base=str(tmp_path / "other.gguf"))).folder
    assert {folder.name for folder in cache.iterdir()} == {in_use.name, newest.name, "used"}
    assert (in_use / "model.safetensors").is_file()


def test_a_second_conversion_waits_for_the_first(tmp_path: Path, converter: Converter) -> None:
    began, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        began.set()
        assert go_on.wait(20)

    converter.before_return = wait
    bases: list[Base] = []
    threads = [threading.Thread(target=lambda: bases.append(locate(tmp_path))) for _ in range(2)]
    threads[0].start()
    assert began.wait(20)
    threads[1].start()
    threads[1].join(0.3)
    assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert converter.files == ["model.gguf"]
    assert bases[0] == bases[1]


def test_refuses_a_file_that_is_no_gguf_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    contents = {
        "version https://git-lfs.github.com/spec/v1\n": "model.gguf is a Git LFS pointer, not the file itself",
        "": "model.gguf is empty; download it again",
        "GGUF": "model.gguf cannot be read: ",
        "not a model": "model.gguf cannot be read: ",
    }
    for content, words in contents.items():
        (tmp_path / "model.gguf").write_text(content)
        with pytest.raises(RecipeError, match=words) as caught:
            locate(tmp_path)
        assert "\n" not in str(caught.value)
        assert not list((tmp_path / "cache" / "gguf").glob("*")) if (tmp_path / "cache" / "gguf").is_dir() else True


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left (os error 28)")]
)
def test_a_full_disk_is_no_mistake_in_the_recipe(
    tmp_path: Path, converter: Converter, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **named: object) -> None:
        raise error

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    with pytest.raises(MachineError, match="no space is left on the disk"), told_in_one_line(LlmtuneError):
        locate(tmp_path)
    assert not list((tmp_path / "cache" / "gguf").iterdir())


def test_a_cache_that_is_no_folder_is_no_mistake_in_the_recipe(tmp_path: Path, converter: Converter) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(MachineError, match="cache/locks: Not a directory"), told_in_one_line(LlmtuneError):
        locate(tmp_path)


def test_a_file_without_quantized_tensors_is_said_to_be_whole() -> None:
    whole = Converted("m.gguf", "0" * 64, {"F16": 3, "F32": 2})
    assert not whole.quantized
    assert whole.words == "converted to bf16 from m.gguf, which stores none quantized"


def test_plan_and_init_say_what_a_quantized_copy_is(
    tmp_path: Path, converter: Converter, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sums(8))
    settings = recipe.load(tiny.write_recipe(tmp_path / "r.yaml", tmp_path / "model.gguf", rows))
    monkeypatch.undo()
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "gguf" / hashlib.sha256((tmp_path / "model.gguf").read_bytes()).hexdigest()[:16]
    tiny.save_base(folder)
    assert plan_alone(settings, 0).notes[0] == (
        "the base is converted to bf16 from model.gguf, which stores 2 of its 3 tensors in Q4_1: "
        "a quantized copy, not its 16-bit weights"
    )
    package = tmp_path / "llm_tiny"
    package.mkdir()
    (package / "__init__.py").touch()
    (tmp_path / "model.gguf").rename(package / "model.gguf")
    monkeypatch.syspath_prepend(str(tmp_path))
    written = write_recipe(rows, "package:llm-tiny", None, tmp_path / "new.yaml")
    assert written
    assert "; this is a copy which stores 2 of its 3 tensors in Q4_1\n" in (tmp_path / "new.yaml").read_text()
