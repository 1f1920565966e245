"""Structure of a checkpoint: tensors first, configuration second (spec sections 3.1 to 3.3).

A published `config.json` holds only what its author passed, and what is missing means the defaults of *that* release.
Reading it with another release's defaults is how a model silently loses its experts. So everything that names and
shapes of tensors can tell is taken from them; the configuration fills in the rest, and a value it states that no reading
of the tensors allows is an error that names both.

Three statements of a configuration may differ from the tensors without being wrong, and give way to them:

* ``use_vectorized_moe`` and the bias modes of per-expert files (upstream converts between layouts while loading, and
  ignores bias modes, weighting and ``shared_expert_dim`` in the per-expert one);
* ``cross_att_groups``, which releases before 0.3.0 ignored;
* ``seq_len``, when the stored rotary table is longer or shorter: upstream's ``update_max_len`` changes only the table.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rxt_model.checkpoint.errors import CheckpointError
from rxt_model.checkpoint.fields import CONFIG_CLASSES
from rxt_model.config import head_counts

__all__ = ["ComponentFile", "infer_component", "is_ignored_buffer"]

Shape = tuple[int, ...]

_BUFFER = re.compile(r"(^|\.)(rope\.(inv_freq|cache)|stm\.memory)$")


def is_ignored_buffer(key: str) -> bool:
    """Whether a stored tensor is one this package makes itself: rotary tables, and memory states of any batch size.

    Example:
        >>> is_ignored_buffer("model.layers.0.attention.rope.cache"), is_ignored_buffer("model.head.weight")
        (True, False)
    """
    return _BUFFER.search(key) is not None


@dataclass
class ComponentFile:
    """One component as its files describe it.

    Attributes:
        kind: decoder, encoder, memory_attention, mlm_head or stateless.
        shapes: name to shape, prefix of the full model removed.
        config: its part of `config.json`, checked (`checked_fields`).
        weights_file: path for messages.
        prefix: the prefix that was removed, for messages.
        config_where: file and part for messages.
        stated_variant: the memory attention variant the full model's configuration names, if any.
        forced_variant: the variant the caller asks for, if any.
        third_era: whether a release from 0.3 on seems to have written the files.
    """

    kind: str
    shapes: Mapping[str, Shape]
    config: Mapping[str, Any]
    weights_file: str
    config_where: str
    prefix: str = ""
    stated_variant: str | None = None
    forced_variant: str | None = None
    third_era: bool = False
    #: What this kind of component calls the fields of a decoder.
    renamed: Mapping[str, str] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    #: Fields that no tensor and no configuration settles; the loader warns about them.
    doubts: list[str] = field(default_factory=list)

    def shape(self, key: str, dimensions: int) -> Shape:
        """The shape of a tensor that must be there and have this many dimensions."""
        shape = self.shapes.get(key)
        if shape is None:
            raise CheckpointError(f"{self.at(key)} this tensor is missing.")
        if len(shape) != dimensions:
            raise CheckpointError(f"{self.at(key)} the shape is {shape}; {dimensions} dimensions are needed.")
        return shape

    def at(self, key: str) -> str:
        """How a message about a tensor begins."""
        return f"{self.weights_file}, key {self.prefix + key!r}:"

    def has(self, key: str) -> bool:
        """Whether the file has a tensor of this name."""
        return key in self.shapes

    def has_under(self, prefix: str) -> bool:
        """Whether the file has a tensor whose name begins like this."""
        return any(key.startswith(prefix) for key in self.shapes)

    def layers(self, prefix: str) -> int:
        """How many numbered children a module list has; numbers must be 0, 1, 2, … without a gap."""
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        seen = {int(match[1]) for key in self.shapes if (match := pattern.match(key))}
        for index in range(len(seen)):
            if index not in seen:
                raise CheckpointError(
                    f"{self.at(f'{prefix}.{index}')} there are no tensors of this number, but of {max(seen)}."
                )
        return len(seen)

    def tensor_fact(self, name: str, value: Any, key: str, *, yields: bool = True) -> None:
        """Records what a tensor tells; with `yields=False` a configuration that states something else is an error."""
        name = self.renamed.get(name, name)
        stated = self.config.get(name, value)
        if stated != value and not yields:
            raise CheckpointError(
                f"{self.at(key)} its shape {self.shapes.get(key, 'is absent')} means {name} = {value!r}, but "
                f"{self.config_where}, key {name!r}, says {stated!r}; the two files do not belong together."
            )
        self.fields[name] = value

    def stated(self, name: str, default: Any = None) -> Any:
        """What the configuration says, under whatever name this kind of component uses."""
        return self.config.get(self.renamed.get(name, name), default)

    def settle(self, name: str, value: Any) -> None:
        """Sets a field without asking the configuration."""
        self.fields[self.renamed.get(name, name)] = value

    def strict_fact(self, name: str, value: Any, key: str) -> None:
        """Records what a tensor tells; a configuration that states something else is an error."""
        self.tensor_fact(name, value, key, yields=False)


def infer_component(file: ComponentFile) -> dict[str, Any]:
    """The complete field dictionary of a component, except for this package's own fields.

    Raises:
        CheckpointError: a tensor needed to tell the structure is missing or has an impossible shape, or the
            configuration contradicts the tensors; the message names file and key.
    """
    defaults = {item.name: item.default for item in dataclasses.fields(CONFIG_CLASSES[file.kind])}
    if file.kind == "mlm_head":
        _infer_mlm_head(file)
    elif file.kind == "memory_attention":
        _infer_memory_attention(file)
    elif file.kind == "stateless":
        _infer_stateless(file)
    else:
        _infer_transformer(file)
    known = set(defaults)
    return {**defaults, **file.config, **{name: value for name, value in file.fields.items() if name in known}}


def _infer_mlm_head(file: ComponentFile) -> None:
    vocabulary, width = file.shape("decoder.weight", 2)
    file.strict_fact("vocab_size", vocabulary, "decoder.weight")
    file.strict_fact("embed_dim", width, "decoder.weight")


# decoder and encoder


def _infer_transformer(file: ComponentFile) -> None:
    _refuse_other_kinds(file)
    _infer_common(file, norm="norm1")
    cross = "model.layers.0.memory_cross_attention"
    has_cross = file.has_under(f"{cross}.")
    if file.kind == "decoder" and not has_cross:
        raise CheckpointError(
            f"{file.at(f'{cross}.q_proj.weight')} this tensor is missing; a decoder reads memory in every layer (a "
            "language model without memory is a SparseQueryTransformer)."
        )
    file.tensor_fact("skip_memory_cross_attention", not has_cross, f"{cross}.q_proj.weight")
    head_dim, heads = _infer_heads(file, "attention")
    _infer_attention(
        file, "model.layers.0.attention", head_dim, heads, ("self_att_type", "att_groups", "att_query_groups")
    )
    gate = "model.layers.0.attention.gate_proj.weight"
    file.strict_fact("use_gated_attention", file.has(gate), gate)
    bias = "model.layers.0.attention.out_proj.bias"
    file.strict_fact("use_attention_output_bias", file.has(bias), bias)
    if has_cross:
        _infer_cross_attention(file, cross, head_dim, heads)
        cross_gate = f"{cross}.gate_proj.weight"
        stated = file.config.get("use_gated_cross_attention")
        if stated is not None or file.has(cross_gate) != file.has(gate):
            file.strict_fact("use_gated_cross_attention", file.has(cross_gate), cross_gate)
    else:
        # Nothing reads these; the defaults of another era ("sqa" without query heads) must not be refused either.
        file.fields.setdefault("cross_att_type", file.config.get("cross_att_type", "mha"))
        _harmless_cross_attention(file, heads)
    _infer_stateless_layers(file)
    _infer_feed_forward(file)
    head_norm = "model.head_norm.weight"
    if file.kind == "decoder":
        file.strict_fact("use_head_norm", file.has(head_norm), head_norm)
        if file.has(head_norm):
            kind = "layer_norm" if file.has("model.head_norm.bias") else "rms_norm"
            file.strict_fact("head_norm_type", kind, "model.head_norm.bias")
    if "stm_size" not in file.config and file.has("model.stm.memory"):
        file.fields["stm_size"] = file.shape("model.stm.memory", 4)[2]


def _refuse_other_kinds(file: ComponentFile) -> None:
    """A file of another kind gets a message that says so, rather than a list of missing tensors."""
    if file.has("model.embedding.weight"):
        is_decoder = file.has("model.head.weight")
        if file.kind == "encoder" and is_decoder:
            raise CheckpointError(f"{file.at('model.head.weight')} a head belongs to a decoder, not to an encoder.")
        return
    found = ""
    for prefix, description in (
        ("decoder.model.", "a full model: load it with RxTAlpha or RxTBeta"),
        ("model.attention_layers.", "a memory attention"),
        ("dense.", "a masked-language-modelling head"),
    ):
        if file.has_under(prefix):
            found = f"; the file holds {description}"
            break
    else:
        names = ", ".join(map(repr, list(file.shapes)[:3])) or "nothing"
        found = f"; the file holds {names} and so on" if file.shapes else "; the file holds no tensors"
    raise CheckpointError(f"{file.at('model.embedding.weight')} this tensor is missing{found}.")


def _infer_common(file: ComponentFile, *, norm: str) -> None:
    vocabulary, width = file.shape("model.embedding.weight", 2)
    file.strict_fact("vocab_size", vocabulary, "model.embedding.weight")
    file.strict_fact("embed_dim", width, "model.embedding.weight")
    count = file.layers("model.layers")
    if count == 0:
        raise CheckpointError(f"{file.at('model.layers.0')} the file has no layers.")
    file.strict_fact("num_layers", count, f"model.layers.{count - 1}.{norm}.weight")
    bias = f"model.layers.0.{norm}.bias"
    file.strict_fact("use_rms_norm", not file.has(bias), bias)


def _infer_heads(file: ComponentFile, attention: str) -> tuple[int, int]:
    """(head dimension, heads the width is split into): from the rotary table, else from the configuration."""
    width = file.fields["embed_dim"]
    table = sorted(key for key in file.shapes if key.endswith(f"{attention}.rope.inv_freq"))
    caches = sorted(key for key in file.shapes if key.endswith(f"{attention}.rope.cache"))
    if attention == "attention_layers":
        table = sorted(key for key in file.shapes if re.search(r"^model\.attention_layers\.\d+\.rope\.inv_freq$", key))
        caches = sorted(key for key in file.shapes if re.search(r"^model\.attention_layers\.\d+\.rope\.cache$", key))
    for key in caches[:1]:
        file.tensor_fact("seq_len", file.shape(key, 2)[0], key)
    if table:
        if file.config.get("use_nope"):
            raise CheckpointError(
                f"{file.at(table[0])} a rotary table contradicts {file.config_where}, key 'use_nope', which is true."
            )
        head_dim = 2 * file.shape(table[0], 1)[0]
        if head_dim == 0 or width % head_dim:
            raise CheckpointError(
                f"{file.at(table[0])} a head dimension of {head_dim} (twice its length) does not divide the model "
                f"width {width}."
            )
        file.strict_fact("att_heads", width // head_dim, table[0])
        return head_dim, width // head_dim
    heads = file.config.get("att_heads")
    if heads is None:
        raise CheckpointError(
            f"{file.config_where}, key 'att_heads': this value is missing, and without a rotary table (…rope.inv_freq in "
            f"{file.weights_file}) the tensors do not tell it."
        )
    if heads < 1 or width % heads:
        raise CheckpointError(
            f"{file.config_where}, key 'att_heads': {heads} does not divide the model width {width}, which "
            f"{file.weights_file} has."
        )
    return width // heads, heads


def _projection_heads(file: ComponentFile, prefix: str, head_dim: int, heads: int) -> tuple[int, int]:
    """(query heads, key/value heads) of one attention, from its projections."""
    counts = []
    for name in ("q_proj", "k_proj"):
        key = f"{prefix}.{name}.weight"
        rows, _ = file.shape(key, 2)
        if rows == 0 or rows % head_dim or rows > head_dim * heads:
            raise CheckpointError(
                f"{file.at(key)} its {rows} rows are not between 1 and {heads} heads of {head_dim} "
                f"(model width {head_dim * heads} in {heads} heads)."
            )
        counts.append(rows // head_dim)
    if max(counts) % min(counts):
        raise CheckpointError(
            f"{file.at(f'{prefix}.q_proj.weight')} {counts[0]} query heads and {counts[1]} key/value heads; one must "
            "divide the other."
        )
    return counts[0], counts[1]


def _stated_heads(kind: Any, groups: Any, query_groups: Any, heads: int) -> tuple[int, int] | None:
    """What a configuration says about heads, or None if it leaves something open."""
    if kind is None or (kind in ("gqa", "sqa") and groups is None) or (kind == "sqa" and query_groups is None):
        return None
    try:
        return head_counts(kind, heads, 1 if groups is None else groups, query_groups)
    except ValueError:
        return (0, 0)


def _write_heads(file: ComponentFile, names: tuple[str, str, str], counts: tuple[int, int], heads: int) -> None:
    kind_name, groups_name, query_name = names
    query_heads, key_value_heads = counts
    kind = (
        "mha"
        if counts == (heads, heads)
        else "sqa"
        if query_heads != heads
        else "mqa"
        if key_value_heads == 1
        else "gqa"
    )
    file.fields[kind_name] = kind
    file.fields[groups_name] = key_value_heads
    file.fields[query_name] = query_heads


def _infer_attention(
    file: ComponentFile, prefix: str, head_dim: int, heads: int, names: tuple[str, str, str]
) -> tuple[int, int]:
    """Type, key/value heads and query heads of one attention; a complete contrary statement is an error."""
    counts = _projection_heads(file, prefix, head_dim, heads)
    kind, groups, query_groups = (file.config.get(name) for name in names)
    stated = _stated_heads(kind, groups, query_groups, heads)
    if stated is not None and stated != counts:
        said = ", ".join(f"{name} = {file.config.get(name)!r}" for name in names)
        raise CheckpointError(
            f"{file.at(f'{prefix}.q_proj.weight')} the projections have {counts[0]} query and {counts[1]} key/value heads "
            f"of {head_dim}, but {file.config_where} says {said} with {heads} heads; the two files do not belong together."
        )
    if stated is None:
        _write_heads(file, names, counts, heads)
    return counts


def _infer_cross_attention(file: ComponentFile, prefix: str, head_dim: int, heads: int) -> None:
    names = ("cross_att_type", "cross_att_groups", "cross_att_query_groups")
    counts = _projection_heads(file, prefix, head_dim, heads)
    settled = {**file.config, **file.fields}
    kind = file.config.get("cross_att_type")
    own_groups, own_queries = settled.get("att_groups"), settled.get("att_query_groups")
    groups, query_groups = file.config.get("cross_att_groups"), file.config.get("cross_att_query_groups")
    queries = own_queries if query_groups is None else query_groups
    if _stated_heads(kind, own_groups if groups is None else groups, queries, heads) == counts:
        return  # the configuration is right as it stands
    stated = _stated_heads(kind, groups, queries, heads)
    ignoring_groups = _stated_heads(kind, own_groups, queries, heads)  # releases before 0.3.0
    if stated is not None and stated != counts and ignoring_groups != counts:
        raise CheckpointError(
            f"{file.at(f'{prefix}.q_proj.weight')} the projections have {counts[0]} query and {counts[1]} key/value heads "
            f"of {head_dim}, but {file.config_where} says cross_att_type = {kind!r}, cross_att_groups = {groups!r}, "
            f"cross_att_query_groups = {queries!r} with {heads} heads; the two files do not belong together."
        )
    _write_heads(file, names, counts, heads)


def _harmless_cross_attention(file: ComponentFile, heads: int) -> None:
    """Values for a cross-attention that does not exist must still pass the configuration's own checks."""
    settled = {**file.config, **file.fields}
    groups = settled.get("cross_att_groups") or settled.get("att_groups")
    queries = settled.get("cross_att_query_groups") or settled.get("att_query_groups")
    if _stated_heads(settled["cross_att_type"], groups, queries, heads) in (None, (0, 0)):
        file.fields.update(cross_att_type="mha", cross_att_groups=None, cross_att_query_groups=None)


