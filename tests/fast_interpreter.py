"""Triton's interpreter without work that it repeats: the same operations on the same numbers in half the time.

Triton 3.6 replaces the functions of ``triton.language`` by interpreted ones at every launch, and again at every call of
one jitted function by another, for which it walks the whole module; our kernels are made of thousands of such calls.
Every tensor and every tuple writes down the name of its type, and a number's type is looked up in a table made for it.
"""

import functools
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

patch_language = interpreter._patch_lang
init_block_type = tl.block_type.__init__
numpy_dtype = interpreter._get_np_dtype
numpy_dtype_of_number = functools.cache(numpy_dtype)


def patch_language_once(fn: object) -> interpreter._LangPatchScope:
    """``_patch_lang``, unless both modules it knows are patched: then there is nothing to do and to restore."""
    if tl.core.is_builtin(tl.load) or tl.core.is_builtin(tl.core.load):
        return patch_language(fn)
    return interpreter._LangPatchScope()


@functools.cache
def fields_of_block_type(element: tl.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    """What ``block_type.__init__`` sets."""
    made = object.__new__(tl.block_type)
    init_block_type(made, element, list(shape))
    return vars(made)


def block_type_init(self: tl.block_type, element: tl.dtype, shape: Any) -> None:
    """``block_type.__init__``; types of numbers are made once."""
    if type(element) is tl.dtype:
        vars(self).update(fields_of_block_type(element, tuple(tl.core._unwrap_shape(shape))))
    else:
        init_block_type(self, element, shape)


def tuple_type_init(self: tl.core.tuple_type, types: Any, fields: Any = None) -> None:
    """``tuple_type.__init__`` without the name."""
    self.types = types
    self.fields = fields or [""] * len(types)


def tuple_type_name(self: tl.core.tuple_type) -> str:
    """The name, when it is asked for."""
    return "[" + ",".join(f"{k}:{v}" for k, v in zip(self.fields, self.types, strict=True)) + "]"


def numpy_dtype_cached(of: tl.dtype) -> Any:
    """``_get_np_dtype``; only types of numbers can be looked up."""
    return numpy_dtype_of_number(of) if type(of) is tl.dtype else numpy_dtype(of)


def install() -> None:
    """Make it so in this process."""
    interpreter._patch_lang = patch_language_once
    interpreter._get_np_dtype = numpy_dtype_cached
    tl.block_type.__init__ = block_type_init
    tl.core.tuple_type.__init__ = tuple_type_init
    tl.core.tuple_type.name = property(tuple_type_name)
