"""`python -m llmtune.comparing.worker OUT NAME`: one entrant's search, trainings and evaluations, in this process."""

import argparse
import time
from pathlib import Path

from llmtune.errors import Interrupted, LlmtuneError, MachineError, TrainingError

START = time.monotonic()


def main(words: list[str], began: float | None = None) -> int:
    """Bring the entrant that the words name to its end, or as far as a stop signal lets it; gives the exit code.

    An entrant that fails keeps its reason in arm.json: that is a result. `began` is when the process began.
    """
    from llmtune.comparing.entrants.entrant import ArmRun
    from llmtune.comparing.folder import Folder
    from llmtune.launch.ending import less_memory
    from llmtune.launch.faults import told_in_one_line

    options = _parser().parse_args(words)
    folder = Folder(options.out)
    run = ArmRun(folder, options.name, options.seconds, options.training, began or time.monotonic())
    try:
        with told_in_one_line(TrainingError, folder.arm(options.name), less_memory=lambda: less_memory(run.recipe)):
            run.go()
    except KeyboardInterrupt:
        run.keep()
        return Interrupted.exit_code
    except Interrupted as stop:
        run.keep()
        return stop.exit_code
    except LlmtuneError as error:
        if isinstance(error, MachineError) and "disk" in str(error):
            raise  # every other entrant would fail alike
        run.fail(str(error))
        print(f"llmtune: {error}", flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llmtune.comparing.worker")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--seconds", type=float, required=True, help="all that the entrant may take")
    parser.add_argument("--training", type=float, help="what each seed trains; its epochs where not given")
    return parser


if __name__ == "__main__":
    from llmtune.launch.process import serve_command
    from llmtune.working import importing

    def _main(words: list[str]) -> int:
        with importing():
            import llmtune.comparing.entrants.entrant  # noqa: F401
        return main(words, START)

    serve_command(_main)
