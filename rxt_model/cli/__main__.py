"""``python -m rxt_model.cli`` is ``rxt``."""

from rxt_model.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
