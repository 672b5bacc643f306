"""patch leaves modules that wrap a recurrent layer as they are, and names the argument that serves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fastseq


class AwdWeightDrop(nn.Module):
    """The shape of awd-lstm-lm's WeightDrop: the raw weights are the layer's, and each call sets what it reads."""

    def __init__(self, module: nn.Module, weights: list[str], dropout: float = 0.0, variational: bool = False) -> None:
        super().__init__()
        self.module, self.weights, self.dropout, self.variational = module, weights, dropout, variational
        for name in weights:
            weight = module._parameters.pop(name)
            module.register_parameter(f"{name}_raw", nn.Parameter(weight.data))

    def forward(self, *args: object) -> object:
        for name in self.weights:
            raw = getattr(self.module, f"{name}_raw")
            setattr(self.module, name, nn.functional.dropout(raw, self.dropout, self.training))
        return self.module(*args)


class WeightDropout(nn.Module):
    """The shape of fastai's: the raw weights are the wrapper's. ``into``: where each call puts what the layer reads, as
    an attribute (its second version) or among the parameters (its first)."""

    def __init__(self, module: nn.Module, weight_p: float, into: str = "attribute") -> None:
        super().__init__()
        self.module, self.weight_p, self.into = module, weight_p, into
        self.layer_names = [name for name in module._parameters if name.startswith("weight_hh")]
        for name in self.layer_names:
            weight = getattr(module, name)
            self.register_parameter(f"{name}_raw", nn.Parameter(weight.data))
            if into == "attribute":
                delattr(module, name)
                setattr(module, name, weight.clone())

    def forward(self, *args: object) -> object:
        for name in self.layer_names:
            weight = nn.functional.dropout(getattr(self, f"{name}_raw"), self.weight_p, self.training)
            if self.into == "attribute":
                setattr(self.module, name, weight)
            else:
                self.module._parameters[name] = weight  # type: ignore[assignment]
        return self.module(*args)


class WeightDrop(nn.Module):
    """The shape of torchnlp's: it replaces the layer's forward, which alone knows the layer."""

    def __init__(self, module: nn.Module, weights: list[str], dropout: float = 0.0) -> None:
        super().__init__()
        drop_in_forward(module, weights, dropout)
        self.forward = module.forward
        vars(self)["layer"] = module  # for the test alone


class WeightDropLSTM(nn.LSTM):
    def __init__(self, *args: int, weight_dropout: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__(*args, dropout=dropout)
        drop_in_forward(self, [f"weight_hh_l{k}" for k in range(self.num_layers)], weight_dropout)


def drop_in_forward(module: nn.Module, weights: list[str], dropout: float) -> None:
    for name in weights:
        module.register_parameter(f"{name}_raw", nn.Parameter(module._parameters.pop(name)))
    forward = module.forward

    def dropping(*args: object) -> object:
        for name in weights:
            weight = nn.functional.dropout(getattr(module, f"{name}_raw"), dropout, module.training)
            setattr(module, name, weight)
        return forward(*args)

    module.forward = dropping


WEIGHT_DROPS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "awd-lstm-lm": (lambda: AwdWeightDrop(nn.LSTM(7, 7), ["weight_hh_l0"], 0.5), "weight_dropout=0.5"),
    "fastai": (lambda: WeightDropout(nn.LSTM(7, 7, 2), 0.5), "weight_dropout=0.5"),
    "fastai 1": (lambda: WeightDropout(nn.GRU(7, 7), 0.25, "parameters"), "weight_dropout=0.25"),
    "torchnlp": (lambda: WeightDrop(nn.GRU(7, 7), ["weight_hh_l0"], 0.5), "weight_dropout="),
    "torchnlp's layer": (lambda: WeightDropLSTM(7, 7, 2, weight_dropout=0.5, dropout=0.25), "weight_dropout="),
}


@pytest.mark.parametrize("keep_class", [False, True], ids=["", "keep_class"])
@pytest.mark.parametrize(("make", "argument"), WEIGHT_DROPS.values(), ids=WEIGHT_DROPS)
def test_a_layer_with_dropped_weights_trains_as_before_and_the_report_names_the_argument(make, argument, keep_class):
    """It stays torch's, and dropouts draw from one seed: losses and gradients are the same bit for bit."""
    x = torch.randn(4, 3, 7)

    def made() -> tuple[nn.Module, nn.Module]:
        """The module that drops weights, and the layer that has them."""
        torch.manual_seed(0)
        drop = make()
        return drop, vars(drop).get("layer") or getattr(drop, "module", drop)

    def trained(drop: nn.Module, layer: nn.Module) -> list[Tensor]:
        """Losses of two steps of training and of evaluation, and the gradients of the last step."""
        torch.manual_seed(1)
        parameters = list(dict.fromkeys([*drop.parameters(), *layer.parameters()]))
        parameters = [p for p in parameters if p.is_leaf]
        optimizer, losses = torch.optim.SGD(parameters, 0.5), []
        for _ in range(2):
            optimizer.zero_grad()
            losses.append(drop.train()(x)[0].square().mean())
            losses[-1].backward()
            optimizer.step()
        layer.eval()
        losses.append(drop.eval()(x)[0].square().mean())
        return losses + [p.grad for p in parameters if p.grad is not None]

    theirs = trained(*made())
    drop, layer = made()
    report = fastseq.patch(nn.Sequential(drop, nn.LSTM(7, 7)), keep_class=keep_class)
    assert [change.name for change in report.changed] == ["1"]
    notes = [note for note in report.notes if "weight_dropout" in note]
    assert notes == [f"0 ({type(drop).__name__}): the layers of fastseq.nn have {argument} for that"]
    ours = trained(drop, layer)
    assert len(ours) == len(theirs) > 5
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_wrapper_that_writes_parameters_is_named_where_its_layer_is_left():
    report = fastseq.patch(WeightDropout(nn.GRU(3, 3), 0.25, "parameters"))
    assert [entry.reason for entry in report.left] == ["its weight_hh_l0 is written by WeightDropout at each call"]
    assert "the layers of fastseq.nn have weight_dropout=0.25 for that" in str(report)


