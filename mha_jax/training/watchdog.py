"""The processes of one run look after each other: who has failed, who is gone, who does not answer.

Each writes `heartbeats/<process>` in the run's directory, a file and no message, so that it can be read whoever is
stopped, process 0 included. Clocks of other machines are not looked at: alive is who still changes their file.
"""

import contextlib
import faulthandler
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from etils import epath

_SILENT_BEATS = 4  # as many beats missed: the process is gone
_LINGER_BEATS = 6


class _Peer:
    """Another process, as its file tells it. What the file held at first may be of an earlier attempt."""

    def __init__(self, file: epath.Path):
        self._file = file
        self._text = ""
        self._text = self._read()
        self.changed = time.monotonic()
        self.facts: dict[str, Any] = {}

    def look(self) -> None:
        text = self._read()
        if text == self._text:
            return
        self._text, self.changed = text, time.monotonic()
        try:
            self.facts = json.loads(text)
        except ValueError:  # half written; the next look finds it whole
            return

    def _read(self) -> str:
        try:
            return self._file.read_text()
        except FileNotFoundError:
            return ""
        except OSError:  # not readable for a moment: nothing new
            return self._text

    def silent(self, seconds: float) -> bool:
        return not self.facts.get("left") and time.monotonic() - self.changed > seconds

    @property
    def doing(self) -> str:
        return f"last heard of at {self.facts['doing']}" if self.facts else "never heard of"


class Watchdog:
    """A thread that ends this process, with a line that says why, when another has failed or nothing goes on.

    Args: limit:  seconds without a `beat` after which the run is ended; 0: never.
          record: told that line and the exit code.
    """

    def __init__(
        self, directory: epath.Path, process: int, processes: int, limit: float, record: Callable[[str, int], None]
    ):
        self._directory, self._process, self._limit, self._record = directory, process, limit, record
        self._every = min(max(limit / 20, 0.2), 5.0) if limit else 5.0
        self._folder = directory / "heartbeats"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._peers = {i: _Peer(self._folder / str(i)) for i in range(processes) if i != process}
        self._facts: dict[str, Any] = {"pid": os.getpid(), "sign": 0, "beats": 0, "doing": "the start", "ended": None}
        self._progressed = time.monotonic()
        self._writing, self._ending = threading.Lock(), threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._progressed = time.monotonic()
        self._write()
        self._thread.start()

    def beat(self, doing: str | None = None) -> None:
        self._progressed = time.monotonic()
        self._facts |= {"beats": self._facts["beats"] + 1} | ({"doing": doing} if doing else {})

    def stop(self) -> None:
        """This process is done; the others need not wait for its beats."""
        self._stopped.set()
        self._thread.join()
        self._write(left=True)

    def fail(self, line: str, code: int, echo: bool) -> NoReturn:
        """Ends this process and, through its file, the others.

        Args: echo: the failure may be another process's end seen from here; then that one is named.
        """
        if echo:
            line, code = self._cause(line, code)
        self._end(line, code)

    def _watch(self) -> None:
        while not self._stopped.wait(self._every):
            with contextlib.suppress(OSError):  # a disk that is full for a moment: the next beat says the same
                self._write()
            for i, peer in self._peers.items():
                peer.look()
                if peer.facts.get("ended"):
                    line, code = peer.facts["ended"]
                    self._end(_of(i, line), code)
            if self._limit and time.monotonic() - self._progressed > self._limit:
                with contextlib.suppress(OSError):
                    self._dump_stacks()
                self._end(self._who(), 1)

    def _write(self, **facts: Any) -> None:
        with self._writing:
            self._facts |= {"sign": self._facts["sign"] + 1, **facts}
            (self._folder / str(self._process)).write_text(json.dumps(self._facts))

    def _cause(self, line: str, code: int) -> tuple[str, int]:
        deadline = time.monotonic() + (_SILENT_BEATS + 2) * self._every
        while time.monotonic() < deadline:
            for i, peer in self._peers.items():
                peer.look()
                if peer.facts.get("ended"):
                    return _of(i, peer.facts["ended"][0]), peer.facts["ended"][1]
                if peer.silent(_SILENT_BEATS * self._every):
                    return f"process {i} is gone, {peer.doing}", 1
            time.sleep(self._every / 4)
        return line, code

    def _who(self) -> str:
        what = f"no step has ended for {self._limit:g} s: "
        silent = [i for i, peer in self._peers.items() if peer.silent(self._limit / 2)]
        if silent:
            return what + "; ".join(f"process {i} does not answer, {self._peers[i].doing}" for i in silent)
        everyone = {self._process: self._facts} | {i: peer.facts for i, peer in self._peers.items()}
        beats = {i: facts.get("beats", 0) for i, facts in everyone.items()}
        behind = [i for i, count in beats.items() if count == min(beats.values())]
        if len(behind) == len(beats):
            return what + f"all {len(beats)} processes wait at {self._facts['doing']}; no one is behind"
        return what + "; ".join(f"process {i} is behind, at {everyone[i].get('doing', 'the start')}" for i in behind)

    def _dump_stacks(self) -> None:
        with tempfile.TemporaryFile("w+") as file:  # the handler wants a descriptor, which a bucket has not
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            (self._directory / f"stacks-{self._process}.txt").write_text(file.read())

    def _end(self, line: str, code: int) -> NoReturn:
        self._ending.acquire()  # never let go: the first line counts, who comes second waits for the end
        with contextlib.suppress(OSError):
            self._write(ended=[line, code])
        with contextlib.suppress(Exception):  # what cannot be recorded is printed all the same
            self._record(line, code)
        print(f"error: {line}", file=sys.stderr, flush=True)
        if self._process == 0:  # with process 0 goes JAX's coordinator, and without it JAX aborts the others
            self._wait_for_the_others()
        os._exit(code)

    def _wait_for_the_others(self) -> None:
        deadline = time.monotonic() + _LINGER_BEATS * self._every + 2
        while time.monotonic() < deadline and not all(
            peer.facts.get("ended") or peer.silent(_SILENT_BEATS * self._every) for peer in self._peers.values()
        ):
            time.sleep(self._every / 4)
            for peer in self._peers.values():
                peer.look()


def _of(process: int, line: str) -> str:
    return line if line.startswith(("process ", "no step ")) else f"process {process} failed: {line}"
