"""Triton kernels; registered for CUDA devices in place of the plain-torch operators."""

if __name__ == "kernels":
    # Python was started in the checkout and finds this folder. Who imports it by this name, as transformers and
    # bitsandbytes do, means the package that loads kernels from a hub: where that is installed, they get it.
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _here = Path(__file__).resolve().parent.parent
    _spec = PathFinder.find_spec(__name__, [entry for entry in sys.path if Path(entry).resolve() != _here])
    if _spec is not None and _spec.loader is not None and _spec.origin is not None:
        sys.modules[__name__] = module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[__name__])
