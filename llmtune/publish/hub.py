"""The Hub: whether a run may be published there, an upload that survives a bad line, and reading back what arrived."""

import hashlib
import logging
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo, get_token
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from llmtune.errors import MachineError, PublishError
from llmtune.files import fingerprint
from llmtune.publish.card import is_ours, seal
from llmtune.recipe.sections import Publish

T = TypeVar("T")
Content = bytes | Path
Sleep = Callable[[float], None]

WAITS = (1, 2, 4, 8, 15, 30, 60)
_LONGEST = 300
_PASSING = (408, 409, 412, 425, 429)
_MEANING = {
    401: "your login is not accepted; `hf auth login`, or set HF_TOKEN to a token that may write",
    403: "your token may not do this; use one that may write to this namespace",
    404: "there is no such repository, or you may not see it",
    412: "someone else commits there at the same time; see what is there now",
    429: "too many requests; wait a while",
}
_PLACEHOLDER = "---\ntags:\n- llmtune\n---\n\nllmtune will put the result of a run here.\n\n"


def target(publish: Publish, sleep: Sleep = time.sleep) -> "Target":
    """The repository of a recipe; raises MachineError where the Hub is switched off."""
    if is_offline_mode():
        raise MachineError(f"{publish.repo} cannot be reached: HF_HUB_OFFLINE is set; unset it to publish")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return Target(publish, sleep)


