"""Importing llmtune changes nothing of the process; its commands and trainings print no library's warnings."""

import os
import subprocess
import sys

import pytest

from tests.support import ROOT

STATE = """
import json, logging, sys, warnings
import accelerate, bitsandbytes, datasets, huggingface_hub, lm_eval, peft, torch, transformers, trl
import trl.trainer.sft_trainer, lm_eval.models.huggingface, lm_eval.tasks
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging as transformers_logging
def state():
    names = [None, *sorted(logging.root.manager.loggerDict)]
    levels = {str(name): logging.getLogger(name).level for name in names if not str(name).startswith("llmtune")}
    bars = [transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()]
    filters = [str(one) for one in warnings.filters]
    return {"levels": levels, "filters": filters, "bars": bars, "disabled": logging.root.manager.disable}
"""
COMPARE = """
before, environment = state(), dict(os.environ)
import llmtune, llmtune.cli, llmtune.cli.chat, llmtune.training.loop
import llmtune.evaluation.step, llmtune.merging.step, llmtune.publishing.step
after = state()
after["levels"] = {name: level for name, level in after["levels"].items() if name in before["levels"]}
assert after == before, {key: (before[key], after[key]) for key in before if before[key] != after[key]}
assert dict(os.environ) == environment
"""
QUIET = """
from llmtune.launch.quiet import quiet_libraries
quiet_libraries()
import logging, warnings
import bitsandbytes, transformers
from transformers.utils import logging as transformers_logging
assert transformers_logging.get_verbosity() == logging.ERROR
assert not transformers_logging.is_progress_bar_enabled()
assert logging.getLogger("bitsandbytes.nn").getEffectiveLevel() == logging.ERROR
warnings.warn_explicit("soon", FutureWarning, "peft.py", 1, module="peft.tuners")
"""
SERVE = """
import os
from llmtune.launch.process import serve_command
def train(words):
    print(os.environ.get("TRANSFORMERS_VERBOSITY"))
    return 0
serve_command(train)
"""
LAUNCH = """
import logging, runpy
import accelerate.commands.launch as launcher
def main():
    print("logged" if logging.getLogger("torch").isEnabledFor(logging.CRITICAL) else "hidden")
launcher.main = main
runpy.run_module("llmtune.launch.accelerate_entry", run_name="__main__")
"""


def fresh(code: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that runs `code`, with `more` variables and without what this process has set for quiet."""
    quiet = ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
    env = {name: value for name, value in os.environ.items() if name not in quiet} | {"PYTHONPATH": str(ROOT)} | more
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


@pytest.mark.slow
def test_importing_llmtune_changes_no_logging_warnings_or_progress_bars() -> None:
    run = fresh(STATE + "import os\n" + COMPARE)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("first", ["", "import transformers\n"], ids=["before", "after"])
def test_prints_nothing_of_libraries_in_a_quiet_process(first: str) -> None:
    run = fresh(first + QUIET)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("module", ["llmtune", "llmtune.train"])
def test_silences_libraries_at_every_entrance_before_importing_one(module: str) -> None:
    code = f"""
import runpy, sys
import llmtune.launch.quiet as quiet
def seen():
    print([name for name in ("torch", "transformers", "bitsandbytes") if name in sys.modules])
    sys.exit(7)
quiet.quiet_libraries = seen
sys.argv = ["llmtune", *{["check"] if module == "llmtune" else []}, "recipe.yaml"]
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""
    run = fresh(code)
    assert (run.returncode, run.stdout) == (7, "[]\n"), run.stderr


def test_shows_no_progress_bars_of_libraries() -> None:
    bar = "from llmtune.launch.quiet import quiet_libraries\nquiet_libraries()\nimport tqdm\nlist(tqdm.tqdm([1, 2]))"
    assert fresh(bar).stderr == ""


@pytest.mark.parametrize(("verbose", "printed"), [("0", "error"), ("1", "None")])
def test_verbose_reaches_the_process_that_trains(verbose: str, printed: str) -> None:
    run = fresh(SERVE, LLMTUNE_VERBOSE=verbose)
    assert (run.returncode, run.stdout) == (0, f"{printed}\n"), run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("verbose", "printed"), [("0", "hidden"), ("1", "logged")])
def test_verbose_reaches_the_launcher_of_several_processes(verbose: str, printed: str) -> None:
    run = fresh(LAUNCH, LLMTUNE_VERBOSE=verbose)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == printed
