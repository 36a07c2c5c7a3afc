"""Traces a transformers model to an ONNX graph of standard operators, with dynamic batch and sequence axes.

The encoder is transformers' own module, and the task's head comes from `models/heads.py`. The graph differs from
transformers' forward pass in three ways, none of which changes a value:

* The mask is an additive [B, 1, 1, S] tensor, so no graph stores a [B, 1, S, S] mask.
* Cosines and sines of rotary positions come from tables, which the model's own rotary module computed in FP32. Another
  implementation rounds the angles of far positions differently (3e-4 in the output at position 2,000), and half
  precision loses them altogether.
* The head of fill-mask computes only masked tokens.

Shapes: B rows, S tokens, M masks, H hidden size, D head size, V vocabulary, L labels.
"""

import ast
import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as ir_passes
from onnxscript import optimizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from gte_deploy.core.errors import ExportError
from gte_deploy.core.spec import LOGITS, POOLINGS, Logits, Pooling, SparseSpec, TaskName, head_task
from gte_deploy.exporters.graph import MAX_OPSET, MIN_MAX_LENGTH, MIN_OPSET
from gte_deploy.exporters.graph.editing import array, dimensions, initializer, integers, operand, replace
from gte_deploy.exporters.graph.joined_layers import separate_joined_layers
from gte_deploy.models.families import family_of
from gte_deploy.models.heads import Head, HeadOptions, PaddedStates, SparseHead, make_heads
from gte_deploy.models.rope import rope_kinds
from gte_deploy.tasks import TASKS
from gte_deploy.tasks.base import HIDDEN

logger = logging.getLogger(__name__)

MASK_BIAS = -10_000.0
"""Added to the scores of masked keys. exp(-10000) is 0 in FP32; a row without keys stays finite; FP16 can hold it."""

_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

# In elements. Constant folding evaluates shape arithmetic and the row of token type 0, but copies no large weight.
_FOLD_LIMIT = 1 << 16
# In elements. Equal shape vectors and scalars are merged; weights stay separate, even the equal ones of a new model.
_SHARED_LIMIT = 4


def trace(
    model: PreTrainedModel,
    *,
    task: str,
    max_length: int,
    pooling: str | None,
    logits: str,
    opset: int,
    token_types: bool = False,
    sparse: SparseSpec | None = None,
) -> ir.Model:
    """Trace `model` with the head of `task`. `gte_deploy.exporters.graph.build` describes the inputs and outputs.

    With `token_types` the graph has the input `token_type_ids`; without it, every token has type 0.

    During the trace the model is in eval mode with eager attention, so it must not run elsewhere. Afterwards its state
    is restored. The graph refers to the model's weights without a copy.

    Raises:
        ConfigError: no family has the model's type.
        ExportError: the task, pooling or logits is unknown; the model has another class or dtype; `max_length` is
            outside the model's range; the RoPE depends on the length; the opset is outside 20–23; `token_types` is set
            for a model with a single token type.
    """
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise ExportError(f"opset {opset} is outside {MIN_OPSET} … {MAX_OPSET}; choose an opset in this range")
    options = _checked_options(task, pooling, logits, sparse)
    with traceable_module(model, options, max_length=max_length, token_types=token_types) as wrapper:
        traced = _export(wrapper, max_length, opset, token_types=token_types)
    _set_names(traced.graph)
    _simplify(traced)
    _separate_outputs(traced.graph, wrapper.output_names)
    return traced


@contextlib.contextmanager
def traceable_module(
    model: PreTrainedModel, options: HeadOptions, *, max_length: int, token_types: bool = False
) -> Iterator["Wrapper"]:
    """Yield a module that computes the outputs of a graph from its inputs, for `torch.export`.

    Inside the block the model is in eval mode with eager attention, so it must not run elsewhere.

    Raises:
        ConfigError, ExportError: see `trace`.
    """
    _check_model(model, options, max_length)
    if token_types and (types := getattr(model.config, "type_vocab_size", 0)) < 2:
        raise ExportError(f"token types need a type_vocab_size above 1; the model has {types}")
    with _traceable(model, max_length):
        yield _wrap(model, options).eval()