@dataclass(frozen=True)
class Target:
    """The repository that a recipe names, and how it is spoken to."""

    publish: Publish
    sleep: Sleep = time.sleep
    api: HfApi = field(default_factory=HfApi)

    def ask(self, what: str, action: Callable[[], T]) -> T:
        """What `action` gives, tried again for minutes while the Hub or the line fails; raises PublishError."""
        for wait in (*WAITS, None):
            try:
                return action()
            except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
                answer = _answer(error)
                status = answer.status_code if answer is not None else None
                lost = status is None and not isinstance(error, ValueError)
                passing = lost or (status is not None and (status in _PASSING or status >= 500))
                if wait is None or not passing:
                    raise PublishError(f"{what} {self.publish.repo}: {_told(error, status)}") from None
            self.sleep(_retry_after(answer) or wait)
        raise AssertionError("the last wait is None")

    def info(self, repo: str, revision: str | None = None) -> ModelInfo | None:
        """What the Hub says of a repository, with its files; None where it has none that you may see."""

        def look() -> ModelInfo | None:
            try:
                return self.api.model_info(repo, revision=revision, files_metadata=True)
            except RepositoryNotFoundError:
                return None

        return self.ask("looking at", look)

    def check_login(self) -> None:
        """Raise PublishError where there is no login, or one that may not write to the namespace."""
        if get_token() is None:
            raise PublishError("you are not logged in to the Hub; `hf auth login`, or set HF_TOKEN")
        user = self.ask("logging in for", self.api.whoami)
        names = [user["name"], *(org["name"] for org in user.get("orgs", []))]
        namespace = self.publish.repo.split("/")[0]
        if namespace not in names:
            raise PublishError(f"you may not write to {namespace}; as {user['name']} you may to {', '.join(names)}")
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise PublishError("your token can only read; publishing needs one that may write to the Hub")

    def open(self) -> ModelInfo:
        """The repository, made if need be; raises PublishError where it is public, unasked, or has a foreign card."""
        private = self.publish.visibility == "private"
        found = self.info(self.publish.repo)
        if found is None:
            create = self.api.create_repo
            self.ask("making", lambda: create(self.publish.repo, private=private, exist_ok=True))
            found = self.info(self.publish.repo)
        if found is None:
            raise PublishError(f"{self.publish.repo}: was made, but cannot be seen")
        self.check_visibility(found)
        if not private and found.private:
            raise PublishError(
                f"{self.publish.repo} is private and llmtune makes nothing public that was not; "
                "change that in its settings on the Hub, or name another publish.repo"
            )
        self._check_card(found)
        return found

    def check_visibility(self, found: ModelInfo) -> None:
        """Raise PublishError where a repository is public and the recipe does not say so."""
        if self.publish.visibility == "private" and not found.private:
            raise PublishError(
                f"{self.publish.repo} is public, and the recipe does not say publish.visibility: public; "
                "make it private in its settings on the Hub, or name another publish.repo"
            )

    def probe(self) -> None:
        """Prove that the repository takes a commit: a first README.md or, where there is one, the same again."""
        text = self._card(self.open()) or seal(_PLACEHOLDER)
        self.commit({"README.md": text.encode()}, "Make place for a run of llmtune")

    def commit(self, files: Mapping[str, Content], message: str) -> str:
        """Commit files at once on top of what was looked at; gives the commit's id. The same again changes nothing."""

        def once() -> str:
            parent = self.open().sha
            operations = [CommitOperationAdd(name, content) for name, content in files.items()]
            made = self.api.create_commit(
                self.publish.repo, operations=operations, commit_message=message, parent_commit=parent
            )
            return str(made.oid)

        return self.ask("uploading to", once)

    def upload(self, files: Mapping[str, Content]) -> ModelInfo:
        """Commit files and give what the Hub then holds; raises PublishError where that is not what was sent."""
        found = self.info(self.publish.repo, self.commit(files, "Upload a run of llmtune"))
        if found is None:
            raise PublishError(f"{self.publish.repo}: the upload cannot be seen")
        self.check_visibility(found)
        there = {one.rfilename: one for one in found.siblings or []}
        lost = [name for name, content in files.items() if name not in there or not _arrived(there[name], content)]
        if lost:
            raise PublishError(f"{self.publish.repo}: {lost[0]} did not arrive as it was sent")
        return found

    def _check_card(self, found: ModelInfo) -> None:
        text = self._card(found)
        if text is not None and not is_ours(text):
            raise PublishError(
                f"{self.publish.repo} holds a README.md that llmtune did not write, or that was edited since; "
                "it is not overwritten: move it away there, or name another publish.repo"
            )

    def _card(self, found: ModelInfo) -> str | None:
        """The README.md of a repository, None where it has none."""
        if "README.md" not in [one.rfilename for one in found.siblings or []]:
            return None
        with tempfile.TemporaryDirectory() as folder:
            read = self.api.hf_hub_download
            file = self.ask("reading", lambda: read(found.id, "README.md", revision=found.sha, cache_dir=folder))
            return Path(file).read_text(encoding="utf-8", errors="replace")


def _arrived(there: Any, content: Content) -> bool:
    if there.lfs is not None:
        digest = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else fingerprint(content)["sha256"]
        return bool(there.lfs.sha256 == digest)
    data = content if isinstance(content, bytes) else content.read_bytes()
    return bool(there.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())


def _answer(error: BaseException | None) -> httpx2.Response | None:
    """The Hub's answer that an error, or what caused it, is about."""
    if error is None or isinstance(error, HfHubHTTPError):
        return error.response if error else None
    return _answer(error.__cause__)


def _retry_after(answer: httpx2.Response | None) -> float:
    asked = answer.headers.get("Retry-After", "") if answer is not None else ""
    return min(float(asked), _LONGEST) if asked.isdigit() else 0.0


def _told(error: BaseException, status: int | None) -> str:
    """An error in one line without the login, addresses or request numbers."""
    if status is None and not isinstance(error, ValueError):
        return f"the connection failed ({type(error.__cause__ or error).__name__})"
    meaning = f"{_MEANING.get(status or 0, 'the Hub failed' if status else 'refused')} "
    said = getattr(error, "server_message", None) or ("" if status else str(error))
    said = re.sub(r"\s+", " ", said.replace(get_token() or "\0", "[token]"))[:200]
    return f"{meaning}({': '.join(str(part) for part in (status, said) if part)})"
