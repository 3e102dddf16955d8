"""The training loop of a pack, all seeds of all its runs at once: evaluate and save if due, take the batch, then step.

A pack is runs of one shape: they differ in seeds, learning rate and weight decay. A run alone is a pack of one. What
each leaves in its directory is a function of its own config: a run that was stopped or killed at any moment and started
again, alone or with others, ends with the same parameters and the same metrics (timings aside).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from mha_jax.data import Data, load
from mha_jax.specs import RunSpec, UserError
from mha_jax.training import hosts
from mha_jax.training.clock import Clock
from mha_jax.training.diagnosis import first_non_finite
from mha_jax.training.evaluation import count_heads, evaluate, evaluate_bleu
from mha_jax.training.finished import parent_state, with_parent
from mha_jax.training.optimizers import hyperparameters
from mha_jax.training.parallel import JitProgram, make_program
from mha_jax.training.part import NonFiniteLoss, Part
from mha_jax.training.step import State, init_state

Outcome = Literal["done", "stopped"] | Exception


class _Pack:
    """The pieces of a pack in progress. `_train` below is the story; these are its verbs."""

    def __init__(self, parts: Sequence[Part], data: Data, program: JitProgram, clock: Clock):
        self.parts, self.data, self.program, self.clock = parts, data, program, clock
        self.run = parts[0].run
        self.seeds = [seed for part in parts for seed in part.run.seeds]
        self._hyperparameters = hyperparameters([part.run for part in parts])
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        start = 0
        for part in parts:
            end = start + len(part.run.seeds)
            part.members, part.share = slice(start, end), (end - start) / len(self.seeds)
            start = end

    @property
    def going(self) -> list[Part]:
        """The parts that have not failed. Failed ones stay in the program, whose other members they do not touch."""
        return [part for part in self.parts if part.error is None]

    def load(self, states: Sequence[State | None]) -> State:
        """The state of all members, from those that were restored; None: from step 0."""
        # Before anything is compiled, as a parent may be wrong.
        parents = [_parent(part.run) if state is None else {} for part, state in zip(self.parts, states, strict=True)]
        with self.clock("compile"):
            begun = [
                with_parent(init_state(part.run), parent) if state is None else state
                for part, state, parent in zip(self.parts, states, parents, strict=True)
            ]
            return self.program.load(_joined(begun))

    def step(self, state: State, batch: dict[str, Any], number: int) -> State:
        """Dispatches step `number` (from 1) and only then waits for the metrics of the one before."""
        earlier = self._pending
        with self._timed("train"):
            state, metrics = self.program.step(state, batch, self._hyperparameters)
            found = _fetched(earlier)
        self._book(state, found)
        self._pending = (number, metrics)
        return state

    def settle(self, state: State) -> None:
        """Waits for the last dispatched step and books it."""
        with self._timed("train"):
            found = _fetched(self._pending)
        self._book(state, found)
        self._pending = None

    def _book(self, state: State, found: tuple[int, dict[str, np.ndarray]] | None) -> None:
        if found is None:
            return
        number, metrics = found
        for part in self.going:
            own = part.of_pack(metrics)
            if not own["good"].all():
                self._fail(part, state, number, own["good"])
                continue
            part.window.add(own)
            if number % self.run.training.log_every == 0 or number == self.run.training.steps:
                part.log_window(number, own)
                part.report(self.facts(part, number))

    def _fail(self, part: Part, state: State, number: int, good: np.ndarray) -> None:
        index = int(np.argmin(good))
        seed, batch = part.run.seeds[index], self.data.train_batch(part.run.seeds[index], number - 1)
        where = first_non_finite(part.run, self.program.unload(state), part.members.start + index, batch)
        part.error = NonFiniteLoss(f"loss is not finite at step {number}, seed {seed}; first seen in {where}")
        part.close()

    def facts(self, part: Part, step: int) -> dict[str, Any]:
        """What a run's status tells about itself while it goes: of the pack's time, its own share by members."""
        seconds = {**self.clock.seconds, "other": self.clock.other}
        return {
            "step": step,
            "seconds": {name: round(part.share * value, 3) for name, value in seconds.items()},
            "packed_with": [other.directory.name for other in self.parts if other is not part],
            "predicted_peak_bytes": self.program.predicted_peak_bytes,
            "attention": self.program.attention,
        }

    def tell(self, step: int) -> None:
        for part in self.going:
            part.report(self.facts(part, step))

    @contextlib.contextmanager
    def _timed(self, category: str) -> Iterator[None]:
        """Puts time on the clock, what was compiled apart; that of training is in the lines of the log as well."""
        before, compiled = self.clock.seconds[category], self.program.compile_seconds
        with self.clock(category):
            yield
        self.clock.move(self.program.compile_seconds - compiled, category, "compile")
        if category == "train":
            for part in self.going:
                part.window.seconds += part.share * (self.clock.seconds[category] - before)

    def _evaluate(self, params: Any, constants: Any, split: str) -> dict[str, np.ndarray]:
        values = evaluate(self.program, params, constants, self.data, split)
        return values | count_heads(self.run, params, constants)

    def evaluate(self, state: State, step: int) -> float:
        """The mean loss over all members, for the eye; each run gets its own in its log."""
        with self._timed("eval"):
            state = self.program.unload(state)
            values = self._evaluate(state["params"], state["constants"], "validation")
        going = self.going
        for part in going:
            part.log_validation(step, part.of_pack(values))
            if part.error is not None:  # given up
                part.report(self.facts(part, step))
        return float(np.mean([np.mean(part.of_pack(values)["loss"]) for part in going]))

    def save(self, state: State, step: int) -> None:
        with self.clock("save"):
            for part, own in zip(self.parts, self._split(self.program.unload(state)), strict=True):
                if part.error is None:
                    part.save(own, step)

    def wait(self) -> None:
        with self.clock("save"):
            for part in self.going:
                part.checkpoints.wait()

    def finish(self, state: State) -> None:
        """The numbers of the table: every split, whole, with the averaged parameters where averaging is asked for."""
        run, step = self.run, self.run.training.steps
        state = self.program.unload(state)
        own = list(zip(self.parts, self._split(state), strict=True))
        with self.clock("save"):
            finals = [part.final_params(self.program, s) if part.error is None else s["params"] for part, s in own]
            params = _joined(finals, like=state["params"])
        for split in self.data.splits:
            with self._timed("eval"):
                values = self._evaluate(params, state["constants"], split)
                if run.task == "translation":
                    scores, signature, sentences = evaluate_bleu(
                        self.program, params, state["constants"], self.data, split
                    )
                    values |= scores
                    for part in self.going:
                        part.write_translations(split, sentences[part.members])
                        part.report({"bleu_signature": signature})
            for part in self.going:
                part.log.write(step, split, part.of_pack(values))
        for (part, s), final in zip(own, finals, strict=True):
            if part.error is None:
                if run.gates.prunes:
                    part.write_gates(final, s["constants"])
                part.log.write(step, "train", {"compile_seconds": part.share * self.clock.seconds["compile"]})
                part.close()

    def _split(self, state: State) -> list[State]:
        """The state of each part; copied through the host, as slices of the devices' arrays would be compiled."""
        if len(self.parts) == 1:
            return [state]
        state = jax.tree.map(np.asarray, state)
        return [jax.tree.map(lambda leaf, own=part.members: leaf[own].copy(), state) for part in self.parts]


