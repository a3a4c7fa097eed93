"""The average of adapters: the mean of their rotations on the rotation group, which is a rotation again.

The entrywise mean of rotations is none: it shrinks what they turn apart. The Karcher mean minimizes the weighted sum of
squared geodesic distances ``‖log(RᵀRᵢ)‖²_F``, block by block; its fixed point is ``Σ wᵢ log(RᵀRᵢ) = 0``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from .adapters import check_addable, check_names, put
from .base import OFTLayer
from .config import OFTConfig
from .errors import AdapterError
from .functional import in_blocks_of
from .reference import cayley, pack
from .stability import spectral_norm
from .state import get_state, oft_layers
from .targets import Target

_MAX_STEPS = 200
_CONVERGED = 1e-12  # ‖Σ wᵢ log(RᵀRᵢ)‖_F; rounding leaves about 1e-14
_NEAR_PI = 1e-6
_EPS = torch.finfo(torch.float64).eps
_SERIES = 0.64  # ‖Q‖₂², at which the series of 80 terms takes 18 products; rotations by 77 degrees


class NoMeanError(ValueError):
    """What keeps the blocks of one layer from having a mean."""


@torch.no_grad()
def average_adapters(
    model: nn.Module,
    adapter_names: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    adapter_name: str = "average",
) -> nn.Module:
    """Adds the average of adapters to a wrapped model, as a new adapter that is not active yet.

    It is the Karcher mean of their rotations, in float64, block by block (of the least common multiple of their sizes);
    truncated series, which are not quite rotations, count as the nearest ones. The new adapter has the exact Cayley
    parametrization, so it is orthogonal, and can be trained on. A layer that an adapter lacks counts as the identity.

    Args:
        model (nn.Module): a wrapped model.
        adapter_names (Sequence[str]): of which adapters, in any order, active or not.
        weights (Sequence[float] | None): one for each, not negative; they are divided by their sum. ``None``: equal.
        adapter_name (str): the name of the average.

    Returns:
        nn.Module: the same object.

    Raises:
        AdapterError: names that :func:`oftv2.add_adapter` or :func:`oftv2.set_adapter` refuse; weights that are no
            weights; an adapter that trained base parameters in full; rotations so far apart that they have no unique
            mean, with the layer and the block. Nothing is changed then.
    """
    check_addable(model, adapter_name)
    names = check_names(model, adapter_names)
    shares = _shares(names, weights)
    state = get_state(model)
    for name in names:
        if state.trained[name]:
            raise AdapterError(
                f"{name!r} trained {state.trained[name][0]} in full, which is no rotation: only adapters without "
                "modules_to_save and biases are averaged"
            )
    shared = all(state.configs[name].block_share for name in names)
    means: dict[str, Tensor] = {}
    for path, layer in oft_layers(model):
        if any(name in layer.rotations for name in names):
            layer.check_generators(names)
            try:
                means[path] = _mean(layer, names, shares, shared)
            except NoMeanError as error:
                raise AdapterError(
                    f"{path}: the adapters {', '.join(map(repr, names))} have no average: {error}"
                ) from None
    sizes = {path: Q.shape[-1] for path, Q in means.items()}
    config = OFTConfig(
        block_size=max(sizes.values()),
        parametrization="cayley",
        block_share=shared,
        target_modules=tuple(means),
        modules_to_save=(),
    )
    layers = dict(oft_layers(model))
    targets = [Target(path, (path,), layers[path].base_layer, type(layers[path]), sizes[path]) for path in means]
    put(model, adapter_name, config, targets, ())
    for path, Q in means.items():
        layers[path].generators[adapter_name].copy_(pack(Q))
    return model


def _shares(names: Sequence[str], weights: Sequence[float] | None) -> Tensor:
    """The weights, normalized: ``(k,)``, float64."""
    given = [1.0] * len(names) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(names):
        raise AdapterError(f"weights={given}: {len(names)} adapters want as many weights")
    if not all(math.isfinite(weight) and weight >= 0 for weight in given) or sum(given) == 0:
        raise AdapterError(f"weights={given} are not allowed: use numbers from 0 up, not all of them 0")
    return torch.tensor(given, dtype=torch.float64) / sum(given)


def _mean(layer: OFTLayer, names: Sequence[str], shares: Tensor, shared: bool) -> Tensor:
    """The generators ``Q`` of the mean rotation, ``(r, b, b)``, for the exact Cayley transform."""
    present = [name for name in names if name in layer.rotations]
    deltas = {name: layer.rotations[name].delta(layer.generators[name].double().cpu()) for name in present}
    size = math.lcm(*(delta.shape[-1] for delta in deltas.values()))
    wide = {name: in_blocks_of(delta, size)[: 1 if shared else None] for name, delta in deltas.items()}
    nothing = torch.zeros_like(wide[present[0]])
    rotations = torch.stack([wide.get(name, nothing) for name in names]) + torch.eye(size, dtype=torch.float64)
    mean = karcher_mean(nearest_rotation(rotations), shares)
    _refuse_beyond(math.pi - _NEAR_PI, mean, "their mean is half a turn, which no generators make")
    return inverse_cayley(mean)


# ---------------------------------------------------------------------------------------------- the rotation group


def karcher_mean(rotations: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of rotations ``(k, r, b, b)`` in float64, block by block: ``(r, b, b)``.

    ``R ← R exp(α Σ wᵢ log(RᵀRᵢ))`` from the entrywise mean, which is near; with the Cayley transform in place of the
    exponential, which differs in third order, stays on the group too, and leaves the fixed point as it is.

    Args:
        rotations (torch.Tensor): orthogonal, of determinant 1.
        weights (torch.Tensor): ``(k,)``, not negative, of sum 1.

    Raises:
        NoMeanError: two of them are half a turn apart, or more than two are not within a quarter turn of their mean,
            beyond which there may be several; or no convergence.
    """
    rotations, weights = rotations[weights > 0], weights[weights > 0]
    for first, second in combinations(rotations, 2):
        _refuse_beyond(math.pi - _NEAR_PI, first.mT @ second, "two of them are half a turn apart")
    mean = nearest_rotation(torch.einsum("k,krij->rij", weights, rotations))
    step, length = torch.zeros_like(mean), torch.full(mean.shape[:1], torch.inf, dtype=mean.dtype)
    rate = torch.ones_like(mean[:, :1, :1])
    for count in range(_MAX_STEPS):
        left = length > _CONVERGED  # blocks that are not there yet
        found = torch.einsum("k,krij->rij", weights, log_rotation(mean[left].mT @ rotations[:, left]))
        length[left] = torch.linalg.matrix_norm(found)
        if count:
            rate[left] = _next_rate(rate[left], step[left], found)
        mean[left] = mean[left] @ cayley(rate[left] * found / 2)
        step[left] = found
        if not (length > _CONVERGED).any():
            break
    _refuse(length, _CONVERGED, f"no convergence in {_MAX_STEPS} steps")
    for rotation in rotations:
        apart = mean.mT @ rotation
        if len(rotations) > 2:
            _refuse_beyond(math.pi / 2, apart, "some are more than a quarter turn from their mean")
        _refuse_beyond(math.pi - _NEAR_PI, apart, "no convergence")
    return mean


