"""The loss: against PyTorch, whole and in chunks, with frozen and with trained heads, on one device and on four."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import mesh_of

from e2p_jax.parallel.mesh import param_sharding, row_sharding
from e2p_jax.plan.hlo import Program
from e2p_jax.prefix.loss import Taught, cross_entropy, taught_cross_entropy

ROWS, WIDTH, VOCABULARY = 4, 16, 98  # by two, and not by four


class Case:
    """Hidden states, a head, ids and what their losses are weighed with; torch's answers in float64."""

    def __init__(self, count: int, cap: float, at_once: int = 1 << 25, taught: int = 0):
        """`taught`: tokens that a teacher gives shares, the true one among them here and there."""
        rng = np.random.default_rng(0)
        self.cap, self.at_once = cap, at_once
        self.hidden = rng.normal(size=(ROWS, count, WIDTH)).astype(np.float32)
        self.head = rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
        self.ids = rng.integers(0, VOCABULARY, (ROWS, count), dtype=np.int32)
        self.weights = rng.normal(size=(ROWS, count)).astype(np.float32)
        hidden, head = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (self.hidden, self.head))
        logits = hidden @ head.T
        logits = cap * torch.tanh(logits / cap) if cap else logits
        ids = torch.tensor(self.ids, dtype=torch.long).reshape(-1)
        logits = logits.reshape(-1, VOCABULARY)
        self.nll = _rows(torch.nn.functional.cross_entropy(logits, ids, reduction="none"))
        wanted = torch.nn.functional.one_hot(ids, VOCABULARY).double()
        self.taught = None
        if taught:
            shares = rng.dirichlet(np.ones(taught + 1), (ROWS, count))[..., :taught].astype(np.float32)
            shares[0, 0] = 0.0  # no teacher
            others = rng.permuted(np.broadcast_to(np.arange(VOCABULARY, dtype=np.int32), (*self.ids.shape, 98)), axis=2)
            self.taught = Taught(jnp.asarray(others[..., :taught]), jnp.asarray(shares))
            wanted = wanted * (1 - torch.tensor(shares).double().sum(-1).reshape(-1, 1))
            wanted.scatter_add_(
                1, *(torch.tensor(x).reshape(-1, taught) for x in (np.int64(others[..., :taught]), np.double(shares)))
            )
        loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        self.losses = _rows(loss)
        (loss * torch.tensor(self.weights).reshape(-1)).sum().backward()
        assert hidden.grad is not None and head.grad is not None
        self.grads = hidden.grad.numpy(), head.grad.numpy()

    def loss(self, hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """The second has no say in the gradient."""
        ids = jnp.asarray(self.ids)
        losses, nll = taught_cross_entropy(hidden, head, ids, self.taught, self.cap, at_once=self.at_once)
        return jnp.sum(losses * self.weights) + jnp.sum(nll), (losses, nll)

    def check(self, hidden: Any, head: Any) -> None:
        """Values alone, with the gradient of the hidden states, and with that of the head too."""
        expected = self.losses, self.nll
        np.testing.assert_allclose(jax.jit(self.loss)(hidden, head)[1], expected, rtol=1e-5, atol=1e-5)
        for wanted in ((0,), (0, 1)):
            (_, found), grads = jax.jit(jax.value_and_grad(self.loss, wanted, has_aux=True))(hidden, head)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
            for gradient, which in zip(grads, wanted, strict=True):
                np.testing.assert_allclose(gradient, self.grads[which], rtol=1e-4, atol=1e-5)


def _rows(nats: torch.Tensor) -> np.ndarray:
    return nats.detach().reshape(ROWS, -1).numpy()


@pytest.mark.parametrize(
    ("count", "chunk", "cap", "taught"),  # targets a row and at a time: all, even parts, a padded last one, one by one
    [
        (12, 12, 0.0, 0),
        (12, 12, 3.0, 5),
        (12, 6, 3.0, 0),
        (12, 5, 0.0, 5),
        (7, 5, 3.0, 1),
        (7, 1, 0.0, 0),
    ],
)
def test_values_and_gradients(count: int, chunk: int, cap: float, taught: int) -> None:
    case = Case(count, cap, chunk * ROWS * VOCABULARY, taught)
    case.check(case.hidden, case.head)
    text = str(jax.make_jaxpr(jax.grad(lambda hidden: case.loss(hidden, case.head)[0]))(case.hidden))
    chunks = -(-count // chunk)
    assert f"f32[{ROWS},{-(-count // chunks)},{VOCABULARY}]" in text
    assert chunks == 1 or f"f32[{ROWS},{count},{VOCABULARY}]" not in text


@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"fsdp": 1, "tensor": 4}], ids=str)
def test_on_a_mesh(axes: dict[str, int]) -> None:
    """Rows, columns and vocabulary split; of a vocabulary that four do not divide, the columns alone."""
    case, mesh = Case(12, 3.0, 5 * ROWS * VOCABULARY // 4, taught=3), mesh_of(**axes)
    hidden = jax.device_put(case.hidden, row_sharding(mesh))
    head = jax.device_put(case.head, param_sharding(mesh, "backbone/head", case.head.shape))
    with jax.set_mesh(mesh):
        case.check(hidden, head)


def test_a_split_head_is_gathered_before_the_loop() -> None:
    """By the program as it is written: compilers differ in whether they would take it out of the loop."""
    case = Case(12, 0.0, 6 * ROWS * VOCABULARY // 4)
    with jax.set_mesh(mesh_of(fsdp=4)):
        program = jax.make_jaxpr(lambda *x: case.loss(*x)[0])(case.hidden, case.head)
    outside = [step.primitive.name for step in program.jaxpr.eqns]
    assert str(program).count("scan[") == 1 and "scan" not in outside
    assert str(program).count("sharding_constraint[") == outside.count("sharding_constraint") == 1


def test_logits_of_a_frozen_head_are_worked_out_once() -> None:
    """Two products, whether in chunks or not; with the head's gradient three, and a fourth in chunks."""
    case = Case(12, 0.0)
    product = 2 * ROWS * 12 * VOCABULARY * WIDTH

    def products(wanted: Any) -> float:
        step = jax.jit(jax.value_and_grad(case.loss, wanted, has_aux=True))
        return Program(step.lower(case.hidden, case.head).compile().as_text()).flops / product

    assert (products(0), products((0, 1))) == (2, 3)
    case.at_once = 6 * ROWS * VOCABULARY
    assert (products(0), products((0, 1))) == (2, 4)


def test_half_precision_keeps_the_gradient_of_what_is_nearly_certain() -> None:
    """Softmax less one-hot is taken before it is rounded: the chosen token's own part does not cancel to nothing."""
    head = jnp.asarray(4 * np.eye(8, WIDTH), jnp.bfloat16)
    hidden = jnp.asarray(2.5 * np.eye(8, WIDTH)[None, :3], jnp.bfloat16)
    ids = jnp.asarray([[0, 1, 2]], jnp.int32)
    gradient = jax.grad(lambda hidden: jnp.sum(cross_entropy(hidden, head, ids, at_once=1 << 25)))(hidden)
    assert gradient.dtype == jnp.bfloat16
    exact = jax.grad(lambda h: jnp.sum(cross_entropy(h, head.astype(jnp.float32), ids, at_once=1 << 25)))(
        hidden.astype(jnp.float32)
    )
    np.testing.assert_allclose(gradient.astype(jnp.float32), exact, rtol=1e-2)
