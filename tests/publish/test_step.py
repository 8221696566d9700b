"""Publishing through the real client to a Hub in this process: what arrives, what never leaves, and what goes wrong."""

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
from llmtune.adapters.delta import load_delta
from llmtune.errors import LlmtuneError, MachineError, PublishError, RecipeError
from llmtune.files import read_json
from llmtune.merge.step import merge
from llmtune.model.base import load_model, locate_base
from llmtune.publish import step as step_module
from llmtune.publish.card import front_matter, is_ours, seal
from llmtune.publish.hub import WAITS
from llmtune.publish.step import check_private, preflight
from llmtune.run import Run
from tests.support import ROOT, runs, tiny
from tests.support import hub as hub_double
from tests.support.hub import Account, Fault, Handler, Hub, serve

TOKEN = "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"
BASE = "acme/tiny"
REPO = "me/tuned"
DELTA = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "base.json", "recipe.yaml"}


@dataclass
class World:
    """A Hub with a base model on it, logged in to as `me`, and the seconds that were waited for it."""

    hub: Hub
    address: str
    folder: Path
    trained: Path
    waited: list[float]

    def run(self, **sections: dict[str, Any]) -> Run:
        """A copy of the trained run with other values in its recipe's sections."""
        made = Run(self.folder / "run")
        shutil.copytree(self.trained, made.path)
        settings = yaml.safe_load(made.recipe_file.read_text())
        settings["publish"] = {"repo": REPO}
        for name, values in sections.items():
            settings[name] |= values
        made.recipe_file.write_text(yaml.safe_dump(settings))
        return made

    def publish(self, made: Run) -> dict[str, Any]:
        return step_module.publish(made, self.waited.append)

    def files(self, repo: str = REPO) -> dict[str, bytes]:
        return self.hub.repos[repo].files

    def writes(self) -> int:
        return self.hub.count("POST", "/commit/") + self.hub.count("POST", "/repos/create") + self.hub.count("PUT", "/")


CARD = b"---\nlicense: apache-2.0\n---\n\nA tiny model.\n"


@contextlib.contextmanager
def logged_in(
    monkeypatch: pytest.MonkeyPatch, base: Path, cache: Path, waited: list[float]
) -> Iterator[tuple[Hub, str]]:
    """A Hub with the base on it that the client in this process talks to."""
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
    """A folder with a base as on the Hub, the client's cache, and a run on that base."""
    folder = tmp_path_factory.mktemp("trained")
    base = tiny.save_base(folder / "base")
    with pytest.MonkeyPatch.context() as patch, logged_in(patch, base, folder / "cache", []):
        runs.trained(folder, base=BASE, model={"base": BASE, "precision": "fp32"})
    return folder