def _infer_stateless_layers(file: ComponentFile) -> None:
    for name in ("stateless_layers", "final_stateless_layers"):
        count = file.layers(f"model.{name}")
        kinds = tuple(
            "moe" if file.has(f"model.{name}.{index}.ff.router.gate.weight") else "dense" for index in range(count)
        )
        field_name = f"{name}_config"
        stated = file.config.get(field_name)
        if (stated or ()) != kinds:
            file.strict_fact(field_name, kinds, f"model.{name}.{count - 1 if count else 0}.ff.router.gate.weight")


# feed-forward


def _feed_forwards(file: ComponentFile) -> Iterable[tuple[str, bool]]:
    """(module prefix, whether it is a mixture of experts) of every layer, stateful ones first."""
    for name in ("layers", "stateless_layers", "final_stateless_layers"):
        for index in range(file.layers(f"model.{name}")):
            prefix = f"model.{name}.{index}.ff"
            yield prefix, file.has(f"{prefix}.router.gate.weight")


def _infer_feed_forward(file: ComponentFile) -> None:
    forwards = list(_feed_forwards(file))
    stateful = [moe for prefix, moe in forwards if prefix.startswith("model.layers.")]
    if len(set(stateful)) > 1:
        index = stateful.index(not stateful[0])
        raise CheckpointError(
            f"{file.at(f'model.layers.{index}.ff.router.gate.weight')} some layers have experts and others have none, "
            "which no configuration describes."
        )
    file.strict_fact("use_moe", stateful[0], "model.layers.0.ff.router.gate.weight")
    dense_stateful = None if stateful[0] else "model.layers.0.ff"
    dense_stateless = next((prefix for prefix, moe in forwards if not moe and "stateless" in prefix), None)
    experts = next((prefix for prefix, moe in forwards if moe), None)
    if dense_stateful is not None:
        hidden, gated = _dense_width(file, dense_stateful)
        file.strict_fact("ff_dim", hidden, f"{dense_stateful}.fc2.weight")
        file.strict_fact("use_gated", gated, f"{dense_stateful}.fc1.linear.weight")
    if dense_stateless is not None:
        hidden, gated = _dense_width(file, dense_stateless)
        file.strict_fact("dense_layer_dim", hidden, f"{dense_stateless}.fc2.weight")
        file.strict_fact("use_gated", gated, f"{dense_stateless}.fc1.linear.weight")
    if experts is None:
        # Says nothing about this model; another era's default must not be refused for a dense one.
        file.settle("num_experts", file.stated("num_experts", 1))
        file.settle("moe_top_k", file.stated("moe_top_k", 1))
        return
    _infer_experts(file, experts)


