"""``patch(model, functional=True)``: a model's own calls of torch's scaled_dot_product_attention go to fastseq."""

import copy
import functools
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

import fastseq
from fastseq import torch_calls


class Attention(nn.Module):
    def __init__(self, features=8, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(features, 3 * features)
        self.out = nn.Linear(features, features)

    def split(self, x):
        return (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))

    def forward(self, x, mask=None):
        o = self.attend(*self.split(x), mask)
        return self.out(o.transpose(1, 2).flatten(2))

    def attend(self, q, k, v, mask):  # by way of a method
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def helper(q, k, v, mask):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)


class ByHelper(Attention):
    def attend(self, *args):
        return helper(*args)


class ByImportedName(Attention):
    def attend(self, q, k, v, mask):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)


class ByDecorated(Attention):
    @torch.enable_grad()
    def attend(self, q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class ByInnerFunction(Attention):
    def attend(self, q, k, v, mask):
        def inner():
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        return inner()


class Processor:
    def __call__(self, *args):
        return helper(*args)


class ByProcessor(Attention):
    def __init__(self, processor=None):
        super().__init__()
        self.processor = processor or Processor()

    def attend(self, *args):
        return self.processor(*args)


class ByPartial(ByProcessor):
    def __init__(self):
        super().__init__(functools.partial(helper))


TABLE = {"torch": helper}


class ByTable(Attention):
    def attend(self, *args):
        return TABLE["torch"](*args)


class BySuper(Attention):
    def attend(self, *args):
        return super().attend(*args)


class ByAlias(Attention):
    def attend(self, q, k, v, mask):
        return sdpa(q, k, v, attn_mask=mask)


class ByAttribute(Attention):
    def __init__(self):
        super().__init__()
        self.function = F.scaled_dot_product_attention

    def attend(self, q, k, v, mask):
        return self.function(q, k, v, attn_mask=mask)


class ByPartialOfTorch(ByAttribute):
    def __init__(self):
        super().__init__()
        self.function = functools.partial(F.scaled_dot_product_attention, dropout_p=0.0)


class ByDefault(Attention):
    def attend(self, q, k, v, mask, function=F.scaled_dot_product_attention):
        return function(q, k, v, attn_mask=mask)


class Functions:
    @staticmethod
    def static(*args):
        return helper(*args)

    def method(self, *args):
        return helper(*args)


class ByStaticMethod(Attention):
    def attend(self, *args):
        return Functions.static(*args)


class ByObject(Attention):
    def __init__(self):
        super().__init__()
        self.functions = Functions()

    def attend(self, *args):
        return self.functions.method(*args)


class ByList(Attention):
    def __init__(self):
        super().__init__()
        self.functions = [helper]

    def attend(self, *args):
        return self.functions[0](*args)


class ByProperty(Attention):
    @property
    def attend(self):
        return lambda *args: helper(*args)


class ByMethodOfChild(Attention):
    def __init__(self):
        super().__init__()
        self.child = ChildOfMethods()

    def attend(self, *args):
        return self.child.method(*args)


class ChildOfMethods(nn.Module):
    def method(self, *args):
        return helper(*args)


class ByOurs(Attention):
    def attend(self, q, k, v, mask):
        return fastseq.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class ByOperator(Attention):
    def attend(self, q, k, v, mask):
        return torch.ops.aten.scaled_dot_product_attention(q, k, v, mask)


CALLERS = [
    Attention, ByHelper, ByImportedName, ByDecorated, ByInnerFunction, ByProcessor, ByPartial, ByTable, BySuper,
    ByAlias, ByAttribute, ByPartialOfTorch, ByDefault, ByStaticMethod, ByObject, ByList, ByProperty, ByMethodOfChild,
]  # fmt: skip


class Model(nn.Module):
    """Two attentions with something between them; with gradient checkpointing where asked for."""

    def __init__(self, kind=Attention, reentrant=None):
        super().__init__()
        self.first, self.last, self.reentrant = kind(), kind(), reentrant

    def forward(self, x):
        if self.reentrant is None:
            return self.last(torch.tanh(self.first(x)))
        return self.last(torch.tanh(checkpoint(self.first, x, use_reentrant=self.reentrant)))


@pytest.fixture
def calls(monkeypatch):
    """The threads in which fastseq's function was called for torch's."""
    seen = []

    def counted(*args, **kwargs):
        seen.append(threading.get_ident())
        return fastseq.scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(torch_calls, "scaled_dot_product_attention", counted)
    return seen


def values_and_gradients(model, x):
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("kind", CALLERS)
def test_a_models_calls_come_here_and_give_torchs_values(kind, calls):
    model, x = Model(kind), torch.randn(2, 5, 8)
    expected = values_and_gradients(model, x)
    report = fastseq.patch(model, functional=True)
    assert [change.name for change in report.changed] == ["first", "last"]
    found = values_and_gradients(model, x)
    assert len(calls) == 2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", CALLERS)
def test_the_report_counts_the_modules_that_call_torch(kind):
    model = Model(kind)
    classes = [type(module) for module in model.modules()]
    assert "2 modules call torch's scaled_dot_product_attention" in str(fastseq.patch(model))
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        nn.TransformerEncoderLayer(8, 2),
        ByOurs(),
        ByOperator(),
        nn.Sequential(nn.LSTM(2, 2), nn.ReLU()),
        nn.MultiheadAttention(8, 2),
    ],
    ids=lambda model: type(model).__name__,
)
def test_modules_without_calls_are_left_alone(model):
    report = fastseq.patch(model, functional=True)
    assert "scaled_dot_product_attention" not in str(report)
    assert not any(torch_calls.is_redirected(module) for module in model.modules())


