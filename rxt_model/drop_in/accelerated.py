"""What stands in the place of an upstream network's forward pass: upstream's arguments and results, our computation."""

from __future__ import annotations

import warnings
from typing import Any, Generic, TypeVar, cast

from torch import Tensor, nn

from rxt_model.cache import MemoryKeyValue
from rxt_model.decoder import HiddenStates, RxTDecoder, mean_of_losses
from rxt_model.drop_in.binding import Binding
from rxt_model.drop_in.comparison import Comparison, compare
from rxt_model.drop_in.language_model import LanguageModel
from rxt_model.drop_in.recognition import Component
from rxt_model.drop_in.shadow import Shadow, shadows
from rxt_model.encoder import RxTEncoder
from rxt_model.heads import MLMHead
from rxt_model.memory import ShortTermMemory
from rxt_model.memory_attention import RxTMemoryAttention

__all__ = [
    "ACCELERATED",
    "AcceleratedDecoder",
    "AcceleratedEncoder",
    "AcceleratedLanguageModel",
    "AcceleratedMLMHead",
    "AcceleratedMemoryAttention",
    "AcceleratedNetwork",
    "accelerated_by",
]

Ours = TypeVar("Ours", RxTDecoder, RxTEncoder, RxTMemoryAttention, LanguageModel, MLMHead)


class AcceleratedNetwork(Shadow, Generic[Ours]):
    """One upstream network whose forward pass is computed here; a deep copy binds the parameters of the copied network.

    Args:
        component: the network and what it was built with.
        parity: "exact" or "upstream".

    Raises:
        ValueError: the component cannot be computed here; the message says why.
    """

    names: tuple[str, ...] = ("forward",)

    def __init__(self, component: Component, parity: str) -> None:
        super().__init__(component.network)
        self.component = component
        self.parity = parity
        self.comparison = Comparison(None, "")
        self._binding: Binding | None = None
        self._refused: tuple[tuple[int, ...], str] | None = None
        self._told = False
        self._bound()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_binding": None, "_refused": None}

    @property
    def network(self) -> nn.Module:
        """Upstream's network."""
        return self.component.network

    def _bound(self) -> Binding:
        """The binding to the network as it is now, made and compared anew where the network has changed.

        Raises:
            ValueError: the network is, or has become, something that is not computed here.
        """
        if self._binding is None or not self._binding.is_current():
            self._binding = None
            modules = tuple(id(module) for module in self.network.modules())
            if self._refused is not None and self._refused[0] == modules:
                raise ValueError(self._refused[1])
            try:
                self._binding = Binding(self.component, self.parity)
                self.comparison = compare(self)
            except ValueError as error:
                self._binding, self._refused = None, (modules, str(error))
                raise
        hook = self._binding.hook()
        if hook is not None:
            raise ValueError(f"a {hook} inside has a hook or a replaced forward pass, which would not be called.")
        return self._binding

    def ours(self) -> Ours:
        """Our component on the network's weights as they are now, in the network's mode.

        Raises:
            ValueError: the network has become something that is not computed here.
        """
        ours = cast(Any, self._bound().ours)
        if ours.training != self.network.training:
            ours.train(self.network.training)
        return cast(Ours, ours)

    def _must_call_upstream(self) -> bool:
        """Whether the network has become something that is not computed here, or has hooks that only upstream calls."""
        try:
            self._bound()
        except ValueError as error:
            if not self._told:
                self._told = True
                warnings.warn(
                    f"{self.component.path or 'the model'} has changed since it was accelerated, and upstream's own code runs "
                    f"as long as that is so (said once): {error}",
                    stacklevel=3,
                )
            return True
        return False

    @staticmethod
    def _mask(attention_mask: Tensor | None) -> Tensor | None:
        """Upstream takes masks of any type; what is not zero is kept."""
        return None if attention_mask is None else attention_mask.bool()


class _WithExperts(AcceleratedNetwork[Ours]):
    """A network that keeps the load-balance loss of its last forward pass in training mode, as upstream's does."""

    names: tuple[str, ...] = ("forward", "moe_router_loss")

    def __init__(self, component: Component, parity: str) -> None:
        self._loss: Tensor | None = None
        super().__init__(component, parity)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_loss": None}

    def _keep_loss(self, states: HiddenStates) -> None:
        if self.network.training:
            self._loss = self._balance(states)

    def _balance(self, states: HiddenStates) -> Tensor | None:
        return states.load_balance_loss

    def moe_router_loss(self) -> Tensor | None:
        """The load-balance loss of the last forward pass in training mode; None for a dense model."""
        loss: Tensor | None = self.original("moe_router_loss")() if self._loss is None else self._loss
        return loss


