"""Manifold Adam in one process, on whole matrices: the definition that the sharded one must equal.

LipNeXt's optimizer as reconstructed from ORTH: Adam moments in the Lie algebra, FastExp, manifold
Lookahead and polar projection. Written to be read, not to be fast.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optim.adam_update import euclidean_average, euclidean_step, new_state
from optim.config import OptimConfig
from optim.errors import OptimizerError
from optim.manifolds import Manifold, is_trivialized, manifold_of
from optim.orthogonality_audit import Audit
from optim.retraction import correction_due


class ReferenceManifoldAdam(torch.optim.Optimizer):
    """Manifold Adam for declared matrices, NAdam or AdamW for the rest, in one process.

    Args:
        param_groups: From `optim.param_groups.parameter_groups`; float32 or float64 parameters.
        config: Hyper-parameters; learning rates are read from the groups at every step.

    Raises:
        OptimizerError: A parameter is neither float32 nor float64.
    """

    def __init__(self, param_groups: list[dict[str, Any]], config: OptimConfig) -> None:
        super().__init__(param_groups, {"lr": config.lr})
        self.config = config
        self.audit = Audit(config)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dtype not in (torch.float32, torch.float64):
                    raise OptimizerError(
                        f"reference optimizer needs float32 or float64, got {parameter.dtype}"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                manifold = manifold_of(p)
                if not self.state[p]:
                    self.state[p] = new_state(p, self.config, on_manifold=manifold is not None)
                if manifold is None:
                    euclidean_step(p, p.grad, self.state[p], group["lr"], self.config)
                else:
                    self._manifold_step(p, p.grad, manifold, group["lr"])
        return loss

    def _manifold_step(self, X: Tensor, G: Tensor, manifold: Manifold, lr: float) -> None:
        state, config = self.state[X], self.config
        b1, b2 = config.betas
        precision = config.precision(X.device.type, X.shape[0])
        state["step"] += 1
        t = state["step"]

        g = manifold.algebra_part(G) if is_trivialized(X) else manifold.tangent(X, G, precision)
        m = state["exp_avg"] + (1 - b1) * (g - state["exp_avg"])
        v = state["exp_avg_sq"] + (1 - b2) * (g * g - state["exp_avg_sq"])
        m = (m - m.T) / 2  # round-off must not break skewness
        v = (v + v.T) / 2
        u = (m / (1 - b1**t)) / (torch.sqrt(v / (1 - b2**t)) + config.eps)
        D = -lr * u
        X.copy_(manifold.retract(X, D, config.rule, precision))
        state["exp_avg"], state["exp_avg_sq"] = m, v

        if config.lookahead_steps:
            state["tangent_sum"] += D
            if t % config.lookahead_steps == 0:
                S = config.lookahead_factor * state["tangent_sum"]
                state["slow"] = manifold.retract(state["slow"], S, config.rule, precision)
                state["tangent_sum"] = torch.zeros_like(S)
                X.copy_(state["slow"])
        if config.retraction == "fast" and correction_due(t, config.lookahead_steps):
            X.copy_(manifold.correct(X))
            if config.lookahead_steps and t % config.lookahead_steps == 0:
                state["slow"] = X.clone()
        if config.polar_every and t % config.polar_every == 0:
            X.copy_(manifold.project(X))
            if config.lookahead_steps:
                state["slow"] = manifold.project(state["slow"])
        if self.audit.due(t):
            self._audit(X, manifold)

    def _audit(self, X: Tensor, manifold: Manifold) -> None:
        """Measure the residual; past the limit re-project the fast and the slow matrix."""
        state, audit, name = self.state[X], self.audit, "X"
        audit.measure(name, X, manifold)
        audit.conclude([audit.summary()])
        X.copy_(audit.repaired(name, X, manifold))
        if self.config.lookahead_steps:
            state["slow"].copy_(audit.repaired(name, state["slow"], manifold))
        audit.forget()

    @torch.no_grad()
    def averaged(self, parameter: Tensor) -> Tensor:
        """The parameter as after a Lookahead synchronisation now, for export.

        Changes no state. Right after a synchronisation it is the slow copy itself.

        Returns:
            A new float64 tensor of the parameter's shape, on the manifold to float64 round-off.
        """
        state, manifold = self.state[parameter], manifold_of(parameter)
        slow = state.get("slow") if state else None
        if manifold is None:
            return euclidean_average(parameter, slow, self.config.lookahead_factor)
        if slow is None:
            return manifold.project(parameter, dtype=torch.float64)
        S = self.config.lookahead_factor * state["tangent_sum"].to(torch.float64)
        moved = manifold.retract(slow.to(torch.float64), S, self.config.rule)
        return manifold.project(moved, dtype=torch.float64)
