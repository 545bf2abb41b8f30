"""What holds for every test: workers share the cores, and a run ends with what it skipped and how to get it."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
from collections import Counter
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from hub_standin import Hub, serve

# A busy machine draws its examples slowly and passes all the same. The environment of `make interop` has no hypothesis.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    # `make test` draws anew each time, to find what nobody thought of. `.ci/run`, which decides on a change, draws the
    # same each time: a change must not fail by an example by which the state before it would have failed, too.
    settings.register_profile(
        "any-machine",
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        derandomize="SAME_EXAMPLES" in os.environ,
    )
    settings.load_profile("any-machine")

# Two workers with as many threads each as there are cores wait for each other, spinning: share the cores out. Read when
# torch is loaded, which is after this file, and by the processes that tests start.
if (_WORKERS := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))


# A shell starts its background jobs with Ctrl-C ignored, and their children inherit that: tests of it need it back.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Hide the data sets from a test that does not say that it needs one: on a fresh machine there are none."""
    told = any(str(mark.kwargs.get("reason")).startswith("no data set") for mark in item.iter_markers("skipif"))
    held = None if told else os.environ.pop("ESPALIER_DATA", None)
    try:
        return (yield)
    finally:
        if held is not None:
            os.environ["ESPALIER_DATA"] = held


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    """List every reason to skip with its number of tests, as the last lines but that of the counts."""
    yield
    # A skip's report carries (path, line, "Skipped: why").
    reasons = Counter(
        str(report.longrepr[2]).removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped")
    )
    if reasons:
        terminalreporter.section("not run here, and how to run it")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count} test{'s' if count > 1 else ''}: {reason}")


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve an empty stand-in of the Hugging Face Hub, and send huggingface_hub there, with an empty cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with serve() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub-cache")))
        monkeypatch.setenv("HF_TOKEN", "a-token-for-the-stand-in")
        yield served
