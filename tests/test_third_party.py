"""Models of other packages, swapped, train as before. Each needs its package:

pip install sb3-contrib opacus pytorch-forecasting thop ptflops torchinfo
"""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import fusedrnn

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]


def test_recurrent_ppo_of_sb3_contrib():
    """Two rollouts and updates of a policy with an LSTM actor and an LSTM critic."""
    sb3_contrib = pytest.importorskip("sb3_contrib")
    policies = []
    for change in (lambda model: model, fusedrnn.swap):
        agent = sb3_contrib.RecurrentPPO(
            "MlpLstmPolicy", "CartPole-v1", n_steps=64, batch_size=32, n_epochs=3, seed=1,
            policy_kwargs={"lstm_hidden_size": 16, "n_lstm_layers": 2}, device="cpu",
        )  # fmt: skip
        start = {n: p.detach().clone() for n, p in agent.policy.named_parameters()}
        change(agent.policy)
        agent.learn(128)
        policies.append(agent.policy)
    plain, fused = policies
    assert type(plain.lstm_actor) is nn.LSTM
    assert type(fused.lstm_actor) is type(fused.lstm_critic) is fusedrnn.LSTM
    trained = dict(plain.named_parameters())
    for name, p in fused.named_parameters():
        torch.testing.assert_close(p, trained[name], rtol=1e-4, atol=1e-5, msg=name)
    assert not torch.equal(fused.lstm_actor.weight_hh_l0, start["lstm_actor.weight_hh_l0"])


def test_temporal_fusion_transformer_of_pytorch_forecasting():
    """An LSTM encoder whose states start an LSTM decoder, with dropout between layers."""
    module = pytest.importorskip(
        "pytorch_forecasting.models.temporal_fusion_transformer._tft_v2",
        reason="needs pytorch-forecasting",
    )
    metadata = {
        "max_encoder_length": 12, "max_prediction_length": 4, "encoder_cont": 3, "encoder_cat": 1,
        "decoder_cont": 2, "decoder_cat": 1, "static_continuous_features": 2,
    }  # fmt: skip
    batch = {
        "encoder_cont": torch.randn(8, 12, 3),
        "encoder_cat": torch.rand(8, 12, 1),
        "decoder_cont": torch.randn(8, 4, 2),
        "decoder_cat": torch.rand(8, 4, 1),
        "static_continuous_features": torch.randn(8, 1, 2),
    }
    goal, histories = torch.randn(8, 4, 1), []
    for change in (lambda model: model, fusedrnn.swap):
        torch.manual_seed(3)
        model = module.TFT(loss=nn.MSELoss(), hidden_size=16, metadata=metadata)
        kinds = {type(m) for m in change(model).modules()}
        optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
        for step in range(10):
            torch.manual_seed(step)  # the LSTMs draw the same masks as torch.nn's
            optimizer.zero_grad()
            loss = (model(batch)["prediction"] - goal).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        histories.append(losses)
    assert fusedrnn.LSTM in kinds and nn.LSTM not in kinds
    assert histories[1] == pytest.approx(histories[0], rel=1e-4)
    assert histories[1][-1] < histories[1][0]


def test_dp_lstm_of_opacus():
    """opacus unrolls its own LSTM for per-sample gradients: swap leaves it, vmap of ours agrees."""
    opacus = pytest.importorskip("opacus")
    from opacus.layers import DPLSTM

    torch.manual_seed(0)
    theirs = fusedrnn.swap(nn.Sequential(DPLSTM(3, 4, num_layers=2, batch_first=True))).model[0]
    assert type(theirs) is DPLSTM
    ours = fusedrnn.LSTM(3, 4, num_layers=2, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 7, 3)
    sampled = opacus.GradSampleModule(theirs, loss_reduction="sum")
    sampled(x)[0].square().sum().backward()

    def loss(parameters, one):
        return functional_call(ours, parameters, (one,))[0].square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(dict(ours.named_parameters()), x)
    for name, p in sampled.named_parameters():
        expected = found[name.removeprefix("_module.")]
        torch.testing.assert_close(p.grad_sample, expected, rtol=1e-4, atol=1e-6, msg=name)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(8, 16, 2, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


def test_opacus_replaces_what_was_unswapped():
    """docs/swapping.md, this test and those below."""
    pytest.importorskip("opacus")
    from opacus.layers import DPLSTM
    from opacus.validators import ModuleValidator

    assert type(ModuleValidator.fix(Model()).rnn) is DPLSTM
    model = fusedrnn.swap(Model()).model
    assert type(ModuleValidator.fix(model).rnn) is fusedrnn.LSTM
    assert type(ModuleValidator.fix(fusedrnn.unswap(model).model).rnn) is DPLSTM


def test_thop_counts_with_its_own_hook():
    thop = pytest.importorskip("thop")
    from thop.rnn_hooks import count_lstm

    x = torch.randn(4, 7, 8)
    plain, _ = thop.profile(Model(), (x,), verbose=False)
    fused = fusedrnn.swap(Model()).model
    assert thop.profile(fused, (x,), verbose=False)[0] < plain
    known = {fusedrnn.LSTM: count_lstm}
    fused = fusedrnn.swap(Model()).model
    assert thop.profile(fused, (x,), custom_ops=known, verbose=False)[0] == plain


def test_ptflops_counts_with_its_own_hook():
    ptflops = pytest.importorskip("ptflops")
    from ptflops.pytorch_ops import rnn_flops_counter_hook

    def count(model, **kwargs):
        quiet = {"as_strings": False, "print_per_layer_stat": False, "backend": "pytorch"}
        return ptflops.get_model_complexity_info(model, (7, 8), **quiet, **kwargs)[0]

    plain, fused = Model(), fusedrnn.swap(Model()).model
    known = {fusedrnn.LSTM: rnn_flops_counter_hook}
    assert count(fused) < count(plain) == count(fused, custom_modules_hooks=known)


def test_torchinfo_counts_the_same():
    torchinfo = pytest.importorskip("torchinfo")
    x = torch.randn(4, 7, 8)
    plain, fused = (
        torchinfo.summary(m, input_data=x, verbose=0)
        for m in (Model(), fusedrnn.swap(Model()).model)
    )
    assert fused.total_mult_adds == plain.total_mult_adds
    assert fused.total_params == plain.total_params
