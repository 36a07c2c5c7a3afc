"""What the listing of an engine says: lines of TensorRT 10.x, of 11.x and TensorRT-RTX, and of plans with names alone.

The lines have the form of the inspector's output, and their values are made up: no ordinary TensorRT built an engine.
"""

import pytest

from gte_deploy.exporters.targets.tensorrt.layers import (
    Expected,
    Layer,
    compare_layers,
    inspector_lines,
    listing_caveats,
    overflowing_sums,
    parse_layers,
)

LAYERS = 2
# Kernel of a GEMM in TensorRT 10.x, for the types of the two factors.
TACTICS = {
    "Half": "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize64x64x64_stage4",
    "BFloat16": "sm80_xmma_gemm_bf16bf16_bf16f32_f32_nn_n_tilesize64x64x64_stage4",
    "Int8": "sm80_xmma_gemm_i8f32_i8i32_f32_tn_n_tilesize64x64x64_stage4_by_fusion_tactic",
    "Float": "sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n_tilesize64x64x16_stage4",
}


def tensor10(name, shape, dtype):
    """A tensor as TensorRT 10.x prints it."""
    return f"{{ Name: {name}, Dimensions: [{shape}], Format/Datatype: {dtype} }}"


def tensor11(name, shape, dtype):
    """A tensor as TensorRT 11.x and TensorRT-RTX 1.7 print it."""
    return (
        f"{{ Name: {name}, Dimensions: [{shape}], Strides: [64,1], StrideOrder: [1,0], Datatype: {dtype}, "
        "Format: (Linear) Row major linear format }"
    )


def join(*tensors):
    return f"[ {', '.join(tensors)}]" if tensors else "[]"


def line10(name, kind, inputs, outputs, tactic="", nodes=()):
    """A layer as TensorRT 10.x prints it: constants stand among the inputs."""
    metadata = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    listed = join(*(tensor10(*tensor) for tensor in inputs))
    made = join(*(tensor10(*tensor) for tensor in outputs))
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: {listed}, Outputs: {made}, TacticName: {tactic}, StreamId: 0, "
        f"Metadata: {metadata}"
    )


def line11(name, kind, inputs, outputs, constants=(), tactic="__myelin_CASK_STUB", nodes=()):
    metadata = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    listed, fixed, made = (join(*(tensor11(*tensor) for tensor in part)) for part in (inputs, constants, outputs))
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: {listed}, Constants: {fixed}, Outputs: {made}, "
        f"TacticName: {tactic}, StreamId: 0, Metadata: {metadata}"
    )


def mha10(layer, partition, number):
    nodes = [f"layers.{layer}.self_attn/{name}" for name in ("MatMul_1", "Softmax", "MatMul")]
    return line10(
        f"_gemm_mha_v2_myl{partition}_{number}",
        "kgen",
        [("query", "-1,-1,64", "Half"), ("key", "-1,64,-1", "Half")],
        [("mixed", "-1,-1,64", "Half")],
        "_gemm_mha_v2_0x1f2e3d4c",
        nodes,
    )


def gemm10(layer, name, partition, number, dtype="Half", kind="gemm", output="Half"):
    own = f"layers.{layer}.{name}/MatMul"
    return line10(
        f"{'__myl_FcAdd' if kind == 'fusion' else own}_myl{partition}_{number}",
        kind,
        [("x", "-1,64", dtype), ("__mye7_dconst", "64,64", dtype), (f"__mye8{own}_alpha", "1", "Float")],
        [(f"y{number}", "-1,64", output)],
        TACTICS[dtype],
        [own, f"layers.{layer}.{name}/Add"],
    )


def reformat(of="Input Tensor 0 to {ForeignNode[embeddings/Gather...head/MatMul]}", profile=""):
    return line10(
        f"Reformatting CopyNode for {of}{profile}",
        "Reformat",
        [("input_ids", "-1,-1", "Int64")],
        [("ids", "-1,-1", "Int32")],
        "0x0",
    )


