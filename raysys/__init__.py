"""raysys: ten published ML-systems ideas as one runtime on Ray.

The library holds algorithms and public names only: no Ray, no network. Ray lives in ``actors``,
programs live in ``jobs``.
"""

__version__ = "0.1.0"
