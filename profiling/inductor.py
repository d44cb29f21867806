"""``python -m profiling.inductor ARCHITECTURE``: what `torch.compile` makes for a GPU, without one.

Traces a training step of the modules that `--compile-model` compiles (a transformer stack, its
pooling, forward and backward) on fake device tensors, lets Inductor write its Triton kernels for
the architecture, and compiles each of them ahead of time. torch is told that it sees a GPU, which
holds for the whole process: run it as a command. Prints one JSON line.

It exists because Inductor's code for a boolean reduction does not compile on ROCm with Triton up to
3.1, which keeps booleans as int8 there. A reduced mask, as padded pooling needs it, is compiled
beside our modules to show what such a reduction looks like; tests assert that ours hold none.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def pretend(architecture: str) -> GPUTarget:
    """Makes torch and Triton believe in one GPU of that architecture. Not undone."""
    amd = architecture.startswith("gfx")
    major, minor = (9, 4) if amd else divmod(int(architecture.removeprefix("sm_")), 10)
    if amd:
        torch.version.hip = "6.3.0"
    else:
        torch.version.cuda = "12.8"
    properties = SimpleNamespace(
        name=architecture, gcnArchName=architecture, major=major, minor=minor, uuid="0",
        multi_processor_count=228 if amd else 132, warp_size=64 if amd else 32,
        regs_per_multiprocessor=131072 if amd else 65536, total_memory=64 << 30,
        max_threads_per_multi_processor=2048, max_threads_per_block=1024, L2_cache_size=4 << 20,
        shared_memory_per_block=65536, shared_memory_per_multiprocessor=65536,
        shared_memory_per_block_optin=65536 if amd else 232448,
    )  # fmt: skip
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_initialized": lambda: False,
        "is_bf16_supported": lambda *a, **k: True,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_name": lambda device=None: architecture,
        "synchronize": lambda device=None: None,
        "_lazy_init": lambda: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch._C._cuda_getCurrentRawStream = lambda index=0: 0
    torch._C._ensureCUDADeviceGuardSet()
    from torch._dynamo import device_interface

    for name in ("get_device_properties", "current_device", "device_count", "is_available"):
        setattr(device_interface.CudaInterface, name, staticmethod(answers[name]))
    worker = device_interface.CudaInterface.Worker
    worker.get_device_properties = staticmethod(answers["get_device_properties"])
    device_interface.caching_worker_device_properties["cuda"] = [properties]
    device_interface.caching_worker_current_devices["cuda"] = 0
    target = (
        GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", major * 10 + minor, 32)
    )
    triton.runtime.driver.set_active(_Driver(target))
    for name in ("torch._inductor.utils", "torch.utils._triton"):
        importlib.import_module(name).has_triton = lambda: True
    return target


class _Driver:
    """As much of a Triton driver as Inductor asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        limits = {"max_shared_mem": 65536, "multiprocessor_count": 132, "warpSize": 64}
        self.utils = SimpleNamespace(get_device_properties=lambda index: limits)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_benchmarker(self) -> None:
        return None


def generated_code(step: Any, make_inputs: Any) -> str:
    """The Python that Inductor writes for ``step(*inputs)`` on fake GPU tensors."""
    import torch._inductor.config as config
    from torch._inductor.compile_fx import _recursive_post_grad_passes, fake_tensor_prop
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    config.compile_threads = 1
    fake = FakeTensorMode()
    # Traced on the CPU and moved: torch's CPU build has no autograd thread for a GPU.
    with fake:
        traced = make_fx(step, decomposition_table=select_decomp_table(), tracing_mode="real")
        graph = traced(*make_inputs("cpu"))
        inputs = make_inputs("cuda")
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", torch.device("cuda", 0))
    with V.set_fake_mode(fake), torch.no_grad():
        fake_tensor_prop(graph, inputs)
        _recursive_post_grad_passes(graph, is_inference=True)
        fake_tensor_prop(graph, inputs, force_allow_non_fake_inputs=True)
        lowering = GraphLowering(graph, example_inputs=inputs, shape_env=None, is_inference=True)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            code, _ = lowering.codegen()
    return code.value if hasattr(code, "value") else code[0]


def compile_kernels(code: str, target: GPUTarget) -> list[str]:
    """Compiles every Triton kernel in Inductor's code for the target; their names."""
    import torch._inductor.runtime.triton_helpers as helpers

    helpers.set_driver_to_gpu = lambda: None
    names = []
    with tempfile.TemporaryDirectory() as folder:
        for name, source in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.S):
            path = Path(folder) / f"{name}.py"
            path.write_text(source)
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            _compile_all(getattr(module, name), target)
            names.append(name)
    return names


def _compile_all(tuner: Any, target: GPUTarget) -> None:
    """Every configuration that Inductor would try."""
    meta, kernel = tuner.triton_meta, tuner.fn
    for config in tuner.configs:
        own = {name: x for name, x in config.kwargs.items() if name in kernel.arg_names}
        constants = {**meta["constants"], **own}
        constants = {name: x for name, x in constants.items() if not isinstance(name, int)}
        signature = {
            name: "constexpr" if name in constants else meta["signature"][name]
            for name in kernel.arg_names
        }
        attributes = {
            place if isinstance(place, tuple) else (kernel.arg_names.index(place),): value
            for place, value in meta["configs"][0].items()
        }
        options = {name: x for name, x in config.kwargs.items() if name not in own}
        options |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
        source = ASTSource(kernel, signature, constants, attributes)
        triton.compile(source, target=target, options=options)


def pooled_stack_step() -> tuple[Any, Any]:
    """A training step of stack and pooling: the function, and its inputs on the device."""
    from aam_kernels.modules import AttentionPool, TransformerEncoder
    from aam_kernels.ragged import _unchecked  # the values of fake offsets cannot be checked

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = TransformerEncoder(128, 4, 2, dropout=0.1)
            self.pool = AttentionPool(128)

        def forward(self, values: Tensor, offsets: Tensor) -> Tensor:
            return self.pool(self.stack(_unchecked(values, offsets, 151)))

    module = Both()
    names = [name for name, _ in module.named_parameters()]

    def step(values: Tensor, offsets: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in parameters]
            state = dict(zip(names, leaves, strict=True))
            pooled = torch.func.functional_call(module, state, (values, offsets))
            grads = torch.autograd.grad(pooled.square().sum(), leaves)
        return (pooled.detach(), *grads)

    def inputs(device: str) -> list[Tensor]:
        shapes = [p.shape for p in module.parameters()]
        offsets = torch.empty(65, dtype=torch.int32, device=device)
        return [
            torch.empty(64 * 151, 128, device=device),
            offsets,
            *(torch.empty(shape, device=device) for shape in shapes),
        ]

    return step, inputs


def masked_any() -> tuple[Any, Any]:
    """The reduction over a mask that padded pooling needs and ragged pooling does not have."""
    return (
        lambda mask: (mask.any(-1),),
        lambda device: [torch.empty(64, 4096, dtype=torch.bool, device=device)],
    )


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    target = pretend(arguments[0])
    makers = {"pooled stack": pooled_stack_step, "boolean reduction": masked_any}
    result = {}
    for name, make in makers.items():
        code = generated_code(*make())
        result[name] = {
            "kernels": compile_kernels(code, target),
            "operators": sorted(set(re.findall(r"torch\.ops\.aam_kernels\.(\w+)", code))),
            "boolean_reductions": len(re.findall(r"triton_helpers\.any\(", code)),
        }
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
