"""The arguments and options of the commands, each with its help."""

from pathlib import Path
from typing import Annotated

import typer

from llmtune.storage.urls import run_folder

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe's file.", show_default=False)]
Folders = Annotated[
    list[Path],
    typer.Argument(
        parser=run_folder, metavar="RUN", help="Folders or URLs of trained runs, two or more.", show_default=False
    ),
]
Reported = Annotated[
    list[Path],
    typer.Argument(parser=run_folder, metavar="RUN", help="A run's folder or URL, or several.", show_default=False),
]
RunsPage = Annotated[
    Path | None,
    typer.Option("-o", "--out", metavar="FILE", help="The page of several runs.", show_default="runs-compared.html"),
]
Weights = Annotated[
    list[float] | None,
    typer.Option(
        "--weights",
        metavar="W ...",
        help="A weight for each run, in their order, as in --weights 0.7 0.3.",
        show_default="the same for each, 1 in sum",
    ),
]
How = Annotated[
    str,
    typer.Option(
        "--how",
        metavar="HOW",
        help="linear: the weighted sum. ties: the largest values of each, where their signs agree. dare: values drawn "
        "at random, the rest scaled up.",
    ),
]
Density = Annotated[
    float | None,
    typer.Option("--density", metavar="D", help="The share of values that ties and dare keep.", show_default="0.5"),
]
Either = Annotated[
    Path,
    typer.Argument(
        parser=run_folder, metavar="RECIPE|RUN", help="A recipe's file, or a run's folder or URL.", show_default=False
    ),
]
Folder = Annotated[
    Path, typer.Argument(parser=run_folder, metavar="RUN", help="A run's folder or URL.", show_default=False)
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a value of the recipe; again for more.")
]
SetAgain = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="a.b=c", help="Another setting of eval, merge, publish, launch or memory; again for more."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        parser=run_folder,
        metavar="DIR",
        help="The run's folder, or a URL such as s3://bucket/run.",
        show_default="runs/<recipe's name>",
    ),
]
NewFolder = Annotated[
    Path | None,
    typer.Option(
        "--out", parser=run_folder, metavar="DIR", help="The new run's folder or URL.", show_default="runs/<a>+<b>"
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", metavar="", help="Remove what the folder holds and start again.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", metavar="", help="Write what would go to RUN/publish; send nothing.")
]
Json = Annotated[
    bool, typer.Option("--json", metavar="", help="Print one JSON object on stdout, and all else on stderr.")
]
Verbose = Annotated[bool, typer.Option("--verbose", metavar="", help="Show tracebacks and what libraries log.")]
NewFile = Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE", help="The file to write.")]
Script = Annotated[
    Path | None, typer.Option("-o", "--script", metavar="FILE", help="The job to write.", show_default="job.sbatch")
]
Slurm = Annotated[bool, typer.Option("--slurm", metavar="", help="Write a job for sbatch; nothing starts.")]
Rank = Annotated[
    int | None,
    typer.Option("--rank", metavar="N", help="Start this machine's part: the first is 0.", show_default=False),
]
Address = Annotated[
    str | None,
    typer.Option("--address", metavar="HOST", help="The first machine's address, beside --rank.", show_default=False),
]
Port = Annotated[
    int | None, typer.Option("--port", metavar="P", help="A free port of the first machine.", show_default="29500")
]
Nodes = Annotated[
    int | None, typer.Option("--nodes", metavar="N", min=1, help="Machines.", show_default="the accelerate config's")
]
GpusPerNode = Annotated[
    int | None,
    typer.Option(
        "--gpus-per-node", metavar="N", min=1, help="GPUs of each machine.", show_default="the accelerate config's"
    ),
]
TimeLimit = Annotated[
    str | None,
    typer.Option("--time", metavar="T", help="The job's time limit, such as 12:00:00.", show_default="the partition's"),
]
Partition = Annotated[
    str | None, typer.Option("--partition", metavar="NAME", help="SLURM's partition.", show_default="the cluster's")
]
Account = Annotated[
    str | None, typer.Option("--account", metavar="NAME", help="SLURM's account.", show_default="yours")
]
Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        metavar="CARD",
        help="A card to judge the recipe for, here or not: h200, h100, a100-80, a100-40, l40s, rtx4090, rtx3090, t4, "
        "or a number of GB.",
        show_default="this machine",
    ),
]
Methods = Annotated[
    bool,
    typer.Option(
        "--methods", metavar="", help="Say what each method takes, what is known of such data, and which one to take."
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="TIME",
        help="The most that a training may take, such as 20m; beside --methods.",
        show_default="no limit",
    ),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="The most memory that a training may take, such as 8GB; beside --methods.",
        show_default="what is free",
    ),
]
Data = Annotated[
    Path | None,
    typer.Argument(
        metavar="FILE",
        help="Your rows: a file, a folder, a pattern or a Hub data set.",
        show_default="the shipped sample",
    ),
]
Model = Annotated[
    str | None, typer.Option("--model", metavar="ID", help="A Hub id, a folder, a .gguf file or package:NAME.")
]
Method = Annotated[str | None, typer.Option("--method", metavar="M", help="Such as lora, full, frozen or gradual.")]
Temperature = Annotated[
    float, typer.Option(min=0.0, help="0 always takes the likeliest token; 1 draws as the model was trained.")
]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens of this sum.")]
TopK = Annotated[int, typer.Option(min=0, help="Draw from so many of the likeliest tokens; 0 for all.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens that an answer may have.")]
To = Annotated[
    str,
    typer.Option(
        "--to",
        metavar="FORM[:TYPE]",
        help="gguf or ollama, of type bf16, f16, f32, q8_0, q5_1, q5_0, q4_1 or q4_0; vllm, of type lora or merged; "
        "mlx.",
        show_default=False,
    ),
]
LlamaCpp = Annotated[
    Path | None,
    typer.Option(
        "--llama-cpp",
        metavar="DIR",
        help="The folder with llama.cpp's convert_hf_to_gguf.py, for models that the gguf package alone cannot write.",
        show_default="$LLAMA_CPP",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of what is drawn.")]
System = Annotated[
    str | None,
    typer.Option(
        "--system",
        metavar="TEXT",
        help="The system prompt, in infer that of rows without one; an empty one for none.",
        show_default="the one that the run's rows share",
    ),
]
