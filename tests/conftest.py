"""Shared by all tests: quiet progress bars (a bar in a notebook's output would make nbval fail), one thread a process,
hypothesis without deadlines (a loaded machine is no bug)."""

from __future__ import annotations

import os

os.environ["TQDM_DISABLE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("permdistill", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("permdistill")


@pytest.fixture
def hasty(monkeypatch):
    """The openai client's back-off, ten times faster: its waits are real, but a test has no minutes."""
    from openai import _base_client

    monkeypatch.setattr(_base_client, "INITIAL_RETRY_DELAY", 0.05)
    monkeypatch.setattr(_base_client, "MAX_RETRY_DELAY", 0.4)


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory):
    """Tiny models and data sets in the hub's layout, written once."""
    import tiny_hub

    return tiny_hub.write(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def tiny(hub_folder, monkeypatch):
    """The model hub, replaced by :func:`hub_folder`."""
    from permdistill.paper import budget, hub

    monkeypatch.setenv(hub.LOCAL, str(hub_folder))
    cached = (budget.architecture, budget._tokenizer)
    for function in cached:
        function.cache_clear()
    yield hub_folder
    for function in cached:
        function.cache_clear()


@pytest.fixture(scope="module")
def browser():
    """A real browser (Playwright's interface, the machine's Chromium); without one the test says so and is skipped."""
    import shutil

    sync_api = pytest.importorskip("playwright.sync_api", reason="no browser test: the package playwright is missing")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no browser test: neither chromium nor google-chrome is installed")
    with sync_api.sync_playwright() as playwright:  # per module: its event loop is in the way of tests with their own
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()
