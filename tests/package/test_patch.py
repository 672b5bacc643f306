"""patch and unpatch change a layer's class and nothing else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from support import assert_within_budget, flat
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq.patch import TO_FASTSEQ

SEQUENCE_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "rnn": lambda: nn.RNN(7, 9),
    "rnn_relu": lambda: nn.RNN(7, 9, nonlinearity="relu", bidirectional=True),
    "gru": lambda: nn.GRU(7, 9, num_layers=2, bidirectional=True),
    "gru_no_bias": lambda: nn.GRU(7, 9, bias=False, batch_first=True),
    "lstm": lambda: nn.LSTM(7, 9, num_layers=2),
    "lstm_projected": lambda: nn.LSTM(7, 9, proj_size=4, bidirectional=True),
}
CELLS: dict[str, Callable[[], nn.Module]] = {
    "rnn_cell": lambda: nn.RNNCell(7, 9, nonlinearity="relu"),
    "gru_cell": lambda: nn.GRUCell(7, 9),
    "lstm_cell": lambda: nn.LSTMCell(7, 9, bias=False),
}
ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    "attention_wide": lambda: nn.MultiheadAttention(8, 2, kdim=5, vdim=3, add_bias_kv=True, add_zero_attn=True),
}
LAYERS = {**SEQUENCE_LAYERS, **CELLS, **ATTENTION}


def arguments(layer: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Arguments that the layer can be called with, the same each time."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    if isinstance(layer, nn.MultiheadAttention):
        return draw(5, 3, layer.embed_dim), draw(5, 3, layer.kdim), draw(5, 3, layer.vdim)
    return (draw(3, 7),) if isinstance(layer, nn.RNNCellBase) else (draw(5, 3, 7),)


def run(layer: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """The outputs of a call, then the gradients of the inputs and of the parameters."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    layer.zero_grad()
    outputs = flat(layer(*inputs))
    torch.stack([y.square().sum() for y in outputs]).sum().backward()
    return [*outputs, *(x.grad for x in inputs), *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_patched_layer_gives_torchs_answers_and_gradients(make):
    torch.manual_seed(0)
    layer = make()
    inputs = arguments(layer)
    theirs = run(layer, *inputs)
    truth = run(copy.deepcopy(layer).double(), *(x.double() for x in inputs))
    assert len(fastseq.patch(layer)) == 1
    for ours, peer, right in zip(run(layer, *inputs), theirs, truth, strict=True):
        assert_within_budget(ours, peer, right)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_patch_changes_only_the_class(make):
    layer = make().eval()
    before = dict(vars(layer))
    own = type(layer)
    weights = {name: (id(p), p.data_ptr()) for name, p in layer.named_parameters()}
    state = {name: tensor.data_ptr() for name, tensor in layer.state_dict().items()}

    report = fastseq.patch(layer)

    assert type(layer) is TO_FASTSEQ[own]
    assert [(c.name, c.old, c.new) for c in report.changed] == [
        ("", f"torch.nn.{own.__name__}", f"fastseq.nn.{own.__name__}")
    ]
    assert {name: (id(p), p.data_ptr()) for name, p in layer.named_parameters()} == weights
    assert {name: tensor.data_ptr() for name, tensor in layer.state_dict().items()} == state
    assert list(vars(layer)) == list(before)
    assert all(vars(layer)[name] is value for name, value in before.items())
    assert not layer.training

    assert len(fastseq.unpatch(layer)) == 1
    assert type(layer) is own
    assert list(vars(layer)) == list(before)
    assert all(vars(layer)[name] is value for name, value in before.items())


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers_survive_pickle_and_deepcopy_and_unpatch_like_torchs(make):
    torch.manual_seed(0)
    layer = make()
    own, inputs = type(layer), arguments(layer)
    fastseq.patch(layer)
    expected = flat(layer(*inputs))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert all(torch.equal(a, b) for a, b in zip(flat(twin(*inputs)), expected, strict=True))
        fastseq.unpatch(twin)
        assert type(twin) is own
        twin(*inputs)


def test_layers_are_found_wherever_they_are():
    model = nn.ModuleDict(
        {
            "list": nn.ModuleList([nn.GRU(3, 4), nn.Linear(3, 4)]),
            "sequential": nn.Sequential(nn.Sequential(nn.LSTM(3, 4))),
            "encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2),
            "decoder": nn.TransformerDecoderLayer(8, 2),
            "cell": nn.GRUCell(3, 4),
        }
    )
    report = fastseq.patch(model)
    assert [changed.name for changed in report.changed] == [
        "list.0",
        "sequential.0.0",
        "encoder.layers.0",
        "encoder.layers.0.self_attn",
        "encoder.layers.1",
        "encoder.layers.1.self_attn",
        "decoder.self_attn",
        "decoder.multihead_attn",
        "cell",
    ]
    assert not report.left
    assert not any(type(module) in TO_FASTSEQ for module in model.modules())


def test_a_second_patch_changes_nothing():
    model = nn.Sequential(nn.GRU(3, 4), nn.MultiheadAttention(4, 2))
    assert fastseq.patch(model)
    again = fastseq.patch(model)
    assert not again
    assert len(again) == 0
    assert again.already == ["0", "1"]
    assert fastseq.unpatch(model)
    assert not fastseq.unpatch(model)


def test_a_shared_layer_is_changed_once_and_stays_shared():
    shared = nn.GRU(3, 3)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    assert [changed.name for changed in fastseq.patch(model).changed] == ["a"]
    assert model["a"] is model["b"][0]


class Mine(nn.LSTM):
    pass


def left_alone() -> dict[str, tuple[nn.Module, str]]:
    """Layers that patch must leave, and a word of the reason."""
    replaced = nn.LSTM(3, 4)
    replaced.forward = lambda x: x
    normed = nn.GRU(3, 4)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(normed, "weight_hh_l0")
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(3, 4)), dtype=torch.qint8)
    lora = nn.MultiheadAttention(8, 2)
    lora.out_proj = nn.Sequential(lora.out_proj)
    return {
        "subclass": (Mine(3, 4), "subclass of torch.nn.LSTM"),
        "replaced forward": (replaced, "forward was replaced"),
        "weight norm": (normed, "weight_hh_l0 is not a parameter"),
        "pruned": (prune.l1_unstructured(nn.LSTMCell(3, 4), "weight_ih", 0.5), "weight_ih is not a parameter"),
        "parametrized": (parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0"), "parametrized"),
        "quantized": (quantized[0], "quantization"),
        "complex": (nn.GRUCell(3, 4, dtype=torch.complex64), "complex64"),
        "other out_proj": (lora, "out_proj is a torch.nn.Sequential"),
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_what_cannot_be_swapped_is_left_with_the_reason():
    for case, (layer, word) in left_alone().items():
        own = type(layer)
        report = fastseq.patch(nn.Sequential(layer))
        assert not report, case
        assert type(layer) is own, case
        assert [entry.name for entry in report.left] == ["0"], case
        assert word in report.left[0].reason, case
        assert word in str(report), case


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_layer_is_left():
    report = fastseq.patch(torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 4))))
    assert not report
    assert "ScriptModule" in report.left[0].reason