def engine10(dtype="Half", kind="gemm", partition=0, profile=""):
    """Two layers in one partition: q, k and v joined, then o, up_gate and down."""
    lines = []
    for layer in range(LAYERS):
        start = 10 * layer
        prefix = f"layers.{layer}.self_attn."
        joined = "+".join(f"{prefix}{name}_proj/MatMul{profile}" for name in "vkq")
        lines += [
            line10(
                f"{joined}_myl{partition}_{start}",
                "gemm",
                [("x", "-1,64", dtype), ("__mye5_dconst", "64,192", dtype), ("__mye6_alpha", "1", "Float")],
                [(f"qkv{start}", "-1,192", "Half")],
                TACTICS[dtype],
                [f"{prefix}{name}_proj/MatMul" for name in "vkq"],
            ),
            mha10(layer, partition, start + 1),
            *(
                gemm10(layer, name, partition, start + 2 + index, dtype, kind)
                for index, name in enumerate(("self_attn.o_proj", "mlp.up_gate_proj", "mlp.down_proj"))
            ),
        ]
    return lines


def wanted(profiles=1, quantized=None, half=0, fp32=0):
    return Expected(LAYERS, profiles, quantized or {}, half, fp32)


def compared(lines, expected):
    return compare_layers(parse_layers(["Layers:", *lines, "", "Bindings:", "input_ids"]), expected)


def test_a_layer_of_tensorrt_10():
    (layer,) = parse_layers([gemm10(0, "mlp.down_proj", 2, 7, "Int8")])
    assert (layer.kind, layer.tactic, layer.profile) == ("gemm", TACTICS["Int8"], None)
    assert [(tensor.shape, tensor.dtype) for tensor in layer.inputs] == [
        ((-1, 64), "int8"),
        ((64, 64), "int8"),
        ((1,), "fp32"),
    ]
    assert layer.outputs[0].dtype == "fp16" and layer.nodes[0] == "layers.0.mlp.down_proj/MatMul"
    assert (layer.gemms, layer.operand_dtype) == (1, "int8")


def test_a_layer_of_tensorrt_11():
    x, weight = ("x [profile 2].1_myl5", "-1,64", "BFloat16"), ("__mye1_dconst_myl5", "64,64", "BFloat16")
    line = line11("a/MatMul [profile 2]_myl5_3", "gemm", [x], [("y", "-1,64", "Float")], [weight])
    (layer,) = parse_layers([line])
    assert layer.name == "a/MatMul [profile 2]_myl5_3" and layer.profile == 2
    assert (layer.gemms, layer.operand_dtype, layer.outputs[0].dtype) == (1, "bf16", "fp32")
    assert layer.constants[0].shape == (64, 64)


def test_old_words_for_types():
    line = line10("a", "MatrixMultiply", [("x", "8,8", "Row major linear FP16 format")] * 2, [("y", "8,8", "Float")])
    assert parse_layers([line])[0].operand_dtype == "fp16"


@pytest.mark.parametrize("dtype, kind", [("Half", "fp16"), ("BFloat16", "bf16")])
def test_an_engine_of_tensorrt_10(dtype, kind):
    found = compared([reformat(), *engine10(dtype), reformat("Output Tensor 0 to head")], wanted())
    assert found.counts == {"fused_attention": LAYERS, f"{kind}_gemm": 6 * LAYERS}
    assert not found.wrong and not found.unsure


def test_a_second_partition_is_no_profile():
    """The head of the model in a partition of its own, and a reformat in none."""
    head = gemm10(9, "lm_head.dense", 1, 0)
    found = compared([*engine10(), head, reformat()], wanted())
    assert found.counts == {"fused_attention": LAYERS, "fp16_gemm": 6 * LAYERS + 1}
    assert not found.wrong and not found.unsure


@pytest.mark.parametrize("kind", ["gemm", "fusion"])
def test_quantized_gemms_of_tensorrt_10_are_fusions(kind):
    found = compared(engine10("Int8", kind), wanted(quantized={"int8": 6 * LAYERS}))
    assert found.counts["int8_gemm"] == 6 * LAYERS and not found.wrong and not found.unsure


