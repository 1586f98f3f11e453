"""``python -m hbp``."""

from hbp.cli import main

raise SystemExit(main())