def _next_rate(rate: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """How far to go along ``Σ wᵢ log(RᵀRᵢ)`` ``(r, b, b)``, judged by what the last step left of it (Barzilai–Borwein).

    Rotations that are far apart curve the sum of squares less than ones that are near, for which 1 is right.
    """
    expected = (before * (before - after)).sum((1, 2), keepdim=True)
    return (rate * before.square().sum((1, 2), keepdim=True) / expected).nan_to_num(1.0).clamp(1, 2)


def nearest_rotation(matrices: Tensor) -> Tensor:
    """The nearest rotation to each of ``(..., b, b)`` matrices, by the Frobenius norm.

    Those that nearly are rotations by Newton's iteration, batched products, which is ten times as fast as the singular
    value decomposition that the others take.
    """
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    near = (torch.linalg.matrix_norm(_beyond_orthogonal(flat)) < 0.5) & (torch.linalg.det(flat) > 0)
    out = torch.empty_like(flat)
    if near.any():
        out[near] = _orthogonalized(flat[near])
    if not near.all():
        out[~near] = _decomposed(flat[~near])
    return out.view_as(matrices)


def _beyond_orthogonal(matrices: Tensor) -> Tensor:
    return matrices.mT @ matrices - torch.eye(matrices.shape[-1], dtype=matrices.dtype)


def _orthogonalized(matrices: Tensor) -> Tensor:
    """The orthogonal polar factors of nearly orthogonal ``(n, b, b)``: ``X ← X − X(XᵀX − I)/2`` squares the error."""
    error = 1.0
    while error > 1e-8:
        beyond = _beyond_orthogonal(matrices)
        matrices = matrices - matrices @ beyond / 2
        error = torch.linalg.matrix_norm(beyond).amax().item()
    return matrices


def _decomposed(matrices: Tensor) -> Tensor:
    """The nearest rotations to any ``(n, b, b)``."""
    left, singular, right = torch.linalg.svd(matrices)
    signs = torch.ones_like(singular)
    signs[..., -1] = torch.linalg.det(left @ right)
    return (left * signs[..., None, :]) @ right


def inverse_cayley(rotations: Tensor) -> Tensor:
    """``Q = (R − I)(R + I)⁻¹``, skew-symmetric; not finite where R turns anything by exactly π, which no Q does."""
    identity = torch.eye(rotations.shape[-1], dtype=rotations.dtype)
    Q = torch.linalg.solve_ex(rotations + identity, rotations - identity, left=False).result
    return (Q - Q.mT) / 2


def log_rotation(rotations: Tensor) -> Tensor:
    """The principal logarithm of rotations ``(..., b, b)``, skew-symmetric; no logarithm of those that turn by π.

    ``log R = 2 artanh Q`` with the inverse Cayley transform ``Q``: a series of batched products where it is short.
    """
    Q = inverse_cayley(rotations).nan_to_num(0, 0, 0)
    Q = Q.view(-1, *Q.shape[-2:])
    square = Q @ Q
    fourth = square @ square
    bound = torch.linalg.matrix_norm(fourth).sqrt()  # of ‖Q‖₂², at most b^¼ times as large
    near = bound <= _SERIES
    out = torch.empty_like(Q)
    if near.any():
        out[near] = _artanh_series(Q[near], [square[near], fourth[near]], bound[near].amax().item())
    if not near.all():
        out[~near] = _artanh(Q[~near])
    return 2 * out.view_as(rotations)


def _artanh_series(Q: Tensor, powers: list[Tensor], bound: float) -> Tensor:
    """``Q Σ Q²ʲ/(2j + 1)`` to float64's precision, in about ``2√n`` products for ``n`` terms (Paterson–Stockmeyer).

    Args:
        Q (torch.Tensor): ``(n, b, b)``.
        powers (list[torch.Tensor]): ``Q²`` and ``Q⁴``.
        bound (float): of ``‖Q‖₂²``, below 1.
    """
    terms = max(3, math.ceil(math.log(_EPS) / math.log(max(bound, _EPS))))
    width = max(2, math.isqrt(terms))
    while len(powers) < width:
        powers = [*powers, powers[-1] @ powers[0]]
    total = torch.zeros_like(Q)
    for start in range((terms - 1) // width * width, -1, -width):
        if start + width < terms:
            total = total @ powers[width - 1]
        total.diagonal(dim1=-2, dim2=-1).add_(1 / (2 * start + 1))
        for j, power in enumerate(powers[: width - 1], start + 1):
            total.add_(power, alpha=1 / (2 * j + 1))
    return Q @ total


def _artanh(Q: Tensor) -> Tensor:
    """Of any ``Q``: ``iQ`` is Hermitian, and has the eigenvalue ``tan(θ/2)`` where R has ``e^(−iθ)``."""
    values, vectors = torch.linalg.eigh(1j * Q)
    return ((vectors * (-1j * torch.atan(values))[..., None, :]) @ vectors.mH).real


def rotation_angles(rotations: Tensor) -> Tensor:
    """The largest angle, in radians and to 0.1%, by which each of ``(r, b, b)`` rotations turns anything: ``(r,)``."""
    Q = inverse_cayley(rotations)
    defined = Q.isfinite().flatten(1).all(1)
    norms = spectral_norm(torch.where(defined[:, None, None], Q, 0.0))  # tan(θ/2)
    return torch.where(defined, 2 * torch.atan(norms), math.pi)


def _refuse_beyond(angle: float, rotations: Tensor, reason: str) -> None:
    """Raises NoMeanError for the block of ``(r, b, b)`` that turns most, if by more than the angle."""
    angles = 2 * torch.atan(torch.linalg.matrix_norm(inverse_cayley(rotations)))  # or less
    doubtful = ~(angles <= angle)
    angles[doubtful] = rotation_angles(rotations[doubtful])
    _refuse(angles.masked_fill(~doubtful, 0), angle, reason)


def _refuse(values: Tensor, limit: float, reason: str) -> None:
    """Raises NoMeanError for the block with the largest of ``values`` ``(r,)``, if that is beyond the limit."""
    if not values.amax() <= limit:
        raise NoMeanError(f"block {int(values.argmax())}: {reason}")
