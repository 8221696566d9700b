"""The SHA-256 of a base's files, by which a run knows its base again; a file is read once until it changes."""

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.files import cache_folder, digest_of, fingerprint, read_json, write_json
from llmtune.model.base import Base
from llmtune.model.files.stored import INDEX, SINGLE, weight_files
from llmtune.working import working

TOKENIZER = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
"""The small files that decide what a base reads and when it stops."""
COPIED = (*TOKENIZER, "*processor_config.json", "LICENSE*", "NOTICE*")
"""The files that go with a base's weights, or with weights that were made from them."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HASHING = threading.Lock()

Files = dict[str, dict[str, Any]]
"""Size and SHA-256 of files by their names in the base's folder."""
Memo = dict[str, tuple[list[int], dict[str, Any]]]
"""What was read before: a file's stamp then, and its fingerprint."""


def base_files(folder: Path) -> list[Path]:
    """The files that decide what a base is: weights, configuration, tokenizer and template.

    Weights beside those that transformers loads, such as consolidated.safetensors, are none of them.
    """
    files = named_like(folder, ("config.json", SINGLE, *TOKENIZER))
    if not (folder / SINGLE).is_file() and (folder / INDEX).is_file():
        files |= {folder / INDEX, *(file for file in weight_files(folder, str(folder)) if os.path.lexists(file))}
    return sorted(files)


def named_like(folder: Path, patterns: Sequence[str]) -> set[Path]:
    """What is in a folder under names like these, links to nowhere too."""
    wild = {file for pattern in patterns if "*" in pattern for file in folder.glob(pattern)}
    return wild | {folder / name for name in patterns if "*" not in name and os.path.lexists(folder / name)}


def leads_outside(file: Path, folder: Path) -> bool:
    """Whether a file of a base's folder is a link to a file elsewhere, which may be private.

    The Hub's cache links to the blobs beside its folder.
    """
    roots = (folder, folder.parent.parent / "blobs")
    return not any(file.resolve().is_relative_to(root.resolve()) for root in roots)


def fingerprint_base(base: Base) -> Files:
    """Size and SHA-256 of the base's files; of a converted base, of its weights alone.

    A file of the Hub's cache is named by its hash. Any other is read again only where size, times or inode changed.
    """
    with working(f"hashing {base.name}, once"):
        _HASHING.acquire()
    try:
        return _fingerprints(base, working)
    finally:
        _HASHING.release()


def hash_beside(base: Base) -> None:
    """Begin to hash what is not known of a base's files, in a thread: who asks for the fingerprints waits for it."""

    def hash_all() -> None:
        # Whoever asks gets the error.
        with contextlib.suppress(Exception), _HASHING:
            _fingerprints(base, _silently)

    threading.Thread(target=hash_all, name="hashing", daemon=True).start()


@contextlib.contextmanager
def _silently(name: str, total: float, unit: str) -> Iterator[Callable[[int], None]]:
    """Show nothing of what a thread does."""
    yield lambda size: None


def _fingerprints(base: Base, shown: Callable[..., AbstractContextManager[Callable[..., None]]]) -> Files:
    files = base_files(base.folder)
    if base.converted:  # each version of transformers writes the small files in another way
        files = [file for file in files if file.suffix == ".safetensors"]
    memo_file = cache_folder() / "fingerprints" / f"{digest_of(str(base.folder.resolve()))[:32]}.json"
    memo = _read_memo(memo_file)
    stamps = {file.relative_to(base.folder).as_posix(): stamp(file) for file in files}
    known = {name: facts for name, (stamp, facts) in memo.items() if stamps.get(name) == stamp}
    known |= {name: facts for name in stamps if (facts := _by_hub(base.folder / name))}
    new = [name for name in stamps if name not in known]
    with shown(f"hashing {base.name}, once", sum(stamps[name][0] for name in new), "bytes") as step:
        for name in new:
            known[name] = fingerprint(base.folder / name)
            step(stamps[name][0])
    hashed = {name: known[name] for name in stamps}
    _write_memo(memo_file, memo, {name: (stamps[name], facts) for name, facts in hashed.items()})
    return hashed


def weights_digest(base: Base) -> str:
    """One SHA-256 for the weights and the configuration of a base."""
    files = fingerprint_base(base)
    return digest_of({name: facts["sha256"] for name, facts in files.items() if not _is_small(name)})


def _is_small(name: str) -> bool:
    return not name.endswith(".safetensors") and name != "config.json"


def describe_base(base: Base) -> dict[str, Any]:
    """What a run records of its base: its name, and the fingerprints of its files."""
    return {"name": base.name, "revision": base.revision, "files": fingerprint_base(base)}


def refuse_other_base(recorded: dict[str, Any] | None, base: Base, where: Path, error: type[LlmtuneError]) -> None:
    """Raise `error` where the base is not the one that the run in `where` recorded; one without a record is taken."""
    if not recorded:
        return
    before, now = recorded["files"], fingerprint_base(base)
    if (recorded["name"], recorded["revision"]) != (base.name, base.revision):
        at = f" at revision {recorded['revision']}" if recorded["revision"] else ""
        to = f" at revision {base.revision}" if base.revision else ""
        raise error(f"{where}: was made with the base {recorded['name']}{at}, and not with {base.name}{to}")
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            change = "changed" if name in before and name in now else "is missing" if name in before else "is new"
            raise error(
                f"{base.folder / name}: {change} since the run {where} was made; "
                "put the base back as it was, or start a new run with --out"
            )


def stamp(file: Path) -> list[int]:
    """What changes when a file's content does."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _by_hub(file: Path) -> dict[str, Any] | None:
    """The fingerprint of a large file in the Hub's cache, which is a link to a file named by its SHA-256."""
    target = file.resolve()
    if file.is_symlink() and target.parent.name == "blobs" and _SHA256.fullmatch(target.name):
        return {"bytes": target.stat().st_size, "sha256": target.name}
    return None


def _read_memo(file: Path) -> Memo:
    try:
        memo = read_json(file)
        return {str(name): (list(entry["stamp"]), dict(entry["facts"])) for name, entry in memo.items()}
    except (LlmtuneError, KeyError, TypeError, AttributeError, ValueError):
        return {}


def _write_memo(file: Path, memo: Memo, hashed: Memo) -> None:
    """Keep the fingerprints for the next time; where the cache cannot be written, that costs only time."""
    if hashed != memo:
        with contextlib.suppress(OSError):
            write_json(file, {name: {"stamp": stamp, "facts": facts} for name, (stamp, facts) in hashed.items()})
