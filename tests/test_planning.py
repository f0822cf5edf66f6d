"""Plans against what they plan: bytes of real tensors, seconds of a real run, published sizes of known models."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from bbopd.cli.main import main
from bbopd.config import LoRAConfig, RunConfig, StudentConfig, TrainConfig
from bbopd.config_file import load_config
from bbopd.errors import ConfigError
from bbopd.modeling import empty_model, packed_attention, packed_hidden, trained_bytes
from bbopd.modeling.shapes import measure_activations, shape_of
from bbopd.pipeline.student import empty_student, load_student
from bbopd.planning.lines import plan_lines
from bbopd.planning.machine import GIB, GPUS, Machine
from bbopd.planning.observed import rates_of_run
from bbopd.planning.plan import Planner
from bbopd.planning.rates import Rates, read_rates
from bbopd.planning.remedies import find_remedies
from bbopd.planning.scaling import Mishaps, break_of, scale, sizes_up_to
from bbopd.trainer.optimizer import build_optimizer
from tests.test_loop import Rig, run_config
from tests.tiny_models import save_folder, tiny_gemma2, tiny_llama, tiny_qwen2

CONFIGS = Path(__file__).parents[1] / "configs"
LAYERS = 4  # of the tiny student: enough for what is of no layer to be told from what is


def shape(folder: Path, name: str, layers: int) -> str:
    """A known model with few of its layers."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**json.loads((CONFIGS / "shapes" / path.name).read_text()), "num_hidden_layers": layers}))
    return str(path)


def student_folder(folder: Path, **sizes) -> Path:
    return save_folder(folder / "model", tiny_llama(layers=LAYERS, **sizes))


# ------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-32b", 32_763_876_352),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
    ],
)
def test_shapes_of_known_models_have_their_published_sizes(name, parameters):
    with torch.device("meta"):
        assert shape_of(empty_model(CONFIGS / "shapes" / f"{name}.json"), name).parameters == parameters


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora": LoRAConfig(rank=64)},
        {"lora": LoRAConfig(rank=64), "quantize": "nf4"},
        {"lora": LoRAConfig(rank=64), "quantize": "int8"},
    ],
    ids=["all weights", "lora", "nf4", "int8"],
)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_weights_and_moments_are_planned_to_the_byte(tmp_path, options, optimizer):
    folder = student_folder(tmp_path, hidden=128, vocab_size=640)
    student = StudentConfig(model=str(folder), dtype="float32", **options)
    model = load_student(student, 0, True)
    train = TrainConfig(optimizer=optimizer, warmup=0)
    optimizer_now = build_optimizer(model, train)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer_now.step()
    held = [one for entry in optimizer_now.state.values() for one in entry.values() if torch.is_tensor(one) and one.ndim]
    moments = sum({one.data_ptr(): one.nbytes for one in held}.values())

    config = run_config(tmp_path / "run").model_copy(update={"student": student, "train": train})
    parts = {part.name: part.size for part in Planner().plan(config, Machine(1, None, None)).memory.parts}
    assert parts["weights"] == parts["gradients"] == trained_bytes(model)
    frozen = sum(one.nbytes for one in model.parameters() if not one.requires_grad)
    assert parts.get("frozen weights", 0) == frozen
    # codes have scales, and norms keep 32 bits: a few percent of a model as small as this
    assert parts["optimizer"] == pytest.approx(moments, rel=1e-9 if optimizer == "adamw" else 0.15)


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_gemma2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_planned_as_a_real_pass_keeps_them(tmp_path, make, dtype, checkpointing):
    model = make()
    folder = save_folder(tmp_path / "model", model)
    lengths = [32] * 5 if make is tiny_gemma2 else [20, 33, 20, 47]  # Gemma's attention keeps its weights: more of longer sequences
    total = model.config.num_hidden_layers
    build = lambda layers: empty_model(folder, keep_layers=range(layers))  # noqa: E731
    planned = measure_activations(build, total, dtype, sequence_tokens=32, checkpointing=checkpointing)
    assert planned is not None
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    kept = _kept(model, lengths, dtype)
    assert planned.of_token * sum(lengths) + (0 if checkpointing else planned.cast_weights) == pytest.approx(kept, rel=0.05)
    assert checkpointing or planned.of_layer < planned.of_token