class RotaryTable(nn.Module):
    """Replaces the model's rotary module by slices of FP32 tables [max_length, D/2], which that module computed.

    A module that rotates by other angles in each kind of layer gets a pair of tables for each kind. Its `layer_types`
    name the kinds, as in transformers' own modules.
    """

    def __init__(self, rotary: nn.Module, max_length: int) -> None:
        super().__init__()
        device = next(rotary.buffers()).device
        places = torch.arange(max_length, device=device)[None]
        kinds: Any = getattr(rotary, "layer_types", None)
        for kind in [None] if kinds is None else kinds:
            angles = rotary(torch.zeros((), device=device), places, *([] if kind is None else [kind]))
            for function, values in zip(("cos", "sin"), angles, strict=True):
                half = values[0, :, : values.shape[-1] // 2].contiguous()
                self.register_buffer(_table_name(function, kind), half)

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines [1, S, D] of positions 0 … S-1, for the layers of one kind if there are several."""
        # transformers asks for the kinds in no fixed order. All are taken here, so that a trace always has the same
        # nodes: those of later calls are equal, and merged.
        taken = {name: table[: x.shape[1]] for name, table in self.named_buffers()}
        cos, sin = (taken[_table_name(function, layer_type)] for function in ("cos", "sin"))
        return torch.cat((cos, cos), dim=-1)[None], torch.cat((sin, sin), dim=-1)[None]


def _table_name(function: str, kind: str | None) -> str:
    return function if kind is None else f"{function}_{kind}"


def _masks(config: Any, bias: Tensor) -> Tensor | dict[str, Tensor]:
    """The additive masks in the form that transformers passes on unchanged, to be added to the scores.

    Args:
        config: its `layer_types` name the kind of attention of each layer, if there are several.
        bias: the mask of padding, [B, 1, 1, S].

    Returns:
        `bias`; or a mask for each kind of attention: `bias`, and for local attention [B, 1, S, S], which also hides the
        tokens that are more than config.sliding_window away. All local layers share it.
    """
    if not (kinds := set(getattr(config, "layer_types", None) or ())):
        return bias
    masks = {"full_attention": bias}
    if "sliding_attention" in kinds:
        places = torch.arange(bias.shape[-1], device=bias.device)
        is_far = (places[:, None] - places[None]).abs() > config.sliding_window
        masks["sliding_attention"] = bias + is_far.to(torch.float32) * MASK_BIAS
    return masks


class _TracedStates(PaddedStates):
    """Padded hidden states that gather the masked tokens with the operator GatherND."""

    def masked_tokens(self) -> Tensor | None:
        """See `States`."""
        positions = self.mask_positions
        if positions is None:
            return None
        return torch.onnx.ops.symbolic(
            "GatherND",  # it checks row and token; an index into flattened rows could reach the next text
            (self.hidden, positions),
            dtype=self.hidden.dtype,
            shape=(positions.shape[0], self.hidden.shape[-1]),
        )


class Wrapper(nn.Module):
    """Runs the encoder and the head on the inputs of the graph: `input_names`, then token types if there are any."""

    input_names: tuple[str, ...] = ("input_ids", "attention_mask")
    states: type[PaddedStates] = _TracedStates
    """What the head reads from; `PaddedStates` has only operators of torch."""

    type_zero: Tensor

    def __init__(self, model: PreTrainedModel, heads: Sequence[Head], output_names: tuple[str, ...]) -> None:
        super().__init__()
        self.model: Any = model
        self.heads = heads
        self.output_names = output_names
        if isinstance(heads[0], SparseHead):
            # The model does not own this module. torch names its nodes only if it is registered and called here.
            self.lm_head, self.heads = heads[0].module, ()
        # One id that is broadcast; ids [B, S] would look up the same row for every token.
        self.register_buffer("type_zero", torch.zeros((1, 1), dtype=torch.long))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return the outputs in the order of `output_names`. Without token types, every token has type 0."""
        return self.compute(input_ids, attention_mask, None, token_type_ids)

    def compute(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        mask_positions: Tensor | None,
        token_type_ids: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Like `forward`, with mask positions for a head that reads only masked tokens."""
        bias = (1.0 - attention_mask.to(torch.float32)) * MASK_BIAS
        types = self.type_zero if token_type_ids is None else token_type_ids
        encoded = self.model.base_model(
            input_ids=input_ids,
            attention_mask=_masks(self.model.config, bias.unsqueeze(1).unsqueeze(1)),
            **({"token_type_ids": types} if hasattr(self.model.config, "type_vocab_size") else {}),
        )
        hidden = encoded.last_hidden_state
        pooled = getattr(encoded, "pooler_output", None)  # some encoders never have a pooler
        states = self.states(hidden, attention_mask, input_ids, mask_positions, pooled)
        heads = self.heads or (SparseHead(self.lm_head),)
        outputs = {HIDDEN: hidden, **{head.output: head(states) for head in heads}}
        return tuple(outputs[name] for name in self.output_names)


class _MaskedWrapper(Wrapper):
    input_names = (*Wrapper.input_names, "mask_positions")

    def forward(  # type: ignore[override]  # torch.export reads the inputs from this signature
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        mask_positions: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        return self.compute(input_ids, attention_mask, mask_positions, token_type_ids)


def _wrap(model: PreTrainedModel, options: HeadOptions) -> Wrapper:
    takes_masks = options.task == "fill-mask" and options.logits == "masked"
    wrapper = _MaskedWrapper if takes_masks else Wrapper
    return wrapper(model, make_heads(model, options), TASKS[options.task].outputs)


def _checked_options(task: str, pooling: str | None, logits: str, sparse: SparseSpec | None) -> HeadOptions:
    known_task: TaskName | None = next((known for known in TASKS if known == task), None)
    if known_task is None:
        raise ExportError(f"task {task!r} is none of {', '.join(TASKS)}")
    if task in ("sparse", "hybrid") and sparse is None:
        raise ExportError(f"task {task!r} needs a SparseSpec, which says how embeddings are pooled")
    known_pooling: Pooling | None = next((known for known in POOLINGS if known == pooling), None)
    if TASKS[known_task].pools and known_pooling is None:
        raise ExportError(f"pooling {pooling!r} is none of {', '.join(POOLINGS)}; {task} needs one")
    known_logits: Logits | None = next((known for known in LOGITS if known == logits), None)
    if known_logits is None:
        raise ExportError(f"logits {logits!r} is none of {', '.join(LOGITS)}")
    return HeadOptions(known_task, known_pooling or "mean", known_logits, sparse)


def _check_model(model: PreTrainedModel, options: HeadOptions, max_length: int) -> None:
    family, task = family_of(model.config), head_task(options.task, options.sparse)
    if task not in family.classes or not isinstance(model, family.model_class(task)):
        expected = family.classes.get(task, "family that has this task")
        raise ExportError(f"task {options.task!r} needs a {expected}, and the model is a {type(model).__name__}")
    longest = family.max_tokens(model.config)
    if not MIN_MAX_LENGTH <= max_length <= longest:
        raise ExportError(f"max_length {max_length} is outside {MIN_MAX_LENGTH} … {longest}, the range of this model")
    for rope in rope_kinds(model.config).values() if family.positions == "rotary" else ():
        if rope["rope_type"] in _LENGTH_DEPENDENT_ROPE:
            raise ExportError(f"rope_type {rope['rope_type']!r} depends on the length of the text, and a table cannot")
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ExportError(f"{name} is {parameter.dtype}; a graph needs float32 weights: load the model in float32")


@contextlib.contextmanager
def _traceable(model: PreTrainedModel, max_length: int) -> Iterator[None]:
    config = model.config
    attention = config._attn_implementation
    modes = [(module, module.training) for module in model.modules()]
    config._attn_implementation = "eager"
    model.eval()
    try:
        with _with_rotary_table(model, max_length):
            yield
    finally:
        config._attn_implementation = attention
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _with_rotary_table(model: PreTrainedModel, max_length: int) -> Iterator[None]:
    """Replace the rotary module by tables, if the family has one, and put it back afterwards."""
    family = family_of(model.config)
    if family.positions != "rotary" or family.position_module is None:
        yield
        return
    encoder, name = model.base_model, family.position_module
    rotary = getattr(encoder, name)
    setattr(encoder, name, RotaryTable(rotary, max_length))
    try:
        yield
    finally:
        setattr(encoder, name, rotary)


def _export(wrapper: Wrapper, max_length: int, opset: int, *, token_types: bool) -> ir.Model:
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=max_length)
    # No axis has size 0 or 1, because torch would make it a constant.
    ones = functools.partial(torch.ones, dtype=torch.long, device=wrapper.model.device)
    arguments: dict[str, tuple[Tensor, dict[int, torch.export.Dim]]] = {
        "input_ids": (ones(2, MIN_MAX_LENGTH - 1), {0: batch, 1: sequence}),
        "attention_mask": (ones(2, MIN_MAX_LENGTH - 1), {0: batch, 1: sequence}),
        "mask_positions": (ones(3, 2), {0: torch.export.Dim("num_masks")}),
        "token_type_ids": (ones(2, MIN_MAX_LENGTH - 1), {0: batch, 1: sequence}),
    }
    input_names = (*wrapper.input_names, *(["token_type_ids"] if token_types else []))
    chosen = [arguments[name] for name in input_names]
    with warnings.catch_warnings(), _quiet("torch.onnx._internal.exporter"), torch.no_grad():
        warnings.simplefilter("ignore")  # about axis names shared by two inputs, and torch's own deprecations
        program: Any = torch.onnx.export(
            wrapper,
            tuple(tensor for tensor, _ in chosen),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=opset,
            dynamic_shapes=tuple(axes for _, axes in chosen),
            input_names=input_names,
            output_names=wrapper.output_names,
        )
    if program is None:
        raise ExportError("torch.onnx.export returned no program")
    return program.model


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silence the warnings of a logger: torch lists every torchvision operator that is not installed."""
    silenced = logging.getLogger(name)
    level = silenced.level
    silenced.setLevel(logging.ERROR)
    try:
        yield
    finally:
        silenced.setLevel(level)


def _set_names(graph: ir.Graph) -> None:
    """Name initialisers like the keys of the state dict, and nodes after the module that they come from."""
    for name in list(graph.initializers):
        graph.initializers[name].name = name.removeprefix("model.")
    for node in graph:
        scopes = [scope for scope in _scopes(node) if scope.startswith(("model.", "lm_head."))]
        node.name = "/".join([*(scope.removeprefix("model.") for scope in scopes[-1:]), node.op_type])


def _scopes(node: ir.Node) -> list[str]:
    value = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    return ast.literal_eval(value) if value else []


def _simplify(model: ir.Model) -> None:
    """Fold shape arithmetic, transpose weights for MatMul, share equal constants, remove unused nodes."""
    ir_passes.ClearMetadataAndDocStringPass()(model)
    _transpose_weights(model.graph)
    _type_products(model.graph)
    _drop_idle_casts(model.graph)
    _set_reshape_targets(model.graph)
    optimizer.fold_constants(model, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT)
    for clean in (
        ir_passes.IdentityEliminationPass(),
        ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        ir_passes.DeduplicateInitializersPass(size_limit=_SHARED_LIMIT),
        ir_passes.CommonSubexpressionEliminationPass(),
        ir_passes.RemoveUnusedNodesPass(),
        ir_passes.RemoveUnusedOpsetsPass(),
        ir_passes.NameFixPass(),
    ):
        clean(model)
    separate_joined_layers(model)
    model.producer_name, model.producer_version = "gte-deploy", None


def _separate_outputs(graph: ir.Graph, names: Sequence[str]) -> None:
    """Give each output a value and a name of its own: without a projection, the states of tokens are their vectors."""
    seen: list[ir.Value] = []
    for index, name in enumerate(names):
        value = graph.outputs[index]
        if any(value is other for other in seen):
            node = ir.node("Identity", [value], name=name)
            copy = node.outputs[0]
            copy.type, copy.shape = value.type, value.shape
            graph.append(node)
            graph.outputs[index] = value = copy
        value.name = name
        seen.append(value)


def _type_products(graph: ir.Graph) -> None:
    """Give types to the products inside linear layers, which torch leaves out and a change of precision looks at."""
    for node in graph:
        dtype = operand(node, 0).dtype if node.op_type == "MatMul" else None
        if dtype is not None and node.outputs[0].dtype is None:
            node.outputs[0].dtype = dtype


def _drop_idle_casts(graph: ir.Graph) -> None:
    """Drop Casts of FP32 values to FP32: transformers asks for a softmax in FP32, whatever the model computes in."""
    for node in list(graph):
        if node.op_type != "Cast" or (source := operand(node, 0).producer()) is None or source.op_type != "Softmax":
            continue
        if operand(source, 0).dtype == ir.DataType.FLOAT == node.attributes["to"].as_int():
            replace(node.outputs[0], source.outputs[0])
            source.outputs[0].dtype = ir.DataType.FLOAT
            graph.remove(node, safe=True)


def _transpose_weights(graph: ir.Graph) -> None:
    """Replace Transpose(weight) by an initialiser that is a transposed view; a copy is made only at writing."""
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer() or list(node.attributes.get_ints("perm") or ()) != [1, 0]:
            continue
        transposed = initializer(graph, f"{weight.name}.T", ir.Tensor(array(weight).T))
        node.outputs[0].replace_all_uses_with(transposed)
        graph.remove(node, safe=True)


def _set_reshape_targets(graph: ir.Graph) -> None:
    """Give each Reshape [B, S, …] -> [B, S, fixed …] the constant target [0, 0, fixed …], so no run computes it."""
    for node in list(graph):
        if node.op_type != "Reshape":
            continue
        if operand(node, 0).shape is None or node.outputs[0].shape is None:
            continue  # shape arithmetic
        before, after = dimensions(operand(node, 0)), dimensions(node.outputs[0])
        sizes = [size for size in after[2:] if isinstance(size, int)]
        if len(before) > 2 and sizes and before[:2] == after[:2] and len(sizes) == len(after) - 2:
            node.replace_input_with(1, integers(graph, 0, 0, *sizes))
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