def test_objects_that_make_up_their_attributes_are_no_obstacle():
    class MadeUp:
        __slots__ = ()

        def __getattr__(self, name):
            return 3

    model = ByProcessor()
    model.attend = model.heads = MadeUp()
    assert "scaled_dot_product_attention" not in str(fastseq.patch(model))


def test_what_runs_beside_the_model_is_not_touched(calls):
    model, x = Model(), torch.randn(1, 4, 8)
    fastseq.patch(model, functional=True)
    inside, done = threading.Event(), threading.Event()
    model.first.out.register_forward_hook(lambda *_: (inside.set(), done.wait(60))[0])

    def run():
        with torch.no_grad():
            model(x)

    thread = threading.Thread(target=run)
    thread.start()
    assert inside.wait(60)  # the model is in its forward there, and here is torch's function
    q = torch.randn(1, 1, 2, 4)
    F.scaled_dot_product_attention(q, q, q)
    done.set()
    thread.join()
    assert threading.get_ident() not in calls
    assert len(calls) == 2


def test_a_call_that_fails_leaves_torch_as_it_was(calls):
    model = Model()
    fastseq.patch(model, functional=True)
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 4, 3))
    q = torch.randn(1, 1, 2, 4)
    F.scaled_dot_product_attention(q, q, q)
    assert not calls


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_calls_the_same_function_again(reentrant, calls):
    plain, x = Model(), torch.randn(2, 5, 8)
    model = Model(reentrant=reentrant)
    model.load_state_dict(plain.state_dict())
    fastseq.patch(model, functional=True)
    for a, b in zip(values_and_gradients(model, x), values_and_gradients(plain, x), strict=True):
        torch.testing.assert_close(a, b)
    assert len(calls) == 3


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_whole(grad):
    model, x = Model(), torch.randn(2, 5, 8)
    expected = model(x)
    fastseq.patch(model, functional=True)
    graphs = []

    def backend(graph, _):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    with torch.set_grad_enabled(grad):
        found = torch.compile(model, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(found, expected)
    assert "scaled_dot_product_attention" not in graphs[0]
    exported = torch.export.export(model, (x,))
    assert sum("fastseq" in str(node.target) for node in exported.graph.nodes) >= 2
    torch.testing.assert_close(exported.module()(x), expected)


def test_patched_twice_and_back():
    model = Model()
    before, keys = [type(module) for module in model.modules()], list(model.state_dict())
    assert len(fastseq.patch(model, functional=True)) == 2
    assert fastseq.patch(model, functional=True).already == ["first", "last"]
    assert fastseq.patch(model).notes == []
    assert isinstance(model.first, Attention)
    assert list(model.state_dict()) == keys
    assert len(fastseq.unpatch(model)) == 2
    assert [type(module) for module in model.modules()] == before
    assert len(fastseq.unpatch(model)) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_call_fastseq_too(copied, calls):
    model, x = Model(), torch.randn(2, 5, 8)
    fastseq.patch(model, functional=True)
    again = copied(model)
    assert torch.equal(again(x), model(x))
    assert len(calls) == 4
    assert [change.name for change in fastseq.unpatch(again).changed] == ["first", "last"]


def test_a_subclass_of_a_patched_class_calls_fastseq_already(calls):
    model = Model()
    fastseq.patch(model, functional=True)
    again = type("Again", (type(model.first),), {})()
    assert fastseq.patch(again, functional=True).already == [""]
    again(torch.randn(2, 5, 8))
    assert len(calls) == 1


def one_head(x, power=1):
    return F.scaled_dot_product_attention(x**power, x, x)


class CallableOnX:
    def __call__(self, x):
        return one_head(x)


FORWARDS = {
    "staticmethod": staticmethod(one_head),
    "classmethod": classmethod(lambda cls, x: one_head(x)),
    "partial": functools.partial(one_head, power=2),
    "partialmethod": functools.partialmethod(lambda self, power, x: one_head(x, power), 2),
    "callable object": CallableOnX(),
    "lambda": lambda self, x: one_head(x),
}


@pytest.mark.parametrize("kind", FORWARDS)
def test_any_kind_of_forward_is_called_as_before(kind, calls):
    model, x = type("Model", (nn.Module,), {"forward": FORWARDS[kind]})(), torch.randn(2, 3, 5, 8)
    expected = model(x)
    assert len(fastseq.patch(model, functional=True)) == 1
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == 1


def test_a_forward_that_runs_later_is_left_with_the_reason(calls):
    class Generator(nn.Module):
        def forward(self, x):
            yield one_head(x)

    class Coroutine(nn.Module):
        async def forward(self, x):
            return one_head(x)

    model = nn.ModuleList([Generator(), Coroutine()])
    report = fastseq.patch(model, functional=True)
    assert [entry.name for entry in report.left] == ["0", "1"]
    assert "generator or a coroutine" in report.left[0].reason
    assert [y.shape for y in model[0](torch.randn(1, 1, 3, 4))] == [(1, 1, 3, 4)]


def test_a_class_that_refuses_subclasses_is_left_with_the_reason(calls):
    class Registered(nn.Module):
        def __init_subclass__(cls, name):
            super().__init_subclass__()

    class Named(Registered, name="attention"):
        def forward(self, x):
            return one_head(x)

    model = nn.Sequential(Named(), Attention())
    report = fastseq.patch(model, functional=True)
    assert [change.name for change in report.changed] == ["1"]
    assert "refuses a subclass" in report.left[0].reason
    model[0](torch.randn(1, 1, 3, 4))
    assert not calls


def rebuilt(cls, state):
    module = cls()
    module.load_state_dict(state)
    return module


class WithReduce(Attention):
    def __reduce__(self):
        return rebuilt, (type(self), self.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_class_with_its_own_reduce_is_copied_by_it(copied, calls):
    model, x = WithReduce(), torch.randn(2, 5, 8)
    fastseq.patch(model, functional=True)
    again = copied(model)
    assert torch.equal(again(x), model(x))
    assert len(calls) == 2
    fastseq.unpatch(again)
    assert type(again) is WithReduce


def test_copies_of_a_subclass_of_a_patched_class_are_of_that_subclass():
    model = Model()
    fastseq.patch(model, functional=True)
    again = type("Again", (type(model.first),), {})()
    assert type(copy.deepcopy(again)) is type(again)


def test_a_forward_replaced_on_the_instance_is_left_with_the_reason(calls):
    model = Model()
    model.first.forward = functools.partial(Attention.forward, model.first)
    report = fastseq.patch(model, functional=True)
    assert [entry.name for entry in report.left] == ["first"]
    assert "replaced on the instance" in report.left[0].reason
    model(torch.randn(2, 5, 8))
    assert len(calls) == 1


def test_tensor_subclasses_keep_torchs_function(calls):
    class Marked(torch.Tensor):
        pass

    model = Attention()
    fastseq.patch(model, functional=True)
    y = model(torch.randn(2, 5, 8).as_subclass(Marked))
    assert type(y) is Marked
    assert not calls
