"""The Hub: whether a run may be published, an upload that survives a bad connection, and a check of what arrived."""

import hashlib
import logging
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo, get_token
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoSibling

from llmtune.errors import MachineError, PublishError
from llmtune.files import fingerprint
from llmtune.loggers import quiet_loggers
from llmtune.model.base import Base
from llmtune.publishing.endpoint import check_endpoint, hub_words
from llmtune.publishing.header import is_ours, sign
from llmtune.recipe.sections import Publish

T = TypeVar("T")
Content = bytes | Path
Sleep = Callable[[float], None]

WAITS = (1, 2, 4, 8, 15, 30, 60)
_LONGEST_WAIT = 300
_TEMPORARY = (408, 409, 412, 425, 429)
_MEANING = {
    401: "your login is not accepted; run `hf auth login`, or set HF_TOKEN to a token that may write",
    403: "your token may not do this; use one that may write to this namespace",
    404: "there is no such repository, or you may not read it",
    412: "someone else commits there at the same time; look at the repository",
    429: "too many requests; try again later",
}
_PLACEHOLDER = "---\ntags:\n- llmtune\n---\n\nllmtune will put the result of a run here.\n\n"


def target(publish: Publish, sleep: Sleep = time.sleep) -> "Target":
    """Return the repository of a recipe; raises MachineError if the Hub is switched off."""
    check_endpoint()
    if is_offline_mode():
        raise MachineError(
            f"{publish.repo} on {hub_words()} cannot be reached: HF_HUB_OFFLINE is set; unset it to publish, "
            "or take publish out of the recipe; llmtune publish RUN --dry-run works offline"
        )
    return Target(publish, sleep)


