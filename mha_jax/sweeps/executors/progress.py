"""How far a sweep has come, told while it runs."""

import time
from collections.abc import Sequence

from tqdm import tqdm

from mha_jax.sweeps.store import RunDirectory


class Progress:
    """One bar over the training steps of all cells, so that the time left is a fair guess."""

    def __init__(self, directories: Sequence[RunDirectory]):
        self._directories = directories
        self._steps = {d.run_id: d.config["training"]["steps"] for d in directories}
        self._at = {d.run_id: self._step(d) for d in directories}
        done = sum(self._at.values())
        self._bar = tqdm(
            total=sum(self._steps.values()), initial=done, unit="step", disable=None, dynamic_ncols=True, smoothing=0.05
        )
        self._read = 0.0

    def _step(self, directory: RunDirectory) -> int:
        return self._steps[directory.run_id] if directory.state == "done" else directory.step

    def show(self, ended: int, running: Sequence[Sequence[RunDirectory]]) -> None:
        if self._bar.disable or time.monotonic() < self._read + 1:
            return
        self._read = time.monotonic()
        self._at |= {directory.run_id: self._step(directory) for directory in self._directories}
        names = [
            f"{pack[0].run_id}{f' and {len(pack) - 1} more' if len(pack) > 1 else ''} "
            f"{self._at[pack[0].run_id]}/{self._steps[pack[0].run_id]}"
            for pack in running
        ]
        self._bar.set_description(f"{ended}/{len(self._directories)} cells")
        self._bar.set_postfix_str(", ".join(names), refresh=False)
        self._bar.n = sum(self._at.values())
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()