def test_partitions_belong_to_the_profiles_that_they_name():
    """Profile 0 has partitions 0 and 1; profile 1 has 2 and 3, of which each names it once."""
    second = [
        *engine10(partition=2, profile=" [profile 1]"),
        gemm10(9, "lm_head", 3, 0).replace(" x,", " x [profile 1],"),
    ]
    found = compared([*engine10(), gemm10(9, "lm_head", 1, 0), *second], wanted(profiles=2))
    assert found.counts == {"fused_attention": LAYERS, "fp16_gemm": 6 * LAYERS + 1}
    assert not found.wrong and not found.unsure


def test_the_profile_with_the_fewest_fused_kernels_counts():
    second = [line for line in engine10(partition=1, profile=" [profile 1]") if "mha" not in line]
    found = compared([*engine10(), *second], wanted(profiles=2))
    assert found.counts["fp16_gemm"] == 6 * LAYERS and found.counts["fused_attention"] == 0
    assert not found.wrong and "0 fused attention layers" in found.unsure[0]


def test_a_listing_of_all_profiles_without_their_numbers():
    lines = [line for number in range(3) for line in engine10(partition=number)]
    found = compared(lines, wanted(profiles=3))
    assert found.counts["fused_attention"] == 3 * LAYERS and not found.wrong and not found.unsure
    assert compared(engine10(), wanted(profiles=3)).unsure == ("the layers of 1 of 3 profiles are listed",)


def softmax(number, partition=0, name="__myl_SlicReshMulAddMaxrSubExpSumDivMul"):
    scores = [("scores", "-1,-1,-1", "Float")]
    return line10(f"{name}_myl{partition}_{number}", "kgen", scores, scores, f"{name}_0x77", ["self_attn/Softmax"])


def test_a_softmax_in_a_kernel_of_its_own_is_certain():
    lines = [softmax(50 + i) if "mha" in line else line for i, line in enumerate(engine10())]
    found = compared(lines, wanted())
    assert found.wrong == (
        f"0 fused attention layers where the graph has {LAYERS} ({LAYERS} kernels compute a softmax alone)",
    )
    # Fused in one profile, and not in another that the listing does not tell apart.
    mixed = compared([*engine10(), *lines], wanted(profiles=2))
    assert "compute a softmax alone" in mixed.wrong[0]


def test_attention_of_an_unknown_kernel_is_not_certain():
    lines = [line.replace("_gemm_mha_v2", "__myl_Etc") for line in engine10()]
    found = compared(lines, wanted())
    assert not found.wrong and "0 fused attention layers" in found.unsure[0]
    assert "does not show" in listing_caveats(found)[0] and "0 fused attention layers" in listing_caveats(found)[0]
    assert listing_caveats(compared(engine10(), wanted())) == ()


def test_a_module_called_mha_is_no_fused_attention():
    (layer,) = parse_layers([gemm10(0, "mha_output", 0, 1).replace("layers.0.mha_output", "encoder/mha/output")])
    assert not layer.is_fused_attention and layer.gemms == 1


def test_gemms_in_fp32():
    found = compared(engine10("Float"), wanted(fp32=1))
    assert found.wrong == (f"{6 * LAYERS} GEMMs in FP32 where the graph has 1",)
    pooling = line10(
        "pool/MatMul_myl0_90",
        "gemm",
        [("m", "-1,1,-1", "Float"), ("h", "-1,-1,64", "Float")],
        [("s", "-1,64", "Float")],
    )
    assert not compared([*engine10(), pooling], wanted(fp32=1)).wrong
    assert compared([*engine10(), pooling, pooling], wanted(fp32=1)).wrong


def test_quantized_gemms_that_run_in_16_bits_are_certain():
    lines = engine10("Int8")
    half = [line for line in engine10("Half") if "down_proj" in line]
    mixed = [line for line in lines if "down_proj" not in line]
    found = compared([*mixed, *half], wanted(quantized={"int8": 6 * LAYERS}))
    assert found.wrong == (f"{5 * LAYERS} int8 gemm layers where the graph has {6 * LAYERS}",)
    # The same count, where nothing says how the missing GEMMs are computed.
    found = compared(mixed, wanted(quantized={"int8": 6 * LAYERS}))
    assert not found.wrong and found.unsure == (f"{5 * LAYERS} int8 gemm layers where the graph has {6 * LAYERS}",)


