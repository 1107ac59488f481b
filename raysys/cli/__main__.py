"""``python -m raysys.cli``: the same as the command ``raysys``."""

from raysys.cli.main import main

raise SystemExit(main())
