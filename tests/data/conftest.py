"""Small files for the data tests, and one cache directory a test."""

from pathlib import Path

import pytest

from mha_jax.specs import DataSpec

PAIRS = {"train": 97, "validation": 11, "test": 7}


def sentence(n: int, words: tuple[str, ...]) -> str:
    """A line whose length varies from 1 to 13 words and which says its own number."""
    return " ".join([str(n), *(words[(n + k) % len(words)] for k in range(n % 13))])


@pytest.fixture
def parallel_files(tmp_path: Path) -> dict[str, tuple[str, str]]:
    files = {}
    for split, count in PAIRS.items():
        paths = (tmp_path / f"{split}.en", tmp_path / f"{split}.de")
        paths[0].write_text("".join(sentence(n, ("red", "dog", "ran")) + "\n" for n in range(count)))
        paths[1].write_text("".join(sentence(n, ("rot", "Hünd", "lief", "ab")) + "\n" for n in range(count)))
        files[split] = (str(paths[0]), str(paths[1]))
    return files


@pytest.fixture
def parallel_spec(parallel_files: dict[str, tuple[str, str]]) -> DataSpec:
    return DataSpec("parallel", length=64, batch_size=5, files=parallel_files, buckets=(23, 41, 64))


@pytest.fixture
def text_spec(tmp_path: Path) -> DataSpec:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(sentence(n, ("ant", "bée", "cat")) for n in range(101)))
    return DataSpec("text", length=17, batch_size=3, files={"train": str(path)})


@pytest.fixture
def multi30k() -> Path:
    folder = Path(__file__).parents[3] / "shared/data/multi30k"
    if not folder.exists():
        pytest.skip("Multi30k is not in ../shared/data/multi30k beside the clone")
    return folder
