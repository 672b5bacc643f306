"""What the mathematics promises (test_recurrent_promises.py), of the Triton kernels under Triton's interpreter."""

import pytest
import test_recurrent_promises as promises
from triton_support import needs_interpreter

pytestmark = [needs_interpreter, promises.pytestmark]


@pytest.fixture(autouse=True, params=["sequence", "step", "persistent"])
def role(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastseq.kernels import recurrent_launch

    monkeypatch.setattr(recurrent_launch, "role", request.param)


@pytest.mark.full
@pytest.mark.parametrize("dtype", promises.DTYPES, ids=str)
def test_for_thousands_of_steps(backend: str, dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises, "LONG", 2000)
    promises.test_open_forget_gate_carries_the_cell_for_thousands_of_steps(backend, dtype)


globals().update({name: test for name, test in vars(promises).items() if name.startswith("test_")})