def _dense_width(file: ComponentFile, prefix: str) -> tuple[int, bool]:
    return file.shape(f"{prefix}.fc2.weight", 2)[1], file.has(f"{prefix}.fc1.linear.weight")


def _infer_experts(file: ComponentFile, prefix: str) -> None:
    router = f"{prefix}.router.gate.weight"
    count = file.shape(router, 2)[0]
    file.strict_fact("num_experts", count, router)
    stacked = file.has(f"{prefix}.w1")
    file.tensor_fact("use_vectorized_moe", stacked, f"{prefix}.w1")
    if stacked:
        _infer_stacked_experts(file, prefix)
    else:
        _infer_separate_experts(file, prefix, count)
    top_k, top_k_name = file.stated("moe_top_k", 1), file.renamed.get("moe_top_k", "moe_top_k")
    if not 1 <= top_k <= count:
        raise CheckpointError(
            f"{file.config_where}, key {top_k_name!r}: {top_k} is not between 1 and the {count} experts of "
            f"{file.weights_file}, key {file.prefix + router!r}."
        )


def _infer_stacked_experts(file: ComponentFile, prefix: str) -> None:
    _, _, wide = file.shape(f"{prefix}.w1", 3)
    hidden = file.shape(f"{prefix}.w2", 3)[1]
    file.strict_fact("ff_dim", hidden, f"{prefix}.w2")
    file.strict_fact("use_gated", _is_gated(file, f"{prefix}.w1", wide, hidden), f"{prefix}.w1")
    file.strict_fact("moe_bias_mode", _bias_mode(file, f"{prefix}.b1", f"{prefix}.global_bias"), f"{prefix}.b1")
    single = file.has_under(f"{prefix}.shared_expert.")
    several = file.has(f"{prefix}.shared_w2")
    if single:
        shared, width_key = 1, f"{prefix}.shared_expert.fc2.weight"
        local_bias, width = f"{prefix}.shared_expert.fc2.bias", file.shape(width_key, 2)[1]
    elif several:
        width_key = f"{prefix}.shared_w2"
        shared, width, _ = file.shape(width_key, 3)
        local_bias = f"{prefix}.shared_b2"
    else:
        file.strict_fact("num_shared_experts", 0, f"{prefix}.shared_w2")
        return
    file.strict_fact("num_shared_experts", shared, width_key)
    mode = _bias_mode(file, local_bias, f"{prefix}.shared_experts_bias")
    file.strict_fact("moe_shared_experts_bias_mode", mode, local_bias)
    if (file.stated("shared_expert_dim") or hidden) != width:
        file.strict_fact("shared_expert_dim", width, width_key)