def test_a_parametrized_layer_can_be_patched_once_the_parametrization_is_removed():
    layer = parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0")
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert type(layer) is nn.GRU
    assert fastseq.patch(layer)
    x = torch.randn(2, 1, 3)
    ours = layer(x)[0]
    fastseq.unpatch(layer)
    torch.testing.assert_close(ours, layer(x)[0])


def test_unpatch_converts_layers_born_as_fastseq_where_torch_has_them():
    model = nn.ModuleList(
        [fastseq.nn.LSTM(3, 4), fastseq.nn.GRU(3, 4, reset_after=False), fastseq.nn.GRUCell(3, 4, reset_after=True),
         fastseq.nn.LSTM(3, 4, input_forget=True), fastseq.nn.LSTMCell(3, 4, input_forget=True)]
    )  # fmt: skip
    assert fastseq.patch(model).already == list("01234")
    report = fastseq.unpatch(model)
    ours = fastseq.nn
    assert [type(layer) for layer in model] == [nn.LSTM, ours.GRU, nn.GRUCell, ours.LSTM, ours.LSTMCell]
    assert [entry.name for entry in report.left] == ["1", "3", "4"]
    assert "reset_after=False" in report.left[0].reason
    assert all("input_forget=True" in entry.reason for entry in report.left[1:])
    x = torch.randn(2, 1, 3)
    model[0](x)
    model[2](x[0])


def test_a_subclass_of_ours_is_left_by_both():
    class Extended(fastseq.nn.GRU):
        pass

    layer = Extended(3, 4)
    assert fastseq.patch(layer).already == [""]
    assert "subclass" in fastseq.unpatch(layer).left[0].reason
    assert type(layer) is Extended


