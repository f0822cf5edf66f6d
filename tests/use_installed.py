"""Run by ``make package`` with the interpreter of an environment that holds nothing but the wheel: all its parts must be there and work."""

from importlib.resources import files
from pathlib import Path

import torch

import bbopd
from bbopd import TopKTeacher, linear_distill, linear_logprobs
from bbopd.hardware import cpu_features
from bbopd.rpc import teacher_pb2, teacher_pb2_grpc


def main() -> None:
    source = Path(__file__).resolve().parents[1]
    assert source not in Path(bbopd.__file__).resolve().parents or "site-packages" in bbopd.__file__, (
        f"this is the source: {bbopd.__file__}"
    )
    assert set(cpu_features()) == {"avx2", "avx512", "avx512_bf16", "amx_bf16"}
    assert teacher_pb2.ScoreRequest.DESCRIPTOR.full_name == "bbopd.v1.ScoreRequest"
    assert teacher_pb2_grpc.TeacherServiceStub is not None
    assert files("bbopd.kernels").joinpath("logprobs.py").is_file()
    assert files("bbopd.report").joinpath("style.css").is_file()
    assert files("bbopd.evaluate.human").joinpath("page.html").is_file()

    hidden = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(11, 8)
    teacher = linear_logprobs(torch.randn(5, 8), weight, top_k=3)
    assert teacher.topk_ids is not None
    assert teacher.topk_logprobs is not None
    assert teacher.log_tail is not None
    out = linear_distill(hidden, weight, TopKTeacher(teacher.topk_ids, teacher.topk_logprobs, teacher.log_tail), torch.randint(11, (5,)))
    out.loss.backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()
    print(f"bbopd {bbopd.__version__} works from {Path(bbopd.__file__).parent}")


if __name__ == "__main__":
    main()
