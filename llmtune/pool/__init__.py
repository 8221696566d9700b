"""Where arms and trials run: one after another here, one on each GPU, or on the machines of a Ray cluster."""

from llmtune.pool.opening import check_place, open_pool
from llmtune.pool.task import Ended, Pool, Task

__all__ = ["Ended", "Pool", "Task", "check_place", "open_pool"]
