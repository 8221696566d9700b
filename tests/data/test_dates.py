"""The day in prompts: a run keeps the one that it began on."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest

from llmtune import recipe as recipes
from llmtune.data.encoding import dates
from llmtune.training import prepare as preparation
from llmtune.training.prepare import prepare
from tests.support import tiny

LLAMA = """{%- if not date_string is defined %}{%- if strftime_now is defined %}
{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}{{- bos_token }}Today: {{ date_string }}\n{%- for m in messages %}<|{{ m.role }}|>{{ m.content }}
{{- eos_token if m.role == 'assistant' }}{%- endfor %}{%- if add_generation_prompt %}<|assistant|>{%- endif %}"""
FIXED = "{{ strftime_now('%Y-%m-%d') }}{%- for m in messages %}{{ m.content }}{%- endfor %}"


class Day(date):
    """A date class whose today a test chooses."""

    chosen = date(2026, 1, 31)

    @classmethod
    def today(cls) -> Any:
        return cls.chosen


def test_run_keeps_the_day_that_it_began_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.save_base(tmp_path / "base")
    (base / "chat_template.jinja").write_text(LLAMA)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sums(12))
    file = tiny.write_recipe(tmp_path / "r.yaml", base, rows)
    monkeypatch.setattr(preparation, "date", Day)
    run = prepare(recipes.load(file), tmp_path / "run", 0)
    assert run.recipe().data.template == {"date_string": "31 Jan 2026"}
    monkeypatch.setattr(Day, "chosen", date(2026, 2, 1))
    again = prepare(recipes.load(file), tmp_path / "run", 0)
    assert again.recipe().data.template == {"date_string": "31 Jan 2026"}
    data = {"train": str(rows), "template": {"date_string": "today"}}
    named = recipes.load(tiny.write_recipe(tmp_path / "n.yaml", base, rows, data=data))
    assert prepare(named, tmp_path / "other", 0).recipe().data.template == {"date_string": "today"}


def test_template_that_takes_no_day_is_told() -> None:
    assert dates.with_day(FIXED, {}, date(2026, 1, 31)) == {}
    assert dates.writes_day(FIXED, {})
    assert len(dates.day_notes(FIXED, {})) == 1
    assert dates.day_notes(LLAMA, {}) == dates.day_notes("{{ messages }}", {}) == []
