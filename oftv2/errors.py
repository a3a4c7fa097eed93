"""The errors and warnings of the library."""


class AdapterError(ValueError):
    """An adapter that does not fit: its file, its model, a layer, or what is asked of it."""


class StabilityWarning(UserWarning):
    """Generators so large that the Cayley–Neumann series is about to diverge."""


class OptimizerWarning(UserWarning):
    """An optimizer that trains nothing of the adapter, because it was made before the adapter was there."""


class TargetWarning(UserWarning):
    """What an adapter leaves out, though it matters: experts of mixtures, running statistics, layers that are read."""


class PeftFormatWarning(UserWarning):
    """An adapter that PEFT cannot read as it is, or one of PEFT's that reads otherwise here than there."""


class PeftRepairWarning(UserWarning):
    """A model of PEFT's that, as asked for, no longer computes what PEFT does."""


class RequantizationWarning(UserWarning):
    """What it cost to quantize a merged weight again."""