def _infer_separate_experts(file: ComponentFile, prefix: str, count: int) -> None:
    if file.layers(f"{prefix}.experts") != count:
        raise CheckpointError(
            f"{file.at(f'{prefix}.router.gate.weight')} the router knows {count} experts, the file has "
            f"{file.layers(f'{prefix}.experts')}."
        )
    hidden, gated = _dense_width(file, f"{prefix}.experts.0")
    file.strict_fact("ff_dim", hidden, f"{prefix}.experts.0.fc2.weight")
    file.strict_fact("use_gated", gated, f"{prefix}.experts.0.fc1.linear.weight")
    shared = file.layers(f"{prefix}.shared_experts")
    if file.stated("num_shared_experts") is not None or shared:
        file.strict_fact("num_shared_experts", shared, f"{prefix}.shared_experts.0.fc2.weight")
    # The defaults of newer releases have one shared expert and biases common to all; these files have neither.
    file.settle("num_shared_experts", shared)
    for name in ("moe_bias_mode", "moe_shared_experts_bias_mode"):
        file.settle(name, file.stated(name, "local"))  # ignored by this layout


def _is_gated(file: ComponentFile, key: str, wide: int, hidden: int) -> bool:
    if wide not in (hidden, 2 * hidden):
        raise CheckpointError(
            f"{file.at(key)} its last dimension {wide} is neither the hidden width {hidden} nor twice that."
        )
    return wide == 2 * hidden


