"""The rows of the sources that a recipe names."""

from llmtune.data.row import Row
from llmtune.data.rows import Form, read
from llmtune.recipe.data import Data


def training_rows(data: Data) -> list[Row]:
    """Read the training rows of a recipe's data section; raises RecipeError at the first bad one."""
    form = Form.of(data)
    return [row for part in data.sources("train") for row in read(part.source, "train", form)]
