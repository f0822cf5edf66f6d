"""What a wheel asks of whoever installs and imports it: little."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from tests.check_dist import ROOT, of_package, sbom_faults, sdist_faults, wheel_faults

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
HEAVY = (
    "vllm",
    "ray",
    "peft",
    "bitsandbytes",
    "lm-eval",
    "flash-attn",
    "wandb",
    "mlflow-skinny",
    "trackio",
    "trl",
    "liger-kernel",
    "triton",
)


def name_of(requirement: str) -> str:
    return requirement.partition(";")[0].split("[")[0].split(">")[0].split("=")[0].split("<")[0].strip()


def test_importing_the_ops_costs_little_beyond_torch():
    """Below 1.5 s of processor time, so that a busy machine is not what is measured; it takes 0.06."""
    code = (
        "import time, torch; began = time.process_time(); "
        "from bbopd import CandidateTeacher, FullTeacher, SampledTeacher, TopKTeacher, linear_distill, linear_logprobs; "
        "import sys; print(time.process_time() - began); "
        "print([name for name in ('transformers', 'datasets', 'vllm', 'ray', 'pydantic', 'triton') if name in sys.modules])"
    )
    seconds, heavy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert float(seconds) < 1.5
    assert heavy == "[]"


def test_a_plain_installation_is_light():
    plain = {name_of(requirement) for requirement in PROJECT["project"]["dependencies"]}
    assert not plain & set(HEAVY)
    extras = PROJECT["project"]["optional-dependencies"]
    assert {name_of(requirement) for requirements in extras.values() for requirement in requirements} >= set(HEAVY)


def test_wheels_are_built_for_every_python_that_is_promised():
    promised = {
        row.rpartition(" ")[2] for row in PROJECT["project"]["classifiers"] if row.startswith("Programming Language :: Python :: 3.")
    }
    built = PROJECT["tool"]["cibuildwheel"]["build"].split()
    assert built == [f"cp{version.replace('.', '')}-*" for version in sorted(promised)]


METADATA = [f"bbopd-0.1.0.dist-info/{name}" for name in ("METADATA", "RECORD", "entry_points.txt", "licenses/LICENSE")]
BUILT = ["bbopd/_C.cpython-311-x86_64-linux-gnu.so", *(f"bbopd/rpc/teacher_pb2{end}" for end in (".py", ".pyi", "_grpc.py"))]


def test_a_wheel_that_lacks_something_or_holds_too_much_is_told():
    """`make package` looks into the real one."""
    package = of_package(ROOT)
    assert {"bbopd/py.typed", "bbopd/report/style.css", "bbopd/kernels/rows.py", "bbopd/cli/main.py"} <= package
    assert wheel_faults([*package, *BUILT, *METADATA], package) == []
    less = [name for name in [*package, *BUILT[1:], *METADATA[1:]] if name != "bbopd/report/style.css"]
    assert wheel_faults([*less, "tests/test_cli.py", "bbopd/_cuda.cpython-311-x86_64-linux-gnu.so"], package) == [
        "bbopd/_C.*.so is missing",
        "bbopd/report/style.css is missing",
        "tests/test_cli.py does not belong there",
        "METADATA is missing",
    ]


def test_an_sdist_needs_its_sources_and_no_builds():
    names = ["pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "csrc/bindings.cpp", "kernels/rows.py", "bbopd/_C.so"]
    assert sdist_faults(f"bbopd-0.1.0/{name}" for name in names) == ["protos/teacher.proto is missing", "bbopd/_C.so does not belong there"]


def test_a_bill_without_a_package_or_a_licence_is_told():
    bill = {"components": [{"name": "PyYAML", "version": "6.0"}, {"name": "numpy", "version": "2.1"}, {"name": "odd"}]}
    licences = "| Name | Version | License | URL |\n|---|---|---|---|\n| PyYAML | 6.0 | MIT | x |\n| numpy | 2.1 | UNKNOWN | y |"
    assert sbom_faults(bill, licences, ["pyyaml", "numpy"]) == ["odd has no version in the bill", "numpy has no licence"]
    assert sbom_faults(bill, licences, ["torch"])[0] == "the bill leaves torch out"
    assert "the licences leave torch out" in sbom_faults(bill, licences, ["torch"])