@dataclass(frozen=True)
class Target:
    """The repository that a recipe names, and the client for it."""

    publish: Publish
    sleep: Sleep = time.sleep
    api: HfApi = field(default_factory=HfApi)

    def ask(self, what: str, action: Callable[[], T]) -> T:
        """Return the result of `action`, retried for two minutes while Hub or connection fail; raises PublishError."""
        for wait in (*WAITS, None):
            try:
                with quiet_loggers(("huggingface_hub",), logging.ERROR):
                    return action()
            except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
                response = _response(error)
                status = response.status_code if response is not None else None
                lost = status is None and not isinstance(error, ValueError)
                temporary = lost or (status is not None and (status in _TEMPORARY or status >= 500))
                if wait is None or not temporary:
                    raise PublishError(f"{what} {self.publish.repo}: {_explain(error, status)}") from None
            self.sleep(_retry_after(response) or wait)
        raise AssertionError("the last wait is None")

    def info(self, repo: str, revision: str | None = None) -> ModelInfo | None:
        """Return what the Hub holds of a repository, with its files; None if there is none that you may read."""

        def look() -> ModelInfo | None:
            try:
                return self.api.model_info(repo, revision=revision, files_metadata=True)
            except RepositoryNotFoundError:
                return None

        return self.ask("looking at", look)

    def base_info(self, base: Base) -> ModelInfo | None:
        """Return what the Hub says of a base; None for one that is not on the Hub."""
        return self.info(base.hub_id) if base.hub_id else None

    def check_login(self) -> None:
        """Raise PublishError without a login, or for one that may not write to the namespace."""
        if get_token() is None:
            raise PublishError(f"you are not logged in to {hub_words()}; run `hf auth login`, or set HF_TOKEN")
        user = self.ask("logging in for", self.api.whoami)
        names = [user["name"], *(org["name"] for org in user.get("orgs", []))]
        namespace = self.publish.repo.split("/")[0]
        if namespace not in names:
            raise PublishError(
                f"you may not write to {namespace}; as {user['name']} you may write to {', '.join(names)}"
            )
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise PublishError("your token can only read; publishing needs one that may write to the Hub")

    def open(self) -> ModelInfo:
        """Return the repository, created if needed; raises PublishError for a public or foreign one."""
        private = self.publish.visibility == "private"
        info = self.info(self.publish.repo)
        if info is None:
            create = self.api.create_repo
            self.ask("creating", lambda: create(self.publish.repo, private=private, exist_ok=True))
            info = self.info(self.publish.repo)
        if info is None:
            raise PublishError(f"{self.publish.repo}: was created, but cannot be read")
        self.check_visibility(info)
        if not private and info.private:
            raise PublishError(
                f"{self.publish.repo} is private, and llmtune never makes a repository public; "
                "do that in its settings on the Hub, or choose another publish.repo"
            )
        self._check_card(info)
        return info

    def check_visibility(self, info: ModelInfo) -> None:
        """Raise PublishError if a repository is public and the recipe does not say so."""
        if self.publish.visibility == "private" and not info.private:
            raise PublishError(
                f"{self.publish.repo} is public, and the recipe does not say publish.visibility: public; "
                "make it private in its settings on the Hub, or choose another publish.repo"
            )

    def probe(self) -> None:
        """Prove that the repository takes a commit: a first README.md or, if there is one, the same again."""
        text = self._card(self.open()) or sign(_PLACEHOLDER)
        self.commit({"README.md": text.encode()}, "Reserve a place for a run of llmtune")

    def commit(self, files: Mapping[str, Content], message: str) -> str:
        """Commit files on top of the commit that was checked; returns the new commit's id."""

        def once() -> str:
            parent = self.open().sha
            operations = [CommitOperationAdd(name, content) for name, content in files.items()]
            commit = self.api.create_commit(
                self.publish.repo, operations=operations, commit_message=message, parent_commit=parent
            )
            return str(commit.oid)

        return self.ask("uploading to", once)

    def upload(self, files: Mapping[str, Content]) -> ModelInfo:
        """Commit files and return what the Hub then holds; raises PublishError if that is not what was sent."""
        info = self.info(self.publish.repo, self.commit(files, "Upload a run of llmtune"))
        if info is None:
            raise PublishError(f"{self.publish.repo}: the upload cannot be read back")
        self.check_visibility(info)
        remote = {file.rfilename: file for file in info.siblings or []}
        damaged = [name for name, sent in files.items() if name not in remote or not _arrived(remote[name], sent)]
        if damaged:
            raise PublishError(f"{self.publish.repo}: {damaged[0]} did not arrive as it was sent")
        return info

    def _check_card(self, info: ModelInfo) -> None:
        text = self._card(info)
        if text is not None and not is_ours(text):
            raise PublishError(
                f"{self.publish.repo} holds a README.md that llmtune did not write, or that was edited since; "
                "it is not overwritten: rename it there, or choose another publish.repo"
            )

    def _card(self, info: ModelInfo) -> str | None:
        """Read the README.md of a repository; None if it has none."""
        if "README.md" not in [file.rfilename for file in info.siblings or []]:
            return None
        with tempfile.TemporaryDirectory() as folder:
            download = self.api.hf_hub_download
            file = self.ask("reading", lambda: download(info.id, "README.md", revision=info.sha, cache_dir=folder))
            return Path(file).read_text(encoding="utf-8", errors="replace")


def _arrived(remote: RepoSibling, sent: Content) -> bool:
    """Compare a file on the Hub with what was sent, by the hash that the Hub keeps: LFS's SHA-256 or Git's SHA-1."""
    if remote.lfs is not None:
        digest = hashlib.sha256(sent).hexdigest() if isinstance(sent, bytes) else fingerprint(sent)["sha256"]
        return bool(remote.lfs.sha256 == digest)
    data = sent if isinstance(sent, bytes) else sent.read_bytes()
    return bool(remote.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())


def _response(error: BaseException | None) -> httpx2.Response | None:
    """Return the Hub's response behind an error or its cause."""
    if error is None or isinstance(error, HfHubHTTPError):
        return error.response if error else None
    return _response(error.__cause__)


def _retry_after(response: httpx2.Response | None) -> float:
    seconds = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(seconds), _LONGEST_WAIT) if seconds.isdigit() else 0.0


def _explain(error: BaseException, status: int | None) -> str:
    """Describe an error in one line without the login or request numbers; of addresses, a private Hub's alone."""
    if status is None and not isinstance(error, ValueError):
        return f"the connection to {hub_words()} failed ({type(error.__cause__ or error).__name__})"
    meaning = f"{_MEANING.get(status or 0, 'the Hub failed' if status else 'refused')} "
    message = getattr(error, "server_message", None) or ("" if status else str(error))
    message = re.sub(r"\s+", " ", message.replace(get_token() or "\0", "[token]"))[:200]
    return f"{meaning}({': '.join(str(part) for part in (status, message) if part)})"
