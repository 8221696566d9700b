"""What llmtune uses of other libraries' internals is in the ledger, with the test that guards it."""

import ast
import textwrap

import pytest
import torch
from transformers import Trainer

from tests.support import ROOT, internals

FOUND = {
    "from lib._hidden import name": "import lib._hidden",
    "from lib import _name": "import lib._name",
    "import lib._hidden": "import lib._hidden",
    "from transformers.core_model_loading import WeightRenaming": "import transformers.core_model_loading",
    "def f(model): return model.config._attn_implementation": "._attn_implementation",
    "import torch\ntorch._softmax(0)": "torch._softmax",
    "import lib.utils\nlib.utils.env = 1": "lib.utils.env =",
    "from lib import TABLE\nTABLE['sdpa'] = 1": "TABLE['sdpa'] =",
    "def f(model): model.is_loaded = True": ".is_loaded =",
    "def f(model): del model.peft_config": ".peft_config =",
    "def f(tensor): tensor.data, x = 1, 2": ".data =",
    "def f(layer): vars(layer)['forward'] = 1": "vars()['forward']",
    "def f(layer): vars(layer).pop('forward', None)": "vars()['forward']",
    "def f(layer, key): layer.__dict__[key] = 1": "vars()[]",
    "def f(layer, name): setattr(layer, name, 1)": "setattr()",
    "from lib import Kind\nsetattr(Kind, 'A', 1)": "setattr(Kind)",
    "from lib import register_method\nregister_method('a')": "register_method()",
    "from lib import Interface\nInterface.register('a', 1)": "Interface.register()",
}
PLAIN = """
from transformers import Trainer
import os
class Own:
    _kept = None
    def _step(self, other):
        self.count, self._kept = 1, other._kept
        self._step(other).count = 2
        vars(self)["forward"] = 1
        os._exit(0)
def f(ctx, model):
    ctx.scale = 1
    return getattr(model, "eps"), vars(model).get("forward"), model.__class__
"""


class Planted(Trainer):
    """A trainer that reaches into its parent in each way there is."""

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        self.model_accepts_loss_kwargs = True
        self._created_lr_scheduler = True
        self._own = 1
        super()._load_rng_state(None)


def test_ledger_lists_every_use_and_no_other() -> None:
    listed = [(use, row["where"]) for row in internals.ledger()["row"] for use in row["uses"]]
    assert len(listed) == len(dict(listed)), "a use is listed twice"
    used = internals.uses()
    assert sorted(set(used) - set(dict(listed))) == [], "not in tests/internals.toml"
    assert sorted(set(dict(listed)) - set(used)) == [], "listed, but not used"


def test_ledger_names_the_packages_of_every_use() -> None:
    used = internals.uses()
    for row in internals.ledger()["row"]:
        assert row["where"] == sorted(set().union(*(used[use] for use in row["uses"]))), row["uses"]


def test_every_row_names_a_test_that_exists() -> None:
    for row in internals.ledger()["row"]:
        file, _, name = row["test"].partition("::")
        tree = ast.parse((ROOT / file).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, row["test"]


def test_every_documented_use_is_used() -> None:
    assert sorted(set(internals.ledger()["documented"]) - set(internals.all_uses())) == []


def test_page_is_written_from_the_ledger() -> None:
    assert internals.PAGE.read_text() == internals.page(), "run: python -m tests.support.internals"


@pytest.mark.parametrize("source", FOUND)
def test_finds_each_form_of_use(source: str) -> None:
    assert FOUND[source] in list(internals.written(ast.parse(source), own=set()))


def test_finds_what_a_subclass_overrides_uses_and_sets() -> None:
    names = ["_created_lr_scheduler", "_load_rng_state", "_save_checkpoint", "model_accepts_loss_kwargs ="]
    assert list(internals.inherited(Planted)) == [f"Trainer.{name}" for name in names]


def test_leaves_alone_what_is_no_use() -> None:
    tree = ast.parse(textwrap.dedent(PLAIN))
    assert list(internals.written(tree, internals.own_names([tree]))) == []
