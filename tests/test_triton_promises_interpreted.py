"""What the mathematics promises (test_recurrent_promises.py), of the Triton kernels under Triton's interpreter."""

import pytest
import test_recurrent_promises as promises
from triton_support import needs_interpreter

pytestmark = [needs_interpreter, promises.pytestmark]


@pytest.fixture(autouse=True, params=["sequence", "step"])
def role(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastseq.kernels import recurrent_launch

    monkeypatch.setattr(recurrent_launch, "role", request.param)


globals().update({name: test for name, test in vars(promises).items() if name.startswith("test_")})
