"""The options of `llmtune compare`, each with its help."""

from pathlib import Path
from typing import Annotated

import typer

Comparable = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE|OUT", help="A recipe's file, or the folder of a comparison to go on with.", show_default=False
    ),
]
Arms = Annotated[
    str | None,
    typer.Option(
        "--arms",
        metavar="a,b|FILE",
        help="Methods by name, or a .yaml file of arms: - {name: mine, set: {method.lr: 1.0e-3}}.",
        show_default="full, frozen, gradual, discriminative and lora, where they fit",
    ),
]
Minutes = Annotated[
    float | None,
    typer.Option("--minutes", metavar="M", help="What all of it may take, shared out equally.", show_default="30"),
]
Seeds = Annotated[int | None, typer.Option("--seeds", metavar="N", help="Trainings of each arm.", show_default="2")]
Sizes = Annotated[
    str | None,
    typer.Option(
        "--sizes", metavar="0.1,0.3,1", help="Shares of the training rows, each part of the next.", show_default="1"
    ),
]
Baselines = Annotated[
    str | None,
    typer.Option(
        "--baselines",
        metavar="a,b|none",
        help="zero-shot and few-shot ask the base as it is; scratch trains its architecture from random weights; "
        "tf-idf is a linear model over words.",
        show_default="all four",
    ),
]
Equal = Annotated[
    str | None,
    typer.Option(
        "--equal", metavar="WHAT", help="What arms have in common: minutes or epochs.", show_default="minutes"
    ),
]
CompareOut = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="The comparison's folder.", show_default="compare/<recipe's name>"),
]
On = Annotated[
    str,
    typer.Option(
        "--on", metavar="PLACE", help="local: one arm after another; gpus: one on each; ray: over a Ray cluster."
    ),
]
Strict = Annotated[bool, typer.Option("--strict", metavar="", help="An arm that cannot be ends it before it begins.")]
