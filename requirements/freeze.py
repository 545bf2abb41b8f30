"""Print the installed packages as a lock file: ``make lock`` writes it to requirements/dev.lock."""

from importlib.metadata import distributions

SKIP = {"espalier", "pip", "torch-espalier"}
HEADER = """\
# Every package of the development environment, pinned; installed with --no-deps by `make env`.
# Written by `make lock`. torch is the CPU build that pip finds first; change its version only with that in mind."""


def main() -> None:
    """Print the header and one ``name==version`` line a package, sorted."""
    pins = {d.metadata["Name"].lower(): d.version.partition("+")[0] for d in distributions()}
    print(HEADER)
    for name in sorted(pins.keys() - SKIP):
        print(f"{name}=={pins[name]}")


if __name__ == "__main__":
    main()