def _kept(model, lengths: list[int], dtype: torch.dtype) -> int:
    own = {one.untyped_storage().data_ptr() for one in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(sum(lengths)) % 250
    positions = torch.cat([torch.arange(length) for length in lengths])
    boundaries = torch.tensor([0, *lengths]).cumsum(0)
    packed_hidden(model.eval(), ids, positions, boundaries)  # settles how the model is packed
    model.train()
    with packed_attention(model), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), saved_tensors_hooks(keep, keep):
        hidden = packed_hidden(model, ids, positions, boundaries)
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_more_gpus_share_what_is_sharded_and_nothing_else(tmp_path):
    config = run_config(tmp_path / "run").model_copy(update={"student": StudentConfig(model=str(student_folder(tmp_path)))})
    one, four = ({part.name: part.size for part in Planner().plan(config, Machine(gpus, None, None)).memory.parts} for gpus in (1, 4))
    for name in ("weights", "optimizer"):
        assert four[name] == one[name] / 4
    for name in ("activations", "loss head", "libraries"):
        assert four[name] == one[name]
    assert four["whole student"] == one["weights"], "rank 0's own copy"


def test_what_several_ranks_cannot_train_is_refused_as_the_run_is(tmp_path):
    student = StudentConfig(model=str(student_folder(tmp_path)), lora=LoRAConfig(rank=4))
    config = run_config(tmp_path / "run").model_copy(update={"student": student})
    with pytest.raises(ConfigError, match=r"student\.lora"):
        Planner().plan(config, Machine(2, None, None))


# ------------------------------------------------------------ what fits


def h100(gpus: int = 1, **given) -> Machine:
    return Machine(gpus, 80 * GIB, GPUS["h100"], **given)


