"""The tasks that a model can be made for: one file each, and this table of them.

To add a task, write its file here, its head in `models/heads.py`, and its line in `TASKS`; `spec.TaskName` lists the
names for type checkers.
"""

from gte_deploy.core.spec import TaskName
from gte_deploy.tasks.base import Task
from gte_deploy.tasks.classify import CLASSIFY
from gte_deploy.tasks.embed import EMBED
from gte_deploy.tasks.fill_mask import FILL_MASK
from gte_deploy.tasks.hybrid import HYBRID
from gte_deploy.tasks.multi_vector import MULTI_VECTOR
from gte_deploy.tasks.sparse import SPARSE
from gte_deploy.tasks.token_classify import TOKEN_CLASSIFY

TASKS: dict[TaskName, Task] = {
    task.name: task for task in (FILL_MASK, EMBED, CLASSIFY, TOKEN_CLASSIFY, SPARSE, HYBRID, MULTI_VECTOR)
}
"""Name of a task -> the task."""
