"""Commands of a trained run: eval, merge, publish and report."""

from pathlib import Path

from llmtune import api
from llmtune.cli.options import DryRun, Folder, Json, Live, LivePort, Reported, RunsPage, SetAgain, Verbose
from llmtune.cli.output import results, scores
from llmtune.errors import RecipeError
from llmtune.run import open_run
from llmtune.storage import fetch


def evaluate(run: Folder, set: SetAgain = None, as_json: Json = False, verbose: Verbose = False) -> None:
    """Evaluate base and tuned model."""
    with results(as_json) as give:
        api.evaluate(run, set=set or [])
        from llmtune import terminal

        done = open_run(run)
        give({"run": run, **scores(done)} if as_json else None, lambda: terminal.scores(done))


def merge(run: Folder, set: SetAgain = None, as_json: Json = False, verbose: Verbose = False) -> None:
    """Write full weights."""
    with results(as_json) as give:
        facts = api.merge(run, set=set or [])
        merged = open_run(run).merged
        give({"run": run, "merged": merged, **facts}, lambda: print(f"merged  {merged}"))


def publish(
    run: Folder, set: SetAgain = None, dry_run: DryRun = False, as_json: Json = False, verbose: Verbose = False
) -> None:
    """Upload to the Hub, or show what would be uploaded."""
    with results(as_json) as give:
        facts = api.publish(run, set=set or [], dry_run=dry_run)
        give({"run": run, **facts}, lambda: None)


def report(
    runs: Reported,
    out: RunsPage = None,
    set: SetAgain = None,
    live: Live = False,
    port: LivePort = 0,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write the report page of a run, or one of several side by side, or serve a run's while it goes on."""
    if live or port:
        refused = {"--out": out, "--set": set, "--json": as_json, "a second RUN": runs[1:], "--port": not live}
        _serve(runs[0], port, [option for option, given in refused.items() if given])
        return
    with results(as_json) as give:
        page = api.report(*runs, out=out, set=set or [])
        named = {"run": runs[0]} if len(runs) == 1 else {"runs": [str(run) for run in runs]}
        give({**named, "report": page}, lambda: print(page))


def _serve(folder: Path, port: int, refused: list[str]) -> None:
    from llmtune.reporting.live.server import serve

    if refused:
        reason = "needs --live" if refused == ["--port"] else "does not go with --live"
        raise RecipeError(f"{refused[0]}: {reason}; llmtune report RUN --live [--port P] serves one page")
    fetch(folder)
    serve(folder, port)