def _bias_mode(file: ComponentFile, local: str, common: str) -> str:
    if file.has(local) and file.has(common):
        raise CheckpointError(f"{file.at(common)} experts have biases of their own as well ({local!r}).")
    return "local" if file.has(local) else "global" if file.has(common) else "off"


# stateless language model


def _infer_stateless(file: ComponentFile) -> None:
    _refuse_other_kinds(file)
    if file.has_under("model.layers.0.memory_cross_attention."):
        raise CheckpointError(
            f"{file.at('model.layers.0.memory_cross_attention.q_proj.weight')} a layer that reads memory belongs to an "
            "RxTDecoder."
        )
    _infer_common(file, norm="norm1")
    head_dim, heads = _infer_heads(file, "attention")
    _infer_attention(
        file, "model.layers.0.attention", head_dim, heads, ("att_type", "att_groups", "att_num_query_groups")
    )
    file.renamed = {
        "use_moe": "use_moe_ff",
        "num_experts": "ff_num_experts",
        "moe_top_k": "ff_moe_top_k",
        "num_shared_experts": "ff_num_shared_experts",
        "dense_layer_dim": "dense_ff_dim",
    }
    gate, bias = "model.layers.0.attention.gate_proj.weight", "model.layers.0.attention.out_proj.bias"
    head_norm = "model.head_norm.weight"
    file.strict_fact("use_gated_attention", file.has(gate), gate)
    file.strict_fact("use_attention_output_bias", file.has(bias), bias)
    file.strict_fact("tie_embeddings", not file.has("model.head.weight"), "model.head.weight")
    file.strict_fact("use_head_norm", file.has(head_norm), head_norm)
    if file.has(head_norm):
        norm_kind = "layer_norm" if file.has("model.head_norm.bias") else "rms_norm"
        file.strict_fact("head_norm_type", norm_kind, "model.head_norm.bias")
    _infer_decoder_only_feed_forward(file)


