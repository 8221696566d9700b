"""Commands in which a run's models answer: infer, to rows of a file, and chat."""

from pathlib import Path
from typing import Annotated

import typer

from llmtune import api
from llmtune.answering.sampling import Sampling
from llmtune.api.steps import open_with, require_trained
from llmtune.cli.options import (
    Folder,
    Json,
    MaxNewTokens,
    Seed,
    SetAgain,
    System,
    Temperature,
    TopK,
    TopP,
    Verbose,
)
from llmtune.cli.output import results
from llmtune.errors import RecipeError
from llmtune.working import importing

_Rows = Annotated[
    Path | None,
    typer.Argument(
        metavar="ROWS",
        help="Rows in a format of data, with or without answers, or a .txt with a prompt a line.",
        show_default=False,
    ),
]
_Answers = Annotated[
    Path | None, typer.Option("-o", "--out", metavar="FILE", help="The .jsonl to write.", show_default=False)
]
_Model = Annotated[str, typer.Option("--model", metavar="WHICH", help="Who answers: tuned, base or both.")]
_Room = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens that an answer may have.",
        show_default="256; where answers are given, 1.5 times the longest",
    ),
]
_Samples = Annotated[int, typer.Option(min=1, help="Answers to each row; several need --temperature.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace FILE, whatever it holds.")]


def infer(
    run: Folder,
    rows: _Rows = None,
    out: _Answers = None,
    model: _Model = "tuned",
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    max_new_tokens: _Room = None,
    samples: _Samples = 1,
    seed: Seed = 0,
    system: System = None,
    overwrite: _Overwrite = False,
    set: SetAgain = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Answer the rows of a file."""
    if rows is None:
        raise RecipeError(f"which rows? Give a file: llmtune infer {run} rows.jsonl -o answers.jsonl")
    if out is None:
        raise RecipeError(
            f"-o: is missing: where do the answers go? Such as -o {rows.stem.partition('.')[0]}.answers.jsonl"
        )
    with results(as_json) as give:
        summary = api.infer(
            run,
            rows,
            out,
            model=model,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_new_tokens=max_new_tokens,
            samples=samples,
            seed=seed,
            system=system,
            overwrite=overwrite,
            set=set or [],
        )
        from llmtune import terminal
        from llmtune.answering.summary import lines

        give(summary, lambda: terminal.plain(lines(summary)))


def chat(
    run: Folder,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    max_new_tokens: MaxNewTokens = 256,
    seed: Seed = 0,
    system: System = None,
    base: Annotated[bool, typer.Option("--base", metavar="", help="Only the base model answers at first.")] = False,
    tuned: Annotated[bool, typer.Option("--tuned", metavar="", help="Only the tuned model answers at first.")] = False,
    set: SetAgain = None,
    verbose: Verbose = False,
) -> None:
    """Talk to base and tuned model."""
    if base and tuned:
        raise RecipeError("--base --tuned: give one of them, or neither for both models")
    folder = open_with(run, set or [])
    require_trained(folder)
    try:
        sampling = Sampling(temperature, top_p, top_k, max_new_tokens, seed)
    except ValueError as error:
        raise RecipeError(f"--{str(error).replace('_', '-', 2)}") from error
    with importing():
        from llmtune.cli import chat as conversation
    alone = "base" if base else "tuned" if tuned else None
    conversation.chat(folder, sampling=sampling, system=system, alone=alone)
