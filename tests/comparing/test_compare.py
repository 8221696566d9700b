"""compare() from end to end on a tiny base."""

from pathlib import Path

import pytest

from llmtune.arms.stored import read_comparison
from llmtune.comparing.compare import compare


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_compares_arms_from_end_to_end(tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    compare(recipe, ["lora", "frozen"], minutes=0.1, seeds=1, out=out)
    comparison = read_comparison(out)
    for arm in comparison["arms"]:
        print(arm["name"], arm["status"], arm.get("reason"), arm.get("minutes"), arm.get("lr"), arm.get("search"))
        for s in arm.get("seeds", []):
            print(s)
    for b in comparison["baselines"]:
        print({k: v for k, v in b.items() if k != "rows"})
    print(comparison["verdict"])
    raise SystemExit(1)