def test_quantized_weights_alone_are_a_16_bit_gemm():
    line = gemm10(0, "mlp.down_proj", 0, 1).replace(
        "__mye7_dconst, Dimensions: [64,64], Format/Datatype: Half", "w, Dimensions: [64,64], Format/Datatype: Int8"
    )
    (layer,) = parse_layers([line])
    assert [tensor.dtype for tensor in layer.inputs] == ["fp16", "int8", "fp32"]
    assert layer.operand_dtype == "fp16"


def test_a_gemm_of_an_unknown_type_is_reported():
    line = gemm10(0, "mlp.down_proj", 0, 1).replace("Half", "UInt4")
    assert "1 GEMMs have a data type that is not known" in compared([*engine10(), line], wanted()).unsure


def test_names_alone_and_no_layers():
    names = ["Layers:", "_gemm_mha_v2_myl0_11", "mlp.down_proj/MatMul_myl0_12", "", "Bindings:", "input_ids"]
    layers = parse_layers(names)
    assert layers == [Layer("_gemm_mha_v2_myl0_11"), Layer("mlp.down_proj/MatMul_myl0_12")]
    found = compare_layers(layers, wanted())
    assert found.counts == {"fused_attention": 1} and not found.wrong
    assert "2 layers by name alone" in found.unsure[0] and "1 fused attention" in found.unsure[1]
    assert compare_layers([], wanted()).unsure == ("TensorRT lists no layers",)


def test_the_inspector_is_asked_for_lines():
    class Inspector:
        def get_engine_information(self, form):
            return f"{form}\nsecond"

    class Trt:
        class LayerInformationFormat:
            ONELINE = "one line"

    class Engine:
        create_engine_inspector = staticmethod(Inspector)

    assert inspector_lines(Trt, Engine()) == ["one line", "second"]


# Sums in 8 bits that are stored before they are scaled.


def sums(dtype="Int8", output="Half", alpha="__mye7q_proj/MatMul_alpha_myl0", then="MulAdd", inner=64):
    """A GEMM of TensorRT-RTX, and the kernel that reads its output."""
    gemm = line11(
        "q_proj/MatMul_U88_myl0_2",
        "gemm",
        [("x.1_myl0", f"-1,{inner}", dtype)],
        [("__mye9_myl0", "-1,64", output)],
        [("__mye5_dconst_myl0", f"{inner},64", dtype), (alpha, "1", "Float"), ("__mye8_beta_myl0", "1", "Float")],
    )
    reader = line11(f"__myl_{then}_myl0_3", "kgen", [("__mye9_myl0", "-1,64", output)], [("z", "-1,64", "Half")])
    return overflowing_sums(parse_layers([gemm, reader]))


@pytest.mark.parametrize("dtype", ["Int8", "FP8"])
@pytest.mark.parametrize("then", ["MulAdd", "CastMulAddReshCast", "SlicConcReshMulAddTran", "MulReshSlicCastDivErf"])
def test_unscaled_sums_in_fp16_can_overflow(dtype, then):
    assert sums(dtype, then=then) == ["q_proj/MatMul_U88_myl0_2"]


def test_sums_that_cannot_overflow():
    assert not sums(output="Float") and not sums(output="BFloat16"), "the output holds every sum"
    assert not sums(alpha="__mye52975_myl0"), "alpha is the scale"
    assert not sums(then="SlicCastDivErfAddMul"), "nothing is left to scale"
    assert not sums("Half"), "16-bit factors have been scaled"
    assert not sums("Int8", inner=4) and sums("Int8", inner=5), "4 * 127 * 127 = 64,516"
    assert sums("FP8", inner=1), "448 * 448 = 200,704"


def test_unscaled_sums_in_tensorrt_10():
    gemm = gemm10(0, "mlp.down_proj", 0, 7, "Int8")
    reader = line10("__myl_MulAdd_myl0_8", "kgen", [("y7", "-1,64", "Half")], [("z", "-1,64", "Half")])
    assert overflowing_sums(parse_layers([gemm, reader])) == ["layers.0.mlp.down_proj/MatMul_myl0_7"]
    assert not overflowing_sums(parse_layers([gemm])), "no kernel scales them"
