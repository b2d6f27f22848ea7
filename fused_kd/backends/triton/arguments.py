"""The kernel arguments that encode an objective: temperature, maps of the logits, divergence."""

import math
from typing import Any, NamedTuple

from ...divergences import Objective, divergence_of
from ...logit_map import LogitMap
from .elements import DIVERGENCES
from .tiles import CAPPED, IDENTITY, OF_RATIO, SCALED


class TemperatureArguments(NamedTuple):
    """The kernel arguments that encode T."""

    exp2_scale: float  # log2(e) / T
    inverse: float  # 1 / T
    power: int  # T if it is 1, 2, 3 or 4, otherwise 0; see `elements.exponentials`


def temperature_arguments(temperature: float) -> TemperatureArguments:
    """Return the arguments that encode a temperature."""
    power = int(temperature) if temperature in (1, 2, 3, 4) else 0
    return TemperatureArguments(math.log2(math.e) / temperature, 1 / temperature, power)


def divergence_number(divergence: str) -> int:
    """Return the value of the constexpr DIVERGENCE."""
    return DIVERGENCES.get(divergence, OF_RATIO).value  # type: ignore[no-any-return]


class MapArguments(NamedTuple):
    """The kernel arguments that encode a `LogitMap`; see `tiles.logits_of`."""

    factor: float
    cap: float
    kind: int  # IDENTITY, SCALED or CAPPED


def map_arguments(logit_map: LogitMap) -> MapArguments:
    """Return the arguments that encode a map of the logits."""
    if logit_map.is_capped:
        return MapArguments(logit_map.scale / logit_map.softcap, logit_map.softcap, CAPPED.value)
    return MapArguments(logit_map.scale, 1.0, (IDENTITY if logit_map.is_identity else SCALED).value)


class ObjectiveArguments(NamedTuple):
    """The kernel arguments that encode an `Objective`."""

    T: TemperatureArguments
    student_map: MapArguments
    teacher_map: MapArguments
    divergence: int
    parameter: float  # of the divergence; 0 if it has none


def objective_arguments(objective: Objective) -> ObjectiveArguments:
    """Return the arguments that encode an objective."""
    return ObjectiveArguments(
        temperature_arguments(objective.temperature),
        map_arguments(objective.student_map),
        map_arguments(objective.teacher_map),
        divergence_number(objective.divergence),
        divergence_of(objective).kernel_parameter,
    )


def teacher_grad_of(objective: Objective) -> int:
    """Return the constexpr TEACHER_GRAD of a teacher that learns: 2 if its slope is a function of its own, otherwise 1."""
    divergence = divergence_of(objective)
    return 2 if divergence.sweeps == 2 and len(divergence.kernels()) == 3 else 1


def functions_of(objective: Objective, teacher_grad: int = 0) -> dict[str, Any]:
    """Return the constexprs of the functions of a divergence of two sweeps; None for others.

    If TEACHER_GRAD is 2, the teacher's slope takes the place of the value.

    VERSION changes with the source of the functions.  Triton before 3.5 knows a constexpr function by its name alone, and
    would take the kernel of a function that has been defined anew.
    """
    divergence = divergence_of(objective)
    value, slope, *of_teacher = (None, None) if divergence.sweeps == 1 else divergence.kernels()
    if teacher_grad == 2:
        (value,) = of_teacher
    version = "".join(getattr(function, "cache_key", "") for function in (value, slope)) or None
    return {"VALUE": value, "SLOPE": slope, "VERSION": version}
