"""The errors and warnings of the library."""


class AdapterError(ValueError):
    """An adapter that does not fit: its file, its model, a layer, or what is asked of it."""


class StabilityWarning(UserWarning):
    """Generators so large that the Cayley–Neumann series is about to diverge."""


class RequantizationWarning(UserWarning):
    """What it cost to quantize a merged weight again."""