def _infer_decoder_only_feed_forward(file: ComponentFile) -> None:
    """Experts in every layer, in none, or in all but the first few (`num_initial_dense_layers`)."""
    kinds = [moe for _, moe in _feed_forwards(file)]
    if not any(kinds):
        _infer_feed_forward(file)
        return
    initial = kinds.index(True)
    if not all(kinds[initial:]):
        index = initial + kinds[initial:].index(False)
        raise CheckpointError(
            f"{file.at(f'model.layers.{index}.ff.router.gate.weight')} this tensor is missing; after the first layer "
            "with experts every layer has them."
        )
    file.strict_fact("use_moe", True, f"model.layers.{initial}.ff.router.gate.weight")
    file.strict_fact("num_initial_dense_layers", initial, f"model.layers.{initial}.ff.router.gate.weight")
    if initial:
        hidden, _ = _dense_width(file, "model.layers.0.ff")
        file.strict_fact("dense_layer_dim", hidden, "model.layers.0.ff.fc2.weight")
    _infer_experts(file, f"model.layers.{initial}.ff")


# memory attention


def _infer_memory_attention(file: ComponentFile) -> None:
    first = "model.attention_layers.0.q_proj.weight"
    if not file.has(first):
        _refuse_other_kinds(dataclasses.replace(file, kind="encoder"))
        raise CheckpointError(f"{file.at(first)} this tensor is missing; the file holds no memory attention.")
    width = file.shape(first, 2)[1]
    file.strict_fact("embed_dim", width, first)
    count = file.layers("model.attention_layers")
    file.strict_fact("num_layers", count, f"model.attention_layers.{count - 1}.q_proj.weight")
    head_dim, heads = _infer_heads(file, "attention_layers")
    _infer_attention(file, "model.attention_layers.0", head_dim, heads, ("att_type", "att_groups", "att_query_groups"))
    variant = _infer_variant(file)
    file.fields["variant"] = variant
    if variant == "self":
        names = ("self_att_type", "self_att_groups", "self_att_query_groups")
        _infer_attention(file, "model.self_attention_layers.0", head_dim, heads, names)
    elif variant != "simple":
        names = ("interlayer_att_type", "interlayer_att_groups", "interlayer_att_query_groups")
        _infer_attention(file, "model.mean_attention_layers.0", head_dim, heads, names)
    _infer_memory_norm(file)
    _infer_gates(file, variant)
    if "stm_size" not in {**file.config, **file.fields} and file.has("model.stm.memory"):
        file.fields["stm_size"] = file.shape("model.stm.memory", 4)[2]


