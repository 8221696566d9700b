"""Data sources that are no ordinary files: pipes, devices, links, odd names, bombs, rows of megabytes."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

GOOD = b"".join(b'{"prompt": "%c?", "completion": "%c"}\n' % (letter, letter + 1) for letter in b"aceg")
TABLE = b"prompt,completion\na?,b\nc?,d\ne?,f\n"
_ZIPPED = gzip.compress(GOOD, mtime=0)
_MIB = 1 << 20

CONTENTS: dict[str, bytes] = {
    **{name: GOOD for name in ("UP.JSONL", "rows", "rows.json", "rows.txt", "a\nb.jsonl", "\x1b[31mred.jsonl")},
    **{name: GOOD for name in ("a:b.jsonl", " .jsonl", "-x.jsonl", "[bold]x.jsonl", "%s{0}.jsonl", ".jsonl")},
    "plain.jsonl.gz": GOOD,
    "good.jsonl.gz": _ZIPPED,
    "cut.jsonl.gz": _ZIPPED[:-6],
    "head.jsonl.gz": _ZIPPED[:12],
    "crc.jsonl.gz": _ZIPPED[:-8] + b"\0" * 8,
    "trail.jsonl.gz": _ZIPPED + b"junk",
    "two.jsonl.gz": _ZIPPED * 2,
    "none.jsonl.gz": b"",
    "middle.jsonl.gz": _ZIPPED[:20] + b"\xff" * 5 + _ZIPPED[25:],
    "zeros.jsonl.gz": _ZIPPED + b"\0" * 512,
    "bomb.jsonl.gz": gzip.compress(b" " * (300 * _MIB), 1),
    "letters.jsonl.gz": gzip.compress(b"x" * (300 * _MIB), 1),
    "answer.jsonl": GOOD + json.dumps({"prompt": "a?", "completion": "x" * 10 * _MIB}).encode(),
    "prompt.jsonl": GOOD + json.dumps({"prompt": "x" * 10 * _MIB, "completion": "b"}).encode(),
    "words.jsonl": GOOD + json.dumps({"prompt": "a?", "completion": "x " * 5 * _MIB}).encode(),
    "stops.jsonl": GOOD + json.dumps({"prompt": "a?", "completion": "<|im_end|>" * _MIB}).encode(),
    "key.jsonl": GOOD + json.dumps({"prompt": "a?", "completion": "b", "x" * 10 * _MIB: 1}).encode(),
    "id.jsonl": GOOD + json.dumps({"prompt": "a?", "completion": "b", "id": "x" * 10 * _MIB}).encode(),
    "turns.jsonl": GOOD
    + json.dumps({"messages": [{"role": role, "content": "x"} for role in ("user", "assistant") * 2000]}).encode(),
    "deep.jsonl": GOOD + b'{"prompt": "a", "completion": "b", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "deep-900.jsonl": GOOD + b'{"prompt": "a", "completion": "b", "x": ' + b"[" * 900 + b"]" * 900 + b"}\n",
    "int.jsonl": GOOD + b'{"prompt": "a", "completion": "b", "x": ' + b"9" * 5000 + b"}\n",
    "float.jsonl": GOOD + b'{"prompt": "a", "completion": "b", "x": 1e99999}\n',
    "nan.jsonl": GOOD + b'{"prompt": "a", "completion": "b", "x": NaN, "id": NaN}\n',
    "twice.jsonl": GOOD + b'{"prompt": "a", "prompt": "z", "completion": "b"}\n',
    "ids.jsonl": b'{"prompt": "a", "completion": "b", "id": 1}\n{"prompt": "c", "completion": "b", "id": 1}\n',
    **{
        f"surrogate-{key}.jsonl": GOOD + json.dumps({"prompt": "a", "completion": "b", key: "c \ud800"}).encode()
        for key in ("prompt", "completion", "id", "other")
    },
    "column.jsonl": GOOD + json.dumps({"prompt": "a", "completion": "b", "\ud800": 1}).encode(),
    "one.jsonl": GOOD.splitlines()[0],
    "empty.jsonl": b"",
    "blank.jsonl": b"\n\n \n",
    "bom.jsonl": b"\xef\xbb\xbf",
    "list.jsonl": b"[" + GOOD.replace(b"}\n{", b"},{").strip() + b"]",
    "list.json": b"[" + GOOD.replace(b"}\n{", b"},{").strip() + b"]",
    "open.json": b"[" + GOOD.replace(b"}\n{", b"},{").strip(),
    "deep.json": b"[" * 100_000 + b"]" * 100_000,
    "key.json": b'[{"prompt": "a", "prompt": "b", "completion": "c"}]',
    "digits.json": b'[{"prompt": "a", "completion": "c", "n": ' + b"9" * 5000 + b"}]",
    "bomb.json.gz": gzip.compress(b"[" + b" " * (300 * _MIB), 1),
    "one.json": b'{"prompt": "a", "completion": "b"}',
    "line.txt": b"x" * (65 * _MIB),
    "good.tsv": TABLE.replace(b",", b"\t"),
    "good.jsonl.zst": bytes(pa.compress(GOOD, codec="zstd", asbytes=True)),
    "cut.jsonl.zst": bytes(pa.compress(GOOD, codec="zstd", asbytes=True))[:-5],
    "junk.jsonl.zst": b"junk",
    "good.csv": TABLE,
    "empty.csv": b"",
    "header.csv": b"prompt,completion\n",
    "nul.csv": TABLE + b"a\0,b\n",
    "field.csv": TABLE + b"a," + b"x" * 200_000 + b"\n",
    "quote.csv": TABLE + b'"a,b\n',
    "utf16.csv": TABLE.decode().encode("utf-16"),
    "semicolon.csv": TABLE.replace(b",", b";"),
    "cr.csv": TABLE.replace(b"\n", b"\r"),
    "columns.csv": b"prompt,prompt,completion\na,b,c\nd,e,f\n",
    "bom.csv": b"\xef\xbb\xbf" + TABLE,
    "good.csv.gz": gzip.compress(TABLE, mtime=0),
    "junk.parquet": b"PAR1junkPAR1",
    "empty.parquet": b"",
    "junk.arrow": b"ARROW1\0\0junkARROW1",
}
"""Files by name."""
LINKS = {
    "loop.jsonl": "loop.jsonl",
    "gone.jsonl": "nowhere.jsonl",
    "zero.jsonl": "/dev/zero",
    "null.jsonl": "/dev/null",
    "memory.jsonl": "/proc/self/mem",
    "command.jsonl": "/proc/self/cmdline",
    "random.csv": "/dev/urandom",
    "zero.parquet": "/dev/zero",
    "zero.jsonl.gz": "/dev/zero",
}
"""Links by name, and where they lead."""
OTHERS: dict[str, Callable[[Path], object]] = {
    "pipe.jsonl": os.mkfifo,
    "pipe.csv": os.mkfifo,
    "pipe.parquet": os.mkfifo,
    "folder.jsonl": lambda path: path.mkdir(),
    "hidden.jsonl": lambda path: path.touch(0),
}
"""What is neither file nor link, by name."""
NAMES = [
    *("x" * 300 + ".jsonl", "a\0b.jsonl", ".", "..", "/", ".jsonl", "~", "~nosuchuser/x.jsonl", "/dev/stdin"),
    *("/dev/fd/0", "owner/name", "owner/name:x", "a/b:c:d", "https://x.y/z.jsonl", "s3://b/z.jsonl", "*.jsonl"),
    *("../..", "./.", "a/" + "b" * 300, "é/ü", "a/b/c", "-", " ", "\n", "x" * 100_000),
    *("hf://datasets/a/b", "file:///x.jsonl", "C:\\x.jsonl", "rows.jsonl/", "good.csv/x.jsonl"),
]
"""Sources that name no file in the folder."""
ALL = [*CONTENTS, *LINKS, *OTHERS, *NAMES]


def make(folder: Path, name: str) -> str:
    """Make what a name stands for in a folder; returns the source that a recipe would name."""
    path = folder / name
    if name in CONTENTS:
        path.write_bytes(CONTENTS[name])
    elif name in LINKS:
        path.symlink_to(LINKS[name])
    elif name in OTHERS:
        OTHERS[name](path)
    else:
        return name
    return str(path)