def test_what_does_not_fit_is_told_with_the_smallest_changes_that_make_it_fit(tmp_path):
    config = load_config(CONFIGS / "7b.yaml")
    planner = Planner(student=shape(tmp_path, "qwen2.5-7b", 4))
    plan = planner.plan(config, Machine(1, 40 * GIB, None))
    assert plan.problems
    remedies = find_remedies(planner, plan)
    assert remedies
    for remedy in remedies:
        assert not remedy.plan.problems
        assert remedy.plan.memory.peak <= 40 * GIB
    said = "\n".join(plan_lines(plan, remedies))
    assert all(remedy.words in said for remedy in remedies)
    counts = [remedy.gpus for remedy in remedies if remedy.gpus is not None]
    assert counts
    assert planner.changed(plan, {}, counts[0] // 2).problems, "fewer would not do"


def test_changes_that_do_not_do_alone_are_put_together_without_those_not_needed(tmp_path):
    config = load_config(CONFIGS / "fleet_topk.yaml", ["student.activation_checkpointing=false", "train.micro_batch_tokens=32768"])
    planner = Planner(student=shape(tmp_path, "qwen2.5-3b", 4))
    plan = planner.plan(config, Machine(1, 8 * GIB, None))
    remedies = find_remedies(planner, plan)
    assert len(remedies) == 1, "no single change does"
    for remedy in remedies:
        for left_out in remedy.sets:
            fewer = {key: value for key, value in remedy.sets.items() if key != left_out}
            changed = planner.changed(plan, fewer)
            assert changed is None or changed.problems, f"{left_out} is not needed"


def test_an_engine_without_room_for_a_sequence_is_a_problem(tmp_path):
    config = load_config(CONFIGS / "fleet_topk.yaml", ["rollouts.gpu_memory=0.05"])
    plan = Planner(student=shape(tmp_path, "qwen2.5-3b", 30)).plan(config, h100())
    assert plan.memory.engine_tokens < 0
    assert any("rollouts.gpu_memory 0.05" in problem for problem in plan.problems)


# ------------------------------------------------------------ time


async def test_the_planned_seconds_of_an_update_are_a_real_runs(tmp_path):
    config = run_config(
        tmp_path / "run",
        student={"model": str(student_folder(tmp_path, vocab_size=262)), "dtype": "float32"},
        rollouts={"per_update": 16, "max_new_tokens": 24, "max_staleness": 0},
        train={"batch_tokens": 128, "max_seq_len": 64, "cold_start_tokens": 100, "on_policy_tokens": 3000, "checkpoint_every": 1000},
    )
    rig = Rig(config)
    assert await rig.run() == "finished"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ends = {line["cycle"]: line["elapsed"] for line in lines if line["phase"] == "on_policy"}
    cycles = sorted(ends)
    seconds = sorted(ends[after] - ends[before] for before, after in pairwise(cycles))
    real = mean(seconds[len(seconds) // 4 : len(seconds) - len(seconds) // 4])

    rates = rates_of_run(tmp_path / "run")
    plan = Planner(rates=rates).plan(config, Machine(1, None, None))
    assert plan.pace is not None
    assert not plan.pace.unknown
    assert plan.pace.cycle == pytest.approx(real, rel=0.2)
    trained = sum(line["tokens"] for line in lines if line["phase"] == "on_policy") / len(cycles)
    assert plan.cycle.trained == pytest.approx(trained, rel=0.1)
    assert plan.pace.bottleneck == max(plan.pace.seconds, key=plan.pace.seconds.__getitem__)


def test_overlapping_cycles_take_as_long_as_the_slowest_stage_and_others_as_all_together(tmp_path):
    sets = ["rollouts.max_staleness=1"], ["rollouts.max_staleness=0"]
    rates = Rates(sampling=1000.0, scoring=500.0, training=4000.0, push=2.0)
    planner = Planner(student=shape(tmp_path, "qwen2.5-3b", 2), rates=rates)
    overlapping, in_turn = (planner.plan(load_config(CONFIGS / "fleet_topk.yaml", one), h100()) for one in sets)
    assert overlapping.pace is not None
    assert in_turn.pace is not None
    cycle = overlapping.cycle
    assert overlapping.pace.cycle == pytest.approx(cycle.scored / 500)
    assert in_turn.pace.cycle == pytest.approx(cycle.written / 1000 + 2 + cycle.scored / 500 + cycle.trained / 4000)
    assert overlapping.pace.bottleneck == "scoring"
    assert in_turn.seconds == pytest.approx(in_turn.pace.update * in_turn.updates)


def test_rates_that_cannot_be_read_are_refused_by_name(tmp_path):
    path = tmp_path / "rates.json"
    for text, message in (
        ("{", "is not JSON"),
        ('{"sampling": 0}', "sampling is 0"),
        ('{"speed": 3}', "speed"),
        ("[]", "list"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_rates(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_rates(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="no run"):
        rates_of_run(tmp_path)


# ------------------------------------------------------------ money, traffic, disk


def test_money_and_bytes_follow_from_the_tokens(tmp_path):
    folder = student_folder(tmp_path)
    priced = {"target": "openai://localhost:1/v1", "topk": 20, "prices": {"prompt": 2.0, "answer": 6.0, "currency": "EUR"}}
    config = run_config(tmp_path / "run", teacher=priced).model_copy(update={"student": StudentConfig(model=str(folder))})
    plan = Planner().plan(config, Machine(1, None, None))
    assert plan.cost == pytest.approx(plan.total.sequence_tokens * 2.0 / 1e6)
    assert plan.answers == plan.total.response_tokens * (20 * (2 + 2) + 8)
    assert plan.currency == "EUR"
    model_bytes = 4 * plan.shapes.student.parameters
    assert plan.checkpoint == pytest.approx(3 * model_bytes, abs=2**24 + 4096)
    assert plan.disk == pytest.approx(3 * plan.checkpoint + model_bytes, abs=4096)


# ------------------------------------------------------------ scaling


def timed(folder: Path, sets: list[str]) -> tuple[RunConfig, Planner]:
    small = ["rollouts.per_update=16", "train.batch_tokens=4096", *sets]
    rates = Rates(sampling=1500.0, training=6000.0)
    return load_config(CONFIGS / "fleet_topk.yaml", small), Planner(student=shape(folder, "qwen2.5-3b", 2), rates=rates)


QUIET = Mishaps(answer_spread=0.01, teacher_seconds=1e-4, teacher_failures=0.0, gpu_hours=1e12, step_spread=0.0, collective_seconds=0.0)


def test_without_mishaps_a_cycle_takes_what_the_plan_says_however_many_gpus_there_are(tmp_path):
    config, planner = timed(tmp_path, ["rollouts.max_staleness=0"])
    plan = planner.plan(config, h100())
    assert plan.pace is not None
    one, many = scale(plan, [1, 16], QUIET)
    assert one.update_seconds == pytest.approx(plan.pace.update, rel=0.1)
    assert many.efficiency == pytest.approx(1.0, abs=0.05)
    assert many.sequences == 16 * one.sequences
    assert break_of([one, many]) is None


def test_what_grows_with_the_gpus_breaks_the_line(tmp_path):
    config, planner = timed(tmp_path, [])
    plan = planner.plan(config, h100())
    stragglers = Mishaps(step_spread=0.3, teacher_failures=0.0)
    points = list(scale(plan, [1, 32], stragglers))
    assert break_of(points) is points[1]
    assert points[1].goodput < points[0].goodput
    assert points[1].driver > 0


def test_sizes_go_by_fours_to_the_end(tmp_path):
    assert sizes_up_to(1) == (1, 4, 16, 64, 256, 1024, 4096)
    assert sizes_up_to(8) == (8, 32, 128, 512, 2048, 4096)
    config, planner = timed(tmp_path, [])
    with pytest.raises(ConfigError, match="multiples"):
        list(scale(planner.plan(config, h100(8)), [12], QUIET))
    with pytest.raises(ConfigError, match="--gpu"):
        list(scale(planner.plan(config, Machine(1, None, None)), [1], QUIET))


# ------------------------------------------------------------ the command


def test_the_command_tells_a_person_and_a_program(tmp_path, capsys):
    given = ["plan", str(CONFIGS / "fleet_topk.yaml"), "--student-config", shape(tmp_path, "qwen2.5-3b", 4)]
    assert main([*given, "--gpu", "h100"]) == 0
    said = capsys.readouterr().out
    for word in ("optimizer", "activations", "KV cache", "logits not there", "slowest", "of questions", "disk", "fits      yes"):
        assert word in said
    assert main([*given, "--gpu-memory", "6", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is False
    assert told["memory"]["peak"] > 6 * GIB
    assert told["remedies"]
    assert main([*given, "--gpu", "h100", "--simulate", "1,2", "--set", "rollouts.per_update=16", "--json"]) == 0
    assert [point["gpus"] for point in json.loads(capsys.readouterr().out)["scaling"]] == [1, 2]
    for wrong, message in ((["--gpu", "z9"], "z9"), (["--gpus", "0"], "--gpus is 0"), (["--simulate", "many"], "many")):
        assert main([*given, "--gpu", "h100", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_measured_rates_come_from_a_few_cycles_of_the_run_itself(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(
        "\n\n\n".join(f"{n} the thin thing in there, then {n * n} more of them and so on" for n in range(40))
    )
    run = tmp_path / "run.yaml"
    run.write_text(
        json.dumps(
            {
                "student": {"model": str(student_folder(tmp_path, vocab_size=262)), "dtype": "float32"},
                "objective": {"name": "sft"},
                "rollouts": {"per_update": 4, "max_new_tokens": 8},
                "train": {"batch_tokens": 40, "max_seq_len": 48, "labelled_tokens": 100_000},
                "data": {"prompts": [{"text": str(tmp_path / "text.txt")}], "prompt_tokens": 8, "response_tokens": 10},
                "output": str(tmp_path / "out" / "run"),
            }
        )
    )
    assert main(["plan", str(run), "--measure", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rates"]["training"] > 0
    assert told["seconds"] > 0
    assert told["bottleneck"] == "training"
    assert list((tmp_path / "out").iterdir()) == [], "nothing is left of it"


def test_an_empty_student_has_the_adapters_of_a_loaded_one(tmp_path):
    student = StudentConfig(model=str(student_folder(tmp_path)), lora=LoRAConfig(rank=4))
    with torch.device("meta"):
        empty = empty_student(student)
    loaded = load_student(student, 0, True)
    assert {name: one.shape for name, one in empty.named_parameters()} == {name: one.shape for name, one in loaded.named_parameters()}