def test_hooks_fire_after_patching():
    model = nn.Sequential(nn.GRU(3, 4))
    seen: list[str] = []
    model[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    model[0].register_forward_hook(lambda *_: seen.append("after"))
    model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    fastseq.patch(model)
    model[0].register_forward_hook(lambda *_: seen.append("added later"))
    model(torch.randn(2, 1, 3, requires_grad=True))[0].sum().backward()
    assert seen == ["before", "after", "added later", "backward"]


def test_an_optimizer_made_before_goes_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(3, 4))
    twin = copy.deepcopy(model)
    x = torch.randn(5, 2, 3)
    for patched, trained in ((True, model), (False, twin)):
        optimizer = torch.optim.Adam(trained.parameters(), 0.01)
        for step in range(4):
            if patched and step == 2:
                fastseq.patch(trained)
            optimizer.zero_grad()
            trained(x)[0].square().sum().backward()
            optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_packed_sequences_go_through_a_patched_layer():
    torch.manual_seed(0)
    layer = nn.LSTM(3, 4, bidirectional=True)
    packed = pack_padded_sequence(torch.randn(6, 3, 3), torch.tensor([2, 6, 3]), enforce_sorted=False)
    theirs, (h, c) = layer(packed)
    fastseq.patch(layer)
    ours, (our_h, our_c) = layer(packed)
    torch.testing.assert_close(ours.data, theirs.data)
    torch.testing.assert_close(our_h, h)
    torch.testing.assert_close(our_c, c)


def test_conversions_work_after_patching():
    layer = nn.GRU(3, 4)
    fastseq.patch(layer)
    x = torch.randn(5, 2, 3)
    expected = layer(x)[0]
    torch.testing.assert_close(layer.double()(x.double())[0].float(), expected)
    assert layer.bfloat16()(x.bfloat16())[0].dtype == torch.bfloat16
    layer.load_state_dict(nn.GRU(3, 4).state_dict())


def test_wrappers_are_walked_through():
    compiled = torch.compile(nn.Sequential(nn.GRU(3, 4)), backend="eager")
    assert [changed.name for changed in fastseq.patch(compiled).changed] == ["_orig_mod.0"]
    parallel = nn.DataParallel(nn.GRU(3, 4))
    assert [changed.name for changed in fastseq.patch(parallel).changed] == ["module"]
    parallel(torch.randn(2, 1, 3))


