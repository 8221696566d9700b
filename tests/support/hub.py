"""A Hub in this process for tests of pushes: HTTP on localhost, standard library only, driven by the real client."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Account:
    """Who a token belongs to, and what it may do."""

    name: str
    orgs: tuple[str, ...] = ()
    role: str = "write"


@dataclass
class Repo:
    """A model repository: its commits, newest last."""

    private: bool
    gated: Any = False
    commits: list[tuple[str, Files]] = field(default_factory=list)

    @property
    def files(self) -> Files:
        """What stands on main."""
        return self.commits[-1][1]

    def at(self, revision: str) -> tuple[str, Files] | None:
        """The commit that a revision names."""
        found = self.commits[-1:] if revision == "main" else [one for one in self.commits if one[0] == revision]
        return found[0] if found else None


@dataclass
class Collection:
    """A collection of repositories: its owner, its title and the ids of its models."""

    owner: str
    title: str
    private: bool
    items: list[str] = field(default_factory=list)


@dataclass
class Fault:
    """The next `times` requests of this method and path go wrong: a status with headers, or a dropped connection.

    It is dropped in the middle of the request or, where `late`, when all is done and only the answer is missing.
    """

    method: str
    path: str
    times: int
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    late: bool = False


class Hub:
    """Accounts by token, repositories by id, faults to come, and what was asked of the server."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.asked: list[tuple[str, str]] = []
        self.everything_public = False
        self.collections: dict[str, Collection] = {}
        self.lock = threading.Lock()

    def add(self, repo: str, files: Files, private: bool = False, gated: Any = False) -> Repo:
        """A repository that is there already."""
        made = self.repos[repo] = Repo(private, gated)
        self.commit(made, files)
        return made

    def commit(self, repo: Repo, files: Files) -> str:
        """A commit with these files in place of all others; gives its id."""
        content = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())
        oid = hashlib.sha1(f"{len(repo.commits)} {content}".encode()).hexdigest()
        repo.commits.append((oid, files))
        return oid

    def count(self, method: str, part: str) -> int:
        """How many requests of this method had this in their path."""
        return sum(one == method and part in path for one, path in self.asked)


