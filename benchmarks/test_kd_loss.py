"""kd_loss beside its peers: forward, backward and both, at the shapes of models.

    pytest benchmarks/test_kd_loss.py --benchmark-columns=median,iqr --benchmark-group-by=group

A peer that cannot run here is skipped with the reason; one that is not what it says it is fails.
"""

from fused_kd.testing import shapes

from .conftest import DEVICE, DTYPE, cases


@cases([shape for shape in shapes.model_shapes(DEVICE, DTYPE) if shape.inputs == "logits"])
def test_pass(time_case, case):
    time_case(case)