def test_a_model_compiled_and_run_before_sees_the_change():
    torch._dynamo.reset()
    torch.manual_seed(0)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.layer = nn.GRU(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.attention(x, x, x)[0])[0]

    whole = Whole()
    compiled = torch.compile(whole, backend="eager")
    x = torch.randn(3, 5, 8)
    theirs = compiled(x)
    fastseq.patch(compiled)
    with fastseq.use_backend("reference"):
        assert "runs on: reference" in fastseq.explain(whole, x)
        torch.testing.assert_close(compiled(x), theirs)
    torch.testing.assert_close(compiled(x), theirs)
    fastseq.unpatch(compiled)
    torch.testing.assert_close(compiled(x), theirs)
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_transformer_encoders_give_torchs_answers(training):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    x = torch.randn(3, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    causal = nn.Transformer.generate_square_subsequent_mask(5)

    def outputs() -> list[Tensor]:
        with torch.no_grad():
            return [model(x), model(x, mask=causal, is_causal=True), model(x, src_key_padding_mask=padding)[~padding]]

    theirs = outputs()
    report = fastseq.patch(model)
    assert len(report) == 4
    for ours, right in zip(outputs(), theirs, strict=True):
        torch.testing.assert_close(ours, right)


class OwnEncoderLayer(nn.TransformerEncoderLayer):
    pass


def test_the_report_tells_of_torchs_fused_encoder_kernel():
    model = nn.TransformerEncoder(OwnEncoderLayer(8, 2, batch_first=True), 2)
    report = fastseq.patch(model)
    assert len(report.notes) == 1
    assert "set_fastpath_enabled(False)" in report.notes[0]
    assert not fastseq.patch(OwnEncoderLayer(8, 2)).notes  # not batch_first: torch does not fuse it


def test_the_report_is_a_table():
    model = nn.Sequential(nn.Linear(8, 16), nn.LSTM(16, 32), Mine(3, 4))
    assert str(fastseq.patch(model)).splitlines() == [
        "fastseq.patch: 1 layer changed, 1 left",
        "  changed  1  torch.nn.LSTM -> fastseq.nn.LSTM",
        f"  left     2  {Mine.__module__}.Mine: a subclass of torch.nn.LSTM: its own code may rely on torch's forward; "
        "see keep_class=",
        "  note     tools that look for torch.nn's recurrent classes miss these layers: see keep_class=, "
        'weights="int8"',
    ]
    assert str(fastseq.unpatch(nn.Linear(3, 4))) == "fastseq.unpatch: 0 layers changed, 0 left"


@pytest.mark.parametrize("value", ["float16", "fp8", 16, "bfloat16 "])
def test_unknown_weights_are_refused_and_nothing_is_changed(value):
    layer = nn.GRU(3, 4)
    with pytest.raises(ValueError, match=r"weights: got .*, accepted is one of None, 'bfloat16', 'int8'"):
        fastseq.patch(layer, weights=value)
    assert type(layer) is nn.GRU


@pytest.mark.parametrize("action", [fastseq.patch, fastseq.unpatch])
def test_only_modules_are_taken(action):
    with pytest.raises(TypeError, match="pass an instance, not the class"):
        action(nn.GRU)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got int"):
        action(3)


def test_a_report_taken_for_the_model_says_that_patch_works_in_place():
    for report in (fastseq.patch(nn.LSTM(3, 4)), fastseq.unpatch(nn.LSTM(3, 4))):
        with pytest.raises(TypeError, match="change the model in place"):
            report(torch.randn(2, 1, 3))
        for name in ("train", "parameters", "state_dict"):
            with pytest.raises(AttributeError, match=f"no attribute '{name}'.*in place"):
                getattr(report, name)
        assert not hasattr(report, "eval")
        assert pickle.loads(pickle.dumps(report)) == copy.deepcopy(report) == report


class Inheriting(nn.LSTM):
    """Adds to torch's layer and changes nothing of it, as layers of other packages do."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size, batch_first=True)

    def start(self, batch: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, batch, self.hidden_size), torch.zeros(1, batch, self.hidden_size)


class Overriding(nn.GRU):
    def forward(self, x: Tensor, hx: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, hx)[0]


@pytest.mark.parametrize("grad", [False, True])
def test_a_layer_may_keep_its_class(grad):
    model = nn.ModuleList(
        [nn.RNN(3, 3), nn.GRU(3, 3, 2), nn.LSTM(3, 3), Inheriting(3), Overriding(3, 3), nn.LSTMCell(3, 3)]
    )
    classes, x = [type(layer) for layer in model], torch.randn(4, 2, 3)
    model.requires_grad_(grad)

    def outputs() -> list[Tensor]:
        return [layer(x)[0] for layer in model[:4]]

    theirs = outputs()
    report = fastseq.patch(model, keep_class=True)
    assert [change.name for change in report.changed] == ["0", "1", "2", "3", "5"]
    assert report.changed[3].new == "fastseq.nn.LSTM"
    assert not report.notes
    assert [left.reason for left in report.left] == ["a subclass of torch.nn.GRU that overrides forward"]
    assert all(isinstance(layer, cls) for layer, cls in zip(model, classes, strict=True))
    assert isinstance(model[3], fastseq.nn.LSTM)
    assert model[3].start(2)[0].shape == (1, 2, 3)
    for layer, right in zip(model, theirs, strict=False):
        torch.testing.assert_close(layer(x)[0], right)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(other) is type(layer)
            torch.testing.assert_close(other(x)[0], right)
    assert not fastseq.patch(model, keep_class=True)
    torch.testing.assert_close(torch.compile(model[3], backend="eager")(x)[0], theirs[3])
    assert len(fastseq.unpatch(model)) == 5
    assert [type(layer) for layer in model] == classes
    assert all(torch.equal(a, b) for a, b in zip(outputs(), theirs, strict=True))
    torch._dynamo.reset()


def test_tools_that_look_for_torchs_classes_find_layers_that_keep_them():
    model = nn.Sequential(nn.LSTM(3, 3))
    fastseq.patch(model)
    assert not isinstance(model[0], nn.LSTM)
    fastseq.unpatch(model)
    fastseq.patch(model, keep_class=True)
    assert isinstance(model[0], nn.LSTM)
    assert [name for name, m in model.named_modules() if isinstance(m, (nn.LSTM, nn.GRU, nn.RNN))] == ["0"]
