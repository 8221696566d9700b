"""The help of every command: what it does, examples, and the panel in which it stands."""

from collections.abc import Callable
from dataclasses import dataclass

from typer.core import TyperCommand

from llmtune.cli.commands.after import evaluate, merge, publish, report
from llmtune.cli.commands.combine import Weighted, combine
from llmtune.cli.commands.compare import compare
from llmtune.cli.commands.export import export
from llmtune.cli.commands.infer import chat, infer
from llmtune.cli.commands.launch import launch
from llmtune.cli.commands.start import check, init, plan, print_schema, recipes
from llmtune.cli.commands.training import run, train
from llmtune.cli.commands.tune import Spread, tune

PANELS = {"start": "To start", "train": "To train", "after": "After training", "other": "Other"}


@dataclass(frozen=True)
class Command:
    """A command of the help: its function, what it does, examples, and the panel in which it stands."""

    name: str
    function: Callable[..., object]
    panel: str
    text: str
    examples: tuple[str, ...]
    parser: type[TyperCommand] | None = None
    """What reads its words, where it takes them in a way of its own."""


COMMANDS = (
    Command(
        "init",
        init,
        "start",
        "Look at your rows and write a short, commented recipe for them.",
        ("llmtune init rows.jsonl", "llmtune init train.csv --model Qwen/Qwen3-4B-Instruct-2507 -o qwen.yaml"),
    ),
    Command(
        "recipes",
        recipes,
        "start",
        "List the recipes that ship with llmtune, or copy one.",
        ("llmtune recipes", "llmtune recipes qwen3-4b/lora -o mine.yaml"),
    ),
    Command(
        "check",
        check,
        "start",
        "Validate recipe and data and print what would be trained; nothing trains.",
        ("llmtune check recipe.yaml", "llmtune check recipe.yaml --set data.max_length=2048"),
    ),
    Command(
        "plan",
        plan,
        "start",
        "Print which layers train in which steps, at which rate, and whether that fits this machine, or a card; with "
        "--methods, what each method takes there, and which one is advised.",
        (
            "llmtune plan recipe.yaml",
            "llmtune plan recipe.yaml --gpu a100-40 --set method=qlora",
            "llmtune plan recipe.yaml --methods --budget 20m --memory 8GB",
        ),
    ),
    Command(
        "run",
        run,
        "train",
        "Check, train, evaluate, merge and publish as the recipe says, and write the report. A run's folder goes on "
        "where it ended; with --set it is evaluated, merged or published again under other settings.",
        (
            "llmtune run recipe.yaml",
            "llmtune run recipe.yaml --set train.epochs=1 --out runs/short",
            "llmtune run runs/recipe --set eval.limit=100",
        ),
    ),
    Command(
        "train",
        train,
        "train",
        "Train alone, from the newest checkpoint. What is trained already stays, unless --overwrite.",
        ("llmtune train recipe.yaml", "llmtune train runs/recipe", "llmtune train runs/recipe --overwrite"),
    ),
    Command(
        "compare",
        compare,
        "train",
        "Compare methods on your own rows: each arm searches its learning rate and trains for its share of the "
        "minutes, and all answer the same held-out rows. The same command, or its folder, goes on where it ended.",
        (
            "llmtune compare recipe.yaml",
            "llmtune compare recipe.yaml --arms lora,frozen,full --minutes 40 --sizes 0.3,1",
            "llmtune compare recipe.yaml --arms arms.yaml --equal epochs --out OUT",
            "llmtune compare OUT --minutes 60",
        ),
    ),
    Command(
        "launch",
        launch,
        "train",
        "Train on several machines: write a job for SLURM, or start one machine's part. RUN lies on a disk that all "
        "share; llmtune run RUN then does what follows training.",
        (
            "llmtune launch recipe.yaml --slurm --time 12:00:00",
            "llmtune launch recipe.yaml --rank 0 --address 10.0.0.7 --out RUN",
        ),
    ),
    Command(
        "tune",
        tune,
        "train",
        "Search values of any keys of a recipe by the validation loss: trials that are behind end early, and the same "
        "command goes on with a search. Leaves the best recipe, an Optuna study and a page.",
        (
            "llmtune tune recipe.yaml --over method.lr=1e-4..1e-2:log --trials 12",
            "llmtune tune recipe.yaml --over method.lr=1e-4..1e-2:log method.adapter.rank=8,16,32 --minutes 60",
        ),
        Spread,
    ),
    Command(
        "eval",
        evaluate,
        "after",
        "Evaluate base and tuned model on the same questions.",
        ("llmtune eval runs/recipe", "llmtune eval runs/recipe --set eval.suite=standard --set eval.limit=200"),
    ),
    Command(
        "merge",
        merge,
        "after",
        "Write base + delta as full weights, with proof.",
        ("llmtune merge runs/recipe", "llmtune merge runs/recipe --set merge.dtype=float32"),
    ),
    Command(
        "combine",
        combine,
        "after",
        "Join the deltas of trained runs of one base in a new run, with proof. Nothing is trained; the new run is "
        "evaluated, merged and published as any other.",
        (
            "llmtune combine runs/a runs/b --weights 0.7 0.3",
            "llmtune combine runs/a runs/b --how ties --density 0.3 --out runs/both",
        ),
        Weighted,
    ),
    Command(
        "export",
        export,
        "after",
        "Write the tuned model for llama.cpp, Ollama, vLLM or MLX. All but vLLM are proved to answer as it does. "
        "vLLM does not run here: merged weights have the merge's proof, an adapter is checked by names and shapes.",
        (
            "llmtune export runs/recipe --to gguf",
            "llmtune export runs/recipe --to ollama:q8_0",
            "llmtune export runs/recipe --to vllm",
        ),
    ),
    Command(
        "publish",
        publish,
        "after",
        "Upload to the Hub as the recipe says; private unless it says public.",
        ("llmtune publish runs/recipe", "llmtune publish runs/recipe --set publish.repo=me/my-model --dry-run"),
    ),
    Command(
        "report",
        report,
        "after",
        "Write the report, one page that opens offline, or several runs side by side on one page. With --live, serve "
        "that of a run or a comparison on this machine alone while it goes on.",
        (
            "llmtune report runs/recipe",
            "llmtune report runs/a runs/b -o compared.html",
            "llmtune report runs/recipe --live",
        ),
    ),
    Command(
        "infer",
        infer,
        "after",
        "Let the tuned model answer the rows of a file, in batches, and score the answers where true ones are given. "
        "The same command goes on with what was interrupted.",
        (
            "llmtune infer runs/recipe rows.jsonl -o answers.jsonl",
            "llmtune infer runs/recipe prompts.txt -o answers.jsonl --model both",
            "llmtune infer runs/recipe rows.csv -o answers.jsonl --temperature 0.7 --top-p 0.9 --samples 4",
        ),
    ),
    Command(
        "chat",
        chat,
        "after",
        "Talk to base and tuned model side by side.",
        (
            "llmtune chat runs/recipe",
            "llmtune chat runs/recipe --tuned --temperature 0.7 --top-p 0.9",
            "llmtune chat runs/recipe --system Translate. --max-new-tokens 64",
        ),
    ),
    Command(
        "schema",
        print_schema,
        "other",
        "Print the recipe's JSON schema, for editors.",
        ("llmtune schema > recipe.schema.json",),
    ),
)
