"""Where arms and trials run: one after another here, one on each GPU, or on the machines of a Ray cluster."""

from llmtune.pool.opening import PLACES, open_pool
from llmtune.pool.task import Ended, Pool, Task

__all__ = ["PLACES", "Ended", "Pool", "Task", "open_pool"]