@contextlib.contextmanager
def serve() -> Iterator[tuple[Hub, str]]:
    """A running Hub and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf"))


def _oid(name: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if _lfs(name) else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request; every answer has a length, so connections stay open."""

    disable_nagle_algorithm = True  # an answer of two small parts would wait 40 ms for the first one's receipt

    hub: Hub
    mute = False
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Tests ask `Hub.asked`."""

    def _answer(
        self, status: int, value: Any = None, headers: dict[str, str] | None = None, raw: bytes | None = None
    ) -> None:
        if self.mute:
            self.close_connection = True
            self.connection.close()
            return
        body = raw if raw is not None else b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, message: str, code: str = "") -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._answer(status, {"error": message}, headers)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _account(self) -> Account | None:
        return self.hub.accounts.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _may(self, namespace: str, write: bool) -> bool:
        account = self._account()
        return (
            account is not None and namespace in (account.name, *account.orgs) and (account.role != "read" or not write)
        )

    def _fault(self) -> Fault | None:
        with self.hub.lock:
            self.hub.asked.append((self.command, self.path))
            for fault in self.hub.faults:
                if fault.times and fault.method == self.command and fault.path in self.path:
                    fault.times -= 1
                    return fault
        return None

    def _handle(self) -> None:
        fault = self._fault()
        self.mute = fault is not None and fault.late
        if fault is not None and fault.status is None and not fault.late:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self._body()
        if fault is not None and fault.status is not None:
            self._answer(
                fault.status,
                {"error": f"fault {fault.status}"},
                {"X-Error-Message": f"fault {fault.status}", **fault.headers},
            )
            return
        path = unquote(urlsplit(self.path).path)
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                answer(self, body, **match.groupdict())
                return
        self._refuse(404, f"no such endpoint: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815

    def _repo(self, repo: str, write: bool = False) -> Repo | None:
        """The repository, if it is there and may be seen; else the refusal is sent."""
        found, namespace = self.hub.repos.get(repo), repo.split("/")[0]
        if self.headers.get("Authorization") and self._account() is None:
            self._refuse(401, "Invalid credentials in Authorization header")
        elif found is None or (found.private and not self._may(namespace, False)):
            self._refuse(404, "Repository not found", "RepoNotFound")
        elif write and not self._may(namespace, True):
            self._refuse(403, f"you don't have the rights to write to {namespace}")
        else:
            return found
        return None

    def whoami(self, body: bytes) -> None:
        """Name, organisations and the token's role."""
        account = self._account()
        if account is None:
            self._refuse(401, "Invalid username or password.")
            return
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": account.role}}
        self._answer(
            200, {"type": "user", "name": account.name, "orgs": [{"name": one} for one in account.orgs], "auth": auth}
        )

    def create(self, body: bytes) -> None:
        """A repository, public unless asked otherwise, as on the real Hub."""
        asked, account = json.loads(body), self._account()
        if account is None:
            self._refuse(401, "Invalid username or password.")
            return
        namespace = asked["organization"] or account.name
        repo = f"{namespace}/{asked['name']}"
        url = f"http://{self.headers['Host']}/{repo}"
        if not self._may(namespace, True):
            self._refuse(403, f"You don't have the rights to create a model under the namespace {namespace}")
        elif repo in self.hub.repos:
            self._answer(409, {"error": "You already created this model repo", "url": url})
        else:
            private = asked.get("visibility") == "private" and not self.hub.everything_public
            self.hub.add(repo, {".gitattributes": b"*.safetensors filter=lfs\n"}, private)
            self._answer(200, {"url": url, "id": repo, "name": repo})

    def list_collections(self, body: bytes) -> None:
        """The collections of an owner, private ones only for who may see them."""
        owner = parse_qs(urlsplit(self.path).query)["owner"][0]
        own = [(slug, one) for slug, one in self.hub.collections.items() if one.owner == owner]
        seen = [(slug, one) for slug, one in own if not one.private or self._may(owner, False)]
        listed = [self._collection(slug, one) for slug, one in seen]
        self._answer(200, [{name: value for name, value in one.items() if name != "position"} for one in listed])

    def create_collection(self, body: bytes) -> None:
        """A collection of that title; 409 where the owner has one."""
        asked = json.loads(body)
        slug = f"{asked['namespace']}/{re.sub(r'[^a-z0-9]+', '-', asked['title'].lower())}-0123456789abcdef01234567"
        if not self._may(asked["namespace"], True):
            self._refuse(403, f"You don't have the rights to create a collection for {asked['namespace']}")
        elif slug in self.hub.collections:
            self._answer(409, {"error": "exists", "slug": slug})
        else:
            self.hub.collections[slug] = Collection(asked["namespace"], asked["title"], asked["private"])
            self._answer(200, self._collection(slug, self.hub.collections[slug]))

    def add_item(self, body: bytes, slug: str) -> None:
        """A model in a collection; 409 where it is there."""
        collection, item = self.hub.collections[slug], json.loads(body)["item"]
        if not self._may(collection.owner, True):
            self._refuse(403, "You don't have the rights to change this collection")
        elif item["id"] in collection.items:
            self._answer(409, {"error": "exists"})
        else:
            collection.items.append(item["id"])
            self._answer(200, self._collection(slug, collection))

    def read_collection(self, body: bytes, slug: str) -> None:
        """A collection with its items."""
        self._answer(200, self._collection(slug, self.hub.collections[slug]))

    def _collection(self, slug: str, collection: Collection) -> dict[str, Any]:
        items = [{"_id": one, "id": one, "type": "model", "position": at} for at, one in enumerate(collection.items)]
        facts = {"slug": slug, "title": collection.title, "private": collection.private, "items": items}
        moment = "2026-01-01T00:00:00.000Z"
        return {
            **facts,
            "owner": {"name": collection.owner},
            "lastUpdated": moment,
            "position": 0,
            "theme": "blue",
            "upvotes": 0,
        }

    def validate(self, body: bytes) -> None:
        """A card's header begins and ends."""
        good = re.match(r"---\n.*?\n---\n", json.loads(body)["content"], re.DOTALL)
        self._answer(200 if good else 400, {"errors": [] if good else [{"message": "no YAML header"}], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        """How each file is to be sent, and the id of the one that stands there now."""
        found = self._repo(repo, write=True)
        if found is None:
            return
        names = [file["path"] for file in json.loads(body)["files"]]
        present = {name: _oid(name, data) for name, data in found.files.items()}
        self._answer(
            200,
            {
                "files": [
                    {
                        "path": name,
                        "uploadMode": "lfs" if _lfs(name) else "regular",
                        "shouldIgnore": False,
                        "oid": present.get(name),
                    }
                    for name in names
                ]
            },
        )

    def batch(self, body: bytes, repo: str) -> None:
        """Where large files go; nowhere for those that are there."""
        if self._repo(repo, write=True) is None:
            return
        objects = []
        for one in json.loads(body)["objects"]:
            href = f"http://{self.headers['Host']}/blob/{one['oid']}"
            objects.append({**one} if one["oid"] in self.hub.blobs else {**one, "actions": {"upload": {"href": href}}})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        """A large file, kept if it is what its name says."""
        if hashlib.sha256(body).hexdigest() != oid:
            self._refuse(400, "hash does not match")
            return
        self.hub.blobs[oid] = body
        self._answer(200, {})

    def add_commit(self, body: bytes, repo: str, revision: str) -> None:
        """Files on top of the newest commit; 412 where the parent is not the newest."""
        found = self._repo(repo, write=True)
        if found is None:
            return
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(found.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", found.commits[-1][0]) != found.commits[-1][0]:
                self._refuse(412, "A commit has happened since. Please refresh and try again.")
                return
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            if line["key"] == "deletedFile":
                files.pop(value["path"])
        oid = self.hub.commit(found, files)
        self._answer(200, {"commitOid": oid, "commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{oid}"})

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        """Visibility, gating, newest commit and files."""
        found = self._repo(repo)
        commit = found.at(revision) if found else None
        if found is not None and commit is not None:
            listed = [{"rfilename": name, **_entry(name, data)} for name, data in commit[1].items()]
            self._answer(
                200,
                {
                    "id": repo,
                    "modelId": repo,
                    "sha": commit[0],
                    "private": found.private,
                    "gated": found.gated,
                    "disabled": False,
                    "tags": [],
                    "siblings": listed,
                    "cardData": _license(commit[1]),
                },
            )
        elif found is not None:
            self._refuse(404, "no such revision", "RevisionNotFound")

    def tree(self, body: bytes, repo: str, revision: str, folder: str | None = None) -> None:
        """The files of a revision."""
        found = self._repo(repo)
        commit = found.at(revision) if found else None
        if commit is not None:
            inside = {name: data for name, data in commit[1].items() if name.startswith((folder or "").strip("/"))}
            listed = [
                {"type": "file", "path": name, "oid": _oid(name, data), **_entry(name, data)}
                for name, data in inside.items()
            ]
            if inside or not folder:
                self._answer(200, listed)
            else:
                self._refuse(404, "no such folder", "EntryNotFound")
        elif found is not None:
            self._refuse(404, "no such revision", "RevisionNotFound")

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        """A file's content."""
        found = self._repo(repo)
        if found is None:
            return
        commit = found.at(revision)
        if commit is None or name not in commit[1]:
            self._refuse(404, "Entry not found", "EntryNotFound" if commit else "RevisionNotFound")
            return
        headers = {"X-Repo-Commit": commit[0], "ETag": f'"{_oid(name, commit[1][name])}"', "Accept-Ranges": "bytes"}
        self._answer(200, headers=headers, raw=commit[1][name])


def _entry(name: str, data: bytes) -> dict[str, Any]:
    large = (
        {"lfs": {"oid": _oid(name, data), "sha256": _oid(name, data), "size": len(data), "pointerSize": 130}}
        if _lfs(name)
        else {}
    )
    return {"size": len(data), "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), **large}


def _license(files: Files) -> dict[str, str]:
    """The scalar lines of a card's header."""
    head = files.get("README.md", b"").decode().split("---\n")
    pairs = (line.split(": ", 1) for line in (head[1] if len(head) > 2 else "").splitlines() if ": " in line)
    return {name: value for name, value in pairs}


SLUG = r"(?P<slug>[\w.-]+/[\w.-]+)"
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("GET", "/api/collections", Handler.list_collections),
    ("POST", "/api/collections", Handler.create_collection),
    ("GET", f"/api/collections/{SLUG}", Handler.read_collection),
    ("POST", f"/api/collections/{SLUG}/items", Handler.add_item),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", f"/{REPO}.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/blob/(?P<oid>[0-9a-f]{64})", Handler.put),
    ("POST", f"/api/models/{REPO}/commit/(?P<revision>[^/]+)", Handler.add_commit),
    ("GET", f"/api/models/{REPO}", Handler.info),
    ("GET", f"/api/models/{REPO}/revision/(?P<revision>[^/]+)", Handler.info),
    ("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", Handler.tree),
    ("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Handler.resolve),
]
