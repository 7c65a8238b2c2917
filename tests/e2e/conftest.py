"""The demo's pipeline, shortened, run once through the real verbs; the tests look at what it wrote."""

import forking
import pytest
from command import Result, succeeded
from pipeline import Demo


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Trained and merged checkpoints."""
    run = Demo(tmp_path_factory.mktemp("demo") / "run", tmp_path_factory.mktemp("logs"))
    run.make("make")
    return run


@pytest.fixture(scope="session")
def trained(demo: Demo) -> Result:
    """The demo's reinforcement learning in its own layout, in the run directory of `demo`."""
    kept = f"replay.store={demo.directory}/routes"
    with forking.in_environment({"FORKED_SERVERS": ""}):  # as a user's, whichever module asks first
        return succeeded(demo.reinforce("train", 2, f"run.dir={demo.directory}", kept, merged=True))