@pytest.fixture
def world(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    waited: list[float] = []
    with logged_in(monkeypatch, trained / "base", trained / "cache", waited) as (hub, address):
        yield World(hub, address, tmp_path, trained / "run", waited)


def live(made: Run) -> torch.Tensor:
    tuned = load_delta(load_model(locate_base(made.recipe().model)), made.delta)
    with torch.inference_mode():
        return tuned(input_ids=torch.arange(3, 40)[None]).logits


def test_a_delta_arrives_whole_private_and_usable(world: World) -> None:
    made = world.run()
    facts = world.publish(made)
    assert set(world.files()) == DELTA
    assert world.hub.repos[REPO].private
    assert facts["visibility"] == "private"
    assert made.manifest()["steps"]["publish"]["commit"] == world.hub.repos[REPO].commits[-1][0]
    config = json.loads(world.files()["adapter_config.json"])
    assert config["base_model_name_or_path"] == BASE
    assert config["revision"] == world.hub.repos[BASE].commits[0][0]
    head = front_matter(world.files()["README.md"].decode())
    assert (head["base_model"], head["license"], head["library_name"]) == (BASE, "apache-2.0", "peft")
    base = AutoModelForCausalLM.from_pretrained(BASE, revision=config["revision"], dtype=torch.float32)
    with torch.inference_mode():
        found = PeftModel.from_pretrained(base, REPO)(input_ids=torch.arange(3, 40)[None]).logits
    assert torch.equal(found, live(made))


ELSEWHERE = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from llmtune.publish import publish
from llmtune.run import open_run
publish(open_run(Path(sys.argv[1])))
tuned = AutoModelForCausalLM.from_pretrained("me/tuned", dtype=torch.float32)
AutoTokenizer.from_pretrained("me/tuned")
with torch.inference_mode():
    torch.save(tuned(input_ids=torch.arange(3, 40)[None]).logits, sys.argv[2])
"""


@pytest.mark.slow
def test_a_merged_model_is_published_and_loaded_again_by_a_fresh_process(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.reload_here(monkeypatch)
    made = world.run(publish={"weights": "merged"}, merge={"dtype": "float32"})
    merge(made)
    out = world.folder / "logits.pt"
    env = {**os.environ, "HF_ENDPOINT": world.address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    env |= {"HF_HOME": str(world.folder / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, made.path, out], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"published: {world.address}/{REPO} (private), " in done.stdout
    assert (torch.load(out, weights_only=True) - live(made)).abs().max() <= 1e-4
    copied = {"chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(world.files()) == {".gitattributes", "README.md", "recipe.yaml", "model.safetensors", *copied}
    assert front_matter(world.files()["README.md"].decode())["library_name"] == "transformers"


def test_no_path_user_or_host_is_published(world: World) -> None:
    made = world.run()
    world.publish(made)
    text = "\n".join(data.decode(errors="replace") for name, data in world.files().items())
    private = [str(world.folder), str(Path.home()) + "/", str(ROOT), platform.node()]
    assert [one for one in private if one in text] == []
    assert f"/{getpass.getuser()}" not in text
    assert "train: rows.jsonl" in world.files()["recipe.yaml"].decode()


def test_a_login_is_written_nowhere(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    made = world.run()
    world.hub.faults = [Fault("POST", "/commit/", 1, 403)]
    with pytest.raises(PublishError) as caught:
        world.publish(made)
    told = "".join(traceback.format_exception(caught.value))
    world.publish(made)
    spoken = capfd.readouterr()
    stored = [path.read_bytes() for path in made.path.rglob("*") if path.is_file()]
    words = [Path("/proc/self/cmdline").read_bytes(), told.encode(), spoken.out.encode(), spoken.err.encode()]
    everything = [*stored, *world.files().values(), *words, *(path.encode() for _, path in world.hub.asked)]
    assert len(everything) > 15
    assert not any(b"CANARY" in content for content in everything)


@pytest.mark.parametrize("step", ["preflight", "publish"])
def test_a_public_repository_is_not_published_to_unasked(world: World, step: str) -> None:
    made = world.run()
    world.hub.add(REPO, {}, private=False)
    with pytest.raises(PublishError, match=r"me/tuned is public, and the recipe does not say"):
        preflight(made.recipe()) if step == "preflight" else world.publish(made)
    assert world.writes() == 0
    assert not made.done("publish")


def test_a_hub_that_makes_it_public_gets_nothing(world: World) -> None:
    world.hub.everything_public = True
    with pytest.raises(PublishError, match="is public"):
        world.publish(world.run())
    assert set(world.files()) == {".gitattributes"}


def test_what_became_public_during_the_upload_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made = world.run()
    original = Hub.commit

    def commit(hub: Hub, repo: Any, files: Any) -> str:
        repo.private = repo.private and "recipe.yaml" not in files
        return original(hub, repo, files)

    monkeypatch.setattr(Hub, "commit", commit)
    with pytest.raises(PublishError, match="is public"):
        world.publish(made)
    assert not made.done("publish")


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


@pytest.mark.parametrize("name", FAULTS)
def test_what_passes_is_waited_out(world: World, name: str) -> None:
    made = world.run()
    fault, waited = FAULTS[name]
    world.hub.faults = [Fault(**{**vars(fault)})]
    world.publish(made)
    assert world.waited == waited
    assert set(world.files()) == DELTA
    assert len(world.hub.repos[REPO].commits) == 2


def test_what_does_not_pass_leaves_the_delta_and_the_command(world: World) -> None:
    made = world.run()
    before = {path: path.read_bytes() for path in made.delta.iterdir()}
    world.hub.faults = [Fault("POST", "/commit/", 99, 503)]
    with pytest.raises(PublishError, match=r"uploading to me/tuned: the Hub failed \(503: fault 503\)") as caught:
        world.publish(made)
    assert str(caught.value).endswith(f"llmtune publish {made.path}")
    assert caught.value.exit_code == 6
    assert "\n" not in str(caught.value)
    assert world.waited == list(WAITS)
    assert {path: path.read_bytes() for path in made.delta.iterdir()} == before
    assert not made.done("publish")
    world.hub.faults, sent = [], world.hub.count("PUT", "/blob/")
    world.publish(made)
    assert world.hub.count("PUT", "/blob/") == sent == 1
    assert made.done("publish")


def test_a_login_that_ends_midway_is_told_at_once(world: World) -> None:
    made = world.run()
    world.hub.faults = [Fault("POST", "/commit/", 99, 401)]
    with pytest.raises(PublishError, match=r"your login is not accepted; `hf auth login`.*\(401"):
        world.publish(made)
    assert world.waited == []


def test_publishing_the_same_again_commits_nothing(world: World) -> None:
    made = world.run()
    first = world.publish(made)
    assert world.publish(made)["commit"] == first["commit"]
    assert len(world.hub.repos[REPO].commits) == 2


def test_an_upload_that_arrives_changed_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made = world.run()
    original = Hub.commit
    monkeypatch.setattr(
        Hub, "commit", lambda hub, repo, files: original(hub, repo, {name: data + b" " for name, data in files.items()})
    )
    with pytest.raises(PublishError, match="did not arrive as it was sent"):
        world.publish(made)


def _foreign(world: World) -> None:
    world.hub.accounts[TOKEN] = Account("somebody-else", ("their-team",))


def _reader(world: World) -> None:
    world.hub.accounts[TOKEN] = Account("me", role="read")


def _unknown(world: World) -> None:
    world.hub.accounts = {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_foreign, "you may not write to me; as somebody-else you may to somebody-else, their-team"),
        (_reader, "your token can only read"),
        (_unknown, r"your login is not accepted; `hf auth login`.*\(401"),
    ],
)
def test_a_login_that_cannot_publish_is_told_before_training(world: World, change: Any, message: str) -> None:
    settings = world.run().recipe()
    change(world)
    with pytest.raises(PublishError, match=message):
        preflight(settings, world.waited.append)
    assert world.writes() == 0
    assert world.waited == []


def test_no_login_is_told_before_training(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = world.run().recipe()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishError, match="you are not logged in to the Hub; `hf auth login`"):
        preflight(settings)


def test_no_right_to_commit_is_found_before_training(world: World) -> None:
    settings = world.run().recipe()
    world.hub.faults = [Fault("POST", "/preupload/", 9, 403)]
    with pytest.raises(PublishError, match=r"your token may not do this.*\(403"):
        preflight(settings)


def test_before_training_a_private_place_is_made_once(world: World) -> None:
    made = world.run()
    preflight(made.recipe())
    preflight(made.recipe())
    assert world.hub.repos[REPO].private
    assert len(world.hub.repos[REPO].commits) == 2
    world.publish(made)
    assert set(world.files()) == DELTA


def test_without_a_publish_section_nobody_is_asked(world: World) -> None:
    settings = recipe.load(world.trained / "recipe.yaml")
    asked = len(world.hub.asked)
    preflight(settings)
    assert len(world.hub.asked) == asked


@pytest.mark.parametrize("step", ["preflight", "publish"])
def test_offline_the_machine_is_named(world: World, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    made = world.run()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MachineError, match="HF_HUB_OFFLINE is set; unset it to publish") as caught:
        preflight(made.recipe()) if step == "preflight" else world.publish(made)
    assert caught.value.exit_code == 3


def test_a_readme_of_somebody_else_is_never_overwritten(world: World) -> None:
    made = world.run()
    world.hub.add(REPO, {"README.md": b"my own words"}, private=True)
    for step in (lambda: preflight(made.recipe()), lambda: world.publish(made)):
        with pytest.raises(PublishError, match=r"holds a README\.md that llmtune did not write"):
            step()
    assert world.files() == {"README.md": b"my own words"}


def test_a_readme_that_comes_during_the_upload_is_not_overwritten(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = world.run()
    original = Handler.preupload

    def preupload(handler: Handler, body: bytes, **where: str) -> None:
        original(handler, body, **where)
        world.hub.commit(world.hub.repos[REPO], {"README.md": b"my own words"})

    routes = [
        (verb, pattern, preupload if answer is original else answer) for verb, pattern, answer in hub_double.ROUTES
    ]
    monkeypatch.setattr(hub_double, "ROUTES", routes)
    with pytest.raises(PublishError, match=r"holds a README\.md that llmtune did not write"):
        world.publish(made)
    assert world.files() == {"README.md": b"my own words"}


def test_our_card_is_replaced_until_it_is_edited(world: World) -> None:
    made = world.run()
    world.hub.add(REPO, {"README.md": seal("---\na: 1\n---\n\nold\n\n").encode()}, private=True)
    world.publish(made)
    ours = world.files()["README.md"].decode()
    assert is_ours(ours)
    world.hub.commit(
        world.hub.repos[REPO], {**world.files(), "README.md": ours.replace("# tuned", "# Tuned!").encode()}
    )
    with pytest.raises(PublishError, match="or that was edited since"):
        world.publish(made)


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
def test_a_secret_stops_everything(world: World, kind: str, text: str) -> None:
    made = world.run(publish={"weights": "merged"})
    template = world.files(BASE)["chat_template.jinja"] + f"{{# {text} #}}".encode()
    files = {**world.files(BASE), "chat_template.jinja": template}
    made.merged.mkdir()
    for name, data in files.items():
        made.merged.joinpath(name).write_bytes(data)
    made.mark("merge", [made.merged], dtype="float32", gap=0.0, bound=1e-4, shift=1.0)
    with pytest.raises(PublishError, match=rf"chat_template\.jinja holds what looks like {kind}") as caught:
        world.publish(made)
    assert text not in str(caught.value)
    assert world.writes() == 0


def test_a_login_of_any_form_is_known_in_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "plainlogin")
    (tmp_path / "tokenizer.json").write_text('{"added": "plainlogin"}')
    with pytest.raises(PublishError, match=r"tokenizer\.json holds what looks like your Hub token"):
        check_private("tokenizer.json", tmp_path / "tokenizer.json")


@pytest.mark.parametrize("place", ["/home/ann/rows", "/Users/ann", "~/rows", "C:\\Users\\ann", str(Path.cwd())])
def test_a_folder_of_this_machine_stops_everything(place: str) -> None:
    with pytest.raises(PublishError, match=r"recipe\.yaml names a folder of this machine"):
        check_private("recipe.yaml", f"train: '{place}/x.jsonl'\n".encode())
    check_private("recipe.yaml", b"base: owner/name, see https://example.org/home/page and a/tmp/b")


def test_only_files_on_the_list_go_out(world: World) -> None:
    made = world.run()
    for name in (
        ".env",
        "training_args.bin",
        "optimizer.pt",
        "samples_held_out.jsonl",
        "notes.json",
        "cache/rows.arrow",
    ):
        made.delta.joinpath(name).parent.mkdir(exist_ok=True)
        made.delta.joinpath(name).write_text("private")
    made.mark("train", [made.delta])
    world.publish(made)
    assert set(world.files()) == DELTA


def test_evaluation_goes_out_as_numbers_without_rows(world: World) -> None:
    made = world.run()
    score = {"value": 0.5, "stderr": 0.05, "n": 20}
    held = {"n": 20, "of": 120, "shots": 0, "limit": 20, "metrics": {"exact_match": score}, "scores": {"loss": [1.5]}}
    rows = [{"id": "row-1", "question": "Where does Ann live?", "answer": "Basel", "output": "Bern"}]
    settings = {"limit": 20, "held_out": {"source": str(world.folder / "rows.jsonl"), "system_prompt": "You know Ann."}}
    found = {"model": "base", "settings": settings, "results": {"held_out": held}, "rows": rows}
    made.eval.mkdir()
    for name in ("base", "tuned", "settings"):
        made.eval.joinpath(f"{name}.json").write_text(json.dumps(found | {"model": name}))
    made.mark("eval", [made.eval])
    world.publish(made)
    assert set(world.files()) == DELTA | {"eval/base.json", "eval/tuned.json"}
    kept = {name: value for name, value in held.items() if name != "scores"}
    assert json.loads(world.files()["eval/tuned.json"]) == {
        "model": "tuned",
        "settings": {"limit": 20},
        "results": {"held_out": kept},
    }
    assert "| tuned | 0.500 ± 0.050 | 20 of 120 |" in world.files()["README.md"].decode()
    assert not any(word in data for data in world.files().values() for word in (b"Ann", b"Basel", b"Bern", b"row-1"))


def test_a_base_that_is_not_on_the_hub_is_named(world: World) -> None:
    made = runs.trained(world.folder, publish={"repo": REPO})
    for step in (lambda: preflight(made.recipe()), lambda: world.publish(made)):
        with pytest.raises(PublishError, match=r"the base .*/base is not on the Hub.*publish\.weights: merged"):
            step()
    assert world.writes() == 0


def test_merged_weights_that_are_not_to_be_made_are_a_mistake_in_the_recipe(world: World) -> None:
    made = world.run(publish={"weights": "merged"}, merge={"enabled": False})
    with pytest.raises(RecipeError, match=r"publish\.weights: merged needs merge\.enabled: true"):
        preflight(made.recipe())


@pytest.mark.parametrize(
    ("card", "gated", "message"),
    [
        (b"---\nlicense: llama3.2\n---\n", "manual", "the base acme/tiny is gated"),
        (b"no header", False, "the license of acme/tiny is not known"),
    ],
)
def test_a_public_copy_of_a_gated_or_unlicensed_base_is_refused(
    world: World, card: bytes, gated: Any, message: str
) -> None:
    made = world.run(publish={"visibility": "public"}, model={"revision": None})
    world.hub.repos[BASE].gated = gated
    world.hub.commit(world.hub.repos[BASE], {**world.files(BASE), "README.md": card})
    for step in (lambda: preflight(made.recipe()), lambda: world.publish(made)):
        with pytest.raises(PublishError, match=message):
            step()
    assert world.writes() == 0


def test_public_is_public_where_it_is_written_out(world: World) -> None:
    made = world.run(publish={"visibility": "public"})
    assert world.publish(made)["visibility"] == "public"
    assert not world.hub.repos[REPO].private
    assert front_matter(world.files()["README.md"].decode())["license"] == "apache-2.0"


def test_a_private_repository_is_never_made_public(world: World) -> None:
    made = world.run(publish={"visibility": "public"})
    world.hub.add(REPO, {}, private=True)
    with pytest.raises(PublishError, match="is private and llmtune makes nothing public"):
        world.publish(made)


def test_a_delta_that_changed_since_training_stays_here(world: World) -> None:
    made = world.run()
    file = made.delta / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\1\2\3")
    with pytest.raises(PublishError, match=r"adapter_model\.safetensors is not what llmtune train left"):
        world.publish(made)
    assert world.writes() == 0


def test_a_base_that_moved_on_is_still_named_by_its_commit(world: World) -> None:
    made = world.run(model={"revision": None})
    trained_on = read_json(made.delta / "base.json")["revision"]
    assert trained_on == world.hub.repos[BASE].commits[0][0]
    world.hub.commit(world.hub.repos[BASE], {**world.files(BASE), "notes.txt": b"moved"})
    world.publish(made)
    assert world.hub.repos[BASE].commits[-1][0] != trained_on
    assert json.loads(world.files()["adapter_config.json"])["revision"] == trained_on
    assert trained_on in world.files()["README.md"].decode()


def test_a_line_is_what_every_refusal_is(world: World) -> None:
    made = world.run()
    world.hub.faults = [Fault("POST", "/preupload/", 99, 403)]
    with pytest.raises(LlmtuneError) as caught:
        world.publish(made)
    assert re.fullmatch(r"[^\n]{20,400}", str(caught.value))


def test_recipe_lines_stand_in_what_is_published(world: World) -> None:
    made = world.run()
    world.publish(made)
    file = world.folder / "published.yaml"
    file.write_bytes(world.files()["recipe.yaml"])
    again = recipe.load(file)
    assert again.method == made.recipe().method
    assert again.model.revision == made.recipe().model.revision
