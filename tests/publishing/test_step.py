"""Publishing through the real client to a Hub in this process: what arrives, what never leaves, what can go wrong."""

import contextlib
import getpass
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import _http
from peft import PeftModel
from transformers import AutoModelForCausalLM

from llmtune import recipe
from llmtune.errors import LlmtuneError, MachineError, PublishError, RecipeError
from llmtune.files import read_json
from llmtune.merging.step import merge
from llmtune.publishing import step as step_module
from llmtune.publishing.header import front_matter, is_ours, sign
from llmtune.publishing.hub import WAITS
from llmtune.publishing.private import check_private
from llmtune.publishing.step import preflight
from llmtune.run import Run
from tests.support import ROOT, runs, tiny
from tests.support import hub as hub_double
from tests.support.hub import Account, Fault, Handler, Hub, serve

TOKEN = "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"
BASE = "acme/tiny"
REPO = "me/tuned"
WEIGHTS = {"adapter_config.json", "adapter_model.safetensors", "base.json"}
DELTA = WEIGHTS | {".gitattributes", "README.md", "recipe.yaml", "figures/plan.svg"}


@dataclass
class World:
    """A Hub with a base model, this process's login `me`, and the seconds that the client waited."""

    hub: Hub
    address: str
    folder: Path
    trained: Path
    waited: list[float]

    def run(self, **sections: dict[str, Any]) -> Run:
        """Copy the trained run, with other values in its recipe's sections."""
        run = Run(self.folder / "run")
        shutil.copytree(self.trained, run.path)
        settings = yaml.safe_load(run.recipe_file.read_text())
        settings["publish"] = {"repo": REPO}
        for name, values in sections.items():
            settings[name] |= values
        run.recipe_file.write_text(yaml.safe_dump(settings))
        return run

    def publish(self, run: Run) -> dict[str, Any]:
        """Publish a run; waits are counted, not waited."""
        return step_module.publish(run, self.waited.append)

    def files(self, repo: str = REPO) -> dict[str, bytes]:
        """Return the newest files of a repository."""
        return self.hub.repos[repo].files

    def writes(self) -> int:
        """Count the requests that write."""
        return self.hub.count("POST", "/commit/") + self.hub.count("POST", "/repos/create") + self.hub.count("PUT", "/")


CARD = b"---\nlicense: apache-2.0\n---\n\nA tiny model.\n"


@contextlib.contextmanager
def logged_in(
    monkeypatch: pytest.MonkeyPatch, base: Path, cache: Path, waited: list[float]
) -> Iterator[tuple[Hub, str]]:
    """Serve a Hub that holds the base, and let the client in this process use it."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(base / "no-token"))
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=waited.append, time=time.time))
    with serve() as (hub, address):
        url = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(hf_api.api, "endpoint", address)
        hub.accounts[TOKEN] = Account("me", ("my-team",))
        hub.add(BASE, {**{file.name: file.read_bytes() for file in base.iterdir()}, "README.md": CARD})
        _http.close_session()
        yield hub, address
        _http.close_session()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a base as on the Hub, the client's cache, and a run on that base."""
    folder = tmp_path_factory.mktemp("trained")
    base = tiny.save_base(folder / "base")
    with pytest.MonkeyPatch.context() as patch, logged_in(patch, base, folder / "cache", []):
        runs.trained(folder, base=BASE, model={"base": BASE, "precision": "fp32"})
    return folder


