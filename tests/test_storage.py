"""Refusals of a file system are told from other errors, and in a user's words."""

import errno
import importlib.util
import os

import pytest
from etils import epath

from mha_jax.storage import refusal, told


def chained(cause):
    try:
        raise RuntimeError("saving failed") from cause
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "disk full"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "disk quota used up"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "read-only file system"),
        (PermissionError(errno.EACCES, "no"), "permission denied"),
        (ValueError("RESOURCE_EXHAUSTED: write: No space left on device [os_error_code='28']"), "disk full"),
        (chained(OSError(errno.ENOSPC, "full")), "disk full"),
        (FileNotFoundError(errno.ENOENT, "none"), None),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), None),
    ],
)
def test_a_refusal_is_named(error, words):
    assert refusal(error) == words


def test_a_real_full_device_is_told_in_one_line():
    with pytest.raises(OSError) as caught, open("/dev/full", "w") as file:
        file.write("x")
    assert told(caught.value) == "disk full; mend that or give another place, and run again: what is saved is kept"


def test_the_path_is_told_where_it_is_known(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught:
        (tmp_path / "file" / "runs").mkdir()
    assert (told(caught.value) or "").startswith(
        f"a file lies where a directory is wanted: {tmp_path}/file/runs; mend that"
    )
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "link" / "runs").mkdir()
    assert (told(caught.value) or "").startswith(f"a link that leads nowhere: {tmp_path}/link; mend that")
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "gone").read_text()
    assert told(caught.value) is None


def test_a_bucket_without_its_library_is_told_with_what_to_install():
    if importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(ImportError) as caught:
        epath.Path("gs://bucket/sweep").exists()
    assert told(caught.value) == "gs:// needs: python -m pip install 'etils[epath-gcs]'"
    assert told(ImportError("no module of that name")) is None