def _infer_variant(file: ComponentFile) -> str:
    """The variant, from which modules exist; what modules cannot tell, from the configuration."""
    stated = file.forced_variant or file.stated_variant
    if file.has_under("model.self_attention_layers."):
        possible: tuple[str, ...] = ("self",)
    elif not file.has_under("model.mean_attention_layers."):
        possible = ("simple",)
    elif file.has_under("model.interlayer_gate_layers."):
        possible = ("gated-self-interlayer", "grouped-self-interlayer")
    elif file.has_under("model.mean_residual_gate_layers."):
        possible = ("interlayer",)
    else:  # no gate has parameters, so nothing tells these apart
        possible = ("interlayer", "gated-self-interlayer", "grouped-self-interlayer")
    grouped = "num_groups" in file.config  # only the grouped component has this argument
    # Releases that asked for 'interlayer' built the gated variant nevertheless (spec 7, defect 1).
    excusable = stated == "interlayer" and file.forced_variant is None and "gated-self-interlayer" in possible
    if stated is not None and stated not in possible and not excusable:
        raise CheckpointError(
            f"{file.weights_file}: the tensors under {file.prefix + 'model.'!r} are those of memory attention "
            f"{' or '.join(possible)}, but the variant is stated as {stated!r}; the two do not belong together."
        )
    if stated in possible:
        if excusable and len(possible) > 1:
            file.doubts.append("variant")
            return "gated-self-interlayer" if file.third_era else stated
        return stated
    if len(possible) == 1:
        return possible[0]
    if grouped and not excusable:
        return "grouped-self-interlayer"
    if "interlayer" in possible:
        file.doubts.append("variant")
        return "interlayer"
    return "gated-self-interlayer"


