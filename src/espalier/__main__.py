"""``python -m espalier`` is the ``espalier`` command."""

from espalier.command_line import main

raise SystemExit(main())
