"""`lxscale`: its commands, and how they end."""

from __future__ import annotations

import argparse
import errno
import importlib
import sys
from typing import NoReturn

from cluster.cli.signals import Signals
from cluster.cli.streams import open_closed_streams, reader_has_gone, say, silence, stdout_problem
from shards.urls import shown

# The module of each command offers `add_arguments(parser)`, which sets `func`: called with the
# parsed arguments, it returns the exit status. A module is imported when its command is asked for:
# torch and Ray take seconds.
COMMANDS = {
    "train": ("cluster.cli.train", "pre-train, or go on with, the run of a YAML file"),
    "submit": ("cluster.cli.submit", "train on a Ray cluster, as a job of it"),
    "status": ("cluster.cli.status", "how a run stands, from its storage alone"),
    "runs": ("cluster.cli.runs", "how all runs of a storage stand"),
    "logs": ("cluster.cli.logs", "what a run's job says"),
    "stop": ("cluster.cli.stop", "have a run's job save and end"),
    "resubmit": ("cluster.cli.resubmit", "go on with a run, from its storage alone"),
    "watch": ("cluster.cli.watch", "bring a run to its end, whatever is lost on the way"),
    "shards": ("cluster.cli.shards", "build, verify and describe data sets"),
    "cache": ("cluster.cli.cache", "list, verify and clean a node's cache"),
    "evaluate": ("cluster.cli.evaluate", "the metrics of a checkpoint over a data set"),
    "predict": ("cluster.cli.predict", "a checkpoint's answers, as a task's evaluation takes them"),
    "score": ("cluster.cli.score", "official metrics of a file of predictions: VQA, GQA, NLVR2"),
    "show": ("cluster.cli.show", "a page of what a checkpoint does with pairs"),
    "compare": ("cluster.cli.compare", "train and measure a table of runs, as the paper's"),
    "checkpoint": ("cluster.cli.checkpoint", "list, verify, remove and export checkpoints"),
    "goodput": ("cluster.cli.goodput", "what part of a run's time is in steps that are kept"),
    "doctor": ("cluster.cli.doctor", "check this machine, or a cluster's nodes, before a run"),
    "demo": ("cluster.cli.demo", "build, train and evaluate on easy-VQA"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command. Exit status: 0 done, 1 problems found, 2 a user's error, 3 the run is
    another job's, 75 run it again, 130 ended by SIGINT (Ctrl-C), 143 by SIGTERM, 141 as nobody
    reads its output any more (`| head`).

    argv: by default the process's, whose signals are then handled here to its end.
    """
    signals = Signals(own_process=argv is None)
    open_closed_streams()
    arguments = parse(sys.argv[1:] if argv is None else argv)
    from cluster.errors import USER_ERRORS, exit_status
    from trainer.logs import setup_logging

    setup_logging()
    status = 141
    try:
        with signals.at_work():
            status = arguments.func(arguments)
    except USER_ERRORS as error:
        status = signals.tell(f"error: {error}", exit_status(error))
    except KeyboardInterrupt:
        status = signals.aborted()
    except OSError as error:
        # Of stdout; what else is written has errors of its own, with the file's name.
        if error.errno == errno.ENOSPC and error.filename is None:
            status = signals.tell(f"error: cannot write to stdout: {error.strerror}", 2)
        elif not (isinstance(error, BrokenPipeError) and reader_has_gone()):
            raise  # of another pipe, or unforeseen
        silence(sys.stdout)
    if problem := stdout_problem():
        silence(sys.stdout)
        if not isinstance(problem, BrokenPipeError):
            say(f"error: cannot write to stdout: {problem.strerror}")
            status = status or 2
    return status


class _Parser(argparse.ArgumentParser):
    """Its errors show no passwords."""

    def error(self, message: str) -> NoReturn:
        super().error(shown(message))


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of a command line; a wrong one ends the process with status 2 and the usage."""
    parser = _Parser(
        prog="lxscale", description="Pre-train LXMERT on a cluster and never lose a sample."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, help_) in COMMANDS.items():
        command = commands.add_parser(name, help=help_)
        if name in argv:
            importlib.import_module(module).add_arguments(command)
    arguments, rest = parser.parse_known_args(argv)
    # argparse gives a list of positionals no more once an option stood between, nor what follows
    # on a "--", after which there are no options.
    end = rest.index("--") if "--" in rest else len(rest)
    if "overrides" in arguments and not any(r.startswith("-") for r in rest[:end]):
        arguments.overrides += rest[:end] + rest[end + 1 :]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments
