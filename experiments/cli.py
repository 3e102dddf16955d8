"""What the scripts share: config flags with overrides, one line for a user's mistake, exit codes."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from mha_jax import config as configs
from mha_jax.specs import UserError
from mha_jax.storage import told
from mha_jax.sweeps import grid, preparation
from mha_jax.training import hosts


def run(main: Callable[[list[str]], int]) -> None:
    """Calls main(sys.argv) and exits with its code, or with 2 and one line where what the user gave is wrong, a disk
    that is full or cannot be written, and a bucket that cannot be reached for want of a library, included."""
    try:
        code = main(sys.argv)
    except UserError as error:
        complain(str(error))
        code = 2
    except (OSError, ImportError) as error:
        if not told(error):
            raise
        complain(str(told(error)))
        code = 2
    sys.exit(int(code))


def complain(text: str) -> None:
    print("error: " + " ".join(text.split("\n")), file=sys.stderr)


def parse(values: flags.FlagValues, argv: list[str], about: str | None) -> None:
    """Parses the command line into `values`; prints the help and exits where --help is given."""
    if "--help" in argv or "-h" in argv:
        print(f"{about or ''}\n\n{values.get_help()}")
        sys.exit(0)
    try:
        rest = values(argv)[1:]
    except flags.Error as error:
        raise UserError(str(error)) from None
    if rest:
        raise UserError(f"{rest[0]!r} is not understood; every argument is a flag, --name=value")


def check_writable(flag: str, path: Path) -> None:
    """Makes the directory of a file that is to come, and leaves the file as it is.

    Raises: UserError where it cannot be written, which would else be found when the work is done.
    """
    there = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise UserError(f"--{flag}={path} cannot be written ({error.strerror}); give another place") from None
    if not there:
        path.unlink()


def define_config(values: flags.FlagValues, argv: list[str]) -> None:
    """--config=configs/NAME.py[:profile], and --config.field=value for each of its fields.

    The file and the names of the fields are checked here: the flags' own parser answers with a traceback.
    """
    path = _given(argv)
    if path is not None:
        _check_overrides(argv, grid.load(path))
    config_flags.DEFINE_config_file("config", None, "Config file[:profile].", flag_values=values, sys_argv=argv)


def define_hosts(values: flags.FlagValues) -> None:
    """--coordinator, --num_processes, --process_id, or --multihost, where several processes train one run."""
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, where the processes of a run meet.", flag_values=values
    )
    flags.DEFINE_integer("num_processes", None, "How many processes train each run.", 1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.", 0, flag_values=values)
    flags.DEFINE_bool(
        "multihost", False, "Several processes, as the TPU pod, Slurm or Open MPI tells.", flag_values=values
    )
    flags.DEFINE_float(
        "watchdog_seconds",
        600.0,
        "Several processes: no step ends for so long, and the run is ended, naming who does not answer; 0: never.",
        flag_values=values,
    )


def enrol(values: flags.FlagValues) -> None:
    """Finds this process's place among several. Raises UserError for flags that do not go together."""
    given: dict[str, Any] = {name: values[name].value for name in ("coordinator", "num_processes", "process_id")}
    missing = [name for name, value in given.items() if value is None]
    if values.multihost and len(missing) < len(given):
        raise UserError("--multihost asks the cluster; leave out --coordinator, --num_processes and --process_id")
    if not values.multihost and missing and len(missing) < len(given):
        raise UserError(f"--{missing[0]} is missing: --coordinator, --num_processes and --process_id go together")
    alone_or_given = hosts.Group() if missing else hosts.Group(**given)
    group = preparation.cluster() if values.multihost else alone_or_given
    hosts.enrol(dataclasses.replace(group, watchdog_seconds=values.watchdog_seconds))


def study(values: flags.FlagValues) -> grid.Study:
    """The study that --config names, with the overrides applied."""
    if values["config"].value is None:
        raise UserError("--config is missing, for instance --config=configs/default.py")
    flag = values["config"]
    return grid.load(config_flags.get_config_filename(flag), config_flags.get_override_values(flag))


def _given(argv: list[str]) -> str | None:
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        name, equals, value = argument.partition("=")
        if name.lstrip("-") == "config" and name.startswith("-"):
            return value if equals else following
    return None


def _check_overrides(argv: list[str], loaded: grid.Study) -> None:
    fields = list(configs.flatten(loaded.config))
    sections = {field.rsplit(".", depth)[0] for field in fields for depth in range(1, field.count(".") + 1)}
    for argument in argv[1:]:
        name = argument.partition("=")[0].lstrip("-").removeprefix("no")
        if argument.startswith("-") and name.startswith("config.") and name[7:] not in {*fields, *sections}:
            raise configs.unknown_field(name[7:], fields)
