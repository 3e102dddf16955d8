"""A sweep as an array of jobs: each index opens the directory that was prepared before and takes its part of it."""

from etils import epath

from mha_jax.specs import UserError
from mha_jax.sweeps.store import RunDirectory, SweepDirectory


def part(workdir: epath.PathLike, cells: str) -> list[RunDirectory]:
    """The runs of a sweep from FROM up to TO of "FROM:TO", counted from 0; TO may lie behind the last.

    Raises: UserError for what is no such range or holds no run, and where there is no sweep.
    """
    sweep = SweepDirectory(workdir)
    if not (sweep.path / "sweep.json").exists():
        raise UserError(f"{sweep.path} is no sweep's directory: it has no sweep.json")
    runs = sweep.runs
    first, colon, behind = cells.partition(":")
    if not (colon and first.isdecimal() and behind.isdecimal() and int(first) < min(int(behind), len(runs))):
        raise UserError(f"--cells={cells} names no cells; 0:{len(runs)} are all of {sweep.path}")
    return runs[int(first) : int(behind)]
