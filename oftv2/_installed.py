"""A clear error where Python finds the checkout's own folder, which has the kernels elsewhere, and no installation."""

from importlib.util import find_spec

if find_spec("oftv2.kernels") is None:
    raise ImportError(
        "this oftv2 is the source folder of a checkout, found because Python was started there: install it with "
        "pip install -e . (which works from every folder), or start Python in another folder"
    )
