"""CCS on Ray: the score store, and selection, coverage and beta search as tasks.

The classes and functions are plain; ``ray.remote`` is applied where a task is sent. Everything
decided lies in ``raysys.training.ccs``; these modules move rows.
"""

from actors.ccs.proxies import auto_beta, coverage_tasks, row_finder, train_many
from actors.ccs.selection import Columns, coreset_dataset, select_dataset, select_parquet
from actors.ccs.store import ScoreStoreActor, ShardedStore

__all__ = [
    "Columns",
    "ScoreStoreActor",
    "ShardedStore",
    "auto_beta",
    "coreset_dataset",
    "coverage_tasks",
    "row_finder",
    "select_dataset",
    "select_parquet",
    "train_many",
]