class AcceleratedDecoder(_WithExperts[RxTDecoder]):
    """Token ids to logits. Steps over upstream's own key/value cache stay upstream's."""

    def _balance(self, states: HiddenStates) -> Tensor | None:
        final = self.ours().model.final_stateless_layers
        if self.parity == "upstream" and final is not None:  # upstream leaves them out (spec 7, defect 40)
            return mean_of_losses(states.layer_losses[: -len(final)])
        return states.load_balance_loss

    def ours(self) -> RxTDecoder:
        """Our decoder, reading upstream's memory as it is now."""
        ours = super().ours()
        _lend_memory(self.network, ours.model.stm)
        return ours

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        stm_kv_cache: list[tuple[Tensor, Tensor]] | None = None,
        use_self_attn_cache: bool = False,
        current_positions: Tensor | None = None,
    ) -> Tensor:
        """As upstream's forward pass."""
        if use_self_attn_cache or current_positions is not None or self._must_call_upstream():
            self._loss = None
            logits: Tensor = self.original("forward")(
                x,
                attention_mask=attention_mask,
                stm_kv_cache=stm_kv_cache,
                use_self_attn_cache=use_self_attn_cache,
                current_positions=current_positions,
            )
            return logits
        ours = self.ours()
        memory = None
        if stm_kv_cache is not None:
            memory = [MemoryKeyValue(key.transpose(1, 2), value.transpose(1, 2)) for key, value in stm_kv_cache]
        states = ours.hidden_states(x, self._mask(attention_mask), memory)
        self._keep_loss(states)
        return ours.logits(states.hidden)


class AcceleratedEncoder(_WithExperts[RxTEncoder]):
    """Token ids to the last state and the states of every layer."""

    def ours(self) -> RxTEncoder:
        """Our encoder, reading upstream's memory as it is now, if it reads one."""
        ours = super().ours()
        if ours.model.stm is not None:
            _lend_memory(self.network, ours.model.stm)
        return ours

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As upstream's forward pass."""
        if self._must_call_upstream():
            self._loss = None
            found: tuple[Tensor, Tensor] = self.original("forward")(x, attention_mask=attention_mask)
            return found
        states = self.ours().hidden_states(x, self._mask(attention_mask))
        self._keep_loss(states)
        return states.hidden[-1], states.hidden


class AcceleratedMemoryAttention(AcceleratedNetwork[RxTMemoryAttention]):
    """Encoded interaction to the next memory, which is committed to upstream's store with its gradients."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """As upstream's forward pass; one memory becomes as many as there are rows (spec 7, defect 21)."""
        if self._must_call_upstream():
            found: Tensor = self.original("forward")(x, attention_mask=attention_mask)
            return found
        store = cast(Any, self.network).stm
        updated = self.ours()(x, self._mask(attention_mask), store.memory)
        store.update_all(updated)
        store.batch_size = updated.shape[1]
        return updated


class AcceleratedLanguageModel(_WithExperts[LanguageModel]):
    """Token ids to logits. Steps over upstream's own key/value cache stay upstream's."""

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        use_self_attn_cache: bool = False,
        current_positions: Tensor | None = None,
    ) -> Tensor:
        """As upstream's forward pass."""
        if use_self_attn_cache or current_positions is not None or self._must_call_upstream():
            self._loss = None
            logits: Tensor = self.original("forward")(
                x,
                attention_mask=attention_mask,
                use_self_attn_cache=use_self_attn_cache,
                current_positions=current_positions,
            )
            return logits
        ours = self.ours()
        states = ours.hidden_states(x, self._mask(attention_mask))
        self._keep_loss(states)
        return ours.logits(states.hidden)


class AcceleratedMLMHead(AcceleratedNetwork[MLMHead]):
    """Encoder states to vocabulary logits."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As upstream's forward pass."""
        if self._must_call_upstream():
            found: Tensor = self.original("forward")(hidden_states)
            return found
        logits: Tensor = self.ours()(hidden_states)
        return logits


ACCELERATED: dict[str, type[AcceleratedNetwork[Any]]] = {
    "decoder": AcceleratedDecoder,
    "encoder": AcceleratedEncoder,
    "memory_attention": AcceleratedMemoryAttention,
    "stateless": AcceleratedLanguageModel,
    "mlm_head": AcceleratedMLMHead,
}
"""The class for every kind of component."""


def accelerated_by(module: nn.Module) -> AcceleratedNetwork[Any] | None:
    """What computes the forward pass of a network in upstream's place, if anything of ours does."""
    return next((shadow for shadow in shadows(module) if isinstance(shadow, AcceleratedNetwork)), None)


def _lend_memory(network: nn.Module, memory: ShortTermMemory) -> None:
    """Make `memory` hold what upstream's store holds now, with its gradients, also where it is a parameter."""
    memory._buffers["state"] = cast(Any, network).stm.memory