def _infer_memory_norm(file: ComponentFile) -> None:
    norm = "model.memory_norm_layers.0"
    per_dim = None
    if file.has(f"{norm}.norm.weight"):
        kind = "layer"
    elif file.has(f"{norm}.ema_rms"):
        kind = "positional" if len(file.shapes[f"{norm}.ema_rms"]) == 2 else "adaptive"
        if kind == "positional":
            per_dim = len(file.shapes.get(f"{norm}.scale", ())) == 1
    elif file.has(f"{norm}.scale"):
        kind = "rms"
    else:
        kind = "classic-rms"
    file.strict_fact("norm_type", kind, f"{norm}.weight" if kind == "classic-rms" else f"{norm}.scale")
    if per_dim is not None:
        file.strict_fact("norm_per_dim_scale", per_dim, f"{norm}.scale")
        file.strict_fact("stm_size", file.shape(f"{norm}.ema_rms", 2)[0], f"{norm}.ema_rms")


def _infer_gates(file: ComponentFile, variant: str) -> None:
    main, own = "model.residual_gate_layers.0", "model.self_residual_gate_layers.0"
    file.strict_fact("use_gated_residual", file.has_under(f"{main}."), f"{main}.gate")
    if variant == "self":
        file.strict_fact("use_gate_for_self_attention", file.has_under(f"{own}."), f"{own}.gate")
    gate = next((prefix for prefix in (main, own) if file.has_under(f"{prefix}.")), None)
    if gate is None:
        return
    if file.has(f"{gate}.gate.weight"):
        rows, columns = file.shape(f"{gate}.gate.weight", 2)
        file.strict_fact("residual_gate_type", "linear", f"{gate}.gate.weight")
        file.strict_fact("stm_size", columns, f"{gate}.gate.weight")
        if rows not in (1, columns):
            raise CheckpointError(
                f"{file.at(f'{gate}.gate.weight')} its shape is {(rows, columns)}; a gate has one row, or one per slot."
            )
        if columns > 1:
            file.strict_fact("residual_per_slot_gate", rows == columns, f"{gate}.gate.weight")
    else:
        key = f"{gate}.gate"
        shape = file.shapes.get(key)
        if shape is None or len(shape) not in (1, 2) or shape[-1] != 1:
            raise CheckpointError(f"{file.at(key)} its shape is {shape}; a gate is (slots, 1) or (1,).")
        file.strict_fact("residual_per_slot_gate", len(shape) == 2, key)
        if len(shape) == 2:
            file.strict_fact("stm_size", shape[0], key)
        if file.config.get("residual_gate_type", "static") == "linear":
            raise CheckpointError(
                f"{file.at(key)} its shape {shape} is that of a static or elementwise gate, but {file.config_where}, key "
                "'residual_gate_type', says 'linear'; the two files do not belong together."
            )
    status = f"{gate}.slot_status.weight"
    file.strict_fact("residual_gate_slot_status_type", "linear" if file.has(status) else "mean", status)
