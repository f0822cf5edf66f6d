"""``bbopd plan run.yaml``: before anything runs, what it holds, takes and costs, whether it fits, and how it would scale."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bbopd.cluster.needs import Placement
    from bbopd.config import RunConfig
    from bbopd.planning.machine import Machine
    from bbopd.planning.rates import Rates
    from bbopd.planning.scaling import ScalePoint

__all__ = ["add_arguments", "run"]

_MEASURED_CYCLES = 4  # of which the first one is not counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="the run's YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="lay one value over the file; may be repeated")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--gpus", type=int, default=1, metavar="N", help="that train (default: 1)")
    machine.add_argument("--engines", type=int, default=1, metavar="N", help="GPUs that sample (default: 1)")
    machine.add_argument("--gpu", metavar="NAME", help="a100, b200, h100, h200, l40s or rtx4090: its memory, and rates by its data sheet")
    machine.add_argument("--gpu-memory", type=float, metavar="GIB", help="of one GPU, where it is another")
    nodes = parser.add_argument_group(
        "cluster", "for --ray: where the processes of the section cluster have room; --gpus is then cluster.ranks"
    )
    nodes.add_argument("--nodes", type=int, metavar="N", help="that the cluster has")
    nodes.add_argument("--node-gpus", type=int, default=8, metavar="N", help="of each (default: 8)")
    nodes.add_argument("--node-cpus", type=int, default=64, metavar="N", help="of each (default: 64)")
    rates = parser.add_argument_group("rates", "how fast each stage is; by default assumed of --gpu").add_mutually_exclusive_group()
    rates.add_argument("--rates", metavar="FILE", help="JSON: sampling, scoring, training in tokens a second, and gpus (docs/planning.md)")
    rates.add_argument("--from", dest="run", metavar="RUN", help="as the run in this folder had them")
    rates.add_argument("--measure", action="store_true", help="run a few cycles here, in a folder of their own that is removed again")
    shapes = parser.add_argument_group("shapes", "where a model's configuration cannot be fetched, or the teacher is elsewhere")
    shapes.add_argument("--student-config", metavar="FILE", help="a config.json, or a model's id or folder")
    shapes.add_argument("--teacher-config", metavar="FILE", help="the same of the teacher, to assume how fast it scores")
    shapes.add_argument("--teacher-gpus", type=int, default=8, metavar="N", help="that it then has, of the same kind (default: 8)")
    parser.add_argument(
        "--simulate",
        nargs="?",
        const="",
        metavar="N,N",
        help="run the pipeline over timed stages on so many GPUs (default: to 4,096 by fours)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")


def run(args: argparse.Namespace) -> int:
    """0 where it fits, or nobody said into what; 1 where it does not."""
    from bbopd.cluster.needs import as_one_rank
    from bbopd.config_file import load_config
    from bbopd.planning.lines import plan_lines
    from bbopd.planning.plan import Planner
    from bbopd.planning.remedies import find_remedies
    from bbopd.planning.scaling import Mishaps, scale

    config = load_config(args.config, args.set)
    cluster = None
    if args.nodes is not None:
        cluster, teacher = _on_cluster(args, config), config.teacher.serve
        args.gpus, args.engines = config.cluster.ranks, max(1, config.cluster.engines[0])
        args.teacher_config = args.teacher_config or (teacher.model if teacher is not None else None)
        config = as_one_rank(config)
    machine = _machine(args)
    rates = _rates(args, config, machine)
    planner = Planner(student=args.student_config, teacher=args.teacher_config, rates=rates, teacher_gpus=args.teacher_gpus)
    plan = planner.plan(config, machine)
    remedies = find_remedies(planner, plan) if plan.problems else []
    sizes = _sizes(args.simulate, machine.gpus) if args.simulate is not None else ()
    points = scale(plan, sizes, Mishaps()) if sizes else iter(())
    if args.json:
        told = [{"change": remedy.words, "costs": remedy.costs, "peak": remedy.plan.memory.peak} for remedy in remedies]
        found = {"config": args.config, **plan.to_json(), "remedies": told, "scaling": [point.to_json() for point in points]}
        print(json.dumps(found if cluster is None else {**found, "cluster": cluster.to_json()}))
    else:
        for line in plan_lines(plan, remedies):
            print(line)
        for line in cluster.lines() if cluster is not None else ():
            print(line)
        if sizes:
            _print_scaling(points)
    return 1 if plan.problems or (cluster is not None and cluster.problem) else 0


def _on_cluster(args: argparse.Namespace, config: RunConfig) -> Placement:
    from bbopd.cluster.needs import Node, Placement
    from bbopd.errors import ConfigError

    if args.nodes < 1 or args.node_gpus < 0 or args.node_cpus < 1:
        raise ConfigError(f"--nodes {args.nodes} of {args.node_gpus} GPUs and {args.node_cpus} CPUs: give a node or more, each with a CPU")
    return Placement.of(config, [Node(f"node {number}", args.node_cpus, args.node_gpus) for number in range(1, args.nodes + 1)])


def _print_scaling(points: Iterator[ScalePoint]) -> None:
    """Each row as it is there."""
    from bbopd.planning.lines import break_line, scale_line, scale_title
    from bbopd.planning.scaling import break_of

    print(f"\n{scale_title()}")
    found = []
    for point in points:
        print(scale_line(point), flush=True)
        found.append(point)
    print(break_line(break_of(found)))


def _sizes(text: str, first: int) -> tuple[int, ...]:
    from bbopd.errors import ConfigError
    from bbopd.planning.scaling import sizes_up_to

    if not text:
        return sizes_up_to(first)
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise ConfigError(f"--simulate {text!r}: give numbers of GPUs, 8,64,512 say, or none") from None


def _machine(args: argparse.Namespace) -> Machine:
    from bbopd.errors import ConfigError
    from bbopd.planning.machine import GIB, Machine, find_gpu

    counts = {name: getattr(args, name) for name in ("gpus", "engines", "gpu_memory", "teacher_gpus")}
    for name, value in counts.items():
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}: give a number above 0")
    gpu = None if args.gpu is None else find_gpu(args.gpu)
    memory = args.gpu_memory or (None if gpu is None else gpu.memory)
    return Machine(args.gpus, None if memory is None else memory * GIB, gpu, args.engines)


def _rates(args: argparse.Namespace, config: RunConfig, machine: Machine) -> Rates | None:
    from bbopd.planning.observed import rates_of_run
    from bbopd.planning.rates import read_rates

    if args.rates is not None:
        return read_rates(args.rates)
    if args.run is not None:
        return rates_of_run(args.run, gpus=machine.gpus, engines=machine.engines)
    return _measure(config, machine) if args.measure else None


def _measure(config: RunConfig, machine: Machine) -> Rates:
    """A few cycles of the very run, with next to no evaluation; what it prints goes to the standard error."""
    from bbopd.cli.execute import execute
    from bbopd.config import RunConfig
    from bbopd.config_file import parse_config
    from bbopd.planning.observed import rates_of_run
    from bbopd.planning.tokens import Lengths, cycle_of

    place = Path(config.output).absolute().parent
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bbopd-plan-", dir=place) as folder:
        short: dict[str, Any] = config.model_dump(mode="json")
        cold_start = 1 if config.objective.name == "gad" else 0
        steps = _MEASURED_CYCLES * cycle_of(config, None, Lengths.given(config)).steps
        short["train"] |= {"total_steps": steps, "cold_start_tokens": cold_start, "warmup": 0}
        short["objective"]["ramp"] = 0
        short["eval"] = {"sequences": 1, "rollouts": 1, "max_new_tokens": 1, "samples": 0}
        short |= {"output": folder, "track": []}
        with contextlib.redirect_stdout(sys.stderr):
            execute(parse_config(short, [], RunConfig, "--measure"), plain=True)
        return rates_of_run(folder, gpus=machine.gpus, engines=machine.engines)
