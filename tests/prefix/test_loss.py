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
from e2p_jax.prefix.loss import cross_entropy

ROWS, WIDTH, VOCABULARY = 4, 16, 98  # by two, and not by four


class Case:
    """Hidden states, a head, ids and what their losses are weighed with; torch's answers in float64."""

    def __init__(self, count: int, cap: float, at_once: int = 1 << 25):
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
        nll = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), ids, reduction="none")
        self.nll = nll.detach().reshape(ROWS, count).numpy()
        (nll * torch.tensor(self.weights).reshape(-1)).sum().backward()
        assert hidden.grad is not None and head.grad is not None
        self.grads = hidden.grad.numpy(), head.grad.numpy()

    def loss(self, hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        nll = cross_entropy(hidden, head, jnp.asarray(self.ids), self.cap, at_once=self.at_once)
        return jnp.sum(nll * self.weights), nll

    def check(self, hidden: Any, head: Any) -> None:
        """Values alone, with the gradient of the hidden states, and with that of the head too."""
        np.testing.assert_allclose(jax.jit(self.loss)(hidden, head)[1], self.nll, rtol=1e-5, atol=1e-5)
        for wanted in ((0,), (0, 1)):
            (_, nll), grads = jax.jit(jax.value_and_grad(self.loss, wanted, has_aux=True))(hidden, head)
            np.testing.assert_allclose(nll, self.nll, rtol=1e-5, atol=1e-5)
            for gradient, which in zip(grads, wanted, strict=True):
                np.testing.assert_allclose(gradient, self.grads[which], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "chunk", "cap"),  # targets a row and at a time: all, even parts, a padded last one, one by one
    [(12, 12, 0.0), (12, 12, 3.0), (12, 6, 3.0), (12, 5, 0.0), (7, 5, 3.0), (7, 1, 0.0)],
)
def test_values_and_gradients(count: int, chunk: int, cap: float) -> None:
    case = Case(count, cap, chunk * ROWS * VOCABULARY)
    case.check(case.hidden, case.head)
    text = str(jax.make_jaxpr(jax.grad(lambda hidden: case.loss(hidden, case.head)[0]))(case.hidden))
    chunks = -(-count // chunk)
    assert f"f32[{ROWS},{-(-count // chunks)},{VOCABULARY}]" in text
    assert chunks == 1 or f"f32[{ROWS},{count},{VOCABULARY}]" not in text


@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"fsdp": 1, "tensor": 4}], ids=str)
def test_on_a_mesh(axes: dict[str, int]) -> None:
    """Rows, columns and vocabulary split; of a vocabulary that four do not divide, the columns alone."""
    case, mesh = Case(12, 3.0, 5 * ROWS * VOCABULARY // 4), mesh_of(**axes)
    hidden = jax.device_put(case.hidden, row_sharding(mesh))
    head = jax.device_put(case.head, param_sharding(mesh, "backbone/head", case.head.shape))
    with jax.set_mesh(mesh):
        case.check(hidden, head)


def test_a_split_head_is_gathered_before_the_loop() -> None:
    """By the program as it is written: compilers differ in whether they would take it out of the loop."""
    case = Case(12, 0.0, 6 * ROWS * VOCABULARY // 4)
    with jax.set_mesh(mesh_of(fsdp=4)):
        before, loop = str(jax.make_jaxpr(lambda *x: case.loss(*x)[0])(case.hidden, case.head)).split("scan[")
    assert "sharding_constraint" in before and "sharding_constraint" not in loop


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
