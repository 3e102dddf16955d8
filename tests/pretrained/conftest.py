from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def stories260k() -> Path:
    folder = Path(__file__).parents[3] / "shared/data/stories260k"
    if not folder.exists():
        pytest.skip("stories260K is not in ../shared/data/stories260k beside the clone")
    return folder
