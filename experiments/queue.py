"""Add to the results for as long as there is time: take the next missing trials in the order of their worth.

    python experiments/queue.py --deadline 150m --cores 1
    python experiments/queue.py --list                        # what is finished and what comes next

Any machine can add seeds at any time: records merge (``espalier records merge``). The committed records are read, new
ones go to ``OUT/records``; ``python experiments/results.py --collect OUT`` puts them beside the committed ones and
writes the pages. A stopped or killed queue loses nothing but the running trial's last epoch.
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.replace("\\", "/").rpartition("/experiments/")[0] or "."
    from experiments.scheduler import main

    sys.exit(main())

# Python puts the folder of a script first on its path. To every script in this folder this file therefore hides the
# standard library's module of the same name, which torch needs: hand that one out instead.
import importlib.util
import sysconfig

_spec = importlib.util.spec_from_file_location(__name__, f"{sysconfig.get_path('stdlib')}/queue.py")
assert _spec is not None
assert _spec.loader is not None
sys.modules[__name__] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[__name__])