@pytest.fixture
def world(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Serve a Hub for one test."""
    waited: list[float] = []
    with logged_in(monkeypatch, trained / "base", trained / "cache", waited) as (hub, address):
        yield World(hub, address, tmp_path, trained / "run", waited)


def tuned_logits(run: Run) -> torch.Tensor:
    """Compute the logits of a run's tuned model."""
    tuned = runs.load_tuned(run)
    with torch.inference_mode():
        return torch.as_tensor(tuned(input_ids=torch.arange(3, 40)[None]).logits)


def test_dry_run_shows_what_would_go_and_asks_the_hub_nothing(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world.run()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    shown = step_module.preview(run)
    assert set(shown["bytes"]) == DELTA - {".gitattributes"}  # which the Hub makes
    weights = run.delta / "adapter_model.safetensors"
    assert shown["bytes"][weights.name] == weights.stat().st_size
    written = {file.relative_to(run.path / "publish").as_posix() for file in (run.path / "publish").rglob("*.*")}
    assert written == set(shown["bytes"])
    assert weights.samefile(run.path / "publish" / weights.name)
    assert f"would go to {REPO} (private); nothing was sent" in capsys.readouterr().out
    assert world.writes() == 0
    assert not run.done("publish")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    world.publish(run)
    card = (run.path / "publish" / "README.md").read_bytes()
    assert card == world.files()["README.md"]
    assert shown["bytes"]["README.md"] == len(card)


def test_uploads_private_delta_that_peft_loads(world: World) -> None:
    run = world.run()
    facts = world.publish(run)
    assert set(world.files()) == DELTA
    assert world.hub.repos[REPO].private
    assert facts["visibility"] == "private"
    assert run.manifest()["steps"]["publish"]["commit"] == world.hub.repos[REPO].commits[-1][0]
    config = json.loads(world.files()["adapter_config.json"])
    assert config["base_model_name_or_path"] == BASE
    assert config["revision"] == world.hub.repos[BASE].commits[0][0]
    head = front_matter(world.files()["README.md"].decode())
    assert (head["base_model"], head["license"], head["library_name"]) == (BASE, "apache-2.0", "peft")
    base = AutoModelForCausalLM.from_pretrained(BASE, revision=config["revision"], dtype=torch.float32)
    with torch.inference_mode():
        actual = PeftModel.from_pretrained(base, REPO)(input_ids=torch.arange(3, 40)[None]).logits
    assert torch.equal(actual, tuned_logits(run))


ELSEWHERE = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from llmtune.publishing.step import publish
from llmtune.run import open_run
publish(open_run(Path(sys.argv[1])))
tuned = AutoModelForCausalLM.from_pretrained("me/tuned", dtype=torch.float32)
AutoTokenizer.from_pretrained("me/tuned")
with torch.inference_mode():
    torch.save(tuned(input_ids=torch.arange(3, 40)[None]).logits, sys.argv[2])
"""


@pytest.mark.slow
def test_fresh_process_publishes_and_loads_merged_model(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.reload_here(monkeypatch)
    run = world.run(publish={"weights": "merged"}, merge={"dtype": "float32"})
    merge(run)
    out = world.folder / "logits.pt"
    env = {**os.environ, "HF_ENDPOINT": world.address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    env |= {"HF_HOME": str(world.folder / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, run.path, out], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"published: {world.address}/{REPO} (private), " in done.stdout
    assert (torch.load(out, weights_only=True) - tuned_logits(run)).abs().max() <= 1e-4
    copied = {"chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(world.files()) == {
        ".gitattributes",
        "README.md",
        "recipe.yaml",
        "figures/plan.svg",
        "model.safetensors",
        *copied,
    }
    assert front_matter(world.files()["README.md"].decode())["library_name"] == "transformers"


def test_publishes_no_path_user_or_host(world: World) -> None:
    run = world.run()
    world.publish(run)
    text = "\n".join(data.decode(errors="replace") for name, data in world.files().items())
    private = [str(world.folder), str(Path.home()) + "/", str(ROOT), platform.node()]
    assert [one for one in private if one in text] == []
    assert f"/{getpass.getuser()}" not in text
    assert "train: rows.jsonl" in world.files()["recipe.yaml"].decode()


def test_writes_token_nowhere(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    run = world.run()
    world.hub.faults = [Fault("POST", "/commit/", 1, 403)]
    with pytest.raises(PublishError) as caught:
        world.publish(run)
    traces = "".join(traceback.format_exception(caught.value))
    world.publish(run)
    output = capfd.readouterr()
    stored = [path.read_bytes() for path in run.path.rglob("*") if path.is_file()]
    words = [Path("/proc/self/cmdline").read_bytes(), traces.encode(), output.out.encode(), output.err.encode()]
    everything = [*stored, *world.files().values(), *words, *(path.encode() for _, path in world.hub.asked)]
    assert len(everything) > 15
    assert not any(b"CANARY" in content for content in everything)


@pytest.mark.parametrize("step", ["preflight", "publish"])
def test_refuses_public_repository_unless_recipe_says_public(world: World, step: str) -> None:
    run = world.run()
    world.hub.add(REPO, {}, private=False)
    with pytest.raises(PublishError, match=r"me/tuned is public, and the recipe does not say"):
        preflight(run.recipe()) if step == "preflight" else world.publish(run)
    assert world.writes() == 0
    assert not run.done("publish")


def test_uploads_nothing_if_hub_creates_public_repository(world: World) -> None:
    world.hub.everything_public = True
    with pytest.raises(PublishError, match="is public"):
        world.publish(world.run())
    assert set(world.files()) == {".gitattributes"}


def test_reports_repository_made_public_during_upload(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.run()
    original = Hub.commit

    def commit(hub: Hub, repo: Any, files: Any) -> str:
        repo.private = repo.private and "recipe.yaml" not in files
        return original(hub, repo, files)

    monkeypatch.setattr(Hub, "commit", commit)
    with pytest.raises(PublishError, match="is public"):
        world.publish(run)
    assert not run.done("publish")


FAULTS = {
    "503 three times": (Fault("POST", "/commit/", 3, 503), [1, 2, 4]),
    "429 with a time to wait": (Fault("POST", "/commit/", 1, 429, {"Retry-After": "7"}), [7]),
    "a connection lost in the middle of the weights": (Fault("PUT", "/blob/", 1), [1]),
    "an answer that is lost": (Fault("POST", "/commit/", 1, late=True), [1]),
    "a commit of somebody else": (Fault("POST", "/commit/", 1, 412), [1]),
    "500 at the login": (Fault("GET", "/whoami", 1, 500), [1]),
    "502 when looking": (Fault("GET", "/api/models/me/tuned", 1, 502), [1]),
    "504 when making the repository": (Fault("POST", "/repos/create", 1, 504), [1]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_retries_temporary_faults(world: World, name: str) -> None:
    run = world.run()
    fault, waited = FAULTS[name]
    world.hub.faults = [Fault(**{**vars(fault)})]
    world.publish(run)
    assert world.waited == waited
    assert set(world.files()) == DELTA
    assert len(world.hub.repos[REPO].commits) == 2


@pytest.mark.slow
def test_lasting_fault_leaves_delta_and_command(world: World) -> None:
    run = world.run()
    before = {path: path.read_bytes() for path in run.delta.iterdir()}
    world.hub.faults = [Fault("POST", "/commit/", 99, 503)]
    with pytest.raises(PublishError, match=r"uploading to me/tuned: the Hub failed \(503: fault 503\)") as caught:
        world.publish(run)
    assert str(caught.value).endswith(f"llmtune publish {run.path}")
    assert caught.value.exit_code == 6
    assert "\n" not in str(caught.value)
    assert world.waited == list(WAITS)
    assert {path: path.read_bytes() for path in run.delta.iterdir()} == before
    assert not run.done("publish")
    world.hub.faults, sent = [], world.hub.count("PUT", "/blob/")
    world.publish(run)
    assert world.hub.count("PUT", "/blob/") == sent == 1
    assert run.done("publish")


def test_reports_expired_login_at_once(world: World) -> None:
    run = world.run()
    world.hub.faults = [Fault("POST", "/commit/", 99, 401)]
    with pytest.raises(PublishError, match=r"your login is not accepted; run `hf auth login`.*\(401"):
        world.publish(run)
    assert world.waited == []


def test_repeated_publish_commits_nothing(world: World) -> None:
    run = world.run()
    first = world.publish(run)
    assert world.publish(run)["commit"] == first["commit"]
    assert len(world.hub.repos[REPO].commits) == 2


def test_reports_changed_upload(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.run()
    original = Hub.commit
    monkeypatch.setattr(
        Hub, "commit", lambda hub, repo, files: original(hub, repo, {name: data + b" " for name, data in files.items()})
    )
    with pytest.raises(PublishError, match="did not arrive as it was sent"):
        world.publish(run)


def _foreign(world: World) -> None:
    world.hub.accounts[TOKEN] = Account("somebody-else", ("their-team",))


def _reader(world: World) -> None:
    world.hub.accounts[TOKEN] = Account("me", role="read")


def _unknown(world: World) -> None:
    world.hub.accounts = {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_foreign, "you may not write to me; as somebody-else you may write to somebody-else, their-team"),
        (_reader, "your token can only read"),
        (_unknown, r"your login is not accepted; run `hf auth login`.*\(401"),
    ],
)
def test_refuses_login_without_write_access_before_training(world: World, change: Any, message: str) -> None:
    settings = world.run().recipe()
    change(world)
    with pytest.raises(PublishError, match=message):
        preflight(settings, world.waited.append)
    assert world.writes() == 0
    assert world.waited == []


def test_refuses_missing_login_before_training(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = world.run().recipe()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishError, match=r"you are not logged in to the Hub at http://\S+; run `hf auth login`"):
        preflight(settings)


def test_refuses_missing_commit_right_before_training(world: World) -> None:
    settings = world.run().recipe()
    world.hub.faults = [Fault("POST", "/preupload/", 9, 403)]
    with pytest.raises(PublishError, match=r"your token may not do this.*\(403"):
        preflight(settings)


def test_preflight_creates_private_repository_once(world: World) -> None:
    run = world.run()
    preflight(run.recipe())
    preflight(run.recipe())
    assert world.hub.repos[REPO].private
    assert len(world.hub.repos[REPO].commits) == 2
    world.publish(run)
    assert set(world.files()) == DELTA


def test_preflight_asks_nobody_without_publish_section(world: World) -> None:
    settings = recipe.load(world.trained / "recipe.yaml")
    asked = len(world.hub.asked)
    preflight(settings)
    assert len(world.hub.asked) == asked


@pytest.mark.parametrize("step", ["preflight", "publish"])
def test_refuses_to_publish_offline(world: World, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    run = world.run()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MachineError, match="HF_HUB_OFFLINE is set; unset it to publish") as caught:
        preflight(run.recipe()) if step == "preflight" else world.publish(run)
    assert caught.value.exit_code == 3


def test_refuses_foreign_readme(world: World) -> None:
    run = world.run()
    world.hub.add(REPO, {"README.md": b"my own words"}, private=True)
    for step in (lambda: preflight(run.recipe()), lambda: world.publish(run)):
        with pytest.raises(PublishError, match=r"holds a README\.md that llmtune did not write"):
            step()
    assert world.files() == {"README.md": b"my own words"}


def test_refuses_foreign_readme_that_appears_during_upload(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.run()
    original = Handler.preupload

    def preupload(handler: Handler, body: bytes, **where: str) -> None:
        original(handler, body, **where)
        world.hub.commit(world.hub.repos[REPO], {"README.md": b"my own words"})

    routes = [
        (verb, pattern, preupload if answer is original else answer) for verb, pattern, answer in hub_double.ROUTES
    ]
    monkeypatch.setattr(hub_double, "ROUTES", routes)
    with pytest.raises(PublishError, match=r"holds a README\.md that llmtune did not write"):
        world.publish(run)
    assert world.files() == {"README.md": b"my own words"}


def test_replaces_own_card_until_edited(world: World) -> None:
    run = world.run()
    world.hub.add(REPO, {"README.md": sign("---\na: 1\n---\n\nold\n\n").encode()}, private=True)
    world.publish(run)
    ours = world.files()["README.md"].decode()
    assert is_ours(ours)
    world.hub.commit(
        world.hub.repos[REPO], {**world.files(), "README.md": ours.replace("# tuned", "# Tuned!").encode()}
    )
    with pytest.raises(PublishError, match="or that was edited since"):
        world.publish(run)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("a Hub token", "hf_" + "aBcD1234" * 4),
        ("an API key", "sk-proj-" + "a1B2" * 8),
        ("an AWS key", "AKIAIOSFODNN7EXAMPLE"),
        ("a GitHub token", "ghp_" + "a1B2" * 9),
        ("a private key", "-----BEGIN OPENSSH PRIVATE KEY-----"),
    ],
)
def test_refuses_file_with_secret(world: World, kind: str, text: str) -> None:
    run = world.run(publish={"weights": "merged"})
    template = world.files(BASE)["chat_template.jinja"] + f"{{# {text} #}}".encode()
    files = {**world.files(BASE), "chat_template.jinja": template}
    run.merged.mkdir()
    for name, data in files.items():
        run.merged.joinpath(name).write_bytes(data)
    run.mark("merge", [run.merged], dtype="float32", gap=0.0, bound=1e-4, shift=1.0)
    with pytest.raises(PublishError, match=rf"chat_template\.jinja contains what looks like {kind}") as caught:
        world.publish(run)
    assert text not in str(caught.value)
    assert world.writes() == 0


def test_refuses_file_with_users_own_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "plainlogin")
    (tmp_path / "tokenizer.json").write_text('{"added": "plainlogin"}')
    with pytest.raises(PublishError, match=r"tokenizer\.json contains what looks like your Hub token"):
        check_private("tokenizer.json", tmp_path / "tokenizer.json")


@pytest.mark.parametrize("place", ["/home/ann/rows", "/Users/ann", "~/rows", "C:\\Users\\ann", str(Path.cwd())])
def test_refuses_text_with_path_of_this_machine(place: str) -> None:
    with pytest.raises(PublishError, match=r"recipe\.yaml names a folder of this machine"):
        check_private("recipe.yaml", f"train: '{place}/x.jsonl'\n".encode())
    check_private("recipe.yaml", b"base: owner/name, see https://example.org/home/page and a/tmp/b")


def test_uploads_only_listed_files(world: World) -> None:
    run = world.run()
    for name in (
        ".env",
        "training_args.bin",
        "optimizer.pt",
        "samples_held_out.jsonl",
        "notes.json",
        "cache/rows.arrow",
    ):
        run.delta.joinpath(name).parent.mkdir(exist_ok=True)
        run.delta.joinpath(name).write_text("private")
    run.mark("train", [run.delta])
    world.publish(run)
    assert set(world.files()) == DELTA


def test_uploads_scores_without_rows(world: World) -> None:
    run = world.run()
    score = {"value": 0.5, "stderr": 0.05, "n": 20}
    held = {"n": 20, "of": 120, "shots": 0, "limit": 20, "metrics": {"exact_match": score}, "scores": {"loss": [1.5]}}
    rows = [{"id": "row-1", "question": "Where does Ann live?", "answer": "Basel", "output": "Bern"}]
    settings = {"limit": 20, "held_out": {"source": str(world.folder / "rows.jsonl"), "system_prompt": "You know Ann."}}
    found = {"model": "base", "settings": settings, "results": {"held_out": held}, "rows": rows}
    run.eval.mkdir()
    for name in ("base", "tuned", "settings"):
        run.eval.joinpath(f"{name}.json").write_text(json.dumps(found | {"model": name}))
    run.mark("eval", [run.eval])
    world.publish(run)
    assert set(world.files()) == DELTA | {"eval/base.json", "eval/tuned.json"}
    kept = {name: value for name, value in held.items() if name != "scores"}
    assert json.loads(world.files()["eval/tuned.json"]) == {
        "model": "tuned",
        "settings": {"limit": 20},
        "results": {"held_out": kept},
    }
    assert "| tuned | 0.500 ± 0.050 | 20 of 120 |" in world.files()["README.md"].decode()
    assert not any(word in data for data in world.files().values() for word in (b"Ann", b"Basel", b"Bern", b"row-1"))


def test_refuses_delta_of_base_not_on_hub(world: World) -> None:
    run = runs.trained(world.folder, publish={"repo": REPO})
    for step in (lambda: preflight(run.recipe()), lambda: world.publish(run)):
        with pytest.raises(PublishError, match=r"the base .*/base is not on the Hub.*try publish\.weights: merged"):
            step()
    assert world.writes() == 0


def test_refuses_merged_weights_without_merge(world: World) -> None:
    run = world.run(publish={"weights": "merged"}, merge={"enabled": False})
    with pytest.raises(
        RecipeError, match=r"publish\.weights: merged needs merge\.enabled: true; set that, or try delta"
    ):
        preflight(run.recipe())


@pytest.mark.parametrize(
    ("card", "gated", "message"),
    [
        (b"---\nlicense: llama3.2\n---\n", "manual", "the base acme/tiny is gated"),
        (b"no header", False, "the license of acme/tiny is unknown"),
    ],
)
def test_refuses_public_copy_of_gated_or_unlicensed_base(world: World, card: bytes, gated: Any, message: str) -> None:
    run = world.run(publish={"visibility": "public"}, model={"revision": None})
    world.hub.repos[BASE].gated = gated
    world.hub.commit(world.hub.repos[BASE], {**world.files(BASE), "README.md": card})
    for step in (lambda: preflight(run.recipe()), lambda: world.publish(run)):
        with pytest.raises(PublishError, match=message):
            step()
    assert world.writes() == 0


def test_publishes_publicly_if_recipe_says_public(world: World) -> None:
    run = world.run(publish={"visibility": "public"})
    assert world.publish(run)["visibility"] == "public"
    assert not world.hub.repos[REPO].private
    assert front_matter(world.files()["README.md"].decode())["license"] == "apache-2.0"


def test_refuses_to_make_private_repository_public(world: World) -> None:
    run = world.run(publish={"visibility": "public"})
    world.hub.add(REPO, {}, private=True)
    with pytest.raises(PublishError, match="is private, and llmtune never makes a repository public"):
        world.publish(run)


def test_refuses_delta_changed_since_training(world: World) -> None:
    run = world.run()
    file = run.delta / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\1\2\3")
    with pytest.raises(
        PublishError,
        match=r"adapter_model\.safetensors: was changed after `llmtune train`; run it again: llmtune train",
    ):
        world.publish(run)
    assert world.writes() == 0


def test_names_base_commit_of_training_after_base_moved(world: World) -> None:
    run = world.run(model={"revision": None})
    trained_on = read_json(run.delta / "base.json")["revision"]
    assert trained_on == world.hub.repos[BASE].commits[0][0]
    world.hub.commit(world.hub.repos[BASE], {**world.files(BASE), "notes.txt": b"moved"})
    world.publish(run)
    assert world.hub.repos[BASE].commits[-1][0] != trained_on
    assert json.loads(world.files()["adapter_config.json"])["revision"] == trained_on
    assert trained_on in world.files()["README.md"].decode()


def test_refuses_in_one_line(world: World) -> None:
    run = world.run()
    world.hub.faults = [Fault("POST", "/preupload/", 99, 403)]
    with pytest.raises(LlmtuneError) as caught:
        world.publish(run)
    assert re.fullmatch(r"[^\n]{20,400}", str(caught.value))


def test_published_recipe_loads_again(world: World) -> None:
    run = world.run()
    world.publish(run)
    file = world.folder / "published.yaml"
    file.write_bytes(world.files()["recipe.yaml"])
    again = recipe.load(file)
    assert again.method == run.recipe().method
    assert again.model.revision == run.recipe().model.revision


def test_names_file_line_and_retry_for_a_mistake_of_the_recipe(world: World) -> None:
    run = world.run()
    text = run.recipe_file.read_text().replace(f"publish:\n  repo: {REPO}\n", "publish: null\n")
    run.recipe_file.write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.yaml:\d+: publish: .*try again with: llmtune publish ") as raised:
        world.publish(run)
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)


def test_names_file_line_and_retry_for_a_base_that_is_gone(world: World) -> None:
    run = world.run(model={"base": "package:llm-nothing"})
    with pytest.raises(
        MachineError, match=r"recipe\.yaml:\d+: model\.base: .*try again with: llmtune publish "
    ) as raised:
        world.publish(run)
    assert raised.value.exit_code == 3


def test_dry_run_across_disks_shows_weights_by_a_link(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    run = world.run()
    monkeypatch.setattr(os, "link", refuse)
    for _ in range(2):  # the second one replaces the first, and leaves what its links lead to
        step_module.preview(run)
    weights = run.path / "publish" / "adapter_model.safetensors"
    assert weights.is_symlink()
    assert weights.read_bytes() == (run.delta / weights.name).read_bytes()


def test_runs_of_a_comparison_share_one_private_collection(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    section = {"repo": REPO, "collection": "Rate plans", "visibility": "public"}
    run = world.run(publish=section)
    step_module.preview(run)
    assert "would go to me/tuned (public) into the collection 'Rate plans'; nothing was sent" in capsys.readouterr().out
    assert world.hub.collections == {}
    preflight(run.recipe())
    (collection,) = world.hub.collections.values()
    assert (collection.owner, collection.title, collection.private, collection.items) == ("me", "Rate plans", True, [])
    facts = world.publish(run)
    assert facts["collection"]["title"] == "Rate plans"
    assert facts["collection"]["url"].startswith(f"{world.address}/collections/me/rate-plans-")
    assert world.publish(run)["collection"] == facts["collection"]
    other = run.recipe().model_copy(update={"publish": run.recipe().publish.model_copy(update={"repo": "me/other"})})  # type: ignore[union-attr]
    world.publish(Run(run.path, other))
    assert world.hub.collections[next(iter(world.hub.collections))].items == [REPO, "me/other"]
    assert len(world.hub.collections) == 1


def test_refused_collection_is_told_before_training_and_after_the_upload(world: World) -> None:
    run = world.run(publish={"collection": "Rate plans"})
    world.hub.faults = [Fault("POST", "/api/collections", 9, 403)]
    with pytest.raises(PublishError, match=r"opening the collection 'Rate plans' for me/tuned: your token may not"):
        preflight(run.recipe())
    with pytest.raises(PublishError, match=r"the upload is complete, but opening the collection .* try again with"):
        world.publish(run)
    assert not run.done("publish")


def test_private_hub_is_named_wherever_a_reader_needs_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.run()
    facts = world.publish(run)
    card = world.files()["README.md"].decode()
    assert facts["url"] == f"{world.address}/{REPO}"
    assert f"set `HF_ENDPOINT={world.address}` first" in card
    assert "huggingface.co" not in card
    world.hub.faults = [Fault("GET", "/whoami", 99)]
    with pytest.raises(PublishError, match=rf"the connection to the Hub at {world.address} failed"):
        world.publish(run)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MachineError, match=rf"me/tuned on the Hub at {world.address} cannot be reached"):
        preflight(run.recipe())


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("hub.example.org", r"HF_ENDPOINT=hub\.example\.org is no address; write it as https://"),
        ("https://me:secret@hub.example.org", "HF_ENDPOINT holds a user name or password"),
    ],
)
def test_refuses_an_endpoint_that_is_no_address(
    world: World, monkeypatch: pytest.MonkeyPatch, endpoint: str, message: str
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with pytest.raises(PublishError, match=message) as raised:
        preflight(world.run().recipe())
    assert "secret" not in str(raised.value)


def test_exported_gguf_goes_along_until_it_changes(world: World) -> None:
    run = world.run()
    file = run.exported / "gguf" / "tuned-q8_0.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"GGUF" + bytes(range(256)))
    facts = {"file": file.name, "gap": 0.0123, "bound": 0.5, "equal": 19, "rows": 20}
    run.mark("export", [run.exported], forms={"gguf:q8_0": facts})
    world.publish(run)
    assert set(world.files()) == DELTA | {file.name}
    assert world.files()[file.name] == file.read_bytes()
    card = world.files()["README.md"].decode()
    assert "gives 19 of 20 greedy answers of the merged model, and logits that differ from its by up to 0.012" in card
    assert f"    hf download {REPO} {file.name} --local-dir .\n    llama-cli -m {file.name}\n" in card
    assert f"| `{file.name}` | 260 | `" in card
    file.write_bytes(b"GGUF" + bytes(range(255, -1, -1)))
    with pytest.raises(PublishError, match=r"q8_0\.gguf: was changed or removed after `llmtune export`; run it again"):
        world.publish(run)


NO_LLMTUNE = """
import json, sys, torch
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "llmtune":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, merged, out = sys.argv[1:]
load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
models = {"adapter": PeftModel.from_pretrained(load(base), adapter), "merged": load(merged)}
AutoTokenizer.from_pretrained(merged)
with torch.inference_mode():
    torch.save({name: model(input_ids=torch.arange(3, 40)[None]).logits for name, model in models.items()}, out)
assert "llmtune" not in sys.modules
"""


@pytest.mark.slow
def test_process_without_llmtune_loads_what_a_dry_run_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.reload_here(monkeypatch)
    publish, merging = {"repo": REPO}, {"dtype": "float32"}
    tensors = runs.trained(tmp_path, {"kind": "full", "lr": 1e-3}, publish=publish, merge=merging)
    merge(tensors)
    base = tensors.recipe().model.base
    adapter = runs.trained(tmp_path / "lora", base=base, publish=publish)
    facts = read_json(adapter.delta / "base.json")
    (adapter.delta / "base.json").write_text(json.dumps({**facts, "hub_id": "acme/tiny"}))
    adapter.mark("train", [adapter.delta])
    monkeypatch.setattr(step_module, "_check_base", lambda *_: None)  # its base lies in a folder
    folders = [step_module.preview(run)["folder"] for run in (adapter, tensors)]
    words = [sys.executable, "-I", "-c", NO_LLMTUNE, base, *folders, str(tmp_path / "logits.pt")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.equal(logits["adapter"], tuned_logits(adapter))
    assert (logits["merged"] - tuned_logits(tensors)).abs().max() <= 1e-4