def _joined(trees: Sequence[Any], like: Any = None) -> Any:
    """One tree of all members, on the devices of `like` where it is given."""
    if len(trees) == 1:
        return trees[0]
    joined = jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), *trees)
    return joined if like is None else jax.tree.map(lambda leaf, old: jax.device_put(leaf, old.sharding), joined, like)


def _fetched(pending: tuple[int, dict[str, jax.Array]] | None) -> tuple[int, dict[str, np.ndarray]] | None:
    return None if pending is None else (pending[0], jax.device_get(pending[1]))


def _parent(run: RunSpec) -> State:
    return {} if run.training.start_from is None else parent_state(run)


@contextlib.contextmanager
def _progress(parts: Sequence[Part], start: int, shown: bool) -> Iterator[Any]:
    run, others = parts[0].run, len(parts) - 1
    name = run.name + (f" and {others} more" if others else "")
    with tqdm(total=run.training.steps, initial=start, desc=name, unit="step", disable=not shown) as bar:
        yield bar


def train(
    parts: Sequence[Part],
    *,
    cache_dir: epath.Path,
    should_stop: Callable[[], bool],
    progress: bool = True,
) -> list[Outcome]:
    """Trains runs of one shape together, each from its newest good checkpoint to its last step, and evaluates them.

    Those that begin at the same step go together; where the steps differ, the packs are trained one after the other.
    A run whose loss is not finite leaves the pack; what the others compute does not change.

    Args:
      cache_dir:   prepared data sets, shared by all runs of a sweep.
      should_stop: asked before every step; when true, the states are saved.
    Returns: how each ended: "done", "stopped", or what it failed of: UserError before anything was compiled for it,
      NonFiniteLoss with the step, seed and layer.
    Raises:  what went wrong with all of them.
    """
    run, clock = parts[0].run, Clock()
    with clock("data"):
        data = load(run.data, run.task, cache_dir)
    program: JitProgram = make_program(run, jax.devices())
    ended: dict[Part, Outcome] = {}
    starts: dict[int, list[tuple[Part, State | None]]] = {}
    for part in parts:
        part.begin(data)
        try:
            with clock("save"):
                step, state = part.restore(program)
            starts.setdefault(step, []).append((part, state))
        except UserError as error:
            ended[part] = error
        for problem in part.problems:
            tqdm.write(f"warning: {problem}")
        if part.problems:
            part.report({"incidents": part.problems})
    for step, together in starts.items():
        pack = _Pack([part for part, _ in together], data, program, clock)
        outcome = _train(pack, step, pack.load([state for _, state in together]), should_stop, progress)
        ended |= {part: part.error or outcome for part in pack.parts}
        clock = Clock()
    return [ended[part] for part in parts]


def _train(
    pack: _Pack, start: int, state: State, should_stop: Callable[[], bool], progress: bool
) -> Literal["done", "stopped"]:
    spec = pack.run.training
    pack.tell(start)
    batches = pack.data.train_stream(pack.seeds, start, pack.program.share)
    with _progress(pack.parts, start, progress) as bar:
        for step in range(start, spec.steps + 1):
            hosts.beat(f"step {step}")
            stopping = step < spec.steps and should_stop()
            fresh = step > start or start == 0
            evaluating = fresh and 0 < step < spec.steps and step % spec.eval_every == 0
            saving = fresh and step > 0 and (step % spec.checkpoint_every == 0 or step == spec.steps or stopping)
            if evaluating or saving:
                pack.settle(state)
            if not pack.going:
                break
            if evaluating:
                bar.set_postfix(loss=f"{pack.evaluate(state, step):.4f}", refresh=False)
            if saving:
                pack.save(state, step)
            if stopping:
                pack.wait()
                pack.tell(step)
                return "stopped"
            if step < spec.steps:
                with pack.clock("data"):
                    batch = next(batches)
                state = pack.step(state, batch, step + 1)
                bar.update()
        else:
            pack.finish(state)
            pack.tell(spec.steps)
    return "done"
