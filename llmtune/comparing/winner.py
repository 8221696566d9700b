"""winner.yaml: the recipe of the arm that won, which runs as it is."""

from collections.abc import Sequence
from typing import Any

import yaml

from llmtune.arms.record import ArmRecord, Comparison
from llmtune.comparing.entrants.search import best_factor
from llmtune.comparing.entrants.session import scaled
from llmtune.comparing.folder import Folder
from llmtune.errors import one_line
from llmtune.files import write_text
from llmtune.plan.stages import Facts
from llmtune.recipe.sections import Recipe
from llmtune.recipe.standing import written

_WIDTH = 110
"""Characters of a comment's line."""


def write_winner(folder: Folder, comparison: Comparison) -> bool:
    """Write the recipe of the arm that the verdict names, at all rows; gives whether there is one."""
    verdict = comparison.get("verdict", {})
    wins = (verdict.get("winner"), verdict.get("size"))
    record = next((arm for arm in comparison["arms"] if (arm["name"], arm["size"]) == wins), None)
    if record is None:
        folder.winner.unlink(missing_ok=True)
        return False
    text = yaml.safe_dump(_values(folder, comparison, record), sort_keys=False, allow_unicode=True)
    write_text(folder.winner, "".join(f"# {line}\n" for line in _comment(folder, verdict["sentences"])) + text)
    return True


def _values(folder: Folder, comparison: Comparison, record: ArmRecord) -> dict[str, Any]:
    recipe = Recipe.load(folder.recipe_file, record["set"])
    base = comparison["base"]
    facts = Facts(base["blocks"], base["hidden"], base["parameters"])
    method = scaled(recipe.method.resolved(facts), best_factor(record["search"]))
    values = written(recipe)
    values["method"] = method.model_dump(mode="json", exclude_unset=True)
    if comparison["equal"] == "minutes":
        values.setdefault("train", {})["max_steps"] = record["seeds"][0]["steps"]
    return values


def _comment(folder: Folder, sentences: Sequence[str]) -> list[str]:
    """Why it won, in lines of a comment."""
    sentences = [one_line(sentence, 600) for sentence in sentences]
    words = f"The recipe that won the comparison in {folder.path.name}. {' '.join(sentences)}".split()
    lines, line = [], ""
    for word in words:
        if line and len(line) + len(word) >= _WIDTH:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line, "Run it: llmtune run winner.yaml"]
