"""tune(recipe, over): a search for the values of a recipe with the lowest validation loss."""

import _thread
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from llmtune import terminal
from llmtune.errors import Interrupted, RecipeError
from llmtune.files import hold, write_text
from llmtune.numbers import duration
from llmtune.pool import Ended, Pool, Task, check_place, open_pool
from llmtune.recipe.standing import recipe_text
from llmtune.run.folder import UNOWNED, refuse_file
from llmtune.searching.record import SearchRecord
from llmtune.searching.space import shown
from llmtune.searching.study import VALIDATIONS, Study, Trial, Tried
from llmtune.storage.urls import url_of
from llmtune.tuning.dealer import Dealer
from llmtune.tuning.files import Folder
from llmtune.tuning.outcome import best_of, record_of, write
from llmtune.tuning.request import Request, read_request
from llmtune.working import Step, working

MODULE = "llmtune.tuning.worker"


def tune(
    recipe: Path | str,
    over: Sequence[str],
    *,
    set: Sequence[str] = (),
    trials: int | None = None,
    minutes: float | None = None,
    out: Path | str | None = None,
    on: str = "local",
    seed: int = 0,
) -> SearchRecord:
    """Search values of a recipe's keys by validation loss; leaves the best recipe, a study and a page in `out`.

    `over` has a text for each key, such as method.lr=1e-4..1e-2:log. A search that was stopped goes on. Gives what
    tune.json holds. Raises RecipeError, MachineError, TrainingError, Interrupted.
    """
    check_place(on)
    request = read_request(recipe, over, set=set, trials=trials, minutes=minutes, seed=seed, out=out)
    folder = Folder(request.out)
    _check_folder(folder)
    with hold(folder.lock, f"{folder.path}: another llmtune process is at work in this folder; wait until it ends"):
        folder.remove_leftovers()
        pool = open_pool(on, folder.path)
        study = Study.open(folder.study, request.facts(), request.space, seed=seed, first=request.first())
        write_text(folder.recipe, recipe_text(request.recipe, ["What the trials of a search by llmtune override."]))
        exit_code = _search(request, folder, study, pool)
        record = record_of(request, study, folder, best_of(study, request, exit_code))
        write(record, request, folder)
    return record


def _check_folder(folder: Folder) -> None:
    """Raise RecipeError for a folder that holds something else."""
    if url := url_of(folder.path):
        raise RecipeError(f"--out {url}: a study is a SQLite file; give a folder of this machine")
    refuse_file(folder.path)
    others = [file.name for file in folder.path.iterdir() if file.name not in UNOWNED] if folder.path.is_dir() else []
    if others and not folder.study.exists():
        message = f"is not empty and holds no study ({sorted(others)[0]}); choose another with --out"
        raise RecipeError(f"{folder.path}: {message}")


def _search(request: Request, folder: Folder, study: Study, pool: Pool) -> int:
    """Run trials until there are enough; gives the exit code of the latest failed one, 0 where none failed."""
    width, total = pool.width(1), request.count()
    seconds = request.minutes * 60 if request.minutes else None
    workers = min(width, total) if total else width
    terminal.heading("tune")
    with working("tuning", total=float(total) if total else None, unit="trials") as advance:
        news = News(study, workers, advance)
        dealer = Dealer(
            study,
            folder,
            workers,
            trials=total,
            seconds=seconds,
            began=news.began,
            validated=news.validated,
            ended=news.ended,
        )
        news.seconds_left = dealer.seconds_left
        while not dealer.is_over:
            before = len(study.trials)
            _round(dealer, folder, pool, workers)
            if len(study.trials) == before:
                break
            dealer.renew(workers)
    return dealer.exit_code


def _round(dealer: Dealer, folder: Folder, pool: Pool, workers: int) -> None:
    """Let workers train until they are told that there is no more, or are all gone."""
    tasks = [
        Task(f"worker-{one}", MODULE, (str(folder.path.absolute()), str(one)), 1, folder.worker_log(one))
        for one in range(workers)
    ]
    dealer.look()
    with _serving(dealer):
        pool.run(tasks, lambda end: _note(dealer, tasks, end))


def _note(dealer: Dealer, tasks: list[Task], end: Ended) -> None:
    dealer.lost(tasks.index(end.task), end.message if end.code else "")


@contextmanager
def _serving(dealer: Dealer) -> Iterator[None]:
    """Let the dealer look at the folder in a thread until the block ends; what ends it early ends the block."""
    until = threading.Event()

    def serve() -> None:
        try:
            dealer.serve(until)
        except BaseException:
            _thread.interrupt_main(signal.SIGINT)
            raise

    with ThreadPoolExecutor(1) as thread:
        served = thread.submit(serve)
        try:
            yield
        except Interrupted as stop:
            until.set()
            served.result()
            dealer.close()
            done = len([one for one in dealer.study.trials if one.state in ("complete", "pruned")])
            stopped = Interrupted(
                f"stopped; {done} {'trial is' if done == 1 else 'trials are'} kept, and the same command goes on"
            )
            stopped.exit_code = stop.exit_code
            raise stopped from None
        finally:
            until.set()
        served.result()
        dealer.close()


class News:
    """Tells how a search goes on: a line for each trial that ends, and in between how much is done."""

    def __init__(self, study: Study, workers: int, advance: Step) -> None:
        self._study, self._advance = study, advance
        self._validations = 0
        self.seconds_left: Callable[[], float | None] = lambda: None
        done = study.ended
        if done:
            best = study.best
            known = f", the best loss {best.loss:.4f}" if best and best.loss is not None else ""
            terminal.plain([f"going on after {len(done)} {'trial' if len(done) == 1 else 'trials'}{known}"])
            advance(len(done), sum(tried.seconds for tried in done) / workers)

    def began(self, trial: Trial) -> None:
        """Say what is tried."""
        self._validations = 0
        terminal.plain([f"trial {trial.number}: {shown(trial.values)}"])

    def validated(self) -> None:
        """Count a part of a trial."""
        if self._validations < VALIDATIONS - 1:
            self._validations += 1
            self._advance(1 / VALIDATIONS)

    def ended(self, tried: Tried) -> None:
        """Say what came of a trial, and what is best so far."""
        self._advance(1 - self._validations / VALIDATIONS)
        self._validations = 0
        what = f"loss {tried.loss:.4f}" if tried.loss is not None else "failed"
        why = f" ({tried.reason})" if tried.reason else ""
        best = self._study.best
        known = f"; best so far: trial {best.number}, {best.loss:.4f}" if best and best.loss is not None else ""
        left = self.seconds_left()
        time_left = f"; {duration(max(0.0, left))} left" if left is not None else ""
        terminal.plain([f"trial {tried.number}: {what}{why}, {duration(tried.seconds)}{known}{time_left}"])