def named(name: str, base: type[nn.Module] = nn.Module, module: str = __name__, /, **attributes: object) -> nn.Module:
    """A module of a class of that name with these parts and attributes."""
    layer = type(name, (base,), {"__module__": module})()
    for attribute, value in attributes.items():
        setattr(layer, attribute, value)
    return layer


def normed_gru(*sizes: int) -> dict[str, nn.Module]:
    return {"linear": nn.Linear(9, 12), **{f"norm{n}": nn.LayerNorm(size) for n, size in enumerate(sizes)}}


class DropConnect(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, weight: Tensor) -> Tensor:
        return nn.functional.dropout(weight, self.p, self.training)


def parametrized(name: str) -> nn.Module:
    layer = nn.LSTM(3, 4)
    parametrize.register_parametrization(layer, name, DropConnect(0.25))
    return layer


NAMED: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "haste lstm": (lambda: named("LSTM", nn.Module, "haste_pytorch.lstm", dropout=0.1, zoneout=0.2),
                   "weight_dropout=0.1, zoneout=(0.2, 0.0)"),
    "haste normed gru": (lambda: named("LayerNormGRU", nn.Module, "haste_pytorch.gru", dropout=0.0, zoneout=0.2),
                         'norm="layer", zoneout=0.2'),
    "haste indrnn": (lambda: named("IndRNN", nn.Module, "haste_pytorch.indrnn", zoneout=0.2), None),
    "normed lstm": (lambda: named("LayerNormLSTMCell", a=nn.LayerNorm(16), b=nn.LayerNorm(16)), 'norm="layer"'),
    "normed gru": (lambda: named("LayerNormGRUCell", **normed_gru(12, 12)), 'norm="layer"'),
    "dreamer": (lambda: named("GRUCell", **normed_gru(12)), 'norm="joint"'),
    "sheeprl": (lambda: named("LayerNormGRUCell", **normed_gru(12)), 'norm="joint"'),
    "norm of the output": (lambda: named("LayerNormLSTM", lstm=nn.LSTM(3, 4), norm=nn.LayerNorm(4)), None),
    "norm elsewhere": (lambda: named("GRUModel", gru=nn.GRUCell(3, 4), **normed_gru(12)), None),
    "zoneout": (lambda: named("ZoneOutCell", cell=nn.LSTMCell(3, 4), zoneout_rate=0.1), "zoneout=0.1"),
    "allennlp": (lambda: named("AugmentedLstm", recurrent_dropout_probability=0.3),
                 "recurrent_dropout=0.3"),
    "drop connect": (lambda: parametrized("weight_hh_l0"), "weight_dropout=0.25"),
    "drop connect of x": (lambda: parametrized("weight_ih_l0"), None),
    "weight norm": (lambda: parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0"), None),
    "rows of weights": (lambda: AwdWeightDrop(nn.LSTM(3, 4), ["weight_hh_l0"], 0.5, variational=True), None),
    "weights of x too": (lambda: AwdWeightDrop(nn.LSTM(3, 4), ["weight_hh_l0", "weight_ih_l0"], 0.5), None),
    "in parallel": (lambda: nn.DataParallel(WeightDropLSTM(3, 4)), "weight_dropout="),
    "ours": (lambda: fastseq.nn.LSTM(3, 4, weight_dropout=0.5, recurrent_dropout=0.5), None),
    "a plain model": (lambda: named("ZonedModel", lstm=nn.LSTM(3, 4), norm=nn.LayerNorm(4), dropout=0.5), None),
}  # fmt: skip


@pytest.mark.parametrize(("make", "arguments"), NAMED.values(), ids=NAMED)
def test_the_report_names_the_argument_that_a_module_stands_for(make, arguments):
    notes = [note for note in fastseq.patch(nn.Sequential(make())).notes if "the layers of fastseq.nn have" in note]
    assert [note.split("fastseq.nn have ")[1] for note in notes] == ([f"{arguments} for that"] if arguments else [])
    assert all(note.startswith("0") for note in notes)


def test_masks_between_layers_are_kept_and_told_once():
    masks = [named(name) for name in ("LockedDropout", "LockedDropout", "InputVariationalDropout")]
    said = "as it is between layers; on the recurrence the layers of fastseq.nn have recurrent_dropout= for that"
    report = fastseq.patch(nn.Sequential(*masks, nn.LSTM(3, 4)))
    assert report.notes[:2] == [f"0, 1 (LockedDropout): {said}", f"2 (InputVariationalDropout): {said}"]
    assert not fastseq.patch(nn.Sequential(*masks)).notes, "there is no recurrence"
    sparse = named("VariationalDropout", theta=nn.Parameter(torch.ones(2)))  # of another paper: a layer with weights
    assert len(fastseq.patch(nn.Sequential(sparse, nn.LSTM(3, 4))).notes) == 1
