"""`python -m llmtune.comparing.baselines.asked OUT`: asks a comparison's base, once, before its arms."""

import time
from pathlib import Path

from llmtune.comparing.folder import Folder
from llmtune.errors import Interrupted, ProofError
from llmtune.files import write_json
from llmtune.launch.faults import told_in_one_line
from llmtune.run import Run

START = time.monotonic()


def main(words: list[str], began: float | None = None) -> int:
    """Ask the base of the comparison in a folder, and keep its results there; every arm reads the same answers.

    `began` is when the process began.
    """
    from llmtune.evaluation.step import ask_base

    began = began or time.monotonic()
    folder = Folder(Path(words[0]))
    try:
        with told_in_one_line(ProofError, folder.path):
            evaluation = ask_base(Run(folder.path / "base", folder.recipe_of(None)))
    except KeyboardInterrupt:
        return Interrupted.exit_code
    seconds = time.monotonic() - began
    write_json(folder.base_file, {"asking": folder.asking(), "seconds": seconds, "results": evaluation["results"]})
    return 0


if __name__ == "__main__":
    from llmtune.launch.process import serve_command
    from llmtune.working import importing

    def _main(words: list[str]) -> int:
        with importing():
            import llmtune.evaluation.step  # noqa: F401
        return main(words, START)

    serve_command(_main)
