"""The tasks of a group, by lm-eval's index."""

from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml as load_task_yaml

_GROUP_KEYS = ("group", "group_alias", "aggregate_metric_list", "metadata")


def member_names(manager: TaskManager, name: str) -> list[str]:
    """Return the names of a group's or a tag's tasks, those of its groups too; of a task, its own name."""
    if name in manager.all_tags:
        return sorted(manager.task_index[name].tags)
    if name not in manager.all_groups:
        return [name]
    listed = _config(manager, name).get("task") or []
    children = [one if isinstance(one, str) else one.get("group") or one["task"] for one in listed]
    return [task for child in children for task in member_names(manager, child)]


def local_group(manager: TaskManager, name: str, tasks: list[Task]) -> Group | None:
    """Return a group of lm-eval's with tasks that were loaded one by one; None for a name that is no group."""
    if name not in manager.all_groups:
        return None
    group = Group.from_config({key: value for key, value in _config(manager, name).items() if key in _GROUP_KEYS})
    for task in tasks:
        group.add(task)
    return group


def _config(manager: TaskManager, name: str) -> dict[str, Any]:
    file = manager.task_index[name].yaml_path
    return {} if file is None else dict(load_task_yaml(file))
