"""From Hugging Face names to a bound Model: the one place where a tensor's name becomes an attribute.

A `WeightSource` (the engine's, over a pack or a checkpoint folder) gives weights by name, on the device they are
used on; `match` has checked before that every name the config asks for is there and that no other is. Knows no
kernel, no format and no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from qwenrun.kernels.weight import Weight
from qwenrun.model.attention import Attention
from qwenrun.model.config import ModelConfig
from qwenrun.model.deltanet import DeltaNet
from qwenrun.model.inventory import HUB_PREFIX
from qwenrun.model.layer import Layer
from qwenrun.model.linear import Linear, See, Watch
from qwenrun.model.moe import DenseMLP, MoE, Routed
from qwenrun.model.mtp import MTP
from qwenrun.model.qwen3_5 import Embedding, Model


class WeightSource(Protocol):
    """Where weights come from. Names are the hub's, routed experts in their fused form."""

    @property
    def where(self) -> str:
        """What to call it in an error."""
        ...

    @property
    def found(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        """name -> (shape, dtype as safetensors spells it) of every tensor there is."""
        ...

    def weight(self, name: str) -> Weight:
        """A matrix in the format it is stored in."""
        ...

    def tensor(self, name: str) -> Tensor:
        """A small tensor: what is no matrix as float32, the router as it is stored or decoded."""
        ...

    def embedding(self, name: str) -> Embedding:
        """The embedding table as a callable: ids to rows."""
        ...

    def experts(self, prefix: str) -> Routed:
        """The routed experts under `prefix`, as a callable."""
        ...


def bind(source: WeightSource, config: ModelConfig, mtp: bool = False, watch: Watch | None = None) -> Model:
    """Build the model of `config` from the weights of `source`, whose names `inventory.match` has checked.

    mtp: also bind the multi-token-prediction module, if it is there. The vision tower's tensors are left alone.
    watch: shown what each matrix reads, but for an embedding that is also the head.
    """
    return _Binder(source, config, watch).model(mtp)


class _Binder:
    def __init__(self, source: WeightSource, config: ModelConfig, watch: Watch | None) -> None:
        self.source, self.config, self.watch = source, config, watch
        self.trunk = HUB_PREFIX if f"{HUB_PREFIX}norm.weight" in source.found else "model."

    def model(self, with_mtp: bool) -> Model:
        embed = f"{self.trunk}embed_tokens.weight"
        return Model(
            self.config,
            self.source.embedding(embed),
            [self.layer(f"{self.trunk}layers.{i}.", self.mixer(i)) for i in range(self.config.num_layers)],
            self.vector(f"{self.trunk}norm.weight"),
            Linear(self.source.weight(embed)) if self.config.tie_embeddings else self.linear("lm_head"),
            self.mtp() if with_mtp and "mtp.fc.weight" in self.source.found else None,
        )

    def mixer(self, layer: int) -> Attention | DeltaNet:
        name = f"{self.trunk}layers.{layer}."
        return self.attention(name) if self.config.is_full(layer) else self.deltanet(name)

    def layer(self, name: str, mixer: Attention | DeltaNet) -> Layer:
        norm = self.vector(f"{name}post_attention_layernorm.weight")
        return Layer(mixer, self.moe(f"{name}mlp.", norm) if self.config.is_moe else self.dense(f"{name}mlp.", norm))

    def attention(self, layer: str) -> Attention:
        name = f"{layer}self_attn."
        return Attention(
            self.config,
            self.vector(f"{layer}input_layernorm.weight"),
            q_proj=self.linear(f"{name}q_proj"),
            k_proj=self.linear(f"{name}k_proj"),
            v_proj=self.linear(f"{name}v_proj"),
            o_proj=self.linear(f"{name}o_proj"),
            q_norm=self.vector(f"{name}q_norm.weight"),
            k_norm=self.vector(f"{name}k_norm.weight"),
        )

    def deltanet(self, layer: str) -> DeltaNet:
        name = f"{layer}linear_attn."
        return DeltaNet(
            self.config,
            self.vector(f"{layer}input_layernorm.weight"),
            in_proj_qkv=self.linear(f"{name}in_proj_qkv"),
            in_proj_z=self.linear(f"{name}in_proj_z"),
            in_proj_b=self.linear(f"{name}in_proj_b"),
            in_proj_a=self.linear(f"{name}in_proj_a"),
            out_proj=self.linear(f"{name}out_proj"),
            conv_weight=self.vector(f"{name}conv1d.weight").squeeze(1),
            A_log=self.vector(f"{name}A_log"),
            dt_bias=self.vector(f"{name}dt_bias"),
            norm=self.vector(f"{name}norm.weight"),
        )

    def moe(self, name: str, norm: Tensor) -> MoE:
        router = Weight.plain(self.source.tensor(f"{name}gate.weight"))
        routed = self.source.experts(f"{name}experts")
        if self.watch:
            routed.watch(self.watch.experts(f"{name}experts"))
        return MoE(
            self.config,
            norm,
            router=Linear(router, self.seen(f"{name}gate.weight")),
            routed=routed,
            gate=self.linear(f"{name}shared_expert.gate_proj"),
            up=self.linear(f"{name}shared_expert.up_proj"),
            down=self.linear(f"{name}shared_expert.down_proj"),
            shared_gate=self.linear(f"{name}shared_expert_gate"),
        )

    def dense(self, name: str, norm: Tensor) -> DenseMLP:
        return DenseMLP(
            self.config,
            norm,
            gate=self.linear(f"{name}gate_proj"),
            up=self.linear(f"{name}up_proj"),
            down=self.linear(f"{name}down_proj"),
        )

    def mtp(self) -> MTP:
        return MTP(
            self.config,
            fc=self.linear("mtp.fc"),
            norm_embedding=self.vector("mtp.pre_fc_norm_embedding.weight"),
            norm_hidden=self.vector("mtp.pre_fc_norm_hidden.weight"),
            layer=self.layer("mtp.layers.0.", self.attention("mtp.layers.0.")),
            norm=self.vector("mtp.norm.weight"),
        )

    def linear(self, name: str) -> Linear:
        return Linear(self.source.weight(f"{name}.weight"), self.seen(f"{name}.weight"))

    def seen(self, name: str) -> See | None:
        return self.watch.linear(name) if self.watch else None

    def vector(self, name: str) -> Tensor:
        """Norms, biases, convolutions: so small that they are held in float32 whatever they are stored in."""
        return self.source.tensor(name)
