"""Small training tasks that the training benchmarks and the tour share."""

from jobs.bench.tasks.data import Task, fashion_task, signal_task, small_task

__all__ = ["Task", "fashion_task", "signal_task", "small_task"]
