"""Run by ``make package`` and ``make sbom``: what was built holds what belongs there, and nothing else.

python tests/check_dist.py dist             # the wheel and the sdist
python tests/check_dist.py dist --sbom      # the bill of materials and the licences too
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILT = ("bbopd/_C.*.so", "bbopd/rpc/teacher_pb2.py", "bbopd/rpc/teacher_pb2_grpc.py", "bbopd/rpc/teacher_pb2.pyi")
MAY_BE_BUILT = ("bbopd/_cuda.*.so",)  # where nvcc was
SOURCES = ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "protos/teacher.proto", "csrc/bindings.cpp", "kernels/rows.py")


def of_package(root: Path) -> set[str]:
    """What a wheel takes from the tree, by its names in the wheel."""
    wheel = {}
    for folder, name in (("bbopd", "bbopd"), ("kernels", "bbopd/kernels")):
        for path in (root / folder).rglob("*"):
            inner = path.relative_to(root / folder)
            is_source = path.is_file() and path.suffix not in (".pyc", ".so") and "_pb2" not in path.name and path.name != ".gitkeep"
            if is_source and not (folder == "bbopd" and inner.parts[0] == "kernels"):
                wheel[f"{name}/{inner.as_posix()}"] = path
    return set(wheel)


def wheel_faults(names: Iterable[str], package: Collection[str]) -> list[str]:
    """What is missing from a wheel, or does not belong into it; ``package``: files of the tree that it has to hold."""
    names = {name for name in names if not name.endswith("/")}
    inside = {name for name in names if ".dist-info/" not in name}
    built = {name for pattern in BUILT + MAY_BE_BUILT for name in inside if _fits(name, pattern)}
    faults = [f"{pattern} is missing" for pattern in BUILT if not any(_fits(name, pattern) for name in inside)]
    faults += [f"{name} is missing" for name in sorted(set(package) - inside)]
    faults += [f"{name} does not belong there" for name in sorted(inside - set(package) - built)]
    told = {name.partition(".dist-info/")[2] for name in names - inside}
    return faults + [f"{name} is missing" for name in ("METADATA", "RECORD", "entry_points.txt", "licenses/LICENSE") if name not in told]


def sdist_faults(names: Iterable[str]) -> list[str]:
    """What is missing from an sdist to be built without the repository, or is too much."""
    inside = {name.partition("/")[2] for name in names}
    too_much = [name for name in sorted(inside) if name.endswith((".so", ".pyc")) or name.startswith("benchmarks/results/")]
    return [f"{name} is missing" for name in SOURCES if name not in inside] + [f"{name} does not belong there" for name in too_much]


def sbom_faults(bill: dict, licences: str, required: Collection[str]) -> list[str]:
    """Packages of ``required`` that a CycloneDX bill or the table of licences leaves out, and those without a version or a licence."""
    listed = {_plain(one["name"]): one for one in bill["components"]}
    rows = {_plain(cells[0]): cells for cells in map(_cells, licences.splitlines()) if len(cells) >= 3}
    faults = [f"the bill leaves {name} out" for name in required if name not in listed]
    faults += [f"{name} has no version in the bill" for name, one in sorted(listed.items()) if not one.get("version") and name != "bbopd"]
    faults += [f"the licences leave {name} out" for name in required if name not in rows]
    return faults + [f"{name} has no licence" for name, cells in sorted(rows.items()) if cells[2].upper() in ("", "UNKNOWN")]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split("|")]


def _fits(name: str, pattern: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", "[^/]+"), name) is not None


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    assert len(found) == 1, f"{folder} holds {len(found)} of {pattern}: {', '.join(path.name for path in found) or 'nothing'}"
    return found[0]


def main(folder: Path, *, sbom: bool) -> int:
    wheel, sdist = _one(folder, "*.whl"), _one(folder, "*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        faults = [f"{wheel.name}: {fault}" for fault in wheel_faults(archive.namelist(), of_package(ROOT))]
        told = f"{wheel.name}: {len(archive.namelist())} files, {wheel.stat().st_size / 2**20:.1f} MiB"
    with tarfile.open(sdist) as archive:
        faults += [f"{sdist.name}: {fault}" for fault in sdist_faults(archive.getnames())]
    if sbom:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        required = [_plain(re.split(r"[^\w.-]", one)[0]) for one in project["dependencies"]]
        bill = json.loads((folder / "bbopd.cdx.json").read_text())
        faults += sbom_faults(bill, (folder / "licences.md").read_text(), required)
        told += f"; a bill of {len(bill['components'])} packages"
    print(*faults, told, sep="\n", file=sys.stderr if faults else sys.stdout)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sbom="--sbom" in sys.argv))
