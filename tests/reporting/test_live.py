"""The live page: it shows what is new, runs only its own scripts, and answers this machine alone."""

import http.client
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtune.errors import MachineError, RecipeError
from llmtune.plan.distances import Everything
from llmtune.reporting.document import policy
from llmtune.reporting.live.server import HOST, open_server
from llmtune.run import Run
from tests.support import pages

RATES = {"0": 1e-3}


@pytest.fixture
def live(tmp_path: Path) -> Iterator[tuple[Run, int]]:
    """A run with a log of 10 steps, and the port at which its page is served."""
    run = pages.empty(tmp_path)
    pages.with_log(run, [pages.stage(0, 40, Everything(), RATES)], pages.falling(RATES, 10))
    with open_server(run.path) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield run, server.server_port
        server.shutdown()


def get(port: int, path: str = "/", host: str | None = None) -> tuple[int, str, http.client.HTTPMessage]:
    """Status, text and headers of an answer."""
    connection = http.client.HTTPConnection(HOST, port, timeout=20)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers


def test_shows_new_steps_of_a_run(live: tuple[Run, int]) -> None:
    run, port = live
    first, version = get(port)[1], get(port, "/version")[1]
    assert f'<html data-version="{version}" ' in first
    assert get(port)[1] == first
    with run.log_file.open("a") as log:
        log.write(json.dumps(pages.falling(RATES, 11)[-1] | {"step": 11, "loss": 0.123456}) + "\n")
    assert get(port, "/version")[1] != version
    assert "0.123" in get(port)[1].replace(first, "")
    run.plan_file.write_text("{")
    assert "<h1" in get(port)[1]


def test_runs_its_own_scripts_and_asks_its_own_server_alone(live: tuple[Run, int]) -> None:
    text = get(live[1])[1]
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    content = next(given["content"] for _, given in pages.Page(text).elements if given.get("http-equiv"))
    hashes = [re.findall(r"script-src ('sha256-[^']+')", policy(script))[0] for script in scripts]
    assert f"script-src {hashes[1]} {hashes[0]};" in content
    assert "connect-src 'self';" in content
    assert "default-src 'none';" in content


def test_answers_this_machine_alone(live: tuple[Run, int]) -> None:
    run, port = live
    assert get(port, host="evil.example")[0] == 403
    assert get(port, "/version", host=f"evil.example:{port}")[0] == 403
    assert get(port, host=f"localhost:{port}")[0] == 200
    assert [get(port, path)[0] for path in ("/recipe.yaml", "/../", "/index.html", "/version?x")] == [404] * 4
    assert get(port)[2]["Cache-Control"] == "no-store"
    with pytest.raises(MachineError, match=f"--port {port}: cannot be used"):
        open_server(run.path, port)


def test_refuses_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="holds no run"):
        open_server(tmp_path)
