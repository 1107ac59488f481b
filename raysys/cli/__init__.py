"""The command ``raysys``: finds a job and starts it, or looks at the machine.

Only the standard library is imported here, so that ``raysys doctor`` works on a machine where the
dependencies are missing or broken, which is when it is needed.
"""

from raysys.cli.main import main

__all__ = ["main"]
