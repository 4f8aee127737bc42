"""A pytest plugin: kernels are compiled to Triton's IR for an NVIDIA GPU instead of being run.

The interpreter accepts Python that the compiler refuses. Run with ``-p only_compile`` and TRITON_INTERPRET=0, the tests
make their launches on the CPU's tensors, every launch is compiled, and a test fails only if that failed: results are
never computed, so what it asserts of them says nothing.
"""

from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError
from triton.compiler.compiler import make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from homkv.attention.triton import runtime

TARGET = GPUTarget("cuda", 90, 32)


class NoDriver:
    """A GPU to compile for that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


def compile_to_ir(
    self: Any, key: Any, signature: Any, device: int, constexprs: Any, options: Any, attrs: Any, warmup: bool
) -> None:
    """What JITFunction does for a new signature, up to the first representation."""
    cache, *_ = self.device_caches[device]
    backend = make_backend(TARGET)
    context = triton._C.libtriton.ir.context()
    triton._C.libtriton.ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(self, signature, constexprs, attrs)
    source.make_ir(TARGET, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    cache[key] = None


driver.set_active(NoDriver())
JITFunction._do_compile = compile_to_ir
runtime.check_device = lambda device: None
runtime.require = lambda: None
runtime.has_dependent_launch = lambda device: True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if call.when != "call":
        return report
    report.outcome = "failed" if call.excinfo and call.excinfo.errisinstance(CompilationError) else "passed"
    return report
