"""The command that writes a trained run for other programs."""

from llmtune import api
from llmtune.cli.options import Folder, Json, LlamaCpp, SetAgain, To, Verbose
from llmtune.cli.output import results


def export(
    run: Folder,
    to: To,
    llama_cpp: LlamaCpp = None,
    set: SetAgain = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write the tuned model for another program."""
    with results(as_json) as give:
        facts = api.export(run, to, llama_cpp=llama_cpp, set=set or [])
        give({"run": run, "to": to, **facts}, lambda: None)
