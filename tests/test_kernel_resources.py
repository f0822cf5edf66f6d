"""Every Triton kernel, compiled: no spills, 16 bytes read at a time, registers as in docs/kernel_resources.csv."""

from __future__ import annotations

import re
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from tests import kernel_resources, resource_table  # noqa: E402
from tests.kernel_resources import CAPABILITIES, VARIANTS  # noqa: E402
from tests.resource_table import Usage  # noqa: E402

IN_ORDER = re.compile(r"ld\.global|st\.global|bar\.sync|cp\.async|^\s*(?:@%\w+ )?bra|^\$L__BB\w+:", re.MULTILINE)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[Usage, str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        return {(usage.variant, usage.capability): (usage, ptx) for usage, ptx in kernel_resources.compile_all()}


def test_the_table_names_every_kernel_and_variant() -> None:
    table = [usage for usage in resource_table.read() if usage.compiler.startswith("triton ")]
    assert {usage.kernel for usage in table} == kernel_resources.kernels().keys()
    assert [(usage.variant, usage.capability) for usage in table] == [(name, one) for name in VARIANTS for one in CAPABILITIES]
    assert all(usage.kernel == VARIANTS[usage.variant].kernel for usage in table)


def assert_stores_wait(ptx: str) -> None:
    """A store to global memory comes after a barrier that all loads before it precede: it may go where other threads read."""
    order = "".join({"ld.global": "l", "st.global": "s", "bar.sync": "b"}.get(found, "|") for found in IN_ORDER.findall(ptx))
    assert re.search("bs", order)
    assert not re.search("s", re.sub("bs+", "", order)), order


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_kernel_keeps_to_its_resources(name: str, capability: int, compiled: dict[Any, tuple[Usage, str]]) -> None:
    usage, ptx = compiled[name, capability]
    usage.assert_fits()
    assert re.search(r"ld\.global(\.\w+)*\.v4\.b32", ptx)  # 16 bytes at a time
    if usage.kernel == "row_gradient":
        assert_stores_wait(ptx)
