"""What never leaves this machine: secrets in any file, and folders of this machine in what llmtune wrote."""

import re
from pathlib import Path
from tempfile import gettempdir

from huggingface_hub import get_token

from llmtune.errors import PublishError
from llmtune.files import home_folder
from llmtune.publishing.hub import Content

SECRETS = {
    "a Hub token": r"\bhf_[A-Za-z0-9]{16,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "an AWS key": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\b(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
_PRIVATE_PATH = re.compile(r"(?<![\w./:-])(~/|/(home|Users|root|tmp|var|mnt|media|Volumes|private)/|[A-Za-z]:\\)")

_GGUF_TEXTS = 64 << 20
"""Bytes of a .gguf file in which its settings, its vocabulary and its template end."""


def check_private(name: str, content: Content) -> None:
    """Raise PublishError if a file holds a secret or, if llmtune wrote it, names a folder of this machine."""
    text = _text(content)
    token = get_token()
    kinds = [kind for kind, pattern in SECRETS.items() if re.search(pattern, text)]
    if kinds or (token and token in text):
        raise PublishError(
            f"{name} contains what looks like {(kinds or ['your Hub token'])[0]}; remove it, then publish"
        )
    if isinstance(content, bytes):
        folders = [
            re.escape(str(path)) for path in (home_folder(), Path.cwd(), gettempdir()) if path and len(str(path)) > 1
        ]
        match = _PRIVATE_PATH.search(text) or re.search(rf"(?<![\w.-])({'|'.join(folders)})(?![\w-])", text)
        if match:
            raise PublishError(f"{name} names a folder of this machine ({match[0]}...); nothing was uploaded")


def _text(content: Content) -> str:
    """Return a file's text; of a safetensors file the header, of a .gguf file the beginning, which holds its texts."""
    if isinstance(content, bytes):
        return content.decode(errors="replace")
    with content.open("rb") as file:
        if content.suffix == ".gguf":
            return file.read(_GGUF_TEXTS).decode(errors="replace")
        size = int.from_bytes(file.read(8), "little") if content.suffix == ".safetensors" else -1
        return file.read(size).decode(errors="replace")
