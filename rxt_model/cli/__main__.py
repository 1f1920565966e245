"""``python -m rxt_model.cli`` is ``rxt``."""

from rxt_model.cli import main

raise SystemExit(main())
