"""A part of a recipe's data is named by what its files hold now."""

import hashlib
import os
from pathlib import Path

from llmtune.data.store.read import fingerprints
from llmtune.recipe.data import Data
from tests.support import tiny


def test_file_with_the_size_and_time_of_its_earlier_content_is_read_again(tmp_path: Path) -> None:
    file = tiny.write_rows(tmp_path / "train.jsonl", tiny.sums(3))
    data, stat = Data(train=str(file)), file.stat()
    before = fingerprints(data, "train")
    file.write_bytes(file.read_bytes().replace(b"plus", b"less"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert before != fingerprints(data, "train") == {str(file): {"bytes": stat.st_size, "sha256": digest}}
