"""The command line: `lxscale train | shards | evaluate | export | demo`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from cluster.cli.shards import add_shards_parser
from cluster.errors import USER_ERRORS
from trainer.audit import audit
from trainer.config import load_config
from trainer.export import evaluate_checkpoint, export_huggingface
from trainer.progress import format_metrics, setup_logging
from trainer.setup import run_url


def main(argv: list[str] | None = None) -> int:
    """Run one command. Exit status: 0 done, 1 problems found, 2 a user's error, 130 stopped."""
    arguments = _parse(argv)
    setup_logging()
    try:
        status: int = arguments.func(arguments)
        return status
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("aborted", file=sys.stderr)
        return 130


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse gives a list of positionals no more once an option stood between.
    if "overrides" in arguments and not any(r.startswith("-") for r in rest):
        arguments.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lxscale", description="Pre-train LXMERT on a cluster and never lose a sample."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shards = add_shards_parser(commands)
    proof = shards.add_parser("audit", help="prove what a run has consumed")
    proof.add_argument("run", help="a run's folder or URL, or a checkpoint's manifest")
    proof.add_argument("--data", nargs="+", metavar="URL", help="where its data sets are now")
    proof.add_argument("--cache", help="folder of the node cache")
    proof.set_defaults(func=_audit)

    train = commands.add_parser("train", help="pre-train, or go on with, the run of a YAML file")
    train.add_argument("config", help="YAML file of the run")
    train.set_defaults(func=_train)

    demo = commands.add_parser("demo", help="build, train and evaluate on easy-VQA")
    demo.add_argument("--full", action="store_true", help="train on to at least 99 %%")
    demo.set_defaults(func=_demo)
    for command in (train, demo):
        command.add_argument("overrides", nargs="*", metavar="section.key=value")
        command.add_argument("--ray-address", help="join this Ray cluster (default: a local one)")

    evaluate = commands.add_parser("evaluate", help="every objective's metrics of a checkpoint")
    evaluate.add_argument("checkpoint", help="a run's folder or URL, or a checkpoint's manifest")
    evaluate.add_argument("--data", required=True, help="folder or URL of a data set")
    evaluate.add_argument("--blind", action="store_true", help="zero all features")
    evaluate.add_argument("--batch", type=int, default=256, help="pairs per batch")
    evaluate.add_argument("--cache", help="folder of the node cache")
    evaluate.add_argument("--json", action="store_true", help="print the metrics as JSON")
    evaluate.add_argument("--predictions", type=Path, help="write the predicted answers as JSON")
    evaluate.set_defaults(func=_evaluate)

    export = commands.add_parser("export", help="write a checkpoint for Hugging Face")
    export.add_argument("checkpoint", help="a run's folder or URL, or a checkpoint's manifest")
    export.add_argument("--out", type=Path, required=True, help="folder to write")
    export.set_defaults(func=_export)
    return parser


def _audit(arguments: argparse.Namespace) -> int:
    found = audit(
        arguments.run,
        arguments.data,
        arguments.cache,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    for line in [*found.lines, *(f"problem: {p}" for p in found.problems)]:
        print(line)
    print(f"{arguments.run}: {f'{len(found.problems)} problems' if found.problems else 'proved'}")
    return 1 if found.problems else 0


def _train(arguments: argparse.Namespace) -> int:
    # Ray takes a second to import: only commands that need it do.
    from cluster.launch import launch

    config = load_config(arguments.config, arguments.overrides)
    result = launch(config, ray_address=arguments.ray_address)
    url = run_url(config)
    if result["stopped"]:
        print(f"stopped at step {result['step']}, saved in {url}; the same command goes on")
        return 130
    print(f"done: step {result['step']}, saved in {url}")
    if result["metrics"]:
        print(f"validation: {format_metrics(result['metrics'])}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from cluster.cli.demo import demo

    return demo(arguments.full, arguments.overrides, arguments.ray_address)


def _evaluate(arguments: argparse.Namespace) -> int:
    metrics = evaluate_checkpoint(
        arguments.checkpoint,
        arguments.data,
        cache=arguments.cache,
        batch_size=arguments.batch,
        blind=arguments.blind,
        predictions=arguments.predictions,
    )
    if arguments.json:
        print(json.dumps(metrics, indent=1))
    else:
        for name, value in metrics.items():
            print(f"{name:32} {value:.4f}")
    if arguments.predictions:
        print(f"predictions: {arguments.predictions}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    generation = export_huggingface(arguments.checkpoint, arguments.out)
    print(f"{generation.url} -> {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
